"""From a pretrained model and noisy labels to a diagnosis, in Python and on the command line."""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from checkpoints import save_base
from cleanlab.rank import get_label_quality_scores
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from PIL import Image as Picture

from hf_robust_ft import (
    Diagnosis,
    RobustTrainingArguments,
    TransitionEstimate,
    corrupt_dataset,
    corrupt_labels,
    crossfit,
    diagnose,
    frozen_features,
    load_transition,
    noise_shape,
    pair_flip_transition,
    rank_suspects,
    symmetric_transition,
)
from hf_robust_ft.cli import main
from hf_robust_ft.diagnosis import SHAPES, _shape
from hf_robust_ft.estimation.verdict import noise_level
from hf_robust_ft.raw_examples import load_backbone, load_processor, model_inputs
from hf_robust_ft.recommendation import as_code, as_flags, radius_for, recommend

NAMES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random BERT and a tokenizer of 50 words."""
    return save_base(tmp_path_factory.mktemp("text_model"))


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image_model")
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    torch.manual_seed(0)
    tiny.vit(num_channels=3).save_pretrained(folder)
    return folder


def texts(examples: int = 300, transition: Any = None, seed: int = 0) -> Dataset:
    """Sentences of words that tell the class, of several lengths, with labels corrupted by T."""
    rng = np.random.default_rng(seed)
    labels = np.arange(examples) % 3
    sentences = [" ".join(f"w{2 + 16 * y + w}" for w in rng.integers(0, 16, rng.integers(3, 9))) for y in labels]
    features = Features({"text": Value("string"), "label": ClassLabel(names=NAMES)})
    clean = Dataset.from_dict({"text": sentences, "label": labels}, features=features)
    return corrupt_dataset(clean, np.eye(3) if transition is None else transition, seed)


@pytest.fixture(scope="module")
def flipped(text_model: Path) -> tuple[Dataset, Diagnosis]:
    data = texts(transition=pair_flip_transition(3, 0.3))
    return data, diagnose(text_model, data, text_column="text")


def test_pair_flips_are_found_and_their_suspects(flipped: tuple[Dataset, Diagnosis]) -> None:
    data, found = flipped
    assert found.classes == ("ant", "bee", "cat")
    assert found.shape == "pair_flip"
    assert found.identifiable
    low, high = found.estimate.noise_rate_interval
    wrong = np.array(data["label"][:]) != np.array(data["clean_label"][:])
    assert low < wrong.mean() < high
    assert found.seconds.keys() == {"load model", "features", "estimate T", "rank suspects"}
    first = np.argsort(found.suspect_rank)[: wrong.sum()]
    assert wrong[first].mean() > 0.8
    assert (found.suggested_label == np.array(data["clean_label"][:])).mean() > 0.8
    assert found.arguments["noise_transition"] == "estimate"
    text = str(found)
    assert "pair flips" in text
    assert "ant -> bee" in text
    assert "noise_transition" in text


def test_the_data_set_gets_columns(flipped: tuple[Dataset, Diagnosis]) -> None:
    data, found = flipped
    annotated = found.annotate(data)
    assert annotated.column_names == [*data.column_names, "suspect_score", "suspect_rank", "suggested_label"]
    assert annotated.features["suggested_label"].names == NAMES
    assert sorted(annotated["suspect_rank"][:]) == list(range(1, len(data) + 1))
    ranked = annotated.sort("suspect_rank")["suspect_score"][:]
    assert ranked == sorted(ranked, reverse=True)
    with pytest.raises(ValueError, match=r"has a column 'suspect_score' already; remove it"):
        found.annotate(annotated)
    with pytest.raises(ValueError, match=r"dataset has 5 rows, but row 299 was diagnosed; give the same data set"):
        found.annotate(data.select(range(5)))
    shuffled = data.shuffle(seed=1)
    others = int((np.array(shuffled["label"][:]) != found.labels).sum())
    with pytest.raises(ValueError, match=f"differs from the labels diagnosed in {others} of 300 rows.*not shuffled"):
        found.annotate(shuffled)


def test_it_is_kept_in_files(flipped: tuple[Dataset, Diagnosis], tmp_path: Path) -> None:
    _, found = flipped
    saved = found.save(tmp_path / "out")
    loaded = Diagnosis.load(tmp_path / "out")
    assert loaded.summary() == saved.summary()
    for name in ("rows", "labels", "suspect_score", "suspect_rank", "suggested_label"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(found, name))
    assert str(loaded) == str(saved)
    assert (tmp_path / "out" / "T.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "out" / "suspects.csv").read_text(encoding="utf-8").splitlines()))
    assert [int(row["row"]) for row in rows] == found.rows[found.suspects].tolist()
    assert all(row["label"] != row["suggested_label"] for row in rows)
    # The recommendation is one that training takes.
    arguments = RobustTrainingArguments(str(tmp_path), **saved.arguments)
    read = load_transition(arguments.noise_transition, 3)
    np.testing.assert_allclose(read, found.estimate.transition, rtol=0, atol=1e-12)
    parser = transformers.HfArgumentParser(RobustTrainingArguments)
    (parsed,) = parser.parse_args_into_dataclasses(shlex.split(as_flags(saved.arguments)))
    assert {name: getattr(parsed, name) for name in saved.arguments} == saved.arguments
    assert eval(f"dict({as_code(saved.arguments)})") == saved.arguments


def test_files_of_older_versions_do_not_tell_the_label_column(
    flipped: tuple[Dataset, Diagnosis], tmp_path: Path
) -> None:
    data, found = flipped
    assert found.label_column == "label"
    found.save(tmp_path)
    content = json.loads((tmp_path / "diagnosis.json").read_text())
    del content["label_column"]
    (tmp_path / "diagnosis.json").write_text(json.dumps(content))
    old = Diagnosis.load(tmp_path)
    assert old.label_column is None
    annotated = old.annotate(data.rename_column("label", "kind"))
    assert annotated["suspect_rank"][:] == found.suspect_rank.tolist()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "is not JSON"),
        ('{"format": 1}', "holds no diagnosis"),
        (
            '{"format": "hf_robust_ft.Diagnosis/1", "examples": {}, "suspects": 0, "classes": [], "estimate": {}}',
            "holds no diagnosis .examples is no object with the keys rows, ",
        ),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: str, match: str) -> None:
    (tmp_path / "diagnosis.json").write_text(content)
    with pytest.raises(ValueError, match=match):
        Diagnosis.load(tmp_path)


def test_clean_labels_need_nothing(text_model: Path) -> None:
    found = diagnose(text_model, texts(), text_column="text")
    assert found.shape == "none"
    assert found.arguments == {}
    assert "plain fine-tuning is enough" in str(found)
    assert len(found.suspects) < 10


def test_rows_without_a_label_and_beyond_max_examples_are_left_out(text_model: Path) -> None:
    data = texts(200, symmetric_transition(3, 0.3)).remove_columns("clean_label")
    labels = np.array(data["label"][:])
    labels[::10] = -100
    data = data.remove_columns("label").add_column("label", labels)
    found = diagnose(text_model, data, max_examples=120)
    assert len(found.rows) == 120
    assert not (found.rows % 10 == 0).any()
    np.testing.assert_array_equal(found.labels, labels[found.rows])
    annotated = found.annotate(data)
    assert sum(score is None for score in annotated["suspect_score"][:]) == 80


def test_a_loaded_model_words_as_labels_and_pairs(text_model: Path) -> None:
    data = texts(150, symmetric_transition(3, 0.3))
    words = [NAMES[k] for k in data["label"][:]]
    data = Dataset.from_dict({"first": data["text"][:], "second": data["text"][:], "label": words})
    tokenizer = transformers.AutoTokenizer.from_pretrained(text_model)
    model = tiny.bert().train()
    found = diagnose(model, data, text_column=["first", "second"], processing_class=tokenizer)
    assert found.classes == tuple(NAMES)
    assert model.training
    assert "suspect_score" in found.annotate(data).column_names
    with pytest.raises(ValueError, match="label_column 'label' of dataset differs"):
        found.annotate(data.select(range(149, -1, -1)))
    with pytest.raises(ValueError, match="processing_class is None; a loaded model needs"):
        diagnose(model, data, text_column="first")


def test_a_decoder_whose_tokenizer_has_no_pad_token(text_model: Path, tmp_path: Path) -> None:
    words = transformers.AutoTokenizer.from_pretrained(text_model).backend_tokenizer
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", eos_token="w49", padding_side="left"
    )
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = tiny.gpt2()
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path)
    # Texts of several lengths, some of which end with the token that pads.
    data = Dataset.from_dict({"text": ["w2", "w3 w4 w49", "w5 w6 w7 w8 w9", "w49 w49"], "label": [0, 1, 2, 0]})
    loaded, processor = load_backbone(tmp_path, "text", 3)
    found = frozen_features(loaded, model_inputs(data, "text", ["text"], processor, None, range(4)))
    alone = frozen_features(loaded, (tokenizer(text, return_tensors="pt") for text in data["text"][:]))
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)
    # A fine-tuned classifier looks for its last token by the pad token: that of its tokenizer stays.
    assert load_processor(tmp_path, "text").pad_token is None
    assert diagnose(tmp_path, texts(60), text_column="text").shape in SHAPES


def photos(folder: Path, examples: int = 90) -> None:
    """An imagefolder: the brightness tells the class; of every fifth image the folder is the next class's."""
    rng = np.random.default_rng(0)
    for k in range(examples):
        label = (k % 3 + (k % 5 == 0)) % 3
        path = folder / NAMES[label] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.clip(rng.normal(60 + 70 * (k % 3), 10, (8, 8, 3)), 0, 255).astype(np.uint8)
        Picture.fromarray(pixels).save(path)


def test_the_command_line_in_a_process_of_its_own(image_model: Path, tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    command = [sys.executable, "-m", "hf_robust_ft", "diagnose", str(image_model), "photos", "--image-size", "8"]
    done = subprocess.run([*command, "--output", "out", "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["classes"] == NAMES
    assert len(Diagnosis.load(tmp_path / "out").rows) == 90
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "diagnosis.json", "transition_estimate.json", "suspects.csv", "T.png",
    }  # fmt: skip


@pytest.mark.parametrize("ending", ["parquet", "csv", "json"])
def test_files_that_it_reads(text_model: Path, tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = texts(90, symmetric_transition(3, 0.3)).remove_columns("clean_label")
    getattr(data, f"to_{ending}")(tmp_path / f"data.{ending}")
    assert main(["diagnose", str(text_model), str(tmp_path / f"data.{ending}"), "--output", str(tmp_path / "o")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("90 examples of 3 classes")
    assert "Written to" in printed


def test_a_csv_of_file_names(image_model: Path, tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    paths = sorted((tmp_path / "photos").rglob("*.png"))
    lines = ["picture,kind", *(f"{path},{path.parent.name}" for path in paths)]
    (tmp_path / "data.csv").write_text("\n".join(lines))
    words = [str(image_model), str(tmp_path / "data.csv"), "--image-column", "picture", "--label-column", "kind"]
    assert main(["diagnose", *words]) == 0


def test_help_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["diagnose", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "exit codes" in printed
    assert "--image-size" in printed


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["nowhere.csv"], "data 'nowhere.csv' does not exist; check the path"),
        (["./nowhere"], "data './nowhere' does not exist"),
        (["notes.txt"], "data 'notes.txt' ends in '.txt'; give one of .parquet, .csv, .json, .jsonl"),
        (["data.csv", "--label-column", "kind"], "label_column 'kind' is not among the columns ['text', 'label']"),
        (["no-such-name"], "data 'no-such-name' is neither a file or folder here nor a data set that the Hub gives"),
    ],
)
def test_bad_input_ends_with_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    match: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("notes")
    Path("data.csv").write_text("text,label\na,0\nb,1\n")
    assert main(["diagnose", "no-such-model", *words]) == 2
    printed = capsys.readouterr()
    assert match in printed.err
    assert printed.out == ""


@pytest.mark.parametrize("words", [[], ["diagnose"], ["diagnose", "m", "d", "--max-examples", "0"], ["cure"]])
def test_wrong_arguments_end_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "usage: hf-robust-ft" in capsys.readouterr().err


def with_labels(labels: list[Any], feature: Any = None) -> Dataset:
    features = None if feature is None else Features({"text": Value("string"), "label": feature})
    return Dataset.from_dict({"text": ["w2 w3"] * len(labels), "label": labels}, features=features)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (texts(30).remove_columns("label"), r"label_column 'label' is not among the columns \['text', 'clean_label'\]"),
        (with_labels([[0.1, 0.9]] * 40), "looks like soft or multi-label targets"),
        (with_labels([0.5, 1.5] * 40), "looks like a regression target"),
        (with_labels([0, 1, None] * 40), "lacks a value in 40 of 120 rows; drop them"),
        (with_labels([0, 2] * 40), "hold no example of class 1 .of 3.*add examples of them.*named: 1"),
        (with_labels([0, 2] * 40, ClassLabel(names=NAMES)), "hold no example of class 1.*named: bee"),
        (with_labels([0, 1, 2] * 9), "27 labelled examples of 3 classes; a diagnosis needs at least 10 a class, 30"),
        (with_labels([0, -1, 1] * 40), "label -1 lies outside"),
        (with_labels(["one"] * 40), "num_classes is 1"),
        (with_labels([-100] * 40), "are empty"),
        (with_labels([0, 1, 10**12] * 40), "holds the number 1000000000000, which looks like an id; name the column"),
        (with_labels([0, 1, 20_000] * 40), "num_classes is 20001, and label_column 'label' reach 20000; a transition"),
        (texts(30).to_iterable_dataset(), "dataset is of type IterableDataset; give a datasets.Dataset.*streaming"),
        (DatasetDict(train=texts(30)), "dataset is of type DatasetDict; give a datasets.Dataset.*one split"),
        (texts(60).add_column("other", ["w2"] * 60), "0 of images and 2 of texts.*set image_column or text_column"),
    ],
)
def test_data_that_can_not_be_diagnosed(text_model: Path, data: Dataset, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        diagnose(text_model, data)


def test_columns_that_contradict(text_model: Path) -> None:
    with pytest.raises(ValueError, match="are both given; give one"):
        diagnose(text_model, texts(60), text_column="text", image_column="text")
    with pytest.raises(ValueError, match="text_column 'nothing' is not among the columns"):
        diagnose(text_model, texts(60), text_column="nothing")
    with pytest.raises(ValueError, match=r"text_column 'clean_label' holds no texts but ClassLabel.*cast_column"):
        diagnose(text_model, texts(60), text_column=["text", "clean_label"])


@pytest.mark.parametrize("most", [-5, 0])
def test_no_examples_are_refused(text_model: Path, most: int) -> None:
    with pytest.raises(ValueError, match=f"max_examples is {most}; give a whole number from 1 on, or None for all"):
        diagnose(text_model, texts(60), text_column="text", max_examples=most)


def test_a_missing_image_is_refused(image_model: Path) -> None:
    pictures = [Picture.new("RGB", (8, 8), (k, k, k)) if k != 40 else None for k in range(60)]
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    data = Dataset.from_dict({"image": pictures, "label": [k % 3 for k in range(60)]}, features=features)
    remedy = r"drop such rows: (dataset.filter\(lambda row: row\['image'\] is not None\))"
    with pytest.raises(ValueError, match=f"image_column 'image' lacks the image in a row; {remedy}") as refused:
        diagnose(image_model, data)
    kept = eval(re.search(remedy, str(refused.value))[1], {"dataset": data})  # type: ignore[index]
    assert len(diagnose(image_model, kept).rows) == 59


def test_models_that_can_not_diagnose(text_model: Path, image_model: Path, tmp_path: Path) -> None:
    data = texts(60)
    with pytest.raises(OSError, match="nowhere"):
        diagnose(tmp_path / "nowhere", data, text_column="text")
    with pytest.raises(ValueError, match=r"can't be loaded to classify texts.*Give a pretrained text model"):
        diagnose(image_model, data, text_column="text")
    tokenizer = transformers.AutoTokenizer.from_pretrained(text_model)
    with pytest.raises(ValueError, match=r"has no backbone beneath its head \(base_model\)"):
        diagnose(tiny.bert().base_model, data, text_column="text", processing_class=tokenizer)
    with pytest.raises(ValueError, match="problem_type is 'regression'"):
        diagnose(tiny.bert(problem_type="regression"), data, text_column="text", processing_class=tokenizer)


def test_the_heat_map_is_left_out_without_matplotlib(
    flipped: tuple[Dataset, Diagnosis],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    flipped[1].save(tmp_path)
    assert not (tmp_path / "T.png").exists()
    assert "matplotlib is missing: pip install 'hf-robust-ft[recipes]'" in caplog.text


def _gaussians(examples: int, transition: Any, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    classes = len(transition)
    truth = rng.integers(0, classes, examples)
    features = 2.5 * np.eye(classes)[truth] + rng.normal(size=(examples, classes))
    return features, truth, corrupt_labels(truth, transition, seed)


@pytest.mark.parametrize(
    "transition", [symmetric_transition(4, 0.3), pair_flip_transition(4, 0.4)], ids=["sym", "pair"]
)
def test_suspects_are_ranked_as_by_the_exact_posterior(transition: np.ndarray) -> None:
    x, truth, noisy = _gaussians(4000, transition, 0)
    found = rank_suspects(x, noisy, transition)
    clean = np.exp(2.5 * x)  # equal variances and priors: linear logits
    exact = clean * transition.T[noisy]
    exact /= exact.sum(axis=1, keepdims=True)
    rows = np.arange(len(x))
    assert np.abs(found.score - (1 - exact[rows, noisy])).mean() < 0.03
    assert (found.suggested == exact.argmax(axis=1)).mean() > 0.97
    wrong = noisy != truth
    assert found.score.mean() == pytest.approx(wrong.mean(), abs=0.02)
    order = np.argsort(found.rank)
    assert (np.diff(found.score[order]) <= 0).all()
    # What cleanlab is usually given ranks worse, and pair flips hardly at all.
    usual = get_label_quality_scores(noisy, crossfit(x, noisy, 4).probabilities)
    ours, theirs = (wrong[o[: wrong.sum()]].mean() for o in (order, np.argsort(usual)))
    assert ours >= theirs - 0.01
    if transition[0, 1] == 0.4:
        assert theirs < 0.7 < 0.85 < ours


def test_labels_that_the_matrix_rules_out_stand() -> None:
    x, _, noisy = _gaussians(200, np.eye(3), 0)
    found = rank_suspects(x, noisy, np.eye(3))
    assert (found.score == 0).all()
    np.testing.assert_array_equal(found.suggested, noisy)
    with pytest.raises(ValueError, match="noise_transition has shape"):
        rank_suspects(x, noisy, np.ones((2, 3)))


def _between(classes: int, *mistakes: tuple[int, int, float]) -> np.ndarray:
    matrix = np.eye(classes)
    for i, j, rate in mistakes:
        matrix[i, i] -= rate
        matrix[i, j] += rate
    return matrix


@pytest.mark.parametrize(
    ("transition", "name"),
    [
        (symmetric_transition(10, 0.3), "symmetric"),
        (symmetric_transition(2, 0.3), "symmetric"),
        (pair_flip_transition(10, 0.3), "pair_flip"),
        (pair_flip_transition(3, 0.3), "pair_flip"),
        (0.9 * pair_flip_transition(10, 0.4) + 0.1 * symmetric_transition(10, 0.4), "pair_flip"),
        (_between(10, (0, 1, 0.4), (1, 0, 0.2), (5, 7, 0.3)), "particular_classes"),
        (np.diag([0.9, 0.5, 0.7, 0.6]) + (np.ones((4, 4)) - np.eye(4)) * np.array([[0.1], [0.5], [0.3], [0.4]]) / 3,
         "symmetric"),
        (_between(4, (0, 1, 0.3), (0, 2, 0.3), (0, 3, 0.3), (1, 2, 0.25), (1, 3, 0.25), (2, 3, 0.3)),
         "class_dependent"),
        (_between(2, (0, 1, 0.3)), "class_dependent"),
    ],
)  # fmt: skip
def test_shapes_have_names(transition: np.ndarray, name: str) -> None:
    found = noise_shape(transition, np.full(len(transition), 1 / len(transition)))
    assert found.name == name
    assert 0.75 <= found.explained <= 1


@pytest.mark.parametrize("rarest", [1.0, 0.2, 0.05])
def test_a_few_wrong_labels_of_every_class_change_no_name(rarest: float) -> None:
    """Tables of counts, as good as estimates get: each class with 2 % of other mistakes and errors of its own."""
    prior = np.geomspace(1, rarest, 10)
    prior /= prior.sum()
    most = _between(10, *((i, i + 1, 0.4) for i in range(8)))
    for truth, name in (
        (pair_flip_transition(10, 0.4), "pair_flip"),
        (_between(10, (3, 5, 0.4), (5, 3, 0.4)), "particular_classes"),
        (most, "particular_classes"),
    ):
        rng, found = np.random.default_rng(0), []
        for _ in range(100):
            rows = [rng.multinomial(int(1000 * p), 0.98 * row + 0.002) for p, row in zip(prior, truth, strict=True)]
            counts = np.array(rows) + 0.1
            found.append(noise_shape(counts / counts.sum(axis=1, keepdims=True), prior).name)
        assert found.count(name) >= 98, (name, found)


def test_recommendations_follow_what_was_measured(flipped: tuple[Dataset, Diagnosis]) -> None:
    measured: TransitionEstimate = replace(flipped[1].estimate, n=3000)

    def with_rate(rate: float, error: float = 0.01, **changes: Any) -> TransitionEstimate:
        interval = (max(0.0, rate - 2 * error), rate + 2 * error)
        return replace(measured, noise_rate=rate, noise_rate_interval=interval, **changes)

    radius = {"layer_radius": 0.01, "radius_mode": "relative"}
    assert recommend(with_rate(0.03), False, 0.01).arguments == {}
    # So much is what clean labels look like, at few examples.
    assert noise_level(0.09, (0.07, 0.11), 90, 3) == "none"
    assert noise_level(0.09, (0.07, 0.11), 3000, 3) == "noise"
    assert recommend(with_rate(0.10, 0.05), False, 0.01).arguments == radius
    posterior = {"noise_transition": "estimate", "loss_correction": "posterior", **radius}
    assert recommend(with_rate(0.3), False, 0.01).arguments == posterior
    found = recommend(with_rate(0.3), True, 0.01)
    assert found.arguments == posterior
    assert "an average T" in found.reason
    singular = recommend(with_rate(0.3, singular_value_interval=(0.0, 0.2)), False, 0.01)
    assert singular.arguments == posterior
    assert "may be singular" in singular.reason
    chance = recommend(with_rate(0.66, singular_value_interval=(0.0, 0.2)), False, 0.01)
    assert chance.arguments == {"loss_correction": "gce", **radius}
    assert "hardly better than chance" in chance.reason
    # Nine of ten examples are of one class: labels are right less often than that, and T is known well.
    rare = with_rate(0.3, singular_value_interval=(0.3, 0.5), clean_prior=np.array([0.9, 0.05, 0.05]))
    assert recommend(rare, False, 0.01).arguments == posterior


def test_example_dependence_needs_an_effect_and_examples(flipped: tuple[Dataset, Diagnosis]) -> None:
    dependent = replace(flipped[1].estimate, n=3000, class_conditional_p_value=0.01, class_conditional_effect=0.15)
    assert _shape(dependent) == ("example_dependent", 1.0)
    for changes in ({"n": 290}, {"class_conditional_effect": 0.05}, {"class_conditional_p_value": 0.2}):
        assert _shape(replace(dependent, **changes))[0] == "pair_flip"


def test_the_radius_suits_the_model() -> None:
    assert radius_for(["vit.layers.0.mlp.fc1.weight"], text=False) == 0.01
    assert radius_for(["bert.encoder.layer.0.output.dense.weight"], text=True) == {"*layer*": 0.02}
    assert radius_for(["transformer.h.0.mlp.c_fc.weight"], text=True) == 0.02


@pytest.mark.real
def test_real_images(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    model, file = root / ".assets/models/dinov2-small", root / "../shared/data/fashion-mnist/train.parquet"
    if not (model.is_dir() and file.is_file()):
        pytest.skip("needs .assets/models and ../shared/data")
    clean = load_dataset("parquet", data_files=str(file), split="train").select(range(800))
    assert isinstance(clean.features["image"], Image)
    data = corrupt_dataset(clean, symmetric_transition(10, 0.4), 0)
    found = diagnose(model, data)
    assert found.shape == "symmetric"
    wrong = found.labels != np.array(data["clean_label"][:])
    assert wrong[np.argsort(found.suspect_rank)[: wrong.sum()]].mean() > 0.75

"""``hf-robust-ft measure`` and ``card``: any fine-tuned classifier, from a folder to its report and card."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from checkpoints import (
    NAMES,
    finetune,
    move,
    save_base,
    save_image_models,
    save_images,
    save_lora,
    save_tokenizer,
    texts,
)
from datasets import ClassLabel, Dataset, Value
from huggingface_hub import ModelCard
from scipy.stats import beta

from hf_robust_ft import (
    CardData,
    HessianReport,
    ReferenceMismatch,
    clean_accuracy,
    finetuned_measurement,
    measure_hessian,
    read_card,
    symmetric_transition,
)
from hf_robust_ft.base_model import freeze_unmoved, read_reference
from hf_robust_ft.card.readme import BEGIN, END, with_section
from hf_robust_ft.card.write import MARK
from hf_robust_ft.cli import main
from hf_robust_ft.model_labels import model_labels

FILES = {"hessian_report.json", "robust_card.json", "README.md", "plots"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetune(base, tmp_path_factory.mktemp("tuned"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.parquet and test.parquet."""
    folder = tmp_path_factory.mktemp("data")
    texts(24).to_parquet(folder / "train.parquet")
    texts(30, seed=1).to_parquet(folder / "test.parquet")
    return folder


def words(model: Path, base: Path | None, data: Path, output: Path | None, *more: str) -> list[str]:
    """A measurement without Lanczos."""
    return [
        "measure", str(model), *([] if base is None else ["--reference", str(base)]),
        "--dataset", str(data / "train.parquet"), "--time-budget", "0",
        *([] if output is None else ["--output", str(output)]), *more,
    ]  # fmt: skip


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


# What is measured


def test_a_measurement_is_that_of_the_library(base: Path, tuned: Path, data: Path, tmp_path: Path) -> None:
    assert main(words(tuned, base, data, tmp_path / "out")) == 0
    found = HessianReport.load(tmp_path / "out" / "hessian_report.json")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tuned)
    start = transformers.AutoModel.from_pretrained(base)
    reference = {f"bert.{name}": weight for name, weight in start.state_dict().items()}
    reference["classifier.weight"] = torch.zeros_like(model.classifier.weight)
    rows = Dataset.from_parquet(str(data / "train.parquet"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tuned)
    batch = {**tokenizer(rows["text"][:], padding=True, return_tensors="pt"), "labels": torch.tensor(rows["label"][:])}
    expected = measure_hessian(model, reference, [batch], time_budget=0)
    assert found.examples == 24
    assert [layer.name for layer in found.layers] == [layer.name for layer in expected.layers]
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert one.distance == pytest.approx(other.distance, rel=1e-5)
        # In float32, and on a GPU where there is one.
        assert one.upper.maximum == pytest.approx(other.upper.maximum, rel=1e-3, abs=1e-6)
    assert found.losses.mean == pytest.approx(expected.losses.mean, rel=1e-5)


def test_it_writes_report_card_and_pictures(
    base: Path, tuned: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--eval-dataset", str(data / "test.parquet")]
    assert main(words(tuned, base, data, tmp_path, "--examples", "12", *more)) == 0
    printed = capsys.readouterr()
    assert "12 of 24 measured" in printed.out
    assert "Lanczos settled no layer within its time" in printed.out
    assert "Gap         " in printed.out
    assert f"Written to {tmp_path}: hessian_report.json, robust_card.json, plots/bounds.png" in printed.out
    assert "sound bounds of " in printed.err  # what it takes, before it starts
    assert written(tmp_path) == FILES
    card, report, _ = read_card(tmp_path)
    assert report is not None
    assert report.examples == 12
    assert (card.base_model, card.training_examples) == (str(base), 24)
    assert card.tasks == ["text-classification"]
    assert [risk.data for risk in card.risks] == ["training", "eval"]
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert MARK in text
    assert "Whether training constrained layers is not known." in text
    assert "hf-robust-ft measure" in text
    assert "classifier.weight, which they lack" in text  # what follows is cut off where the name of a folder is long
    metadata = ModelCard.load(tmp_path / "README.md").data
    assert metadata.library_name == "transformers"
    assert "generated_from_trainer" not in metadata.tags
    assert {result.metric_type for result in metadata.eval_results} >= {"accuracy", "hessian_total"}


def test_the_error_of_evaluation_data_gets_a_certificate(base: Path, tuned: Path, data: Path, tmp_path: Path) -> None:
    assert main(words(tuned, base, data, tmp_path, "--eval-dataset", str(data / "test.parquet"))) == 0
    card = read_card(tmp_path)[0]
    error = card.risks[1].error
    assert error is not None
    (bound,) = [bound for bound in card.bounds if bound.name == "held-out, eval"]
    assert bound.kind == "certificate"
    assert bound.bounds_what == "error on labels as given"
    wrong = round(30 * error)
    assert bound.value == pytest.approx(beta.ppf(0.95, wrong + 1, 30 - wrong))
    assert card.metrics == {"eval_accuracy": pytest.approx(1 - error), "eval_loss": card.risks[1].loss}


def test_noise_of_the_training_labels(base: Path, tuned: Path, data: Path, tmp_path: Path) -> None:
    more = ["--noise-transition", "0.3", "--eval-dataset", str(data / "test.parquet")]
    assert main(words(tuned, base, data, tmp_path / "given", *more)) == 0
    for said in ("clean", "noisy"):
        assert main(words(tuned, base, data, tmp_path / said, *more, "--eval-labels", said)) == 0
    given, clean, noisy = (read_card(tmp_path / name)[0] for name in ("given", "clean", "noisy"))
    for card in (given, clean, noisy):
        assert card.noise_rate == pytest.approx(0.3)
        assert card.noise_source == "symmetric noise of rate 0.3, as given"
        assert (card.risks[0].labels, card.risks[0].corrected) == ("noisy", True)
        assert {bound.bounds_what for bound in card.bounds if bound.name.startswith("Hessian")} == {
            "expected loss on clean labels"
        }
    assert [card.risks[1].labels for card in (given, clean, noisy)] == ["as given", "clean", "noisy"]
    certified = [[b.bounds_what for b in card.bounds if b.name == "held-out, eval"] for card in (given, clean)]
    assert certified == [["error on labels as given"], ["error on clean labels"]]
    error = noisy.risks[1].error
    assert error is not None
    wrong = torch.arange(30) < round(30 * error)
    expected = clean_accuracy(wrong.long().numpy(), [0] * 30, symmetric_transition(3, 0.3))
    (bound,) = [bound for bound in noisy.bounds if bound.name == "held-out, eval"]
    assert bound.terms["error"] == pytest.approx(1 - expected.accuracy)
    assert noisy.metric_labels == {"eval": "noisy"}
    assert "corrected by" not in (tmp_path / "noisy" / "README.md").read_text(encoding="utf-8")


def test_noisy_evaluation_labels_need_a_transition(
    base: Path, tuned: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--eval-dataset", str(data / "test.parquet"), "--eval-labels", "noisy"]
    assert main(words(tuned, base, data, tmp_path / "out", *more)) != 0
    assert "eval_labels is 'noisy', but noise_transition is not given" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_classes_go_by_their_names(base: Path, data: Path, tmp_path: Path) -> None:
    """One model with classes in two orders, its head's rows with them, on one data set."""
    order = [2, 0, 1]
    finetune(base, tmp_path / "one", id2label=dict(enumerate(NAMES)))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "one")
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight[order].clone())
        model.classifier.bias.copy_(model.classifier.bias[order].clone())
    model.config.id2label = {k: NAMES[order[k]] for k in range(3)}
    model.save_pretrained(tmp_path / "other")
    save_tokenizer(tmp_path / "other")
    words_file = tmp_path / "words"
    words_file.mkdir()
    rows = texts(24)
    named = [NAMES[k] for k in rows["label"]]
    rows.remove_columns("label").add_column("label", named).to_parquet(words_file / "train.parquet")
    reports = []
    for folder, source in (("one", data), ("other", data), ("other", words_file)):
        assert main(words(tmp_path / folder, base, source, tmp_path / "out")) == 0
        reports.append(HessianReport.load(tmp_path / "out" / "hessian_report.json"))
    for report in reports[1:]:
        assert report.losses.mean == pytest.approx(reports[0].losses.mean, rel=1e-5)


def test_labels_are_numbers_of_the_model() -> None:
    model = tiny.bert()
    rows = texts(3)
    assert model_labels(rows, "label", model, "the data").tolist() == [0, 1, 2]
    model.config.id2label = {0: "cat", 1: "ant", 2: "bee"}
    assert model_labels(rows, "label", model, "the data").tolist() == [1, 2, 0]
    unlabelled = rows.map(lambda row, k: {"label": -100 if k == 1 else row["label"]}, with_indices=True)
    assert model_labels(unlabelled, "label", model, "the data").tolist() == [1, -100, 0]
    numbers = rows.cast_column("label", Value("int64"))
    assert model_labels(numbers, "label", model, "the data").tolist() == [0, 1, 2]


def test_other_names_go_by_number_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.bert()
    model.config.id2label = dict(enumerate(["A", "B", "C"]))
    assert model_labels(texts(3), "label", model, "the data").tolist() == [0, 1, 2]
    assert "go by number: the data name them ant, bee, cat, the model A, B, C" in caplog.text


def test_images_in_folders_with_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The base's head has five classes, the model's three: a new head."""
    base, tuned = save_image_models(tmp_path)
    photos = save_images(tmp_path / "photos", {"train": 12, "test": 6})
    given = ["measure", str(tuned), "--reference", str(base), "--dataset", str(photos), "--eval-split", "test"]
    assert main([*given, "--time-budget", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["examples"], found["training_examples"]) == (12, 12)
    assert found["hessian_total_lanczos"] <= found["hessian_total"]
    assert found["gap"] == pytest.approx(found["risks"][1]["loss"] - found["risks"][0]["loss"])
    assert found["reference"].endswith("classifier.weight, which they lack, from zero")
    assert [risk["n"] for risk in found["risks"]] == [12, 6]
    assert found["written"] == [
        "hessian_report.json", "robust_card.json", "plots/bounds.png", "plots/hessian_by_layer.png", "README.md"
    ]  # fmt: skip
    assert read_card(tuned)[0].classes == NAMES


# Adapters


def test_an_adapter_is_measured_as_the_model_that_it_makes(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    save_lora(base, tmp_path / "lora")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    merged = peft.PeftModel.from_pretrained(model, str(tmp_path / "lora")).merge_and_unload()
    merged.save_pretrained(tmp_path / "whole")
    save_tokenizer(tmp_path / "whole")
    assert main(words(tmp_path / "lora", None, data, None)) == 0  # the base model's tokenizer and weights
    assert "parameters are those of the reference, and count as frozen" in capsys.readouterr().err
    assert main(words(tmp_path / "whole", base, data, None)) == 0
    found, expected = (HessianReport.load(tmp_path / name / "hessian_report.json") for name in ("lora", "whole"))
    assert {layer.name for layer in found.layers} == {
        *(f"bert.encoder.layer.{i}.attention.self.{name}.weight" for i in (0, 1) for name in ("query", "value")),
        "classifier.weight",
    }
    assert [other.name for other in found.left_out] == ["classifier.bias"]
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert one.distance == pytest.approx(other.distance, rel=1e-5) != 0
        assert one.upper.maximum == pytest.approx(other.upper.maximum, rel=1e-4)
    card = read_card(tmp_path / "lora")[0]
    assert card.base_model == str(base)
    assert card.trained_parameters == 4 * 16 * 16 + 3 * 16 + 3


def test_an_adapter_whose_base_has_moved(base: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("peft")
    gone = tmp_path / "gone"
    shutil.copytree(base, gone)
    save_lora(gone, tmp_path / "lora")
    shutil.rmtree(gone)
    assert main(words(tmp_path / "lora", None, data, None)) == 2
    assert f"is an adapter of '{gone}', which can't be loaded" in capsys.readouterr().err
    assert main(words(tmp_path / "lora", base, data, None)) == 0


def test_an_adapter_without_peft(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    save_lora(base, tmp_path / "lora")
    before = written(tmp_path / "lora")
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(words(tmp_path / "lora", None, data, None)) == 2
    assert "is a PEFT adapter, which needs peft: pip install peft" in capsys.readouterr().err
    assert written(tmp_path / "lora") == before


def test_adapters_that_do_not_fit(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    save_lora(base, tmp_path / "lora")
    config = tmp_path / "lora" / "adapter_config.json"
    content = json.loads(config.read_text())
    other = save_base(tmp_path / "other", hidden_size=32)
    config.write_text(json.dumps({**content, "base_model_name_or_path": str(other)}))
    assert main(words(tmp_path / "lora", None, data, None)) == 2
    assert "is an adapter that can't be merged into the weights of" in capsys.readouterr().err
    config.write_text(json.dumps({**content, "base_model_name_or_path": None}))
    assert main(words(tmp_path / "lora", None, data, None)) == 2
    assert "is an adapter that names no base model; give it as the reference" in capsys.readouterr().err


# The reference


def test_layers_that_have_not_moved_count_as_frozen(base: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    weights, described = read_reference(model, base)
    assert described == f"the weights of {base}; classifier.weight, which they lack, from zero"
    with torch.no_grad():
        model.bert.pooler.dense.weight += 1e-3
    frozen = freeze_unmoved(model, weights)
    moved = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert moved == ["bert.pooler.dense.weight", "classifier.weight", "classifier.bias"]
    assert frozen == len(list(model.parameters())) - 3


def test_references_that_do_not_fit(base: Path, tuned: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tuned)
    wide = save_base(tmp_path / "wide", hidden_size=32)
    with pytest.raises(ReferenceMismatch, match=r"has another shape for .*and 13 more: it is another model. Give"):
        read_reference(model, wide)
    shallow = save_base(tmp_path / "shallow", num_hidden_layers=1)
    with pytest.raises(ReferenceMismatch, match=r"has no weights for bert.encoder.layer.1.*and 3 more"):
        read_reference(model, shallow)
    tiny.vit().save_pretrained(tmp_path / "vit")
    with pytest.raises(ReferenceMismatch, match="is a vit model, but the fine-tuned one is a bert"):
        read_reference(model, tmp_path / "vit")


# The card


README = b"---\r\nlicense: mit\r\ntags: [a,   b]\r\n---\r\n\r\n# Mine \xff\r\n\r\nWords.\r\n"


def test_a_readme_of_someone_elses_gets_a_section(
    base: Path, tuned: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_bytes(README)
    assert main(words(tuned, base, data, tmp_path, "--examples", "4")) == 0
    assert "README.md was there and is not this package's" in capsys.readouterr().out
    first = readme.read_bytes()
    assert first.startswith(README + b"\n" + BEGIN)
    assert first.endswith(END + b"\n")
    section = first[len(README) :].decode()
    assert "\n## Measured by hf_robust_ft\n" in section
    assert "\n### Curvature\n" in section
    assert "\n# " not in section
    assert MARK not in section
    assert " 4 training examples" in section
    readme.write_bytes(first + b"After.")
    assert main(words(tuned, base, data, tmp_path, "--examples", "8")) == 0
    second = readme.read_bytes()
    assert second.startswith(README + b"\n" + BEGIN)
    assert second.endswith(END + b"\nAfter.")
    assert second.count(BEGIN) == second.count(END) == 1
    assert b"8 training examples" in second
    assert b" 4 training examples" not in second
    assert main(["card", str(tmp_path)]) == 0
    assert "a section of README.md" in capsys.readouterr().out
    assert readme.read_bytes() == second


@pytest.mark.parametrize("readme", [BEGIN, END + BEGIN, BEGIN + END + BEGIN + END, b"x\n" + END])
def test_damaged_marks_are_refused_before_anything_is_done(
    tuned: Path, data: Path, tmp_path: Path, readme: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_bytes(readme)
    assert main(words(tuned, None, data, tmp_path)) == 2
    assert "which should be one of each, in this order; remove them" in capsys.readouterr().err
    assert written(tmp_path) == {"README.md"}
    assert (tmp_path / "README.md").read_bytes() == readme


@pytest.mark.parametrize(("before", "between"), [(b"", b""), (b"a", b"\n\n"), (b"a\n", b"\n")])
def test_a_section_stands_apart(before: bytes, between: bytes) -> None:
    assert with_section(before, b"s", "x").startswith(before + between + BEGIN)


def test_what_training_said_stays(base: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The Trainer's own card: constraints, settings and metrics are kept, what is measured is new."""
    finetune(base, tmp_path)
    before = CardData(
        correction="forward", noise_source="as given", noise_rate=0.2, transition=symmetric_transition(3, 0.2).tolist(),
        metrics={"eval_accuracy": 0.25}, arguments={"learning_rate": 0.1}, seeds={"training": 7}, limits=["Mine."],
        command=["python", "train.py"], training_examples=5,
    )  # fmt: skip
    before.save(tmp_path / "robust_card.json")
    more = ["--eval-dataset", str(data / "test.parquet")]
    assert main(words(tmp_path, base, data, None, *more)) == 0
    assert "trained with a noise model (as given), but labels were taken as they are" in caplog.text
    after = read_card(tmp_path)[0]
    for name in ("correction", "noise_rate", "transition", "metrics", "arguments", "limits", "command"):
        assert getattr(after, name) == getattr(before, name)
    assert after.training_examples == 24
    assert after.seeds == {"training": 7, "measurement": 0}
    assert after.measured_by[:2] == ["hf-robust-ft", "measure"]
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "python train.py" in text
    assert "The measurement:" in text
    # A card that a measurement made knows nothing of the training that the next one should keep.
    before.correction = None
    before.save(tmp_path / "robust_card.json")
    assert main(words(tmp_path, base, data, None)) == 0
    after = read_card(tmp_path)[0]
    assert (after.noise_rate, after.metrics, after.arguments) == (None, {}, {})
    assert after.limits == ["Mine."]


def test_a_card_is_made_again_from_its_files(
    base: Path, tuned: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main(words(tuned, base, data, folder)) == 0
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert main(["card", str(folder)]) == 0
    assert (folder / "README.md").read_text(encoding="utf-8") == text
    card = CardData.load(folder / "robust_card.json")
    card.description = "For | ants."
    card.save(folder / "robust_card.json")
    assert main(["card", str(folder), "--output", str(tmp_path / "other")]) == 0
    assert "For &#124; ants." in (tmp_path / "other" / "README.md").read_text(encoding="utf-8")
    assert written(tmp_path / "other") == FILES
    assert (folder / "README.md").read_text(encoding="utf-8") == text
    assert f"Written to {tmp_path / 'other'}: README.md" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        ("robust_card.json", {"format": "hf_robust_ft.CardData/9"}, "it is written as hf_robust_ft.CardData/9, and"),
        ("robust_card.json", "{", "holds no card of this version"),
        ("robust_card.json", "[1]", "holds no card of this version"),
        ("robust_card.json", {"datasets": "x"}, "datasets is 'x'"),
        ("robust_card.json", {"training_examples": "x"}, "training_examples is 'x'"),
        ("robust_card.json", {"noise_rate": [1]}, "noise_rate is a list of 1; it should be a number"),
        ("robust_card.json", None, "holds no robust_card.json; trainer.create_model_card() and hf-robust-ft measure"),
        ("hessian_report.json", {"format": "hf_robust_ft.HessianReport/9"}, "is written as hf_robust_ft.HessianRepo"),
        ("hessian_report.json", "{", "is no report of measure_hessian"),
        ("hessian_report.json", None, "hessian_report.json"),
    ],
)
def test_files_that_a_card_can_not_be_made_from(
    base: Path,
    tuned: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    change: Any,
    match: str,
) -> None:
    folder = tmp_path / "out"
    assert main(words(tuned, base, data, folder, "--examples", "2")) == 0
    if change is None:
        (folder / file).unlink()
    elif isinstance(change, dict):
        (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **change}))
    else:
        (folder / file).write_text(change)
    before = (folder / "README.md").stat().st_mtime_ns
    assert main(["card", str(folder)]) == 2
    assert match in capsys.readouterr().err
    assert (folder / "README.md").stat().st_mtime_ns == before
    if file == "robust_card.json" and change is not None:  # found out before the model is measured
        assert main(words(tuned, base, data, folder)) == 2


def test_an_interrupted_measurement_keeps_what_it_found(
    base: Path,
    tuned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts(40).to_parquet(tmp_path / "train.parquet")
    made = finetuned_measurement.model_inputs
    calls: list[int] = []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt  # as Ctrl-C does, during the second batch
        return made(*args)

    monkeypatch.setattr(finetuned_measurement, "model_inputs", interrupted)
    assert main(words(tuned, base, tmp_path, tmp_path / "out")) == 130
    assert "32 of 40 measured (stopped early)" in capsys.readouterr().out
    report = HessianReport.load(tmp_path / "out" / "hessian_report.json")
    assert (report.complete, report.examples) == (False, 32)
    assert "The measurement was stopped early." in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.real
def test_a_real_text_model(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    base, rows = root / ".assets/models/minilm-l6", root / "../shared/data/wordnet-supersense"
    if not (base.is_dir() and rows.is_dir()):
        pytest.skip("needs .assets/models and ../shared/data")
    for split, count in (("train", 8), ("test", 8)):
        Dataset.from_parquet(str(rows / f"{split}.parquet"), cache_dir=str(tmp_path)).select(range(count)).to_parquet(
            tmp_path / f"{split}.parquet"
        )
    names = Dataset.from_parquet(str(tmp_path / "train.parquet")).features["label"].names
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=10, id2label=dict(enumerate(names))
    )
    move(model, 1e-3)
    model.save_pretrained(tmp_path / "tuned")
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "tuned")
    assert main(words(tmp_path / "tuned", base, tmp_path, None, "--eval-dataset", str(tmp_path / "test.parquet"))) == 0
    card, report, _ = read_card(tmp_path / "tuned")
    assert report is not None
    assert len(report.layers) == 3 + 6 * 6 + 2
    assert all(layer.upper.maximum >= layer.hessian.maximum for layer in report.layers)
    assert card.classes == names


# What is refused


def test_help_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("measure", "card", "compare"):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        printed = capsys.readouterr().out
        assert "exit codes: 0" in printed
        assert "examples:" in printed


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--dataset", "nowhere.csv"], "data 'nowhere.csv' does not exist; check the path"),
        (["--label-column", "kind"], "label_column 'kind' is not among the columns"),
        (["--text-column", "kind"], "text_column 'kind' is not among the columns"),
        (["--reference", "./nowhere"], "nowhere"),
        (["--reference", "{tuned}"], "has the very weights of model"),
        (["--reference", "{wide}"], "has another shape for bert.embeddings.word_embeddings.weight"),
        (["--eval-split", "test"], "are a file, which has no splits; give the evaluation data by --eval-dataset"),
        (
            ["--eval-dataset", "{short}"],
            "of the eval data has 4 classes (ant, bee, cat, dog), and the head of the model 3: they don't fit",
        ),
        (["--noise-transition", "0.9x"], "is neither a number, nor a JSON matrix"),
        (["--noise-transition", "[[0.9, 0.1], [0.2, 0.8]]"], "noise_transition is for 2 classes, but the model has 3"),
        (["--noise-transition", "0.6666666666666667"], "noise_transition is singular"),
        (["--output", "{file}"], "is a file; give a folder"),
    ],
)
def test_bad_input_ends_with_2_and_writes_nothing(
    base: Path,
    tuned: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    match: str,
) -> None:
    texts(12, ["ant", "bee", "cat", "dog"]).to_parquet(tmp_path / "short.parquet")
    (tmp_path / "file").write_text("x")
    places = {
        "{tuned}": str(tuned),
        "{wide}": str(save_base(tmp_path / "wide", hidden_size=32)),
        "{short}": str(tmp_path / "short.parquet"),
        "{file}": str(tmp_path / "file"),
    }
    given = words(tuned, base, data, tmp_path / "out", *(places.get(word, word) for word in more))
    assert main(given) == 2
    printed = capsys.readouterr()
    assert match in printed.err
    assert printed.out == ""
    assert not (tmp_path / "out").exists()


def test_models_that_can_not_be_measured(
    base: Path, tuned: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(model: Path, match: str, *more: str, reference: Path | None = base) -> None:
        before = written(model)
        assert main(words(model, reference, data, None, *more)) == 2
        assert match in capsys.readouterr().err
        assert written(model) == before

    refused(base, "lacks the weights of classifier.bias, classifier.weight, so it has no trained head")
    refused(tuned, "does not tell what it was fine-tuned from; give the base model", reference=None)
    for name, settings in {"two": {"num_labels": 2}, "scores": {"problem_type": "regression"}}.items():
        finetune(base, tmp_path / name, **settings)
    refused(tmp_path / "two", "has 3 classes (ant, bee, cat), and the head of the model 2: they don't fit")
    refused(tmp_path / "scores", "problem_type is 'regression'")
    bare = tmp_path / "bare"
    shutil.copytree(tuned, bare)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    refused(bare, "comes without the vocabulary of a tokenizer; save that of its base model there")
    for name, place in {"weights": "bert.pooler.dense.weight", "bias": "classifier.bias"}.items():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(tuned)
        with torch.no_grad():
            model.get_parameter(place).fill_(math.nan)
        model.save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
    refused(tmp_path / "weights", "weights that are not finite in bert.pooler.dense.weight")
    refused(tmp_path / "bias", "the loss of example 0 is nan")
    _, image_model = save_image_models(tmp_path / "images")
    refused(image_model, "can't be loaded to classify texts")
    (image_model / "preprocessor_config.json").unlink()
    photos = save_images(tmp_path / "photos", {"train": 6})
    refused(image_model, "comes without a usable ImageProcessor", "--dataset", str(photos))
    assert main(["measure", "no-such-model", "--dataset", str(data / "train.parquet")]) == 2
    assert "output is not given, and model 'no-such-model' is no folder here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [["--examples", "0"], ["--time-budget", "-1"], ["--time-budget", "nan"], ["--eval-labels", "dirty"]]
)
def test_wrong_arguments_end_with_2(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["measure", "m", "--dataset", "d", *wrong])
    assert stopped.value.code == 2
    assert "usage: hf-robust-ft measure" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["ant", "bee", "cat", "dog"], r"has 4 classes \(ant, bee, cat, dog\), and the head of the model 3"),
        (["ant", "bee"], r"has 2 classes"),
    ],
)
def test_classes_that_are_not_those_of_the_head(names: list[str], match: str) -> None:
    rows = Dataset.from_dict({"label": [0, 1]}).cast_column("label", ClassLabel(names=names))
    with pytest.raises(ValueError, match=match):
        model_labels(rows, "label", tiny.bert(), "the data")


def test_labels_that_the_head_does_not_have() -> None:
    model = tiny.bert()
    with pytest.raises(ValueError, match="holds the label 3, but the head of the model has 3 classes, 0 to 2"):
        model_labels(Dataset.from_dict({"label": [0, 3]}), "label", model, "the data")
    model.config.id2label = dict(enumerate(NAMES))
    with pytest.raises(ValueError, match=r"has 3 classes \(ant, bee, dog\), and the head of the model 3 \(ant, bee, c"):
        model_labels(Dataset.from_dict({"label": ["ant", "bee", "dog"]}), "label", model, "the data")

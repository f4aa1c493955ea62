"""The recipes as users start them, in processes of their own, offline."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import evaluate
import pytest
import tiny
from datasets import ClassLabel, Dataset, Features, Value
from sklearn.datasets import load_digits
from started import start
from transformers import BertTokenizerFast

from hf_robust_ft import TransitionEstimate

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
DATA = ROOT.parent / "shared" / "data" / "wordnet-supersense"
real = pytest.mark.skipif(
    not (ROOT / ".assets" / "models" / "minilm-l6").is_dir() or not DATA.is_dir(),
    reason="needs ../shared/data, and in .assets/models what ../shared/assets/fetch_models.py lays out",
)

pytestmark = pytest.mark.slow


def run(script: str, folder: Path, *words: str, fails: bool = False) -> str:
    """What the recipe prints; with ``fails``, what it complains about."""
    return start(RECIPES / script, *words, cwd=folder, fails=fails)


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())  # type: ignore[no-any-return]


def digits(folder: Path, count: int = 60) -> list[tuple[str, int]]:
    """Files FOLDER/SPLIT/CLASS/N.png, three classes."""
    from PIL import Image

    found = load_digits(n_class=3)
    rows = []
    for number, (pixels, label) in enumerate(zip(found.images[:count], found.target[:count], strict=True)):
        path = folder / ("train" if number % 3 else "test") / f"digit_{label}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype("uint8")).save(path)
        rows.append((str(path), int(label)))
    return rows


WORDS = {
    "animal": ["a small bird with a red tail", "a large fish of the sea", "a wild cat of the woods"],
    "food": ["a sweet cake with cream", "a soup made of fish", "a bread baked with butter"],
}


def bert(folder: Path) -> str:
    """A tiny random BERT whose tokenizer knows the words above."""
    words = sorted({word for lines in WORDS.values() for line in lines for word in line.split()})
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    tiny.bert(num_labels=2).base_model.save_pretrained(folder)
    return str(folder)


def pairs(label: list[int]) -> Dataset:
    """A pair of texts, a label and a number, as GLUE's MRPC has them."""
    lines = [line for texts in WORDS.values() for line in texts]
    columns = {
        "sentence1": [lines[i % 6] for i in range(len(label))],
        "sentence2": [lines[i * 5 % 6] for i in range(len(label))],
        "label": label,
        "idx": list(range(len(label))),
    }
    classes = ClassLabel(names=["not_equivalent", "equivalent"])
    kinds = {"sentence1": Value("string"), "sentence2": Value("string"), "label": classes, "idx": Value("int32")}
    return Dataset.from_dict(columns, features=Features(kinds))


def test_the_default_compares_plain_and_robust(tmp_path: Path) -> None:
    words = ["--num_train_epochs", "1", "--max_train_samples", "128", "--max_test_samples", "64", "--seeds", "0", "1"]
    command = [sys.executable, "-m", "accelerate.commands.launch", str(RECIPES / "vit_noisy.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = results(tmp_path / "outputs" / "vit_noisy")
    assert [(r["method"], r["seed"]) for r in found["runs"]] == [(m, s) for s in (0, 1) for m in ("plain", "robust")]
    for one in found["runs"]:
        assert len(one["accuracy"]) == 1
        assert 0 < one["accuracy"][0] < 1
        assert one["distances"].keys() == one["depths"].keys()
    assert "| plain | " in done.stdout
    assert re.search(r"\| vit\.\S*layers?\.3 \| 6 \| ", done.stdout)
    assert (tmp_path / "outputs" / "vit_noisy" / "curves.png").stat().st_size > 10_000


def test_an_imagefolder_whose_labels_are_noisy_already(tmp_path: Path) -> None:
    digits(tmp_path / "photos")
    run(
        "vit_noisy.py", tmp_path, "--data_dir", "photos", "--noise", "none", "--noise_transition", "0.3",
        "--methods", "forward", "projection", "--num_train_epochs", "1", "--output_dir", "out",
    )  # fmt: skip
    found = results(tmp_path / "out")
    assert [one["method"] for one in found["runs"]] == ["forward", "projection"]
    assert found["settings"]["noise_transition"] == 0.3


def test_a_csv_of_file_names_with_labels_as_words(tmp_path: Path) -> None:
    rows = digits(tmp_path / "photos")
    with open(tmp_path / "train.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["picture", "kind"])
        writer.writerows((path, f"digit {label}") for path, label in rows)
    run(
        "vit_noisy.py", tmp_path, "--train_file", "train.csv", "--image_column", "picture", "--label_column", "kind",
        "--noise", "pair_flip", "--noise_rate", "0.2", "--methods", "robust", "--num_train_epochs", "1",
        "--output_dir", "out",
    )  # fmt: skip
    assert len(results(tmp_path / "out")["runs"]) == 1


def test_a_csv_of_texts_with_labels_as_words(tmp_path: Path) -> None:
    with open(tmp_path / "train.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "kind"])
        writer.writerows((line, kind) for kind, lines in WORDS.items() for line in lines * 4)
    text = run(
        "text_noisy.py", tmp_path, "--model_name_or_path", bert(tmp_path / "bert"), "--train_file", "train.csv",
        "--label_column", "kind", "--methods", "plain", "forward", "projection", "robust", "--noise_rate", "0.2",
        "--num_train_epochs", "2", "--freeze_embeddings", "--max_length", "5",
    )  # fmt: skip
    found = results(tmp_path / "outputs" / "text_noisy")
    assert [one["method"] for one in found["runs"]] == ["plain", "forward", "projection", "robust"]
    assert all(len(one["accuracy"]) == 2 for one in found["runs"])
    assert not any("word_embeddings" in name for name in found["runs"][0]["distances"])
    assert re.search(r"robust, seed 0: 19 training examples, 12 layers constrained", text)


def test_pairs_of_texts_as_glue_has_them(tmp_path: Path) -> None:
    pairs([0, 1] * 8).to_parquet(tmp_path / "train.parquet")
    pairs([0, 1] * 4).to_parquet(tmp_path / "validation.parquet")
    pairs([-1] * 8).to_parquet(tmp_path / "test.parquet")
    words = [
        "--model_name_or_path",
        bert(tmp_path / "bert"),
        "--train_file",
        "train.parquet",
        "--num_train_epochs",
        "1",
    ]
    run("text_noisy.py", tmp_path, *words, "--validation_file", "validation.parquet", "--output_dir", "out")
    assert [one["method"] for one in results(tmp_path / "out")["runs"]] == ["plain", "robust"]
    complaint = run("text_noisy.py", tmp_path, *words, "--validation_file", "test.parquet", fails=True)
    assert "holds the label -1, so its labels are withheld" in complaint


def test_text_columns_that_are_not_there_are_named(tmp_path: Path) -> None:
    pairs([0, 1] * 8).to_parquet(tmp_path / "train.parquet")
    complaint = run(
        "text_noisy.py", tmp_path, "--model_name_or_path", bert(tmp_path / "bert"), "--train_file", "train.parquet",
        "--text_columns", "sentence", fails=True,
    )  # fmt: skip
    assert "text_columns is ['sentence']; name one or two of the columns ['sentence1', 'sentence2'" in complaint


def test_a_machine_without_model_and_data_is_told_what_to_name(tmp_path: Path) -> None:
    # A copy elsewhere finds neither beside itself.
    copied = tmp_path / "checkout" / "recipes"
    shutil.copytree(RECIPES, copied, ignore=shutil.ignore_patterns("__pycache__", "outputs"))
    assert "no data was named" in run(str(copied / "text_noisy.py"), tmp_path, fails=True)
    pairs([0, 1] * 8).to_parquet(tmp_path / "train.parquet")
    complaint = run(str(copied / "text_noisy.py"), tmp_path, "--train_file", "train.parquet", fails=True)
    assert "no model was named" in complaint
    assert "fetch_models.py --out .assets/models" in complaint


@pytest.mark.real
@real
def test_text_with_noisy_labels_by_default(tmp_path: Path) -> None:
    text = run(
        "text_noisy.py", tmp_path, "--max_train_samples", "64", "--max_test_samples", "64", "--num_train_epochs", "1"
    )
    found = results(tmp_path / "outputs" / "text_noisy")
    assert [one["method"] for one in found["runs"]] == ["plain", "robust"]
    assert found["settings"]["layer_radius"] == {"*layer*": 0.02}
    assert "robust, seed 0: 64 training examples, 36 layers constrained" in text


@pytest.mark.real
@real
def test_weak_supervision_by_default(tmp_path: Path) -> None:
    text = run(
        "weak_supervision.py", tmp_path, "--max_train_samples", "400", "--max_test_samples", "64",
        "--num_train_epochs", "1", "--methods", "robust",
    )  # fmt: skip
    settings = results(tmp_path / "outputs" / "weak_supervision")["settings"]
    assert 0.5 < settings["weak_labels"]["coverage"] < 0.8
    assert 0.6 < settings["weak_labels"]["accuracy"] < 0.9
    assert settings["noise_transition"] == "estimate"
    kept = round(settings["weak_labels"]["coverage"] * 400)
    estimate = TransitionEstimate.load(
        tmp_path / "outputs" / "weak_supervision" / "robust-0" / "transition_estimate.json"
    )
    assert estimate.n == kept
    assert estimate.identifiable
    assert f"robust, seed 0: {kept} training examples, 36 layers constrained" in text
    assert re.search(r"food_drinks +5 +\d", text)


def test_rules_vote_where_their_words_stand(recipe: Any) -> None:
    rules = recipe("supersense_rules")
    names, vote, classes = rules.NAMES, rules.vote, sorted(rules.PATTERNS)
    votes = vote(["a small BIRD of prey", "birdlike", "someone who shirks duty"], classes)
    assert votes.shape == (3, len(names))
    assert votes[0, names.index("animal_kinds")] == classes.index("animal")
    assert (votes[1] == -1).all()
    assert votes[2, names.index("person_opening")] == classes.index("person")
    with pytest.raises(ValueError, match=r"the rules vote for \['animal'\], but the classes are"):
        vote(["a bird"], [name for name in classes if name != "animal"])


def test_the_benchmark_of_a_step(tmp_path: Path) -> None:
    run("bench_step.py", tmp_path, "--rounds", "1", "--batch_size", "2", "--output", "bench.json")
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["bytes kept / bytes of constrained weights"] == 1
    assert found["layers projected at every step"] == "73 of 73"


def test_the_metric_needs_no_network() -> None:
    accuracy = evaluate.load(str(RECIPES / "metrics" / "accuracy"))
    assert accuracy.compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2]) == {"accuracy": 0.75}

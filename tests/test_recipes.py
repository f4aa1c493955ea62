"""The recipes as users start them, in processes of their own, offline."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import evaluate
import pytest
from sklearn.datasets import load_digits

RECIPES = Path(__file__).parent.parent / "recipes"

pytestmark = pytest.mark.slow


def run(script: str, folder: Path, *words: str, launch: bool = False) -> str:
    start = [sys.executable, "-m", "accelerate.commands.launch"] if launch else [sys.executable]
    command = [*start, str(RECIPES / script), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


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


def test_the_default_compares_plain_and_robust(tmp_path: Path) -> None:
    text = run(
        "vit_noisy.py", tmp_path, "--num_train_epochs", "1", "--max_train_samples", "128", "--max_test_samples", "64",
        "--seeds", "0", "1", launch=True,
    )  # fmt: skip
    found = results(tmp_path / "outputs" / "vit_noisy")
    assert [(r["method"], r["seed"]) for r in found["runs"]] == [(m, s) for s in (0, 1) for m in ("plain", "robust")]
    for one in found["runs"]:
        assert len(one["accuracy"]) == 1
        assert 0 < one["accuracy"][0] < 1
        assert one["distances"].keys() == one["depths"].keys()
    assert "| plain | " in text
    assert re.search(r"\| vit\.\S*layers?\.3 \| 6 \| ", text)
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


def test_the_benchmark_of_a_step(tmp_path: Path) -> None:
    run("bench_step.py", tmp_path, "--rounds", "1", "--batch_size", "2", "--output", "bench.json")
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["bytes kept / bytes of constrained weights"] == 1
    assert found["layers projected at every step"] == "73 of 73"


def test_the_metric_needs_no_network() -> None:
    accuracy = evaluate.load(str(RECIPES / "metrics" / "accuracy"))
    assert accuracy.compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2]) == {"accuracy": 0.75}

"""Real pretrained models and data: DINOv2-small on Fashion-MNIST, MiniLM on WordNet supersenses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_robust_ft import HessianRegularizedTrainer, corrupt_dataset, find_layers, layer_distances

ROOT = Path(__file__).parent.parent
MODELS = ROOT / ".assets" / "models"
DATA = ROOT.parent / "shared" / "data"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (MODELS / "dinov2-small").is_dir() or not DATA.is_dir(),
        reason="needs ../shared/data, and in .assets/models what ../shared/assets/fetch_models.py lays out",
    ),
]


def sample(name: str, tmp_path: Path, count: int = 24) -> Dataset:
    files = {"train": str(DATA / name / "train.parquet")}
    data = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))["train"].select(range(count))
    return corrupt_dataset(data, 0.4, seed=0)


def train_and_check(model: Any, data: Dataset, tmp_path: Path, **settings: Any) -> HessianRegularizedTrainer:
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    arguments = tiny.arguments(
        tmp_path, learning_rate=1e-3, noise_transition=0.4, layer_radius=0.01, radius_mode="relative", max_steps=3,
        remove_unused_columns="pixel_values" not in data.format["columns"] and data.format["type"] is None, **settings,
    )  # fmt: skip
    trainer = HessianRegularizedTrainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert {"eval_loss", "eval_corrected_loss"} <= trainer.evaluate().keys()
    distances = layer_distances(model, before)
    for name, radius in trainer.constraints.radii.items():
        assert distances[name] <= radius == pytest.approx(0.01 * before[name].double().norm().item())
    assert sum(row.active for row in trainer.constraint_table()) > len(trainer.constraints) / 2
    assert "classifier.weight" not in trainer.constraints.radii
    assert distances["classifier.weight"] > 0
    return trainer


def test_dinov2(tmp_path: Path) -> None:
    data = sample("fashion-mnist", tmp_path)
    processor = AutoImageProcessor.from_pretrained(MODELS / "dinov2-small")
    model = AutoModelForImageClassification.from_pretrained(MODELS / "dinov2-small", num_labels=10)
    layers, _ = find_layers(model)
    assert len(layers) == 74
    assert max(layer.depth for layer in layers) == 13

    def pixels(batch: dict[str, Any]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch["image"]]
        return {**processor(images, return_tensors="pt"), "labels": batch["label"]}

    train_and_check(model, data.with_transform(pixels), tmp_path)


@pytest.mark.parametrize("bf16", [False, True])
def test_minilm(tmp_path: Path, bf16: bool) -> None:
    data = sample("wordnet-supersense", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "minilm-l6")
    data = data.map(lambda batch: tokenizer(batch["text"], padding="max_length", max_length=24, truncation=True))
    model = AutoModelForSequenceClassification.from_pretrained(MODELS / "minilm-l6", num_labels=10)
    trainer = train_and_check(model, data, tmp_path, bf16=bf16)
    assert len(trainer.constraints) == 3 + 6 * 6 + 1
    assert next(model.parameters()).dtype == torch.float32

"""Tiny fine-tuned models in folders, with their base models and raw data, as other trainers leave them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tiny
import tokenizers
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Value
from torch import nn

NAMES = ["ant", "bee", "cat"]


def save_tokenizer(folder: Path) -> None:
    """Of 50 words."""
    words = {"[PAD]": 0, "[UNK]": 1} | {f"w{k}": k for k in range(2, 50)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    fast.model_max_length = 32
    fast.save_pretrained(folder)


def save_base(folder: Path, **changes: Any) -> Path:
    """A pretrained BERT without a head."""
    torch.manual_seed(0)
    tiny.bert(**changes).base_model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def move(model: nn.Module, size: float = 0.05) -> None:
    """What training does to every parameter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def finetune(base: Path, folder: Path, size: float = 0.05, **settings: Any) -> Path:
    """A classifier of three classes, saved as ``Trainer`` saves it."""
    torch.manual_seed(1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, **{"num_labels": 3, **settings})
    move(model, size)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_lora(base: Path, folder: Path, **settings: Any) -> Path:
    """A LoRA adapter with a head of its own."""
    import peft

    torch.manual_seed(1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], **settings)
    adapted = peft.get_peft_model(model, config)
    move(adapted.base_model.model.classifier)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    return folder


def texts(examples: int = 24, names: list[str] | None = None, seed: int = 0) -> Dataset:
    """Sentences whose words tell the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(examples) % 3
    sentences = [" ".join(f"w{2 + 16 * y + w}" for w in rng.integers(0, 16, rng.integers(3, 9))) for y in labels]
    kind = ClassLabel(names=names or NAMES)
    features = Features({"text": Value("string"), "label": kind})
    return Dataset.from_dict({"text": sentences, "label": labels}, features=features)


def save_images(folder: Path, splits: dict[str, int]) -> Path:
    """An imagefolder whose brightness tells the class."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, examples in splits.items():
        for k in range(examples):
            path = folder / split / NAMES[k % 3] / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.clip(rng.normal(60 + 70 * (k % 3), 10, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(path)
    return folder


def save_image_models(folder: Path) -> tuple[Path, Path]:
    """A ViT with a head of five classes, and what became of it with three."""
    torch.manual_seed(0)
    tiny.vit(num_channels=3, num_labels=5).save_pretrained(folder / "base")
    model = transformers.AutoModelForImageClassification.from_pretrained(
        folder / "base", num_labels=3, ignore_mismatched_sizes=True, id2label=dict(enumerate(NAMES))
    )
    move(model)
    model.save_pretrained(folder / "tuned")
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"

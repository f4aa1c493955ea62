"""Tiny random models and data: milliseconds each."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from datasets import ClassLabel, Dataset, Features, List, Value
from torch import Tensor, nn

from hf_robust_ft import HessianRegularizedTrainer, RobustTrainingArguments

CLASSES = 3

TEXT = {"vocab_size": 50, "num_labels": CLASSES, "pad_token_id": 0}
ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": CLASSES}


def bert(**changes: Any) -> transformers.PreTrainedModel:
    config = transformers.BertConfig(**{**TEXT, **ENCODER, **changes})
    return transformers.BertForSequenceClassification(config)


def vit(**changes: Any) -> transformers.PreTrainedModel:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**{**IMAGE, **ENCODER, **changes}))


def dinov2() -> transformers.PreTrainedModel:
    config = transformers.Dinov2Config(**IMAGE, **ENCODER, mlp_ratio=2)
    return transformers.Dinov2ForImageClassification(config)


def resnet(**changes: Any) -> transformers.PreTrainedModel:
    sizes = {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 2], "num_labels": CLASSES}
    config = transformers.ResNetConfig(**{**sizes, "layer_type": "basic", **changes})
    return transformers.ResNetForImageClassification(config)


def convnext() -> transformers.PreTrainedModel:
    config = transformers.ConvNextConfig(
        num_channels=1, hidden_sizes=[4, 8], depths=[1, 2], num_stages=2, patch_size=2, num_labels=CLASSES
    )
    return transformers.ConvNextForImageClassification(config)


def roberta() -> transformers.PreTrainedModel:
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**TEXT, **ENCODER))


def distilbert() -> transformers.PreTrainedModel:
    config = transformers.DistilBertConfig(
        **TEXT, dim=16, n_layers=2, n_heads=2, hidden_dim=24, dropout=0.0, attention_dropout=0.0
    )
    return transformers.DistilBertForSequenceClassification(config)


def gpt2(causal: bool = False) -> transformers.PreTrainedModel:
    config = transformers.GPT2Config(
        **TEXT, n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    kind = transformers.GPT2LMHeadModel if causal else transformers.GPT2ForSequenceClassification
    return kind(config)


def token_classifier() -> transformers.PreTrainedModel:
    return transformers.BertForTokenClassification(transformers.BertConfig(**{**TEXT, **ENCODER}))


class NamedOutput(NamedTuple):
    """Logits that are not the first member."""

    features: Tensor
    logits: Tensor


class Mlp(nn.Module):
    """No transformers model: takes no labels and returns what it is told to."""

    def __init__(self, returns: str = "tuple") -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.fc2 = nn.Linear(8, CLASSES)
        self.returns = returns

    def logits(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.norm(self.fc1(x))))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Any:
        logits = self.logits(x)
        return {
            "tuple": (logits,),
            "none and logits": (None, logits),
            "named tuple": NamedOutput(x, logits),
            "dict": {"logits": logits},
            "tensor": logits,
        }[self.returns]


class MlpWithLoss(Mlp):
    """No transformers model, with a loss of its own: labels are required, and called ``target``."""

    def forward(self, x: Tensor, target: Tensor) -> Any:  # type: ignore[override]
        logits = self.logits(x)
        loss = nn.functional.cross_entropy(logits, target)
        return {"tuple": (loss, logits), "dict": {"loss": loss, "logits": logits}}[self.returns]


def texts(examples: int = 24, seed: int = 0, label: str = "label") -> Dataset:
    """Token ids whose first one tells the class, with class labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (examples, 7), generator=generator)
    labels = torch.arange(examples) % CLASSES
    ids[:, 0] = labels
    features = Features({"input_ids": List(Value("int64")), label: ClassLabel(names=["a", "b", "c"])})
    return Dataset.from_dict({"input_ids": ids.tolist(), label: labels.tolist()}, features=features)


def vectors(examples: int = 24, label: str = "label") -> Dataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(examples) % CLASSES
    x = torch.randn(examples, 6, generator=generator)
    x[:, 0] += labels
    return Dataset.from_dict({"x": x.tolist(), label: labels.tolist()})


def images(examples: int = 12) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(examples, 1, 8, 8, generator=generator)
    return Dataset.from_dict({"pixel_values": pixels.tolist(), "label": [i % CLASSES for i in range(examples)]})


def arguments(folder: Path | str, **changes: Any) -> RobustTrainingArguments:
    """Quiet, on the CPU, eight examples a step, a learning rate that moves weights."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return RobustTrainingArguments(**{**settings, **changes})


def trainer(folder: Path | str, model: nn.Module | None = None, **changes: Any) -> HessianRegularizedTrainer:
    """A Trainer of a tiny BERT (or another model) on tiny texts; arguments by name, ``train_dataset`` too."""
    given = {
        name: changes.pop(name)
        for name in (
            "train_dataset",
            "eval_dataset",
            "compute_metrics",
            "compute_loss_func",
            "callbacks",
            "model_init",
        )
        if name in changes
    }
    if model is None and "model_init" not in given:
        torch.manual_seed(0)
        model = bert()
    return HessianRegularizedTrainer(
        model=model, args=arguments(folder, **changes), **{"train_dataset": texts(), **given}
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different

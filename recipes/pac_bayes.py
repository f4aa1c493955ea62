"""PAC-Bayes certificates of DINOv2-small on Fashion-MNIST: a linear head, clean and noisy, and fine-tuned models.

    python recipes/pac_bayes.py --experiments head noisy_head lora full

runs offline on a CPU. Each certificate bounds the error of a randomised classifier, with probability 0.95, from its
training examples alone; the test error beside it is that of the same randomised classifier (and of the published
weights) on 1,500 clean test images.

- head:        a linear head on frozen features, 5,000 images, prior centred on zero.
- noisy_head:  the same with 40 % symmetric label noise of known T; bounds the error on clean labels.
- lora:        LoRA adapters of rank 2 on the queries and values of all blocks, and the head.
- full:        every weight and bias of all linear layers and layer norms. Patch embedding, tokens and layer scales, for
               which there is no way to draw noise example by example, stay frozen.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_robust_ft import (
    Posterior,
    corrupt_labels,
    fit_posterior,
    pac_bayes_certificate,
    pac_bayes_head,
    symmetric_transition,
)

EXPERIMENTS = ("head", "noisy_head", "lora", "full")
CLASSES = 10
Batches = list[dict[str, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=".assets/models/dinov2-small")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/fashion-mnist"))
    parser.add_argument("--output", type=Path, default=Path("pac_bayes.json"))
    parser.add_argument("--experiments", nargs="+", default=list(EXPERIMENTS), choices=EXPERIMENTS)
    parser.add_argument("--examples", type=int, default=5000, help="training images of the heads")
    parser.add_argument("--model_examples", type=int, default=5000, help="training images of the fine-tuned models")
    parser.add_argument("--test_examples", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=6, help="of the fine-tuned models")
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--passes", type=int, default=5, help="draws of the weights for each image, fine-tuned models")
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    heads = {"head", "noisy_head"} & set(args.experiments)
    train = images(args, "train", args.examples if heads else args.model_examples)
    test = images(args, "test", args.test_examples)
    features = [features_of(args, batches) for batches in (train, test)]
    records: list[dict[str, Any]] = []
    for experiment in args.experiments:
        start = time.perf_counter()
        if experiment in heads:
            record = head(args, *features, noisy=experiment == "noisy_head")
        else:
            count = args.model_examples // args.batch_size
            record = fine_tuned(args, train[:count], test, features[0], lora=experiment == "lora")
        record |= {"experiment": experiment, "seconds": time.perf_counter() - start}
        records.append(record)
        print(json.dumps(record), flush=True)
        args.output.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def head(
    args: argparse.Namespace, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, noisy: bool
) -> dict[str, Any]:
    features, labels = train
    transition = symmetric_transition(CLASSES, 0.4) if noisy else None
    if noisy:
        labels = torch.as_tensor(corrupt_labels(labels.numpy(), transition, args.seed))
    posterior, bound = pac_bayes_head(
        features, labels, num_classes=CLASSES, transition=transition, delta=args.delta, seed=args.seed
    )
    model = nn.Linear(features.shape[1], CLASSES, bias=False)
    return {"bound": bound.to_dict(), **errors(model, posterior, [test], args)}


def fine_tuned(
    args: argparse.Namespace, train: Batches, test: Batches, features: tuple[Tensor, Tensor], *, lora: bool
) -> dict[str, Any]:
    torch.manual_seed(args.seed)
    model = pretrained(args)
    if lora:
        config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
        model = get_peft_model(model, config)
        groups = ["*classifier*", "*lora_A*", "*lora_B*"]
    else:
        for module in model.modules():
            if not isinstance(module, (nn.Linear, nn.LayerNorm)):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(False)
        groups = ["classifier*"]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # The head's prior is centred on zero: training may move it first, by a head of its own on frozen features.
    reference = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if not ("classifier" in name and name in trained)
    }
    rows = sum(len(batch["labels"]) for batch in train)
    start, _ = pac_bayes_head(features[0][:rows], features[1][:rows], num_classes=CLASSES, seed=args.seed)
    with torch.no_grad():
        for name, parameter in trained.items():
            if "classifier" in name:
                parameter.copy_(start.weights[0].mean if name.endswith("weight") else torch.zeros_like(parameter))
    posterior = fit_posterior(
        model, reference, train, epochs=args.epochs, groups=groups, delta=args.delta, seed=args.seed
    )
    bound = pac_bayes_certificate(model, posterior, train, delta=args.delta, passes=args.passes, seed=args.seed + 1)
    return {
        "bound": bound.to_dict(),
        **errors(model, posterior, test, args),
        "trained_parameters": sum(p.numel() for p in trained.values()),
        "kl_by_group": {group: sum(w.kl for w in posterior.weights if group.strip("*") in w.name) for group in groups},
    }


def errors(model: nn.Module, posterior: Posterior, test: Any, args: argparse.Namespace) -> dict[str, float]:
    """On clean test labels: of the randomised classifier, and of its mean weights."""
    # The certificate's own draws, of which only the empirical part is of use here.
    drawn = pac_bayes_certificate(model, posterior, test, passes=1, seed=args.seed + 2).terms["empirical"]
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for weight in posterior.weights:
            weights[weight.name].copy_(weight.mean)
        model.eval()
        wrong, total = 0, 0
        for batch in test:
            inputs, labels = (batch["pixel_values"], batch["labels"]) if isinstance(batch, dict) else batch
            outputs = model(inputs)
            wrong += int((getattr(outputs, "logits", outputs).argmax(-1) != labels).sum())
            total += len(labels)
    return {"test_error": drawn, "test_error_of_mean": wrong / total}


def pretrained(args: argparse.Namespace) -> Any:
    return AutoModelForImageClassification.from_pretrained(args.model_name_or_path, num_labels=CLASSES)


def features_of(args: argparse.Namespace, batches: Batches) -> tuple[Tensor, Tensor]:
    """What the model's own head sees: class token and mean of the patches."""
    model = pretrained(args).eval()
    inputs: list[Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda module, seen: inputs.append(seen[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch["pixel_values"])
    hook.remove()
    return torch.cat(inputs), torch.cat([batch["labels"] for batch in batches])


def images(args: argparse.Namespace, split: str, count: int) -> Batches:
    """Batches of 56 x 56 pixels, from the file's first rows."""
    table = pq.read_table(args.data / f"{split}.parquet").slice(0, count)
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
    size = {"height": 56, "width": 56}

    def batches() -> Iterator[dict[str, Tensor]]:
        for first in range(0, len(table), args.batch_size):
            rows = table.slice(first, args.batch_size)
            pictures = [Image.open(io.BytesIO(v["bytes"])).convert("RGB") for v in rows["image"].to_pylist()]
            pixels = processor(pictures, return_tensors="pt", size=size, do_center_crop=False)["pixel_values"]
            yield {"pixel_values": pixels, "labels": torch.tensor(rows["label"].to_pylist())}

    return list(batches())


if __name__ == "__main__":
    main()

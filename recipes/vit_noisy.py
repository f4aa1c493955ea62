"""Fine-tune an image classifier on noisy labels, plainly and robustly, and compare them on clean ones.

    accelerate launch recipes/vit_noisy.py

runs offline in a few minutes on two CPU cores: a small ViT pretrained on printed glyphs (beside this
file) learns scikit-learn's handwritten digits, 60 % of whose training labels were replaced. On your own:

    accelerate launch recipes/vit_noisy.py --model_name_or_path google/vit-base-patch16-224-in21k \\
        --dataset_name ethz/food101 --test_split validation --noise symmetric --noise_rate 0.4
    accelerate launch recipes/vit_noisy.py --model_name_or_path facebook/dinov2-small \\
        --data_dir photos --noise none --noise_transition T.json --layer_radius 0.5

``--data_dir`` is an imagefolder (photos/train/CLASS/*.png, photos/test/CLASS/*.png). With ``--noise
none`` the training labels are taken to be noisy already. Test labels are never touched.
"""

from __future__ import annotations

import time
from copy import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
from comparison import Run, report, save
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from torch import distributed
from transformers import (
    AutoModelForImageClassification,
    EvalPrediction,
    HfArgumentParser,
    set_seed,
)

# The one at the top of transformers asks for torchvision before 5.19.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_robust_ft import (
    HessianRegularizedTrainer,
    RobustTrainingArguments,
    corrupt_dataset,
    find_layers,
    layer_distances,
    pair_flip_transition,
    symmetric_transition,
)

HERE = Path(__file__).parent

# What each method changes in the arguments given; "robust" keeps them.
METHODS = {
    "plain": {"loss_correction": "none", "layer_radius": None},
    "forward": {"loss_correction": "forward", "layer_radius": None},
    "projection": {"loss_correction": "none"},
    "robust": {},
}

REPORTED = (
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "noise_transition",
    "layer_radius",
    "radius_norm",
    "radius_mode",
    "radius_growth",
    "world_size",
)


@dataclass
class RecipeArguments:
    """What to train on, how to corrupt it, and which methods to compare."""

    model_name_or_path: str = field(
        default=str(HERE / "glyph_vit"),
        metadata={"help": "A pretrained image model: a folder or a Hub name."},
    )
    dataset_name: str | None = field(default=None, metadata={"help": "A data set of the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": "Training data: a .parquet, .csv or .json file."})
    validation_file: str | None = field(default=None, metadata={"help": "Clean test data, of the same kind."})
    data_dir: str | None = field(default=None, metadata={"help": "An imagefolder with train and test."})
    train_split: str = field(default="train", metadata={"help": "Name of the split to train on."})
    test_split: str = field(default="test", metadata={"help": "Name of the split with clean labels to test on."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many, shuffled."})
    max_test_samples: int | None = field(default=None, metadata={"help": "Test on the first so many, shuffled."})
    noise: str = field(
        default="symmetric",
        metadata={
            "help": "Noise to put on the training labels.",
            "choices": ["symmetric", "pair_flip", "none"],
        },
    )
    noise_rate: float = field(default=0.6, metadata={"help": "Share of the training labels to replace."})
    methods: list[str] = field(
        default_factory=lambda: ["plain", "robust"],
        metadata={"help": "Ways to train, in this order.", "choices": list(METHODS)},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "One run a method and seed: noise, head and batches."}
    )


def main() -> None:
    parser = HfArgumentParser((RecipeArguments, RobustTrainingArguments), description=__doc__.split("\n\n")[0])
    parser.set_defaults(
        output_dir="outputs/vit_noisy",
        num_train_epochs=20,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=64,
        learning_rate=1e-3,
        layer_radius="0.01",
        radius_mode="relative",
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="epoch",
        report_to="none",
        remove_unused_columns=False,
    )
    recipe, arguments = parser.parse_args_into_dataclasses()
    data = load(recipe)
    settings = asdict(recipe) | {name: getattr(arguments, name) for name in REPORTED}
    runs: list[Run] = []
    for seed in recipe.seeds:
        for method in recipe.methods:
            runs.append(train(method, seed, recipe, arguments, data))
            if arguments.process_index == 0:
                save(runs, settings, Path(arguments.output_dir))  # each time: nothing that was computed is lost
    if arguments.process_index == 0:
        report(runs, Path(arguments.output_dir))
    if distributed.is_initialized():
        distributed.destroy_process_group()


def load(recipe: RecipeArguments) -> DatasetDict:
    """The training and test data with clean labels, under the names train and test."""
    if recipe.train_file:
        files = {"train": recipe.train_file, "test": recipe.validation_file or recipe.train_file}
        kind = Path(recipe.train_file).suffix.removeprefix(".").replace("jsonl", "json")
        loaded = load_dataset(kind, data_files=files)
        train, test = loaded["train"], loaded["test"]
        if not recipe.validation_file:
            train, test = train.train_test_split(0.2, seed=0).values()
    elif recipe.data_dir or recipe.dataset_name:
        loaded = load_dataset(
            recipe.dataset_name or "imagefolder", recipe.dataset_config_name, data_dir=recipe.data_dir
        )
        train, test = loaded[recipe.train_split], loaded[recipe.test_split]
    else:
        train, test = digits()
    if not isinstance(train.features[recipe.image_column], Image):
        # A column of file names, as a csv file has.
        train, test = (part.cast_column(recipe.image_column, Image()) for part in (train, test))
    if not isinstance(train.features[recipe.label_column], ClassLabel):
        train, test = name_classes(train, test, recipe.label_column)
    parts = {"train": (train, recipe.max_train_samples), "test": (test, recipe.max_test_samples)}
    return DatasetDict(
        {
            name: part.shuffle(seed=0).select(range(min(limit or len(part), len(part))))
            for name, (part, limit) in parts.items()
        }
    )


def name_classes(train: Dataset, test: Dataset, column: str) -> tuple[Dataset, Dataset]:
    """Labels that are words or numbers as class labels, in the order of the words or numbers.

    Numbers in their own order, not that of their names: it is that of the rows of a transition matrix.
    """
    classes = ClassLabel(names=[str(label) for label in sorted(set(train[column]))])

    def encode(part: Dataset) -> Dataset:
        features = part.features.copy()
        features[column] = classes
        return part.map(lambda label: {column: classes.str2int(str(label))}, input_columns=column, features=features)

    return encode(train), encode(test)


def digits() -> tuple[Dataset, Dataset]:
    """scikit-learn's handwritten digits, 8 x 8 pixels: 1,000 to train on and 797 to test on."""
    from PIL import Image as Picture
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = (found.images * (255 / 16)).astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(d) for d in range(10)])})
    columns = {"image": [Picture.fromarray(p) for p in pixels], "label": found.target.tolist()}
    split = Dataset.from_dict(columns, features=features).train_test_split(train_size=1000, seed=0)
    return split["train"], split["test"]


def train(
    method: str, seed: int, recipe: RecipeArguments, arguments: RobustTrainingArguments, data: DatasetDict
) -> Run:
    """Train one model from the pretrained weights and test it on clean labels after each epoch."""
    names = data["train"].features[recipe.label_column].names
    noisy, transition = data["train"], arguments.noise_transition
    if recipe.noise != "none":
        build = symmetric_transition if recipe.noise == "symmetric" else pair_flip_transition
        matrix = build(len(names), recipe.noise_rate)
        noisy = corrupt_dataset(noisy, matrix, seed, label_column=recipe.label_column)
        transition = matrix.tolist() if transition is None else transition

    arguments = copy(arguments)
    arguments.seed, arguments.noise_transition = seed, transition
    arguments.output_dir = str(Path(arguments.output_dir) / f"{method}-{seed}")
    for name, value in METHODS[method].items():
        setattr(arguments, name, value)

    processor = AutoImageProcessor.from_pretrained(recipe.model_name_or_path)
    set_seed(seed)
    model = AutoModelForImageClassification.from_pretrained(
        recipe.model_name_or_path,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        ignore_mismatched_sizes=True,
    )
    pretrained = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def pixels(batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch[recipe.image_column]]
        return {**processor(images, return_tensors="pt"), "labels": batch[recipe.label_column]}

    accuracy = evaluate.load(str(HERE / "metrics" / "accuracy"))

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        chosen = prediction.predictions.argmax(-1)
        return accuracy.compute(predictions=chosen, references=prediction.label_ids)  # type: ignore[no-any-return]

    trainer = HessianRegularizedTrainer(
        model=model,
        args=arguments,
        train_dataset=noisy.with_transform(pixels),
        eval_dataset=data["test"].with_transform(pixels),
        processing_class=processor,
        compute_metrics=compute_metrics,
    )
    if trainer.is_world_process_zero():
        print(f"\n{method}, seed {seed}: {len(noisy)} training examples, {len(trainer.constraints)} layers constrained")
    started = time.perf_counter()
    trainer.train()
    layers, _ = find_layers(model)
    return Run(
        method=method,
        seed=seed,
        accuracy=[entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry],
        distances=layer_distances(model, pretrained),
        depths={layer.name: layer.depth for layer in layers},
        seconds=time.perf_counter() - started,
    )


if __name__ == "__main__":
    main()

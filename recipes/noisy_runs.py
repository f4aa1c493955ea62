"""What the recipes of noisy labels share: reading data, naming classes, and one training after another.

Not run by itself. A recipe reads its arguments (:func:`parse`) and its data (:func:`load`), says in a :class:`Task`
how a model and its inputs are made, and hands it to :func:`compare`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import evaluate
import numpy as np
import numpy.typing as npt
from comparison import Run, report, save
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from torch import distributed
from transformers import EvalPrediction, HfArgumentParser, PreTrainedModel, set_seed

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

# What each method changes in the arguments given; "robust" keeps them. Another method is another line.
METHODS: dict[str, dict[str, Any]] = {
    "plain": {"loss_correction": "none", "layer_radius": None},
    "gce": {"loss_correction": "gce", "layer_radius": None},
    "forward": {"loss_correction": "forward", "layer_radius": None},
    "posterior": {"loss_correction": "posterior", "layer_radius": None},
    # Sizes found on noisy validation labels of the digits of vit_noisy.py: RESULTS.md.
    "nso": {"loss_correction": "none", "layer_radius": None, "hessian_penalty": 0.02},
    "l2sp": {"loss_correction": "none", "layer_radius": None, "l2sp_penalty": 1.0},
    "projection": {"loss_correction": "none"},
    "robust": {},
}

# The metric that tells which labels are noisy: those of the test data are clean.
SELECTED_ON = "eval_validation_clean_accuracy"

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
class RunArguments:
    """What to train on, and which methods to compare."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set of the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": "Training data: a .parquet, .csv or .json file."})
    validation_file: str | None = field(default=None, metadata={"help": "Clean test data, of the same kind."})
    train_split: str = field(default="train", metadata={"help": "Name of the split to train on."})
    test_split: str = field(default="test", metadata={"help": "Name of the split with clean labels to test on."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many, shuffled."})
    max_test_samples: int | None = field(default=None, metadata={"help": "Test on the first so many, shuffled."})
    validation_samples: int = field(
        default=0,
        metadata={
            "help": "Hold out so many of the training examples, with their noisy labels, and tell the epoch that the "
            "clean accuracy estimated on them chooses. Needs a noise_transition, such as 'estimate'."
        },
    )
    methods: list[str] = field(
        default_factory=lambda: ["plain", "robust"],
        metadata={"help": "Ways to train, in this order.", "choices": list(METHODS)},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "One run a method and seed: noise, head and batches."}
    )


@dataclass
class NoisyRunArguments(RunArguments):
    """The same, and how to corrupt the training labels."""

    noise: str = field(
        default="symmetric",
        metadata={
            "help": "Noise to put on the training labels.",
            "choices": ["symmetric", "pair_flip", "none"],
        },
    )
    noise_rate: float = field(default=0.6, metadata={"help": "Share of the training labels to replace."})


Arguments = TypeVar("Arguments", bound=RunArguments)


@dataclass(frozen=True)
class Task:
    """What is a recipe's own."""

    data: DatasetDict
    """``train`` and ``test``; the labels are a ``ClassLabel`` column."""
    data_name: str
    """What a model card calls them."""
    label_column: str
    make_model: Callable[[list[str]], PreTrainedModel]
    """A pretrained model with a new head, from the names of the classes."""
    processing_class: Any
    """Tokenizer or image processor."""
    collator: Callable[[list[Any]], dict[str, Any]] | None = None
    prepare: Callable[[Dataset], Dataset] = lambda part: part
    """What turns examples into inputs of the model, after the labels were corrupted."""
    about_labels: str = ""
    """A sentence for the card: where the training labels come from."""


def parse(kind: type[Arguments], doc: str, **defaults: Any) -> tuple[Arguments, RobustTrainingArguments]:
    """Read the command line: the recipe's own arguments and those of training, with the recipe's defaults."""
    parser = HfArgumentParser((kind, RobustTrainingArguments), description=doc.split("\n\n")[0])
    parser.set_defaults(eval_strategy="epoch", save_strategy="no", logging_strategy="epoch", report_to="none")
    parser.set_defaults(**defaults)
    recipe, arguments = parser.parse_args_into_dataclasses()
    return recipe, arguments


def load(
    recipe: RunArguments, fallback: Callable[[], tuple[Dataset, Dataset]], *, data_dir: str | None = None
) -> DatasetDict:
    """The training and test data with clean labels, under the names train and test.

    Args:
        recipe: which files, data set or splits, and how much of them.
        fallback: makes the data when the arguments name none.
        data_dir: an imagefolder, or the folder of a data set of the Hub.
    """
    if recipe.train_file:
        files = {"train": recipe.train_file, "test": recipe.validation_file or recipe.train_file}
        kind = Path(recipe.train_file).suffix.removeprefix(".").replace("jsonl", "json")
        loaded = load_dataset(kind, data_files=files)
        train, test = loaded["train"], loaded["test"]
        if not recipe.validation_file:
            train, test = train.train_test_split(0.2, seed=0).values()
    elif data_dir or recipe.dataset_name:
        loaded = load_dataset(recipe.dataset_name or "imagefolder", recipe.dataset_config_name, data_dir=data_dir)
        train, test = loaded[recipe.train_split], loaded[recipe.test_split]
    else:
        train, test = fallback()
    if not isinstance(train.features[recipe.label_column], ClassLabel):
        train, test = name_classes(train, test, recipe.label_column)
    # GLUE keeps the labels of most of its test splits to itself and writes -1.
    if min(test[recipe.label_column]) < 0:
        raise ValueError(
            f"the split '{recipe.test_split}' holds the label {min(test[recipe.label_column])}, so its labels are "
            "withheld; name a labelled one, such as --test_split validation"
        )
    parts = {"train": (train, recipe.max_train_samples), "test": (test, recipe.max_test_samples)}
    return DatasetDict(
        {
            name: part.shuffle(seed=0).select(range(min(limit or len(part), len(part))))
            for name, (part, limit) in parts.items()
        }
    )


def name_of_data(recipe: RunArguments, fallback: str, *, data_dir: str | None = None) -> str:
    """What :func:`load` loads, in words."""
    if recipe.train_file:
        path = Path(recipe.train_file).absolute()
        return f"{path.parent.name}/{path.name}"
    if data_dir and not recipe.dataset_name:
        return Path(data_dir).absolute().name
    return recipe.dataset_name or fallback


def name_classes(train: Dataset, test: Dataset, column: str) -> tuple[Dataset, Dataset]:
    """Labels that are words or numbers as class labels, in the order of the words or numbers.

    Numbers in their own order, not that of their names: it is that of the rows of a transition matrix.
    """
    found = sorted(set(train[column]))
    classes, numbers = ClassLabel(names=[str(label) for label in found]), {label: i for i, label in enumerate(found)}
    if unknown := sorted(set(test[column]) - set(found)):
        raise ValueError(f"the test labels {unknown[:10]} do not occur in training; leave these examples out")

    def encode(part: Dataset) -> Dataset:
        features = part.features.copy()
        features[column] = classes
        return part.map(lambda label: {column: numbers[label]}, input_columns=column, features=features)

    return encode(train), encode(test)


def classification_head(names: list[str]) -> dict[str, Any]:
    """What ``from_pretrained`` needs for a new head over the classes of these names."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "ignore_mismatched_sizes": True,
    }


def compare(task: Task, recipe: RunArguments, arguments: RobustTrainingArguments, **also: Any) -> list[Run]:
    """Train with each seed and method; save and print what came of it.

    What is given as ``also`` goes into results.json beside the settings.
    """
    settings = asdict(recipe) | {name: getattr(arguments, name) for name in REPORTED} | also
    runs: list[Run] = []
    for seed in recipe.seeds:
        for method in recipe.methods:
            runs.append(train(method, seed, task, recipe, arguments))
            if arguments.process_index == 0:
                save(runs, settings, Path(arguments.output_dir))  # each time: nothing that was computed is lost
    if arguments.process_index == 0:
        report(runs, Path(arguments.output_dir))
    if distributed.is_initialized():
        distributed.destroy_process_group()
    return runs


def describe(recipe: RunArguments, task: Task, method: str) -> str:
    """What a reader of the card must know before its figures."""
    said = f"A run of a recipe that compares ways to train on noisy labels; this is the method '{method}'."
    if isinstance(recipe, NoisyRunArguments) and recipe.noise != "none":
        kind = recipe.noise.replace("_", "-")
        said += f" {recipe.noise_rate:.0%} of the training labels were replaced on purpose ({kind} noise)."
    return f"{said}{task.about_labels} The labels of the test data are as they came."


def transition_of(noise: str, rate: float, classes: int) -> npt.NDArray[np.float64]:
    """T of ``"symmetric"`` or ``"pair_flip"`` noise."""
    build = {"symmetric": symmetric_transition, "pair_flip": pair_flip_transition}[noise]
    return build(classes, rate)


def train_and_test(folder: Path) -> tuple[Dataset, Dataset]:
    """What ``train.parquet`` and ``test.parquet`` of a folder hold."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; name other data")
    loaded = load_dataset("parquet", data_files={part: str(folder / f"{part}.parquet") for part in ("train", "test")})
    return loaded["train"], loaded["test"]


def train(method: str, seed: int, task: Task, recipe: RunArguments, arguments: RobustTrainingArguments) -> Run:
    """Train one model from the pretrained weights and test it on clean labels after each epoch."""
    names = task.data["train"].features[task.label_column].names
    noisy, transition = task.data["train"], arguments.noise_transition
    if isinstance(recipe, NoisyRunArguments) and recipe.noise != "none":
        matrix = transition_of(recipe.noise, recipe.noise_rate, len(names))
        noisy = corrupt_dataset(noisy, matrix, seed, label_column=task.label_column)
        transition = matrix.tolist() if transition is None else transition

    evaluated = {"test": task.data["test"]}
    if recipe.validation_samples:
        held_out = noisy.train_test_split(recipe.validation_samples, seed=seed)
        noisy, evaluated["validation"] = held_out["train"], held_out["test"]

    arguments = copy(arguments)
    if recipe.validation_samples:
        arguments.metric_for_best_model, arguments.greater_is_better = SELECTED_ON, True
    elif arguments.eval_labels is None:
        arguments.eval_labels = "clean"
    arguments.seed, arguments.noise_transition = seed, transition
    arguments.output_dir = str(Path(arguments.output_dir) / f"{method}-{seed}")
    for name, value in METHODS[method].items():
        setattr(arguments, name, value)

    set_seed(seed)
    model = task.make_model(names)
    pretrained = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    accuracy = evaluate.load(str(HERE / "metrics" / "accuracy"))

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        chosen = np.asarray(prediction.predictions).argmax(-1)
        return accuracy.compute(predictions=chosen, references=prediction.label_ids)  # type: ignore[no-any-return]

    trainer = HessianRegularizedTrainer(
        model=model,
        args=arguments,
        train_dataset=task.prepare(noisy),
        eval_dataset={name: task.prepare(part) for name, part in evaluated.items()},
        data_collator=task.collator,
        processing_class=task.processing_class,
        compute_metrics=compute_metrics,
    )
    if trainer.is_world_process_zero():
        print(f"\n{method}, seed {seed}: {len(noisy)} training examples, {len(trainer.constraints)} layers constrained")
    started = time.perf_counter()
    trainer.train()
    trainer.card_data.description = describe(recipe, task, method)
    model_name = f"{Path(str(model.config._name_or_path)).name} on {task.data_name}, {method}, seed {seed}"
    trainer.create_model_card(model_name=model_name, dataset=task.data_name)
    layers, _ = find_layers(model)
    history = trainer.state.log_history
    return Run(
        method=method,
        seed=seed,
        accuracy=[entry["eval_test_accuracy"] for entry in history if "eval_test_accuracy" in entry],
        validation=[entry[SELECTED_ON] for entry in history if SELECTED_ON in entry],
        distances=layer_distances(model, pretrained),
        depths={layer.name: layer.depth for layer in layers},
        seconds=time.perf_counter() - started,
    )

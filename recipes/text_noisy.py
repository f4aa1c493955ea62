"""Fine-tune a text classifier on noisy labels, plainly and robustly, and compare them on clean ones.

    accelerate launch recipes/text_noisy.py

runs offline where the checkout has MiniLM in .assets/models/minilm-l6 (laid out by ``python
../shared/assets/fetch_models.py --out .assets/models``) and WordNet's definitions in ../shared/data: it tells
what kind of thing a definition defines, after training on labels of which 40 % were replaced. On your own:

    accelerate launch recipes/text_noisy.py --model_name_or_path google-bert/bert-base-uncased \\
        --dataset_name nyu-mll/glue --dataset_config_name mrpc --noise_rate 0.2
    accelerate launch recipes/text_noisy.py --model_name_or_path distilbert/distilroberta-base \\
        --train_file mails.csv --text_columns subject body --label_column folder --noise none --noise_transition T.json

The text is one column or a pair. With ``--noise none`` the training labels are taken to be noisy already. Test
labels are never touched; most GLUE tasks withhold theirs, and want ``--test_split validation``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Value
from noisy_runs import NoisyRunArguments, Task, classification_head, compare, load, name_of_data, parse, train_and_test
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
)

CHECKOUT = Path(__file__).parent.parent
MINILM = CHECKOUT / ".assets" / "models" / "minilm-l6"
SUPERSENSES = CHECKOUT.parent / "shared" / "data" / "wordnet-supersense"
SUPERSENSES_NAME = "WordNet supersenses"


@dataclass
class TextArguments:
    """Which model, and what of the data is its text."""

    model_name_or_path: str = field(
        default=str(MINILM),
        metadata={"help": "A pretrained text model: a folder or a Hub name."},
    )
    text_columns: list[str] | None = field(
        default=None,
        metadata={"help": "Column of the text, or the two columns of a pair. Default: the columns of strings."},
    )
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to so many tokens."})
    freeze_embeddings: bool = field(
        default=False,
        metadata={"help": "Leave the token embeddings as they are: half of a small model's weights."},
    )


@dataclass
class RecipeArguments(TextArguments, NoisyRunArguments):
    """What to train on, how to corrupt it, and which methods to compare."""

    noise_rate: float = field(default=0.4, metadata={"help": "Share of the training labels to replace."})


# Found on noisy validation labels: RESULTS.md.
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 6,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 1e-4,
    # The transformer's blocks. What pools their outputs is hardly pretrained in most models, and stays free.
    "layer_radius": '{"*layer*": 0.02}',
    "radius_mode": "relative",
}


def main() -> None:
    recipe, arguments = parse(RecipeArguments, __doc__, output_dir="outputs/text_noisy", **DEFAULTS)
    data = load(recipe, supersenses)
    task = text_task(recipe, data, recipe.label_column, name_of_data(recipe, SUPERSENSES_NAME))
    compare(task, recipe, arguments)


def supersenses() -> tuple[Dataset, Dataset]:
    """5,000 and 1,500 of WordNet's definitions of nouns; the label is the kind of thing, one of ten."""
    if not SUPERSENSES.is_dir():
        raise FileNotFoundError(
            f"no data was named, and {SUPERSENSES} does not exist; give --train_file FILE or --dataset_name NAME"
        )
    return train_and_test(SUPERSENSES)


def text_task(recipe: TextArguments, data: DatasetDict, label_column: str, name: str) -> Task:
    """The data as tokens, and the model."""
    if recipe.model_name_or_path == str(MINILM) and not MINILM.is_dir():
        raise FileNotFoundError(
            f"no model was named, and {MINILM} does not exist; give --model_name_or_path (a folder, or a Hub name "
            "such as sentence-transformers/all-MiniLM-L6-v2), or lay that one out without the Hub: "
            "python ../shared/assets/fetch_models.py --out .assets/models"
        )
    columns = text_columns(recipe, data["train"], label_column)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # as GPT-2 and its like

    def tokens(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [batch[column] for column in columns]
        return tokenizer(*texts, truncation=True, max_length=recipe.max_length)  # type: ignore[no-any-return]

    def make_model(names: list[str]) -> PreTrainedModel:
        model = AutoModelForSequenceClassification.from_pretrained(
            recipe.model_name_or_path, **classification_head(names)
        )
        model.config.pad_token_id = tokenizer.pad_token_id
        if recipe.freeze_embeddings:
            model.get_input_embeddings().requires_grad_(False)
        return model

    # Each batch is padded to its own longest text. The collator finds labels under this name, in any data set.
    data = data.map(tokens, batched=True).rename_column(label_column, "labels")
    # Accuracy does not ask for an order, and texts of one length need no padding.
    data["test"] = data["test"].select(np.argsort([len(ids) for ids in data["test"]["input_ids"]]))
    return Task(data, name, "labels", make_model, tokenizer, DataCollatorWithPadding(tokenizer))


def text_columns(recipe: TextArguments, data: Dataset, label_column: str) -> list[str]:
    """The one or two columns named, or else those that hold strings."""
    strings = [
        name
        for name, feature in data.features.items()
        if isinstance(feature, Value) and feature.dtype in ("string", "large_string") and name != label_column
    ]
    columns = recipe.text_columns or strings
    missing = [name for name in columns if name not in data.column_names]
    if missing or len(columns) not in (1, 2):
        raise ValueError(
            f"text_columns is {columns}; name one or two of the columns {data.column_names} with --text_columns"
        )
    return columns


if __name__ == "__main__":
    main()

"""Fine-tune an image classifier on noisy labels, plainly and robustly, and compare them on clean ones.

    accelerate launch recipes/vit_noisy.py

runs offline in a minute or two on two CPU cores: a small ViT pretrained on printed glyphs (beside this
file) learns scikit-learn's handwritten digits, 60 % of whose training labels were replaced. On your own:

    accelerate launch recipes/vit_noisy.py --model_name_or_path google/vit-base-patch16-224-in21k \\
        --dataset_name ethz/food101 --test_split validation --noise symmetric --noise_rate 0.4
    accelerate launch recipes/vit_noisy.py --model_name_or_path facebook/dinov2-small \\
        --data_dir photos --noise none --noise_transition T.json --layer_radius 0.03

``--data_dir`` is an imagefolder (photos/train/CLASS/*.png, photos/test/CLASS/*.png). With ``--noise
none`` the training labels are taken to be noisy already. Test labels are never touched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from noisy_runs import NoisyRunArguments, Task, classification_head, compare, load, name_of_data, parse
from transformers import AutoModelForImageClassification, PreTrainedModel

# The one at the top of transformers asks for torchvision before 5.19.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

HERE = Path(__file__).parent


@dataclass
class RecipeArguments(NoisyRunArguments):
    """What to train on, how to corrupt it, and which methods to compare."""

    model_name_or_path: str = field(
        default=str(HERE / "glyph_vit"),
        metadata={"help": "A pretrained image model: a folder or a Hub name."},
    )
    data_dir: str | None = field(default=None, metadata={"help": "An imagefolder with train and test."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})


def main() -> None:
    recipe, arguments = parse(
        RecipeArguments,
        __doc__,
        output_dir="outputs/vit_noisy",
        num_train_epochs=20,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=64,
        learning_rate=1e-3,
        layer_radius="0.01",
        radius_mode="relative",
        remove_unused_columns=False,
    )
    compare(image_task(recipe), recipe, arguments)


def image_task(recipe: RecipeArguments) -> Task:
    """The data, the model, and how pictures become its inputs."""
    data = load(recipe, digits, data_dir=recipe.data_dir)
    if not isinstance(data["train"].features[recipe.image_column], Image):
        # A column of file names, as a csv file has.
        data = data.cast_column(recipe.image_column, Image())
    processor = AutoImageProcessor.from_pretrained(recipe.model_name_or_path)

    def pixels(batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch[recipe.image_column]]
        return {**processor(images, return_tensors="pt"), "labels": batch[recipe.label_column]}

    def make_model(names: list[str]) -> PreTrainedModel:
        return AutoModelForImageClassification.from_pretrained(recipe.model_name_or_path, **classification_head(names))

    return Task(
        data,
        name_of_data(recipe, "handwritten digits of scikit-learn", data_dir=recipe.data_dir),
        recipe.label_column,
        make_model,
        processor,
        prepare=lambda part: part.with_transform(pixels),
    )


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


if __name__ == "__main__":
    main()

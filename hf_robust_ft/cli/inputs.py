"""What commands are given: data and numbers."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def seconds(text: str) -> float:
    """A time from 0 on."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds; give one >= 0")
    return value


def seed(text: str) -> int:
    """What every generator of random numbers takes."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no seed; give a whole number from 0 to {2**32 - 1}")
    return int(text)


def add_data_options(command: argparse.ArgumentParser) -> None:
    """Which part of the data, which columns hold what, and how large images are: for every command that reads data."""
    command.add_argument("--config", help="configuration of a data set of the Hub")
    command.add_argument("--split", default="train", help="split of an imagefolder or Hub data set (default: train)")
    command.add_argument("--label-column", default="label", metavar="NAME", help="default: label")
    command.add_argument("--image-column", metavar="NAME", help="images or file names; default: the only image column")
    command.add_argument(
        "--text-column", nargs="+", metavar="NAME", help="texts, two columns for pairs; default: the only text column"
    )
    command.add_argument(
        "--image-size", type=positive, metavar="PIXELS", help="of each side; default: what the image processor says"
    )


def is_file(source: str) -> bool:
    """Whether data come from one file, which has no splits."""
    return Path(source).is_file() or Path(source).suffix.lower() in FORMATS


def load_data(source: str, config: str | None, split: str) -> datasets.Dataset:
    """A file, an imagefolder or a data set of the Hub.

    Raises:
        ValueError: a file of another format, a damaged one, or a split that doesn't exist.
        OSError: there is no such file, folder or data set.
    """
    try:
        return _loaded(source, config, split)
    except (OSError, ImportError):
        raise
    except Exception as error:  # of readers that met what they did not expect
        if isinstance(error, ValueError) and not isinstance(error, DatasetsError):
            raise
        cause = error.__cause__ or error
        said = (str(cause).splitlines() or [type(cause).__name__])[0][:200]
        raise ValueError(
            f"data '{source}' can't be read ({said}): is the file empty, damaged, or of another format than its name "
            "says?"
        ) from error


def _loaded(source: str, config: str | None, split: str) -> datasets.Dataset:
    path = Path(source)
    kind = FORMATS.get(path.suffix.lower())
    loaded: Any
    if path.is_file():
        if kind is None:
            raise ValueError(f"data '{source}' ends in '{path.suffix}'; give one of {', '.join(FORMATS)}")
        return datasets.load_dataset(kind, data_files=source, split="train")
    if path.is_dir():
        return datasets.load_dataset("imagefolder", data_dir=source, split=split)
    # No name on the Hub looks like these.
    if kind is not None or path.is_absolute() or source.startswith(".") or source.count("/") > 1:
        raise FileNotFoundError(f"data '{source}' does not exist; check the path (a Hub name is OWNER/NAME)")
    try:
        loaded = datasets.load_dataset(source, config, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"data '{source}' is neither a file or folder here nor a data set that the Hub gives: {error}"
        ) from error
    return loaded

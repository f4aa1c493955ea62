"""The command ``hf-robust-ft``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers

from .diagnosis import FILES, diagnose

FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}

DESCRIPTION = """\
Are the labels of a data set noisy? Estimates how often which class is mistaken for which (T), from the noisy labels
and the frozen backbone of a pretrained model alone, ranks the labels that are probably wrong, and says what to train
with."""

EXAMPLES = """\
examples:
  hf-robust-ft diagnose facebook/dinov2-small photos --image-size 56 --output diagnosis
  hf-robust-ft diagnose sentence-transformers/all-MiniLM-L6-v2 reviews.csv --text-column review --label-column stars
  hf-robust-ft diagnose facebook/dinov2-small ethz/food101 --split train --max-examples 5000 --image-size 56

exit codes: 0 diagnosed (whatever was found), 2 wrong arguments or input, 130 interrupted"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit code."""
    args = _parser().parse_args(arguments)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # that the head is a new one is no news
    try:
        return _diagnose(args)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"hf-robust-ft: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-robust-ft", description="Fine-tuning on noisy labels: the tools.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "diagnose",
        help="are the labels noisy, how, which ones, and what to do?",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("model", help="a pretrained image or text model: a folder or a Hub name; needs no head")
    command.add_argument(
        "data", help="a .parquet, .csv, .json or .jsonl file, an imagefolder (CLASS/*.png in it), or a Hub name"
    )
    command.add_argument("--config", help="configuration of a data set of the Hub")
    command.add_argument("--split", default="train", help="split of an imagefolder or Hub data set (default: train)")
    command.add_argument("--label-column", default="label", metavar="NAME", help="default: label")
    command.add_argument("--image-column", metavar="NAME", help="images or file names; default: the only image column")
    command.add_argument(
        "--text-column", nargs="+", metavar="NAME", help="texts, two columns for pairs; default: the only text column"
    )
    command.add_argument(
        "--image-size", type=_positive, metavar="PIXELS", help="of each side; default: what the image processor says"
    )
    command.add_argument(
        "--max-examples", type=_positive, metavar="N", help="look at so many, drawn at random; default: all"
    )
    command.add_argument(
        "--output",
        metavar="DIR",
        help="write diagnosis.json, transition_estimate.json, suspects.csv and T.png (needs matplotlib) to this folder",
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of the report")
    command.add_argument("--seed", type=int, default=0, help="of all random draws (default: 0)")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def _diagnose(args: argparse.Namespace) -> int:
    found = diagnose(
        args.model,
        load_data(args.data, args.config, args.split),
        label_column=args.label_column,
        image_column=args.image_column,
        text_column=args.text_column,
        image_size=args.image_size,
        max_examples=args.max_examples,
        seed=args.seed,
    )
    if args.output:
        found = found.save(args.output)
    sys.stdout.write((json.dumps(found.summary(), indent=1) if args.json else str(found)) + "\n")
    if args.output and not args.json:
        written = [name for name in FILES if (Path(args.output) / name).is_file()]
        sys.stdout.write(f"\nWritten to {args.output}: {', '.join(written)}\n")
    return 0


def load_data(source: str, config: str | None, split: str) -> datasets.Dataset:
    """A file, an imagefolder or a data set of the Hub.

    Raises:
        ValueError: a file of another format, or a split that doesn't exist.
        OSError: there is no such file, folder or data set.
    """
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

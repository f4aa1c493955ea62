"""``hf-robust-ft diagnose``: are the labels of a data set noisy?"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..diagnosis import FILES, diagnose
from .inputs import add_data_options, load_data, positive, seed

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


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Its arguments."""
    command: argparse.ArgumentParser = commands.add_parser(
        "diagnose",
        help="are the labels noisy, how, which ones, and what to do?",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    command.add_argument("model", help="a pretrained image or text model: a folder or a Hub name; needs no head")
    command.add_argument(
        "data", help="a .parquet, .csv, .json or .jsonl file, an imagefolder (CLASS/*.png in it), or a Hub name"
    )
    add_data_options(command)
    command.add_argument(
        "--max-examples", type=positive, metavar="N", help="look at so many, drawn at random; default: all"
    )
    command.add_argument(
        "--output",
        metavar="DIR",
        help="write diagnosis.json, transition_estimate.json, suspects.csv and T.png (needs matplotlib) to this folder",
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of the report")
    command.add_argument("--seed", type=seed, default=0, help="of all random draws (default: 0)")
    return command


def run(args: argparse.Namespace) -> int:
    """Diagnose, print and write."""
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

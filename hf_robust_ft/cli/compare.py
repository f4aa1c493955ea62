"""``hf-robust-ft compare``: measured models side by side."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..card.data import plain
from ..comparison import differences, read_models, summary, table
from ..comparison_plot import FILE, plot_comparison

DESCRIPTION = """\
Measured models side by side: metrics that they share, noise, constraints, distance, Σ √𝓗, bounds, the measured gap,
certificates; and in what they can't be compared (another architecture, another loss, other numbers of examples)."""

DETAILS = """\
examples:
  hf-robust-ft compare plain robust
  hf-robust-ft compare plain robust lora --output comparison

exit codes: 0 compared (whether or not they can be), 2 wrong arguments or input, 130 interrupted"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Its arguments."""
    command: argparse.ArgumentParser = commands.add_parser(
        "compare", help="measured models side by side", description=DESCRIPTION, epilog=DETAILS
    )
    command.add_argument(
        "models", nargs="+", metavar="FOLDER", help="what hf-robust-ft measure or trainer.create_model_card() wrote to"
    )
    command.add_argument("--output", metavar="DIR", help=f"draw them to {FILE} in this folder (needs matplotlib)")
    command.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return command


def run(args: argparse.Namespace) -> int:
    """Read, print and draw."""
    models = read_models(args.models)
    notes = differences(models)
    drawn = args.output is not None and plot_comparison(models, Path(args.output) / FILE)
    if args.json:
        content = plain({"models": [summary(model) for model in models], "differences": notes})
        sys.stdout.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return 0
    sys.stdout.write(table(models) + "\n")
    if notes:
        sys.stdout.write("\nNot everything compares:\n" + "".join(f"  {note}\n" for note in notes))
    if args.output is not None:
        sys.stdout.write(f"\nDrawn to {Path(args.output) / FILE}\n" if drawn else "\nNothing was drawn\n")
    return 0

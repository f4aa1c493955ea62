"""``hf-robust-ft card``: the model card again, from its files alone."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..card import add_card, read_card
from ..card.readme import foreign_readme
from ..card.write import README

DESCRIPTION = """\
Render the model card again from robust_card.json and the reports beside it, without model or data: after a change to
that file (its description, limits or license), or with another version of hf-robust-ft. Of a README.md that something
else wrote, only a section between two comments is added or replaced."""

DETAILS = """\
examples:
  hf-robust-ft card out
  hf-robust-ft card out --output preview

exit codes: 0 written, 2 wrong arguments or input (nothing is written then), 130 interrupted"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Its arguments."""
    command: argparse.ArgumentParser = commands.add_parser(
        "card", help="render a model card again from its files", description=DESCRIPTION, epilog=DETAILS
    )
    command.add_argument("folder", help="what hf-robust-ft measure or trainer.create_model_card() wrote to")
    command.add_argument("--output", metavar="DIR", help="folder to write to; default: the same")
    return command


def run(args: argparse.Namespace) -> int:
    """Read, render and write."""
    data, report, estimate = read_card(args.folder)
    folder = args.output or args.folder
    foreign_readme(folder)  # raises, if it is damaged
    own = add_card(folder, data, report, estimate)
    sys.stdout.write(
        f"Written to {folder}: {README if own else f'a section of {README}, which is not this package’s'}\n"
    )
    return 0

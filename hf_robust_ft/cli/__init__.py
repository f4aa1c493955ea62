"""The command ``hf-robust-ft``. Each module here is a subcommand: ``add_parser`` describes it, ``run`` does it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import transformers

from ..curvature import MeasurementStopped
from . import card, compare, diagnose, measure, push

COMMANDS = (diagnose, measure, card, compare, push)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit code."""
    args = _parser().parse_args(arguments)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # that a head is a new one is no news
    try:
        return int(args.run(args))
    except (ValueError, OSError, ImportError, MeasurementStopped) as error:
        sys.stderr.write(f"hf-robust-ft: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-robust-ft", description="Fine-tuning on noisy labels: the tools.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        added = command.add_parser(commands)
        added.formatter_class = argparse.RawDescriptionHelpFormatter
        added.set_defaults(run=command.run)
    return parser

"""``hf-robust-ft push``: the folder of a model to the Hub."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ..hub import PushFailed, public_files, push_folder

DESCRIPTION = """\
Push the folder of a model to the Hub as it is: weights, configuration, processor, card, reports and pictures, in one
commit. Makes the repository if there is none, and sends nothing that it has already. Checkpoints, training_args.bin,
names that begin with an underscore, tables and logs stay here."""

EXAMPLES = """\
examples:
  hf-robust-ft push out --repo-id me/my-model
  HF_TOKEN=... hf-robust-ft push out --repo-id my-lab/my-model --private

The access token is that of `hf auth login`, or in the variable HF_TOKEN.

exit codes: 0 pushed, 1 the Hub did not take it (nothing is lost), 2 wrong arguments or input, 130 interrupted"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add ``push`` to the commands of a parser (what ``add_subparsers`` returned)."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "push",
        help="push a model with its card and reports to the Hub",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument("folder", help="of a model, such as the output folder of a training")
    parser.add_argument("--repo-id", required=True, metavar="OWNER/NAME", help="on the Hub; NAME alone is yours")
    parser.add_argument("--revision", metavar="BRANCH", help="one that exists (default: the main one)")
    parser.add_argument("--private", action="store_true", help="make the repository, if it has to be made, private")
    parser.add_argument("--json", action="store_true", help="print the address, the commit and the files as JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Push, say what was pushed, and return the exit code.

    Raises:
        ValueError: of :func:`~hf_robust_ft.push_folder`.
    """
    files = list(public_files(args.folder))
    try:
        # None, not False: what the account or the organization prescribes.
        commit = push_folder(args.folder, args.repo_id, revision=args.revision, private=args.private or None)
    except PushFailed as error:
        sys.stderr.write(f"hf-robust-ft: error: {error}\n")
        return 1
    if args.json:
        said = json.dumps({"url": str(commit.repo_url), "commit": commit.oid, "files": files}, indent=1)
    else:
        said = f"{commit.repo_url} at {commit.oid}: {', '.join(files)}"
    sys.stdout.write(f"{said}\n")
    return 0

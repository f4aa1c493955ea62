"""``hf-robust-ft measure``: curvature, bounds and card of a model that was fine-tuned by anything."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..card import CardData, add_card
from ..card.data import FILE as CARD_FILE
from ..card.data import plain
from ..card.facts import hardware, merged, package_versions
from ..card.readme import foreign_readme
from ..card.write import README, read_estimate
from ..estimation import TransitionEstimate
from ..files import inside
from ..finetuned_measurement import TIME_BUDGET, FinetunedMeasurement, measure_finetuned
from ..hessian_measurement import EXAMPLES
from ..hessian_measurement import FILE as REPORT_FILE
from ..noise_estimate import saved_estimate
from ..redaction import redacted
from .inputs import add_data_options, is_file, load_data, positive, seconds, seed
from .measurement_text import summary, text

logger = logging.getLogger(__name__)

DESCRIPTION = """\
How sharply does the loss of a fine-tuned model bend along the way that each layer travelled from the pretrained
weights, and what does that bound? For any image or text classifier that transformers loads, whoever trained it; a
PEFT adapter (LoRA and its kin) is merged into its base model first.

Writes hessian_report.json, robust_card.json, pictures under plots/ (needs matplotlib) and the card, README.md. Of a
README.md that something else wrote, only a section between two comments is added or replaced."""

DETAILS = """\
examples:
  hf-robust-ft measure out --reference facebook/dinov2-small --dataset photos --eval-split test --image-size 56
  hf-robust-ft measure out --reference google-bert/bert-base-uncased --dataset train.csv --eval-dataset test.csv \\
      --text-column review --label-column stars
  hf-robust-ft measure my-lora --dataset nyu-mll/glue --config sst2 --text-column sentence --eval-split validation
  hf-robust-ft measure out --reference google-bert/bert-base-uncased --dataset noisy.csv --eval-dataset test.csv \\
      --noise-transition diagnosis/transition_estimate.json

The bounds are about the training examples: give as DATA what the model was trained on, without augmentation. The
time: about 2.4 forward passes a layer and example for the sound bounds (told before they start), then Lanczos, which
makes them tighter, within --time-budget. Ctrl-C ends the measurement early and keeps what it found.

exit codes: 0 measured, 2 wrong arguments or input (nothing is written then), 130 interrupted"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Its arguments."""
    command: argparse.ArgumentParser = commands.add_parser(
        "measure",
        help="how far can a fine-tuned model be trusted? Curvature, bounds, model card",
        description=DESCRIPTION,
        epilog=DETAILS,
    )
    command.add_argument("model", help="the fine-tuned model or adapter, with its processor: a folder or a Hub name")
    command.add_argument(
        "--reference",
        metavar="BASE",
        help="the model that its training started from, a folder or a Hub name; default for an adapter: its base model",
    )
    command.add_argument(
        "--dataset",
        required=True,
        metavar="DATA",
        help="the training data: a .parquet, .csv, .json or .jsonl file, an imagefolder (CLASS/*.png in it), or a Hub "
        "name",
    )
    add_data_options(command)
    command.add_argument(
        "--eval-dataset", metavar="DATA", help="other data, for the measured gap and a bound on the error"
    )
    command.add_argument(
        "--eval-split", metavar="NAME", help="their split; without --eval-dataset, this split of the training data"
    )
    command.add_argument(
        "--examples", type=positive, default=EXAMPLES, metavar="N", help=f"measure so many (default: {EXAMPLES})"
    )
    command.add_argument(
        "--time-budget",
        type=seconds,
        default=TIME_BUDGET,
        metavar="SECONDS",
        help=f"for Lanczos (default: {TIME_BUDGET:g}); 0 leaves it out",
    )
    command.add_argument(
        "--noise-transition",
        metavar="FILE_OR_RATE",
        help="noise of the training labels, T[i, j] = P(noisy label = j | true label = i): a symmetric rate, or a .npy "
        "or .json file, such as diagnose writes; default: labels are taken as they are",
    )
    command.add_argument(
        "--eval-labels",
        choices=("clean", "noisy"),
        default="as given",
        help="what the evaluation labels are: clean, or noisy by --noise-transition, too (default: not known)",
    )
    command.add_argument(
        "--output", metavar="DIR", help="folder to write to; default: the model's, if it is a folder here"
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of the report")
    command.add_argument("--seed", type=seed, default=0, help="of the draw of examples (default: 0)")
    return command


def run(args: argparse.Namespace) -> int:
    """Check, measure, write, print: nothing is written before all is measured."""
    folder = _output(args)
    before, estimate_before = _card_before(folder, Path(args.model))
    foreign_readme(folder)  # raises, if it is damaged
    estimate = saved_estimate(args.noise_transition)
    dataset = load_data(args.dataset, args.config, args.split)
    evaluated = _eval_data(args)
    with _told():
        found = measure_finetuned(
            args.model,
            args.reference,
            dataset,
            evaluated,
            label_column=args.label_column,
            image_column=args.image_column,
            text_column=args.text_column,
            image_size=args.image_size,
            examples=args.examples,
            time_budget=args.time_budget,
            noise_transition=args.noise_transition,
            eval_labels=args.eval_labels,
            seed=args.seed,
        )
    if args.noise_transition is None and before is not None and before.training_known:
        estimate = estimate_before
        if before.noise_source is not None:
            logger.warning(
                "the model was trained with a noise model (%s), but labels were taken as they are: if they are noisy "
                "ones, give --noise-transition",
                before.noise_source,
            )
    data = _card(args, found, before)
    own = add_card(folder, data, found.measurement.report, estimate)
    written = [REPORT_FILE, CARD_FILE, *_pictures(folder), README if own else f"a section of {README}"]
    if args.json:
        content = {**summary(data, found), "output": str(folder), "written": written}
        sys.stdout.write(json.dumps(plain(content), indent=1, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(f"{text(args.model, data, found)}\n\nWritten to {folder}: {', '.join(written)}\n")
        if not own:
            sys.stdout.write(
                f"{README} was there and is not this package's: all outside of that section is as it was\n"
            )
    return 0 if found.measurement.report.complete else 130


# What is given


def _output(args: argparse.Namespace) -> Path:
    if args.output:
        folder = Path(args.output)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"output '{folder}' is a file; give a folder")
        return folder
    if not Path(args.model).is_dir():
        raise ValueError(
            f"output is not given, and model '{args.model}' is no folder here to write to; give --output DIR"
        )
    return Path(args.model)


def _eval_data(args: argparse.Namespace) -> Any:
    if args.eval_dataset is not None:
        config = args.config if args.eval_dataset == args.dataset else None
        return load_data(args.eval_dataset, config, args.eval_split or args.split)
    if args.eval_split is None:
        return None
    if is_file(args.dataset):
        raise ValueError(
            f"eval_split is '{args.eval_split}', but data '{args.dataset}' are a file, which has no splits; give the "
            "evaluation data by --eval-dataset FILE"
        )
    return load_data(args.dataset, args.config, args.eval_split)


def _card_before(output: Path, model: Path) -> tuple[CardData | None, TransitionEstimate | None]:
    """What an earlier card says, and the estimate of T that it names."""
    for folder in (output, model):
        if (folder / CARD_FILE).is_file():
            data = CardData.load(inside(folder, CARD_FILE))
            return data, read_estimate(folder, data)
    return None, None


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Say on stderr what is being done."""
    logger = logging.getLogger("hf_robust_ft")
    handler, level = logging.StreamHandler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


# What is written

BY_THE_USER = ("model_name", "description", "language", "license", "tags", "limits", "other_bounds")
ABOUT_NOISE = ("noise_source", "transition", "noise_rate", "condition_number", "amplification")


def _card(args: argparse.Namespace, found: FinetunedMeasurement, before: CardData | None) -> CardData:
    """What was measured now, then what an earlier card knows of the training, then what the model tells."""
    measurement, facts = found.measurement, found.facts
    now: dict[str, Any] = {
        "bounds": list(found.bounds),
        "risks": list(measurement.risks),
        "reference": measurement.reference,
        "training_examples": facts["training_examples"],
        "measured_by": _command(args),
    }
    kept: dict[str, Any] = {}
    if before is not None and before.training_known:
        noisy = "noise_source" in facts
        kept = {name: value for name, value in vars(before).items() if not (noisy and name in ABOUT_NOISE)}
        now["seeds"] = {**before.seeds, "measurement": args.seed}
    elif before is not None:
        kept = {name: getattr(before, name) for name in BY_THE_USER}
    local = Path(args.dataset).exists()
    told = {
        **facts,
        "model_name": Path(args.model).absolute().name if Path(args.model).exists() else args.model,
        "datasets": ["/".join(Path(args.dataset).parts[-2:]) if local else args.dataset],
        "dataset_ids": [] if local else [args.dataset],
        "dataset_args": [args.config] if args.config and not local else [],
        "seeds": {"measurement": args.seed},
        "versions": package_versions(),
        "hardware": hardware(),
    }
    return merged(now, kept, told)


def _command(args: argparse.Namespace) -> list[str]:
    """This command, with what is not the default."""
    words = ["hf-robust-ft", "measure", args.model]
    defaults = vars(_defaults())
    for name, value in vars(args).items():
        if name in ("model", "run", "json") or value == defaults.get(name):
            continue
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return [redacted(word) for word in words]


def _defaults() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    return add_parser(parser.add_subparsers()).parse_args(["", "--dataset", ""])


def _pictures(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in (folder / "plots").glob("*.png"))

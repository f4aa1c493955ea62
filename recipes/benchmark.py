"""Ways to fine-tune on noisy labels, on real data with real pretrained models: methods × data × noise × seeds.

    python recipes/benchmark.py --sources wordnet-verbs --seeds 100
    accelerate launch --multi_gpu --num_processes 8 recipes/benchmark.py --seeds 100 101 102 103 104
    torchrun --nproc_per_node 2 recipes/benchmark.py --seeds 100        # two processes on a CPU, or on one GPU

Each run appends one line of JSON to ``--output``; runs that stand there are skipped, so that the command that broke
off is also the one that goes on. Several processes share the runs, each on a GPU of its own where there are as many.
Settings are those of ``--settings``, which ``python recipes/benchmark_report.py --freeze`` chose from the runs of
``--tune``, which goes on beyond a list of learning rates that a method likes best at its end, when it is repeated,
until it has nothing to do:

    torchrun --nproc_per_node 2 recipes/benchmark.py --tune --seeds 0 --noises symmetric-0.4 pair_flip-0.4 \\
        --output outputs/benchmark_development.jsonl

``benchmark_report.py`` makes tables and pictures of the lines. All but the digits need the models that
``../shared/assets/fetch_models.py`` lays out in .assets/models; fashion-mnist and wordnet-nouns ``../shared/data``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from benchmark_data import NOISES, RULES, SOURCES, SPECIAL, Source, draw
from benchmark_methods import METHODS, Setting, run
from benchmark_tuning import outward, scores_of
from resumable import Line, append_line, own_share, read_lines
from tqdm import tqdm

from hf_robust_ft import Diagnosis, diagnose

SETTINGS = Path(__file__).parent / "results" / "benchmark_settings.json"
KEY = ("source", "noise", "seed", "method", "setting")
Job = tuple[str, str, int, str, Setting]
"""What ``KEY`` names."""
VERSIONS = ("torch", "transformers", "accelerate", "datasets")


def main() -> int:
    options = parse()
    rank, world = own_share()
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    lines = read_lines(options.output)
    done = {key(line) for line in lines}
    jobs = [
        (name, noise, seed, method, setting)
        for seed in options.seeds
        for name in options.sources
        for noise in options.noises or SOURCES[name].noises
        if noise in (*SOURCES[name].noises, *SPECIAL)
        for method in options.methods
        for setting in settings_of(method, name, options)
    ]
    if options.tune:
        jobs += further(lines, jobs)
    folder = options.output.parent / "diagnoses"
    wanted = {job[:3] for job in jobs if key_of(job) not in done}
    for name, noise, seed in list(dict.fromkeys(job[:3] for job in jobs))[rank::world]:
        missing = not (case_folder(folder, name, noise, seed) / "diagnosis.json").is_file()
        if missing and (name, noise, seed) in wanted:
            make_diagnosis(SOURCES[name], noise, seed, folder)
    own = [job for job in jobs[rank::world] if key_of(job) not in done]
    failed, case = 0, None
    bar = tqdm(own, unit="run", disable=rank > 0, file=sys.stdout, mininterval=5)
    for name, noise, seed, method, setting in bar:
        source = SOURCES[name]
        if case != (name, noise, seed):
            case = name, noise, seed
            parts = draw(source, noise, seed)
            diagnosis = wait_for_diagnosis(case_folder(folder, *case))
        try:
            result = run(method, setting, source, parts, diagnosis, seed)
        except Exception:  # noqa: BLE001 - the other runs go on; the exit status tells
            traceback.print_exc()
            print(f"failed: {name}, {noise}, seed {seed}, {method}, {setting}", file=sys.stderr)
            failed += 1
            continue
        about = {
            "wrong": float((parts["train"].labels != parts["train"].clean).mean()),
            "estimated": round(diagnosis.estimate.noise_rate, 4),
            "recommended": diagnosis.arguments.get("loss_correction", "none"),
        }
        run_of = dict(zip(KEY, (name, noise, seed, method, setting), strict=True))
        append_line(run_of | about | result | machine(), options.output)
    if failed:
        print(f"{failed} runs failed; the same command tries them again", file=sys.stderr)
    return int(failed > 0 and world == 1)  # a launcher would stop the other processes


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument(
        "--noises",
        nargs="+",
        choices=(*NOISES, RULES, *SPECIAL),
        help="default: all of each source's tables",
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[100], help="below 100: development")
    parser.add_argument("--tune", action="store_true", help="run every setting of each method")
    parser.add_argument("--settings", type=Path, default=SETTINGS, help="the settings that were chosen")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark.jsonl"))
    return parser.parse_args()


def settings_of(method: str, source: str, options: argparse.Namespace) -> tuple[Setting, ...]:
    """All that are tuned, or the one that was chosen."""
    if options.tune:
        return METHODS[method].settings
    if not options.settings.is_file():
        raise FileNotFoundError(
            f"settings {options.settings} does not exist; choose them with benchmark_report.py --freeze, or run --tune"
        )
    # The verbs were never tuned on: they take what the nouns chose.
    chosen = json.loads(options.settings.read_text()).get({"wordnet-verbs": "wordnet-nouns"}.get(source, source), {})
    if method not in chosen:
        raise ValueError(
            f"settings {options.settings} has none for '{method}' on '{source}'; choose them with --tune and "
            "benchmark_report.py --freeze, or leave it out with --sources and --methods"
        )
    return (chosen[method],)


def further(lines: Sequence[Line], jobs: Sequence[Job]) -> list[Job]:
    """Of each method whose ``jobs`` have all been run, those of learning rates beyond its list: see
    :func:`~benchmark_tuning.outward`."""
    done = {key(line) for line in lines}
    cases: dict[tuple[str, str], set[tuple[str, int]]] = defaultdict(set)
    for source, noise, seed, method, _ in jobs:
        cases[source, method].add((noise, seed))

    def missing(of: tuple[str, str], settings: Iterable[Setting]) -> list[Job]:
        every = [(of[0], noise, seed, of[1], setting) for setting in settings for noise, seed in sorted(cases[of])]
        return [job for job in every if key_of(job) not in done]

    listed = {(job[0], job[3]) for job in jobs if key_of(job) not in done}
    runs = [run for run in lines if (run["noise"], run["seed"]) in cases.get((run["source"], run["method"]), ())]
    found: list[Job] = []
    for of, tried in scores_of(runs).items():
        if of not in listed:
            # A mean over some of the cases can't be compared.
            found += missing(of, map(json.loads, tried)) or missing(of, outward(tried))
    return found


def case_folder(folder: Path, name: str, noise: str, seed: int) -> Path:
    """Where the diagnosis of these labels lies."""
    return folder / f"{name}-{noise}-{seed}"


def make_diagnosis(source: Source, noise: str, seed: int, folder: Path) -> None:
    """Of the noisy training labels: what is recommended, and the T that all methods get."""
    raw = draw(source, noise, seed)["train"].raw
    found = diagnose(str(source.model), raw, image_size=source.image_size, seed=seed)
    found.save(case_folder(folder, source.name, noise, seed))


def wait_for_diagnosis(kept: Path) -> Diagnosis:
    """The one that another process makes, perhaps now."""
    while not (kept / "diagnosis.json").is_file():
        time.sleep(0.5)
    return Diagnosis.load(kept)


def key(line: dict[str, Any]) -> tuple[str, str, int, str, str]:
    """What tells one run from another."""
    source, noise, seed, method, setting = (line[name] for name in KEY)
    return source, noise, seed, method, json.dumps(setting, sort_keys=True)


def key_of(job: Job) -> tuple[str, str, int, str, str]:
    """:func:`key` of the line that a job will have."""
    return key(dict(zip(KEY, job, strict=True)))


def machine() -> dict[str, str]:
    """Versions and device."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device} | {name: version(name) for name in VERSIONS}


if __name__ == "__main__":
    sys.exit(main())

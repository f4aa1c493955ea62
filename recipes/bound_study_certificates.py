"""PAC-Bayes certificates of models of bound_study.py, each trained once more in its way.

    python recipes/bound_study_certificates.py --input outputs/bound_study.jsonl

For each chosen line of ``--input`` the model is trained again, and must end at the line's training loss. Its posterior
has the means where training left them, and one prior scale for the head and one for all else, fitted to the bound. The
certificate bounds the error of the randomised model on examples with labels of the same kind. Certificates end at 1,
where they say nothing, so the divergence from the prior stands beside them: that of each way is what orders them. One
line of JSON a run goes to a file beside the input, ``…_certificates.jsonl``; runs that have theirs are skipped. The
process that ends last prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from bound_study import HERE, Examples, data, drawn, fine_tune, fresh_model, risks, shortened
from bound_study_report import OUTPUT, Record
from resumable import append_line, own_share, read_lines
from scipy.stats import kendalltau
from transformers.utils import logging

from hf_robust_ft import fit_posterior, pac_bayes_certificate

EPOCHS, PASSES = 20, 5
# Relative, of the training loss: the same training on another machine ends elsewhere in the last digits.
SAME = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=str(HERE / "glyph_vit"), help="that of the runs")
    parser.add_argument("--input", type=Path, default=OUTPUT, help="JSON lines of bound_study.py")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1000])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    share, shares = own_share()
    runs = [run for run in read_lines(args.input) if run["n"] in args.sizes and run["seed"] in args.seeds]
    output = args.input.with_stem(f"{args.input.stem}_certificates")
    done = {key(line) for line in read_lines(output)}
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    train, test = data(args.model_name_or_path)
    for run in runs[share::shares]:
        if key(run) not in done:
            examples, _ = drawn(run["n"], run["seed"], run["noise_rate"], train, test)
            append_line(shortened(certified(run, examples, args.model_name_or_path)), output)
    lines = [line for line in read_lines(output) if key(line) in {key(run) for run in runs}]
    if len(lines) == len(runs):
        print(table(lines))


def key(run: Record) -> tuple[str, int, int]:
    """What tells a run from another one."""
    return run["way"], run["n"], run["seed"]


def certified(run: Record, examples: Examples, model_name_or_path: str) -> Record:
    """The model of a run, and its certificate.

    Raises:
        SystemExit: training ends elsewhere than that of the run.
    """
    started = time.perf_counter()
    model, reference = fresh_model(model_name_or_path, run["seed"])
    fine_tune(model, examples, run["way"], run["seed"], run["epochs"])
    batches = examples.batches(next(model.parameters()).device)
    loss = risks(model, batches)[0].mean().item()
    if abs(loss - run["train_loss"]) > SAME * run["train_loss"]:
        raise SystemExit(
            f"{key(run)} ends at a training loss of {loss:.6g}, in the input at {run['train_loss']:.6g}: these are not "
            "its models; make the input on this machine"
        )
    posterior = fit_posterior(
        model, reference, batches, epochs=EPOCHS, groups=["classifier*"], move=False, seed=run["seed"]
    )
    bound = pac_bayes_certificate(model, posterior, batches, passes=PASSES, seed=run["seed"])
    assert bound.value is not None
    return {
        **{name: run[name] for name in ("way", "n", "seed", "noise_rate", "gap", "error_gap", "test_error")},
        "certificate": bound.value,
        "empirical": bound.terms["empirical"],
        "kl": posterior.kl,
        "train_loss": loss,
        "seconds": time.perf_counter() - started,
    }


def table(lines: Sequence[Record]) -> str:
    """One row a run, and how the divergences are ordered."""
    rows = [
        "| way | n | seed | certificate | error of the randomised model | KL / n | test error | gap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        rows.append(
            f"| {line['way']} | {line['n']} | {line['seed']} | {line['certificate']:.3f} | {line['empirical']:.3f} | "
            f"{line['kl'] / line['n']:.3g} | {line['test_error']:.3f} | {line['gap']:.3f} |"
        )
    for n, seed in sorted({(line["n"], line["seed"]) for line in lines}):
        some = [line for line in lines if (line["n"], line["seed"]) == (n, seed)]
        tau = kendalltau([line["kl"] for line in some], [line["gap"] for line in some]).statistic
        rows.append(f"\nKendall's τ of KL with the gap, n = {n}, seed {seed}: {tau:.2f}")
    return "\n".join(rows)


if __name__ == "__main__":
    main()

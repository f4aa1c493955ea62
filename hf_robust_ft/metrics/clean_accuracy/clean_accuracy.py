"""Clean accuracy and recalls from noisy labels, as a metric of ``evaluate``:

    from hf_robust_ft import CLEAN_ACCURACY_METRIC
    metric = evaluate.load(CLEAN_ACCURACY_METRIC)
    metric.compute(predictions=predictions, references=noisy_labels, transition=T)

The loader takes the path of a local folder as it is, so no network is needed.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
import numpy.typing as npt

from hf_robust_ft.clean_accuracy import clean_accuracy

_INPUTS = """
predictions: predicted classes, integers in 0..K-1.
references: noisy labels, integers in 0..K-1; -100 where there is none.
transition: T, [K, K], T[i, j] = P(noisy label = j | true label = i); or a path to it (.npy, .json).
transition_samples: draws of an estimated T, [B, K, K]; None if T is known.
confidence: of each interval, 0.95 unless told.

Gives clean_accuracy, clean_accuracy_low, clean_accuracy_high, noisy_accuracy, and for each class k clean_recall_k,
clean_recall_k_low, clean_recall_k_high (NaN, 0 and 1 for a class that does not seem to occur).
"""


class CleanAccuracyMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """See :func:`hf_robust_ft.clean_accuracy` for the estimate, its assumptions and its errors."""

    def _info(self) -> evaluate.MetricInfo:
        # Not int64: the loader would silently cut soft labels down to integers.
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description="Accuracy and recall on clean labels, with intervals, estimated from noisy labels and their "
            "transition matrix.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(
        self,
        predictions: npt.ArrayLike,
        references: npt.ArrayLike,
        transition: Any,
        transition_samples: Any = None,
        confidence: float = 0.95,
    ) -> dict[str, float]:
        found = clean_accuracy(
            _as_integers(predictions),
            _as_integers(references),
            transition,
            transition_samples=transition_samples,
            confidence=confidence,
        )
        flat = {
            "clean_accuracy": found.accuracy,
            "clean_accuracy_low": found.interval[0],
            "clean_accuracy_high": found.interval[1],
            "noisy_accuracy": found.noisy_accuracy,
        }
        for k, (recall, (low, high)) in enumerate(zip(found.recall, found.recall_interval, strict=True)):
            flat |= {f"clean_recall_{k}": recall, f"clean_recall_{k}_low": low, f"clean_recall_{k}_high": high}
        return flat


def _as_integers(values: npt.ArrayLike) -> npt.NDArray[Any]:
    """Class indices as integers again; what are none as it is, for clean_accuracy to refuse."""
    numbers = np.asarray(values)
    integers = numbers.astype(np.int64)
    return integers if (integers == numbers).all() else numbers

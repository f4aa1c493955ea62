"""What an estimate of T carries, how it reads, and how it is kept."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from ..files import written_whole
from ..noise import Matrix, validate_transition
from ..stored import Count, Share, Size, Within, checked_fields, in_json, read_json
from .verdict import NoiseLevel, noise_level

FORMAT = "hf_robust_ft.TransitionEstimate/1"

# The text of an estimate prints T whole up to this many classes, and its largest entries beyond.
PRINTED_CLASSES = 12


@dataclass(frozen=True, eq=False)
class TransitionEstimate:
    """An estimated noise transition matrix with its uncertainty. Rows are the true class.

    Intervals are 95 % ones, made of errors that include bias: recipes/RESULTS.md has how often they held the truth in
    simulations. They do not cover the misfit of a linear head.
    """

    transition: Matrix
    """[K, K], ``T[i, j] = P(noisy = j | true = i)``."""
    standard_error: Matrix
    """[K, K], by bootstrap: root mean square about the estimate, bias included."""
    interval: Matrix
    """[K, K, 2]: lower and upper end for each entry; its diagonal is the interval of ``T[i, i]``."""
    noise_rate: Share
    """``Σ_i P(y = i) (1 - T[i, i])``: the share of wrong labels."""
    noise_rate_error: Size
    noise_rate_interval: tuple[Share, Share]
    clean_prior: Matrix
    """[K]: ``P(y = i)`` of the true class."""
    condition_number: Size = field(metadata=in_json({None: float("inf")}))
    """``‖T‖₂ ‖T^-1‖₂``; 1 is noiseless, infinity is not identifiable."""
    smallest_singular_value: Size
    """How far T is from a singular matrix, in the spectral norm."""
    singular_value_interval: tuple[float, float]
    """If it reaches 0, a singular T explains the labels as well: they may not identify the true classes."""
    effective_counts: Matrix
    """[K]: ``Σ_n P(y = i | x_n)²``, the examples of class i, each counted by how surely it is one."""
    counts: Matrix
    """[K]: how many examples carry each noisy label."""
    class_conditional_p_value: Share
    """Small: noise depends on the example, not on its class alone, or a linear head does not fit exactly."""
    class_conditional_effect: Size
    """How well features foretell which labels are wrong beyond what their class says: a correlation, 0 where it is
    negative. recipes/RESULTS.md has what it comes to on real data."""
    method: str
    n: Annotated[int, Within(1)]
    bootstrap: Count
    """How many replicates the errors and the p-value come from."""
    folds: Count
    seed: int
    verdict: str
    draws: Matrix
    """[bootstrap, K, K]: T as it might have come out, were the estimate the truth: ``transition_samples`` for
    :func:`~hf_robust_ft.clean_accuracy`."""

    @property
    def identifiable(self) -> bool:
        """Whether T is regular throughout its interval, so that correction by it is meaningful."""
        return self.singular_value_interval[0] > 0

    @property
    def informative(self) -> bool:
        """Whether labels surely say something of the true class: T is regular throughout its interval, or the share of
        right labels, at the lower end of its interval, lies above that of the largest class. Enough for posteriors of
        the labels, which need no inverse of T: where classes are rare T may be singular, and most of it known well."""
        return self.identifiable or bool(1 - self.noise_rate_interval[1] > self.clean_prior.max())

    @property
    def noise_level(self) -> NoiseLevel:
        """Whether there is noise: ``"none"``, ``"perhaps"`` or ``"noise"``; clean labels don't look quite clean."""
        return noise_level(self.noise_rate, self.noise_rate_interval, self.n, len(self.transition))

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`save` writes: nothing but what JSON holds."""
        content: dict[str, Any] = {"format": FORMAT}
        for name, value in asdict(self).items():
            content[name] = value.tolist() if isinstance(value, np.ndarray) else value
        if not np.isfinite(self.condition_number):
            content["condition_number"] = None  # JSON knows no infinity
        return content

    @classmethod
    def from_dict(cls, content: Any, source: str = "this") -> TransitionEstimate:
        """From what :meth:`to_dict` gave.

        Args:
            source: what the error calls it.

        Raises:
            ValueError: it is something else.
        """
        try:
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            found = cls(**checked_fields(cls, {name: value for name, value in content.items() if name != "format"}))
            found._check_shapes()
        except ValueError as error:
            raise ValueError(
                f"{source} holds no transition estimate ({error}); give a file that TransitionEstimate.save wrote"
            ) from None
        return found

    def _check_shapes(self) -> None:
        """Raise ``ValueError`` unless every table is of as many classes as T, which is a transition matrix."""
        classes = len(validate_transition(self.transition))
        square = (classes, classes)
        shapes: dict[str, tuple[int, ...]] = {
            "standard_error": square,
            "interval": (*square, 2),
            "clean_prior": (classes,),
            "effective_counts": (classes,),
            "counts": (classes,),
            "draws": (self.bootstrap, *square),
        }
        for name, shape in shapes.items():
            if (found := getattr(self, name).shape) != shape:
                raise ValueError(f"{name} has shape {found}, where T is of {classes} classes and it should be {shape}")
            if (getattr(self, name) < 0).any():
                raise ValueError(f"{name} holds negative numbers")

    def save(self, path: str | Path) -> None:
        """Write the estimate as JSON, at once: a reader never sees half a file."""
        with written_whole(Path(path)) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> TransitionEstimate:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is something else.
            OSError: it can't be read.
        """
        try:
            content = read_json(path)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); give a file that TransitionEstimate.save wrote") from None
        return cls.from_dict(content, str(path))

    def __str__(self) -> str:
        low, high = self.noise_rate_interval
        lines = [
            f"Noise transition matrix of {len(self.transition)} classes, from {self.n} examples ({self.method})",
            f"  noise rate        {self.noise_rate:.1%}  [{low:.1%}, {high:.1%}]",
            f"  condition number  {self.condition_number:.3g}",
            f"  class-conditional p = {self.class_conditional_p_value:.3g}, effect {self.class_conditional_effect:.2f}",
            "",
            *(self._table() if len(self.transition) <= PRINTED_CLASSES else self._largest()),
            "",
            self.verdict,
        ]
        return "\n".join(lines)

    def _table(self) -> list[str]:
        num_classes = len(self.transition)
        lines = ["  true | noisy " + "".join(f"{j:>5}" for j in range(num_classes)) + "   ± diagonal   count"]
        for i, row in enumerate(self.transition):
            entries = "".join(f"{'·' if value < 0.005 else f'{value:.2f}':>5}" for value in row)
            lines.append(
                f"  {i:>4} |       {entries}   {self.standard_error[i, i]:>10.2f}   {self.effective_counts[i]:>5.0f}"
            )
        return lines

    def _largest(self) -> list[str]:
        off = self.transition - np.diag(np.diag(self.transition))
        order = np.argsort(-off, axis=None)[:10]
        lines = ["  most frequent mistakes (true -> noisy):"]
        for flat in order:
            i, j = divmod(int(flat), len(off))
            lines.append(f"  {i:>4} -> {j:<4} {off[i, j]:.2f} ± {self.standard_error[i, j]:.2f}")
        return lines

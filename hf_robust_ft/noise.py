"""Label noise as a transition matrix: build one, check it, invert it, corrupt labels by it.

One convention everywhere: ``T[i, j] = P(noisy label = j | true label = i)``. Rows are the true
class and sum to 1. (cleanlab's ``noise_matrix`` is the transpose.)
"""

from __future__ import annotations

import math
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .stored import parse_json

if TYPE_CHECKING:
    from datasets import Dataset

Matrix = npt.NDArray[np.float64]

IGNORE_INDEX = -100
"""Label of positions that carry no target (padding, sub-words), as in torch and transformers."""

# Rows that were written with six decimals or stored in float32 still pass; a forgotten class does not.
ROW_SUM_TOLERANCE = 1e-5

# Losses are float32 (7 digits) and inverting T costs up to log10(condition number) of them.
MAX_CONDITION_NUMBER = 1e6

# A dense float64 T of this many classes takes 0.8 GB; a larger one is a vocabulary, not a label set.
MAX_CLASSES = 10_000


class InverseTransition(NamedTuple):
    """The inverse of a transition matrix, with what it costs to use it."""

    matrix: Matrix
    """``T^-1``, shape [K, K]. Its rows sum to 1, but its entries are not probabilities."""
    condition_number: float
    """``‖T‖₂ ‖T^-1‖₂``; 1 is noiseless, infinity is not identifiable."""
    amplification: float
    """``ρ = max_j Σ_k |T^-1[j, k]|``: by how much backward correction can at most amplify a loss."""


def symmetric_transition(num_classes: int, rate: float) -> Matrix:
    """T of symmetric noise: a label is wrong with probability ``rate``, each other class equally likely.

    Args:
        num_classes: K, at least 2.
        rate: ``P(noisy ≠ true)`` in [0, 1]. At ``(K - 1) / K`` labels are pure chance and T is singular.

    Returns:
        Shape [K, K], ``1 - rate`` on the diagonal and ``rate / (K - 1)`` elsewhere.

    Raises:
        ValueError: ``num_classes`` or ``rate`` out of range.
    """
    _check_classes(num_classes)
    _check_rate(rate)
    matrix = np.full((num_classes, num_classes), rate / (num_classes - 1))
    np.fill_diagonal(matrix, 1.0 - rate)
    return matrix


def pair_flip_transition(num_classes: int, rate: float) -> Matrix:
    """T of pair-flip noise: class i becomes class i + 1 (the last becomes 0) with probability ``rate``.

    Args:
        num_classes: K, at least 2.
        rate: ``P(noisy ≠ true)`` in [0, 1]. With an even K, T is singular at 0.5.

    Returns:
        Shape [K, K], ``1 - rate`` on the diagonal and ``rate`` right of it.

    Raises:
        ValueError: ``num_classes`` or ``rate`` out of range.
    """
    _check_classes(num_classes)
    _check_rate(rate)
    identity = np.eye(num_classes)
    return (1.0 - rate) * identity + rate * np.roll(identity, 1, axis=1)


def validate_transition(matrix: Any, num_classes: int | None = None) -> Matrix:
    """Check that a matrix is a transition matrix, and return it as float64.

    Args:
        matrix: anything that numpy reads as [K, K]: nested lists, an array, a CPU tensor.
        num_classes: K that the model has, if known.

    Returns:
        A copy, shape [K, K], with rows divided by their sums (they may be off by 1e-5 on input).

    Raises:
        ValueError: not square, wrong K, not finite, negative entries, or rows that do not sum to 1.
    """
    array = _numbers(matrix)
    if array.ndim != 2 or array.shape[0] != array.shape[1] or array.shape[0] < 2:
        raise ValueError(f"noise_transition has shape {array.shape}; a transition matrix is square, [K, K] with K >= 2")
    if num_classes is not None and array.shape[0] != num_classes:
        raise ValueError(
            f"noise_transition is for {array.shape[0]} classes, but the model has {num_classes}; "
            f"give a [{num_classes}, {num_classes}] matrix, or load the model with "
            f"num_labels={array.shape[0]}"
        )
    if not np.isfinite(array).all():
        row, column = np.argwhere(~np.isfinite(array))[0]
        raise ValueError(f"noise_transition[{row}, {column}] is {array[row, column]}; entries must be finite")
    if (array < 0).any():
        row, column = np.argwhere(array < 0)[0]
        raise ValueError(
            f"noise_transition[{row}, {column}] is {array[row, column]:g}; "
            "entries are probabilities and must not be negative"
        )
    sums = array.sum(axis=1)
    worst = int(np.abs(sums - 1).argmax())
    if abs(sums[worst] - 1) > ROW_SUM_TOLERANCE:
        hint = "divide each row by its sum"
        if np.allclose(array.sum(axis=0), 1, atol=ROW_SUM_TOLERANCE):
            hint = "its columns do sum to 1, so it looks transposed: rows are the true class here, pass T.T"
        raise ValueError(f"row {worst} of noise_transition sums to {sums[worst]:.6g}, not 1; {hint}")
    normalised: Matrix = array / sums[:, None]
    return normalised


def load_transition(source: Any, num_classes: int | None = None) -> Matrix:
    """Turn what a user gives as ``noise_transition`` into a transition matrix.

    Args:
        source: a symmetric noise rate in [0, 1); a path to ``.npy`` or ``.json`` (nested lists, or a saved
            :class:`TransitionEstimate`); or the matrix itself. Strings of a number or of nested lists (from a
            command line) are read as such.
        num_classes: K of the model. Needed for a rate.

    Returns:
        The validated matrix, float64 [K, K], ``T[i, j] = P(noisy = j | true = i)``.

    Raises:
        ValueError: what :func:`validate_transition` refuses, a rate without ``num_classes``, a file of
            another kind or with other content.
        FileNotFoundError: the path does not exist.
        OSError: it can't be read.
    """
    source = read_transition(source)
    if isinstance(source, float):
        if num_classes is None:
            raise ValueError(
                f"noise_transition is the rate {source}, but the number of classes is not known; "
                "give the matrix: symmetric_transition(num_classes, rate)"
            )
        return symmetric_transition(num_classes, source)
    return validate_transition(source, num_classes)


def invert_transition(transition: Matrix) -> InverseTransition:
    """Invert a transition matrix, with its condition number and amplification.

    Args:
        transition: a validated T, [K, K].

    Raises:
        ValueError: T is singular, or so close to it (condition number above 1e6) that float32 losses
            corrected by it have no digit left. Then the noisy labels do not identify the clean ones. A
            label that can't occur (a column of zeros) is such a case.
    """
    impossible = np.flatnonzero(transition.max(axis=0) == 0)
    if impossible.size:
        raise ValueError(
            f"column {impossible[0]} of noise_transition is zero: T says that label {impossible[0]} can't occur, which "
            "also makes T singular. Correct T, or smooth it with a small probability in that column"
        )
    condition = float(np.linalg.cond(transition))
    if not condition <= MAX_CONDITION_NUMBER:
        raise ValueError(
            f"noise_transition is singular (condition number {condition:.3g}): labels corrupted by it "
            "cannot tell the classes apart. Lower the noise rate, merge the classes that have equal rows, "
            "or train without correction (loss_correction='none')"
        )
    inverse: Matrix = np.linalg.inv(transition).astype(np.float64)
    return InverseTransition(inverse, condition, float(np.abs(inverse).sum(axis=1).max()))


def inverse_of(matrix: Matrix) -> InverseTransition | None:
    """T⁻¹ of T, [K, K]; None where T is singular or nearly so: posteriors need no inverse, the corrected losses do."""
    try:
        return invert_transition(matrix)
    except ValueError:
        return None


def corrupt_labels(labels: npt.ArrayLike, transition: Any, seed: int) -> npt.NDArray[np.int64]:
    """Draw noisy labels from clean ones: each label y becomes j with probability ``T[y, j]``.

    Args:
        labels: integers in 0..K-1, any shape. -100 stays -100.
        transition: T, [K, K].
        seed: the draw depends on the seed, the position and the label only.

    Returns:
        int64, same shape.

    Raises:
        ValueError: T is not a transition matrix, or a label lies outside 0..K-1.
    """
    matrix = validate_transition(transition)
    clean = np.asarray(labels)
    if clean.size and not np.issubdtype(clean.dtype, np.integer):
        raise ValueError(f"labels have dtype {clean.dtype}; class labels are integers")
    clean = clean.astype(np.int64)
    kept = clean != IGNORE_INDEX
    check_labels(clean[kept], len(matrix))
    uniform = np.random.default_rng(seed).random(clean.shape)
    cumulative = matrix.cumsum(axis=1)
    # The last sum may round to just below 1; a draw above it still belongs to the last possible class.
    last_possible = matrix.shape[1] - 1 - (matrix[:, ::-1] > 0).argmax(axis=1)
    noisy = clean.copy()
    drawn = (uniform[kept][:, None] >= cumulative[clean[kept]]).sum(axis=1)
    noisy[kept] = np.minimum(drawn, last_possible[clean[kept]])
    return noisy


def corrupt_dataset(
    dataset: Dataset,
    transition: Any,
    seed: int,
    *,
    label_column: str = "label",
    clean_column: str = "clean_label",
) -> Dataset:
    """Replace a column of class labels by noisy ones, and keep the clean ones in a column of their own.

    Args:
        dataset: a ``datasets.Dataset`` with an integer (or ``ClassLabel``) column.
        transition: T, [K, K], or a symmetric rate when the column is a ``ClassLabel``.
        seed: same dataset, T and seed, same noisy labels.
        label_column: the column to corrupt.
        clean_column: the new column for the clean labels, of the same feature type.

    Returns:
        A new dataset; the one given is unchanged.

    Raises:
        ValueError: a column that is missing or already there, labels outside 0..K-1, or a bad T.
    """
    if label_column not in dataset.column_names:
        raise ValueError(f"label_column '{label_column}' is not among the columns {dataset.column_names}")
    if clean_column in dataset.column_names:
        raise ValueError(
            f"clean_column '{clean_column}' exists already: were these labels corrupted before? "
            "Remove the column or name another"
        )
    feature = dataset.features[label_column]
    matrix = load_transition(transition, getattr(feature, "num_classes", None))
    clean = np.asarray(dataset.with_format("numpy", columns=[label_column])[label_column][:])
    noisy = corrupt_labels(clean, matrix, seed)

    def replace(batch: dict[str, list[int]], rows: list[int]) -> dict[str, Any]:
        return {clean_column: batch[label_column], label_column: noisy[rows]}

    features = dataset.features.copy()
    features[clean_column] = feature
    return dataset.map(replace, with_indices=True, batched=True, features=features, desc="corrupting labels")


def check_labels(labels: npt.NDArray[np.integer[Any]], num_classes: int) -> None:
    """Raise ``ValueError`` unless every label lies in 0..num_classes-1. (-100 is not let through.)"""
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if outside.size:
        raise ValueError(
            f"label {int(outside[0])} lies outside 0..{num_classes - 1} ({outside.size} such labels); "
            f"map labels to 0..{num_classes - 1}, or to {IGNORE_INDEX} where there is no target"
        )


def read_transition(source: Any) -> Any:
    """Read a rate (as a float) or a matrix (not checked yet) from a string or a file; others pass through."""
    if isinstance(source, bool):
        raise ValueError(f"noise_transition is {source}; give a rate, a path or a matrix")
    if isinstance(source, (int, float)):
        return float(source)
    if not isinstance(source, (str, Path)):
        return source
    text = str(source).strip()
    if text.startswith("["):
        return _parse_json(text, "noise_transition")
    try:
        return float(text)
    except ValueError:
        pass
    path = Path(text)
    try:
        there = path.is_file()
    except OSError:  # a name that is too long for one
        there = False
    if not there:
        raise FileNotFoundError(
            f"noise_transition={text!a:.200} is neither a number, nor a JSON matrix, nor an existing .npy or .json file"
        )
    if path.suffix == ".npy":
        try:
            return _read_npy(path)
        except ValueError as error:
            raise ValueError(
                f"the noise_transition file {path} is no plain .npy array of numbers ({error}); write it by "
                "numpy.save(path, matrix)"
            ) from None
    if path.suffix == ".json":
        what = f"the noise_transition file {path}"
        try:
            content = _parse_json(path.read_text(encoding="utf-8"), what)
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is not valid JSON ({error}); write K rows: [[0.9, 0.1], [0.2, 0.8]]") from None
        # What TransitionEstimate.save wrote.
        return content.get("transition", content) if isinstance(content, dict) else content
    raise ValueError(f"noise_transition='{text}' ends in '{path.suffix}'; give a .npy or .json file")


def _read_npy(path: Path) -> npt.NDArray[Any]:
    """The matrix in a .npy file; the header is checked before memory is taken for what it promises.

    Not ``numpy.load``, which opens archives and pickles, too, and believes every header.
    """
    versions = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        if version not in versions:
            raise ValueError(f"version {version} of the format")
        try:
            shape, fortran, dtype = versions[version](file)
        except (SyntaxError, TypeError, RecursionError, MemoryError, tokenize.TokenError) as error:
            raise ValueError(f"a damaged header: {error!r:.100}") from None
        if dtype.kind not in "fiu" or dtype.subdtype is not None:
            raise ValueError(f"its entries are {dtype}")
        if len(shape) != 2 or not all(0 <= size <= MAX_CLASSES for size in shape):
            raise ValueError(f"its shape is {shape!r:.60}, not [K, K] with K of 2 to {MAX_CLASSES}")
        content = file.read()
    if len(content) != shape[0] * shape[1] * dtype.itemsize:
        raise ValueError(f"{len(content)} bytes of data for {shape[0]} rows of {shape[1]} {dtype}")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def _numbers(matrix: Any) -> Matrix:
    """As float64. numpy alone would take booleans, numbers that are spelt and real parts for numbers, too."""
    problem = "it holds something else"
    try:
        array = np.asarray(matrix)
        if array.dtype.kind in "fiu" and not any(isinstance(leaf, bool) for leaf in _leaves(matrix)):
            return array.astype(np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # ragged rows, tensors that numpy can't read
        problem = str(error)
    raise ValueError(f"noise_transition is not a matrix of numbers ({problem:.200}); give K rows of K numbers each")


def _leaves(value: Any) -> Iterator[Any]:
    """What nested lists hold."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _parse_json(text: str, what: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{what} is not valid JSON ({error}); write K rows: [[0.9, 0.1], [0.2, 0.8]]") from None


def _check_classes(num_classes: int) -> None:
    if not 2 <= num_classes <= MAX_CLASSES:
        raise ValueError(f"num_classes is {num_classes}; a transition matrix needs 2 to {MAX_CLASSES} classes")


def _check_rate(rate: float) -> None:
    if not (math.isfinite(rate) and 0 <= rate <= 1):
        raise ValueError(f"noise rate is {rate}; a rate is a probability between 0 and 1")

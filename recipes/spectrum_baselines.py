"""Trace and largest eigenvalue by other libraries, for comparison with ``hessian_trace`` and ``top_eigenpairs``.

Of the Hessian of the mean cross entropy of one batch, in the named weights together; all other parameters are held.
Each library is used as its own documentation has it, with what it keeps between products (PyHessian: the graph of the
gradient). The measurement is in eval mode, and the model is left as it was found. ``curvature_baselines.INSTALL``
says how to install them.

What they can't do: PyHessian and BackPACK know no layers (here all other weights are frozen). PyHessian finds the
eigenvalue of largest *magnitude*. BackPACK has no eigenvalues, and its Hessian diagonal, exact, is for chains of
linear layers, convolutions, ReLU, tanh and the like: no attention, no layer norm, no GELU, no embeddings.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from curvature_baselines import Inputs, Logits, measuring, package
from torch import Tensor, nn

# Of a power iteration that does not stop by itself, and of Lanczos started anew with twice as many steps each time.
MAX_PRODUCTS = 1000
# ARPACK, too, keeps 20 vectors for one eigenvalue.
LANCZOS_STEPS = 20


def pyhessian_trace(
    model: nn.Module, inputs: Inputs, labels: Tensor, names: Sequence[str], *, probes: int, seed: int = 0
) -> float:
    """Hutchinson's estimate by PyHessian.

    Its own rule to stop is switched off: it compares the running mean with the one before, which says little of the
    error, and for a negative one stops at the second probe.

    Args:
        model: a classifier that returns logits, or an output with ``logits``, as those of transformers do.
        inputs: of all examples: the model's only argument, or its keyword arguments.
        labels: one class per example.
        names: the weights that form the block.
        probes: Hessian-vector products, each with a vector of ±1.
        seed: of the probes.
    """
    with _pyhessian(model, inputs, labels, names, seed) as asked:
        samples: list[float] = asked.trace(maxIter=probes, tol=-math.inf)
    return sum(samples) / len(samples)


def pyhessian_eigenvalue(
    model: nn.Module, inputs: Inputs, labels: Tensor, names: Sequence[str], *, tolerance: float, seed: int = 0
) -> float:
    """The eigenvalue of largest magnitude, by PyHessian's power iteration.

    Args:
        model, inputs, labels, names: as for ``pyhessian_trace``.
        tolerance: relative difference between two estimates in a row at which it stops.
        seed: of the start.
    """
    with _pyhessian(model, inputs, labels, names, seed) as asked:
        ((value,), _) = asked.eigenvalues(maxIter=MAX_PRODUCTS, tol=tolerance)
    return float(value)


def curvlinops_trace(
    model: nn.Module, inputs: Inputs, labels: Tensor, names: Sequence[str], *, probes: int, seed: int = 0
) -> float:
    """Hutchinson's estimate by curvlinops, which multiplies by all probes at once. Arguments: ``pyhessian_trace``."""
    curvlinops = package("curvlinops")
    with _curvlinops(model, inputs, labels, names, seed) as operator:
        return float(curvlinops.hutchinson_trace(operator, probes))


def curvlinops_eigenvalue(
    model: nn.Module, inputs: Inputs, labels: Tensor, names: Sequence[str], *, tolerance: float, seed: int = 0
) -> float:
    """The largest eigenvalue of curvlinops' operator by SciPy (ARPACK), to a relative residual of ``tolerance``."""
    from scipy.sparse.linalg import eigsh

    with _curvlinops(model, inputs, labels, names, seed) as operator:
        start = torch.randn(operator.shape[0]).numpy()
        (value,) = eigsh(operator.to_scipy(), 1, which="LA", tol=tolerance, v0=start, return_eigenvectors=False)
    return float(value)


def eigenthings_trace(
    model: nn.Module, inputs: Inputs, labels: Tensor, names: Sequence[str], *, probes: int, seed: int = 0
) -> float:
    """Hutchinson's estimate by pytorch-hessian-eigenthings. Arguments: ``pyhessian_trace``."""
    eigenthings = package("hessian_eigenthings")
    with measuring(model, names) as (logits, _):
        operator = _eigenthings(eigenthings, logits, inputs, labels)
        return float(eigenthings.trace(operator, num_matvecs=probes, method="hutchinson", seed=seed).estimate)


def eigenthings_eigenvalue(
    model: nn.Module, inputs: Inputs, labels: Tensor, names: Sequence[str], *, tolerance: float, seed: int = 0
) -> float:
    """The largest eigenvalue by Lanczos of pytorch-hessian-eigenthings, to a relative residual of ``tolerance``.

    It takes as many steps as it is told to. Where that was too few it starts anew with twice as many.
    """
    eigenthings = package("hessian_eigenthings")
    with measuring(model, names) as (logits, _):
        operator = _eigenthings(eigenthings, logits, inputs, labels)
        steps = min(LANCZOS_STEPS, operator.size)
        while True:
            found = eigenthings.lanczos(operator, k=1, max_iter=steps, tol=tolerance, which="LA", seed=seed)
            if found.converged.all() or steps >= min(MAX_PRODUCTS, operator.size):
                return float(found.eigenvalues[0])
            steps = min(2 * steps, operator.size)


def backpack_trace(model: nn.Module, inputs: Inputs, labels: Tensor, names: Sequence[str]) -> float:
    """The exact trace: the sum of the Hessian's diagonal by BackPACK.

    Raises:
        NotImplementedError: of BackPACK, for a module that it has no rule for, as in every transformer.
    """
    backpack = package("backpack")
    extensions = package("backpack.extensions")
    # `extend` leaves hooks behind.
    extended = backpack.extend(copy.deepcopy(model).eval())
    loss = backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(extensions.DiagHessian()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Full|For) backward hook")
        loss(Logits(extended)(inputs), labels).backward()
    return float(sum(extended.get_parameter(name).diag_h.sum() for name in names))  # type: ignore[attr-defined]


TRACES: dict[str, Callable[..., float]] = {
    "PyHessian": pyhessian_trace,
    "curvlinops": curvlinops_trace,
    "hessian-eigenthings": eigenthings_trace,
}
EIGENVALUES: dict[str, Callable[..., float]] = {
    "PyHessian": pyhessian_eigenvalue,
    "curvlinops": curvlinops_eigenvalue,
    "hessian-eigenthings": eigenthings_eigenvalue,
}


@contextmanager
def _pyhessian(model: nn.Module, inputs: Inputs, labels: Tensor, names: Sequence[str], seed: int) -> Iterator[Any]:
    pyhessian = package("pyhessian")
    with measuring(model, names) as (logits, _), warnings.catch_warnings(), torch.random.fork_rng():
        warnings.filterwarnings("ignore", message="Using backward.* with create_graph=True")
        torch.manual_seed(seed)
        # `cuda=False`, on any device: it can't move a dictionary. Its vectors must go where the weights are.
        asked = pyhessian.hessian(logits, nn.CrossEntropyLoss(), data=(inputs, labels), cuda=False)
        asked.device = labels.device
        yield asked


@contextmanager
def _curvlinops(model: nn.Module, inputs: Inputs, labels: Tensor, names: Sequence[str], seed: int) -> Iterator[Any]:
    curvlinops = package("curvlinops")
    with measuring(model, names) as (logits, weights), torch.random.fork_rng():
        torch.manual_seed(seed)
        yield curvlinops.HessianLinearOperator(
            logits,
            nn.CrossEntropyLoss(),
            weights,
            [(inputs, labels)],
            check_deterministic=False,
            num_data=len(labels),
            batch_size_fn=lambda _: len(labels),
        )


def _eigenthings(eigenthings: Any, logits: Logits, inputs: Inputs, labels: Tensor) -> Any:
    return eigenthings.HessianOperator(logits, [(inputs, labels)], eigenthings.supervised_loss(nn.CrossEntropyLoss()))

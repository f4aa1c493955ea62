r"""What a measurement costs: peak memory and time, from plain numbers.

Memory is what a process needs beyond the model, the reference and the batch that it is given: the sum of what is alive
at the worst moment. With b bytes for a number (4, or 8 for a float64 model), P measured weights, V the way that they
travelled, and what n examples hold (:class:`~.footprint.Footprint`: tape, graph, …, each about proportional to n):

==========================  ==========================================================================================
exact forms                 ``b P`` (V) + the largest of: ``tape + adjoints + remembered + K tangents`` (n examples
                            and K directions travel together); ``tape + 2 adjoints + 4 widths`` (are examples apart?);
                            ``b P + graph`` and ``graph + second + bend + b (compared + p)`` of one example (which
                            autograd does, too, for a few layers)
sound bounds                ``b P`` + the largest of: ``tape + 2 outputs + 4 widths``; ``graph + used + second + bend``,
                            or ``6 b vector`` in the place of ``bend``; and for groups, of one example,
                            ``graph + second + bend + 3 b p``, or ``6 b p`` in the place of ``bend + 3 b p``, p the
                            weights of the largest layer
one Lanczos value           ``b P + graph + used + second + bend + (steps + 8) b q`` of one example, q the
                            elements of a vector: ``min(tokens, in) out`` of a weight that is used once, p of a group
the measure, a data set     the larger of the last two, and the inputs of at most 8 examples a layer
trace, separate probes      as exact forms, with the probes in the place of V
trace, joint probes         B examples of a batch at once: ``graph + second + b P (2 + probes kept)``, and
                            ``bend`` or 3 b times the largest tensor
eigenpairs                  ``graph + second + bend`` of a batch, and ``8 P (m + 6) + 3 b P + 8 P``, with
                            ``m = max(2 count + 1, 20)`` vectors of ARPACK
spectral density            ``graph + second + bend`` of a batch, and ``b P (steps + 5) + 8 P``, and the probes kept
                            (less for the last of several layers: their graphs are shorter)
noise stability             as joint probes; the noise that is kept, and ``b P``, before
==========================  ==========================================================================================

What n examples hold is counted on the model itself. For a transformer of blocks h wide with a heads and T tokens it is,
in numbers for each example and block, without what lies before and after the blocks (counted; exact):

===========  =====================  =======================================================
\            ViT, MLP of 4 h        Llama, MLP of 2.69 h; V words add to the whole
===========  =====================  =======================================================
tape         ``21 h T + 2 a T²``    ``37 h T + 3 a T²``, and ``2 T V``
graph        ``16 h T + a T²``      ``19 h T + a T²``, and ``T V``
used         ``4 h T``              ``4 h T``, and ``T V``
second       ``16 h T + 2 a T²``    ``34 h T + 2 a T²``, and ``2 T V``
bend         ``9 h T + 2 a T²``     ``13 h T + 2 a T²``
outputs      ``9 h T``              ``10 h T``, and ``T V``
adjoints     ``7 h T + 2 a T²``     ``10 h T + 2 a T²``
remembered   ``12 h T + a T²``      ``9 h T + a T²``
===========  =====================  =======================================================

Tangents grow with the widest activation, not with the blocks. Classes count where they are many: as V with T = 1.

Each measurement has 5 MB more for Python's objects. A half-precision model adds ``b`` times its parameters: it is
measured on copies. Nothing of this shrinks with more processes, as each holds all weights; the time is divided by
their number.

Time in forward passes without gradients, per example: 0.9 a layer for exact forms, 2.4 a layer for the sound bounds,
2.0 a Lanczos step (recipes/RESULTS.md, "What curvature costs"); for a product with the Hessian of all weights 3.0 (the
graph, once a batch) and 6.5 ("What a measurement costs"). With groups for layers the sound bounds take longer.
"""

from __future__ import annotations

from dataclasses import dataclass

from .candidates import CANDIDATES
from .footprint import Footprint
from .probes import KEPT_ELEMENTS
from .trace import SWEPT_ELEMENTS

# Bytes of the objects of Python and autograd and of what the allocator can't give back. Of the resident memory of the
# ViT of recipes/glyph_vit 2 to 7 MB are no tensor's; elsewhere it doesn't matter.
OVERHEAD = 5_000_000
# Forward passes without gradients on a CPU (recipes/RESULTS.md): a layer of a sweep, of the sound bounds, and of a step
# of Lanczos; the graph for products of all weights, and one of these.
SWEEP_PASSES = 0.9
BOUND_PASSES = 2.4
STEP_PASSES = 2.0
GRAPH_PASSES = 3.0
PRODUCT_PASSES = 6.5


@dataclass(frozen=True)
class Work:
    """What there is to measure."""

    layers: int
    measured: int
    """Weights of these layers, P."""
    largest: int
    """Weights of the largest of them."""
    tensor: int
    """Elements of the largest weight."""
    examples: int
    """Of the data set."""
    batch: int
    """Examples that the dataloader gives at once."""
    products_at_once: int = 1
    """Examples of a chunk of products; see :mod:`.chunks` for what the engine chooses."""
    swept_at_once: int = 1
    """Examples of a chunk of a sweep."""
    directions_at_once: int = 8
    copied: int = 0
    """Parameters and buffers in half precision."""
    number: int = 4
    """Bytes of a number."""
    processes: int = 1
    """Among which the examples are divided."""
    forward: float = float("nan")
    """Seconds of a forward pass without gradients, for each example of a batch."""
    forward_alone: float = float("nan")
    """For an example alone."""

    @property
    def pass_seconds(self) -> float:
        """Of one forward pass over the data set."""
        return self.examples * self.forward / self.processes


@dataclass(frozen=True)
class Cost:
    """What one process needs."""

    bytes: int
    """At the peak, beyond the model, the reference and the batch."""
    seconds: float


def forms(work: Work, some: Footprint) -> Cost:
    """``vᵀ H v`` of every layer and example."""
    swept = _swept(work, some, layers=work.layers)
    return _cost(work, some, _ways(work) + swept, SWEEP_PASSES * work.layers)


def bounds(work: Work, some: Footprint) -> Cost:
    """The sound bounds of every layer and example."""
    return _cost(work, some, _ways(work) + _products(work, some), BOUND_PASSES * work.layers)


def bound_seconds(work: Work) -> float:
    """Of the sound bounds of every layer and example."""
    return BOUND_PASSES * work.layers * work.pass_seconds


def lanczos_value(work: Work, one: Footprint, steps: int) -> Cost:
    """``vᵀ H⁺ v`` of one layer and example.

    Args:
        one: footprint of one example.
        steps: products.
    """
    memory = _ways(work) + _vectors(work, one.of(1), steps)
    return Cost(memory + work.number * work.copied + OVERHEAD, STEP_PASSES * steps * work.forward_alone)


def measure(work: Work, some: Footprint, steps: int) -> Cost:
    """The Hessian distance measure of a data set, without the time of Lanczos, which has a budget of its own."""
    kept = min(work.examples, CANDIDATES * work.layers) * some.of(1).inputs
    memory = _ways(work) + kept + max(_products(work, some), _vectors(work, some.of(1), steps))
    return _cost(work, some, memory, BOUND_PASSES * work.layers)


def trace(work: Work, some: Footprint, probes: int) -> Cost:
    """Traces by separate probes for each layer."""
    together = min(probes, max(1, SWEPT_ELEMENTS // work.measured))
    drawn = work.number * work.measured * (probes if _kept(work, probes) else together)
    swept = _swept(work, some, layers=together * work.layers)
    return _cost(work, some, drawn + swept, SWEEP_PASSES * work.layers * probes)


def joint_trace(work: Work, some: Footprint, probes: int) -> Cost:
    """Traces by joint probes: a product of all weights for each."""
    whole = some.of(work.batch)
    drawn = work.number * work.measured * (probes if _kept(work, probes) else 1)
    # Gradients and a product; its inner products are taken in float64.
    products = 2 * work.number * work.measured + max(whole.bend, 3 * work.number * work.tensor)
    memory = drawn + whole.graph + whole.second + products
    return _cost(work, some, memory, GRAPH_PASSES + PRODUCT_PASSES * probes)


def eigenpairs(work: Work, some: Footprint, count: int, passes: int) -> Cost:
    """The largest eigenvalues of one layer.

    Args:
        passes: over the data; 20 to 40 for each layer where they stand out.
    """
    whole, b = some.of(work.batch), work.number
    vectors = 8 * (max(2 * count + 1, 20) + 6) + 3 * b + 8
    memory = work.largest * vectors + whole.graph + whole.second + whole.bend
    return _cost(work, some, memory, (GRAPH_PASSES + PRODUCT_PASSES) * passes)


def density(work: Work, some: Footprint, probes: int, steps: int) -> Cost:
    """The spectral density of every layer."""
    whole, b = some.of(work.batch), work.number
    kept = probes if probes * work.largest <= KEPT_ELEMENTS else 0
    # The sum over batches is float64, and so is what it is divided into once the graphs are gone.
    product = max(work.largest * (2 * b + 8) + whole.graph + whole.second + whole.bend, 16 * work.largest)
    memory = work.largest * b * (steps + 3 + kept) + product
    return _cost(work, some, memory, (GRAPH_PASSES + PRODUCT_PASSES) * probes * steps * work.layers)


def stability(work: Work, some: Footprint, draws: int, probes: int) -> Cost:
    """The mean loss under noise, and its second-order prediction."""
    noise = work.number * work.measured * ((draws if _kept(work, draws) else 1) + 1)
    moved = noise + some.of(work.batch).passing + work.number * work.copied + OVERHEAD
    joint = joint_trace(work, some, probes)
    return Cost(max(moved, joint.bytes), joint.seconds + 2 * draws * work.pass_seconds)


def _ways(work: Work) -> int:
    return work.number * work.measured


def _kept(work: Work, probes: int) -> bool:
    return probes * work.measured <= KEPT_ELEMENTS


def _cost(work: Work, some: Footprint, memory: int, passes: float) -> Cost:
    """Of some forward passes over the data; a whole batch passes the model at once, before anything else."""
    memory = max(memory, some.of(work.batch).passing)
    return Cost(memory + work.number * work.copied + OVERHEAD, passes * work.pass_seconds)


def _swept(work: Work, some: Footprint, layers: int) -> int:
    chunk, one, b = some.of(work.swept_at_once), some.of(1), work.number
    together = min(work.directions_at_once, layers)
    tangents = min(together * chunk.tangents, layers // work.layers * chunk.joined)
    told = 0
    if work.swept_at_once > 1:
        told = chunk.tape + 2 * chunk.adjoints + 4 * b * chunk.width
    chosen = b * (one.compared + min(one.compared, work.largest))
    compared = max(b * work.measured + one.graph, one.graph + one.second + one.bend + chosen)
    return max(chunk.tape + chunk.adjoints + chunk.remembered + tangents, told, compared)


def _products(work: Work, some: Footprint) -> int:
    chunk, one, b = some.of(work.products_at_once), some.of(1), work.number
    told = chunk.tape + (2 * chunk.outputs + 4 * b * chunk.width if work.products_at_once > 1 else 0)
    together = chunk.graph + chunk.used + chunk.second + max(chunk.bend, 6 * b * chunk.vector) if chunk.outputs else 0
    alone = one.graph + one.second + max(one.bend + 3 * b * one.group, 6 * b * one.group) if one.group else 0
    return max(told, together, alone)


def _vectors(work: Work, one: Footprint, steps: int) -> int:
    vector = max(one.vector, one.group)
    # The basis, and about eight more: v, products, the next vector and what it is compared with, some in float64.
    return one.graph + one.used + one.second + one.bend + (steps + 8) * work.number * vector

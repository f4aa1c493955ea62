r"""What a measurement costs: peak memory and time, from plain numbers.

Memory is what a process needs beyond the model, the reference and the batch that it is given: the sum of what is alive
at the worst moment. With b bytes for a number (4, or 8 for a float64 model), P measured weights, V the way that they
travelled, and what n examples hold (:class:`~.footprint.Footprint`: tape, graph, …; counted for one and for a chunk,
and on the line through both for others):

==========================  ==========================================================================================
exact forms                 ``b P`` (V) + the largest of: ``tape + adjoints + remembered + K tangents`` (n examples
                            and K directions travel together); ``tape + 2 adjoints + 4 widths`` (are examples apart?);
                            ``b t + graph``, t the largest tensor, and ``graph + second + bend + b (compared + p)`` of
                            one example (which autograd does, too, for a few layers)
sound bounds                ``b P`` + the largest of: ``tape + patches + 2 outputs + 4 widths`` (as above; patches are
                            the inputs of convolutions by rows); ``graph + used + second + bend``, or
                            ``6 b vector`` in the place of ``bend``; and for groups, of one example,
                            ``graph + second + bend + 3 b p``, or ``6 b p`` in the place of ``bend + 3 b p``, p the
                            weights of the largest layer
one Lanczos value           ``b P + graph + used + second + bend + (steps + 8) b q`` of one example, q the
                            elements of a vector: ``min(tokens, in) out`` of a weight that is used once, p of a group
the measure, a data set     the larger of the last two, and the inputs of at most 8 examples a layer
trace, separate probes      as exact forms, with the probes in the place of V, of which only the first are drawn when
                            autograd compares; directions of one weight that travel together are copied
trace, joint probes         B examples of a batch at once: ``graph + second + b P (2 + probes kept)``, and
                            ``bend`` or 3 b times the largest tensor
eigenpairs                  a product, and ``b P (m + 2)``, with ``m = max(2 count + 1, 14)`` vectors that are kept;
                            with many eigenvalues the residuals in the end, ``b P (count + 2) + 16 P (count - 1)``
spectral density            a product, and ``b P (steps + 3)``, and the probes kept (less for the last of several
                            layers: their graphs are shorter)
a product of these          the larger of ``graph + second + bend + 2 b P + 8 P`` of a batch and ``16 P``; to the latter
                            a dataloader of one batch, whose graph stays, adds ``graph + second + b P``
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
measured on copies. Nothing of this shrinks with more processes, as each holds all weights, but for sharded models that
are too large for that (:mod:`.paging`), of which V is not held either; the time is divided by their number. What is no
tensor is not counted: workspaces of convolutions, and the kernels that oneDNN compiles for each shape of a convolution
and keeps (the first measurement of a ResNet-18 left 32 MB).

Time in forward passes without gradients, per example: 0.9 a layer for exact forms, 2.4 a layer for the sound bounds,
3.0 of an example alone for those of a group, 2.0 a Lanczos step (recipes/RESULTS.md, "What curvature costs"); for a
product with the Hessian of all weights 3.0 (the graph: once a batch, and only once for a dataloader of one batch) and
6.5 ("What a measurement costs"). Work on vectors of P numbers hangs on memory, not on tokens; its unit is the time to
sum the weights: 120 for a product of eigenpairs or density, 30 for a joint probe, 25 for a draw of noise, and 50 an
example for the bounds of all groups together.
"""

from __future__ import annotations

from dataclasses import dataclass

from .candidates import CANDIDATES
from .footprint import Footprint, Footprints
from .probes import KEPT_ELEMENTS
from .spectrum import basis
from .trace import SWEPT_ELEMENTS

# Bytes of the objects of Python and autograd and of what the allocator can't give back. Of the resident memory of the
# ViT of recipes/glyph_vit 2 to 7 MB are no tensor's; elsewhere it doesn't matter.
OVERHEAD = 5_000_000
# Forward passes without gradients on a CPU (recipes/RESULTS.md): a layer of a sweep, of the sound bounds, and of a step
# of Lanczos; the graph for products of all weights, and one of these; and both for a layer of several weights, which
# ends halfway on average, and needs no gradients of other weights.
SWEEP_PASSES = 0.9
BOUND_PASSES = 2.4
STEP_PASSES = 2.0
GRAPH_PASSES = 3.0
PRODUCT_PASSES = 6.5
GROUP_PASSES = 3.0
# How often the weights could be summed in the time of what is done to vectors of their size, by memory and not by
# arithmetic: norms of a layer of several weights and of its product; drawing a probe, and its inner product; drawing
# noise, and moving the weights twice; for each product of Lanczos, sums in float64 and orthogonal vectors.
GROUP_READINGS = 50
PROBE_READINGS = 30
NOISE_READINGS = 25
VECTOR_READINGS = 120


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
    grouped: int = 0
    """Layers of several weights."""
    reading: float = float("nan")
    """Seconds to sum all measured weights."""

    @property
    def one_batch(self) -> bool:
        """Whether the dataloader has one batch: its graph is kept, where one process reads it all."""
        return self.examples <= self.batch and self.processes == 1

    @property
    def own(self) -> float:
        """Examples that one process measures."""
        return self.examples / self.processes

    @property
    def pass_seconds(self) -> float:
        """Of one forward pass over the data set."""
        return self.own * self.forward


@dataclass(frozen=True)
class Cost:
    """What one process needs."""

    bytes: int
    """At the peak, beyond the model, the reference and the batch."""
    seconds: float


def forms(work: Work, sizes: Footprints) -> Cost:
    """``vᵀ H v`` of every layer and example."""
    swept = max(_travelling(work, sizes, 1), _compared(work, sizes))
    return _cost(work, sizes, _ways(work) + swept, SWEEP_PASSES * work.layers * work.pass_seconds)


def bounds(work: Work, sizes: Footprints) -> Cost:
    """The sound bounds of every layer and example."""
    return _cost(work, sizes, _ways(work) + _products(work, sizes), bound_seconds(work))


def bound_seconds(work: Work) -> float:
    """Of the sound bounds of every layer and example; layers of several weights take one example at a time."""
    alone = GROUP_PASSES * work.grouped * work.forward_alone + GROUP_READINGS * work.reading * bool(work.grouped)
    return BOUND_PASSES * (work.layers - work.grouped) * work.pass_seconds + work.own * alone


def lanczos_value(work: Work, sizes: Footprints, steps: int) -> Cost:
    """``vᵀ H⁺ v`` of one layer and example.

    Args:
        steps: products.
    """
    memory = _ways(work) + _vectors(work, sizes.one, steps)
    return Cost(memory + work.number * work.copied + OVERHEAD, STEP_PASSES * steps * work.forward_alone)


def measure(work: Work, sizes: Footprints, steps: int) -> Cost:
    """The Hessian distance measure of a data set, without the time of Lanczos, which has a budget of its own."""
    kept = min(work.examples, CANDIDATES * work.layers) * sizes.one.inputs
    memory = _ways(work) + kept + max(_products(work, sizes), _vectors(work, sizes.one, steps))
    return _cost(work, sizes, memory, bound_seconds(work))


def trace(work: Work, sizes: Footprints, probes: int) -> Cost:
    """Traces by separate probes for each layer."""
    together, b = min(probes, max(1, SWEPT_ELEMENTS // work.measured)), work.number
    drawn = b * work.measured * (probes if _kept(work, probes) else together)
    swept = drawn + _travelling(work, sizes, together)
    # Autograd compares before all probes are drawn.
    compared = b * work.measured * together + _compared(work, sizes)
    return _cost(work, sizes, max(swept, compared), SWEEP_PASSES * work.layers * probes * work.pass_seconds)


def joint_trace(work: Work, sizes: Footprints, probes: int) -> Cost:
    """Traces by joint probes: a product of all weights for each."""
    whole = sizes.of(work.batch)
    drawn = work.number * work.measured * (probes if _kept(work, probes) else 1)
    # Gradients and a product; its inner products are taken in float64.
    products = 2 * work.number * work.measured + max(whole.bend, 3 * work.number * work.tensor)
    memory = drawn + whole.graph + whole.second + products
    seconds = (GRAPH_PASSES + PRODUCT_PASSES * probes) * work.pass_seconds
    return _cost(work, sizes, memory, seconds + PROBE_READINGS * probes * work.reading)


def eigenpairs(work: Work, sizes: Footprints, count: int, passes: int) -> Cost:
    """The largest eigenvalues of one layer.

    Args:
        passes: over the data; 15 to 40 for each layer where they stand out.
    """
    b = work.number
    # With the start and what is multiplied; in the end eigenvectors and, in float64, products of all of them.
    vectors = max(b * (basis(count) + 2), b * (count + 2) + 16 * (count - 1))
    return _cost(work, sizes, work.largest * vectors + _product(work, sizes), _product_seconds(work, 1, passes))


def density(work: Work, sizes: Footprints, probes: int, steps: int) -> Cost:
    """The spectral density of every layer."""
    kept = probes if probes * work.largest <= KEPT_ELEMENTS else 0
    memory = work.largest * work.number * (steps + 3 + kept) + _product(work, sizes)
    return _cost(work, sizes, memory, _product_seconds(work, work.layers, probes * steps))


def stability(work: Work, sizes: Footprints, draws: int, probes: int) -> Cost:
    """The mean loss under noise, and its second-order prediction."""
    noise = work.number * work.measured * ((draws if _kept(work, draws) else 1) + 1)
    moved = noise + sizes.of(work.batch).passing + work.number * work.copied + OVERHEAD
    joint = joint_trace(work, sizes, probes)
    seconds = 2 * draws * work.pass_seconds + NOISE_READINGS * draws * work.reading
    return Cost(max(moved, joint.bytes), joint.seconds + seconds)


def _ways(work: Work) -> int:
    return work.number * work.measured


def _kept(work: Work, probes: int) -> bool:
    return probes * work.measured <= KEPT_ELEMENTS


def _cost(work: Work, sizes: Footprints, memory: int, seconds: float) -> Cost:
    """A whole batch passes the model at once, before anything else."""
    memory = max(memory, sizes.of(work.batch).passing)
    return Cost(memory + work.number * work.copied + OVERHEAD, seconds)


def _product(work: Work, sizes: Footprints) -> int:
    """A product of the largest layer with the Hessian of the mean loss."""
    whole, weights = sizes.of(work.batch), work.largest
    graphs = work.number * weights + whole.graph + whole.second  # and gradients
    bent = graphs + work.number * weights + whole.bend + 8 * weights
    # The sum over batches is float64, and so is what it is divided into.
    return max(bent, 16 * weights + graphs * work.one_batch)


def _product_seconds(work: Work, layers: int, products: int) -> float:
    """Of some products for each of some layers, one after the other."""
    graphs = 1 if work.one_batch else products
    passes = (GRAPH_PASSES * graphs + PRODUCT_PASSES * products) * work.pass_seconds
    return layers * (passes + VECTOR_READINGS * products * work.reading * work.largest / work.measured)


def _travelling(work: Work, sizes: Footprints, probes: int) -> int:
    """A chunk of examples and one of directions, some for each layer; or what tells the examples apart."""
    chunk = sizes.of(work.swept_at_once)
    together = min(work.directions_at_once, probes * work.layers)
    copied = work.number * work.largest if probes > 1 else 0
    tangents = min(together * (chunk.tangents + copied), probes * (chunk.stacked if copied else chunk.joined))
    told = 0
    if work.swept_at_once > 1:
        told = chunk.tape + 2 * chunk.adjoints + 4 * work.number * chunk.width
    return max(chunk.tape + chunk.adjoints + chunk.remembered + tangents, told)


def _compared(work: Work, sizes: Footprints) -> int:
    """What autograd holds to compare one example of a sweep with its own derivatives."""
    one, b = sizes.one, work.number
    chosen = b * (one.compared + min(one.compared, work.largest))
    return max(b * work.tensor + one.graph, one.graph + one.second + one.bend + chosen)


def _products(work: Work, sizes: Footprints) -> int:
    chunk, one, b = sizes.of(work.products_at_once), sizes.one, work.number
    told = max(chunk.tape, chunk.told + 4 * b * chunk.width if work.products_at_once > 1 else 0)
    together = [
        some.graph + some.used + some.second + max(some.bend, 6 * b * some.vector)
        for some in (chunk, one)
        if some.vector
    ]
    alone = one.graph + one.second + max(one.bend + 3 * b * one.group, 6 * b * one.group) if one.group else 0
    return max(told, alone, *together)


def _vectors(work: Work, one: Footprint, steps: int) -> int:
    vector = max(one.vector, one.group)
    # The basis, and about eight more: v, products, the next vector and what it is compared with, some in float64.
    return one.graph + one.used + one.second + one.bend + (steps + 8) * work.number * vector

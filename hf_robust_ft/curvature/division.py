"""Which process looks at which candidates of a round, so that all are done at about the same time."""

from __future__ import annotations

import math
from collections.abc import Sequence

# What the graph of an example costs before the first product, in products of the first layer: 3 for DINOv2-small, 7
# for the small ViT of the recipes, where much of it is Python.
GRAPH_PRODUCTS = 5.0
# The largest pieces tried, in what each process should get: small ones are even, but make graphs more than once.
PIECES = (1.0, 0.5, 0.25)

Pair = tuple[int, int]
"""A layer, counted from the input on, and an example."""


def divided(pairs: Sequence[Pair], layers: int, steps: int, processes: int) -> list[list[Pair]]:
    """Divide candidates among processes, in the same way on all of them.

    A product with the Hessian of a layer goes from the layer to the loss and back: the later the layer, the less it
    costs. The graph of an example serves all its layers, so they stay together unless they are too much for a process.
    The largest pieces go first, each to the process that has the least to do.

    Args:
        pairs: the candidates.
        layers: of the model.
        steps: of Lanczos.
        processes: how many.

    Returns:
        For each process its candidates, those of one example side by side.
    """

    def cost(share: Sequence[Pair]) -> float:  # one product more gives vᵀ H v
        products = sum((steps + 1) * (layers - layer) / layers for layer, _ in share)
        return products + GRAPH_PRODUCTS * len({example for _, example in share})

    groups: dict[int, list[Pair]] = {}
    for layer, example in sorted(pairs):
        groups.setdefault(example, []).append((layer, example))
    fair = sum(map(cost, groups.values())) / processes

    def shares(limit: float) -> list[list[Pair]]:
        pieces: list[list[Pair]] = []
        for group in groups.values():
            count = min(len(group), math.ceil(cost(group) / limit))
            pieces += [group[k::count] for k in range(count)]
        found: list[list[Pair]] = [[] for _ in range(processes)]
        for piece in sorted(pieces, key=cost, reverse=True):
            min(found, key=cost).extend(piece)
        return found

    best = min((shares(part * fair) for part in PIECES), key=lambda found: max(map(cost, found)))
    return [sorted(share, key=lambda pair: pair[1]) for share in best]

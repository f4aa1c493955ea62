"""What each ATen operation does to tangents, and how much its own curvature adds.

For ``y = f(x)`` and a tangent ``x1`` of the inputs a rule returns the first-order tangent
``y1 = Df(x)[x1]`` and adds ``⟨ā, D²f(x)[x1, x1]⟩`` to the local term, with ``ā`` the adjoint of y.
A rule never differentiates anything along the directions: its cost is that of the operation, times their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from itertools import combinations
from operator import or_

from .elementwise_rules import POINTWISE, SLOPED, pointwise, sloped
from .linear_rules import JOINTLY_LINEAR, LINEAR, jointly_linear
from .local import Rule
from .norm_rules import NORMS
from .product_rules import PRODUCTS
from .tape import Op, aten


def rule_of(op: Op) -> Rule | None:
    """The rule of an operation; None if there is none."""
    packet = op.packet
    if packet in (aten.max, aten.min) and op.func._overloadname != "dim":
        return None
    if packet is aten.masked_fill and op.slots[2] is not None:
        return None
    if packet is aten.div and "rounding_mode" in op.kwargs:
        return None
    if packet in JOINTLY_LINEAR:
        return jointly_linear
    if packet in SLOPED:
        (place, *others) = op.active()
        return sloped if not others and op.leaves[place].shape == op.outs[0].shape else pointwise
    if packet in POINTWISE:
        return pointwise
    return LINEAR.get(packet) or PRODUCTS.get(packet) or NORMS.get(packet)


def curved_along(op: Op, reach: Mapping[int, int]) -> int:
    """The directions along which an operation has curvature of its own, as a bit set.

    Args:
        reach: for each slot the directions along which it moves, as a bit set.
    """
    rule = rule_of(op)
    if rule in (jointly_linear, sloped) or (rule is not None and rule is LINEAR.get(op.packet)):
        return 0
    if op.packet is aten.div and rule is not None:
        return 0 if op.slots[1] is None else reach[op.slots[1]]
    parts = [reach[slot] for slot in op.slots if slot is not None]
    if op.packet in PRODUCTS:
        parts = [a & b for a, b in combinations(parts, 2)]
    return reduce(or_, parts, 0)

"""Layer-wise constraints ``‖W_i - W_i^ref‖ ≤ α_i``: radii, projection, and an audit of every parameter; and their
soft form, a penalty on the distances. A layer with a LoRA adapter is held by what the adapter adds to it.

Source: equation 7 and algorithm 1 of Ju, Li & Zhang 2022; Li & Zhang 2021; Gouk et al. 2021; for the penalty Li,
Grandvalet & Davoine 2018.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from numbers import Real
from typing import Literal

import torch
from torch import Tensor, nn

from .adapters import find_adapters
from .layers import Layer, NotALayer, find_layers
from .penalties import add_l2sp_gradient
from .projection import TOGETHER, Norm, distance, magnitude, project_, project_together_, square_distance
from .reference import capture_reference, reference_weight
from .sharding import is_sharded, over_shards_at_once, reshard
from .stored import Count, Size

Radius = float | Mapping[str, float | None] | None
"""One radius for all layers, or name pattern → radius, where None and infinity leave a layer free."""


@dataclass(frozen=True)
class ConstraintRow:
    """One trained parameter in the audit."""

    name: str
    shape: tuple[Count, ...]
    centre: Literal["pretrained", "initial"] | None
    """``"initial"`` for a freshly initialised layer that was given a radius; None if free."""
    radius: Size | None
    norm: Norm | None
    distance: Size | None
    """Now, in the row's norm (Frobenius for a free layer that a penalty pulls). None if nothing holds the weight: no
    copy of it is kept."""
    free: str | None
    """Why there is no ball; None if there is one."""
    tied: tuple[str, ...] = ()
    """Other names of the same parameter."""
    factors: tuple[str, ...] = ()
    """Of a layer with a LoRA adapter, the names of the parameters that are trained in the place of its own."""

    @property
    def active(self) -> bool:
        """Whether the weight lies on its ball (within 0.1 % of the radius)."""
        return self.distance is not None and self.radius is not None and self.distance >= 0.999 * self.radius


class ConstraintTable(tuple[ConstraintRow, ...]):
    """Rows of the audit. ``print`` shows them as a table; ``pandas.DataFrame(table)`` reads them."""

    def __str__(self) -> str:
        header = ("parameter", "shape", "centre", "radius", "norm", "distance", "")
        cells = [header]
        for row in self:
            name = row.name if not row.tied else f"{row.name} (= {', '.join(row.tied)})"
            name += " (LoRA)" if row.factors else ""
            shape = "×".join(map(str, row.shape))
            if row.free is not None:
                distance = "" if row.distance is None else f"{row.distance:.4g}"
                cells.append((name, shape, row.centre or "free", "", row.norm or "", distance, row.free))
            else:
                state = "active" if row.active else ""
                values = (f"{row.radius:.4g}", str(row.norm), f"{row.distance:.4g}")
                cells.append((name, shape, str(row.centre), *values, state))
        widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


@dataclass(frozen=True)
class Ball:
    """One constrained layer: its centre in memory, the centre's norm, and the radius that results.

    The centre of a layer with an adapter is its base weight, which doesn't move: no copy is kept.
    """

    layer: Layer
    centre: Tensor
    centre_norm: float
    radius: float

    def distance(self, norm: Norm) -> float:
        """``‖W_i - W_i^ref‖`` now, in float64."""
        return _distance(self.layer, self.centre, norm)

    def goes_with(self) -> tuple[torch.device, torch.dtype] | None:
        """What the weights that :func:`project_together_` can take beside this one share; None: it goes alone.

        On a CPU alone is faster: a weight's blocks stay in the cache from the norm to the projection.
        """
        weight = self.layer.parameter
        plain = self.layer.adapter is None and not is_sharded(weight) and weight.device.type != "cpu"
        # The difference of a larger one would be a copy, and it has work enough for kernels of its own.
        fits = weight.numel() <= TOGETHER and weight.dtype == self.centre.dtype
        if not (plain and fits and weight.dtype in (torch.float32, torch.float64)):
            return None
        return weight.device, weight.dtype

    def project_(self, norm: Norm, square: Tensor | None = None) -> None:
        """Move the weight, or what an adapter adds to it, in place, into the ball.

        Args:
            square: see :func:`~.projection.project_`.
        """
        if self.layer.adapter is not None:
            self.layer.adapter.project_(self.radius, norm)
            return
        project_(
            self.layer.parameter,
            self.centre,
            self.radius,
            norm,
            reference_norm=self.centre_norm,
            row_dims=self.layer.row_dims or (0,),
            square=square,
        )


class LayerConstraints:
    """The balls around the layers of one model, and the penalty that pulls at them.

    Where plain LoRA changes a weight to ``W + s B A``, the ball is ``‖s B A‖ ≤ α`` and the penalty ``λ/2 ‖s B A‖_F²``:
    around the base weight, whatever the adapter started from. Projection scales B, or its rows under ``"inf_op"``,
    which is the same as scaling the change.

    Args:
        model: unwrapped. With PEFT adapters, layers have the names that they have in the merged model.
        radius: see :data:`Radius`. A number holds for every layer but a freshly initialised one. In a
            mapping, the first pattern that matches a layer decides (shell wildcards, case counts, against
            the names of the parameter and of its module), and layers without a match are free.
        norm: ``"frobenius"`` or ``"inf_op"`` (the largest row sum; rows are outputs).
        mode: ``"absolute"``, or ``"relative"`` to ``‖W_i^ref‖`` in the same norm.
        growth: γ of the depth schedule ``α_i = α γ^depth``.
        reference: centres by parameter name, as stored by an earlier run; by default the present weights.
        capture_missing: whether a layer that the reference lacks is centred on its present weights, too.
        fresh: names of the freshly initialised layers, as an earlier run found them: a model built from a
            checkpoint no longer tells. By default those that :func:`find_layers` names.
        penalty: λ of the L2-SP penalty ``λ/2 Σ_i ‖W_i - W_i^ref‖_F²`` over all layers, with or without a radius, but
            the freshly initialised ones: their initial weights hold no knowledge to stay close to.
        before_sharding: the model will be sharded before it is trained, and constraints made anew from its shards.
            These are only to look at: each layer is its own centre, and nothing is copied.

    Raises:
        ValueError: a negative or NaN radius, a pattern without a match, a growth that is not positive, a
            relative radius around zero weights, adapters other than plain LoRA, a layer without rows under
            ``"inf_op"``, a penalty without a layer to pull at.
        ReferenceMismatch: a reference that lacks a layer or has another shape.
    """

    def __init__(
        self,
        model: nn.Module,
        radius: Radius,
        *,
        norm: Norm = "frobenius",
        mode: Literal["absolute", "relative"] = "absolute",
        growth: float = 1.0,
        reference: Mapping[str, Tensor] | None = None,
        capture_missing: bool = False,
        fresh: Collection[str] | None = None,
        penalty: float = 0.0,
        before_sharding: bool = False,
    ) -> None:
        if not (math.isfinite(growth) and growth > 0):
            raise ValueError(f"radius_growth is {growth}; it is a positive factor from one depth to the next")
        if norm not in ("frobenius", "inf_op"):
            raise ValueError(f"radius_norm is {norm!r}; choose 'frobenius' or 'inf_op'")
        if mode not in ("absolute", "relative"):
            raise ValueError(f"radius_mode is {mode!r}; choose 'absolute' or 'relative'")
        if radius is not None or penalty:
            asked, off = ("layer_radius", "None") if radius is not None else ("l2sp_penalty", "0")
            remedy = f"Use LoRA without variants, fine-tune the full weights, or set {asked}={off}"
            find_adapters(model).refuse(asked, remedy)
        self.norm: Norm = norm
        reshard(model)
        layers, self._others = find_layers(model)
        if fresh is not None:
            layers = [replace(layer, fresh=layer.name in fresh) for layer in layers]
        self.fresh = [layer.name for layer in layers if layer.fresh]
        """Names of the freshly initialised layers, whether they are constrained or not."""
        # No weight that nothing holds is kept here: what becomes of the model should be free to go.
        self._free: list[ConstraintRow] = []
        constrained: list[tuple[Layer, float]] = []
        for layer, (value, free) in zip(layers, _assign(layers, radius, self._others), strict=True):
            if free is None:
                constrained.append((layer, value))
            else:
                shape, factors = tuple(layer.parameter.shape), _factors(layer)
                self._free.append(ConstraintRow(layer.name, shape, None, None, None, None, free, layer.tied, factors))
        self._penalty = penalty
        self._pulled = [layer for layer in layers if not layer.fresh] if penalty else []
        if penalty and not self._pulled:
            raise ValueError(
                f"l2sp_penalty is {penalty}, but the model has no pretrained weight matrix that is trained; set it to 0"
            )
        held = {layer.name: layer for layer in (*(layer for layer, _ in constrained), *self._pulled)}
        if any(layer.adapter and (before_sharding or is_sharded(layer.parameter)) for layer in held.values()):
            raise ValueError(
                "layer_radius and l2sp_penalty of LoRA layers need whole factors, but the model is sharded; use DDP, "
                "or set layer_radius=None and l2sp_penalty=0"
            )
        if before_sharding:
            reference = {name: layer.parameter for name, layer in held.items()}
        elif reference is None or capture_missing:
            known = reference or {}
            missing = capture_reference(layer for name, layer in held.items() if name not in known)
            reference = {**known, **missing}
        self._adapted = {name for name, layer in held.items() if layer.adapter is not None}
        self._centres = {
            name: layer.parameter.detach() if name in self._adapted else reference_weight(layer, reference)
            for name, layer in held.items()
        }
        self._balls = [
            _ball(layer, value * growth**layer.depth, norm, mode, self._centres[layer.name])
            for layer, value in constrained
        ]

    def __len__(self) -> int:
        """The number of layers that a ball or the penalty holds; an object without any is false."""
        return len(self._centres)

    @property
    def reference(self) -> dict[str, Tensor]:
        """The centres, by parameter name; not of layers with an adapter, whose base weights are their centres."""
        return {name: centre for name, centre in self._centres.items() if name not in self._adapted}

    @property
    def radii(self) -> dict[str, float]:
        """The radii α_i in the norm of the constraint, by parameter name."""
        return {ball.layer.name: ball.radius for ball in self._balls}

    def project_(self) -> None:
        """Move every constrained weight, in place, into its ball. Doing it twice changes nothing more.

        Of sharded weights (FSDP2, tensor parallelism) each process moves its shard; all must call this.
        """
        groups: dict[tuple[torch.device, torch.dtype], list[Ball]] = {}
        for ball, square in zip(self._balls, self._square_distances(), strict=True):
            if self.norm == "frobenius" and (kind := ball.goes_with()) is not None:
                groups.setdefault(kind, []).append(ball)
            else:
                ball.project_(self.norm, square)
        for group in groups.values():
            weights, centres = [ball.layer.parameter for ball in group], [ball.centre for ball in group]
            radii, norms = [ball.radius for ball in group], [ball.centre_norm for ball in group]
            project_together_(weights, centres, radii, norms)

    def _square_distances(self) -> Sequence[Tensor | None]:
        """Those of sharded weights, by one reduction for all layers; None for what is as well found one by one."""
        weights = [ball.layer.parameter for ball in self._balls]
        if self.norm != "frobenius" or not any(is_sharded(weight) for weight in weights):
            return [None] * len(weights)
        squares = [square_distance(weight, ball.centre) for weight, ball in zip(weights, self._balls, strict=True)]
        return over_shards_at_once(squares, weights)

    def add_pull(self, scale: float = 1.0) -> None:
        """Add the gradient of the penalty, ``scale · λ (W_i - W_i^ref)``, to those of the layers."""
        for layer in self._pulled:
            if layer.adapter is not None:
                layer.adapter.add_l2sp_gradient(scale * self._penalty)
            else:
                add_l2sp_gradient(layer.parameter, self._centres[layer.name], scale * self._penalty)

    def distances(self) -> dict[str, float]:
        """``‖W_i - W_i^ref‖`` of each layer that is held now, in float64, by parameter name.

        In the norm of the constraint; the Frobenius norm for a layer without one, which only the penalty holds.
        """
        return {ball.layer.name: ball.distance(self.norm) for ball in self._balls} | self._pulled_distances()

    def _pulled_distances(self) -> dict[str, float]:
        return {
            name: _distance(layer, self._centres[name], "frobenius") for name, layer in self._pulled_alone().items()
        }

    def _pulled_alone(self) -> dict[str, Layer]:
        """Those that have no ball."""
        balls = self.radii
        return {layer.name: layer for layer in self._pulled if layer.name not in balls}

    def table(self, *, distances: bool = True) -> ConstraintTable:
        """Every trained parameter: its centre, radius, norm and distance, or why it is free.

        Args:
            distances: False leaves them out. Of sharded weights, all processes must take them together.
        """
        rows = [
            ConstraintRow(
                name=ball.layer.name,
                shape=tuple(ball.centre.shape),
                centre="initial" if ball.layer.fresh else "pretrained",
                radius=ball.radius,
                norm=self.norm,
                distance=ball.distance(self.norm) if distances else None,
                free=None,
                tied=ball.layer.tied,
                factors=_factors(ball.layer),
            )
            for ball in self._balls
        ]
        pulled = self._pulled_distances() if distances else dict.fromkeys(self._pulled_alone())
        for row in self._free:
            if row.name in pulled:
                row = replace(
                    row,
                    centre="pretrained",
                    norm="frobenius",
                    distance=pulled[row.name],
                    free=f"{row.free}; pulled by l2sp_penalty",
                )
            rows.append(row)
        rows += [ConstraintRow(o.name, o.shape, None, None, None, None, o.reason) for o in self._others]
        return ConstraintTable(rows)


def _factors(layer: Layer) -> tuple[str, ...]:
    return () if layer.adapter is None else tuple(layer.adapter.factors)


def _distance(layer: Layer, centre: Tensor, norm: Norm) -> float:
    if layer.adapter is not None:
        return layer.adapter.norm(norm)
    return distance(layer.parameter, centre, norm, layer.row_dims or (0,))


def _ball(layer: Layer, radius: float, norm: Norm, mode: str, centre: Tensor) -> Ball:
    if layer.adapter is not None and not layer.adapter.left[1].requires_grad:
        raise ValueError(
            f"layer_radius holds {layer.name} by scaling a factor of its adapter, but {layer.adapter.left[0]} is "
            "frozen; train it, or free the layer with a null radius"
        )
    if norm == "inf_op" and layer.row_dims is None:
        raise ValueError(
            f"radius_norm='inf_op' has no rows in {layer.name} ({layer.kind}, shape "
            f"{tuple(layer.parameter.shape)}); "
            "use 'frobenius', or free it with a null radius"
        )
    centre_norm = magnitude(centre, norm, layer.row_dims or (0,))
    if mode == "relative":
        if centre_norm == 0:
            raise ValueError(
                f"radius_mode='relative', but the reference of {layer.name} is zero; "
                "use 'absolute', or free it with a null radius"
            )
        radius *= centre_norm
    return Ball(layer, centre, centre_norm, radius)


def _assign(layers: Sequence[Layer], radius: Radius, others: Sequence[NotALayer]) -> list[tuple[float, str | None]]:
    """For each layer its radius before schedule and scaling, and why it is free (None if it is not)."""
    if radius is None:
        return [(math.inf, "layer_radius is None")] * len(layers)
    if not isinstance(radius, Mapping):
        value = _checked(radius, "layer_radius")
        if not layers:
            raise ValueError("layer_radius is set, but the model has no trained weight matrix to constrain")
        free = "layer_radius is infinite" if math.isinf(value) else None
        fresh = "freshly initialised, and layer_radius names no radius for it"
        return [(value, fresh if layer.fresh else free) for layer in layers]
    for pattern in radius:
        if not any(layer.matches(pattern) for layer in layers):
            raise ValueError(_no_match(pattern, layers, others))
    given: list[tuple[float, str | None]] = []
    for layer in layers:
        first = next((p for p in radius if layer.matches(p)), None)
        if first is None:
            given.append((math.inf, "no pattern of layer_radius matches"))
            continue
        chosen = radius[first]
        value = math.inf if chosen is None else _checked(chosen, f"layer_radius['{first}']")
        given.append((value, f"freed by the pattern '{first}'" if math.isinf(value) else None))
    return given


def _checked(radius: float, argument: str) -> float:
    if isinstance(radius, bool) or not isinstance(radius, Real) or not radius >= 0:
        raise ValueError(f"{argument} is {radius!r}; a radius is a number >= 0, or null or infinity for free")
    return float(radius)


def _no_match(pattern: str, layers: Sequence[Layer], others: Sequence[NotALayer]) -> str:
    message = f"layer_radius pattern '{pattern}' matches no layer"
    wrapped = f"*{pattern}*"
    hits = sum(layer.matches(wrapped) for layer in layers)
    if any(fnmatchcase(other.name, pattern) for other in others):
        message += ": it matches only parameters that are no layers (biases, norms, tables), which are free"
    elif hits:
        message += f"; '{wrapped}' would match {hits} (patterns match whole names, with * and ?)"
    names = [layer.name for layer in layers]
    shown = names if len(names) <= 6 else [*names[:3], "…", *names[-2:]]
    return f"{message}. Layers are {', '.join(shown)}"

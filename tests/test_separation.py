"""Examples of one batch are told apart, however a model arranges them; nothing that they share is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_robust_ft import layer_quadratic_forms, measure_hessian

KINDS = ("hessian", "gauss_newton", "hessian_upper", "hessian_psd")
IDS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6], [5, 3, 5, 8], [9, 7, 9, 3]])


class Encoder(nn.Module):
    """torch's own transformer, which computes with the sequence first whatever it is told."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)
        self.batch_first = batch_first

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = self.encoder(x if self.batch_first else x.transpose(0, 1))
        return self.head(x[:, 0] if self.batch_first else x[0])


class Routed(nn.Module):
    """Some tokens of each example, not equally many, go through an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.expert = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        chosen = ids > 4
        routed = torch.zeros_like(x).masked_scatter(chosen.unsqueeze(-1), torch.tanh(self.expert(x[chosen])))
        return self.head((x + routed).square().mean(1))


class TokenHead(nn.Module):
    """A label for each token, and the sequence first inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.embedding(ids).transpose(0, 1)))
        return self.second(x).transpose(0, 1)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return losses.sum(1) / (labels != -100).sum(1).clamp(min=1)


def moved(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: weight.detach() + 0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        for name, weight in model.named_parameters()
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("examples_at_once", [None, 2])
@pytest.mark.parametrize(
    "make",
    [lambda: Encoder(True), lambda: Encoder(False), Routed, TokenHead],
    ids=["batch", "sequence", "routed", "tokens"],
)
def test_a_batch_gives_what_its_examples_give_alone(make: Any, kind: Any, examples_at_once: int | None) -> None:
    torch.manual_seed(0)
    model = make().double()
    labels, loss = torch.tensor([0, 1, 2, 0]), None
    if isinstance(model, TokenHead):  # the first example has no target, the second only its first token
        labels = torch.tensor([[-100] * 4, [1, -100, -100, -100], [0, 1, 2, 0], [2, 2, -100, 1]])
        loss = token_loss
    options: dict[str, Any] = {"kind": kind, "loss": loss, "lanczos_steps": 100}
    reference = moved(model)
    found = layer_quadratic_forms(model, (IDS, labels), reference, examples_at_once=examples_at_once, **options)
    alone = [
        layer_quadratic_forms(model, (IDS[n : n + 1], labels[n : n + 1]), reference, **options).values for n in range(4)
    ]
    expected = torch.cat(alone)
    torch.testing.assert_close(found.values, expected, rtol=1e-8, atol=1e-10 * expected.abs().max().item())


def test_a_settled_maximum_is_the_maximum() -> None:
    torch.manual_seed(0)
    model = Encoder(True).double()
    reference, labels = moved(model), torch.tensor([0, 1, 2, 0])
    report = measure_hessian(model, reference, [(IDS, labels)], lanczos_steps=100)
    alone = measure_hessian(
        model, reference, [(IDS[n : n + 1], labels[n : n + 1]) for n in range(4)], lanczos_steps=100
    )
    for layer, other in zip(report.layers, alone.layers, strict=True):
        assert layer.upper.maximum == pytest.approx(other.upper.maximum, rel=1e-8)
        assert layer.positive is not None
        assert other.positive is not None
        assert layer.positive.maximum == pytest.approx(other.positive.maximum, rel=1e-8)


class Scaled(nn.Module):
    """One of its inputs is the same for all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)) * scale.sum())


def test_an_input_that_all_examples_share_is_not_cut_in_silence() -> None:
    torch.manual_seed(0)
    model = Scaled().double()
    batch = {
        "x": torch.randn(3, 4).double(),
        "scale": torch.tensor([1.0, 2.0, 3.0]).double(),
        "labels": torch.arange(3),
    }
    with pytest.raises(ValueError, match="first of 3 examples has other logits alone"):
        layer_quadratic_forms(model, batch, moved(model))
    whole = layer_quadratic_forms(model, {**batch, "x": batch["x"][:2], "labels": batch["labels"][:2]}, moved(model))
    assert whole.values.shape == (2, 2)


def test_examples_that_influence_each_other_are_refused() -> None:
    class Coupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x - x.mean(0))

    model = Coupled().double()
    with pytest.raises(ValueError, match="influence each other"):
        layer_quadratic_forms(model, (torch.randn(3, 4).double(), torch.arange(3)), moved(model), kind="hessian_upper")


def test_layers_that_do_nothing_have_no_curvature() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Spare().double()
    batch = (torch.randn(3, 4).double(), torch.arange(3))
    for kind in KINDS:
        found = layer_quadratic_forms(model, batch, moved(model), kind=kind, layers={"idle": "unused"})
        assert torch.equal(found.values, torch.zeros(3, 1, dtype=torch.float64))


def test_it_measures_inside_no_grad() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    batch = (torch.randn(3, 4).double(), torch.arange(3))
    expected = layer_quadratic_forms(model, batch, moved(model)).values
    with torch.no_grad():
        assert torch.equal(layer_quadratic_forms(model, batch, moved(model)).values, expected)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        layer_quadratic_forms(model, batch, moved(model))


def test_weights_that_are_not_finite_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).double()
    reference = moved(model)
    reference["0.weight"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"not finite in 0\.weight"):
        measure_hessian(model, reference, [(torch.randn(3, 4).double(), torch.arange(3))])


def test_empty_batches_are_passed_over() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    x, y = torch.randn(3, 4).double(), torch.arange(3)
    assert measure_hessian(model, moved(model), [(x, y), (x[:0], y[:0])]).examples == 3

"""Weight noise for each example, and posteriors trained on their own bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from hf_robust_ft import (
    NoNoiseRule,
    Posterior,
    corrupt_labels,
    fit_posterior,
    pac_bayes_certificate,
    pac_bayes_head,
    symmetric_transition,
)
from hf_robust_ft.bounds.kl import kl_inverse
from hf_robust_ft.gibbs import WeightPosterior
from hf_robust_ft.gibbs.injection import JUDGING, TRAINING, check_apart, fresh_noise, generator_of, noise_owners
from hf_robust_ft.gibbs.noise_rules import Noise
from hf_robust_ft.gibbs.posterior import centres, prior_unit
from hf_robust_ft.gibbs.training import _slopes


class Tokens(nn.Module):
    """Linear, GELU, norm, mean over the tokens, head: something of all that has a rule."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.head = first, nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(nn.functional.gelu(self.first(x))).mean(1))


def rotation(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)).Q


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Noise for each example against explicit draws of the weights


def linear_case(tokens: int, std: str, kind: type[nn.Module]) -> tuple[nn.Module, Tensor, dict[str, Noise]]:
    """A layer, two examples and noise."""
    module = (nn.Linear(3, 2) if kind is nn.Linear else Conv1D(2, 3)).double()
    x = torch.randn(2, tokens, 3, generator=generator(1), dtype=torch.float64)
    x[1, -1] = x[1, 0]  # tokens may repeat: X Xᵀ has no inverse
    weight = module.weight
    assert isinstance(weight, Tensor)
    deviations = {
        "scalar": torch.tensor(0.3, dtype=torch.float64),
        "full": torch.rand(weight.shape, generator=generator(2), dtype=torch.float64),
    }
    noises = {"weight": Noise(deviations[std]), "bias": Noise(torch.tensor(0.2, dtype=torch.float64))}
    return module, x, noises


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("std", ["scalar", "full"])
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_noise_of_a_linear_layer_has_the_covariance_of_drawn_weights(
    tokens: int, std: str, kind: type[nn.Module]
) -> None:
    module, x, noises = linear_case(tokens, std, kind)
    draws = 20_000
    many = x.repeat(draws, 1, 1)
    with torch.no_grad(), fresh_noise(module, noises, len(many), generator()):
        drawn = module(many)
    found = (drawn.view(draws, -1) - module(x).reshape(-1)).detach()
    # Covariance of Σ_i x_ti E_oi s_oi + b_o over (example, token, output): none between examples or outputs.
    wide = noises["weight"].std.expand(module.weight.shape)
    squares = (wide if kind is nn.Linear else wide.t()).square()
    expected = torch.zeros(2, tokens, 2, 2, tokens, 2, dtype=torch.float64)
    for n in range(2):
        for o in range(2):
            expected[n, :, o, n, :, o] = torch.einsum("ti,ui,i->tu", x[n], x[n], squares[o]) + 0.2**2
    matrix = expected.reshape(4 * tokens, 4 * tokens)
    error = (matrix.diagonal()[:, None] * matrix.diagonal() + matrix.square()).div(draws).sqrt()
    assert (found.mean(0).abs() < 5 * (matrix.diagonal() / draws).sqrt()).all()
    assert ((found.T @ found / draws - matrix).abs() < 5 * error).all()


def explicit(model: nn.Module, x: Tensor, noises: Mapping[str, Noise], draws: int) -> Tensor:
    """Outputs of one example [draws, K], each of a model with weights of its own."""
    rng = generator(9)
    moved = {}
    for name, parameter in model.named_parameters():
        noise = noises[name]
        drawn = noise.std * torch.randn(draws, *parameter.shape, generator=rng, dtype=torch.float64)
        moved[name] = parameter.detach() + (drawn if noise.basis is None else drawn @ noise.basis.T)
    return torch.vmap(lambda weights: functional_call(model, weights, (x,))[0])(moved)


def test_a_whole_model_with_noise_is_one_with_drawn_weights() -> None:
    """Mean, covariance and a non-linear statistic of the logits, through two noisy layers and a norm."""
    torch.manual_seed(0)
    model = Tokens(nn.Linear(3, 4)).double()
    small = torch.tensor(0.3, dtype=torch.float64)
    head = 0.1 + 0.4 * torch.rand(3, 4, generator=generator(3), dtype=torch.float64)
    noises = {name: Noise(small) for name, _ in model.named_parameters()}
    noises["head.weight"] = Noise(head, rotation(4))
    x = torch.randn(1, 5, 3, generator=generator(4), dtype=torch.float64)
    draws = 20_000
    with torch.no_grad():
        naive = explicit(model, x, noises, draws)
        with fresh_noise(model, noises, draws, generator()):
            ours = model(x.expand(draws, -1, -1))
    for statistic in (
        lambda z: z,
        lambda z: (z.unsqueeze(-1) * z.unsqueeze(-2)).flatten(1),
        lambda z: nn.functional.one_hot(z.argmax(-1), 3).double(),
    ):
        first, second = statistic(naive), statistic(ours)
        error = ((first.var(0) + second.var(0)) / draws).sqrt()
        assert ((first.mean(0) - second.mean(0)).abs() < 4.5 * error).all()


class Vision(nn.Module):
    """Patches, class token, positions, a scale of its own, head: what a vision transformer adds."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 3)), nn.Parameter(torch.randn(1, 5, 3))
        self.scale, self.head = nn.Parameter(torch.rand(3) + 0.5), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.positions
        return self.head(torch.tanh(tokens * self.scale).mean(1))


class Text(nn.Module):
    """Words, some of them twice, and positions that all examples share."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(7, 3, padding_idx=0), nn.Embedding(4, 3)
        self.head = nn.Linear(3, 3)
        self.register_buffer("ids", torch.arange(4).unsqueeze(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(x) + self.positions(self.ids)).square().mean(1))


@pytest.mark.parametrize("wide", [False, True], ids=["one deviation", "one for each entry"])
@pytest.mark.parametrize("kind", [Vision, Text])
def test_embeddings_with_noise_are_those_of_drawn_weights(kind: type[nn.Module], wide: bool) -> None:
    torch.manual_seed(0)
    model = kind().double()
    rng = generator(3)
    noises = {
        name: Noise(0.2 + 0.2 * torch.rand(p.shape if wide else (), generator=rng, dtype=torch.float64))
        for name, p in model.named_parameters()
    }
    assert noise_owners(model).keys() == noises.keys()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64) if kind is Vision else torch.tensor([[3, 5, 3, 0]])
    draws = 20_000
    many = x.expand(draws, *x.shape[1:])
    with torch.no_grad():
        naive = explicit(model, x, noises, draws)
        with fresh_noise(model, noises, draws, generator()):
            ours = model(many)
        check_apart(model, noises, lambda: model(many[:3]), 3)
    assert dict(model.named_parameters()).keys() == noises.keys()  # all are back
    for statistic in (lambda z: z, lambda z: (z.unsqueeze(-1) * z.unsqueeze(-2)).flatten(1)):
        first, second = statistic(naive), statistic(ours)
        error = ((first.var(0) + second.var(0)) / draws).sqrt()
        assert ((first.mean(0) - second.mean(0)).abs() < 4.5 * error).all()


@pytest.mark.parametrize("build", [tiny.vit, tiny.bert])
def test_a_whole_transformer_has_a_certificate(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build()
    reference = {name: weight.clone() for name, weight in model.state_dict().items()}
    inputs = (
        {"pixel_values": torch.randn(40, 1, 8, 8)}
        if build is tiny.vit
        else {"input_ids": torch.randint(1, 20, (40, 6)), "attention_mask": torch.ones(40, 6, dtype=torch.long)}
    )
    batches = [{**{key: value[i : i + 8] for key, value in inputs.items()}, "labels": torch.arange(8) % 3}
               for i in range(0, 40, 8)]  # fmt: skip
    posterior = fit_posterior(model, reference, batches, epochs=2)
    assert {weight.name for weight in posterior.weights} == {name for name, _ in model.named_parameters()}
    bound = pac_bayes_certificate(model, posterior, batches, passes=2)
    assert 0 < bound.value <= 1  # type: ignore[operator]


def test_each_example_has_noise_of_its_own_and_a_seed() -> None:
    torch.manual_seed(0)
    model = tiny.dinov2()
    model.eval()
    trainable(model, lambda name, module: type(module) in (nn.Linear, nn.LayerNorm))
    noises = {name: Noise(torch.tensor(0.1)) for name in noise_owners(model)}
    pixels = torch.randn(1, 1, 8, 8).repeat(3, 1, 1, 1)
    with torch.no_grad():
        outputs = []
        for seed in (0, 0, 1):
            with fresh_noise(model, noises, 3, generator(seed)):
                outputs.append(model(pixels).logits)
        still = model(pixels).logits
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0][0], outputs[0][1])
    assert torch.allclose(still[0], still[1])  # the hooks are gone


def trainable(model: nn.Module, wanted: Callable[[str, nn.Module], bool]) -> None:
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(wanted(name, module))


def test_training_and_judging_never_share_a_stream() -> None:
    cpu = torch.device("cpu")
    drawn = [
        torch.randn(8, generator=generator_of(seed, purpose, cpu)) for seed in (0, 1) for purpose in (TRAINING, JUDGING)
    ]
    assert len({tuple(each.tolist()) for each in drawn}) == 4
    assert torch.equal(drawn[0], torch.randn(8, generator=generator_of(0, TRAINING, cpu)))


# What has no rule is refused by name


def test_a_parameter_without_a_rule_is_named() -> None:
    by_channel = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3, padding="same"), nn.GRU(4, 4))
    with pytest.raises(NoNoiseRule, match=r"0.weight \(Conv2d\), 1.weight \(Conv2d\), 2.weight_ih_l0 \(GRU\).*Freeze"):
        noise_owners(by_channel)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight  # type: ignore[union-attr]
    with pytest.raises(NoNoiseRule, match=r"1.weight \(tied to 0.weight\)"):
        noise_owners(tied)


class Relative(nn.Module):
    """Positions relative to each other, the same for all examples: a table that sees a row for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 1), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        far = torch.arange(5) - torch.arange(5).unsqueeze(1) + 4
        return self.head(x @ self.table(far).squeeze(-1))


def test_noise_that_reaches_other_examples_is_refused() -> None:
    torch.manual_seed(0)
    model, x = Relative(), torch.randn(5, 5)
    names = dict(model.named_parameters())
    with pytest.raises(NoNoiseRule, match="the input of table has 5 rows for 4 examples"):
        check_apart(model, names, lambda: model(x[:4]), 4)
    # As many examples as tokens: only the logits tell.
    with pytest.raises(NoNoiseRule, match=r"changes the logits of others.*: freeze what is used otherwise"):
        check_apart(model, names, lambda: model(x), 5)
    with pytest.raises(NoNoiseRule, match="changes the logits of others"):
        fit_posterior(model, model.state_dict(), [(x, torch.arange(5) % 3)], epochs=1)
    model.table.requires_grad_(False)
    check_apart(model, ["head.weight", "head.bias"], lambda: model(x), 5)


def test_a_parameter_that_all_examples_must_share_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    names = dict(model.named_parameters())
    x = torch.randn(6, 4)
    with pytest.raises(NoNoiseRule, match=r"can't have another parameter for each example \(.*freeze 1.weight, 1.bias"):
        check_apart(model, names, lambda: model(x), 6)
    assert isinstance(model[1].weight, nn.Parameter)
    # Positions that are fitted to another image size.
    vision = tiny.dinov2().eval()
    pixels = torch.randn(2, 1, 12, 12)
    with pytest.raises(NoNoiseRule, match=r"freeze .*position_embeddings"):
        check_apart(vision, noise_owners(vision), lambda: vision(pixels).logits, 2)


class Twice(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = nn.Linear(3, 3), how

    def forward(self, x: Tensor) -> Tensor:
        return {
            "twice": lambda: self.inner(self.inner(x)),
            "behind": lambda: x @ self.inner.weight.T,
            "flattened": lambda: self.inner(x.reshape(-1, 3)).view_as(x),
            "keyword": lambda: self.inner(input=x),
        }[self.how]()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("twice", "inner is called twice in a forward pass"),
        ("behind", "inner had no call of its own in the forward pass"),
        ("flattened", "the input of inner has 10 rows for 2 examples"),
        ("keyword", "inner is called with keyword arguments"),
    ],
)
def test_a_use_that_noise_would_miss_is_refused(how: str, message: str) -> None:
    model = Twice(how)
    noises = {"inner.weight": Noise(torch.tensor(0.1))}
    with pytest.raises(NoNoiseRule, match=message), fresh_noise(model, noises, 2, generator()):
        model(torch.ones(2, 5, 3))
    assert not model.inner._forward_hooks


def test_what_is_frozen_must_equal_the_reference() -> None:
    model = Tokens(nn.Linear(3, 4))
    reference = tiny.weights(model)
    trainable(model, lambda name, module: name == "head")
    assert set(centres(model, reference)) == {"head.weight", "head.bias"}
    without = {name: tensor for name, tensor in reference.items() if name != "head.bias"}
    assert torch.equal(centres(model, without)["head.bias"], torch.zeros(3))
    with torch.no_grad():
        model.first.weight.add_(1e-3)
    with pytest.raises(ValueError, match=r"first\.weight is frozen but differs from the reference"):
        centres(model, reference)
    del reference["first.weight"]
    with pytest.raises(ValueError, match=r"first\.weight is frozen but is not in the reference"):
        centres(model, reference)
    with pytest.raises(ValueError, match=r"the reference of head.bias has shape \(2,\), the model's has \(3,\)"):
        centres(model, {**reference, "head.bias": torch.zeros(2)})
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        centres(model, reference)


def test_statistics_of_batch_norm_count_as_trained() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    trainable(model, lambda name, module: name == "1")
    reference = tiny.weights(model)
    model.train()
    model(torch.randn(8, 3))
    with pytest.raises(ValueError, match=r"0\.running_mean is frozen but differs"):
        centres(model, reference)


# The posterior


def test_the_kl_counts_every_entry() -> None:
    mean, centre = torch.randn(3, 4, generator=generator()), torch.randn(3, 4, generator=generator(1))
    ratio = torch.rand(3, 4, generator=generator(2)) + 0.1
    weight = WeightPosterior("w", mean, centre, 0.5, ratio)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, ratio * 0.5), normal(centre, 0.5)).sum().item()
    assert weight.kl == pytest.approx(expected, rel=1e-5)
    # A rotated posterior, against the formula for full covariances.
    basis = rotation(4)
    rotated = WeightPosterior("w", mean.double(), centre.double(), 0.5, ratio.double(), basis)
    total = 0.0
    for row in range(3):
        covariance = basis @ torch.diag((ratio[row].double() * 0.5).square()) @ basis.T
        total += torch.distributions.kl_divergence(
            torch.distributions.MultivariateNormal(mean[row].double(), covariance),
            torch.distributions.MultivariateNormal(centre[row].double(), 0.25 * torch.eye(4, dtype=torch.float64)),
        ).item()
    assert rotated.kl == pytest.approx(total)
    scalar = WeightPosterior("w", mean, centre, 0.5, torch.tensor(1.0))
    assert scalar.kl == pytest.approx((mean - centre).double().square().sum().item() / 0.5, rel=1e-6)
    assert Posterior((weight, scalar), 2).kl == pytest.approx(weight.kl + scalar.kl)
    assert Posterior((weight,), 2).priors == 33**2


def test_the_prior_s_unit_knows_no_data() -> None:
    assert prior_unit(torch.full((2, 5), -3.0)) == pytest.approx(3.0)
    assert prior_unit(torch.zeros(2, 4)) == pytest.approx(0.5)
    assert prior_unit(torch.zeros(4)) == 1.0


@pytest.mark.parametrize(("risk", "penalty"), [(0.1, 0.05), (0.6, 0.2), (0.0, 0.1), (0.3, 3.0)])
def test_slopes_of_the_kl_inverse(risk: float, penalty: float) -> None:
    by_risk, by_penalty = _slopes(risk, penalty)
    assert by_risk > 0
    assert by_penalty > 0
    if risk > 0 and penalty < 1:
        step = 1e-6
        assert by_risk == pytest.approx((kl_inverse(risk + step, penalty) - kl_inverse(risk, penalty)) / step, rel=1e-2)
        assert by_penalty == pytest.approx(
            (kl_inverse(risk, penalty + step) - kl_inverse(risk, penalty)) / step, rel=1e-2
        )


def clouds(examples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three clouds in eight dimensions around distant centres."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, examples)
    x = rng.normal(size=(examples, 8)) + 3 * np.eye(8)[labels]
    return torch.tensor(x, dtype=torch.float32), torch.tensor(labels)


def test_a_head_is_certified_clean_and_noisy() -> None:
    x, labels = clouds(400)
    test, truth = clouds(2000, seed=1)
    posterior, bound = pac_bayes_head(x, labels, num_classes=3, steps=100)
    assert bound.value is not None
    assert bound.value < 0.25
    assert bound.terms["kl"] == pytest.approx(posterior.kl)
    matrix = symmetric_transition(3, 0.3)
    noisy = torch.tensor(corrupt_labels(labels.numpy(), matrix, 0))
    _, through = pac_bayes_head(x, noisy, num_classes=3, transition=matrix, steps=100)
    assert through.value is not None
    assert bound.value < through.value < 0.5
    assert through.bounds_what == "error on clean labels of the randomised classifier"
    # The same randomised classifier on other examples.
    head = nn.Linear(8, 3, bias=False)
    other = pac_bayes_certificate(head, posterior, [(test, truth)], passes=1)
    assert abs(other.terms["empirical"] - bound.terms["empirical"]) < 0.05
    assert other.terms["empirical"] < bound.value


def test_a_certificate_leaves_the_model_alone_and_depends_on_its_seed() -> None:
    x, labels = clouds(64)
    torch.manual_seed(0)
    head = nn.Linear(8, 3)
    before = tiny.weights(head)
    weights = tuple(
        WeightPosterior(name, torch.randn(p.shape), torch.zeros_like(p), 0.5, torch.tensor(1.0))
        for name, p in head.named_parameters()
    )
    posterior = Posterior(weights, 1)
    first, again = (pac_bayes_certificate(head, posterior, [(x, labels)], passes=2) for _ in range(2))
    assert first == again
    assert first.terms["draws"] == 128
    halves = [(x[:30], labels[:30]), (x[30:], labels[30:])]
    assert pac_bayes_certificate(head, posterior, halves, passes=2).n == 64
    tiny.assert_equal_weights(before, tiny.weights(head))
    assert head.training
    with pytest.raises(ValueError, match="passes is 0"):
        pac_bayes_certificate(head, posterior, halves, passes=0)
    with pytest.raises(ValueError, match="trained parameters differ in bias: the KL has to count every trained"):
        pac_bayes_certificate(head, Posterior(weights[:1], 1), halves)


@pytest.mark.parametrize("build", [tiny.dinov2, tiny.bert, tiny.gpt2])
def test_transformers_models_end_to_end(build: Any) -> None:
    """Fit, move, certify: the bound of an unmodified model, with every linear layer and norm trained."""
    torch.manual_seed(0)
    model = build()
    trainable(model, lambda name, module: type(module) in (nn.Linear, nn.LayerNorm, Conv1D))
    if build is tiny.dinov2:
        inputs: dict[str, Tensor] = {"pixel_values": torch.randn(24, 1, 8, 8)}
    else:
        inputs = {"input_ids": torch.randint(3, 50, (24, 5)), "attention_mask": torch.ones(24, 5, dtype=torch.long)}
    labels = torch.arange(24) % 3
    batches = [{**{k: v[i : i + 8] for k, v in inputs.items()}, "labels": labels[i : i + 8]} for i in (0, 8, 16)]
    reference = tiny.weights(model)
    head = "score.weight" if build is tiny.gpt2 else "classifier.weight"
    posterior = fit_posterior(model, reference, batches, epochs=2, groups=[head])
    assert posterior.groups == 2
    named = {weight.name: weight for weight in posterior.weights}
    assert named.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not torch.equal(named[head].mean, reference[head])
    assert {name for name, weight in named.items() if weight.ratio.numel() > 1} >= {head} - {"score.weight"}
    bound = pac_bayes_certificate(model, posterior, batches, passes=1)
    assert bound.value is not None
    assert 0 < bound.value <= 1
    assert bound.n == 24
    assert any("groups of parameters" in line for line in bound.assumptions)


def test_a_model_trained_elsewhere_keeps_its_means() -> None:
    x, labels = clouds(100)
    model = nn.Linear(8, 3)
    reference = tiny.weights(model)
    with torch.no_grad():
        model.weight.add_(0.1)
    before = tiny.weights(model)
    posterior = fit_posterior(model, reference, [(x, labels)], epochs=5, move=False)
    tiny.assert_equal_weights(before, tiny.weights(model))
    assert posterior.kl > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": ["nothing*"]}, r"the group 'nothing\*' matches no trained parameter"),
        ({"batches": []}, "batches gave no example"),
        (
            {"batches": [(torch.full((9, 8), math.nan), torch.zeros(9, dtype=torch.long))]},
            "the inputs of weight hold NaN",
        ),
        ({"transition": [[0.5, 0.5], [0.5, 0.5]]}, "noise_transition is for 2 classes, but the model has 3"),
    ],
)
def test_fitting_refuses(change: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"batches": [clouds(20)], **change}
    with pytest.raises(ValueError, match=message):
        fit_posterior(nn.Linear(8, 3, bias=False), {}, settings.pop("batches"), epochs=2, **settings)


def test_a_bound_that_is_not_finite_is_refused() -> None:
    model = Tokens(nn.Linear(3, 4))
    trainable(model, lambda name, module: name == "norm")
    batch = (torch.full((9, 5, 3), math.nan), torch.zeros(9, dtype=torch.long))
    with pytest.raises(ValueError, match="in epoch 0 the risk became nan"):
        fit_posterior(model, tiny.weights(model), [batch], epochs=1)


def test_heads_and_logits_refuse() -> None:
    x, labels = clouds(20)
    with pytest.raises(ValueError, match=r"features have shape \(20, 8\) and labels \(19,\)"):
        pac_bayes_head(x, labels[:-1], num_classes=3)
    with pytest.raises(ValueError, match="features hold NaN"):
        pac_bayes_head(x * math.nan, labels, num_classes=3)
    token_classifier = tiny.token_classifier()
    trainable(token_classifier, lambda name, module: name == "classifier")
    batch = {"input_ids": torch.randint(3, 50, (8, 5)), "labels": torch.zeros(8, dtype=torch.long)}
    with pytest.raises(ValueError, match="the certificate is for one class an example"):
        fit_posterior(token_classifier, tiny.weights(token_classifier), [batch], epochs=1)

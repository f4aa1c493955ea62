"""Bounds from measured numbers: closed forms by hand, kl inverse against a root finder, coverage on toys."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from scipy.optimize import bisect
from scipy.stats import binom, norm

from hf_robust_ft import (
    Bound,
    HessianReport,
    NotALayer,
    certified_error,
    clean_accuracy,
    distance_measures,
    held_out_bound,
    hessian_bound,
    pac_bayes_bound,
    pair_flip_transition,
    report_bounds,
    symmetric_transition,
)
from hf_robust_ft.bounds import binary_kl, gaussian_kl, held_out_error, kl_inverse
from hf_robust_ft.bounds.kl import mean_bound
from hf_robust_ft.bounds.pac_bayes import PRIOR_SCALES, bounded_loss
from hf_robust_ft.curvature.report import LayerCurvature, PositivePart, Statistic

LOSSES = {"mean_loss": 0.5, "largest_loss": 4.0}


# The common result type


def test_a_bound_survives_json() -> None:
    bound = Bound("a", math.inf, "measure", "gap", {"log10": 400.0}, ("if",), "paper", 0.95, 10, 3)
    text = json.dumps(bound.to_dict(), allow_nan=False)
    assert Bound.from_dict(json.loads(text)) == bound
    missing = Bound("a", None, "estimate", "gap", assumptions=("no layer settled",))
    assert Bound.from_dict(json.loads(json.dumps(missing.to_dict()))) == missing
    assert str(missing) == "a: gap not measured (no layer settled)"
    assert str(replace(bound, value=0.5, kind="certificate")) == "a: gap 0.5 (certificate, with probability 0.95)"


def test_a_bound_refuses_what_it_is_not() -> None:
    with pytest.raises(ValueError, match="value of the bound 'a' is NaN"):
        Bound("a", math.nan, "measure", "gap")
    with pytest.raises(ValueError, match="kind is 'guess'; choose one of 'certificate'"):
        Bound("a", 1.0, "guess", "gap")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"is no bound; give what Bound\.to_dict gave"):
        Bound.from_dict({"name": "a"})


# Theorem 2.1


def test_the_leading_term_by_hand() -> None:
    bound = hessian_bound([4.0, 9.0, 0.0, -1e-9], n=100, **LOSSES, epsilon=0.2)
    # 1.2 · 0.5 + 1.2 · √4 · (2 + 3) / √100
    assert bound.value == pytest.approx(0.6 + 1.2)
    assert bound.terms["gap"] == pytest.approx(1.3)
    assert bound.terms["root_sum"] == pytest.approx(5.0)
    assert bound.kind == "estimate"


def test_noise_shifts_the_loss() -> None:
    matrix = symmetric_transition(2, 0.2)  # T^-1 = [[4, -1], [-1, 4]] / 3
    bound = hessian_bound(
        [4.0], n=25, mean_loss=1.0, largest_loss=6.0, smallest_loss=-3.0, transition=matrix, epsilon=0.5
    )
    # -3 + 1.5 · (1 + 3) + 1.5 · √9 · 2 / 5
    assert bound.value == pytest.approx(-3 + 6 + 1.8)
    assert bound.terms["amplification"] == pytest.approx(5 / 3)
    assert bound.bounds_what == "expected loss on clean labels"


def test_a_shift_of_the_corrected_loss_shifts_its_bound() -> None:
    settings: dict[str, Any] = {"n": 25, "transition": symmetric_transition(2, 0.2)}
    here = hessian_bound([4.0], mean_loss=1.0, largest_loss=6.0, smallest_loss=-3.0, **settings)
    there = hessian_bound([4.0], mean_loss=6.0, largest_loss=11.0, smallest_loss=2.0, **settings)
    assert here.value is not None
    assert there.value == pytest.approx(here.value + 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n is 0; give the number of training examples"),
        ({"epsilon": 0.0}, "epsilon is 0.0; the theorem is for a positive one"),
        ({"mean_loss": math.nan}, "mean_loss is nan; a bound needs finite numbers"),
        ({"largest_loss": math.inf}, "largest_loss is inf"),
        ({"mean_loss": 0.0, "largest_loss": 0.0}, "C = 0: every loss is the same"),
        ({"smallest_loss": -1.0}, "smallest_loss is -1; the theorem is for losses from 0 on. Give the transition"),
        ({"mean_loss": 5.0}, r"mean_loss is 5, outside of \[0, 4\]"),
        ({"measures": []}, "measures is empty"),
        ({"measures": [1.0, math.nan]}, r"measures\[1\] is nan"),
        ({"transition": pair_flip_transition(2, 0.5)}, "noise_transition is singular"),
    ],
)
def test_the_leading_term_refuses(change: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"measures": [1.0], "n": 10, **LOSSES, **change}
    with pytest.raises(ValueError, match=message):
        hessian_bound(settings.pop("measures"), **settings)


# From a report


def report(*settled: bool | None, **changes: Any) -> HessianReport:
    """One layer for each value: whether it is settled; None: not looked at."""
    layers = tuple(
        LayerCurvature(
            name=f"{i}.weight",
            members=(f"{i}.weight",),
            distance=1.0,
            hessian=Statistic(1.0, 0, 0.5, 0.1),
            upper=Statistic(4.0, 0, 2.0, 0.1),
            positive=None if state is None else PositivePart(1.0, 0, 0.0, 1, state),
        )
        for i, state in enumerate(settled)
    )
    known: dict[str, Any] = {
        "layers": layers,
        "left_out": (),
        "examples": 100,
        "losses": Statistic(4.0, 0, 0.5, 0.1),
        "smallest_loss": 0.0,
        "lanczos_steps": 20,
        "complete": True,
        "seconds": 1.0,
        "estimated_seconds": 1.0,
        "notes": (),
    }
    return HessianReport(**{**known, **changes})


def test_lanczos_counts_where_it_settled() -> None:
    sound, lanczos = report_bounds(report(True, False, None), 100)
    assert sound.terms["root_sum"] == pytest.approx(2 + 2 + 2)
    assert lanczos.terms["root_sum"] == pytest.approx(1 + 2 + 2)
    assert any("1 of 3 layers" in line for line in lanczos.assumptions)


def test_lanczos_that_settled_nothing_is_not_measured() -> None:
    sound, lanczos = report_bounds(report(False, None), 100)
    assert sound.value is not None
    assert lanczos.value is None
    assert "not measured (Lanczos settled no layer)" in str(lanczos)


def test_a_report_says_what_voids_the_theorem() -> None:
    left_out = (NotALayer("a.bias", (3,), "bias"),)
    (bound, _) = report_bounds(report(True, left_out=left_out, complete=False), 1000)
    said = " ".join(bound.assumptions)
    assert "void the theorem: a.bias" in said
    assert "stopped before the end" in said
    assert "100 of 1000 training examples" in said


def test_a_report_without_losses_is_refused() -> None:
    nothing = Statistic(math.nan, 0, math.nan, math.nan)
    with pytest.raises(ValueError, match="mean_loss is nan"):
        report_bounds(report(True, losses=nothing), 100)
    with pytest.raises(ValueError, match="n is 0"):
        report_bounds(report(True), 0)
    with pytest.raises(ValueError, match="give model and reference, or neither"):
        report_bounds(report(True), 10, reference={})


@pytest.mark.parametrize("build", [tiny.bert, tiny.gpt2])
def test_all_bounds_of_a_model(build: Any) -> None:
    torch.manual_seed(0)
    model = build()
    reference = tiny.weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    extra = Bound("held-out", 0.2, "certificate", "error")
    found = report_bounds(report(True), 100, model=model, reference=reference, margin=0.5, others=[extra])
    assert len(found) == 2 + 5 + 1
    assert all(bound.value is not None for bound in found)
    assert found[-1] is extra


def test_rows_of_conv1d_are_its_outputs() -> None:
    torch.manual_seed(0)
    model = tiny.gpt2()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "transformer.h.0.mlp.c_fc.weight")  # [in 16, out 64]
    reference = {name: tensor + 1.0 for name, tensor in tiny.weights(model).items()}
    found = {b.name: b for b in report_bounds(report(True), 1, model=model, reference=reference)}
    (weight,) = [p for p in model.parameters() if p.requires_grad]
    widest = weight.detach().double().abs().sum(0).max().item()
    assert found["row sums"].value == pytest.approx(2 * widest * weight.shape[0] / widest, rel=1e-5)


# Distance-only measures


def test_distance_measures_by_hand() -> None:
    # Diagonal matrices: every norm can be read off.
    weights = [torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([2.0, 2.0]))]
    ways = [torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([0.0, 1.0]))]
    pairs = [(w, w - d) for w, d in zip(weights, ways, strict=True)]
    found = {bound.name: bound for bound in distance_measures(pairs, n=4, margin=0.5, largest_loss=3.0)}
    assert all(bound.kind == "measure" for bound in found.values())
    assert found["distance"].value == pytest.approx(math.sqrt(5 + 1) / 2)
    assert found["row sums"].value == pytest.approx(6 * 4 * (2 / 3 + 1 / 2) / 2)
    assert found["spectral"].value == pytest.approx(6 * math.sqrt(5 / 9 + 1 / 4) / (0.5 * 2))
    lengths = ((3 / 3) ** (2 / 3) + (1 / 2) ** (2 / 3)) ** 1.5
    assert found["spectral, row lengths"].value == pytest.approx(6 * lengths / (0.5 * 2))
    assert found["parameters"].value == pytest.approx(3 * math.sqrt(8 * (2 + 1 + math.log(4)) / 4))


def test_distance_measures_scale_as_they_must() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator)) for _ in range(3)]
    here = distance_measures(pairs, n=10, margin=1.0, largest_loss=1.0)
    # Ten times as far, the weights where they are.
    far = distance_measures([(w, w - 10 * (w - c)) for w, c in pairs], n=10, margin=1.0, largest_loss=1.0)
    for a, b in zip(here[:4], far[:4], strict=True):
        assert a.value is not None
        assert b.value == pytest.approx(10 * a.value)
    # A model of many layers is beyond floats, and its logarithm is not.
    (_, deep, *_) = distance_measures([(1e6 * w, c) for w, c in pairs] * 50, n=10)
    assert deep.value == math.inf
    assert 300 < deep.terms["log10"] < 2000


def test_distance_measures_that_are_not_measured() -> None:
    weight = torch.eye(2)
    found = {bound.name: bound for bound in distance_measures([(weight, 2 * weight)], n=4)}
    assert found["spectral"].assumptions == ("no margin was given",)
    assert found["parameters"].assumptions == ("no largest loss was given",)
    (first, *others) = distance_measures([(0 * weight, weight)], n=4, margin=1.0)
    assert first.value == pytest.approx(math.sqrt(2) / 2)
    assert others[0].value is None
    assert others[0].assumptions == ("a weight is zero, and its norm a divisor",)
    still = distance_measures([(weight, weight)], n=4, margin=1.0)
    assert [bound.value for bound in still[:4]] == [0.0] * 4


@pytest.mark.parametrize(
    ("layers", "settings", "message"),
    [
        ([], {}, "layers is empty"),
        ([(torch.ones(2, 2), torch.ones(2, 3))], {}, r"shape \(2, 2\) and its reference \(2, 3\)"),
        ([(torch.full((2, 2), math.nan), torch.ones(2, 2))], {}, "NaN or infinity"),
        ([(torch.ones(2, 2), torch.ones(2, 2))], {"margin": 0.0}, "margin is 0.0; it is positive"),
        ([(torch.ones(2, 2), torch.ones(2, 2))], {"n": 0}, "n is 0"),
    ],
)
def test_distance_measures_refuse(layers: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distance_measures(layers, **{"n": 10, **settings})


# Held out


def test_held_out_accuracy_is_an_error_bound() -> None:
    labels = np.arange(1000) % 4
    found = clean_accuracy(
        np.where(np.arange(1000) < 700, labels, (labels + 1) % 4), labels, symmetric_transition(4, 0.2)
    )
    bound = held_out_bound(found)
    assert bound.kind == "certificate"
    assert bound.value == pytest.approx(1 - found.interval[0])
    assert bound.terms["error"] == pytest.approx(1 - found.accuracy)
    estimate = held_out_bound(clean_accuracy(labels, labels, np.array(pair_flip_transition(4, 0.0)), confidence=0.9))
    assert estimate.confidence == 0.9
    contradiction = held_out_bound(clean_accuracy(labels, labels, symmetric_transition(4, 0.5)))
    assert contradiction.value is None
    assert "contradict T" in str(contradiction)


@pytest.mark.parametrize("wrong", [0, 1, 7, 39, 40])
def test_the_held_out_error_is_the_largest_that_so_few_mistakes_do_not_refute(wrong: int) -> None:
    bound = held_out_error(wrong, 40, name="held-out", clean=True, confidence=0.9)
    assert bound.terms == {"error": wrong / 40}
    if wrong == 40:
        assert bound.value == 1
    else:
        assert binom.cdf(wrong, 40, bound.value) == pytest.approx(0.1)
    assert bound.bounds_what == "error on clean labels"
    assert "as given" in held_out_error(wrong, 40, name="held-out", clean=False).bounds_what


@pytest.mark.parametrize("truth", [0.1, 0.3])
def test_the_held_out_error_holds_as_often_as_it_says(truth: float) -> None:
    shares = [binom.pmf(k, 60, truth) for k in range(61)]
    values = [held_out_error(k, 60, name="held-out", clean=True).value or 0.0 for k in range(61)]
    assert 0.95 <= math.fsum(p for p, value in zip(shares, values, strict=True) if value >= truth) < 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "n is 0"),
        ({"wrong": 5}, "wrong is 5 of n=4"),
        ({"confidence": 1.0}, "confidence is 1.0; it is a probability"),
    ],
)
def test_held_out_error_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        held_out_error(**{"wrong": 1, "n": 4, "name": "held-out", "clean": True, **settings})


# Kl


@pytest.mark.parametrize("q", [0.0, 1e-9, 0.01, 0.3, 0.9, 0.999999])
@pytest.mark.parametrize("bound", [1e-12, 1e-4, 0.1, 1.0, 3.0])
def test_the_kl_inverse_is_the_root(q: float, bound: float) -> None:
    def kl(p: float) -> float:
        return (q * math.log(q / p) if q else 0.0) + (1 - q) * math.log((1 - q) / (1 - p))

    last = math.nextafter(1.0, 0.0)
    expected = 1.0 if kl(last) <= bound else bisect(lambda p: kl(p) - bound, max(q, 1e-300), last, xtol=1e-14)
    found = kl_inverse(q, bound)
    assert found == pytest.approx(expected, abs=1e-9)
    assert found == 1.0 or binary_kl(q, found) >= bound  # never below the root


def test_the_kl_inverse_at_its_ends() -> None:
    assert kl_inverse(0.3, 0.0) == pytest.approx(0.3)
    assert kl_inverse(1.0, 0.5) == 1.0
    assert kl_inverse(0.0, 0.2) == pytest.approx(1 - math.exp(-0.2))
    assert binary_kl(0.0, 1.0) == math.inf
    for q, bound, message in ((1.2, 0.1, "q is 1.2"), (math.nan, 0.1, "q is nan"), (0.1, -1.0, "bound is -1.0")):
        with pytest.raises(ValueError, match=message):
            kl_inverse(q, bound)
    with pytest.raises(ValueError, match="p is 2"):
        binary_kl(0.5, 2)


def test_gaussian_kl_is_torch_s() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, centre = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    std = torch.rand(3, 4, generator=generator, dtype=torch.float64) + 0.1
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(centre, 0.7)).sum().item()
    assert gaussian_kl(mean, std, centre, 0.7) == pytest.approx(expected)
    same = gaussian_kl(mean, 0.7, centre, 0.7)  # a scalar stands for every entry
    assert same == pytest.approx(((mean - centre).square().sum() / (2 * 0.49)).item())
    with pytest.raises(ValueError, match="std has the entry 0"):
        gaussian_kl(mean, 0.0, centre, 1.0)


def test_mean_bound_of_different_coins() -> None:
    """Clopper-Pearson holds for a sum of different coins: the exact probability of failure, by convolution."""
    rng = np.random.default_rng(0)
    for n, delta in ((12, 0.25), (40, 0.05)):
        uppers = np.array([mean_bound(k / n, n, delta, binary=True) for k in range(n + 1)])
        assert (np.diff(uppers) >= 0).all()
        for chances in ([*rng.beta(0.3, 0.3, n)], [1.0] * (n // 2) + [0.0] * (n - n // 2), [1.0] * (n - 1) + [0.5]):
            masses = np.array([1.0])
            for p in chances:
                masses = np.convolve(masses, [1 - p, p])
            assert masses[uppers < np.mean(chances) - 1e-9].sum() <= delta
        alone = binom.pmf(np.arange(n + 1), n, 0.2)[uppers < 0.2].sum()
        assert 0 < alone <= delta


def test_mean_bound_of_other_losses() -> None:
    assert mean_bound(0.3, 100, 0.05, binary=False) == pytest.approx(kl_inverse(0.3, math.log(20) / 100))
    assert mean_bound(0.3, 100, 0.05, binary=True) < mean_bound(0.3, 100, 0.05, binary=False)
    with pytest.raises(ValueError, match=r"delta is 0.5; it is a probability of failure in \(0, 1/4\]"):
        mean_bound(0.3, 100, 0.5, binary=True)


# The PAC-Bayes certificate


def test_the_certificate_by_hand() -> None:
    labels = np.arange(1000) % 3
    drawn = np.stack([labels, np.where(np.arange(1000) < 400, (labels + 1) % 3, labels)])
    bound = certified_error(drawn, labels, num_classes=3, kl=50.0, priors=33, delta=0.05, seed=7)
    upper = mean_bound(0.2, 2000, 0.005, binary=True)
    right = kl_inverse(upper, (50 + math.log(2 * math.sqrt(1000) * 33 / 0.045)) / 1000)
    assert bound.value == pytest.approx(right)
    assert bound.terms["empirical"] == pytest.approx(0.2)
    assert bound.confidence == 0.95
    assert bound.seed == 7
    assert bound.kind == "certificate"
    assert bound.value == pytest.approx(pac_bayes_bound(upper, 50.0, 1000, delta=0.045, priors=33))


@pytest.mark.parametrize("matrix", [symmetric_transition(3, 0.4), pair_flip_transition(3, 0.3)])
def test_the_bounded_loss_sees_clean_error_through_noise(matrix: Any) -> None:
    squeezed, low, width = bounded_loss(3, matrix)
    assert squeezed.min() == 0.0
    assert squeezed.max() == 1.0
    np.testing.assert_allclose(matrix @ (low + width * squeezed), 1 - np.eye(3), atol=1e-12)


def test_clean_labels_need_no_map() -> None:
    squeezed, low, width = bounded_loss(4)
    np.testing.assert_array_equal(squeezed, 1 - np.eye(4))
    assert (low, width) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": 0.0}, "delta is 0.0; it is a probability of failure between 0 and 1"),
        ({"delta": 1.0}, "delta is 1.0"),
        ({"predictions": np.zeros((1, 5), int)}, r"predictions have shape \(1, 5\) and labels \(10,\)"),
        ({"predictions": np.zeros((1, 4), int), "labels": np.zeros(4, int)}, "n is 4; give the number .* at least 8"),
        ({"transition": pair_flip_transition(2, 0.5)}, "noise_transition is singular"),
        ({"transition": symmetric_transition(3, 0.1)}, "noise_transition is for 3 classes, but the model has 2"),
        ({"labels": np.full(10, 2)}, r"label 2 lies outside 0..1"),
        ({"kl": math.nan}, "kl is nan; it is a divergence in nats"),
        ({"kl": -1.0}, "kl is -1.0"),
    ],
)
def test_the_certificate_refuses(change: dict[str, Any], message: str) -> None:
    known: dict[str, Any] = {
        "predictions": np.zeros((1, 10), int),
        "labels": np.zeros(10, int),
        "num_classes": 2,
        "kl": 1.0,
    }
    settings = {**known, **change}
    with pytest.raises(ValueError, match=message):
        certified_error(settings.pop("predictions"), settings.pop("labels"), **settings)


SIZE, DIMENSIONS, ATOMS, DELTA = 400, 5, 300, 0.05
STRETCHES = np.array([0.5, 1.0, 2.0, 4.0, 8.0])


def toy(seed: int, transition: Any = None) -> tuple[Bound, float, float]:
    """A linear classifier of two Gaussian clouds under a Gaussian posterior: certificate, true risk, risk on examples.

    The population is a cloud of atoms, so that the true risk is a finite sum: the error of ``sign(w·x)`` with
    ``w ~ N(m, 1)`` is ``Φ(-y m·x / ‖x‖)``. The mean m and the prior's deviation are chosen on the examples.
    """
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, ATOMS)
    centre = rng.normal(size=DIMENSIONS)
    atoms = rng.normal(size=(ATOMS, DIMENSIONS))
    atoms += np.outer(2 * truth - 1, 1.2 * centre / np.linalg.norm(centre))
    chosen = rng.integers(0, ATOMS, SIZE)
    seen = truth[chosen]
    if transition is not None:
        seen = (rng.random(SIZE) < transition[seen, 1]).astype(int)

    def risks(rows: Any, labels: np.ndarray) -> np.ndarray:
        units = atoms[rows] / np.linalg.norm(atoms[rows], axis=1, keepdims=True)
        return norm.cdf(-(2 * labels - 1) * (means @ units.T)).mean(1)

    means = STRETCHES[:, None] * (atoms[chosen] * (2 * seen - 1)[:, None]).mean(0)
    scales = np.array(PRIOR_SCALES)
    lengths = (means**2).sum(1)[:, None]
    kls = DIMENSIONS * (np.log(scales) + 0.5 / scales**2 - 0.5) + lengths / (2 * scales**2)
    promise = risks(chosen, seen) + np.sqrt(kls.min(1) / (2 * SIZE))
    best = int(promise.argmin())
    scale = scales[kls[best].argmin()]
    kl = gaussian_kl(torch.as_tensor(means[best]), 1.0, 0.0, float(scale))
    assert kl == pytest.approx(kls[best].min())
    weights = means[best] + rng.normal(size=(10, SIZE, DIMENSIONS))
    predictions = (np.einsum("rnd,nd->rn", weights, atoms[chosen]) > 0).astype(int)
    bound = certified_error(
        predictions, seen, num_classes=2, kl=kl, priors=len(scales), transition=transition, delta=DELTA
    )
    return bound, float(risks(slice(None), truth)[best]), float(risks(chosen, truth[chosen])[best])


@pytest.mark.parametrize(
    "transition",
    [None, symmetric_transition(2, 0.2), np.array([[0.9, 0.1], [0.25, 0.75]])],
    ids=["clean", "symmetric", "uneven"],
)
def test_the_certificate_holds(transition: Any) -> None:
    found = [toy(seed, transition) for seed in range(200)]
    bounds = np.array([bound.value for bound, _, _ in found])
    risks = np.array([risk for _, risk, _ in found])
    assert bounds.max() < 1
    assert (risks <= bounds).mean() >= 1 - DELTA
    # It says more than chance, and less would not do: the examples' own risk is below the true one half of the time.
    assert bounds.mean() < 0.5
    assert 0.2 < (risks > np.array([own for _, _, own in found])).mean() < 0.8


def test_a_kl_that_is_left_out_breaks_the_certificate() -> None:
    """Coverage depends on the KL: a posterior that memorises examples of random labels fails without it."""
    rng = np.random.default_rng(0)
    failed = 0
    for _ in range(40):
        x, labels = rng.normal(size=(60, 40)), rng.integers(0, 2, 60)
        mean = np.linalg.lstsq(x, 2.0 * labels - 1, rcond=None)[0]
        drawn = (x @ mean > 0).astype(int)[None].repeat(20, 0)
        kl = gaussian_kl(torch.as_tensor(mean), 0.001, 0.0, 0.1)
        honest = certified_error(drawn, labels, num_classes=2, kl=kl)
        without = certified_error(drawn, labels, num_classes=2, kl=0.0)
        assert honest.value is not None
        assert honest.value >= 0.5  # the true risk of any classifier of random labels
        failed += without.value is not None and without.value < 0.5
    assert failed > 20

"""The baselines of the benchmarks against dense Hessians in float64: a comparison is worth what they are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import dense
import oracle
import pytest
import torch
from tiny import vit
from torch import Tensor

RECIPES = Path(__file__).parent.parent / "recipes"
PEERS = {"PyHessian": "pyhessian", "curvlinops": "curvlinops", "hessian-eigenthings": "hessian_eigenthings"}
PROBES = 400


@pytest.fixture
def recipes(recipe: Any) -> dict[str, Any]:
    return {**vars(recipe("curvature_baselines")), **vars(recipe("spectrum_baselines"))}


def directions() -> dict[str, Tensor]:
    model, generator = dense.smooth(), torch.Generator().manual_seed(1)
    return {
        name: torch.randn(model.get_parameter(name).shape, generator=generator, dtype=torch.float64)
        for name in dense.LAYERS
    }


def hessians() -> Tensor:
    """Of each example in both weights together, [examples, P, P]."""
    (found,) = oracle.dense_hessians(dense.smooth(), {"input": dense.X}, dense.Y, dense.PLAIN, [dense.LAYERS])
    return found


def test_the_loop_is_the_dense_block_of_each_example(recipes: Any) -> None:
    ways = directions()
    found = recipes["example_loop"](dense.smooth(), dense.X, dense.Y, ways)
    blocks = oracle.dense_hessians(dense.smooth(), {"input": dense.X}, dense.Y, dense.PLAIN, [[n] for n in ways])
    expected = [
        torch.einsum("p,npq,q->n", v.flatten(), h, v.flatten()) for v, h in zip(ways.values(), blocks, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(expected, 1), rtol=1e-10, atol=1e-12)


def test_the_authors_measure_is_that_of_batch_means_with_the_terms_between_layers(recipes: Any) -> None:
    ways, model = directions(), dense.smooth()
    found = recipes["joint_batch_forms"](model, dense.batches(3), ways)
    v = torch.cat([way.flatten() for way in ways.values()])
    first = ways[dense.LAYERS[0]].numel()
    expected = []
    for some in torch.arange(dense.EXAMPLES).split(3):
        inner = v * (hessians()[some].mean(0) @ v)
        expected.append(torch.stack([inner[:first].sum(), inner[first:].sum()]))
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-12)
    # The batches are of 3, 3 and 1: in the last the terms between layers alone make the difference.
    loop = recipes["example_loop"](model, dense.X, dense.Y, ways)[-1]
    assert not torch.allclose(found[-1], loop, rtol=1e-3)
    alone = [
        recipes["joint_batch_forms"](model, dense.batches(3)[-1:], {name: way})[0, 0] for name, way in ways.items()
    ]
    torch.testing.assert_close(torch.stack(alone), loop, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("peer", PEERS)
def test_traces_of_peers_come_to_the_dense_one(recipes: Any, peer: str) -> None:
    pytest.importorskip(PEERS[peer], reason=f"{peer} is needed for its own baseline only")
    hessian = hessians().mean(0)
    # Hutchinson with ±1: variance 2 Σ_{j≠k} H_jk² a probe.
    error = (2 * (hessian.square().sum() - hessian.diag().square().sum()) / PROBES).sqrt().item()
    if peer == "curvlinops":  # takes fewer probes than there are weights
        found = [recipes["TRACES"][peer](dense.smooth(), dense.X, dense.Y, dense.LAYERS, probes=20, seed=s)
                 for s in range(PROBES // 20)]  # fmt: skip
        value = sum(found) / len(found)
    else:
        value = recipes["TRACES"][peer](dense.smooth(), dense.X, dense.Y, dense.LAYERS, probes=PROBES, seed=0)
    assert value == pytest.approx(hessian.trace().item(), abs=4 * error)
    assert error < 0.15 * hessian.trace()


@pytest.mark.parametrize("names", [dense.LAYERS, dense.LAYERS[1:]], ids=["both layers", "one layer"])
@pytest.mark.parametrize("peer", PEERS)
def test_eigenvalues_of_peers_are_the_dense_ones(recipes: Any, peer: str, names: list[str]) -> None:
    pytest.importorskip(PEERS[peer], reason=f"{peer} is needed for its own baseline only")
    (block,) = oracle.dense_hessians(dense.smooth(), {"input": dense.X}, dense.Y, dense.PLAIN, [names])
    largest = torch.linalg.eigvalsh(block.mean(0))[-1].item()
    found = recipes["EIGENVALUES"][peer](dense.smooth(), dense.X, dense.Y, names, tolerance=1e-6)
    # PyHessian divides by norms plus 1e-6, and stops where two estimates in a row agree.
    assert found == pytest.approx(largest, rel=1e-4 if peer == "PyHessian" else 1e-6)


def test_the_diagonal_of_backpack_is_exact_and_for_chains_only(recipes: Any) -> None:
    pytest.importorskip("backpack", reason="BackPACK is needed for its own baseline only")
    model = dense.smooth()
    found = recipes["backpack_trace"](model, dense.X, dense.Y, dense.LAYERS)
    assert found == pytest.approx(hessians().mean(0).trace().item(), rel=1e-10)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(NotImplementedError):
        recipes["backpack_trace"](vit(), torch.randn(2, 1, 8, 8), torch.tensor([0, 1]), ["classifier.weight"])


@pytest.mark.parametrize(
    ("function", "module"),
    [("pyhessian_trace", "pyhessian"), ("curvlinops_trace", "curvlinops"), ("eigenthings_trace", "hessian_eigenthings"),
     ("backpack_trace", "backpack")],
)  # fmt: skip
def test_a_missing_peer_says_how_to_get_it(
    recipes: Any, monkeypatch: pytest.MonkeyPatch, function: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    more = {} if module == "backpack" else {"probes": 2}
    with pytest.raises(ImportError, match=rf"{module} cannot be imported .*\n +pip install"):
        recipes[function](dense.smooth(), dense.X, dense.Y, dense.LAYERS, **more)

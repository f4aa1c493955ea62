"""The check of the cost model as users start it, on the smallest of its models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from started import start

RECIPE = Path(__file__).parent.parent / "recipes" / "bench_cost.py"

pytestmark = pytest.mark.slow


def test_the_check_of_the_cost_model(tmp_path: Path) -> None:
    case, names = "glyph ViT, 17 tokens", ["layer_quadratic_forms", "joint hessian_trace"]
    printed = start(RECIPE, "--cases", case, "--measurements", *names, "--output", "cost.json", cwd=tmp_path)
    found = json.loads((tmp_path / "cost.json").read_text())
    assert found.keys() == {f"{case}: {name}" for name in names}
    for row in found.values():
        # Of a process this small Python itself is a large part; test_cost.py counts tensors.
        assert row["predicted MB"] == pytest.approx(row["MB"], rel=0.5)
        assert row["stopped"] is False
    assert "ratio" in printed

"""The package is a building of four floors: imports go down or sideways, never up and never round."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "hf_robust_ft"

# Module -> floor. 1: mathematics on tensors and floats. 2: what touches a model. 3: when and where. 4: who.
# __init__ gathers the public names and so stands outside the floors.
FLOORS = {
    "clean_accuracy": 1,
    "files": 1,
    "noise": 1,
    "noise_shape": 1,
    "losses": 1,
    "low_rank": 1,
    "penalties": 1,
    "projection": 1,
    "sharding": 1,
    "stored": 1,
    "redaction": 1,
    "bounds": 1,
    "estimation": 1,
    "weak_labels": 1,
    "suspects": 1,
    "label_posteriors": 1,
    "adapters": 2,
    "layers": 2,
    "pretrained": 2,
    "reference": 2,
    "constraints": 2,
    "corrected_loss": 2,
    "curvature": 2,
    "frozen_features": 2,
    "gibbs": 2,
    "innermost": 2,
    "report_bounds": 2,
    "risks": 2,
    "snapshot": 2,
    "withheld_labels": 2,
    "arguments": 3,
    "callbacks": 3,
    "card": 3,
    "checkpoint": 3,
    "data": 3,
    "diagnosis": 3,
    "features": 3,
    "fold_probabilities": 3,
    "figures": 3,
    "heat_map": 3,
    "hessian_measurement": 3,
    "noise_estimate": 3,
    "label_targets": 3,
    "metrics": 3,
    "noisy_evaluation": 3,
    "hub": 3,
    "interruption": 3,
    "penalized_step": 3,
    "processes": 2,
    "raw_examples": 3,
    "recommendation": 3,
    "__main__": 4,
    "base_model": 2,
    "cli": 4,
    "comparison": 3,
    "comparison_plot": 3,
    "finetuned": 3,
    "finetuned_measurement": 3,
    "model_labels": 3,
    "radius_search": 3,
    "trainer": 4,
}
NOT_ON_FLOOR_1 = {"transformers", "accelerate", "datasets", "evaluate", "huggingface_hub"}


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def _imports(node: ast.AST, at_run_time: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import below `node`, also inside functions, and whether it happens at run time."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, at_run_time
    elif isinstance(node, ast.If) and _is_type_checking(node.test):
        for child in node.body:
            yield from _imports(child, False)
        for child in node.orelse:
            yield from _imports(child, at_run_time)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, at_run_time)


def _targets(node: ast.Import | ast.ImportFrom, module: str, is_package: bool) -> list[tuple[str, str | None]]:
    """(absolute module, imported name or None) for each name in one import statement of `module`."""
    if isinstance(node, ast.Import):
        return [(alias.name, None) for alias in node.names]
    base = node.module or ""
    if node.level:
        parts = module.split(".")
        above = parts[: len(parts) - node.level + is_package]
        base = ".".join([*above, base] if base else above)
    return [(base, alias.name) for alias in node.names]


def _public_names(init: Path) -> set[str] | None:
    """The package's `__all__`, or None where it is not one literal list."""
    for node in ast.parse(init.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if not any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            continue
        value = getattr(node, "value", None)
        if isinstance(value, ast.List | ast.Tuple) and all(isinstance(e, ast.Constant) for e in value.elts):
            return {str(e.value) for e in value.elts if isinstance(e, ast.Constant)}
        return None
    return None


def floor_problems(package: Path, floors: dict[str, int]) -> list[str]:
    """What breaks the floors in the package at `package`, one line each."""
    problems: list[str] = []
    files: dict[str, Path] = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)
        if name != "__init__":
            files[name] = path

    # A subpackage has one floor, under its own name.
    units = {name.split(".")[0] for name in files}
    problems += [f"{unit} has no floor: add it to FLOORS in {__file__}" for unit in sorted(units - set(floors))]
    problems += [f"FLOORS names {unit}, which does not exist" for unit in sorted(set(floors) - units)]

    graph: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        floor = floors.get(name.split(".")[0])
        dotted = f"{package.name}.{name}"
        for node, at_run_time in _imports(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{name}, line {node.lineno}"
            for base, imported in _targets(node, dotted, path.name == "__init__.py"):
                top, _, inner = base.partition(".")
                if top != package.name:
                    if floor == 1 and at_run_time and top in NOT_ON_FLOOR_1:
                        problems.append(f"{where}: floor 1 does not import {top}")
                    continue
                submodule = f"{inner}.{imported}" if inner else str(imported)
                target = submodule if submodule in files else inner
                if target not in files:
                    problems.append(f"{where}: imports from {base} itself; import from the module that defines it")
                    continue
                graph[name].add(target)
                target_floor = floors.get(target.split(".")[0])
                if floor is not None and target_floor is not None and target_floor > floor:
                    problems.append(f"{where}: floor {floor} imports {target} from floor {target_floor}")

    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        problems.append("imports go round: " + " -> ".join(error.args[1]))
    return problems


def recipe_problems(recipes: Path, package: Path) -> list[str]:
    """Imports of the recipes that reach past the package's public names, one line each."""
    public = _public_names(package / "__init__.py")
    if public is None:
        return [f"{package.name}/__init__.py needs __all__ as one literal list of strings"]
    problems: list[str] = []
    for path in sorted(recipes.rglob("*.py")):
        for node, _ in _imports(ast.parse(path.read_text(encoding="utf-8"))):
            for base, imported in _targets(node, path.stem, False):
                if base.split(".")[0] != package.name:
                    continue
                if base != package.name or imported not in public:
                    problems.append(
                        f"{path.name}, line {node.lineno}: imports {imported or 'the module'} from {base}; "
                        f"a recipe writes `from {package.name} import NAME` with a public NAME"
                    )
    return problems


def test_the_package_keeps_to_its_floors() -> None:
    assert floor_problems(ROOT / PACKAGE, FLOORS) == []


def test_recipes_import_public_names_only() -> None:
    assert recipe_problems(ROOT / "recipes", ROOT / PACKAGE) == []


GOOD = {
    "__init__.py": "from .trainer import Trainer\n__all__ = ['Trainer']\n",
    "noise.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from transformers import Trainer\n",
    "losses.py": "from hf_robust_ft.noise import x\nfrom hf_robust_ft import noise\n",
    "layers.py": "def f():\n    from . import noise\n    import transformers\n",
    "trainer.py": "import hf_robust_ft.noise\nfrom .layers import f\nfrom transformers import Trainer\n",
}
GOOD_FLOORS = {"noise": 1, "losses": 1, "layers": 2, "trainer": 4}


def _write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_the_checker_passes_a_good_package(tmp_path: Path) -> None:
    assert floor_problems(_write(tmp_path / PACKAGE, GOOD), GOOD_FLOORS) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(
            {"noise.py": "from .layers import f"},
            "noise, line 1: floor 1 imports layers from floor 2",
            id="up",
        ),
        pytest.param(
            {"noise.py": "import hf_robust_ft.trainer"},
            "floor 1 imports trainer from floor 4",
            id="up, plain import",
        ),
        pytest.param(
            {"noise.py": "from hf_robust_ft import layers"},
            "floor 1 imports layers from floor 2",
            id="up, submodule",
        ),
        pytest.param(
            {"noise.py": "def g():\n    from .layers import f"},
            "noise, line 2: floor 1 imports layers",
            id="up, late",
        ),
        pytest.param({"noise.py": "from .losses import x"}, "imports go round: ", id="a cycle"),
        pytest.param(
            {"noise.py": "import transformers.utils"},
            "noise, line 1: floor 1 does not import transformers",
            id="hf",
        ),
        pytest.param(
            {"losses.py": "def g():\n    from accelerate import A"},
            "floor 1 does not import accelerate",
            id="late hf",
        ),
        pytest.param(
            {"noise.py": "from typing import TYPE_CHECKING as T\nif not T:\n    import datasets"},
            "floor 1 does not import datasets",
            id="hf behind another condition",
        ),
        pytest.param(
            {"noise.py": "if TYPE_CHECKING:\n    pass\nelse:\n    import transformers"},
            "floor 1 does not import transformers",
            id="hf in the else branch",
        ),
        pytest.param(
            {"layers.py": "from hf_robust_ft import Trainer"},
            "imports from hf_robust_ft itself",
            id="the package root",
        ),
        pytest.param({"bounds.py": ""}, "bounds has no floor: add it to FLOORS", id="no floor"),
        pytest.param({"curvature/lanczos.py": ""}, "curvature has no floor: add it to FLOORS", id="no floor, nested"),
    ],
)
def test_the_checker_finds(tmp_path: Path, change: dict[str, str], expected: str) -> None:
    problems = floor_problems(_write(tmp_path / PACKAGE, GOOD | change), GOOD_FLOORS)
    assert any(expected in problem for problem in problems), problems


def test_the_checker_finds_a_stale_floor(tmp_path: Path) -> None:
    package = _write(tmp_path / PACKAGE, GOOD)
    assert floor_problems(package, GOOD_FLOORS | {"gone": 1}) == ["FLOORS names gone, which does not exist"]


def test_the_checker_reads_relative_imports_in_a_subpackage(tmp_path: Path) -> None:
    nested = {
        "curvature/__init__.py": "from .lanczos import x",
        "curvature/lanczos.py": "from ..layers import f",
    }
    package = _write(tmp_path / PACKAGE, GOOD | nested)
    assert floor_problems(package, GOOD_FLOORS | {"curvature": 2}) == []
    assert floor_problems(package, GOOD_FLOORS | {"curvature": 1}) == [
        "curvature.lanczos, line 1: floor 1 imports layers from floor 2"
    ]


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("from hf_robust_ft import Trainer\nimport torch", None),
        ("from hf_robust_ft import hidden", "recipe.py, line 1: imports hidden from hf_robust_ft"),
        ("from hf_robust_ft.noise import x", "imports x from hf_robust_ft.noise"),
        ("import hf_robust_ft.noise", "imports the module from hf_robust_ft.noise"),
        ("from hf_robust_ft import *", "imports * from hf_robust_ft"),
    ],
)
def test_the_checker_reads_recipes(tmp_path: Path, recipe: str, expected: str | None) -> None:
    package = _write(tmp_path / PACKAGE, GOOD)
    problems = recipe_problems(_write(tmp_path / "recipes", {"recipe.py": recipe}), package)
    assert len(problems) == (expected is not None)
    assert expected is None or expected in problems[0]


def test_the_checker_wants_a_literal_all(tmp_path: Path) -> None:
    package = _write(tmp_path / PACKAGE, GOOD | {"__init__.py": "__all__ = sorted(names)\n"})
    (problem,) = recipe_problems(tmp_path / "recipes", package)
    assert "needs __all__ as one literal list" in problem

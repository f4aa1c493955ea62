"""What is built from the checkout is whole, says what it needs, and works out of the checkout's reach."""

from __future__ import annotations

import ast
import configparser
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from email.message import Message
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "hf_robust_ft"
# What goes into a build. Named one by one: a checkout also holds environments, models and caches.
SOURCES = [
    "pyproject.toml",
    "setup.cfg",
    "MANIFEST.in",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    PACKAGE,
    "recipes",
    "tests",
]
UNPACKED_BY_PYTHON = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info", ".*_cache", "outputs", "runs")


def _setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def _requirements(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def _name(requirement: str) -> str:
    """The distribution's name in its normal form: `Scikit_Learn>=1.5` is scikit-learn."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def _declared(*extras: str) -> set[str]:
    config = _setup_cfg()
    lists = [config["options"]["install_requires"]]
    lists += [config["options.extras_require"][extra] for extra in extras]
    return {_name(line) for text in lists for line in _requirements(text)}


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@dataclass
class Built:
    source: Path
    sdist: Path
    wheel: Path
    wheel_of_sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The sdist, the wheel, and the wheel made from the unpacked sdist.

    From a copy: a build leaves files in its source, and setuptools would also read the file list that an
    earlier (editable) install left there, and so hide what a clean checkout lacks. Nothing is fetched: the
    build backend is the one in this environment.
    """
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=UNPACKED_BY_PYTHON)
        else:
            shutil.copy(ROOT / name, source / name)

    build = [sys.executable, "-m", "build", "--no-isolation"]
    _run(*build, "--sdist", "--wheel", "--outdir", folder / "dist", source, cwd=folder)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    with tarfile.open(sdist) as archive:
        # Python 3.11.0 to 3.11.3 know no filters.
        archive.extractall(folder / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = (folder / "unpacked").iterdir()
    _run(*build, "--wheel", "--outdir", folder / "again", unpacked, cwd=folder)
    (wheel_of_sdist,) = (folder / "again").glob("*.whl")
    return Built(source, sdist, wheel, wheel_of_sdist)


def _package_files(source: Path) -> set[str]:
    return {path.relative_to(source).as_posix() for path in (source / PACKAGE).rglob("*") if path.is_file()}


def _metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_string(archive.read(name).decode())


@pytest.mark.slow
def test_the_wheel_holds_the_whole_package(built: Built) -> None:
    expected = _package_files(built.source)
    assert f"{PACKAGE}/py.typed" in expected
    assert f"{PACKAGE}/__init__.py" in expected
    for wheel in (built.wheel, built.wheel_of_sdist):
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
        inside = {name for name in names if ".dist-info/" not in name}
        # A missing data file wants a line under [options.package_data]; tests and recipes do not belong here.
        assert inside == expected
        assert any(name.endswith("/LICENSE") for name in names)


@pytest.mark.slow
def test_the_sdist_holds_what_a_reader_needs(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "setup.cfg",
        "pyproject.toml",
        "tests/test_packaging.py",
    }
    assert expected | _package_files(built.source) <= names


@pytest.mark.slow
def test_the_metadata_says_what_setup_cfg_says(built: Built) -> None:
    config = _setup_cfg()
    metadata = _metadata(built.wheel)
    assert metadata["Name"] == "hf-robust-ft"
    assert metadata["Version"] == config["metadata"]["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == config["options"]["python_requires"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(metadata.get_all("Provides-Extra", [])) == {"recipes", "test"}

    requirements: dict[str | None, set[str]] = {}
    for line in metadata.get_all("Requires-Dist", []):
        extra = re.search(r"""extra == ['"](\w+)['"]""", line)
        requirements.setdefault(extra and extra[1], set()).add(_name(line))
    assert requirements[None] == _declared()
    assert requirements[None] >= {"torch", "transformers", "datasets", "accelerate", "evaluate"}
    assert requirements["test"] >= {"pytest", "hf-robust-ft"}
    assert requirements["recipes"] | requirements[None] == _declared("recipes")


IMPORT_EVERYTHING = """
import importlib, importlib.metadata, pathlib, pkgutil, sys

target, checkout = (pathlib.Path(argument).resolve() for argument in sys.argv[1:])
# An editable install brings the checkout in by a path entry or by a finder of its own.
sys.path = [entry for entry in sys.path if pathlib.Path(entry).resolve() != checkout]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]

import hf_robust_ft

assert pathlib.Path(hf_robust_ft.__file__).resolve().is_relative_to(target), hf_robust_ft.__file__
for name in hf_robust_ft.__all__:
    getattr(hf_robust_ft, name)
for found in pkgutil.walk_packages(hf_robust_ft.__path__, "hf_robust_ft."):
    if not found.name.endswith("__main__"):
        file = importlib.import_module(found.name).__file__
        assert pathlib.Path(file).resolve().is_relative_to(target), file
(installed,) = importlib.metadata.distributions(name="hf-robust-ft", path=[str(target)])
print("version", installed.version)
"""


@pytest.mark.slow
@pytest.mark.parametrize("which", ["wheel", "wheel_of_sdist"])
def test_an_installed_wheel_imports_without_the_checkout(built: Built, tmp_path: Path, which: str) -> None:
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check"]
    _run(*pip, "--target", target, getattr(built, which), cwd=tmp_path)
    output = _run(
        sys.executable,
        "-c",
        IMPORT_EVERYTHING,
        target,
        ROOT,
        cwd=tmp_path,
        PYTHONPATH=str(target),
        HF_HUB_OFFLINE="1",
    )
    assert f"version {_setup_cfg()['metadata']['version']}" in output.splitlines()


def _imported_at_once(path: Path) -> set[str]:
    """Top-level names of the modules that a file always imports as soon as it is imported itself."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize(("folder", "extras"), [(PACKAGE, []), ("recipes", ["recipes"])])
def test_every_import_is_declared(folder: str, extras: list[str]) -> None:
    """A late or guarded import (in a function, an `if`, a `try`) is free: so an optional one is written."""
    distributions = packages_distributions()
    declared = _declared(*extras) | {"hf-robust-ft"}
    files = list((ROOT / folder).rglob("*.py"))
    # A recipe may import its neighbour.
    own = {path.stem for path in files} | {PACKAGE}
    undeclared = sorted(
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in _imported_at_once(path) - set(sys.stdlib_module_names) - own
        if not {_name(d) for d in distributions.get(name, [name])} & declared
    )
    assert undeclared == []


def test_every_requirement_has_a_floor() -> None:
    """tests/lowest_versions.sh installs the floors; what has none would be tested at its newest only."""
    config = _setup_cfg()
    lists = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    lines = [line for text in lists for line in _requirements(text) if _name(line) != "hf-robust-ft"]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+>=[\d.]+(,<[\d.]+)?", line)] == []


def test_the_build_backend_floor_is_the_tests_one() -> None:
    """The tests build without isolation, so with the setuptools of the test extra."""
    (required,) = re.findall(r'"(setuptools>=[\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert required in _requirements(_setup_cfg()["options.extras_require"]["test"])

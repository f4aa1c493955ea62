"""Files, arguments and cards from anybody: each is read as what it says or refused in one way, and nothing is written.

An earlier state had all of this: booleans and text taken for numbers, and the real part of complex ones;
negative counts and text for numbers in reports, posteriors of any shape; an archive read as a matrix, and memory taken
for what a header promised; RecursionError and ZeroDivisionError of JSON; a card whose command held the mark of this
package's own README, so that the next measurement replaced somebody else's whole page; `README.md.tmp` and `plots` as
links, through which a measurement wrote outside of the folder.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
import yaml
from checkpoints import finetune, save_base, save_lora, texts
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from test_card import HOSTILE, Page, bound, data, report, risk

from hf_robust_ft import (
    Bound,
    CardData,
    Diagnosis,
    HessianReport,
    LayerConstraints,
    RobustTrainingArguments,
    TransitionEstimate,
    load_transition,
    read_card,
    render_card,
    write_card,
)
from hf_robust_ft.base_model import read_reference
from hf_robust_ft.card import add_card
from hf_robust_ft.card.readme import BEGIN, END, with_section
from hf_robust_ft.card.text import one_line
from hf_robust_ft.card.write import MARK
from hf_robust_ft.checkpoint import RECORD_FILE, STATE_FILE, ConstraintRecord, last_complete_checkpoint
from hf_robust_ft.cli import main
from hf_robust_ft.comparison import Compared, differences, summary, table
from hf_robust_ft.files import inside
from hf_robust_ft.finetuned import load_finetuned
from hf_robust_ft.hessian_measurement import START_RECORD, hessian_metrics, load_start, record_start, save_start
from hf_robust_ft.hub import public_files
from hf_robust_ft.label_targets import FILE as TARGETS_FILE
from hf_robust_ft.label_targets import LabelTargets
from hf_robust_ft.noise_estimate import saved_estimate
from hf_robust_ft.pretrained import CodeRefused
from hf_robust_ft.radius_search import RadiusCandidate, RadiusChoice
from hf_robust_ft.raw_examples import load_backbone
from hf_robust_ft.reference import REFERENCE_FILE, ReferenceMismatch, load_reference, reference_digest, save_reference

ROOT = Path(__file__).parent.parent

EXAMPLES = 40
fuzzed = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=EXAMPLES,
    phases=(Phase.explicit, Phase.generate),  # shrinking a card takes minutes
    suppress_health_check=list(HealthCheck),
)

ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**63, 10**400, 0.5, -0.5, 1e308, math.nan, math.inf, -math.inf),
    *("", "1", "inf", "nan", "..", "../x", "/etc/passwd", "a\0b", "\ud800", HOSTILE, [], {}, [[]], [True], [1, 2]),
]
values = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


# What is read


def estimate(bootstrap: int = 2) -> TransitionEstimate:
    matrix = np.array([[0.9, 0.1], [0.2, 0.8]])
    return TransitionEstimate(
        transition=matrix,
        standard_error=np.full((2, 2), 0.01),
        interval=np.stack([matrix - 0.05, matrix + 0.05], axis=2),
        noise_rate=0.15,
        noise_rate_error=0.01,
        noise_rate_interval=(0.1, 0.2),
        clean_prior=np.array([0.5, 0.5]),
        condition_number=math.inf,
        smallest_singular_value=0.6,
        singular_value_interval=(0.5, 0.7),
        effective_counts=np.array([40.0, 50.0]),
        counts=np.array([45.0, 55.0]),
        class_conditional_p_value=0.5,
        class_conditional_effect=0.01,
        method="joint",
        n=100,
        bootstrap=bootstrap,
        folds=5,
        seed=0,
        verdict="There is noise.",
        draws=np.stack([matrix] * bootstrap),
    )


def diagnosis() -> Diagnosis:
    return Diagnosis(
        model="m",
        classes=("ant", "bee"),
        shape="pair_flip",
        explained=0.9,
        identifiable=True,
        estimate=estimate(),
        rows=np.array([0, 2, 5]),
        labels=np.array([0, 1, 1]),
        suspect_score=np.array([0.1, 0.9, 0.2]),
        suspect_rank=np.array([3, 1, 2]),
        suggested_label=np.array([0, 0, 1]),
        arguments={"noise_transition": "estimate", "layer_radius": {"*layer*": 0.02}},
        reason="r",
        seconds={"features": 1.0},
    )


REFERENCE = {"a.weight": torch.ones(2, 2), "b.weight": torch.zeros(3)}
CHOICE = RadiusChoice(
    math.inf, (RadiusCandidate(0.01, 0.7, 0.1, 0.1, 0.05), RadiusCandidate(math.inf, 0.8, 0.1, 0, 0)), "accuracy", 9, 1
)
RECORD = ConstraintRecord("ab", "frobenius", {"a.weight": 0.5}, ["b.weight"])
TARGETS = LabelTargets(
    torch.tensor([[0.9, 0.1], [-100, -100]]), torch.tensor([0, -100]), torch.eye(2, dtype=torch.float64)
)
CARD = data(
    transition=[[0.9, 0.1], [0.2, 0.8]],
    noise_source="given",
    report="hessian_report.json",
    other_bounds=[Bound("b", math.inf, "measure", "m", terms={"gap": -math.inf}), Bound("c", None, "measure", "m")],
    arguments={"layer_radius": {"*": 0.1}},
    seeds={"training": 1},
)


class Parser(NamedTuple):
    """How one kind of file is written and read."""

    file: str
    save: Callable[[Path], Any]
    load: Callable[[Path], Any]
    """Raises nothing but ``ValueError`` and ``OSError``; what it returns can be used."""
    same: Callable[[Any, Any], bool] = lambda first, second: bool(first == second)


def saved_dict(found: Any) -> Any:
    """What it writes."""
    with tempfile.TemporaryDirectory() as folder:
        found.save(Path(folder) / "x")
        return json.loads((Path(folder) / "x").read_text(encoding="utf-8"))


def read_diagnosis(path: Path) -> Diagnosis:
    found = Diagnosis.load(path.parent)
    str(found)
    json.dumps(found.summary(), allow_nan=False)
    return found


def read_report(path: Path) -> HessianReport:
    found = HessianReport.load(path)
    str(found)
    hessian_metrics(found, "x")
    render_card(CardData(), found)
    return found


def read_estimate(path: Path) -> TransitionEstimate:
    found = TransitionEstimate.load(path)
    assert isinstance(found.noise_level, str)
    str(found)
    render_card(CardData(noise_source="x"), estimate=found)
    return found


def read_card_data(path: Path) -> CardData:
    found = CardData.load(path)
    render_card(found)
    model = Compared("m", found, None)
    json.dumps(summary(model))
    table([model, model])
    differences([model, Compared("n", CARD, None)])
    return found


def read_choice(path: Path) -> RadiusChoice:
    found = RadiusChoice.load(path)
    str(found)
    return found


def save_start_files(path: Path) -> None:
    record_start(save_start(REFERENCE, path.parent.parent), path.parent)


def save_targets(path: Path) -> None:
    TARGETS.save(path.parent)


def read_targets(path: Path) -> LabelTargets:
    found = LabelTargets.load(path.parent)
    assert found.are_of(found.transition.numpy()) in (True, False)
    return found


def equal_tensors(first: Any, second: Any) -> bool:
    one, two = (x if isinstance(x, dict) else x._asdict() for x in (first, second))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def same_files(first: Any, second: Any) -> bool:
    return bool(saved_dict(first) == saved_dict(second))


def same_diagnosis(first: Diagnosis, second: Diagnosis) -> bool:
    return first.summary() == second.summary() and np.array_equal(first.rows, second.rows)


JSON_PARSERS = {
    "estimate": Parser("e.json", lambda path: estimate().save(path), read_estimate, same_files),
    "report": Parser("r.json", lambda path: report().save(path), read_report),
    "card": Parser("c.json", lambda path: CARD.save(path), read_card_data, same_files),
    "radius": Parser("radius.json", lambda path: CHOICE.save(path), read_choice),
    "record": Parser(
        f"checkpoint-1/{RECORD_FILE}",
        lambda path: RECORD.save(path.parent),
        lambda path: ConstraintRecord.load(path.parent),
    ),
    "start": Parser(
        f"checkpoint-1/{START_RECORD}", save_start_files, lambda path: load_start(path.parent), equal_tensors
    ),
    "diagnosis": Parser(
        "d/diagnosis.json",
        lambda path: diagnosis().save(path.parent),
        read_diagnosis,
        lambda first, second: second is first or same_diagnosis(first, second),
    ),
    "T": Parser(
        "T.json",
        lambda path: path.write_text("[[0.9, 0.1], [0.2, 0.8]]"),
        lambda path: load_transition(path, 2),
        np.array_equal,
    ),
}
BINARY_PARSERS = {
    "npy": Parser(
        "T.npy",
        lambda path: np.save(path, np.array([[0.9, 0.1], [0.2, 0.8]])),
        lambda path: load_transition(str(path), 2),
        np.array_equal,
    ),
    "targets": Parser(TARGETS_FILE, save_targets, read_targets, equal_tensors),
    "reference": Parser(
        REFERENCE_FILE,
        lambda path: save_reference(REFERENCE, path.parent),
        lambda path: load_reference(path.parent, reference_digest(REFERENCE)),
        equal_tensors,
    ),
}
every_json = pytest.mark.parametrize("kind", JSON_PARSERS)
every_file = pytest.mark.parametrize("kind", JSON_PARSERS | BINARY_PARSERS)


def listing(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@contextlib.contextmanager
def refused() -> Any:
    """Nothing but the documented errors, with words in them."""
    said = None
    try:
        yield
    except (ValueError, OSError) as error:
        said = str(error)
    assert said is None or 20 < len(said) < 1500


@functools.cache
def valid(kind: str, root: Path) -> Any:
    """What a valid file holds: JSON, or bytes."""
    parser = (JSON_PARSERS | BINARY_PARSERS)[kind]
    path = root / kind / parser.file
    path.parent.mkdir(parents=True)
    parser.save(path)
    return json.loads(path.read_text()) if kind in JSON_PARSERS else path.read_bytes()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


def read(kind: str, root: Path, content: bytes) -> Any:
    """What the parser makes of these bytes, None if it refuses them."""
    valid(kind, root)
    parser = (JSON_PARSERS | BINARY_PARSERS)[kind]
    path = root / kind / parser.file
    path.write_bytes(content)
    before = listing(root)
    with refused():
        found = parser.load(path)
        assert listing(root) == before
        return found
    assert listing(root) == before
    return None


def encoded(content: Any) -> bytes:
    return json.dumps(content).encode()


def places(content: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value."""
    found = [above] if above else []
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, item in inside:
        found += places(item, (*above, key))
    return found


def at(content: Any, place: tuple[Any, ...]) -> Any:
    return functools.reduce(lambda value, key: value[key], place, content)


def mutated(draw: Any, content: Any) -> Any:
    """A copy with one to three changes."""
    changed = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        if not (known := places(changed)):
            return draw(values)
        place = draw(st.sampled_from(known))
        holder, key = at(changed, place[:-1]), place[-1]
        action = draw(st.sampled_from(("replace", "odd", "drop", "swap", "again")))
        if action == "drop":
            del holder[key]
        elif action == "again" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif action == "swap":
            holder[key] = copy.deepcopy(at(content, draw(st.sampled_from(places(content)))))
        else:
            holder[key] = copy.deepcopy(draw(values if action == "replace" else st.sampled_from(ODD)))
    return changed


def says(saved: Any, content: Any) -> bool:
    """Whether what is saved is what was read; only what was missing has its default."""
    if isinstance(content, dict):
        return all(name in saved and says(saved[name], item) for name, item in content.items())
    if isinstance(content, list):
        return len(saved) == len(content) and all(map(says, saved, content))
    return bool(saved == content)


@every_file
def test_what_was_saved_is_read_again(kind: str, root: Path) -> None:
    content = valid(kind, root)
    parser = (JSON_PARSERS | BINARY_PARSERS)[kind]
    first, second = (read(kind, root, content if isinstance(content, bytes) else encoded(content)) for _ in range(2))
    assert first is not None
    assert parser.same(first, second)


@every_file
@fuzzed
@given(content=st.binary(max_size=200))
def test_any_bytes(kind: str, root: Path, content: bytes) -> None:
    read(kind, root, content)


@every_json
@fuzzed
@given(content=values, header=st.booleans())
def test_any_json(kind: str, root: Path, content: Any, header: bool) -> None:
    good = valid(kind, root)
    if header and isinstance(good, dict) and isinstance(content, dict):
        content = {"format": good.get("format"), **content}
    read(kind, root, encoded(content))


@every_json
@fuzzed
@given(draws=st.data())
def test_valid_json_with_changes(kind: str, root: Path, draws: st.DataObject) -> None:
    content = mutated(draws.draw, valid(kind, root))
    found = read(kind, root, encoded(content))
    if found is not None and hasattr(found, "save") and kind not in ("record", "diagnosis"):
        assert says(saved_dict(found), content)


@pytest.mark.parametrize("kind", BINARY_PARSERS)
@fuzzed
@given(draws=st.data())
def test_valid_bytes_with_changes(kind: str, root: Path, draws: st.DataObject) -> None:
    good = bytearray(valid(kind, root))
    for _ in range(draws.draw(st.integers(1, 4))):
        good[draws.draw(st.integers(0, len(good) - 1))] = draws.draw(st.integers(0, 255))
    cut = draws.draw(st.none() | st.integers(0, len(good)))
    read(kind, root, bytes(good if cut is None else good[:cut]))


@every_json
@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"format": 1, "format": 2}', "\ufeff{}", "1" * 5000]
)
def test_json_that_parsers_stumble_over(kind: str, root: Path, text: str) -> None:
    assert read(kind, root, text.encode()) is None


@fuzzed
@given(
    value=st.none() | st.floats(0, 1e300) | st.sampled_from([math.inf, -math.inf]),
    terms=st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False), max_size=3),
    words=st.lists(st.text(), max_size=3),
    sure=st.none() | st.floats(0, 1),
)
def test_any_bound_goes_to_json_and_back(value: float | None, terms: Any, words: list[str], sure: float | None) -> None:
    made = Bound("b", value, "measure", "what", terms, tuple(words), confidence=sure, n=3, seed=2)
    assert Bound.from_dict(json.loads(json.dumps(made.to_dict(), allow_nan=False))) == made


# Matrices


def npy(header: str, content: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + content


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000), }", "its shape is"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (9999, 9999), }", "0 bytes of data for 9999 rows of 9999"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -1), }", "its shape is"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (2, 2), }", "its entries are object"),
        ("{'descr': '|b1', 'fortran_order': False, 'shape': (2, 2), }", "its entries are bool"),
        ("{'descr': '<c16', 'fortran_order': False, 'shape': (2, 2), }", "its entries are complex"),
        ("{'descr': '<U3', 'fortran_order': False, 'shape': (2, 2), }", "its entries are <U3"),
        ("{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (2, 2), }", "its entries are"),
        ("(" * 5000, "no plain .npy array"),
        ("{'descr': ", "no plain .npy array"),
    ],
)
def test_headers_that_promise_what_is_not_there(tmp_path: Path, header: str, match: str) -> None:
    (tmp_path / "T.npy").write_bytes(npy(header))
    with pytest.raises(ValueError, match=match):
        load_transition(tmp_path / "T.npy", 2)


def test_neither_archives_nor_pickles_are_matrices(tmp_path: Path) -> None:
    np.savez(tmp_path / "T.npz", T=np.eye(2))
    np.save(tmp_path / "pickle.npy", np.array([[{}, 1]], dtype=object), allow_pickle=True)
    for content in ((tmp_path / "T.npz").read_bytes(), (tmp_path / "pickle.npy").read_bytes(), b"\x80\x04N."):
        (tmp_path / "T.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"T\.npy is no plain .npy array of numbers .*numpy\.save"):
            load_transition(tmp_path / "T.npy", 2)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f8", ">f8", "<f4", "<f2", "<i8", "|u1"])
def test_matrices_of_numbers_are_read(tmp_path: Path, dtype: str, order: Any) -> None:
    matrix = np.array([[0, 1], [0.5, 0.5]] if "f" in dtype else [[0, 1], [1, 0]])
    np.save(tmp_path / "T.npy", np.array(matrix, dtype=dtype, order=order))
    np.testing.assert_array_equal(load_transition(tmp_path / "T.npy"), matrix)


@pytest.mark.parametrize(
    "matrix",
    [
        [[True, False], [False, True]],
        [[True, 0.0], [0.5, 0.5]],
        [["1", "0"], ["0", "1"]],
        np.eye(2) + 0j,
        np.eye(2, dtype=bool),
        [[10**400, 0], [0, 1]],
        {"a": 1},
        None,
        torch.eye(2, requires_grad=True),
        np.array([["2020-01-01"] * 2] * 2, dtype="datetime64[D]"),
    ],
)
def test_only_numbers_make_a_matrix(matrix: Any) -> None:
    with pytest.raises(ValueError, match=r"noise_transition is not a matrix of numbers .*give K rows of K numbers"):
        load_transition(matrix, 2)


@fuzzed
@given(source=values | st.text() | st.floats())
def test_any_noise_transition(source: Any) -> None:
    with refused():
        matrix = load_transition(source, 2)
        assert matrix.shape == (2, 2)
        assert np.allclose(matrix.sum(1), 1)
    with refused():
        saved_estimate(source)


def test_a_path_that_is_too_long() -> None:
    with pytest.raises(FileNotFoundError, match="neither a number, nor a JSON matrix, nor an existing"):
        load_transition("x" * 5000, 2)


# Arguments


@settings(fuzzed, max_examples=2 * EXAMPLES)
@given(given_radius=values | st.text(), as_json=st.booleans())
def test_any_layer_radius(root: Path, given_radius: Any, as_json: bool) -> None:
    with refused():
        made = RobustTrainingArguments(
            str(root / "run"), layer_radius=json.dumps(given_radius) if as_json else given_radius
        )
        assert made.layer_radius is None or isinstance(made.layer_radius, float | int | str | dict)
        assert not isinstance(made.layer_radius, bool)
        LayerConstraints(MODEL, made.layer_radius)


MODEL = tiny.bert()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("true", r"\(it is no radius: a number >= 0"),
        ("-1", r"\(it is no radius: a number >= 0"),
        ('{"*": true}', r"\(that of \* is no radius"),
        ('{"*": "0.3"}', r"\(that of \* is no radius"),
        ('{"*": NaN}', "NaN is no JSON number"),
        ('{"*": 0.1, "*": 0.2}', r"the key '\*' stands there twice"),
        ('{"*": 1' + "0" * 400 + "}", r"\(that of \* is no radius"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_layer_radius_as_no_one_would_write_it(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(
        ValueError, match=f"layer_radius is .*give a number, 'auto' or JSON such as .*{match}"
    ) as raised:
        RobustTrainingArguments(str(tmp_path), layer_radius=text)
    assert len(str(raised.value)) < 1000


@settings(fuzzed, max_examples=2 * EXAMPLES)
@given(
    name=st.sampled_from(
        ["hessian_penalty", "l2sp_penalty", "radius_growth", "hessian_examples", "hessian_time_budget", "hessian_every",
         "loss_correction", "radius_norm", "radius_mode", "eval_labels", "noise_transition"]
    ),
    value=values,
)  # fmt: skip
def test_any_argument(root: Path, name: str, value: Any) -> None:
    with refused():
        made = getattr(RobustTrainingArguments(str(root / "run"), **{name: value}), name)
        if name not in ("noise_transition", "loss_correction", "radius_norm", "radius_mode", "eval_labels"):
            assert isinstance(made, int | float)
            assert not isinstance(made, bool)
            assert made >= 0


# Cards


@functools.cache
def tags_of_a_card() -> set[str]:
    plain = data(transition=[[1, 0], [0, 1]], noise_source="x", radius_choice="x", command=["x"])
    return set(Page(render_card(plain, report()).text).tags)


words = st.text(max_size=20) | st.sampled_from(
    [HOSTILE, "---", "\n---\n", "a: b", "|", "- x", "{{ x }}", "no", "1e3", "~"]
)


@settings(fuzzed, max_examples=EXAMPLES // 2)
@given(draws=st.data())
def test_the_head_of_a_card_says_what_was_put_in(draws: st.DataObject) -> None:
    word = functools.partial(draws.draw, words)
    made = data(
        model_name=word(),
        description=word(),
        tags=[word(), word()],
        language=[word()],
        license=word(),
        datasets=[word()],
        dataset_ids=[word()],
        base_model=word(),
        tasks=[word()],
        classes=[word(), word()],
        transition=[[0.9, 0.1], [0.2, 0.8]],
        noise_source=word() or "x",
        metrics={f"eval_{word()}": 0.5},
        bounds=[bound(word(), assumptions=(word(),), source=word())],
        risks=[risk("training", 0.5), risk(word(), 0.9)],
        command=["python", word()],
        radius_choice=word(),
        arguments={word(): word()},
    )
    card = render_card(made, report(notes=(word(),)))
    assert card.content.startswith("---\n")
    head, body = card.content[4:].split("\n---\n", 1)
    found = yaml.safe_load(head)
    assert found == yaml.safe_load(ModelCard(card.content).data.to_yaml())
    assert found["model-index"][0]["name"] == one_line(made.model_name or "model")
    # A word that is one of the card's own tags stands there once.
    tags = [*found["tags"][:2], "label-noise", *map(one_line, made.tags)]
    assert found["tags"] == list(dict.fromkeys(filter(None, tags)))
    assert found.get("license") in (None, made.license)
    assert found.get("base_model") in (None, made.base_model)
    assert found.get("datasets") in (None, made.dataset_ids)
    names = [result["metrics"][0]["name"] for result in found["model-index"][0]["results"]]
    assert names[0] == one_line(next(iter(made.metrics)))
    page = Page(body)
    assert all(len(set(rows)) == 1 for rows in page.rows)
    assert set(page.tags) <= tags_of_a_card()
    assert "script" not in page.tags


@fuzzed
@given(before=st.binary(max_size=60), sections=st.lists(st.text(max_size=30), min_size=2, max_size=2))
def test_a_section_leaves_every_other_byte(before: bytes, sections: list[str]) -> None:
    assume(BEGIN not in before)
    assume(END not in before)
    first, second = (with_section(before, section.encode(errors="replace"), "README.md") for section in sections)
    assert first.startswith(before)
    assert with_section(first, sections[1].encode(errors="replace"), "README.md") == second


@pytest.mark.parametrize("mark", [MARK, END.decode()])
def test_marks_in_a_command_are_no_marks(tmp_path: Path, mark: str) -> None:
    (tmp_path / "README.md").write_text("# Mine\n")
    for _ in range(2):
        assert not add_card(tmp_path, data(command=["python", mark], radius_choice=mark), report())
        assert (tmp_path / "README.md").read_text(encoding="utf-8").startswith("# Mine\n\n")


# Names and links


@pytest.mark.parametrize(
    "name",
    ["../x.json", "/etc/passwd", "..", ".", "", "a/../../x", "a\\..\\x", "a\0b", "a//b", "C:x", "x\n", "~\x7f", "./x"],
)
def test_no_name_leads_out_of_the_folder_of_a_card(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.json").write_text("{}")
    file = tmp_path / "m" / "robust_card.json"
    data().save(file)
    for key in ("report", "estimate"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"report": None, "estimate": None, key: name}))
        with pytest.raises(ValueError, match=r"is no name of a file in .*put the file there, and name it alone"):
            read_card(tmp_path / "m")


@fuzzed
@given(name=st.text(max_size=12) | st.lists(st.sampled_from(["..", ".", "a", "/", "\\", "\0", "~", "C:"])).map("".join))
def test_any_name_stays_in_its_folder(root: Path, name: str) -> None:
    with contextlib.suppress(ValueError):
        assert inside(root, name).resolve().is_relative_to(root.resolve())


@pytest.mark.parametrize("file", ["robust_card.json", "hessian_report.json", "README.md"])
def test_links_out_of_the_folder_are_not_read(tmp_path: Path, file: str) -> None:
    write_card(tmp_path / "m", data(), report())
    (tmp_path / "m" / file).rename(tmp_path / "private")
    (tmp_path / "m" / file).symlink_to(tmp_path / "private")
    before = (tmp_path / "private").read_bytes()
    with pytest.raises(ValueError, match=r"is a link that leads out of .*put the file itself there, or remove"):
        add_card(tmp_path / "m", *read_card(tmp_path / "m"))
    assert (tmp_path / "private").read_bytes() == before


def test_links_in_the_cache_of_the_hub_are_read(tmp_path: Path) -> None:
    write_card(tmp_path / "snapshots/abc", data(), report())
    (tmp_path / "blobs").mkdir()
    for file in ("robust_card.json", "hessian_report.json"):
        (tmp_path / "snapshots/abc" / file).rename(tmp_path / "blobs" / file)
        (tmp_path / "snapshots/abc" / file).symlink_to(f"../../blobs/{file}")
    assert read_card(tmp_path / "snapshots/abc")[1] == report()


def test_nothing_is_written_through_links(tmp_path: Path) -> None:
    folder, outside = tmp_path / "m", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    for name in ("README.md", "robust_card.json", "hessian_report.json"):
        (outside / name).write_text("private")
        (folder / f"{name}.tmp").symlink_to(outside / name)
    (folder / "hessian_report.json").symlink_to(outside / "hessian_report.json")
    write_card(folder, data(), report())
    diagnosis().save(folder)
    assert {path.read_text() for path in outside.iterdir()} == {"private"}
    assert not (folder / "hessian_report.json").is_symlink()

    shutil.rmtree(folder / "plots")
    (outside / "hessian_by_layer.png").write_text("private")
    (folder / "plots").symlink_to(outside)
    with pytest.raises(ValueError, match="plots is a link that leads out of"):
        write_card(folder, data(), report())
    assert (outside / "hessian_by_layer.png").read_text() == "private"


def test_links_out_of_the_folder_are_not_pushed(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    tiny.bert().save_pretrained(folder)
    (tmp_path / "private.json").write_text("{}")
    (folder / "again.json").symlink_to("config.json")  # within the folder
    (folder / "notes").symlink_to("/etc/passwd")  # is not pushed in any case
    assert set(public_files(folder)) == {"config.json", "model.safetensors", "again.json"}
    (folder / "data.json").symlink_to("../private.json")
    with pytest.raises(ValueError, match=r"'data\.json' in folder .* is a link that leads out of it: put the file"):
        public_files(folder)
    (folder / "data.json").unlink()
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "config.json").write_text("{}")
    (folder / "part").symlink_to("../part")
    assert not [name for name in public_files(folder) if "part" in name]


# Models


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetune(base, tmp_path_factory.mktemp("tuned"))


class Pickled:
    """Leaves a file where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> Any:
        return open, (self.trace, "w")


def with_pickles(model: Path, folder: Path) -> Path:
    """The same model with its weights as a pickle that writes a file."""
    shutil.copytree(model, folder)
    for path in folder.glob("*.safetensors"):
        name = "pytorch_model.bin" if path.stem == "model" else f"{path.stem}.bin"
        torch.save(safetensors.torch.load_file(path) | {"x": Pickled(folder / "ran")}, folder / name)
        path.unlink()
    return folder


def test_pickled_weights_are_not_read(base: Path, tuned: Path, tmp_path: Path) -> None:
    match = r"has no weights in safetensors, and others .* are pickles, .*write them anew: .*save_pretrained"
    whole = with_pickles(tuned, tmp_path / "whole")
    adapter = with_pickles(save_lora(base, tmp_path / "lora"), tmp_path / "adapter")
    for folder in (whole, adapter):
        with pytest.raises(OSError, match=match):
            load_finetuned(str(folder), "text")
        with pytest.raises(OSError, match=match):
            load_backbone(folder, "text", 3)
        assert not (folder / "ran").exists()
    with pytest.raises(OSError, match=match):
        read_reference(load_finetuned(str(tuned), "text").model, whole)
    assert not (whole / "ran").exists()


def test_a_command_says_so(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts(40).to_parquet(tmp_path / "train.parquet")
    whole = with_pickles(tuned, tmp_path / "whole")
    assert main(["diagnose", str(whole), str(tmp_path / "train.parquet")]) == 2
    assert "has no weights in safetensors" in capsys.readouterr().err


def test_code_of_a_repository_is_not_run(tuned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tuned, folder)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    names = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification")
    config |= {"model_type": "own", "auto_map": {name: f"code.{name}" for name in names}}
    (folder / "config.json").write_text(json.dumps(config))
    match = r"needs code that comes with it, which is not run\. If you trust .*trust_remote_code=True.*the loaded model"
    with pytest.raises(CodeRefused, match=match):
        load_finetuned(str(folder), "text")
    with pytest.raises(CodeRefused, match=match):
        load_backbone(folder, "text", 3)
    with pytest.raises(ReferenceMismatch, match="is a own model"):
        read_reference(load_finetuned(str(tuned), "text").model, folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a\\b", 1, None])
def test_pieces_of_a_model_lie_in_its_folder(tuned: Path, tmp_path: Path, shard: Any) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tuned, folder)
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"classifier.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json is no index of weights .*save the model again"):
        load_finetuned(str(folder), "text")


@pytest.mark.parametrize(
    "change",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
        {"adapters": {"0": "/somewhere"}, "peft_type": "XLORA"},
        {"base_model_name_or_path": ["x"]},
    ],
)
def test_an_adapter_imports_nothing(base: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    config = save_lora(base, tmp_path / "lora") / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=r"is no configuration of an adapter to merge .*save it again"):
        load_finetuned(str(tmp_path / "lora"), "text")
    assert "antigravity" not in sys.modules


@settings(fuzzed, max_examples=EXAMPLES // 4)
@given(draws=st.data(), file=st.sampled_from(["config.json", "adapter_config.json", "tokenizer.json"]))
def test_models_with_changes(base: Path, root: Path, draws: st.DataObject, file: str) -> None:
    folder = root / "model"
    shutil.rmtree(folder, ignore_errors=True)
    if file == "adapter_config.json":
        save_lora(base, folder)
    else:
        shutil.copytree(base, folder)
    content = json.loads((folder / file).read_text())
    (folder / file).write_bytes(encoded(mutated(draws.draw, content)))
    with refused():
        if file == "adapter_config.json":
            load_finetuned(str(folder), "text")
        else:
            load_backbone(folder, "text", 3)


def test_checkpoints_with_damaged_states(tmp_path: Path) -> None:
    for step, content in ((1, "[" * 100_000), (2, "[]"), (3, '{"a": 1}'), (4, "\x00")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / STATE_FILE).write_text(content)
    assert last_complete_checkpoint(tmp_path) is None


# Data


@pytest.mark.parametrize("file", ["x.parquet", "x.csv", "x.json", "x.jsonl"])
@pytest.mark.parametrize("content", [b"", b"\x00\xff" * 40, b"PAR1", b"[" * 5000, b'{"a": 1}\n{"a": {"b": "c"}}'])
def test_damaged_data(tmp_path: Path, capsys: Any, file: str, content: bytes) -> None:
    (tmp_path / file).write_bytes(content)
    assert main(["diagnose", "nowhere/model", str(tmp_path / file)]) == 2
    assert "hf-robust-ft: error: " in capsys.readouterr().err


@pytest.mark.parametrize("text", ["-1", "4294967296", "1.5", "x", "1" * 5000])
def test_seeds_that_generators_refuse(text: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["diagnose", "m", "d", "--seed", text])
    assert len(capsys.readouterr().err) > 20


# The sources

SOURCES = sorted(path for folder in ("hf_robust_ft", "recipes") for path in (ROOT / folder).rglob("*.py"))


PICKLES = ("pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")


def unsafe(source: str) -> list[str]:
    """What could unpickle, or run what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            found += [
                n for n in names if n.split(".")[0] in ("pickle", "cPickle", "dill", "joblib", "shelve", "marshal")
            ]
        if not isinstance(node, ast.Call):
            continue
        call, given_names = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
        if call in ("torch.load", "eval", "exec", "np.fromfile", "pd.read_pickle", "yaml.load", "load_peft_weights"):
            found.append(call)
        for name in ("allow_pickle", "trust_remote_code"):
            if name in given_names and ast.unparse(given_names[name]) != "False":
                found.append(name)
        if "use_safetensors" in given_names and ast.unparse(given_names["use_safetensors"]) != "True":
            found.append("use_safetensors")
    return found


def test_nothing_in_the_package_reads_pickles() -> None:
    assert {str(path): found for path in SOURCES if (found := unsafe(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from joblib import load", "torch.load(x, weights_only=True)", "np.load(x, allow_pickle=True)",
     "load(x, trust_remote_code=args.trust)", "eval(x)", "load(x, use_safetensors=False)"],
)  # fmt: skip
def test_the_check_of_the_sources_finds(source: str) -> None:
    assert unsafe(source)


def test_models_are_loaded_by_one_function() -> None:
    """``load_pretrained`` is given every ``from_pretrained`` of a model: it alone calls one, with safetensors."""
    called = {}
    for path in (ROOT / "hf_robust_ft").rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        named = [ast.unparse(call) for call in calls if ast.unparse(call).endswith(".from_pretrained")]
        if named:
            called[path.name] = named
    # A processor, and an adapter from a folder that was seen to hold safetensors.
    assert called == {"raw_examples.py": ["auto.from_pretrained"], "finetuned.py": ["peft.PeftModel.from_pretrained"]}

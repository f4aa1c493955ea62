"""The model card: what stands in it, that nothing in it breaks it, and that it can be made again from its files."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from huggingface_hub import ModelCard
from PIL import Image

from hf_robust_ft import Bound, CardData, HessianReport, TransitionEstimate, read_card, render_card, write_card
from hf_robust_ft.card.data import FILE
from hf_robust_ft.card.facts import command, merged, metric_facts
from hf_robust_ft.card.plots import BOUNDS_FILE, LAYERS_FILE, TRANSITION_FILE, plot_bounds
from hf_robust_ft.card.sections import measured_error, measured_gap
from hf_robust_ft.card.text import LONGEST, duration, escaped, fenced, number, one_line, percent, whole
from hf_robust_ft.curvature.report import LayerCurvature, PositivePart, Statistic
from hf_robust_ft.heat_map import save_heat_map
from hf_robust_ft.layers import NotALayer
from hf_robust_ft.risks import MeasuredRisk

HOSTILE = (
    "E|v`il` <script>alert(1)</script> \"q\" 's'\n# h\n---\n- [x](http://e.org) ![i](y) **b** $\\frac{$ @all {{ 7*7 }}"
)


def layer(name: str, size: float = 1.0, settled: bool | None = True) -> LayerCurvature:
    positive = None if settled is None else PositivePart(size, 0, 0.0, 2, settled)
    return LayerCurvature(
        name, (name,), 0.5, Statistic(0.9 * size, 0, 0.1, 0.01), Statistic(2 * size, 1, 1, 0.1), positive
    )


def report(**changes: Any) -> HessianReport:
    layers = (
        layer("vit.layers.0.fc.weight", 4.0),
        layer("vit.layers.0.proj.weight", 1.0, settled=False),
        layer("classifier.weight", 9.0, settled=None),
    )
    given: dict[str, Any] = {
        "layers": layers,
        "left_out": (NotALayer("classifier.bias", (3,), "bias"),),
        "examples": 10,
        "losses": Statistic(2.0, 3, 0.5, 0.05),
        "smallest_loss": 0.1,
        "lanczos_steps": 20,
        "complete": True,
        "seconds": 70.0,
        "estimated_seconds": 60.0,
        "notes": (),
    }
    return HessianReport(**{**given, **changes})


def bound(name: str = "Hessian distance", **changes: Any) -> Bound:
    given: dict[str, Any] = {
        "value": 1.5,
        "kind": "estimate",
        "bounds_what": "expected loss",
        "terms": {"gap": 1.0},
        "assumptions": ("only the leading term",),
        "source": "Somebody 2020",
        "n": 100,
    }
    return Bound(name, **{**given, **changes})


def risk(data: str, loss: float, **changes: Any) -> MeasuredRisk:
    given: dict[str, Any] = {
        "labels": "as given", "loss_error": 0.3, "corrected": False, "error": 0.2, "margin": 0.1, "n": 50
    }  # fmt: skip
    return MeasuredRisk(data, loss=loss, **{**given, **changes})


def data(**changes: Any) -> CardData:
    given: dict[str, Any] = {
        "model_name": "a model",
        "tasks": ["image-classification"],
        "metrics": {"eval_accuracy": 0.75, "eval_runtime": 3.0},
        "training_examples": 100,
        "bounds": [bound()],
        "risks": [risk("training", 0.5), risk("eval", 0.9, loss_error=0.4)],
    }
    return CardData(**{**given, **changes})


class Page(HTMLParser):
    """Tags, table shapes and text of a rendered card."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        renderer = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
        self.tags: list[str] = []
        self.text = ""
        self.rows: list[list[int]] = []
        self.feed(renderer.render(markdown))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag == "table":
            self.rows.append([])
        elif tag == "tr":
            self.rows[-1].append(0)
        elif tag in ("td", "th"):
            self.rows[-1][-1] += 1

    def handle_data(self, content: str) -> None:
        self.text += content


# Escaping


@pytest.mark.parametrize(
    "text",
    [HOSTILE, "a_b", "_a_", "__init__", "1. one", "- dash", "+ plus", "* star", "# head", "> quote", "a | b", "\\|",
     "&lt;", "www.evil.org", "https://evil.org", "~~x~~", "`" * 4, "===", "12) x", "<!-- c -->",
     "a\u202eb", "\x00\x1b[31m"],
)  # fmt: skip
def test_any_text_stays_text_in_paragraphs_lists_and_cells(text: str) -> None:
    shown = " ".join(one_line(text).split())
    for around in (f"{whole(text)}\n", f"- {whole(text)}\n", f"| a | b |\n|---|---|\n| x | {whole(text)} |\n"):
        page = Page(around)
        assert set(page.tags) <= {"p", "ul", "li", "table", "thead", "tbody", "tr", "th", "td"}
        assert all(row == [2, 2] for row in page.rows)
        assert shown in " ".join(page.text.split())


def test_ordinary_names_and_numbers_are_left_readable() -> None:
    for text in (
        "vit.layers.0.fc1.weight",
        "eval_test_accuracy",
        "0.0388",
        "Ju, Li 2022 (arXiv 2206.02659)",
        "20.0 %",
        "it's",
    ):
        assert escaped(text) == text
    assert escaped(None) == "not measured"
    assert len(html.unescape(escaped("|" * 500))) == LONGEST
    assert len(html.unescape(whole("|" * 500))) == 500


def test_numbers() -> None:
    assert [number(x) for x in (None, 0.123456, math.inf, 0.0)] == ["not measured", "0.1235", "beyond floats", "0"]
    assert [percent(x) for x in (None, 0.5)] == ["not measured", "50.0 %"]
    assert [duration(x) for x in (None, 12.3, 300.0)] == ["not measured", "12 s", "5.0 min"]


def test_a_block_of_code_can_not_be_ended_from_within() -> None:
    page = Page(fenced("````\n# no heading\n```", "bash"))
    assert page.tags == ["pre", "code"]


# The card


def test_the_hub_library_reads_the_card(tmp_path: Path) -> None:
    known = data(
        base_model="facebook/dinov2-small",
        datasets=["Fashion MNIST"],
        dataset_ids=["zalando/fashion_mnist"],
        license="apache-2.0",
        language=["en"],
        tags=["mine"],
        metric_labels={"eval": "clean"},
        noise_source="given",
    )
    write_card(tmp_path, known, report())
    card = ModelCard.load(tmp_path / "README.md")
    found = card.data
    assert (found.base_model, found.license, found.language) == ("facebook/dinov2-small", "apache-2.0", ["en"])
    assert found.datasets == ["zalando/fashion_mnist"]
    assert found.library_name == "transformers"
    assert {"mine", "hf_robust_ft", "label-noise"} <= set(found.tags)
    results = {result.metric_type: result for result in found.eval_results}
    assert results.keys() == {"accuracy", "bound_hessian_distance", "hessian_total"}
    assert results["accuracy"].metric_value == 0.75
    assert results["accuracy"].metric_name == "eval_accuracy (clean labels)"
    assert results["accuracy"].dataset_type == "zalando/fashion_mnist"
    assert results["bound_hessian_distance"].metric_value == 1.5
    assert "estimate on expected loss" in results["bound_hessian_distance"].metric_name
    assert results["hessian_total"].metric_value == pytest.approx(math.sqrt(8) + math.sqrt(2) + math.sqrt(18))


def test_an_empty_card_says_not_measured_and_nothing_else(tmp_path: Path) -> None:
    write_card(tmp_path, CardData())
    card = ModelCard.load(tmp_path / "README.md")
    page = Page(card.text)
    for line in ("Metrics: not measured.", "Noise rate: not measured.", "Bounds: not measured.", "Measurement"):
        assert line in page.text
    assert "Hessian distance measure: not measured." in page.text
    assert not card.data.eval_results
    assert "nan" not in page.text.lower()
    assert "None" not in card.content
    assert not any((tmp_path / name).exists() for name in (LAYERS_FILE, BOUNDS_FILE, TRANSITION_FILE))


def test_hostile_names_everywhere(tmp_path: Path) -> None:
    given: dict[str, Any] = {}
    for each in dataclasses.fields(CardData):
        kind = str(each.type)
        if kind == "str | None":
            given[each.name] = HOSTILE
        elif kind == "list[str]":
            given[each.name] = [HOSTILE] * 3
    given |= {
        "noise_source": HOSTILE,
        "metrics": {f"eval_{HOSTILE}": 0.5, "eval_accuracy": 0.5},
        "metric_labels": {"eval": HOSTILE},
        "transition": np.eye(3).tolist(),
        "arguments": {HOSTILE: HOSTILE, "layer_radius": {HOSTILE: 0.1}},
        "versions": {HOSTILE: HOSTILE},
        "seeds": {HOSTILE: 1},
        "bounds": [bound(HOSTILE, assumptions=(HOSTILE,), source=HOSTILE)],
        "risks": [risk("training", 0.5), risk(HOSTILE, 0.9)],
    }
    found = report(layers=(layer(HOSTILE), layer("b")), left_out=(NotALayer(HOSTILE, (3,), HOSTILE),), notes=(HOSTILE,))
    write_card(tmp_path, CardData(**given), found)
    card = ModelCard.load(tmp_path / "README.md")  # YAML, too
    assert card.data.eval_results
    assert card.data.license is None  # no name that the Hub knows
    assert card.data.datasets is None
    body = card.text
    page = Page(body)
    plain = Page(render_card(data(**{"transition": np.eye(3).tolist(), "noise_source": "x"}), report()).text)
    assert set(page.tags) <= set(plain.tags) | {"img"}
    assert page.tags.count("h2") == plain.tags.count("h2")
    assert page.tags.count("img") == 3
    assert "a" not in page.tags
    assert all(len(set(rows)) == 1 for rows in page.rows)
    assert "{{ 7&#42;7 }}" in body  # no template of a template
    loaded, again, _ = read_card(tmp_path)
    assert loaded.description == HOSTILE
    assert again == found


def test_metrics_that_are_no_numbers_stay_out_of_the_head(tmp_path: Path) -> None:
    metrics: dict[str, Any] = {
        "eval_f1": math.nan,
        "eval_loss": np.float32(0.5),
        "eval_x": math.inf,
        "eval_n": np.int64(3),
    }
    write_card(tmp_path, data(metrics=metrics), report())
    card = ModelCard.load(tmp_path / "README.md")
    assert "!!" not in card.content.partition("# ")[0]
    assert {r.metric_type: r.metric_value for r in card.data.eval_results if r.dataset_split == "eval"} == {
        "loss": 0.5,
        "n": 3,
    }
    assert "| eval_f1 | labels as given | not a finite number |" in card.text
    assert read_card(tmp_path)[0].metrics["eval_f1"] is None


def test_a_card_is_made_again_from_its_files(tmp_path: Path) -> None:
    first = write_card(tmp_path / "a", data(transition=np.eye(2).tolist(), noise_source="given"), report())
    again = write_card(tmp_path / "b", *read_card(tmp_path / "a"))
    assert str(again) == str(first)
    for name in (FILE, "hessian_report.json", LAYERS_FILE, BOUNDS_FILE, TRANSITION_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_is_not_measured_any_more_goes(tmp_path: Path) -> None:
    write_card(tmp_path, data(), report())
    assert (tmp_path / LAYERS_FILE).is_file()
    write_card(tmp_path, data(bounds=[]))  # the report of earlier weights still lies there
    assert not (tmp_path / LAYERS_FILE).exists()
    assert read_card(tmp_path)[1] is None


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"format": "hf_robust_ft.CardData/9"}, "written as hf_robust_ft.CardData/9"),
        ({"colour": 1}, "unknown keys 'colour'"),
        ({"bounds": [1]}, r"bounds\[0\] is no bound"),
        ({"risks": [{}]}, "missing"),
    ],
)
def test_another_format_is_refused(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    data().save(tmp_path / FILE)
    content = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=f"holds no card of this version .*{problem}.*make the card again"):
        CardData.load(tmp_path / FILE)


def test_no_card_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_card(tmp_path)
    (tmp_path / FILE).write_text("[")
    with pytest.raises(ValueError, match="holds no card"):
        read_card(tmp_path)


def test_the_gap_says_which_labels_each_side_has() -> None:
    sides = [
        risk("training", 0.5, labels="noisy", corrected=True),
        risk("eval_a", 0.7, labels="noisy", corrected=True),
        risk("eval_b", 0.9, labels="clean", loss_error=0.4, error=0.25),
    ]
    known = data(risks=sides, noise_source="given")
    assert measured_gap(known) == pytest.approx(0.4)  # clean labels first
    assert measured_error(known) == 0.25
    text = render_card(known, report()).text
    assert "**Measured gap: 0.4 ± 0.5 nats**" in text
    assert "- Training: backward-corrected cross entropy on 50 examples, noisy labels" in text
    assert "- Evaluation, eval_b: cross entropy on 50 examples, clean labels" in text
    assert "the gap holds" not in text
    assert measured_error(data(risks=sides[:2])) is None
    assert measured_gap(data(risks=sides[1:])) is None


@pytest.mark.parametrize(
    ("training", "evaluation", "caveat"),
    [
        (("as given", False), ("as given", False), None),
        (("noisy", True), ("noisy", True), None),
        (("noisy", True), ("clean", False), None),
        (("noisy", True), ("as given", False), "Evaluation labels are taken as given: where they are wrong"),
        (("noisy", False), ("as given", False), "The training loss is not corrected for noise"),
        (("noisy", False), ("clean", False), "The training loss is not corrected for noise"),
        (("noisy", False), ("noisy", False), None),
    ],
)
def test_a_gap_between_two_kinds_of_labels_says_so(
    training: tuple[str, bool], evaluation: tuple[str, bool], caveat: str | None
) -> None:
    sides = [
        risk(name, 0.5, labels=labels, corrected=corrected)
        for name, (labels, corrected) in (("training", training), ("eval", evaluation))
    ]
    text = Page(render_card(data(risks=sides)).text).text
    assert (caveat in text) if caveat else "the gap holds" not in text


def test_the_tables_add_up() -> None:
    text = render_card(data(), report()).text
    total = math.sqrt(8) + math.sqrt(2) + math.sqrt(18)
    block = math.sqrt(8) + math.sqrt(2)
    assert f"| vit.layers.0 | 2 | 0.707 | {block:.3g} | 1 of 2 settled | {100 * block / total:.1f} % |" in text
    assert f"| classifier | 1 | 0.5 | {math.sqrt(18):.3g} | not measured |" in text
    assert "The worst layers are classifier.weight, vit.layers.0.fc.weight, vit.layers.0.proj.weight:" in text
    assert "| vit.layers.0.proj.weight | 0.5 | 0.9 | ≥ 1 | 2 |" in text
    assert "| bias | classifier.bias |" in text


def test_an_estimated_transition_is_shown_with_its_interval() -> None:
    matrix = np.array([[0.8, 0.2], [0.1, 0.9]])
    pair, ones = (0.1, 0.2), np.ones(2)
    estimate = TransitionEstimate(
        matrix, matrix, np.stack([matrix, matrix], -1), 0.15, 0.01, (0.13, 0.17), ones, 1.4, 0.7, pair, ones, ones,
        0.3, 0.02, "joint likelihood", 500, 100, 5, 7, "Correction is possible.", matrix[None],
    )  # fmt: skip
    known = data(noise_source="estimated", transition=matrix.tolist(), condition_number=1.43, amplification=1.6)
    text = render_card(known, report(), estimate).text
    assert "| Noise rate | 15.0 %, 95 % interval 13.0 % to 17.0 % |" in text
    assert "Correction is possible." in text
    assert "| 0 | 0.80 | 0.20 |" in text
    assert "joint likelihood from 500 examples, 100 replicates, seed 7" in text


# Pictures


def test_pictures_are_small_opaque_and_linked(tmp_path: Path) -> None:
    many = tuple(layer(f"model.encoder.layer.{i // 6}.part{i % 6}.weight", 10.0 ** (i % 7)) for i in range(150))
    certificate = bound("held-out", kind="certificate", bounds_what="error on clean labels", value=0.4, terms={})
    huge = bound("row sums", kind="measure", value=math.inf, terms={"log10": 400.0})
    matrix = (np.eye(10) * 0.6 + 0.04).tolist()
    card = write_card(
        tmp_path,
        data(bounds=[bound(), huge, certificate], transition=matrix, noise_source="given"),
        report(layers=many),
    )
    for name in (LAYERS_FILE, BOUNDS_FILE, TRANSITION_FILE):
        assert (tmp_path / name).stat().st_size < 100_000
        assert f"]({name})" in card.text
        with Image.open(tmp_path / name) as picture:
            assert picture.width <= 1000
            assert np.asarray(picture.convert("RGBA"))[..., 3].min() == 255


@pytest.mark.parametrize("gap", [None, -0.2, 0.0, 0.3])
def test_bounds_are_drawn_beside_any_gap(tmp_path: Path, gap: float | None) -> None:
    assert plot_bounds([bound("$\\frac{ a|\nb")], gap, None, tmp_path / "x.png")
    assert not plot_bounds([bound(value=None)], gap, None, tmp_path / "y.png")


def test_weights_that_never_moved_are_drawn(tmp_path: Path) -> None:
    still = LayerCurvature("a", ("a",), 0.0, Statistic(0.0, 0, 0, 0), Statistic(0.0, 0, 0, 0), None)
    card = write_card(tmp_path, data(), report(layers=(still,)))
    assert LAYERS_FILE in card.text


def test_class_names_are_no_formulas(tmp_path: Path) -> None:
    assert save_heat_map(np.eye(2), ["$\\frac{", "a\nb"], tmp_path / "T.png")


def test_without_matplotlib_the_card_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    card = write_card(tmp_path, data(transition=np.eye(2).tolist(), noise_source="given"), report())
    assert "![" not in card.text
    assert "No pictures: matplotlib was not there" in card.text


# What the Trainer fills in


def test_the_card_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", "hf_abcdefghijklmnop", "--seed=0"])
    trainer = tiny.trainer(
        tmp_path / "run",
        noise_transition=0.2,
        layer_radius={"*encoder*": 0.05},
        eval_dataset=tiny.texts(8, 1),
        hessian_examples=6,
        hessian_time_budget=0,
        hub_token="hf_abcdefghijklmnop",
    )
    trainer.card_data.description = "For trying things out. " * 20
    trainer.model.config._name_or_path = str(tmp_path / "base")
    trainer.card_data.other_bounds.append(bound("held-out", kind="certificate", terms={}, confidence=0.95))
    trainer.train()
    evaluated = trainer.evaluate()
    trainer.create_model_card(dataset="texts", tags="x", license="mit")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    text = Page(card.text).text
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results["eval_loss"] == evaluated["eval_loss"]  # nobody said that these labels are clean
    assert "clean labels" not in card.text.replace("expected loss on clean labels", "")
    assert "where they are wrong, the gap holds their noise, too" in text
    assert card.data.license == "mit"
    assert "symmetric noise of rate 0.2, as given" in text
    assert ("For trying things out. " * 20).strip() in text
    assert str(tmp_path) not in card.text.replace(str(Path.cwd()), "")
    assert "| bert.encoder.layer.1 | 6 | frobenius | 0.05 |" in card.text
    assert "certificate, 95 %" in card.text
    assert "python train.py" in text
    everything = "".join(path.read_text() for path in (tmp_path / "run").glob("*.json")) + card.content
    assert "hf_abc" not in everything
    known, report, _ = read_card(tmp_path / "run")
    assert report == trainer.hessian_report
    assert known.classes == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert known.tasks == ["text-classification"]
    assert known.training_examples == 24
    assert known.condition_number == pytest.approx(1 / 0.7)
    assert len(known.bounds) == 8
    assert "output_dir" not in known.arguments


def test_a_plain_module_without_a_processor_or_a_measurement_has_a_card(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, tiny.MlpWithLoss(), train_dataset=tiny.vectors(label="target"), label_names=["target"]
    )
    trainer.train()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert "| Model | MlpWithLoss |" in card.text
    assert "Hessian distance measure: not measured." in card.text
    assert card.data.model_name is None or card.data.model_name == tmp_path.name


def test_trained_on_after_a_measurement_it_is_not_shown(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, hessian_examples=4, hessian_time_budget=0)
    trainer.train()
    trainer.args.hessian_examples = 0
    trainer.train()
    trainer.create_model_card()
    assert "Hessian distance measure: not measured." in (tmp_path / "README.md").read_text()


def test_noisy_held_out_labels_estimate_the_error_of_these_weights(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, noise_transition=0.2, eval_labels="noisy", eval_dataset=tiny.texts(40, 1))
    trainer.train()
    metrics = trainer.evaluate()
    trainer.create_model_card()
    (found,) = read_card(tmp_path)[0].bounds
    assert found.name == "held-out, eval"
    assert found.terms["error"] == pytest.approx(1 - metrics["eval_clean_accuracy"])
    trainer.train()
    trainer.create_model_card()
    assert read_card(tmp_path)[0].bounds == []


def test_labels_that_the_radius_was_chosen_by_as_noisy_are_called_so(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path,
        layer_radius="auto",
        noise_transition=0.3,
        max_steps=1,
        eval_dataset={"dev": tiny.texts(24, 1), "test": tiny.texts(8, 2)},
        metric_for_best_model="dev_loss",
        hessian_examples=4,
        hessian_time_budget=0,
    )
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card()
    assert trainer.radius_choice.score == "clean_accuracy"
    known = read_card(tmp_path)[0]
    assert known.metric_labels == {"eval_dev": "noisy", "eval_test": "as given"}
    assert [(risk.data, risk.labels, risk.corrected) for risk in known.risks] == [
        ("training", "noisy", True), ("eval_dev", "noisy", True), ("eval_test", "as given", False)
    ]  # fmt: skip


@pytest.mark.parametrize("transition", [[[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], np.full((3, 3), 1 / 3)])
def test_a_transition_without_an_inverse_has_a_card(tmp_path: Path, transition: Any) -> None:
    trainer = tiny.trainer(
        tmp_path / "run",
        noise_transition=transition,
        loss_correction="posterior",
        hessian_examples=4,
        hessian_time_budget=0,
        eval_dataset=tiny.texts(8, 1),
    )
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| Condition number of T | infinite, or too large: T can't be inverted |" in card
    assert "| Amplification ρ of a loss by T⁻¹ | there is no T⁻¹ |" in card
    assert "are those of the plain cross entropy, on training labels as given." in card
    assert "| training | noisy labels | 4 | plain |" in card
    known, report, _ = read_card(tmp_path / "run")
    assert (known.condition_number, known.amplification) == (None, None)
    assert known.noise_rate == pytest.approx(1 - np.trace(transition) / 3)
    assert str(write_card(tmp_path / "again", known, report)) == card


def test_a_folder_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.bert().save_pretrained("models/base")
    for source in ("models/base", str(tmp_path / "models" / "base")):
        model = type(tiny.bert()).from_pretrained(source)
        trainer = tiny.trainer(tmp_path / "run", model)
        trainer.create_model_card()
        card = ModelCard.load(tmp_path / "run" / "README.md")
        assert card.data.base_model is None
        assert "| Fine-tuned from | base (a local folder) |" in card.text
    model.config._name_or_path = "google-bert/bert-base-uncased"
    tiny.trainer(tmp_path / "run", model).create_model_card()
    assert ModelCard.load(tmp_path / "run" / "README.md").data.base_model == "google-bert/bert-base-uncased"


@pytest.mark.parametrize("noise", [None, 0.2])
def test_metrics_of_several_evaluations_have_their_names_on_the_hub(tmp_path: Path, noise: float | None) -> None:
    trainer = tiny.trainer(
        tmp_path,
        noise_transition=noise,
        eval_dataset={"test": tiny.texts(6)},
        compute_metrics=lambda found: {"accuracy": 0.5},
    )
    trainer.train()
    trainer.evaluate()
    trainer.evaluate(tiny.texts(6), metric_key_prefix="far_away")
    trainer.create_model_card()
    found = ModelCard.load(tmp_path / "README.md").data
    assert found.metrics == ["accuracy"]
    assert [(r.metric_name, r.dataset_split) for r in found.eval_results if r.metric_type == "accuracy"] == [
        ("eval_test_accuracy", "eval_test"), ("far_away_accuracy", "far_away")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "source"),
    [
        (" [[0.8,0.1,0.1],[0.1,0.8,0.1],[0.1,0.1,0.8]]", "a matrix that was given"),
        (np.eye(3), "a matrix that was given"),
        ("0.2", "symmetric noise of rate 0.2, as given"),
        ("T.json", "read from T.json"),
    ],
)
def test_where_the_transition_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Any, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("T.json").write_text(json.dumps(np.eye(3).tolist()))
    tiny.trainer(tmp_path / "run", noise_transition=given).create_model_card()
    assert read_card(tmp_path / "run")[0].noise_source == source


def test_other_processes_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny.trainer(tmp_path)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.create_model_card()
    assert not list(tmp_path.iterdir())


def test_metrics_are_those_of_the_weights_that_were_kept(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    state = trainer.state
    state.global_step, state.best_global_step = 20, 10
    state.log_history = [
        {"eval_loss": 1.0, "eval_runtime": 1, "step": 10, "epoch": 1},
        {"loss": 3.0, "step": 10},
        {"eval_loss": 2.0, "eval_runtime": 1, "step": 20, "epoch": 2},
        {"train_runtime": 5, "train_loss": 1.0, "step": 20},
    ]
    assert metric_facts(state, best=True)["eval_loss"] == 1.0
    assert metric_facts(state, best=False)["eval_loss"] == 2.0
    state.log_history.append({"eval_loss": 1.5, "eval_runtime": 1, "step": 20})
    state.log_history.append({"test_accuracy": math.nan, "test_runtime": 1, "step": 20})
    found = metric_facts(state, best=True)
    assert (found["eval_loss"], found["test_accuracy"]) == (1.5, None)
    assert not any(name.startswith("train") or name == "loss" for name in found)


def test_secrets_stay_out_of_the_command() -> None:
    words = ["a/b.py", "--hub_token=abc", "--push_to_hub_token", "xyz", "--x", "hf_ABCDEFGHIJ", "http://me:pw@host/"]
    text = " ".join(command(words))
    assert not any(secret in text for secret in ("abc", "xyz", "ABCDEF", "pw"))
    assert text == "python a/b.py --hub_token=*** --push_to_hub_token *** --x *** http://***@host/"
    assert command(["a.py", "looks-like-nothing"], ["looks-like-nothing"]) == ["python", "a.py", "***"]
    assert command(["-c"]) == []


def test_the_first_stratum_that_says_something_counts() -> None:
    found = merged({"license": None, "tags": ["x"]}, vars(CardData(license="mit")), {"tags": ["y"], "hardware": "none"})
    assert (found.license, found.tags, found.hardware, found.model_name) == ("mit", ["x"], "none", None)

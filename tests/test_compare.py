"""``hf-robust-ft compare``: measured models side by side."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_card import HOSTILE, bound, data, report, risk

from hf_robust_ft import CardData, HessianReport, symmetric_transition, write_card
from hf_robust_ft.cli import main
from hf_robust_ft.comparison import Compared, differences, read_models, roots, summary, table
from hf_robust_ft.comparison_plot import FILE, plot_comparison
from hf_robust_ft.constraints import ConstraintRow


def ball(name: str, distance: float) -> ConstraintRow:
    return ConstraintRow(name, (2, 2), "pretrained", 0.5, "frobenius", distance, None)


def robust() -> CardData:
    """Trained by this package, with noise and constraints, and certified."""
    transition = symmetric_transition(3, 0.3)
    return data(
        metrics={"eval_accuracy": 0.8, "eval_loss": 0.4},
        correction="forward",
        noise_rate=0.3,
        noise_source="as given",
        transition=transition.tolist(),
        constraints=[ball("a", 0.5), ball("b", 0.1), replace(ball("c", 0.1), free="norm")],
        other_bounds=[
            bound("PAC-Bayes", value=0.6, kind="certificate", confidence=0.95, bounds_what="error on clean labels"),
        ],
    )


def compared(name: str, card: CardData | None = None, found: HessianReport | None = None) -> Compared:
    return Compared(name, data() if card is None else card, report() if found is None else found)


def save(folder: Path, card: CardData | None = None, found: HessianReport | None = None) -> str:
    write_card(folder, data() if card is None else card, report() if found is None else found)
    return str(folder)


def cells(printed: str) -> dict[str, list[str]]:
    """Row → columns."""
    rows = (line.split("  ") for line in printed.splitlines())
    return {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}


def test_the_table_has_what_was_measured() -> None:
    found = cells(table([compared("plain", data(metrics={"eval_accuracy": 0.75})), compared("robust", robust())]))
    assert found[""] == ["plain", "robust"]
    assert found["eval_accuracy"] == ["0.75", "0.8"]
    assert "eval_loss" not in found  # not of both
    assert found["noise rate by T"] == ["no T", "30.0 %"]
    assert found["layers constrained"] == ["not known", "2"]
    assert found["layers on their ball"] == ["not known", "1"]
    total = math.sqrt(8) + math.sqrt(2) + math.sqrt(18)
    assert found["Σ √𝓗, sound bound"] == [f"{total:.4g}"] * 2
    assert found["Σ √𝓗, Lanczos"] == [f"{2 + math.sqrt(2) + math.sqrt(18):.4g}"] * 2  # the first layer is settled
    assert found["layers settled"] == ["33.3 %"] * 2
    assert found["distance"] == [f"{math.sqrt(3 * 0.25):.4g}"] * 2
    assert found["measured gap"] == ["0.4"] * 2
    assert found["Hessian distance (estimate)"] == ["1.5", "1.5"]
    assert found["PAC-Bayes (certificate)"] == ["not measured", "0.6"]


def test_what_was_not_measured_says_so() -> None:
    bare = Compared("bare", CardData(), None)
    found = cells(table([bare, bare]))
    for name in ("training examples", "measured loss", "Σ √𝓗, sound bound", "measured gap", "distance"):
        assert found[name] == ["not measured"] * 2
    none_settled = report(layers=tuple(replace(layer, positive=None) for layer in report().layers))
    assert cells(table([compared("a", found=none_settled)] * 2))["Σ √𝓗, Lanczos"] == ["not measured"] * 2


def test_names_stay_in_their_columns() -> None:
    printed = table([compared(HOSTILE), compared("b", data(model_class=HOSTILE))])
    assert len(printed.splitlines()) == len(table([compared("a"), compared("b")]).splitlines())


CORRECTED = [risk("training", 0.5, corrected=True, labels="noisy"), risk("eval", 0.9)]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (compared("b"), []),
        (compared("b", data(model_class="Bert")), ["other architectures"]),
        (compared("b", found=report(layers=report().layers[:2])), ["other layers were measured"]),
        (compared("b", found=report(examples=20)), ["a maximum over more examples is larger"]),
        (compared("b", data(model_class="Vit", training_examples=200)), ["trained on other numbers of examples"]),
        (compared("b", data(model_class="Vit", risks=CORRECTED)), ["other losses were measured"]),
        (compared("b", data(model_class="Vit", reference="there")), ["measured from weights of other names"]),
        (compared("b", data(model_class="Vit", datasets=["digits"])), ["trained on other data"]),
        (compared("b", found=report(complete=False)), ["b: the measurement was stopped early"]),
        (Compared("b", data(model_class="Vit"), None), ["b: the curvature was not measured"]),
        (
            compared("b", data(model_class="Vit", risks=[risk("training", 0.5), risk("eval", 0.9, labels="noisy")])),
            ["the gap was measured on other evaluation labels"],
        ),
    ],
)
def test_what_does_not_compare_is_named(other: Compared, said: list[str]) -> None:
    first = compared("a", data(model_class="Vit", reference="here", datasets=["clothes"]))
    if other.data.model_class is None:
        other = other._replace(data=data(model_class="Vit"))
    found = differences([first, other, first._replace(name="c")])
    assert len(found) == len(said)
    for one, start in zip(found, said, strict=True):
        assert one.startswith(start)
    if said and not said[0].startswith("b:"):
        assert "a, c: " in found[0]


def test_other_matrices_are_other_losses() -> None:
    def with_rate(rate: float) -> Compared:
        matrix = symmetric_transition(3, rate).tolist()
        return compared(f"{rate}", data(risks=CORRECTED, noise_rate=rate, transition=matrix))

    assert differences([with_rate(0.3), with_rate(0.3)]) == []
    assert differences([with_rate(0.3), with_rate(0.2)]) == [
        "the loss was corrected by another T (0.3: rate 0.3; 0.2: rate 0.2)"
    ]


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [save(tmp_path / "plain"), save(tmp_path / "robust", robust(), report(examples=20))]
    assert main(["compare", *folders, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert cells(printed.partition("\n\n")[0])[""] == ["plain", "robust"]
    assert "Not everything compares:\n  a maximum over more examples is larger" in printed
    assert f"Drawn to {tmp_path / 'out' / FILE}" in printed
    with Image.open(tmp_path / "out" / FILE) as picture:
        assert picture.width <= 900
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 10
    assert (tmp_path / "out" / FILE).stat().st_size < 100_000
    assert main(["compare", *folders, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in found["models"]] == ["plain", "robust"]
    assert found["models"][1]["certificates"] == {"PAC-Bayes": 0.6}
    assert found["models"][1]["hessian_total"] == pytest.approx(sum(roots(report()).values()))
    assert len(found["differences"]) == 1


def test_folders_of_one_name_keep_their_paths(tmp_path: Path) -> None:
    one, other = save(tmp_path / "a" / "out"), save(tmp_path / "b" / "out")
    assert [model.name for model in read_models([one, other])] == [one, other]


@pytest.mark.parametrize("count", [1, 0])
def test_one_model_has_nothing_to_compare_with(tmp_path: Path, count: int) -> None:
    with pytest.raises(ValueError, match=f"models: {count} given; give two or more"):
        read_models([save(tmp_path / "a")] * count)


def test_folders_that_can_not_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = save(tmp_path / "good")
    assert main(["compare", good, str(tmp_path / "nowhere")]) == 2
    assert "holds no robust_card.json; trainer.create_model_card() and hf-robust-ft" in capsys.readouterr().err
    bad = Path(save(tmp_path / "bad"))
    (bad / "hessian_report.json").write_text("{")
    assert main(["compare", good, str(bad), "--output", str(tmp_path / "out")]) == 2
    assert "is no report of measure_hessian" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    bare = Compared("a", CardData(), None)
    assert not plot_comparison([bare, bare], tmp_path / FILE)
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("case", ["no gap", "a gap below 0", "no layers in common", "many", "flat"])
def test_odd_models_are_drawn(tmp_path: Path, case: str) -> None:
    models = [compared("a"), compared("b", robust())]
    if case == "no gap":
        models = [compared(name, data(risks=[])) for name in "ab"]
    if case == "a gap below 0":
        models = [compared(name, data(risks=[risk("training", 0.5), risk("eval", 0.4)])) for name in "ab"]
    if case == "no layers in common":
        models[1] = models[1]._replace(report=report(layers=(replace(report().layers[0], name="z"),)))
    if case == "many":
        models = [compared(HOSTILE + str(i), robust()) for i in range(10)]
    if case == "flat":
        zero = replace(report().layers[0].upper, maximum=0.0)
        models = [
            compared(n, found=report(layers=tuple(replace(x, upper=zero) for x in report().layers))) for n in "ab"
        ]
    assert plot_comparison(models, tmp_path / FILE)
    assert (tmp_path / FILE).stat().st_size > 1000


def test_a_summary_is_json(tmp_path: Path) -> None:
    found: Any = json.loads(json.dumps(summary(compared("a", robust()))))
    assert found["bounds"][1]["name"] == "PAC-Bayes"
    assert (found["constrained"], found["active"]) == (2, 1)

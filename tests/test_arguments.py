"""``RobustTrainingArguments`` from Python, from a command line and from JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import HfArgumentParser

from hf_robust_ft import RobustTrainingArguments, symmetric_transition


def parse(folder: Path, *words: str) -> RobustTrainingArguments:
    parser = HfArgumentParser(RobustTrainingArguments)
    (parsed,) = parser.parse_args_into_dataclasses(["--output_dir", str(folder), *words])
    return parsed


def test_every_feature_is_off_by_default(tmp_path: Path) -> None:
    parsed = parse(tmp_path)
    assert (parsed.noise_transition, parsed.loss_correction, parsed.layer_radius) == (None, None, None)
    assert (parsed.radius_norm, parsed.radius_mode, parsed.radius_growth) == ("frobenius", "absolute", 1.0)
    assert (parsed.hessian_penalty, parsed.l2sp_penalty) == (0.0, 0.0)


def test_penalties_are_numbers(tmp_path: Path) -> None:
    parsed = parse(tmp_path, "--hessian_penalty", "0.01", "--l2sp_penalty", "1e-3")
    assert (parsed.hessian_penalty, parsed.l2sp_penalty) == (0.01, 1e-3)
    # As YAML reads it, and as numpy has it: JSON, which logs are written in, has no such numbers.
    made = RobustTrainingArguments(str(tmp_path), hessian_penalty="1e-2", l2sp_penalty=np.float32(0.5))
    assert [type(value) for value in (made.hessian_penalty, made.l2sp_penalty)] == [float, float]
    assert (made.hessian_penalty, made.l2sp_penalty) == (0.01, 0.5)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("0.3", 0.3),
        ("inf", math.inf),
        ('{"*.layer.*": 0.3, "classifier": null}', {"*.layer.*": 0.3, "classifier": None}),
    ],
)
def test_radii_on_a_command_line(tmp_path: Path, word: str, value: Any) -> None:
    assert parse(tmp_path, "--layer_radius", word).layer_radius == value


def test_an_automatic_radius_is_relative(tmp_path: Path) -> None:
    for word, value in (("auto", "auto"), ('{"*.layer.*": "auto", "*": null}', {"*.layer.*": "auto", "*": None})):
        parsed = parse(tmp_path, "--layer_radius", word)
        assert (parsed.layer_radius, parsed.radius_mode) == (value, "relative")


@pytest.mark.parametrize(
    ("word", "value"), [("0.4", 0.4), ("T.npy", "T.npy"), ("[[0.9, 0.1], [0, 1]]", "[[0.9, 0.1], [0, 1]]")]
)
def test_transitions_on_a_command_line(tmp_path: Path, word: str, value: Any) -> None:
    assert parse(tmp_path, "--noise_transition", word).noise_transition == value


def test_choices_are_checked_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argument in ("loss_correction", "radius_norm", "radius_mode"):
        with pytest.raises(SystemExit):
            parse(tmp_path, f"--{argument}", "nonsense")
        assert f"--{argument}" in capsys.readouterr().err


def test_help_explains_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        HfArgumentParser(RobustTrainingArguments).parse_args(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "a symmetric rate (0.4), a path to .npy or .json" in text
    assert "largest row sum; rows are outputs" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"loss_correction": "forwards"},
            "loss_correction is 'forwards'; choose one of None, 'none', 'forward'",
        ),
        ({"radius_norm": "l2"}, "radius_norm is 'l2'; choose one of 'frobenius', 'inf_op'"),
        ({"radius_mode": "rel"}, "radius_mode is 'rel'"),
        ({"layer_radius": "[0.3]"}, r"layer_radius is '\[0.3\]'; give a number, 'auto' or JSON"),
        ({"layer_radius": "{'a': 1}"}, "give a number, 'auto' or JSON"),
    ],
)
def test_bad_values_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RobustTrainingArguments(output_dir=str(tmp_path), **settings)


@pytest.mark.parametrize("kind", ["list", "array", "tensor"])
def test_a_matrix_survives_json(tmp_path: Path, kind: str) -> None:
    matrix = symmetric_transition(3, 0.3)
    given = {"list": matrix.tolist(), "array": matrix, "tensor": torch.tensor(matrix)}[kind]
    arguments = RobustTrainingArguments(
        output_dir=str(tmp_path), noise_transition=given, layer_radius={"*": 0.1, "b": None}, report_to="none"
    )
    written = json.loads(arguments.to_json_string())
    np.testing.assert_array_equal(written["noise_transition"], matrix)
    assert written["layer_radius"] == {"*": 0.1, "b": None}


def test_a_json_file_of_arguments(tmp_path: Path) -> None:
    file = tmp_path / "arguments.json"
    settings = {
        "output_dir": str(tmp_path),
        "noise_transition": [[0.9, 0.1], [0.2, 0.8]],
        "layer_radius": {"*": 1},
    }
    file.write_text(json.dumps(settings))
    (parsed,) = HfArgumentParser(RobustTrainingArguments).parse_json_file(file)
    assert parsed.noise_transition == [[0.9, 0.1], [0.2, 0.8]]
    assert parsed.layer_radius == {"*": 1}

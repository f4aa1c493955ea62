"""From what is known to the files of a card: pictures, ``README.md``, and JSON to make it again from."""

from __future__ import annotations

import functools
from pathlib import Path

import jinja2
import numpy as np
from huggingface_hub import ModelCard

from ..curvature import HessianReport
from ..estimation import TransitionEstimate
from ..files import inside, written_whole
from ..heat_map import save_heat_map
from ..hessian_measurement import FILE as REPORT_FILE
from ..noise_estimate import FILE as ESTIMATE_FILE
from .citations import citations
from .data import FILE, CardData
from .metadata import hub_metadata
from .plots import BOUNDS_FILE, LAYERS_FILE, TRANSITION_FILE, plot_bounds, plot_layers
from .sections import measured_error, measured_gap, sections
from .text import Markup, duration, escaped, fenced, number, percent, whole

TEMPLATE = Path(__file__).parent / "template.md.jinja"
README = "README.md"
MARK = "<!-- Written by hf_robust_ft from robust_card.json and the reports beside it. -->"
"""In every README that this package wrote as a whole."""


def write_card(
    folder: str | Path,
    data: CardData,
    report: HessianReport | None = None,
    estimate: TransitionEstimate | None = None,
) -> ModelCard:
    """Write ``README.md``, its pictures under ``plots/``, and the JSON files that :func:`read_card` reads.

    Args:
        folder: of the model.
        data: whose ``report`` and ``estimate`` are set to the names of the files written.
        report: of the curvature; None: not measured.
        estimate: of T; None where T was not estimated.
    """
    plots = write_parts(folder, data, report, estimate)
    card = render_card(data, report, estimate, plots=plots)
    with written_whole(Path(folder) / README) as temporary:
        temporary.write_text(str(card), encoding="utf-8")
    return card


def write_parts(
    folder: str | Path, data: CardData, report: HessianReport | None, estimate: TransitionEstimate | None
) -> tuple[str, ...]:
    """All of a card but ``README.md``. Returns the paths of the pictures in the folder.

    Raises:
        ValueError: the folder of the pictures is a link out of this one; nothing is written then.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (LAYERS_FILE, BOUNDS_FILE, TRANSITION_FILE):
        inside(folder, str(Path(name).parent))
    data.report = data.estimate = None
    if report is not None:
        data.report = REPORT_FILE
        report.save(folder / REPORT_FILE)
    if estimate is not None:
        data.estimate = ESTIMATE_FILE
        estimate.save(folder / ESTIMATE_FILE)
    data.save(folder / FILE)
    return _draw(folder, data, report)


def read_card(folder: str | Path) -> tuple[CardData, HessianReport | None, TransitionEstimate | None]:
    """What :func:`write_card` was given, to change something and write the card again.

    Raises:
        ValueError: a file of another format, a damaged one, or one that lies elsewhere.
        OSError: a file that ``robust_card.json`` names, or itself, is missing.
    """
    folder = Path(folder)
    if not (folder / FILE).is_file():
        raise FileNotFoundError(
            f"'{folder}' holds no {FILE}; trainer.create_model_card() and hf-robust-ft measure write one"
        )
    data = CardData.load(inside(folder, FILE))
    report = None if data.report is None else HessianReport.load(inside(folder, data.report))
    return data, report, read_estimate(folder, data)


def read_estimate(folder: Path, data: CardData) -> TransitionEstimate | None:
    """The estimate of T that a card names, if it names one.

    Raises:
        ValueError: it is something else, or lies elsewhere.
        OSError: it is missing.
    """
    return None if data.estimate is None else TransitionEstimate.load(inside(folder, data.estimate))


def render_card(
    data: CardData,
    report: HessianReport | None = None,
    estimate: TransitionEstimate | None = None,
    *,
    plots: tuple[str, ...] = (),
) -> ModelCard:
    """The card, with links to those pictures that there are.

    Args:
        plots: paths relative to the card.
    """
    body = render_body(data, report, estimate, plots=plots, own=True)
    return ModelCard(f"---\n{hub_metadata(data, report).to_yaml()}\n---\n\n{body}\n")


def render_body(
    data: CardData,
    report: HessianReport | None,
    estimate: TransitionEstimate | None,
    *,
    plots: tuple[str, ...],
    own: bool,
) -> str:
    """The card without metadata.

    Args:
        own: whether it is a page of its own, not a section of another.
    """
    text = _template().render(
        data=data,
        report=report,
        estimate=estimate,
        plots=plots,
        own=own,
        mark=Markup(MARK),
        heading=Markup("##" if own else "###"),
        layers_plot=LAYERS_FILE,
        bounds_plot=BOUNDS_FILE,
        transition_plot=TRANSITION_FILE,
        citation=fenced(
            citations(data.correction, row_sums=any(row.norm == "inf_op" for row in data.constraints)), "bibtex"
        ),
        **sections(data, report, estimate),
    )
    return text.rstrip()


@functools.cache
def _template() -> jinja2.Template:
    # finalize sees every value before it is output: what is not Markup is escaped, wherever it stands.
    environment = jinja2.Environment(
        finalize=escaped, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False
    )
    environment.filters.update(
        number=number, percent=percent, duration=duration, whole=whole, block=fenced, safe_markup=Markup
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _draw(folder: Path, data: CardData, report: HessianReport | None) -> tuple[str, ...]:
    """The pictures that could be drawn. Others, of an earlier card, go."""
    drawn = []
    if report is not None and plot_layers(report, folder / LAYERS_FILE):
        drawn.append(LAYERS_FILE)
    bounds = [*data.bounds, *data.other_bounds]
    if bounds and plot_bounds(bounds, measured_gap(data), measured_error(data), folder / BOUNDS_FILE):
        drawn.append(BOUNDS_FILE)
    if data.transition is not None:
        classes = len(data.transition)
        names = data.classes if len(data.classes) == classes else [str(i) for i in range(classes)]
        if save_heat_map(np.array(data.transition), names, folder / TRANSITION_FILE):
            drawn.append(TRANSITION_FILE)
    for name in {LAYERS_FILE, BOUNDS_FILE, TRANSITION_FILE}.difference(drawn):
        (folder / name).unlink(missing_ok=True)
    return tuple(drawn)

"""Pictures as small files, on a light ground of their own, so that they read on light and dark pages alike."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

GROUND = "#f7f7f5"
# Okabe & Ito 2008, told apart with any colour vision; shapes differ, too.
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#5f5f5f"
NAMES = 26
"""Names that fit below an axis."""
COLOURS = 256
"""Of a picture: a third of the bytes."""


def new_figure(width: float, height: float, purpose: str) -> Figure | None:
    """A figure in inches; None (and a logged note) without matplotlib.

    Args:
        purpose: what is not drawn then.
    """
    try:
        # Figure itself, not pyplot: no backend is chosen and no state kept.
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("%s is not drawn, as matplotlib is missing: pip install 'hf-robust-ft[recipes]'", purpose)
        return None
    return Figure(figsize=(width, height), layout="constrained", facecolor=GROUND)


def save_small(figure: Figure, path: str | Path, dpi: int) -> None:
    """Write an opaque PNG with a palette."""
    from PIL import Image  # matplotlib needs it, so it is there

    written = io.BytesIO()
    figure.savefig(written, dpi=dpi, format="png")
    picture: Any = Image.open(written).convert("RGB")
    # Maximum coverage keeps the few dots of a rare colour; a median cut would mix them with the lines.
    picture = picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    with written_whole(Path(path)) as temporary:
        picture.save(temporary, format="PNG", optimize=True)


def tidy(axes: Any) -> None:
    """Ground, grid and frame as all pictures have them."""
    axes.set_facecolor(GROUND)
    axes.grid(axis="both", color="#e2e2de", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def block_ticks(panels: Sequence[Any], blocks: Sequence[str]) -> None:
    """Lines between the blocks of layers, and their names below the last panel.

    Args:
        blocks: of the layers at 0, 1, …
    """
    starts: dict[str, int] = {}
    for i, block in enumerate(blocks):
        starts.setdefault(block, i)
    shown = list(starts.items())[:: -(-len(starts) // NAMES)]
    panels[-1].set_xticks([i for _, i in shown], [_tail(name) for name, _ in shown], rotation=90, fontsize=7.5)
    for axes in panels:
        for start in list(starts.values())[1:]:
            axes.axvline(start - 0.5, color="#d5d5d0", linewidth=0.6, zorder=0)


def plain_text(name: str) -> str:
    """What matplotlib would take for a formula is text."""
    return " ".join(name.split()).replace("$", r"\$")


def power(where: float) -> str:
    """A number from its decimal logarithm."""
    return f"{10**where:.3g}" if abs(where) < 4 else f"$10^{{{where:.1f}}}$"


def _tail(name: str) -> str:
    parts = name.split(".")
    return plain_text(".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1])

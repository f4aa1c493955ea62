"""Pictures as small files, on a light ground of their own, so that they read on light and dark pages alike."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

GROUND = "#f7f7f5"
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

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    written = io.BytesIO()
    figure.savefig(written, dpi=dpi, format="png")
    picture: Any = Image.open(written).convert("RGB")
    # Maximum coverage keeps the few dots of a rare colour; a median cut would mix them with the lines.
    picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        path, format="PNG", optimize=True
    )

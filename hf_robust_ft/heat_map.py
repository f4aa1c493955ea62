"""A picture of a transition matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .figures import new_figure, save_small
from .noise import Matrix

# Numbers in cells, and a name at every row, stay legible up to here.
LEGIBLE_CLASSES = 20
NAME_LENGTH = 16


def save_heat_map(transition: Matrix, classes: Sequence[str], path: str | Path) -> bool:
    """Draw T as a PNG, rows the true class; False (and a logged note) without matplotlib.

    Args:
        transition: T, [K, K].
        classes: K names.
        path: of the picture.
    """
    num_classes = len(transition)
    side = 2.2 + 0.5 * min(num_classes, LEGIBLE_CLASSES)
    figure = new_figure(side + 0.8, side, str(path))
    if figure is None:
        return False
    axes = figure.subplots()
    image = axes.imshow(transition, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, label="P(noisy label | true label)")
    axes.set(xlabel="noisy label", ylabel="true label")
    if num_classes <= LEGIBLE_CLASSES:
        names = [name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…" for name in map(str, classes)]
        names = [" ".join(name.split()).replace("$", r"\$") for name in names]  # no formula, no second line
        axes.set_xticks(range(num_classes), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(num_classes), names)
        for i, row in enumerate(transition):
            for j, value in enumerate(row):
                if value >= 0.005:
                    colour = "white" if value > 0.5 else "black"
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    save_small(figure, path, dpi=120)
    return True

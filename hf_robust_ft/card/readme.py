"""The card beside a README of someone else's: a section between two comments, and not a byte elsewhere."""

from __future__ import annotations

from pathlib import Path

from ..curvature import HessianReport
from ..estimation import TransitionEstimate
from ..files import inside, written_whole
from .data import CardData
from .write import MARK, README, render_body, write_card, write_parts

BEGIN = b"<!-- hf_robust_ft: begin. What stands from here to the end mark is written anew by each measurement. -->"
END = b"<!-- hf_robust_ft: end -->"


def add_card(
    folder: str | Path,
    data: CardData,
    report: HessianReport | None = None,
    estimate: TransitionEstimate | None = None,
) -> bool:
    """As :func:`~hf_robust_ft.write_card`; of a README that this package did not write, only a section is touched.

    Returns:
        Whether the README is this package's own.

    Raises:
        ValueError: a README whose marks don't form one section; nothing is written then.
    """
    readme = Path(folder) / README
    if (before := foreign_readme(folder)) is None:
        write_card(folder, data, report, estimate)
        return True
    plots = write_parts(folder, data, report, estimate)
    section = render_body(data, report, estimate, plots=plots, own=False)
    with written_whole(readme) as temporary:
        temporary.write_bytes(with_section(before, section.encode(), str(readme)))
    return False


def foreign_readme(folder: str | Path) -> bytes | None:
    """A README that this package did not write; None where there is none.

    Raises:
        ValueError: its marks don't form one section, or it is a link out of the folder.
    """
    readme = inside(folder, README)
    if not readme.is_file():
        return None
    content = readme.read_bytes()
    if MARK.encode() in content:
        return None
    with_section(content, b"", str(readme))
    return content


def with_section(readme: bytes, section: bytes, name: str) -> bytes:
    """The README with the section in the place of an earlier one, or at its end.

    Args:
        name: of the README, for messages.

    Raises:
        ValueError: one mark without the other, several, or in the wrong order.
    """
    block = b"\n".join((BEGIN, b"", section, b"", END))
    begins, ends = readme.count(BEGIN), readme.count(END)
    first, last = readme.find(BEGIN), readme.find(END)
    if (begins, ends) == (0, 0):
        gap = b"" if not readme else b"\n" if readme.endswith(b"\n") else b"\n\n"
        return readme + gap + block + b"\n"
    if (begins, ends) != (1, 1) or last < first:
        raise ValueError(
            f"{name} has {begins} marks '{BEGIN.decode()[:26]}…' and {ends} marks '{END.decode()}', which should be "
            "one of each, in this order; remove them, and the section is put at the end"
        )
    return readme[:first] + block + readme[last + len(END) :]

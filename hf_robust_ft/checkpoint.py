"""What a checkpoint must know to be resumed: which reference it was trained around, with which radii."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .files import written_whole
from .reference import ReferenceMismatch
from .stored import Size, checked_fields, read_json

RECORD_FILE = "_constraints.json"
STATE_FILE = "trainer_state.json"


@dataclass(frozen=True)
class ConstraintRecord:
    """Written into every checkpoint of a run whose weights are held by balls or by a penalty."""

    reference_sha256: str
    radius_norm: str
    radii: dict[str, Size]
    fresh: list[str]
    """Names of the layers that had no pretrained weights."""

    def save(self, checkpoint: str | Path) -> None:
        """Write ``_constraints.json``; a reader never sees half of it."""
        with written_whole(Path(checkpoint) / RECORD_FILE) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @classmethod
    def load(cls, checkpoint: str | Path) -> ConstraintRecord:
        """Read ``_constraints.json`` of a checkpoint.

        Raises:
            ReferenceMismatch: there is none, or it is not what :meth:`save` writes.
        """
        path = Path(checkpoint) / RECORD_FILE
        try:
            return cls(**checked_fields(cls, read_json(path)))
        except FileNotFoundError:
            raise ReferenceMismatch(
                f"{path} is missing: this checkpoint was trained without layer_radius, so its centres are not known. "
                "Resume with layer_radius=None and l2sp_penalty=0, or start a new run from the pretrained weights"
            ) from None
        except ValueError as error:
            raise ReferenceMismatch(f"{path} is damaged ({error}): resume from another checkpoint") from None


def last_complete_checkpoint(run_folder: str | Path) -> str | None:
    """The newest checkpoint that was written to its end; None if there is none.

    The Trainer writes ``trainer_state.json`` last. A run killed while saving leaves a folder without
    it, or with half of it, and that folder can't be resumed from.
    """
    complete: dict[int, str] = {}
    for folder in Path(run_folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.rpartition("-")[2]
        if step.isdigit() and _is_complete(folder):
            complete[int(step)] = str(folder)
    return complete[max(complete)] if complete else None


def _is_complete(checkpoint: Path) -> bool:
    try:
        TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    except (OSError, ValueError, TypeError, RecursionError):  # also JSON that is nested too deeply
        return False
    return True

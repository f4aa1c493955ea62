"""Which checkpoints can be resumed from, and what they must know: around which reference, with which radii."""

from __future__ import annotations

import contextlib
import json
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
from safetensors import SafetensorError
from torch import nn
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .files import sync, sync_tree, written_whole
from .reference import ReferenceMismatch
from .stored import Size, checked_fields, read_json

RECORD_FILE = "_constraints.json"
STATE_FILE = "trainer_state.json"
WEIGHTS_FILE = "model.safetensors"
UNFINISHED_FILE = "_unfinished"
FILES_FILE = "_files.json"
"""The sizes of a checkpoint's files, without which Trainer would go on with a new optimizer and say nothing."""
RESUMED_FROM = (".safetensors", ".bin", ".pt", ".pth")
SHARD = ".distcp"  # of torch.distributed.checkpoint, which FSDP2 writes
# model.safetensors, adapter_model.bin, mp_rank_00_model_states.pt, …, but not tokenizer.model.
ANY_WEIGHTS = "*model[-_.]*"


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

    ``trainer_state.json`` comes last, once all else is on the disk (:func:`saved_last`). A run killed while saving
    leaves a folder without it, and that folder can't be resumed from. ``Trainer`` itself may leave half of it. Nor does
    a checkpoint count of which files are missing or cut off, as while it is deleted or copied.
    """
    complete: dict[int, str] = {}
    for folder in Path(run_folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.rpartition("-")[2]
        if step.isdigit() and is_complete(folder):
            complete[int(step)] = str(folder)
    return complete[max(complete)] if complete else None


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has its state, and each file that was written with it in its length."""
    try:
        TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        if (checkpoint / FILES_FILE).is_file():
            sizes = json.loads((checkpoint / FILES_FILE).read_text(encoding="utf-8"))
            return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return False
    # Written by Trainer, which keeps no record.
    files = [path for path in checkpoint.rglob("*") if path.suffix in RESUMED_FROM]
    return any(checkpoint.rglob(ANY_WEIGHTS)) and not any(map(_cut_off, files))


def _cut_off(path: Path) -> bool:
    """Of a file of safetensors or of torch.save."""
    try:
        if path.suffix != ".safetensors":
            return not zipfile.is_zipfile(path)  # its directory stands at the end
        with safetensors.safe_open(path, framework="pt"):  # compares the length with what the header says
            return False
    except (OSError, SafetensorError):
        return True


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint or what is left of one. Its state goes first, so that it is never taken for whole."""
    (checkpoint / STATE_FILE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def discard_unfinished(run_folder: Path) -> None:
    """Remove the checkpoints that a run was killed while saving, by the mark of :func:`saved_last`.

    ``Trainer`` would count them for ``save_total_limit``, and might keep one in the place of a whole one.
    """
    for mark in run_folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{UNFINISHED_FILE}"):
        discard(mark.parent)


@contextlib.contextmanager
def saved_last(state: TrainerState, checkpoint: Path, writes: bool) -> Iterator[None]:
    """While a checkpoint is saved: its state is written as a whole, after all else in it is on the disk.

    ``Trainer`` deletes older checkpoints right after it wrote the state, so that waiting any longer would be too late.
    """

    def save_to_json(json_path: str) -> None:
        files = [path for path in sorted(checkpoint.rglob("*")) if path.suffix in (*RESUMED_FROM, SHARD)]
        sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
        with written_whole(checkpoint / FILES_FILE) as temporary:
            temporary.write_text(json.dumps(sizes, indent=1), encoding="utf-8")
        (checkpoint / UNFINISHED_FILE).unlink()
        sync_tree(checkpoint)
        with written_whole(Path(json_path)) as temporary:
            type(state).save_to_json(state, str(temporary))
        sync(checkpoint.parent)

    if writes:
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / UNFINISHED_FILE).touch()
    vars(state)["save_to_json"] = save_to_json
    try:
        yield
    finally:
        del vars(state)["save_to_json"]


def check_fits(checkpoint: Path, model: nn.Module) -> None:
    """Refuse the checkpoint of another model before any of its weights are loaded; ``Trainer`` loads what fits.

    Raises:
        ValueError: its weights have other names or shapes than those of the model, or can't be read.
    """
    path = checkpoint / WEIGHTS_FILE
    if not path.is_file():
        return  # shards, adapters and other formats: what loads them checks them
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} can't be read ({error}): resume from another checkpoint") from None
    state = model.state_dict()
    # Of weights that share their storage one is saved.
    there = {state[name].data_ptr() for name in saved if name in state}
    # What wraps a module for activation checkpointing takes its own name out of the state's.
    parameters = {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in model.named_parameters()}
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    # Not of buffers: one may grow with the data, and its own model knows how to load it.
    misshapen = [name for name, p in parameters.items() if name in saved and saved[name] != tuple(p.shape)]
    lacking = [name for name in state if name in trained - saved.keys() and state[name].data_ptr() not in there]
    unknown = [name for name in saved if name.endswith("weight") and name not in state]
    problems = [
        *(f"{name} has shape {saved[name]} there, {tuple(state[name].shape)} here" for name in misshapen),
        *(f"it lacks {name}" for name in lacking),
        *(f"the model has no {name}" for name in unknown),
    ]
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ValueError(
            f"{path} is of another model than this {type(model).__name__}: {problems[0]}{more}. Give the checkpoint of "
            "a run of this model, or the model that the checkpoint's run began with"
        )

"""Pushing to the Hub, during training, at its end and when asked."""

from __future__ import annotations

import functools
import logging
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers.trainer_utils import HubStrategy, SaveStrategy

from ..files import leads_out
from ..hub import (
    MESSAGE,
    PushFailed,
    check_repo_id,
    commit_files,
    explained,
    open_repository,
    public_files,
    retry_command,
    saved_in,
)
from ..redaction import redacted
from .card import CardTrainer

logger = logging.getLogger(__name__)

# It holds the access token.
ARGUMENTS_FILE = "training_args.bin"


class PushingTrainer(CardTrainer):
    """Pushes model, processor, card and reports; see :class:`~hf_robust_ft.HessianRegularizedTrainer`."""

    hub_model_id: str | None  # type: ignore[assignment]  # None in Trainer's eyes
    _pushing: Future[CommitInfo] | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As ``Trainer.init_hf_repo``; also asks whether the token may write there.

        Raises:
            ValueError: ``hub_model_id``, or the name of the output folder in its place, is no name of a repository.
            PushFailed: the Hub can't be reached, or does not let this token write there.
        """
        later = "train with push_to_hub=False, and push later with trainer.push_to_hub()"
        self._open_repository(
            f"Nothing has been trained yet. Put it right, or {later}",
            token=self.args.hub_token if token is None else token,
            private=self.args.hub_private_repo if private is None else private,
            revision=self.args.hub_revision,
        )

    def push_to_hub(
        self,
        commit_message: str | None = MESSAGE,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model and write its card, then push model, processor, card, reports and pictures in one commit.

        Args:
            commit_message: the first line of the commit.
            blocking: False returns a ``Future`` of the commit at once.
            token: of access; default: ``hub_token``, or that of ``hf auth login`` or ``HF_TOKEN``.
            revision: a branch that exists; default: ``hub_revision``, or the main one.
            private: of a repository that has to be made; default: ``hub_private_repo``.
            kwargs: for :meth:`create_model_card`.

        Returns:
            ``huggingface_hub.CommitInfo``; None on processes other than the first.

        Raises:
            ValueError: the name of the repository is none, or a file that would be pushed holds the token.
            PushFailed: the Hub did not take it. All is saved by then, and the message has the command that tries again.
        """
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        # On all processes, and before anything is asked of the Hub.
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = [kwargs["tags"]] if isinstance(kwargs.get("tags"), str) else list(kwargs.get("tags") or ())
        own = getattr(self.model, "model_tags", None) or ()
        model_name = kwargs.pop("model_name", None) or self._repo_name().rpartition("/")[2]
        self.create_model_card(
            model_name=model_name, **{**kwargs, "tags": [*tags, *(tag for tag in own if tag not in tags)]}
        )
        self._finish_current_push()

        token = args.hub_token if token is None else token
        revision = args.hub_revision if revision is None else revision
        private = args.hub_private_repo if private is None else private
        command = retry_command(self._folder, self._repo_name(), revision=revision, private=private)
        remedy = saved_in(self._folder, command)
        if self.hub_model_id is None:
            self._open_repository(remedy, token=token, private=private, revision=revision)
        files = public_files(self._folder, token=token)
        push = functools.partial(
            self._push, files, remedy, token=token, revision=revision, message=commit_message or MESSAGE
        )
        return push() if blocking else self._in_background(push)

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _repo_name(self) -> str:
        return str(self.hub_model_id or self.args.hub_model_id or self._folder.absolute().name)

    def _open_repository(self, remedy: str, *, token: str | None, **settings: Any) -> None:
        repo_id = self._repo_name()
        # On all processes, as it asks nobody.
        check_repo_id(repo_id, "hub_model_id" if self.args.hub_model_id else "output_dir, in place of hub_model_id,")
        if self.is_world_process_zero():
            self.hub_model_id = explained(
                lambda: open_repository(repo_id, token=token, **settings), repo_id, remedy, token=token
            )

    def _push(self, files: Mapping[str, Path], remedy: str, *, token: str | None, **settings: Any) -> CommitInfo:
        repo_id = self._repo_name()
        return explained(lambda: commit_files(repo_id, files, token=token, **settings), repo_id, remedy, token=token)

    def _push_trained(self) -> None:
        """After training and measuring. A push that fails does not take the result of the training away."""
        try:
            self.push_to_hub()
        except PushFailed as error:
            logger.error("%s", error)
        except (Exception, KeyboardInterrupt) as error:  # any at all: the training is worth more
            said = f"{type(error).__name__}: {redacted(str(error), self.args.hub_token or '')}"
            logger.error("The model was not pushed: %s. Push it with trainer.push_to_hub()", said)
            if isinstance(error, KeyboardInterrupt):
                raise

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As ``hub_strategy`` says, weights and processor in the background, without a card: nothing is measured yet.

        One commit, where ``Trainer`` makes two with a strategy that pushes checkpoints.
        """
        args, busy = self.args, self._pushing is not None and not self._pushing.done()
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        checkpoint = Path(checkpoint_folder)
        # Checkpoints may be deleted, and the output folder written to, before all is uploaded.
        kept = Path(tempfile.mkdtemp(prefix="_push-", dir=self._folder))
        try:
            files = public_files(checkpoint, card=False, token=args.hub_token)
            if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                under = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
                inside = (path for path in sorted(checkpoint.rglob("*")) if not leads_out(path, checkpoint))
                states = (path for path in inside if path.is_file())
                files |= {
                    f"{under}/{path.relative_to(checkpoint).as_posix()}": path
                    for path in states
                    if path.name != ARGUMENTS_FILE
                }
            files = {name: _kept(path, kept / name) for name, path in files.items()}
        except (OSError, ValueError) as error:
            shutil.rmtree(kept)
            logger.error("%s is not pushed: %s", checkpoint, error)
            return
        by_steps = args.save_strategy == SaveStrategy.STEPS
        at = f"step {self.state.global_step}" if by_steps else f"epoch {int(self.state.epoch or 0)}"
        pushing = self._in_background(
            functools.partial(
                self._push,
                files,
                "The training goes on; the next checkpoint and the end of training push again",
                token=args.hub_token,
                revision=args.hub_revision,
                message=f"Training in progress, {at}",
            )
        )
        pushing.add_done_callback(lambda _: shutil.rmtree(kept, ignore_errors=True))

    @functools.cached_property
    def _one_at_a_time(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")

    def _in_background(self, push: Any) -> Future[CommitInfo]:
        self._pushing = self._one_at_a_time.submit(push)
        self._pushing.add_done_callback(_log_failure)
        return self._pushing

    def _finish_current_push(self) -> None:
        """Wait for what is pushed in the background."""
        if self._pushing is not None and not self._pushing.done():
            logger.info("Waiting until the last push is through")
            wait([self._pushing])


def _kept(path: Path, there: Path) -> Path:
    """A second name for a file that nothing writes to any more; a copy where the file system has no second names."""
    there.parent.mkdir(parents=True, exist_ok=True)
    try:
        there.hardlink_to(path)
    except OSError:
        shutil.copy(path, there)
    return there


def _log_failure(future: Future[CommitInfo]) -> None:
    error = None if future.cancelled() else future.exception()
    if error is not None:
        logger.error("%s", error)

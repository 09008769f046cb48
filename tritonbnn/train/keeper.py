"""When a stage's state is saved, and how it is found again."""

import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from tritonbnn.cli import UserError
from tritonbnn.data.classes import odd_class, other_order
from tritonbnn.distributed import World
from tritonbnn.files import make_folder, write_atomically
from tritonbnn.optim import optimizer_state
from tritonbnn.stop import Stopped, StopSignals
from tritonbnn.train.checkpoint import (
    BEST,
    LAST,
    PREVIOUS,
    Checkpoint,
    DamagedError,
    State,
    encode,
    read,
)
from tritonbnn.train.engine import FirstBad
from tritonbnn.train.weights import check_same_network

logger = logging.getLogger(__name__)

T = TypeVar("T")


def read_latest(folder: Path) -> Checkpoint | None:
    """The last checkpoint of a stage, or the one before where the last is damaged or missing.

    Returns:
        None where the stage has not been saved yet.

    Raises:
        UserError: all that there is, is damaged; or the last one may not be read, or is of a newer
            version. That is no damage: the state is there, and going on without it would lose it.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    if not last.exists():
        return read(previous) if previous.exists() else None
    try:
        return read(last)
    except DamagedError as error:
        if not previous.exists():
            raise UserError(
                f"{error.args[0]}, or start over with --fresh; there is none before it"
            ) from error
        logger.warning("%s is damaged: going on from the one before, %s", last, previous.name)
        return read(previous)


def other_data(checkpoint: Checkpoint, identity: dict[str, Any]) -> dict[str, str]:
    """What of the data is not as a checkpoint was trained on, in words, for each split.

    Args:
        checkpoint: of a run.
        identity: what a checkpoint made now would say, see :class:`Keeper`.

    Raises:
        UserError: the classes are others, or in another order.
    """
    path, facts = checkpoint.path, checkpoint.facts
    names, now = facts.get("data", {}).get("classes"), identity["data"]["classes"]
    if names is not None:
        odd = odd_class(now, names, "the data", "the checkpoint") or other_order(now, names)
        if odd:
            raise UserError(
                f"the data have other classes than {path}: they differ in {odd}: give the data that"
                " it was trained on, or start over with --fresh"
            )
    if "images" not in facts:
        logger.info("%s does not say which images it has seen: these are taken for the same", path)
        return {}
    changes = {}
    for split, before in facts["images"].items():
        after = identity["images"][split]
        if after["images"] != before["images"]:
            changes[split] = f"{split} has {after['images']} images after {before['images']}"
        elif after != before:
            changes[split] = f"{split} has other images, {after['images']} as before"
    return changes


class Keeper:
    """Saves a stage's state in its folder: at intervals, on a signal, at the end of an epoch.

    All processes must call its methods together; the leading one writes.

    Args:
        folder: of the stage.
        state: what to save.
        identity: facts that tell what the network and its data are; they go into every file.
        bad: where the first bad loss is noted. A bad state is never saved.
        world: the processes of the job.
        signals: requests to stop.
        save_minutes: between checkpoints within an epoch.
        log_interval: optimiser steps between looks at the loss.
    """

    def __init__(
        self,
        folder: Path,
        state: State,
        identity: dict[str, Any],
        bad: FirstBad,
        *,
        world: World,
        signals: StopSignals,
        save_minutes: float,
        log_interval: int,
    ) -> None:
        self.folder, self.state, self.identity = folder, state, identity
        self.bad, self._world, self._signals = bad, world, signals
        self._save_seconds, self._log_interval = 60 * save_minutes, log_interval
        self._saved_at = time.monotonic()
        self._optimizer_is_checked = False
        world.lead(lambda: make_folder(folder))

    def resume(self, epochs: int) -> Checkpoint | None:
        """Take up the state that was saved, if one was.

        An epoch that was begun with other images begins anew: its order is one of their numbers.

        Args:
            epochs: of the stage.
        """
        checkpoint = read_latest(self.folder)
        if checkpoint is None:
            return None
        changes = other_data(checkpoint, self.identity)
        check_same_network(checkpoint, self.identity["network"])
        try:
            self.state.restore(checkpoint, self._world)
        except KeyError as error:
            raise UserError(
                f"{checkpoint.path} holds no state to go on from ({error} is missing):"
                " start over with --fresh, or from its weights with --init-from"
            ) from error
        if changes and self.state.epoch < epochs:
            self._begin_epoch_anew(changes)
        before = checkpoint.facts["world_size"]
        if before != self._world.size and self._world.leads:
            logger.warning(
                "going on with %d processes after %d: gradients stay the mean over the batch,"
                " but BatchNorm now sees other shares of it",
                self._world.size,
                before,
            )
        return checkpoint

    def _begin_epoch_anew(self, changes: dict[str, str]) -> None:
        state = self.state
        told = "; ".join(changes.values())
        logger.warning(
            "%s: the data have changed: %s; epoch %d begins anew",
            *(state.stage, told, state.epoch + 1),
        )
        state.begin_epoch(state.epoch)
        if "val" in changes:  # what was best on others is compared with nothing
            state.best = None

    def after_step(self) -> None:
        """Look at the loss, save, or stop, as the time has come."""
        if not self._optimizer_is_checked:  # the first save may be hours away
            optimizer_state(self.state.model, self.state.optimizer)
            self._optimizer_is_checked = True
        due = self._world.leads and time.monotonic() - self._saved_at >= self._save_seconds
        number, save = self._world.agree(self._signals.number, int(due))
        if number:
            self._stop(number)
        if save:
            self.save()
        elif self.state.batch % self._log_interval == 0:
            self.check_loss()

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """``batches``, broken off by a request to stop, or where one of them cannot be had.

        Before either the state is saved. Processes may have unequal numbers of batches.
        """
        iterator = iter(batches)
        while True:
            batch, error = None, None
            try:
                batch = next(iterator, None)
            except Exception as caught:
                error = caught
            facts = (self._signals.number, int(error is not None), int(batch is not None))
            number, failed, more = self._world.agree(*facts)
            if failed:
                self._leave_whole(error)
            if number:
                self._stop(number)
            if batch is not None:
                yield batch
            if not more:
                return

    def _leave_whole(self, error: Exception | None) -> NoReturn:
        """End because of an error that has left the state as it was after the last step."""
        self.save()
        logger.info(
            "%s: saved after %d optimiser steps of epoch %d",
            *(self.state.stage, self.state.batch, self.state.epoch + 1),
        )
        if error is None:
            raise UserError("another process has no images to go on with: see what it says")
        raise error

    def _stop(self, number: int) -> None:
        self.save()
        raise Stopped(number)

    def save(self) -> None:
        """Write the state as the last checkpoint, and keep the one before."""
        self._check_state()
        tensors, facts = self.state.tensors(self._world), self.state.facts(self._world)
        last = self.folder / LAST
        self._world.lead(
            lambda: write_atomically(
                last, encode(tensors, {**self.identity, **facts}), keep=self.folder / PREVIOUS
            )
        )
        self._saved_at = time.monotonic()

    def save_best(self) -> None:
        """Write the weights alone as the best ones."""
        self._check_state()
        weights = self.state.method.weights(self.state.model)
        tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
        facts = {**self.identity, "stage": self.state.stage, "best": self.state.best}
        self._world.lead(lambda: write_atomically(self.folder / BEST, encode(tensors, facts)))

    def check_loss(self) -> None:
        """Stop the run if a loss was not finite."""
        index = self.bad.read()
        [worst] = self._world.agree(-1 if index is None else index)
        if worst >= 0:
            self._give_up(f"the loss is not finite at optimiser step {worst + 1}")

    def _check_state(self) -> None:
        """The last update may have spoilt what no loss has seen yet."""
        self.check_loss()
        values = [t for t in self.state.model.state_dict().values() if t.is_floating_point()]
        good = torch.stack([torch.isfinite(t).all() for t in values]).all()
        [spoilt] = self._world.agree(int(not good))
        if spoilt:
            self._give_up(f"a weight is not finite after optimiser step {self.state.batch}")

    def _give_up(self, what: str) -> None:
        last = self.folder / LAST
        state = self.state
        remedy = "give a smaller --lr (with --fresh)"
        if self._world.leads and last.exists():
            remedy += f"; the last good checkpoint is {last}"
        lr = state.optimizer.param_groups[0]["lr"]
        raise UserError(
            f"{state.stage}: {what} of epoch {state.epoch + 1}, learning rate {lr:g}: {remedy}"
        )

"""A run from its beginning to its end: its processes, its images, its stages."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tritonbnn import cli, distributed
from tritonbnn.cli import UserError
from tritonbnn.compute import Compute, choose_device, keep_freed_memory
from tritonbnn.data.batches import check_fits_memory, check_shared_memory
from tritonbnn.data.classes import warn_of_numbers
from tritonbnn.data.sources import Source, open_source
from tritonbnn.distributed import World
from tritonbnn.stop import Stopped, StopSignals
from tritonbnn.train.captured import check_capture
from tritonbnn.train.checkpoint import BEST, stage_folder
from tritonbnn.train.config import OF_A_PROCESS, SCRATCH, Config, data_settings, flat
from tritonbnn.train.log import Line
from tritonbnn.train.recipe import read_recipe, resolve
from tritonbnn.train.run_folder import RunFolder, versions
from tritonbnn.train.stage import Run, train_stage

logger = logging.getLogger(__name__)

_training = threading.Lock()  # held by the run of this process


@dataclass(frozen=True)
class Trained:
    """What a run has come to.

    Attributes:
        config: of the run.
        folder: of the run.
        history: a log line for each epoch of all stages.
        classes: their names.
        leads: whether this process is the one that talks.
    """

    config: Config
    folder: Path
    history: list[Line]
    classes: tuple[str, ...]
    leads: bool

    @property
    def best(self) -> Path:
        """The file with the best weights of the last stage that was trained."""
        return stage_folder(self.folder, self.config.chosen[-1].name) / BEST


def configure(recipe: str = "digits", **settings: Any) -> Config:
    """A configuration, as the command line makes one.

    Args:
        recipe: one of those that are shipped, or a TOML file.
        settings: keys of a recipe, such as ``epochs=3`` or ``optimizer="sgd"``. A stage's name
            takes a dict of keys for that stage alone: ``step1={"lr": 1e-3}``.

    Raises:
        UserError: an unknown recipe or key, or a value that cannot be.
    """
    layer = read_recipe(recipe)
    names = [table.get("name") for table in layer.get("stage", ()) if isinstance(table, dict)]
    own = {key: value for key, value in settings.items() if key in names}
    rest = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items() if k not in own}
    return resolve(layer, {**rest, "own": own})


def run(config: Config, out: Path | str | None = None, *, fresh: bool = False) -> Trained:
    """Train, or go on training: what ``python -m tritonbnn.train`` does, for notebooks and scripts.

    A signal that asks to stop is obeyed after the optimiser step, and all is saved then. Whatever
    way this ends, handlers of signals are as they were before, and the folder is free for others.
    In another thread than the main one no signals are heard.

    Args:
        config: from :func:`configure`.
        out: the run's folder; None for ``runs/RECIPE``.
        fresh: start over in a new folder beside ``out``.

    Raises:
        UserError: a mistake of the user, in one line.
        KeyboardInterrupt: SIGINT, which is a notebook's interrupt. All is saved.
        Stopped: another signal. All is saved.
    """
    try:
        return train(config, cli.path(str(out or default_folder(config))), fresh=fresh)
    except Stopped as stopped:
        if stopped.signal == signal.SIGINT:
            raise KeyboardInterrupt(str(stopped)) from None
        raise


def default_folder(config: Config) -> Path:
    """The folder of a run that names none."""
    return Path("runs") / config.recipe


def train(config: Config, out: Path, *, fresh: bool) -> Trained:
    """See :func:`run`; every signal raises :class:`Stopped`."""
    with _one_at_a_time(), StopSignals(patient=distributed.launched()) as signals:
        device = choose_device(config.device)
        if device.type == "cpu":
            keep_freed_memory()
        try:
            with signals.obeyed_at_once():
                world = distributed.join(device)
        except Stopped as stopped:
            logger.info("stopped by %s before all processes were there", stopped.signal.name)
            raise
        if config.graph:
            check_capture(config, device, world.size)
        held: RunFolder | None = world.lead(
            lambda: RunFolder(out, config, fresh=fresh, device=device)
        )
        try:
            folder = world.share(held.path if held else out)
            trained = _train_in(folder, config, device, world, signals)
        finally:
            if held:
                held.release()
        distributed.leave()
    return trained


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Refuse a second run in another thread.

    Both would draw their weights from torch's one generator, and the lock of a run's folder is a
    process's: it does not keep two threads apart.
    """
    if not _training.acquire(blocking=False):
        raise UserError(
            "another run is training in this process: wait for its end, or give each run a process"
        )
    try:
        yield
    finally:
        _training.release()


def _train_in(
    folder: Path, config: Config, device: torch.device, world: World, signals: StopSignals
) -> Trained:
    if not world.leads:  # it would say the same of the same files
        logging.getLogger("tritonbnn").setLevel(logging.ERROR)
    logger.info("%s on %s, in %s", config.recipe, device, folder)
    history: list[Line] = []
    try:
        with signals.obeyed_at_once():  # a large tree takes minutes
            source, images = world.everywhere("open", lambda: _open(config, device))
            world.compare(_facts(config, source, images))
        compute = Compute(
            device,
            config.precision,
            config.channels_last,
            config.compile,
            source.train.normalisation,
        )
        this = Run(config, source, images, folder, compute, world, signals)
        for stage in config.chosen:
            history = train_stage(stage, this)
    except Stopped as stopped:
        logger.info(
            "stopped by %s; all is saved in %s: run the same command again to go on",
            *(stopped.signal.name, folder),
        )
        raise
    return Trained(config, folder, history, source.classes, world.leads)


def _open(config: Config, device: torch.device) -> tuple[Source, dict[str, Any]]:
    source = open_images(config)
    on_gpu = device.type == "cuda"
    check_shared_memory(source, config.batch_size, config.workers, levels=on_gpu)
    return source, source.identity()


def _facts(config: Config, source: Source, images: dict[str, Any]) -> dict[str, Any]:
    """What all processes of a job must have in common."""
    shared = {key: value for key, value in flat(config).items() if key not in OF_A_PROCESS}
    named = {"train": "training", "val": "validation"}
    counts = {f"number of {named[k]} images": v["images"] for k, v in images.items()}
    digests = {f"digest of the {named[k]} images": v["digest"] for k, v in images.items()}
    return {**shared, **versions(), "class": list(source.classes), **counts, **digests}


def open_images(config: Config) -> Source:
    """The run's data set; all stages use it."""
    source = open_source(
        config.dataset,
        image_size=config.image_size,
        augment=config.augment,
        lighting=config.lighting,
        seed=config.seed,
        step=config.number(config.chosen[0]),
        **data_settings(config),
    )
    check_fits_memory(source, config.batch_size)
    if _takes_weights(config):
        warn_of_numbers(source.classes)
    source.load()
    return source


def _takes_weights(config: Config) -> bool:
    """Whether weights from elsewhere bring an order of classes with them."""
    starts = [stage.start for stage in config.chosen if stage.start not in config.names]
    teachers = [getattr(stage.method.settings, "teacher", "none") for stage in config.chosen]
    return config.init_from not in ("", SCRATCH) or any(starts) or set(teachers) != {"none"}

"""A run from its beginning to its end: its folder, its processes, its images, its stages."""

import dataclasses
import hashlib
import json
import logging
import platform
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torchvision

import tritonbnn
from tritonbnn import cli, distributed
from tritonbnn.cli import UserError
from tritonbnn.compute import Compute, choose_device, keep_freed_memory
from tritonbnn.data.batches import check_fits_memory, check_shared_memory
from tritonbnn.data.classes import warn_of_numbers
from tritonbnn.data.folder import SPLIT_NAMES
from tritonbnn.data.sources import Source, open_source
from tritonbnn.distributed import World
from tritonbnn.files import FolderLock, make_folder, remove_leftovers, update
from tritonbnn.meeting import attempt
from tritonbnn.methods import Stage
from tritonbnn.stop import Stopped, StopSignals
from tritonbnn.train.checkpoint import BEST, LAST, PREVIOUS, has_begun, history, stage_folder
from tritonbnn.train.config import (
    OF_A_PROCESS,
    SCRATCH,
    Config,
    data_settings,
    differences,
    flat,
    to_toml,
)
from tritonbnn.train.log import ANALYSIS, LOG, Line
from tritonbnn.train.recipe import read_recipe, resolve, stage_names
from tritonbnn.train.stage import Run, train_stage

CONFIG = "config.toml"
ENVIRONMENT = "environment.json"
_OF_A_RUN = (CONFIG, ENVIRONMENT, LOG)
_OF_A_STAGE = (LAST, PREVIOUS, BEST, ANALYSIS)
# Parts of the package that a run never sees.
_NO_PART_OF_A_RUN = ("compare", "deploy", "report")
_SOURCES = (".py", ".c", ".h", ".npz")

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
            source, images = world.everywhere("open", lambda: _open(config))
            world.compare(_facts(config, source, images))
        compute = Compute(device, config.precision, config.channels_last, config.compile)
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


def _open(config: Config) -> tuple[Source, dict[str, Any]]:
    source = open_images(config)
    return source, source.identity()


def _facts(config: Config, source: Source, images: dict[str, Any]) -> dict[str, Any]:
    """What all processes of a job must have in common."""
    shared = {key: value for key, value in flat(config).items() if key not in OF_A_PROCESS}
    named = {"train": "training", "val": "validation"}
    counts = {f"number of {named[k]} images": v["images"] for k, v in images.items()}
    digests = {f"digest of the {named[k]} images": v["digest"] for k, v in images.items()}
    return {**shared, **_versions(), "class": list(source.classes), **counts, **digests}


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
    check_shared_memory(source, config.batch_size, config.workers)
    if _takes_weights(config):
        warn_of_numbers(source.classes)
    source.load()
    return source


def _takes_weights(config: Config) -> bool:
    """Whether weights from elsewhere bring an order of classes with them."""
    starts = [stage.start for stage in config.chosen if stage.start not in config.names]
    teachers = [getattr(stage.method.settings, "teacher", "none") for stage in config.chosen]
    return config.init_from not in ("", SCRATCH) or any(starts) or set(teachers) != {"none"}


class RunFolder:
    """The folder of a run, held by this process.

    Args:
        out: where the user wants it.
        config: what is to be run.
        fresh: take a new folder beside ``out`` if it is in use by an earlier run.
        device: what it runs on, for the record.

    Attributes:
        path: the folder.

    Raises:
        UserError: it cannot be written, another process uses it, or it is of another run.
    """

    def __init__(self, out: Path, config: Config, *, fresh: bool, device: torch.device) -> None:
        self.path = numbered(out) if fresh else out
        check_outside_images(self.path, config)
        make_folder(self.path)
        self._lock = FolderLock(self.path)
        stages = [
            stage_folder(self.path, name) for name in {*config.names, *stage_names(self.path)}
        ]
        if any(has_begun(stage) for stage in stages):
            self._check_begun(config)
        else:
            self._check_ours()
        own = [self.path / name for name in _OF_A_RUN]
        remove_leftovers([*own, *(stage / name for stage in stages for name in _OF_A_STAGE)])
        # first of all files, because it tells that the others are a run's
        update(self.path / ENVIRONMENT, _environment(config, device).encode())
        # a path in it keeps its bytes, UTF-8 or not
        update(self.path / CONFIG, to_toml(config).encode(errors="surrogateescape"))

    def _check_ours(self) -> None:
        """What nobody but its owner has written stays, as a recipe of that name."""
        if (self.path / ENVIRONMENT).exists():
            return
        for name in (CONFIG, LOG):
            if (self.path / name).exists():
                raise UserError(
                    f"{self.path / name} is there already, and of no run: choose another --out"
                )

    def _check_begun(self, config: Config) -> None:
        """A run that has a checkpoint goes on with its own settings."""
        path = self.path / CONFIG
        if not path.exists():
            raise UserError(
                f"{self.path} holds checkpoints but no {CONFIG}: use --fresh, or another --out"
            )
        _check(resolve(read_recipe(str(path))), config, self.path)

    def release(self) -> None:
        """Let others use it."""
        self._lock.release()


@cache
def code_version() -> str:
    """What code a run is of: torch's version, and a hash of the sources that train.

    Two runs whose versions differ may differ for that alone.
    """
    root = Path(tritonbnn.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in _SOURCES):
        name = path.relative_to(root)
        if name.parts[0] not in _NO_PART_OF_A_RUN:
            digest.update(name.as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{digest.hexdigest()[:12]} with torch {torch.__version__}"


def check_outside_images(out: Path, config: Config) -> None:
    """Refuse a folder among the images: what a run writes there would be a class the next time.

    Raises:
        UserError: it is there.
    """
    if not config.data_dir:
        return
    splits = {name: cli.path(config.data_dir) / name for name in SPLIT_NAMES}
    around = (out.resolve(), *out.resolve().parents)
    for name, split in splits.items():
        if split.resolve() in around:
            raise UserError(
                f"{out} is in {name}/ of the data, where every folder is a class:"
                " choose another --out"
            )


def numbered(out: Path) -> Path:
    """The first of out, out-2, out-3, ... that does not exist.

    What torchrun restarts was fresh in its first attempt: it goes on in the last that does.
    """
    number, path, last = 1, out, out
    while path.exists() or path.is_symlink():
        number, last = number + 1, path
        path = out.with_name(f"{out.name}-{number}")
    return last if attempt() else path


def _check(before: Config, config: Config, path: Path) -> None:
    """Refuse other settings, and say what more epochs do to the learning rate."""
    changed = differences(before, config)
    if changed:
        raise UserError(
            f"{path} is a run with other settings: {'; '.join(changed)};"
            " repeat the old ones to go on, or start over with --fresh"
        )
    grown = [
        (old, new)
        for old, new in zip(before.stages, config.stages, strict=True)
        if old.epochs != new.epochs and has_begun(stage_folder(path, new.name))
    ]
    for old, new in grown:
        begun = [x for x in config.stages if x.start == new.name and has_begun(path / x.name)]
        if begun:
            raise UserError(_too_late(old, new, begun[0], path))
    for _, new in grown:
        logger.warning("%s", _jump(new, path))


def _too_late(old: Stage, new: Stage, later: Stage, path: Path) -> str:
    """Why a stage cannot have more epochs, and which one can."""
    done = len(history(stage_folder(path, later.name), later.name))
    longer = dataclasses.replace(later, epochs=max(later.epochs, new.epochs, done + 1))
    return (
        f"{path} is a run with other settings: {new.name}.epochs was {old.epochs} and is"
        f" {new.epochs}, but {later.name} has begun from its weights: give more epochs to"
        f" {later.name} alone, --{later.name}.epochs {longer.epochs} ({_jump(longer, path)}),"
        " or start over with --fresh"
    )


def _jump(stage: Stage, path: Path) -> str:
    """What the learning rate does where a stage goes on with more epochs than before."""
    lines = history(stage_folder(path, stage.name), stage.name)
    rate = stage.lr * stage.schedule.settings(len(lines), stage.epochs)
    told = f"{stage.name}, now of {stage.epochs} epochs, has the learning rate {rate:g}"
    before = f", after {lines[-1]['lr']:g} in the one before" if lines else ""
    return f"{told} in epoch {len(lines) + 1}{before}"


def _environment(config: Config, device: torch.device) -> str:
    """What a reader needs to repeat the run."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    facts = {
        "seed": config.seed,
        "device": str(device),
        "device_name": name or platform.machine(),
        "threads": torch.get_num_threads(),
        **_versions(),
        "code": code_version(),
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "config": dataclasses.asdict(config),
    }
    return json.dumps(facts, indent=2) + "\n"


def _versions() -> dict[str, str]:
    return {
        "tritonbnn": tritonbnn.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": sys.version.split()[0],
    }

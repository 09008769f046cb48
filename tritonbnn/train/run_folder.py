"""The folder of a run: who may use it, and what it says of its run."""

import dataclasses
import hashlib
import json
import logging
import platform
import sys
from functools import cache
from pathlib import Path

import torch
import torchvision

import tritonbnn
from tritonbnn import cli
from tritonbnn.cli import UserError
from tritonbnn.data.folder import SPLIT_NAMES
from tritonbnn.files import FolderLock, make_folder, remove_leftovers, update
from tritonbnn.meeting import attempt
from tritonbnn.methods import Stage
from tritonbnn.train.checkpoint import BEST, LAST, PREVIOUS, has_begun, history, stage_folder
from tritonbnn.train.config import Config, differences, to_toml
from tritonbnn.train.log import ANALYSIS, LOG
from tritonbnn.train.recipe import read_recipe, resolve, stage_names

CONFIG = "config.toml"
ENVIRONMENT = "environment.json"
_OF_A_RUN = (CONFIG, ENVIRONMENT, LOG)
_OF_A_STAGE = (LAST, PREVIOUS, BEST, ANALYSIS)
# Parts of the package that a run never sees.
_NO_PART_OF_A_RUN = ("compare", "deploy", "report")
_SOURCES = (".py", ".c", ".h", ".npz")

logger = logging.getLogger(__name__)


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
        **versions(),
        "code": code_version(),
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "config": dataclasses.asdict(config),
    }
    return json.dumps(facts, indent=2) + "\n"


def versions() -> dict[str, str]:
    """Of what a run's numbers hang on."""
    return {
        "tritonbnn": tritonbnn.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": sys.version.split()[0],
    }

"""A run's folder: created, numbered, locked, and checked against what it was begun with."""

import dataclasses
import hashlib
import json
import platform
import sys
from functools import cache
from pathlib import Path

import torch
import torchvision

import tritonbnn
from tritonbnn.cli import UserError
from tritonbnn.files import FolderLock, make_folder, remove_leftovers, update
from tritonbnn.meeting import attempt
from tritonbnn.train.checkpoint import has_begun
from tritonbnn.train.config import Config, differences, to_toml
from tritonbnn.train.recipe import read_recipe, resolve, stage_names

CONFIG = "config.toml"
ENVIRONMENT = "environment.json"
# Parts of the package that a run never sees.
_NO_PART_OF_A_RUN = ("compare", "deploy", "report")
_SOURCES = (".py", ".c", ".h", ".npz")


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
        make_folder(self.path)
        self._lock = FolderLock(self.path)
        remove_leftovers(self.path)
        self._check_begun(config)
        # a path in it keeps its bytes, UTF-8 or not
        update(self.path / CONFIG, to_toml(config).encode(errors="surrogateescape"))
        update(self.path / ENVIRONMENT, _environment(config, device).encode())

    def _check_begun(self, config: Config) -> None:
        """A run that has a checkpoint goes on with its own settings; before, nothing is lost."""
        names = {*config.names, *stage_names(self.path)}
        if not any(has_begun(stage_folder(self.path, name)) for name in names):
            return
        path = self.path / CONFIG
        if not path.exists():
            raise UserError(
                f"{self.path} holds checkpoints but no {CONFIG}: use --fresh, or another --out"
            )
        _check(resolve(read_recipe(str(path))), config, self.path)

    def release(self) -> None:
        """Let others use it."""
        self._lock.release()


def stage_folder(run: Path, name: str) -> Path:
    """Where a stage's checkpoints are."""
    return run / name


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
    changed = differences(before, config)
    if not changed:
        changed = [
            f"{old.name}.epochs was {old.epochs} and is {new.epochs}, but {later.name} has begun"
            for old, new in zip(before.stages, config.stages, strict=True)
            for later in config.stages
            if old.epochs != new.epochs
            and later.start == new.name
            and has_begun(stage_folder(path, later.name))
        ]
    if changed:
        raise UserError(
            f"{path} is a run with other settings: {'; '.join(changed)};"
            " repeat the old ones to go on, or start over with --fresh"
        )


def _environment(config: Config, device: torch.device) -> str:
    """What a reader needs to repeat the run."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    facts = {
        "seed": config.seed,
        "device": str(device),
        "device_name": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "tritonbnn": tritonbnn.__version__,
        "code": code_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "config": dataclasses.asdict(config),
    }
    return json.dumps(facts, indent=2) + "\n"

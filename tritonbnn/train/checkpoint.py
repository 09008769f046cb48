"""What is saved of a stage, and the file that it is saved in.

A checkpoint is one safetensors file, with its facts as JSON in the header. Reading one runs no
code. A checksum over the tensors finds damage that leaves the length alone.
"""

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tritonbnn.analysis import Recorder
from tritonbnn.cli import UserError
from tritonbnn.distributed import World
from tritonbnn.files import utf_8_name
from tritonbnn.methods import Method
from tritonbnn.methods.scores import TrainMeter
from tritonbnn.models.foreign import is_torch_file
from tritonbnn.optim import optimizer_state, restore_optimizer

# The files in a stage's folder: where to go on, where before that, and the best weights.
LAST = "last.safetensors"
PREVIOUS = "previous.safetensors"
BEST = "best.safetensors"

# Format 1 called a stage by its number, 1 or 2, and kept tensors alone of an optimiser.
_FORMAT, _READABLE = 2, (1, 2)
FACTS = "tritonbnn"


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        path: where it was read from.
        tensors: by dotted name; ``model.`` leads those of the network.
        facts: everything else, as JSON knows it.
    """

    path: Path
    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below ``prefix.``, by the rest of their name."""
        start = f"{prefix}."
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}


def stage_folder(run: Path, name: str) -> Path:
    """Where a stage's checkpoints are."""
    return run / name


def encode(tensors: dict[str, Tensor], facts: dict[str, Any]) -> bytes:
    """The bytes of a checkpoint file."""
    # safetensors knows no strides: a channels_last tensor is stored as NCHW
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"format": _FORMAT, "checksum": _checksum(plain), **facts}
    return save(plain, metadata={FACTS: json.dumps(header)})


class DamagedError(UserError):
    """A file is no whole checkpoint, so that the one before it may be taken."""


def read(path: Path) -> Checkpoint:
    """Read a checkpoint file.

    Raises:
        DamagedError: it is damaged, or it is not one of ours.
        UserError: there is none, it may not be read, or it is of a newer version.
    """
    if not path.is_file():
        raise UserError(
            f"there is no checkpoint {path}: name another one, or start over with --fresh"
        )
    try:
        path.open("rb").close()  # safetensors says of any file that it cannot open: there is none
        with utf_8_name(path) as name, safe_open(name, framework="pt") as file:
            header = (file.metadata() or {})[FACTS]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(header)
        number = facts["format"]
        newer = number > max(_READABLE)
        whole = number in _READABLE and facts["checksum"] == _checksum(tensors)
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}: check its permissions") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path) from error
    if newer:
        raise UserError(
            f"{path} is of a newer version of tritonbnn (format {number}): update the package, or"
            " use another checkpoint"
        )
    if not whole:
        raise _damaged(path)
    return Checkpoint(path, tensors, _with_names(facts))


def is_foreign(path: Path) -> bool:
    """Whether a file holds tensors and is no checkpoint of this package."""
    try:
        if is_torch_file(path):
            return True
        with utf_8_name(path) as name, safe_open(name, framework="pt") as file:
            return FACTS not in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False  # who reads it says why it cannot be read


def has_begun(folder: Path) -> bool:
    """Whether a stage's folder holds a state to go on from."""
    return any((folder / name).exists() for name in (LAST, PREVIOUS))


def history(folder: Path, stage: str) -> list[dict[str, Any]]:
    """The log lines of a stage that is not trained now; none where there is no whole checkpoint.

    The header alone is read: a checkpoint of a large network would take its time.
    """
    for path in (folder / LAST, folder / PREVIOUS):
        try:
            with utf_8_name(path) as name, safe_open(name, framework="pt") as file:
                facts = _with_names(json.loads((file.metadata() or {})[FACTS]))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            continue
        return [line for line in facts.get("history", ()) if line.get("stage") == stage]
    return []


def _with_names(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts of format 1 as those of today: stages have names."""
    if "step" in facts:
        facts["stage"] = f"step{facts.pop('step')}"
        facts["history"] = [with_stage(line) for line in facts.get("history", ())]
    return facts


def with_stage(line: dict[str, Any]) -> dict[str, Any]:
    """A line of a log, whose stage was a number before it was a name."""
    if "stage" in line or "step" not in line:
        return line
    return {"stage": f"step{line['step']}", **{k: v for k, v in line.items() if k != "step"}}


def _damaged(path: Path) -> DamagedError:
    what = "is damaged, or not a checkpoint of tritonbnn"
    if path.suffix.lower() == ".onnx":
        what = "is an ONNX graph, which is for other programs"
    if not path.stat().st_size:
        what = "is empty"
    return DamagedError(f"{path} {what}: use another checkpoint")


def _checksum(tensors: dict[str, Tensor]) -> int:
    checksum = 0
    for name in sorted(tensors):
        content = tensors[name].reshape(-1).view(torch.uint8).numpy().data
        checksum = zlib.crc32(content, zlib.crc32(name.encode(), checksum))
    return checksum


@dataclass
class State:
    """A stage of the run, in the middle of its work: all that is lost unless saved.

    Attributes:
        stage: its name.
        method: how it learns.
        model: the network, never wrapped for several processes.
        optimizer: over its parameters.
        scaler: of the loss; at rest unless the precision is fp16.
        meter: of this epoch's training images so far.
        analysis: what it says about its binary weights.
        epoch: the one to go on with, from 0; the number of epochs when all is done.
        batch: optimiser steps of it that are done.
        seconds: spent training in it.
        best: epoch and validation top-1 of the best checkpoint; its loss where there is no top-1.
        history: a log line per finished epoch.
    """

    stage: str
    method: Method
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meter: TrainMeter
    analysis: Recorder
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    best: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def new(
        cls,
        method: Method,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        analysis: Recorder | None = None,
    ) -> "State":
        """The state of a stage that begins; without ``analysis``, it follows flips alone."""
        task = method.task
        return cls(
            stage=task.stage.name,
            method=method,
            model=model,
            optimizer=optimizer,
            scaler=task.compute.scaler(),
            meter=TrainMeter(task.compute.device),
            analysis=analysis or Recorder(model, optimizer),
        )

    def begin_epoch(self, epoch: int) -> None:
        """Stand before the first optimiser step of an epoch, with nothing counted of it."""
        self.epoch, self.batch, self.seconds = epoch, 0, 0.0
        self.meter.clear()
        self.analysis.begin_epoch()

    def tensors(self, world: World) -> dict[str, Tensor]:
        """All tensors by name; every process must call this, as each has its own random numbers."""
        named = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        optimizer, _ = optimizer_state(self.model, self.optimizer)
        named |= {f"optimizer.{name}": tensor for name, tensor in optimizer.items()}
        named |= {f"method.{name}": tensor for name, tensor in self.method.state_dict().items()}
        named |= {f"analysis.{name}": tensor for name, tensor in self.analysis.tensors().items()}
        own = {"meter": self.meter.sums.cpu(), **random_states()}
        rows = world.gather(own)
        for key in own:
            named[f"process.{key}"] = torch.stack([row[key] for row in rows])
        return named

    def facts(self, world: World) -> dict[str, Any]:
        """All that is not a tensor."""
        return {
            "stage": self.stage,
            "epoch": self.epoch,
            "batch": self.batch,
            "seconds": self.seconds,
            "best": self.best,
            "history": self.history,
            "scaler": self.scaler.state_dict(),
            "optimizer": optimizer_state(self.model, self.optimizer)[1],
            "world_size": world.size,
        }

    def restore(self, checkpoint: Checkpoint, world: World) -> None:
        """Become what was saved."""
        facts = checkpoint.facts
        self.model.load_state_dict(checkpoint.group("model"))
        saved = checkpoint.group("optimizer")
        restore_optimizer(self.model, self.optimizer, saved, facts.get("optimizer", {}))
        device = self.method.task.compute.device
        remembered = checkpoint.group("method")
        self.method.load_state_dict({name: t.to(device) for name, t in remembered.items()})
        self.analysis.restore(checkpoint.group("analysis"))
        self._restore_process(checkpoint.group("process"), world)
        self.scaler.load_state_dict(facts["scaler"])
        self.epoch, self.batch, self.seconds = facts["epoch"], facts["batch"], facts["seconds"]
        self.best = facts["best"]
        # format 1 had the lines of the stage before among them
        self.history = [line for line in facts["history"] if line["stage"] == self.stage]

    def _restore_process(self, saved: dict[str, Tensor], world: World) -> None:
        sums = saved.pop("meter")
        if len(sums) == world.size:
            self.meter.sums.copy_(sums[world.rank])
        elif world.leads:
            self.meter.sums.copy_(sums.sum(dim=0))
        for key, rows in saved.items():
            if world.rank < len(rows):
                set_random_state(key, rows[world.rank])


def random_states() -> dict[str, Tensor]:
    """The state of torch's generators. Nothing in training draws from any other."""
    states = {"rng_cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["rng_cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(key: str, state: Tensor) -> None:
    """Restore one of :func:`random_states`; for a device that is not here, nothing."""
    state = state.clone()  # torch reads the memory of a view from its base's beginning
    if key == "rng_cpu":
        torch.set_rng_state(state)
    elif torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state)

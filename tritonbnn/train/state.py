"""Everything about a step that is lost unless saved, to and from a checkpoint."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tritonbnn.analysis import Recorder
from tritonbnn.train.checkpoint import Checkpoint
from tritonbnn.train.distributed import World
from tritonbnn.train.meters import TrainMeter

OPTIMIZER_STATE = ("exp_avg", "exp_avg_sq", "step", "momentum_buffer")
"""What Adam and SGD keep of a parameter."""


@dataclass
class State:
    """A step of the run, in the middle of its work.

    Attributes:
        step: 1 or 2.
        model: the network, never wrapped for several processes.
        optimizer: over its parameters.
        scaler: of the loss; at rest unless the precision is fp16.
        meter: of this epoch's training images so far.
        analysis: what it says about its binary weights.
        epoch: the one to go on with, from 0; the number of epochs when all is done.
        batch: optimiser steps of it that are done.
        seconds: spent training in it.
        best: epoch and validation top-1 of the best checkpoint.
        history: a log line per finished epoch, those of the step before included.
    """

    step: int
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

    def tensors(self, world: World) -> dict[str, Tensor]:
        """All tensors by name; every process must call this, as each has its own random numbers."""
        named = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                named[f"optimizer.{key}.{name}"] = value
        named |= {f"analysis.{name}": tensor for name, tensor in self.analysis.tensors().items()}
        own = {"meter": self.meter.sums.cpu(), **random_states()}
        rows = world.gather(own)
        for key in own:
            named[f"process.{key}"] = torch.stack([row[key] for row in rows])
        return named

    def facts(self, world: World) -> dict[str, Any]:
        """All that is not a tensor."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "seconds": self.seconds,
            "best": self.best,
            "history": self.history,
            "scaler": self.scaler.state_dict(),
            "world_size": world.size,
        }

    def restore(self, checkpoint: Checkpoint, world: World) -> None:
        """Become what was saved."""
        facts = checkpoint.facts
        self.model.load_state_dict(checkpoint.group("model"))
        for key in OPTIMIZER_STATE:
            self._restore_optimizer(key, checkpoint.group(f"optimizer.{key}"))
        self.analysis.restore(checkpoint.group("analysis"))
        self._restore_process(checkpoint.group("process"), world)
        self.scaler.load_state_dict(facts["scaler"])
        self.epoch, self.batch, self.seconds = facts["epoch"], facts["batch"], facts["seconds"]
        self.best, self.history = facts["best"], facts["history"]

    def _restore_optimizer(self, key: str, saved: dict[str, Tensor]) -> None:
        fused = self.optimizer.defaults["fused"]
        for name, parameter in self.model.named_parameters():
            if name not in saved:
                continue
            if key == "step":
                value = saved[name].to(parameter.device if fused else "cpu", copy=True)
            else:
                # like the parameter in its strides too: fused ones walk both as flat memory, and
                # would pair the wrong numbers where one is NHWC and the other NCHW
                value = torch.empty_like(parameter).copy_(saved[name])
            self.optimizer.state[parameter][key] = value

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

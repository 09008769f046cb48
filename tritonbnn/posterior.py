"""The networks that IVON's training has found likely, as one network that predicts with many."""

import tomllib
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tritonbnn.cli import UserError
from tritonbnn.compute import Compute
from tritonbnn.optim import (
    IVON,
    OPTIMIZERS,
    build_optimizer,
    restore_optimizer,
    sampled_probabilities,
)
from tritonbnn.settings import Choice, filled
from tritonbnn.train.checkpoint import LAST, Checkpoint, read
from tritonbnn.train.weights import find_checkpoint, network_with_weights


class SampledNetwork(nn.Module):
    """Predicts with the mean of softmaxes over networks whose weights are drawn (2402.17641).

    Args:
        network: in eval mode, whose parameters the optimiser has.
        optimizer: has the distribution of the weights.
        samples: how many networks are drawn. All images meet the same ones.
    """

    def __init__(self, network: nn.Module, optimizer: IVON, samples: int) -> None:
        super().__init__()
        self.network, self.optimizer, self.samples = network, optimizer, samples

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) to logarithms of probabilities (N, classes), float32 or wider."""
        shares = sampled_probabilities(self.network, images, self.optimizer, self.samples)
        # a share that is 0 would make the loss of all images infinite
        return shares.clamp_min(torch.finfo(shares.dtype).tiny).log()


def open_sampled(place: Path, compute: Compute, samples: int) -> tuple[nn.Module, Checkpoint]:
    """The networks of a run that IVON trained, as one in its place and in eval mode.

    The last checkpoint is read, and not the best, as only that one has the distribution.

    Args:
        place: the run's folder, or a file that holds the optimiser's state too.
        compute: where and how it is to run.
        samples: how many networks are drawn.

    Raises:
        UserError: there is no such checkpoint, or another optimiser trained it.
    """
    checkpoint = read(find_checkpoint(place, LAST))
    stage = _stage(checkpoint)
    settings = dict(stage["optimizer"])
    name = settings.pop("name")
    if name != "ivon":
        raise UserError(
            f"{checkpoint.path} was trained by {name}, which learns no distribution of weights:"
            " leave --samples out"
        )
    model = network_with_weights(checkpoint).eval()
    compute.place(model)
    choice = Choice(name, filled(OPTIMIZERS[name], settings, "optimizer."))
    optimizer = build_optimizer(choice, model, stage["lr"], stage["weight_decay"])
    saved = checkpoint.group("optimizer")
    restore_optimizer(model, optimizer, saved, checkpoint.facts["optimizer"])
    return SampledNetwork(model, cast(IVON, optimizer), samples).eval(), checkpoint


def _stage(checkpoint: Checkpoint) -> dict[str, Any]:
    """The table of the stage that a checkpoint is of, with all its settings."""
    facts = checkpoint.facts
    if "optimizer" not in facts:
        raise UserError(
            f"{checkpoint.path} holds weights alone: --samples needs the distribution that the"
            f" optimiser has learnt, which {LAST} of a run holds"
        )
    tables = tomllib.loads(facts["config"])["stage"]
    return next(table for table in tables if table["name"] == facts["stage"])

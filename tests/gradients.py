"""One epoch in float64, alone or in two processes; leaves what it saw in a file for each rank."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.hand import plain
from tritonbnn import cli, distributed
from tritonbnn.compute import Compute
from tritonbnn.data.batches import train_batches, val_batches
from tritonbnn.data.sources import SampleKey
from tritonbnn.methods import evaluate
from tritonbnn.nn import BinaryConv2d, RPReLU, RSign
from tritonbnn.optim import build_optimizer
from tritonbnn.train.checkpoint import State
from tritonbnn.train.engine import FirstBad, train_one_epoch

CPU = torch.device("cpu")


class Images:
    """Eleven: batches of 5 are shared 3 to 2, and the last one, of 1, is shared 1 to 0."""

    def __len__(self) -> int:
        return 11

    def batch(self, keys: Sequence[SampleKey]) -> tuple[Tensor, Tensor]:
        generators = [torch.Generator().manual_seed(key.index) for key in keys]
        images = [torch.randn(3, 8, 8, generator=g, dtype=torch.float64) for g in generators]
        return torch.stack(images), torch.tensor([key.index % 3 for key in keys])


def network() -> nn.Module:
    """Without BatchNorm, whose statistics are each process's own."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), RSign(8), BinaryConv2d(8, 8, 3, padding=1), RPReLU(8)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).double()


def main(argv: list[str]) -> int:
    """Take an epoch with the accumulation given, and evaluate."""
    world = distributed.join(CPU)
    model = network()
    wrapped = DistributedDataParallel(model) if world.size > 1 else model
    optimizer = build_optimizer("adam", model, 1e-3, 1e-2)
    method = plain(Compute(CPU))
    method.task = replace(method.task, world=world)
    state = State.new(method, model, optimizer)
    gradients: list[list[Tensor]] = []
    state.optimizer.register_step_pre_hook(
        lambda *_: gradients.append([p.grad.clone() for p in model.parameters()])
    )
    shares = {"rank": world.rank, "world_size": world.size, "batch_size": 5}
    batches = train_batches(Images(), seed=0, step=1, epoch=0, accumulation=int(argv[0]), **shares)
    train_one_epoch(
        state,
        wrapped,
        batches,
        FirstBad(CPU),
        after_step=lambda: None,
    )
    score = evaluate(model, val_batches(Images(), **shares), Compute(CPU), world)
    torch.save(
        {
            "gradients": gradients,
            "sums": world.total(state.meter.sums),
            "score": (score.loss, score.top1, score.images),
        },
        Path(f"seen-{argv[0]}-{world.size}-{world.rank}.pt"),
    )
    distributed.leave()
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

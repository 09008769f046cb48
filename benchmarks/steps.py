"""One training step on a fixed batch, as every rival takes it, and whether it learns from it."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._inductor import config as inductor_config
from torch.nn import functional as F

from tritonbnn.train.captured import WARM_UP
from tritonbnn.train.graphs import Graphs

CLASSES = 1000
LEARNING_RATE = 1e-3
RECOMPILES = 1000
"""More than there are shapes."""

TRIAL_STEPS = 6
"""Enough for the loss of every rival to fall on one batch."""

Step = Callable[[], Tensor]


@contextmanager
def as_trainers_run() -> Iterator[None]:
    """cuDNN searches for its fastest algorithms and uses TF32, and any number of shapes compile.

    Compiled CPU code has its number of threads written into it, and the compiler keeps it on disk
    by a key without that number: only as a setting of the compiler is it part of the key.
    """
    with (
        inductor_config.patch({"cpp.threads": torch.get_num_threads()}),
        torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True),
        dynamo_config.patch(recompile_limit=RECOMPILES, accumulated_recompile_limit=RECOMPILES),
    ):
        yield


def training_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    bf16: bool = False,
    mode: str | None = None,
    graphs: Graphs | None = None,
) -> Step:
    """One step of ``model`` with Adam: forward, backward, update; it returns the loss.

    Args:
        model: on the images' device.
        images: (N, 3, H, W), in the model's memory layout.
        labels: (N,).
        bf16: forward under bf16 autocast.
        mode: of torch.compile; None leaves the model as it is.
        graphs: records the step, which is repeated then.
    """
    optimizer = torch.optim.Adam(
        model.parameters(), lr=LEARNING_RATE, fused=True, capturable=graphs is not None
    )
    network = torch.compile(model, mode=mode, dynamic=False) if mode else model
    device = images.device.type

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16) if bf16 else nullcontext():
            logits = network(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step if graphs is None else _repeated(step, graphs)


def _repeated(step: Step, graphs: Graphs) -> Step:
    """A step that is recorded when it is first taken, after some ordinary ones."""
    recorded: list[tuple[Callable[[], None], Tensor]] = []

    def record() -> None:
        with graphs.aside():
            for _ in range(WARM_UP):
                step()
        losses: list[Tensor] = []
        recorded.append((graphs.record(lambda: losses.append(step())), losses[0]))

    def repeat() -> Tensor:
        if not recorded:
            record()
        [(replay, loss)] = recorded
        replay()
        return loss.clone()  # the next one is written to the same place

    return repeat


def does_not_train(step: Step) -> str:
    """Take a few steps; why they do not count as training, or nothing if they do."""
    losses = torch.stack([step() for _ in range(TRIAL_STEPS)]).tolist()
    said = ", ".join(f"{loss:.4g}" for loss in losses)
    if not all(math.isfinite(loss) for loss in losses):
        return f"the loss is not finite: {said}"
    if losses[-1] >= losses[0]:
        return f"the loss does not fall on one batch: {said}"
    return ""

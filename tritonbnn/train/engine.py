"""The two loops: train for one epoch, and evaluate. No wait for the device inside."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tritonbnn.compute import Compute
from tritonbnn.data.batches import MicroBatch
from tritonbnn.train.distributed import World
from tritonbnn.train.meters import Evaluation, FirstBad, evaluation_sums
from tritonbnn.train.state import State

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]


def label_objective(smoothing: float) -> Objective:
    """Cross-entropy of each image with its label."""

    def losses(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")

    return losses


def teacher_objective(teacher: nn.Module, compute: Compute) -> Objective:
    """Cross-entropy of each image with the teacher's answer: -sum softmax(t) log_softmax(s).

    Temperature 1; labels have no part in it (2106.11309, the published code).
    """

    def losses(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad(), compute.autocast():
            target = teacher(images).float().softmax(dim=1)
        return -(target * logits.log_softmax(dim=1)).sum(dim=1)

    return losses


def train_one_epoch(
    state: State,
    network: nn.Module,
    batches: Iterable[MicroBatch],
    objective: Objective,
    compute: Compute,
    bad: FirstBad,
    *,
    world_size: int,
    after_step: Callable[[], None],
) -> None:
    """Train to the end of the epoch, from wherever in it ``state`` is.

    The gradient is the mean over the images of all processes and parts: each micro-batch gives the
    sum over its own images divided by the global count, and what DistributedDataParallel divides
    by the number of processes is multiplied back.

    Args:
        state: moves on, batch by batch.
        network: ``state.model``, wrapped where there are several processes.
        batches: the rest of this epoch.
        objective: losses (N,) from logits, images and labels.
        compute: device and precision.
        bad: notes the first loss that is not finite, by the optimiser step within the epoch.
        world_size: number of processes.
        after_step: called when an optimiser step is done; may raise to leave.
    """
    network.train()
    for micro in batches:
        images, labels = compute.to_device(micro.images, micro.labels)
        with _gradient_exchange(network, micro.last):
            with compute.autocast():
                logits = network(images)
            losses = objective(_at_least_float32(logits), images, labels)
            loss = losses[: micro.count].sum() / micro.global_count
            state.scaler.scale(loss * world_size).backward()
        bad.note(loss, state.batch)
        own = slice(micro.count)
        state.meter.add(losses[own], logits[own], labels[own])
        if micro.last:
            _update(state)
            state.batch += 1
            after_step()


def _update(state: State) -> None:
    """Take an optimiser step. Its flips are counted, and its gradients looked at if it is time."""
    looking = state.analysis.due(state.batch)
    if looking:
        state.scaler.unscale_(state.optimizer)
        state.analysis.before_update()
    state.scaler.step(state.optimizer)
    state.analysis.after_update(looked=looking)
    state.scaler.update()
    state.optimizer.zero_grad()


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _gradient_exchange(network: nn.Module, last: bool) -> AbstractContextManager:
    """Between processes gradients are exchanged once an optimiser step, in its last part."""
    if last or not isinstance(network, DistributedDataParallel):
        return nullcontext()
    return network.no_sync()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    compute: Compute,
    world: World,
) -> Evaluation:
    """Score the model on batches that, over all processes, hold every image once."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=compute.device)
    for images, labels in batches:
        images, labels = compute.to_device(images, labels)
        with compute.autocast():
            logits = model(images)
        sums += evaluation_sums(logits, labels)
    loss, first, five, images_seen = world.total(sums.cpu()).tolist()
    if not images_seen:
        raise ValueError("there are no images to evaluate on")
    return Evaluation(
        loss=loss / images_seen,
        top1=100 * first / images_seen,
        top5=100 * five / images_seen,
        images=int(images_seen),
    )

"""Which parameters of a network are not trained at all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def check_gradients(
    model: nn.Module,
    batch: Tensor | tuple[Any, ...],
    loss: Callable[[Any], Tensor] | None = None,
) -> list[str]:
    """The names of trainable parameters that get no gradient from one batch, or only zeros.

    A binary network whose gradients stop half way still learns in its last layers, and its loss
    still falls. This runs the model once forward and backward, in the mode that it is in, and names
    what was not reached. ``assert not check_gradients(model, images)`` belongs before a long run.

    A name is a reason to look, not always a fault. In a real network a few parameters can have a
    zero gradient on one batch by right: the slopes of a PReLU whose inputs are all positive, or
    what comes before an activation that is the same for every image. Try a larger batch, or train a
    few steps first. A parameter that is always named is not used, or something behind it stops the
    gradient: ``detach``, activations that are all larger than 1, or dropout between two signs.

    Afterwards gradients, buffers such as BatchNorm's running averages, and torch's random number
    generators are as before.

    Args:
        model: on one device; not wrapped in DistributedDataParallel, which wants whole steps.
        batch: its input, or a tuple of its positional arguments.
        loss: makes a scalar of the model's output, as the training does:
            ``lambda logits: F.cross_entropy(logits, labels)``. None for a sum with fixed random
            weights, for which the output must be one tensor.

    Returns:
        Names as in ``model.named_parameters()``, in its order; empty where all is well.

    Raises:
        TypeError: ``loss`` is None and the output is not a floating-point tensor.
        ValueError: ``loss`` returned something else than a scalar tensor.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    arguments = batch if isinstance(batch, tuple) else (batch,)
    with _left_as_found(model), torch.enable_grad():
        output = model(*arguments)
        value = _random_sum(output) if loss is None else loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss must return a scalar tensor, not {given}")
        if not (trainable and value.requires_grad):
            return list(trainable)
        # unlike backward(), it leaves .grad alone
        grads = torch.autograd.grad(value, list(trainable.values()), allow_unused=True)
    reached = [grad is not None and grad.any() for grad in grads]
    return [name for name, some in zip(trainable, reached, strict=True) if not some]


def _random_sum(output: Any) -> Tensor:
    """A sum with random weights: a plain one is constant behind BatchNorm or softmax."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise TypeError(
            "the model must return one floating-point tensor, "
            f"not {type(output).__name__}: give a loss that makes a scalar of it"
        )
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(output.shape, generator=generator).to(output.device)
    return (output.float() * weights).sum()


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Put buffers and the random number generators back afterwards."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, before in kept:
                buffer.copy_(before)
                setattr(module, name, buffer)

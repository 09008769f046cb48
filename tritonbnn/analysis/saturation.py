"""Which activations are too large for a gradient to pass: abs(x + shift) > 1."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tritonbnn.nn import BinaryConv1d, BinaryLinear, BinaryUnit
from tritonbnn.nn.parameters import binary_layers

PROBE_IMAGES = 16
"""Images in the probe batch; fewer where the validation set has fewer."""

CHANNEL_THRESHOLD = 0.99
"""A channel is saturated when a larger share of its activations is."""


@dataclass(frozen=True)
class Saturation:
    """What one layer's binarised input was on the probe batch.

    Attributes:
        counts: int64 (C,), saturated activations of each channel.
        total: activations of a channel.
    """

    counts: Tensor
    total: int

    @property
    def shares(self) -> Tensor:
        """Of each channel's activations, float64 (C,)."""
        return self.counts.double() / self.total

    @property
    def share(self) -> float:
        """Of all activations."""
        return pooled([self])

    @property
    def saturated_channels(self) -> float:
        """The share of channels that are saturated."""
        return (self.shares > CHANNEL_THRESHOLD).double().mean().item()


def pooled(layers: Iterable[Saturation]) -> float:
    """The saturated share of all activations of several layers."""
    layers = list(layers)
    total = sum(layer.counts.numel() * layer.total for layer in layers)
    return sum(int(layer.counts.sum()) for layer in layers) / total


@dataclass(frozen=True)
class Probe:
    """A fixed batch on which saturation is measured, in eval mode.

    Args:
        images: (N, C, H, W), where the network is.
        autocast: makes the context of a forward pass.
    """

    images: Tensor
    autocast: Callable[[], AbstractContextManager] = nullcontext

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, Saturation]:
        """Saturation of what each binary layer binarises, by its weight's name, on the host.

        The shift is the layer's own. So a layer that follows an
        :class:`~tritonbnn.nn.RSign`, and sees its +-1, is never saturated.
        """
        found: dict[str, Saturation] = {}
        hooks = [
            module.register_forward_pre_hook(_observer(name, found))
            for name, module in binary_layers(model).items()
        ]
        training = model.training
        try:
            model.eval()
            with self.autocast():
                model(self.images)
        finally:
            model.train(training)
            for hook in hooks:
                hook.remove()
        return {name: Saturation(s.counts.cpu(), s.total) for name, s in found.items()}


def _observer(name: str, found: dict[str, Saturation]) -> Callable[[nn.Module, tuple], None]:
    """A hook that counts what a layer is about to binarise; a layer called twice adds up."""

    def observe(module: nn.Module, inputs: tuple) -> None:
        channel_dim = _channel_dim(module)
        shift = getattr(module, "shift_in" if isinstance(module, BinaryUnit) else "shift")
        counts, total = saturated(inputs[0], shift, channel_dim)
        before = found.get(name, Saturation(torch.zeros_like(counts), 0))
        found[name] = Saturation(before.counts + counts, before.total + total)

    return observe


def _channel_dim(module: nn.Module) -> int:
    """Where the channels of a binary layer's input are, which may have no batch."""
    if isinstance(module, BinaryLinear):
        return -1
    return -2 if isinstance(module, BinaryConv1d) else -3


def saturated(x: Tensor, shift: Tensor | None, channel_dim: int) -> tuple[Tensor, int]:
    """How many activations of each channel have abs(x + shift) > 1, in float32 at least.

    Args:
        x: any shape, the channels in ``channel_dim``.
        shift: (C,), or None.
        channel_dim: -3 for images, -1 for features.

    Returns:
        int64 (C,), and how many activations a channel has.
    """
    rows = x.movedim(channel_dim, -1).flatten(0, -2)
    rows = rows.to(torch.promote_types(x.dtype, torch.float32))
    shifted = rows if shift is None else rows + shift
    return (shifted.abs() > 1).sum(dim=0), len(rows)

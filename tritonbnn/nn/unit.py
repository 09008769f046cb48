"""The half-block: everything between two residual streams."""

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from tritonbnn import ops
from tritonbnn.nn.activations import INITIAL_SLOPE
from tritonbnn.nn.layers import initial_weight


class BinaryUnit(nn.Module):
    """rprelu(BatchNorm(binary_conv2d(x)) + shortcut(x)): all of ReActNet between two streams.

    The shortcut follows from the shapes: 2x2 average pooling at stride 2, the channels repeated
    twice where ``out_channels == 2 * in_channels`` (both 1x1 convolutions of a published widening
    pair, merged into one), else the input itself. It can also be given to :meth:`forward`.

    Args:
        in_channels: C.
        out_channels: O, which is C or 2 C unless the shortcut is given.
        kernel_size: 1 or 3; the padding is kernel_size // 2.
        stride: 1 or 2.
        binary_weight: False for a real weight (step 1 of the two-step schedule).
        rprelu: False for Bi-Real Net's unit, which has neither shifts nor a PReLU.
        fused: True for one Function that saves bits and the stream; False for the composition of
            the small operators, which saves more. The state dict is the same.
        plan: of the fused Function, see :func:`~tritonbnn.ops.binary_unit`.

    Shape:
        (N, C, H, W) to (N, O, H / stride, W / stride); H and W even at stride 2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        binary_weight: bool = True,
        rprelu: bool = True,
        fused: bool = True,
        plan: str = "auto",
    ) -> None:
        super().__init__()
        self.stride, self.binary_weight = stride, binary_weight
        self.fused, self.plan = fused, plan
        self.weight = initial_weight(out_channels, in_channels, kernel_size, kernel_size)
        self.bn = nn.BatchNorm2d(out_channels)
        if rprelu:
            self.shift_in = nn.Parameter(torch.zeros(in_channels))
            self.shift_mid = nn.Parameter(torch.zeros(out_channels))
            self.slope = nn.Parameter(torch.full((out_channels,), INITIAL_SLOPE))
            self.shift_out = nn.Parameter(torch.zeros(out_channels))
        else:
            for name in ("shift_in", "shift_mid", "slope", "shift_out"):
                self.register_parameter(name, None)

    def forward(
        self,
        x: Tensor,
        shortcut: Tensor | None = None,
        *,
        signs: Tensor | None = None,
        following: "BinaryUnit | None" = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Apply the unit; in a chain, also pack the signs that the following unit starts with.

        Args:
            x: (N, C, H, W), the input stream.
            shortcut: (N, O, H', W'), what is added after BatchNorm; None for the unit's own.
            signs: of x + shift_in, packed by the unit before; None to pack them here.
            following: the unit that comes next, or None.

        Returns:
            The output stream; with ``following``, the stream and its packed signs, which are None
            where units are not fused.
        """
        if not self.fused:
            z = self._composed(x, shortcut)
            return z if following is None else (z, None)
        output = self._fused(x, shortcut, signs, following)
        return output.z if following is None else (output.z, output.signs)

    def _shortcut_kind(self) -> str:
        if self.stride == 2:
            return "pool"
        out_channels, in_channels = self.weight.shape[:2]
        return "repeat" if out_channels == 2 * in_channels else "identity"

    def _fused(
        self,
        x: Tensor,
        shortcut: Tensor | None,
        signs: Tensor | None,
        following: "BinaryUnit | None",
    ) -> ops.UnitOutput:
        bn = self.bn
        output = ops.binary_unit(
            x,
            self.weight,
            bn.weight,
            bn.bias,
            self.shift_in,
            self.shift_mid,
            self.slope,
            self.shift_out,
            shortcut=self._shortcut_kind() if shortcut is None else shortcut,
            stride=self.stride,
            binary_weight=self.binary_weight,
            signs=signs,
            pack=following is not None,
            next_shift=None if following is None else following.shift_in,
            statistics=None if bn.training else _running_statistics(bn),
            eps=bn.eps,
            plan=self.plan,
            group=_statistics_group(bn),
        )
        if bn.training and len(x):
            _update_running(bn, output.mean, output.variance)
        return output

    def _composed(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        a = ops.binary_conv2d(
            x,
            self.weight,
            self.shift_in,
            stride=self.stride,
            padding=self.weight.shape[2] // 2,
            binary_weight=self.binary_weight,
            may_be_binary=False,  # a stream is real, as the fused Function takes it to be
        )
        u = self.bn(a)
        shortcut = self._own_shortcut(x) if shortcut is None else shortcut
        if shortcut.shape != u.shape:
            raise ValueError(
                f"the shortcut must have shape {tuple(u.shape)}, not {tuple(shortcut.shape)}"
            )
        u = u + shortcut
        if self.slope is None:
            return u
        return ops.rprelu(u, self.shift_mid, self.slope, self.shift_out)

    def _own_shortcut(self, x: Tensor) -> Tensor:
        kind = self._shortcut_kind()
        if kind == "pool":
            if x.shape[2] % 2 or x.shape[3] % 2:
                raise ValueError(
                    f"a unit of stride 2 needs even height and width, not {tuple(x.shape[2:])}"
                )
            return F.avg_pool2d(x, 2)
        return torch.cat((x, x), dim=1) if kind == "repeat" else x

    def extra_repr(self) -> str:
        out_channels, in_channels, kernel_size, _ = self.weight.shape
        return (
            f"{in_channels}, {out_channels}, kernel_size={kernel_size}, stride={self.stride}, "
            f"binary_weight={self.binary_weight}, fused={self.fused}"
        )


def _statistics_group(bn: nn.Module) -> distributed.ProcessGroup | None:
    """The processes that share ``bn``'s batch statistics: none, unless it is a SyncBatchNorm."""
    if not (isinstance(bn, nn.SyncBatchNorm) and bn.training and distributed.is_initialized()):
        return None
    group = bn.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


def _running_statistics(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor] | None:
    """What ``bn`` normalises by in eval mode; None for the batch's own, if it keeps no averages."""
    if bn.running_mean is None or bn.running_var is None:
        return None
    return bn.running_mean, bn.running_var


@torch.no_grad()
def _update_running(bn: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Move the running averages towards the batch's statistics, as nn.BatchNorm2d does."""
    averages = _running_statistics(bn)
    if averages is None or bn.num_batches_tracked is None:
        return
    bn.num_batches_tracked.add_(1)
    # Without a momentum the average is cumulative.
    step = 1 / bn.num_batches_tracked if bn.momentum is None else bn.momentum
    for average, value in zip(averages, (mean, variance), strict=True):
        average.lerp_(value.to(average.dtype), step)

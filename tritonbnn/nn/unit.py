"""The half-block: everything between two residual streams."""

from collections.abc import Callable
from itertools import chain
from typing import Any, TypeGuard

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from tritonbnn import ops
from tritonbnn.nn.activations import INITIAL_SLOPE
from tritonbnn.nn.layers import initialise_weight, new_weight, tell_of_pruning
from tritonbnn.ops.autocast import autocast_input
from tritonbnn.ops.unit import PLANS
from tritonbnn.window import Size, check_count, sizes


class BinaryUnit(nn.Module):
    """rprelu(BatchNorm(binary_conv2d(x)) + shortcut(x)): all of ReActNet between two streams.

    The shortcut follows from the shapes: 2x2 average pooling at stride 2, the channels repeated
    twice where ``out_channels == 2 * in_channels`` (both 1x1 convolutions of a published widening
    pair, merged into one), else the input itself. It can also be given to :meth:`forward`, and must
    be for other numbers of channels.

    A plain affine nn.BatchNorm2d or nn.SyncBatchNorm is not called: the fused Function computes
    exactly what it would, running averages included. Any other norm is called, and the unit is then
    the composition of the small operators. So is a plain one that has hooks, that is parametrised,
    or whose ``forward`` was replaced.

    Args:
        in_channels: C.
        out_channels: O, which is C or 2 C unless ``given_shortcut``.
        kernel_size: odd; the padding is kernel_size // 2. Only 1 and 3 can be fused.
        stride: 1 or 2.
        binary_weight: False for a real weight (step 1 of the two-step schedule).
        rprelu: False for Bi-Real Net's unit, which has neither shifts nor a PReLU.
        fused: True for one Function that saves bits and the stream; False for the composition of
            the small operators, which saves more. The state dict is the same.
        plan: of the fused Function, see :func:`~tritonbnn.ops.binary_unit`.
        norm: makes the norm of ``out_channels``, which becomes the attribute ``bn``. It keeps
            shape, dtype and device; only under autocast may it return another dtype.
        given_shortcut: True where :meth:`forward` is always given one, so that the unit needs none
            of its own.
        device: of the parameters, and of the norm.
        dtype: of the parameters, and of the norm.

    Shape:
        (N, C, H, W) to (N, O, H / stride, W / stride); H and W even at stride 2. The output has the
        dtype of the input, or under autocast, for a float32 input, that of autocast. It is in
        channels_last memory where the input or the weight is, else contiguous.

    Raises:
        ValueError: an argument is out of range, or no shortcut follows from the shapes.
    """

    shift_in: nn.Parameter | None
    shift_mid: nn.Parameter | None
    slope: nn.Parameter | None
    shift_out: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        *,
        binary_weight: bool = True,
        rprelu: bool = True,
        fused: bool = True,
        plan: str = "auto",
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        given_shortcut: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kernel_size, stride = _one("kernel_size", kernel_size), _one("stride", stride)
        _check_unit(in_channels, out_channels, kernel_size, stride, given_shortcut)
        fused = fused and kernel_size in (1, 3)
        if plan not in PLANS:
            raise ValueError(f"plan must be one of {', '.join(PLANS)}, not {plan!r}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = kernel_size
        self.stride, self.binary_weight = stride, binary_weight
        self.fused, self.plan = fused, plan
        place = {"device": device, "dtype": dtype}
        self.weight = new_weight(out_channels, in_channels, kernel_size, kernel_size, **place)
        self.bn = norm(out_channels).to(**place)
        vectors = {"shift_in": in_channels}
        vectors |= dict.fromkeys(("shift_mid", "slope", "shift_out"), out_channels)
        for name, channels in vectors.items():
            vector = nn.Parameter(torch.empty(channels, **place)) if rprelu else None
            self.register_parameter(name, vector)
        self._reset_own_parameters()

    def reset_parameters(self) -> None:
        """Set all parameters to what they were at the start; the norm's by its own method."""
        self._reset_own_parameters()
        reset = getattr(self.bn, "reset_parameters", None)
        if callable(reset):
            reset()

    def _reset_own_parameters(self) -> None:
        initialise_weight(self.weight)
        for name in ("shift_in", "shift_mid", "slope", "shift_out"):
            vector = getattr(self, name)
            if vector is not None:
                nn.init.constant_(vector, INITIAL_SLOPE if name == "slope" else 0)

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
            The output stream; with ``following``, the stream and its packed signs. They are None
            where one of the two units is not fused, or where a hook may come between them.

        Raises:
            ValueError: shapes that do not match, an odd size at stride 2, several devices, or a
                norm that changes shape, dtype or device.
            TypeError: an operand is not floating point, or the weight's dtype does not go with x's.
        """
        weight = self.weight  # once: a parametrised one is computed anew at each look
        if self.binary_weight:
            tell_of_pruning(self)
        bn = self.bn
        shortcut = self._widened(x) if shortcut is None else shortcut
        if not (self.fused and _is_fusible(bn)):
            z = self._composed(x, weight, shortcut)
            return z if following is None else (z, None)
        successor = following if following is not None and self._hands_on(following) else None
        output = self._fused(x, weight, bn, shortcut, signs, successor)
        if following is None:
            return output.z
        return output.z, None if successor is None else output.signs

    def _hands_on(self, following: "BinaryUnit") -> bool:
        """Whether ``following`` can start with signs packed here.

        It cannot where something may still change the stream, or the shift that is added to it:
        a hook between the units, or a shift that is computed when ``following`` is called.
        """
        return (
            following.fused
            and _is_fusible(following.bn)
            and "shift_in" in following._parameters
            and not (self._forward_hooks or following._forward_pre_hooks)
            and not any("forward" in unit.__dict__ for unit in (self, following))
        )

    def _widened(self, x: Tensor) -> Tensor | None:
        """The shortcut that pools and widens at once, which launchers have not; else None."""
        if self.stride == 1 or self.out_channels != 2 * self.in_channels:
            return None
        _check_even(x)
        pooled = F.avg_pool2d(autocast_input(x), 2)
        return torch.cat((pooled, pooled), dim=1)

    def _shortcut_kind(self, weight: Tensor) -> str:
        if self.stride == 2:
            return "pool"
        return "repeat" if weight.shape[0] == 2 * weight.shape[1] else "identity"

    def _fused(
        self,
        x: Tensor,
        weight: Tensor,
        bn: _BatchNorm,
        shortcut: Tensor | None,
        signs: Tensor | None,
        successor: "BinaryUnit | None",
    ) -> ops.UnitOutput:
        group = _statistics_group(bn)
        output = ops.binary_unit(
            x,
            weight,
            bn.weight,
            bn.bias,
            self.shift_in,
            self.shift_mid,
            self.slope,
            self.shift_out,
            shortcut=self._shortcut_kind(weight) if shortcut is None else shortcut,
            stride=self.stride,
            binary_weight=self.binary_weight,
            signs=signs,
            pack=successor is not None,
            next_shift=None if successor is None else successor.shift_in,
            statistics=None if bn.training else _averages(bn),
            eps=bn.eps,
            plan=self.plan,
            group=group,
        )
        if bn.training and bn.track_running_stats:
            # with a group there may be values of other processes
            known = len(x) > 0 or group is not None
            count_batch(bn, (output.mean, output.variance) if known else None)
        return output

    def _composed(self, x: Tensor, weight: Tensor, shortcut: Tensor | None) -> Tensor:
        x = autocast_input(x)
        a = ops.binary_conv2d(
            x,
            weight,
            self.shift_in,
            stride=self.stride,
            padding=weight.shape[2] // 2,
            binary_weight=self.binary_weight,
            may_be_binary=False,  # a stream is real, as the fused Function takes it to be
        )
        u = _normed(self.bn, a)
        shortcut = self._own_shortcut(x, weight) if shortcut is None else shortcut.to(x.dtype)
        if shortcut.shape != u.shape:
            raise ValueError(
                f"the shortcut must have shape {tuple(u.shape)}, not {tuple(shortcut.shape)}"
            )
        u = u + shortcut
        shift_mid, slope, shift_out = self.shift_mid, self.slope, self.shift_out
        if shift_mid is None or slope is None or shift_out is None:
            return u
        return ops.rprelu(u, shift_mid, slope, shift_out)

    def _own_shortcut(self, x: Tensor, weight: Tensor) -> Tensor:
        kind = self._shortcut_kind(weight)
        if kind == "pool":
            _check_even(x)
            return F.avg_pool2d(x, 2)
        return torch.cat((x, x), dim=1) if kind == "repeat" else x

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, binary_weight={self.binary_weight}, fused={self.fused}"
        )


def _one(name: str, value: Size) -> int:
    """The one number that holds for both dimensions of a unit."""
    first, second = sizes(name, value, 2)
    if first != second:
        raise ValueError(f"{name} of a unit must be the same in both dimensions, not {value!r}")
    return first


def _check_unit(
    in_channels: int, out_channels: int, kernel_size: int, stride: int, given_shortcut: bool
) -> None:
    for name, count in (("in_channels", in_channels), ("out_channels", out_channels)):
        check_count(name, count)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size of a unit must be odd, not {kernel_size}")
    if stride > 2:
        raise ValueError(f"stride of a unit must be 1 or 2, not {stride}")
    if not given_shortcut and out_channels not in (in_channels, 2 * in_channels):
        raise ValueError(
            f"a unit's own shortcut does not lead from {in_channels} to {out_channels} channels: "
            f"give it {in_channels} or {2 * in_channels} out_channels, or build it with "
            "given_shortcut=True and call it with a shortcut"
        )


def _check_even(x: Tensor) -> None:
    if x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(
            f"a unit of stride 2 needs even height and width, not {tuple(x.shape[2:])}"
        )


def _is_fusible(norm: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether the fused Function computes exactly what a call of ``norm`` would.

    A subclass may compute anything, and parametrising a module makes it one. Hooks and a
    ``forward`` put on the instance are seen by calls alone. What torch refuses is left to torch.
    """
    return (
        isinstance(norm, _BatchNorm)
        and type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
        and norm.weight is not None
        and norm.bias is not None
        and (norm.running_mean is None) == (norm.running_var is None)
        and norm.eps > 0
        and "forward" not in norm.__dict__
        and not norm._forward_pre_hooks
        and not norm._forward_hooks
        and not norm._backward_pre_hooks
        and not norm._backward_hooks
    )


def _normed(norm: nn.Module, a: Tensor) -> Tensor:
    """``norm(a)``, in ``a``'s dtype.

    Raises:
        ValueError: the norm is on another device, or what it returns is not like ``a``.
    """
    _check_device(norm, a)
    u = norm(a)
    name = type(norm).__name__
    if not isinstance(u, Tensor):
        raise ValueError(f"the norm {name} must return a tensor, not {type(u).__name__}")
    if u.dtype != a.dtype and torch.is_autocast_enabled(a.device.type):
        u = u.to(a.dtype)  # autocast runs some norms in float32
    for what in ("shape", "dtype", "device"):
        given, expected = getattr(u, what), getattr(a, what)
        if given != expected:
            given, expected = (tuple(v) if what == "shape" else v for v in (given, expected))
            raise ValueError(
                f"the norm {name} must keep {what} {expected}, not return {given}: "
                "choose a norm that does"
            )
    return u


def _check_device(norm: nn.Module, a: Tensor) -> None:
    """Raise ValueError where a norm's tensors are elsewhere and nothing is there to bring them."""
    if any(m._forward_pre_hooks or "forward" in m.__dict__ for m in norm.modules()):
        return
    for name, tensor in chain(norm.named_parameters(), norm.named_buffers()):
        if tensor.dim() and tensor.device != a.device:
            raise ValueError(
                f"all tensors must be on one device, not x on {a.device}, "
                f"the norm's {name} on {tensor.device}"
            )


def _statistics_group(bn: _BatchNorm) -> distributed.ProcessGroup | None:
    """The processes that share ``bn``'s batch statistics: none, unless it is a SyncBatchNorm."""
    if not (isinstance(bn, nn.SyncBatchNorm) and bn.training and distributed.is_initialized()):
        return None
    group = bn.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


def _averages(bn: _BatchNorm) -> tuple[Tensor, Tensor] | None:
    """What ``bn`` normalises by in eval mode; None for the batch's own, if it keeps no averages."""
    if bn.running_mean is None or bn.running_var is None:
        return None
    return bn.running_mean, bn.running_var


@torch.no_grad()
def count_batch(bn: _BatchNorm, statistics: tuple[Tensor, Tensor] | None) -> None:
    """Count a batch, and move the running averages towards its statistics, as nn.BatchNorm2d does.

    Args:
        bn: in training mode, and tracking.
        statistics: mean and unbiased variance, (O,) each; None for a batch without values.
    """
    counter, averages = bn.num_batches_tracked, _averages(bn)
    if counter is not None:
        counter.add_(1)
    step: float | Tensor
    if bn.momentum is not None:
        step = bn.momentum
    elif counter is not None:
        step = 1 / counter.double()  # a cumulative average
    else:
        return  # nn.BatchNorm2d's, too, stands still without a count
    if averages is None or statistics is None:
        return
    for average, value in zip(averages, statistics, strict=True):
        weight = step.to(average.dtype) if isinstance(step, Tensor) else step
        average.lerp_(value.to(average.dtype), weight)

"""The half-block: everything between two residual streams."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from tritonbnn import ops
from tritonbnn.checks import check_float
from tritonbnn.nn.activations import INITIAL_SLOPE
from tritonbnn.nn.layers import initialise_weight, new_weight, tell_of_pruning
from tritonbnn.nn.leaf import as_leaf
from tritonbnn.nn.norm import averages, is_fusible, normed, running_averages, statistics_group
from tritonbnn.ops.apply import exporting
from tritonbnn.ops.autocast import autocast_input
from tritonbnn.ops.unit import PLANS
from tritonbnn.window import Size, check_count, sizes


class Handover:
    """Takes packed signs from the unit whose output they are of to the unit that comes next.

    Attributes:
        following: the unit that is called next with the output of the one that is called now, if
            nothing can come between them; else None.
    """

    def __init__(self) -> None:
        self.following: BinaryUnit | None = None
        self._left: tuple[Tensor, Tensor, BinaryUnit] | None = None

    def leave(self, stream: Tensor, signs: Tensor, following: "BinaryUnit") -> None:
        """Keep ``stream``'s signs, packed with ``following``'s shift, until they are taken."""
        self._left = (stream, signs, following)

    def take(self, stream: Tensor, unit: "BinaryUnit") -> Tensor | None:
        """The signs that were left of this very stream for ``unit``, or None; nothing is kept."""
        left, self._left = self._left, None
        if left is None or left[0] is not stream or left[2] is not unit:
            return None
        return left[1]


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
        TypeError: ``norm`` makes no module.
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
        self.bn = norm(out_channels)
        if not isinstance(self.bn, nn.Module):
            raise TypeError(f"norm must make a module, not a {type(self.bn).__name__}")
        if any(place.values()):  # under a FakeTensorMode even a move to the same place fails
            self.bn.to(**place)
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
        self, x: Tensor, shortcut: Tensor | None = None, *, handover: Handover | None = None
    ) -> Tensor:
        """Apply the unit.

        Args:
            x: (N, C, H, W), the input stream.
            shortcut: (N, O, H', W'), what is added after BatchNorm; None for the unit's own.
            handover: brings the signs of x + shift_in and takes those of the output, as
                :class:`~tritonbnn.nn.Chain` passes it; None to pack them here.

        Returns:
            The output stream.

        Raises:
            ValueError: shapes that do not match, an odd size at stride 2, several devices, or a
                norm that changes shape, dtype or device.
            TypeError: an operand is not floating point, or the weight's dtype does not go with x's.
        """
        if isinstance(x, fx.Proxy):
            return as_leaf(self, x, shortcut)
        signs = following = None
        if handover is not None:
            signs, following = handover.take(x, self), handover.following
        weight = self.weight  # once: a parametrised one is computed anew at each look
        if self.binary_weight:
            tell_of_pruning(self)
        bn = self.bn
        shortcut = self.projected(x) if shortcut is None else shortcut
        if not (self.fused and is_fusible(bn)):
            return self._composed(x, weight, shortcut)
        if following is not None and not following._takes_signs():
            following = None
        output = self._fused(x, weight, bn, shortcut, signs, following)
        if handover is not None and following is not None:
            handover.leave(output.z, output.signs, following)
        return output.z

    def projected(self, x: Tensor) -> Tensor | None:
        """The shortcut of x where it is computed before the unit; None where the unit does it.

        A subclass may return its own. Here it is the one that pools and widens at once, which
        launchers have not.
        """
        if self.stride == 1 or self.out_channels != 2 * self.in_channels:
            return None
        _check_even(x)
        pooled = F.avg_pool2d(autocast_input(x), 2)
        return torch.cat((pooled, pooled), dim=1)

    def _takes_signs(self) -> bool:
        """Whether it can start with signs that were packed before it is called.

        It cannot where the shift that is added to the stream is computed in the call. In an
        exported program no packed words go from operator to operator.
        """
        return (
            self.fused
            and is_fusible(self.bn)
            and "shift_in" in self._parameters
            and not exporting()
        )

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
        following: "BinaryUnit | None",
    ) -> ops.UnitOutput:
        tracks = bn.training and bn.track_running_stats
        return ops.binary_unit(
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
            pack=following is not None,
            next_shift=None if following is None else following.shift_in,
            statistics=None if bn.training else averages(bn),
            eps=bn.eps,
            plan=self.plan,
            group=statistics_group(bn),
            averages=running_averages(bn) if tracks else None,
        )

    def _composed(self, x: Tensor, weight: Tensor, shortcut: Tensor | None) -> Tensor:
        check_float("x", x)
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
        u = normed(self.bn, a)
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
    check_float("x", x)
    if x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(
            f"a unit of stride 2 needs even height and width, not {tuple(x.shape[2:])}"
        )

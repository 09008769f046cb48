"""The half-block as one Function, which saves packed signs and the stream."""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from tritonbnn import checks
from tritonbnn.contract import Averages, Kept, Options, Statistics
from tritonbnn.layout import in_format_of, laid_out_as
from tritonbnn.ops import backend, composed, library
from tritonbnn.ops.apply import apply
from tritonbnn.ops.autocast import autocast_input
from tritonbnn.ops.norm import move_averages
from tritonbnn.ops.once import differentiable_once

PLANS = ("auto", "keep", "recompute", "fused")
SHORTCUTS = ("identity", "pool", "repeat")


class UnitOutput(NamedTuple):
    """A unit's output, and the batch's statistics, with which the caller updates its averages.

    Attributes:
        z: (N, O, H', W'), the output stream.
        signs: int32 (N, H', W', words), packed signs of z + next_shift if they were asked for.
        mean: (O,), of the scaled convolution; the given one where statistics were given.
        variance: (O,), its unbiased variance; likewise.
    """

    z: Tensor
    signs: Tensor
    mean: Tensor
    variance: Tensor


class _BinaryUnit(torch.autograd.Function):
    """The forward pass keeps what ``options.plan`` says; backward computes the rest again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gamma: Tensor,
        beta: Tensor,
        shift_in: Tensor | None,
        shift_mid: Tensor | None,
        slope: Tensor | None,
        shift_out: Tensor | None,
        residual: Tensor | None,
        signs: Tensor | None,
        next_shift: Tensor | None,
        statistics: Statistics | None,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        operands = (x, weight, gamma, beta, shift_in, shift_mid, slope, shift_out, residual)
        compute = composed.forward if options.whole is None else options.whole.forward
        outputs, kept = compute(*operands, signs, next_shift, statistics, options)
        outputs = (in_format_of(outputs[0], x, weight), *outputs[1:])
        ctx.save_for_backward(x, weight, gamma, shift_in, shift_mid, slope, residual, *kept)
        ctx.options = options
        ctx.mark_non_differentiable(*outputs[1:])
        if options.whole is not None:  # torch.compile does not know it
            ctx.set_materialize_grads(False)  # no zeros for what is not differentiable
        return outputs

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:  # nothing behind the unit has a gradient
            return (None,) * len(ctx.needs_input_grad)
        x, weight, gamma, shift_in, shift_mid, slope, residual, *kept = ctx.saved_tensors
        needs_x, needs_weight, _, _, needs_shift_in = ctx.needs_input_grad[:5]
        whole = None if library.through_operators(grad) else ctx.options.whole
        compute = composed.backward if whole is None else whole.backward
        gradients = compute(
            *(grad, x, weight, gamma, shift_in, shift_mid, slope, residual, Kept(*kept)),
            ctx.options,
            wants_input=needs_x or needs_shift_in,
            wants_weight=needs_weight,
        )
        return (
            laid_out_as(gradients.x, x) if needs_x else None,
            laid_out_as(gradients.weight, weight),
            *(gradients.gamma, gradients.beta),
            None if shift_in is None else gradients.shift_in,
            *(gradients.shift_mid, gradients.slope, gradients.shift_out),
            None if residual is None else laid_out_as(gradients.residual, residual),
            *(None,) * 4,
        )


def binary_unit(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    shift_in: Tensor | None = None,
    shift_mid: Tensor | None = None,
    slope: Tensor | None = None,
    shift_out: Tensor | None = None,
    *,
    shortcut: str | Tensor = "identity",
    stride: int = 1,
    binary_weight: bool = True,
    signs: Tensor | None = None,
    pack: bool = False,
    next_shift: Tensor | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    plan: str = "auto",
    group: distributed.ProcessGroup | None = None,
    averages: Averages | None = None,
) -> UnitOutput:
    """rprelu(BatchNorm(binary_conv2d(x, weight, shift_in)) + shortcut) in one Function.

    Equal to the composition of the small operators and torch's batch_norm. Saved for backward are
    ``x``, which the shortcut needs anyway, its packed signs, and under the plan "keep" also the
    convolution's output as int16; under "recompute" that is convolved again. Under "fused" it is
    never written where there is a one-bit tensor core: four passes, two forward and two backward,
    each do the convolution themselves. With a real weight, or elsewhere, that is "recompute".

    Args:
        x: (N, C, H, W), the input stream; float32, bfloat16, float16, or float64 on the CPU.
            Under autocast a float32 x is cast first.
        weight: (O, C, k, k), k = 1 or 3, padded by k // 2 with zeros after the sign.
        gamma: (O,), BatchNorm's weight.
        beta: (O,), BatchNorm's bias.
        shift_in: (C,), added before the sign, or None.
        shift_mid: (O,), added before the PReLU; None, together with the next two, for no PReLU.
        slope: (O,), of the PReLU.
        shift_out: (O,), added after the PReLU.
        shortcut: "identity" (O = C), "repeat" (O = 2 C: the channels twice), "pool" (2x2 average,
            with stride 2), or a tensor (N, O, H', W').
        stride: 1 or 2.
        binary_weight: False for a real weight, as in step 1 of the two-step schedule.
        signs: ``pack_signs(x, shift_in)``, if the unit before this one has packed them already.
        pack: whether to pack the output's signs, for the unit that comes next.
        next_shift: (O,), that unit's ``shift_in``, or None. Its gradient is that unit's to compute.
        statistics: (mean, variance), (O,) each, to normalise by, as in eval mode; None for the
            batch's own.
        eps: added to the variance.
        plan: "keep", "recompute", "fused", or "auto": what the tuning table says for these
            shapes, else "fused" on a one-bit core and "keep" elsewhere. "recompute" and "fused"
            save least. The table knows single shapes, so "auto" is "keep" where torch.compile
            makes one program for many.
        group: processes that share the batch's statistics, as SyncBatchNorm does; or None.
        averages: BatchNorm's running ones, which the batch moves in place; None for none.

    Returns:
        The output stream in ``x``'s dtype, its signs, and the statistics. The stream is in
        channels_last memory where ``x`` or ``weight`` is, else contiguous.

    Raises:
        TypeError: an operand is not floating point, or the weight is neither in ``x``'s dtype nor
            float32 beside a narrower x.
        ValueError: shapes that do not match, an unknown shortcut or plan, one value per channel
            where the batch's own statistics are wanted, several devices.
    """
    checks.check_activation("x", x, dims=(4,))
    checks.check_conv_weight(weight, x.shape[1])
    if gamma is None or beta is None:
        raise TypeError("gamma and beta must be tensors: the BatchNorm of a unit is affine")
    given = None if statistics is None else Statistics(*statistics)
    mean, variance = (None, None) if given is None else given
    vectors = {
        "gamma": gamma,
        "beta": beta,
        "shift_mid": shift_mid,
        "slope": slope,
        "shift_out": shift_out,
        "next_shift": next_shift,
        "the running mean": mean,
        "the running variance": variance,
    }
    checks.check_per_channel(weight.shape[0], **vectors)
    checks.check_per_channel(x.shape[1], shift_in=shift_in)
    if signs is not None:
        checks.check_packed("signs", signs, x.shape[1])
        checks.check_shape("signs", signs, (x.shape[0], *x.shape[2:], signs.shape[-1]))
    residual = shortcut if isinstance(shortcut, Tensor) else None
    checks.check_same_device(
        x=x,
        weight=weight,
        shift_in=shift_in,
        shortcut=residual,
        signs=signs,
        **vectors,
    )
    if len({v is None for v in (shift_mid, slope, shift_out)}) > 1:
        raise ValueError("shift_mid, slope and shift_out must be given together, or none of them")
    if plan not in PLANS:
        raise ValueError(f"plan must be one of {', '.join(PLANS)}, not {plan!r}")
    kind = "identity" if isinstance(shortcut, Tensor) else shortcut
    shape = (x.shape[0], weight.shape[0], *composed.output_size(x, weight, stride))
    _check_shortcut(x, residual, kind, stride, shape)
    if statistics is None and x.shape[0] and shape[0] * shape[2] * shape[3] == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {shape}"
        )
    x = autocast_input(x)
    checks.check_weight_dtype(x, weight)
    residual = None if residual is None else residual.to(x.dtype)
    next_shift = None if next_shift is None else next_shift.detach()
    operands = (x, weight, gamma, beta, shift_in, shift_mid, slope, shift_out, residual)
    launchers = library.whole_units(*operands, next_shift, mean, variance)
    whole = None if launchers is None else launchers.whole
    if group is not None and whole is not None and not whole.SHARES_STATISTICS:
        whole = None
    moved = averages is not None and whole is not None and whole.moves(averages, shape[1], x.device)
    if plan == "auto":
        plan = _automatic_plan(x, weight, stride, binary_weight, launchers)
    moving = averages if moved else None
    options = Options(stride, kind, binary_weight, eps, plan, group, pack, whole, moving)
    output = UnitOutput(*apply(_BinaryUnit, *operands, signs, next_shift, given, options))
    if averages is not None and not moved:
        # with a group there may be values of other processes
        known = x.shape[0] > 0 or group is not None
        move_averages(averages, (output.mean, output.variance) if known else None)
    return output


def _automatic_plan(
    x: Tensor, weight: Tensor, stride: int, binary_weight: bool, launchers: ModuleType | None
) -> str:
    """The plan that the launchers have for a unit; None for those that x's device has."""
    sizes = (*x.shape, *weight.shape[::2])
    if torch.compiler.is_compiling():
        # not at the top, as it imports Triton, which then cannot be told to interpret
        from torch.fx.experimental.symbolic_shapes import guard_scalar, has_static_value

        if not all(map(has_static_value, sizes)):
            return "keep"
        sizes = tuple(map(guard_scalar, sizes))  # a symbol with one value is no constant yet
    return _planned(*(*sizes, stride, x.dtype, binary_weight, x.device, launchers))


def _planned(
    batch: int,
    channels: int,
    height: int,
    width: int,
    out_channels: int,
    kernel_size: int,
    stride: int,
    dtype: torch.dtype,
    binary_weight: bool,
    device: torch.device,
    launchers: ModuleType | None,
) -> str:
    """The tuning table's plan for one shape."""
    launchers = backend.launchers(device) if launchers is None else launchers
    return launchers.unit_plan(
        batch=batch,
        height=height,
        width=width,
        channels=channels,
        out_channels=out_channels,
        kernel_size=kernel_size,
        stride=stride,
        dtype=dtype,
        binary_weight=binary_weight,
        device=device,
    )


# torch.compile asks once and need not trace the lookup, which takes constants only. This is what
# torch.compiler.assume_constant_result does; calling that would import the compiler, and Triton.
vars(_planned)["_dynamo_marked_constant"] = True


def _check_shortcut(
    x: Tensor, residual: Tensor | None, kind: str, stride: int, shape: tuple[int, ...]
) -> None:
    if residual is not None:
        if residual.shape != shape:
            raise ValueError(f"the shortcut must have shape {shape}, not {tuple(residual.shape)}")
        return
    if kind not in SHORTCUTS:
        raise ValueError(
            f"shortcut must be a tensor or one of {', '.join(SHORTCUTS)}, not {kind!r}"
        )
    if (stride == 2) != (kind == "pool"):
        raise ValueError(f"the shortcut {kind!r} does not go with stride {stride}")
    if kind == "pool" and (x.shape[2] % 2 or x.shape[3] % 2):
        raise ValueError(
            f"a unit of stride 2 needs even height and width, not {tuple(x.shape[2:])}"
        )
    if shape[1] != x.shape[1] * (2 if kind == "repeat" else 1):
        raise ValueError(
            f"the shortcut {kind!r} does not lead from {x.shape[1]} to {shape[1]} channels"
        )

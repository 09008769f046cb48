"""What stands for the autograd Functions in an exported program: operators from floats to floats.

torch.export writes down operators, and a Function is none. So each Function has an operator here
that computes the same, with a gradient of its own. That one runs the Function again and asks it:
an exported program that trains keeps the operands alone. Packed words have no gradient, so none of
these operators takes or returns any.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tritonbnn import checks
from tritonbnn.contract import Options, Statistics
from tritonbnn.layout import empty_channels_last, empty_pixels, in_format_of
from tritonbnn.ops import composed, library
from tritonbnn.ops.any_window import AnyWindow
from tritonbnn.ops.binarize import _Binarize
from tritonbnn.ops.conv import _BinaryConv2d
from tritonbnn.ops.linear import _BinaryLinear
from tritonbnn.ops.rprelu import _RPReLU
from tritonbnn.ops.unit import _BinaryUnit
from tritonbnn.window import Window

OPERATORS: dict[str, Any] = {}
"""By name: binarize, rprelu, binary_conv2d, binary_conv2d_window, binary_linear, binary_unit."""


def register(
    name: str,
    schema: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    outputs: int = 1,
    constants: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """Register an operator, and the one that computes its gradients.

    Args:
        name: of the operator.
        schema: of its arguments, tensors first; ``Tensor?`` where one may be None.
        compute: the differentiable computation of these arguments.
        fake: the same of shapes, dtypes and strides alone.
        outputs: how many tensors it returns; the first has a gradient.
        constants: which arguments have none, though they are tensors.

    Returns:
        The operator.
    """
    returned = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
    define: Any = partial(torch.library.custom_op, mutates_args=())

    def forward(*arguments: Any) -> Any:
        with torch.no_grad():
            return compute(*arguments)

    operator = define(f"{library.NAMESPACE}::{name}", forward, schema=f"({schema}) -> {returned}")
    operator.register_fake(fake)

    def gradients(grad: Tensor, wanted: list[bool], *arguments: Any) -> list[Tensor]:
        inputs = list(arguments)
        for i, wants in enumerate(wanted):
            if wants:
                inputs[i] = arguments[i].detach().requires_grad_()
        with torch.enable_grad():
            result = compute(*inputs)
        y = result if outputs == 1 else result[0]
        leaves = [x for x, wants in zip(inputs, wanted, strict=False) if wants]
        # in the layout that was promised, whatever the Function returned
        return [
            torch.empty_like(leaf).copy_(g)
            for leaf, g in zip(leaves, torch.autograd.grad(y, leaves, grad), strict=True)
        ]

    backward = define(
        f"{library.NAMESPACE}::{name}_gradients",
        gradients,
        schema=f"(Tensor grad, bool[] wanted, {schema}) -> Tensor[]",
    )

    @backward.register_fake
    def _(grad: Tensor, wanted: list[bool], *arguments: Any) -> list[Tensor]:
        wants = zip(arguments, wanted, strict=False)
        return [torch.empty_like(x, requires_grad=False) for x, wanted in wants if wanted]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [x if isinstance(x, Tensor) else None for x in inputs]
        ctx.save_for_backward(*tensors)
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]

    def run_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.others, strict=True)
        arguments = [other if tensor is None else tensor for tensor, other in pairs]
        wanted = [bool(w) and i not in constants for i, w in enumerate(ctx.needs_input_grad)]
        found = iter(backward(grad, wanted, *arguments))
        return tuple(next(found) if wants else None for wants in wanted)

    operator.register_autograd(run_backward, setup_context=setup_context)
    OPERATORS[name] = operator
    return operator


def _calling(operator: Callable[..., Any]) -> Callable[..., Any]:
    """A plain function, which is what torch.export follows."""

    def call(*arguments: Any) -> Any:
        return operator(*arguments)

    return call


def _like_pixels(x: Tensor, *_: Any) -> Tensor:
    return in_format_of(empty_pixels(x, x.dtype), x)


def _conv_output(
    x: Tensor, weight: Tensor, shift: Tensor | None, stride: int, padding: int, *_: bool
) -> Tensor:
    size = checks.conv_output_size(x.shape[2], x.shape[3], weight.shape[2], stride, padding)
    return _image(x, weight, size)


def _image(x: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    y = empty_channels_last((x.shape[0], weight.shape[0], *size), x.dtype, x.device)
    return in_format_of(y, x, weight)


def _window(
    x: Tensor, weight: Tensor, shift: Tensor | None, *options: Any
) -> tuple[Window, tuple[bool, bool]]:
    *sides, groups, binary_weight, may_be_binary = options
    stride, padding, extra, dilation = map(tuple, sides)
    return Window(stride, padding, extra, dilation, groups), (binary_weight, may_be_binary)


def _any_window(x: Tensor, weight: Tensor, shift: Tensor | None, *options: Any) -> Tensor:
    window, kinds = _window(x, weight, shift, *options)
    return AnyWindow.apply(x, weight, shift, window, *kinds)


def _any_window_output(x: Tensor, weight: Tensor, shift: Tensor | None, *options: Any) -> Tensor:
    window, _ = _window(x, weight, shift, *options)
    return _image(x, weight, window.output_size(weight.shape[2:], x.shape[2:]))


def _linear_output(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


_FUNCTIONS: tuple[tuple[str, Any, str, Callable[..., Any]], ...] = (
    ("binarize", _Binarize, "Tensor x, Tensor? shift", _like_pixels),
    ("rprelu", _RPReLU, "Tensor x, Tensor shift_in, Tensor slope, Tensor shift_out", _like_pixels),
    (
        "binary_conv2d",
        _BinaryConv2d,
        "Tensor x, Tensor weight, Tensor? shift, int stride, int padding, bool binary_weight, "
        "bool may_be_binary",
        _conv_output,
    ),
    (
        "binary_linear",
        _BinaryLinear,
        "Tensor x, Tensor weight, Tensor? shift, bool binary_weight, bool may_be_binary",
        _linear_output,
    ),
)
for _name, _function, _schema, _fake in _FUNCTIONS:
    _operator = register(_name, _schema, _function.apply, _fake)
    _function.exported = staticmethod(_calling(_operator))
    _function.operator = f"{library.NAMESPACE}::{_name}"  # what a profiler calls it
    _function.operator = f"{library.NAMESPACE}::{_name}"  # what a profiler calls it


_binary_conv2d_window = register(
    "binary_conv2d_window",
    "Tensor x, Tensor weight, Tensor? shift, int[] stride, int[] padding, int[] extra, "
    "int[] dilation, int groups, bool binary_weight, bool may_be_binary",
    _any_window,
    _any_window_output,
)


def _exported_window(
    x: Tensor, weight: Tensor, shift: Tensor | None, window: Window, *kinds: bool
) -> Tensor:
    sides = (list(window.stride), list(window.padding), list(window.extra), list(window.dilation))
    return _binary_conv2d_window(x, weight, shift, *sides, window.groups, *kinds)


AnyWindow.exported = staticmethod(_exported_window)  # type: ignore[attr-defined]
AnyWindow.operator = f"{library.NAMESPACE}::binary_conv2d_window"  # type: ignore[attr-defined]


def _unit(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    shift_in: Tensor | None,
    shift_mid: Tensor | None,
    slope: Tensor | None,
    shift_out: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    stride: int,
    shortcut: str,
    binary_weight: bool,
    eps: float,
    plan: str,
) -> tuple[Tensor, Tensor, Tensor]:
    given = None if mean is None or variance is None else Statistics(mean, variance)
    options = Options(stride, shortcut, binary_weight, eps, plan, group=None, pack=False)
    operands = (x, weight, gamma, beta, shift_in, shift_mid, slope, shift_out, residual)
    z, _, *statistics = _BinaryUnit.apply(*operands, None, None, given, options)
    return z, statistics[0], statistics[1]


def _unit_output(
    x: Tensor, weight: Tensor, *operands: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    stride: Any = operands[9]
    size = composed.output_size(x, weight, stride)
    z = _image(x, weight, size)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, variance = (z.new_empty(weight.shape[0], dtype=wide) for _ in range(2))
    return z, mean, variance


_binary_unit = register(
    "binary_unit",
    "Tensor x, Tensor weight, Tensor gamma, Tensor beta, Tensor? shift_in, Tensor? shift_mid, "
    "Tensor? slope, Tensor? shift_out, Tensor? residual, Tensor? mean, Tensor? variance, "
    "int stride, str shortcut, bool binary_weight, float eps, str plan",
    _unit,
    _unit_output,
    outputs=3,
    constants=(9, 10),
)


def _exported_unit(
    *operands: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *tensors, _, next_shift, given, options = operands
    if options.group is not None:
        raise ValueError(
            "a unit whose batch statistics several processes share cannot be exported: "
            "export it in eval mode, or before the process group is made"
        )
    fields = (options.stride, options.shortcut, options.binary_weight, options.eps, options.plan)
    z, mean, variance = _binary_unit(*tensors, *(given or (None, None)), *fields)
    if options.pack:
        signs = library.pack_signs(z.detach(), next_shift)
    else:
        signs = z.new_empty((z.shape[0], *z.shape[2:], 0), dtype=torch.int32)
    return z, signs, mean.detach(), variance.detach()


_BinaryUnit.exported = staticmethod(_exported_unit)  # type: ignore[attr-defined]
_BinaryUnit.operator = f"{library.NAMESPACE}::binary_unit"  # type: ignore[attr-defined]
_BinaryUnit.operator = f"{library.NAMESPACE}::binary_unit"  # type: ignore[attr-defined]

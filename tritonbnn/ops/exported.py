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

from tritonbnn.layout import empty_channels_last, empty_pixels, in_format_of
from tritonbnn.ops.flops import NAMESPACE

OPERATORS: dict[str, Any] = {}
"""By name. The file of each Function registers its own."""

_PLAIN: dict[str, Callable[..., Any]] = {}


def register(
    name: str,
    schema: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    plain: Callable[..., Any],
    outputs: int = 1,
    constants: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """Register an operator, and the one that computes its gradients.

    Args:
        name: of the operator.
        schema: of its arguments, tensors first; ``Tensor?`` where one may be None.
        compute: the differentiable computation of these arguments.
        fake: the same of shapes, dtypes and strides alone.
        plain: its forward pass in torch's own operators, for :func:`decompositions`.
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

    operator = define(f"{NAMESPACE}::{name}", forward, schema=f"({schema}) -> {returned}")
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
        f"{NAMESPACE}::{name}_gradients",
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
    OPERATORS[name], _PLAIN[name] = operator, plain
    return operator


def stand_in(
    function: Any,
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    plain: Callable[..., Any],
) -> None:
    """Register an operator that an exported program calls in the place of a Function.

    Args:
        function: the autograd Function, whose operands an operator takes as they are.
        name: of the operator, as all that follow in :func:`register`.
        schema: of the operands.
        fake: of shapes.
        plain: in torch's own operators.
    """
    operator = register(name, schema, function.apply, fake, plain)
    replace(function, name, lambda *operands: operator(*operands))


def replace(function: Any, name: str, call: Callable[..., Any]) -> None:
    """Have :func:`tritonbnn.ops.apply.apply` run ``call`` for a Function where torch exports.

    Args:
        function: the autograd Function.
        name: what a profiler calls it.
        call: a plain function, which is what torch.export follows.
    """
    function.exported = staticmethod(call)
    function.operator = f"{NAMESPACE}::{name}"


def decompositions() -> dict[Any, Callable[..., Any]]:
    """A table for ``ExportedProgram.run_decompositions``: after it the program needs torch alone.

    Such a program can be compiled by AOTInductor, and run from C++. It computes the forward pass,
    without packed bits, and has no pseudo-gradients.

    Example:
        >>> program = torch.export.export(model.eval(), (images,))
        >>> program = program.run_decompositions(tritonbnn.ops.decompositions())
        >>> torch._inductor.aoti_compile_and_package(program)
    """
    return {OPERATORS[name]._opoverload: plain for name, plain in _PLAIN.items()}


def like_pixels(x: Tensor, *_: Any) -> Tensor:
    """A fake: of the shape, dtype and memory format of ``x``."""
    return in_format_of(empty_pixels(x, x.dtype), x)


def image_like(x: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    """A fake convolution's output of a size, in the format that ``x`` and ``weight`` ask for."""
    y = empty_channels_last((x.shape[0], weight.shape[0], *size), x.dtype, x.device)
    return in_format_of(y, x, weight)

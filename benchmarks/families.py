"""Which family an operator or a GPU kernel belongs to.

Our launchers are operators with names of their own; torch's are told apart by name, and the stem by
its weight, which has an image's channels. What a compiler generates is elementwise: convolutions
and matrix products it leaves to the libraries.
"""

import re
from collections.abc import Sequence

PACK = "pack"
FORWARD = "convolution forward"
GRADIENTS = "convolution gradients"
ELEMENTWISE = "elementwise and norm"
ENDS = "stem and head"
OPTIMIZER = "optimizer"
FAMILIES = (PACK, FORWARD, GRADIENTS, ELEMENTWISE, ENDS, OPTIMIZER)

PASSES = {
    "weights packed": PACK,
    "signs packed": PACK,
    "forward product": FORWARD,
    "input gradient": GRADIENTS,
    "weight gradient": GRADIENTS,
}
"""The passes of a whole unit in C by name; the others are elementwise."""

_IMAGE_CHANNELS = (1, 3)

_OURS = (
    (re.compile(r"^(un)?pack_"), PACK),
    (re.compile(r"^conv_.*_grad$"), GRADIENTS),
    (re.compile(r"^conv_"), FORWARD),
)
"""Launchers by name; the others are elementwise."""

_CONVOLUTIONS = {"conv2d": (1, FORWARD), "convolution": (1, FORWARD)}
_CONVOLUTIONS["convolution_backward"] = (2, GRADIENTS)
"""Of torch: which argument is the weight, and the family of all but the stem's."""

_HEAD = ("linear", "addmm", "mm", "log_softmax", "nll_loss", "cross_entropy")
_OPTIMIZER = re.compile(r"Optimizer\.(step|zero_grad)#|_fused_adam|multi_tensor|FusedAdam")

_KERNELS = (
    (re.compile(r"^triton_(?!tem)"), ELEMENTWISE),
    (re.compile(r"wgrad|dgrad|bgrad|_grad_kernel"), GRADIENTS),
    (
        re.compile(r"^triton_tem|fprop|implicit|winograd|cutlass|xmma|gemm|conv", re.I),
        FORWARD,
    ),
)


def operator_family(name: str, shapes: Sequence[Sequence[int]]) -> str | None:
    """The family of an operator by its qualified name; None for one that is only a wrapper.

    Args:
        name: as the dispatcher and the profiler know it, such as ``aten::convolution``.
        shapes: of its arguments; empty for what is not a tensor.
    """
    if _OPTIMIZER.search(name):
        return OPTIMIZER
    space, _, bare = name.partition("::")
    if space == "tritonbnn":
        return _first(_OURS, bare)
    if space != "aten":
        return None
    bare = bare.lstrip("_")
    if bare in _CONVOLUTIONS:
        index, family = _CONVOLUTIONS[bare]
        weight = shapes[index] if len(shapes) > index else ()
        return ENDS if len(weight) == 4 and weight[1] in _IMAGE_CHANNELS else family
    return ENDS if bare.startswith(_HEAD) else ELEMENTWISE


def kernel_family(name: str) -> str:
    """The family of a GPU kernel of which no operator is known."""
    if _OPTIMIZER.search(name):
        return OPTIMIZER
    return _first(_KERNELS, name)


def _first(patterns: Sequence[tuple[re.Pattern, str]], name: str) -> str:
    return next((family for pattern, family in patterns if pattern.search(name)), ELEMENTWISE)

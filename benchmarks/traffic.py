"""Bytes that a training step moves at least, by family: counted, not measured.

Every operator reads its operands once and writes its results once. Views move nothing. A kernel
that reads twice moves more, so these are lower bounds of what the step as written costs; an
operator's own scratch memory is not seen. A compiled network is not counted: its operators are the
compiler's.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.families import OPTIMIZER, operator_family
from benchmarks.steps import training_step
from tritonbnn.ops.library import through_dispatcher

ADAM_PASSES = 7
"""Adam reads parameter, gradient and two moments, and writes all but the gradient."""

_ADAM = "aten::_fused_adam_"  # it returns nothing, so what it writes is not among its results
_ALLOCATIONS = ("empty", "new_empty", "detach")


class Operators(TorchDispatchMode):
    """Hands every operator that moves memory to :meth:`record`. Views and allocations do not.

    Attributes:
        operations: multiplications and additions of the operator at hand, where it is a product.
    """

    operations = 0

    def record(self, name: str, family: str, nbytes: int) -> None:
        """Take note of an operator.

        Args:
            name: qualified, such as ``aten::add``.
            family: see :mod:`benchmarks.families`.
            nbytes: that it reads and writes.
        """
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func._schema.name
        bare = name.rpartition("::")[2].lstrip("_")
        if func.is_view or bare.startswith(_ALLOCATIONS):
            return results
        flops = flop_registry.get(func._overloadpacket)
        self.operations = flops(*args, **(kwargs or {}), out_val=results) if flops else 0
        shapes = [tuple(a.shape) if isinstance(a, Tensor) else () for a in args]
        family = operator_family(name, shapes)
        if name == _ADAM:
            self.record(name, OPTIMIZER, ADAM_PASSES * sum(_nbytes(p) for p in args[0]))
        elif family:
            written = {id(leaf) for leaf in tree_leaves(results)}
            named = [leaf for leaf in tree_leaves(kwargs) if id(leaf) not in written]  # no out=
            leaves = [*tree_leaves(args), *named, *tree_leaves(results)]
            moved = sum(_nbytes(leaf) for leaf in leaves if isinstance(leaf, Tensor))
            self.record(name, family, moved)
        return results


class _Traffic(Operators):
    """Adds up the bytes of all operators that run under it, by family."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def record(self, name: str, family: str, nbytes: int) -> None:
        self.bytes[family] += nbytes


def _nbytes(tensor: Tensor) -> int:
    """Bytes that a tensor's values take in memory; an expanded one is no larger than its source."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def counted_bytes(
    build: Callable[[], nn.Module],
    batch: int,
    size: int,
    *,
    bf16: bool,
    device: torch.device,
    in_channels: int = 3,
) -> dict[str, int]:
    """Bytes of one training step by family, without running it.

    Args:
        build: makes the network on torch's default device.
        batch: images of the step.
        size: height and width of an image.
        bf16: forward under bf16 autocast.
        device: the step's, which decides what autocast casts.
        in_channels: of an image.
    """
    traffic = _Traffic()
    with FakeTensorMode(), torch.device(device), through_dispatcher():
        model = build()
        images = torch.empty(batch, in_channels, size, size)
        labels = torch.zeros(batch, dtype=torch.int64)
        step = training_step(model, images, labels, bf16=bf16)
        step()  # creates the optimizer's state
        with traffic:
            step()
    return dict(traffic.bytes)

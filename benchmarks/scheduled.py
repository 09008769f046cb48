"""What a compiled network launches, by the compiler's own schedule, of which no code is made.

Inductor decides what it fuses before it writes code. Its nodes are counted then: each is a launch
that reads and writes its buffers once, as the compiler itself counts them. Where no GPU is, the
schedule is the one that Inductor makes for a CPU.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import MultiOutput
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.launches import COMPILED, Counted, in_channels_last, rest_of_step


class _ScheduledError(Exception):
    """Raised in place of running the compiled network, which has no code."""


def compiled_launches(
    build: Callable[[], nn.Module], batch: int, size: int, *, bf16: bool
) -> list[Counted]:
    """What one training step with Adam launches of a network that torch.compile has compiled.

    Args:
        build: makes the network on torch's default device.
        batch: images of the step.
        size: height and width of an image.
        bf16: forward under bf16 autocast.
    """
    counted: list[Counted] = []

    def schedule(graph: Any) -> Any:
        graph.init_wrapper_code()
        graph._update_scheduler()
        counted.extend(_launches(graph))
        return mock.Mock(call=mock.Mock(side_effect=_ScheduledError), runner=None, __file__="")

    with (
        FakeTensorMode(),
        functorch_config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False),
        inductor_config.patch(fx_graph_cache=False),
        mock.patch.object(GraphLowering, "compile_to_module", schedule),
    ):
        torch._dynamo.reset()
        model = in_channels_last(build())
        images = torch.empty(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                torch.compile(model, dynamic=False)(images)
        except _ScheduledError:
            return counted + rest_of_step(model, batch, bf16=bf16)
        finally:
            torch._dynamo.reset()
    raise RuntimeError("the compiled network ran, though it has no code: it was not scheduled")


def _launches(graph: Any) -> list[Counted]:
    """Of one graph. A node with several results, such as a convolution's gradients, is as many."""
    nodes = graph.scheduler.nodes
    results = {node.get_name(): node for node in nodes if isinstance(node.node, MultiOutput)}
    sources = {name: node.node.inputs[0].get_name() for name, node in results.items()}
    shared = Counter(sources.values())
    counted, shares = [], {}
    for node in nodes:
        moved = node.get_read_write_buffers_sizes()
        buffer = node.node.get_name() if node.node else ""
        if buffer in shared:
            whole = _counted(node, moved)
            parts = shared[buffer]
            share = {"bytes": whole.bytes // parts, "operations": whole.operations // parts}
            shares[buffer] = replace(whole, **share)
        elif node.get_name() in results:
            share = shares[sources[node.get_name()]]
            counted.append(replace(share, bytes=share.bytes + moved))
        elif moved:  # else it is a view or an allocation
            counted.append(_counted(node, moved))
    return counted


def _counted(node: Any, moved: int) -> Counted:
    name = getattr(node.node, "python_kernel_name", None) or "fused"
    name = name.removeprefix("extern_kernels.").removeprefix("torch.ops.aten.")
    return Counted(COMPILED, name, moved, {}, _operations(name, node))


def _operations(name: str, node: Any) -> int:
    """Multiplications and additions of a node that is a library's product."""
    if "convolution" not in name and not name.endswith("mm"):
        return 0
    sizes = [[int(n) for n in each.get_size()] for each in node.node.inputs if _has_size(each)]
    if "convolution_backward" in name:
        grad, x, weight = sizes[:3]
        products = 2 if x[1] > 3 else 1  # an image has no gradient
        return products * 2 * torch.Size(grad).numel() * torch.Size(weight[1:]).numel()
    if "convolution" in name:
        output = torch.Size([int(n) for n in node.node.get_size()])
        return 2 * output.numel() * torch.Size(sizes[1][1:]).numel()
    *_, left, right = sizes
    return 2 * torch.Size(left).numel() * right[-1]


def _has_size(operand: Any) -> bool:
    return bool(operand.maybe_get_size())

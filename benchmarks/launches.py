"""What a training step launches, and the bytes of each launch: counted on tensors without data.

Our launchers are called as they are on a GPU, and hand in their launches instead of starting them.
Every other operator is one launch of torch's. Each launch reads its operands once and writes its
results once. A GPU is stood for by the CPU: its autocast decides what torch's own operators cast.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from benchmarks.steps import training_step
from benchmarks.traffic import Operators
from tritonbnn.kernels import below_triton, config
from tritonbnn.kernels.launch import Launch, launching_by
from tritonbnn.kernels.targets import Target
from tritonbnn.ops.backend import VARIABLE
from tritonbnn.ops.library import through_dispatcher

OURS, TORCH, COMPILED = "ours", "torch", "compiled"
SMALL = 2**20
"""Bytes below which a launch is all overhead."""


@dataclass(frozen=True)
class Counted:
    """One launch.

    Attributes:
        source: ``OURS``, ``TORCH`` or ``COMPILED``.
        name: of the kernel or operator.
        bytes: that it reads and writes.
        tensors: the same by the name of each tensor, where it is known.
        operations: multiplications and additions of a matrix product.
        launch: as it was recorded, if it is ours.
    """

    source: str
    name: str
    bytes: int
    tensors: dict[str, int] = field(default_factory=dict)
    operations: int = 0
    launch: Launch | None = field(default=None, repr=False)


class _Torch(Operators):
    """Notes torch's own operators as launches."""

    def __init__(self, counted: list[Counted]) -> None:
        super().__init__()
        self.counted = counted

    def record(self, name: str, family: str, nbytes: int) -> None:
        bare = name.partition("::")[2]
        self.counted.append(Counted(TORCH, bare, nbytes, {family: nbytes}, self.operations))


def step_launches(
    build: Callable[[], nn.Module], batch: int, size: int, *, bf16: bool, target: Target
) -> list[Counted]:
    """What one training step with Adam launches, in order.

    Args:
        build: makes the network on torch's default device.
        batch: images of the step.
        size: height and width of an image.
        bf16: forward under bf16 autocast.
        target: whose default formulations and tiles our kernels take.
    """
    counted: list[Counted] = []

    def launched(*launch: Any) -> None:
        counted.append(of_ours(Launch(*launch)))

    with FakeTensorMode(), as_on_a_gpu(target, launched):
        model = in_channels_last(build())
        images = torch.empty(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
        step = training_step(model, images, torch.zeros(batch, dtype=torch.int64), bf16=bf16)
        step()  # creates the optimizer's state
        counted.clear()
        with _Torch(counted):
            step()
    return counted


def call_launches(make: Callable[[], Callable[[], Any]], target: Target) -> list[Counted]:
    """What a call without gradients launches, in order: the second one, as the first prepares.

    Args:
        make: makes it, of a network and images on torch's default device.
        target: whose default formulations and tiles our kernels take.
    """
    counted: list[Counted] = []

    def launched(*launch: Any) -> None:
        counted.append(of_ours(Launch(*launch)))

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad(), as_on_a_gpu(target, launched):
        call = make()
        call()
        counted.clear()
        with _Torch(counted):
            call()
    return counted


def rest_of_step(model: nn.Module, batch: int, *, bf16: bool) -> list[Counted]:
    """What a step launches beside a network's forward and backward pass: the loss, and Adam.

    Args:
        model: of fake tensors.
        batch: images of the step.
        bf16: whether the network returns bf16.
    """
    counted: list[Counted] = []
    parameters = list(model.parameters())
    classes = parameters[-1].shape[0]
    dtype = torch.bfloat16 if bf16 else torch.float32
    logits = torch.empty(batch, classes, dtype=dtype).requires_grad_()
    optimizer = torch.optim.Adam(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    with _Torch(counted):
        F.cross_entropy(logits.float(), torch.zeros(batch, dtype=torch.int64)).backward()
        optimizer.step()
    return counted


@contextmanager
def as_on_a_gpu(
    target: Target, call: Callable[..., None], table: config.Table | None = None
) -> Iterator[None]:
    """Have the kernels' launchers called on the CPU, and each launch handed to ``call``.

    Args:
        target: whose default formulations and tiles our kernels take.
        call: takes what :class:`~tritonbnn.kernels.launch.Launch` holds.
        table: what is tuned, and taken in their place.
    """
    # the kernels were imported to be compiled, so they are not interpreted whatever this says
    environment = {VARIABLE: "triton", "TRITON_INTERPRET": "1"}

    there = target.formulations

    def runs(device: torch.device, formulation: str = "mma") -> bool:
        return formulation in there

    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(below_triton, "runs", runs),
        through_dispatcher(always=False),
        config.using(table or {}, target),
        launching_by(call),
    ):
        yield


def in_channels_last(model: nn.Module) -> nn.Module:
    """``model.to(memory_format=torch.channels_last)``, which fake parameters refuse."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.dim() == 4:
                last = parameter.detach().contiguous(memory_format=torch.channels_last)
                module._parameters[name] = nn.Parameter(last)
    return model


def of_ours(launch: Launch) -> Counted:
    """A launch of ours: its tensors by their arguments' names.

    It is kept without them. Autograd copies a gradient that anyone else holds.
    """
    tensors: dict[str, int] = {}
    alike: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in launch.arguments.items():
        if not isinstance(value, Tensor):
            continue
        alike[name] = torch.empty(value.shape, dtype=value.dtype, device="meta")
        if id(value) not in seen:
            seen.add(id(value))
            tensors[name.removesuffix("_ptr")] = value.nbytes
    name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
    operations = _operations(name, launch.arguments)
    kept = replace(launch, arguments=launch.arguments | alike)
    return Counted(OURS, name, sum(tensors.values()), tensors, operations, kept)


def _operations(name: str, arguments: dict[str, Any]) -> int:
    """Multiplications and additions of a convolution or its gradients; 0 for other kernels."""
    shape = arguments.get("shape")
    if shape is None:
        return 0
    outputs = shape.out_height * shape.out_width
    pixels = arguments["pixels"] if "pixels" in arguments else arguments["batch"] * outputs
    return 2 * pixels * shape.out_channels * shape.channels * shape.kernel_size**2

"""What a network is computed on: the device, the precision, and a CPU's memory."""

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tritonbnn import caches
from tritonbnn.cli import UserError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_NEVER = 2**31 - 1
_SIZES, _MODULES = 256, 8  # more than anybody has, of a batch; and modules compiled apart

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """How the network is run.

    Attributes:
        device: where.
        precision: "fp32", "bf16" or "fp16".
        channels_last: keep images in NHWC order.
        compiled: run networks through torch.compile.
        normalise: makes what a network sees of 8-bit images, uint8 (N, C, H, W); None where none
            come.
    """

    device: torch.device
    precision: str = "fp32"
    channels_last: bool = False
    compiled: bool = False
    normalise: Callable[[Tensor], Tensor] | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether it is on a GPU, which normalises 8-bit images itself, from page-locked memory."""
        return self.device.type == "cuda"

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, PRECISIONS[self.precision])

    def scaler(self) -> torch.amp.GradScaler:
        """A loss scaler, at rest unless the precision needs one."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def place(self, model: nn.Module) -> None:
        """Put a network where and as it runs."""
        model.to(self.device)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.compiled:
            check_compiler(self.device)
            # Sizes are compiled one by one, which makes the fastest code. Parts of a batch, of the
            # last one and of validation come in more of them than torch allows by default, and
            # beyond that it would silently run uncompiled.
            limits = torch._dynamo.config
            limits.recompile_limit = max(limits.recompile_limit, _SIZES)
            limits.accumulated_recompile_limit = max(
                limits.accumulated_recompile_limit, _MODULES * _SIZES
            )
            model.compile(dynamic=False)  # in place, so that names stay bare

    def place_frozen(self, model: nn.Module) -> None:
        """Put a network that is never trained where and as it answers fastest.

        Autocast would cast weights that need no gradient in every pass. They are cast here, which
        gives the same bits.
        """
        if self.precision != "fp32":
            for module in model.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.to(PRECISIONS[self.precision])
        # A GPU's convolutions are fastest in this order, whatever the trained network's is.
        replace(self, channels_last=self.channels_last or self.on_gpu).place(model)

    def to_device(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A batch where and as the network wants it; images of uint8 are normalised there."""
        order = torch.channels_last if self.channels_last else torch.preserve_format
        images = images.to(self.device, non_blocking=True, memory_format=order)
        if images.dtype == torch.uint8 and self.normalise is not None:
            images = self.normalise(images)
        return images, labels.to(self.device, non_blocking=True)


def choose_device(name: str) -> torch.device:
    """The device that ``name`` means: auto, cpu, cuda, or cuda:N.

    Under torchrun, ``cuda`` is the GPU of this process's number on its machine.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise UserError(f"unknown --device {name!r}: use auto, cpu, cuda or cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no CUDA device: use --device cpu")
    index = int(number or os.environ.get("LOCAL_RANK") or 0)
    if index >= torch.cuda.device_count():
        raise UserError(
            f"there is no cuda:{index}, only {torch.cuda.device_count()} GPUs:"
            " start fewer processes, or choose another --device"
        )
    caches.prepare(caches.TRITON)
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


@contextmanager
def searching_convolutions(device: torch.device) -> Iterator[None]:
    """Let cuDNN time its ways to convolve at each new shape, and take the fastest from then on.

    It is for a teacher, which has many convolutions and few shapes. Another process may find
    another way, whose sums have other last bits. So the trained network's are not found so.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def keep_freed_memory() -> None:
    """Have malloc keep what is freed for the tensors to come, as torch does on a GPU.

    By default glibc gives large blocks back to the system, and each page that is taken again is a
    fault: an eighth of a ReActNet-A step at 224 x 224 on two cores. It stays so until the process
    ends. A user's own settings of malloc are left alone, and so is any other libc.
    """
    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if chosen or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
        mallopt(_M_MMAP_MAX, 0)


def check_compiler(device: torch.device) -> None:
    """Raise UserError if torch.compile could not make machine code for the device, or not keep it.

    For a CPU it writes C++; what a GPU needs, our own kernels need too.
    """
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("--compile needs a C++ compiler: install g++, or leave --compile out")
    caches.prepare(caches.INDUCTOR)

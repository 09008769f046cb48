"""What a network is computed on: the device, the precision, and a CPU's memory."""

import ctypes
import os
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

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
    """

    device: torch.device
    precision: str = "fp32"
    channels_last: bool = False
    compiled: bool = False

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

    def to_device(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A batch where and as the network wants it."""
        order = torch.channels_last if self.channels_last else torch.preserve_format
        images = images.to(self.device, non_blocking=True, memory_format=order)
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

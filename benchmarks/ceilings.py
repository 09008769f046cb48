"""What a device can do at most, measured: bytes copied and products per second."""

from dataclasses import asdict, dataclass
from functools import partial

import torch

from tritonbnn.kernels.timing import time_callable

_RUNS = 20


@dataclass(frozen=True)
class Ceilings:
    """The roofs over a training step.

    Attributes:
        copy_gbs: 1e9 bytes read and written a second by a large copy.
        fp32_tflops: 1e12 operations a second of a large matrix product in true float32.
        bf16_tflops: likewise in bf16.
        int8_tops: likewise in int8, with int32 sums.
    """

    copy_gbs: float
    fp32_tflops: float
    bf16_tflops: float
    int8_tops: float

    def __str__(self) -> str:
        return "ceilings: " + ", ".join(f"{name} {v:g}" for name, v in asdict(self).items())

    def operations_per_second(self, dtype: str) -> float:
        """Of a matrix product in "fp32", "bf16" or "int8"."""
        rates = {"fp32": self.fp32_tflops, "bf16": self.bf16_tflops, "int8": self.int8_tops}
        return rates[dtype] * 1e12


def measure(device: torch.device) -> Ceilings:
    """Measure all four on a device; seconds on a GPU or a CPU."""
    cuda = device.type == "cuda"
    source = torch.zeros(2**30 if cuda else 2**27, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = time_callable(lambda: target.copy_(source), device, runs=_RUNS).p50
    size = 8192 if cuda else 1024
    operands = torch.randn(size, size, device=device)
    rates = {}
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        a = (operands * 8).to(dtype)
        b = a.t().contiguous().t()  # int8 wants its second operand by columns
        product = partial(torch._int_mm if dtype == torch.int8 else torch.mm, a, b)
        rates[dtype] = 2 * size**3 / time_callable(product, device, runs=_RUNS).p50 / 1e6
    return Ceilings(
        copy_gbs=round(2 * source.nbytes / copy / 1e3, 1),
        fp32_tflops=round(rates[torch.float32], 3),
        bf16_tflops=round(rates[torch.bfloat16], 3),
        int8_tops=round(rates[torch.int8], 3),
    )

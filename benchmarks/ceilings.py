"""What a device can do at most, measured: bytes copied and products per second."""

from dataclasses import asdict, dataclass
from functools import partial

import torch

from tritonbnn.kernels.bench import one_bit_roofs
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
        one_bit_tops: likewise of the one-bit tensor core's instruction on registers alone; None
            where there is none, and signs are multiplied in int8.
    """

    copy_gbs: float
    fp32_tflops: float
    bf16_tflops: float
    int8_tops: float
    one_bit_tops: float | None = None

    def __str__(self) -> str:
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return "ceilings: " + ", ".join(f"{name} {value:g}" for name, value in known.items())

    def operations_per_second(self, dtype: str) -> float:
        """Of a matrix product in "fp32" or "bf16", or of "signs" with signs."""
        signs = max(self.int8_tops, self.one_bit_tops or 0)
        rates = {"fp32": self.fp32_tflops, "bf16": self.bf16_tflops, "signs": signs}
        return rates[dtype] * 1e12


def measure(device: torch.device) -> Ceilings:
    """Measure all that a device has; seconds on a GPU or a CPU."""
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
        one_bit_tops=_one_bit_tops(device),
    )


def _one_bit_tops(device: torch.device) -> float | None:
    """Of the fastest form of the one-bit tensor core that the device has."""
    rates = one_bit_roofs(device).values()
    return round(max(rates) / 1e12, 3) if rates else None

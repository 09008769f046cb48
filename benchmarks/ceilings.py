"""What a device can do at most, measured: bytes copied and products per second."""

from dataclasses import asdict, dataclass

import torch

from tritonbnn.kernels.bench import one_bit_roofs
from tritonbnn.kernels.timing import copy_bandwidth, matmul_rate


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
    return Ceilings(
        copy_gbs=round(copy_bandwidth(device) / 1e9, 1),
        fp32_tflops=round(matmul_rate(device, torch.float32) / 1e12, 3),
        bf16_tflops=round(matmul_rate(device, torch.bfloat16) / 1e12, 3),
        int8_tops=round(matmul_rate(device, torch.int8) / 1e12, 3),
        one_bit_tops=_one_bit_tops(device),
    )


def _one_bit_tops(device: torch.device) -> float | None:
    """Of the fastest form of the one-bit tensor core that the device has."""
    rates = one_bit_roofs(device).values()
    return round(max(rates) / 1e12, 3) if rates else None

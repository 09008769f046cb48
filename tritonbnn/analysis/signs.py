"""The signs of all binary weights in one matrix of bits, and where two such matrices differ."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tritonbnn import ops
from tritonbnn.bits import words
from tritonbnn.packed import plain

ROW = 1024  # signs to a row of the matrix


class SignLayout:
    """Which rows of the matrix belong to which weight: each fills whole ones, in logical order.

    A matrix is int32 (R, 32), one bit a weight and 1 for >= 0; bits past a weight's end are alike
    in all matrices of one kind. Nothing here waits for the device.

    Args:
        weights: of any shapes and strides, all on one device.

    Attributes:
        sizes: int64 (L,), the numbers of elements.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        device = weights[0].device if weights else torch.device("cpu")
        sizes = [weight.numel() for weight in weights]
        rows = [-(-size // ROW) for size in sizes]
        self.sizes = torch.tensor(sizes, dtype=torch.int64, device=device)
        self._layer_of_row = torch.arange(len(sizes), device=device).repeat_interleave(
            torch.tensor(rows, dtype=torch.int64, device=device), output_size=sum(rows)
        )
        dtype = weights[0].dtype if weights else torch.float32
        padding = torch.zeros(ROW, dtype=dtype, device=device)
        self._padding = [padding[: -size % ROW] for size in sizes]
        self._on_host = device.type == "cpu"
        self._scratch = np.empty(max(rows, default=0) * ROW if self._on_host else 0, np.bool_)

    def signs(self, weights: Sequence[Tensor]) -> Tensor:
        """A matrix of the signs of now; bits past a weight's end are 1."""
        weights = [plain(weight) for weight in weights]
        if self._on_host:
            return self._host_bits(weights, lambda x, bits: np.greater_equal(x, 0, out=bits), True)
        return ops.pack_signs(self._rows(weights))

    def reaching(self, tensors: Sequence[Tensor], threshold: float) -> Tensor:
        """A matrix whose bits are 1 where abs(x) >= threshold > 0, and 0 past a weight's end."""
        if self._on_host:
            return self._host_bits(tensors, lambda x, bits: _reaching(x, threshold, bits), False)
        # The difference of two floats has the right sign, and 0 only where they are equal.
        return ops.pack_signs(self._rows(tensors).abs_().sub_(threshold))

    def finite(self, tensors: Sequence[Tensor]) -> Tensor:
        """A matrix whose bits are 0 where x is infinite or NaN; bits past a weight's end are 1."""
        if self._on_host:
            return self._host_bits(tensors, lambda x, bits: np.isfinite(x, out=bits), True)
        rows = self._rows(tensors)
        return ops.pack_signs(rows.sub_(rows))  # 0, or NaN, which is not >= 0

    def _host_bits(
        self,
        tensors: Sequence[Tensor],
        test: Callable[[np.ndarray, np.ndarray], object],
        padding: bool,
    ) -> Tensor:
        """A matrix of what numpy finds, which compares and packs in a fraction of torch's time.

        Signs are compared after every update, which is to cost far less than the update itself.

        Args:
            tensors: in host memory.
            test: writes a bit for each element of its first argument to its second.
            padding: the bits past a weight's end.
        """
        packed = np.empty((len(self._layer_of_row), words(ROW)), dtype=np.int32)
        free = packed.view(np.uint8).reshape(-1)
        for tensor in tensors:
            size = tensor.numel()
            bits = self._scratch[: size + -size % ROW]
            bits[size:] = padding
            # numpy has no bfloat16
            exact = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
            test(exact.numpy(), bits[:size].reshape(tensor.shape))
            free[: len(bits) // 8] = np.packbits(bits, bitorder="little")
            free = free[len(bits) // 8 :]
        return torch.from_numpy(packed)

    def differing(self, a: Tensor, b: Tensor) -> Tensor:
        """How many bits of each weight differ between two matrices, int64 (L,)."""
        counts = ops.packed_difference(a, b).long()
        return torch.zeros_like(self.sizes).index_add_(0, self._layer_of_row, counts)

    def count(self, bits: Tensor) -> Tensor:
        """How many bits of each weight are 1, int64 (L,)."""
        return self.differing(bits, torch.zeros_like(bits))

    def _rows(self, tensors: Sequence[Tensor]) -> Tensor:
        """A copy of all elements, (R, ROW), zeros in between."""
        pieces = [
            piece
            for tensor, padding in zip(tensors, self._padding, strict=True)
            for piece in (tensor.detach().reshape(-1), padding)
        ]
        flat = torch.cat(pieces) if pieces else torch.zeros(0)
        return flat.view(-1, ROW)

    def empty(self) -> Tensor:
        """A matrix of bits that are 0."""
        shape = (len(self._layer_of_row), words(ROW))
        return torch.zeros(shape, dtype=torch.int32, device=self.sizes.device)


def _reaching(x: np.ndarray, threshold: float, bits: np.ndarray) -> None:
    """Whether abs(x) >= threshold, without a copy of x."""
    np.greater_equal(x, threshold, out=bits)
    bits |= np.less_equal(x, -threshold)

"""The exact product of two packed sign matrices."""

import torch
from torch import Tensor

from tritonbnn import checks
from tritonbnn.kernels.conv import conv_packed


def packed_matmul(a: Tensor, b: Tensor, k: int) -> Tensor:
    """a @ b^T of signs: the twin of :func:`tritonbnn.eager.packed_matmul`.

    A matrix is a batch of images of one pixel, and its product with another a 1x1 convolution:
    the convolution's kernels, both formulations and tuning serve it as they are.
    """
    checks.check_packed("a", a, k)
    checks.check_packed("b", b, k)
    y = conv_packed(
        a[:, None, None, :],
        b[:, None, None, :],
        None,
        channels=k,
        stride=1,
        padding=0,
        dtype=torch.int32,
    )
    return y[:, :, 0, 0]

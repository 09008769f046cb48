"""What all launchers of one operation agree on.

Of a whole unit: what is taken beside its tensors, kept for backward, and returned. Of second-order
Bop: its epsilon.
"""

from types import ModuleType
from typing import NamedTuple

from torch import Tensor, distributed

BOP_EPSILON = 1e-10
"""Added to the root of second-order Bop's second average, as in the authors' code."""


class Averages(NamedTuple):
    """BatchNorm's running averages, which a batch moves in place.

    Attributes:
        mean: (O,), of y; None, together with the variance, where none are kept.
        variance: (O,), unbiased.
        counter: int64, of one element: batches that were counted; or None.
        momentum: the share of the batch; None for a cumulative average.
    """

    mean: Tensor | None
    variance: Tensor | None
    counter: Tensor | None
    momentum: float | None


class Options(NamedTuple):
    """What a unit computes apart from its tensors; see :func:`tritonbnn.ops.binary_unit`.

    ``whole`` is the module that computes it in one call a direction, if there is one; ``averages``
    are those that such a call moves.
    """

    stride: int
    shortcut: str
    binary_weight: bool
    eps: float
    plan: str
    group: distributed.ProcessGroup | None
    pack: bool
    whole: ModuleType | None = None
    averages: Averages | None = None


class Statistics(NamedTuple):
    """Mean and unbiased variance of y, (O,), as BatchNorm's running averages want them."""

    mean: Tensor
    variance: Tensor


class Kept(NamedTuple):
    """What the forward pass leaves for backward, apart from its operands.

    Attributes:
        signs: of the input, packed.
        packed: the weight's signs, or None for a real weight.
        alpha: (O,), the weight's scale, or None.
        a: the convolution before its scale, or None where it is computed again.
        vectors: (6, O), the fields of :class:`tritonbnn.ops.norm.Affine`.
    """

    signs: Tensor
    packed: Tensor | None
    alpha: Tensor | None
    a: Tensor | None
    vectors: Tensor


class Gradients(NamedTuple):
    """The gradients to a unit's operands.

    Attributes:
        x: None if it was not wanted.
        weight: None if it was not wanted.
        gamma: (O,).
        beta: (O,).
        shift_in: None if neither it nor x was wanted.
        shift_mid: equal to beta's, but memory of its own: under torch.compile what clips or
            accumulates the one in place would change the other too. None without a PReLU, as are
            the next two.
        slope: (O,), or None.
        shift_out: (O,), or None.
        residual: None if there was none.
    """

    x: Tensor | None
    weight: Tensor | None
    gamma: Tensor
    beta: Tensor
    shift_in: Tensor | None
    shift_mid: Tensor | None
    slope: Tensor | None
    shift_out: Tensor | None
    residual: Tensor | None

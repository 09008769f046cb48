"""BatchNorm on a binary convolution before its scale: all that is computed per channel.

y = alpha * a, where a are integers and alpha is the weight's scale (1 for a real weight). The
launchers read a; statistics of y follow, mean(y) = alpha * mean(a) and var(y) = alpha^2 * var(a).
Vectors are (O,) and computed in float64, which costs nothing here, then rounded once.
"""

from typing import NamedTuple

import torch
from torch import Tensor, distributed

from tritonbnn.contract import Averages, Statistics


class Affine(NamedTuple):
    """BatchNorm as the launchers apply it: gamma * xhat + beta = (a - centre) * scale + offset.

    Attributes:
        centre: mean(a) in training; 0 in eval mode, where alpha = 0 would leave it undefined.
        scale: gamma * invstd * alpha.
        offset: beta - gamma * invstd * rest.
        rest: mean(y) - alpha * centre.
        invstd: 1 / sqrt(var(y) + eps).
        share: 1 / (values per channel) in training: the weight of one value in the statistics;
            0 in eval mode, where no value has any.
    """

    centre: Tensor
    scale: Tensor
    offset: Tensor
    rest: Tensor
    invstd: Tensor
    share: Tensor

    def to(self, dtype: torch.dtype) -> "Affine":
        return Affine(*(vector.to(dtype) for vector in self))


def batch_affine(
    moments: tuple[Tensor, Tensor],
    values: int,
    alpha: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    group: distributed.ProcessGroup | None,
) -> tuple[Affine, Statistics]:
    """BatchNorm by the batch's own statistics, over all devices of ``group`` if there is one.

    Args:
        moments: mean and variance, (O,) each, of the convolution before its scale.
        values: per channel, of this device.
        alpha: (O,), or None for 1.
        gamma: (O,), BatchNorm's weight.
        beta: (O,), BatchNorm's bias.
        eps: added to the variance.
        group: whose devices share statistics, or None.
    """
    centre, spread = moments
    count = torch.full_like(centre, values)
    if group is not None:
        # One exchange: in float64 the moments about 0 do the variance no harm.
        sums = torch.stack((count, count * centre, count * (spread + centre**2)))
        distributed.all_reduce(sums, group=group)
        count, centre, square = sums[0], sums[1] / sums[0], sums[2] / sums[0]
        spread = (square - centre**2).clamp(min=0)
    alpha_ = torch.ones_like(centre) if alpha is None else alpha.double()
    variance = alpha_**2 * spread
    invstd = (variance + eps).rsqrt()
    affine = Affine(
        centre=centre,
        scale=gamma * invstd * alpha_,
        offset=beta.double(),
        rest=torch.zeros_like(centre),
        invstd=invstd,
        share=1 / count.clamp(min=1),  # an empty batch has no values
    )
    unbiased = variance * (count / (count - 1).clamp(min=1))
    return affine, Statistics(alpha_ * centre, unbiased)


def running_affine(
    mean: Tensor, variance: Tensor, alpha: Tensor | None, gamma: Tensor, beta: Tensor, eps: float
) -> Affine:
    """BatchNorm by given statistics of y, as in eval mode."""
    rest, zero = mean.double(), torch.zeros_like(mean, dtype=torch.float64)
    invstd = (variance.double() + eps).rsqrt()
    gain = gamma * invstd
    scale = gain if alpha is None else gain * alpha
    return Affine(zero, scale, beta - gain * rest, rest, invstd, zero)


def norm_grads(
    affine: Affine,
    alpha: Tensor | None,
    gamma: Tensor,
    du_sum: Tensor,
    du_a_sum: Tensor,
    group: distributed.ProcessGroup | None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The gradient to gamma, and the one to y as du_scale * du + a_scale * a + constant.

    From dy = gamma * invstd * (du - mean(du) - xhat * mean(du * xhat)), the means by ``share``.

    Args:
        affine: of the forward pass.
        alpha: (O,), or None for 1.
        gamma: (O,).
        du_sum: (O,), the sum of du, which is also beta's gradient.
        du_a_sum: (O,), the sum of du * (a - centre).
        group: whose devices share statistics, or None.

    Returns:
        gamma's gradient from this device's values, and the three vectors.
    """
    scale = affine.invstd if alpha is None else affine.invstd * alpha  # xhat per unit of a
    dgamma = scale * du_a_sum - affine.invstd * affine.rest * du_sum
    sums = torch.stack((du_sum, dgamma))
    if group is not None:
        distributed.all_reduce(sums, group=group)
    du_mean, du_xhat_mean = sums * affine.share
    du_scale = gamma * affine.invstd
    a_scale = -du_scale * scale * du_xhat_mean
    constant = -du_scale * du_mean - a_scale * affine.centre
    return dgamma, (du_scale, a_scale, constant)


def move_averages(averages: Averages, statistics: tuple[Tensor, Tensor] | None) -> None:
    """Count a batch, and move the running averages towards its statistics, as nn.BatchNorm2d does.

    Args:
        averages: changed in place.
        statistics: mean and unbiased variance, (O,) each, without a gradient; None for a batch
            without values.

    Raises:
        ValueError: an average has another shape, or is elsewhere.
    """
    counter, moving = averages.counter, (averages.mean, averages.variance)
    if counter is not None:
        counter.add_(1)
    step: float | Tensor
    if averages.momentum is not None:
        step = averages.momentum
    elif counter is not None:
        step = 1 / counter.double()  # a cumulative average
    else:
        return  # nn.BatchNorm2d's, too, stands still without a count
    if statistics is None:
        return
    for average, value in zip(moving, statistics, strict=True):
        if average is None:
            continue
        weight = step.to(average.dtype) if isinstance(step, Tensor) else step
        try:
            average.lerp_(value.to(average.dtype), weight)
        except RuntimeError as error:
            raise ValueError(
                f"a running average of the norm must be {tuple(value.shape)} on {value.device}, "
                f"not {tuple(average.shape)} on {average.device}"
            ) from error

"""IVON (2402.17641): learn a Gaussian over the weights at about the cost of Adam.

Each weight has a mean w and a curvature h. Its distribution is N(w, 1 / (ess (h + weight_decay))).
A step draws weights from it, takes the gradient there, and estimates the curvature from gradient
times noise.

    optimizer = IVON(model.parameters(), lr=0.1, ess=len(dataset))
    for images, labels in batches:
        optimizer.zero_grad()
        with optimizer.sampled_params(train=True):
            loss(model(images), labels).backward()
        optimizer.step()
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from tritonbnn import checks
from tritonbnn.eager.common import accumulator
from tritonbnn.optim.base import (
    CheckedOptimizer,
    check_number,
    closure_loss,
    dense_gradient,
    portions,
)

logger = logging.getLogger(__name__)

_ADAMS_SCALE = 0.01
_TRAINING, _EVALUATION = 0, 1  # streams of noise


class IVON(CheckedOptimizer):
    """The improved variational online Newton method.

    With noise e, and g the gradient at w + e (averages of g and e g over the samples of a step):

        h_hat = e g (h + weight_decay) ess
        h <- b2 h + (1 - b2) h_hat + (1 - b2)^2 / 2 (h - h_hat)^2 / (h + weight_decay)
        m <- b1 m + (1 - b1) g
        w <- w - lr (hess_init + weight_decay) clip((m / (1 - b1^t) + weight_decay w)
                                                    / (h + weight_decay))

    The loss must be a mean over images. Several samples a step are several ``with`` blocks before
    one ``step``. Parts of an accumulated gradient belong into one block.

    **Several processes.** All draw the same noise, so that the gradient which
    DistributedDataParallel has averaged fits it. With ``own_noise`` each process draws its own, and
    ``step`` averages what they found. Gradients must then not be averaged before: run backward in
    ``no_sync()``, or without that wrapper.

    **Binary weights.** The noise flips the sign of a latent weight that is small beside its
    deviation (:meth:`expected_flips` says how many). So a group may have ``noise``, a factor of the
    deviation. 1 is the method as published. With 0 the group is exempt: it is not sampled, and its
    curvature is estimated by ess g^2.

    Args:
        params: parameters or groups of them.
        lr: of IVON's own scale, 0.1 to 2.5, not of Adam's.
        ess: effective sample size, usually the number of training images. Fewer is more noise.
        hess_init: the curvature at first.
        betas: of the averages of gradients and of curvature.
        weight_decay: the precision of the prior; it is part of the method.
        clip_radius: bounds a step's direction.
        rescale_lr: whether the step is multiplied by hess_init + weight_decay.
        noise: factor of the noise's deviation.
        seed: of the noise, which depends on nothing else but the count of steps and samples.
        own_noise: whether each process draws its own.

    State:
        ``momentum``, ``hess``: m and h, of the weight's shape, float32 (float64 for float64).

    Raises:
        ValueError: a setting out of range, parameters on several devices.
        TypeError: a parameter that is not floating point.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        ess: float,
        hess_init: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.99999),
        weight_decay: float = 1e-4,
        clip_radius: float = math.inf,
        rescale_lr: bool = True,
        noise: float = 1.0,
        seed: int = 0,
        own_noise: bool = False,
    ) -> None:
        defaults = {"lr": lr, "ess": ess, "hess_init": hess_init, "betas": betas}
        defaults |= {"weight_decay": weight_decay, "clip_radius": clip_radius}
        defaults |= {"rescale_lr": rescale_lr, "noise": noise, "steps": 0}
        self.seed, self.own_noise = seed, own_noise
        self._inside = False
        self._samples: list[dict[Tensor, Tensor]] = []  # the noise of each; of all but the last {}
        self._means: dict[Tensor, Tensor] = {}  # of gradients, where there are several samples
        self._products: dict[Tensor, Tensor] = {}  # the same of noise times gradient
        self._magnitudes: dict[Tensor, Tensor] = {}  # of the means, to see what is done to them
        super().__init__(params, defaults)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        tiny = torch.finfo(torch.float32).tiny
        for name in ("ess", "hess_init", "clip_radius"):
            check_number(self, name, group[name], least=tiny)
        for name in ("lr", "weight_decay", "noise"):
            check_number(self, name, group[name], least=0)
        for index, beta in enumerate(group["betas"]):
            check_number(self, f"betas[{index}]", beta, least=0, most=1 - 1e-12)
        for weight in group["params"]:
            checks.check_float("IVON's parameter", weight)
        if group["rescale_lr"] and 0 < group["lr"] < _ADAMS_SCALE:
            logger.warning(
                "IVON with lr %g: that is Adam's scale, and IVON's is 0.1 to 2.5, so it will hardly"
                " learn",
                group["lr"],
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and outside of a sample also the samples that were not used."""
        super().zero_grad(set_to_none)
        if not self._inside:
            self._forget()

    @contextmanager
    def sampled_params(self, *, train: bool = False, sample: int = 0) -> Iterator[None]:
        """Move the weights by noise for the block. They come back bit for bit, also from an error.

        Args:
            train: whether the block computes gradients for the next step.
            sample: which draw, where ``train`` is False. The same number is the same noise until
                the next step.

        Raises:
            RuntimeError: a block inside a block.
        """
        if self._inside:
            raise RuntimeError(
                "sampled_params() inside sampled_params(): the weights are moved already, so leave"
                " the outer block first"
            )
        if train:
            self._open_sample()
        noise = self._draw(_TRAINING if train else _EVALUATION, self._index(train, sample))
        kept = {weight: weight.detach().clone() for weight in noise}
        self._inside = True
        try:
            with torch.no_grad():
                for weight, e in noise.items():
                    weight.add_(e)
            yield
        finally:
            self._inside = False
            if kept:
                with torch.no_grad():
                    torch._foreach_copy_(list(kept), list(kept.values()))
        if train:
            self._close_sample(noise)

    def passes(self) -> AbstractContextManager[None]:
        """What a trainer puts around the forward and backward passes of a step."""
        return self.sampled_params(train=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update curvature, momentum and mean by the samples taken since the last step.

        Args:
            closure: takes a sample and returns the loss.

        Returns:
            What the closure returns.

        Raises:
            RuntimeError: no sample was taken, or one is being taken.
            ValueError: a sparse gradient.
        """
        loss = closure_loss(closure)
        if self._inside:
            raise RuntimeError(
                "step() inside sampled_params(): the weights would be put back after it, so leave"
                " the block first"
            )
        if not self._samples:
            raise RuntimeError(
                "step() without a sample: run forward and backward inside"
                " `with optimizer.sampled_params(train=True):`"
            )
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            group["steps"] += 1
            grads, products = self._estimates(weights)
            for part in portions(weights):
                self._update(weights[part], grads[part], products[part], group)
        self._forget()
        return loss

    @torch.no_grad()
    def deviation(self, weight: Tensor) -> Tensor:
        """The noise's standard deviation of each number of a parameter, in its state's dtype."""
        group = next(g for g in self.param_groups if any(w is weight for w in g["params"]))
        return self._deviations([weight], group)[0]

    def _deviations(self, weights: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """:meth:`deviation` of several parameters of a group."""
        hess = [self._hess(w, group) for w in weights]
        precision = torch._foreach_add(hess, group["weight_decay"])
        torch._foreach_rsqrt_(precision)
        torch._foreach_mul_(precision, group["noise"] / math.sqrt(group["ess"]))
        return list(precision)

    @torch.no_grad()
    def expected_flips(self, weight: Tensor) -> Tensor:
        """The mean probability that the noise changes the sign of a parameter's number.

        A number of exactly 0 counts one half.
        """
        deviation = self.deviation(weight)
        distance = weight.detach().abs().to(deviation.dtype) / deviation
        return torch.erfc(distance.div_(math.sqrt(2))).mul_(0.5).nan_to_num_(0.0).mean()

    def _hess(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        """The curvature of a parameter, whose state begins here."""
        state = self.state[weight]
        if not state:
            wide = accumulator(weight.dtype)
            state["momentum"] = torch.zeros_like(weight, dtype=wide)
            state["hess"] = torch.full_like(weight, group["hess_init"], dtype=wide)
        return state["hess"]

    def _index(self, train: bool, sample: int) -> int:
        return len(self._samples) if train else sample

    def _draw(self, stream: int, sample: int) -> dict[Tensor, Tensor]:
        """Noise for every parameter that is sampled."""
        noise: dict[Tensor, Tensor] = {}
        own = self.own_noise and stream == _TRAINING and distributed.is_initialized()
        process = distributed.get_rank() if own else 0
        for position, group in enumerate(self.param_groups):
            weights = [w for w in group["params"] if w.requires_grad]
            if not (group["noise"] and weights):
                continue
            place = (process, position, group["steps"], sample, stream)
            numbers = self._standard_normal(sum(w.numel() for w in weights), weights[0], place)
            parts = numbers.split([w.numel() for w in weights])
            drawn = [part.view(w.shape) for w, part in zip(weights, parts, strict=True)]
            for part in portions(weights):
                torch._foreach_mul_(drawn[part], self._deviations(weights[part], group))
            noise |= zip(weights, drawn, strict=True)
        return noise

    def _standard_normal(self, count: int, like: Tensor, place: tuple[int, ...]) -> Tensor:
        """Numbers that depend on the seed and the place alone.

        A generator that is seeded anew needs no state in a checkpoint.

        Args:
            count: how many.
            like: gives device and dtype.
            place: the process, the group, its steps so far, the sample, the stream.
        """
        generator = torch.Generator(like.device).manual_seed(_mixed(self.seed, *place))
        dtype = accumulator(like.dtype)
        return torch.randn(count, generator=generator, dtype=dtype, device=like.device)

    def _forget(self) -> None:
        self._samples, self._means, self._products, self._magnitudes = [], {}, {}, {}

    def _open_sample(self) -> None:
        """Put the mean of earlier samples' gradients aside, so that backward starts from none."""
        weights = [w for group in self.param_groups for w in group["params"]]
        if self._samples and all(w.grad is None for w in weights):
            self._forget()  # a step that was left out, as a loss scaler does at an infinity
        if not self._samples:
            return
        if len(self._samples) == 1:
            self._products = self._times_noise(self._samples[0])
            self._samples[0] = {}
        self._means = {w: w.grad for w in weights if w.grad is not None}
        for weight in weights:
            weight.grad = None

    @torch.no_grad()
    def _close_sample(self, noise: dict[Tensor, Tensor]) -> None:
        """A single sample's gradient stays as it is until the step; of several, the mean does."""
        if not self._samples:
            self._samples.append(noise)
            return
        self._samples.append({})
        count = len(self._samples)
        for weight, product in self._times_noise(noise).items():
            _move_mean(self._products, weight, product, count)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    _move_mean(self._means, weight, weight.grad, count)
                weight.grad = self._means.get(weight)
        self._magnitudes = {w: g.abs().sum() for w, g in self._means.items()}

    def _times_noise(self, noise: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        return {w: e * dense_gradient(self, w) for w, e in noise.items() if w.grad is not None}

    def _estimates(self, weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        """Gradients, and products with the noise, None for parameters that are not sampled."""
        grads = [dense_gradient(self, w).to(accumulator(w.dtype)) for w in weights]
        if len(self._samples) == 1:
            noise = self._samples[0]
            products = [
                noise[w] * g if w in noise else None for w, g in zip(weights, grads, strict=True)
            ]
        else:
            products = [self._rescaled(w) for w in weights]
        if self.own_noise and distributed.is_initialized():
            for tensor in [*grads, *(p for p in products if p is not None)]:
                distributed.all_reduce(tensor)
                tensor.div_(distributed.get_world_size())
        return grads, products

    def _rescaled(self, weight: Tensor) -> Tensor | None:
        """A product as its gradient has been multiplied since: by a loss scaler, or to clip it."""
        product, before = self._products.get(weight), self._magnitudes.get(weight)
        if product is None or before is None:
            return product
        factor = dense_gradient(self, weight).abs().sum() / before
        return product * torch.where(before > 0, factor, 1.0)

    def _update(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        products: list[Tensor | None],
        group: dict[str, Any],
    ) -> None:
        beta1, beta2 = group["betas"]
        decay, ess = group["weight_decay"], group["ess"]
        hess = [self._hess(w, group) for w in weights]
        momentum = [self.state[w]["momentum"] for w in weights]
        precision = torch._foreach_add(hess, decay)
        if group["noise"]:
            # of a parameter that had no gradient in any sample nothing is known
            known = [
                torch.zeros_like(h) if p is None else p for p, h in zip(products, hess, strict=True)
            ]
            estimate = torch._foreach_mul(known, precision)
            torch._foreach_mul_(estimate, ess / group["noise"] ** 2)
        else:
            estimate = torch._foreach_mul(grads, grads)
            torch._foreach_mul_(estimate, ess)
        surprise = torch._foreach_sub(hess, estimate)
        torch._foreach_mul_(surprise, surprise)
        torch._foreach_div_(surprise, precision)
        torch._foreach_mul_(hess, beta2)
        torch._foreach_add_(hess, estimate, alpha=1 - beta2)
        torch._foreach_add_(hess, surprise, alpha=0.5 * (1 - beta2) ** 2)
        torch._foreach_mul_(momentum, beta1)
        torch._foreach_add_(momentum, grads, alpha=1 - beta1)
        direction = torch._foreach_div(momentum, 1 - beta1 ** group["steps"])
        torch._foreach_add_(direction, weights, alpha=decay)
        torch._foreach_div_(direction, torch._foreach_add(hess, decay))
        if math.isfinite(group["clip_radius"]):
            torch._foreach_clamp_min_(direction, -group["clip_radius"])
            torch._foreach_clamp_max_(direction, group["clip_radius"])
        rescale = group["hess_init"] + decay if group["rescale_lr"] else 1.0
        torch._foreach_add_(weights, direction, alpha=-group["lr"] * rescale)


@torch.no_grad()
def sampled_probabilities(
    network: nn.Module, images: Tensor, optimizer: IVON, samples: int
) -> Tensor:
    """The mean of softmaxes over networks drawn from what IVON has learnt.

    Args:
        network: in eval mode, whose parameters the optimiser has.
        images: (N, ...), the network's input.
        optimizer: has the distribution.
        samples: networks to draw, at least 1.

    Returns:
        (N, K), float32 or wider.
    """
    total = None
    for sample in range(samples):
        with optimizer.sampled_params(sample=sample):
            logits = network(images)
        shares = logits.to(accumulator(logits.dtype)).softmax(dim=1)
        total = shares if total is None else total.add_(shares)
    if total is None:
        raise ValueError(f"samples must be at least 1, not {samples}")
    return total.div_(samples)


def _move_mean(means: dict[Tensor, Tensor], key: Tensor, value: Tensor, count: int) -> None:
    """Let the mean of ``count - 1`` numbers be that of ``count``. What was missing was 0."""
    if key in means:
        means[key].add_(value - means[key], alpha=1 / count)
    else:
        means[key] = value / count


def _mixed(*numbers: int) -> int:
    """A seed from several small numbers, each of which changes it altogether (splitmix64)."""
    mask, state = (1 << 64) - 1, 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1  # torch's seeds are signed

"""What a recipe may set of the optimisers of binary networks: Bop, prediction, IVON."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from tritonbnn.cli import UserError
from tritonbnn.nn import pack_weights_
from tritonbnn.optim.bop import Bop, Bop2ndOrder
from tritonbnn.optim.ivon import IVON
from tritonbnn.optim.joint import Joint
from tritonbnn.optim.optimizers import AdamW, Group, OptimizerSettings
from tritonbnn.optim.prediction import AdamWPrediction
from tritonbnn.settings import setting


@dataclass(frozen=True)
class BopSettings(OptimizerSettings):
    """Bop (1906.02107) for the 1-bit weights, which are kept as bits, and Adam for the rest.

    The stage's schedule moves gamma as it moves Adam's learning rate.
    """

    optimizer: ClassVar[type[Optimizer]] = Bop

    threshold: float = setting(1e-8, "what an average must exceed for a flip", least=0)
    gamma: float = setting(1e-4, "share of a gradient in the average", above=0, most=1)

    def prepare(self, model: nn.Module) -> None:
        try:
            pack_weights_(model)
        except ValueError as error:
            raise UserError(f"Bop trains 1-bit weights (binary_weights = true): {error}") from error

    def build(self, groups: list[Group], lr: float) -> Optimizer:
        signs = [self._of_signs(group, lr) for group in groups if group["name"] == "binary"]
        rest = [group for group in groups if group["name"] != "binary"]
        fused = all(p.device.type in ("cpu", "cuda") for g in rest for p in g["params"])
        return Joint(
            self.optimizer(signs, **self.keywords()),
            torch.optim.Adam(rest, lr=lr, fused=fused),
        )

    def _of_signs(self, group: Group, lr: float) -> Group:
        # a trainer sets lr * lr_factor, and for Bop that is gamma
        factor = group["lr_factor"] * self.gamma / lr
        return {**group, "lr": lr * factor, "lr_factor": factor}


@dataclass(frozen=True)
class SecondOrderBopSettings(BopSettings):
    """Second-order Bop (2104.05124) for the 1-bit weights, and Adam for the rest."""

    optimizer: ClassVar[type[Optimizer]] = Bop2ndOrder

    threshold: float = setting(1e-6, "what the ratio of averages must exceed", least=0)
    gamma: float = setting(1e-7, "share of a gradient in its average", above=0, most=1)
    sigma: float = setting(1e-3, "share of a squared gradient in its average", above=0, most=1)
    bias_correction: bool = setting(False, "correct both averages for their start at 0")


@dataclass(frozen=True)
class PredictionSettings(AdamW):
    """AdamW whose gradients are taken where the weights are about to be (2302.00195)."""

    optimizer: ClassVar[type[Optimizer]] = AdamWPrediction

    horizon: float = setting(1.0, "steps to look ahead; 0 is AdamW", least=0)

    def keywords(self) -> dict[str, Any]:
        keywords = super().keywords()
        del keywords["amsgrad"]
        return keywords


@dataclass(frozen=True)
class IVONSettings(OptimizerSettings):
    """IVON (2402.17641), which learns how sure it is of each weight."""

    optimizer: ClassVar[type[Optimizer]] = IVON

    ess: float = setting(0.0, "effective sample size, such as the number of images", least=0)
    hess_init: float = setting(1.0, "curvature at first", above=0)
    betas: tuple[float, float] = setting(
        (0.9, 0.99999), "how much of the running means is kept at each step", least=0, below=1
    )
    prior: float = setting(1e-4, "precision of the prior, its weight decay", least=0)
    clip_radius: float = setting(1e9, "bound of a step's direction", above=0)
    rescale_lr: bool = setting(True, "multiply steps by hess_init + prior")
    noise: float = setting(1.0, "factor of the noise; 0 exempts a group", least=0)

    def build(self, groups: list[Group], lr: float) -> Optimizer:
        if not self.ess:
            raise UserError(
                "optimizer ivon needs ess, the effective sample size: set it to the number of"
                " training images, or higher for less noise"
            )
        keywords = self.keywords()
        prior = keywords.pop("prior")
        groups = [{**g, "weight_decay": g["weight_decay"] or prior} for g in groups]
        return IVON(groups, lr, **keywords)

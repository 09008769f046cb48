"""torch's own optimisers, each as a frozen dataclass of its settings."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from tritonbnn.cli import UserError
from tritonbnn.optim.groups import GROUPS
from tritonbnn.settings import checked, choose_from, did_you_mean, fields_of, setting

_FUSED_DEVICES = ("cpu", "cuda")
_BETAS = "how much of the running means is kept at each step"

Group = dict[str, Any]
"""A parameter group as torch has it, with ``name`` and ``lr_factor`` beside what torch knows."""


@dataclass(frozen=True)
class OfGroup:
    """What every parameter group has a value of its own for."""

    lr_factor: float = setting(1.0, "the group's learning rate by that of the stage", least=0)
    weight_decay: float = setting(0.0, "the group's weight decay", least=0)


@dataclass(frozen=True)
class OptimizerSettings:
    """The settings that every optimiser has.

    A subclass adds its own as fields, and names the torch class as ``optimizer``, or overrides
    :meth:`build`.

    Attributes:
        groups: what one group has of its own, by its name: ``lr_factor``, ``weight_decay``, or any
            setting of the optimiser.
    """

    optimizer: ClassVar[type[Optimizer]]
    fuses: ClassVar[bool] = False  # whether torch has it as one kernel, on a CPU too

    groups: dict = field(
        default_factory=dict, metadata={"help": f"settings of one group: {', '.join(GROUPS)}"}
    )

    def __post_init__(self) -> None:
        own = {name: spec for name, spec in fields_of(type(self)).items() if name != "groups"}
        known = own | fields_of(OfGroup)
        clean: dict[str, dict[str, Any]] = {}
        for group, values in self.groups.items():
            if group not in GROUPS:
                raise UserError(f"unknown group {group!r}: {choose_from(group, GROUPS)}")
            clean[group] = {}
            for key, value in values.items():
                if key not in known:
                    near = did_you_mean(key, known)
                    raise UserError(f"unknown key {key!r} of optimizer.groups.{group}{near}")
                clean[group][key] = checked(f"optimizer.groups.{group}.{key}", value, known[key])
        object.__setattr__(self, "groups", clean)

    def keywords(self) -> dict[str, Any]:
        """Its own settings, as the torch class takes them."""
        return {name: getattr(self, name) for name in fields_of(type(self)) if name != "groups"}

    def prepare(self, model: nn.Module) -> None:
        """Change a network, before its parameters are grouped, into one that this can train.

        Raises:
            UserError: it cannot.
        """

    def build(self, groups: list[Group], lr: float) -> Optimizer:
        """The optimiser over parameter groups.

        Args:
            groups: each a dict with ``name`` (of :data:`GROUPS`), ``params``, ``weight_decay`` and
                ``lr_factor``, and what ``self.groups`` says of it.
            lr: the learning rate of a group with factor 1.
        """
        keywords = self.keywords()
        if self.fuses:
            devices = {p.device.type for group in groups for p in group["params"]}
            keywords["fused"] = devices <= set(_FUSED_DEVICES)
        return self.optimizer(groups, lr=lr, **keywords)  # type: ignore[call-arg]


@dataclass(frozen=True)
class Adam(OptimizerSettings):
    """Adam (1412.6980). The L2 term is added to the gradient."""

    optimizer: ClassVar[type[Optimizer]] = torch.optim.Adam
    fuses = True

    betas: tuple[float, float] = setting((0.9, 0.999), _BETAS, least=0, below=1)
    eps: float = setting(1e-8, "added to the root of the second moment", above=0)
    amsgrad: bool = setting(False, "keep the largest second moment")


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (1711.05101)."""

    optimizer: ClassVar[type[Optimizer]] = torch.optim.AdamW


@dataclass(frozen=True)
class SGD(OptimizerSettings):
    """Stochastic gradient descent with momentum."""

    optimizer = torch.optim.SGD
    fuses = True

    momentum: float = setting(0.9, "how much of the last update is kept", least=0, below=1)
    nesterov: bool = setting(False, "look ahead along the momentum")


@dataclass(frozen=True)
class NAdam(OptimizerSettings):
    """Adam with Nesterov's momentum (Dozat, 2016)."""

    optimizer = torch.optim.NAdam

    betas: tuple[float, float] = setting((0.9, 0.999), _BETAS, least=0, below=1)
    eps: float = setting(1e-8, "added to the root of the second moment", above=0)
    momentum_decay: float = setting(4e-3, "of the momentum's schedule", least=0)


@dataclass(frozen=True)
class RMSprop(OptimizerSettings):
    """Gradients divided by a running root mean square (Tieleman and Hinton, 2012)."""

    optimizer = torch.optim.RMSprop

    alpha: float = setting(0.99, "how much of the mean square is kept", least=0, below=1)
    eps: float = setting(1e-8, "added to the root", above=0)
    momentum: float = setting(0.0, "how much of the last update is kept", least=0, below=1)
    centered: bool = setting(False, "divide by the root of the variance")


@dataclass(frozen=True)
class RAdam(OptimizerSettings):
    """Adam whose first steps are rectified (1908.03265)."""

    optimizer = torch.optim.RAdam

    betas: tuple[float, float] = setting((0.9, 0.999), _BETAS, least=0, below=1)
    eps: float = setting(1e-8, "added to the root of the second moment", above=0)

"""Optimisers by name, their parameter groups, and the schedules of the learning rate.

The classes are torch optimisers, and are used as these are. What the trainer knows by name is in
``OPTIMIZERS`` and ``SCHEDULES``. To add an optimiser, write a dataclass of its settings in a file
of its own, and name it here.
"""

import inspect
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tritonbnn.cli import UserError
from tritonbnn.optim.bop import Bop, Bop2ndOrder, to_signs_
from tritonbnn.optim.capturable import CAPTURABLE, make_capturable
from tritonbnn.optim.groups import GROUPS, describe_groups, parameter_groups, set_learning_rate
from tritonbnn.optim.ivon import IVON, sampled_probabilities
from tritonbnn.optim.joint import Joint
from tritonbnn.optim.optimizers import (
    SGD,
    Adam,
    AdamW,
    Group,
    NAdam,
    OfGroup,
    OptimizerSettings,
    RAdam,
    RMSprop,
)
from tritonbnn.optim.prediction import AdamPrediction, AdamWPrediction, SGDPrediction
from tritonbnn.optim.schedules import SCHEDULES
from tritonbnn.optim.signs import (
    BopSettings,
    IVONSettings,
    PredictionSettings,
    SecondOrderBopSettings,
)
from tritonbnn.optim.state import optimizer_state, restore_optimizer
from tritonbnn.settings import Choice, Options, choose_from, filled, own_class

__all__ = [
    "CAPTURABLE",
    "GROUPS",
    "IVON",
    "OPTIMIZERS",
    "SCHEDULES",
    "AdamPrediction",
    "AdamWPrediction",
    "Bop",
    "Bop2ndOrder",
    "Joint",
    "OptimizerSettings",
    "SGDPrediction",
    "build_optimizer",
    "check_optimizer",
    "describe_groups",
    "make_capturable",
    "optimizer_state",
    "parameter_groups",
    "restore_optimizer",
    "sampled_probabilities",
    "set_learning_rate",
    "to_signs_",
]

OPTIMIZERS: dict[str, type[OptimizerSettings]] = {
    "adam": Adam,
    "adamw": AdamW,
    "sgd": SGD,
    "nadam": NAdam,
    "rmsprop": RMSprop,
    "radam": RAdam,
    "bop": BopSettings,
    "bop_second_order": SecondOrderBopSettings,
    "adamw_prediction": PredictionSettings,
    "ivon": IVONSettings,
}
"""The optimisers that a recipe may name. A dotted name is a class of the user's own."""


def build_optimizer(
    choice: Choice | str, model: nn.Module, lr: float, weight_decay: float = 0.0
) -> Optimizer:
    """An optimiser over a network's parameter groups.

    Args:
        choice: which, or the name of one with its default settings.
        model: already on its device.
        lr: learning rate.
        weight_decay: of the groups ``binary`` and ``decayed``.

    Raises:
        UserError: the optimiser does not take the settings, or has no weight decay to set.
    """
    if isinstance(choice, str):
        choice = Choice(choice, OPTIMIZERS[choice]())
    is_own = isinstance(choice.settings, Options)
    if not is_own:
        choice.settings.prepare(model)
    of_group = choice.settings.given.get("groups", {}) if is_own else choice.settings.groups
    groups: list[Group] = [
        {
            "name": name,
            "params": parameters,
            "lr_factor": 1.0,
            "weight_decay": 0.0 if name == "rest" else weight_decay,
            **of_group.get(name, {}),
        }
        for name, parameters in parameter_groups(model).items()
        if parameters
    ]
    try:
        if is_own:
            keywords = {k: v for k, v in choice.settings.given.items() if k != "groups"}
            optimizer = check_optimizer(choice)(groups, lr=lr, **keywords)
        else:
            optimizer = choice.settings.build(groups, lr)
    except ValueError as error:
        raise UserError(f"optimizer {choice.name}: {error}") from error
    decays = any(group["weight_decay"] for group in groups)
    if decays and "weight_decay" not in optimizer.defaults:
        raise UserError(f"optimizer {choice.name} has no weight decay: set weight_decay to 0")
    return optimizer


def check_optimizer(choice: Choice) -> Any:
    """The class behind a user's own optimiser, its settings checked as far as they can be.

    Raises:
        UserError: there is none of that name, it is no Optimizer, or takes no such setting.
    """
    cls = own_class(choice.name, Optimizer, "optimizer")
    known = inspect.signature(cls).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for key in ("lr", *choice.settings.given):
        if key not in known and not free and key != "groups":
            names = [name for name in known if name not in ("params", "self")]
            raise UserError(f"optimizer {choice.name} takes no {key!r}: {choose_from(key, names)}")
    for group, values in choice.settings.given.get("groups", {}).items():
        if group not in GROUPS:
            raise UserError(f"unknown group {group!r}: {choose_from(group, GROUPS)}")
        common = {k: v for k, v in values.items() if k in ("lr_factor", "weight_decay")}
        filled(OfGroup, common, f"optimizer.groups.{group}.")
    return cls

"""How stages learn: one file a method.

To add one, write a subclass of :class:`Method` in a file of its own, and name it here.
"""

from typing import Any

from tritonbnn.compute import Compute
from tritonbnn.distributed import World
from tritonbnn.methods.distill import Distill
from tritonbnn.methods.method import Losses, Method
from tritonbnn.methods.plain import Plain
from tritonbnn.methods.scores import Evaluation, evaluate
from tritonbnn.methods.stage import Stage, Task
from tritonbnn.optim import OPTIMIZERS, SCHEDULES
from tritonbnn.settings import Choice, Options, filled, own_class

__all__ = [
    "METHODS",
    "Evaluation",
    "Losses",
    "Method",
    "Stage",
    "Task",
    "evaluate",
    "lone_task",
    "make_method",
    "method_class",
]

METHODS: dict[str, type[Method]] = {"plain": Plain, "distill": Distill}
"""The methods that a recipe may name. A dotted name is a class of the user's own."""


def method_class(choice: Choice) -> tuple[type[Method], Any]:
    """The class of a method, and its settings.

    Raises:
        UserError: there is no class of that name, it is no Method, or has no such settings.
    """
    if not isinstance(choice.settings, Options):
        return METHODS[choice.name], choice.settings
    cls = own_class(choice.name, Method, "method")
    return cls, filled(cls.Settings, choice.settings.given, "method.")


def lone_task(compute: Compute, method: str = "plain", **settings: Any) -> Task:
    """A task without images, alone on the machine: for who calls the loop by hand.

    Args:
        compute: device and precision.
        method: one of :data:`METHODS`.
        settings: of the method.
    """
    own = METHODS[method].Settings(**settings)
    stage = Stage(
        name="alone",
        method=Choice(method, own),
        optimizer=Choice("adam", OPTIMIZERS["adam"]()),
        schedule=Choice("constant", SCHEDULES["constant"]()),
    )
    return Task(stage, {}, "auto", None, compute, World())


def make_method(task: Task) -> Method:
    """The method of a stage."""
    cls, settings = method_class(task.stage.method)
    return cls(settings, task)

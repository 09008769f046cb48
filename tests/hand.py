"""Methods for tests that call the training loop by hand."""

from torch import nn

from tritonbnn.compute import Compute
from tritonbnn.methods import lone_task
from tritonbnn.methods.distill import Distill
from tritonbnn.methods.plain import Plain


def plain(compute: Compute, label_smoothing: float = 0.0) -> Plain:
    """Learning from labels."""
    settings = Plain.Settings(label_smoothing)
    return Plain(settings, lone_task(compute, label_smoothing=label_smoothing))


def taught(compute: Compute, teacher: nn.Module) -> Distill:
    """Learning from a teacher that is at hand."""
    method = Distill(Distill.Settings(), lone_task(compute, "distill"))
    method.teacher = teacher
    return method

"""NaN in front of a sign, where nobody would see it any more."""

import torch
from torch import Tensor


def refuse_nan(x: Tensor) -> None:
    """Raise if ``x`` holds NaN, whose sign is -1 like that of any number below 0.

    Only while torch looks for such numbers itself, in ``torch.autograd.set_detect_anomaly(True)``,
    for it takes one more pass over x, and on a GPU a wait.

    Raises:
        RuntimeError: it does.
    """
    if torch.compiler.is_compiling() or not torch.is_anomaly_enabled():
        return
    if x.isnan().any():
        raise RuntimeError(
            f"a binary layer's input of shape {tuple(x.shape)} holds NaN, which the sign would"
            " hide: see the layers before it"
        )

"""Learning rates as pure functions of the epoch: what a stage's ``lr`` is multiplied by.

A schedule is a frozen dataclass of its settings. Called with an epoch, counted from 0, and the
number of epochs, it gives the factor for that whole epoch. Nothing is remembered, so a run can go
on in any epoch.
"""

import math
from dataclasses import dataclass

from tritonbnn.settings import setting


@dataclass(frozen=True)
class AdamBNN:
    """1 - (epoch + 1) / epochs.

    The code published with AdamBNN (2106.11309) steps its schedule before the first batch. So no
    epoch runs at the full rate, and in the last one no weight moves: it only refreshes the running
    statistics of BatchNorm.
    """

    def __call__(self, epoch: int, epochs: int) -> float:
        return 1 - (epoch + 1) / epochs


@dataclass(frozen=True)
class Linear:
    """1 - epoch / epochs: from the full rate down to one epoch's share of it."""

    def __call__(self, epoch: int, epochs: int) -> float:
        return 1 - epoch / epochs


@dataclass(frozen=True)
class Constant:
    """The full rate in every epoch."""

    def __call__(self, epoch: int, epochs: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Cosine:
    """A linear rise, then half a cosine from the full rate towards ``least`` (1608.03983)."""

    warmup: int = setting(0, "epochs of a linear rise before the full rate", least=0)
    least: float = setting(0.0, "factor that the curve falls towards", least=0, most=1)

    def __call__(self, epoch: int, epochs: int) -> float:
        if epoch < self.warmup:
            return (epoch + 1) / (self.warmup + 1)
        done = (epoch - self.warmup) / max(1, epochs - self.warmup)
        return self.least + (1 - self.least) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class Step:
    """The rate is multiplied by ``factor`` at each of some points of the stage."""

    at: tuple[float, ...] = setting(
        (0.5, 0.75), "shares of the epochs after which the rate drops", above=0, below=1
    )
    factor: float = setting(0.1, "of each drop", above=0, most=1)

    def __call__(self, epoch: int, epochs: int) -> float:
        return self.factor ** sum(epoch >= share * epochs for share in self.at)


SCHEDULES: dict[str, type] = {
    "adambnn": AdamBNN,
    "linear": Linear,
    "cosine": Cosine,
    "step": Step,
    "constant": Constant,
}
"""The schedules that a stage may name, by name."""

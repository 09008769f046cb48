"""What a run is: one frozen dataclass, written with it and compared when it goes on."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tritonbnn.analysis import LEVELS
from tritonbnn.compute import PRECISIONS
from tritonbnn.data.classes import CLASS_ORDERS
from tritonbnn.data.sources import SETTINGS, SOURCES
from tritonbnn.data.views import AUGMENTATIONS, LIGHTING
from tritonbnn.methods import METHODS, Stage
from tritonbnn.models import MODELS
from tritonbnn.ops.unit import PLANS
from tritonbnn.optim import OPTIMIZERS, SCHEDULES
from tritonbnn.settings import fields_of, setting

# More is a slip of the finger, which would end in a machine out of memory or out of processes.
MOST_IMAGES = 1 << 20  # of a batch
MOST_WORKERS = 1024
MOST_SEED = 2**64 - 1  # of torch's generators
# A run may go on with another value of these. The epochs of a stage may grow too.
MAY_CHANGE_ON_RESUME = (
    *("device", "graph", "workers", "data_dir", "only", "skip_bad_images"),
    *("log_interval", "log_minutes", "save_minutes", "plan", "analysis", "analysis_interval"),
)
OF_STAGE_MAY_CHANGE = ("published_top1",)
# The processes of a job may each have their own.
OF_A_PROCESS = ("device", "workers", "data_dir", "recipe")
# What --init-from says where there is no checkpoint, and the weights shall start at random.
SCRATCH = "scratch"

_BARE = re.compile(r"[A-Za-z0-9_-]+")

CHOICES: dict[str, Mapping[str, type]] = {
    "method": {name: method.Settings for name, method in METHODS.items()},
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
}
"""What a stage chooses by name: the settings dataclass behind each name."""

CHOSEN_BY_DEFAULT = {"method": "plain", "optimizer": "adam", "schedule": "adambnn"}


@dataclass(frozen=True)
class Config:
    """All that decides a run, but for the machine and the number of processes."""

    recipe: str = setting("", "name of the recipe that this came from")
    dataset: str = setting("digits", "data set", choices=tuple(SOURCES))
    data_dir: str = setting(
        "", "folder with train/ and val/, or with the data set's own files", path=()
    )
    skip_bad_images: bool = setting(False, "count and list unreadable images, do not stop")
    class_order: str = setting("name", "of a tree's classes", choices=tuple(CLASS_ORDERS))
    white_level: int = setting(
        0, "level of 16-bit grey that is white; 0 guesses it from the files", least=0
    )
    background: str = setting("white", "colour behind what is transparent in an image file")
    image_size: int = setting(32, "height and width of the network's input", least=1)
    augment: str = setting("none", "training views", choices=tuple(AUGMENTATIONS))
    lighting: str = setting("none", "colour noise", choices=tuple(LIGHTING))
    model: str = setting("reactnet_a", "network", choices=tuple(MODELS))
    width: float = setting(1.0, "multiplies all channels", above=0)
    small_images: bool = setting(False, "a stem of stride 1, for images of about 32x32")
    batch_size: int = setting(
        64, "images of an optimiser step, over all processes", least=1, most=MOST_IMAGES
    )
    accumulation: int = setting(1, "parts that a process computes its share in", least=1)
    precision: str = setting("fp32", "of the activations", choices=tuple(PRECISIONS))
    channels_last: bool = setting(False, "keep images and convolution weights in NHWC order")
    plan: str = setting(
        "auto", "what units save for backward; recompute takes least memory", choices=PLANS
    )
    compile: bool = setting(False, "network and teacher through torch.compile")
    graph: bool = setting(False, "record a training step on a GPU as CUDA graphs, and repeat it")
    sync_bn: bool = setting(False, "BatchNorm statistics over all processes (CUDA)")
    init_from: str = setting(
        "",
        "checkpoint (a published one of AdamBNN too) or run whose weights the first stage starts"
        " from, or scratch: random weights, as convolutions in torch begin",
        path=(SCRATCH,),
    )
    only: str = setting("", "the one stage to run; empty: all of them")
    seed: int = setting(0, "of weights, order and views", least=0, most=MOST_SEED)
    device: str = setting("auto", "cpu, cuda, cuda:N, or auto: cuda where there is one")
    workers: int = setting(
        0, "processes that read images; 0 reads in the trainer itself", least=0, most=MOST_WORKERS
    )
    save_minutes: float = setting(10.0, "time between checkpoints within an epoch", least=0)
    log_interval: int = setting(50, "optimiser steps between looks at the loss", least=1)
    log_minutes: float = setting(
        1.0, "time between lines within an epoch where the output is no terminal", least=0
    )
    analysis: str = setting("light", "what is measured of flips and the like", choices=LEVELS)
    analysis_interval: int = setting(10, "optimiser steps from one look at gradients on", least=1)
    stages: tuple[Stage, ...] = ()

    @property
    def chosen(self) -> tuple[Stage, ...]:
        """The stages to run, in order."""
        return (self.stage(self.only),) if self.only else self.stages

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all stages, in order."""
        return tuple(stage.name for stage in self.stages)

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        return self.stages[self.names.index(name)]

    def number(self, stage: Stage) -> int:
        """Which stage of the run it is, from 1. Order and views of the images depend on it."""
        return 1 + self.names.index(stage.name)


SHARED_FIELDS = {k: f for k, f in fields_of(Config).items() if k != "stages"}
STAGE_FIELDS = {k: f for k, f in fields_of(Stage).items() if k not in ("name", *CHOICES)}


def data_settings(config: Config) -> dict[str, Any]:
    """What the data set is opened with."""
    return {key: getattr(config, key) for key in SETTINGS}


def tuned_shapes(config: Config) -> dict[str, Any]:
    """What decides which shapes the kernels meet in a part of a batch."""
    return {
        "model": config.model,
        "batch": -(-config.batch_size // config.accumulation),
        "size": config.image_size,
        "width": config.width,
        "small_images": config.small_images,
        "dtype": config.precision,
    }


def to_toml(config: Config) -> str:
    """``config`` as a recipe file that gives the same configuration again."""
    lines = [f"{key} = {_toml(getattr(config, key))}" for key in SHARED_FIELDS]
    for stage in config.stages:
        lines += ["", "[[stage]]", f"name = {_toml(stage.name)}"]
        lines += [f"{key} = {_toml(getattr(stage, key))}" for key in STAGE_FIELDS]
        lines += [f"{key} = {_toml(getattr(stage, key).table())}" for key in CHOICES]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        pairs = (f"{_key(key)} = {_toml(inner)}" for key, inner in value.items())
        return f"{{ {', '.join(pairs)} }}" if value else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    # what JSON writes for these types is TOML too, once non-ASCII text stays as it is
    return json.dumps(value, ensure_ascii=False)


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _toml(key)


def flat(config: Config) -> dict[str, Any]:
    """Every setting by the name of its flag, as in ``step1.optimizer.eps``."""
    found = {key: getattr(config, key) for key in SHARED_FIELDS}
    for stage in config.stages:
        found |= {f"{stage.name}.{key}": getattr(stage, key) for key in STAGE_FIELDS}
        for key in CHOICES:
            table = getattr(stage, key).table()
            found[f"{stage.name}.{key}"] = table.pop("name")
            found |= {f"{stage.name}.{key}.{name}": value for name, value in table.items()}
    return found


def differences(old: Config, new: Config) -> list[str]:
    """What forbids going on with ``new`` in a run of ``old``, one phrase a key."""
    if old.names != new.names:
        return [f"stages were {', '.join(old.names)} and are {', '.join(new.names)}"]
    before, after = flat(old), flat(new)
    changed = [key for key in dict.fromkeys((*before, *after)) if before.get(key) != after.get(key)]
    return [
        f"{key} was {before.get(key)!r} and is {after.get(key)!r}"
        for key in changed
        # another choice has other settings; it says enough
        if key.rpartition(".")[0] not in changed and not _may_change(key, before, after)
    ]


def _may_change(key: str, before: dict[str, Any], after: dict[str, Any]) -> bool:
    stage, *rest = key.split(".")
    if not rest:
        return stage in (*MAY_CHANGE_ON_RESUME, "recipe")
    grows = rest == ["epochs"] and after[key] > before[key]
    return grows or rest[0] in OF_STAGE_MAY_CHANGE

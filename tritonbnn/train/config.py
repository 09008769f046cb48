"""What a run is: one frozen dataclass, written with it and compared when it goes on."""

import json
from dataclasses import dataclass, field, fields
from typing import Any

from tritonbnn.analysis import LEVELS
from tritonbnn.data.classes import CLASS_ORDERS
from tritonbnn.data.sources import SETTINGS, SOURCES
from tritonbnn.data.views import AUGMENTATIONS, LIGHTING

STEPS = (1, 2)
# More is a slip of the finger, which would end in a machine out of memory or out of processes.
MOST_IMAGES = 1 << 20  # of a batch
MOST_WORKERS = 1024
# A run may go on with another value of these. The epochs of a step may grow too.
MAY_CHANGE_ON_RESUME = (
    *("device", "workers", "data_dir", "step"),
    *("log_interval", "save_minutes", "plan", "analysis", "analysis_interval"),
)
# What --init-from says where there is no checkpoint, and binary weights shall start at random.
SCRATCH = "scratch"


def setting(default: Any, help_text: str, **limits: Any) -> Any:
    """A field of the configuration. Its comment is also its ``--help``.

    Args:
        default: its value where neither recipe nor command line sets it.
        help_text: what it means.
        limits: ``choices``, ``least`` and ``most`` (bounds that are legal), ``above`` and ``below``
            (bounds that are not).
    """
    return field(default=default, metadata={"help": help_text, **limits})


@dataclass(frozen=True)
class StepConfig:
    """What differs between the steps. Set without a prefix, a key counts for both."""

    epochs: int = setting(10, "passes over the training images", least=1)
    lr: float = setting(1.25e-3, "learning rate that the linear decay starts from", above=0)
    weight_decay: float = setting(0.0, "L2 term on convolution weights and shifts", least=0)


@dataclass(frozen=True)
class Config:
    """All that decides a run, but for the machine and the number of processes."""

    recipe: str = setting("", "name of the recipe that this came from")
    dataset: str = setting("digits", "data set", choices=tuple(SOURCES))
    data_dir: str = setting("", "folder with train/ and val/, or with the data set's own files")
    skip_bad_images: bool = setting(False, "count and list unreadable images, do not stop")
    class_order: str = setting("name", "of a tree's classes", choices=tuple(CLASS_ORDERS))
    white_level: int = setting(
        0, "level of 16-bit grey that is white; 0 guesses it from the files", least=0
    )
    background: str = setting("white", "colour behind what is transparent in an image file")
    image_size: int = setting(32, "height and width of the network's input", least=1)
    augment: str = setting("none", "training views", choices=tuple(AUGMENTATIONS))
    lighting: str = setting("none", "colour noise", choices=tuple(LIGHTING))
    model: str = setting(
        "reactnet_a", "network", choices=("reactnet_a", "reactnet_18", "birealnet_18")
    )
    width: float = setting(1.0, "multiplies all channels", above=0)
    small_images: bool = setting(False, "a stem of stride 1, for images of about 32x32")
    teacher: str = setting("none", "resnet34, a file with its weights, or none (labels)")
    label_smoothing: float = setting(0.0, "of the labels, without a teacher", least=0, below=1)
    optimizer: str = setting("adam", "SGD has momentum 0.9", choices=("adam", "sgd"))
    batch_size: int = setting(
        64, "images of an optimiser step, over all processes", least=1, most=MOST_IMAGES
    )
    accumulation: int = setting(1, "parts that a process computes its share in", least=1)
    precision: str = setting("fp32", "of the activations", choices=("fp32", "bf16", "fp16"))
    channels_last: bool = setting(False, "keep images and convolution weights in NHWC order")
    plan: str = setting(
        "auto",
        "what units save for backward; recompute takes least memory",
        choices=("auto", "keep", "recompute", "fused"),
    )
    compile: bool = setting(False, "network and teacher through torch.compile")
    sync_bn: bool = setting(False, "BatchNorm statistics over all processes (CUDA)")
    init_from: str = setting(
        "",
        "checkpoint (a published one of AdamBNN too) or run whose weights the first step starts"
        " from; with --step 2, scratch: random weights, as convolutions in torch begin",
    )
    step: int = setting(0, "1 or 2 runs that step alone, 0 both", choices=(0, 1, 2))
    seed: int = setting(0, "of weights, order and views", least=0)
    device: str = setting("auto", "cpu, cuda, cuda:N, or auto: cuda where there is one")
    workers: int = setting(
        0, "processes that read images; 0 reads in the trainer itself", least=0, most=MOST_WORKERS
    )
    save_minutes: float = setting(10.0, "time between checkpoints within an epoch", least=0)
    log_interval: int = setting(50, "optimiser steps between looks at the loss", least=1)
    analysis: str = setting("light", "what is measured of flips and the like", choices=LEVELS)
    analysis_interval: int = setting(10, "optimiser steps from one look at gradients on", least=1)
    step1: StepConfig = StepConfig()
    step2: StepConfig = StepConfig()

    def of_step(self, step: int) -> StepConfig:
        """The part that belongs to step 1 or 2."""
        return self.step1 if step == 1 else self.step2

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps to run, in order."""
        return (self.step,) if self.step else STEPS


STEP_FIELDS = {f.name: f for f in fields(StepConfig)}
SHARED_FIELDS = {f.name: f for f in fields(Config) if f.name not in ("step1", "step2")}


def data_settings(config: Config) -> dict[str, Any]:
    """What the data set is opened with."""
    return {key: getattr(config, key) for key in SETTINGS}


def to_toml(config: Config) -> str:
    """``config`` as a recipe file that gives the same configuration again."""
    lines = [f"{key} = {_toml(getattr(config, key))}" for key in SHARED_FIELDS]
    for step in STEPS:
        lines += ["", f"[step{step}]"]
        lines += [f"{key} = {_toml(getattr(config.of_step(step), key))}" for key in STEP_FIELDS]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    # what JSON writes for these types is TOML too, once non-ASCII text stays as it is
    return json.dumps(value, ensure_ascii=False)


def differences(old: Config, new: Config) -> list[str]:
    """What forbids going on with ``new`` in a run of ``old``, one phrase a key."""
    keys = [key for key in SHARED_FIELDS if key not in (*MAY_CHANGE_ON_RESUME, "recipe")]
    changed = [(key, getattr(old, key), getattr(new, key)) for key in keys]
    for step in STEPS:
        before, after = old.of_step(step), new.of_step(step)
        for key in STEP_FIELDS:
            a, b = getattr(before, key), getattr(after, key)
            if not (key == "epochs" and b > a):
                changed.append((f"step{step}.{key}", a, b))
    return [f"{key} was {a!r} and is {b!r}" for key, a, b in changed if a != b]

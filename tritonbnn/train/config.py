"""What a run is: one frozen dataclass, filled from a recipe file, then from the command line."""

import dataclasses
import difflib
import json
import math
import os
import tomllib
from argparse import SUPPRESS, BooleanOptionalAction
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from tritonbnn.cli import Parser, UserError

STEPS = (1, 2)
# A run may go on with another value of these. The epochs of a step may grow too.
MAY_CHANGE_ON_RESUME = ("device", "workers", "data_dir", "step", "log_interval", "save_minutes")


def setting(default: Any, help_text: str, **limits: Any) -> Any:
    """A field of the configuration. Its comment is also its ``--help``.

    Args:
        default: its value where neither recipe nor command line sets it.
        help_text: what it means.
        limits: ``choices``, ``least`` (smallest legal value), ``above`` or ``below`` (bounds that
            are not legal themselves).
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
    dataset: str = setting("digits", "data set", choices=("digits", "fashion", "folder"))
    data_dir: str = setting("", "folder with train/ and val/, or with Fashion-MNIST's files")
    skip_bad_images: bool = setting(False, "count and list unreadable images, do not stop")
    image_size: int = setting(32, "height and width of the network's input", least=1)
    augment: str = setting("none", "training views", choices=("imagenet", "crop-flip", "none"))
    lighting: str = setting("none", "colour noise", choices=("published", "pca", "none"))
    model: str = setting(
        "reactnet_a", "network", choices=("reactnet_a", "reactnet_18", "birealnet_18")
    )
    width: float = setting(1.0, "multiplies all channels", above=0)
    small_images: bool = setting(False, "a stem of stride 1, for images of about 32x32")
    teacher: str = setting("none", "resnet34, a file with its weights, or none (labels)")
    label_smoothing: float = setting(0.0, "of the labels, without a teacher", least=0, below=1)
    batch_size: int = setting(64, "images of an optimiser step, over all processes", least=1)
    accumulation: int = setting(1, "parts that a process computes its share in", least=1)
    precision: str = setting("fp32", "of the activations", choices=("fp32", "bf16", "fp16"))
    channels_last: bool = setting(False, "keep images and convolution weights in NHWC order")
    sync_bn: bool = setting(False, "BatchNorm statistics over all processes (CUDA)")
    init_from: str = setting("", "checkpoint or run whose weights the first step starts from")
    step: int = setting(0, "1 or 2 runs that step alone, 0 both", choices=(0, 1, 2))
    seed: int = setting(0, "of weights, order and views", least=0)
    device: str = setting("auto", "cpu, cuda, cuda:N, or auto: cuda where there is one")
    workers: int = setting(0, "processes that read images; 0 reads in the trainer itself", least=0)
    save_minutes: float = setting(10.0, "time between checkpoints within an epoch", least=0)
    log_interval: int = setting(50, "optimiser steps between looks at the loss", least=1)
    step1: StepConfig = StepConfig()
    step2: StepConfig = StepConfig()

    def of_step(self, step: int) -> StepConfig:
        """The part that belongs to step 1 or 2."""
        return self.step1 if step == 1 else self.step2

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps to run, in order."""
        return (self.step,) if self.step else STEPS


@dataclass(frozen=True)
class Arguments:
    """A parsed command line.

    Attributes:
        config: the resolved configuration.
        out: the run's folder.
        fresh: start over in a new folder beside ``out``.
    """

    config: Config
    out: Path
    fresh: bool


_STEP_FIELDS = {f.name: f for f in fields(StepConfig)}
_SHARED_FIELDS = {f.name: f for f in fields(Config) if f.name not in ("step1", "step2")}


def parse(argv: list[str]) -> Arguments:
    """Read ``[RECIPE] [--key value ...]``.

    Raises:
        UserError: an unknown recipe or key, a value of the wrong type or out of range.
    """
    parser = _parser()
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise UserError(f"unknown argument {unknown[0]}{_did_you_mean(unknown[0], flags)}")
    overrides = vars(given)
    recipe, out, fresh = (overrides.pop(key) for key in ("recipe", "out", "fresh"))
    config = resolve(read_recipe(recipe), overrides)
    return Arguments(config, Path(out or f"runs/{config.recipe}"), fresh)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m tritonbnn.train",
        description="Train a binary network in two steps: binary activations, then weights too.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "recipe",
        nargs="?",
        default="digits",
        help=f"one of {', '.join(shipped_recipes())}, or a .toml file (default: digits)",
    )
    parser.add_argument("--out", help="the run's folder (default: runs/RECIPE)")
    parser.add_argument(
        "--fresh", action="store_true", help="start over in a new folder beside the old one"
    )
    for key, spec in _SHARED_FIELDS.items():
        if key != "recipe":
            _add_flag(parser, key, spec)
    for key, spec in _STEP_FIELDS.items():
        _add_flag(parser, key, spec)
        for step in STEPS:
            _add_flag(parser, f"step{step}.{key}", spec)
    return parser


def _add_flag(parser: Parser, key: str, spec: dataclasses.Field) -> None:
    text = spec.metadata["help"].replace("%", "%%")
    if choices := spec.metadata.get("choices"):
        text += f" ({', '.join(map(str, choices))})"
    flag = f"--{key.replace('_', '-')}"
    # SUPPRESS: what is not given must not hide what the recipe says
    if spec.type is bool:
        parser.add_argument(
            flag, dest=key, default=SUPPRESS, help=text, action=BooleanOptionalAction
        )
    else:
        parser.add_argument(flag, dest=key, default=SUPPRESS, help=text, metavar="VALUE")


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package."""
    folder = resources.files("tritonbnn.train") / "recipes"
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".toml"))


def read_recipe(name: str) -> dict[str, Any]:
    """The settings of a shipped recipe, or of a TOML file, tables flattened to dotted keys."""
    if name in shipped_recipes():
        text = (resources.files("tritonbnn.train") / "recipes" / f"{name}.toml").read_text("utf-8")
    else:
        text = _read_file(name)
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"recipe {name} is not valid TOML: {error}") from error
    flat = {"recipe": Path(name).stem}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": inner_value for inner, inner_value in value.items()}
        else:
            flat[key] = value
    return flat


def _read_file(name: str) -> str:
    try:
        return Path(name).read_text("utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        if os.sep in name or name.endswith(".toml"):
            raise UserError(f"cannot read recipe {name}: {error}") from error
        known = shipped_recipes()
        raise UserError(
            f"unknown recipe {name!r}{_did_you_mean(name, known)}:"
            f" choose from {', '.join(known)}, or name a .toml file"
        ) from error


def resolve(*layers: dict[str, Any]) -> Config:
    """Lay settings over each other, the last one on top; within one, ``step1.lr`` beats ``lr``."""
    shared: dict[str, Any] = {}
    of_step: dict[int, dict[str, Any]] = {step: {} for step in STEPS}
    for layer in layers:
        for key, value in layer.items():
            if key in _SHARED_FIELDS:
                shared[key] = _checked(key, value, _SHARED_FIELDS[key])
            elif key in _STEP_FIELDS:
                for step in STEPS:
                    of_step[step][key] = _checked(key, value, _STEP_FIELDS[key])
        for step in STEPS:
            for name, spec in _STEP_FIELDS.items():
                key = f"step{step}.{name}"
                if key in layer:
                    of_step[step][name] = _checked(key, layer[key], spec)
        _reject_unknown(layer)
    config = Config(**shared, step1=StepConfig(**of_step[1]), step2=StepConfig(**of_step[2]))
    return _with_data_folder(config)


def _reject_unknown(layer: dict[str, Any]) -> None:
    dotted = [f"step{step}.{name}" for step in STEPS for name in _STEP_FIELDS]
    known = [*_SHARED_FIELDS, *_STEP_FIELDS, *dotted]
    for key in layer:
        if key not in known:
            raise UserError(f"unknown key {key!r} in the recipe{_did_you_mean(key, known)}")


def _with_data_folder(config: Config) -> Config:
    """Paths made absolute: a run may go on from another folder."""
    paths: dict[str, Any] = {
        key: str(Path(value).absolute())
        for key in ("data_dir", "init_from")
        if (value := getattr(config, key))
    }
    if config.data_dir and config.dataset == "digits":
        paths["dataset"] = "folder"
    return dataclasses.replace(config, **paths)


def _checked(key: str, value: Any, spec: dataclasses.Field) -> Any:
    """``value`` as the field's type: from TOML it has one, from the command line it is text."""
    limits = spec.metadata
    flag = f"--{key.replace('_', '-')}"
    kind: Any = spec.type
    value = _converted(flag, value, kind)
    if "choices" in limits and value not in limits["choices"]:
        raise UserError(
            f"{flag} {value}: choose from {', '.join(map(str, limits['choices']))}"
            f"{_did_you_mean(str(value), [str(c) for c in limits['choices']])}"
        )
    if kind is float and not math.isfinite(value):
        raise UserError(f"{flag} must be a finite number, not {value}")
    if "least" in limits and value < limits["least"]:
        raise UserError(f"{flag} must be at least {limits['least']}, not {value}")
    if "above" in limits and value <= limits["above"]:
        raise UserError(f"{flag} must be greater than {limits['above']}, not {value}")
    if "below" in limits and value >= limits["below"]:
        raise UserError(f"{flag} must be less than {limits['below']}, not {value}")
    return value


def _converted(flag: str, value: Any, kind: type) -> Any:
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind in (int, float) and isinstance(value, str):
        try:
            return kind(value)
        except ValueError:
            pass
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    raise UserError(f"{flag} must be {names[kind]}, not {value!r}")


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def to_toml(config: Config) -> str:
    """``config`` as a recipe file that gives the same configuration again."""
    lines = [f"{key} = {_toml(getattr(config, key))}" for key in _SHARED_FIELDS]
    for step in STEPS:
        lines += ["", f"[step{step}]"]
        lines += [f"{key} = {_toml(getattr(config.of_step(step), key))}" for key in _STEP_FIELDS]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    # what JSON writes for these types is TOML too, once non-ASCII text stays as it is
    return json.dumps(value, ensure_ascii=False)


def differences(old: Config, new: Config) -> list[str]:
    """What forbids going on with ``new`` in a run of ``old``, one phrase a key."""
    keys = [key for key in _SHARED_FIELDS if key not in (*MAY_CHANGE_ON_RESUME, "recipe")]
    changed = [(key, getattr(old, key), getattr(new, key)) for key in keys]
    for step in STEPS:
        before, after = old.of_step(step), new.of_step(step)
        for key in _STEP_FIELDS:
            a, b = getattr(before, key), getattr(after, key)
            if not (key == "epochs" and b > a):
                changed.append((f"step{step}.{key}", a, b))
    return [f"{key} was {a!r} and is {b!r}" for key, a, b in changed if a != b]

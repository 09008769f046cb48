"""From a recipe and a command line to a configuration."""

import dataclasses
import difflib
import math
import os
import tomllib
from argparse import SUPPRESS, BooleanOptionalAction
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from tritonbnn.cli import Parser, UserError
from tritonbnn.data.sources import canonical, make_opener
from tritonbnn.train.config import (
    SCRATCH,
    SHARED_FIELDS,
    STEP_FIELDS,
    STEPS,
    Config,
    StepConfig,
    data_settings,
)


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
        epilog="What is not given is as the recipe has it.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "recipe",
        nargs="?",
        default="digits",
        help=f"one of {', '.join(shipped_recipes())}, or a .toml file",
    )
    parser.add_argument("--out", help="the run's folder (default: runs/RECIPE)")
    parser.add_argument(
        "--fresh", action="store_true", help="start over in a new folder beside the old one"
    )
    for key, spec in SHARED_FIELDS.items():
        if key != "recipe":
            _add_flag(parser, key, spec)
    for key, spec in STEP_FIELDS.items():
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
        if any("\udc80" <= c <= "\udcff" for c in text):
            raise UserError(f"cannot read recipe {name}: it is no text in UTF-8") from error
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
        # a path in it may hold bytes that are not UTF-8, and config.toml keeps them as they are
        return Path(name).read_text("utf-8", errors="surrogateescape")
    except (OSError, ValueError) as error:
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
            if key in SHARED_FIELDS:
                shared[key] = _checked(key, value, SHARED_FIELDS[key])
            elif key in STEP_FIELDS:
                for step in STEPS:
                    of_step[step][key] = _checked(key, value, STEP_FIELDS[key])
        for step in STEPS:
            for name, spec in STEP_FIELDS.items():
                key = f"step{step}.{name}"
                if key in layer:
                    of_step[step][name] = _checked(key, layer[key], spec)
        _reject_unknown(layer)
    config = Config(**shared, step1=StepConfig(**of_step[1]), step2=StepConfig(**of_step[2]))
    return _with_data_folder(config)


def _reject_unknown(layer: dict[str, Any]) -> None:
    dotted = [f"step{step}.{name}" for step in STEPS for name in STEP_FIELDS]
    known = [*SHARED_FIELDS, *STEP_FIELDS, *dotted]
    for key in layer:
        if key not in known:
            raise UserError(f"unknown key {key!r} in the recipe{_did_you_mean(key, known)}")


def _with_data_folder(config: Config) -> Config:
    """Paths made absolute: a run may go on from another folder."""
    paths: dict[str, Any] = {
        key: str(Path(value).absolute())
        for key in ("data_dir", "init_from")
        if (value := getattr(config, key)) not in ("", SCRATCH)
    }
    config = dataclasses.replace(config, **paths)
    make_opener(config.dataset, data_settings(config))  # what does not fit is refused here
    return config


def _checked(key: str, value: Any, spec: dataclasses.Field) -> Any:
    """``value`` as the field's type: from TOML it has one, from the command line it is text."""
    if key == "dataset":
        value = canonical(value)
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
    if "most" in limits and value > limits["most"]:
        raise UserError(f"{flag} must be at most {limits['most']}, not {value}")
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

"""The trainer's command line: ``[RECIPE] [--key value ...]``.

argparse collects text. What it means, and whether it is legal, the same code decides that reads
recipes (:mod:`tritonbnn.train.recipe`), so that a value is never checked in two ways.
"""

from argparse import SUPPRESS, BooleanOptionalAction
from collections.abc import Mapping
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Any, get_args

from tritonbnn import cli
from tritonbnn.cli import Parser, UserError
from tritonbnn.methods import method_class
from tritonbnn.optim import check_optimizer
from tritonbnn.settings import Options, did_you_mean, fields_of, flag
from tritonbnn.train.config import (
    CHOICES,
    CHOSEN_BY_DEFAULT,
    SHARED_FIELDS,
    STAGE_FIELDS,
    Config,
)
from tritonbnn.train.recipe import read_recipe, resolve, shipped_recipes

_METAVARS = {int: "INT", float: "NUMBER", str: "TEXT", dict: "TABLE"}
_OF_ONE_STAGE = ("start", "published_top1")  # --STAGE.KEY sets them, and nothing else does
_OWN_FLAG = ("recipe", "only")  # that Config has, and whose flag is spelt otherwise


@dataclass(frozen=True)
class Arguments:
    """A parsed command line.

    Attributes:
        config: the resolved configuration.
        out: the run's folder.
        fresh: start over in a new folder beside ``out``.
        tune: minutes in which the kernels are tuned first, or None.
    """

    config: Config
    out: Path
    fresh: bool
    tune: float | None


def parse(argv: list[str]) -> Arguments:
    """Read ``[RECIPE] [--key value ...]``.

    Raises:
        UserError: an unknown recipe or key, a value of the wrong type or out of range, a class of
            the user's own that cannot be used.
    """
    rest, of_parts = _take_dotted(argv)
    parser = _parser(None)
    given, unknown = parser.parse_known_args(rest)
    if unknown:
        flags = [name for action in parser._actions for name in action.option_strings]
        raise UserError(f"unknown argument {unknown[0]}{did_you_mean(unknown[0], flags)}")
    overrides = vars(given)
    recipe, out, fresh, tune, wants_help = (
        overrides.pop(key) for key in ("recipe", "out", "fresh", "tune", "help")
    )
    config = resolve(read_recipe(recipe), _merged(overrides, of_parts))
    if wants_help:
        _parser(config).print_help()
        raise SystemExit(0)
    _check_own_classes(config)
    return Arguments(config, cli.path(out or f"runs/{config.recipe}"), fresh, tune)


def _check_own_classes(config: Config) -> None:
    """Import the user's own classes now: a mistake in a later stage must not wait for it."""
    for stage in config.chosen:
        method_class(stage.method)
        if isinstance(stage.optimizer.settings, Options):
            check_optimizer(stage.optimizer)


def _take_dotted(argv: list[str]) -> tuple[list[str], list[tuple[list[str], str]]]:
    """Part flags of a stage or a choice, as in ``--step1.lr 1e-3``, from all others.

    Which of these exist depends on the recipe. So they are read before argparse, and each has a
    value: ``true`` or ``false`` where it is yes or no.
    """
    rest: list[str] = []
    dotted: list[tuple[list[str], str]] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if not name.startswith("--") or "." not in name:
            rest.append(word)
            continue
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise UserError(f"argument {name}: expected one argument (see --help)")
        dotted.append((name.removeprefix("--").split("."), value))
    return rest, dotted


def _merged(overrides: dict[str, Any], dotted: list[tuple[list[str], str]]) -> dict[str, Any]:
    """The command line as a layer over a recipe."""
    layer = {key: {"name": v} if key in CHOICES else v for key, v in overrides.items()}
    layer["own"] = {}
    for (first, *middle, last), value in dotted:
        place = layer if first in CHOICES else layer["own"]
        for part in (first, *middle):
            word = part if part == first else part.replace("-", "_")
            place = place.setdefault(word, {})
            if not isinstance(place, dict):  # --step1.optimizer adam --step1.optimizer.eps 1
                raise UserError(f"--{first}.{'.'.join((*middle, last))}: give --{part}.name too")
        key = last.replace("-", "_")
        place[key] = {"name": value} if key in CHOICES else value
    return layer


def _parser(config: Config | None) -> Parser:
    """The parser; with a configuration, one whose help shows what that sets."""
    parser = Parser(
        prog="python -m tritonbnn.train",
        description="Train a binary network, in as many stages as the recipe has.",
        epilog="What is not given is as the recipe has it. A key of one stage alone is set by"
        " --STAGE.KEY, as in --step1.lr 1e-3.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this and exit")
    parser.add_argument(
        "recipe",
        nargs="?",
        default="digits",
        help=f"one of {', '.join(shipped_recipes())}, or a .toml file",
    )
    parser.add_argument("--out", metavar="FOLDER", help="the run's folder (default: runs/RECIPE)")
    parser.add_argument(
        "--fresh", action="store_true", help="start over in a new folder beside the old one"
    )
    parser.add_argument(
        "--tune",
        type=cli.minutes,
        metavar="MINUTES",
        help="first time the kernels for this network on this GPU, for so long (5m or 5)",
    )
    names = f" ({', '.join(config.names)})" if config else ""
    parser.add_argument(
        "--stage", dest="only", default=SUPPRESS, metavar="NAME", help=f"run it alone{names}"
    )
    parser.add_argument(
        "--step",
        default=SUPPRESS,
        metavar="{0,1,2}",
        help="the same for stages step1 and step2; 0: both",
    )
    for name, text in (
        ("--teacher", "learn from it: method distill, or none for method plain"),
        ("--label-smoothing", "of method plain"),
    ):
        parser.add_argument(name, default=SUPPRESS, help=text, metavar=name[2:].upper())
    of_stage = parser.add_argument_group("of a stage, or of all")
    for key, spec in STAGE_FIELDS.items():
        if key in _OF_ONE_STAGE:
            continue
        _add_flag(of_stage, key, spec, _values(config, key))
    for key, known in CHOICES.items():
        text = "or package.Class of your own" if key != "schedule" else "of the learning rate"
        shown = _values(config, key) or CHOSEN_BY_DEFAULT[key]
        of_stage.add_argument(
            f"--{key}",
            default=SUPPRESS,
            metavar=f"{{{','.join(known)}}}",
            help=f"{text} (default: {shown})",
        )
    if config:
        for key in CHOICES:
            _describe_choice(parser, config, key)
    run = parser.add_argument_group("of the run")
    for key, spec in SHARED_FIELDS.items():
        if key not in _OWN_FLAG:
            _add_flag(run, key, spec, "" if config is None else _shown(getattr(config, key)))
    return parser


def _add_flag(parser: Any, key: str, spec: Field, shown: str) -> None:
    text = spec.metadata["help"].replace("%", "%%")
    if shown:
        text += f" (default: {shown.replace('%', '%%')})"
    # SUPPRESS: what is not given must not hide what the recipe says
    if spec.type is bool:
        parser.add_argument(
            flag(key), dest=key, default=SUPPRESS, help=text, action=BooleanOptionalAction
        )
    else:
        parser.add_argument(
            flag(key), dest=key, default=SUPPRESS, help=text, metavar=_metavar(spec)
        )


def _describe_choice(parser: Parser, config: Config, key: str) -> None:
    """Flags of the settings of what the stages have chosen; they are read by :func:`resolve`."""
    for choice in dict.fromkeys(getattr(stage, key).name for stage in config.stages):
        cls = CHOICES[key].get(choice)
        specs = fields_of(cls) if cls else {}
        group = parser.add_argument_group(f"of {key} {choice}") if specs else None
        for name, spec in specs.items():
            default = next(
                getattr(getattr(stage, key).settings, name)
                for stage in config.stages
                if getattr(stage, key).name == choice
            )
            text = spec.metadata["help"].replace("%", "%%")
            assert group
            group.add_argument(
                flag(f"{key}.{name}"),
                metavar=_metavar(spec),
                help=f"{text} (default: {_shown(default) or 'none'})",
            )


def _metavar(spec: Field) -> str:
    if choices := spec.metadata.get("choices"):
        return f"{{{','.join(map(str, choices))}}}"
    if spec.type is bool:
        return "{true,false}"
    parts = get_args(spec.type)
    return ",".join(_METAVARS.get(kind, "...") for kind in parts or (spec.type,))


def _values(config: Config | None, key: str) -> str:
    """A stage's key as the recipe has it: one value, or one for each stage."""
    if config is None:
        return ""
    values = {stage.name: getattr(stage, key) for stage in config.stages}
    shown = {name: _shown(getattr(v, "name", v)) for name, v in values.items()}
    if len(set(shown.values())) == 1:
        return next(iter(shown.values()))
    return ", ".join(f"{value or 'none'} in {name}" for name, value in shown.items())


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(_shown, value))
    if isinstance(value, Mapping):
        return ", ".join(value)
    return str(value)

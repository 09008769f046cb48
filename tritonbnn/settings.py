"""Settings: fields of frozen dataclasses that know their help, their choices and their bounds.

A recipe and a command line are checked by the same code here. A recipe's values have a type; those
of a command line are text, and become what the field wants.
"""

import dataclasses
import difflib
import importlib
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from tritonbnn import cli
from tritonbnn.cli import UserError

T = TypeVar("T")

_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "a table",
}


def setting(default: Any, help_text: str, **limits: Any) -> Any:
    """A field of a settings dataclass.

    Args:
        default: its value where neither recipe nor command line sets it.
        help_text: what it means, for ``--help`` and for whoever reads the class.
        limits: ``choices``, ``least`` and ``most`` (bounds that are legal), ``above`` and ``below``
            (bounds that are not). Of a tuple they hold for each number. ``path`` makes a relative
            path absolute; it is a tuple of words that are no path.
    """
    return field(default=default, metadata={"help": help_text, **limits})


@dataclass(frozen=True)
class Options:
    """Keyword arguments for a class of the user's own, as she gave them. It is not imported yet."""

    given: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """One class out of several, by name, and its settings.

    Attributes:
        name: a key of the dict of classes, or the dotted name of a user's own class.
        settings: an instance of the class's settings dataclass, or :class:`Options`.
    """

    name: str
    settings: Any

    def table(self) -> dict[str, Any]:
        """As a recipe has it: the name, and all settings beside it."""
        given = self.settings.given if isinstance(self.settings, Options) else None
        return {
            "name": self.name,
            **(dataclasses.asdict(self.settings) if given is None else given),
        }


def fields_of(cls: type) -> dict[str, dataclasses.Field]:
    """The fields of a settings dataclass by name, with real types where they were text."""
    kinds = get_type_hints(cls)
    specs = {spec.name: spec for spec in dataclasses.fields(cls) if spec.init}
    for name, spec in specs.items():
        spec.type = kinds[name]
    return specs


def filled(cls: type[T], given: Mapping[str, Any], path: str) -> T:
    """An instance of a settings dataclass.

    Args:
        cls: the dataclass.
        given: values by field; what is not there keeps its default.
        path: what leads the field's name in a message, as in ``"optimizer."``.

    Raises:
        UserError: an unknown name, a value of the wrong type or out of range.
    """
    specs = fields_of(cls)
    for key in given:
        if key not in specs:
            raise UserError(f"unknown key {path + key!r}{did_you_mean(key, specs)}")
    return cls(**{key: checked(path + key, value, specs[key]) for key, value in given.items()})


def checked(key: str, value: Any, spec: dataclasses.Field) -> Any:
    """``value`` as the field's type and within its limits.

    Raises:
        UserError: it is neither.
    """
    name, limits = flag(key), spec.metadata
    value = _converted(name, value, spec.type)
    if "choices" in limits and value not in limits["choices"]:
        raise UserError(f"{name} {value}: {choose_from(str(value), limits['choices'])}")
    for number in value if isinstance(value, tuple) else (value,):
        _check_limits(name, number, limits)
    if "path" in limits and value not in ("", *limits["path"]):
        return absolute(value)
    return value


def absolute(text: str) -> str:
    """A path that means the same from any folder: a run may go on from another one."""
    path = cli.path(text).absolute()
    return str(path.resolve() if ".." in path.parts else path)


def choose_from(word: str, known: Iterable[Any]) -> str:
    """What to choose instead of ``word``, and the nearest of it."""
    names = [str(name) for name in known]
    return f"choose from {', '.join(names)}{did_you_mean(word, names)}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest known word, in brackets; empty where none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def flag(key: str) -> str:
    """A key as the command line spells it."""
    return f"--{key.replace('_', '-')}"


def guessed(text: Any) -> Any:
    """A value of the command line whose type nobody knows, read as a recipe would have it."""
    if not isinstance(text, str):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def own_class(name: str, base: type[T], what: str) -> type[T]:
    """The class of a dotted name, as in ``"mypackage.MyClass"``. Its module is imported.

    Args:
        name: of a module that Python finds, and a class in it.
        base: what it must be a subclass of.
        what: it is, for a message.

    Raises:
        UserError: there is no such module or class, or it is of another kind.
    """
    module_name, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # something that the user's module itself imports
        raise UserError(
            f"{what} {name}: Python finds no module {error.name}: start where it is, or set"
            " PYTHONPATH"
        ) from error
    found = getattr(module, attribute, None)
    if found is None:
        near = did_you_mean(attribute, vars(module))
        raise UserError(f"{what} {name}: module {module_name} has no {attribute}{near}")
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{what} {name} is no subclass of {base.__module__}.{base.__qualname__}")
    return found


def _check_limits(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, not {value}")
    if "least" in limits and value < limits["least"]:
        raise UserError(f"{name} must be at least {limits['least']}, not {value}")
    if "most" in limits and value > limits["most"]:
        raise UserError(f"{name} must be at most {limits['most']}, not {value}")
    if "above" in limits and value <= limits["above"]:
        raise UserError(f"{name} must be greater than {limits['above']}, not {value}")
    if "below" in limits and value >= limits["below"]:
        raise UserError(f"{name} must be less than {limits['below']}, not {value}")


def _converted(name: str, value: Any, kind: Any) -> Any:
    if get_origin(kind) is tuple:
        return _tuple(name, value, get_args(kind))
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(value, str):
        if kind is bool and value in ("true", "false"):
            return value == "true"
        if kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                pass
    wanted = _KINDS.get(kind) or getattr(kind, "__name__", str(kind))
    raise UserError(f"{name} must be {wanted}, not {value!r}")


def _tuple(name: str, value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    """A list from a recipe, or ``0.9,0.999`` from a command line, as a tuple of numbers."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        raise UserError(f"{name} must be a list, not {value!r}")
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(parts)
    if len(parts) != len(kinds):
        raise UserError(f"{name} must be {len(kinds)} values, not {len(parts)}")
    return tuple(_converted(name, part, kind) for part, kind in zip(parts, kinds, strict=True))

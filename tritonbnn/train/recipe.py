"""From recipes, laid over each other, to a configuration.

A layer is what a TOML file holds. The command line is one more, whose values are still text and
whose tables of single stages stand under ``own``, by name.
"""

import os
import re
import tomllib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from importlib import resources
from pathlib import Path
from typing import Any

from tritonbnn import cli
from tritonbnn.cli import UserError
from tritonbnn.data.sources import canonical, make_opener
from tritonbnn.methods import Stage
from tritonbnn.settings import (
    Choice,
    Options,
    absolute,
    checked,
    choose_from,
    did_you_mean,
    fields_of,
    filled,
    flag,
    guessed,
)
from tritonbnn.train.config import (
    CHOICES,
    CHOSEN_BY_DEFAULT,
    SHARED_FIELDS,
    STAGE_FIELDS,
    Config,
    data_settings,
)

Layer = dict[str, Any]

_STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_ADAMBNN = ("step1", "step2")
# A stage of one of these names would be taken for a key, or for a folder of another kind.
_RESERVED = (*CHOICES, "stage", "own", "tensorboard")
# Keys from before a stage had a method; they are still the shortest way to say it.
_SHORT = ("teacher", "label_smoothing")


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package."""
    folder = resources.files("tritonbnn.train") / "recipes"
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".toml"))


def read_recipe(name: str) -> Layer:
    """The layer of a shipped recipe, or of a TOML file.

    Raises:
        UserError: there is none, or it is no TOML.
    """
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
    except RecursionError as error:
        raise UserError(f"recipe {name} is not valid TOML: its brackets nest too deeply") from error
    return {"recipe": Path(name).stem, **_with_stages(content)}


def _read_file(name: str) -> str:
    try:
        content = cli.path(name).read_bytes()
    except (OSError, ValueError) as error:
        if os.sep in name or name.endswith(".toml"):
            raise UserError(f"cannot read recipe {name}: {error}") from error
        raise UserError(
            f"unknown recipe {name!r}: {choose_from(name, shipped_recipes())}, or name a .toml file"
        ) from error
    # as editors and shells of Windows write it: every other byte of plain text is 0 then
    if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) or b"\0" in content:
        raise UserError(f"cannot read recipe {name}: it is in UTF-16, or no text: save it as UTF-8")
    # a path in it may hold bytes that are not UTF-8, and config.toml keeps them as they are
    return content.removeprefix(BOM_UTF8).decode(errors="surrogateescape")


def _with_stages(content: Layer) -> Layer:
    """A recipe from before stages had names: its steps 1 and 2 are AdamBNN's stages."""
    old = [name for name in _ADAMBNN if isinstance(content.get(name), dict)]
    if "stage" in content or not old:
        return content
    layer = {key: value for key, value in content.items() if key not in old}
    layer["stage"] = [
        {"name": "step1", "binary_weights": False, **content.get("step1", {})},
        {"name": "step2", "start": "step1", **content.get("step2", {})},
    ]
    if layer.get("teacher", "none") != "none":  # labels had no part in it
        layer.pop("label_smoothing", None)
    return layer


def stage_names(folder: Path) -> list[str]:
    """The stages of a run, in order, as its ``config.toml`` has them; AdamBNN's without one."""
    try:
        text = (folder / "config.toml").read_text("utf-8", errors="surrogateescape")
        tables = tomllib.loads(text).get("stage", [])
        return [str(table["name"]) for table in tables] or list(_ADAMBNN)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return list(_ADAMBNN)  # who needs the file says that it cannot be read


def resolve(*layers: Layer) -> Config:
    """Lay settings over each other, the last layer on top.

    Within a layer a key of one stage beats the same key for all stages.

    Raises:
        UserError: an unknown key, a value of the wrong type or out of range, or stages that make
            no run.
    """
    draft = _Draft()
    for layer in layers:
        draft.lay(dict(layer))
    return draft.config()


class _Draft:
    """A configuration in the making.

    Attributes:
        shared: of the run.
        stages: fields of each stage, by its name; a choice is a table with ``name`` in it.
    """

    def __init__(self) -> None:
        self.shared: dict[str, Any] = {}
        self.stages: dict[str, dict[str, Any]] = {}

    def lay(self, layer: Layer) -> None:
        """Put a layer on top."""
        tables = self._declared(layer.pop("stage", []))
        for name, table in layer.pop("own", {}).items():
            if name not in self.stages or not isinstance(table, dict):
                key = f"{name}.{next(iter(table))}"
                near = did_you_mean(name, [*self.stages, *CHOICES])
                raise UserError(f"unknown argument {flag(key)}{near}")
            tables.append((name, table))
        for key, value in layer.items():
            if key == "dataset":
                value = canonical(value)
            if key in SHARED_FIELDS:
                self.shared[key] = checked(key, value, SHARED_FIELDS[key])
            elif key in STAGE_FIELDS:
                checked(key, value, STAGE_FIELDS[key])  # named without a stage's name before it
            elif key == "step":
                self.shared["only"] = self._of_number(value)
            elif key not in (*CHOICES, *_SHORT):
                near = did_you_mean(key, [*SHARED_FIELDS, *STAGE_FIELDS, *CHOICES])
                raise UserError(f"unknown key {key!r} in the recipe{near}")
        common = {k: v for k, v in layer.items() if k in (*STAGE_FIELDS, *CHOICES, *_SHORT)}
        for name in self.stages:
            self._enter(name, common, "")
        for name, table in tables:
            self._enter(name, table, f"{name}.")

    def _declared(self, tables: Any) -> list[tuple[str, dict[str, Any]]]:
        """The ``[[stage]]`` tables, each with its name taken out."""
        if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
            raise UserError("a stage is a [[stage]] table with a name: write each so")
        found = []
        for number, table in enumerate(tables, start=1):
            name = table.get("name")
            if not isinstance(name, str) or not _STAGE_NAME.fullmatch(name) or name in _RESERVED:
                raise UserError(
                    f"stage {number} has the name {name!r}: give one of letters, digits, - and _"
                    f" that is none of {', '.join(_RESERVED)}"
                )
            if name in self.stages:
                raise UserError(f"there are two stages {name!r}: give each a name of its own")
            self.stages[name] = {key: {"name": value} for key, value in CHOSEN_BY_DEFAULT.items()}
            found.append((name, {k: v for k, v in table.items() if k != "name"}))
        return found

    def _of_number(self, value: Any) -> str:
        """The stage that ``--step`` means."""
        if str(value) not in ("0", "1", "2") or isinstance(value, bool):
            raise UserError(f"--step {value}: choose from 0, 1, 2")
        name = f"step{value}"
        if str(value) == "0":
            return ""
        if name not in self.stages:
            names = ", ".join(self.stages)
            raise UserError(f"--step is for stages step1 and step2: use --stage with {names}")
        return name

    def _enter(self, name: str, table: dict[str, Any], path: str) -> None:
        """Set keys of a stage. What it chooses comes first, as settings belong to that."""
        stage = self.stages[name]
        for key in CHOICES:
            if key in table:
                stage[key] = _chosen(key, stage[key], table[key], path)
        for key, value in table.items():
            if key in _SHORT:
                stage["method"] = _short(stage["method"], key, value, path)
            elif key in STAGE_FIELDS:
                stage[key] = checked(path + key, value, STAGE_FIELDS[key])
            elif key not in CHOICES:
                near = did_you_mean(key, [*STAGE_FIELDS, *CHOICES])
                raise UserError(f"unknown key {path + key!r}{near}")

    def config(self) -> Config:
        """The finished configuration."""
        if not self.stages:
            raise UserError(
                "the recipe has no stage: add a [[stage]] table with a name for each stage"
            )
        only = self.shared.get("only", "")
        if only and only not in self.stages:
            raise UserError(f"--stage {only}: {choose_from(only, self.stages)}")
        stages: list[Stage] = []
        for name, fields in self.stages.items():
            choices = {key: _choice(key, fields[key]) for key in CHOICES}
            before = [stage.name for stage in stages]
            start = self._start(name, fields.get("start", ""), before)
            stages.append(Stage(name=name, **{**fields, **choices, "start": start}))
        config = Config(**self.shared, stages=tuple(stages))
        make_opener(config.dataset, data_settings(config))  # what does not fit is refused here
        return config

    def _start(self, name: str, start: str, before: list[str]) -> str:
        """What a stage starts from: a stage before it, or a path, made absolute."""
        if not start or start in before:
            return start
        if start in self.stages:
            raise UserError(
                f"stage {name} starts from {start}, which does not come before it:"
                " put it later, or start from another"
            )
        if os.sep not in start and not cli.path(start).exists():
            raise UserError(
                f"stage {name} starts from {start!r}, which is neither a stage before it nor a"
                f" checkpoint{did_you_mean(start, before)}"
            )
        return absolute(start)


def _chosen(key: str, before: dict[str, Any], given: Any, path: str) -> dict[str, Any]:
    """A choice with other settings, or another choice: then the settings before are forgotten."""
    table = {"name": given} if isinstance(given, str) else given
    if not isinstance(table, dict) or not isinstance(table.get("name", ""), str):
        raise UserError(f"{flag(path + key)} must be a name, or a table with a name, not {given!r}")
    name = table.get("name", before["name"])
    cls = _settings_class(key, name, path)
    kept = before if name == before["name"] else {}
    new = {k: v for k, v in table.items() if k != "name"}
    if cls is not None:
        filled(cls, new, f"{path}{key}.")
    elif not all(isinstance(k, str) for k in new):
        raise UserError(f"{flag(path + key)} has a setting without a name")
    return {**_deep(kept, new), "name": name}


def _deep(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """One table laid over another, and tables in it over tables."""
    both = {k for k in above if isinstance(above[k], dict) and isinstance(below.get(k), dict)}
    return {**below, **above, **{k: _deep(below[k], above[k]) for k in both}}


def _settings_class(key: str, name: str, path: str) -> type | None:
    """The settings of a choice; None for a class of the user's own."""
    known = CHOICES[key]
    if name in known:
        return known[name]
    if "." in name and key != "schedule":
        return None
    own = "" if key == "schedule" else ", or a class of your own as package.Class"
    raise UserError(f"{flag(path + key)} {name}: {choose_from(name, known)}{own}")


def _choice(key: str, table: dict[str, Any]) -> Choice:
    """A finished choice."""
    given = {k: v for k, v in table.items() if k != "name"}
    cls = _settings_class(key, table["name"], "")
    if cls is None:
        return Choice(table["name"], Options(_guessed(given)))
    return Choice(table["name"], filled(cls, given, f"{key}."))


def _guessed(table: dict[str, Any]) -> dict[str, Any]:
    return {k: _guessed(v) if isinstance(v, dict) else guessed(v) for k, v in table.items()}


def _short(method: dict[str, Any], key: str, value: Any, path: str) -> dict[str, Any]:
    """A method after ``teacher`` or ``label_smoothing`` was set without naming a method."""
    name = method["name"]
    cls = _settings_class("method", name, path)
    if cls is not None and key in fields_of(cls) and value != "none":
        checked(path + key, value, fields_of(cls)[key])
        return _chosen("method", method, {key: value}, path)
    if key == "teacher" and value == "none":
        return {"name": "plain"} if name == "distill" else method
    if key == "teacher" and name == "plain":
        return _chosen("method", method, {"name": "distill", key: value}, path)
    if key == "label_smoothing" and str(value) in ("0", "0.0"):
        return method
    raise UserError(f"{flag(path + key)}: method {name} has no such setting")

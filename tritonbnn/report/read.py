"""A saved run, read again without its network: its log, its settings, its histograms."""

import json
import math
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from tritonbnn.cli import UserError
from tritonbnn.files import utf_8_name
from tritonbnn.train.checkpoint import stage_folder, with_stage
from tritonbnn.train.log import ANALYSIS, LOG, Line
from tritonbnn.train.recipe import stage_names
from tritonbnn.train.run_folder import CONFIG

EDGES = "histogram.edges"
_NAMED = 3  # epochs, of those with a bad number


@dataclass(frozen=True, eq=False)
class StageRecord:
    """What one stage of a run wrote down. What it did not is NaN, or empty.

    Attributes:
        name: of the stage.
        weights: in a word: real or 1-bit.
        lines: of the log, one an epoch, in their order.
        tensors: of ``analysis.safetensors``, by name.
    """

    name: str
    weights: str
    lines: list[Line]
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def epochs(self) -> int:
        """The last epoch in the log."""
        return max(line["epoch"] for line in self.lines)

    @property
    def layers(self) -> list[str]:
        """Names of the binary layers that any epoch measured, from the first to the last."""
        return list(dict.fromkeys(name for line in self.lines for name in _layers(line)))

    @property
    def samples_flips(self) -> bool:
        """Whether flip-flop ratios are of some updates alone, as an older tritonbnn took them."""
        return any("flip_flop" in (a := _analysis(x)) and "updates" not in a for x in self.lines)

    @property
    def lacks_start(self) -> bool:
        """Whether histograms were turned on in the middle of the stage."""
        return any(not counts[0].any() for counts in self.of_layers("histogram").values())

    def series(self, key: str) -> np.ndarray:
        """A value of the log, or of its analysis, by epoch: (epochs,) float64."""
        return self._by_epoch([line.get(key, _analysis(line).get(key)) for line in self.lines])

    def by_layer(self, key: str) -> np.ndarray:
        """A value of every layer by epoch: (layers, epochs) float64."""
        rows = [
            self._by_epoch([_layers(line).get(name, {}).get(key) for line in self.lines])
            for name in self.layers
        ]
        return np.array(rows).reshape(len(rows), self.epochs)

    def of_layers(self, kind: str) -> dict[str, np.ndarray]:
        """The tensors ``kind.NAME``, by the name of their layer, from the first to the last."""
        start = f"{kind}."
        names = [n.removeprefix(start) for n in self.tensors if n.startswith(start) and n != EDGES]
        return {name: self.tensors[start + name] for name in sorted(names, key=_by_numbers)}

    def _by_epoch(self, values: list[Any]) -> np.ndarray:
        result = np.full(self.epochs, np.nan)
        for line, value in zip(self.lines, values, strict=True):
            if _is_number(value) and math.isfinite(value):
                result[line["epoch"] - 1] = value
        return result


@dataclass(frozen=True, eq=False)
class RunRecord:
    """A run as it lies on the disk.

    Attributes:
        path: its folder.
        label: a short name that no other run beside it has.
        config: its settings, as in ``config.toml``; empty where that is missing.
        stages: those that have begun, by name, in their order.
        notes: what could not be read, a sentence each.
    """

    path: Path
    label: str
    config: dict[str, Any]
    stages: dict[str, StageRecord]
    notes: list[str]

    @property
    def network(self) -> dict[str, Any]:
        """What makes its layers comparable with another run's."""
        return self._settings("model", "width", "small_images")

    @property
    def data(self) -> dict[str, Any]:
        """What makes its scores comparable with another run's."""
        return self._settings("dataset", "data_dir", "image_size")

    def setting(self, key: str, stage: str) -> Any:
        """A setting as it holds in a stage; empty where it is not known."""
        own = _stage_table(self.config, stage)
        return (own if key in own else self.config).get(key, "")

    def _settings(self, *keys: str) -> dict[str, Any]:
        return {key: self.config.get(key) for key in keys}


def read_runs(folders: list[Path]) -> list[RunRecord]:
    """Read runs, each under a label of its own. One that shows nothing is left out, and named.

    Raises:
        UserError: no folder holds a run's log.
    """
    runs, refused = [], []
    for folder, label in zip(folders, _labels(folders), strict=True):
        try:
            runs.append(_read_run(folder, label))
        except UserError as error:
            refused.append(str(error))
    if not runs:
        raise UserError("; ".join(refused))
    for reason in refused:
        runs[0].notes.append(reason)
    return runs


def _labels(folders: list[Path]) -> list[str]:
    """The folders' names, or as much of their paths as tells them apart; the same one twice, no."""
    resolved = [folder.resolve() for folder in folders]
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise UserError(f"{folder} is given twice: name each run once")
    for parts in range(1, max(len(folder.parts) for folder in resolved) + 1):
        labels = ["/".join(folder.parts[-parts:]) for folder in resolved]
        if len(set(labels)) == len(labels):
            break
    # a name that is not UTF-8 could be neither drawn nor written
    return [label.encode(errors="replace").decode() for label in labels]


def _read_run(folder: Path, label: str) -> RunRecord:
    notes: list[str] = []
    names = stage_names(folder)
    lines = _read_log(folder, names, notes)
    config = _read_config(folder, notes)
    stages = {}
    for name in names:
        own = sorted((x for x in lines if x["stage"] == name), key=lambda x: x["epoch"])
        if own:
            tensors = _read_tensors(stage_folder(folder, name) / ANALYSIS, notes)
            stages[name] = StageRecord(name, _weights(config, name), own, tensors)
    for stage in stages.values():
        if stage.samples_flips:
            notes.append(
                f"the flip-flop ratios of {stage.name} of {label} are those of sampled"
                " updates, in which an epoch's first weighs too much: train again to compare them"
            )
        if stage.lacks_start:
            notes.append(
                f"histograms of {stage.name} of {label} were turned on in its middle:"
                " there is none of the stage's start"
            )
    return RunRecord(folder, label, config, stages, notes)


def _stage_table(config: dict[str, Any], stage: str) -> dict[str, Any]:
    """The settings of one stage; a run from before stages had names has a table ``[step1]``."""
    tables = config.get("stage")
    if isinstance(tables, list):
        return next((x for x in tables if isinstance(x, dict) and x.get("name") == stage), {})
    own = config.get(stage)
    return own if isinstance(own, dict) else {}


def _weights(config: dict[str, Any], stage: str) -> str:
    binary = _stage_table(config, stage).get("binary_weights", stage != "step1")
    return "1-bit" if binary else "real"


def _read_log(folder: Path, names: list[str], notes: list[str]) -> list[Line]:
    path = folder / LOG
    if not folder.exists():
        raise UserError(f"{folder} does not exist: name a run's folder")
    if not path.is_file():
        raise UserError(f"{folder} holds no {LOG}: name the folder of a run that has begun")
    try:
        rows = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    lines = list(_good_lines(path, rows, names, notes))
    if not lines:
        raise UserError(f"{path} tells of no epoch yet: wait for its first, or name another run")
    for key, epochs in _not_finite(lines).items():
        more = f" and {len(epochs) - _NAMED} more" if len(epochs) > _NAMED else ""
        where = ", ".join(epochs[:_NAMED]) + more
        notes.append(f"{path}: {key} is not a finite number in {where}: left out")
    return lines


def _good_lines(
    path: Path, rows: list[bytes], names: list[str], notes: list[str]
) -> Iterator[Line]:
    """The lines of a log that tell of an epoch, and a note about each that does not."""
    for number, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        try:
            line = with_stage(json.loads(row))
        # bad UTF-8 too, brackets without end, and what is no object
        except (ValueError, TypeError, RecursionError):
            line = None
        if line is not None and _tells_of_an_epoch(line, names):
            yield line
        elif number == len(rows):
            notes.append(f"{path} ends in the middle of line {number}: used up to there")
        else:
            notes.append(f"{path}: line {number} is not an epoch's: left out")


def _tells_of_an_epoch(line: Any, names: list[str]) -> bool:
    return (
        isinstance(line, dict)
        and line.get("stage") in names
        and type(line.get("epoch")) is int  # and no bool
        and 0 < line["epoch"] < 10**6  # arrays are as long as that
    )


def _not_finite(lines: list[Line]) -> dict[str, list[str]]:
    """The values that are NaN or infinite, and where."""
    found: dict[str, list[str]] = {}
    for line in lines:
        values = [*line.items(), *_analysis(line).items()]
        for layer in _layers(line).values():
            values += [(f"a layer's {key}", value) for key, value in layer.items()]
        bad = [key for key, value in values if _is_number(value) and not math.isfinite(value)]
        for key in dict.fromkeys(bad):
            found.setdefault(key, []).append(f"{line['stage']} epoch {line['epoch']}")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """Sorts blocks.2 before blocks.10: a safetensors file has no order of its own."""
    parts = name.split(".")
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _analysis(line: Line) -> dict[str, Any]:
    found = line.get("analysis")
    return found if isinstance(found, dict) else {}


def _layers(line: Line) -> dict[str, dict[str, Any]]:
    found = _analysis(line).get("layers")
    layers = found if isinstance(found, dict) else {}
    return {name: layer for name, layer in layers.items() if isinstance(layer, dict)}


def _read_config(folder: Path, notes: list[str]) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        return tomllib.loads(path.read_text("utf-8", errors="surrogateescape"))
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path} cannot be read, so its settings are not shown: {error}")
        return {}


def _read_tensors(path: Path, notes: list[str]) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    try:
        with utf_8_name(path) as name:
            tensors = load_file(name)
    except (SafetensorError, OSError, ValueError) as error:
        notes.append(f"{path} is damaged, so histograms and channels are not shown: {error}")
        return {}
    if odd := [name for name, tensor in tensors.items() if not _fits(name, tensor, tensors)]:
        notes.append(f"{path} has tensors of other shapes than it should: {', '.join(odd)}")
    return {name: tensor for name, tensor in tensors.items() if name not in odd}


def _fits(name: str, tensor: np.ndarray, tensors: dict[str, np.ndarray]) -> bool:
    """Whether a tensor of a record has the shape that its name promises."""
    if name == EDGES:
        return tensor.ndim == 1 and bool((np.diff(tensor) > 0).all())
    if name.startswith("histogram."):
        bins = tensors[EDGES].size - 1 if EDGES in tensors else 0
        return tensor.ndim == 2 and tensor.size > 0 and tensor.shape[1] == bins
    return tensor.ndim == 2 and tensor.size > 0

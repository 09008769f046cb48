"""Result files as Markdown: every figure is one of a file, or a ratio of two of the same file."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measure import trouble
from benchmarks.output import read_result
from tritonbnn import cli
from tritonbnn.study import summary
from tritonbnn.study.plan import STUDIES, TWO_STEP_SGD

MISSING = "not measured yet"
STEP_FILES = {step: f"train_step_{step}.json" for step in (1, 2)}
MAX_AUTOTUNE_FILES = {step: f"train_step_{step}_max_autotune.json" for step in (1, 2)}
BATCH_SWEEP, SIZE_SWEEP, PEAK = (
    "batch_sweep.json",
    "size_sweep.json",
    "peak_memory_reactnet_a_224_batch8.json",
)
TRAINING_RUNS = tuple(
    f"{recipe}{way}.json" for recipe in ("digits", "fashion") for way in ("", "_bf16", "_obvious")
)

Result = dict[str, Any]


class Device:
    """The results of one device.

    Args:
        folder: of its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {path.name: read_result(path) for path in sorted(folder.glob("*.json"))}

    @property
    def is_cpu(self) -> bool:
        return self.folder.name.startswith("cpu-")

    @property
    def title(self) -> str:
        """Its name, as the files have it."""
        heads = [result for result in self.files.values() if result and "device" in result]
        name = heads[0]["device"] if heads else self.folder.name
        cores = re.search(r"-(\d+)-cores$", self.folder.name)
        return f"{name}, {cores[1]} cores, no GPU" if cores else name

    def get(self, name: str) -> Result | None:
        """A result, or None where it was not measured."""
        return self.files.get(name)

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Name the file if something in it is not as expected."""
        try:
            yield
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise cli.UserError(
                f"{self.folder / name} is not as expected ({error!r}): measure it again"
            ) from error

    def rows(self, step: int) -> dict[str, Result]:
        """Every rival's row of a step's files; in one file the rivals took turns."""
        found: dict[str, Result] = {}
        for name in (STEP_FILES[step], MAX_AUTOTUNE_FILES[step]):
            with self.reading(name):
                if result := self.get(name):
                    rows = result["points"][0]["rows"]
                    first = next(iter(rows.values())).get("median_seconds")
                    for rival, row in rows.items():
                        seconds = row.get("median_seconds")
                        ratio = {"slower": seconds / first} if seconds and first else {}
                        found.setdefault(rival, {**row, **ratio})
        return found


def label(rival: str) -> str:
    """A rival's word for readers."""
    network, *options = rival.split("+")
    said = {"compile": "torch.compile", "max-autotune": "torch.compile max-autotune"}
    return ", ".join([network.replace("-", " "), *(said.get(o, o) for o in options)])


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table, with a line that says so where there are no rows."""
    if not rows:
        rows = [[MISSING, *[""] * (len(head) - 1)]]
    rule = ["---"] * len(head)
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)] + [""]


def steps_table(device: Device) -> list[str]:
    """Rivals against each other in both steps."""
    by_step = {step: device.rows(step) for step in STEP_FILES}
    result = device.get(STEP_FILES[2]) or device.get(STEP_FILES[1])
    what = "a training step"
    if result:
        with device.reading(STEP_FILES[2]):
            point = result["points"][0]
            what += f", batch {point['batch']}, {point['size']} x {point['size']}"
            what += f", threads: {result['threads']}" if device.is_cpu else ""
    head = [what, "step 1, img/s", "step 2, img/s", "ours is faster by", "MB saved / img"]
    if not device.is_cpu:
        head += ["GB at peak", "of the floor"]
    rows = []
    with device.reading(STEP_FILES[2]):
        for rival in dict.fromkeys([*by_step[2], *by_step[1]]):
            one, two = (by_step[step].get(rival, {}) for step in (1, 2))
            slower = f"{two['slower']:.2f} x" if two.get("slower", 1) != 1 else ""
            cells = [
                label(rival),
                speed(one),
                speed(two),
                slower,
                number(two or one, "saved_mb_per_image"),
            ]
            if not device.is_cpu:
                cells += [number(two, "peak_mb", 1e-3), number(two, "share_of_floor", 100, " %")]
            rows.append(cells)
    return table(head, rows)


def speed(row: Result) -> str:
    """Images a second and half the spread of its rounds, or why there is none."""
    if "images_per_second" in row:
        return f"{row['images_per_second']:,.4g} ± {row['spread'] / 2:.0%}"
    return trouble(row) if row else MISSING


def number(row: Result, key: str, scale: float = 1, unit: str = "") -> str:
    """One figure, or nothing where it does not apply."""
    return f"{row[key] * scale:,.4g}{unit}" if key in row else ""


def sweep_table(device: Device, name: str, key: str) -> list[str]:
    """Images a second against batch size or resolution.

    Args:
        device: whose.
        name: of the file.
        key: "batch" or "size".
    """
    result = device.get(name)
    if result is None and device.is_cpu:
        return []
    with device.reading(name):
        points = result["points"] if result else []
        rivals = list(points[0]["rows"]) if points else []
        rows = [
            [str(point[key]), *(speed(point["rows"][rival]) for rival in rivals)]
            for point in points
        ]
    return table([f"img/s by {key}", *map(label, rivals)], rows)


def runs_table(device: Device) -> list[str]:
    """Training runs to their end: accuracy over seeds, and minutes."""
    tool = "python -m benchmarks.seeds "
    names = [n for n, r in device.files.items() if r and r.get("command", "").startswith(tool)]
    if not device.is_cpu:
        names = list(dict.fromkeys([*TRAINING_RUNS, *names]))
    rows = []
    for name in names:
        result = device.get(name)
        if result is None:
            rows.append([name.removesuffix(".json").replace("_", " "), MISSING, MISSING, ""])
            continue
        with device.reading(name):
            said = result["command"].removeprefix(tool)
            rows.append([f"`{said}`", *(accuracy(result[f"step{s}"]) for s in (1, 2))])
            minutes = [m for s in (1, 2) for m in result[f"step{s}"]["training_minutes"].values()]
            rows[-1].append(f"{sum(minutes) / len(minutes) * 2:.2g}")
    return table(["`python -m benchmarks.seeds`", "step 1", "step 2", "minutes a run"], rows)


def accuracy(step: Result) -> str:
    """The mean of the seeds' last top-1, and their range."""
    if step["lowest"] == step["highest"]:
        return f"{step['mean']:.2f} %"
    return f"{step['mean']:.2f} % ({step['lowest']:.2f} to {step['highest']:.2f})"


def study_table(device: Device) -> list[str]:
    """Ways to train, of the paper's comparisons; nothing where they were not made."""
    name, lines = "study_digits.json", []
    with device.reading(name):
        if result := device.get(name):
            results, studies = result["results"], result["studies"]
            variants = dict.fromkeys(v for study in studies for v in STUDIES[study].variants)
            head = ["`python -m tritonbnn.study`", *summary.heads(results)]
            rows = [[variant.title, *summary.cells(variant, results)] for variant in variants]
            scale, caution = summary.scale, summary.caution
            lines = table(head, rows)
            lines += [f"{scale(result['settings'])} {summary.window(results)}", ""]
            lines += [f"The paper's orders. {caution(result['settings'], studies)}", ""]
            lines += [*summary.verdicts(studies, results), "", *_rates_line(device, result)]
    return lines


def _rates_line(device: Device, result: Result) -> list[str]:
    """SGD at learning rates other than that of the table; nothing where none was tried."""
    names = [name for name in device.files if name.startswith("study_digits_sgd_")]
    top1 = {}
    for name in names:
        with device.reading(name):
            other = device.files[name] or {}
            top1[other["settings"]["sgd_lr"]] = other["results"][TWO_STEP_SGD.name]["0"]["top1"]
    if not top1:
        return []
    top1[result["settings"]["sgd_lr"]] = result["results"][TWO_STEP_SGD.name]["0"]["top1"]
    said = ", ".join(f"{value:.4g} % at {rate:g}" for rate, value in sorted(top1.items()))
    return [f"SGD at other rates, with seed 0: {said}.", ""]


def overhead_line(device: Device) -> list[str]:
    """What the analysis adds to a training step; nothing where it was not measured."""
    name = "analysis_overhead_digits.json"
    with device.reading(name):
        result = device.get(name)
        share = f"{result['share_of_step']:.1%}" if result else ""
    return [f"`--analysis light` adds {share} to a training step.", ""] if share else []


def peak_line(device: Device) -> list[str]:
    """Resident memory of a CPU's step, in one line."""
    result = device.get(PEAK)
    if not device.is_cpu:
        return []
    with device.reading(PEAK):
        figures = (
            MISSING
            if result is None
            else ", ".join(f"{label(name)} {peak:,.0f} MB" for name, peak in result["mb"].items())
        )
    return [f"Resident memory that a step adds at its peak: {figures}.", ""]

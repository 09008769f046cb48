"""Result files as Markdown: every figure is one of a file, or a ratio of two of the same file.

A figure that no file has is a dash.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.layers import FLOAT, OURS, layer_of
from benchmarks.measure import trouble
from benchmarks.output import read_result
from tritonbnn import cli
from tritonbnn.compare import page

MISSING = "not measured yet"
DASH = "-"
STEP_FILES = {step: f"train_step_{step}.json" for step in (1, 2)}
DIGITS_FILES = {step: f"train_step_digits_{step}.json" for step in (1, 2)}
ONE_THREAD_FILES = {step: f"train_step_digits_{step}_1_thread.json" for step in (1, 2)}
MAX_AUTOTUNE_FILES = {step: f"train_step_{step}_max_autotune.json" for step in (1, 2)}
BATCH_SWEEP, SIZE_SWEEP, PEAK = (
    "batch_sweep.json",
    "size_sweep.json",
    "peak_memory_reactnet_a_224_batch8.json",
)
LAYERS = "binary_conv2d.json"
TRAINING_RUNS = ("compare_digits.json", "compare_fashion.json")

LAYER_WAYS = {
    "eval": "eval forward",
    "weight": "forward and backward, weight's gradient alone",
    "stream": "forward and backward, input's gradient too",
}
"""Ways to run a layer, and what stands above their column."""

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
        if not heads:
            return self.folder.name
        head = max(heads, key=lambda result: "cpu" in result)
        if not self.is_cpu:
            return head["device"]
        cores = re.search(r"-(\d+)-cores$", self.folder.name)
        said = [head["device"], head.get("cpu", ""), ", ".join(head.get("instructions", []))]
        return ", ".join(filter(None, [*said, f"{cores[1]} cores" if cores else "", "no GPU"]))

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
                    for rival, row in result["points"][0]["rows"].items():
                        found.setdefault(rival, row)
        return found


def label(rival: str) -> str:
    """A rival's word for readers."""
    network, *options = rival.split("+")
    said = {
        "graph": "CUDA graph",
        "compile": "torch.compile",
        "max-autotune": "torch.compile max-autotune",
    }
    return ", ".join([network.replace("-", " "), *(said.get(o, o) for o in options)])


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table, with a line that says so where there are no rows."""
    if not rows:
        rows = [[MISSING, *[""] * (len(head) - 1)]]
    rule = ["---"] * len(head)
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)] + [""]


def steps_table(device: Device, name: str) -> list[str]:
    """Rivals that took turns in one file; nothing where it was not measured."""
    result = device.get(name)
    if result is None:
        return []
    with device.reading(name):
        point = result["points"][0]
        what = f"step {result['step']}, batch {point['batch']}, {point['size']} x {point['size']}"
        if device.is_cpu:
            what += f", threads: {result['threads']}"
        fastest = best(point["rows"], "expert", "median_seconds")
        head = [what, "ms", "thread-ms", "img/s", "time ÷ fastest expert's", "MB kept / img"]
        if not device.is_cpu:
            head += ["GB at peak", "of the floor"]
        rows = []
        for rival, row in point["rows"].items():
            cells = [
                milliseconds(row),
                number(row, "cpu_seconds", 1e3),
                number(row, "images_per_second"),
                ratio(row.get("median_seconds"), fastest),
                number(row, "saved_mb_per_image"),
            ]
            if not device.is_cpu:
                cells += [number(row, "peak_mb", 1e-3), number(row, "share_of_floor", 100, " %")]
            rows.append([label(rival), *cells])
        return [*table(head, rows), *source(result)]


def best(rows: dict[str, Result], network: str, key: str) -> float | None:
    """The least of a figure over the rows of a network, whatever its options."""
    found = [row[key] for rival, row in rows.items() if is_of(rival, network) and key in row]
    return min(found, default=None)


def is_of(rival: str, network: str) -> bool:
    """Whether a rival's word names a network."""
    return rival.partition("+")[0] == network


def ratio(part: float | None, whole: float | None) -> str:
    """Of two figures of one file, or a dash."""
    return f"{part / whole:.2f} x" if part and whole else DASH


def milliseconds(row: Result) -> str:
    """A step's time and half the spread of its rounds, or why there is none."""
    if "median_seconds" in row:
        return f"{1e3 * row['median_seconds']:,.4g} ± {row['spread'] / 2:.0%}"
    return trouble(row) if row else DASH


def source(result: Result) -> list[str]:
    """Where a table is from."""
    rounds = f", {result['rounds']} rounds" if "rounds" in result else ""
    said = f"`{result['command']}`, " if "command" in result else ""
    return [f"From {said}commit {result.get('commit', 'unknown')}{rounds}.", ""]


def speed(row: Result) -> str:
    """Images a second and half the spread of its rounds, or why there is none."""
    if "images_per_second" in row:
        return f"{row['images_per_second']:,.4g} ± {row['spread'] / 2:.0%}"
    return trouble(row) if row else MISSING


def number(row: Result, key: str, scale: float = 1, unit: str = "") -> str:
    """One figure, or a dash."""
    return f"{row[key] * scale:,.4g}{unit}" if key in row else DASH


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
    lines = table([f"img/s by {key}", *map(label, rivals)], rows)
    return [*lines, *(source(result) if result else [])]


def runs_tables(device: Device) -> list[str]:
    """Training runs to their end, side by side: tables and verdicts, made from the seeds' numbers.

    What a file has beside these numbers, such as words of the code that wrote it, is not read.
    """
    names = [name for name, r in device.files.items() if r and {"values", "claims"} <= r.keys()]
    lines = ["### Recipes side by side", "", page.CELLS, ""] if names else []
    for name in names:
        with device.reading(name):
            document = device.files[name] or {}
            result = page.Result.of(document)
            what = f"{', '.join(dict.fromkeys(row['recipe'] for row in result.rows.values()))}"
            lines += [*page.table(result, f"{what}, threads: {document['threads']}"), ""]
            lines += [f"{page.spread(result)} {page.caution(result)}".rstrip(), ""]
            lines += [*page.orders(result), ""] if len(result.rows) > 1 else []
            lines += source(document)
    missing = [name for name in TRAINING_RUNS if name not in device.files and not device.is_cpu]
    for name in missing:
        lines += [f"{name.removesuffix('.json').replace('_', ' ')}: {MISSING}.", ""]
    return lines


def overhead_line(device: Device) -> list[str]:
    """What the analysis adds to a training step; nothing where it was not measured."""
    name = "analysis_overhead_digits.json"
    with device.reading(name):
        result = device.get(name)
        share = f"{result['share_of_step']:.1%}" if result else ""
    said = f"`--analysis light` adds {share} to a training step of digits, in the mean of an epoch."
    return [said, "", *source(result)] if result else []


def layers_table(device: Device) -> list[str]:
    """BinaryConv2d alone against nn.Conv2d; nothing where it was not measured."""
    result = device.get(LAYERS)
    if result is None:
        return []
    with device.reading(LAYERS):
        what = f"layer, batch {result['batch']}, {result['dtype']}, threads: {result['threads']}"
        rows = [
            [str(layer_of(row)), *(_against_float(row["ways"][way]) for way in LAYER_WAYS)]
            for row in result["layers"]
        ]
        lines = [
            f"`{OURS}` alone against `{FLOAT}` of the same channels, both in channels_last memory:"
            f" ms ÷ ms, and how many times as fast `{OURS}` is:",
            "",
            *table([what, *LAYER_WAYS.values()], rows),
        ]
        return ["### A layer alone", "", *lines, *source(result)]


def _against_float(rows: Result) -> str:
    """Both medians in ms, and their ratio."""
    theirs, own = (1e3 * rows[name]["median_seconds"] for name in (FLOAT, OURS))
    return f"{theirs:,.3g} ÷ {own:,.3g} = {theirs / own:.2f} x"


def peaks(device: Device) -> dict[str, float]:
    """MB that a CPU's step adds to resident memory at its peak, by rival, with the usual malloc."""
    with device.reading(PEAK):
        result = device.get(PEAK)
        return result["with_malloc"]["default"]["mb"] if result else {}


def peak_table(device: Device) -> list[str]:
    """Resident memory of a CPU's step; nothing where it was not measured."""
    result = device.get(PEAK)
    if result is None:
        return []
    with device.reading(PEAK):
        found = result["with_malloc"]["default"]["mb_by_process"]
        where = "step {step}, batch {batch}, {size} x {size}" if "size" in result else "step 2"
        head = [where.format(**result) + f", threads: {result['threads']}", "MB", "least", "most"]
        rows = [
            [label(name), f"{peak:,.0f}", f"{min(found[name]):,.0f}", f"{max(found[name]):,.0f}"]
            for name, peak in peaks(device).items()
        ]
        beyond = result.get("beyond", "imports and parameters")
        what = "Resident memory at the peak of a step, with the default malloc, beyond"
        return [f"{what} {beyond}:", "", *table(head, rows), *source(result)]

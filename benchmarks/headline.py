"""The README's one table: ours, the expert's network and the float twin, each in both steps.

Figures of several files stand side by side. The lines under the table say what each was measured
at, and which commits they are of if they are several.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.tables import (
    DASH,
    DIGITS_FILES,
    MAX_AUTOTUNE_FILES,
    PEAK,
    STEP_FILES,
    Device,
    Result,
    best,
    is_of,
    label,
    milliseconds,
    number,
    peaks,
    table,
)

FIGURES = "python -m benchmarks.suite --device cpu --figures"
EXPECTED = {
    True: ("ours", "expert", "expert+compile", "twin+compile"),
    False: ("ours+bf16", "expert+bf16+channels_last+compile", "twin+bf16+channels_last+compile"),
}
"""Rows that are there even where they were not measured, by whether the device is a CPU."""

LEFT_OUT = ("ours-unfused",)
SECONDS, SAVED, PEAK_MB = "median_seconds", "saved_mb_per_image", "peak_mb"
UNITS = {SECONDS: "ms", SAVED: "MB kept an image", PEAK_MB: "MB at the peak"}


@dataclass(frozen=True)
class Column:
    """One figure of every rival.

    Attributes:
        head: what it is.
        key: of it in a row.
        where: what it was measured at.
        files: rows by rival, one dictionary a file: ratios are taken within one.
    """

    head: str
    key: str
    where: str
    files: list[dict[str, Result]]

    def cell(self, rival: str) -> str:
        """A rival's figure, or a dash."""
        row: Result = next((rows[rival] for rows in self.files if rival in rows), {})
        return milliseconds(row) if self.key == SECONDS else number(row, self.key)

    def ratio(self, network: str) -> float | None:
        """The best of ours as a multiple of the best of a network: the largest over the files."""
        found = []
        for rows in self.files:
            ours, theirs = (best(rows, word, self.key) for word in ("ours", network))
            if ours and theirs:
                found.append(ours / theirs)
        return max(found, default=None)


def headline(device: Device) -> list[str]:
    """The table of a device, and what it says."""
    columns = list(_columns(device))
    measured = [rival for column in columns for rows in column.files for rival in rows]
    rivals = list(dict.fromkeys([*measured, *EXPECTED[device.is_cpu]]))
    rivals = [rival for rival in rivals if not any(is_of(rival, word) for word in LEFT_OUT)]
    rivals.sort(key=_order)
    rows = [[label(rival), *(column.cell(rival) for column in columns)] for rival in rivals]
    for network in ("expert", "twin"):
        ratios = [column.ratio(network) for column in columns]
        cells = [f"{value:.2f} x" if value else DASH for value in ratios]
        rows.append([f"**ours ÷ best {network}**", *cells])
    head = ["", *(f"{column.head}, {UNITS[column.key]}" for column in columns)]
    return [*table(head, rows), *_verdict(columns), *_conditions(columns), *_provenance(device)]


def _order(rival: str) -> int:
    """Ours first, whatever its plan, and the obvious network last."""
    networks = ("ours", "expert", "twin", "obvious")
    return networks.index(rival.partition("+")[0].partition("-")[0])


def _columns(device: Device) -> Iterator[Column]:
    for step in (1, 2):
        names = (STEP_FILES[step], MAX_AUTOTUNE_FILES[step])
        yield _column(device, f"step {step}", SECONDS, names)
    for step in (1, 2):
        yield _column(device, f"digits step {step}", SECONDS, (DIGITS_FILES[step],))
    for step in (1, 2):
        yield _column(device, f"step {step}", SAVED, (STEP_FILES[step],))
    if device.is_cpu:
        rows = {rival: {PEAK_MB: peak} for rival, peak in peaks(device).items()}
        yield Column("step 2", PEAK_MB, "", [rows])
    else:
        yield _column(device, "step 2", PEAK_MB, (STEP_FILES[2],))


def _column(device: Device, head: str, key: str, names: tuple[str, ...]) -> Column:
    """A figure from files of one kind, and what the first of them was measured at."""
    where, result = "", device.get(names[0])
    with device.reading(names[0]):
        if result:
            point = result["points"][0]
            where = f"batch {point['batch']}, {point['size']} x {point['size']}"
            where += f", threads: {result['threads']}" if device.is_cpu else ""
    return Column(head, key, where, [_rows(device, name) for name in names])


def _rows(device: Device, name: str) -> dict[str, Result]:
    with device.reading(name):
        result = device.get(name)
        return result["points"][0]["rows"] if result else {}


def _verdict(columns: list[Column]) -> list[str]:
    """Where ours is slower than the fastest expert, and where it is not."""
    ratios = {c.head: c.ratio("expert") for c in columns if c.key == SECONDS}
    said = {
        "Ours is slower than the fastest expert in": [h for h, r in ratios.items() if r and r > 1],
        "Ours is as fast or faster in": [h for h, r in ratios.items() if r and r <= 1],
        "Not measured against the expert yet:": [h for h, r in ratios.items() if r is None],
    }
    lines = [f"{words} {', '.join(heads)}." for words, heads in said.items() if heads]
    return [" ".join(lines), ""]


def _conditions(columns: list[Column]) -> list[str]:
    """What the columns were measured at."""
    heads: dict[str, list[str]] = {}
    for column in columns:
        if column.key == SECONDS and column.where:
            heads.setdefault(column.where, []).append(column.head)
    said = [f"{', '.join(of)} at {where}" for where, of in heads.items()]
    return [f"Measured: {'. Measured: '.join(said)}.", ""] if said else []


def _provenance(device: Device) -> list[str]:
    """Which commits the figures are of; several are marked."""
    names = [*STEP_FILES.values(), *MAX_AUTOTUNE_FILES.values(), *DIGITS_FILES.values()]
    names += [PEAK] if device.is_cpu else []
    commits: dict[str, list[str]] = {}
    for name in names:
        if result := device.get(name):
            commits.setdefault(result.get("commit", "unknown"), []).append(name)
    if len(commits) < 2:
        return [f"All of commit {commit}." for commit in commits] + [""]
    said = "; ".join(f"{commit}: {', '.join(of)}" for commit, of in commits.items())
    return [f"**Of several commits**: compare rivals within a column, but not columns. {said}.", ""]

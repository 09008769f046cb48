"""The packed engine's results as tables and a picture, from the file of benchmarks.deploy."""

import os
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from benchmarks.deploy_layers import FLOAT, RIVALS
from benchmarks.deploy_networks import PACKED
from benchmarks.tables import DASH, Device, Result, source, table

FILE = "deploy.json"
BEGIN = "<!-- Measured: written by python -m benchmarks.report -->"
END = "<!-- End of what was measured -->"
MEMORY = {
    "file": "the file",
    "weights": "weights, as they are run",
    "scratch": "scratch, kept for the next call",
    "resident, loaded": "resident, once loaded",
    "resident, after an image": "resident, after an image",
}


def measured(found: list[Device], base: Path) -> str:
    """What stands between the page's markers.

    Args:
        found: the devices.
        base: the page's folder, for links to pictures.
    """
    lines = [BEGIN, ""]
    for device in found:
        if result := device.get(FILE):
            with device.reading(FILE):
                tables = [race_table(result), layers_table(result), memory_table(result)]
            path = (device.folder / "deploy.svg").resolve()
            where = Path(os.path.relpath(path, base.resolve())).as_posix()
            drawn = [f"![milliseconds an image, one thread]({where})", ""] if path.exists() else []
            lines += [f"**{device.title}**", "", *drawn, *(line for t in tables for line in t)]
            lines += source(result)
    return "\n".join([*lines, END])


def race_table(result: Result) -> list[str]:
    """ms an image of every rival, and how many times the packed network's that is."""
    points = result["race"]
    head = [f"batch {p['batch']}, threads: {p['threads']}" for p in points]
    names = dict.fromkeys(name for point in points for name in point["seconds"])
    rows = [[name, *(_time(point, name) for point in points)] for name in names]
    return table(["ReActNet-A, 224 x 224, ms an image", *head], rows)


def _time(point: dict[str, Any], name: str) -> str:
    seconds = point["seconds"]
    if name not in seconds:
        return DASH
    middle = median(seconds[name])
    spread = (max(seconds[name]) - min(seconds[name])) / 2 / middle
    said = f"{1e3 * middle / point['batch']:.3g} ± {spread:.0%}"
    times = "" if name == PACKED else f", {middle / median(seconds[PACKED]):.1f} x"
    return said + times


def layers_table(result: Result) -> list[str]:
    """GOPS of each layer, and the packed engine's share of its loop."""
    layers, peak = result["layers"]["gops"], result["layers"]["peak_gops"]
    rivals = [*RIVALS, FLOAT]
    rows = [
        [
            name,
            f"{speeds[PACKED]:,.0f}",
            f"{speeds[PACKED] / peak:.0%}",
            *(f"{speeds[rival]:,.0f}" if rival in speeds else DASH for rival in rivals),
        ]
        for name, speeds in layers.items()
    ]
    head = ["layer, one thread, GOPS", "packed unit", f"of the loop's {peak:,.0f}"]
    return table([*head, *rivals], rows)


def memory_table(result: Result) -> list[str]:
    """MB that the packed network and its twin hold."""
    held = result["memory"]
    rows = [
        [said, *(f"{kinds[key] / 1e6:.1f}" if key in kinds else DASH for kinds in held.values())]
        for key, said in MEMORY.items()
    ]
    return table(["MB", *held], rows)


def picture(device: Device) -> Figure | None:
    """Bars of every rival's time for one image on one thread; None where it was not measured."""
    result = device.get(FILE)
    if result is None:
        return None
    with device.reading(FILE):
        points = [p for p in result["race"] if (p["batch"], p["threads"]) == (1, 1)]
        if not points:
            return None
        times = {name: 1e3 * median(turns) for name, turns in points[0]["seconds"].items()}
    axes = Figure(figsize=(8, 1 + 0.32 * len(times))).subplots()
    colours = ["#0072b2" if name.startswith(PACKED) else "#bbbbbb" for name in times]
    bars = axes.barh(list(times), list(times.values()), color=colours)
    axes.bar_label(bars, [f"{ms:.3g}" for ms in times.values()], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("ms for an image of 224 x 224 on one thread")
    return axes.figure  # type: ignore[return-value]

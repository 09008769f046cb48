"""Pictures of a device's results: speed with its floor, memory against batch, time by family,
and the packed engine beside its rivals.

Colours are Okabe and Ito's, which the colour-blind can tell apart. The same files give the same SVG
byte for byte.
"""

from collections.abc import Callable

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import deploy_table
from benchmarks.families import FAMILIES
from benchmarks.tables import BATCH_SWEEP, STEP_FILES, Device, label

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    *("#000000", "#e69f00", "#56b4e9", "#009e73"),
    *("#f0e442", "#0072b2", "#d55e00", "#cc79a7"),
)
FAMILY_COLOURS = dict(zip(FAMILIES, (YELLOW, BLUE, SKY, ORANGE, GREEN, PURPLE), strict=True))
STEP_COLOURS = {2: BLUE, 1: ORANGE}
LINES = ((BLUE, "o", "-"), (RED, "s", "--"), (GREEN, "^", "-."), (PURPLE, "D", ":"))
STYLE = {"svg.hashsalt": "tritonbnn", "font.size": 10, "axes.spines.right": False}
STYLE |= {"axes.spines.top": False, "figure.constrained_layout.use": True}


def draw(device: Device) -> None:
    """Write the pictures that the device's files allow, as SVG and PNG beside them."""
    kinds: dict[str, Callable[[Device], Figure | None]] = {
        "throughput": throughput,
        "memory": memory,
        "families": families,
        "deploy": deploy_table.picture,
    }
    for name, picture in kinds.items():
        with mpl.rc_context(STYLE):  # type: ignore[arg-type]
            figure = picture(device)
            if figure is not None:
                figure.savefig(device.folder / f"{name}.svg", metadata={"Date": None})
                figure.savefig(device.folder / f"{name}.png", dpi=150, metadata={"Software": None})


def throughput(device: Device) -> Figure | None:
    """Images a second of every rival in both steps, and the floor where it was told."""
    by_step = {step: device.rows(step) for step in STEP_COLOURS}
    rivals = list(dict.fromkeys(name for rows in by_step.values() for name in rows))
    if not any("images_per_second" in row for rows in by_step.values() for row in rows.values()):
        return None
    axes = _bars(rivals)
    for offset, (step, rows) in zip((-0.2, 0.2), by_step.items(), strict=True):
        timed = {name: row for name, row in rows.items() if "images_per_second" in row}
        if not timed:
            continue
        places = [rivals.index(name) + offset for name in timed]
        speeds = [row["images_per_second"] for row in timed.values()]
        spreads = [row["images_per_second"] * row["spread"] / 2 for row in timed.values()]
        weights = {1: "real", 2: "1-bit"}[step]
        axes.barh(
            places,
            speeds,
            0.38,
            xerr=spreads,
            color=STEP_COLOURS[step],
            label=f"step {step}: {weights} weights",
        )
        for place, speed, spread in zip(places, speeds, spreads, strict=True):
            axes.annotate(
                f"{speed:,.4g}",
                (speed + spread, place),
                (4, 0),
                textcoords="offset points",
                va="center",
            )
        _floors(axes, device, step)
    axes.set_xlabel("images a second")
    axes.margins(x=0.12)
    axes.figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return axes.figure  # type: ignore[return-value]


def _floors(axes: Axes, device: Device, step: int) -> None:
    """A line for each dtype: as fast as our design can be on this device."""
    result = device.get(STEP_FILES[step])
    floors = result["points"][0].get("floors", {}) if result else {}
    for dtype, style in (("bf16", "--"), ("fp32", ":")):
        plans = [row["images_per_second"] for name, row in floors.items() if dtype in name]
        if plans:
            axes.axvline(
                max(plans),
                linestyle=style,
                zorder=0,
                color=STEP_COLOURS[step],
                label=f"floor of ours, step {step}, {dtype}",
            )


def memory(device: Device) -> Figure | None:
    """Peak memory against batch; where a rival's line ends, it ran out."""
    with device.reading(BATCH_SWEEP):
        result = device.get(BATCH_SWEEP)
        points = result["points"] if result else []
        peaks = {
            rival: [
                (p["batch"], p["rows"][rival]["peak_mb"] / 1e3)
                for p in points
                if "peak_mb" in p["rows"][rival]
            ]
            for rival in (points[0]["rows"] if points else ())
        }
    if not any(peaks.values()):
        return None
    axes = Figure(figsize=(7, 4)).subplots()
    for (rival, line), (colour, marker, style) in zip(peaks.items(), LINES, strict=False):
        axes.plot(*zip(*line, strict=True), style, color=colour, marker=marker, label=label(rival))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_xlabel("images of a step")
    axes.set_ylabel("GB at the peak")
    axes.legend(frameon=False)
    return axes.figure  # type: ignore[return-value]


def families(device: Device) -> Figure | None:
    """Time of a step by kernel family, one bar a rival."""
    rows = {name: row for name, row in device.rows(2).items() if "time_ms" in row}
    if not rows:
        return None
    axes = _bars(list(rows))
    left = [0.0] * len(rows)
    for family, colour in FAMILY_COLOURS.items():
        times = [row["time_ms"].get(family, 0.0) for row in rows.values()]
        axes.barh(range(len(rows)), times, 0.6, left, color=colour, edgecolor="white", label=family)
        left = [a + b for a, b in zip(left, times, strict=True)]
    axes.set_xlabel("ms of a profiled step, step 2")
    axes.figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return axes.figure  # type: ignore[return-value]


def _bars(rivals: list[str]) -> Axes:
    """Axes for horizontal bars, the first rival on top."""
    axes = Figure(figsize=(8, 1.6 + 0.55 * len(rivals))).subplots()
    axes.set_yticks(range(len(rivals)), [label(name).replace(", ", "\n", 1) for name in rivals])
    axes.invert_yaxis()
    return axes

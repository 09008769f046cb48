"""How pictures look: colours, sizes, names, and the step from a figure to a file.

Colours are Okabe and Ito's and matplotlib's cividis, which the colour-blind can tell apart. Figures
are objects: pyplot, with its one state for the whole process, has no part in it.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator

from tritonbnn.report.read import RunRecord, StageRecord

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv"
MAP = "cividis"
DPI = 160
WIDTH, PANEL = 10.5, 3.0  # inches: of a picture, and of a panel beside others in it
_LONGEST = 32  # characters of a run's name
_LETTERS, _HANDLE = 13, 8  # of the legend: characters an inch, and the line's width in characters
Dash = Literal["-", "--", ":"]


@contextmanager
def style() -> Iterator[None]:
    """The look of all pictures, whatever the user's own matplotlibrc says."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rc("font", size=9)
        mpl.rc("axes", titlesize=9, grid=True, axisbelow=True)
        mpl.rc("grid", color="#dddddd")
        mpl.rc("legend", frameon=False)
        mpl.rc("image", interpolation="nearest")
        mpl.rc("figure.constrained_layout", use=True)
        yield


def png(figure: Figure) -> bytes:
    """The picture as a PNG file; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def name_of(text: str) -> str:
    """A run's name or a class's as matplotlib draws it unchanged: no formula, never hidden."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - 1]}…"
    font = get_font(findfont("DejaVu Sans"))  # matplotlib's own, with a sign for the unknown
    text = "".join(c if font.get_char_index(ord(c)) else "�" for c in text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # a leading _ keeps it out of the legend


def colours() -> Colormap:
    """Of a map; grey where nothing was measured."""
    return mpl.colormaps[MAP].with_extremes(bad="#e8e8e8")


def look(index: int, epochs: int) -> dict:
    """Colour of a run; the marker changes where the colours begin again."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index // len(COLOURS) % len(MARKERS)],
        "markersize": 3 if epochs <= 40 else 0,
        "linewidth": 1.4,
    }


def drawn(line: Dash) -> dict[str, Any]:
    """A line style. Hollow markers stand for dashes where an epoch is alone, without a line."""
    return {"linestyle": line, **({"markerfacecolor": "white"} if line == "--" else {})}


def legend(figure: Figure, runs: Sequence[RunRecord], styles: Sequence[tuple[Dash, str]]) -> None:
    """Name the runs' colours, and the line styles, above all panels."""
    handles = [Line2D([], [], **look(i, 1)) for i in range(len(runs))]
    labels = [name_of(run.label) for run in runs]
    short = any(stage.epochs == 1 for run in runs for stage in run.stages.values())
    mark: dict[str, Any] = {"marker": "o"} if short else {}
    handles += [Line2D([], [], color="#555555", **mark, **drawn(line)) for line, _ in styles]
    labels += [name for _, name in styles]
    columns = int(figure.get_figwidth() * _LETTERS / (max(map(len, labels)) + _HANDLE))
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(handles), columns))


def short(layer: str) -> str:
    """A layer's name without what all have."""
    return layer.removesuffix(".weight").removeprefix("blocks.")


def titles(runs: Sequence[RunRecord]) -> dict[str, str]:
    """What to write above the panels of each stage, by its name; stages of all runs, in order."""
    found: dict[str, str] = {}
    place: dict[str, int] = {}  # how late a stage comes in any run
    for run in runs:
        for index, stage in enumerate(run.stages.values()):
            found.setdefault(stage.name, f"{stage.name}: {stage.weights} weights")
            place[stage.name] = max(index, place.get(stage.name, 0))
    return {name: found[name] for name in sorted(found, key=lambda name: place[name])}


def all_stages(run: RunRecord, key: str) -> tuple[list[str], np.ndarray]:
    """Names of the layers, and (layers, epochs of all stages) with NaN where a stage lacks one."""
    stages = list(run.stages.values())
    names = list(dict.fromkeys(name for stage in stages for name in stage.layers))
    blocks = []
    for stage in stages:
        block = np.full((len(names), stage.epochs), np.nan)
        for name, row in zip(stage.layers, stage.by_layer(key), strict=True):
            block[names.index(name)] = row
        blocks.append(block)
    return names, np.concatenate(blocks, axis=1)


def in_a_row(run: RunRecord) -> Iterator[tuple[int, StageRecord]]:
    """The stages of a run, each with the number of epochs before it."""
    before = 0
    for stage in run.stages.values():
        yield before, stage
        before += stage.epochs


def mark_stages(axis: Axes, run: RunRecord, colour: str, *, name: bool = True) -> None:
    """Draw a line between the stages, and name them above the panel."""
    for before, stage in in_a_row(run):
        if before:
            axis.axvline(before + 0.5, color=colour, linewidth=1.5)
        if name:
            axis.annotate(
                stage.name,
                (before + (stage.epochs + 1) / 2, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
            )


def count_epochs(axis: Axes, label: str = "epoch") -> None:
    """Epochs, which are whole, on the x axis: one alone in the middle."""
    axis.set_xlabel(label)
    low, high = axis.get_xlim()
    if high - low < 1:
        axis.set_xlim(round((low + high) / 2) - 0.5, round((low + high) / 2) + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def beside(runs: Sequence[RunRecord]) -> float:
    """Inches of a picture with a panel a run."""
    return max(0.7 * WIDTH, 1.6 + PANEL * len(runs))


def colour_bar(
    figure: Figure,
    image: AxesImage,
    axes: Iterable[Axes],
    label: str,
    *,
    extend: Literal["neither", "min"] = "neither",
) -> None:
    """What the colours of ``image`` mean, beside the panels that share them."""
    bar = figure.colorbar(image, ax=axes, label=label, extend=extend, aspect=30, pad=0.02)
    if isinstance(image.norm, LogNorm):
        bar.set_ticks(LogLocator(subs=(1, 2, 5)))
        bar.minorticks_off()
        bar.formatter = FormatStrFormatter("%g")

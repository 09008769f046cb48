"""Values by epoch as lines, and weights as histograms; None where nothing was measured."""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from tritonbnn.report.read import EDGES, RunRecord, StageRecord
from tritonbnn.report.style import (
    COLOURS,
    MAP,
    WIDTH,
    Dash,
    all_stages,
    beside,
    count_epochs,
    drawn,
    in_a_row,
    legend,
    look,
    mark_stages,
    name_of,
    titles,
)

_RARE, _LEAST_SHARE = ("dead", "revived"), 0.01
_NARROW = 0.01  # the least a histogram reaches to both sides of 0


@dataclass(frozen=True)
class Row:
    """A row of panels: its label, a key or None for each line style, and whether it is log."""

    label: str
    keys: tuple[str | None, ...]
    log: bool = False


def curves(runs: Sequence[RunRecord]) -> Figure:
    """Loss, top-1 and learning rate of each stage; training is dashed, validation solid."""
    rows = [
        Row("loss, nats per image", ("train_loss", "val_loss")),
        Row("top-1, % of images", ("train_top1", "val_top1")),
        Row("learning rate", (None, "lr")),
    ]
    styles: list[tuple[Dash, str]] = [("--", "training"), ("-", "validation")]
    figure = _lines(runs, rows, [line for line, _ in styles])
    legend(figure, runs, styles)
    return figure


def quantities(runs: Sequence[RunRecord]) -> Figure | None:
    """What is measured of the whole network, by epoch."""
    rows = [
        Row("flip-flop ratio,\nflips per weight and update", ("flip_flop",), log=True),
        Row("C2I: share of signs\nas at the stage's start", ("c2i_full",)),
        Row("saturation: share of\nactivations, |x| > 1", ("saturation",)),
        Row("dead weights,\nshare of all", ("dead",)),
        Row("revived weights,\nshare of all", ("revived",)),
    ]
    rows = [row for row in rows if _has(runs, row.keys)]
    if not rows:
        return None
    figure = _lines(runs, rows, ["-"])
    for axis in figure.axes:
        if axis.get_yscale() == "linear":
            axis.set_ylim(bottom=max(0, axis.get_ylim()[0]))  # no share is below 0
    columns = len(figure.axes) // len(rows)
    for row, axis in zip(rows, figure.axes[::columns], strict=True):
        if row.keys[0] in _RARE:  # else one weight in a million would fill the axis
            axis.set_ylim(0, max(_LEAST_SHARE, axis.get_ylim()[1]))
    sampled = any(stage.samples_flips for run in runs for stage in run.stages.values())
    legend(figure, runs, [(":", "flip-flop ratio of sampled updates")] if sampled else [])
    return figure


def _has(runs: Sequence[RunRecord], keys: Sequence[str | None]) -> bool:
    stages = [stage for run in runs for stage in run.stages.values()]
    return any(np.isfinite(stage.series(key)).any() for stage in stages for key in keys if key)


def _lines(runs: Sequence[RunRecord], rows: Sequence[Row], styles: Sequence[Dash]) -> Figure:
    """A row a quantity, a column a stage, a colour a run; the axes of a row are the same."""
    stages = titles(runs)
    figure = Figure(figsize=(WIDTH if len(stages) > 1 else 0.6 * WIDTH, 0.6 + 1.9 * len(rows)))
    grid = figure.subplots(len(rows), len(stages), squeeze=False, sharex="col", sharey="row")
    for axes, (name, title) in zip(grid.T, stages.items(), strict=True):
        axes[0].set_title(title)
        for axis, row in zip(axes, rows, strict=True):
            for index, run in enumerate(runs):
                if name in run.stages:
                    for key, line in zip(row.keys, styles, strict=True):
                        if key:
                            stage = run.stages[name]
                            sampled = key == "flip_flop" and stage.samples_flips
                            _line(axis, stage.series(key), index, ":" if sampled else line)
        count_epochs(axes[-1])
    for axes, row in zip(grid, rows, strict=True):
        axes[0].set_ylabel(row.label)
        # a run of one epoch, which is at learning rate 0, has nothing that a logarithm could show
        if row.log and any((line.get_ydata() > 0).any() for axis in axes for line in axis.lines):
            axes[0].set_yscale("log", nonpositive="mask")
    figure.align_ylabels(grid[:, 0])
    return figure


def _line(axis: Axes, values: np.ndarray, index: int, line: Dash) -> None:
    style = look(index, len(values)) | drawn(line)
    if len(values) == 1:  # training lies behind validation, often at the same place
        style["markersize"] = 9 if line == "--" else 5
    axis.plot(np.arange(1, len(values) + 1), values, **style)


def trajectories(runs: Sequence[RunRecord]) -> Figure | None:
    """Mean gradient, Adam step and weight of each layer by epoch, coloured by depth."""
    rows = [
        ("mean |gradient|,\nnats per unit of weight", "gradient"),
        ("mean |Adam step|,\nper optimiser step", "adam_step"),
        ("mean |latent weight|", "weight"),
    ]
    rows = [row for row in rows if any((all_stages(run, row[1])[1] > 0).any() for run in runs)]
    if not rows:
        return None
    figure = Figure(figsize=(beside(runs), 1 + 2 * len(rows)))
    grid = figure.subplots(len(rows), len(runs), squeeze=False, sharex=True, sharey="row")
    for (row, column), axis in np.ndenumerate(grid):
        _layer_lines(axis, runs[column], rows[row][1])
        mark_stages(axis, runs[column], "#555555", name=row == 0)
    for axis, run in zip(grid[0], runs, strict=True):
        axis.set_title(name_of(run.label), pad=16)
    for axis in grid[-1]:
        count_epochs(axis, "epoch of the run")
    for axis, (label, _) in zip(grid[:, 0], rows, strict=True):
        axis.set_ylabel(label)
    figure.align_ylabels(grid[:, 0])
    scale = ScalarMappable(Normalize(0, 100), MAP)
    figure.colorbar(scale, ax=grid, label="depth of the layer, %", aspect=30, pad=0.02)
    return figure


def _layer_lines(axis: Axes, run: RunRecord, key: str) -> None:
    axis.set_yscale("log")
    for before, stage in in_a_row(run):
        values = stage.by_layer(key)
        epochs = before + np.arange(1, stage.epochs + 1)
        for depth, line in enumerate(values):
            shade = mpl.colormaps[MAP](depth / max(len(values) - 1, 1))
            drawn = np.where(line > 0, line, np.nan)
            axis.plot(epochs, drawn, ".-", color=shade, linewidth=1, markersize=3)


def histograms(runs: Sequence[RunRecord]) -> Figure | None:
    """Latent weights at a stage's start, dashed where that is known, and at its end, solid."""
    found = {(i, n): _densities(s) for i, r in enumerate(runs) for n, s in r.stages.items()}
    found = {key: panels for key, panels in found.items() if panels}
    if not found:
        return None
    stages = [name for name in titles(runs) if any(name == seen for _, seen in found)]
    figure = Figure(figsize=(WIDTH, 0.8 + 2.1 * len(stages)))
    grid = figure.subplots(len(stages), 4, squeeze=False, subplot_kw={"xlim": (-_NARROW, _NARROW)})
    for (index, name), panels in found.items():
        row = grid[stages.index(name)]
        for axis, (title, edges, start, end) in zip(row, panels, strict=True):
            axis.set_title(f"{name}: {title}")
            for density, line in ((start, "--"), (end, "-")):
                if not density.any():  # histograms were not turned on yet
                    continue
                colour = COLOURS[index % len(COLOURS)]
                axis.stairs(density, edges, color=colour, linestyle=line, linewidth=1.2)
                reach = max(axis.get_xlim()[1], _reach(edges, density))
                axis.set_xlim(-reach, reach)
    for axis in grid[-1]:
        axis.set_xlabel("latent weight")
    for axis in grid[:, 0]:
        axis.set_ylabel("density")
    legend(figure, runs, [("--", "at the stage's start"), ("-", "at its end")])
    return figure


_Density = tuple[str, np.ndarray, np.ndarray, np.ndarray]


def _densities(stage: StageRecord) -> list[_Density]:
    """Of all layers together and of three: title, bin edges, density at start and end.

    A density of zeros was not measured.
    """
    layers, edges = stage.of_layers("histogram"), stage.tensors.get(EDGES)
    if edges is None or not layers:
        return []
    names = list(layers)
    chosen = {"first layer": 0, "middle layer": len(names) // 2, "last layer": -1}
    panels = [("all layers", np.sum(list(layers.values()), axis=0))]
    panels += [(title, layers[names[index]]) for title, index in chosen.items()]
    return [(t, edges, _density(c[0], edges), _density(c[-1], edges)) for t, c in panels]


def _reach(edges: np.ndarray, density: np.ndarray) -> float:
    """How far from 0 there is anything to see."""
    inside = np.flatnonzero(density > 2e-3 * density.max())
    return float(np.abs(edges[[inside[0], inside[-1] + 1]]).max()) if len(inside) else 0.0


def _density(counts: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return counts / max(counts.sum(), 1) / np.diff(edges)

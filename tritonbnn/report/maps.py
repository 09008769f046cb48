"""Values as colours: by layer and epoch, by channel, and measured of the network itself."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from tritonbnn.analysis.landscape import Landscape
from tritonbnn.report.confusion import Confused
from tritonbnn.report.read import RunRecord
from tritonbnn.report.style import (
    PANEL,
    all_stages,
    beside,
    colour_bar,
    colours,
    count_epochs,
    mark_stages,
    name_of,
    short,
    titles,
)

Landscapes = dict[str, Landscape]  # by stage


def layer_map(
    runs: Sequence[RunRecord], key: str, label: str, *, bounds: tuple[float, float] | None = None
) -> Figure | None:
    """One value of each layer by epoch, all stages in a row; the colours of all runs are the same.

    Args:
        runs: beside each other.
        key: of the record.
        label: of the colour bar.
        bounds: of the colours, widened where values lie outside; None for a logarithmic scale.
    """
    maps = [all_stages(run, key) for run in runs]
    seen = np.concatenate([values[np.isfinite(values)] for _, values in maps])
    if not len(seen):
        return None
    low, high = _log_bounds(seen) if bounds is None else _widened(seen, bounds)
    norm = LogNorm(low, high) if bounds is None else Normalize(low, high)
    figure, panels = _panels(runs, [names for names, _ in maps])
    for axis, run, (names, values) in zip(panels, runs, maps, strict=True):
        if key == "flip_flop" and any(x.samples_flips for x in run.stages.values()):
            axis.set_title(f"{name_of(run.label)}\n(of sampled updates)", pad=16)
        if not names:
            _say_missing(axis)
            continue
        shown = np.where(values < low, low, values)
        image = axis.imshow(shown, norm=norm, cmap=colours(), aspect="auto", extent=_extent(values))
        mark_stages(axis, run, "white")
    widest = max(values.shape[1] for _, values in maps)
    for axis in panels:
        axis.set_xlim(0.5, widest + 0.5)
        count_epochs(axis, "epoch of the run")
    colour_bar(figure, image, panels, label, extend="min" if seen.min() < low else "neither")
    return figure


def channel_map(runs: Sequence[RunRecord]) -> Figure | None:
    """How saturated each channel is at the end, a layer's channels sorted."""
    found = [_last_channels(run) for run in runs]
    if not any(found):
        return None
    points = 200
    figure, panels = _panels(runs, [list(layers) for layers in found])
    for axis, layers in zip(panels, found, strict=True):
        if not layers:
            _say_missing(axis)
            continue
        rows = [np.sort(last)[np.arange(points) * len(last) // points] for last in layers.values()]
        values = np.array(rows).reshape(len(rows), points)
        extent = (0, 100, len(rows) - 0.5, -0.5)
        image = axis.imshow(
            values, norm=Normalize(0, 1), cmap=colours(), aspect="auto", extent=extent
        )
        axis.set_xlabel("channels of the layer, sorted, %")
    colour_bar(figure, image, panels, "share of a channel's activations, |x| > 1")
    return figure


def _last_channels(run: RunRecord) -> dict[str, np.ndarray]:
    """Saturation by channel in the last epoch of the furthest stage that has it."""
    for stage in reversed(run.stages.values()):
        layers = stage.of_layers("saturation")
        if layers:
            return {name: rows[-1] for name, rows in layers.items()}
    return {}


def _panels(runs: Sequence[RunRecord], layers: list[list[str]]) -> tuple[Figure, list[Axes]]:
    """A panel a run, its rows named after its layers; once, where all have the same."""
    rows = max(map(len, layers))
    figure = Figure(figsize=(beside(runs), max(2.2, 1.2 + 0.16 * rows)))
    panels = list(figure.subplots(1, len(runs), squeeze=False)[0])
    for index, (axis, run, names) in enumerate(zip(panels, runs, layers, strict=True)):
        axis.set_title(name_of(run.label), pad=16)
        axis.grid(visible=False)
        repeats = index and names == layers[index - 1]
        labels = [] if repeats else [short(name) for name in names]
        axis.set_yticks([] if repeats else range(len(names)), labels, fontsize=7)
    panels[0].set_ylabel("binary layer, input at the top")
    return figure, panels


def _say_missing(axis: Axes) -> None:
    axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)


def _extent(values: np.ndarray) -> tuple[float, float, float, float]:
    """Epochs from 1 on the x axis; the first layer at the top."""
    layers, epochs = values.shape
    return (0.5, epochs + 0.5, layers - 0.5, -0.5)


def _log_bounds(seen: np.ndarray) -> tuple[float, float]:
    """Of logarithmic colours for the positive values, four decades at most."""
    positive = seen[seen > 0]
    if not len(positive):
        return 1e-6, 1.0
    high = float(positive.max())
    return max(float(positive.min()), high * 1e-4) * 0.999, high


def _widened(seen: np.ndarray, bounds: tuple[float, float]) -> tuple[float, float]:
    return min(bounds[0], float(seen.min())), max(bounds[1], float(seen.max()))


def landscapes(runs: Sequence[RunRecord], measured: Sequence[Landscapes]) -> Figure | None:
    """The loss around each stage's best weights, a row a run, all in the same colours."""
    grids = [found.loss for stages in measured for found in stages.values()]
    seen = np.concatenate([grid[np.isfinite(grid)] for grid in grids] or [np.empty(0)])
    if not len(seen):
        return None
    stages = {k: v for k, v in titles(runs).items() if any(k in found for found in measured)}
    names = list(stages)
    low, high = _log_bounds(seen)
    figure = Figure(figsize=(1.4 + PANEL * len(names), 0.4 + PANEL * len(runs)))
    grid = figure.subplots(len(runs), len(names), squeeze=False)
    for (row, column), axis in np.ndenumerate(grid):
        name = names[column]
        axis.set_title(f"{name_of(runs[row].label)}: {stages[name]}")
        axis.set_aspect("equal")
        axis.grid(visible=False)
        if found := measured[row].get(name):
            image = _landscape(axis, found, low, high)
        else:
            _say_missing(axis)
    for axis in grid[-1]:
        axis.set_xlabel("first direction, lengths of the filter")
    for axis in grid[:, 0]:
        axis.set_ylabel("second direction, lengths of the filter")
    colour_bar(figure, image, grid, "loss, nats per image")
    return figure


def _landscape(axis: Axes, found: Landscape, low: float, high: float) -> AxesImage:
    loss = np.ma.masked_invalid(found.loss)
    image = axis.imshow(
        np.ma.maximum(loss, low),
        norm=LogNorm(low, high),
        cmap=colours(),
        origin="lower",
        extent=_cells(found.axis),
    )
    levels = np.geomspace(low, high, 17)
    axis.contour(found.axis, found.axis, loss, levels, colors="w", linewidths=0.6, alpha=0.7)
    axis.plot(0, 0, "+", color="white", markersize=9)
    return image


def _cells(axis: np.ndarray) -> tuple[float, float, float, float]:
    """The outer edges of cells that have the grid's points in their middle."""
    half = (axis[1] - axis[0]) / 2
    low, high = float(axis[0] - half), float(axis[-1] + half)
    return low, high, low, high


def confusions(runs: Sequence[RunRecord], matrices: Sequence[Confused | None]) -> Figure | None:
    """Guesses by class, in percent of the class's images."""
    shown = [(r, m) for r, m in zip(runs, matrices, strict=True) if m and m.is_small]
    if not shown:
        return None
    side = max(PANEL, 0.7 + 0.23 * max(len(matrix.classes) for _, matrix in shown))
    figure = Figure(figsize=((side + 0.2) * len(shown) + 0.9, side + 0.2))
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, (run, matrix) in zip(panels, shown, strict=True):
        axis.set_title(f"{name_of(run.label)}, {matrix.stage}")
        axis.grid(visible=False)
        counts = matrix.counts.matrix().numpy()
        percent = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        image = axis.imshow(percent, norm=Normalize(0, 100), cmap=colours())
        names = [name_of(name) for name in matrix.classes]
        axis.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 2 else 0)
        axis.set_yticks(range(len(names)), names)
        axis.set_xlabel("guess")
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "black" if percent[row, column] > 50 else "white"
                axis.text(column, row, f"{count}", ha="center", va="center", c=colour, fontsize=7)
    panels[0].set_ylabel("class")
    colour_bar(figure, image, panels, "% of the class's images")
    return figure

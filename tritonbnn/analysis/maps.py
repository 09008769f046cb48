"""Values as colours: by layer and epoch, by channel, and measured of the network itself."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from tritonbnn.analysis.confusion import Confused
from tritonbnn.analysis.landscape import Landscape
from tritonbnn.analysis.read import RunRecord
from tritonbnn.analysis.style import (
    PANEL,
    WEIGHTS,
    beside,
    both_steps,
    colours,
    count_epochs,
    mark_steps,
    name_of,
    short,
)

Landscapes = dict[int, Landscape]  # by step


def layer_map(
    runs: Sequence[RunRecord], key: str, label: str, *, bounds: tuple[float, float] | None = None
) -> Figure | None:
    """One value of each layer by epoch, both steps in a row; the colours of all runs are the same.

    Args:
        runs: beside each other.
        key: of the record.
        label: of the colour bar.
        bounds: of the colours, widened where values lie outside; None for a logarithmic scale.
    """
    maps = [both_steps(run, key) for run in runs]
    seen = np.concatenate([values[np.isfinite(values)] for _, values in maps])
    if not len(seen):
        return None
    low, high = _log_bounds(seen) if bounds is None else _widened(seen, bounds)
    norm = LogNorm(low, high) if bounds is None else Normalize(low, high)
    figure, panels = _panels(runs, [names for names, _ in maps])
    for axis, run, (_, values) in zip(panels, runs, maps, strict=True):
        shown = np.where(values < low, low, values)
        image = axis.imshow(shown, norm=norm, cmap=colours(), aspect="auto", extent=_extent(values))
        mark_steps(axis, run)
    widest = max(values.shape[1] for _, values in maps)
    for axis in panels:
        axis.set_xlim(0.5, widest + 0.5)
        count_epochs(axis)
    below = seen.min() < low
    figure.colorbar(
        image, ax=panels, label=label, extend="min" if below else "neither", aspect=30, pad=0.02
    )
    return figure


def channel_map(runs: Sequence[RunRecord]) -> Figure | None:
    """How saturated each channel is at the end, a layer's channels sorted."""
    found = [_last_channels(run) for run in runs]
    if not any(found):
        return None
    points = 200
    figure, panels = _panels(runs, [list(layers) for layers in found])
    for axis, layers in zip(panels, found, strict=True):
        rows = [np.sort(last)[np.arange(points) * len(last) // points] for last in layers.values()]
        values = np.array(rows).reshape(len(rows), points)
        extent = (0, 100, len(rows) - 0.5, -0.5)
        image = axis.imshow(
            values, norm=Normalize(0, 1), cmap=colours(), aspect="auto", extent=extent
        )
        axis.set_xlabel("channels of the layer, sorted, %")
    figure.colorbar(
        image, ax=panels, label="share of a channel's activations, |x| > 1", aspect=30, pad=0.02
    )
    return figure


def _last_channels(run: RunRecord) -> dict[str, np.ndarray]:
    """Saturation by channel in the last epoch of the furthest step that has it."""
    for number in sorted(run.steps, reverse=True):
        layers = run.steps[number].of_layers("saturation")
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


def _extent(values: np.ndarray) -> tuple[float, float, float, float]:
    """Epochs from 1 on the x axis; the first layer at the top."""
    layers, epochs = values.shape
    return (0.5, epochs + 0.5, max(layers, 1) - 0.5, -0.5)


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
    """The loss around each step's best weights, all in the same colours."""
    grids = [found.loss for steps in measured for found in steps.values()]
    if not grids:
        return None
    steps = sorted({number for found in measured for number in found})
    low, high = _log_bounds(np.concatenate([g[np.isfinite(g)] for g in grids]))
    levels = np.geomspace(low, high, 17)
    figure = Figure(figsize=(beside(runs), 0.8 + 3.1 * len(steps)))
    grid = figure.subplots(len(steps), len(runs), squeeze=False)
    for (row, column), axis in np.ndenumerate(grid):
        number = steps[row]
        axis.set_title(f"{name_of(runs[column].label)}\nstep {number}, {WEIGHTS[number]}")
        axis.set_aspect("equal")
        found = measured[column].get(number)
        if found is None:
            axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
            continue
        image = axis.imshow(
            np.maximum(found.loss, low),
            norm=LogNorm(low, high),
            cmap=colours(),
            origin="lower",
            extent=_cells(found.axis),
        )
        lines = axis.contour(found.axis, found.axis, found.loss, levels, colors="w", linewidths=0.6)
        lines.set_alpha(0.7)
        axis.plot(0, 0, "+", color="white", markersize=9)
        axis.set_xlabel("first direction, lengths of the filter")
    for axis in grid[:, 0]:
        axis.set_ylabel("second direction")
    figure.colorbar(image, ax=grid, label="loss, nats per image", aspect=30, pad=0.02)
    return figure


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
    side = max(PANEL, 1 + 0.3 * max(len(matrix.classes) for _, matrix in shown))
    figure = Figure(figsize=(max(beside([]), (side + 0.6) * len(shown) + 1), side + 1))
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, (run, matrix) in zip(panels, shown, strict=True):
        axis.set_title(f"{name_of(run.label)}, step {matrix.step}")
        axis.grid(visible=False)
        counts = matrix.counts.numpy()
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
    figure.colorbar(image, ax=panels, label="% of the class's images", aspect=30, pad=0.02)
    return figure

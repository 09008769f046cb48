"""A comparison as a picture: every seed a dot, beside the mean and deviation of its row."""

from statistics import mean, stdev

from matplotlib.figure import Figure

from tritonbnn.compare.page import Result
from tritonbnn.compare.sets import QUANTITIES
from tritonbnn.report.style import COLOURS, PANEL, name_of, png, style

_SHOWN = ("top1", "loss", "flip_flop", "c2i_half")
_ROW, _AROUND = 0.32, 0.9  # inches: of a row, and of what is above and below all


def draw(result: Result) -> bytes | None:
    """The PNG file; None where no run is there to be drawn."""
    known = {key: result.of_quantity(key) for key in _SHOWN}
    if any(known["top1"].values()):
        known.pop("loss")
    panels = [key for key in known if any(known[key].values())]
    if not panels:
        return None
    names = list(result.rows)
    with style():
        figure = Figure(figsize=(2.2 + PANEL * len(panels), _AROUND + _ROW * len(names)))
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, key in zip(axes, panels, strict=True):
            head, scale = QUANTITIES[key]
            for place, name in enumerate(names):
                values = [value * scale for value in known[key][name]]
                if not values:
                    continue
                colour = COLOURS[place % len(COLOURS)]
                axis.plot(values, [place] * len(values), "o", color=colour, alpha=0.5, ms=4)
                deviation = stdev(values) if len(values) > 1 else 0.0
                middle = mean(values)
                axis.errorbar(
                    middle, place, xerr=deviation, color=colour, fmt="|", ms=12, capsize=3
                )
            axis.set_xlabel(head)
        axes[0].set_yticks(range(len(names)), [name_of(name) for name in names])
        axes[0].set_ylim(len(names) - 0.5, -0.5)  # the first on top, as in the table
        return png(figure)

"""Which pictures a report has, and how to read each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from tritonbnn.report import lines, maps
from tritonbnn.report.measure import Measured
from tritonbnn.report.read import RunRecord
from tritonbnn.report.style import png, style

_LAYERS = "Rows are layers, columns epochs."


@dataclass(frozen=True)
class Picture:
    """A drawn picture and the words around it.

    Attributes:
        name: of its file, without the ending.
        title: above it.
        reading: a sentence on how to read it.
        png: the file.
    """

    name: str
    title: str
    reading: str
    png: bytes


Draw = Callable[[Sequence[RunRecord], Sequence[Measured]], Figure | None]


def _by_layer(key: str, label: str, bounds: tuple[float, float] | None) -> Draw:
    return lambda runs, _: maps.layer_map(runs, key, label, bounds=bounds)


CATALOGUE: list[tuple[str, str, str, Draw]] = [
    (
        "curves",
        "Learning curves",
        "Validation (solid) should follow training (dashed) to the end of each stage; the learning"
        " rate falls to zero in the last epoch, where no weight moves.",
        lambda runs, _: lines.curves(runs),
    ),
    (
        "quantities",
        "The whole network",
        "The flip-flop ratio should fall with the learning rate: signs that still flip at the end"
        " were never decided. C2I of 0.5 means signs that have forgotten the start, 1 the same.",
        lambda runs, _: lines.quantities(runs),
    ),
    (
        "flip_flop",
        "Flip-flop ratio by layer",
        f"{_LAYERS} A row that stays bright has weights too small for its steps, or too large a"
        " learning rate; one that is dark from the start does not learn its signs.",
        _by_layer("flip_flop", "flips per weight and update", None),
    ),
    (
        "c2i",
        "Correlation to the start (C2I) by layer",
        f"{_LAYERS} The share of signs that are as they were when the stage began: bright rows keep"
        " what they started from, dark ones (0.5) are independent of it.",
        _by_layer("c2i_full", "share of unchanged signs", (0.5, 1)),
    ),
    (
        "saturation",
        "Saturation by layer",
        f"{_LAYERS} The share of values before the sign with |x| > 1, which pass no gradient back:"
        " a row near 1 cuts off what is before it.",
        _by_layer("saturation", "share of activations, |x| > 1", (0, 1)),
    ),
    (
        "channels",
        "Saturation by channel",
        "Each row is a layer at the end of training, its channels sorted from the least to the most"
        " saturated: the bright part on the right is the share of channels that gradients skip.",
        lambda runs, _: maps.channel_map(runs),
    ),
    (
        "dead",
        "Dead weights by layer",
        f"{_LAYERS} The share of weights whose gradient was below 1e-12 at every look of the epoch"
        " and whose sign never flipped; in a healthy run the map is dark.",
        _by_layer("dead", "share of the layer's weights", (0, 0.01)),
    ),
    (
        "revived",
        "Revived weights by layer",
        f"{_LAYERS} The share of weights that were dead in the epoch before and are no more. Where"
        " many are dead and none comes back, nothing wakes them.",
        _by_layer("revived", "share of the layer's weights", (0, 0.01)),
    ),
    (
        "trajectories",
        "Gradient, step and weight by layer",
        "Each line is a layer, dark at the input and bright at the head. Gradients may differ by"
        " decades between layers; Adam's steps should not. A falling |weight| makes signs flip"
        " more easily.",
        lambda runs, _: lines.trajectories(runs),
    ),
    (
        "histograms",
        "Latent weights before and after",
        "Weights far from zero have decided on a sign; one narrow peak at zero means signs that a"
        " small step flips.",
        lambda runs, _: lines.histograms(runs),
    ),
    (
        "landscape",
        "Loss landscape",
        "The loss around the best weights (+), along two random directions; 1 on an axis moves each"
        " filter by its own length. BatchNorm takes the statistics of the batch, a fixed one of"
        " training images. A wide dark basin is forgiving; every sign that flips makes a jump: of"
        " activations in every stage, of weights where these are 1-bit too.",
        lambda runs, measured: maps.landscapes(runs, [m.landscapes for m in measured]),
    ),
    (
        "confusion",
        "Confusion matrix",
        "Each row is a class and sums to 100 %: bright cells off the diagonal are what the network"
        " takes for something else. The numbers count validation images.",
        lambda runs, measured: maps.confusions(runs, [m.confused for m in measured]),
    ),
]


def draw(runs: Sequence[RunRecord], measured: Sequence[Measured]) -> list[Picture]:
    """The pictures that there is something to draw for, in the order of the page."""
    pictures = []
    for name, title, reading, make in CATALOGUE:
        with style():
            figure = make(runs, measured)
            if figure is not None:
                pictures.append(Picture(name, title, reading, png(figure)))
    return pictures

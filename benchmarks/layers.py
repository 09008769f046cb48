"""BinaryConv2d alone against nn.Conv2d, on a CPU: forward, and forward with backward.

    python -m benchmarks.layers --threads 2
    python -m benchmarks.layers --layers 3x3:64@28,1x1:256@14 --batch 1

A layer has as many outputs as inputs, float32, and channels_last memory on both sides. Each of the
two has a process of its own, with the same number of threads, and they take turns. Three ways to
run a layer are timed:

- eval: forward, without gradients
- weight: forward and backward where the input has no gradient, as in a first layer
- stream: forward and backward where the input is another layer's output, and has a gradient
"""

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import rounds
from benchmarks.measure import trouble
from benchmarks.output import command
from benchmarks.rounds import Turn
from benchmarks.runner import RivalError
from benchmarks.worker import Process
from tritonbnn import cli
from tritonbnn.files import writable, write_json
from tritonbnn.kernels.commands import positive
from tritonbnn.kernels.provenance import header
from tritonbnn.nn import BinaryConv2d

LAYERS = "3x3:128@56,3x3:256@28,3x3:512@14,3x3:1024@7,1x1:512@14"
WAYS = ("eval", "weight", "stream")
OURS, FLOAT = "BinaryConv2d", "nn.Conv2d"
ROUNDS, MILLISECONDS = 5, 200


@dataclass(frozen=True)
class Layer:
    """A convolution and how it is run.

    Attributes:
        kernel_size: 1 or 3.
        channels: of the input and of the output.
        size: height and width of the input.
    """

    kernel_size: int
    channels: int
    size: int

    def __str__(self) -> str:
        return (
            f"{self.kernel_size} x {self.kernel_size}, {self.channels} channels"
            f" at {self.size} x {self.size}"
        )

    def build(self, name: str) -> nn.Module:
        """One of the two, the same weights every time."""
        torch.manual_seed(0)
        shape, padding = (self.channels, self.channels, self.kernel_size), self.kernel_size // 2
        layer = (
            BinaryConv2d(*shape, padding=padding)
            if name == OURS
            else nn.Conv2d(*shape, padding=padding, bias=False)
        )
        return layer.to(memory_format=torch.channels_last)

    def numbers(self, batch: int, seed: int) -> Tensor:
        """Of its input or output: random, in channels_last memory."""
        shape = (batch, self.channels, self.size, self.size)
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return numbers.contiguous(memory_format=torch.channels_last)


class LayerRunner:
    """One of the two layers in this process.

    Args:
        layer: what is run.
        name: OURS or FLOAT.
        batch: images.
    """

    def __init__(self, layer: Layer, name: str, batch: int) -> None:
        module, x = layer.build(name), layer.numbers(batch, seed=1)
        grad, leaf = layer.numbers(batch, seed=2), x.clone().requires_grad_()

        def forward() -> None:
            with torch.no_grad():
                module(x)

        def weight() -> None:
            module.zero_grad()
            module(x).backward(grad)

        def stream() -> None:
            module.zero_grad()
            leaf.grad = None
            module(leaf.view_as(leaf)).backward(grad)

        self._calls: dict[str, Callable[[], None]] = {
            "eval": forward,
            "weight": weight,
            "stream": stream,
        }

    def turn(self, way: str, milliseconds: int) -> Turn:
        """Time calls in a row: as many as take so long together, by the time of the second."""
        call, device = self._calls[way], torch.device("cpu")
        call()
        count = ceil(milliseconds / 1e3 / rounds.seconds(call, 1, device))
        return rounds.turn(call, count, device)


def measure(
    layer: Layer, batch: int, *, turns: int, milliseconds: int
) -> dict[str, dict[str, Any]]:
    """Rows of both layers, by the way they are run and by name.

    Args:
        layer: what is run.
        batch: images.
        turns: of each.
        milliseconds: that a turn's calls take together. Cores sleep between a process's turns, and
            a short turn would time how they wake.
    """
    taken: dict[tuple[str, str], list[Turn]] = {
        (w, name): [] for w in WAYS for name in (OURS, FLOAT)
    }
    with ExitStack() as stack:
        both = {
            name: stack.enter_context(closing(Process(partial(LayerRunner, layer, name, batch))))
            for name in (OURS, FLOAT)
        }
        for _ in range(turns):
            for (way, name), found in taken.items():
                found.append(both[name].ask("turn", way, milliseconds))
    rows: dict[str, dict[str, Any]] = {way: {} for way in WAYS}
    for (way, name), found in taken.items():
        cpu_seconds = round(median(turn.cpu_seconds for turn in found), 6)
        rows[way][name] = rounds.summary([turn.seconds for turn in found])
        rows[way][name]["cpu_seconds"] = cpu_seconds
    return rows


def ratio(rows: dict[str, Any]) -> float:
    """How many times as fast as nn.Conv2d the binary layer is."""
    return rows[FLOAT]["median_seconds"] / rows[OURS]["median_seconds"]


def layer_of(entry: dict[str, Any]) -> Layer:
    """The layer of an entry of a result."""
    return Layer(entry["kernel_size"], entry["channels"], entry["size"])


def describe(layer: Layer, ways: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A line for each way to run a layer."""
    yield f"{layer}"
    for way, rows in ways.items():
        cells = (
            f"{name} {1e3 * row['median_seconds']:9.3f} ms ±{row['spread'] / 2:6.1%}"
            f" {1e3 * row['cpu_seconds']:9.3f} thread-ms"
            for name, row in rows.items()
        )
        yield f"  {way:8} {'   '.join(cells)} {ratio(rows):8.2f} x"


def parsed_layers(text: str) -> list[Layer]:
    """Layers from a flag's value.

    Raises:
        argparse.ArgumentTypeError: a word of it names none.
    """
    return [_parsed_layer(word) for word in text.split(",")]


def _parsed_layer(word: str) -> Layer:
    found = re.fullmatch(r"([13])x\1:([1-9]\d*)@([1-9]\d*)", word)
    if not found:
        raise argparse.ArgumentTypeError(f"{word!r} is no layer: write 3x3:128@56 or 1x1:512@14")
    return Layer(*map(int, found.groups()))


def parser() -> cli.Parser:
    result = cli.Parser(prog="python -m benchmarks.layers", description=__doc__.split("\n")[0])
    result.add_argument(
        "--layers", type=parsed_layers, default=LAYERS, help=f"KxK:CHANNELS@SIZE,...; {LAYERS}"
    )
    result.add_argument("--batch", type=positive, default=8, help="images; default: 8")
    result.add_argument("--rounds", type=positive, default=ROUNDS)
    result.add_argument(
        "--milliseconds", type=positive, default=MILLISECONDS, help="of a turn; default: 200"
    )
    result.add_argument("--threads", type=positive, default=torch.get_num_threads())
    result.add_argument("--json", type=Path, help="write the result here")
    return result


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    path = writable(args.json)
    torch.set_num_threads(args.threads)
    head = header(command("layers", argv), torch.device("cpu"))
    result = {"batch": args.batch, "dtype": "float32", "rounds": args.rounds}
    result |= {"milliseconds_of_a_turn": args.milliseconds, "layers": []}
    for layer in args.layers:
        try:
            ways = measure(layer, args.batch, turns=args.rounds, milliseconds=args.milliseconds)
        except RivalError as error:
            raise cli.UserError(f"{layer}: {trouble(error.facts)}") from error
        result["layers"].append({**asdict(layer), "ways": ways})
        print("\n".join(describe(layer, ways)), flush=True)
        if path:
            write_json(path, head | result)
    return 0


if __name__ == "__main__":
    cli.run(main)

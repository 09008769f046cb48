"""What a training step costs with each optimiser, beside fused Adam in the same rounds.

    python -m benchmarks.optimisers [--model reactnet_a] [--width 0.25] [--batch 64] [--size 32]

Each optimiser trains a network of its own on one batch. Rounds go from one to the next, so that a
change of the machine's speed meets all. A ratio is the median over rounds of time / Adam's time.
Memory is what lies in memory of the binary weights and of the optimiser's state for them.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.output import command
from benchmarks.rounds import seconds
from tritonbnn import cli
from tritonbnn.kernels.commands import positive
from tritonbnn.kernels.provenance import header, own_device
from tritonbnn.models import build_model
from tritonbnn.nn import binary_weights, pack_weights_
from tritonbnn.optim import IVON, AdamWPrediction, Bop, Bop2ndOrder, to_signs_
from tritonbnn.packed import PackedWeight

ADAM = "adam"
IMAGES = 1437  # of the digits, IVON's sample size

Optimizers = list[torch.optim.Optimizer]
Make = Callable[[list[Tensor], list[Tensor]], Optimizers]


def adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """The rival: torch's own, in one pass over memory."""
    return torch.optim.Adam(parameters, lr=1e-3, fused=True)


def sampled(noise: float) -> Make:
    """IVON, with so much noise on binary weights."""

    def make(binary: list[Tensor], rest: list[Tensor]) -> Optimizers:
        groups = [{"params": rest}, {"params": binary, "noise": noise}]
        return [IVON(groups, 0.1, ess=IMAGES)]

    return make


MAKERS: dict[str, Make] = {
    ADAM: lambda binary, rest: [adam(binary + rest)],
    "bop": lambda binary, rest: [Bop(binary), adam(rest)],
    "bop, packed": lambda binary, rest: [Bop(binary), adam(rest)],
    "second-order bop": lambda binary, rest: [Bop2ndOrder(binary), adam(rest)],
    "second-order bop, packed": lambda binary, rest: [Bop2ndOrder(binary), adam(rest)],
    "prediction": lambda binary, rest: [AdamWPrediction(binary + rest, fused=True)],
    "ivon": sampled(0.0),
    "ivon, noise on all": sampled(1.0),
}
"""Two optimisers where one trains the binary weights and Adam the rest."""


class Contender:
    """A network, its optimisers, and a step with both.

    Args:
        name: of :data:`MAKERS`.
        model: a copy of its own.
        images: a batch.
        labels: of it.
    """

    def __init__(self, name: str, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        if "bop" in name:
            to_signs_(binary_weights(model).values())
        if "packed" in name:
            pack_weights_(model)
        self.binary = list(binary_weights(model).values())
        known = set(map(id, self.binary))
        rest = [p for p in model.parameters() if id(p) not in known]
        self.model, self.images, self.labels = model, images, labels
        self.optimizers = MAKERS[name](self.binary, rest)

    def step(self) -> None:
        """Forward, backward, update."""
        self.backward()
        self.update()

    def backward(self) -> None:
        """Up to the gradients."""
        with ExitStack() as stack:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
                if isinstance(optimizer, IVON):
                    stack.enter_context(optimizer.sampled_params(train=True))
                if isinstance(optimizer, AdamWPrediction):
                    stack.enter_context(optimizer.predicted())
            F.cross_entropy(self.model(self.images), self.labels).backward()

    def update(self) -> None:
        """From them to the weights."""
        for optimizer in self.optimizers:
            optimizer.step()

    def bytes_a_weight(self) -> float:
        """Of the binary weights: as they are stored, and what the optimisers keep of them."""
        tensors = [w.packed if isinstance(w, PackedWeight) else w for w in self.binary]
        for optimizer in self.optimizers:
            for weight in self.binary:
                state = optimizer.state.get(weight, {})
                tensors += [v for v in state.values() if isinstance(v, Tensor) and v.dim()]
        stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(stored.values()) / sum(w.numel() for w in self.binary)


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """A row for each optimiser."""
    images = torch.randn(args.batch, 3, args.size, args.size, device=device)
    labels = torch.randint(10, (args.batch,), device=device)
    contenders = {}
    for name in MAKERS:
        torch.manual_seed(0)
        model = build_model(
            args.model, width=args.width, num_classes=10, small_images=args.size < 64
        )
        contenders[name] = Contender(name, model.to(device), images, labels)
    for contender in contenders.values():  # state begins, and kernels are compiled
        for _ in range(2):
            contender.step()
    times: dict[str, list[float]] = {name: [] for name in MAKERS}
    for _ in range(args.rounds):
        for name, contender in contenders.items():
            times[name].append(seconds(contender.step, args.steps, device))
    rows = {}
    for name, contender in contenders.items():
        ratios = [t / a for t, a in zip(times[name], times[ADAM], strict=True)]
        rows[name] = {
            "milliseconds": round(1000 * median(times[name]), 3),
            "of_adam": round(median(ratios), 4),
            "bytes_a_binary_weight": round(contender.bytes_a_weight(), 4),
        }
    return rows


def main(argv: list[str]) -> int:
    """Measure, print a table, and write JSON if asked to."""
    parser = cli.Parser(prog="python -m benchmarks.optimisers", description=__doc__)
    parser.add_argument("--model", default="reactnet_a", help="network")
    parser.add_argument("--width", type=float, default=0.25, help="multiplies its channels")
    parser.add_argument("--batch", type=positive, default=64, help="images of a step")
    parser.add_argument("--size", type=positive, default=32, help="height and width of an image")
    parser.add_argument("--rounds", type=positive, default=7, help="times that each has its turn")
    parser.add_argument("--steps", type=positive, default=3, help="steps of a turn")
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args(argv)
    device = own_device()
    rows = measure(args, device)
    print(f"{'':26} {'ms a step':>10} {'÷ adam':>8} {'bytes a binary weight':>22}")
    for name, row in rows.items():
        print(
            f"{name:26} {row['milliseconds']:10.2f} {row['of_adam']:8.3f}"
            f" {row['bytes_a_binary_weight']:22.3f}"
        )
    if args.json:
        result = {**header(command("optimisers", argv), device), "rows": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    cli.run(main)

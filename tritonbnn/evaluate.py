"""``python -m tritonbnn.evaluate RUN|FILE``: score a checkpoint on its validation images.

FILE may be a packed one of ``python -m tritonbnn.export``. It may also hold weights from elsewhere:
a state dict of a network of this package, or AdamBNN's:
``model_best.pth.tar --step 2 --data-dir IMAGENET``.
"""

import argparse
import math

from torch import nn

from tritonbnn import cli
from tritonbnn.cli import Parser, UserError, at_least, printable
from tritonbnn.compute import PRECISIONS, Compute, choose_device
from tritonbnn.data.batches import check_fits_memory, check_shared_memory, val_batches
from tritonbnn.data.classes import CLASS_ORDERS
from tritonbnn.deploy import file
from tritonbnn.distributed import World
from tritonbnn.methods import evaluate
from tritonbnn.networks import add_engine, add_told, open_network
from tritonbnn.posterior import open_sampled
from tritonbnn.train.checkpoint import Checkpoint
from tritonbnn.train.config import MOST_IMAGES, MOST_WORKERS
from tritonbnn.train.weights import NOTHING, Told, open_data

MOST_SAMPLES = 1 << 20


def main(argv: list[str]) -> int:
    """Print the scores. Returns the exit code."""
    given = _parser().parse_args(argv)
    compute = Compute(choose_device(given.device), given.precision)
    told = Told(given.step, given.recipe)
    if given.samples:
        model, checkpoint = _open_sampled(given, compute, told)
    else:
        model, checkpoint = open_network(given.checkpoint, compute, engine=given.engine, told=told)
    source = open_data(checkpoint, given.data_dir, given.class_order)
    check_fits_memory(source, given.batch_size)
    check_shared_memory(source, given.batch_size, given.workers)
    batches = val_batches(source.val, batch_size=given.batch_size, workers=given.workers)
    score = evaluate(model, batches, compute, World())
    if not math.isfinite(score.loss):
        raise UserError(
            f"{checkpoint.path}: the loss is {score.loss} in {given.precision}: try --precision"
            " fp32, or use another checkpoint"
        )
    weights = "1-bit" if checkpoint.facts["network"]["binary_weights"] else "real"
    five = "" if score.top5 is None else f", top-5 {score.top5:.2f} %"
    print(
        f"{printable(checkpoint.path)}: {weights} weights, {score.images} images of the"
        f" data set {source.name}: top-1 {score.top1:.2f} %{five}, loss {score.loss:.4f}"
    )
    return 0


def _open_sampled(
    given: argparse.Namespace, compute: Compute, told: Told
) -> tuple[nn.Module, Checkpoint]:
    if given.engine == "packed" or told != NOTHING:
        raise UserError(
            "--samples draws the weights of a run: leave --engine, --step and --recipe out"
        )
    if given.checkpoint.is_file() and file.is_packed(given.checkpoint):
        raise UserError(f"--samples draws the weights of a run, and {given.checkpoint} is packed")
    return open_sampled(given.checkpoint, compute, given.samples)


def _parser() -> Parser:
    parser = Parser(prog="python -m tritonbnn.evaluate", description=__doc__)
    parser.add_argument(
        "checkpoint", type=cli.path, metavar="RUN|FILE", help="a run's folder, or a checkpoint file"
    )
    add_told(parser)
    parser.add_argument("--data-dir", type=cli.path, help="where the data are now")
    parser.add_argument(
        "--class-order",
        choices=list(CLASS_ORDERS),
        help="of the class folders, for weights that do not name their classes (default: name)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--batch-size", type=at_least(1, MOST_IMAGES), default=128, help="images at a time"
    )
    parser.add_argument(
        "--workers", type=at_least(0, MOST_WORKERS), default=0, help="processes that read images"
    )
    parser.add_argument(
        "--precision", choices=list(PRECISIONS), default="fp32", help="of activations"
    )
    parser.add_argument(
        "--samples",
        type=at_least(0, MOST_SAMPLES),
        default=0,
        help="of a run by IVON: predict with the mean of so many networks, whose weights are drawn"
        " from the distribution of its last checkpoint (default: the mean's network alone)",
    )
    add_engine(parser)
    return parser


if __name__ == "__main__":
    cli.run(main)

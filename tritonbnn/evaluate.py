"""``python -m tritonbnn.evaluate RUN|FILE``: score a checkpoint on its validation images.

FILE may also be a published one of AdamBNN: ``model_best.pth.tar --step 2 --data-dir IMAGENET``.
"""

import math
from pathlib import Path

from tritonbnn import cli
from tritonbnn.cli import Parser, UserError, at_least, printable
from tritonbnn.compute import PRECISIONS, Compute, choose_device
from tritonbnn.data.batches import check_fits_memory, check_shared_memory, val_batches
from tritonbnn.data.classes import CLASS_ORDERS
from tritonbnn.train.config import MOST_IMAGES, MOST_WORKERS, STEPS
from tritonbnn.train.distributed import World
from tritonbnn.train.engine import evaluate
from tritonbnn.train.weights import network_with_weights, open_data, read_any


def main(argv: list[str]) -> int:
    """Print the scores. Returns the exit code."""
    given = _parser().parse_args(argv)
    checkpoint = read_any(given.checkpoint, given.step)
    model = network_with_weights(checkpoint)
    compute = Compute(choose_device(given.device), given.precision)
    source = open_data(checkpoint, given.data_dir, given.class_order)
    check_fits_memory(source, given.batch_size)
    check_shared_memory(source, given.batch_size, given.workers)
    batches = val_batches(source.val, batch_size=given.batch_size, workers=given.workers)
    compute.place(model)
    score = evaluate(model, batches, compute, World())
    if not math.isfinite(score.loss):
        raise UserError(
            f"{checkpoint.path}: the loss is {score.loss} in {given.precision}: try --precision"
            " fp32, or use another checkpoint"
        )
    weights = "1-bit" if checkpoint.facts["network"]["binary_weights"] else "real"
    print(
        f"{printable(checkpoint.path)}: {weights} weights, {score.images} images of the"
        f" data set {source.name}: top-1 {score.top1:.2f} %, top-5 {score.top5:.2f} %,"
        f" loss {score.loss:.4f}"
    )
    return 0


def _parser() -> Parser:
    parser = Parser(prog="python -m tritonbnn.evaluate", description=__doc__)
    parser.add_argument(
        "checkpoint", type=Path, metavar="RUN|FILE", help="a run's folder, or a checkpoint file"
    )
    parser.add_argument(
        "--step",
        type=int,
        choices=STEPS,
        help="of a published file: 1 takes its weights as they are, 2 binarises them",
    )
    parser.add_argument("--data-dir", type=Path, help="where the data are now")
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
    return parser


if __name__ == "__main__":
    cli.run(main)

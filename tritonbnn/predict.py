"""``python -m tritonbnn.predict RUN|FILE IMAGE...``: name what is in images.

FILE may be a packed one of ``python -m tritonbnn.export`` too.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tritonbnn import cli
from tritonbnn.cli import Parser, UserError, at_least, printable
from tritonbnn.compute import Compute, choose_device
from tritonbnn.data.listing import list_images
from tritonbnn.data.sources import canonical, eval_reader
from tritonbnn.data.workers import read_batches
from tritonbnn.methods.scores import TOP
from tritonbnn.networks import add_engine, add_told, open_network
from tritonbnn.train.checkpoint import Checkpoint
from tritonbnn.train.config import MOST_IMAGES, MOST_WORKERS
from tritonbnn.train.weights import Told, open_data


def main(argv: list[str]) -> int:
    """Print the likeliest classes of each image. Returns the exit code.

    What cannot be read is named on stderr, and the next image comes: one bad file among thousands
    loses no other's answer, but the exit code tells.
    """
    given = _parser().parse_args(argv)
    compute = Compute(choose_device(given.device))
    told = Told(given.step, given.recipe)
    model, checkpoint = open_network(given.checkpoint, compute, engine=given.engine, told=told)
    model.eval()
    data = checkpoint.facts["data"]
    read = eval_reader(data)
    classes = _classes(checkpoint, given.data_dir)
    code = 0
    for place in given.images:
        found = list(_images(place))
        starts = range(0, len(found), given.batch_size)
        batches = [np.arange(i, min(i + given.batch_size, len(found))) for i in starts]
        read_files = read_batches(_Files(found, read), batches, given.workers)
        for indices, images in zip(batches, read_files, strict=True):
            answers = _answers(model, images, compute.device)
            for index, answer in zip(indices, answers, strict=True):
                if isinstance(answer, UserError):
                    code = cli.complain(answer)
                elif not answer.isfinite().all():
                    code = cli.complain(
                        f"{found[index]}: the network's answer is not finite:"
                        " use another checkpoint"
                    )
                else:
                    print(printable(f"{found[index]}: {_guesses(answer, classes)}"), flush=True)
    return code


@dataclass(frozen=True, eq=False)
class _Files(Dataset):
    """Images by batches of their numbers; instead of one that cannot be read, what is wrong."""

    found: list[Path | UserError]
    read: Callable[[Path], Tensor]

    def __getitem__(self, indices: np.ndarray) -> list[Tensor | UserError]:
        return [self._one(self.found[index]) for index in indices]

    def _one(self, found: Path | UserError) -> Tensor | UserError:
        if isinstance(found, UserError):
            return found
        try:
            return self.read(found)
        except UserError as error:
            return error


def _parser() -> Parser:
    parser = Parser(prog="python -m tritonbnn.predict", description=__doc__)
    parser.add_argument(
        "checkpoint", type=cli.path, metavar="RUN|FILE", help="a run's folder, or a checkpoint file"
    )
    parser.add_argument(
        "images", type=cli.path, nargs="+", metavar="IMAGE", help="image files, or folders of them"
    )
    add_told(parser)
    parser.add_argument(
        "--data-dir", type=cli.path, help="data whose classes name those of weights from elsewhere"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--batch-size", type=at_least(1, MOST_IMAGES), default=32, help="images at a time"
    )
    parser.add_argument(
        "--workers", type=at_least(0, MOST_WORKERS), default=0, help="processes that read images"
    )
    add_engine(parser)
    return parser


def _classes(checkpoint: Checkpoint, data_dir: Path | None) -> list[str]:
    """The names of the classes; of weights from elsewhere without data, their numbers."""
    known = checkpoint.facts["data"]["classes"]
    data = checkpoint.facts["data"]
    if known is None and (data_dir or canonical(data["name"]) != "images" or data["dir"]):
        return list(open_data(checkpoint, data_dir).classes)
    if data_dir is not None:
        raise UserError(f"{checkpoint.path} knows its classes: leave --data-dir out")
    return known or [f"class {i}" for i in range(checkpoint.facts["network"]["num_classes"])]


def _images(place: Path) -> Iterator[Path | UserError]:
    """The image itself, or all images below a folder, or what is wrong with the place."""
    try:
        if not place.is_dir():
            missing = UserError(f"{place} does not exist: name an image file or a folder")
            yield place if place.exists() else missing
            return
        listing = list_images(place)
    except OSError as error:
        yield UserError(f"cannot read {error.filename}: {error.strerror}")
        return
    listing.tell(place)
    [below] = listing.paths.values()
    if not below:
        yield UserError(f"{place} holds no image files")
    yield from (place / os.fsdecode(path) for path in below)


@torch.no_grad()
def _answers(
    model: nn.Module, images: list[Tensor | UserError], device: torch.device
) -> list[Tensor | UserError]:
    """Of each image the probability of each class, (C,), or what is wrong with it."""
    good = [image for image in images if isinstance(image, Tensor)]
    if not good:
        return images
    answers = iter(model(torch.stack(good).to(device)).softmax(dim=1).cpu())
    return [image if isinstance(image, UserError) else next(answers) for image in images]


def _guesses(probabilities: Tensor, classes: list[str]) -> str:
    values, indices = probabilities.topk(min(TOP, len(classes)))
    pairs = zip(indices.tolist(), values.tolist(), strict=True)
    return ", ".join(f"{classes[index]} {value:.1%}" for index, value in pairs)


if __name__ == "__main__":
    cli.run(main)

"""``python -m tritonbnn.predict RUN|FILE IMAGE...``: name what is in images."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from tritonbnn import cli
from tritonbnn.cli import Parser, UserError, printable
from tritonbnn.compute import choose_device
from tritonbnn.data.listing import list_images
from tritonbnn.data.sources import eval_reader
from tritonbnn.train.meters import TOP
from tritonbnn.train.weights import load_network


def main(argv: list[str]) -> int:
    """Print the likeliest classes of each image. Returns the exit code.

    What cannot be read is named on stderr, and the next image comes: one bad file among thousands
    loses no other's answer, but the exit code tells.
    """
    given = _parser().parse_args(argv)
    model, checkpoint = load_network(given.checkpoint)
    device = choose_device(given.device)
    model = model.to(device).eval()
    data = checkpoint.facts["data"]
    read = eval_reader(data)
    code = 0
    for place in given.images:
        for found in _images(place):
            try:
                probabilities = _probabilities(model, read, found, device)
            except UserError as error:
                code = cli.complain(error)
                continue
            guesses = _guesses(probabilities, data["classes"])
            print(printable(f"{found}: {guesses}"), flush=True)
    return code


def _parser() -> Parser:
    parser = Parser(prog="python -m tritonbnn.predict", description=__doc__)
    parser.add_argument(
        "checkpoint", type=Path, metavar="RUN|FILE", help="a run's folder, or a checkpoint file"
    )
    parser.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE", help="image files, or folders of them"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


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


def _probabilities(
    model: nn.Module,
    read: Callable[[Path], Tensor],
    found: Path | UserError,
    device: torch.device,
) -> Tensor:
    """Of each class, (C,).

    Raises:
        UserError: there is no image to read, or the network has no finite answer.
    """
    if isinstance(found, UserError):
        raise found
    with torch.no_grad():
        probabilities = model(read(found)[None].to(device))[0].softmax(dim=0)
    if not probabilities.isfinite().all():
        raise UserError(f"{found}: the network's answer is not finite: use another checkpoint")
    return probabilities


def _guesses(probabilities: Tensor, classes: list[str]) -> str:
    values, indices = probabilities.topk(min(TOP, len(classes)))
    pairs = zip(indices.tolist(), values.tolist(), strict=True)
    return ", ".join(f"{classes[index]} {value:.1%}" for index, value in pairs)


if __name__ == "__main__":
    cli.run(main)

"""``python -m tritonbnn.predict RUN|FILE IMAGE...``: name what is in images."""

from pathlib import Path

import torch

from tritonbnn import cli
from tritonbnn.cli import Parser, UserError
from tritonbnn.train.device import choose_device
from tritonbnn.train.images import is_image
from tritonbnn.train.meters import TOP
from tritonbnn.train.sources import eval_reader
from tritonbnn.train.weights import load_network


def main(argv: list[str]) -> int:
    """Print the likeliest classes of each image. Returns the exit code."""
    given = _parser().parse_args(argv)
    paths = [path for place in given.images for path in _images(place)]
    model, checkpoint = load_network(given.checkpoint)
    device = choose_device(given.device)
    model = model.to(device).eval()
    data = checkpoint.facts["data"]
    read = eval_reader(
        data["name"],
        image_size=data["image_size"],
        augment=data["augment"],
        channels=data["channels"],
    )
    for path in paths:
        with torch.no_grad():
            probabilities = model(read(path)[None].to(device))[0].softmax(dim=0)
        print(f"{path}: {_guesses(probabilities, data['classes'])}")
    return 0


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


def _images(place: Path) -> list[Path]:
    """The image itself, or all images below a folder."""
    if not place.is_dir():
        if not place.exists():
            raise UserError(f"{place} does not exist: name an image file or a folder")
        return [place]
    found = sorted(p for p in place.rglob("*") if p.is_file() and is_image(p.name))
    if not found:
        raise UserError(f"{place} holds no image files")
    return found


def _guesses(probabilities: torch.Tensor, classes: list[str]) -> str:
    values, indices = probabilities.topk(min(TOP, len(classes)))
    pairs = zip(indices.tolist(), values.tolist(), strict=True)
    return ", ".join(f"{classes[index]} {value:.1%}" for index, value in pairs)


if __name__ == "__main__":
    cli.run(main)

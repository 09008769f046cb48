"""A network to use, from whatever a command is given: a run, a checkpoint, or a packed file."""

import argparse
from pathlib import Path

from torch import Tensor, nn

from tritonbnn.cli import UserError
from tritonbnn.compute import Compute
from tritonbnn.deploy import file
from tritonbnn.deploy.engine import BaseEngine, Engine
from tritonbnn.deploy.fold import FoldError, fold
from tritonbnn.deploy.packed import Packed
from tritonbnn.train.checkpoint import Checkpoint
from tritonbnn.train.weights import NOTHING, Told, network_with_weights, read_any

ENGINES = ("auto", "packed", "torch")
_DATA = ("name", "dir", "classes", "channels", "image_size", "augment")


class PackedModule(nn.Module):
    """A packed network where torch wants a module.

    Args:
        engine: that runs it.
    """

    def __init__(self, engine: BaseEngine) -> None:
        super().__init__()
        self.engine = engine

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, classes), on the images' device."""
        return self.engine(images)


def open_network(
    place: Path, compute: Compute, *, engine: str, told: Told = NOTHING
) -> tuple[nn.Module, Checkpoint]:
    """A network in its place and in eval mode, and what is known of it.

    Args:
        place: a run's folder, a checkpoint, weights from elsewhere, or a packed file.
        compute: where and how it is to run.
        engine: of ENGINES. "auto" packs what can be packed where it runs on a CPU in float32.
        told: of weights from elsewhere.

    Raises:
        UserError: there is no network, or the engine cannot run it.
    """
    if place.is_file() and file.is_packed(place):
        return _open_packed(place, compute, engine, told)
    checkpoint = read_any(place, told)
    model: nn.Module = network_with_weights(checkpoint).eval()
    if engine != "torch" and (engine == "packed" or _suits(compute)):
        _check_suits(checkpoint.path, compute)
        try:
            return _module(fold(model), compute), checkpoint
        except FoldError as error:
            if engine == "packed":
                raise UserError(f"{checkpoint.path}: {error}: use --engine torch") from error
    compute.place(model)
    return model, checkpoint


def add_engine(parser: argparse.ArgumentParser) -> None:
    """The flag that chooses."""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="packed is the engine that runs packed files; auto takes it for them, and for what"
        " can be packed on a CPU in float32",
    )


def add_told(parser: argparse.ArgumentParser) -> None:
    """The flags for what :class:`~tritonbnn.train.weights.Told` holds."""
    parser.add_argument(
        "--step",
        type=int,
        choices=(1, 2),
        help="of weights from elsewhere: 1 takes them as they are, 2 binarises them",
    )
    parser.add_argument(
        "--recipe",
        help="of weights from elsewhere: whose data and size of images they are for (default:"
        " imagenet)",
    )


def check_not_told(place: Path, told: Told) -> None:
    """Raise UserError if something is told of a packed file, which knows it."""
    if told != NOTHING:
        raise UserError(
            f"--step and --recipe are for weights from elsewhere, and {place} is packed:"
            " leave them out"
        )


def _open_packed(
    place: Path, compute: Compute, engine: str, told: Told
) -> tuple[nn.Module, Checkpoint]:
    if engine == "torch":
        raise UserError(f"{place} is a packed file, which torch does not run: leave --engine out")
    check_not_told(place, told)
    _check_suits(place, compute)
    packed = file.read(place)
    data = {"classes": packed.classes and list(packed.classes), **(packed.transform or {})}
    missing = [key for key in _DATA if key not in data]
    if missing or not isinstance(data["dir"], str) or not _is_size(data["image_size"]):
        raise UserError(
            f"{place} does not tell how images become its input: export it from a run,"
            " or use tritonbnn.deploy.load"
        )
    network = {
        "in_channels": packed.in_channels,
        "num_classes": len(packed.head_weight),
        "binary_weights": True,
    }
    return _module(packed, compute), Checkpoint(place, {}, {"network": network, "data": data})


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value <= 1 << 14


def _module(packed: Packed, compute: Compute) -> nn.Module:
    """A packed network on the engine of the device."""
    if compute.device.type == "cpu":
        return PackedModule(Engine(packed)).eval()
    from tritonbnn.deploy.gpu import GpuEngine  # it needs Triton, which a CPU's engine does not

    return PackedModule(GpuEngine(packed, compute.device, compute.precision)).eval()


def _suits(compute: Compute) -> bool:
    return (compute.device.type, compute.precision) == ("cpu", "fp32")


def _check_suits(place: Path, compute: Compute) -> None:
    if compute.device.type == "cpu" and compute.precision != "fp32":
        raise UserError(
            f"{place}: the packed engine runs on a CPU in float32: use --precision fp32, or"
            " --engine torch with a run"
        )

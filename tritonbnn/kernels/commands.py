"""What the commands on these kernels share: where to run, and which problems to work on."""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

from tritonbnn import caches, cli
from tritonbnn.kernels import tiles
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.launch import interpreted
from tritonbnn.kernels.problems import DTYPES, OPS, Problem
from tritonbnn.kernels.problems.network import model_layers
from tritonbnn.kernels.provenance import own_device

LIMIT_HELP = "try at most so many candidates: the default, and others spread over all"

positive = cli.at_least(1)


def kernel_device() -> torch.device:
    """The GPU; or the CPU, where Triton's interpreter runs kernels.

    Raises:
        UserError: kernels run on neither, or there is no folder for what is compiled.
    """
    caches.prepare(caches.TRITON)
    device = own_device()
    if device.type == "cpu" and not interpreted(tiles.popcount):
        raise cli.UserError(
            "no CUDA device; to try the command, set TRITON_INTERPRET=1 and a small --size"
        )
    return device


def add_problem_arguments(parser: cli.Parser, model: str | None, ops: Sequence[str] = OPS) -> None:
    """Add the options that name a network's layers, operations and dtype."""
    model_help = "the network whose layers count"
    if model is None:
        model_help += "; without, a few layers that stand for all, of their own sizes"
    parser.add_argument("--model", default=model, help=model_help)
    parser.add_argument("--batch", type=positive, default=256, help="images")
    parser.add_argument("--size", type=positive, default=224, help="of the images")
    parser.add_argument("--width", type=float, default=1.0, help="of the network")
    parser.add_argument(
        "--small-images", action="store_true", help="a stem of stride 1, as for images of 32x32"
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="of activations")
    parser.add_argument("--op", action="append", choices=sorted(ops), help="only these")
    parser.add_argument(
        "--layer", type=int, action="append", help="only these of its layers, by index"
    )


def named_problems(
    arguments: argparse.Namespace,
    ops: Sequence[str] = OPS,
    layers: Sequence[Geometry] = (),
    *,
    both_steps: bool = False,
) -> list[Problem]:
    """The problems that the options name.

    Args:
        arguments: with what :func:`add_problem_arguments` added.
        ops: where no ``--op`` is given.
        layers: where there is no ``--model``.
        both_steps: also those of step 1 that work on a convolution by real weights.
    """
    caches.prepare(caches.TRITON)
    if arguments.model:
        try:
            small = arguments.small_images
            shape = arguments.batch, arguments.size, arguments.width
            layers = list(model_layers(arguments.model, *shape, small_images=small))
        except ValueError as error:
            raise cli.UserError(str(error)) from error
    chosen = range(len(layers)) if arguments.layer is None else arguments.layer
    if not set(chosen) <= set(range(len(layers))):
        raise cli.UserError(f"--layer must be from 0 to {len(layers) - 1}")
    dtype = DTYPES[arguments.dtype]
    problems = [Problem(op, layers[i], dtype) for i in chosen for op in arguments.op or ops]
    if both_steps:
        problems += [replace(p, binary_weight=False) for p in problems if p.on_convolution]
    return problems

"""Try formulations in a language below Triton's on this GPU, each in a process of its own.

    python -m tritonbnn.kernels.trial               # all that exist on this GPU
    python -m tritonbnn.kernels.trial mma popcount --json FILE

A formulation of the packed convolution is exact if all its sums are, in every shipped tile, on
layers of odd sizes. One of its gradients must be as near to float64 as eager torch is. So must
whole units, whose passes do the convolution themselves or go on from its gradient. Training asks
the same before it uses what is not Triton's own (:mod:`tritonbnn.kernels.verdicts`).
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tritonbnn import cli
from tritonbnn.files import writable, write_json
from tritonbnn.kernels import config, verdicts
from tritonbnn.kernels.commands import kernel_device
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.problems import PLAN, Problem
from tritonbnn.kernels.shipped import shipped_choices
from tritonbnn.kernels.targets import Target, target_of
from tritonbnn.kernels.truth import error_of

OP = "conv_packed"
KNOWN = (*config.known_formulations(OP), "warpgroup")
UNIT_PLANS = {"mma": "fused", "warpgroup": "keep"}
"""Formulations that whole units are tried with, and their plan."""

SHOWN = 3
"""Wrong cases that are told of."""

LAYERS = (
    Geometry(2, 9, 7, 32, 32, 3, 1, 1),
    Geometry(2, 5, 3, 33, 31, 3, 1, 1),
    Geometry(3, 8, 6, 96, 192, 3, 2, 1),
    Geometry(2, 7, 7, 512, 512, 3, 1, 1),
    Geometry(3, 5, 9, 40, 72, 1, 1, 0),
    Geometry(2, 7, 7, 256, 512, 1, 1, 0),
    Geometry(1, 3, 3, 1024, 1024, 1, 1, 0),
)
"""Words that are full and not, borders, a stride, and every size of a tile."""

UNITS = (
    Geometry(2, 9, 7, 33, 33, 3, 1, 1),
    Geometry(3, 8, 6, 96, 96, 3, 2, 1),
    Geometry(2, 5, 7, 40, 80, 1, 1, 0),
    Geometry(2, 5, 6, 72, 72, 3, 1, 1),
    Geometry(2, 7, 7, 512, 512, 1, 1, 0),
)
"""Every shortcut."""


def operations(formulation: str) -> tuple[str, ...]:
    """What a formulation is of."""
    if formulation == "warpgroup":
        return ("conv_weight_grad", "conv_input_grad", "conv_real")
    return (OP,)


def formulations(target: Target) -> tuple[str, ...]:
    """All that exist on a target and can be tried."""
    return (*target.products, *(name for name in ("warpgroup",) if name in target.formulations))


def cases(
    formulation: str,
    device: torch.device,
    layers: tuple[Geometry, ...] = LAYERS,
    units: tuple[Geometry, ...] = UNITS,
) -> Iterator[tuple[Problem, config.Choice | config.Table]]:
    """Every problem of the trial, in every shipped tile of the formulation, and what it runs as."""
    target, dtype = target_of(device), _dtype(formulation)
    for op, layer in product(operations(formulation), layers):
        problem = Problem(op, layer, dtype)
        if config.takes(formulation, problem.key):
            for choice in shipped_choices(problem, target):
                if choice.formulation == formulation:
                    yield problem, choice
    for layer in units if formulation in UNIT_PLANS else ():
        problem = Problem(PLAN, layer, dtype)
        table = {problem.key: config.default(problem.key, UNIT_PLANS[formulation])}
        for op in operations(formulation):
            key = layer.key(op, "int32" if op == OP else config.dtype_name(dtype))
            if config.takes(formulation, key):
                table[key] = config.default(key, formulation)
        if len(table) > 1:
            yield problem, {key.bucketed(): choice for key, choice in table.items()}


def _dtype(formulation: str) -> torch.dtype:
    """Of a trial's images."""
    return torch.bfloat16 if formulation == "warpgroup" else torch.float32


def try_here(
    formulation: str,
    device: torch.device,
    layers: tuple[Geometry, ...] = LAYERS,
    units: tuple[Geometry, ...] = UNITS,
) -> dict[str, Any]:
    """Run the trial in this process, which it may end.

    Returns:
        How many cases were tried, and the first that are wrong, as texts.
    """
    tried, wrong = 0, []
    for problem, forced in cases(formulation, device, layers, units):
        inputs = problem.inputs(device)
        with config.using(forced):
            error = error_of(problem, inputs, problem.run(inputs))
        tried += 1
        if error:
            where = forced.tile if isinstance(forced, config.Choice) else "a unit"
            wrong.append(f"{problem.layer} in {where}: {error}")
    return {"tried": tried, "wrong": wrong[:SHOWN]}


def main(argv: list[str]) -> int:
    """Command line. Returns 1 if a formulation is not exact."""
    given = _parser().parse_args(argv)
    known = KNOWN
    for name in given.formulations:
        if name not in known:
            raise cli.UserError(f"formulation {name!r}: choose from {', '.join(known)}")
    device = kernel_device() if given.device is None else torch.device(given.device)
    names = given.formulations or formulations(target_of(device))
    if given.child:
        verdicts.inside = True
        print(json.dumps(try_here(names[0], device)))
        return 0
    path, found = writable(given.json), {}
    for name in names:
        found[name] = verdicts.ask(device, name, given.seconds)
        said = "exact" if found[name].exact else found[name].reason
        print(
            f"{name}: {said} ({found[name].tried} cases, {found[name].seconds:.0f} s)", flush=True
        )
    if path:
        rows = {name: asdict(each) for name, each in found.items()}
        write_json(path, {**verdicts.facts_of(device), "verdicts": rows})
    return 0 if all(each.exact for each in found.values()) else 1


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m tritonbnn.kernels.trial", description=__doc__)
    known = ", ".join(KNOWN)
    parser.add_argument("formulations", nargs="*", help=f"of {known}; all that exist if absent")
    parser.add_argument("--seconds", type=float, default=verdicts.SECONDS, help="limit of each")
    parser.add_argument("--json", type=Path, help="write the verdicts here")
    parser.add_argument("--device", help="another GPU than the first, as in cuda:1")
    parser.add_argument("--child", action="store_true", help="run the trial in this process")
    return parser


if __name__ == "__main__":
    cli.run(main)

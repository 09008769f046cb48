"""Ours against torch, layer by layer.

``python -m tritonbnn.kernels.bench --json FILE`` checks every launcher against the truth, times it
beside eager torch, torch.compile and the vendor's library, and relates it to the floor that bytes
and operations set. Without a GPU it runs at small sizes under TRITON_INTERPRET=1, to be tested.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tritonbnn import cli, eager
from tritonbnn.files import writable, write_json
from tritonbnn.kernels import below_triton
from tritonbnn.kernels.commands import (
    add_problem_arguments,
    kernel_device,
    named_problems,
    positive,
)
from tritonbnn.kernels.library import convolution, convolution_backward
from tritonbnn.kernels.problems import DTYPES, VECTORS, Problem
from tritonbnn.kernels.provenance import header
from tritonbnn.kernels.shipped import describe
from tritonbnn.kernels.timing import copy_bandwidth, matmul_rate, time_callable
from tritonbnn.kernels.truth import error_of

CHECK_BATCH = 2
"""Images that a launcher is checked on before it is timed."""

Call = Callable[[], Any]


def alternatives(problem: Problem, inputs: dict[str, Tensor], compiled: bool) -> dict[str, Call]:
    """What else does the same work: name and call, operands prepared outside of it."""
    formula = problem.kind.formula
    if formula is None:
        return _library_calls(problem, inputs)
    # torch's formulas stay in the stream's dtype, as a network under autocast would.
    t = {
        name: tensor.to(problem.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    t |= {name: t[name].view(1, -1, 1, 1) for name in VECTORS if name in t}
    shortcut = problem.shortcut
    calls: dict[str, Call] = {"eager": lambda: formula(t, shortcut)}
    if compiled:
        fast = torch.compile(formula, dynamic=False)
        calls["compile"] = lambda: fast(t, shortcut)
    return calls


def _library_calls(problem: Problem, inputs: dict[str, Tensor]) -> dict[str, Call]:
    """The vendor's convolution on +-1 in the dtype, and for 1x1 its matrix product."""
    layer, dtype = problem.layer, problem.dtype
    x = eager.unpack_signs(inputs["signs"], layer.channels, dtype)
    weight = eager.unpack_signs(inputs["weight_signs"], layer.channels, dtype)
    grad = inputs["grad"]
    masks = {"conv_input_grad": [True, False, False], "conv_weight_grad": [False, True, False]}
    if problem.op in masks:
        mask = masks[problem.op]
        calls: dict[str, Call] = {
            "cudnn": lambda: convolution_backward(grad, x, weight, layer, mask)
        }
    else:
        calls = {"cudnn": lambda: convolution(x, weight, layer)}
    if layer.kernel_size == 1 and layer.stride == 1:
        rows = x.permute(0, 2, 3, 1).reshape(-1, layer.channels)
        grads = grad.permute(0, 2, 3, 1).reshape(-1, layer.out_channels)
        matrix = weight.flatten(1)
        products: dict[str, Call] = {
            "conv_input_grad": lambda: grads @ matrix,
            "conv_weight_grad": lambda: grads.T @ rows,
        }
        calls["cublas"] = products.get(problem.op, lambda: rows @ matrix.T)
    return calls


def measure(
    problem: Problem, device: torch.device, roofs: dict[str, float], *, runs: int, compiled: bool
) -> dict[str, Any]:
    """One row: checked first, and without any number if the check fails.

    Args:
        problem: what to run.
        device: where.
        roofs: as :func:`measured_roofs` measures them.
        runs: timed runs of each contender.
        compiled: whether torch.compile contends.
    """
    row: dict[str, Any] = {"op": problem.op, "layer": describe(problem.layer)}
    small = problem.with_batch(min(CHECK_BATCH, problem.layer.batch))
    inputs = small.inputs(device)
    if wrong := error_of(small, inputs, small.run(inputs)):
        return {**row, "wrong": wrong}
    inputs = problem.inputs(device)
    ours = time_callable(lambda: problem.run(inputs), device, runs=runs)
    others = {
        name: time_callable(call, device, runs=runs)
        for name, call in alternatives(problem, inputs, compiled).items()
    }
    one_bit = [rate for name, rate in roofs.items() if name.startswith("one_bit")]
    floor = 1e6 * max(
        problem.bytes_moved / roofs["copy_bytes_per_s"],
        problem.operations / roofs["matmul_ops_per_s"],
        problem.bit_operations / max(one_bit, default=math.inf),
    )
    best = min(other.p50 for other in others.values())
    return {
        **row,
        "ours_us": asdict(ours),
        **{f"{name}_us": asdict(timing) for name, timing in others.items()},
        "bytes": problem.bytes_moved,
        "operations": problem.operations,
        "bit_operations": problem.bit_operations,
        "floor_us": floor,
        "share_of_floor": floor / ours.p50,
        "times_faster_than_best": best / ours.p50,
    }


def measured_roofs(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What the device reaches at best, per second: bytes copied, operations of products.

    Of products of signs only where there is a one-bit tensor core.
    """
    return {
        "copy_bytes_per_s": copy_bandwidth(device),
        "matmul_ops_per_s": matmul_rate(device, dtype),
        **one_bit_roofs(device),
    }


def one_bit_roofs(device: torch.device) -> dict[str, float]:
    """Operations per second of each form of the one-bit tensor core that the device has."""
    roofs = {}
    if below_triton.runs(device):
        from tritonbnn.kernels.mma_peak import one_bit_rate  # it needs Gluon

        roofs["one_bit_ops_per_s"] = one_bit_rate(device)
    if below_triton.runs(device, "wgmma"):
        from tritonbnn.kernels.mma_peak import warpgroup_rate

        roofs["one_bit_warpgroup_ops_per_s"] = warpgroup_rate(device)
    return roofs


def main(argv: list[str]) -> int:
    """Command line."""
    arguments = _parser().parse_args(argv)
    path, problems = writable(arguments.json), named_problems(arguments)
    device = kernel_device()
    roofs = measured_roofs(device, DTYPES[arguments.dtype])
    command = f"python -m tritonbnn.kernels.bench {' '.join(argv)}"
    options = {"batch": arguments.batch, "dtype": arguments.dtype, "runs": arguments.runs}
    head = {**header(command, device), **roofs, **options}
    compiled = device.type == "cuda" and not arguments.no_compile
    rows: list[dict[str, Any]] = []
    print(json.dumps(head))
    for problem in tqdm(problems, unit="problem", disable=None):
        row = measure(problem, device, roofs, runs=arguments.runs, compiled=compiled)
        rows.append(row)
        tqdm.write(_line(row), file=sys.stdout)
        if path:
            write_json(path, {**head, "rows": rows})
    return 1 if any("wrong" in row for row in rows) else 0


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m tritonbnn.kernels.bench", description=__doc__)
    parser.add_argument("--json", type=Path, help="write header and rows to this file")
    add_problem_arguments(parser, "reactnet_a")
    parser.add_argument("--runs", type=positive, default=50, help="timed runs of each contender")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    return parser


def _line(row: dict[str, Any]) -> str:
    name = f"{row['layer']:26} {row['op']:17}"
    if "wrong" in row:
        return f"{name} WRONG: {row['wrong']}"
    others = {key: value for key, value in row.items() if key.endswith("_us") and key != "floor_us"}
    times = "  ".join(f"{key[:-3]} {value['p50']:10.1f}" for key, value in others.items())
    return f"{name} {times}  floor {row['floor_us']:.1f} us ({row['share_of_floor']:.0%})"


if __name__ == "__main__":
    cli.run(main)

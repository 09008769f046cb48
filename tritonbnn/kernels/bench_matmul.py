"""Square products of signs: the one-bit tensor core against int8, in the same run.

``python -m tritonbnn.kernels.bench_matmul --size 8192 --json FILE`` tries the tiles of every
formulation, compares each result with ``torch._int_mm``'s, integer by integer, and times the best.
Without a GPU it runs at small sizes under TRITON_INTERPRET=1, to be tested.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from tqdm import tqdm

from tritonbnn import cli, eager
from tritonbnn.files import writable, write_json
from tritonbnn.kernels import below_triton, config, packed_matmul
from tritonbnn.kernels.bench import measured_roofs
from tritonbnn.kernels.candidates import candidates, spread
from tritonbnn.kernels.commands import LIMIT_HELP, kernel_device, positive
from tritonbnn.kernels.provenance import header
from tritonbnn.kernels.targets import target_of
from tritonbnn.kernels.timing import Timing, time_callable

ROOFS = {"mma": "one_bit_ops_per_s", "wgmma": "one_bit_warpgroup_ops_per_s"}
"""What bounds a formulation on the one-bit tensor core."""


def best(
    formulation: str, operands: tuple[Tensor, Tensor], truth: Tensor, limit: int | None, runs: int
) -> tuple[config.TileConfig, Timing]:
    """The fastest tile of a formulation.

    Args:
        formulation: of ``conv_packed``, as which a product runs.
        operands: packed (size, words) each.
        truth: (size, size) int32.
        limit: try at most so many tiles.
        runs: timed runs of each.

    Raises:
        RuntimeError: a product is not the truth.
    """
    a, b = operands
    size = len(a)
    key = config.ProblemKey("conv_packed", "int32", size, 1, 1, size, size)
    known = candidates(key, target_of(a.device))
    choices = [config.default(key, formulation)]
    choices += [choice for choice in known if choice.formulation == formulation]
    found: list[tuple[config.TileConfig, Timing]] = []
    for choice in spread(list(dict.fromkeys(choices)), limit):
        with config.using(choice):
            try:
                if not torch.equal(packed_matmul(a, b, size), truth):
                    raise RuntimeError(f"the product as {choice} is wrong")
                timing = time_callable(lambda: packed_matmul(a, b, size), a.device, runs=runs)
            except triton.runtime.OutOfResources:
                continue  # the count that pruned tiles before compiling was too kind
        found.append((choice.tile, timing))
    return min(found, key=lambda pair: pair[1].p50)


def measure(
    size: int, device: torch.device, roofs: dict[str, float], *, limit: int | None, runs: int
) -> dict[str, Any]:
    """One row: times, and where there is a one-bit tensor core its forms' shares and leads.

    Args:
        size: of both matrices, rows and columns; a multiple of 8.
        device: where.
        roofs: as :func:`tritonbnn.kernels.bench.measured_roofs` measures them.
        limit: of tiles a formulation.
        runs: timed runs of each contender.
    """
    a, b = torch.randint(0, 2, (2, size, size), dtype=torch.int8, device=device).mul_(2).sub_(1)
    truth = torch._int_mm(a, b.T)
    operands = (eager.pack_signs(a.half()), eager.pack_signs(b.half()))
    timings = {"torch_int_mm": time_callable(lambda: torch._int_mm(a, b.T), device, runs=runs)}
    moved = sum(each.numel() * each.itemsize for each in (*operands, truth))
    row: dict[str, Any] = {"size": size, "operations": 2 * size**3, "bytes": moved}
    forms = [name for name in ROOFS if below_triton.runs(device, name)]
    for formulation in ("int8", *forms):
        tile, timings[formulation] = best(formulation, operands, truth, limit, runs)
        row[f"{formulation}_tile"] = asdict(tile)
    row |= {f"{name}_us": asdict(timing) for name, timing in timings.items()}
    int8 = min(timings[name].p50 for name in ("torch_int_mm", "int8"))
    for form in forms:
        ours = timings[form].p50
        peak = 1e6 * row["operations"] / roofs[ROOFS[form]]
        row[f"{form}_share_of_peak"] = peak / ours
        row[f"{form}_share_of_floor"] = max(peak, 1e6 * moved / roofs["copy_bytes_per_s"]) / ours
        row[f"{form}_times_faster_than_int8"] = int8 / ours
    return row


def main(argv: list[str]) -> int:
    """Command line."""
    arguments = _parser().parse_args(argv)
    sizes = arguments.size or [8192]
    if any(size % 8 or size < 32 for size in sizes):
        raise cli.UserError("--size must be a multiple of 8 and at least 32, for torch._int_mm")
    device, path = kernel_device(), writable(arguments.json)
    roofs = measured_roofs(device, torch.bfloat16)
    command = f"python -m tritonbnn.kernels.bench_matmul {' '.join(argv)}"
    head = {**header(command, device), **roofs}
    rows: list[dict[str, Any]] = []
    print(json.dumps(head))
    for size in tqdm(sizes, unit="size", disable=None):
        rows.append(measure(size, device, roofs, limit=arguments.limit, runs=arguments.runs))
        tqdm.write(json.dumps(rows[-1]), file=sys.stdout)
        if path:
            write_json(path, {**head, "rows": rows})
    return 0


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m tritonbnn.kernels.bench_matmul", description=__doc__)
    parser.add_argument(
        "--size",
        type=positive,
        action="append",
        help="of both matrices, 8192 if none is given; repeat for several",
    )
    parser.add_argument("--limit", type=positive, help=f"{LIMIT_HELP}, for each formulation")
    parser.add_argument("--runs", type=positive, default=30, help="timed runs of each contender")
    parser.add_argument("--json", type=Path, help="write header and rows to this file")
    return parser


if __name__ == "__main__":
    cli.run(main)

"""The bounds of a step's launches, by kernel and layer."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from benchmarks.bounds import LIMITS, Bound
from benchmarks.launches import Counted
from benchmarks.multiprocessor import MACHINES
from tritonbnn.kernels.launch import Launch
from tritonbnn.kernels.shipped import describe
from tritonbnn.kernels.targets import Target

Row = dict[str, Any]

SHOWN_MS = 0.03
"""The least estimate of a row that is printed."""

_MILLISECONDS = (*(f"{name}_ms" for name in LIMITS), "bound_ms", "estimated_ms")
_ADDED = ("launches", "mb", *_MILLISECONDS)


def rows_of(counted: list[Counted], bounds: list[Bound | None]) -> list[Row]:
    """A row for each kernel and layer: launches of the same that compiled to the same."""
    rows: dict[tuple[str, ...], Row] = {}
    for each, bound in zip(counted, bounds, strict=True):
        if bound is None or each.launch is None:
            continue
        row = _row(each, bound)
        key = each.name, row["layer"], str(bound)
        if key in rows:
            row = {name: value + rows[key][name] for name, value in row.items() if name in _ADDED}
            row = rows[key] | row
        rows[key] = row
    return sorted(rows.values(), key=lambda row: (row["kernel"], -row["bound_ms"]))


def _row(each: Counted, bound: Bound) -> Row:
    milliseconds = {f"{name}_ms": bound.seconds.get(name, 0.0) * 1e3 for name in LIMITS}
    tile = each.launch.tile
    return {
        "kernel": each.name,
        "layer": _layer(each.launch),
        "launches": 1,
        "mb": each.bytes / 1e6,
        **milliseconds,
        "bound_ms": bound.least * 1e3,
        "binding": bound.binding,
        "estimated_ms": bound.estimate * 1e3,
        "registers": bound.code.registers,
        "spill_bytes": bound.code.spill_bytes,
        "spills_in_loops": bound.code.spills_in_loops,
        "shared_bytes": bound.code.shared_bytes,
        "blocks": bound.blocks,
        "tile": [tile.block_m, tile.block_n, tile.block_k, tile.num_warps, tile.num_stages],
    }


def _layer(launch: Launch) -> str:
    """The convolution, or else the shape of the largest tensor."""
    if "shape" in launch.arguments:
        return describe(launch.arguments["shape"])
    tensors = [value for value in launch.arguments.values() if isinstance(value, Tensor)]
    largest = max(tensors, key=lambda tensor: tensor.nbytes).shape
    if len(largest) == 4:
        return f"{largest[1]} at {largest[2]}x{largest[3]}"
    return "x".join(map(str, largest))


def describe_rows(rows: list[Row], target: Target) -> Iterator[str]:
    """A line for each row that counts, and the sums."""
    if target.name not in MACHINES:
        known = ", ".join(MACHINES)
        yield f"no bounds on {target.name}, but on {known}: our products are taken for a library's"
        return
    machine = MACHINES[target.name]
    yield (
        f"bounds of our kernels on {target.name}: {machine.model}, {machine.multiprocessors}"
        f" multiprocessors at {machine.gigahertz:g} GHz, in ms of all launches of a row, with ! for"
        f" a spill in a loop; rows under {SHOWN_MS:g} ms are in the sums alone, and launches under"
        " 1 MiB without a product nowhere"
    )
    times = " ".join(f"{name:>6}" for name in (*LIMITS, "bound", "est"))
    yield f"  {'kernel':24} {'layer':24}  n     MB {times} binds  regs spill blocks"
    for row in rows:
        if row["estimated_ms"] < SHOWN_MS:
            continue
        times = " ".join(f"{row[name]:6.3f}" for name in _MILLISECONDS)
        spilled = f"{row['spill_bytes']}{'!' if row['spills_in_loops'] else ''}"
        yield (
            f"  {row['kernel']:24} {row['layer']:24} {row['launches']:2} {row['mb']:6.0f} {times}"
            f" {row['binding']:6} {row['registers']:3} {spilled:>5} {row['blocks']:6}"
        )
    for kernel in sorted({row["kernel"] for row in rows}):
        yield _total(kernel, [row for row in rows if row["kernel"] == kernel])
    yield _total("all", rows)


def _total(name: str, rows: list[Row]) -> str:
    """The sums of rows."""
    launches, megabytes = (sum(row[name] for row in rows) for name in ("launches", "mb"))
    times = " ".join(f"{sum(row[name] for row in rows):6.2f}" for name in _MILLISECONDS)
    return f"  {name:24} {'sum':23} {launches:3} {megabytes:6.0f} {times}"

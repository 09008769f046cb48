"""Ahead-of-time gate: every kernel as shipped, compiled for GPUs that need not be there.

``python -m tritonbnn.kernels.shipped --target sm_90`` prints registers, spills, shared memory and
tensor-core instructions of each kernel, and fails if one of them breaks a limit.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tritonbnn import cli
from tritonbnn.files import writable, write_json
from tritonbnn.kernels import aot, config
from tritonbnn.kernels.commands import add_problem_arguments, named_problems
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.launch import Launch
from tritonbnn.kernels.problems import DTYPES, OPS, PLAN, Problem
from tritonbnn.kernels.targets import ANY, TARGETS, Target, parse_target

META = torch.device("meta")

# One word of channels, a stride, a widening one: they differ in tile, parity and shortcut.
REPRESENTATIVE = (
    Geometry(256, 112, 112, 32, 32, 3, 1, 1),
    Geometry(256, 28, 28, 256, 256, 3, 2, 1),
    Geometry(256, 7, 7, 512, 1024, 1, 1, 0),
)

SPILLED = 8
"""Bytes a kernel may spill: two registers, which Triton 3.8 spills of one kernel on sm_80."""

GATED = (*OPS, PLAN)
"""What is compiled: every launcher, and what a whole unit launches beside them."""

ONE_BIT_UNITS = {"mma": "BMMA", "warpgroup": "BGMMA"}
"""The only tensor-core instruction of kernels with such a name."""


@dataclass(frozen=True)
class Row:
    """One kernel of one problem, compiled."""

    target: str
    op: str
    step: int
    layer: str
    dtype: str
    tile: config.TileConfig
    resources: aot.Resources

    @property
    def problems(self) -> list[str]:
        """What is wrong with it."""
        limit = parse_target(self.target).shared_bytes
        wrong = []
        if self.resources.spill_bytes > SPILLED:
            wrong.append(f"spills {self.resources.spill_bytes} bytes")
        if self.resources.shared_bytes > limit:
            wrong.append(f"takes {self.resources.shared_bytes} of {limit} bytes of shared memory")
        if self._wants_tensor_core and not self.resources.tensor_core:
            wrong.append("has no tensor-core instruction")
        for name, unit in ONE_BIT_UNITS.items():
            if name in self.resources.kernel and set(self.resources.tensor_core) != {unit}:
                wrong.append("is not on the one-bit tensor core")
            if name in self.resources.kernel and not self.resources.wide_loads:
                wrong.append("has no load of 16 bytes")
        return wrong

    @property
    def _wants_tensor_core(self) -> bool:
        product = "conv" in self.resources.kernel and "popcount" not in self.resources.kernel
        return product and (self.dtype != "fp32" or self.op in ("conv_packed", "conv_scaled"))

    def as_json(self) -> dict[str, object]:
        return {
            "target": self.target,
            "op": self.op,
            "step": self.step,
            "layer": self.layer,
            "dtype": self.dtype,
            "kernel": self.resources.kernel,
            "registers": self.resources.registers,
            "spill_bytes": self.resources.spill_bytes,
            "shared_bytes": self.resources.shared_bytes,
            "tensor_core": self.resources.tensor_core,
            "instructions": sum(self.resources.instructions.values()),
            "loop": dict(self.resources.loop),
            "wide_loads": self.resources.wide_loads,
            "popcounts": self.resources.instructions["POPC"],
            "shuffles": self.resources.instructions["SHFL"],
            "problems": self.problems,
        }


def launches_of(
    problem: Problem, choice: config.Choice | None = None, target: Target = ANY
) -> list[Launch]:
    """What a problem launches, without running it, by default as the interpreter would.

    A unit's choice is its plan. What it launches runs as its target's default.
    """
    inputs = problem.inputs(META)
    choice = choice or config.default(problem.key, target=target)
    with config.using(target if problem.op == PLAN else choice):
        return aot.record(lambda: problem.run(inputs))


def shipped_choices(problem: Problem, target: Target) -> Iterator[config.Choice]:
    """The target's defaults and what shipped tables hold for a problem, library calls left out."""
    names = config.formulations(problem.key.op, target)
    if problem.op == PLAN:  # the others launch the same kernels
        names = names[:1]
    choices = {config.default(problem.key, name, target) for name in names}
    for path in sorted(config.CONFIG_DIR.glob("*.json")):
        gpu = json.loads(path.read_text(encoding="utf-8"))["gpu"]
        choices.add(config.look_up(problem.key, config.read_table(path, gpu), target))
    there = (choice for choice in choices if choice.formulation in names)
    yield from sorted(choice for choice in there if choice.formulation != "library")


def compile_all(problems: Iterable[Problem], targets: Iterable[Target]) -> Iterator[Row]:
    """Compile what the problems launch, each distinct kernel once for each target."""
    seen = set()
    for problem, target in product(problems, targets):
        if problem.dtype == torch.bfloat16 and not target.bfloat16:
            problem = replace(problem, dtype=torch.float16)
        for choice in shipped_choices(problem, target):
            for launch in launches_of(problem, choice, target):
                identity = target.name, *_identity(launch)
                if identity in seen:
                    continue
                seen.add(identity)
                resources = aot.compile_launch(launch, target)
                dtype = next(name for name, d in DTYPES.items() if d == problem.dtype)
                step, layer = 1 + problem.binary_weight, describe(problem.layer)
                yield Row(target.name, problem.op, step, layer, dtype, launch.tile, resources)


def _identity(launch: Launch) -> tuple[object, ...]:
    """What makes two launches compile to the same kernel."""
    values = tuple(
        value.dtype if isinstance(value, Tensor) else value for value in launch.arguments.values()
    )
    return launch.kernel.__name__, values, launch.tile


def describe(layer: Geometry) -> str:
    """A layer in a few characters: ``3x3/2 64>64 at 112x112``."""
    k, stride = layer.kernel_size, f"/{layer.stride}" if layer.stride != 1 else ""
    size = f"{layer.height}x{layer.width}"
    return f"{k}x{k}{stride} {layer.channels}>{layer.out_channels} at {size}"


def main(argv: list[str]) -> int:
    """Command line."""
    parser = cli.Parser(prog="python -m tritonbnn.kernels.shipped", description=__doc__)
    parser.add_argument(
        "--target", action="append", help=f"{', '.join(TARGETS)}; repeat it for several (sm_90)"
    )
    add_problem_arguments(parser, None, GATED)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args(argv)
    path = writable(arguments.json)
    targets = [parse_target(name) for name in arguments.target or ["sm_90"]]
    problems = named_problems(arguments, GATED, REPRESENTATIVE, both_steps=True)
    rows = list(compile_all(tqdm(problems, unit="problem", disable=None), targets))
    if path:
        write_json(path, [row.as_json() for row in rows])
    broken = [row for row in rows if row.problems]
    for row in rows:
        print(_line(row))
    return 1 if broken else 0


def _line(row: Row) -> str:
    made = row.resources
    units = ", ".join(f"{n} {name}" for name, n in made.tensor_core.items()) or "-"
    if made.tensor_core:
        where = "in the loop" if made.loop != made.instructions else "in all"
        units += f", {made.tensor_core_share:.0%} of {made.loop.total()} {where}"
    wrong = f"  WRONG: {'; '.join(row.problems)}" if row.problems else ""
    return (
        f"{row.target}  {row.layer:26} {row.dtype}  step {row.step}  {row.op:24} {made.kernel:32} "
        f"{made.registers:3} registers  {made.spill_bytes} spilled  "
        f"{made.shared_bytes:6} shared  {units}{wrong}"
    )


if __name__ == "__main__":
    cli.run(main)

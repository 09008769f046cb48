"""Choose formulation and tile for every problem a network poses, by measurement.

``python -m tritonbnn.kernels.autotune`` writes a table into the user's cache folder, where training
looks for it; ``--ship`` writes the package's own. What an interrupted run had finished is kept, and
the same command goes on. Choices run in a process of its own, and one that ends or hangs it is
skipped and noted. Without a GPU, ``--compile-only --target sm_90`` ranks the candidates by
what the compiler makes of them.
"""

import argparse
import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tritonbnn import cli
from tritonbnn.files import writable, write_json
from tritonbnn.kernels import aot, below_triton, config, shipped
from tritonbnn.kernels.apart import JudgeApart
from tritonbnn.kernels.candidates import candidates, spread
from tritonbnn.kernels.commands import (
    LIMIT_HELP,
    add_problem_arguments,
    named_problems,
    positive,
)
from tritonbnn.kernels.config import BELOW_TRITON
from tritonbnn.kernels.judge import Judges, UnfitError
from tritonbnn.kernels.problems import OPS, PLAN, STEP_OPS, Problem
from tritonbnn.kernels.provenance import versions
from tritonbnn.kernels.targets import TARGETS, Target, parse_target, target_of


@dataclass(frozen=True)
class Entry:
    """One line of a tuning table."""

    key: config.ProblemKey
    choice: config.Choice
    time_us: float
    default_us: float
    unfit: tuple[tuple[config.Choice, str], ...] = ()
    """Choices that were wrong or could not run, and why."""

    def as_json(self) -> dict[str, Any]:
        unfit = [{**asdict(choice), "reason": reason} for choice, reason in self.unfit]
        return {
            "key": asdict(self.key),
            **asdict(self.choice),
            "time_us": round(self.time_us, 2),
            "default_us": round(self.default_us, 2),
            **({"unfit": unfit} if unfit else {}),
        }


class UntunableError(Exception):
    """There is no right time of the default to compare with."""


def tune(
    problem: Problem,
    choices: Iterable[config.Choice],
    judge: Judges,
    table: config.Table | None = None,
) -> Entry:
    """Check and time the choices, the default first among them, and return the fastest.

    Args:
        problem: a launcher, or a whole unit.
        choices: what it may run as.
        judge: who checks and times them.
        table: what the launchers inside a whole unit run as; None for the defaults.

    Raises:
        UntunableError: the default is wrong or cannot run.
    """
    choices = list(choices)
    default = choices[0]
    times, unfit = {}, []
    try:
        judge.begin(problem, table or {})
    except UnfitError as error:
        raise UntunableError(f"{problem.key} cannot be tuned: {error}") from error
    for choice in choices:
        try:
            times[choice] = judge.time(choice)
        except UnfitError as error:
            if str(error):
                tqdm.write(f"{problem.op} as {choice} {error}")
                unfit.append((choice, str(error)))
    if default not in times:
        raise UntunableError(f"the default of {problem.key} is wrong or cannot run: {default}")
    best = min(times, key=lambda choice: (times[choice], choice))
    return Entry(problem.key.bucketed(), best, times[best], times[default], tuple(unfit))


def read_entries(path: Path, head: dict[str, Any]) -> dict[config.ProblemKey, dict[str, Any]]:
    """The entries of an earlier run; none if another Triton made them.

    Another driver or torch compiles nothing anew.
    """
    if not path.exists():
        return {}
    try:
        table = config.read_table(path, head["gpu"])
    except ValueError as error:
        raise cli.UserError(f"{error}; mend or remove the file") from error
    document = json.loads(path.read_text(encoding="utf-8"))
    if document.get("triton") != head["triton"]:
        return {}
    return dict(zip(table, document["entries"], strict=True))


def write_table(
    path: Path, head: dict[str, Any], entries: dict[config.ProblemKey, dict[str, Any]]
) -> None:
    """Write a table, its entries sorted."""
    write_json(path, {**head, "entries": [entries[key] for key in sorted(entries)]})


def tune_all(
    problems: list[Problem],
    path: Path,
    gpu: str,
    judge: Judges,
    *,
    target: Target,
    limit: int | None = None,
    end: float = math.inf,
) -> tuple[int, int]:
    """Tune what the table at ``path`` misses, and write it after every problem.

    None is begun after ``end`` on the clock of :func:`time.monotonic`. The costliest layers come
    first. Whole units come last, on the launchers as tuned.

    Returns:
        How many problems were tuned, and how many could not be.
    """
    tuned, device = 0, judge.device
    head = {"gpu": gpu, **versions(device)}
    entries = read_entries(path, head)
    todo = {problem.key.bucketed(): problem for problem in problems}
    todo = {key: problem for key, problem in todo.items() if key not in entries}
    failed = 0
    ordered = sorted(todo.items(), key=lambda item: (item[1].op == PLAN, -_cost(item[1])))
    for key, problem in tqdm(ordered, unit="problem", disable=None):
        if time.monotonic() > end:
            break
        choices = _runnable(candidates(problem.key, target), problem.key, target, device)
        table = dict(config.parse_entry(entry) for entry in entries.values())
        try:
            entries[key] = tune(problem, spread(choices, limit), judge, table).as_json()
        except UntunableError as error:
            failed += 1
            tqdm.write(str(error))
        else:
            tuned += 1
            write_table(path, head, entries)
    return tuned, failed


def _runnable(
    choices: list[config.Choice], key: config.ProblemKey, target: Target, device: torch.device
) -> list[config.Choice]:
    """Those that the device is trusted with, what an untuned problem runs as first."""
    found = [
        choice
        for choice in choices
        if choice.formulation not in BELOW_TRITON or below_triton.runs(device, choice.formulation)
    ]
    default = config.on_common_cores(key, target)
    return found if choices[0] in found else list(dict.fromkeys((default, *found)))


def _cost(problem: Problem) -> int:
    """Products of the layer, which its other passes take the longer for too."""
    layer = problem.layer
    return layer.pixels * layer.out_channels * layer.channels * layer.kernel_size**2


def rank(problem: Problem, target: Target, limit: int | None) -> list[dict[str, Any]]:
    """Compile the candidates and sort them: no spills first, then by tensor-core share."""
    ranked = []
    choices = candidates(problem.key, target) if problem.op != PLAN else []
    compiled = [choice for choice in choices if choice.formulation != "library"]
    for choice in spread(compiled, limit):
        launch = shipped.launches_of(problem, choice)[-1]
        made = aot.compile_launch(launch, target)
        if made.shared_bytes > target.shared_bytes:
            continue
        ranked.append(
            {
                "op": problem.op,
                "layer": shipped.describe(problem.layer),
                **asdict(choice),
                "registers": made.registers,
                "spill_bytes": made.spill_bytes,
                "shared_bytes": made.shared_bytes,
                "loop_instructions": made.loop.total(),
                "tensor_core_share": round(made.tensor_core_share, 4),
            }
        )
    return sorted(ranked, key=lambda row: (row["spill_bytes"] > 0, -row["tensor_core_share"]))


def main(argv: list[str]) -> int:
    """Command line."""
    arguments = _parser().parse_args(argv)
    problems = named_problems(arguments, (*STEP_OPS, "conv_real", PLAN), both_steps=True)
    if arguments.compile_only:
        target = parse_target(arguments.target)
        for problem in tqdm(problems, unit="problem", disable=None):
            for row in rank(problem, target, arguments.limit)[: arguments.top]:
                print(json.dumps(row))
        return 0
    if not torch.cuda.is_available():
        raise cli.UserError("no CUDA device to tune on; rank candidates with --compile-only")
    device = torch.device("cuda")
    gpu = torch.cuda.get_device_name(device)
    if arguments.gpu not in ("auto", gpu):
        raise cli.UserError(f"this GPU is {gpu!r}, not {arguments.gpu!r}")
    path = _table(arguments, gpu)
    with JudgeApart(device) as judge:
        tuned, failed = tune_all(
            problems,
            path,
            gpu,
            judge,
            target=target_of(device),
            limit=arguments.limit,
            end=time.monotonic() + 60 * arguments.minutes,
        )
    print(f"tuned {tuned} of {len(problems)} problems, {failed} could not be: {path}")
    return int(failed > 0)


def _table(arguments: argparse.Namespace, gpu: str) -> Path:
    """The table to write.

    Raises:
        cli.UserError: it cannot be.
    """
    try:
        path = config.table_path(gpu) if arguments.ship else config.own_path(gpu)
    except OSError as error:
        raise cli.UserError(
            f"no folder for a table: set TRITONBNN_CACHE to one ({error})"
        ) from error
    path = arguments.output or path
    writable(path)
    return path


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m tritonbnn.kernels.autotune", description=__doc__)
    add_problem_arguments(parser, "reactnet_a", (*OPS, PLAN))
    parser.add_argument("--gpu", default="auto", help="the GPU's name, to be sure of it")
    parser.add_argument("--limit", type=positive, help=f"{LIMIT_HELP}, for each problem")
    parser.add_argument("--output", type=Path, help="the table, instead of the user's own")
    parser.add_argument("--ship", action="store_true", help="write the package's own table")
    parser.add_argument(
        "--minutes", type=cli.minutes, default=math.inf, help="begin no problem after"
    )
    parser.add_argument("--compile-only", action="store_true", help="rank without a GPU")
    parser.add_argument("--target", default="sm_90", choices=TARGETS, help="of --compile-only")
    parser.add_argument("--top", type=positive, default=5, help="of --compile-only: rows a problem")
    return parser


if __name__ == "__main__":
    cli.run(main)

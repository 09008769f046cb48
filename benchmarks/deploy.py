"""A packed ReActNet-A against floats, on a CPU: times, layers, and memory.

    python -m benchmarks.deploy                       # all of it, one thread and all
    python -m benchmarks.deploy --only layers
    python -m benchmarks.deploy --batch 1 --threads 1 --json FILE

Rivals take turns in one process, and each number is a median. On one thread it is CPU time, which
other programs of the machine do not add to; on several it is wall time. What other people's
runtimes take part are those that are installed: pip install 'tritonbnn[bench]'.

A layer's speed is in GOPS, two operations a product of signs. Beside it stands its share of what
the loop reaches in the same run where all that it reads is in the first cache.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import deploy_layers
from benchmarks.deploy_layers import LAYERS
from benchmarks.deploy_memory import memory
from benchmarks.deploy_networks import PACKED, SIZE, Call, Maker, makers
from benchmarks.output import command
from tritonbnn import cli
from tritonbnn.files import writable, write_json
from tritonbnn.kernels.commands import positive
from tritonbnn.kernels.provenance import header

ROUNDS = 9
TURN_SECONDS = 0.05
Clock = Callable[[], float]


def clock_for(threads: int) -> Clock:
    """CPU time of this process where one thread works, else the time on the wall."""
    return time.process_time if threads == 1 else time.perf_counter


def turn(call: Call, clock: Clock) -> float:
    """Seconds of a call: the mean of as many as fill a turn. An untimed one goes before."""
    call()
    calls, start = 0, clock()
    while True:
        call()
        calls += 1
        taken = clock() - start
        if taken >= TURN_SECONDS:
            return taken / calls


def race(calls: Mapping[str, Call], rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of every turn, by rival."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(turn(call, clock))
    return taken


def networks(rivals: Mapping[str, Maker], batch: int, threads: int, rounds: int) -> dict[str, Any]:
    """A race of whole networks."""
    torch.set_num_threads(threads)
    images = torch.randn(batch, 3, SIZE, SIZE)
    calls = {name: maker(images) for name, maker in rivals.items()}
    seconds = race(calls, rounds, clock_for(threads))
    return {"batch": batch, "threads": threads, "seconds": seconds}


def describe(point: Mapping[str, Any]) -> list[str]:
    """A line for each rival, and how many times its time is the packed network's."""
    batch, threads, seconds = point["batch"], point["threads"], point["seconds"]
    own = median(seconds[PACKED])
    lines = [f"batch {batch}, threads {threads}: ms an image"]
    for name, times in seconds.items():
        middle = median(times)
        spread = (max(times) - min(times)) / 2 / middle
        each = 1e3 * middle / batch
        lines.append(f"  {name:34} {each:9.2f} ± {spread:4.0%} {middle / own:7.2f} x")
    return lines


def layers(rounds: int) -> dict[str, Any]:
    """GOPS of every layer and rival, and the peak of the loop: medians of the same rounds."""
    torch.set_num_threads(1)
    clock = clock_for(1)
    calls = {layer: deploy_layers.calls(*layer) for layer in LAYERS}
    taken: dict[tuple[int, int, int], list[dict[str, float]]] = {layer: [] for layer in LAYERS}
    peaks = []
    for _ in range(rounds):
        peaks.append(deploy_layers.peak(clock))
        for layer, rivals in calls.items():
            taken[layer].append({name: turn(call, clock) for name, call in rivals.items()})
    speeds = {}
    for layer, turns in taken.items():
        seconds = {name: median(t[name] for t in turns) for name in turns[0]}
        speeds[deploy_layers.title(*layer)] = deploy_layers.gops(*layer, seconds)
    return {"peak_gops": median(peaks), "gops": speeds}


def describe_layers(result: Mapping[str, Any]) -> list[str]:
    lines = [f"the loop alone: {result['peak_gops']:.0f} GOPS"]
    for name, speeds in result["gops"].items():
        share = speeds[PACKED] / result["peak_gops"]
        others = ", ".join(f"{rival} {gops:.0f}" for rival, gops in speeds.items())
        lines.append(f"  {name:12} {others} GOPS; packed is at {share:.0%} of the loop")
    return lines


def describe_memory(held: Mapping[str, Mapping[str, int]]) -> list[str]:
    return [
        f"  {name:12} {', '.join(f'{kind} {count / 1e6:.1f} MB' for kind, count in kinds.items())}"
        for name, kinds in held.items()
    ]


def parser() -> cli.Parser:
    result = cli.Parser(prog="python -m benchmarks.deploy", description=__doc__.split("\n")[0])
    result.add_argument("--batch", type=positive, nargs="+", default=[1, 8], help="images")
    everything = torch.get_num_threads()
    result.add_argument("--threads", type=positive, nargs="+", default=sorted({1, everything}))
    result.add_argument("--rounds", type=positive, default=ROUNDS)
    result.add_argument(
        "--rivals", nargs="+", help="whole networks beside packed; all that are installed if absent"
    )
    result.add_argument(
        "--only", choices=("race", "layers", "memory"), help="a part; all where it is left out"
    )
    result.add_argument("--json", type=Path, help="write the result here")
    return result


def main(argv: list[str]) -> int:
    args: argparse.Namespace = parser().parse_args(argv)
    path = writable(args.json)
    rivals = makers(args.rivals)
    result = header(command("deploy", argv), torch.device("cpu")) | {"rounds": args.rounds}
    torch.set_grad_enabled(False)
    if args.only in (None, "race"):
        result["race"] = []
        for threads in args.threads:
            for batch in args.batch:
                result["race"].append(networks(rivals, batch, threads, args.rounds))
                print("\n".join(describe(result["race"][-1])), flush=True)
    if args.only in (None, "layers"):
        result["layers"] = layers(args.rounds)
        print("\n".join(describe_layers(result["layers"])), flush=True)
    if args.only in (None, "memory"):
        result["memory"] = memory()
        print("\n".join(describe_memory(result["memory"])))
    if path:
        write_json(path, result)
    return 0


if __name__ == "__main__":
    cli.run(main)

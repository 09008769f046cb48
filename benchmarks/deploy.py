"""A packed ReActNet-A against floats, on a CPU: times, layers, and memory.

    python -m benchmarks.deploy                       # all of it, one thread and all
    python -m benchmarks.deploy --batch 1 --threads 1 --json FILE

Rivals take turns in one process, and each number is a median. They are:

- packed: the engine of tritonbnn.deploy
- ours: the same network's own eval mode in torch
- twin: the float twin of benchmarks/twin.py, eager, traced and frozen, or compiled and frozen
- resnet18: torchvision's, eager
- openvino, onnxruntime: the float twin in these, where they are installed

A layer's speed is in GOPS, two operations a product of signs, and beside it stands the share of the
fastest layer's in the same run. Memory is resident, measured in a process of its own for each.
"""

import argparse
import gc
import importlib.util
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from benchmarks.output import command
from benchmarks.twin import FloatReActNetA
from tritonbnn import cli
from tritonbnn.deploy import Engine
from tritonbnn.deploy.fold import fold
from tritonbnn.deploy.packed import Packed, Unit
from tritonbnn.files import writable, write_json
from tritonbnn.kernels.commands import positive
from tritonbnn.kernels.provenance import header
from tritonbnn.models import build_model

SIZE, ROUNDS = 224, 7
PACKED = "packed"
LAYERS = ((3, 128, 56), (3, 256, 28), (3, 512, 14), (3, 1024, 7), (1, 512, 14))
Call = Callable[[], Any]


def frozen(model: nn.Module, images: Tensor) -> nn.Module:
    """The model traced, its parameters constants and its BatchNorms folded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sizes are constants in a trace
        return torch.jit.freeze(torch.jit.trace(model, images))


def compiled(model: nn.Module) -> nn.Module:
    """The model through inductor, its parameters constants."""
    return torch.compile(model, options={"freezing": True})


def rivals(images: Tensor, *, slow: bool) -> dict[str, Call]:
    """What takes turns, by name; each answers the images."""
    network = build_model("reactnet_a").eval()
    engine = Engine(fold(network))
    twin, resnet = FloatReActNetA().eval(), torchvision.models.resnet18().eval()
    twin.fc = nn.Linear(twin.fc.in_features, twin.fc.out_features)  # ours cannot be traced
    calls: dict[str, Call] = {
        PACKED: lambda: engine(images),
        "ours": lambda: network(images),
        "twin": lambda: twin(images),
        "resnet18": lambda: resnet(images),
    }
    fast = frozen(twin, images)
    calls["twin, frozen"] = lambda: fast(images)
    if slow:
        best = compiled(twin)
        calls["twin, compiled and frozen"] = lambda: best(images)
    calls |= optional_rivals(twin, images)
    return calls


def optional_rivals(twin: nn.Module, images: Tensor) -> dict[str, Call]:
    """The float twin in other people's engines, as far as they are installed."""
    calls: dict[str, Call] = {}
    threads = torch.get_num_threads()
    if importlib.util.find_spec("openvino"):
        import openvino

        model = openvino.convert_model(twin, example_input=images)
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        run = openvino.compile_model(model, "CPU", settings)
        array = images.numpy()
        calls["openvino, float32"] = lambda: run(array)
    return calls


def race(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of every turn, by rival; an untimed call goes before each turn."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return taken


def layer(kernel: int, channels: int, size: int) -> Packed:
    """A network of one unit that keeps its channels, behind a stem that makes them."""
    random = np.random.default_rng(0)

    def vector(count: int) -> np.ndarray:
        return random.standard_normal(count, np.float32)

    width = -(-channels // 8)
    weight = random.integers(0, 256, (channels, kernel, kernel, width), np.uint8)
    vectors = [vector(channels) for _ in range(5)]
    unit = Unit(channels, channels, kernel, 1, "identity", weight, *vectors)
    return Packed(
        in_channels=1,
        size_multiple=1,
        stem_weight=vector(channels).reshape(channels, 1, 1, 1),
        stem_offset=vector(channels),
        stem_stride=1,
        stem_pools=False,
        units=(unit,),
        head_weight=vector(2 * channels).reshape(2, channels),
        head_offset=vector(2),
    )


def layer_gops(rounds: int) -> dict[str, float]:
    """GOPS of a unit on one thread: of 20 in a row, less those of one."""
    speeds = {}
    for kernel, channels, size in LAYERS:
        one = layer(kernel, channels, size)
        many = Packed(**{**vars(one), "units": one.units * 21})
        images = np.random.default_rng(1).standard_normal((1, 1, size, size), np.float32)
        calls = {"one": partial(Engine(one, 1), images), "many": partial(Engine(many, 1), images)}
        taken = {name: median(times) for name, times in race(calls, 3 * rounds).items()}
        operations = 2 * kernel**2 * channels**2 * size**2
        seconds = (taken["many"] - taken["one"]) / 20
        speeds[f"{kernel}x{kernel} {channels}@{size}"] = operations / seconds / 1e9
    return speeds


RESIDENT = """
import sys, torch
torch.set_num_threads(1)
from benchmarks.deploy import resident
print(resident(sys.argv[1]))
"""


def resident(name: str) -> int:
    """Bytes that a network adds to this process, once it has answered one image."""
    torch.set_grad_enabled(False)
    images = torch.zeros(1, 3, SIZE, SIZE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.tbnn"
        if name == PACKED:
            subprocess.run([sys.executable, "-c", _EXPORT, str(path)], check=True)
            from tritonbnn import deploy

            Engine(layer(1, 16, 4), 1)(np.zeros((1, 1, 4, 4), np.float32))  # the library itself
            before = _resident()
            model: Any = deploy.load(path, threads=1)
        else:
            nn.Conv2d(3, 8, 3)(images)
            before = _resident()
            model = FloatReActNetA().eval()
        model(images)
        gc.collect()
        return _resident() - before


_EXPORT = """
import sys
from tritonbnn import deploy
from tritonbnn.models import build_model
deploy.export(build_model("reactnet_a").eval(), sys.argv[1])
"""


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def memory() -> dict[str, int]:
    """Resident bytes of the packed network and of its twin, each in a new process."""
    return {
        name: int(subprocess.check_output([sys.executable, "-c", RESIDENT, name], text=True))
        for name in (PACKED, "twin")
    }


def describe(batch: int, threads: int, taken: dict[str, list[float]]) -> list[str]:
    """A line for each rival, and how many times as fast the packed network is."""
    own = median(taken[PACKED])
    lines = [f"batch {batch}, {threads} threads, ms an image"]
    for name, times in taken.items():
        middle = median(times)
        spread = (max(times) - min(times)) / 2 / middle
        each = 1e3 * middle / batch
        lines.append(f"  {name:26} {each:9.2f} ± {spread:4.0%} {middle / own:7.1f} x")
    return lines


def parser() -> cli.Parser:
    result = cli.Parser(prog="python -m benchmarks.deploy", description=__doc__.split("\n")[0])
    result.add_argument("--batch", type=positive, nargs="+", default=[1, 8], help="images")
    everything = torch.get_num_threads()
    result.add_argument("--threads", type=positive, nargs="+", default=sorted({1, everything}))
    result.add_argument("--rounds", type=positive, default=ROUNDS)
    result.add_argument("--compiled", action="store_true", help="compile the twin too: minutes")
    result.add_argument(
        "--only", choices=("race", "layers", "memory"), help="a part; all where it is left out"
    )
    result.add_argument("--json", type=Path, help="write the result here")
    return result


def main(argv: list[str]) -> int:
    args: argparse.Namespace = parser().parse_args(argv)
    path = writable(args.json)
    result = header(command("deploy", argv), torch.device("cpu")) | {"rounds": args.rounds}
    torch.set_grad_enabled(False)
    if args.only in (None, "race"):
        result["race"] = []
        for threads in args.threads:
            torch.set_num_threads(threads)
            for batch in args.batch:
                images = torch.randn(batch, 3, SIZE, SIZE)
                taken = race(rivals(images, slow=args.compiled), args.rounds)
                print("\n".join(describe(batch, threads, taken)), flush=True)
                result["race"].append({"batch": batch, "threads": threads, "seconds": taken})
    if args.only in (None, "layers"):
        result["layers"] = speeds = layer_gops(args.rounds)
        for name, gops in speeds.items():
            share = gops / max(speeds.values())
            print(f"  {name:12} {gops:7.0f} GOPS, {share:4.0%} of the fastest")
    if args.only in (None, "memory"):
        result["resident_bytes"] = held = memory()
        for name, count in held.items():
            print(f"  {name:12} {count / 1e6:7.1f} MB resident")
    if path:
        write_json(path, result)
    return 0


if __name__ == "__main__":
    cli.run(main)

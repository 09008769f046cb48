"""Run the package's commands as processes of their own, without importing torch for each."""

import atexit
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
TRAIN, EVALUATE, PREDICT = "tritonbnn.train.__main__", "tritonbnn.evaluate", "tritonbnn.predict"
ANALYZE, COMPARE = "tritonbnn.analyze", "tritonbnn.compare.__main__"
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PRELOADED = (TRAIN, EVALUATE, PREDICT, COMPARE, "torch.utils.tensorboard")

# trains both steps in about half a second, and saves after every optimiser step
TINY = """
dataset = "images"
model = "birealnet_18"
width = 0.125
small_images = true
image_size = 16
batch_size = 8
epochs = 2
lr = 2e-3
device = "cpu"
save_minutes = 0
log_interval = 1

[step1]
weight_decay = 5e-6
"""


@dataclass(frozen=True)
class Result:
    """How a command ended.

    Attributes:
        code: its exit code; negative for the signal that ended it.
        output: what it printed, stdout and stderr together.
        calls: how many writes, fsyncs and renames it made; 0 if it was killed.
        seconds: how long it ran.
    """

    code: int
    output: str
    calls: int
    seconds: float


@cache
def _zygote() -> subprocess.Popen:
    environ = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "zygote.py"), *PRELOADED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environ,
        cwd=ROOT,
    )
    atexit.register(process.communicate)  # the end of its input ends it
    return process


def run(
    module: str,
    *argv: object,
    cwd: Path,
    mishap: str | None = None,
    at_call: int = 0,
    at_step: int = 0,
    at_file: int = 0,
    kill_after: float | None = None,
    kill_with: str = "SIGKILL",
    stdout: str = "",
    encoding: str = "utf-8",
    environ: dict[str, str] | None = None,
) -> Result:
    """Run a command to its end.

    Args:
        module: whose ``main`` it is.
        argv: its arguments.
        cwd: the folder to run it in.
        mishap: "death", "full disk", a signal's name, or that name and "twice".
        at_call: which call that makes a file last meets it, from 1.
        at_step: or which optimiser step.
        at_file: or which file, as it is listed.
        kill_after: seconds after which it is killed.
        kill_with: the signal for it.
        stdout: where it goes if not into the output: a path, or "closed pipe".
        encoding: of the output.
        environ: more environment variables.
    """
    process = {"environ": environ or {}, "mishap": mishap, "output": str(cwd / "output.txt")}
    process["stdout"] = stdout
    order = {"at_call": at_call, "at_step": at_step, "at_file": at_file}
    order |= {"kill_after": kill_after, "kill_with": kill_with}
    [result] = _carry_out(module, argv, cwd, order, [process], encoding)
    return result


def run_two(
    module: str,
    *argv: object,
    cwd: Path,
    mishap: str | None = None,
    at_step: int = 0,
    second: Sequence[object] = (),
) -> list[Result]:
    """Run a command in two processes that meet as under torchrun.

    Args:
        module: whose ``main`` it is.
        argv: arguments of both.
        cwd: the folder to run it in.
        mishap: what rank 1 meets, as in :func:`run`.
        at_step: which optimiser step meets it.
        second: more arguments for rank 1.
    """
    environ = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    processes = [
        {
            "environ": {**environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            "mishap": mishap if rank == 1 else None,
            "argv": [str(word) for word in second] if rank == 1 else [],
            "output": str(cwd / f"output-{rank}.txt"),
            "stdout": "",
        }
        for rank in range(2)
    ]
    order = {"at_call": 0, "at_step": at_step, "at_file": 0}
    order |= {"kill_after": None, "kill_with": ""}
    return _carry_out(module, argv, cwd, order, processes)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _carry_out(
    module: str,
    argv: Iterable[object],
    cwd: Path,
    order: dict,
    processes: list[dict],
    encoding: str = "utf-8",
) -> list[Result]:
    order |= {"module": module, "argv": [str(a) for a in argv], "cwd": str(cwd)}
    zygote = _zygote()
    assert zygote.stdin
    assert zygote.stdout
    zygote.stdin.write(json.dumps({**order, "processes": processes}) + "\n")
    zygote.stdin.flush()
    answers = json.loads(zygote.stdout.readline())
    outputs = [Path(process["output"]).read_text(encoding) for process in processes]
    return [Result(output=o, **a) for o, a in zip(outputs, answers, strict=True)]


def write_tree(root: Path, *, train: int = 8, val: int = 3, classes: Sequence[str] = "ab") -> Path:
    """A tree of small images whose classes differ in brightness."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                dark = 160 * number // len(classes)
                pixels = random.integers(dark, dark + 96, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def write_tiny(folder: Path) -> Path:
    """A recipe that trains in a moment, and its images; returns the recipe's file."""
    write_tree(folder / "images")
    recipe = folder / "tiny.toml"
    recipe.write_text(f'data_dir = "{folder / "images"}"\n{TINY}')
    return recipe

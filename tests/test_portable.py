"""On systems that lack what Linux has, training, scoring and predicting on a CPU go on."""

import os
import subprocess
import sys

import pytest

from tests.commands import ROOT, write_tiny

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
HIDING = """
import ctypes, os, signal, sys
for name in ("fcntl", "resource", "triton", "grp", "termios"):
    sys.modules[name] = None  # an import of it fails
for name in ("SIGHUP", "SIGUSR1"):
    delattr(signal, name)
for name in ("O_DIRECTORY", "getuid", "pwrite"):
    delattr(os, name)
real, sys.platform = ctypes.CDLL.__init__, "darwin"

def init(library, name, *arguments, **keywords):
    if name is None:
        raise TypeError("there is no library without a name")
    real(library, name, *arguments, **keywords)

ctypes.CDLL.__init__ = init
"""

USING = """
from tritonbnn import cli, evaluate, predict
from tritonbnn.train.__main__ import main as train
cli.log_to_stderr()
assert train(["tiny.toml", "--out", "run"]) == 0
assert train(["tiny.toml", "--out", "run"]) == 0
assert evaluate.main(["run"]) == 0
assert predict.main(["run", "images/val"]) == 0
"""


def python(code, cwd, *flags):
    """A process of its own that runs the code."""
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TRITONBNN_CACHE": str(cwd / "cache"),
            **NO_GPU,
        },
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_without_what_only_linux_has(tmp_path):
    """torch is imported first: whether it runs there is its own matter."""
    write_tiny(tmp_path)
    first = "import torch, torchvision, torch.utils.tensorboard, tqdm, matplotlib\n"
    done = python(first + HIDING + USING, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "this system has no locks: start no second run in run" in done.stderr
    assert "the C sources are compiled on POSIX systems only" in done.stderr
    assert (tmp_path / "run" / "step2" / "best.safetensors").exists()


@pytest.mark.slow
def test_a_run_leaves_no_file_open(tmp_path):
    write_tiny(tmp_path)
    code = """
from tritonbnn.train.__main__ import main
assert main(["tiny.toml", "--out", "run", "--epochs", "1"]) == 0
"""
    done = python(code, tmp_path, "-W", "ignore", "-W", "always::ResourceWarning")
    assert done.returncode == 0, done.stderr
    assert "ResourceWarning" not in done.stderr

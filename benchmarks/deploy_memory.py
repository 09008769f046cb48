"""What a network holds in memory, each in a process of its own: ``resident(name)`` is its part."""

import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.deploy_layers import network
from benchmarks.deploy_networks import PACKED, SIZE, float_twin
from tritonbnn import deploy
from tritonbnn.deploy import Engine
from tritonbnn.models import build_model

TWIN = "float twin"
_CHILD = """
import json, sys, torch
torch.set_num_threads(1)
torch.set_grad_enabled(False)
from benchmarks.deploy_memory import resident
print(json.dumps(resident(sys.argv[1])))
"""
_EXPORT = "import sys; from benchmarks.deploy_memory import export; export(sys.argv[1])"


def memory() -> dict[str, dict[str, int]]:
    """Bytes by kind of the packed network and of its twin, each measured in a new process."""
    return {
        name: json.loads(subprocess.check_output([sys.executable, "-c", _CHILD, name], text=True))
        for name in (PACKED, TWIN)
    }


def export(path: str) -> None:
    """Write a packed ReActNet-A."""
    deploy.export(build_model("reactnet_a").eval(), path)


def resident(name: str) -> dict[str, int]:
    """Bytes that a network adds to this process, loaded and after one image.

    "weights" and "scratch" are those of the engine's own arrays, or of the twin's parameters.
    """
    images = torch.zeros(1, 3, SIZE, SIZE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.tbnn"
        if name == PACKED:
            subprocess.run([sys.executable, "-c", _EXPORT, str(path)], check=True)
            # the library itself is loaded before
            Engine(network(1, 16, 4, 1), 1)(np.zeros((1, 1, 4, 4), np.float32))
        else:
            nn.Conv2d(3, 8, 3)(images)
        before = _resident()
        model: Any = deploy.load(path, threads=1) if name == PACKED else float_twin()
        loaded = _settled() - before
        model(images)
        ran = _settled() - before
        kinds = {"resident, loaded": loaded, "resident, after an image": ran}
        if name == PACKED:
            return kinds | model.memory() | {"file": path.stat().st_size}
        return kinds | {"weights": sum(t.nbytes for t in model.state_dict().values())}


def _settled() -> int:
    gc.collect()
    return _resident()


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096

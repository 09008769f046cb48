"""What a number was measured on: device, driver, versions and commit."""

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from tritonbnn.kernels.timing import measured_on

ROOT = Path(__file__).parents[1]


WRITTEN = ("benchmarks/results", "tritonbnn/kernels/configs", "README.md")
"""What measuring writes itself."""


def commit() -> str:
    """The commit of this checkout, marked if its code differs from it; "unknown" outside of one."""
    short = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--", ".", *(f":(exclude){path}" for path in WRITTEN))
    return f"{short}-dirty" if short and changed else short or "unknown"


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()


def processor() -> str:
    """The CPU's model name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def own_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def folder_name(device: torch.device) -> str:
    """The folder of a device's results: ``nvidia-h100-80gb-hbm3``, ``cpu-amd-epyc-2-cores``."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"cpu {processor()} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def header(command: str, device: torch.device | None = None) -> dict[str, str | int]:
    """Device, versions, commit and command, to stand above a table of results.

    Args:
        command: the line that printed them.
        device: where they were measured; by default the GPU if there is one.
    """
    device = device or own_device()
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        **({"driver": measured_on(device)["driver"]} if cuda else {}),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "triton": version("triton"),
        "commit": commit(),
        "command": command,
    }

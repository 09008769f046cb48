"""What a number was measured on: device, driver, versions and commit."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
WRITTEN = ("benchmarks/results", "tritonbnn/kernels/configs", "README.md")
"""What measuring writes itself."""


def own_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's model name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions(device: torch.device) -> dict[str, str]:
    """Of torch and Triton, and of a GPU's driver."""
    driver = {"driver": _driver()} if device.type == "cuda" else {}
    return {**driver, "torch": version("torch"), "triton": version("triton")}


def header(command: str, device: torch.device | None = None) -> dict[str, str | int]:
    """Device, versions, commit and command, to stand above a table of results.

    Args:
        command: the line that printed them.
        device: where they were measured; by default the GPU if there is one.
    """
    device = device or own_device()
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions(device),
        "commit": commit(),
        "command": command,
    }


def commit(root: Path = ROOT) -> str:
    """The commit of a checkout, marked if its code differs from it; "unknown" outside of one."""
    if not _git(root, "ls-files", "tritonbnn"):  # another repository may surround an installation
        return "unknown"
    excluded = [f":(exclude){path}" for path in WRITTEN]
    changed = _git(root, "status", "--porcelain", "--", ".", *excluded)
    return _git(root, "rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # a machine without git
        return ""
    return done.stdout.strip()


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.split()[0]

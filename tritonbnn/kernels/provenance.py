"""What a number was measured on: device, driver, versions and commit."""

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
WRITTEN = (
    *("benchmarks/results", "tritonbnn/kernels/configs"),
    *("README.md", "docs/results.md", "docs/deploy.md"),
)
"""What measuring writes itself."""

CPUINFO = Path("/proc/cpuinfo")
INSTRUCTIONS = (
    *("avx2", "avx512f", "avx512_vpopcntdq", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "bf16", "i8mm", "sve"),
)
"""Of a processor's flags, those that decide how fast signs, bits and bf16 are multiplied."""


def own_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's model name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_facts().get("model name") or platform.processor() or platform.machine()


def cpu_facts() -> dict[str, str]:
    """What Linux says of the first processor, such as its "model name"; nothing elsewhere."""
    text = CPUINFO.read_text().partition("\n\n")[0] if CPUINFO.exists() else ""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def cpu_model() -> str:
    """Family, model and stepping: a virtual machine's name, such as "AMD EPYC", fits many."""
    facts = cpu_facts()
    known = [f"{word} {facts[key]}" for word, key in _NUMBERS.items() if key in facts]
    return ", ".join(known) or platform.machine()


_NUMBERS = {"family": "cpu family", "model": "model", "stepping": "stepping"}


def cpu_instructions() -> list[str]:
    """Those of :data:`INSTRUCTIONS` that the processor has."""
    facts = cpu_facts()
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return [name for name in INSTRUCTIONS if name in flags]


def folder_name(device: torch.device) -> str:
    """The folder of a device's results, different for machines that differ in what matters.

    ``nvidia-h100-80gb-hbm3``; a CPU's has the numbers of its family, model and stepping, the widest
    of its instructions and its cores: ``cpu-amd-epyc-26-17-0-avx512f-vpopcntdq-bf16-2-cores``.
    """
    name = device_name(device)
    if device.type == "cpu":
        facts = cpu_facts()
        numbers = [facts[key] for key in _NUMBERS.values() if key in facts]
        name = " ".join(["cpu", name, *numbers, *_widest(), str(os.cpu_count()), "cores"])
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _widest() -> list[str]:
    """The instructions, but for the narrower of a kind, and each prefix said once."""
    found = cpu_instructions()
    for wide, narrow in (("avx512f", "avx2"), ("asimddp", "asimd")):
        if wide in found and narrow in found:
            found.remove(narrow)
    said: list[str] = []
    for name in found:
        kind, _, rest = name.partition("_")
        said.append(rest if rest and any(s.startswith(kind) for s in said) else name)
    return said


def versions(device: torch.device) -> dict[str, str]:
    """Of torch and Triton, and of a GPU's driver."""
    driver = {"driver": _driver()} if device.type == "cuda" else {}
    return {**driver, "torch": version("torch"), "triton": version("triton")}


def header(command: str, device: torch.device | None = None) -> dict[str, Any]:
    """Device, versions, commit and command, to stand above a table of results.

    Args:
        command: the line that printed them.
        device: where they were measured; by default the GPU if there is one.
    """
    device = device or own_device()
    return {
        "device": device_name(device),
        "cpu": cpu_model(),
        "instructions": cpu_instructions(),
        "cores": os.cpu_count(),
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

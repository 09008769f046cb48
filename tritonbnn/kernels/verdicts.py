"""Which formulations may run on this GPU: those that were exact in a process of their own.

An instruction that a GPU lacks ends the process that launched it, and a kernel without an end
hangs it. So the one-bit tensor core is tried in a child, with a time limit, before anything here
uses it (:mod:`tritonbnn.kernels.trial`). The verdict is kept in the user's cache, by GPU, driver,
Triton and the kernels' own sources.
"""

import hashlib
import json
import logging
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch

from tritonbnn.cli import UserError
from tritonbnn.compiled.build import cache_folder, locked
from tritonbnn.files import write_json

TRIAL = "tritonbnn.kernels.trial"
SECONDS = 300
"""After which a child is ended. Its kernels are compiled in that time too."""

logger = logging.getLogger(__name__)

inside = False
"""Whether this process is such a child, which may run anything."""


@dataclass(frozen=True)
class Verdict:
    """What came of a trial.

    Attributes:
        exact: whether every sum was right.
        reason: why not, in one line; empty if it was.
        tried: how many problems and tiles were.
        seconds: that it took.
    """

    exact: bool
    reason: str
    tried: int
    seconds: float


def trusted(device: torch.device, formulation: str) -> bool:
    """Whether a formulation may run in this process: it was exact in a child, now or before.

    Args:
        device: a GPU.
        formulation: one that :mod:`tritonbnn.kernels.trial` tries.
    """
    return inside or verdict(device, formulation).exact


@lru_cache
def verdict(device: torch.device, formulation: str) -> Verdict:
    """From the cache, else of a child. One process of a machine asks, and the others wait."""
    facts = facts_of(device)
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    try:
        folder = cache_folder() / "verdicts"
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            path = folder / f"{name}.json"
            known = _read(path)
            if formulation not in known:
                known[formulation] = _told(device, formulation)
                rows = {each: asdict(found) for each, found in known.items()}
                write_json(path, {**facts, "verdicts": rows})
            return known[formulation]
    except (OSError, UserError) as error:  # no folder that can be written
        logger.warning("the verdict on %s cannot be kept: %s", formulation, error)
        return _told(device, formulation)


def facts_of(device: torch.device) -> dict[str, str]:
    """What a verdict holds for. A driver counts by its API, which a patch of it does not change."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()
    cuda = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else device.type,
        "driver": str(torch._C._cuda_getDriverVersion()) if cuda else "",  # type: ignore[attr-defined]
        "triton": version("triton"),
        "kernels": digest[:16],
    }


def _read(path: Path) -> dict[str, Verdict]:
    """The verdicts of a file; none if there is no such file, or somebody has changed it."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["verdicts"]
        found = {name: Verdict(**row) for name, row in rows.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {name: each for name, each in found.items() if type(each.exact) is bool}


def _told(device: torch.device, formulation: str) -> Verdict:
    """The verdict of a child, with a line that says it."""
    found = ask(device, formulation)
    said = "exact" if found.exact else f"not used, as {found.reason}"
    logger.info("tried %s on %s in a process of its own: %s", formulation, device, said)
    return found


def ask(device: torch.device, formulation: str, seconds: float = SECONDS) -> Verdict:
    """Try a formulation in a child of this process, however that ends."""
    command = [sys.executable, "-m", TRIAL, formulation, "--child", "--device", str(device)]
    start = time.monotonic()
    wrong, tried = _answer(command, seconds)
    if not wrong and not tried:
        wrong = "there is nothing to try it on"
    return Verdict(not wrong, wrong, tried, round(time.monotonic() - start, 1))


def _answer(command: list[str], seconds: float) -> tuple[str, int]:
    """What is wrong, in one line, and how many cases were tried."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it did not end in {seconds:g} s", 0
    if done.returncode:
        said = done.stderr.strip().splitlines()
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"code {done.returncode}"
        return f"its process ended with {how}" + (f": {said[-1][:200]}" if said else ""), 0
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        return "; ".join(answer["wrong"]), int(answer["tried"])
    except (ValueError, IndexError, KeyError, TypeError):
        return "its process gave no answer", 0

"""Where the checkout is, and where in it a device's results are."""

import os
import re
from pathlib import Path

import torch

from tritonbnn.kernels.provenance import device_name

ROOT = Path(__file__).parents[1]


def folder_name(device: torch.device) -> str:
    """The folder of a device's results: ``nvidia-h100-80gb-hbm3``, ``cpu-amd-epyc-2-cores``."""
    name = device_name(device)
    if device.type == "cpu":
        name = f"cpu {name} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

"""The checkout as torch.hub takes it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import gradient
from tritonbnn.models import MODELS, build_model

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", MODELS)
def test_torch_hub_builds_every_network(name):
    torch.manual_seed(0)
    model = torch.hub.load(str(ROOT), name, source="local", width=0.25, small_images=True)
    torch.manual_seed(0)
    twin = build_model(name, width=0.25, small_images=True)
    x = gradient(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), twin.eval()(x))


def test_torch_hub_needs_no_installed_package(tmp_path):
    """It brings the checkout alone; the network runs after that has left the search path."""
    code = (
        "import torch\n"
        f"model = torch.hub.load({str(ROOT)!r}, 'binarynet', source='local', width=.25)\n"
        "print(model(torch.zeros(2, 3, 32, 32)).shape[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "1000\n"), done.stderr

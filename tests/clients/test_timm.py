"""timm: its registry, its feature extraction, and scripts of its own."""

import subprocess
import sys

import pytest
import torch

from tests.clients import client
from tests.helpers import gradient
from tritonbnn.models import MODELS, build_model

timm = client("timm")
SMALL = {"width": 0.25, "small_images": True}


@pytest.fixture(autouse=True)
def registered():
    import tritonbnn.timm  # noqa: F401


def test_timm_lists_every_network():
    assert set(timm.list_models("tritonbnn_*")) == {f"tritonbnn_{name}" for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_timm_builds_a_network_with_its_facts(name):
    torch.manual_seed(0)
    model = timm.create_model(f"tritonbnn_{name}", num_classes=3, in_chans=1, drop_rate=0, **SMALL)
    torch.manual_seed(0)
    twin = build_model(name, num_classes=3, in_channels=1, **SMALL)
    x = gradient(2, 1, 32, 32)
    assert torch.equal(model.eval()(x), twin.eval()(x))
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["mean"]) == ((3, 32, 32), twin.default_cfg["mean"])
    headless = timm.create_model(f"tritonbnn_{name}", num_classes=0, global_pool="", **SMALL)
    assert headless(gradient(2, 3, 32, 32)).shape[:2] == (2, model.num_features)


@pytest.mark.parametrize("name", ["reactnet_a", "reactnet_18", "birealnet_18"])
@pytest.mark.parametrize("small", [True, False])
def test_timm_takes_features(name, small):
    model = timm.create_model(
        f"tritonbnn_{name}", features_only=True, width=0.25, small_images=small
    ).eval()
    x = gradient(1, 3, 64, 96)
    body, seen = model["body"], {}
    for info in body.feature_info:
        body.get_submodule(info["module"]).register_forward_hook(
            lambda m, args, y, key=info["module"]: seen.update({key: y})
        )
    features = model(x)
    assert [y.shape[1] for y in features] == model.feature_info.channels()
    assert [64 // y.shape[2] for y in features] == model.feature_info.reduction()
    for y, info in zip(features, body.feature_info, strict=True):
        assert y is seen[info["module"]]
    assert torch.equal(features[-1], body.forward_features(x))


def test_what_a_network_has_not_is_said():
    with pytest.raises(ValueError, match="has no streams that features_only could return"):
        timm.create_model("tritonbnn_binarynet", features_only=True)
    with pytest.raises(ValueError, match=r"drop nothing: drop_rate must be 0, not 0\.1"):
        timm.create_model("tritonbnn_reactnet_a", drop_rate=0.1)


SCRIPT = """
import sys
import beside, timm.optim, torch
if __name__ == "__main__":
    model = timm.create_model(sys.argv[2], num_classes=beside.CLASSES, width=.25)
    optimizer = timm.optim.create_optimizer_v2(model, "lamb", lr=.01, weight_decay=.05,
                                               layer_decay=.7)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    print(sys.argv[1:], len(optimizer.param_groups) > 10)
    sys.exit(3)
"""


def test_a_script_of_timms_runs_with_the_networks(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("CLASSES = 3\n")
    command = [sys.executable, "-m", "tritonbnn.timm", tmp_path / "train.py"]
    done = subprocess.run(
        [*command, "--model", "tritonbnn_reactnet_a"], capture_output=True, text=True, check=False
    )
    assert (done.stderr, done.returncode) == ("", 3)
    assert done.stdout == "['--model', 'tritonbnn_reactnet_a'] True\n"

"""Hugging Face: networks on its hub, and what transformers leaves to reset_parameters."""

import torch
from torch import nn

from tests.clients import client
from tests.helpers import gradient
from tritonbnn.models import build_model
from tritonbnn.nn import BinaryConv2d, BinaryLinear, BinaryUnit, RPReLU, RSign

SMALL = {"width": 0.25, "num_classes": 3, "small_images": True}


def test_a_network_with_the_hubs_mixin_is_saved_and_loaded(tmp_path):
    hub = client("huggingface_hub")

    class Hubbed(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self, name: str, width: float):
            super().__init__()
            self.net = build_model(name, **{**SMALL, "width": width})

        def forward(self, x):
            return self.net(x)

    model = Hubbed("reactnet_a", width=0.25).eval()
    model.save_pretrained(tmp_path)
    again = Hubbed.from_pretrained(tmp_path).eval()
    x = gradient(2, 3, 32, 32)
    assert torch.equal(again(x), model(x))


def test_what_a_checkpoint_lacks_is_initialised_by_transformers(tmp_path):
    """It builds on meta, and calls a hook of the model for each module that lacks something."""
    transformers = client("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "tritonbnn_test"

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.body = nn.Sequential(
                RSign(8), BinaryConv2d(8, 8, 3, padding=1, bias=True, shift=True), RPReLU(8)
            )
            self.unit, self.head = BinaryUnit(8, 8, 3), BinaryLinear(8, 3, bias=True)
            self.post_init()

        def _init_weights(self, module):
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

        def forward(self, x):
            return self.head(self.unit(self.body(x)).mean((2, 3)))

    model = Model(Config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    kept = {"unit.weight": model.unit.weight}
    model.save_pretrained(tmp_path, state_dict=dict(kept))
    torch.manual_seed(0)
    again = Model.from_pretrained(tmp_path)
    assert torch.equal(again.unit.weight, model.unit.weight)
    fresh = Model(Config()).state_dict()
    for name, value in again.state_dict().items():
        if name in kept:
            continue
        if ("weight" in name and value.dim() > 1) or name in ("body.1.bias", "head.bias"):
            assert 0.3 < value.std() / fresh[name].std() < 3, name
        else:
            assert torch.equal(value, fresh[name]), name

"""What is saved for backward: counted through autograd's hooks, and seen in live memory."""

import pytest
import torch

from benchmarks.baseline import ObviousReActNetA
from benchmarks.expert import ExpertReActNetA
from benchmarks.saved import saved_bytes, saved_slope
from tritonbnn.models import build_model


def images(count):
    return torch.randn(count, 3, 224, 224).contiguous(memory_format=torch.channels_last)


def allocated_by(call):
    """Bytes that ``call`` allocates and does not free, as the allocator reports them."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        result = call()
    return sum(event.self_cpu_memory_usage for event in profile.key_averages()), result


def test_the_baseline_is_the_obvious_one():
    saved = saved_slope(ObviousReActNetA(), images)
    assert saved.per_image == pytest.approx(185, abs=8)
    assert saved.per_batch == pytest.approx(113, abs=2)


def test_the_expert_saves_one_tensor_where_the_masks_save_many():
    assert saved_slope(ExpertReActNetA(), images).per_image == pytest.approx(85.3, abs=0.2)


class Autocast(torch.nn.Module):
    """A network under bf16 autocast."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.network(x)


@pytest.mark.parametrize(
    ("options", "bf16", "limit"),
    [
        pytest.param({"plan": "recompute"}, False, 26, id="recompute-fp32"),
        pytest.param({"plan": "recompute"}, True, 13, id="recompute-bf16"),
        # and two bytes of each of the 4.64 M output elements
        pytest.param({"plan": "keep"}, False, 26 + 9.3, id="keep-fp32"),
        pytest.param({"fused": False}, False, 70, id="composed-fp32"),
    ],
)
def test_the_network_saves_bits_and_the_stream(options, bf16, limit):
    network = build_model("reactnet_a", **options)
    saved = saved_slope(Autocast(network) if bf16 else network, images)
    assert saved.per_image <= limit
    assert saved.per_batch <= 6  # packed weights, scales, and the head's weight in bf16


@pytest.mark.parametrize("options", [{"plan": "recompute"}, {"plan": "keep"}, {"fused": False}])
def test_live_memory_agrees_with_the_count(options):
    """A tensor kept anywhere but in save_for_backward would be live and not counted."""
    model = build_model("reactnet_a", width=0.25, **options)
    x = images(2)
    saved = saved_bytes(model, lambda: model(x))
    live, logits = allocated_by(lambda: model(x))
    outside = logits.untyped_storage().nbytes() - x.untyped_storage().nbytes()
    assert live - outside == pytest.approx(saved, rel=1e-3)

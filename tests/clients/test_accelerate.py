"""accelerate: weights that live elsewhere, and a step by its way."""

import pytest
import torch

from tests.clients import client
from tests.helpers import gradient
from tritonbnn.models import build_model
from tritonbnn.nn import BinaryUnit

accelerate = client("accelerate")


def network():
    torch.manual_seed(0)
    return build_model("reactnet_a", width=0.25, num_classes=3, small_images=True).eval()


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_offloaded_weights_come_when_they_are_needed(place, tmp_path):
    model, twin, x = network(), network(), gradient(2, 3, 32, 32)
    if place == "memory":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x))
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_an_offloaded_unit_computes_the_same():
    unit, twin = BinaryUnit(8, 8, 3).eval(), BinaryUnit(8, 8, 3).eval()
    unit.load_state_dict(twin.state_dict())
    accelerate.cpu_offload(unit, execution_device=torch.device("cpu"))
    x = gradient(2, 8, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(unit(x), twin(x))


def test_a_step_is_torchs_and_a_saved_state_goes_on(tmp_path):
    x, results = gradient(4, 3, 32, 32), []
    for prepared in (False, True):
        model = network().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        accelerator = accelerate.Accelerator(cpu=True)
        if prepared:
            model, optimizer = accelerator.prepare(model, optimizer)
        for step in range(2):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            accelerator.backward(loss) if prepared else loss.backward()
            optimizer.step()
            if prepared and step == 0:
                accelerator.save_state(str(tmp_path))
                accelerator.load_state(str(tmp_path))
        results.append(model.state_dict())
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name

"""A network that was trained answers as torch does once it is packed: every image, every sign."""

import pytest
import torch

from tests.commands import TRAIN, run
from tests.test_deploy import make, streams  # noqa: F401 - a fixture
from tritonbnn.data.batches import val_batches
from tritonbnn.deploy import plain
from tritonbnn.export import pack
from tritonbnn.train.weights import NOTHING, network_with_weights, open_data, read_any

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The digits after two short steps: the network, its packed twin, and all validation images."""
    folder = tmp_path_factory.mktemp("trained")
    result = run(TRAIN, "digits", "--epochs", 3, "--out", "run", cwd=folder)
    assert result.code == 0, result.output
    checkpoint = read_any(folder / "run", NOTHING)
    batches = val_batches(open_data(checkpoint, None, None).val, batch_size=128, workers=0)
    images = torch.cat([batch[0] for batch in batches])
    return network_with_weights(checkpoint).eval(), pack(checkpoint), images


def test_every_image_gets_torch_s_class(trained, make):  # noqa: F811
    model, packed, images = trained
    with torch.no_grad():
        truth = model(images).argmax(1)
    assert len(truth.unique()) > 5  # it has learned something
    assert torch.equal(make(packed)(images).argmax(1), truth)


def test_every_sign_is_torch_s_on_the_same_stream(trained):
    model, packed, images = trained
    for unit, (x, z) in zip(packed.units, streams(model, images[:32]), strict=True):
        own = torch.from_numpy(plain.run_unit(unit, plain.weight_signs(unit), x.numpy()))
        assert torch.equal(own >= 0, z >= 0)

"""A network's real layers: against torch in float64, and over numbers of threads."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers import assert_no_worse_than_eager, gradient
from tritonbnn.models import build_model
from tritonbnn.native import library
from tritonbnn.nn.ends import OrderedBatchNorm2d, OrderedConv2d, OrderedLinear

pytestmark = pytest.mark.skipif(not library.available(), reason="needs a C compiler")

LAYERS = [
    pytest.param(lambda: OrderedConv2d(3, 20, 3, 2, 1, bias=False), (3, 3, 9, 7), id="strided"),
    pytest.param(lambda: OrderedConv2d(1, 16, 3, 1, 1, bias=False), (2, 1, 5, 6), id="3x3"),
    pytest.param(lambda: OrderedConv2d(5, 33, 1, bias=False), (2, 5, 4, 3), id="1x1"),
    pytest.param(lambda: OrderedBatchNorm2d(19), (3, 19, 5, 4), id="norm"),
    pytest.param(lambda: OrderedBatchNorm2d(8, momentum=None), (3, 8, 5, 4), id="cumulative"),
    pytest.param(lambda: OrderedLinear(37, 11), (5, 37), id="linear"),
    pytest.param(lambda: OrderedLinear(16, 10, bias=False), (9, 16), id="no_bias"),
]


@pytest.fixture
def threads():
    """As many as now, afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def plain(layer):
    """torch's own layer with the same parameters and buffers."""
    twin = copy.deepcopy(layer)
    twin.__class__ = type(layer).__mro__[1]
    return twin


def trained(layer, x, grad):
    """Output, buffers and all gradients of one pass in training."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(grad)
    gradients = [p.grad for p in layer.parameters()]
    return [y.detach(), x.grad, *gradients, *(b for b in layer.buffers() if b.is_floating_point())]


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_a_layer_is_torch_s_own(build, shape, memory):
    torch.manual_seed(0)
    layer = build()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    x = gradient(*shape, seed=1)
    if x.dim() == 4:
        x = x.contiguous(memory_format=memory)
    twin, truth = plain(layer), plain(layer).double()
    grad = gradient(*layer.eval()(x).shape)
    layer.train()
    results = trained(layer, x, grad)
    expected, exact = trained(twin, x, grad), trained(truth, x.double(), grad.double())
    assert len(results) == len(exact)
    for result, eager, value in zip(results, expected, exact, strict=True):
        assert_no_worse_than_eager(result, eager, value)


@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_what_it_does_not_compute_is_torch_s(build, shape):
    """float64, and evaluation: bit for bit."""
    layer = build()
    twin, x = plain(layer), gradient(*shape)
    layer.eval(), twin.eval()
    if not isinstance(layer, OrderedLinear):
        assert torch.equal(layer(x), twin(x))
    assert torch.equal(layer.double()(x.double()), twin.double()(x.double()))


@pytest.mark.parametrize("in_channels", [1, 3])
def test_training_does_not_depend_on_the_number_of_threads(threads, in_channels):
    """Every parameter and buffer after three updates in step 2, bit for bit."""
    states = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        torch.manual_seed(0)
        model = build_model(
            "reactnet_a", width=0.25, num_classes=100, small_images=True, in_channels=in_channels
        ).to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        images = gradient(9, in_channels, 32, 32).contiguous(memory_format=torch.channels_last)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(images), torch.arange(9)).backward()
            optimizer.step()
        states.append(model.state_dict())
    for other in states[1:]:
        different = [name for name in other if not torch.equal(other[name], states[0][name])]
        assert not different


def test_a_network_s_ends_keep_torch_s_types():
    """Whoever looks for nn.Conv2d, nn.BatchNorm2d and nn.Linear finds them, SyncBatchNorm too."""
    model = build_model("reactnet_18", width=0.25, num_classes=10, small_images=True)
    assert isinstance(model.stem[0], nn.Conv2d)
    assert isinstance(model.fc, nn.Linear)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted.stem[1], nn.SyncBatchNorm)

"""captum: attributions are the gradients that autograd has."""

import torch

from tests.clients import client
from tests.helpers import gradient
from tritonbnn.models import build_model

attr = client("captum.attr")


def network():
    torch.manual_seed(0)
    return build_model("reactnet_a", width=0.25, num_classes=3, small_images=True).eval()


def test_integrated_gradients_are_the_mean_of_gradients():
    model, x = network(), gradient(1, 3, 32, 32)
    found = attr.IntegratedGradients(model).attribute(
        x, target=1, n_steps=8, method="riemann_right"
    )
    total = torch.zeros_like(x)
    for step in range(1, 9):
        point = (x * step / 8).requires_grad_()
        total += torch.autograd.grad(model(point)[0, 1], point)[0]
    torch.testing.assert_close(found, x * total / 8, rtol=1e-3, atol=1e-5)


def test_grad_cam_of_a_block_weighs_its_stream():
    model, x = network(), gradient(1, 3, 32, 32)
    found = attr.LayerGradCam(model, model.blocks[4]).attribute(x, target=2)
    seen = []
    handle = model.blocks[4].register_forward_hook(lambda m, args, y: seen.append(y))
    grad = torch.autograd.grad(model(x)[0, 2], seen[0])[0]
    handle.remove()
    expected = (grad.mean((2, 3), keepdim=True) * seen[0]).sum(1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)

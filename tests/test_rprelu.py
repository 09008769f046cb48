"""RPReLU and all its gradients."""

import pytest
import torch

from tests.helpers import (
    INPUTS,
    KERNEL_DEVICE,
    activation,
    assert_no_worse_than_eager,
    gradient,
    vectors,
)
from tritonbnn import kernels, reference
from tritonbnn.kernels import elementwise


def autograd(dtype, grad, *inputs):
    """Value and gradients through ``reference``, in ``dtype`` throughout."""
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    z = reference.rprelu(*inputs)
    return z, *torch.autograd.grad(z, inputs, grad.to(dtype))


@pytest.mark.parametrize(("shape", "dtype", "layout"), INPUTS)
def test_value_and_gradients(launchers, device, shape, dtype, layout):
    x = activation(*shape, dtype=dtype, layout=layout)
    grad = gradient(*shape, dtype=dtype, seed=5)
    shift_in, slope, shift_out = vectors(3, shape[1])
    on_device = [v.to(device) for v in (x, shift_in, slope, shift_out)]
    z = launchers.rprelu_forward(*on_device)
    gradients = launchers.rprelu_backward(grad.to(device), *on_device[:3])
    assert z.dtype == gradients[0].dtype == dtype
    assert all(sums.dtype == torch.float32 for sums in gradients[1:])
    assert z.movedim(1, -1).is_contiguous()
    ordinary, truth = (
        autograd(d, grad, x, shift_in, slope, shift_out) for d in (dtype, torch.float64)
    )
    for result, plain, exact in zip((z, *gradients), ordinary, truth, strict=True):
        assert_no_worse_than_eager(result, plain, exact)


def test_zero_takes_the_slope(launchers, device):
    x = torch.tensor([[0.0], [-0.0]], device=device)
    zero, slope = torch.zeros(1, device=device), torch.full((1,), 0.25, device=device)
    dx, *_ = launchers.rprelu_backward(torch.ones_like(x), x, zero, slope)
    assert dx.tolist() == [[0.25], [0.25]]


def test_programs_share_many_rows(monkeypatch):
    monkeypatch.setattr(elementwise, "MAX_PARTIALS", 2)
    x, grad = activation(300, 40), gradient(300, 40, seed=5)
    shift_in, slope, shift_out = vectors(3, 40)
    inputs = (t.to(KERNEL_DEVICE) for t in (grad, x, shift_in, slope))
    gradients = kernels.rprelu_backward(*inputs)
    ordinary, truth = (
        autograd(d, grad, x, shift_in, slope, shift_out)[1:] for d in (torch.float32, torch.float64)
    )
    for result, plain, exact in zip(gradients, ordinary, truth, strict=True):
        assert_no_worse_than_eager(result, plain, exact)


def test_an_empty_batch(launchers, device):
    x = torch.zeros(0, 33, 5, 3, device=device)
    vector = torch.ones(33, device=device)
    assert launchers.rprelu_forward(x, vector, vector, vector).shape == x.shape
    dx, *sums = launchers.rprelu_backward(x, x, vector, vector)
    assert dx.shape == x.shape
    assert all(torch.equal(each.cpu(), torch.zeros(33)) for each in sums)


def test_bad_input_is_named():
    x, vector = torch.zeros(2, 33), torch.zeros(33)
    with pytest.raises(ValueError, match=r"slope must have shape \(33,\)"):
        kernels.rprelu_forward(x, vector, vector[:1], vector)
    with pytest.raises(ValueError, match="all tensors must have one shape"):
        kernels.rprelu_backward(x[:1], x, vector, vector)

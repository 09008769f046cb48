"""The sign as +-1, and its pseudo-gradient."""

import pytest
import torch
from torch.nn import functional as F

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


@pytest.mark.parametrize(("shape", "dtype", "layout"), INPUTS)
def test_forward_is_the_sign_of_the_shifted_value(launchers, device, shape, dtype, layout):
    x = activation(*shape, dtype=dtype, layout=layout)
    (shift,) = vectors(1, shape[1])
    along = shift.view(-1, *[1] * (len(shape) - 2))
    y = launchers.sign_forward(x.to(device))
    shifted = launchers.sign_forward(x.to(device), shift.to(device))
    assert y.dtype == shifted.dtype == dtype
    assert y.movedim(1, -1).is_contiguous()
    assert torch.equal(y.cpu(), reference.hard_sign(x))
    assert torch.equal(shifted.cpu(), reference.hard_sign(x.float() + along).to(dtype))


def autograd(dtype, grad, x, shift, residual):
    """Gradients to x and shift through ``reference`` in ``dtype``; ``residual`` by its own way."""
    x, shift = x.to(dtype).requires_grad_(), shift.to(dtype).requires_grad_()
    total = (reference.binarize(x, shift) * grad.to(dtype)).sum()
    if residual is not None:
        total = total + (x * residual.to(dtype)).sum()
    return torch.autograd.grad(total, (x, shift))


@pytest.mark.parametrize("with_residual", [False, True], ids=["bare", "residual"])
@pytest.mark.parametrize(("shape", "dtype", "layout"), INPUTS)
def test_gradients(launchers, device, shape, dtype, layout, with_residual):
    x = activation(*shape, dtype=dtype, layout=layout)
    grad = gradient(*shape, dtype=dtype, seed=5)
    residual = gradient(*shape, dtype=dtype, seed=6) if with_residual else None
    (shift,) = vectors(1, shape[1])
    dx, dshift = launchers.sign_backward(
        grad.to(device),
        x.to(device),
        shift.to(device),
        None if residual is None else residual.to(device),
    )
    assert dx.dtype == dtype
    assert dshift.dtype == torch.float32
    ordinary, truth = (autograd(d, grad, x, shift, residual) for d in (dtype, torch.float64))
    assert_no_worse_than_eager(dx, ordinary[0], truth[0])
    assert_no_worse_than_eager(dshift, ordinary[1], truth[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shortcut", "size"), [("pool", (33, 3, 2)), ("repeat", (66, 6, 4))])
def test_a_shortcut_sends_its_gradient_back(launchers, device, shortcut, size, dtype):
    x = activation(3, 33, 6, 4, dtype=dtype, layout="channels_last")
    grad, residual = gradient(*x.shape, dtype=dtype, seed=5), gradient(3, *size, dtype=dtype)
    (shift,) = vectors(1, 33)
    moved = (t.to(device) for t in (grad, x, shift, residual))
    dx, dshift = launchers.sign_backward(*moved, shortcut=shortcut)

    def autograd(to):
        leaf, s = x.to(to).requires_grad_(), shift.to(to).requires_grad_()
        skip = F.avg_pool2d(leaf, 2) if shortcut == "pool" else torch.cat((leaf, leaf), dim=1)
        outputs = (reference.binarize(leaf, s), skip)
        return torch.autograd.grad(outputs, (leaf, s), (grad.to(to), residual.to(to)))

    ordinary, truth = autograd(dtype), autograd(torch.float64)
    assert_no_worse_than_eager(dx, ordinary[0], truth[0])
    assert_no_worse_than_eager(dshift, ordinary[1], truth[1])


def test_the_slope_at_its_corners(launchers, device):
    x = torch.tensor([[-1.5, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 1.5]], device=device)
    dx, dshift = launchers.sign_backward(torch.ones_like(x), x)
    assert dx.tolist() == [[0.0, 0.0, 1.0, 2.0, 2.0, 1.0, 0.0, 0.0]]
    assert torch.equal(dshift, dx[0])


def test_programs_share_many_rows(monkeypatch):
    monkeypatch.setattr(elementwise, "MAX_PARTIALS", 2)
    x, grad = activation(300, 40), gradient(300, 40, seed=5)
    (shift,) = vectors(1, 40)
    dx, dshift = kernels.sign_backward(*(t.to(KERNEL_DEVICE) for t in (grad, x, shift)))
    ordinary, truth = (autograd(d, grad, x, shift, None) for d in (torch.float32, torch.float64))
    assert_no_worse_than_eager(dx, ordinary[0], truth[0])
    assert_no_worse_than_eager(dshift, ordinary[1], truth[1])


def test_an_empty_batch(launchers, device):
    x = torch.zeros(0, 33, 5, 3, device=device)
    assert launchers.sign_forward(x).shape == x.shape
    dx, dshift = launchers.sign_backward(x, x)
    assert dx.shape == x.shape
    assert torch.equal(dshift.cpu(), torch.zeros(33))


def test_bad_input_is_named():
    x = torch.zeros(2, 33, 5, 3)
    with pytest.raises(ValueError, match=r"one shape, not x \(2, 33, 5, 3\), grad \(2, 32, 5, 3\)"):
        kernels.sign_backward(x[:, :32], x)
    with pytest.raises(ValueError, match=r"x must have shape \(2, 33, 10, 6\)"):
        kernels.sign_backward(x, x, None, x, shortcut="pool")
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16"):
        kernels.sign_forward(x.int())

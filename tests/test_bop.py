"""Bop and its second-order form: every flip against a transcription of the rule in float64."""

import copy
import io

import numpy as np
import pytest
import torch

from tests.helpers import gradient, plus_minus
from tests.test_aot import run_python
from tritonbnn import eager
from tritonbnn.optim import Bop, Bop2ndOrder, to_signs_

STEPS = 200

BOP = {"threshold": 0.02, "gamma": 0.03}
SECOND = {"threshold": 0.3, "gamma": 0.05, "sigma": 0.02}

FORMS = [
    pytest.param(Bop, BOP, id="bop"),
    pytest.param(Bop2ndOrder, SECOND, id="second_order"),
    pytest.param(Bop2ndOrder, SECOND | {"bias_correction": True}, id="corrected"),
]

SHAPES = [
    pytest.param((5, 33, 3, 3), torch.contiguous_format, id="odd"),
    pytest.param((7, 40, 3, 3), torch.channels_last, id="channels_last"),
    pytest.param((1, 1), torch.contiguous_format, id="one"),
    pytest.param((3, 2051), torch.contiguous_format, id="matrix"),
]


def scripted(step, shape):
    """The gradient of a step: it drifts, so that weights flip more than once."""
    drift = np.sin(step / 9 + np.arange(np.prod(shape)).reshape(shape))
    return gradient(*shape, seed=step).mul_(0.3).add_(torch.from_numpy(drift).float())


class Rule:
    """The authors' rule on one weight, in float64 throughout: w <- sgn(-sign(w s - tau) w)."""

    def __init__(self, weight, *, threshold, gamma, sigma=None, bias_correction=False):
        self.w = weight.double().numpy().copy()
        self.m, self.v = np.zeros_like(self.w), np.zeros_like(self.w)
        self.threshold, self.gamma, self.sigma = threshold, gamma, sigma
        self.corrected, self.t = bias_correction, 0

    def step(self, grad):
        g = grad.double().numpy()
        self.t += 1
        self.m = (1 - self.gamma) * self.m + self.gamma * g
        signal = self.m
        if self.sigma is not None:
            self.v = (1 - self.sigma) * self.v + self.sigma * g**2
            m_hat, v_hat = self.m, self.v
            if self.corrected:
                m_hat = self.m / (1 - (1 - self.gamma) ** self.t)
                v_hat = self.v / (1 - (1 - self.sigma) ** self.t)
            signal = m_hat / (np.sqrt(v_hat) + 1e-10)
        inner = -np.sign(self.w * signal - self.threshold) * self.w
        before, self.w = self.w, np.where(inner >= 0, 1.0, -1.0)
        return int((before != self.w).sum())


@pytest.mark.slow
@pytest.mark.parametrize(("form", "settings"), FORMS)
@pytest.mark.parametrize(("shape", "layout"), SHAPES)
def test_every_flip_is_the_rules(launchers, device, form, settings, shape, layout):
    start = plus_minus(*shape)
    weight = torch.nn.Parameter(start.contiguous(memory_format=layout).to(device))
    optimizer, rule, total = form([weight], **settings), Rule(start, **settings), 0
    for step in range(STEPS if shape[-1] < 100 else 20):
        weight.grad = scripted(step, shape).to(device)
        optimizer.step()
        flips = rule.step(scripted(step, shape))
        assert optimizer.flips.item() == flips
        assert np.array_equal(weight.detach().cpu().numpy(), rule.w)
        total += flips
    assert total > 0 or start.numel() == 1
    state = optimizer.state[weight]
    assert state["average"].dtype == torch.float32
    np.testing.assert_allclose(state["average"].cpu().numpy(), rule.m, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("form", "settings"), FORMS)
def test_weights_of_other_dtypes(form, settings, dtype):
    start = plus_minus(6, 33)
    weight = torch.nn.Parameter(start.to(dtype))
    optimizer, rule = form([weight], **settings), Rule(start, **settings)
    for step in range(50):
        weight.grad = scripted(step, (6, 33)).to(dtype)
        rule.step(weight.grad.float())
        optimizer.step()
        assert np.array_equal(weight.detach().float().numpy(), rule.w)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert optimizer.state[weight]["average"].dtype == wide


def test_the_papers_scalars(launchers, device):
    """Flips where w m > threshold, not where the signs differ; on a tie the weight is +1."""
    weight = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, 1.0], device=device)
    threshold = 2.0**-27
    average = torch.tensor([2, 2, -1, 1, -2, 0.5], device=device).mul_(threshold)
    arguments = {"threshold": threshold, "gamma": 0.0}
    changed = launchers.bop_update(weight, torch.zeros_like(weight), average, None, **arguments)
    assert weight.tolist() == [-1, -1, 1, 1, 1, 1]
    assert changed.item() == 3
    assert changed.dtype == torch.int64


def test_corrected_averages_are_the_gradient_at_first(launchers, device):
    """So the ratio is the gradient's sign, and just below 1 all weights of its sign flip."""
    grad = gradient(300).mul_(1e-3)
    weight = torch.nn.Parameter(torch.ones(300, device=device))
    optimizer = Bop2ndOrder([weight], threshold=0.999, gamma=1e-7, sigma=1e-3, bias_correction=True)
    weight.grad = grad.to(device)
    optimizer.step()
    assert torch.equal(weight.detach().cpu(), torch.where(grad > 0, -1.0, 1.0))


def test_nothing_flips_at_nan(launchers, device):
    for value in (torch.nan, torch.inf):
        weight = torch.nn.Parameter(torch.tensor([1.0, -1.0, 1.0], device=device))
        optimizer = Bop2ndOrder([weight], threshold=0.0, gamma=0.5, sigma=0.5)
        weight.grad = torch.tensor([value, value, 1.0], device=device)
        optimizer.step()
        assert weight.tolist() == [1, -1, -1]
        weight.grad = torch.ones(3, device=device)
        optimizer.step()
        assert weight.tolist() == [1, -1, -1]


def test_a_schedule_moves_threshold_and_gamma():
    weight = torch.nn.Parameter(torch.ones(50))
    optimizer = Bop([weight], threshold=1.0, gamma=1e-3)
    weight.grad = torch.ones(50)
    optimizer.step()
    assert optimizer.flips == 0
    optimizer.param_groups[0].update(threshold=0.4, gamma=0.5)
    optimizer.step()
    assert optimizer.flips == 50


def test_torchs_schedulers_move_a_groups_lr_which_is_its_gamma():
    weight = torch.nn.Parameter(torch.ones(50))
    optimizer = Bop([{"params": [weight], "lr": 1e-3}], threshold=0.4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 500.0**epoch)
    weight.grad = torch.ones(50)
    optimizer.step()
    assert optimizer.flips == 0
    scheduler.step()
    optimizer.step()
    assert optimizer.flips == 50


def test_corrections_follow_a_schedule():
    """The corrected average of a constant gradient is that gradient, however gamma moves."""
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = Bop2ndOrder([weight], threshold=0.99, gamma=0.1, sigma=0.1, bias_correction=True)
    for step in range(30):
        optimizer.param_groups[0]["gamma"] = 0.1 / (step + 1)
        weight.grad = torch.full((4,), 0.3)
        with torch.no_grad():
            weight.fill_(1)
        optimizer.step()
        assert weight.tolist() == [-1] * 4  # the ratio is 1 > 0.99
    optimizer = Bop2ndOrder([weight], threshold=0.0, gamma=0.0, bias_correction=True)
    with torch.no_grad():
        weight.fill_(1)
    optimizer.step()
    assert weight.tolist() == [1] * 4


@pytest.mark.parametrize(("form", "settings"), FORMS)
def test_a_run_goes_on_from_its_state(form, settings):
    def run(weight, optimizer, steps):
        for step in steps:
            weight.grad = scripted(step, weight.shape)
            optimizer.step()

    whole = torch.nn.Parameter(plus_minus(4, 33, 3, 3))
    run(whole, form([whole], **settings), range(30))
    first = torch.nn.Parameter(plus_minus(4, 33, 3, 3))
    optimizer = form([first], **settings)
    run(first, optimizer, range(13))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = torch.nn.Parameter(first.detach().clone())
    optimizer = form([second], **settings)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    run(second, optimizer, range(13, 30))
    assert torch.equal(whole, second)


def test_loaded_state_keeps_its_dtype():
    """torch would round a float32 average to a bfloat16 weight's dtype."""
    weight = torch.nn.Parameter(plus_minus(3, 33).bfloat16())
    optimizer = Bop([weight], **BOP)
    weight.grad = gradient(3, 33).bfloat16()
    optimizer.step()
    other = Bop([torch.nn.Parameter(weight.detach().clone())], **BOP)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (before,), (after,) = optimizer.state.values(), other.state.values()
    assert torch.equal(before["average"], after["average"])
    assert after["average"].dtype == torch.float32


@pytest.mark.parametrize(("form", "settings"), FORMS)
def test_scaled_losses_and_parts_flip_the_same(form, settings):
    """The threshold is in units of the gradient: a scaler's factor is taken out first."""
    x = gradient(12, 33, seed=3)

    def run(scale, parts):
        weight = torch.nn.Parameter(plus_minus(5, 33))
        optimizer = form([weight], **settings)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        for step in range(10):
            optimizer.zero_grad()
            for part in x.roll(step, 0).chunk(parts):
                loss = (part @ weight.T).square().sum() / 64
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return weight.detach()

    assert not torch.equal(run(1, 1), plus_minus(5, 33))
    assert torch.equal(run(1, 1), run(1024.0, 1))
    assert torch.equal(run(1, 4), run(65536.0, 4))


def test_a_weight_without_a_gradient_stands_still():
    weights = [torch.nn.Parameter(plus_minus(3, 4)) for _ in range(2)]
    optimizer = Bop(weights, threshold=0, gamma=1)
    assert optimizer.flips is None
    weights[1].grad = weights[1].detach().clone()
    before = [w.detach().clone() for w in weights]
    optimizer.step()
    assert torch.equal(weights[0], before[0])
    assert torch.equal(weights[1], -before[1])
    assert weights[0] not in optimizer.state


def test_a_closure_and_a_layout_of_its_own():
    weight = torch.nn.Parameter(plus_minus(2, 3, 3, 3))
    optimizer = Bop([weight], threshold=0, gamma=1)
    grad = gradient(2, 3, 3, 3).contiguous(memory_format=torch.channels_last)

    def closure():
        assert torch.is_grad_enabled()
        weight.grad = grad
        return 7

    expected = torch.where(weight.detach() * grad > 0, -weight.detach(), weight.detach())
    assert optimizer.step(closure) == 7
    assert torch.equal(weight, expected)


def test_weights_that_lie_apart_in_memory():
    """Of every second row: no launcher but eager reads them."""
    storage = plus_minus(6, 5)
    weight = torch.nn.Parameter(storage[::2])
    optimizer = Bop([weight], threshold=0, gamma=1)
    weight.grad = weight.detach().clone()
    before = storage.clone()
    optimizer.step()
    assert torch.equal(storage[::2], -before[::2])
    assert torch.equal(storage[1::2], before[1::2])


def test_state_is_four_bytes_a_weight():
    weight = torch.nn.Parameter(plus_minus(64, 64, 3, 3))
    for optimizer, size in ((Bop([weight]), 4), (Bop2ndOrder([weight]), 8)):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        tensors = [v for v in optimizer.state[weight].values() if isinstance(v, torch.Tensor)]
        assert sum(t.nbytes for t in tensors) == size * weight.numel()


def test_to_signs():
    weight = torch.nn.Parameter(torch.tensor([0.0, -0.0, -0.5, 3.0]))
    to_signs_([weight])
    assert weight.tolist() == [1, 1, -1, 1]


def test_bad_input_is_named():
    weight = torch.nn.Parameter(plus_minus(3, 3))
    with pytest.raises(ValueError, match=r"must be \+1 or -1.*shape \(2,\).*to_signs_"):
        Bop([torch.nn.Parameter(torch.tensor([1.0, 0.5]))])
    with pytest.raises(ValueError, match="must be"):
        Bop2ndOrder([torch.nn.Parameter(torch.tensor([1.0, torch.nan]))])
    with pytest.raises(ValueError, match="Bop has no weight decay"):
        Bop([{"params": [weight], "weight_decay": 1e-4}])
    with pytest.raises(ValueError, match="threshold must be at least 0, not -1"):
        Bop([weight], threshold=-1)
    with pytest.raises(ValueError, match="gamma must be from 0 to 1, not 2"):
        Bop([weight], gamma=2)
    with pytest.raises(ValueError, match="sigma must be from 0 to 1, not nan"):
        Bop2ndOrder([weight], sigma=torch.nan)
    with pytest.raises(TypeError, match="Bop's parameter must be a tensor of float32"):
        Bop([torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))])
    elsewhere = torch.nn.Parameter(torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match="Bop's parameters are on cpu and meta: move them"):
        Bop([weight, elsewhere])
    optimizer = Bop([weight])
    with pytest.raises(ValueError, match="on cpu and meta"):
        optimizer.add_param_group({"params": [elsewhere]})
    assert len(optimizer.param_groups) == 1
    embedding = torch.nn.Embedding(4, 3, sparse=True)
    to_signs_(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="takes no sparse gradient"):
        Bop(embedding.parameters()).step()


def test_launchers_name_bad_input(launchers, device):
    weight, average = torch.ones(3, 4, device=device), torch.zeros(3, 5, device=device)
    kind = RuntimeError if launchers is eager else ValueError  # torch names shapes itself
    with pytest.raises(kind, match=r"must have one shape|must match the size"):
        launchers.bop_update(weight, weight, average, None, threshold=0, gamma=1)


COMPILED = """
import torch
from tritonbnn import kernels
from tritonbnn.kernels import aot
from tritonbnn.kernels.targets import TARGETS

def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

def calls():
    numbers = {"threshold": 1e-8, "gamma": 1e-4}
    for dtype in (torch.float32, torch.bfloat16):
        for squares in (None, meta(64, 100)):
            grad, average = meta(64, 100, dtype=dtype), meta(64, 100)
            yield lambda: kernels.bop_update(
                meta(64, 100, dtype=dtype), grad, average, squares, **numbers
            )
            packed = meta(64, 4, dtype=torch.int32)
            yield lambda: kernels.bop_update_packed(packed, grad, average, squares, **numbers)

for call in calls():
    for launch in aot.record(call):
        for target in ("sm_80", "sm_90"):
            made = aot.compile_launch(launch, TARGETS[target])
            print(made.kernel, target, made.registers, made.spill_bytes)
"""


@pytest.mark.compile
def test_kernels_compile_without_spills():
    rows = [line.split() for line in run_python(COMPILED).splitlines()]
    assert {(name, target) for name, target, *_ in rows} == {
        (name, target)
        for name in ("_bop_kernel", "_bop_packed_kernel")
        for target in ("sm_80", "sm_90")
    }
    assert len(rows) == 16
    for *_, registers, spills in rows:
        assert int(registers) <= 128
        assert int(spills) == 0

"""Weight prediction: torch's optimisers at horizon 0, the public rule beyond, weights put back."""

import copy
import io

import pytest
import torch
from torch import nn

from tests.helpers import gradient
from tritonbnn.optim import AdamPrediction, AdamWPrediction, SGDPrediction

FORMS = [
    pytest.param(AdamWPrediction, torch.optim.AdamW, {"weight_decay": 0.1}, id="adamw"),
    pytest.param(AdamPrediction, torch.optim.Adam, {"weight_decay": 0.1}, id="adam"),
    pytest.param(SGDPrediction, torch.optim.SGD, {"momentum": 0.9}, id="sgd"),
]
LR = 0.01


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def batch(step, dtype=torch.float32):
    return gradient(4, 7, seed=step).to(dtype)


def train(model, optimizer, steps, *, parts=1, scaler=None, dtype=torch.float32):
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for step in steps:
        optimizer.zero_grad()
        with optimizer.predicted():
            for part in batch(step, dtype).chunk(parts):
                scaler.scale(model(part).square().sum() / 4).backward()
        scaler.step(optimizer)
        scaler.update()
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("form", "plain", "settings"), FORMS)
@pytest.mark.parametrize("fused", [False, True])
def test_horizon_0_is_torchs_own(form, plain, settings, fused):
    ours, theirs = network(), network()
    optimizer = form(ours.parameters(), lr=LR, horizon=0, fused=fused, **settings)
    reference = plain(theirs.parameters(), lr=LR, fused=fused, **settings)
    weights = train(ours, optimizer, range(20))
    for step in range(20):
        reference.zero_grad()
        (theirs(batch(step)).square().sum() / 4).backward()
        reference.step()
    assert equal(weights, theirs.parameters())


def public_rule(weights, states, grads_at, step, settings, horizon, kind):
    """XGrad's rule on numbers of float64: predict, take the gradient, put back, step."""
    decay, betas, eps = settings.get("weight_decay", 0.0), (0.9, 0.999), 1e-8
    ahead = []
    for w, s in zip(weights, states, strict=True):
        move = 0
        if step and kind == "sgd":
            move = s["m"]
        elif step:
            m_hat, v_hat = (s[k] / (1 - b**step) for k, b in zip("mv", betas, strict=True))
            move = m_hat / (v_hat.sqrt() + eps)
        ahead.append(w - horizon * LR * move)
    new = []
    for w, s, g in zip(weights, states, grads_at(ahead), strict=True):
        if kind == "sgd":
            s["m"] = g if not step else settings["momentum"] * s["m"] + g
            new.append(w - LR * s["m"])
            continue
        if kind == "adam":
            g = g + decay * w
        else:
            w = w * (1 - LR * decay)
        s["m"] = betas[0] * s["m"] + (1 - betas[0]) * g
        s["v"] = betas[1] * s["v"] + (1 - betas[1]) * g**2
        m_hat, v_hat = (s[k] / (1 - b ** (step + 1)) for k, b in zip("mv", betas, strict=True))
        new.append(w - LR * m_hat / (v_hat.sqrt() + eps))
    return new


@pytest.mark.parametrize("horizon", [1, 2.5])
@pytest.mark.parametrize(("form", "plain", "settings"), FORMS)
def test_it_is_the_public_rule(form, plain, settings, horizon):
    model, truth = network(), network(torch.float64)
    optimizer = form(model.parameters(), lr=LR, horizon=horizon, **settings)
    kind = plain.__name__.lower()
    weights = [p.detach().clone() for p in truth.parameters()]
    states = [{"m": torch.zeros_like(w), "v": torch.zeros_like(w)} for w in weights]
    names = [name for name, _ in truth.named_parameters()]
    for step in range(20):
        (ours,) = [train(model, optimizer, [step])]

        def grads_at(ahead, step=step):
            ahead = [w.requires_grad_() for w in ahead]
            values = dict(zip(names, ahead, strict=True))
            output = torch.func.functional_call(truth, values, batch(step, torch.float64))
            return torch.autograd.grad(output.square().sum() / 4, ahead)

        weights = public_rule(weights, states, grads_at, step, settings, horizon, kind)
    for a, b in zip(ours, weights, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-7 if kind == "sgd" else 1e-6)


def test_the_rule_to_float64():
    """The same in float64, where nothing is rounded away, to 1e-12."""
    model, truth = network(torch.float64), network(torch.float64)
    optimizer = AdamWPrediction(model.parameters(), lr=LR, weight_decay=0.1)
    weights = [p.detach().clone() for p in truth.parameters()]
    states = [{"m": torch.zeros_like(w), "v": torch.zeros_like(w)} for w in weights]
    names = [name for name, _ in truth.named_parameters()]
    for step in range(50):
        ours = train(model, optimizer, [step], dtype=torch.float64)

        def grads_at(ahead, step=step):
            ahead = [w.requires_grad_() for w in ahead]
            values = dict(zip(names, ahead, strict=True))
            output = torch.func.functional_call(truth, values, batch(step, torch.float64))
            return torch.autograd.grad(output.square().sum() / 4, ahead)

        rule = {"weight_decay": 0.1}
        weights = public_rule(weights, states, grads_at, step, rule, 1, "adamw")
    for a, b in zip(ours, weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_scalars_of_the_public_code():
    """w 1, lr 1e-3, decay 0.01, g 0.5: 0.99899000002 after a step, then predicted 0.99799000004."""
    w = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = AdamWPrediction([w], lr=1e-3, weight_decay=0.01)
    with optimizer.predicted():
        assert w.item() == 1
        (0.5 * w).sum().backward()
    optimizer.step()
    assert w.item() == pytest.approx(0.99899000002, abs=1e-14)
    with optimizer.predicted():
        assert w.item() == pytest.approx(0.99799000004, abs=1e-14)
    assert w.item() == pytest.approx(0.99899000002, abs=1e-14)


@pytest.mark.parametrize(("form", "plain", "settings"), FORMS)
def test_weights_come_back_bit_for_bit(form, plain, settings):
    model = network()
    optimizer = form(model.parameters(), lr=LR, **settings)
    train(model, optimizer, range(3))
    before = [p.detach().clone() for p in model.parameters()]
    places = [p.data_ptr() for p in model.parameters()]
    with optimizer.predicted():
        assert not equal(before, model.parameters())
    assert equal(before, model.parameters())
    with pytest.raises(KeyError), optimizer.predicted():
        raise KeyError("in the forward pass")
    assert equal(before, model.parameters())
    assert places == [p.data_ptr() for p in model.parameters()]
    with optimizer.predicted():  # and may be moved again
        pass


def test_groups_have_horizons_of_their_own():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = AdamWPrediction([{"params": [a], "horizon": 0}, {"params": [b]}], lr=LR)
    a.grad, b.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    before = a.detach().clone(), b.detach().clone()
    with optimizer.predicted():
        assert torch.equal(a, before[0])
        assert not torch.equal(b, before[1])


def test_the_last_epochs_learning_rate_of_0_moves_nothing():
    model = network()
    optimizer = AdamWPrediction(model.parameters(), lr=LR)
    train(model, optimizer, range(2))
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.predicted():
        assert equal(before, model.parameters())


@pytest.mark.parametrize(("form", "plain", "settings"), FORMS)
def test_a_run_goes_on_from_its_state(form, plain, settings):
    whole = network()
    expected = train(whole, form(whole.parameters(), lr=LR, **settings), range(12))
    first = network()
    optimizer = form(first.parameters(), lr=LR, **settings)
    train(first, optimizer, range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = copy.deepcopy(first)
    optimizer = form(second.parameters(), lr=LR, **settings)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert equal(train(second, optimizer, range(5, 12)), expected)


@pytest.mark.parametrize(("form", "plain", "settings"), FORMS)
def test_scaled_losses_and_parts(form, plain, settings):
    """A factor of two to some power changes no bit; parts are predicted once a step."""

    def run(scale, parts):
        model = network()
        optimizer = form(model.parameters(), lr=LR, **settings)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return train(model, optimizer, range(8), parts=parts, scaler=scaler)

    assert equal(run(1.0, 1), run(4096.0, 1))
    assert equal(run(1.0, 2), run(4096.0, 2))
    for a, b in zip(run(1.0, 1), run(1.0, 2), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_noise_free_quadratic_needs_no_more_steps():
    """To 1e-6, where AdamW and the prediction start alike."""

    def steps(horizon):
        w = nn.Parameter(torch.linspace(-2, 2, 9, dtype=torch.float64))
        optimizer = AdamWPrediction([w], lr=0.05, weight_decay=0, horizon=horizon)
        for step in range(5000):
            optimizer.zero_grad()
            with optimizer.predicted():
                w.square().sum().backward()
            optimizer.step()
            if w.detach().square().sum() < 1e-6:
                return step
        raise AssertionError("no end")

    assert steps(1) <= steps(0)


def test_bad_input_is_named():
    model = network()
    with pytest.raises(ValueError, match="AdamWPrediction: horizon must be at least 0, not -1"):
        AdamWPrediction(model.parameters(), horizon=-1)
    elsewhere = nn.Parameter(torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match="parameters are on cpu and meta"):
        AdamWPrediction([*model.parameters(), elsewhere])
    optimizer = AdamWPrediction(model.parameters(), lr=LR)
    with (
        optimizer.predicted(),
        pytest.raises(RuntimeError, match=r"predicted\(\) inside predicted\(\)"),
        optimizer.predicted(),
    ):
        pass
    with optimizer.predicted(), pytest.raises(RuntimeError, match=r"step\(\) inside predicted"):
        optimizer.step()
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="AdamWPrediction takes no sparse gradient"):
        AdamWPrediction(embedding.parameters()).step()

"""IVON: the rule on scalars, the authors' package where it is installed, samples, resuming."""

import copy
import io
import logging
import socket

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from tests.helpers import gradient
from tritonbnn.optim import IVON, sampled_probabilities

SETTINGS = {"lr": 0.2, "ess": 500.0, "hess_init": 0.5, "betas": (0.9, 0.995), "weight_decay": 2e-3}


class GlobalNoise(IVON):
    """Draws from torch's global generator, a group at a time, as the authors' package does."""

    def _standard_normal(self, count, like, place):
        return torch.randn(count, dtype=like.dtype, device=like.device)


class FixedNoise(IVON):
    """Noise of one size e: what is drawn is e in units of the deviation."""

    def _standard_normal(self, count, like, place):
        return torch.full((count,), 0.01, dtype=like.dtype) * (5e4 * (0.5 + 2e-4)) ** 0.5


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def loss_of(model, step, part=slice(None)):
    return model(gradient(8, 7, seed=step)[part].to(model[0].weight.dtype)).square().mean()


def train(model, optimizer, steps, *, samples=1, scaler=None):
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for step in steps:
        optimizer.zero_grad()
        for _ in range(samples):
            with optimizer.sampled_params(train=True):
                scaler.scale(loss_of(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
    return values(model)


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_scalars_of_the_public_code():
    w = nn.Parameter(torch.ones(1, dtype=torch.float64))
    settings = {"hess_init": 0.5, "betas": (0.9, 0.99999), "weight_decay": 2e-4}
    optimizer = FixedNoise([w], 0.2, ess=5e4, **settings)
    with optimizer.sampled_params(train=True):
        assert w.item() == pytest.approx(1.01, abs=1e-14)
        (0.3 * w).sum().backward()
    optimizer.step()
    assert optimizer.state[w]["hess"].item() == pytest.approx(0.5007458552499866, abs=1e-12)
    assert w.item() == pytest.approx(0.9400493931923778, abs=1e-12)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("clip_radius", [float("inf"), 0.02])
def test_it_is_the_authors_package(samples, clip_radius):
    ivon = pytest.importorskip("ivon", reason="needs ivon-opt, which is for tests only")
    ours, theirs = network(), network()
    beta1, beta2 = SETTINGS["betas"]
    plain = {k: v for k, v in SETTINGS.items() if k != "betas"} | {"clip_radius": clip_radius}
    optimizer = GlobalNoise(ours.parameters(), **plain, betas=SETTINGS["betas"])
    reference = ivon.IVON(theirs.parameters(), **plain, beta1=beta1, beta2=beta2)
    for step in range(50):
        torch.manual_seed(step)
        train(ours, optimizer, [step], samples=samples)
        torch.manual_seed(step)
        for _ in range(samples):
            with reference.sampled_params(train=True):
                reference.zero_grad()
                loss_of(theirs, step).backward()
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    hess = torch.cat([optimizer.state[p]["hess"].flatten() for p in ours.parameters()])
    torch.testing.assert_close(hess, reference.param_groups[0]["hess"], rtol=1e-5, atol=1e-6)


class Rule:
    """The rule of the paper in float64, one flat vector, given noise and gradients."""

    def __init__(self, w):
        self.w, self.h, self.m, self.t = w, np.full_like(w, 0.5), np.zeros_like(w), 0

    def step(self, noises, grads, noise=1.0):
        n, d, (b1, b2) = SETTINGS["ess"], SETTINGS["weight_decay"], SETTINGS["betas"]
        self.t += 1
        g = np.mean(grads, axis=0)
        if noise:
            product = np.mean([e * g for e, g in zip(noises, grads, strict=True)], axis=0)
            hat = product * (self.h + d) * n / noise**2
        else:
            hat = n * g**2
        old = self.h
        self.h = b2 * old + (1 - b2) * hat + 0.5 * (1 - b2) ** 2 * (old - hat) ** 2 / (old + d)
        self.m = b1 * self.m + (1 - b1) * g
        self.w = self.w - SETTINGS["lr"] * (0.5 + d) * (self.m / (1 - b1**self.t) + d * self.w) / (
            self.h + d
        )


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("noise", [1.0, 0.25, 0.0])
def test_it_is_the_papers_rule(samples, noise):
    weight = nn.Parameter(gradient(6, 5).double())
    optimizer = IVON([weight], **SETTINGS, noise=noise)
    rule, target = Rule(weight.detach().numpy().copy()), gradient(6, 5, seed=9).double()
    for step in range(30):
        optimizer.zero_grad()
        noises, grads = [], []
        for _ in range(samples):
            mean = weight.detach().clone()
            with optimizer.sampled_params(train=True):
                noises.append((weight - mean).detach().numpy())
                loss = ((weight - target) ** 4).mean() * (1 + step % 3)
                grads.append(torch.autograd.grad(loss, weight)[0].numpy().copy())
                weight.grad = torch.from_numpy(grads[-1].copy())
            assert torch.equal(weight, mean)
        sizes = [np.abs(e).max() for e in noises]
        assert (min(sizes) > 0) == (noise > 0)
        optimizer.step()
        rule.step(noises, grads, noise)
        np.testing.assert_allclose(weight.detach().numpy(), rule.w, rtol=0, atol=1e-12)
        np.testing.assert_allclose(optimizer.state[weight]["hess"].numpy(), rule.h, atol=1e-12)


def test_noise_has_the_deviation_of_the_posterior():
    weight = nn.Parameter(torch.zeros(200_000))
    optimizer = IVON([weight], **SETTINGS)
    with optimizer.sampled_params():
        drawn = weight.detach().clone()
    expected = 1 / (500 * (0.5 + 2e-3)) ** 0.5
    assert drawn.std().item() == pytest.approx(expected, rel=0.01)
    assert drawn.mean().item() == pytest.approx(0, abs=0.01 * expected)
    assert optimizer.deviation(weight)[0].item() == pytest.approx(expected, rel=1e-6)


def test_every_step_and_sample_has_noise_of_its_own():
    weight = nn.Parameter(torch.zeros(50))
    optimizer, drawn = IVON([weight], **SETTINGS), []
    for _ in range(2):
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                drawn.append(weight.detach().clone())
                weight.sum().backward()
        for sample in (0, 1):
            with optimizer.sampled_params(sample=sample):
                drawn.append(weight.detach().clone())
        optimizer.step()
        weight.data.zero_()
    assert len({tuple(each.tolist()) for each in drawn}) == len(drawn)
    again = IVON([weight], **SETTINGS)
    with again.sampled_params(train=True):
        assert torch.equal(weight, drawn[0])
    other = IVON([weight], **SETTINGS, seed=1)
    with other.sampled_params(train=True):
        assert not torch.equal(weight, drawn[0])


def test_expected_flips_are_those_of_samples():
    weight = nn.Parameter(gradient(100_000).mul_(0.05))
    optimizer = IVON([weight], **SETTINGS)
    before = weight.detach() >= 0
    with optimizer.sampled_params():
        share = ((weight >= 0) != before).float().mean().item()
    assert share == pytest.approx(optimizer.expected_flips(weight).item(), abs=0.005)
    assert 0.2 < share < 0.4
    exempt = IVON([weight], **SETTINGS, noise=0)
    assert exempt.expected_flips(weight) == 0
    with exempt.sampled_params():
        assert torch.equal(weight >= 0, before)


def test_weights_come_back_from_an_error():
    model = network()
    optimizer = IVON(model.parameters(), **SETTINGS)
    before = values(model)
    with optimizer.sampled_params():
        assert not equal(before, model.parameters())
    with pytest.raises(KeyError), optimizer.sampled_params(train=True):
        raise KeyError("in the forward pass")
    assert equal(before, model.parameters())
    with pytest.raises(RuntimeError, match="without a sample"):
        optimizer.step()


@pytest.mark.parametrize("samples", [1, 2])
def test_a_run_goes_on_from_its_state(samples):
    whole = network()
    expected = train(whole, IVON(whole.parameters(), **SETTINGS), range(12), samples=samples)
    first = network()
    optimizer = IVON(first.parameters(), **SETTINGS)
    train(first, optimizer, range(5), samples=samples)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = copy.deepcopy(first)
    optimizer = IVON(second.parameters(), **SETTINGS)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert equal(train(second, optimizer, range(5, 12), samples=samples), expected)


@pytest.mark.parametrize("samples", [1, 3])
def test_scaled_losses_are_unscaled(samples):
    """A power of two changes no bit, neither of the mean nor of the curvature."""

    def run(scale, unscale_first=False):
        model = network()
        optimizer = IVON(model.parameters(), **SETTINGS)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        weights = train(model, optimizer, range(8), samples=samples, scaler=scaler)
        return weights + [optimizer.state[p]["hess"] for p in model.parameters()]

    assert equal(run(1.0), run(4096.0))


def test_clipping_reaches_the_curvature():
    """With several samples too: their products shrink as the gradient does."""

    def run(samples):
        model = network()
        optimizer = IVON(model.parameters(), **SETTINGS)
        for _ in range(samples):
            with optimizer.sampled_params(train=True):
                (loss_of(model, 0) * 1000).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return torch.cat([optimizer.state[p]["hess"].flatten() for p in model.parameters()])

    assert (run(1) - 0.5).abs().max() < 0.1
    assert (run(2) - 0.5).abs().max() < 0.1


def test_a_step_that_a_scaler_leaves_out_leaves_nothing():
    def run(overflow):
        model = network()
        optimizer = IVON(model.parameters(), **SETTINGS)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        if overflow:
            optimizer.zero_grad()
            with optimizer.sampled_params(train=True):
                scaler.scale(loss_of(model, 0) * torch.inf).backward()
            scaler.step(optimizer)
            scaler.update()
        return train(model, optimizer, range(3), scaler=scaler)

    assert equal(run(False), run(True))


def test_parts_of_one_sample_share_its_noise():
    def run(parts):
        model = network(torch.float64)
        optimizer = IVON(model.parameters(), **SETTINGS)
        for step in range(5):
            optimizer.zero_grad()
            with optimizer.sampled_params(train=True):
                for rows in torch.arange(8).chunk(parts):
                    (loss_of(model, step, rows) * len(rows) / 8).backward()
            optimizer.step()
        return values(model)

    for a, b in zip(run(1), run(4), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def _process(rank, port, own_noise, folder):
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    model = network(torch.float64)
    optimizer = IVON(model.parameters(), **SETTINGS, own_noise=own_noise)
    wrapped = model if own_noise else DistributedDataParallel(model)
    for step in range(4):
        optimizer.zero_grad()
        with optimizer.sampled_params(train=True):
            inputs = gradient(8, 7, seed=step).double()
            rows = slice(None) if own_noise else slice(4 * rank, 4 * rank + 4)
            wrapped(inputs[rows]).square().mean().backward()
        optimizer.step()
    torch.save(values(model), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def in_two_processes(own_noise, folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_process, (port, own_noise, str(folder)), nprocs=2)
    a, b = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert equal(a, b)
    return a


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """With common noise, averaged gradients of halves are those of the whole batch."""
    model = network(torch.float64)
    alone = train(model, IVON(model.parameters(), **SETTINGS), range(4))
    for a, b in zip(in_two_processes(False, tmp_path), alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_two_processes_with_own_noise_are_two_samples(tmp_path):
    class Ranks(IVON):
        """Sample k of one process is what process k would draw."""

        def _standard_normal(self, count, like, place):
            _, position, steps, sample, stream = place
            return super()._standard_normal(count, like, (sample, position, steps, 0, stream))

    model = network(torch.float64)
    optimizer = Ranks(model.parameters(), **SETTINGS, own_noise=True)
    alone = train(model, optimizer, range(4), samples=2)
    for a, b in zip(in_two_processes(True, tmp_path), alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_predictions_are_means_of_softmaxes():
    model = network().eval()
    optimizer = IVON(model.parameters(), **SETTINGS | {"ess": 5.0})
    images, before = gradient(4, 7), values(model)
    shares = []
    for sample in range(3):
        with optimizer.sampled_params(sample=sample), torch.no_grad():
            shares.append(model(images).softmax(1))
    expected = torch.stack(shares).mean(0)
    torch.testing.assert_close(sampled_probabilities(model, images, optimizer, 3), expected)
    assert equal(before, model.parameters())
    assert (expected - model(images).softmax(1)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="samples must be at least 1, not 0"):
        sampled_probabilities(model, images, optimizer, 0)


def test_bad_input_is_named(caplog):
    model = network()
    with pytest.raises(TypeError, match="ess"):
        IVON(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"IVON: ess must be at least .*, not 0"):
        IVON(model.parameters(), 0.1, ess=0)
    with pytest.raises(ValueError, match=r"betas\[1\] must be from 0 to 1, not 1\.5"):
        IVON(model.parameters(), 0.1, ess=10, betas=(0.9, 1.5))
    with caplog.at_level(logging.WARNING):
        IVON(model.parameters(), 0.1, ess=10)
        assert not caplog.records
        IVON(model.parameters(), 1e-3, ess=10)
    assert "lr 0.001: that is Adam's scale, and IVON's is 0.1 to 2.5" in caplog.text
    optimizer = IVON(model.parameters(), 0.1, ess=10)
    with pytest.raises(RuntimeError, match="without a sample"):
        optimizer.step()
    with (
        optimizer.sampled_params(),
        pytest.raises(RuntimeError, match="inside sampled_params"),
        optimizer.sampled_params(),
    ):
        pass
    with optimizer.sampled_params(), pytest.raises(RuntimeError, match=r"step\(\) inside"):
        optimizer.step()
    with optimizer.sampled_params():  # looked at, but not trained on
        pass
    with pytest.raises(RuntimeError, match="without a sample"):
        optimizer.step()
    elsewhere = nn.Parameter(torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match="IVON's parameters are on cpu and meta"):
        IVON([*model.parameters(), elsewhere], 0.1, ess=10)
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = IVON(embedding.parameters(), 0.1, ess=10)
    with optimizer.sampled_params(train=True):
        embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="IVON takes no sparse gradient"):
        optimizer.step()

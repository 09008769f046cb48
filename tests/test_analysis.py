"""What a run says about its binary weights, against plain numpy."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.hand import plain
from tests.helpers import flips, gradient, signs
from tritonbnn.analysis import EDGES, Probe, Recorder, histogram
from tritonbnn.compute import Compute
from tritonbnn.data.batches import MicroBatch
from tritonbnn.models import build_model
from tritonbnn.nn import BinaryConv2d, BinaryLinear, BinaryUnit, binary_weights
from tritonbnn.train.checkpoint import State
from tritonbnn.train.engine import FirstBad, train_one_epoch
from tritonbnn.train.log import describe, scalars


class Scripted:
    """Two layers, their optimiser, and everything that numpy needs to tell the same.

    A quarter of the weights gets no gradient in the first epoch, and of these one half in none.
    But each update flips the sign of one weight in two rows, as momentum alone can.
    """

    def __init__(self, name="adam", **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(BinaryConv2d(5, 8, 3, padding=1), BinaryLinear(9, 7))
        for weight in self.model.parameters():
            weight.data[0] = 0.0
            weight.data *= 0.01
        kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        self.optimizer = kinds[name](self.model.parameters(), lr=0.003)
        self.recorder = Recorder(self.model, self.optimizer, **options)
        self.history = [self.weights()]
        self.gradients, self.records, self.batch = [], [], 0

    def weights(self):
        return [w.detach().numpy().copy() for w in self.model.parameters()]

    def update(self, leap=False):
        for index, weight in enumerate(self.model.parameters()):
            weight.grad = gradient(*weight.shape, seed=10 * len(self.history) + index) * 1e-3
            dead = 4 if not self.records else 8
            weight.grad.view(-1)[: weight.numel() // dead] = 1e-13
        self.gradients.append([w.grad.numpy().copy() for w in self.model.parameters()])
        due = self.recorder.due(self.batch)
        if due:
            self.recorder.before_update()
        self.optimizer.step()
        for weight in self.model.parameters():
            if leap:
                weight.data.view(-1)[::2] *= -1
            for row in (0, 1):
                index = len(self.history) % 6
                weight.data[row].view(-1)[index] = (
                    0.01 if weight[row].view(-1)[index] < 0 else -0.01
                )
        self.recorder.after_update(looked=due)
        self.batch += 1
        self.history.append(self.weights())

    def epoch(self, updates, leap=False):
        for index in range(updates):
            self.update(leap and index == 0)
        self.records.append(self.recorder.record(len(self.records) + 1))
        self.recorder.begin_epoch()
        self.batch = 0


SIZES = [8 * 5 * 9, 63]


def of_layers(record, key):
    return [layer[key] for layer in record["layers"].values()]


@pytest.mark.parametrize("interval", [1, 4, 100])
def test_flip_flop_is_the_mean_over_all_updates(interval):
    """Of a run whose first update flips half of the signs, as a rate that is too high does."""
    run = Scripted(level="light", interval=interval)
    run.epoch(11, leap=True)
    run.epoch(6)
    for record, first, last in zip(run.records, (0, 11), (11, 17), strict=True):
        pairs = pairwise(run.history[first : last + 1])
        counts = np.array([flips(before, after) for before, after in pairs])
        updates = last - first
        assert len(counts) == record["updates"] == updates
        assert record["flip_flop"] == counts.sum() / sum(SIZES) / updates
        assert of_layers(record, "flip_flop") == [
            c / n / updates for c, n in zip(counts.sum(0), SIZES, strict=True)
        ]
    assert flips(run.history[0], run.history[1])[1] > 0.4 * SIZES[1]
    assert list(run.records[0]["layers"]) == ["0.weight", "1.weight"]


def test_training_counts_the_flips_of_every_update():
    """At a rate so high that the first update turns half of the signs, of five with two looks."""
    torch.manual_seed(0)
    options = {"width": 0.125, "num_classes": 3, "small_images": True}
    model = build_model("birealnet_18", **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    compute = Compute(torch.device("cpu"))
    state = State.new(
        plain(compute), model, optimizer, Recorder(model, optimizer, level="light", interval=4)
    )
    history = []

    def remember():
        history.append([w.detach().numpy().copy() for w in binary_weights(model).values()])

    remember()
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    batches = [MicroBatch(images, labels, 4, 4, last=True)] * 5
    train_one_epoch(state, model, batches, FirstBad(compute.device), after_step=remember)
    counts = np.array([flips(before, after) for before, after in pairwise(history)])
    sizes = np.array([weight.size for weight in history[0]])
    assert counts[0].sum() > 0.4 * sizes.sum() > 2 * counts[1:].sum(1).max()
    record = state.analysis.record(1)
    assert record["flip_flop"] == counts.sum() / sizes.sum() / 5
    assert of_layers(record, "flip_flop") == (counts.sum(0) / sizes / 5).tolist()


def test_c2i_is_against_the_weights_that_the_step_started_from():
    run = Scripted(level="light", interval=3)
    for weight in run.model.parameters():
        weight.data.neg_()  # as loading others does: those of the constructor do not count
    run.recorder.begin_step()
    run.history = [run.weights()]
    run.epoch(4)
    run.epoch(4)
    changed = flips(run.history[0], run.history[-1])
    record = run.records[-1]
    agreement = 1 - sum(changed) / sum(SIZES)
    assert 0 < agreement < 1
    assert record["c2i_full"] == agreement
    assert record["c2i_half"] == pytest.approx(1 - sum(changed) / (sum(SIZES) / 2), abs=1e-15)
    assert of_layers(record, "c2i_full") == [1 - c / n for c, n in zip(changed, SIZES, strict=True)]


def moved(run, first, updates, looks):
    """Which weights move in an epoch: a gradient at a look, or a sign at any update."""
    result = []
    for layer in range(2):
        history = [signs(run.history[first + t][layer]) for t in range(updates + 1)]
        seen = np.any([after != before for before, after in pairwise(history)], axis=0)
        for look in looks:
            seen |= np.abs(run.gradients[first + look][layer]) >= 1e-12
        result.append(seen)
    return result


def test_dead_weights_and_their_revival():
    run = Scripted(level="light", interval=2)
    run.epoch(5)
    run.epoch(4)
    one, two = moved(run, 0, 5, (0, 2, 4)), moved(run, 5, 4, (0, 2))
    first, second = run.records
    dead = [int((~seen).sum()) for seen in one]
    assert 0 < dead[0] < SIZES[0] / 3
    assert first["dead"] == 1 - (sum(SIZES) - sum(dead)) / sum(SIZES)
    assert "revived" not in first
    revived = [int((~a & b).sum()) for a, b in zip(one, two, strict=True)]
    assert revived[0] > 0
    assert of_layers(second, "revived") == [r / n for r, n in zip(revived, SIZES, strict=True)]
    assert second["revived"] == sum(revived) / sum(SIZES)


def test_means_are_those_of_numpy():
    run = Scripted(level="light", interval=2)
    run.epoch(5)
    [record] = run.records
    beta1, beta2, eps, lr = 0.9, 0.999, 1e-8, 0.003
    for layer, (name, values) in enumerate(record["layers"].items()):
        m = v = np.zeros(run.history[0][layer].shape)
        steps = []
        for t, gradients in enumerate(run.gradients, start=1):
            g = gradients[layer].astype(float)
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
            m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
            steps.append(np.abs(lr * m_hat / (np.sqrt(v_hat) + eps)).mean())
        looks = [np.abs(run.gradients[t][layer].astype(float)).mean() for t in (0, 2, 4)]
        assert values["gradient"] == pytest.approx(np.mean(looks), rel=1e-6), name
        assert values["adam_step"] == pytest.approx(np.mean(steps[::2]), rel=1e-6), name
        last = np.abs(run.history[-1][layer].astype(float)).mean()
        assert values["weight"] == pytest.approx(last, rel=1e-6), name


def test_sgd_has_no_step_of_adam():
    run = Scripted("sgd", level="light")
    run.epoch(2)
    assert of_layers(run.records[0], "gradient")
    assert all("adam_step" not in layer for layer in run.records[0]["layers"].values())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_counts_in_no_mean(bad):
    run = Scripted("sgd", level="light", interval=1)
    run.update()
    good = np.abs(run.gradients[0][1].astype(float)).mean()
    for weight in run.model.parameters():
        weight.grad = torch.full_like(weight, bad)
    run.recorder.before_update()
    run.recorder.after_update(looked=True)
    record = run.recorder.record(1)
    assert of_layers(record, "gradient")[1] == pytest.approx(good, rel=1e-6)

    other = Scripted("sgd", level="light")
    for weight in other.model.parameters():
        weight.grad = torch.full_like(weight, bad)
    other.recorder.before_update()
    other.recorder.after_update(looked=True)
    assert all("gradient" not in layer for layer in other.recorder.record(1)["layers"].values())


class Reads(TorchDispatchMode):
    """Collects the operators that bring a number to the host."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten.equal):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_look_does_not_wait_for_the_device():
    run = Scripted(level="light", interval=1)
    run.update()
    for weight in run.model.parameters():
        weight.grad = torch.ones_like(weight)
    with Reads() as reads:
        run.recorder.before_update()
        run.recorder.after_update(looked=True)
        assert reads.seen == []
        run.recorder.flipped()
    assert reads.seen


def test_an_epoch_without_a_look_says_less():
    run = Scripted(level="light", interval=10)
    run.batch = 1
    run.epoch(3)
    assert run.records[0].keys() == {"updates", "c2i_full", "c2i_half", "flip_flop", "layers"}
    run.epoch(3)
    assert "revived" not in run.records[1]
    assert "dead" in run.records[1]


def test_off_measures_nothing_but_the_epoch_s_flips():
    run = Scripted()
    run.epoch(4)
    assert run.records == [None]
    run.update()
    expected = flips(run.history[-2], run.history[-1])
    assert run.recorder.flipped() == sum(expected) / sum(SIZES) > 0


def test_a_network_without_binary_weights():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    probe = Probe(torch.randn(4, 3))
    recorder = Recorder(model, optimizer, level="full", interval=1, probe=probe)
    recorder.begin_step()
    model.weight.grad = torch.ones_like(model.weight)
    recorder.before_update()
    optimizer.step()
    recorder.after_update(looked=True)
    assert recorder.flipped() is None
    assert recorder.record(1) == {"updates": 1, "layers": {}}
    assert recorder.rows() == {}


def test_a_share_of_no_weights_is_none_in_the_log():
    """It is null in JSON, not said in words, and not drawn."""
    numbers = dict.fromkeys(("train_loss", "train_top1", "val_top1", "val_top5"), 50.0)
    line = {"stage": "step2", "epoch": 1, **numbers, "images_per_second": 9.0, "flips": None}
    assert describe(line, 3).endswith("top-5 50.00 %; 9 img/s")
    assert describe({**line, "flips": 0.5}, 3).endswith("; 50.00% of signs flipped; 9 img/s")
    assert scalars(line).keys() == {*numbers, "images_per_second"}


def test_a_layer_without_a_gradient_is_dead():
    run = Scripted(level="light")
    run.recorder.before_update()
    run.recorder.after_update(looked=True)
    assert run.recorder.record(1)["dead"] == 1


def test_a_gradient_that_is_no_number_says_nothing_of_a_weight():
    """A weight is dead if all else that is known of its gradient is small, and if that is some."""
    run = Scripted("sgd", level="light", interval=1)
    looks = [[np.nan, np.nan, np.inf, 0.0, np.nan, 1.0], [np.nan, 0.0, 1e-13, -np.inf, 1.0, np.nan]]
    for look in looks:
        for weight in run.model.parameters():
            weight.grad = torch.zeros_like(weight)
            weight.grad.view(-1)[:6] = torch.tensor(look)
        run.recorder.before_update()
        run.recorder.after_update(looked=True)  # by an optimiser that skipped the update
    [conv, linear] = of_layers(run.recorder.record(1), "dead")
    assert (conv, linear) == tuple(pytest.approx(1 - 3 / n, abs=1e-15) for n in SIZES)
    run.recorder.begin_epoch()
    for weight in run.model.parameters():
        weight.grad = torch.full_like(weight, torch.nan)
    run.recorder.before_update()
    run.recorder.after_update(looked=True)
    record = run.recorder.record(2)
    assert (record["dead"], record["revived"]) == (0, 0)


def test_full_keeps_a_row_for_the_start_and_each_epoch():
    torch.manual_seed(0)
    model = nn.Sequential(BinaryUnit(8, 8, 3), BinaryUnit(8, 16, 1))
    optimizer = torch.optim.SGD(model.parameters())
    probe = Probe(torch.randn(2, 8, 4, 4))
    recorder = Recorder(model, optimizer, level="full", probe=probe)
    recorder.begin_step()
    expected = []
    for epoch in range(3):
        if epoch:
            recorder.record(epoch)
            recorder.begin_epoch()
        rows = {f"histogram.{n}.weight": histogram(model[n].weight) for n in (0, 1)}
        rows |= {f"saturation.{n}": s.shares.float() for n, s in probe.measure(model).items()}
        expected.append(rows)
        for parameter in model.parameters():
            parameter.data *= 1.5
    rows = recorder.rows()
    assert torch.equal(rows.pop("histogram.edges"), EDGES)
    assert rows.keys() == expected[0].keys()
    for name, tensor in rows.items():
        assert torch.equal(tensor, torch.stack([row[name] for row in expected])), name
    assert {t.dtype for t in rows.values()} == {torch.int64, torch.float32}

    later = Recorder(model, optimizer, level="full", probe=probe)
    later.record(2)
    gap = later.rows()
    assert gap["histogram.0.weight"].sum(1).tolist() == [0, 0, model[0].weight.numel()]
    assert gap["saturation.0.weight"].isnan().all(1).tolist() == [True, True, False]


def test_what_was_saved_goes_on_bit_for_bit():
    """Cut off within an epoch, between looks, a recorder tells what an uninterrupted one tells."""
    whole, cut = Scripted(level="full", interval=2), Scripted(level="full", interval=2)
    for run in (whole, cut):
        run.recorder.begin_step()
        run.epoch(3)
        for _ in range(4):
            run.update()
    saved = {name: tensor.clone() for name, tensor in cut.recorder.tensors().items()}
    cut.recorder = Recorder(cut.model, cut.optimizer, level="full", interval=2)
    cut.recorder.restore(saved)
    for run in (whole, cut):
        run.epoch(3)
        run.epoch(2)
    assert whole.records == cut.records
    assert "revived" in whole.records[1]
    ours, theirs = whole.recorder.tensors(), cut.recorder.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

"""The loops: losses, gradients, counts, and what is noticed without waiting."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from tests.hand import plain, taught
from tritonbnn.cli import UserError
from tritonbnn.compute import Compute
from tritonbnn.data.batches import MicroBatch
from tritonbnn.distributed import World
from tritonbnn.methods import evaluate
from tritonbnn.methods.scores import evaluation_sums
from tritonbnn.nn import BinaryConv2d, RPReLU, RSign
from tritonbnn.optim import build_optimizer
from tritonbnn.stop import StopSignals
from tritonbnn.train.checkpoint import State
from tritonbnn.train.engine import FirstBad, train_one_epoch
from tritonbnn.train.keeper import Keeper

CPU = torch.device("cpu")


def network() -> nn.Module:
    """Binary, and without BatchNorm, whose statistics would depend on how a batch is cut."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        RSign(8),
        BinaryConv2d(8, 8, 3, padding=1),
        RPReLU(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def new_state(model: nn.Module, compute: Compute | None = None) -> State:
    return State.new(plain(compute or Compute(CPU)), model, build_optimizer("adam", model, 1e-3))


def images_and_labels(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, 3, 8, 8, generator=generator, dtype=dtype)
    return images, torch.randint(3, (count,), generator=generator)


def train(state: State, batches: list[MicroBatch]) -> FirstBad:
    bad = FirstBad(CPU)
    train_one_epoch(state, state.model, batches, bad, after_step=lambda: None)
    return bad


def of_batch(images: Tensor, labels: Tensor) -> MicroBatch:
    return MicroBatch(images, labels, len(images), len(images), True)


def test_label_objective_is_the_formula():
    logits, labels = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    log_p = (logits.exp() / logits.exp().sum(1, keepdim=True)).log()
    target = torch.full((5, 4), 0.1 / 4, dtype=torch.float64)
    target[torch.arange(5), labels] += 0.9
    expected = -(target * log_p).sum(1)
    found = plain(Compute(CPU), 0.1).losses(nn.Identity(), of_batch(logits, labels))
    torch.testing.assert_close(found.each, expected)
    assert found.logits is logits


def test_teacher_objective_is_the_formula_and_ignores_labels():
    torch.manual_seed(0)
    teacher = nn.Linear(3, 4)
    images, logits = torch.randn(5, 3), torch.randn(5, 4)
    t = teacher(images).detach()
    expected = [
        -sum(
            math.exp(a) / sum(math.exp(x) for x in row_t) * (s - math.log(sum_s))
            for a, s in zip(row_t, row_s, strict=True)
        )
        for row_t, row_s in zip(t.tolist(), logits.tolist(), strict=True)
        for sum_s in [sum(math.exp(x) for x in row_s)]
    ]
    method = taught(Compute(CPU), teacher)
    student = lambda _: logits  # noqa: E731
    for labels in (torch.zeros(5, dtype=torch.int64), torch.full((5,), 3)):
        losses = method.losses(student, of_batch(images, labels)).each
        torch.testing.assert_close(losses, torch.tensor(expected))
    logits.requires_grad_()
    method.losses(student, of_batch(images, labels)).each.sum().backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_loss_of_a_student_that_is_its_teacher_is_the_entropy():
    logits = torch.zeros(2, 128)
    batch = of_batch(logits, torch.zeros(2, dtype=torch.int64))
    losses = taught(Compute(CPU), nn.Identity()).losses(nn.Identity(), batch).each
    torch.testing.assert_close(losses, torch.full((2,), math.log(128)))


def gradients_of(batches: list[MicroBatch]) -> list[Tensor]:
    """What one optimiser step would use."""
    state = new_state(network().double())
    seen: list[Tensor] = []
    state.optimizer.step = lambda: seen.extend(  # type: ignore[method-assign]
        p.grad.clone() for p in state.model.parameters()
    )
    train(state, batches)
    return seen


def test_parts_of_a_batch_give_the_gradient_of_the_whole():
    images, labels = images_and_labels(7, torch.float64)
    whole = gradients_of([MicroBatch(images, labels, 7, 7, True)])
    cuts = ((0, 3, 3, False), (3, 6, 3, False), (6, 7, 1, False), (0, 1, 0, True))  # one borrowed
    parts = gradients_of([MicroBatch(images[a:b], labels[a:b], n, 7, e) for a, b, n, e in cuts])
    model = network().double()
    nn.functional.cross_entropy(model(images), labels).backward()
    for a, b, parameter in zip(parts, whole, model.parameters(), strict=True):
        torch.testing.assert_close(b, parameter.grad, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_borrowed_images_are_not_counted():
    images, labels = images_and_labels(4)
    state = new_state(network())
    train(state, [MicroBatch(images, labels, 4, 4, False), MicroBatch(images, labels, 0, 4, True)])
    assert state.meter.sums[2] == 4
    assert state.batch == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_learns_in_every_precision(precision: str):
    images, labels = images_and_labels(8)
    state = new_state(network(), Compute(CPU, precision, channels_last=True))
    for group in state.optimizer.param_groups:
        group["lr"] = 0.02
    batches = [MicroBatch(images, labels, 8, 8, True)] * 40
    train(state, batches[:1])
    first = float(state.meter.sums[0])
    train(state, batches)
    state.meter.clear()
    train(state, batches[:1])
    assert float(state.meter.sums[0]) < 0.8 * first
    assert all(p.dtype == torch.float32 for p in state.model.parameters())
    assert bool(state.scaler.state_dict()) == (precision == "fp16")


def test_meter_counts_what_it_is_shown():
    images, labels = images_and_labels(6)
    state = new_state(network())
    before = copy.deepcopy(state.model)
    train(state, [MicroBatch(images, labels, 6, 6, True)])
    logits = before(images)
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    right = sum(int(row.argmax()) == int(label) for row, label in zip(logits, labels, strict=True))
    assert state.meter.sums.tolist() == pytest.approx([loss.item(), right, 6], rel=1e-6)


def test_evaluation_counts_every_image_once():
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 9), torch.randint(9, (50,))
    order = logits.argsort(dim=1, descending=True).tolist()
    first = sum(row[0] == label for row, label in zip(order, labels.tolist(), strict=True))
    five = sum(label in row[:5] for row, label in zip(order, labels.tolist(), strict=True))
    batches = [(logits[a:b], labels[a:b]) for a, b in ((0, 20), (20, 49), (49, 50))]
    score = evaluate(nn.Identity(), batches, Compute(CPU), World())
    assert (score.top1, score.top5, score.images) == (2 * first, 2 * five, 50)
    expected = nn.functional.cross_entropy(logits.double(), labels)
    assert score.loss == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(("classes", "known"), [(2, False), (5, False), (6, True)])
def test_top5_of_no_more_than_five_classes_is_no_result(classes: int, known: bool):
    logits, labels = torch.randn(40, classes), torch.arange(40) % classes
    assert evaluation_sums(logits, labels)[3] == 40
    score = evaluate(nn.Identity(), [(logits, labels)], Compute(CPU), World())
    assert (score.top5 is not None) == known
    assert score.top1 is not None


def test_evaluation_restores_nothing_and_trains_nothing():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    evaluate(model, [images_and_labels(4)], Compute(CPU), World())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_first_bad_step_is_remembered():
    bad = FirstBad(CPU)
    for index, value in enumerate((1.0, math.inf, 2.0, math.nan)):
        bad.note(torch.tensor(value), index)
    assert bad.read() == 1
    assert FirstBad(CPU).read() is None


def test_a_bad_loss_is_noted_with_its_step():
    images, labels = images_and_labels(4)
    batches = [MicroBatch(images, labels, 4, 4, True) for _ in range(3)]
    batches[1].images = images * math.inf
    state = new_state(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))
    assert train(state, batches).read() == 1


@pytest.mark.parametrize("spoil", ["loss", "weight"])
def test_a_bad_state_is_never_saved(tmp_path, spoil: str):
    state, bad = new_state(network()), FirstBad(CPU)
    keeper = Keeper(
        tmp_path,
        state,
        {"network": {}},
        bad,
        world=World(),
        signals=StopSignals(),
        save_minutes=60,
        log_interval=1,
    )
    keeper.save()
    good = (tmp_path / "last.safetensors").read_bytes()
    if spoil == "loss":
        bad.note(torch.tensor(math.nan), 4)
    else:
        next(state.model.parameters()).data[0] = math.nan
    state.epoch, state.batch = 2, 5
    for save in (keeper.save, keeper.save_best):
        with pytest.raises(UserError) as caught:
            save()
        words = str(caught.value)
        assert "optimiser step 5 of epoch 3, learning rate 0.001" in words
        assert f"the last good checkpoint is {tmp_path / 'last.safetensors'}" in words
    assert (tmp_path / "last.safetensors").read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == ["last.safetensors"]

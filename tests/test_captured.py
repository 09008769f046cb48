"""A captured training step is the ordinary one, bit for bit: on a tape, and on a GPU in graphs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.commands import write_tiny
from tests.conftest import HAS_GPU
from tests.hand import plain, taught
from tests.tape import Tape
from tritonbnn.analysis import Recorder
from tritonbnn.cli import UserError
from tritonbnn.compute import Compute
from tritonbnn.data.batches import MicroBatch
from tritonbnn.data.splits import IMAGENET
from tritonbnn.distributed import World
from tritonbnn.methods import Losses
from tritonbnn.methods.plain import Plain
from tritonbnn.models import build_model
from tritonbnn.nn import BinaryConv2d, BinaryUnit, RPReLU, RSign
from tritonbnn.optim import build_optimizer, make_capturable, optimizer_state, set_learning_rate
from tritonbnn.train import job, stage
from tritonbnn.train.captured import WARM_UP, CapturedStep, check_capture
from tritonbnn.train.checkpoint import LAST, State, encode, read, stage_folder
from tritonbnn.train.engine import FirstBad, take_step, train_one_epoch
from tritonbnn.train.graphs import Graphs
from tritonbnn.train.job import configure, train

CPU = torch.device("cpu")
FULL, ODD, CLASSES = 4, 3, 5


@pytest.fixture(autouse=True)
def operators_of_torch_alone(monkeypatch):
    """A tape does not hear of our C functions."""
    if not HAS_GPU:
        monkeypatch.setenv("TRITONBNN_LAUNCHERS", "eager")


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        RSign(8),
        BinaryConv2d(8, 8, 3, padding=1),
        RPReLU(8),
        BinaryUnit(8, 16, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


class Training:
    """A network in training; two of them begin alike.

    Attributes:
        seen: what each step left: weights, counts and what the analysis knows.
    """

    def __init__(
        self,
        compute: Compute,
        build: Callable[[], nn.Module] = small_network,
        make_method: Callable[[Compute], Plain] = plain,
        optimizer: str = "adam",
    ) -> None:
        torch.manual_seed(0)
        model = build()
        compute.place(model)
        method = make_method(compute)
        method.begin(model)
        self.optimizer = build_optimizer(optimizer, model, 2e-3, 1e-3)
        recorder = Recorder(model, self.optimizer, level="light", interval=2)
        recorder.begin_step()
        self.state = State.new(method, model, self.optimizer, recorder)
        self.bad = FirstBad(compute.device)
        self.seen: list[dict[str, Tensor]] = []

    def epoch(self, take, batches: list[MicroBatch], lr: float | None) -> None:
        if lr is not None:
            set_learning_rate(self.optimizer, lr)
        train_one_epoch(
            self.state, self.state.model, batches, self.bad, after_step=self._look, take=take
        )
        self.state.begin_epoch(self.state.epoch + 1)

    def _look(self) -> None:
        state = self.state
        found = dict(state.model.state_dict()) | state.analysis.tensors()
        found |= optimizer_state(state.model, self.optimizer)[0]
        found |= {"sums": state.meter.sums, **state.method.state_dict()}
        self.seen.append({name: t.detach().cpu().clone() for name, t in found.items()})

    def saved(self, path: Path) -> Path:
        """A checkpoint of now."""
        path.write_bytes(encode(self.state.tensors(World()), self.state.facts(World())))
        return path


def batches(*sizes: int) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(len(sizes))
    found = []
    for size in sizes:
        images = torch.randint(256, (size, 3, 8, 8), generator=generator, dtype=torch.uint8)
        labels = torch.randint(CLASSES, (size,), generator=generator)
        found.append(MicroBatch(images, labels, size, size, True))
    return found


def both(compute: Compute, graphs, **options) -> tuple[Training, Training]:
    """An eager training and a captured one, whose optimisers are alike."""
    eager, captured = Training(compute, **options), Training(compute, **options)
    make_capturable(eager.optimizer)
    step = CapturedStep(captured.state, FULL, graphs)
    for training, take in ((eager, take_step), (captured, step)):
        training.epoch(take, batches(*[FULL] * 6, ODD), 2e-3)
        training.epoch(take, batches(FULL, FULL, ODD, FULL), 1e-3)
        training.epoch(take, batches(FULL, FULL), 0.0)
    return eager, captured


def assert_same_steps(eager: Training, captured: Training) -> None:
    assert len(eager.seen) == len(captured.seen)
    for number, (a, b) in enumerate(zip(eager.seen, captured.seen, strict=True)):
        assert a.keys() == b.keys()
        different = [name for name in a if not torch.equal(a[name], b[name])]
        assert not different, f"step {number}: {different}"
    assert eager.bad.read() == captured.bad.read()


class Averaged(Plain):
    """Changes gradients before the update, and keeps a mean of the weights after it.

    Its passes are at weights of another scale, and in a context that they depend on.
    """

    inside = False

    @contextmanager
    def passes(self, model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
        weight = next(model.parameters())
        self.inside = True
        with torch.no_grad():
            weight.mul_(2)
        yield
        with torch.no_grad():
            weight.div_(2)
        self.inside = False

    def losses(self, network: nn.Module, batch: MicroBatch) -> Losses:
        each, logits, _ = super().losses(network, batch)
        return Losses(each * 3 if self.inside else each, logits)

    def begin(self, model: nn.Module) -> None:
        self.mean = {name: p.detach().clone() for name, p in model.named_parameters()}

    def before_update(self, model: nn.Module) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        weight = next(model.parameters())
        weight.grad = weight.grad.sign()  # another tensor

    def after_update(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            self.mean[name].lerp_(p.detach(), 0.1)

    def state_dict(self) -> dict[str, Tensor]:
        return self.mean


def averaged(compute: Compute) -> Plain:
    return Averaged(Plain.Settings(0.1), plain(compute).task)


def distilled(compute: Compute) -> Plain:
    teacher = nn.Sequential(nn.Conv2d(3, CLASSES, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    compute.place_frozen(teacher.eval().requires_grad_(False))
    return taught(compute, teacher)


@pytest.mark.parametrize("make_method", [plain, distilled, averaged])
@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_captured_steps_are_ordinary_ones(make_method, optimizer: str):
    compute, tape = Compute(CPU, normalise=IMAGENET), Tape()
    options = {"make_method": make_method, "optimizer": optimizer}
    eager, captured = both(compute, tape, **options)
    assert_same_steps(eager, captured)
    assert tape.warm == WARM_UP
    assert tape.repeated == [6 + 3 + 2 - WARM_UP] * 2  # passes and updates
    moved = [a for a in eager.seen[0] if not torch.equal(eager.seen[0][a], eager.seen[-3][a])]
    assert {"0.weight", "1.running_mean", "3.weight", "5.bn.running_var", "sums"} <= set(moved)


@pytest.mark.parametrize("spoilt", [1, WARM_UP, WARM_UP + 2])
def test_a_bad_loss_is_noted_with_its_step(spoilt: int):
    """Before the recording, in the step that records, and in one that is repeated."""
    coming = batches(*[FULL] * 7)
    for number, part in enumerate(coming):
        part.images = part.images.float() * (torch.inf if number == spoilt else 1)
    # signs would hide it
    training = Training(Compute(CPU), lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES)))
    training.epoch(CapturedStep(training.state, FULL, Tape()), coming, 1e-3)
    assert training.bad.read() == spoilt


def test_a_gradient_that_is_taken_away_is_one_line():
    class Freezing(Plain):
        def before_update(self, model):
            next(model.parameters()).grad = None

    def freezing(compute: Compute) -> Plain:
        return Freezing(Plain.Settings(), plain(compute).task)

    training = Training(Compute(CPU, normalise=IMAGENET), make_method=freezing)
    step = CapturedStep(training.state, FULL, Tape())
    with pytest.raises(UserError, match="takes a gradient away: leave --graph out"):
        training.epoch(step, batches(*[FULL] * 4), 1e-3)


def test_a_step_that_is_recorded_reads_nothing():
    """What waits for the device cannot be captured. The tape hears it, as a GPU would."""

    class Reading(Plain):
        def losses(self, network, part):
            found = super().losses(network, part)
            assert found.each.sum().item() > 0
            return found

    def reading(compute: Compute) -> Plain:
        return Reading(Plain.Settings(), plain(compute).task)

    training = Training(Compute(CPU, normalise=IMAGENET), make_method=reading)
    step = CapturedStep(training.state, FULL, Tape())
    with pytest.raises(RuntimeError, match="reads a tensor"):
        training.epoch(step, batches(*[FULL] * 4), 1e-3)
    assert len(training.seen) == WARM_UP


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("goes_on", ["captured", "eager"])
def test_a_run_goes_on_with_the_same_bits(tmp_path: Path, steps: int, goes_on: str):
    compute, coming = Compute(CPU, normalise=IMAGENET), batches(*[FULL] * 9, ODD)
    whole = Training(compute)
    make_capturable(whole.optimizer)
    whole.epoch(take_step, coming, 1e-3)

    first = Training(compute)
    first.epoch(CapturedStep(first.state, FULL, Tape()), coming[:steps], 1e-3)
    first.state.epoch, first.state.batch = 0, steps
    path = first.saved(tmp_path / "last.safetensors")
    again = Training(compute)
    again.state.restore(read(path), World())
    take = take_step
    if goes_on == "captured":
        take = CapturedStep(again.state, FULL, Tape())
    again.epoch(take, coming[steps:], None)
    names = [name for name in whole.seen[-1] if name in dict(again.state.model.named_parameters())]
    for name in names:
        assert torch.equal(whole.seen[-1][name], again.seen[-1][name]), name


def test_a_rate_in_a_tensor_is_the_number():
    """The update of a capturable Adam is that of an ordinary one, at a rate that float32 has."""
    ordinary, capturable = Training(Compute(CPU)), Training(Compute(CPU))
    make_capturable(capturable.optimizer)
    rates = [group["lr"] for group in capturable.optimizer.param_groups]
    for lr in (2.0**-9, 2.0**-11):
        for training in (ordinary, capturable):
            coming = [replace(p, images=p.images.float()) for p in batches(FULL, FULL, ODD)]
            training.epoch(take_step, coming, lr)
    now = [group["lr"] for group in capturable.optimizer.param_groups]
    assert all(a is b for a, b in zip(rates, now, strict=True))
    assert {rate.dtype for rate in rates} == {torch.float32}  # no other does on a GPU
    for a, b in zip(ordinary.seen, capturable.seen, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("settings", "device", "processes", "words"),
    [
        ({}, CPU, 1, "--graph captures what a GPU does, and this run is on the CPU: leave it out"),
        ({}, GPU, 2, "the step of a process alone, and there are 2"),
        ({"accumulation": 3}, GPU, 1, "in one part: leave it out, or --accumulation"),
        ({"precision": "fp16"}, GPU, 1, "use --precision bf16"),
        ({"step2": {"optimizer": "sgd"}}, GPU, 1, "adam and adamw, and step2 has sgd"),
        ({"optimizer": "adamw_prediction"}, GPU, 1, "adam and adamw, and step1 has adamw_pred"),
        ({"method": f"{__name__}.Averaged"}, GPU, 1, "set capturable = True in that class"),
    ],
)
def test_what_cannot_be_captured_is_refused(settings: dict, device, processes: int, words: str):
    config = configure("digits", **settings)
    with pytest.raises(UserError) as caught:
        check_capture(config, device, processes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [{}, {"precision": "bf16"}, {"optimizer": "adamw"}, {"method": f"{__name__}.Promising"}],
)
def test_what_can_be_captured_is_not_refused(settings: dict):
    check_capture(configure("digits", **settings), GPU, 1)


class Promising(Averaged):
    """Says that its losses are the same operators in each step."""

    capturable = True


RATE = {"lr": 2.0**-9, "schedule": "constant"}  # rates of float32, so that a run is the same


def trained(place: Path, out: str, **settings) -> dict[str, Tensor]:
    """All tensors of a run's last checkpoints, and the numbers of its log."""
    config = configure(str(place / "tiny.toml"), **RATE, **settings)
    done = train(config, place / out, fresh=False)
    found = {"loss": torch.tensor([line["train_loss"] for line in done.history])}
    for name in config.names:
        checkpoint = read(stage_folder(place / out, name) / LAST)
        found |= {f"{name} {key}": tensor for key, tensor in checkpoint.tensors.items()}
    return found


@pytest.mark.slow
def test_a_run_is_the_same_captured(tmp_path: Path, monkeypatch):
    """On a tape, from its stages and the validation between them to the files that it leaves."""
    write_tiny(tmp_path)
    eager = trained(tmp_path, "eager", batch_size=3)
    tapes: list[Tape] = []
    monkeypatch.setattr(stage, "Graphs", lambda device: tapes.append(Tape()) or tapes[-1])
    monkeypatch.setattr(job, "check_capture", lambda *given: None)
    captured = trained(tmp_path, "captured", batch_size=3, graph=True)
    assert [tape.warm for tape in tapes] == [WARM_UP] * 2
    assert all(tape.repeated[0] for tape in tapes)
    for name, tensor in eager.items():
        assert torch.equal(tensor, captured[name]), name


def test_a_run_in_graphs_is_the_same(tmp_path: Path, monkeypatch, gpu):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    write_tiny(tmp_path)
    settings = {"batch_size": 3, "device": "cuda", "precision": "bf16"}
    eager = trained(tmp_path, "eager", **settings)
    captured = trained(tmp_path, "captured", **settings, graph=True)
    for name, tensor in eager.items():
        if "rng_cuda" not in name:
            assert torch.equal(tensor, captured[name]), name


def reactnet() -> nn.Module:
    return build_model("reactnet_a", width=0.25, num_classes=CLASSES, small_images=True)


@pytest.mark.parametrize(
    ("build", "make_method", "precision", "compiled"),
    [
        pytest.param(small_network, plain, "fp32", False, marks=pytest.mark.gpu),
        pytest.param(small_network, averaged, "bf16", False, marks=pytest.mark.gpu),
        pytest.param(small_network, plain, "bf16", True, marks=pytest.mark.gpu),
        (reactnet, plain, "fp32", False),
        (reactnet, distilled, "bf16", False),
    ],
)
def test_graphs_take_the_same_steps(gpu, monkeypatch, build, make_method, precision, compiled):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    compute = Compute(gpu, precision, True, compiled, IMAGENET)
    eager, captured = both(compute, Graphs(gpu), build=build, make_method=make_method)
    assert_same_steps(eager, captured)


@pytest.mark.gpu
def test_a_repeated_step_does_not_wait(gpu):
    training = Training(Compute(gpu, "bf16", channels_last=True, normalise=IMAGENET))
    step = CapturedStep(training.state, FULL, Graphs(gpu))
    coming = [replace(p, images=p.images.to(gpu)) for p in batches(*[FULL] * 6)]
    coming = [replace(p, labels=p.labels.to(gpu)) for p in coming]
    training.epoch(step, coming, 1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for part in coming:
            step(training.state, training.state.model, [part], training.bad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_what_a_gpu_cannot_capture_is_one_line(gpu):
    with pytest.raises(UserError, match=r"cannot be captured as a CUDA graph \(.*leave --graph"):
        Graphs(gpu).record(lambda: torch.ones(3, device=gpu).sum().item())

"""Checkpoint files: whole or refused, never run, and restored exactly."""

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save as save_tensors
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tests.hand import plain
from tritonbnn.cli import UserError
from tritonbnn.compute import Compute
from tritonbnn.distributed import World
from tritonbnn.files import FolderLock, make_folder, write_atomically
from tritonbnn.models import build_model
from tritonbnn.nn import binary_weights
from tritonbnn.optim import build_optimizer
from tritonbnn.train.checkpoint import FACTS, LAST, PREVIOUS, State, encode, is_foreign, read
from tritonbnn.train.keeper import read_latest

CPU = torch.device("cpu")


def new_state(memory_format: torch.memory_format = torch.contiguous_format) -> State:
    torch.manual_seed(0)
    model = build_model("reactnet_18", num_classes=3, width=0.125, small_images=True)
    model.to(memory_format=memory_format)
    optimizer = build_optimizer("adam", model, 1e-2, 1e-4)
    return State.new(plain(Compute(CPU)), model, optimizer)


def train(state: State, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(4, 3, 16, 16, generator=generator)
        loss = F.cross_entropy(state.model(images), torch.tensor([0, 1, 2, 0]))
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.meter.sums += loss.item()
    torch.rand(7)


def save(state: State, path: Path) -> None:
    path.write_bytes(encode(state.tensors(World()), state.facts(World())))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "last.safetensors"


def test_tensors_and_facts_come_back(path: Path):
    tensors = {
        "model.a": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "model.b": torch.tensor(3.5),
        "signs": torch.tensor([True, False]),
        "empty": torch.zeros(0),
        "count": torch.tensor([2**53 + 1]),
    }
    path.write_bytes(encode(tensors, {"history": [{"loss": 0.1 + 0.2}], "name": "é"}))
    checkpoint = read(path)
    assert checkpoint.facts["history"] == [{"loss": 0.30000000000000004}]
    assert checkpoint.facts["name"] == "é"
    assert checkpoint.tensors.keys() == tensors.keys()
    assert all(torch.equal(checkpoint.tensors[k], v) for k, v in tensors.items())
    assert checkpoint.group("model").keys() == {"a", "b"}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_restored_training_goes_on_bit_for_bit(path: Path, memory_format: torch.memory_format):
    """Fused Adam on a CPU pairs wrong numbers where a moment has other strides than its weight."""
    whole = new_state(memory_format)
    train(whole, range(3))
    whole.epoch, whole.batch, whole.best = 2, 3, {"epoch": 1, "top1": 50.0}
    whole.history = [{"stage": "alone", "epoch": 1}]
    save(whole, path)
    random_after = torch.rand(3)
    train(whole, range(3, 6))

    resumed = new_state(memory_format)
    resumed.restore(read(path), World())
    assert torch.equal(torch.rand(3), random_after)
    assert (resumed.epoch, resumed.batch, resumed.best) == (2, 3, {"epoch": 1, "top1": 50.0})
    train(resumed, range(3, 6))
    for (name, a), b in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
        assert a.stride() == b.stride(), name
    assert torch.equal(whole.meter.sums, resumed.meter.sums)
    assert whole.analysis.flipped() == resumed.analysis.flipped() > 0


def test_signs_that_the_epoch_began_with_come_back(path: Path):
    state = new_state()
    save(state, path)
    for weight in state.model.parameters():
        weight.data.neg_()
    assert state.analysis.flipped() == 1
    state.analysis.begin_epoch()
    assert state.analysis.flipped() == 0
    state.restore(read(path), World())
    assert state.analysis.flipped() == 0
    for weight in state.model.parameters():
        weight.data.neg_()
    assert state.analysis.flipped() == 1


def test_a_zero_weight_is_positive():
    state = new_state()
    weights = binary_weights(state.model)
    for weight in weights.values():
        weight.data.fill_(-0.0)
    state.analysis.begin_epoch()
    total = sum(weight.numel() for weight in weights.values())
    next(iter(weights.values())).data.view(-1)[:3] = torch.tensor([-1e-30, 0.0, 1.0])
    assert state.analysis.flipped() == 1 / total


def as_newer(path: Path) -> None:
    """Make a checkpoint one that a later version has written."""
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()[FACTS])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    path.write_bytes(save_tensors(tensors, {FACTS: json.dumps({**facts, "format": 3})}))


def as_forbidden(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file be one that this user may not read. A superuser may read all."""
    real = Path.open

    def opened(self, *arguments):
        if self == path:
            raise PermissionError(13, "Permission denied", str(path))
        return real(self, *arguments)

    monkeypatch.setattr(Path, "open", opened)


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("newer", r"is of a newer version of tritonbnn \(format 3\): update the package"),
        ("forbidden", r"cannot read .*last.safetensors: Permission denied"),
    ],
)
def test_what_is_not_damaged_is_not_passed_over(tmp_path: Path, monkeypatch, reason, said):
    """Going on from the checkpoint before would lose what the last one holds."""
    for name in (LAST, PREVIOUS):
        save(new_state(), tmp_path / name)
    if reason == "newer":
        as_newer(tmp_path / LAST)
    else:
        as_forbidden(tmp_path / LAST, monkeypatch)
    with pytest.raises(UserError, match=said):
        read_latest(tmp_path)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


def content_of(kind: str, path: Path) -> bytes:
    good = encode({"model.a": torch.arange(1000.0)}, {})
    if kind.startswith("cut to"):
        return good[: int(kind.split()[-1])]
    if kind == "one bit flipped":
        return good[:-100] + bytes([good[-100] ^ 1]) + good[-99:]
    if kind == "a pickle with code":
        return pickle.dumps(Bomb(path.with_name("bomb")))
    if kind == "a torch file":
        torch.save({"model": Tensor([1.0])}, path)
        return path.read_bytes()
    if kind == "somebody else's safetensors":
        save_file({"a": torch.ones(3)}, path)
        return path.read_bytes()
    return {"text": b"hello" * 100, "zeros": bytes(5000)}[kind]


@pytest.mark.parametrize(
    "kind",
    [
        *("cut to 0", "cut to 7", "cut to 100", "cut to 4000", "one bit flipped"),
        *("a pickle with code", "a torch file", "somebody else's safetensors", "text", "zeros"),
    ],
)
def test_a_bad_file_is_refused(path: Path, kind: str):
    path.write_bytes(content_of(kind, path))
    with pytest.raises(UserError, match=r"last\.safetensors is (empty|damaged)"):
        read(path)
    assert not path.with_name("bomb").exists()


def test_a_checkpoint_is_not_taken_for_a_pickle(path: Path):
    """Its first byte is of a length, and may be any multiple of 8: that of a pickle too."""
    firsts = set()
    for size in range(0, 256, 8):
        path.write_bytes(encode({"model.a": torch.ones(1)}, {"text": "x" * size}))
        firsts.add(path.read_bytes()[0])
        assert not is_foreign(path)
    assert 0x80 in firsts


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="there is no checkpoint"):
            read(path)


def test_writing_keeps_the_file_before(tmp_path: Path):
    path, previous = tmp_path / "last", tmp_path / "previous"
    for content in (b"one", b"two", b"three"):
        write_atomically(path, content, keep=previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"three", b"two")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "previous"]


@pytest.mark.parametrize("name", ["write", "fsync"])
def test_a_failed_write_leaves_the_file(tmp_path: Path, monkeypatch, name: str):
    path = tmp_path / "last"
    path.write_bytes(b"old")

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(UserError, match="no space left to write"):
        write_atomically(path, b"new", keep=tmp_path / "previous")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["last"]


def test_a_write_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch):
    calls = []
    for name in ("write", "fsync", "replace"):
        real = getattr(os, name)

        def noted(*arguments, real=real, name=name):
            calls.append(name)
            return real(*arguments)

        monkeypatch.setattr(os, name, noted)
    write_atomically(tmp_path / "a", b"content")
    assert calls == ["write", "fsync", "replace", "fsync"]


def test_a_lock_is_seen_by_others_and_ends_with_its_process(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from tritonbnn.files import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(
            UserError, match=rf"in use by another running process \(pid {holder.pid}"
        ):
            FolderLock(tmp_path)
    finally:
        holder.kill()
        holder.communicate(timeout=300)
    FolderLock(tmp_path).release()


def test_a_folder_below_a_file_is_an_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="is a file, not a folder"):
            make_folder(path)


def test_channels_last_moments_are_not_stored_as_they_lie(path: Path):
    """Strides are lost in the file, which is why restoring must bring them back."""
    model = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    path.write_bytes(encode({"w": model.weight}, {}))
    assert read(path).tensors["w"].is_contiguous()
    assert not model.weight.is_contiguous()

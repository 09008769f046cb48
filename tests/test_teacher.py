"""The teacher: what it loads, and what it refuses."""

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import resnet34

from tritonbnn.cli import UserError
from tritonbnn.methods import teacher
from tritonbnn.methods.teacher import load_teacher


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return resnet34(num_classes=7).state_dict()


@pytest.fixture
def no_network(tmp_path, monkeypatch) -> Path:
    """An empty download folder, and an address where nothing is, whatever the network."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(teacher, "WEIGHTS_URL", f"file://{tmp_path}/absent/resnet34-b627a593.pth")
    return tmp_path / "hub" / "hub" / "checkpoints"


def refuse(spec, num_classes: int, match: str, **options) -> None:
    with pytest.raises(UserError, match=match) as error:
        load_teacher(str(spec), num_classes=num_classes, device="cpu", **options)
    assert "\n" not in str(error.value)


def test_none_is_no_teacher():
    assert load_teacher("none", num_classes=10, device="cpu", channels=1) is None


def test_the_weights_are_pinned_to_version_1():
    assert teacher.WEIGHTS_URL.endswith("/resnet34-b627a593.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_local_file_gives_a_frozen_network(tmp_path, state, suffix):
    path = tmp_path / f"t{suffix}"
    (torch.save if suffix == ".pth" else save_file)(state, path)
    before = torch.get_rng_state()
    net = load_teacher(str(path), num_classes=7, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    expected = resnet34(num_classes=7)
    expected.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(x), expected.eval()(x), rtol=0, atol=0)
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())


def test_the_download_is_kept_and_checked(tmp_path, no_network, monkeypatch):
    served = tmp_path / "served.pth"
    torch.save(resnet34().state_dict(), served)
    digest = hashlib.sha256(served.read_bytes()).hexdigest()[:8]
    good = served.rename(tmp_path / f"resnet34-{digest}.pth")
    monkeypatch.setattr(teacher, "WEIGHTS_URL", f"file://{good}")
    assert load_teacher("resnet34", num_classes=1000, device="cpu") is not None
    assert (no_network / good.name).exists()
    wrong = good.rename(tmp_path / "resnet34-00000000.pth")
    monkeypatch.setattr(teacher, "WEIGHTS_URL", f"file://{wrong}")
    refuse("resnet34", 1000, "invalid hash")
    assert not (no_network / wrong.name).exists()


def test_no_network_names_the_remedy(no_network):
    refuse("resnet34", 1000, "another machine and pass it as --teacher FILE")


def test_a_damaged_download_is_named(no_network):
    no_network.mkdir(parents=True)
    path = no_network / "resnet34-b627a593.pth"
    path.write_bytes(b"half a file")
    refuse("resnet34", 1000, str(path))


def test_class_counts_must_agree(tmp_path, state):
    torch.save(state, tmp_path / "t.pth")
    refuse(tmp_path / "t.pth", 10, "has 7 classes and the data have 10")
    refuse("resnet34", 10, "has 1000 classes and the data have 10")


def test_grey_data_have_no_teacher():
    refuse("resnet34", 1000, "grey", channels=1)


def test_an_unknown_teacher_is_named(tmp_path):
    refuse("resnet50", 1000, "resnet50 is neither a file, nor resnet34, nor none")
    refuse(tmp_path / "absent.safetensors", 1000, "is neither a file")
    refuse(tmp_path, 1000, "cannot be read")


class Evil:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "save", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o, protocol=2))]
)
def test_code_in_a_file_is_never_run(tmp_path, save):
    save({"fc.weight": Evil(tmp_path / "trace")}, tmp_path / "t.pth")
    refuse(tmp_path / "t.pth", 7, "without running code")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["t.pth", "t.safetensors"])
@pytest.mark.parametrize("content", [b"", b"text", b"PK\3\4" + bytes(50)])
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refuse(tmp_path / name, 7, f"{name} is damaged")


def test_a_truncated_file_is_named(tmp_path, state):
    for suffix, save in ((".pth", torch.save), (".safetensors", save_file)):
        path = tmp_path / f"t{suffix}"
        save({"fc.weight": state["fc.weight"]}, path)
        path.write_bytes(path.read_bytes()[:-100])
        refuse(path, 7, f"t{suffix} is damaged")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.pop("fc.weight"), "no matrix fc.weight"),
        (lambda s: s.update({"fc.weight": torch.tensor(7.0)}), "no matrix fc.weight"),
        (lambda s: s.pop("conv1.weight"), r"Missing key.*conv1\.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), r"Unexpected key.*extra"),
        (lambda s: s.update({"conv1.weight": torch.zeros(64, 1, 7, 7)}), "size mismatch"),
        (lambda s: s.update({"fc.bias": "words"}), r"fc\.bias"),
    ],
)
def test_another_network_is_named(tmp_path, state, change, reason):
    changed = dict(state)
    change(changed)
    torch.save(changed, tmp_path / "t.pth")
    refuse(tmp_path / "t.pth", 7, reason)


def test_a_file_that_is_no_dict_is_named(tmp_path):
    torch.save([torch.zeros(7)], tmp_path / "t.pth")
    refuse(tmp_path / "t.pth", 7, "holds no state dict, but a list")

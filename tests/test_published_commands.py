"""The commands on a published file: the score it was published for, or one clear line."""

import pickle
import re

import pytest
import torch
from torch.nn import functional as F
from torchvision import transforms as tv
from torchvision.datasets import ImageFolder

from benchmarks.baseline import ObviousReActNetA
from tests.commands import EVALUATE, TRAIN, run, write_tree
from tests.test_bad_input import assert_one_line
from tests.test_published import Malicious
from tritonbnn.models import build_model, load_adambnn
from tritonbnn.train.checkpoint import encode, is_foreign, read

CLASSES = "abc"
NORMALISE = tv.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FILE = "model_best.pth.tar"


def content(network):
    """What AdamBNN's trainer saves, from within DataParallel."""
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    optimizer = torch.optim.Adam(network.parameters()).state_dict()
    best = torch.tensor(70.5)
    return {"epoch": 255, "state_dict": state, "best_top1_acc": best, "optimizer": optimizer}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images of three classes and a published file of a narrow network."""
    folder = tmp_path_factory.mktemp("published")
    write_tree(folder / "images", train=1, val=2, classes=CLASSES)
    torch.manual_seed(0)
    network = ObviousReActNetA(num_classes=len(CLASSES), width=0.25)
    for name, value in network.state_dict().items():  # no two steps or channels score alike
        if value.is_floating_point() and "running" not in name and "weight" not in name:
            value.copy_(0.3 * torch.randn_like(value))
    torch.save(content(network), folder / FILE)
    return folder


def published_score(place, step):
    """Top-1 and loss by the plain network and torchvision's views."""
    network = ObviousReActNetA(
        num_classes=len(CLASSES), width=0.25, binary_weights=step == 2
    ).eval()
    saved = torch.load(place / FILE, weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("module."): t for name, t in saved.items()})
    view = tv.Compose([tv.Resize(256), tv.CenterCrop(224), tv.ToTensor(), NORMALISE])
    images, labels = zip(*ImageFolder(place / "images" / "val", view), strict=True)
    with torch.no_grad():
        logits = network(torch.stack(images))
    labels = torch.tensor(labels)
    right = (logits.argmax(dim=1) == labels).double().mean().item()
    return 100 * right, F.cross_entropy(logits, labels).item()


def test_a_published_file_scores_as_the_published_network(place):
    losses = []
    for step, weights in ((1, "real"), (2, "1-bit")):
        result = run(EVALUATE, FILE, "--step", step, "--data-dir", "images", cwd=place)
        assert result.code == 0, result.output
        line = result.output.splitlines()[-1]
        assert line.startswith(f"{FILE}: {weights} weights, 6 images of the data set images")
        score = [float(re.search(rf"{name} (\d+\.\d+)", line)[1]) for name in ("top-1", "loss")]
        assert score == pytest.approx(published_score(place, step), abs=5e-3)
        losses.append(score[1])
    assert abs(losses[0] - losses[1]) > 2e-2


def test_an_older_torch_s_file_is_read_too(place, tmp_path):
    old = tmp_path / "old.pth.tar"
    saved = torch.load(place / FILE, weights_only=True)
    torch.save(saved, old, _use_new_zipfile_serialization=False)
    argv = ("--step", 2, "--data-dir", "images")
    new, same = (run(EVALUATE, path, *argv, cwd=place).output for path in (FILE, old))
    assert new.splitlines()[-1].partition(":")[2] == same.splitlines()[-1].partition(":")[2]


def test_training_starts_from_a_published_file(place):
    argv = ("--data-dir", "images", "--teacher", "none", "--width", 0.25, "--image-size", 32)
    few = ("--workers", 0, "--step", 2, "--epochs", 1, "--out", "tuned", "--device", "cpu")
    result = run(TRAIN, "imagenet", *argv, *few, "--init-from", FILE, cwd=place)
    assert result.code == 0, result.output
    ours = read(place / "tuned" / "step2" / "last.safetensors").group("model")
    theirs = build_model("reactnet_a", num_classes=len(CLASSES), width=0.25)
    load_adambnn(theirs, place / FILE)
    for name, value in theirs.named_parameters():  # an only epoch is at learning rate 0
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("start", [b"\x80\x02", b"PK"])
def test_a_file_of_ours_is_never_taken_for_a_published_one(tmp_path, start):
    """Its first bytes are a length, which may be those of a pickle or a zip."""
    path = tmp_path / "best.safetensors"
    size = int.from_bytes(start, "little")
    tensors = {"model.x": torch.arange(3.0)}
    plain = encode(tensors, {})
    end = 8 + int.from_bytes(plain[:8], "little")
    content = size.to_bytes(8, "little") + plain[8:end].ljust(size) + plain[end:]
    path.write_bytes(content)
    assert content[:2] == start
    assert not is_foreign(path)
    assert torch.equal(read(path).tensors["model.x"], tensors["model.x"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([FILE, "--data-dir", "images"], "give --step 1"),
        ([FILE, "--step", "3"], "--step"),
        ([FILE, "--step", "2"], "pass an image tree as --data-dir"),
        ([FILE, "--step", "2", "--data-dir", "nowhere"], "nowhere does not exist"),
        ([FILE, "--step", "2", "--data-dir", "ab"], "other classes than model_best.pth.tar (2 and"),
        (["absent.pth.tar", "--step", "2"], "absent.pth.tar does not exist"),
    ],
)
def test_mistakes_with_a_published_file(place, argv, words):
    if not (place / "ab").exists():
        write_tree(place / "ab", train=1, val=1)
    assert_one_line(run(EVALUATE, *argv, cwd=place), words)


def test_a_step_is_for_published_files_only(place):
    network = {"name": "reactnet_a", "num_classes": 3, "width": 0.25}
    path = place / "ours.safetensors"
    path.write_bytes(encode({}, {"network": network}))
    assert_one_line(run(EVALUATE, path, "--step", 2, cwd=place), "leave it out")


def bad_files(place):
    """Name, bytes or content of torch.save, and what is said of it."""
    good = (place / FILE).read_bytes()
    saved = torch.load(place / FILE, weights_only=True)
    state = saved["state_dict"]
    yield "truncated", good[:-100], "is damaged"
    yield "half", good[: len(good) // 2], "is damaged"
    yield "hostile", {"state_dict": Malicious(place / "witness")}, "without running code"
    yield "hostile-pickle", pickle.dumps(Malicious(place / "witness")), "without running code"
    yield "list", [1, 2], "holds no state dict"
    yield "foreign", {"conv1.weight": torch.zeros(8, 3, 3, 3)}, "but of conv1.weight"
    yield "flat-head", {**state, "module.fc.weight": torch.zeros(3)}, "not a published ReActNet-A"
    some = {name: state[name] for name in list(state)[:20]} | {
        "fc.weight": state["module.fc.weight"]
    }
    yield "half-a-network", some, "more"
    odd = {**state, "module.feature.2.bn2_1.weight": torch.tensor(1.0)}
    head = "module.fc.weight"
    yield "sparse", {**state, head: state[head].to_sparse()}, "of plain tensors"
    yield "elsewhere", {**state, head: state[head].to("meta")}, "of plain tensors"
    yield "complex", {**state, head: state[head].cfloat()}, "of plain tensors"
    petabyte = torch.zeros(1, 1).expand(2**40, 256)
    yield "petabyte", {**state, head: petabyte}, "of plain tensors"
    yield "twice", {**state, "fc.weight": state[head]}, "a tensor twice"
    yield "escape", {**state, "\x1b[31m\n": state[head]}, "not used \\x1b[31m\\n"
    grey = {**state, "module.feature.0.conv1.weight": torch.zeros(8, 1, 3, 3)}
    yield "grey", grey, "3 channels where"
    yield "odd-shape", odd, "feature.2.bn2_1.weight must have shape (16,), not ()"


def test_bad_published_files(place):
    for name, held, words in bad_files(place):
        path = place / f"{name}.pth.tar"
        if isinstance(held, bytes):
            path.write_bytes(held)
        else:
            torch.save(held, path)
        result = run(EVALUATE, path, "--step", 2, "--data-dir", "images", cwd=place)
        assert_one_line(result, f"{name}.pth.tar", words)
        assert len(result.output.splitlines()[-1]) < 400
    assert not (place / "witness").exists()

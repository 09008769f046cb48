"""Sixty bad inputs of ``evaluate``, and as many of ``predict``, which share most."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.bad_inputs import DEVICES, NUMBERS, PLACES, assert_refused, snapshot, write_places
from tests.commands import EVALUATE, PREDICT, TRAIN, run, write_tiny, write_tree
from tritonbnn.train.checkpoint import encode, read

IMAGE = "images/val/a/0.png"


def checkpoints(folder: Path) -> None:
    """Files that are no good checkpoint, each in its own way."""
    good = read(folder / "run" / "step2" / "best.safetensors")
    whole = (folder / "run" / "step2" / "best.safetensors").read_bytes()
    network = good.facts["network"]
    facts = {
        "no-network": {k: v for k, v in good.facts.items() if k != "network"},
        "odd-network": {**good.facts, "network": [1]},
        "unknown-model": {**good.facts, "network": {**network, "name": "resnet_50"}},
        "wide": {**good.facts, "network": {**network, "width": 0.25}},
        "no-width": {**good.facts, "network": {**network, "width": "wide"}},
        "one-class": {**good.facts, "network": {**network, "num_classes": 1}},
        "more-classes": {**good.facts, "network": {**network, "num_classes": 3}},
        "unknown-key": {**good.facts, "network": {**network, "colour": "red"}},
    }
    for name, changed in facts.items():
        (folder / f"{name}.bad").write_bytes(encode(good.tensors, changed))
    some = dict(list(good.tensors.items())[:-1])
    (folder / "lacks-one.bad").write_bytes(encode(some, good.facts))
    nan = {k: t * float("nan") if t.is_floating_point() else t for k, t in good.tensors.items()}
    (folder / "nan.bad").write_bytes(encode(nan, good.facts))
    deep = len(whole).to_bytes(8, "little") + b"[" * len(whole)
    (folder / "deep.bad").write_bytes(deep)
    (folder / "empty.bad").write_bytes(b"")
    (folder / "cut.bad").write_bytes(whole[:-9])
    (folder / "header.bad").write_bytes(whole[:100])
    (folder / "flipped.bad").write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    (folder / "text.bad").write_text("words")
    (folder / "json.bad").write_text(json.dumps({"model": 1}))
    torch.save([1], folder / "list.bad")
    torch.save({"state_dict": {}}, folder / "nothing.bad")
    torch.save({"fc.weight": torch.ones(2, 3)}, folder / "other.bad")
    save_file({"fc.weight": torch.ones(2, 3)}, folder / "other-safe.bad")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished tiny run, other data, and bad files."""
    folder = tmp_path_factory.mktemp("bad")
    write_tiny(folder)
    assert run(TRAIN, "tiny.toml", "--out", "run", cwd=folder).code == 0
    write_tree(folder / "abc", classes="abc", train=1, val=1)
    write_tree(folder / "xy", classes="xy", train=1, val=1)
    (folder / "val-only" / "val").mkdir(parents=True)
    write_places(folder)
    checkpoints(folder)
    return folder


BAD_FILES = ("no-network", "odd-network", "unknown-model", "wide", "no-width", "one-class")
BAD_FILES = (*BAD_FILES, "more-classes", "unknown-key", "lacks-one", "nan", "empty", "cut")
BAD_FILES = (*BAD_FILES, "header", "flipped", "text", "json", "list", "nothing", "other")
BAD_FILES = (*BAD_FILES, "other-safe", "deep")
SHARED = [
    *([f"{name}.bad"] for name in BAD_FILES),
    *([name] for name in PLACES),
    *(["run", "--device", device] for device in DEVICES),
    *(["run", "--step", step] for step in ("1", "0", "3", "x")),
    *(["run", "--recipe", name] for name in ("digits", "nowhere.toml", "digit")),
    ["plain.pth", "--step", "2"],
    ["run", "--colour"],
    ["run", "--device"],
]
OF_EVALUATE = [
    *SHARED,
    [],
    ["run", "run"],
    *(["run", "--data-dir", name] for name in (*PLACES, "abc", "xy", "val-only")),
    *(["run", "--batch-size", n] for n in (*NUMBERS, "0", "1000000000000")),
    *(["run", "--workers", n] for n in (*NUMBERS, "100000")),
    *(["run", "--precision", name] for name in ("fp64", "FP32", "", "int8")),
]
OF_PREDICT = [
    *([argv[0], IMAGE, *argv[1:]] for argv in SHARED),
    [],
    ["run"],
    [IMAGE, "run"],
    *(["run", name] for name in PLACES),
    *(["run", IMAGE, name] for name in PLACES),
    *(["run", IMAGE, "--data-dir", name] for name in ("images", "abc", *PLACES)),
]


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        pytest.param(command, argv, id=f"{command.rpartition('.')[2]} {argv}"[:80])
        for command, table in ((EVALUATE, OF_EVALUATE), (PREDICT, OF_PREDICT))
        for argv in table
    ],
)
def test_a_bad_input_is_one_line(place, command, argv):
    before = snapshot(place)
    assert_refused(run(command, *argv, cwd=place), before, place)


def test_the_tables_are_long():
    assert len(OF_EVALUATE) >= 60
    assert len(OF_PREDICT) >= 60

"""More than sixty bad inputs of ``train``: flags, recipes, data and places."""

import pytest
import torch

from tests.bad_inputs import DEVICES, NUMBERS, assert_refused, snapshot, write_places
from tests.commands import TRAIN, run, write_tiny, write_tree

REALS = ("", "x", "nan", "inf", "-inf", "1e999", "1,5")  # of no finite number
WHOLE = ("--epochs", "--batch-size", "--accumulation", "--workers", "--seed", "--image-size")
FLAGS = [
    *([flag, value] for flag in WHOLE for value in NUMBERS),
    *([flag, "0"] for flag in ("--epochs", "--batch-size", "--accumulation", "--image-size")),
    *([flag, value] for flag in ("--lr", "--width", "--step2.lr") for value in REALS),
    *([flag, value] for flag in ("--lr", "--width") for value in ("0", "-1")),
    *(["--device", device] for device in DEVICES),
    *([flag, "nonsense"] for flag in ("--model", "--optimizer", "--precision", "--augment")),
    *([flag, "nonsense"] for flag in ("--lighting", "--plan", "--analysis", "--step")),
    *(["--teacher", name] for name in ("nowhere", "empty", "text.png", "tiny.toml", "list.pth")),
    *(["--init-from", name] for name in ("nowhere", "empty", "text.png", "tiny.toml", "list.pth")),
    *(["--data-dir", name] for name in ("nowhere", "empty", "text.png", "no-val", "one-class")),
    *(["--data-dir", name] for name in ("other-classes", "no-images", "x" * 300, "a\nb")),
    ["--batch-size", "1000000000000"],
    ["--workers", "1000000"],
    ["--width", "0.001"],
    ["--image-size", "17"],
    ["--step", "2"],
    ["--colour"],
    ["--lr"],
    ["--weight-decay", "-1"],
    ["--label-smoothing", "1"],
    ["more"],
]
RECIPES = {
    "not-toml": "epochs = = 3",
    "unknown-key": "epoch = 3",
    "a-list": "epochs = [1, 2]",
    "a-date": "epochs = 1979-05-27",
    "text-for-number": 'lr = "fast"',
    "number-for-text": "model = 3",
    "float-for-whole": "epochs = 1.5",
    "unknown-table": "[step3]\nlr = 1.0",
    "nested": "[step1.more]\nlr = 1.0",
    "twice": "lr = 1.0\nlr = 2.0",
    "nan": "lr = nan",
    "deep": f"epochs = {'[' * 100_000}",
    "huge": f"epochs = {10**30}0x",
}
OUTS = ("text.png", "text.png/below", "/proc/none", "/dev/null/x", "x" * 300)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    write_tiny(folder)
    write_places(folder)
    write_tree(folder / "no-val")
    (folder / "no-val" / "val").rename(folder / "no-val" / "value")
    write_tree(folder / "one-class", classes="a")
    write_tree(folder / "other-classes")
    (folder / "other-classes" / "val" / "a").rename(folder / "other-classes" / "val" / "c")
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (folder / "no-images" / name).mkdir(parents=True)
    torch.save([1], folder / "list.pth")
    for name, text in RECIPES.items():
        (folder / f"{name}.toml").write_text(f'data_dir = "images"\n{text}\n')
    (folder / "latin.toml").write_bytes(b'data_dir = "caf\xe9"\n\xff = 1\n')
    (folder / "wide.toml").write_text("lr = 1.0\n", "utf-16")
    return folder


def without_the_run(before):
    """A folder for the run may be made before its data are looked at, but holds no checkpoint."""
    kept = ("config.toml", "environment.json", ".lock", "log.jsonl")
    return {p: c for p, c in before.items() if p.name not in kept and "run" not in p.parts[-2:]}


def check(place, *argv):
    before = snapshot(place)
    result = run(TRAIN, *argv, cwd=place)
    assert not list(place.rglob("*.safetensors"))
    after = snapshot(place)
    assert without_the_run(after).keys() - {place / "run" / "step1", place / "run" / "step2"} == (
        without_the_run(before).keys() - {place / "run" / "step1", place / "run" / "step2"}
    )
    assert_refused(result, after, place)


@pytest.mark.parametrize("argv", FLAGS, ids=lambda argv: " ".join(argv)[:60])
def test_a_bad_flag_is_one_line(place, argv):
    check(place, "tiny.toml", "--out", "run", *argv)


@pytest.mark.parametrize("name", [*RECIPES, "latin", "wide", "nowhere", "empty", "text.png/x"])
def test_a_bad_recipe_is_one_line(place, name):
    check(place, f"{name}.toml", "--out", "run")


@pytest.mark.parametrize("out", OUTS, ids=lambda out: out[:30])
def test_a_bad_place_is_one_line(place, out):
    check(place, "tiny.toml", "--out", out)

"""The commands on data of several kinds and ages: CIFAR's files, orders of classes, older runs."""

import shutil
from pathlib import Path

import pytest

from tests.commands import EVALUATE, TRAIN, Result, run, write_tiny, write_tree
from tests.test_bad_input import assert_one_line
from tests.test_cifar import NAMES, write_cifar
from tritonbnn.train.checkpoint import encode, read

NUMBERS = ("2", "10")  # as text, 10 comes first
SHORT = ("--epochs", 1, "--step", 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny recipe, images of the classes 2 and 10, and a run that takes them as numbers."""
    folder = tmp_path_factory.mktemp("data")
    write_tiny(folder)
    shutil.rmtree(folder / "images")
    write_tree(folder / "images", classes=NUMBERS)
    result = train(folder, "numeric", "--class-order", "numeric", "--epochs", 3)
    assert result.code == 0, result.output
    return folder


def train(place: Path, out: str, *argv: object) -> Result:
    return run(TRAIN, "tiny.toml", "--out", out, "--step", 1, *argv, cwd=place)


def best(place: Path, out: str) -> Path:
    return place / out / "step1" / "best.safetensors"


def with_data(path: Path, new: Path, **data: object) -> Path:
    """A checkpoint that says other things of its data; None leaves one out."""
    good = read(path)
    facts = {k: v for k, v in good.facts.items() if k != "checksum"}
    facts["data"] = {k: v for k, v in {**facts["data"], **data}.items() if v is not ...}
    new.write_bytes(encode(good.tensors, facts))
    return new


def score(result: Result) -> str:
    assert result.code == 0, result.output
    return result.output.splitlines()[-1].partition(": ")[2]


def test_a_run_is_scored_in_its_own_order(place: Path):
    assert read(best(place, "numeric")).facts["data"]["classes"] == ["2", "10"]
    own = score(run(EVALUATE, "numeric", cwd=place))
    assert "top-1 100.00 %" in own
    # whatever is said of weights that name no classes
    for order in ("name", "numeric"):
        assert score(run(EVALUATE, "numeric", "--class-order", order, cwd=place)) == own


def test_weights_that_name_no_classes_are_warned_of_and_can_be_told(place: Path):
    own = score(run(EVALUATE, "numeric", cwd=place))
    path = with_data(best(place, "numeric"), place / "nameless.safetensors", classes=None)
    by_text = run(EVALUATE, path, cwd=place)
    assert by_text.output.count("pass --class-order numeric") == 1
    assert "top-1 0.00 %" in score(by_text)
    by_number = run(EVALUATE, path, "--class-order", "numeric", cwd=place)
    assert "pass --class-order" not in by_number.output
    assert score(by_number) == own


def test_init_from_the_same_classes_in_another_order_is_refused(place: Path):
    result = train(place, "text", "--init-from", "numeric", *SHORT)
    assert_one_line(result, "another order", "class number 0 is 2 there, and 10", "--class-order")
    result = train(place, "right", "--init-from", "numeric", "--class-order", "numeric", *SHORT)
    assert result.code == 0, result.output
    assert "head starts anew" not in result.output


def test_init_from_as_many_other_classes_replaces_the_head(place: Path):
    write_tree(place / "ab", classes="ab")
    result = train(place, "other", "--init-from", "numeric", "--data-dir", "ab", *SHORT)
    assert result.code == 0, result.output
    assert "other classes, 4 (the first: 10, only in the checkpoint): the head starts anew" in (
        result.output
    )


def test_data_of_other_names_are_refused(place: Path):
    write_tree(place / "xy", classes=["2", "x"])
    result = run(EVALUATE, "numeric", "--data-dir", "xy", cwd=place)
    assert_one_line(result, "they differ in 2 (the first: 10, only in the checkpoint)")


def test_a_run_of_before_is_scored_and_goes_on(place: Path):
    assert train(place, "today", *SHORT).code == 0
    ours = score(run(EVALUATE, best(place, "today"), cwd=place))
    new = place / "before.safetensors"
    old = {"name": "folder", "white_level": ..., "background": ...}
    assert score(run(EVALUATE, with_data(best(place, "today"), new, **old), cwd=place)) == ours
    config = place / "today" / "config.toml"
    lines = [
        line.replace('"images"', '"folder"') if line.startswith("dataset") else line
        for line in config.read_text().splitlines()
        if line.split(" ")[0] not in ("class_order", "white_level", "background")
    ]
    config.write_text("\n".join(lines))
    result = train(place, "today", "--epochs", 2)
    assert result.code == 0, result.output


def test_cifar_is_trained_on_and_scored(place: Path):
    write_cifar(place / "cifar-10-batches-py", 10)
    small = ("--model", "birealnet_18", "--width", 0.125, "--device", "cpu", "--batch-size", 8)
    result = run(TRAIN, "cifar10", "--data-dir", ".", *small, *SHORT, "--out", "cifar", cwd=place)
    assert result.code == 0, result.output
    facts = read(best(place, "cifar")).facts["data"]
    assert (facts["name"], facts["classes"], facts["dir"]) == ("cifar10", NAMES[:10], str(place))
    assert "4 images of the data set cifar10" in score(run(EVALUATE, "cifar", cwd=place))
    (place / "cifar-10-batches-py" / "data_batch_5").unlink()
    result = run(EVALUATE, "cifar", cwd=place)
    assert_one_line(result, "data_batch_5 is missing")


def test_digits_of_a_folder_leave_nothing_behind(tmp_path: Path):
    result = run(TRAIN, "digits", "--data-dir", "photos", "--out", "run", cwd=tmp_path)
    assert_one_line(result, "use the recipe images")
    assert not (tmp_path / "run").exists()

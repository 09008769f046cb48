"""A run as a whole: its folder, the hand-over between the steps, other runs' weights."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet34

from tests.commands import ROOT, TRAIN, Result, run, write_tiny, write_tree
from tritonbnn.models import build_model
from tritonbnn.train.arguments import parse, shipped_recipes
from tritonbnn.train.checkpoint import Checkpoint, encode, read
from tritonbnn.train.log import is_published, table

STEADY = ("--step2.epochs", 1)  # an only epoch is at learning rate 0: no weight moves


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_tiny(folder)
    return folder


def train(place: Path, *argv: object, **options) -> Result:
    result = run(TRAIN, "tiny.toml", *argv, cwd=place, **options)
    assert result.code == 0, result.output
    return result


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """A run whose second step keeps the weights that it was given."""
    train(place, "--out", "whole", "--step1.epochs", 3, *STEADY)
    return place / "whole"


def same_weights(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether all but BatchNorm's running statistics are equal."""
    names = [name for name in a.group("model") if "running" not in name and "num_b" not in name]
    return all(torch.equal(a.group("model")[n], b.group("model")[n]) for n in names)


def test_a_run_is_a_folder(whole: Path):
    names = {str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file()}
    boards = {name for name in names if name.startswith("tensorboard/")}
    assert {name.split("/")[1] for name in boards} == {"step1", "step2"}
    kinds = [("step1", "last"), ("step1", "previous"), ("step1", "best")]
    kinds += [("step2", "last"), ("step2", "previous"), ("step2", "best")]
    files = {f"{step}/{kind}.safetensors" for step, kind in kinds}
    assert names - boards == files | {"config.toml", "environment.json", "log.jsonl", ".lock"}
    config = tomllib.loads((whole / "config.toml").read_text())
    first, second = config["stage"]
    settings = {"epochs": 3, "lr": 0.002, "weight_decay": 5e-6, "binary_weights": False}
    assert {"name": "step1", **settings}.items() <= first.items()
    assert (second["start"], second["optimizer"]["name"]) == ("step1", "adam")
    environment = json.loads((whole / "environment.json").read_text())
    assert environment["seed"] == 0
    assert environment["device"] == "cpu"
    assert environment["torch"] == torch.__version__


def test_step_2_starts_from_the_best_of_step_1(whole: Path):
    best, other = read(whole / "step1" / "best.safetensors"), read(whole / "step1/last.safetensors")
    assert same_weights(read(whole / "step2" / "last.safetensors"), best)
    lines = [json.loads(line) for line in (whole / "log.jsonl").open()]
    first = [line["val_top1"] for line in lines if line["stage"] == "step1"]
    assert best.facts["best"] == {"epoch": 1 + first.index(max(first)), "top1": max(first)}
    assert other.facts["best"] == best.facts["best"]


def test_a_best_that_is_not_the_last_is_handed_over(place: Path):
    """Here the last may be as good as the best, so another best is put there."""
    out = place / "handover"
    train(place, "--out", "handover", "--step", 1, "--step1.epochs", 3, *STEADY)
    best = read(out / "step1" / "best.safetensors")
    tensors = {name: tensor.clone() for name, tensor in best.tensors.items()}
    tensors["model.fc.bias"] += 1

    facts = {k: v for k, v in best.facts.items() if k not in ("format", "checksum")}
    (out / "step1" / "best.safetensors").write_bytes(encode(tensors, facts))
    train(place, "--out", "handover", "--step", 2, "--step1.epochs", 3, *STEADY)
    assert same_weights(
        read(out / "step2" / "last.safetensors"), read(out / "step1" / "best.safetensors")
    )


def test_checkpoints_say_what_they_are(whole: Path):
    for step in (1, 2):
        for kind in ("last", "best"):
            facts = read(whole / f"step{step}" / f"{kind}.safetensors").facts
            assert facts["network"] == {
                "name": "birealnet_18",
                "num_classes": 2,
                "binary_weights": step == 2,
                "width": 0.125,
                "in_channels": 3,
                "small_images": True,
            }
            assert facts["data"]["classes"] == ["a", "b"]
            assert facts["stage"] == f"step{step}"


def test_both_steps_at_once_equal_one_after_the_other(place: Path, whole: Path):
    argv = ("--out", "apart", "--step1.epochs", 3, *STEADY)
    train(place, *argv, "--step", 1)
    assert not (place / "apart" / "step2").exists()
    train(place, *argv, "--step", 2)
    for step in (1, 2):
        name = Path(f"step{step}") / "last.safetensors"
        ours, theirs = read(place / "apart" / name).tensors, read(whole / name).tensors
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_step_2_waits_for_the_end_of_step_1(place: Path):
    stopped = run(TRAIN, "tiny.toml", "--out", "half", cwd=place, mishap="SIGTERM", at_step=3)
    assert stopped.code == 75
    result = run(TRAIN, "tiny.toml", "--out", "half", "--step", 2, cwd=place)
    assert result.code == 2
    assert "step1 has done 1 of 2 epochs: run --stage step1 first" in result.output


def test_more_epochs_go_on_from_the_last(place: Path):
    train(place, "--out", "longer", "--step", 1)
    train(place, "--out", "longer", "--step", 1, "--epochs", 4)
    lines = [json.loads(line) for line in (place / "longer" / "log.jsonl").open()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert [line["lr"] for line in lines] == [1e-3, 0.0, 5e-4, 0.0]


def test_fresh_takes_a_new_numbered_folder(place: Path):
    before = train(place, "--epochs", 1, "--step", 1)
    log = (place / "runs" / "tiny" / "log.jsonl").read_text()
    assert "in runs/tiny\n" in before.output
    for number in (2, 3):
        result = train(place, "--epochs", 1, "--step", 1, "--fresh")
        assert f"in runs/tiny-{number}\n" in result.output
    assert (place / "runs" / "tiny" / "log.jsonl").read_text() == log


def test_init_from_a_run_with_the_same_classes(place: Path, whole: Path):
    result = train(place, "--out", "tuned", "--init-from", whole, "--step", 2, "--epochs", 1)
    assert f"starting from the weights in {whole / 'step2' / 'best.safetensors'}" in result.output
    best = read(whole / "step2" / "best.safetensors")
    assert same_weights(read(place / "tuned" / "step2" / "last.safetensors"), best)


def test_init_from_a_run_with_other_classes_replaces_the_head(place: Path, whole: Path):
    write_tree(place / "abc", classes="abc")
    argv = ("--out", "abc-run", "--data-dir", "abc", "--init-from", whole, "--step", 2)
    result = train(place, *argv, "--epochs", 1)
    assert "3 classes after 2: the head starts anew" in result.output
    ours = read(place / "abc-run" / "step2" / "last.safetensors").group("model")
    theirs = read(whole / "step2" / "best.safetensors").group("model")
    assert ours["fc.weight"].shape[0] == 3
    assert all(
        torch.equal(value, theirs[name])
        for name, value in ours.items()
        if not name.startswith("fc.") and "running" not in name and "num_b" not in name
    )


def test_step_1_again_leaves_the_log_of_step_2(place: Path, whole: Path):
    log = (whole / "log.jsonl").read_text()
    train(place, "--out", "whole", "--step1.epochs", 3, *STEADY, "--step", 1)
    assert (whole / "log.jsonl").read_text() == log


def test_a_finished_run_needs_no_space(place: Path, whole: Path):
    argv = ("--out", "whole", "--step1.epochs", 3, *STEADY)
    train(place, *argv)  # the configuration may name another step
    assert train(place, *argv).calls == 0


def test_the_seed_decides_the_weights(place: Path):
    weights = []
    for seed in (0, 0, 1):
        out = f"seed-{len(weights)}"
        train(place, "--out", out, "--step", 1, "--epochs", 1, "--seed", seed)
        weights.append(read(place / out / "step1" / "last.safetensors"))
    assert same_weights(weights[0], weights[1])
    assert not same_weights(weights[0], weights[2])
    torch.manual_seed(0)
    model = build_model("birealnet_18", num_classes=2, width=0.125, small_images=True)
    expected = model.state_dict()["blocks.0.weight"]
    assert torch.equal(weights[0].group("model")["blocks.0.weight"], expected)


def test_every_epoch_has_one_line(whole: Path):
    lines = [json.loads(line) for line in (whole / "log.jsonl").open()]
    assert [(line["stage"], line["epoch"]) for line in lines] == [
        *(("step1", epoch) for epoch in (1, 2, 3)),
        ("step2", 1),
    ]
    for line in lines:
        assert line.keys() == {
            *("stage", "epoch", "lr", "train_loss", "train_top1", "val_loss", "val_top1"),
            *("val_top5", "flips", "images_per_second", "seconds", "analysis"),
        }
        assert line["val_top5"] is None  # of two classes
        assert (line["flips"] > 0) == (line["lr"] > 0)


def test_tensorboard_holds_the_log(whole: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(whole / "tensorboard" / "step1"))
    board.Reload()
    lines = [json.loads(line) for line in (whole / "log.jsonl").open()]
    drawn = [(event.step, event.value) for event in board.Scalars("val_loss")]
    expected = [(line["epoch"], line["val_loss"]) for line in lines if line["stage"] == "step1"]
    assert [epoch for epoch, _ in drawn] == [epoch for epoch, _ in expected]
    assert [loss for _, loss in drawn] == pytest.approx([loss for _, loss in expected], rel=1e-6)


def test_table_of_imagenet_shows_the_published_numbers():
    line = {"val_top5": 90.0, "seconds": 60.0}
    scores = ((1, 70.0), (1, 69.0), (2, 68.5))
    history = [{"stage": f"step{s}", "val_top1": t, **line} for s, t in scores]
    stages = parse(["imagenet"]).config.stages
    plain, published = (table(history, stages, published=p) for p in (False, True))
    assert "71.4" not in plain
    rows = [" ".join(row.split()) for row in published.splitlines()]
    assert rows[1] == "step1 real 2 70.00 % 69.00 % 90.00 % 120 71.4 %"
    assert rows[2] == "step2 1-bit 1 68.50 % 68.50 % 90.00 % 60 70.5 %"


@pytest.mark.parametrize(
    ("flags", "published"),
    [
        ("", True),
        ("--seed 3 --workers 2 --channels-last --accumulation 4 --save-minutes 1", True),
        ("--width 0.5", False),
        ("--teacher none", False),
        ("--epochs 10", False),
        ("--step2.epochs 512", False),
        ("--image-size 192", False),
        ("--optimizer sgd", False),
    ],
)
def test_the_published_numbers_stand_beside_their_recipe_alone(flags, published):
    config = parse(["imagenet", "--data-dir", "images", *flags.split()]).config
    assert is_published(config, classes=1000) == published
    assert not is_published(config, classes=100)


def test_the_shipped_recipes_build_their_networks():
    for recipe in shipped_recipes():
        config = parse([recipe]).config
        model = build_model(config.model, width=0.25, small_images=config.small_images)
        assert config.image_size % model.size_multiple == 0


def test_distillation_learns_from_a_teacher_in_a_file(place: Path):
    """The teacher answers always "a", so that is what the student learns, whatever the labels."""
    teacher = resnet34(num_classes=2)
    teacher.fc.weight.data.zero_()
    teacher.fc.bias.data.copy_(torch.tensor([20.0, 0.0]))
    torch.save(teacher.state_dict(), place / "teacher.pth")
    argv = ("--out", "distilled", "--teacher", "teacher.pth", "--step", 1)
    train(place, *argv, "--epochs", 8, "--lr", 0.03)
    lines = [json.loads(line) for line in (place / "distilled" / "log.jsonl").open()]
    assert lines[-1]["train_loss"] < 0.2 < lines[0]["train_loss"], lines
    assert lines[-1]["val_top1"] == 50, lines


@pytest.mark.slow
def test_a_broken_tensorboard_costs_a_line_and_no_run(tmp_path):
    """As where its package and protobuf's do not fit each other."""
    write_tiny(tmp_path)
    broken = tmp_path / "tensorboard"
    broken.mkdir()
    (broken / "__init__.py").write_text(
        'raise TypeError("Descriptors cannot be created\\nand more")'
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    code += "from tritonbnn import cli; from tritonbnn.train.__main__ import main; cli.run(main)"
    done = subprocess.run(
        [sys.executable, "-c", code, "tiny.toml", "--epochs", "1", "--out", "run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "TensorBoard" in line]
    assert said == ["no TensorBoard, which cannot be imported here: Descriptors cannot be created"]
    assert (tmp_path / "run" / "step2" / "best.safetensors").exists()

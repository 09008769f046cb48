"""Runs of one stage, of three, and of a method or an optimiser that the user wrote."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.commands import EVALUATE, PREDICT, TRAIN, Result, run, run_two, write_tiny
from tests.test_run import same_weights
from tritonbnn.train.checkpoint import encode, read

pytestmark = pytest.mark.slow

# as tests.commands.TINY, but for its stages
SHARED = """
dataset = "folder"
model = "birealnet_18"
width = 0.125
small_images = true
image_size = 16
batch_size = 8
epochs = 2
lr = 2e-3
schedule = "linear"
device = "cpu"
save_minutes = 0
log_interval = 1
"""
ONE = '[[stage]]\nname = "only"\n'
THREE = """
[[stage]]
name = "warm-up"
binary_weights = false
optimizer = { name = "sgd", momentum = 0.5 }
label_smoothing = 0.1
epochs = 1

[[stage]]
name = "binary"
start = "warm-up"
optimizer = "radam"

[[stage]]
name = "again"
start = "warm-up"
optimizer = "own.Lion"
method = { name = "own.Clip", limit = 0.5 }
schedule = "constant"
"""


def prepare(folder: Path) -> Path:
    """Recipes, images, and the user's own classes."""
    write_tiny(folder)
    shutil.copy(Path(__file__).with_name("own.py"), folder)
    for name, stages in (("one", ONE), ("three", THREE)):
        text = f'data_dir = "{folder / "images"}"\n{SHARED}\n{stages}'
        (folder / f"{name}.toml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("stages"))


def train(place: Path, recipe: str, out: Path | str, *argv: object, **options) -> Result:
    return run(TRAIN, f"{recipe}.toml", "--out", out, *argv, cwd=place, **options)


@pytest.fixture(scope="module")
def three(place: Path) -> Path:
    result = train(place, "three", "three")
    assert result.code == 0, result.output
    return place / "three"


def lines_of(folder: Path) -> list[dict]:
    times = ("seconds", "images_per_second")
    lines = [json.loads(line) for line in (folder / "log.jsonl").open()]
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def assert_same(ours: Path, theirs: Path, stages: tuple[str, ...]) -> None:
    """Whatever a run leaves behind, but for times."""
    assert lines_of(ours) == lines_of(theirs)
    for stage in stages:
        for kind in ("last", "best"):
            a, b = (read(f / stage / f"{kind}.safetensors") for f in (ours, theirs))
            assert a.tensors.keys() == b.tensors.keys()
            different = [k for k in a.tensors if not torch.equal(a.tensors[k], b.tensors[k])]
            assert not different, f"{stage}/{kind}: {different[:5]}"
            assert a.facts.get("optimizer") == b.facts.get("optimizer")


def test_one_stage_is_a_run(place: Path):
    result = train(place, "one", "one")
    assert result.code == 0, result.output
    table = [line.split() for line in result.output.splitlines()]
    assert ["only", "1-bit", "2"] in [row[:3] for row in table]
    assert "best weights: one/only/best.safetensors" in result.output
    assert [(line["stage"], line["lr"]) for line in lines_of(place / "one")] == [
        ("only", 2e-3),
        ("only", 1e-3),
    ]
    assert (place / "one" / "tensorboard" / "only").is_dir()
    scored = run(EVALUATE, "one", cwd=place)
    assert scored.output.startswith("one/only/best.safetensors: 1-bit weights, 6 images")
    image = place / "images" / "val" / "a" / "0.png"
    assert run(PREDICT, "one", image, cwd=place).code == 0


def test_three_stages_are_trained_in_order(place: Path, three: Path):
    assert [(line["stage"], line["epoch"]) for line in lines_of(three)] == [
        *(("warm-up", 1), ("binary", 1), ("binary", 2), ("again", 1), ("again", 2)),
    ]
    kinds = {"warm-up": "momentum_buffer", "binary": "exp_avg", "again": "momentum"}
    for name, kind in kinds.items():
        last = read(three / name / "last.safetensors")
        assert any(key.startswith(f"optimizer.{kind}.") for key in last.tensors)
        assert last.facts["network"]["binary_weights"] == (name != "warm-up")
    assert [line["lr"] for line in lines_of(three)][-2:] == [2e-3, 2e-3]
    assert run(EVALUATE, "three", cwd=place).output.startswith("three/again/best.safetensors")


def test_stages_that_start_from_the_same_one_start_alike(three: Path):
    """From the best of it, whatever was trained in between."""
    starts = [read(three / name / "last.safetensors") for name in ("binary", "again")]
    assert torch.equal(*(start.tensors["analysis.start"] for start in starts))
    first, best = (read(three / "warm-up" / f"{kind}.safetensors") for kind in ("last", "best"))
    assert same_weights(first, best)  # it has one epoch


def test_one_stage_after_the_other_is_the_same_run(place: Path, three: Path):
    for name in ("warm-up", "again", "binary"):
        result = train(place, "three", "apart", "--stage", name)
        assert result.code == 0, result.output
    assert_same(place / "apart", three, ("warm-up", "binary", "again"))


def test_a_stage_waits_for_the_one_it_starts_from(place: Path):
    result = train(place, "three", "waits", "--stage", "again")
    assert result.code == 2
    assert "again starts from the weights of warm-up: run --stage warm-up first" in result.output


def test_a_stage_may_start_from_a_checkpoint(place: Path, three: Path):
    best = three / "binary" / "best.safetensors"
    result = train(place, "one", "from", "--only.start", best, "--epochs", 1)
    assert result.code == 0, result.output
    assert f"starting from the weights in {best}" in result.output
    assert f'start = "{best}"' in (place / "from" / "config.toml").read_text()


@pytest.mark.parametrize("part", range(4))
def test_death_at_any_step_of_any_optimiser(place: Path, three: Path, tmp_path: Path, part: int):
    """sgd, radam and the user's own: a run that was killed ends as if it had not been."""
    for step in range(1 + part, 11, 4):
        out = tmp_path / f"{step}"
        assert train(place, "three", out, mishap="death", at_step=step).code == -9
        result = train(place, "three", out)
        assert result.code == 0, result.output
        assert_same(out, three, ("warm-up", "binary", "again"))


@pytest.mark.parametrize("optimizer", ["adamw", "nadam", "rmsprop", "sgd", "own.Lion"])
def test_a_stop_within_an_epoch_of_every_optimiser(place: Path, tmp_path: Path, optimizer: str):
    argv = ("--optimizer", optimizer, "--channels-last", "--weight-decay", 1e-3)
    assert train(place, "one", tmp_path / "whole", *argv).code == 0
    stopped = train(place, "one", tmp_path / "cut", *argv, mishap="SIGTERM", at_step=3)
    assert stopped.code == 75, stopped.output
    assert train(place, "one", tmp_path / "cut", *argv).code == 0
    assert_same(tmp_path / "cut", tmp_path / "whole", ("only",))


def test_what_a_method_remembers_goes_on(place: Path, tmp_path: Path):
    argv = ("--method", "own.Averaged")
    assert train(place, "one", tmp_path / "whole", *argv).code == 0
    assert train(place, "one", tmp_path / "cut", *argv, mishap="death", at_step=4).code == -9
    assert train(place, "one", tmp_path / "cut", *argv).code == 0
    last = read(tmp_path / "whole" / "only" / "last.safetensors")
    mean, weight = (last.tensors[f"{kind}.blocks.0.weight"] for kind in ("method", "model"))
    assert 0 < (mean - weight).abs().max() < 0.1
    assert_same(tmp_path / "cut", tmp_path / "whole", ("only",))


def test_the_best_checkpoint_holds_what_was_scored(place: Path, tmp_path: Path):
    out = tmp_path / "run"
    assert train(place, "one", out, "--method", "own.Averaged", "--epochs", 1).code == 0
    [line] = lines_of(out)
    scored = run(EVALUATE, out, cwd=place)
    assert f"top-1 {line['val_top1']:.2f} %" in scored.output
    assert f"loss {line['val_loss']:.4f}" in scored.output
    best, last = (read(out / "only" / f"{kind}.safetensors") for kind in ("best", "last"))
    assert torch.equal(best.tensors["model.fc.bias"], last.tensors["method.fc.bias"])
    assert not same_weights(best, last)


def test_a_method_without_classes(place: Path, tmp_path: Path):
    """Its best checkpoint is that of the least loss, and no line shows a top-1."""
    result = train(place, "one", tmp_path / "run", "--method", "own.Reconstruct", "--epochs", 3)
    assert result.code == 0, result.output
    lines = lines_of(tmp_path / "run")
    assert {line[key] for line in lines for key in ("train_top1", "val_top1", "val_top5")} == {None}
    assert "top-1 " not in result.output.partition("best top-1")[0]
    losses = [line["val_loss"] for line in lines]
    best = read(tmp_path / "run" / "only" / "best.safetensors").facts["best"]
    assert best == {"epoch": 1 + losses.index(min(losses)), "loss": min(losses)}
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--optimizer own.Lists", "own.Lists keeps 'seen' of type list"),
        ("--optimizer own.Lino", "module own has no Lino (did you mean Lion?)"),
        ("--optimizer own.Clip", "optimizer own.Clip is no subclass of torch.optim"),
        ("--optimizer own.Lion --optimizer.bta 0.5", "takes no 'bta': choose from lr, beta"),
        ("--optimizer other.Lion", "Python finds no module other: start where it is"),
        ("--method own.NoMethod", "method own.NoMethod is no subclass of tritonbnn.methods"),
        ("--method own.Clip --method.limit 0", "--method.limit must be greater than 0, not 0"),
        ("--method own.Clip --method.limt 1", "unknown key 'method.limt' (did you mean limit?)"),
        ("--method distill --method.teacher none", "method distill needs a teacher"),
        ("--optimizer sgd --optimizer.momentum 0 --optimizer.nesterov true", "Nesterov momentum"),
    ],
)
def test_what_cannot_be_used_is_one_line(place: Path, tmp_path: Path, argv: str, words: str):
    result = train(place, "one", tmp_path / "run", *argv.split())
    assert result.code == 2, result.output
    assert "Traceback" not in result.output
    *_, error = result.output.splitlines()
    assert error.startswith("error: ")
    assert words in error


def test_two_processes_train_every_stage(place: Path, tmp_path: Path):
    """A penalty that knows no images counts once, however many processes there are."""
    argv = ("three.toml", "--out", tmp_path / "run")
    stopped = run_two(TRAIN, *argv, cwd=place, mishap="SIGTERM", at_step=5)
    assert [result.code for result in stopped] == [75, 75], stopped
    for result in run_two(TRAIN, *argv, cwd=place):
        assert result.code == 0, result.output
    whole = run_two(TRAIN, "three.toml", "--out", tmp_path / "whole", cwd=place)
    assert [result.code for result in whole] == [0, 0]
    assert_same(tmp_path / "run", tmp_path / "whole", ("warm-up", "binary", "again"))


def as_format_1(path: Path) -> None:
    """Rewrite a checkpoint as it was written before stages had names."""
    checkpoint = read(path)
    facts = {k: v for k, v in checkpoint.facts.items() if k not in ("format", "checksum")}
    for key in ("optimizer", "method"):
        facts.pop(key, None)
    number = int(facts.pop("stage").removeprefix("step"))
    lines = facts.pop("history", None)
    if lines is not None:
        before = lines_of(path.parents[1]) if number == 2 else []
        times = {"seconds": 1.0, "images_per_second": 1.0}
        all_lines = [{**times, **line} for line in before if line["stage"] == "step1"] + lines
        facts["history"] = [
            {"step": int(line["stage"][-1]), **{k: v for k, v in line.items() if k != "stage"}}
            for line in all_lines
        ]
    content = encode(checkpoint.tensors, {"step": number, **facts})
    assert content.count(b'\\"format\\": 2') == 1
    path.write_bytes(content.replace(b'\\"format\\": 2', b'\\"format\\": 1'))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_run_from_before_stages_had_names_goes_on(place: Path, tmp_path: Path, optimizer: str):
    argv = ("tiny.toml", "--optimizer", optimizer)
    assert run(TRAIN, *argv, "--out", tmp_path / "whole", cwd=place).code == 0
    cut = tmp_path / "cut"
    stopped = run(TRAIN, *argv, "--out", cut, cwd=place, mishap="SIGTERM", at_step=7)
    assert stopped.code == 75
    for path in cut.rglob("*.safetensors"):
        as_format_1(path)
    settings = (place / "tiny.toml").read_text().partition("[step1]")[0]
    old = f'{settings}optimizer = "{optimizer}"\nteacher = "none"\nstep = 0\n'
    old += "[step1]\nepochs = 2\nlr = 0.002\nweight_decay = 5e-06\n"
    old += "[step2]\nepochs = 2\nlr = 0.002\nweight_decay = 0.0\n"
    (cut / "config.toml").write_text(old)
    scored = run(EVALUATE, cut, cwd=place)
    assert scored.code == 0, scored.output
    result = run(TRAIN, *argv, "--out", cut, cwd=place)
    assert result.code == 0, result.output
    assert lines_of(cut) == lines_of(tmp_path / "whole")
    name = Path("step2") / "last.safetensors"
    ours, theirs = (read(folder / name).tensors for folder in (cut, tmp_path / "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

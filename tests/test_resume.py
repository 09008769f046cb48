"""A run that was cut off and goes on ends like one that was not, bit for bit on one CPU."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from tests.commands import TRAIN, Result, run, write_tiny
from tritonbnn.train.checkpoint import read

pytestmark = pytest.mark.slow

FILES = [
    Path(f"step{step}") / f"{kind}.safetensors" for step in (1, 2) for kind in ("last", "best")
]
KILLS = int(os.environ.get("KILLS", "5"))
"""Of each optimiser's run."""

TIMES = ("seconds", "images_per_second")


def without_times(line: dict) -> dict:
    return {key: value for key, value in line.items() if key not in TIMES}


def log_lines(folder: Path) -> list[dict]:
    return [without_times(json.loads(line)) for line in (folder / "log.jsonl").open()]


def assert_same_run(folder: Path, whole: Path) -> None:
    """Weights, Adam's state, signs, random numbers, position, history and log are equal."""
    assert log_lines(folder) == log_lines(whole)
    for name in FILES:
        ours, theirs = read(folder / name), read(whole / name)
        assert ours.tensors.keys() == theirs.tensors.keys()
        different = [k for k, v in theirs.tensors.items() if not torch.equal(v, ours.tensors[k])]
        assert not different, f"{name}: {different[:5]}"
        for facts in (ours.facts, theirs.facts):
            for key in ("seconds", "config"):  # save_minutes may differ
                facts.pop(key, None)
            facts["history"] = [without_times(line) for line in facts.get("history", [])]
        assert ours.facts == theirs.facts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny recipe and its images."""
    folder = tmp_path_factory.mktemp("resume")
    write_tiny(folder)
    return folder


def train(place: Path, out: Path | str, *argv: object, **mishap) -> Result:
    return run(TRAIN, "tiny.toml", "--out", out, *argv, cwd=place, **mishap)


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[Path, Result]:
    """The uninterrupted run."""
    result = train(place, "whole")
    assert result.code == 0, result.output
    return place / "whole", result


def test_training_is_repeatable_and_trains(place: Path, whole: tuple[Path, Result]):
    assert train(place, "again").code == 0
    assert_same_run(place / "again", whole[0])
    epochs = [(line["stage"], line["epoch"]) for line in log_lines(whole[0])]
    assert epochs == [("step1", 1), ("step1", 2), ("step2", 1), ("step2", 2)]
    first, second = (read(whole[0] / name) for name in FILES[::2])
    before, after = first.group("model"), second.group("model")
    assert any(not torch.equal(after[name], before[name]) for name in before if "weight" in name)


OPTIMIZERS = {
    "adam": (),
    "sgd": ("--optimizer", "sgd", "--optimizer.momentum", 0.9, "--lr", 0.1),
    "radam": ("--optimizer", "radam"),
    "own": ("--optimizer", "own.Lion"),
}


@pytest.fixture(scope="module", params=OPTIMIZERS)
def optimised(place: Path, request: pytest.FixtureRequest) -> tuple[Path, tuple, float]:
    """An uninterrupted run of each optimiser, its flags, and its seconds."""
    shutil.copy(Path(__file__).parent / "own.py", place)
    flags = OPTIMIZERS[request.param]
    result = train(place, request.param, *flags)
    assert result.code == 0, result.output
    return place / request.param, flags, result.seconds


@pytest.mark.parametrize("seed", range(KILLS))
def test_kill_at_a_random_moment(
    place: Path, optimised: tuple[Path, tuple, float], tmp_path: Path, seed: int
):
    whole, flags, seconds = optimised
    moment = random.Random(f"{whole.name} {seed}").uniform(0, seconds)
    train(place, tmp_path / "run", *flags, kill_after=moment)
    result = train(place, tmp_path / "run", *flags)
    assert result.code == 0, result.output
    assert_same_run(tmp_path / "run", whole)


@pytest.fixture(scope="module")
def coarse(place: Path) -> tuple[Path, Result]:
    """An uninterrupted run of one optimiser step an epoch, saved at the ends of epochs."""
    result = train_coarsely(place, "coarse")
    assert result.code == 0, result.output
    return place / "coarse", result


def train_coarsely(place: Path, out: Path | str, **mishap) -> Result:
    return train(place, out, "--batch-size", 16, "--save-minutes", 60, **mishap)


# in parts, so that workers can share them; a quarter of the calls where few runs are killed
@pytest.mark.parametrize("part", range(8 if KILLS > 5 else 2))
def test_death_at_every_write_fsync_and_rename(
    place: Path, coarse: tuple[Path, Result], tmp_path: Path, part: int
):
    for call in range(1 + part, coarse[1].calls + 1, 8):
        out = tmp_path / f"{call}"
        assert train_coarsely(place, out, mishap="death", at_call=call).code == -9
        result = train_coarsely(place, out)
        assert result.code == 0, f"after death at call {call}: {result.output}"
        assert_same_run(out, coarse[0])


@pytest.mark.parametrize("part", range(4))
def test_full_disk_spares_what_was_saved(
    place: Path, coarse: tuple[Path, Result], tmp_path: Path, part: int
):
    for call in range(1 + 2 * part, coarse[1].calls + 1, 19):
        out = tmp_path / f"{call}"
        broken = train_coarsely(place, out, mishap="full disk", at_call=call)
        assert broken.code == 2
        assert "error: no space left to write" in broken.output
        assert "Traceback" not in broken.output
        assert not list(out.rglob("*.tmp"))
        result = train_coarsely(place, out)
        assert result.code == 0, f"after a full disk at call {call}: {result.output}"
        assert_same_run(out, coarse[0])


@pytest.mark.parametrize(("signal", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
@pytest.mark.parametrize("step", [1, 2, 7])
def test_stop_signal_saves_and_ends(
    place: Path, whole: tuple[Path, Result], tmp_path: Path, signal: str, code: int, step: int
):
    out = tmp_path / "run"
    stopped = train(place, out, "--save-minutes", 60, mishap=signal, at_step=step)
    assert stopped.code == code
    assert f"stopped by {signal}" in stopped.output
    assert "Traceback" not in stopped.output
    facts = read(out / ("step1" if step < 5 else "step2") / "last.safetensors").facts
    assert 2 * facts["epoch"] + facts["batch"] == (step if step < 5 else step - 4)
    result = train(place, out)
    assert result.code == 0, result.output
    assert_same_run(out, whole[0])


@pytest.mark.parametrize(
    "options",
    [
        *("--precision bf16", "--precision fp16 --channels-last", "--accumulation 3 --workers 2"),
        *("--analysis full --analysis-interval 1", "--optimizer sgd --analysis off"),
    ],
)
def test_resume_with_other_options(place: Path, tmp_path: Path, options: str):
    argv = [*options.split(), "--model", "reactnet_18"]
    assert train(place, tmp_path / "whole", *argv).code == 0
    stopped = train(place, tmp_path / "run", *argv, mishap="SIGTERM", at_step=3)
    assert stopped.code == 75, stopped.output
    result = train(place, tmp_path / "run", *argv)
    assert result.code == 0, result.output
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_workers_change_nothing(place: Path, whole: tuple[Path, Result], tmp_path: Path):
    assert train(place, tmp_path / "run", "--workers", 1).code == 0
    assert_same_run(tmp_path / "run", whole[0])


def test_stop_signal_while_evaluating(place: Path, whole: tuple[Path, Result], tmp_path: Path):
    out = tmp_path / "run"
    # 12 calls to begin the folder, 4 for the first save, 5 for the one after the epoch's last step
    stopped = train(place, out, mishap="SIGTERM", at_call=18)
    assert stopped.code == 75
    assert "epoch 1/2" not in stopped.output
    facts = read(out / "step1" / "last.safetensors").facts
    assert (facts["epoch"], facts["batch"]) == (0, 2)
    assert train(place, out).code == 0
    assert_same_run(out, whole[0])


def test_a_second_signal_ends_at_once(place: Path, tmp_path: Path):
    result = train(place, tmp_path / "run", mishap="SIGINT twice", at_step=3)
    assert result.code == 130
    assert "stopped by" not in result.output


def test_damaged_last_falls_back_to_the_one_before(
    place: Path, whole: tuple[Path, Result], tmp_path: Path
):
    out = tmp_path / "run"
    assert train(place, out, mishap="SIGTERM", at_step=3).code == 75
    last = out / "step1" / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-1000])
    result = train(place, out)
    assert result.code == 0
    assert f"{last} is damaged: going on from the one before, previous.safetensors" in result.output
    assert_same_run(out, whole[0])


def test_nothing_but_damage_is_an_error(place: Path, tmp_path: Path):
    out = tmp_path / "run"
    assert train(place, out, mishap="SIGTERM", at_step=3).code == 75
    for path in (out / "step1").iterdir():
        path.write_bytes(b"")
    result = train(place, out)
    assert result.code == 2
    assert "previous.safetensors is empty" in result.output


def table_of(result: Result) -> list[str]:
    heads = ("stage", "step1", "step2")
    rows = [line for line in result.output.splitlines() if line.startswith(heads)]
    return [row for row in rows if "  " in row]


def test_finished_run_prints_its_table(place: Path, whole: tuple[Path, Result]):
    before = {path: path.read_bytes() for path in whole[0].rglob("*.safetensors")}
    log = (whole[0] / "log.jsonl").read_text()
    result = train(place, "whole")
    assert result.code == 0
    assert table_of(result) == table_of(whole[1])
    assert len(table_of(result)) == 3
    assert before == {path: path.read_bytes() for path in whole[0].rglob("*.safetensors")}
    assert (whole[0] / "log.jsonl").read_text() == log

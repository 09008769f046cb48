"""Two processes with gloo: the same gradients, one writer, a common stop, and a restart."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.commands import ROOT, TRAIN, free_port, run, run_two, write_tiny
from tests.test_resume import assert_same_run
from tritonbnn import distributed
from tritonbnn.cli import UserError
from tritonbnn.train.checkpoint import read

pytestmark = pytest.mark.slow

# One worker of a parallel test run takes them all, so that they do not fight for the cores.

GRADIENTS = "tests.gradients"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_have_the_gradients_of_one(tmp_path: Path, accumulation: int):
    """Shares of 3 and 2 images, and of 1 and none; in parts of unequal sizes too."""
    alone = run(GRADIENTS, accumulation, cwd=tmp_path)
    assert alone.code == 0, alone.output
    for result in run_two(GRADIENTS, accumulation, cwd=tmp_path):
        assert result.code == 0, result.output
    names = [f"seen-{accumulation}-{n}.pt" for n in ("1-0", "2-0", "2-1")]
    one, *both = [torch.load(tmp_path / name) for name in names]
    assert len(one["gradients"]) == 3
    for other in both:
        for step, of_step in zip(one["gradients"], other["gradients"], strict=True):
            for a, b in zip(step, of_step, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-14)
        assert other["score"][2] == one["score"][2] == 11
        assert other["score"] == pytest.approx(one["score"], rel=1e-12)
        torch.testing.assert_close(other["sums"], one["sums"], rtol=1e-12, atol=0)
        assert one["sums"][2] == 11


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    write_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """An uninterrupted run of two processes."""
    for result in run_two(TRAIN, "tiny.toml", "--out", "whole", cwd=place):
        assert result.code == 0, result.output
    return place / "whole"


def test_only_the_leading_process_writes_and_talks(place: Path, tmp_path: Path):
    argv = ("tiny.toml", "--out", tmp_path / "run", "--epochs", 1)
    first, second = run_two(TRAIN, *argv, cwd=place)
    assert "step1 epoch 1/1" in first.output
    assert second.calls == 0
    # torch itself may warn of a host without a name and count its peers, and on a busy machine one
    # waits for the other
    news = ("c10d", "[Gloo]", "waiting for", "waits for")
    assert not [line for line in second.output.splitlines() if not any(n in line for n in news)]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    assert [(x["stage"], x["epoch"]) for x in lines] == [("step1", 1), ("step2", 1)]


def test_a_signal_to_one_process_stops_both_at_the_same_step(
    place: Path, whole: Path, tmp_path: Path
):
    argv = ("tiny.toml", "--out", tmp_path / "run")
    for result in run_two(TRAIN, *argv, cwd=place, mishap="SIGTERM", at_step=3):
        assert result.code == 75, result.output
    facts = read(tmp_path / "run" / "step1" / "last.safetensors").facts
    assert (facts["epoch"], facts["batch"], facts["world_size"]) == (1, 1, 2)
    for result in run_two(TRAIN, *argv, cwd=place):
        assert result.code == 0, result.output
    assert_same_run(tmp_path / "run", whole)


def test_another_number_of_processes_goes_on_with_a_note(place: Path, tmp_path: Path):
    argv = ("tiny.toml", "--out", tmp_path / "run")
    run_two(TRAIN, *argv, cwd=place, mishap="SIGTERM", at_step=3)
    result = run(TRAIN, *argv, cwd=place)
    assert result.code == 0, result.output
    assert "going on with 1 processes after 2" in result.output
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 4


def test_a_mistake_that_only_the_leading_process_meets_ends_both(place: Path, tmp_path: Path):
    (tmp_path / "run").write_text("")
    for result in run_two(TRAIN, "tiny.toml", "--out", tmp_path / "run", cwd=place):
        assert result.code == 2
        assert "is a file, not a folder" in result.output


def test_fewer_images_than_processes_is_an_error(place: Path):
    for result in run_two(TRAIN, "tiny.toml", "--batch-size", 1, "--fresh", cwd=place):
        assert result.code == 2
        assert "make it at least 2, or start fewer processes" in result.output


def test_a_killed_process_is_restarted_and_the_run_resumes(
    place: Path, whole: Path, tmp_path: Path
):
    """torchrun starts both again in the same store, where the dead have left their addresses."""
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--max-restarts", "1", "--master-addr", "127.0.0.1", "--local-addr", "127.0.0.1"),
            *("--master-port", str(free_port()), "--monitor-interval", "0.1"),
            *("-m", "tests.mortal", "tiny.toml", "--fresh", "--out", str(tmp_path / "run")),
        ],
        cwd=place,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "lo",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    assert "goes on in epoch" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert_same_run(tmp_path / "run", whole)


def test_alone_the_world_does_nothing():
    world = distributed.World()
    sums = torch.tensor([1.0, 2.0])
    assert world.agree(3, -1) == [3, -1]
    assert world.total(sums) is sums
    assert world.gather("a") == ["a"]
    assert world.share("a") == "a"
    assert world.lead(lambda: 5) == 5


def test_half_set_variables_are_named(monkeypatch: pytest.MonkeyPatch):
    for name in distributed.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert not distributed.launched()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing"):
        distributed.launched()

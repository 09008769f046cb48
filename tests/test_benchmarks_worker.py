"""Rivals in processes of their own: what they take, that they take turns, and how they end."""

import math
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import measure, peak_memory
from benchmarks.machine import ROOT
from benchmarks.measure import has_failed, trouble
from benchmarks.point import Point
from benchmarks.rivals import Rival
from benchmarks.runner import RivalError, Runner
from benchmarks.steps import TRIAL_STEPS
from tritonbnn import cli

POINT = Point("reactnet_a", 2, 5, 4, 1.0, torch.device("cpu"))
PAGES, NAP, THREADS = 2000, 0.05, 3
TURNS, COUNT = 2, 2
OPTIONS = {"turns": TURNS, "count": COUNT, "details": False, "say": print}
PATIENCE = 300  # seconds


def nothing(images):
    """Goes on at once."""


def nap(images):
    """Takes a while, and pages that the process did not have."""
    time.sleep(NAP)
    with mmap.mmap(-1, PAGES * mmap.PAGESIZE) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for page in range(PAGES):
            memory[page * mmap.PAGESIZE] = 1


def die(*_):
    """As the kernel ends what takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail(images):
    """As a compiler does."""
    raise RuntimeError("no compiler\nin 20 lines")


def refuse(images):
    """As a network does with a size that it cannot take."""
    raise ValueError("no such size")


def err(images):
    """As code of ours might."""
    raise KeyError("a bug")


def overflow(images):
    """Takes a petabyte for more than two images."""
    torch.empty(2**50 if len(images) > 2 else 1)


class Network(nn.Module):
    """One linear layer that notes each of its passes."""

    def __init__(self, rival, classes):
        super().__init__()
        self.rival, self.passes = rival, 0
        self.linear = nn.Linear(3 * POINT.size**2, classes)

    def forward(self, images):
        self.passes += 1
        with self.rival.log.open("a") as log:
            log.write(f"{self.rival.network} {os.getpid()} {torch.get_num_threads()}\n")
        if self.passes > self.rival.after:
            self.rival.act(images)
        return self.linear(images.flatten(1)) * self.rival.scale


@dataclass(frozen=True)
class Scripted(Rival):
    """A rival that does something in every pass after some."""

    log: Path
    act: Callable = nothing
    after: int = 0
    scale: float = 1.0

    def build(self, model, step, **options):
        return Network(self, options["num_classes"])


def scripted(log):
    turn = 1 + COUNT
    script = {
        "steady": {"act": nap},
        "killed": {"act": die, "after": TRIAL_STEPS + turn + 1},
        "second": {},
        "greedy": {"act": overflow, "after": TRIAL_STEPS + turn},
        "buggy": {"act": err},
        "constant": {"scale": 0.0},
    }
    return {name: Scripted(name, frozenset(), log, **how) for name, how in script.items()}


@pytest.fixture(scope="module")
def race(tmp_path_factory):
    """Rows by name, (name, process, threads) of all passes, and the seconds of all."""
    log = tmp_path_factory.mktemp("race") / "passes"
    before, start = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(THREADS)
    try:
        rows = measure.measure(POINT, scripted(log), **OPTIONS)
    finally:
        torch.set_num_threads(before)
    passes = [line.split() for line in log.read_text().splitlines()]
    return rows, passes, time.perf_counter() - start


@pytest.mark.bench
def test_times_and_page_faults_are_those_of_the_steps(race):
    rows, _, elapsed = race
    row = rows["steady"]
    assert len(row["seconds"]) == TURNS
    assert all(seconds >= NAP for seconds in row["seconds"])
    assert COUNT * sum(row["seconds"]) < elapsed
    assert row["images_per_second"] <= POINT.batch / NAP
    assert 0 < row["cpu_seconds"] < NAP  # it sleeps for most of the time
    assert PAGES <= row["page_faults"] < 1.5 * PAGES
    assert rows["second"]["page_faults"] < PAGES / 2


@pytest.mark.bench
def test_rivals_take_turns_in_processes_of_their_own(race):
    _, passes, _ = race
    names = [name for name, _, _ in passes if name in ("steady", "second")]
    trial = ["steady"] * TRIAL_STEPS + ["second"] * TRIAL_STEPS
    turn = ["steady"] * (1 + COUNT) + ["second"] * (1 + COUNT)  # one of them not timed
    assert names == trial + turn * TURNS
    processes = {(name, process) for name, process, _ in passes}
    assert len(processes) == len({name for name, _ in processes})
    assert str(os.getpid()) not in {process for _, process in processes}
    assert {threads for _, _, threads in passes} == {str(THREADS)}


@pytest.mark.bench
def test_a_rival_in_trouble_has_a_row_that_says_so(race):
    rows, _, _ = race
    troubles = {
        "killed": "failed: its process was killed by SIGKILL, most often for want of memory",
        "greedy": "out of memory; batch 2 fits",
        "buggy": "failed: its process ended with exit code 1",
        "constant": f"the loss does not fall on one batch: {losses_of_nothing()}",
    }
    found = {name: trouble(row) for name, row in rows.items() if "seconds" not in row}
    assert found == troubles
    assert {name for name in rows if has_failed(rows[name])} == troubles.keys() - {"greedy"}


def losses_of_nothing():
    """Of a network that says the same of all thousand classes."""
    return ", ".join([f"{math.log(1000):.4g}"] * TRIAL_STEPS)


@pytest.mark.parametrize(
    ("act", "facts"),
    [
        (overflow, {"out_of_memory": True, "largest_batch": 2}),
        (fail, {"failed": "no compiler"}),
        (refuse, {"failed": "no such size"}),
    ],
)
def test_in_this_process_trouble_is_raised(tmp_path, act, facts):
    rival = Scripted("alone", frozenset(), tmp_path / "passes", act)
    with pytest.raises(RivalError) as caught:
        Runner(POINT, rival).trial()
    assert caught.value.facts == facts


@pytest.mark.slow
def test_in_one_process_they_take_turns_too(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "own_processes", lambda device: False)  # as on a GPU
    log = tmp_path / "passes"
    rivals = {name: scripted(log)[name] for name in ("second", "greedy")}
    rows = measure.measure(POINT, rivals, **OPTIONS)
    assert set(rows["second"]) == {"seconds", "median_seconds", "spread", "images_per_second"}
    assert rows["greedy"] == {"out_of_memory": True, "largest_batch": 2}  # and no time
    passes = [line.split() for line in log.read_text().splitlines()]
    assert {process for _, process, _ in passes} == {str(os.getpid())}
    second, greedy = ([name] * (1 + COUNT) for name in ("second", "greedy"))
    expected = ["second"] * TRIAL_STEPS + ["greedy"] * TRIAL_STEPS
    # the second turn of one ends in its first pass, and two steps of two images fit
    expected += second + greedy + second + ["greedy"] * (1 + 2)
    assert [name for name, _, _ in passes] == expected


@pytest.mark.bench
@pytest.mark.parametrize("ending", ["Ctrl-C", "killed"])
def test_no_process_outlives_the_command(ending):
    flags = ["--size", "32", "--width", "0.25", "--batch", "2", "--device", "cpu"]
    endless = ["--rivals", "twin,twin+channels_last", "--rounds", "1000000"]
    command = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.train_step", *flags, *endless],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert any("rounds of" in line for line in command.stderr)  # both have been tried
        if ending == "Ctrl-C":  # the terminal interrupts all of them
            os.killpg(command.pid, signal.SIGINT)
        else:
            command.kill()
        _, said = command.communicate(timeout=PATIENCE)  # until the last of them has closed it
        assert "Traceback" not in said
        if ending == "Ctrl-C":
            assert (command.returncode, said) == (cli.INTERRUPTED, "interrupted\n")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_process_whose_peak_is_too_high_is_one_line(monkeypatch):
    monkeypatch.setattr(peak_memory, "peak_of_steps", die)
    with pytest.raises(cli.UserError, match=r"ours was killed, .*: choose a smaller --batch"):
        peak_memory.in_fresh_process("ours", 2, 8, 224, 1)


def test_the_peak_is_that_of_the_steps_after_the_first(monkeypatch):
    """A step that takes 300 MB for a moment, and keeps 200 MB from its first call on."""
    kept = []

    def of_known_size(model, images, labels, **options):
        def step():
            if not kept:
                kept.append(torch.ones(50_000_000))
            torch.ones(75_000_000)

        return step

    monkeypatch.setattr(peak_memory, "training_step", of_known_size)
    threads = torch.get_num_threads()
    peak = peak_memory.peak_of_steps("ours", 2, 2, 32, threads)
    assert peak == pytest.approx(300, abs=20)  # the resident set is counted roughly


def test_the_environment_is_as_before_afterwards():
    before = dict(os.environ)
    with peak_memory.environment({"PATH": "elsewhere", "MALLOC_MMAP_THRESHOLD_": "1"}):
        assert (os.environ["PATH"], os.environ["MALLOC_MMAP_THRESHOLD_"]) == ("elsewhere", "1")
    assert dict(os.environ) == before

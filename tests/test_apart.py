"""The tuner's choices run in a child: one that dies or hangs there is skipped, and noted."""

import json
import threading
from multiprocessing import Pipe

import pytest
import torch

from tests.helpers import KERNEL_DEVICE
from tritonbnn.kernels import apart, autotune, config
from tritonbnn.kernels.config import Choice, TileConfig
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.judge import Judge, UnfitError
from tritonbnn.kernels.problems import Problem

FORWARD = Problem("conv_packed", Geometry(1, 3, 2, 33, 5, 3, 1, 1), torch.float32)
PACK = Problem("pack_signs", FORWARD.layer, torch.float32)
DEFAULT = config.default(FORWARD.key)
BAD = Choice("popcount", TileConfig(16, 16, 32, 4, 1))
LAST = Choice("popcount", TileConfig(32, 16, 32, 4, 1))

CHILD = """
import os, sys, time, torch
from tritonbnn.kernels import apart, config
from tritonbnn.kernels.judge import Judge

right = Judge._run

def run(judge):
    choice = config.choose(judge._problem.key, judge.device)
    if choice.formulation == "popcount" and choice.tile.block_m == 16:
        {fault}
    off = choice.formulation == "popcount" and {off}
    return tuple(result + 2 * off for result in right(judge))

Judge._run = run
apart.main(sys.argv[1:])
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Makes every child fail where the bad choice runs on the whole batch; others may be wrong."""
    if KERNEL_DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")

    def make(fault, *, off=False):
        (tmp_path / "fake_apart.py").write_text(CHILD.format(fault=fault, off=off))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(apart, "MODULE", "fake_apart")

    return make


@pytest.fixture
def elsewhere():
    with apart.JudgeApart(KERNEL_DEVICE, runs=1) as judge:
        yield judge


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("os.abort()", "cannot run: its process ended with signal 6"),
        ("sys.exit('an illegal instruction')", "ended with code 1: an illegal instruction"),
        ("time.sleep(600)", "cannot run: it did not end in 9 s"),
        ("raise torch.OutOfMemoryError('out of memory')", "cannot run: out of memory"),
    ],
)
def test_a_choice_that_ends_its_process_is_that_choice_s_alone(
    child, elsewhere, monkeypatch, capsys, fault, reason
):
    monkeypatch.setattr(apart, "SECONDS", 9)
    child(fault)
    entry = autotune.tune(FORWARD, [DEFAULT, BAD, LAST], elsewhere)
    assert entry.choice in (DEFAULT, LAST)
    [(choice, said)] = entry.unfit
    assert choice == BAD
    assert reason in said
    assert "\n" not in said
    row = json.loads(json.dumps(entry.as_json()))
    assert row["unfit"][0]["tile"]["block_m"] == 16
    assert config.parse_entry(row) == (FORWARD.key.bucketed(), entry.choice)
    assert f"{FORWARD.op} as {BAD} {said}" in capsys.readouterr().out
    assert autotune.tune(PACK, [config.default(PACK.key)], elsewhere).unfit == ()


@pytest.mark.gpu
def test_a_fault_of_the_gpu_is_that_choice_s_alone(child, elsewhere, gpu):
    child("torch.zeros(1, device='cuda')[torch.tensor([9], device='cuda')].cpu()")
    entry = autotune.tune(FORWARD, [DEFAULT, BAD, LAST], elsewhere)
    assert [choice for choice, _ in entry.unfit] == [BAD]
    assert torch.ones(1, device=gpu).item() == 1


@pytest.mark.slow
def test_a_new_child_compares_with_what_was_right_in_the_one_before(child, elsewhere):
    child("os.abort()", off=True)
    entry = autotune.tune(FORWARD, [DEFAULT, BAD, LAST], elsewhere)
    assert entry.choice == DEFAULT
    assert [choice for choice, _ in entry.unfit] == [BAD, LAST]
    assert entry.unfit[1][1] == "is wrong: 30 integers are not the default's"


class Script:
    """A judge that answers as it is told."""

    device = torch.device("cpu")

    def __init__(self, *answers):
        self.answers = list(answers)

    def begin(self, problem, table):
        self.begun = problem, table

    def time(self, choice):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def served(judge, *questions):
    """What a child answers until it ends."""
    here, there = Pipe()
    thread = threading.Thread(target=apart.serve, args=(there, judge))
    thread.start()
    found = []
    for question in questions:
        here.send(question)
        found.append(here.recv())
    here.close()
    thread.join(10)
    assert not thread.is_alive()
    return [(str(a) if isinstance(a, UnfitError) else a, goes_on) for a, goes_on in found]


def test_a_child_answers_until_its_parent_is_gone():
    judge = Script(3.5, UnfitError("is wrong: a sum"), 2.5)
    found = served(judge, (FORWARD, {}), DEFAULT, BAD, LAST)
    assert found == [(None, True), (3.5, True), ("is wrong: a sum", True), (2.5, True)]
    assert judge.begun == (FORWARD, {})


def test_a_child_ends_after_a_fault_of_the_gpu(monkeypatch):
    monkeypatch.setattr(apart, "_is_sound", lambda device: False)
    judge = Script(3.5, UnfitError("cannot run: an illegal address"))
    assert served(judge, DEFAULT, BAD) == [(3.5, True), ("cannot run: an illegal address", False)]


def test_operands_beyond_the_memory_are_that_problem_s(monkeypatch):
    def refuse(problem, device):
        raise torch.OutOfMemoryError("out of memory\nand more")

    monkeypatch.setattr(Problem, "inputs", refuse)
    with pytest.raises(autotune.UntunableError, match="cannot be tuned: its operands do not fit"):
        autotune.tune(FORWARD, [DEFAULT], Judge(KERNEL_DEVICE))

"""Formulations are tried in a process of their own: whatever happens there costs a line."""

import json
import logging
import os
from dataclasses import replace

import pytest
import torch

from tests.helpers import KERNEL_DEVICE
from tritonbnn import cli
from tritonbnn.kernels import conv, mma_unit_grad, trial, verdicts
from tritonbnn.kernels.geometry import Geometry

CPU = torch.device("cpu")
SMALL = (Geometry(1, 3, 2, 33, 5, 3, 1, 1), Geometry(2, 2, 3, 31, 7, 1, 1, 0))
EXACT = verdicts.Verdict(True, "", 7, 1.0)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITONBNN_CACHE", str(tmp_path / "cache"))
    verdicts.verdict.cache_clear()
    yield tmp_path / "cache" / "verdicts"
    verdicts.verdict.cache_clear()


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Makes every child run a few lines of Python."""

    def make(code):
        (tmp_path / "fake_trial.py").write_text(f"import json, os, sys, time\n{code}\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(verdicts, "TRIAL", "fake_trial")

    return make


@pytest.fixture
def asked(monkeypatch):
    """What is asked of children, each of which finds everything exact."""
    found = []
    monkeypatch.setattr(verdicts, "ask", lambda device, name: found.append(name) or EXACT)
    return found


@pytest.mark.parametrize("formulation", ["int8", "popcount"])
def test_what_is_exact_is_found_so_and_a_wrong_sum_is_not(formulation, monkeypatch):
    found = trial.try_here(formulation, KERNEL_DEVICE, SMALL)
    assert found["tried"] >= len(SMALL)
    assert found["wrong"] == []
    right = conv.convolved

    def off_by_one_sign(*arguments):
        y = right(*arguments)
        y[-1, -1, -1, -1] += 2
        return y

    monkeypatch.setattr(conv, "convolved", off_by_one_sign)
    found = trial.try_here(formulation, KERNEL_DEVICE, SMALL)
    assert len(found["wrong"]) == min(found["tried"], trial.SHOWN)
    assert "33" in found["wrong"][0]
    assert "error 2 where 0 is allowed" in found["wrong"][0]


def test_units_that_convolve_within_their_passes_are_tried_too(one_bit_core, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that a CPU's tensors have kernels
    units = (Geometry(2, 4, 6, 33, 33, 3, 2, 1), Geometry(1, 3, 3, 20, 40, 1, 1, 0))
    found = trial.try_here("mma", KERNEL_DEVICE, (), units)
    assert found == {"tried": 2, "wrong": []}
    right = mma_unit_grad.unit_grad_mma

    def without_its_mean(*arguments, **options):
        skipped, dy = right(*arguments, **options)
        return skipped, dy + 0.01

    monkeypatch.setattr(mma_unit_grad, "unit_grad_mma", without_its_mean)
    found = trial.try_here("mma", KERNEL_DEVICE, (), units)
    assert len(found["wrong"]) == 2
    assert "in a unit: " in found["wrong"][0]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("os.kill(os.getpid(), 9)", "its process ended with signal 9"),
        ("sys.exit('CUDA error: an illegal instruction')", "code 1: CUDA error: an illegal"),
        ("time.sleep(60)", "it did not end in 2 s"),
        ("print('hello')", "its process gave no answer"),
        ("print(json.dumps({'tried': 0, 'wrong': []}))", "there is nothing to try it on"),
        ("print(json.dumps({'tried': 2, 'wrong': ['a sum', 'another']}))", "a sum; another"),
    ],
)
def test_however_a_child_ends_there_is_a_verdict_of_one_line(child, code, reason):
    child(code)
    found = verdicts.ask(CPU, "mma", seconds=2)
    assert not found.exact
    assert reason in found.reason
    assert "\n" not in found.reason


def test_an_exact_child_is_believed(child):
    child("print('compiling'); print(json.dumps({'tried': 3, 'wrong': []}))")
    found = verdicts.ask(CPU, "mma")
    assert replace(found, seconds=0) == verdicts.Verdict(True, "", 3, 0)


def test_a_verdict_is_asked_for_once(cache, asked, caplog):
    with caplog.at_level(logging.INFO, "tritonbnn"):
        assert verdicts.trusted(CPU, "mma")
        verdicts.verdict.cache_clear()  # as another process
        assert verdicts.trusted(CPU, "mma")
    assert asked == ["mma"]
    assert [r.message for r in caplog.records] == [
        "tried mma on cpu in a process of its own: exact"
    ]
    assert verdicts.trusted(CPU, "wgmma")
    (path,) = cache.glob("*.json")
    document = json.loads(path.read_text())
    assert set(document["verdicts"]) == {"mma", "wgmma"}
    assert document["gpu"] == "cpu"


def test_other_kernels_and_a_file_that_somebody_changed_are_tried_again(cache, asked, monkeypatch):
    verdicts.trusted(CPU, "mma")
    (path,) = cache.glob("*.json")
    whole = json.loads(path.read_text())
    row = whole["verdicts"]["mma"]
    changed = ({**row, "exact": "yes"}, {"exact": True}, [], None)
    texts = [json.dumps({**whole, "verdicts": {"mma": value}}) for value in changed]
    for text in (*texts, "{", "[]", ""):
        path.write_text(text)
        verdicts.verdict.cache_clear()
        del asked[:]
        assert verdicts.trusted(CPU, "mma")
        assert asked == ["mma"]
    facts = verdicts.facts_of(CPU)
    monkeypatch.setattr(verdicts, "facts_of", lambda device: {**facts, "driver": "another"})
    verdicts.verdict.cache_clear()
    assert verdicts.trusted(CPU, "mma")
    assert asked == ["mma", "mma"]


def test_a_cache_that_cannot_be_written_costs_a_line(cache, asked, monkeypatch, caplog):
    monkeypatch.setenv("TRITONBNN_CACHE", os.devnull)
    assert verdicts.trusted(CPU, "mma")
    assert asked == ["mma"]
    assert "the verdict on mma cannot be kept: " in caplog.text


def test_a_child_asks_no_child(monkeypatch):
    monkeypatch.setattr(verdicts, "inside", True)
    monkeypatch.setattr(verdicts, "verdict", None)
    assert verdicts.trusted(CPU, "mma")


def test_the_command_says_each_verdict(child, tmp_path, capsys):
    code = "print(json.dumps({'tried': 4, 'wrong': ['a sum'] * (sys.argv[1] == 'int8')}))"
    child(code)
    path = tmp_path / "verdicts.json"
    arguments = ["int8", "popcount", "--device", "cpu", "--json", str(path)]
    assert trial.main(arguments) == 1
    out = capsys.readouterr().out
    assert "int8: a sum (4 cases, " in out
    assert "popcount: exact (4 cases, " in out
    assert json.loads(path.read_text())["verdicts"]["int8"]["reason"] == "a sum"
    assert trial.main(["popcount", "--device", "cpu"]) == 0
    with pytest.raises(cli.UserError, match="formulation 'mna': choose from int8, popcount, mma"):
        trial.main(["mna"])

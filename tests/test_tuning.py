"""``--tune``: the tuner is asked for the run's own shapes, and never stops a run."""

import subprocess

import pytest
import torch

from tritonbnn import cli, tuning
from tritonbnn.kernels import autotune
from tritonbnn.kernels.commands import named_problems
from tritonbnn.train.arguments import parse
from tritonbnn.train.config import tuned_shapes
from tritonbnn.train.job import configure

SHAPES = tuned_shapes(configure("digits"))


@pytest.mark.parametrize(("text", "minutes"), [("5m", 5.0), ("2.5", 2.5)])
def test_the_flag_is_a_time(text, minutes):
    assert parse(["digits", "--tune", text]).tune == minutes
    assert parse(["digits"]).tune is None


@pytest.mark.parametrize("text", ["0", "-1", "nan", "5h", ""])
def test_another_text_is_one_line(text):
    with pytest.raises(cli.UserError, match="must be a number of minutes above 0, as in 5m"):
        parse(["digits", f"--tune={text}"])


def test_the_tuner_is_told_the_shapes_that_the_run_poses():
    config = configure(
        "digits", width=0.5, batch_size=30, accumulation=4, precision="bf16", channels_last=True
    )
    _, flag, module, *flags = tuning.command(**tuned_shapes(config), minutes=3)
    assert (flag, module) == ("-m", autotune.__name__)
    given = autotune._parser().parse_args(flags)
    assert given.minutes == 3
    problems = named_problems(given)
    assert {problem.dtype for problem in problems} == {torch.bfloat16}
    layers = {problem.layer for problem in problems}
    assert {layer.batch for layer in layers} == {8}
    assert max(layer.height for layer in layers) == config.image_size  # a stem of stride 1
    assert max(layer.out_channels for layer in layers) == 512


def test_without_a_gpu_or_in_a_job_of_processes_one_line_says_so(monkeypatch):
    with pytest.raises(cli.UserError, match="--tune times kernels on a GPU, and this run has none"):
        tuning.tune("cpu", **SHAPES)
    monkeypatch.setattr(tuning, "launched", lambda: True)
    with pytest.raises(cli.UserError, match="--tune is for one process"):
        tuning.tune("auto", **SHAPES)


def test_a_tuner_that_fails_costs_a_line(monkeypatch, caplog):
    monkeypatch.setattr(tuning, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(tuning, "TUNER", "no_such_module")
    tuning.tune("auto", **SHAPES)
    assert "the tuner ended with code 1: going on with what is tuned" in caplog.text
    monkeypatch.setattr(
        subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 0)
    )
    caplog.clear()
    tuning.tune("auto", **SHAPES)
    assert not caplog.records

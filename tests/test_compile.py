"""--compile: the same training, with bare names in the checkpoints.

The compiler's front end and autograd run here, and what they traced runs as it is: making machine
code of it takes minutes.
"""

from functools import partialmethod

import pytest
import torch
from torch import nn

from tests.commands import write_tiny
from tests.hand import taught
from tritonbnn import evaluate
from tritonbnn.cli import UserError
from tritonbnn.compute import Compute
from tritonbnn.data.batches import MicroBatch
from tritonbnn.train import __main__ as trainer
from tritonbnn.train.checkpoint import read


@pytest.fixture
def compilations(monkeypatch):
    """Compile with the backend that only traces; counters of the compiler."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch.compiler.reset()


@pytest.mark.compile
def test_a_compiled_run_trains_resumes_and_is_evaluated(
    compilations, monkeypatch, tmp_path, capsys
):
    write_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = {}
    for out, flags in (("plain", []), ("compiled", ["--compile"])):
        common = ["tiny.toml", "--out", out, "--step", "1", *flags]
        assert trainer.main([*common, "--epochs", "1"]) == 0
        assert trainer.main([*common, "--epochs", "2"]) == 0
        assert evaluate.main([out]) == 0
        lines[out] = capsys.readouterr().out.splitlines()[-1].removeprefix(out)
    plain, compiled = (read(tmp_path / out / "step1/last.safetensors") for out in lines)
    assert compilations["stats"]["unique_graphs"] > 0
    assert not compilations["graph_break"]
    assert set(compiled.tensors) == set(plain.tensors)
    assert compiled.facts["epoch"] == 2
    assert lines["compiled"] == lines["plain"]


class Teacher(nn.Sequential):
    """torch's own containers are not compiled."""

    def forward(self, x):
        return super().forward(x)


@pytest.mark.compile
def test_a_compiled_teacher_teaches_the_same(compilations):
    torch.manual_seed(0)
    teacher = Teacher(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images, logits = torch.randn(4, 3, 8, 8), torch.randn(4, 5)
    batch = MicroBatch(images, torch.zeros(4, dtype=torch.int64), 4, 4, True)
    student = lambda _: logits  # noqa: E731
    expected = taught(Compute(torch.device("cpu")), teacher).losses(student, batch).each
    compute = Compute(torch.device("cpu"), channels_last=True, compiled=True)
    compute.place(teacher)
    losses = taught(compute, teacher).losses(student, batch).each
    torch.testing.assert_close(losses, expected)
    assert compilations["stats"]["unique_graphs"] == 1


def test_a_missing_compiler_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"--compile needs a C\+\+ compiler"):
        Compute(torch.device("cpu"), compiled=True).place(nn.Identity())

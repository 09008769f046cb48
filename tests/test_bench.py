"""The benchmark at tiny sizes, and the clock it uses."""

import json

import pytest
import torch

from tests.conftest import HAS_GPU
from tests.helpers import KERNEL_DEVICE
from tritonbnn import cli
from tritonbnn.kernels import bench, commands, provenance, timing, truth
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.problems import OPS, Problem

ROOFS = {"copy_bytes_per_s": 1e9, "matmul_ops_per_s": 1e9}


@pytest.mark.skipif(HAS_GPU, reason="the tiny sizes are for the interpreter")
def test_the_command_writes_a_results_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    path = tmp_path / "results.json"
    tiny = ["--batch", "1", "--size", "32", "--width", "0.25", "--runs", "1", "--dtype", "fp32"]
    ops = ["--op", "pack_signs", "--op", "conv_packed", "--layer", "1", "--layer", "2"]
    assert bench.main([*tiny, *ops, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    head = {*provenance.header("", KERNEL_DEVICE), "batch", "dtype", "runs"}
    assert set(document) == head | {"rows"} | set(ROOFS)
    assert [row["op"] for row in document["rows"]] == ["pack_signs", "conv_packed"] * 2
    assert document["rows"][1]["layer"] == "1x1 8>16 at 16x16"
    assert set(document["rows"][1]) >= {"ours_us", "cudnn_us", "cublas_us", "bytes"}
    assert set(document["rows"][0]) >= {"ours_us", "eager_us", "floor_us", "share_of_floor"}
    assert "WRONG" not in capsys.readouterr().out


@pytest.mark.parametrize("outputs", [33, 66], ids=["identity", "repeat"])
@pytest.mark.parametrize("op", OPS)
def test_contenders_compute_the_same(op, outputs):
    torch.manual_seed(0)
    problem = Problem(op, Geometry(2, 5, 3, 33, outputs, 1, 1, 0), torch.float32)
    inputs = problem.inputs(KERNEL_DEVICE)
    inputs["alpha"] = torch.ones(
        outputs, device=KERNEL_DEVICE
    )  # the library's part is the bare one
    truths = [each.float() for each in truth.plain(problem, inputs, torch.float64)]
    calls = bench.alternatives(problem, inputs, compiled=False)
    assert set(calls) == ({"cudnn", "cublas"} if op.startswith("conv") else {"eager"})
    if op == "conv_real":
        return  # the library convolves the signs of the weight: the time is the same
    for name, call in calls.items():
        results = call()
        results = results if isinstance(results, (tuple, list)) else (results,)
        results = [each for each in results if each is not None and each.numel()]
        assert results
        for result, expected in zip(results, truths, strict=False):
            if name == "cublas" and op != "conv_weight_grad":
                expected = expected.permute(0, 2, 3, 1)
            torch.testing.assert_close(result.reshape(expected.shape), expected)


def test_a_wrong_launcher_gets_no_number(monkeypatch):
    problem = Problem("conv_packed", Geometry(1, 5, 3, 33, 31, 1, 1, 0), torch.float32)
    run = Problem.run
    monkeypatch.setattr(Problem, "run", lambda *a: tuple(r + 1 for r in run(*a)))
    row = bench.measure(problem, KERNEL_DEVICE, ROOFS, runs=1, compiled=False)
    assert set(row) == {"op", "layer", "wrong"}


def test_bytes_and_operations_are_counted():
    layer = Geometry(2, 4, 4, 64, 32, 3, 2, 1)
    bf16 = {op: Problem(op, layer, torch.bfloat16) for op in OPS}
    pixels, out_pixels = 2 * 16, 2 * 4
    assert bf16["pack_signs"].bytes_moved == pixels * (128 + 8)
    assert bf16["sign_backward"].bytes_moved == (3 * pixels + out_pixels) * 64 * 2
    assert bf16["rprelu_backward"].bytes_moved == out_pixels * 32 * 6
    assert bf16["conv_packed"].bytes_moved == pixels * 8 + 32 * 9 * 8 + out_pixels * 64
    assert bf16["unit_forward"].bytes_moved == out_pixels * (32 * (2 + 8 + 2) + 4)
    assert bf16["unit_activation_backward"].bytes_moved == out_pixels * 32 * (2 + 2 + 8 + 2)
    assert bf16["conv_weight_grad"].bytes_moved == pixels * 8 + out_pixels * 64 + 32 * 9 * 64 * 4
    assert bf16["conv_weight_grad"].operations == 2 * out_pixels * 32 * 9 * 64
    assert bf16["conv_packed"].operations == bf16["conv_real"].bit_operations == 0
    assert bf16["conv_packed"].bit_operations == bf16["conv_real"].operations


def test_percentiles():
    fifty = [float(value) for value in range(51)]
    assert timing.percentiles(fifty) == timing.Timing(10, 25, 40)
    assert timing.percentiles([7.0]) == timing.Timing(7, 7, 7)


def test_every_timed_run_is_one_call():
    calls = []
    result = timing.time_callable(lambda: calls.append(1), torch.device("cpu"), runs=4, warmup=2)
    assert len(calls) == 6
    assert 0 <= result.p20 <= result.p50 <= result.p80


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_roofs_are_measured_on_random_operands(monkeypatch, dtype):
    """Zeros would flatter a GPU."""
    results = []

    def clock(call, device, runs):
        results.append(call())
        return timing.Timing(2e6, 2e6, 2e6)

    monkeypatch.setattr(timing, "time_callable", clock)
    rate = timing.matmul_rate(KERNEL_DEVICE, dtype)
    size = len(results[0])
    assert rate == size**3
    assert len(results[0].unique()) > 100
    assert results[0].dtype == (torch.int32 if dtype == torch.int8 else dtype)
    assert timing.copy_bandwidth(KERNEL_DEVICE) == results[1].nbytes
    assert len(results[1][: 2**16].unique()) == 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nonsense"], "unknown model 'nonsense'"),
        (["--op", "nonsense"], "invalid choice"),
        (["--runs", "many"], "must be a whole number of at least 1, not 'many'"),
        (["--runs", "0"], "must be a whole number of at least 1, not '0'"),
    ],
)
def test_a_user_error_is_one_line(arguments, message):
    with pytest.raises(cli.UserError, match=message) as caught:
        bench.main(arguments)
    assert "\n" not in str(caught.value)


def test_without_a_gpu_or_the_interpreter_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(commands, "interpreted", lambda kernel: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(cli.UserError, match=r"no CUDA device; .* TRITON_INTERPRET=1"):
        bench.main([])


def test_where_no_result_can_be_written_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "measured_roofs", lambda *_: pytest.fail("it measures"))
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "results.json"):
        with pytest.raises(cli.UserError, match=r"folder"):
            bench.main(["--json", str(place)])

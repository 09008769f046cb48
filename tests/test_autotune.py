"""The tuner: candidates, the check before the clock, tables that can be gone on with."""

import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from tests.helpers import KERNEL_DEVICE, OF_BOTH_STEPS
from tritonbnn import cli, reference
from tritonbnn.kernels import autotune, config, judge, provenance, truth, whole
from tritonbnn.kernels.candidates import candidates, spread
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.judge import Judge
from tritonbnn.kernels.problems import OPS, PLAN, Problem
from tritonbnn.kernels.problems.network import model_layers
from tritonbnn.kernels.targets import TARGETS
from tritonbnn.kernels.timing import Timing

H100 = TARGETS["sm_90"]

LAYER = Geometry(2, 5, 3, 33, 31, 3, 1, 1)
FORWARD = Problem("conv_packed", LAYER, torch.float32)
HERE = Judge(KERNEL_DEVICE, runs=1)
UNIT = Problem(PLAN, Geometry(2, 3, 2, 33, 33, 1, 1, 0), torch.float32)


@pytest.fixture(autouse=True)
def progress(monkeypatch):
    """No progress bars in captured output."""
    monkeypatch.setenv("TQDM_DISABLE", "1")


def test_reactnet_a_has_26_convolutions_of_18_shapes():
    layers = model_layers("reactnet_a", 256, 224)
    assert (layers.total(), len(layers)) == (26, 18)
    assert layers[Geometry(256, 112, 112, 32, 32, 3, 1, 1)] == 1
    assert layers[Geometry(256, 14, 14, 512, 512, 3, 1, 1)] == 5
    assert layers[Geometry(256, 7, 7, 512, 1024, 1, 1, 0)] == 1


@pytest.mark.parametrize("op", OPS)
def test_candidates_are_distinct_and_start_with_the_default(op):
    key = Problem(op, Geometry(256, 14, 14, 512, 512, 3, 1, 1), torch.bfloat16).key
    found = candidates(key, H100)
    assert found[0] == config.default(key, target=H100)
    assert len(set(found)) == len(found) > 4
    formulations = set(config.known_formulations(key.op)) - {"wgmma"}  # that of 1x1 convolutions
    assert {choice.formulation for choice in found} == formulations


def test_candidates_are_clipped_to_the_problem_and_to_shared_memory():
    small = candidates(FORWARD.key, H100)[1:]
    assert max(choice.tile.block_n for choice in small) == 32
    assert max(choice.tile.block_m for choice in small) == 32
    wide = Problem("conv_real", Geometry(256, 14, 14, 512, 512, 3, 1, 1), torch.bfloat16).key
    tiles = {t: {c.tile for c in candidates(wide, TARGETS[t])} for t in TARGETS}
    assert tiles["sm_89"] < tiles["sm_80"] < tiles["sm_90"]


@pytest.mark.parametrize("op", ["conv_packed", "conv_real", "pack_signs", PLAN])
def test_a_limit_keeps_the_default_and_spreads_over_the_rest(op):
    key = Problem(op, Geometry(256, 14, 14, 512, 512, 1, 1, 0), torch.bfloat16).key
    found = candidates(key, H100)
    for limit in (1, 2, 3, 4, 7, 16, 40, len(found) - 1, len(found), len(found) + 9):
        chosen = spread(found, limit)
        assert chosen[0] == found[0] == config.default(key, target=H100)
        assert len(set(chosen)) == len(chosen) == min(limit, len(found))
        assert set(chosen) <= set(found)
        if limit > len(config.known_formulations(op)):
            assert {c.formulation for c in chosen} == set(config.known_formulations(op))
    assert spread(found, None) == found


def test_a_limit_leaves_no_wide_gap():
    key = Problem("conv_real", Geometry(256, 14, 14, 512, 512, 3, 1, 1), torch.bfloat16).key
    products = [c for c in candidates(key, H100)[1:] if c.formulation == "dot"]
    places = [products.index(c) for c in spread([config.default(key), *products], 9)[1:]]
    gaps = [b - a for a, b in itertools.pairwise([0, *places, len(products)])]
    assert max(gaps) <= len(products) / 8 + 1
    assert max(products[place].tile.block_m for place in places) == 256


@pytest.fixture
def kernels_everywhere(monkeypatch):
    """A whole unit runs on kernels too."""
    if KERNEL_DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.usefixtures("kernels_everywhere")
@pytest.mark.parametrize(("op", "binary_weight"), OF_BOTH_STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_launcher_looks_up_the_key_of_its_problem(monkeypatch, op, binary_weight, dtype):
    """Else what was tuned for the problem would not be found."""
    asked = set()
    choose = config.choose
    monkeypatch.setattr(config, "choose", lambda key, device: asked.add(key) or choose(key, device))
    problem = Problem(op, Geometry(2, 6, 4, 33, 33, 3, 2, 1), dtype, binary_weight)
    problem.run(problem.inputs(KERNEL_DEVICE))
    assert problem.key in asked


@pytest.mark.usefixtures("kernels_everywhere")
@pytest.mark.parametrize(("op", "binary_weight"), OF_BOTH_STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_default_passes_the_check(op, binary_weight, dtype):
    torch.manual_seed(0)
    layer = UNIT.layer if op == PLAN else LAYER  # no shortcut leads from 33 to 31 channels
    problem = Problem(op, layer, dtype, binary_weight)
    inputs = problem.inputs(KERNEL_DEVICE)
    results = problem.run(inputs)
    assert truth.error_of(problem, inputs, results) == ""
    wrong = (results[0] * 2 + 1, *results[1:])
    if op != "pack_signs":
        assert "is allowed" in truth.error_of(problem, inputs, wrong)


@pytest.mark.parametrize("op", ["conv_real", "conv_weight_grad", PLAN])
def test_the_yardstick_of_float32_is_no_tf32(monkeypatch, op):
    seen = []
    convolve = reference.binary_conv2d

    def look(*args, **kwargs):
        seen.append(torch.backends.cudnn.conv.fp32_precision)
        return convolve(*args, **kwargs)

    monkeypatch.setattr(reference, "binary_conv2d", look)
    problem = Problem(op, UNIT.layer, torch.float32)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        truth.plain(problem, problem.inputs(torch.device("cpu")), torch.float32)
    assert seen == ["ieee"]


def test_the_fastest_right_candidate_wins(monkeypatch):
    wrong = config.Choice("popcount", config.TileConfig(16, 16, 32, 4, 1))
    right = config.Choice("int8", config.TileConfig(32, 32, 64, 4, 1))
    default = config.default(FORWARD.key)
    speed = {wrong: 1.0, right: 2.0, default: 3.0}
    current = []
    run = Problem.run

    def corrupted(problem, inputs):
        current[:] = [config.choose(problem.key, KERNEL_DEVICE)]
        return tuple(r + (current[0] == wrong) for r in run(problem, inputs))

    def clock(call, device, runs):
        call()
        return Timing(*[speed[current[0]]] * 3)

    monkeypatch.setattr(Problem, "run", corrupted)
    monkeypatch.setattr(judge, "time_callable", clock)
    entry = autotune.tune(FORWARD, [default, wrong, right], HERE)
    assert (entry.choice, entry.time_us, entry.default_us) == (right, 2.0, 3.0)


@pytest.mark.parametrize("op", ["conv_packed", "conv_real"])
def test_what_is_wrong_on_the_whole_batch_alone_is_not_chosen(monkeypatch, capsys, op):
    """As where the compiler knows that a size is a multiple of 16, and is wrong then."""
    problem = Problem(op, replace(LAYER, batch=3), torch.float32)
    default = config.default(problem.key)
    other = config.Choice(default.formulation, replace(default.tile, num_warps=2))
    run = Problem.run

    def corrupted(self, inputs):
        wrong = self.layer.batch > 2 and config.choose(self.key, KERNEL_DEVICE) == other
        return tuple(result + wrong for result in run(self, inputs))

    monkeypatch.setattr(Problem, "run", corrupted)
    times = iter([2.0, 1.0])
    monkeypatch.setattr(judge, "time_callable", lambda *_, **__: Timing(*[next(times)] * 3))
    assert autotune.tune(problem, [default, other], HERE).choice == default
    said = {"conv_packed": "integers are not the default's", "conv_real": "reals are not near"}
    assert said[op] in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("kernels_everywhere")
def test_the_faster_plan_wins(monkeypatch):
    """By a clock that counts convolutions: recompute takes one more than keep.

    Without a one-bit core fused is keep, and the first of equals is chosen.
    """
    count = [0]
    convolve = whole.convolved

    def counted(*args, **kwargs):
        count[0] += 1
        return convolve(*args, **kwargs)

    def clock(call, device, runs):
        count[0] = 0
        call()
        return Timing(*[sign * count[0]] * 3)

    monkeypatch.setattr(whole, "convolved", counted)
    monkeypatch.setattr(judge, "time_callable", clock)
    plans = candidates(UNIT.key, H100)
    assert [plan.formulation for plan in plans] == ["fused", "keep", "recompute"]
    for sign, best, convolutions in ((1, "fused", 1), (-1, "recompute", 2)):
        entry = autotune.tune(UNIT, plans, HERE)
        assert (entry.choice.formulation, entry.time_us * sign) == (best, convolutions)
        assert entry.default_us == sign


def test_the_costliest_layers_come_first_and_whole_units_last(monkeypatch, tmp_path):
    small, large = (replace(LAYER, height=size, width=size) for size in (3, 5))
    problems = [UNIT, *(Problem("pack_signs", layer, torch.float32) for layer in (small, large))]
    order = []

    def note(problem, *rest):
        order.append((problem.op, problem.layer.height))
        raise autotune.UntunableError

    monkeypatch.setattr(autotune, "tune", note)
    autotune.tune_all(problems, tmp_path / "gpu.json", "test gpu", HERE, target=H100)
    assert order == [("pack_signs", 5), ("pack_signs", 3), (PLAN, UNIT.layer.height)]


def test_no_problem_is_begun_when_time_is_over(tmp_path):
    problems = [Problem("pack_signs", LAYER, torch.float32)]
    options = {"target": H100, "limit": 1, "end": time.monotonic() - 1}
    path = tmp_path / "gpu.json"
    assert autotune.tune_all(problems, path, "test gpu", HERE, **options) == (
        0,
        0,
    )
    assert not path.exists()


@pytest.mark.usefixtures("kernels_everywhere")
def test_a_plan_is_chosen_on_the_launchers_as_tuned(monkeypatch, tmp_path):
    path = tmp_path / "gpu.json"
    options = {"target": H100, "limit": 2}
    forward = Problem("conv_packed", UNIT.layer, torch.float32)
    monkeypatch.setattr(judge, "time_callable", lambda call, *_, **__: Timing(1, 1, 1))
    autotune.tune_all([forward], path, "test gpu", HERE, **options)
    path.write_text(path.read_text().replace('"int8"', '"popcount"'))
    ran = []
    run = Problem.run

    def noted(problem, inputs):
        ran.append((problem.op, config.choose(forward.key, KERNEL_DEVICE).formulation))
        return run(problem, inputs)

    monkeypatch.setattr(Problem, "run", noted)
    assert autotune.tune_all([UNIT], path, "test gpu", HERE, **options) == (1, 0)
    assert set(ran) == {(PLAN, "popcount")}
    plan = config.read_table(path, "test gpu")[UNIT.key.bucketed()]
    assert plan.formulation in config.known_formulations(PLAN)


@pytest.mark.slow
def test_a_table_is_written_read_and_gone_on_with(tmp_path):
    path = tmp_path / "gpu.json"
    problems = [FORWARD, Problem("pack_signs", LAYER, torch.float32)]
    options = {"target": H100, "limit": 2}
    assert autotune.tune_all(problems[:1], path, "test gpu", HERE, **options) == (1, 0)
    assert autotune.tune_all(problems, path, "test gpu", HERE, **options) == (
        1,
        0,
    )
    first = path.read_text()
    assert autotune.tune_all(problems, path, "test gpu", HERE, **options) == (
        0,
        0,
    )
    assert path.read_text() == first
    table = config.read_table(path, "test gpu")
    assert set(table) == {problem.key.bucketed() for problem in problems}
    document = json.loads(first)
    assert set(document) == {"gpu", "entries", *provenance.versions(KERNEL_DEVICE)}
    for entry in document["entries"]:
        assert 0 < entry["time_us"] <= entry["default_us"]


@pytest.mark.slow
def test_what_cannot_run_is_said_and_the_rest_is_tuned(tmp_path, monkeypatch, capsys):
    pack = Problem("pack_signs", LAYER, torch.float32)
    broken = {config.default(FORWARD.key)}
    run = Problem.run

    def fragile(problem, inputs):
        if problem.op == FORWARD.op and config.choose(problem.key, KERNEL_DEVICE) in broken:
            raise RuntimeError("PassManager::run failed\nand more")
        return run(problem, inputs)

    monkeypatch.setattr(Problem, "run", fragile)
    path, options = tmp_path / "gpu.json", {"target": H100, "limit": 2}
    tuned = autotune.tune_all([FORWARD, pack], path, "test gpu", HERE, **options)
    assert tuned == (1, 1)
    assert set(config.read_table(path, "test gpu")) == {pack.key.bucketed()}
    said = capsys.readouterr().out + capsys.readouterr().err
    assert "cannot run: PassManager::run failed\n" in said
    assert "is wrong or cannot run" in said
    broken.clear()
    tuned = autotune.tune_all([FORWARD, pack], path, "test gpu", HERE, **options)
    assert tuned == (1, 0)


def test_other_versions_tune_again_and_a_broken_table_stops(tmp_path):
    path = tmp_path / "gpu.json"
    options = {"target": H100, "limit": 1}
    problems = [Problem("pack_signs", LAYER, torch.float32)]
    autotune.tune_all(problems, path, "test gpu", HERE, **options)
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "driver": "1.0", "torch": "1.0"}))
    assert autotune.tune_all(problems, path, "test gpu", HERE, **options) == (
        0,
        0,
    )
    path.write_text(json.dumps({**document, "triton": "1.0"}))
    assert autotune.tune_all(problems, path, "test gpu", HERE, **options) == (
        1,
        0,
    )
    path.write_text("{")
    with pytest.raises(cli.UserError, match=r"gpu.json: not JSON.*; mend or remove the file"):
        autotune.tune_all(problems, path, "test gpu", HERE, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nonsense"], "unknown model 'nonsense'"),
        (["--layer", "99"], "--layer must be from 0 to 17"),
        (["--compile-only", "--target", "sm_10"], "--target: invalid choice: 'sm_10'"),
        (["--dtype", "int8"], "invalid choice"),
        (["--minutes", "-1"], "must be a number of minutes above 0, as in 5m, not '-1'"),
        (["--batch", "0"], "must be a whole number of at least 1, not '0'"),
        (["--size", "33"], "multiple|divisible"),
        (["--gpu", "Some other GPU"], "no CUDA device|this GPU is"),
    ],
)
def test_a_user_error_is_one_line(arguments, message):
    with pytest.raises(cli.UserError, match=message) as caught:
        autotune.main(arguments)
    assert "\n" not in str(caught.value)


def test_a_plan_is_no_kernel_to_rank(capsys):
    arguments = ["--compile-only", "--op", "unit_plan", "--layer", "0"]
    assert autotune.main(arguments) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_candidates_are_ranked_without_a_gpu():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tritonbnn.kernels.autotune", "--compile-only"]
    options = ["--op", "conv_real", "--layer", "4", "--limit", "3", "--target", "sm_90"]
    done = subprocess.run(
        [*command, *options],
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 3
    shares = [row["tensor_core_share"] for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert min(shares) > 0
    assert all(row["spill_bytes"] == 0 and row["registers"] > 0 for row in rows)

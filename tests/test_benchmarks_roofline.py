"""The floor against closed forms, and counted bytes against the floor's own count."""

from dataclasses import replace

import pytest
import torch

from benchmarks import ceilings, rivals, roofline, traffic
from benchmarks.ceilings import Ceilings
from benchmarks.families import (
    ELEMENTWISE,
    ENDS,
    FORWARD,
    GRADIENTS,
    OPTIMIZER,
    PACK,
    kernel_family,
    operator_family,
)
from tritonbnn import cli
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.problems.network import model_layers

CPU = torch.device("cpu")
ROOFS = Ceilings(copy_gbs=3000, fp32_tflops=50, bf16_tflops=800, int8_tops=1600)
FLAGS = ["--copy-gbs", "3000", "--fp32-tflops", "50", "--bf16-tflops", "800", "--int8-tops", "1600"]


def total(launches, what, *families):
    return sum(getattr(each, what) for each in launches if each.family in families)


def test_the_network_has_the_published_sizes():
    layers = model_layers("reactnet_a", 1, 224)
    assert sum(n * layer.pixels * layer.out_channels for layer, n in layers.items()) == 4_641_280
    launches = roofline.network_launches(
        "reactnet_a", 1, 224, 1.0, dtype="bf16", step=2, plan="keep"
    )
    assert total(launches, "operations", FORWARD) == pytest.approx(2 * 4.817e9, rel=1e-3)
    assert total(launches, "operations", GRADIENTS) == pytest.approx(4 * 4.817e9, rel=1e-3)


@pytest.mark.parametrize(
    ("dtype", "step", "plan", "per_element"),
    [  # 5 A + 12 B, and A more where the convolution is computed again; fused, A is never stored
        ("bf16", 2, "keep", 5 * 2 + 12 * 2),
        ("bf16", 2, "recompute", 6 * 2 + 12 * 2),
        ("bf16", 2, "fused", 12 * 2),
        ("fp32", 2, "keep", 5 * 2 + 12 * 4),
        ("fp32", 1, "keep", 5 * 4 + 12 * 4),
        ("fp32", 1, "fused", 6 * 4 + 12 * 4),
    ],
)
def test_bytes_of_an_identity_unit(dtype, step, plan, per_element):
    layer = Geometry(2, 8, 8, 64, 64, 1, 1, 0)
    elements = 2 * 8 * 8 * 64
    convolutions = 4 if plan == "fused" and step == 2 else 1 + (plan != "keep")
    # read by each convolution and by the weight's gradient, and written once; fused, so are du's
    signs = (2 + convolutions + 2 * (convolutions == 4)) * elements // 8
    weights = (convolutions + 1) * 64 * 64 * (1 / 8 if step == 2 else 4) + 64 * 64 * 4
    launches = list(roofline.unit_launches(layer, dtype, step, plan))
    assert sum(each.bytes for each in launches) == elements * per_element + signs + weights


def test_bytes_of_a_widening_and_of_a_pooling_unit():
    wide = list(roofline.unit_launches(Geometry(1, 4, 4, 32, 64, 1, 1, 0), "bf16", 2, "keep"))
    x, z, a = 16 * 32 * 2, 16 * 64 * 2, 16 * 64 * 2
    signs_x, signs_z = 16 * 32 // 8, 16 * 64 // 8
    epilogues = 2 * a + x + z + signs_z + (2 * z + a + x) + (2 * z + a)
    assert total(wide, "bytes", ELEMENTWISE) == epilogues
    weights = 64 * 32 // 8 + 64 * 32 * 4
    assert total(wide, "bytes", GRADIENTS) == (z + signs_x) + (2 * z + 2 * x) + weights
    pool = list(roofline.unit_launches(Geometry(1, 4, 4, 32, 32, 3, 2, 1), "bf16", 2, "keep"))
    packed = 32 * 9 * 4
    assert total(pool, "bytes", FORWARD) == signs_x + packed + 4 * 32 * 2


def test_a_launch_takes_the_longer_of_its_two():
    moving = roofline.Launch(ELEMENTWISE, bytes=3_000_000)
    assert moving.seconds(ROOFS) == pytest.approx(1e-6)
    multiplying = roofline.Launch(FORWARD, bytes=3, operations=1_600_000_000, dtype="signs")
    assert multiplying.seconds(ROOFS) == pytest.approx(1e-6)
    assert multiplying.seconds(replace(ROOFS, one_bit_tops=6400)) == pytest.approx(0.25e-6)
    report = roofline.report("reactnet_a", 4, 64, 0.5, 2, ROOFS)
    plans = ("keep", "recompute", "fused")
    assert set(report) == {f"{dtype} {plan}" for dtype in ("fp32", "bf16") for plan in plans}
    for row in report.values():
        assert sum(row["ms_by_family"].values()) == pytest.approx(row["ms"], abs=1e-3)
        assert row["images_per_second"] == pytest.approx(4 / row["ms"] * 1e3, rel=1e-2)


@pytest.mark.bench
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize(
    ("word", "plan"),
    [("ours", "keep"), ("ours-recompute", "recompute"), ("ours-recompute+bf16", "recompute")],
)
def test_the_count_agrees_with_what_the_operators_are_given(word, plan, step):
    rival = rivals.parse(word)
    counted = traffic.counted_bytes(
        lambda: rival.build("reactnet_a", step, num_classes=1000),
        8,
        224,
        bf16=rival.bf16,
        device=CPU,
    )
    launches = roofline.network_launches(
        "reactnet_a",
        *(8, 224, 1.0),
        dtype="bf16" if rival.bf16 else "fp32",
        step=step,
        plan=plan,
    )
    for family in (FORWARD, OPTIMIZER):
        assert counted[family] == pytest.approx(total(launches, "bytes", family), rel=1e-3)
    # As operators the input gradient ends at the signs; what follows is one that reads it again.
    bytes_of = roofline.STREAM_BYTES["bf16" if rival.bf16 else "fp32"]
    layers = model_layers("reactnet_a", 8, 224)
    x, z = (
        bytes_of * sum(n * size(layer) for layer, n in layers.items())
        for size in (
            lambda layer: layer.batch * layer.height * layer.width * layer.channels,
            lambda layer: layer.pixels * layer.out_channels,
        )
    )
    gradients = total(launches, "bytes", GRADIENTS) - x - z
    assert counted[GRADIENTS] == pytest.approx(gradients, rel=1e-3)
    assert counted[PACK] == pytest.approx(total(launches, "bytes", PACK), rel=0.05)
    # what is left to torch takes several passes where one would do, but the stem's BatchNorm is
    # counted once for the three tensors that it reads twice
    least = total(launches, "bytes", ELEMENTWISE) + 3 * x + z
    twice = 3 * 8 * 32 * 112**2 * bytes_of
    assert least - twice < counted[ELEMENTWISE] < 1.35 * least


def test_traffic_is_operands_read_and_results_written():
    a, b = torch.zeros(4, 6), torch.zeros(6)
    with traffic._Traffic() as count:
        a.view(24), a.t(), torch.empty(1000)
        a + b.expand(4, 6)
        a.mul_(2)
    assert count.bytes == {ELEMENTWISE: 4 * (24 + 6 + 24) + 4 * (24 + 24)}


@pytest.mark.parametrize(
    ("name", "shapes", "family"),
    [
        ("tritonbnn::pack_weight", [], PACK),
        ("tritonbnn::conv_real", [], FORWARD),
        ("tritonbnn::conv_weight_grad", [], GRADIENTS),
        ("tritonbnn::unit_forward", [], ELEMENTWISE),
        ("aten::convolution", [[2, 64, 8, 8], [64, 64, 3, 3]], FORWARD),
        ("aten::conv2d", [[2, 3, 8, 8], [32, 3, 3, 3]], ENDS),
        ("aten::convolution_backward", [[2, 8, 8, 8], [2, 8, 8, 8], [8, 8, 1, 1]], GRADIENTS),
        ("aten::convolution_backward", [[2, 8, 8, 8], [2, 3, 8, 8], [8, 3, 3, 3]], ENDS),
        ("aten::addmm", [], ENDS),
        ("aten::nll_loss_backward", [], ENDS),
        ("aten::native_batch_norm", [], ELEMENTWISE),
        ("Optimizer.step#Adam.step", [], OPTIMIZER),
        ("autograd::engine::evaluate_function: MulBackward0", [], None),
    ],
)
def test_families_of_operators(name, shapes, family):
    assert operator_family(name, shapes) == family


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("sm90_xmma_wgrad_implicit_gemm_indexed_f16f16", GRADIENTS),
        ("sm80_xmma_fprop_implicit_gemm_tf32f32", FORWARD),
        ("triton_red_fused__native_batch_norm_legit_add_7", ELEMENTWISE),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", OPTIMIZER),
    ],
)
def test_families_of_kernels_without_an_operator(name, family):
    assert kernel_family(name) == family


def test_ceilings_are_measured_here():
    found = ceilings.measure(CPU)
    assert min(found.copy_gbs, found.fp32_tflops, found.bf16_tflops, found.int8_tops) > 0


def test_the_command_computes_from_given_ceilings(capsys, tmp_path):
    path = tmp_path / "floor.json"
    assert roofline.main([*FLAGS, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "ceilings: copy_gbs 3000" in out
    assert out.count("img/s") == 6
    assert path.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--copy-gbs", "3000"], "give all ceilings but --one-bit-tops"),
        ([*FLAGS[:-1], "0"], "a ceiling must be above 0"),
        ([*FLAGS, "--model", "nonsense"], "unknown model 'nonsense'"),
    ],
)
def test_a_user_error_is_one_line(arguments, message):
    with pytest.raises(cli.UserError, match=message):
        roofline.main(arguments)

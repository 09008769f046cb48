"""Which GPU gets what: the table, and where a device stands in it."""

import pytest
import torch

from tritonbnn.cli import UserError
from tritonbnn.kernels import config, targets
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.targets import ANY, TARGETS, UNKNOWN, nearest, parse_target, target_of

LAYER = Geometry(256, 14, 14, 512, 512, 3, 1, 1)
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        *((75, "sm_75"), (80, "sm_80"), (86, "sm_86"), (87, "sm_86"), (89, "sm_89")),
        *((90, "sm_90"), (100, "sm_100"), (103, "sm_100"), (120, "sm_120"), (121, "sm_120")),
    ],
)
def test_a_gpu_is_the_nearest_that_is_not_newer(capability, name, monkeypatch):
    assert nearest(capability).name == name
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: divmod(capability, 10))
    assert target_of(CUDA) is TARGETS[name]


def test_an_older_gpu_is_told_what_runs_there():
    with pytest.raises(UserError, match=r"sm_70 is older than sm_75 .*: use --device cpu, or"):
        nearest(70)


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("gfx942:sramecc+:xnack-", TARGETS["gfx942"]),
        ("gfx1100", TARGETS["gfx1100"]),
        ("gfx803", UNKNOWN),
    ],
)
def test_a_rocm_gpu_is_known_by_its_architecture(arch, expected, monkeypatch):
    class Properties:
        gcnArchName = arch  # noqa: N815

    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    assert target_of(CUDA) is expected


def test_no_gpu_is_any():
    assert target_of(torch.device("cpu")) is ANY


def test_a_name_is_parsed_or_the_known_ones_are_listed():
    assert parse_target("gfx90a").warp_size == 64
    with pytest.raises(UserError, match=r"one of sm_75, sm_80, .*gfx1201, not 'sm_70'"):
        parse_target("sm_70")


@pytest.mark.parametrize("target", [*TARGETS.values(), ANY, UNKNOWN], ids=lambda t: t.name)
def test_a_default_is_something_that_exists_there(target):
    for op in config.operations():
        known = config.known_formulations(op)
        dtype = "int32" if op == "conv_packed" else "float16"
        key = LAYER.key(op, dtype)
        found = config.default(key, target=target)
        assert found.formulation in config.formulations(op, target)
        assert set(config.formulations(op, target)) <= set(known)
    forward = config.default(LAYER.key("conv_packed", "int32"), target=target).formulation
    one_bit = {"sm_80", "sm_86", "sm_89", "sm_90"}
    usual = {"sm_75": "popcount", "unknown": "popcount", **dict.fromkeys(one_bit, "mma")}
    assert forward == usual.get(target.name, "int8")
    without = config.on_common_cores(LAYER.key("conv_packed", "int32"), target).formulation
    assert without == ("popcount" if target.name in ("sm_75", "unknown") else "int8")
    product = config.default(LAYER.key("conv_input_grad", "float16"), target=target).formulation
    usual = {"sm_75": "library", "unknown": "library", "sm_90": "warpgroup"}
    assert product == usual.get(target.name, "dot")


def test_bfloat16_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(config, "target_of", lambda _: TARGETS["sm_75"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU without a table")
    key = LAYER.key("conv_input_grad", "bfloat16")
    choose = config._choose.__wrapped__
    with pytest.raises(UserError, match=r"sm_75 \(T4.*no bfloat16 arithmetic: use float16"):
        choose(key, CUDA)
    assert choose(LAYER.key("conv_input_grad", "float16"), CUDA).formulation == "library"


def test_every_target_is_named_once():
    assert all(target.name == name for name, target in TARGETS.items())
    assert len({(t.backend, t.architecture) for t in TARGETS.values()}) == len(TARGETS)
    assert targets.OLDEST.architecture == min(
        t.architecture for t in TARGETS.values() if t.backend == "cuda"
    )

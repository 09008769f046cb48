"""The operators that torch.compile sees: which there are, their schemas, and whole networks."""

from contextlib import nullcontext

import pytest
import torch
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.twin import FloatReActNetA
from tritonbnn import eager, ops
from tritonbnn.models import build_model
from tritonbnn.nn import BinaryUnit
from tritonbnn.ops import library

# one is asked for a setting, and the others change a weight in place, which no graph holds
NAMES = set(eager.__all__) - {"unit_plan", "bop_update", "bop_update_packed"}


def test_exactly_these_operators_are_registered():
    assert set(library.OPERATORS) == NAMES
    assert all(hasattr(torch.ops.tritonbnn, name) for name in NAMES)


def samples():
    """Arguments for each operator: odd sizes, a channel count that is not a multiple of 32."""
    torch.manual_seed(0)
    x = torch.randn(2, 33, 5, 7).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(2, 40, 3, 4)
    vector = torch.randn(33)
    weight = torch.randn(40, 33, 3, 3)
    signs = eager.pack_signs(x)
    packed, alpha = eager.pack_weight(weight)
    matrix = eager.pack_signs(torch.randn(6, 33))
    geometry = {"stride": 2, "padding": 1}
    integers = {"channels": 33, "dtype": torch.int16, **geometry}
    size = {"channels": 33, "height": 5, "width": 7}
    return {
        "pack_signs": ((x, vector), {}),
        "unpack_signs": ((signs, 33, torch.bfloat16), {}),
        "pack_weight": ((weight,), {}),
        "packed_difference": ((matrix, matrix.flip(0)), {}),
        "packed_matmul": ((matrix, matrix, 33), {}),
        "conv_packed": ((signs, packed, None), integers),
        "conv_moments": ((signs, packed), {"channels": 33, **geometry}),
        "conv_unit_forward": (
            (signs, packed, grad, *[torch.randn(40)] * 7),
            {"channels": 33, **geometry, "shortcut": "identity", "pack": True},
        ),
        "conv_real": ((signs, weight), {"dtype": torch.float32, **geometry}),
        "conv_input_grad": ((grad, packed, alpha), {**size, **geometry}),
        "conv_weight_grad": ((grad, signs), {"channels": 33, "kernel_size": 3, **geometry}),
        "sign_forward": ((x, None), {}),
        "sign_backward": ((x, x, vector, x), {}),
        "rprelu_forward": ((x, vector, vector, vector), {}),
        "rprelu_backward": ((x, x, vector, vector), {}),
        "channel_moments": ((eager.conv_packed(signs, packed, None, **integers),), {}),
        "unit_forward": ((x, x, *[vector] * 7), {"shortcut": "identity", "pack": True}),
        "unit_activation_backward": ((x, x, x, *[vector] * 5), {"shortcut": "identity"}),
        "unit_norm_backward": ((x, x, *[vector] * 3), {}),
    }


@pytest.mark.parametrize("name", sorted(NAMES))
def test_operators_pass_opcheck(name):
    args, kwargs = samples()[name]
    torch.library.opcheck(library.OPERATORS[name], args, kwargs)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_launchers_keep_to_what_operators_may_return(launchers, device, name):
    """torch refuses an operator whose results share memory; only the eager twins were asked."""
    args, kwargs = tree_map_only(torch.Tensor, lambda x: x.to(device), samples()[name])
    library.OPERATORS[name](*args, **kwargs)


@pytest.mark.compile
def test_a_whole_network_compiles_without_a_graph_break():
    """Forward and backward, against the same network not compiled; in float64, so bits agree."""
    torch.manual_seed(0)
    options = {"width": 0.25, "num_classes": 10, "small_images": True}
    model = build_model("reactnet_a", **options).double()
    twin = build_model("reactnet_a", **options).double()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = twin(x)
    with profile() as seen:
        actual = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    names = {event.key for event in seen.key_averages()}
    assert "tritonbnn::unit_forward" in names
    assert "tritonbnn::binary_unit" not in names  # of exported programs, whose backward costs more
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    actual.backward(upstream)
    assert torch.allclose(actual, expected, rtol=1e-9)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-9 * b.grad.abs().max()


def test_meta_tensors_give_shapes():
    x = torch.empty(2, 33, 5, 7, device="meta")
    y = ops.binary_conv2d(x, torch.empty(40, 33, 3, 3, device="meta"), stride=2, padding=1)
    assert (y.shape, y.device.type) == ((2, 40, 3, 4), "meta")


class Seen(TorchDispatchMode):
    """Notes the names of all operators that run under it."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_modes_see_launchers_as_operators():
    x = torch.randn(2, 33, 5, 7)
    with Seen() as seen:
        library.pack_signs(x)
    assert "tritonbnn::pack_signs" in seen.names


def test_profilers_see_launchers_as_operators_only_where_that_is_asked_for():
    x = torch.randn(2, 33, 5, 7)
    with pytest.raises(KeyError), library.through_dispatcher():
        raise KeyError
    for asked in (False, True, False):
        with library.through_dispatcher() if asked else nullcontext(), profile() as seen:
            library.pack_signs(x)
        assert ("tritonbnn::pack_signs" in {e.key for e in seen.key_averages()}) == asked


def test_a_profiler_sees_each_function_by_its_operators_name():
    x = torch.randn(2, 8, 4, 4)
    with profile() as seen:
        BinaryUnit(8, 8, 3)(x)
        ops.binarize(x)
    names = {event.key for event in seen.key_averages()}
    assert names >= {"tritonbnn::binary_unit", "tritonbnn::binarize"}


def test_operations_are_counted_as_those_of_the_float_twin():
    options = {"width": 0.25, "num_classes": 3, "small_images": True}
    counted = []
    for model in (
        build_model("reactnet_a", **options),
        build_model("reactnet_a", binary_weights=False, **options),
        build_model("reactnet_a", plan="recompute", **options),
        FloatReActNetA(**options),
    ):
        with FlopCounterMode(display=False) as counter:
            y = model(torch.randn(2, 3, 16, 16))
            forward = counter.get_total_flops()
            y.sum().backward()
        counted.append((forward, counter.get_total_flops()))
    of_ours, of_step_1, recomputed, of_twin = counted
    assert of_ours == of_step_1 == of_twin
    assert recomputed[0] == of_twin[0]
    assert recomputed[1] > of_twin[1]  # it convolves once more

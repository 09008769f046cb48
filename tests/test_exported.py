"""Exported programs: what they compute, how they train, and what they need to be loaded."""

import copy
import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import cpp_extension
from torchvision.models.feature_extraction import create_feature_extractor

from tests.helpers import assert_runs_silently, gradient
from tests.test_compiled_gradients import IMAGES, Binarize, Onto, Program, parts
from tritonbnn import ops
from tritonbnn.contract import Options
from tritonbnn.models import build_model
from tritonbnn.nn import BinaryConv2d, BinaryUnit
from tritonbnn.ops import exported, exported_unit

COMPILER = shutil.which("g++") or shutil.which("c++")


def network(name="reactnet_a"):
    torch.manual_seed(0)
    model = build_model(name, width=0.25, num_classes=3, small_images=True)
    for parameter in model.blocks.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def all_parts():
    """And a window that torch convolves."""
    yield from parts()
    yield BinaryConv2d(8, 6, (3, 2), padding="same", groups=2), IMAGES


def outcome(model, run, inputs):
    """Outputs, all gradients and averages of one pass, by name."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = run(*leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    torch.autograd.backward(outputs, [gradient(*y.shape, seed=i) for i, y in enumerate(outputs)])
    seen = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    seen |= {f"input {i}": x.grad for i, x in enumerate(leaves)}
    seen |= {f"d{name}": p.grad for name, p in model.named_parameters()}
    return seen | {name: b.clone() for name, b in model.named_buffers()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        rounding = 1e-5 * max(1.0, value.abs().max().item())  # sums are of the largest terms
        torch.testing.assert_close(
            actual[name], value, rtol=1e-4, atol=rounding, msg=lambda m, n=name: f"{n}: {m}"
        )


def saved_and_loaded(program):
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


@pytest.mark.parametrize("strict", [True, False])
def test_every_module_trains_in_an_exported_program(strict):
    torch.manual_seed(0)
    modules, shapes = zip(*all_parts(), strict=True)
    model = Program(modules)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    twin = copy.deepcopy(model)
    inputs = [gradient(*shape, seed=i) for i, shape in enumerate(shapes)]
    program = torch.export.export(model, tuple(inputs), strict=strict)
    assert {str(node.target) for node in program.graph.nodes} >= {
        f"tritonbnn.{name}.default" for name in exported.OPERATORS
    }
    run = saved_and_loaded(program).module()
    expected = outcome(twin, twin, inputs)
    actual = outcome(run, run, inputs)
    for name in expected.keys() - actual.keys():  # the tracer drops counters that are not counted
        assert name.endswith("num_batches_tracked")
        del expected[name]
    assert_same(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["reactnet_a", "reactnet_18"])
def test_a_network_of_any_batch_trains_in_an_exported_program(name, training):
    model, twin = network(name).train(training), network(name).train(training)
    sizes = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(model, (gradient(4, 3, 16, 16),), dynamic_shapes=sizes)
    assert not any(node.meta["val"].dtype == torch.int32 for node in tensors(program))
    run = saved_and_loaded(program).module()
    inputs = [gradient(5, 3, 16, 16, seed=1)]
    assert_same(outcome(run, run, inputs), outcome(twin, twin, inputs))


def tensors(program):
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and n.users]
    return [n for n in nodes if isinstance(n.meta.get("val"), torch.Tensor)]


@pytest.mark.parametrize("name", exported.OPERATORS)
def test_exported_operators_pass_opcheck(name):
    x = gradient(2, 8, 6, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    rows, matrix = gradient(5, 8).requires_grad_(), gradient(7, 8, seed=1).requires_grad_()
    weight = gradient(8, 8, 3, 3, seed=2).requires_grad_()
    vectors = [gradient(8, seed=i).requires_grad_() for i in range(6)]
    evaluated = (None, None, None, None, x, vectors[0], vectors[1].exp())
    real_unit = (x, weight, *vectors[2:4], *evaluated, 1, "identity", False, 1e-5, "recompute")
    unit = (x, weight, *vectors, None, None, None, 2, "pool", True, 1e-5, "keep")
    samples = {
        "binarize": [(x, None), (rows, vectors[0])],
        "rprelu": [(x, *vectors[:3])],
        "binary_conv2d": [
            (x, weight, None, 2, 1, True, True),
            (x, weight, *[vectors[0], 1, 1, 0, 0]),
        ],
        "binary_conv2d_window": [
            (x, weight[:, :4], None, *([1, 1], [1, 0], [0, 1], [1, 2]), 2, True, True)
        ],
        "binary_linear": [
            (rows, matrix, vectors[0], True, True),
            (rows, matrix, None, False, False),
        ],
        "binary_unit": [unit, real_unit],
    }
    for arguments in samples[name]:
        arguments = [bool(a) if a is False or a is True else a for a in arguments]
        torch.library.opcheck(exported.OPERATORS[name], tuple(arguments))


def test_a_saved_program_needs_torch_and_this_package_alone(tmp_path):
    """Imported in the order that the README has; the package alone brings no torch in."""
    program = torch.export.export(BinaryUnit(8, 8, 3).eval(), (gradient(1, 8, 4, 4),))
    torch.export.save(program, tmp_path / "unit.pt2")
    assert_runs_silently("import sys, tritonbnn\nassert 'torch' not in sys.modules\n")
    code = (
        "import torch, tritonbnn\n"
        f"run = torch.export.load({str(tmp_path / 'unit.pt2')!r}).module()\n"
        "print(tuple(run(torch.zeros(1, 8, 4, 4)).shape))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(1, 8, 4, 4)\n"


class Every(nn.Module):
    """All operators in a row."""

    def __init__(self):
        super().__init__()
        modules, shapes = zip(*all_parts(), strict=True)
        self.program, self.of_rows = Program(modules), [len(shape) == 3 for shape in shapes]

    def forward(self, x):
        rows = x.movedim(1, -1).flatten(1, 2)
        return self.program(*(rows if of_rows else x for of_rows in self.of_rows))


def assert_close_to_signs(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decomposed_program_computes_the_same_in_torchs_own_operators(dtype, training):
    torch.manual_seed(0)
    model = Every().to(dtype).train(training)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    twin = copy.deepcopy(model)
    x = gradient(2, 8, 6, 4, dtype=dtype)
    program = torch.export.export(model, (x,)).run_decompositions(ops.decompositions())
    assert not any("tritonbnn" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        assert_close_to_signs(program.module()(x), twin(x))


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A unit compiled ahead of time, with an input and what the unit makes of it."""
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("package")
    unit, x = BinaryUnit(8, 16, 1).eval(), gradient(1, 8, 4, 4)
    program = torch.export.export(unit, (x,)).run_decompositions(ops.decompositions())
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "unit.pt2"))
    return path, x, unit(x).detach()


@pytest.mark.compile
def test_a_compiled_package_runs_without_this_package(package, tmp_path):
    path, x, y = package
    torch.save((x, y), tmp_path / "io.pt")
    code = (
        "import sys, torch\n"
        f"x, y = torch.load({str(tmp_path / 'io.pt')!r})\n"
        f"run = torch._inductor.aoti_load_package({path!r})\n"
        "torch.testing.assert_close(run(x), y)\n"
        "assert 'tritonbnn' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.compile
def test_a_compiled_package_runs_from_cpp(package, tmp_path):
    path, x, y = package
    source, program = Path(__file__).parent / "run_package.cpp", tmp_path / "run_package"
    command = [COMPILER, "-std=c++17", source, "-o", program]
    command += [f"-I{folder}" for folder in cpp_extension.include_paths()]
    for folder in cpp_extension.library_paths():
        command += [f"-L{folder}", f"-Wl,-rpath,{folder}"]
    subprocess.run([*command, "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"], check=True)
    x.numpy().tofile(tmp_path / "x")
    sizes = [str(size) for size in x.shape]
    subprocess.run([program, path, tmp_path / "x", tmp_path / "y", *sizes], check=True)
    found = np.fromfile(tmp_path / "y", dtype=np.float32)
    torch.testing.assert_close(torch.from_numpy(found).view(y.shape), y)


def test_a_unit_whose_processes_share_statistics_is_not_exported():
    options = Options(1, "identity", True, 1e-5, "keep", object(), False)
    with pytest.raises(ValueError, match="cannot be exported: export it in eval mode"):
        exported_unit._exported(*[None] * 12, options)


@pytest.mark.parametrize("name", ["reactnet_a", "reactnet_18"])
def test_torch_fx_traces_a_network(name):
    """Modules of ours are nodes of the graph; it trains, and keeps the check of the images."""
    model, twin = network(name), network(name)
    graph = torch.fx.symbolic_trace(model)
    inputs = [gradient(2, 3, 16, 16)]
    assert_same(outcome(graph, graph, inputs), outcome(twin, twin, inputs))
    with pytest.raises(ValueError, match="height and width must be multiples of"):
        graph(gradient(2, 3, 15, 16))


def test_torch_fx_traces_every_module():
    torch.manual_seed(0)
    modules, shapes = zip(*all_parts(), strict=True)
    for module, shape in zip(modules, shapes, strict=True):
        if type(module) in (Onto, Binarize):  # they pass their stand-in on to an operator
            continue
        graph = torch.fx.symbolic_trace(nn.Sequential(module, nn.Identity()))
        x = gradient(*shape)
        torch.testing.assert_close(graph(x), module(x))


def test_torchvisions_feature_extractor_finds_blocks():
    model = network().eval()
    extract = create_feature_extractor(model, {"blocks.0": "first", "blocks.12": "last"})
    x = gradient(2, 3, 16, 16)
    seen = {}
    for i in (0, 12):
        model.blocks[i].register_forward_hook(lambda m, a, y, i=i: seen.update({i: y}))
    model(x)
    found = extract.eval()(x)
    torch.testing.assert_close([found["first"], found["last"]], [seen[0], seen[12]])

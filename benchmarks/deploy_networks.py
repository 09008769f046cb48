"""Who runs a network: the packed engine, torch, and the float twin in other people's runtimes."""

import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.twin import FloatReActNetA
from tritonbnn import cli
from tritonbnn.deploy import Engine
from tritonbnn.deploy.fold import fold
from tritonbnn.models import build_model

SIZE = 224
PACKED, HALF = "packed", "packed, half ends"
INPUT = "images"
Call = Callable[[], Any]
Maker = Callable[[Tensor], Call]


def float_twin() -> nn.Module:
    """ReActNet-A's layout in floats."""
    twin = FloatReActNetA().eval()
    twin.fc = nn.Linear(twin.fc.in_features, twin.fc.out_features)  # ours cannot be traced
    return twin


def _engine(images: Tensor, *, half_ends: bool = False) -> Call:
    engine = Engine(fold(build_model("reactnet_a").eval(), half_ends=half_ends))
    array = images.numpy()
    return lambda: engine(array)


def _module(model: nn.Module, images: Tensor) -> Call:
    return lambda: model(images)


def _frozen(images: Tensor) -> Call:
    """The twin traced, its parameters constants and its BatchNorms folded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sizes are constants in a trace
        return _module(torch.jit.freeze(torch.jit.trace(float_twin(), images)), images)


def _compiled(images: Tensor) -> Call:
    """The twin through inductor, its parameters constants."""
    return _module(torch.compile(float_twin(), options={"freezing": True}), images)


@contextmanager
def _onnx_file(images: Tensor, *, int8: bool) -> Iterator[Path]:
    """The twin as an ONNX file, its convolutions and its head in int8 if that is asked for."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this exporter is the older one
        path = Path(folder) / "twin.onnx"
        torch.onnx.export(
            float_twin(), (images,), path, input_names=[INPUT], dynamo=False, opset_version=17
        )
        yield _quantised(path, images) if int8 else path


def _quantised(path: Path, images: Tensor) -> Path:
    """The same in int8 by ONNX Runtime's own tool, a scale for each output channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        """The images once: how exact the result is does not matter here."""

        def __init__(self) -> None:
            self.left = [{INPUT: images.numpy()}]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    ready, quantised = path.with_name("ready.onnx"), path.with_name("int8.onnx")
    quant_pre_process(path, ready, skip_symbolic_shape=True)
    quantize_static(
        ready,
        quantised,
        Images(),
        per_channel=True,
        activation_type=QuantType.QUInt8,  # what the processor's dot products of bytes take
        op_types_to_quantize=["Conv", "Gemm"],  # with Add too, OpenVINO does not take the graph
    )
    return quantised


def _openvino(images: Tensor, *, int8: bool = False) -> Call:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    with _onnx_file(images, int8=int8) as path:
        run = openvino.Core().compile_model(path, "CPU", settings)
    array = images.numpy()
    return lambda: run(array)


def _onnxruntime(images: Tensor, *, int8: bool = False) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with _onnx_file(images, int8=int8) as path:
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    feed = {INPUT: images.numpy()}
    return lambda: session.run(None, feed)


MAKERS: dict[str, Maker] = {
    PACKED: _engine,
    HALF: lambda images: _engine(images, half_ends=True),
    "ours in torch": lambda images: _module(build_model("reactnet_a").eval(), images),
    "float twin": lambda images: _module(float_twin(), images),
    "float twin, traced and frozen": _frozen,
    "float twin, compiled and frozen": _compiled,
    "float twin, OpenVINO float32": _openvino,
    "float twin, OpenVINO int8": lambda images: _openvino(images, int8=True),
    "float twin, ONNX Runtime float32": _onnxruntime,
    "float twin, ONNX Runtime int8": lambda images: _onnxruntime(images, int8=True),
    "torchvision's ResNet-18": lambda images: _module(torchvision.models.resnet18().eval(), images),
}
"""Each makes a call that answers the images, with as many threads as torch has."""

NEEDS = {"OpenVINO": ("openvino", "onnx", "onnxruntime"), "ONNX Runtime": ("onnx", "onnxruntime")}
"""What a rival needs that torch does not, by a word of its name."""


def missing(name: str) -> list[str]:
    """The packages that a rival needs and that are not installed."""
    needed = [p for word, packages in NEEDS.items() if word in name for p in packages]
    return [package for package in needed if importlib.util.find_spec(package) is None]


def makers(names: list[str] | None) -> dict[str, Maker]:
    """The rivals of these names; all that can run here where there are none.

    Raises:
        cli.UserError: there is no such rival, or a package that it needs is missing.
    """
    if names is None:
        return {name: maker for name, maker in MAKERS.items() if not missing(name)}
    for name in names:
        if name not in MAKERS:
            raise cli.UserError(f"--rivals {name}: choose from {'; '.join(MAKERS)}")
        if missing(name):
            raise cli.UserError(f"--rivals {name}: pip install {' '.join(missing(name))}")
    return {name: MAKERS[name] for name in dict.fromkeys([PACKED, *names])}

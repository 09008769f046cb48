"""A packed network as an ONNX graph of floats, which other runtimes read.

Signs become a comparison and a choice between +1 and -1, a unit's weight a tensor of +1 and -1 in
a byte each. A runtime may add in any order, and may fold a scale into the weight before it. Either
would make a sum of signs a little more or less than a whole number, and later another sign. So each
sum is rounded: that changes no whole number, and nothing is folded past it.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper

from tritonbnn.deploy.packed import Array, Packed, PackedError, Unit
from tritonbnn.deploy.plain import weight_signs
from tritonbnn.files import write_atomically

OPSET = 17
IR_VERSION = 8
"""The version of ONNX's file format that came with this opset."""
_LARGEST = 2**31 - 1  # bytes of a protobuf message


class _Graph:
    """Nodes and constants in the order in which they are added; a value is its name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._one, self._minus_one = (
            self.constant(name, np.array(sign, np.float32))
            for name, sign in (("plus_one", 1), ("minus_one", -1))
        )

    def constant(self, name: str, array: Array) -> str:
        """A tensor that the file holds."""
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def floats(self, name: str, array: Array) -> str:
        """A tensor that the file holds as it is, and that is computed with in float32."""
        kept = self.constant(name, array)
        return kept if array.dtype == np.float32 else self.add("Cast", kept, to=TensorProto.FLOAT)

    def channels(self, name: str, vector: Array) -> str:
        """A number a channel, as (C, 1, 1)."""
        return self.constant(name, vector[:, None, None])

    def add(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """A node of one output."""
        output = output or f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def convolution(self, x: str, weight: str, kernel_size: int, stride: int) -> str:
        """With zeros around the input."""
        sides, strides, pads = [kernel_size] * 2, [stride] * 2, [kernel_size // 2] * 4
        return self.add("Conv", x, weight, kernel_shape=sides, strides=strides, pads=pads)

    def signs(self, x: str, shift: Array | None, name: str) -> str:
        """+1 where x + shift >= 0, else -1."""
        zero = np.zeros((1, 1, 1), np.float32)
        least = zero if shift is None else 0 - shift[:, None, None]
        threshold = self.constant(name, least)
        return self.add(
            "Where", self.add("GreaterOrEqual", x, threshold), self._one, self._minus_one
        )


def model(packed: Packed) -> ModelProto:
    """The network as an ONNX model, opset 17.

    Its input ``images`` is (N, C, H, W) float32, normalised; its output ``logits`` is (N, classes)
    float32. N, H and W are free. The names of the classes and the transform stand in the metadata,
    as JSON.

    Raises:
        PackedError: it would be larger than an ONNX file may be.
    """
    graph = _Graph()
    x = graph.convolution(
        "images",
        graph.floats("stem.weight", packed.stem_weight),
        packed.stem_weight.shape[2],
        packed.stem_stride,
    )
    x = graph.add("Add", x, graph.channels("stem.offset", packed.stem_offset))
    if packed.stem_pools:
        x = graph.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for index, unit in enumerate(packed.units):
        x = _unit(graph, f"units.{index}", unit, x)
    features = graph.add("Flatten", graph.add("GlobalAveragePool", x))
    head = graph.floats("head.weight", packed.head_weight)
    offset = graph.constant("head.offset", packed.head_offset)
    graph.add("Gemm", features, head, offset, transB=1, output="logits")
    return _finished(graph, packed)


def _unit(graph: _Graph, name: str, unit: Unit, x: str) -> str:
    signs = graph.signs(x, unit.shift_in, f"{name}.threshold")
    weight = graph.floats(f"{name}.weight", weight_signs(unit).astype(np.int8))
    sums = graph.add("Round", graph.convolution(signs, weight, unit.kernel_size, unit.stride))
    t = graph.add("Mul", sums, graph.channels(f"{name}.scale", unit.scale))
    t = graph.add("Add", t, graph.channels(f"{name}.constant", unit.constant))
    t = graph.add("Add", t, _shortcut(graph, name, unit, x))
    if unit.slope is not None:
        t = graph.add("PRelu", t, graph.channels(f"{name}.slope", unit.slope))
    if unit.shift_out is not None:
        t = graph.add("Add", t, graph.channels(f"{name}.shift_out", unit.shift_out))
    return t


def _shortcut(graph: _Graph, name: str, unit: Unit, x: str) -> str:
    if unit.shortcut == "identity":
        return x
    if unit.shortcut == "repeat":
        return graph.add("Concat", x, x, axis=1)
    pooled = graph.add("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
    if unit.projection is None or unit.offset is None:
        return pooled
    matrix = graph.constant(f"{name}.projection", unit.projection[:, :, None, None])
    projected = graph.convolution(pooled, matrix, 1, 1)
    return graph.add("Add", projected, graph.channels(f"{name}.offset", unit.offset))


def _finished(graph: _Graph, packed: Packed) -> ModelProto:
    """The model around a graph, checked by ONNX's own checker."""
    size = sum(constant.ByteSize() for constant in graph.constants)
    if size > _LARGEST:
        raise PackedError(f"its {size / 1e9:.1f} GB are more than an ONNX file may hold: 2.1 GB")
    shape: list[str | int | None] = ["N", packed.in_channels, "H", "W"]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)
    classes = len(packed.head_weight)
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes])
    whole = helper.make_graph(graph.nodes, "network", [images], [logits], graph.constants)
    opset = [helper.make_opsetid("", OPSET)]
    found = helper.make_model(whole, opset_imports=opset, producer_name="tritonbnn")
    found.ir_version = IR_VERSION
    facts = {"classes": packed.classes, "transform": packed.transform}
    helper.set_model_props(found, {k: json.dumps(v) for k, v in facts.items() if v is not None})
    checker.check_model(found)
    return found


def write(packed: Packed, path: Path) -> int:
    """Write an ONNX file; returns its bytes.

    Raises:
        PackedError: it would be larger than an ONNX file may be.
        tritonbnn.cli.UserError: it cannot be written.
    """
    content = model(packed).SerializeToString()
    write_atomically(path, content)
    return len(content)

"""One layer of signs in the packed engine, and in the two exact 1-bit rivals that pip installs.

- packed: a whole unit, with its shortcut, normalisation, PReLU and the next signs
- OpenVINO: BinaryConvolution, with the signs of its input taken in front of it
- NumKong: hammings_packed over patches that are packed already
- float32: torch's convolution of the same shape

One thread each. A speed counts two operations for a product of signs.
"""

import ctypes
import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tritonbnn.compiled import loader
from tritonbnn.deploy import Engine
from tritonbnn.deploy.native import SOURCES
from tritonbnn.deploy.packed import Array, Packed, Unit

LAYERS = ((3, 128, 56), (3, 256, 28), (3, 512, 14), (3, 1024, 7), (1, 512, 14))
"""Kernel size, channels, height and width."""
UNITS = 20
PACKED, FLOAT = "packed", "float32"
ONE, MANY = "packed, one unit", f"packed, {1 + UNITS} units"
Call = Callable[[], Any]


def title(kernel: int, channels: int, size: int) -> str:
    return f"{kernel}x{kernel} {channels}@{size}"


def operations(kernel: int, channels: int, size: int) -> int:
    return 2 * kernel**2 * channels**2 * size**2


def network(kernel: int, channels: int, size: int, units: int) -> Packed:
    """Equal units that keep their channels, behind a stem that makes them."""
    random = np.random.default_rng(0)

    def vector(count: int) -> Array:
        return random.standard_normal(count, np.float32)

    weight = random.integers(0, 256, (channels, kernel, kernel, -(-channels // 8)), np.uint8)
    unit = Unit(
        channels, channels, kernel, 1, "identity", weight, *(vector(channels) for _ in range(5))
    )
    return Packed(
        in_channels=1,
        size_multiple=1,
        stem_weight=vector(channels).reshape(channels, 1, 1, 1),
        stem_offset=vector(channels),
        stem_stride=1,
        stem_pools=False,
        units=(unit,) * units,
        head_weight=vector(2 * channels).reshape(2, channels),
        head_offset=vector(2),
    )


def calls(kernel: int, channels: int, size: int) -> dict[str, Call]:
    """What takes turns. A unit's time is what many units take beyond one, by their number.

    Raises:
        RuntimeError: a rival's sums are not the exact ones.
    """
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(1, 1, size, size, generator=generator).numpy()
    engines = {name: Engine(network(kernel, channels, size, n), 1) for name, n in _UNITS.items()}
    x = torch.randn(1, channels, size, size, generator=generator)
    weight = torch.randn(channels, channels, kernel, kernel, generator=generator)
    signs = torch.where(weight >= 0, 1.0, -1.0)
    exact = F.conv2d(torch.where(x > 0, 1.0, -1.0), signs, padding=kernel // 2)
    taken = {name: partial(engine, images) for name, engine in engines.items()}
    for package, rival in RIVALS.items():
        if importlib.util.find_spec(package.lower()):
            call, sums = rival(x, signs)
            if not torch.equal(sums(call()), exact):
                raise RuntimeError(f"{package}'s sums are not exact")
            taken[package] = call
    inputs, floats = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    taken[FLOAT] = lambda: F.conv2d(inputs, floats, padding=kernel // 2)
    return taken


_UNITS = {ONE: 1, MANY: 1 + UNITS}


def gops(kernel: int, channels: int, size: int, seconds: dict[str, float]) -> dict[str, float]:
    """Speeds from the seconds of each call."""
    alone = {name: taken for name, taken in seconds.items() if name not in _UNITS}
    times = {PACKED: (seconds[MANY] - seconds[ONE]) / UNITS, **alone}
    return {name: operations(kernel, channels, size) / t / 1e9 for name, t in times.items()}


def _openvino(x: Tensor, signs: Tensor) -> tuple[Call, Callable[[Any], Tensor]]:
    import openvino
    from openvino import opset1

    one, zero = (np.full((1, 1, 1, 1), value, np.float32) for value in (1, 0))
    bits = np.packbits((signs.numpy() > 0).ravel(), bitorder="little")
    filters = openvino.op.Constant(
        openvino.Tensor(bits, openvino.Shape(signs.shape), openvino.Type.u1)
    )
    stream = opset1.parameter(list(x.shape), np.float32)
    binary = opset1.fake_quantize(stream, zero, zero, zero, one, 2)
    pads = [signs.shape[2] // 2] * 2
    product = opset1.binary_convolution(
        binary, filters, [1, 1], pads, pads, [1, 1], "xnor-popcount", 0.0
    )
    model = openvino.Model([opset1.result(product)], [stream], "layer")
    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    run, array = openvino.Core().compile_model(model, "CPU", settings), x.numpy()
    return lambda: run(array), lambda output: torch.from_numpy(output[0])


def _numkong(x: Tensor, signs: Tensor) -> tuple[Call, Callable[[Any], Tensor]]:
    import numkong

    kernel, size = signs.shape[2], x.shape[2]
    # a pixel outside the image is 0 bits; _inside makes up for them as the engine's sums do
    patches = F.unfold(torch.where(x > 0, 1.0, 0.0), kernel, padding=kernel // 2)[0]
    rows = np.ascontiguousarray(np.packbits(patches.T.numpy() > 0, axis=1))
    weight = numkong.hammings_pack(np.packbits((signs > 0).flatten(1).numpy(), axis=1))
    kept = _inside(x, signs)

    def sums(distances: Any) -> Tensor:
        different = torch.from_numpy(np.asarray(distances).astype(np.float32)).T
        return (kept - 2 * different).view(1, -1, size, size)

    return lambda: numkong.hammings_packed(rows, weight), sums


def _inside(x: Tensor, signs: Tensor) -> Tensor:
    """(O, pixels): an output's sum if no bit differed. Ones of the weight outside count twice."""
    kernel, pad = signs.shape[2], signs.shape[2] // 2
    inside = F.unfold(torch.ones_like(x), kernel, padding=pad)[0]
    ones = (signs > 0).float().flatten(1)
    return inside.sum(0) + 2 * ones @ (1 - inside)


RIVALS = {"OpenVINO": _openvino, "NumKong": _numkong}
"""By package. Each gives a call, and how the convolution's sums are read from what it returns."""


def count(tiles: int) -> tuple[int, int]:
    """Run the loop alone, where all that it reads is in the first cache.

    Returns:
        The products of so many equal tiles, and how many signs differed in one of them.
    """
    different = ctypes.c_int64()
    return _loop()(tiles, different), different.value


@cache
def _loop() -> Any:
    """The C function; to find its library takes longer than to call it."""
    function = loader.load_best(loader.Library, SOURCES).function("engine_peak")
    function.argtypes = [ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)]
    function.restype = ctypes.c_int64
    return function


def peak(clock: Callable[[], float], tiles: int = 200_000) -> float:
    """GOPS of the loop alone."""
    count(1)
    start = clock()
    products, _ = count(tiles)
    return 2 * products / (clock() - start) / 1e9

r"""The floor of a training step: no step of this design can be faster on the same device.

    python -m benchmarks.roofline             # by ceilings measured here, or by given ones:
    python -m benchmarks.roofline --copy-gbs 3000 --fp32-tflops 50 --bf16-tflops 798 \
        --int8-tops 1500

Every launch is counted as it is written: it reads its operands once, writes its results once, and
multiplies as often as its layer asks for. It takes at least the longer of the two, and launches run
one after another. What caches save between launches is not counted, so a step may beat the floor by
that, where a batch is small enough to stay in a cache.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import ceilings
from benchmarks.ceilings import Ceilings
from benchmarks.families import ELEMENTWISE, ENDS, FORWARD, GRADIENTS, OPTIMIZER, PACK
from benchmarks.output import command
from benchmarks.traffic import ADAM_PASSES
from tritonbnn import cli
from tritonbnn.bits import words
from tritonbnn.files import writable, write_json
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.problems.network import model_layers
from tritonbnn.kernels.provenance import header, own_device
from tritonbnn.models import build_model

PLANS = ("keep", "recompute", "fused")
STREAM_BYTES = {"fp32": 4, "bf16": 2}
PARAMETER_BYTES = 4
INTEGER_BYTES = 2  # a convolution of signs, as the unit keeps it
WORD_BYTES = 4


@dataclass(frozen=True)
class Launch:
    """One kernel's work.

    Attributes:
        family: see :mod:`benchmarks.families`.
        bytes: read and written.
        operations: multiplications and additions of a matrix product.
        dtype: of its operands: "fp32", "bf16" or "signs".
    """

    family: str
    bytes: int
    operations: int = 0
    dtype: str = "fp32"

    def seconds(self, roofs: Ceilings) -> float:
        """The least time it takes."""
        moving = self.bytes / (roofs.copy_gbs * 1e9)
        return max(moving, self.operations / roofs.operations_per_second(self.dtype))


def unit_launches(layer: Geometry, dtype: str, step: int, plan: str) -> Iterator[Launch]:
    """What one half-block launches on its stream, forward then backward.

    Bytes per output element of a unit with the identity shortcut, in a stream of B bytes and with a
    convolution of A = 2 bytes (step 1: B), plus bits:

        forward    convolution A; statistics A; epilogue A + 2 B                       3 A + 2 B
        backward   activation A + 3 B; norm A + 2 B; weight B; input and sign 4 B      2 A + 10 B
        recompute  the convolution again, in backward                                  A
        fused      the convolution within four passes, without any A: statistics 0;
                   epilogue 2 B; sums 2 B; activation and norm 3 B; as above 5 B      12 B

    With real weights "fused" is "recompute". Behind a pool it stores du, of which otherwise a bit
    is written and read.

    Args:
        layer: its convolution.
        dtype: of the stream, "fp32" or "bf16".
        step: of the schedule; in step 1 the convolution's weight and result are real.
        plan: "keep" or "recompute" the convolution for backward, or "fused".
    """
    stream = STREAM_BYTES[dtype]
    pixels = layer.batch * layer.height * layer.width
    x = pixels * layer.channels * stream
    signs = pixels * words(layer.channels) * WORD_BYTES
    outputs = layer.pixels * layer.out_channels
    z = outputs * stream
    next_signs = layer.pixels * words(layer.out_channels) * WORD_BYTES
    a = outputs * (INTEGER_BYTES if step == 2 else stream)
    taps = layer.out_channels * layer.kernel_size**2
    packed = taps * words(layer.channels) * WORD_BYTES
    weight = packed if step == 2 else taps * layer.channels * PARAMETER_BYTES
    products = 2 * layer.pixels * taps * layer.channels
    operands = "signs" if step == 2 else dtype
    convolution = Launch(FORWARD, signs + weight + a, products, operands)
    bits = 0

    if plan == "fused" and step == 2:
        du = z
        if layer.stride == 1:
            du = bits = next_signs
        for images in (
            0,  # statistics
            x + z + next_signs,  # epilogue
            z + x,  # the activation's sums: reads gradient and stream
            z + x + du + z,  # activation and norm: writes du or its bits, and dy
        ):
            yield Launch(FORWARD, signs + weight + images, products, operands)
    else:
        yield convolution
        yield Launch(ELEMENTWISE, a)  # statistics
        yield Launch(ELEMENTWISE, a + x + z + next_signs)  # epilogue, and the next unit's signs
        if plan != "keep":
            yield convolution
        yield Launch(ELEMENTWISE, z + a + x + z)  # activation: reads gradient, a, stream, writes du
        yield Launch(ELEMENTWISE, z + a + z)  # norm: reads du and a, writes dy
    yield Launch(GRADIENTS, z + signs + taps * layer.channels * PARAMETER_BYTES, products, dtype)
    # input: reads dy, and past its product the stream and du, or gradient and bits; writes dx
    yield Launch(GRADIENTS, z + weight + x + z + bits + x, products, dtype)


def network_launches(
    model: str, batch: int, size: int, width: float, *, dtype: str, step: int, plan: str
) -> list[Launch]:
    """What one training step launches: all units, the packing of weights, both ends, Adam.

    Args:
        model: a network's name.
        batch: images of the step.
        size: height and width of an image.
        width: multiplies all channels.
        dtype: of the stream, "fp32" or "bf16".
        step: of the schedule.
        plan: of all units.
    """
    layers = model_layers(model, batch, size, width)
    launches = [
        launch
        for layer, count in layers.items()
        for launch in [*unit_launches(layer, dtype, step, plan)] * count
    ]
    first = next(iter(layers))
    pixels = first.batch * first.height * first.width
    stem = pixels * first.channels * STREAM_BYTES[dtype]
    signs = pixels * words(first.channels) * WORD_BYTES
    weights = sum(
        count * layer.out_channels * layer.channels * layer.kernel_size**2 * PARAMETER_BYTES
        for layer, count in layers.items()
    )
    launches.append(Launch(PACK, stem + signs))  # of the first unit; the others' are in epilogues
    if step == 2:
        launches.append(Launch(PACK, weights))
        launches.append(Launch(ELEMENTWISE, 3 * weights))  # the clip: reads gradient and weight
    # convolution and its weight's gradient; BatchNorm's statistics, result, sums and gradient
    images = batch * 3 * size**2 * STREAM_BYTES[dtype]
    launches += [Launch(ENDS, images + stem)] * 2 + [Launch(ELEMENTWISE, 8 * stem)]
    parameters = sum(p.numel() for p in build_model(model, width=width).parameters())
    launches.append(Launch(OPTIMIZER, ADAM_PASSES * parameters * PARAMETER_BYTES))
    return launches


def floor(launches: list[Launch], roofs: Ceilings) -> dict[str, float]:
    """Milliseconds of a training step by family."""
    total: Counter[str] = Counter()
    for launch in launches:
        total[launch.family] += launch.seconds(roofs) * 1e3
    return dict(total)


def report(
    model: str, batch: int, size: int, width: float, step: int, roofs: Ceilings
) -> dict[str, dict]:
    """The floors of a step by dtype and plan: ms by family, their sum, images a second."""
    floors = {}
    for dtype in STREAM_BYTES:
        for plan in PLANS:
            launches = network_launches(
                model, batch, size, width, dtype=dtype, step=step, plan=plan
            )
            families = floor(launches, roofs)
            milliseconds = sum(families.values())
            floors[f"{dtype} {plan}"] = {
                "ms": round(milliseconds, 4),
                "images_per_second": round(batch / milliseconds * 1e3, 2),
                "gb": round(sum(launch.bytes for launch in launches) / 1e9, 3),
                "ms_by_family": {name: round(ms, 4) for name, ms in families.items()},
            }
    return floors


def describe(floors: dict[str, dict]) -> Iterator[str]:
    """A line for each plan."""
    for name, row in floors.items():
        parts = ", ".join(f"{family} {ms:.2f}" for family, ms in row["ms_by_family"].items())
        yield (
            f"  floor {name:14} {row['ms']:10.2f} ms {row['images_per_second']:10.1f} img/s"
            f" {row['gb']:8.1f} GB   ({parts})"
        )


def main(argv: list[str]) -> int:
    parser = cli.Parser(prog="python -m benchmarks.roofline", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="reactnet_a", help="a network's name")
    parser.add_argument("--batch", type=cli.at_least(1), default=256, help="images of a step")
    parser.add_argument(
        "--size", type=cli.at_least(1), default=224, help="height and width of an image"
    )
    parser.add_argument("--step", type=int, default=2, choices=(1, 2), help="of the schedule")
    parser.add_argument("--width", type=float, default=1.0, help="multiplies all channels")
    for name in Ceilings.__dataclass_fields__:
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=float, help="a ceiling; without any, all are measured")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args(argv)
    path = writable(args.json)
    given = {name: getattr(args, name) for name in Ceilings.__dataclass_fields__}
    if any(value is not None and value <= 0 for value in given.values()):
        raise cli.UserError("a ceiling must be above 0")
    missing = [name for name, value in given.items() if value is None and name != "one_bit_tops"]
    if missing and any(given.values()):
        raise cli.UserError(
            f"give all ceilings but --one-bit-tops, or none to measure them here:"
            f" --{missing[0].replace('_', '-')} is missing"
        )
    roofs = ceilings.measure(own_device()) if missing else Ceilings(**given)
    try:
        floors = report(args.model, args.batch, args.size, args.width, args.step, roofs)
    except ValueError as error:
        raise cli.UserError(str(error)) from error
    print(roofs)
    print("\n".join(describe(floors)))
    if path:
        head = header(command("roofline", argv))
        write_json(path, head | {"ceilings": asdict(roofs), "floors": floors})
    return 0


if __name__ == "__main__":
    cli.run(main)

"""A training step on a GPU that is not there: launches and bytes, ours beside the expert's.

    python -m benchmarks.count --model reactnet_a --batch 256 --target sm_90 --copy-gbs 4300

Nothing is measured. Both are counted from what is really called, with the same boundary: forward,
loss, backward and Adam, in bf16 autocast and channels_last memory. Our kernels are compiled for the
target: their instructions bound the time of each (see :mod:`benchmarks.bounds`). From all follows
an estimate of the time, by assumptions that are printed with it.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.bounds import LIMITS, Bound, bounds_of
from benchmarks.bounds_table import describe_rows, rows_of
from benchmarks.launches import SMALL, TORCH, Counted, step_launches
from benchmarks.output import command
from benchmarks.rivals import parse
from benchmarks.scheduled import compiled_launches
from benchmarks.steps import CLASSES
from tritonbnn import cli
from tritonbnn.files import writable, write_json
from tritonbnn.kernels.provenance import header
from tritonbnn.kernels.targets import parse_target

EXPERT = "expert+bf16+channels_last+compile"
LAUNCH_SECONDS = 2e-6
COPY_SHARE = LIMITS["dram"]
PRODUCT_SHARE = 0.7

ASSUMPTIONS = (
    "every launch reads its operands once and writes its results once, from and to memory",
    "fused Adam is one launch; what the CPU's autocast casts, a GPU's casts",
    "Inductor fuses on a GPU as it does for a CPU, and a convolution's two gradients read once",
    f"a launch takes {LAUNCH_SECONDS * 1e6:g} us, and the longer of its bytes at"
    f" {COPY_SHARE:.0%} of the copy rate and its products",
    f"a library's products reach {PRODUCT_SHARE:.0%} of the bf16 rate",
    "our kernels reach "
    + ", ".join(f"{share:.0%} of what {name} allows" for name, share in LIMITS.items()),
    "of ours, no branch forward is taken, lanes access words side by side, and what moves before or"
    " after a product overlaps it only where a multiprocessor has two blocks or more",
    "rates of a multiprocessor are those of benchmarks.multiprocessor",
    "the host keeps up (see benchmarks.host_time)",
)


def seconds(
    launch: Counted, copy_gbs: float, bf16_tflops: float, bound: Bound | None = None
) -> float:
    """The estimate of one launch, by its bound if there is one."""
    if bound is not None:
        return LAUNCH_SECONDS + bound.estimate
    moving = launch.bytes / (COPY_SHARE * copy_gbs * 1e9)
    return LAUNCH_SECONDS + max(moving, launch.operations / (PRODUCT_SHARE * bf16_tflops * 1e12))


def summary(
    launches: list[Counted],
    batch: int,
    copy_gbs: float,
    bf16_tflops: float,
    bounds: list[Bound | None] | None = None,
) -> dict[str, Any]:
    """Counts and the estimate of a step.

    Args:
        launches: of the step.
        batch: images of it.
        copy_gbs: 1e9 bytes read and written a second by a large copy.
        bf16_tflops: 1e12 operations a second of a large matrix product.
        bounds: of each launch, or None where there is none.
    """
    kernels: dict[str, Counter[str]] = {}
    tensors: Counter[str] = Counter()
    total = 0.0
    for launch, bound in zip(launches, bounds or [None] * len(launches), strict=True):
        taken = seconds(launch, copy_gbs, bf16_tflops, bound)
        total += taken
        name = "torch" if launch.source == TORCH else launch.name
        row = kernels.setdefault(name, Counter())
        row.update(launches=1, bytes=launch.bytes, nanoseconds=round(taken * 1e9))
        tensors.update(launch.tensors)
    return {
        "launches": len(launches),
        "by_source": dict(Counter(launch.source for launch in launches)),
        "small_launches": sum(launch.bytes < SMALL for launch in launches),
        "mb_per_image": round(sum(launch.bytes for launch in launches) / batch / 1e6, 2),
        "estimated_ms": round(total * 1e3, 3),
        "images_per_second": round(batch / total, 1),
        "kernels": {name: dict(row) for name, row in kernels.items()},
        "mb_per_image_by_tensor": {
            name: round(nbytes / batch / 1e6, 3) for name, nbytes in tensors.most_common()
        },
    }


def describe(name: str, row: dict[str, Any], batch: int) -> Iterator[str]:
    """A rival's table."""
    sources = ", ".join(f"{n} {source}" for source, n in row["by_source"].items())
    yield (
        f"{name}: {row['launches']} launches ({sources}), {row['small_launches']} of them under"
        f" 1 MiB; {row['mb_per_image']:.1f} MB an image; estimated {row['estimated_ms']:.1f} ms,"
        f" {row['images_per_second']:.0f} img/s"
    )
    kernels = sorted(row["kernels"].items(), key=lambda item: -item[1]["bytes"])
    for kernel, counts in kernels:
        yield (
            f"  {kernel:28} {counts['launches']:5} launches"
            f" {counts['bytes'] / batch / 1e6:8.2f} MB/img"
            f" {counts['nanoseconds'] / 1e6:8.2f} ms"
        )
    tensors = row["mb_per_image_by_tensor"].items()
    named = [f"{tensor} {mb:.1f}" for tensor, mb in tensors if mb >= 0.1]
    if named:
        yield f"  MB/img by tensor: {', '.join(named)}"


def main(argv: list[str]) -> int:
    parser = cli.Parser(prog="python -m benchmarks.count", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="reactnet_a", help="a network's name")
    parser.add_argument("--batch", type=cli.at_least(2), default=256, help="images of a step")
    parser.add_argument(
        "--size", type=cli.at_least(1), default=224, help="height and width of an image"
    )
    parser.add_argument("--step", type=int, default=2, choices=(1, 2), help="of the schedule")
    parser.add_argument("--target", default="sm_90", help="whose default tiles our kernels take")
    parser.add_argument("--copy-gbs", type=float, default=4300, help="of a large copy")
    parser.add_argument("--bf16-tflops", type=float, default=788, help="of a large product")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args(argv)
    path, target = writable(args.json), parse_target(args.target)
    if min(args.copy_gbs, args.bf16_tflops) <= 0:
        raise cli.UserError("--copy-gbs and --bf16-tflops must be above 0")
    if not target.bfloat16:
        raise cli.UserError(f"{target.name} has no bfloat16, in which a step is counted")
    rates = (args.batch, args.copy_gbs, args.bf16_tflops)

    def build(word: str) -> Any:
        return lambda: parse(word).build(args.model, args.step, num_classes=CLASSES)

    shape = (args.batch, args.size)
    rows = {}
    try:
        ours = step_launches(build("ours"), *shape, bf16=True, target=target)
    except ValueError as error:
        raise cli.UserError(str(error)) from error
    bounds = bounds_of(ours, target, args.copy_gbs)
    rows["ours+bf16"] = summary(ours, *rates, bounds) | {"bounds": rows_of(ours, bounds)}
    if args.model == "reactnet_a":
        rows[EXPERT] = summary(compiled_launches(build("expert"), *shape, bf16=True), *rates)
    for name, row in rows.items():
        print("\n".join(describe(name, row, args.batch)), flush=True)
    print("\n".join(describe_rows(rows["ours+bf16"]["bounds"], target)))
    if EXPERT in rows:
        ratio = rows[EXPERT]["estimated_ms"] / rows["ours+bf16"]["estimated_ms"]
        print(f"ours is estimated {ratio:.2f} times as fast as the expert compiled")
    print("assumed:", "; ".join(ASSUMPTIONS))
    if path:
        write_json(path, header(command("count", argv)) | {"assumed": ASSUMPTIONS, "rows": rows})
    return 0


if __name__ == "__main__":
    cli.run(main)

"""The parts of the whole measurement: each a command that ends within minutes."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

MINUTES = 8
"""After which a part is stopped; what it had done is kept, where it can go on."""

CONVOLUTIONS = ("conv_packed", "conv_real", "conv_input_grad", "conv_weight_grad")
ELEMENTWISE = (
    ("pack_signs", "channel_moments", "unit_forward"),
    ("unit_activation_backward", "unit_norm_backward", "sign_backward"),
)
KERNEL_TESTS = ("pack", "matmul", "binarize", "rprelu", "conv", "conv_grad", "unit", "ops")
SWEPT = "ours+bf16,obvious,obvious+bf16+channels_last,twin+bf16+channels_last"
COMPILED = "ours+bf16,obvious+bf16+channels_last+max-autotune"
EAGER = (
    "ours+bf16,ours,ours-unfused+bf16,obvious,obvious+bf16+channels_last,"
    "obvious+bf16+channels_last+compile,twin+bf16+channels_last+compile"
)


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: of the part, and of its log.
        command: what follows ``python -m``; or a program and its arguments.
        result: the file that it writes with ``--json``, or None.
        minutes: that it takes on an H100, roughly; at most ``MINUTES`` in one go.
        turns: how often it may be started: more than once where it goes on where it stopped.
        program: run instead of ``python -m``, where it is installed.
        tuned: whether its figures depend on the tuning table.
        always: run it again even if it ended well.
        environ: more environment variables.
    """

    name: str
    command: tuple[str, ...]
    result: str | None = None
    minutes: float = 2
    turns: int = 1
    program: tuple[str, ...] = ()
    tuned: bool = True
    always: bool = False
    environ: dict[str, str] = field(default_factory=dict)


def parts(folder: Path, runs: Path, *, cuda: bool, tiny: bool, fashion: Path | None) -> list[Part]:
    """All parts in their order.

    Args:
        folder: of the results.
        runs: where training runs go.
        cuda: on a GPU; else on the CPU, without what needs a GPU.
        tiny: at sizes that take a CPU seconds, to try the parts themselves.
        fashion: the folder of Fashion-MNIST's files; None where the system has them.
    """
    found = [
        *_tests(cuda, tiny),
        *_tuning(cuda, tiny),
        *_layers(cuda, tiny),
        *_steps(cuda, tiny),
        *_training(runs, cuda, tiny, fashion),
    ]
    if not tiny:
        found.append(Part("report", ("benchmarks.report",), minutes=0.2, always=True))
    return [_with_result(part, folder) for part in found]


def _with_result(part: Part, folder: Path) -> Part:
    if part.result is None:
        return part
    path = str(folder / part.result)
    return Part(**{**part.__dict__, "command": (*part.command, "--json", path)})


def _tests(cuda: bool, tiny: bool) -> Iterator[Part]:
    options = ("-q", "-p", "no:cacheprovider")
    files = tuple(f"tests/test_{name}.py" for name in (("matmul",) if tiny else KERNEL_TESTS))
    # Most of their time goes into compiling, and what is compiled stays on disk for the next turn.
    turns = {"turns": 3, "tuned": False}
    yield Part("tests-kernels", ("pytest", *options, *files), minutes=6, **turns)
    if cuda:
        gpu, shapes = ("pytest", *options, "-m", "gpu"), "tests/test_real_shapes.py"
        yield Part("tests-gpu", (*gpu, f"--ignore={shapes}"), minutes=5, **turns)
        yield Part("tests-gpu-shapes", (*gpu, shapes), minutes=5, **turns)
        small = ("tests/test_pack.py", "tests/test_conv.py", "tests/test_unit.py")
        memcheck = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
        command = ("pytest", *options, "-m", "not gpu", "-k", "kernels", *small)
        yield Part("sanitizer", command, minutes=8, program=memcheck, tuned=False)


def _tuning(cuda: bool, tiny: bool) -> Iterator[Part]:
    """A command for each kind of problem; what one had tuned is not tuned again."""
    command = ("tritonbnn.kernels.autotune", "--limit", "1" if tiny else "16")
    if not cuda:
        layer = ("--compile-only", "--batch", "1", "--layer", "0", "--op", "conv_packed")
        yield Part("autotune-compile", (*command, *layer), minutes=1, tuned=False)
        return
    for group in (*((op,) for op in CONVOLUTIONS), *ELEMENTWISE):
        ops = tuple(word for op in group for word in ("--op", op))
        yield Part(f"autotune-{group[0]}", (*command, *ops), minutes=8, turns=4, tuned=False)
    yield Part("autotune-rest", command, minutes=8, turns=4, tuned=False)


def _layers(cuda: bool, tiny: bool) -> Iterator[Part]:
    if not cuda and not tiny:
        return  # the interpreter would take days
    command: tuple[str, ...] = ("tritonbnn.kernels.bench", "--runs", "1" if tiny else "20")
    environ = {} if cuda else {"TRITON_INTERPRET": "1"}
    if tiny:
        command += ("--batch", "1", "--size", "32", "--width", "0.25", "--dtype", "fp32")
        command += ("--layer", "1")
    groups = {"convolutions": CONVOLUTIONS, "forward": ELEMENTWISE[0], "backward": ELEMENTWISE[1]}
    for name, group in groups.items():
        ops = tuple(word for op in group for word in ("--op", op))
        compiled = ("--no-compile",) if group == CONVOLUTIONS else ()
        result = f"layers_{name}.json"
        yield Part(
            f"layers-{name}", (*command, *ops, *compiled), result, minutes=6, environ=environ
        )


def _steps(cuda: bool, tiny: bool) -> Iterator[Part]:
    command: tuple[str, ...] = ("benchmarks.train_step", "--device", "cuda" if cuda else "cpu")
    size = "32" if tiny else "224"
    if tiny:
        command += ("--width", "0.25", "--rounds", "1", "--floor")
    batch = "256" if cuda else "2" if tiny else "8"
    for step in ("2", "1"):
        own = (*command, "--step", step, "--batch", batch, "--size", size)
        rivals = ("--rivals", EAGER) if cuda else ()
        result = f"train_step_{step}.json"
        yield Part(f"train-step-{step}", (*own, *rivals), result, minutes=6)
        if cuda:  # the compiler's own search is kept on disk, so a second turn is shorter
            yield Part(
                f"train-step-{step}-max-autotune",
                (*own, "--no-details", "--rivals", COMPILED),
                f"train_step_{step}_max_autotune.json",
                minutes=8,
                turns=3,
            )
    batches = "64,128,256,512,1024,2048,4096" if cuda else "2,4" if tiny else "1,2,4,8,16"
    sizes = "128,160,192,224,256,320" if cuda else "32,64" if tiny else "96,128,160,192,224"
    swept = ("--rivals", SWEPT if cuda else "ours,obvious", "--no-details", "--rounds", "3")
    own = (*command, *swept, *(("--steps", "5") if cuda else ()))
    batch_sweep = (*own, "--size", size, "--batches", batches)
    yield Part("batch-sweep", batch_sweep, "batch_sweep.json", minutes=6)
    size_sweep = (*own, "--batch", "128" if cuda else "2", "--sizes", sizes)
    yield Part("size-sweep", size_sweep, "size_sweep.json", minutes=4)


def _training(runs: Path, cuda: bool, tiny: bool, fashion: Path | None) -> Iterator[Part]:
    """Both data sets with fused float32, fused bf16, and the obvious code."""
    small = ("--epochs", "1", "--width", "0.25", "--batch-size", "512") if tiny else ()
    wide = () if tiny else ("--width", "1", "--epochs", "20", "--workers", "8")
    where = () if fashion is None else ("--data-dir", str(fashion))
    device = ("--device", "cuda" if cuda else "cpu")
    for recipe, seeds, flags in (("digits", "1" if tiny else "3", ()), ("fashion", "1", where)):
        if recipe == "fashion" and not cuda:
            continue
        flags += small if recipe == "digits" else wide
        ways = {"": (), "bf16": ("--precision", "bf16"), "obvious": ("--obvious",)}
        for way, options in ways.items():
            name = f"{recipe}-{way}".rstrip("-")
            command = ("benchmarks.seeds", recipe, "--seeds", seeds, "--out", str(runs / name))
            yield Part(
                name,
                (*command, *options, *device, *flags),
                f"{name.replace('-', '_')}.json",
                minutes=3 if recipe == "digits" else 8,
                turns=1 if way == "obvious" else 3,
            )

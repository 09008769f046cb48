"""The parts of the whole measurement: each a command that ends within minutes.

On a GPU the costliest questions come first, as a rented one may be there for minutes only: whether
every formulation is exact, and how fast a step is beside the expert's.
"""

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
WARPGROUP_TESTS = (
    "mma_warpgroup",
    "conv_warpgroup",
    "input_grad_warpgroup",
    "weight_grad_warpgroup",
)
GLUON_TESTS = ("weight", "mma", "mma_unit", *WARPGROUP_TESTS)
"""Of kernels that a CPU emulates."""

SWEPT = "ours+bf16,expert+bf16+channels_last,obvious+bf16+channels_last,twin+bf16+channels_last"
FIRST = "ours+bf16,expert+bf16+channels_last+compile"
MAX_AUTOTUNE = "ours+bf16,expert+bf16+channels_last+max-autotune"
EAGER = (
    "ours+bf16,ours+bf16+graph,ours,ours-recompute+bf16,expert,expert+bf16+channels_last,"
    "expert+bf16+channels_last+compile,expert+bf16+channels_last+compile+graph,"
    "twin+bf16+channels_last+compile,obvious"
)
"""On a GPU, all but the compiler's own search: that has a part of its own."""

SMALL = {
    "cuda": "ours+bf16,ours,expert,expert+compile,twin+compile,obvious",
    "cpu": "ours,expert,expert+compile,twin,twin+compile,obvious",
}
ONE_THREAD = "ours,expert,expert+compile,twin,twin+compile"
TINY = "ours,expert,twin"


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: of the part, and of its log.
        command: what follows ``python -m``; or a program and its arguments.
        result: the file that it writes with ``--json``, or None.
        minutes: that it takes on an H100, or on two cores of a CPU, roughly; at most ``MINUTES``
            in one go.
        turns: how often it may be started: more than once where it goes on where it stopped.
        program: run instead of ``python -m``, where it is installed.
        tuned: whether its figures depend on the tuning table.
        always: run it again even if it ended well.
        figure: whether the README's own table shows its result.
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
    figure: bool = False
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
        *_first(cuda, tiny),
        *(_steps(cuda, tiny) if cuda else ()),
        *_tests(cuda, tiny),
        *_tuning(cuda, tiny),
        *_layers(cuda, tiny),
        *_memory(cuda, tiny),
        *_layers_alone(cuda, tiny),
        *_deployed(cuda, tiny),
        *_small_steps(cuda, tiny),
        *(() if cuda else _steps(cuda, tiny)),
        *_sweeps(cuda, tiny),
        *_training(runs, cuda, tiny, fashion),
    ]
    if not tiny:
        report = ("benchmarks.report",)
        found.append(Part("report", report, minutes=0.2, always=True, figure=True))
    return [_with_result(part, folder) for part in found]


def _with_result(part: Part, folder: Path) -> Part:
    if part.result is None:
        return part
    path = str(folder / part.result)
    return Part(**{**part.__dict__, "command": (*part.command, "--json", path)})


def _first(cuda: bool, tiny: bool) -> Iterator[Part]:
    """Which formulations are exact, and one race of a step."""
    if not (cuda or tiny):
        return
    environ = {} if cuda else {"TRITON_INTERPRET": "1"}
    trial = ("tritonbnn.kernels.trial", *(() if cuda else ("popcount",)))
    yield Part("verdicts", trial, "verdicts.json", minutes=1.5, tuned=False, environ=environ)
    if cuda:
        shape = ("--step", "2", "--batch", "256", "--size", "224")
        # Each time, for another machine's cache is empty. Where it is full, this is short.
        yield Part("precompile", ("benchmarks.precompile", *shape), minutes=1, always=True)
        own = (*_step_command(cuda, tiny), *shape)
        own += ("--no-details", "--no-floor", "--rounds", "3", "--rivals", FIRST)
        yield Part("train-step-first", own, "train_step_first.json", minutes=2.5)


def _tests(cuda: bool, tiny: bool) -> Iterator[Part]:
    options = ("-q", "-p", "no:cacheprovider")
    names = ("matmul",) if tiny else (*KERNEL_TESTS, *(GLUON_TESTS if cuda else ()))
    files = tuple(f"tests/test_{name}.py" for name in names)
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
    command = ("tritonbnn.kernels.autotune", "--ship", "--limit", "1" if tiny else "16")
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


def _memory(cuda: bool, tiny: bool) -> Iterator[Part]:
    """Resident memory of a CPU's steps; on a GPU the steps themselves say what they take."""
    if cuda:
        return
    small = ("--batch", "2", "--size", "32", "--processes", "1", "--rivals", TINY) if tiny else ()
    result = "peak_memory_reactnet_a_224_batch8.json"
    yield Part("peak-memory", ("benchmarks.peak_memory", *small), result, minutes=4, figure=True)


def _layers_alone(cuda: bool, tiny: bool) -> Iterator[Part]:
    """BinaryConv2d on a CPU, against nn.Conv2d."""
    if cuda:
        return
    small = ("--layers", "3x3:32@6", "--rounds", "1", "--milliseconds", "1") if tiny else ()
    command = ("benchmarks.layers", *small)
    yield Part("binary-conv2d", command, "binary_conv2d.json", minutes=2, figure=True)


def _deployed(cuda: bool, tiny: bool) -> Iterator[Part]:
    """The packed engines: a GPU's beside torch's networks, a CPU's beside other engines too."""
    if cuda:
        yield Part("deploy-gpu", ("benchmarks.deploy_gpu",), "deploy_gpu.json", minutes=5)
        return
    small = ("--only", "layers", "--rounds", "1") if tiny else ()
    yield Part("deploy", ("benchmarks.deploy", *small), "deploy.json", minutes=8, figure=True)


def _small_steps(cuda: bool, tiny: bool) -> Iterator[Part]:
    """The recipe that ``make train`` runs."""
    kind = "cuda" if cuda else "cpu"
    command = ("benchmarks.train_step", "--device", kind, "--recipe", "digits", "--no-details")
    command += ("--rounds", "1", "--batch", "2") if tiny else ("--steps", "10")
    for step in ("2", "1"):
        own = (*command, "--step", step, "--rivals", TINY if tiny else SMALL[kind])
        name = f"train-step-digits-{step}"
        yield Part(name, own, f"train_step_digits_{step}.json", minutes=2, figure=True)
    for step in () if cuda or tiny else ("2", "1"):
        own = (*command, "--step", step, "--rivals", ONE_THREAD, "--threads", "1")
        name, result = (
            f"train-step-digits-{step}-1-thread",
            f"train_step_digits_{step}_1_thread.json",
        )
        yield Part(name, own, result, minutes=1.2, figure=True)


def _step_command(cuda: bool, tiny: bool) -> tuple[str, ...]:
    """How a step is timed, but for what."""
    small = ("--width", "0.25", "--rounds", "1", "--floor") if tiny else ()
    return ("benchmarks.train_step", "--device", "cuda" if cuda else "cpu", *small)


def _steps(cuda: bool, tiny: bool) -> Iterator[Part]:
    """Both steps of the whole network."""
    batch = "256" if cuda else "2" if tiny else "8"
    for step in ("2", "1"):
        own = (*_step_command(cuda, tiny), "--step", step, "--batch", batch)
        own += ("--size", "32" if tiny else "224")
        rivals = ("--rivals", EAGER if cuda else TINY) if cuda or tiny else ()
        result = f"train_step_{step}.json"
        yield Part(f"train-step-{step}", (*own, *rivals), result, minutes=6, figure=True)
        if cuda:  # the compiler's own search is kept on disk, so a second turn is shorter
            yield Part(
                f"train-step-{step}-max-autotune",
                (*own, "--no-details", "--rivals", MAX_AUTOTUNE),
                f"train_step_{step}_max_autotune.json",
                minutes=8,
                turns=3,
                figure=True,
            )


def _sweeps(cuda: bool, tiny: bool) -> Iterator[Part]:
    """Speed against batch size and resolution."""
    size = "32" if tiny else "224"
    batches = "64,128,256,512,1024,2048,4096" if cuda else "2,4" if tiny else "1,2,4,8,16"
    sizes = "128,160,192,224,256,320" if cuda else "32,64" if tiny else "96,128,160,192,224"
    swept = ("--rivals", SWEPT if cuda else "ours,expert", "--no-details", "--rounds", "3")
    own = (*_step_command(cuda, tiny), *swept, *(("--steps", "5") if cuda else ()))
    batch_sweep = (*own, "--size", size, "--batches", batches)
    yield Part("batch-sweep", batch_sweep, "batch_sweep.json", minutes=6)
    size_sweep = (*own, "--batch", "128" if cuda else "2", "--sizes", sizes)
    yield Part("size-sweep", size_sweep, "size_sweep.json", minutes=4)


def _training(runs: Path, cuda: bool, tiny: bool, fashion: Path | None) -> Iterator[Part]:
    """Both data sets with fused float32, fused bf16, the expert's network and the obvious one."""
    small = ("--epochs", "1", "--width", "0.25", "--batch-size", "512") if tiny else ()
    wide = () if tiny else ("--width", "1", "--epochs", "20", "--workers", "8")
    where = () if fashion is None else ("--data-dir", str(fashion))
    device = ("--device", "cuda" if cuda else "cpu")
    for recipe, seeds, flags in (("digits", "1" if tiny else "3", ()), ("fashion", "1", where)):
        if recipe == "fashion" and not cuda:
            continue
        rivals = "bf16,expert,obvious" if recipe == "digits" else "bf16,expert"
        command = ("benchmarks.compare", recipe, "--seeds", seeds, "--rivals", rivals)
        command += ("--out", str(runs / recipe), *device, *flags)
        command += small if recipe == "digits" else wide
        yield Part(recipe, command, f"compare_{recipe}.json", minutes=8, turns=6)

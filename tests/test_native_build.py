"""The C library: compiled once, never loaded unless it is right, and eager torch without it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.commands import TRAIN, run, write_tiny
from tritonbnn import eager, kernels, native
from tritonbnn.cli import SettingError
from tritonbnn.compiled import build
from tritonbnn.native import library
from tritonbnn.ops import backend

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
BASELINE = "generic"
SUM = """
#include "vector.h"

/* Sums of integers by blocks, and how many threads were there. */
EXPORT void tritonbnn_sum(const float *x, int64_t blocks, int64_t block, double times,
                          float *sums, int64_t *team, int64_t threads) {
    int members = 0;
#pragma omp parallel num_threads(threads) reduction(+ : members)
    {
        members += 1;
#pragma omp for
        for (int64_t i = 0; i < blocks; i++) {
            float sum = 0;
            for (int64_t j = 0; j < block; j++) sum += x[i * block + j];
            sums[i] = sum * (float)times;
        }
    }
    if (team) *team = members;
}
"""
# What a process of its own starts with: its arguments are the folder of the sources above.
PRELUDE = f"""
import os, sys, torch
from pathlib import Path
from tritonbnn.compiled import build
from tritonbnn.native import library

def load():
    [compiler, *_] = build.compilers()
    return library.Library(build.library("{BASELINE}", compiler, Path(sys.argv[1])), "{BASELINE}")

def team(loaded):
    "The number of threads of a call, which must give the right sums."
    x, sums = torch.arange(1000.0), torch.empty(10)
    members = torch.zeros(1, dtype=torch.int64)
    loaded.call("sum", x, 10, 100, 2.0, sums, members)
    assert torch.equal(sums, 2 * x.view(10, 100).sum(1))
    return members.item()
"""

# Or with, in a tenth of the time, when it need not call the library.
WITHOUT_TORCH = f"""
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("build", {build.__file__!r})
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
path = build.library("{BASELINE}", build.compilers()[0], pathlib.Path(sys.argv[1]))
"""

needs_compiler = pytest.mark.skipif(not build.compilers(), reason="needs a C compiler")


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """A cache and a folder for temporary files of this test's own."""
    monkeypatch.setenv("TRITONBNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    for name in (library.VARIABLE, backend.VARIABLE, "TRITONBNN_SANITIZE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def sources(tmp_path):
    """A small set of sources: what every library has, and a sum."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    for name in ("cpu.c", "vector.h"):
        shutil.copy(build.SOURCES / name, folder)
    (folder / "sum.c").write_text(SUM)
    return folder


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A compiler that takes its time, and the file where it writes a line for every library."""
    log = tmp_path / "log"
    path = script(tmp_path / "slow-cc", f'case "$*" in *-shared*) echo >> {log}; sleep 1;; esac')
    with path.open("a") as file:
        file.write(f'exec {build.compilers()[0][0]} "$@"\n')
    monkeypatch.setenv("CC", str(path))
    log.touch()
    return log


def script(path, *lines):
    """A program that the shell runs."""
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def compiled(sources, isa=BASELINE):
    return build.library(isa, build.compilers()[0], sources)


def python(code, *arguments, ends_well=True, **environ):
    """What a process of its own says, both streams; it must end well, or must not."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "2", **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
    )
    assert (done.returncode == 0) is ends_well, done.stdout
    return done.stdout


# The cache.


@needs_compiler
def test_a_library_is_compiled_once(sources, compiler):
    path = compiled(sources)
    assert path == compiled(sources)
    assert len(compiler.read_text().splitlines()) == 1
    assert library.Library(path, BASELINE).isa == BASELINE


@needs_compiler
def test_other_sources_are_another_library(sources):
    path = compiled(sources)
    (sources / "sum.c").write_text(SUM + "\n/* the same, with a comment */\n")
    assert compiled(sources) != path


@needs_compiler
def test_two_processes_compile_once(sources, compiler):
    """The one that comes second waits for the other; a third finds what they made."""
    code = WITHOUT_TORCH + "print(path)"
    command = [sys.executable, "-c", code, str(sources)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    [first, second] = [process.communicate(timeout=60)[0].strip() for process in both]
    assert first == second == str(compiled(sources))
    assert len(compiler.read_text().splitlines()) == 1


@pytest.mark.parametrize("harm", ["truncated", "changed", "unrecorded", "misrecorded", "removed"])
@needs_compiler
def test_a_harmed_library_is_compiled_again(sources, harm):
    path = compiled(sources)
    content, record = path.read_bytes(), path.with_name("native.json")
    if harm == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif harm == "changed":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif harm == "unrecorded":
        record.unlink()
    elif harm == "misrecorded":
        record.write_text("{")
    else:
        path.unlink()
    assert compiled(sources) == path
    assert path.read_bytes() == content
    assert json.loads(record.read_text())["bytes"] == len(content)


@needs_compiler
def test_a_loaded_library_outlives_its_folder(sources, tmp_path):
    """A cache deleted between two calls of a process, and before another process comes."""
    code = (
        "import shutil\nloaded = load(); first = team(loaded)\n"
        "shutil.rmtree(os.environ['TRITONBNN_CACHE'])\n"
        "assert team(loaded) == first; assert team(load()) == first"
    )
    assert python(PRELUDE + code, sources) == ""
    shutil.rmtree(tmp_path / "cache")
    assert compiled(sources).exists()


@pytest.mark.parametrize("cache", ["/proc/none", "/dev/null/none"])
@needs_compiler
def test_a_cache_that_cannot_be_written_gives_way(sources, tmp_path, monkeypatch, cache):
    monkeypatch.setenv("TRITONBNN_CACHE", cache)
    monkeypatch.setattr("tempfile.tempdir", None)  # it remembers the first answer
    path = compiled(sources)
    assert path.parents[1] == tmp_path / f"tritonbnn-{os.getuid()}"
    assert path.parents[1].stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("chosen", ["TRITONBNN_CACHE", "XDG_CACHE_HOME", "HOME"])
@needs_compiler
def test_where_the_cache_is(sources, tmp_path, monkeypatch, chosen):
    monkeypatch.delenv("TRITONBNN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard has us ignore
    monkeypatch.setenv(chosen, str(tmp_path / "chosen"))
    within = {"TRITONBNN_CACHE": "", "XDG_CACHE_HOME": "tritonbnn", "HOME": ".cache/tritonbnn"}
    assert compiled(sources).parents[1] == tmp_path / "chosen" / within[chosen]


@needs_compiler
def test_a_read_only_cache_is_read(sources, compiler, tmp_path):
    path = compiled(sources)
    for folder in (path.parent, path.parents[1]):
        folder.chmod(0o500)
    assert compiled(sources) == path
    assert len(compiler.read_text().splitlines()) == 1
    for folder in (path.parents[1], path.parent):
        folder.chmod(0o700)  # for pytest to remove


@needs_compiler
def test_a_cache_on_a_full_disk_gives_way(sources, tmp_path, monkeypatch):
    """The compiler is who meets it: here, wherever it links into the cache."""
    good = build.compilers()[0][0]
    full = "ld: final link failed: No space left on device"
    meets = f'case "$*" in *-shared*{tmp_path}/cache*) echo "{full}" >&2; exit 1;; esac'
    monkeypatch.setenv("CC", str(script(tmp_path / "cc", meets, f'exec {good} "$@"')))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert compiled(sources).parents[1] == tmp_path / f"tritonbnn-{os.getuid()}"
    everywhere = meets.replace(f"{tmp_path}/cache*", "")
    script(tmp_path / "cc", everywhere, f'exec {good} "$@"')
    with pytest.raises(build.BuildError, match=r"No space left on device.*set TRITONBNN_CACHE"):
        compiled(sources, build.PROBE)


@pytest.mark.parametrize("danger", ["open to all", "a link"])
@needs_compiler
def test_a_temporary_folder_of_others_is_refused(sources, tmp_path, monkeypatch, danger):
    monkeypatch.setenv("TRITONBNN_CACHE", "/proc/none")
    monkeypatch.setattr("tempfile.tempdir", None)
    folder = tmp_path / f"tritonbnn-{os.getuid()}"
    if danger == "a link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "theirs")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(build.BuildError, match=r"^no folder .*/proc/none.*set TRITONBNN_CACHE"):
        compiled(sources)


# Compilers.


def test_without_a_compiler_eager_does_the_work_and_says_so_once():
    code = (
        "import torch; from tritonbnn import eager; from tritonbnn.ops import backend\n"
        "cpu = torch.device('cpu')\n"
        "assert backend.launchers(cpu) is backend.launchers(cpu) is eager"
    )
    said = python(code, PATH="", HOME="/proc/none")
    assert said.count("\n") == 1
    assert "eager torch" in said
    assert "no C compiler (install gcc, or name a C compiler by CC)" in said


@needs_compiler
def test_a_compiler_that_is_gone_has_left_its_library():
    """Of the instruction set that the variable chooses."""
    code = "from tritonbnn.native import library; print(library.isa(), end='')"
    for path in (os.environ["PATH"], ""):
        assert python(code, TRITONBNN_ISA=BASELINE, PATH=path) == BASELINE


BROKEN = {
    "fails": (["exit 1"], "fails: exit code 1"),
    "complains": (
        [r"printf 'In file x.c:\nx.c:1: error: \377no\n' >&2", "exit 1"],
        "fails: x.c:1: error: \ufffdno",
    ),
    "idle": (["exit 0"], "writes nothing"),
    "garbage": (
        ['while [ $# -gt 1 ]; do [ "$1" = -o ] && printf %0999d 0 > "$2"; shift; done'],
        "invalid ELF header",
    ),
}


@pytest.mark.parametrize("kind", [*BROKEN, "absent", "quoted"])
def test_a_broken_compiler_is_named(tmp_path, monkeypatch, kind):
    """In one line, where there is no other compiler."""
    lines, message = BROKEN.get(kind, ([], "does not run: No such file or directory"))
    path = tmp_path / "cc"
    if lines:
        script(path, *lines)
    monkeypatch.setenv("CC", f'"{path}' if kind == "quoted" else str(path))
    monkeypatch.setenv("PATH", "")
    [only] = build.compilers()
    with pytest.raises((build.BuildError, OSError)) as caught:
        library.Library(build.library(BASELINE, only), BASELINE)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@needs_compiler
def test_a_broken_compiler_gives_way_to_the_next_and_is_not_remembered(tmp_path, monkeypatch):
    """Mended, it is asked again: what it wrote before is not taken from the cache."""
    [good, *_] = build.compilers()[0]
    version = f'[ "$1" = --version ] && exec {good} --version'
    path = script(tmp_path / "cc", version, *BROKEN["garbage"][0])
    monkeypatch.setenv("CC", str(path))
    broken, *others = build.compilers()
    assert [good] in others
    with pytest.raises(OSError, match="ELF"):
        library.Library(build.library(BASELINE, broken), BASELINE)
    script(path, f'exec {good} "$@"')
    library.Library(build.library(BASELINE, broken), BASELINE)


@needs_compiler
def test_each_library_has_its_own_instructions_and_no_more(sources):
    """Else the baseline's, compiled where a newer machine is the compiler's default, would not run.

    Read as data: nothing of the library runs.
    """
    wanted = {"__AVX2__": {"avx2", "avx512"}, "__AVX512VPOPCNTDQ__": {"avx512"}}
    exports = (f"#ifdef {macro}\nEXPORT const char has{macro} = 1;\n#endif\n" for macro in wanted)
    (sources / "sum.c").write_text('#include "vector.h"\n' + "".join(exports))
    for isa in build.ISAS:
        content = compiled(sources, isa).read_bytes()
        for macro, isas in wanted.items():
            assert (f"has{macro}".encode() in content) is (isa in isas), (isa, macro)


@needs_compiler
def test_no_openmp_is_linked(sources):
    """Torch's is found when the library is loaded, whatever the name of its file."""
    content = compiled(sources).read_bytes()
    assert b"GOMP_parallel" in content
    assert b"libgomp" not in content


@needs_compiler
def test_there_is_no_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", f"{build.compilers()[0][0]} -Werror")
    build.library(list(build.ISAS)[-1], build.compilers()[0])


# What is loaded.


@needs_compiler
def test_a_library_of_another_version_is_refused(sources):
    file = sources / "cpu.c"
    file.write_text(file.read_text().replace("= TRITONBNN_ABI;", "= TRITONBNN_ABI + 1;"))
    with pytest.raises(OSError, match="another version of tritonbnn"):
        library.Library(compiled(sources), BASELINE)


@needs_compiler
def test_a_library_of_another_instruction_set_is_refused(sources):
    for isa in build.ISAS:
        if isa != BASELINE:
            with pytest.raises(OSError, match="another version"):
                library.Library(compiled(sources, isa), BASELINE)


@needs_compiler
def test_what_is_no_library_of_ours_is_refused(sources):
    (sources / "cpu.c").write_text("int nothing;\n")
    with pytest.raises(OSError, match=r"native\.so is not a library of tritonbnn"):
        library.Library(compiled(sources), BASELINE)


@needs_compiler
def test_a_library_with_an_unknown_symbol_is_refused(sources):
    """As one of a compiler whose OpenMP is not the one that torch brings."""
    with (sources / "sum.c").open("a") as file:
        file.write("void __kmpc_none(void);\nEXPORT void tritonbnn_x(void) { __kmpc_none(); }\n")
    with pytest.raises(OSError, match="undefined symbol: __kmpc_none"):
        library.Library(compiled(sources), BASELINE)


def test_an_instruction_set_must_be_known_and_run_here():
    known = list(build.ISAS)
    for position, name in enumerate(known):
        assert library.checked_isa(name, best=known[-1]) == name
        for better in known[position + 1 :]:
            with pytest.raises(SettingError, match=f"TRITONBNN_ISA={better}.*runs {name} at most"):
                library.checked_isa(better, best=name)
    with pytest.raises(ValueError, match=r"TRITONBNN_ISA must be one of generic.*not 'mmx'"):
        library.checked_isa("mmx", best=known[-1])


# Calls.


@needs_compiler
def test_arguments_reach_c(sources):
    loaded = library.Library(compiled(sources), BASELINE)
    x, sums = torch.arange(12.0), torch.empty(3)
    loaded.call("sum", x, 3, 4, 0.5, sums, None)
    assert sums.tolist() == [3.0, 11.0, 19.0]
    loaded.call("sum", torch.nn.Parameter(x), 2, 6, 1.0, sums, None)
    assert sums.tolist() == [15.0, 51.0, 19.0]
    with pytest.raises(ValueError, match="sum: a tensor is on meta"):
        loaded.call("sum", x.to("meta"), 3, 4, 0.5, sums, None)


@needs_compiler
def test_threads_are_those_of_torch(sources):
    """One pool, as many threads as torch's, more than cores too, and one in a fork's child."""
    code = """
loaded = load()
for threads in (2, 1, 3 * os.cpu_count()):
    torch.set_num_threads(threads)
    torch.randn(1_000_000).relu_()  # torch's own work in the same pool
    assert team(loaded) == threads, threads
maps = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line}
assert len(maps) == 1, maps
child = os.fork()
if child == 0:
    import signal
    signal.alarm(60)
    os._exit(0 if team(loaded) == 1 else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    assert python(PRELUDE + code, sources) == ""


@needs_compiler
def test_a_child_that_first_loads_after_a_fork_has_one_thread(sources):
    """The parent's pool has started, of torch's own work; then a child meets the library."""
    code = f"""
import os, sys, torch
torch.set_num_threads(2)
torch.randn(1_000_000).relu_()
child = os.fork()
if child == 0:
    import signal
    signal.alarm(60)
    exec({PRELUDE!r})
    os._exit(0 if team(load()) == 1 else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    assert python(code, sources) == ""


@pytest.mark.parametrize(
    ("wrong", "report"),
    [
        ("x[n] = 0", "AddressSanitizer: heap-buffer-overflow"),
        ("x[0] = 1 << n", "runtime error: shift exponent"),
    ],
)
@needs_compiler
def test_the_sanitizers_see_what_is_wrong(sources, wrong, report):
    """As ``make sanitize`` runs them: they must be on, and end the process."""
    run_time = subprocess.check_output(
        [*build.compilers()[0], "-print-file-name=libasan.so"], text=True
    ).strip()
    if not Path(run_time).is_absolute():
        pytest.skip("needs the compiler's libasan.so")
    (sources / "sum.c").write_text(
        '#include "vector.h"\n#include <stdlib.h>\n'
        "EXPORT void wrong(int n) {\n"
        "    volatile int *x = malloc(n * sizeof *x);\n"
        f"    {wrong};\n    free((void *)x);\n}}\n"
    )
    code = "import ctypes; ctypes.CDLL(str(path)).wrong(1000)"
    environ = {"TRITONBNN_SANITIZE": "1", "ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": run_time}
    assert report in python(WITHOUT_TORCH + code, sources, ends_well=False, **environ)


# The choice.


def test_who_does_the_work(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert backend.launchers(cuda) is kernels
    assert backend.launchers(torch.device("mps")) is eager
    assert backend.launchers(cpu) is (native if library.available() else eager)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.launchers(cpu) is kernels
    monkeypatch.setenv("TRITONBNN_LAUNCHERS", "eager")
    assert backend.launchers(cpu) is backend.launchers(cuda) is eager
    monkeypatch.setenv("TRITONBNN_LAUNCHERS", "triton")
    assert backend.launchers(cpu) is backend.launchers(cuda) is kernels
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SettingError, match=r"triton runs on CUDA.*TRITON_INTERPRET=1, not on cpu"):
        backend.launchers(cpu)
    monkeypatch.setenv("TRITONBNN_LAUNCHERS", "native")
    with pytest.raises(SettingError, match="native runs on a CPU, not on cuda"):
        backend.launchers(cuda)
    monkeypatch.setenv("TRITONBNN_LAUNCHERS", "cuda")
    with pytest.raises(ValueError, match="must be eager, native or triton, not 'cuda'"):
        backend.launchers(cpu)


def test_native_launchers_that_are_forced_do_not_give_way():
    code = (
        "import torch; from tritonbnn.ops import backend\n"
        "try: backend.launchers(torch.device('cpu'))\n"
        "except ValueError as error: print(error)"
    )
    said = python(code, TRITONBNN_LAUNCHERS="native", PATH="")
    assert said.startswith("TRITONBNN_LAUNCHERS=native, but there is no C library: there is no C")
    assert said.count("\n") == 1


def test_a_command_reports_a_bad_setting_in_one_line(tmp_path):
    recipe = write_tiny(tmp_path)
    environ = {"TRITONBNN_LAUNCHERS": "fast"}
    done = run(TRAIN, recipe, "--out", tmp_path / "run", cwd=tmp_path, environ=environ)
    assert done.code == 2
    last = done.output.splitlines()[-1]
    assert last == "error: TRITONBNN_LAUNCHERS must be eager, native or triton, not 'fast'"
    assert "Traceback" not in done.output

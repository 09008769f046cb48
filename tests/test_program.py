"""A packed network as a C program, compiled as its users do, for this machine and for others."""

import ctypes
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.commands import TRAIN, run, write_tiny
from tests.test_bad_input import assert_one_line
from tests.test_deploy import NETWORKS, ODD, dyadic_network, random_network
from tritonbnn import deploy
from tritonbnn.cli import UserError
from tritonbnn.compiled import build
from tritonbnn.deploy import program
from tritonbnn.deploy.fold import fold
from tritonbnn.deploy.packed import Packed

pytestmark = pytest.mark.slow  # compilers that are not ours

EXPORT = "tritonbnn.export"
STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic")
FEW = {"width": 0.1, "small_images": True}
TRANSFORM = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.1], "image_size": 32}
EVERY = [p.values for p in (*NETWORKS, *ODD)]
NAMES = [p.id for p in (*NETWORKS, *ODD)]
HOSTILE = ['a"b', "back\\", "??/??(", "*/ int x;", "two\nlines", "é 漢", "%s%n", "\x7f\t", "a\0b"]
HOSTILE += ["\udcff", "</script>", "", "x" * 5000]


def tool(name: str) -> str:
    """A program by its name, or with a version behind it; where there is none the test skips."""
    for version in ("", *(f"-{number}" for number in range(30, 10, -1))):
        if path := shutil.which(name + version):
            return path
    pytest.skip(f"needs {name}")


def call(*command: object, **options: object) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def with_facts(model: torch.nn.Module, channels: int = 3, **options: object) -> Packed:
    """The network with a transform for its channels and names for its classes."""
    transform = {key: v[:channels] if isinstance(v, list) else v for key, v in TRANSFORM.items()}
    names = [f"class {i}" for i in range(model.fc.out_features)]
    return fold(model, classes=names, transform=transform, **options)


def channels_of(options: dict) -> int:
    return options.get("in_channels", 3)


@dataclass
class Compiled:
    """The functions of a C file, which ctypes calls."""

    library: ctypes.CDLL
    prefix: str
    classes: int

    def bytes_needed(self, images: int, height: int, width: int) -> int:
        function = self.library[f"{self.prefix}_workspace_bytes"]
        function.restype = ctypes.c_size_t
        return function(images, height, width)

    def run(self, images: np.ndarray, spare: int = 0, offset: int = 0) -> tuple[int, np.ndarray]:
        """The code and the logits, from a workspace with bytes to spare and at an odd address."""
        kind = "run_bytes" if images.dtype == np.uint8 else "run"
        count, _, height, width = images.shape
        needed = self.bytes_needed(count, height, width) + spare
        workspace = np.full(max(needed, 1) + 64, 0xEE, np.uint8)
        logits = np.full((count, self.classes), np.nan, np.float32)
        code = self.library[f"{self.prefix}_{kind}"](
            ctypes.c_void_p(images.ctypes.data),
            *(count, height, width),
            ctypes.c_void_p(logits.ctypes.data),
            ctypes.c_void_p(workspace.ctypes.data + offset),
            ctypes.c_size_t(max(needed, 0)),
        )
        assert (workspace[needed + offset :] == 0xEE).all()
        return code, logits


def compiled(packed: Packed, folder: Path, flag: str = "-O1") -> Compiled:
    program.write(packed, folder / "net.c")
    call(tool("gcc"), *STRICT, flag, "-shared", "-fPIC", "net.c", "-o", "net.so", cwd=folder)
    return Compiled(ctypes.CDLL(str(folder / "net.so")), "net", len(packed.head_weight))


def compile_test(folder: Path, *command: str) -> Path:
    """The test program of net.c."""
    call(*command, *STRICT, "net.c", "net_test.c", "-o", "net_test", cwd=folder)
    return folder / "net_test"


def checker(packed: Packed, folder: Path, *command: str) -> Path:
    """The test program of a network, compiled by a command."""
    program.write(packed, folder / "net.c")
    return compile_test(folder, *command, "-O3")


def assert_same(said: str) -> None:
    """No logit differs by a bit, of the floats and of the bytes."""
    assert re.findall(r"^(\w+): largest difference 0,", said, re.MULTILINE) == ["floats", "bytes"]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[Packed, Compiled]:
    """A small network, packed and compiled."""
    packed = with_facts(random_network("birealnet_18", **FEW))
    return packed, compiled(packed, tmp_path_factory.mktemp("few"))


def test_it_gives_the_engine_s_logits(few: tuple[Packed, Compiled]):
    packed, net = few
    random = np.random.default_rng(0)
    engine = deploy.Engine(packed, 1)
    for shape in ((3, 3, 24, 40), (1, 3, 8, 8)):
        pixels = random.integers(0, 256, shape, np.uint8)
        for images in (random.standard_normal(shape, np.float32), pixels):
            code, logits = net.run(images, offset=3)
            assert code == 0
            np.testing.assert_allclose(logits, engine(images), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_has_a_code(few: tuple[Packed, Compiled]):
    _, net = few
    image = np.zeros((1, 3, 16, 16), np.float32)
    assert net.run(image)[0] == 0
    assert net.run(image, spare=-1)[0] == 3  # a small workspace
    image[0, 1, 2, 3] = np.nan
    assert net.run(image)[0] == 4
    for images, height, width in ((1, 16, 12), (0, 16, 16), (-1, 16, 16), (1, -16, 16), (1, 0, 0)):
        assert net.bytes_needed(images, height, width) == 0
    most = 2**31 - 8
    assert net.bytes_needed(most, most, most) == net.bytes_needed(1, most, 8) == 0
    assert net.run(np.zeros((1, 3, 16, 12), np.float32))[0] == 2  # a bad size
    run_ = net.library.net_run
    assert run_(None, 1, 16, 16, None, None, ctypes.c_size_t(1 << 30)) == 1


def test_memory_is_the_caller_s(few: tuple[Packed, Compiled], tmp_path: Path):
    program.write(few[0], tmp_path / "net.c")
    call(tool("gcc"), *STRICT, "-O1", "-fno-pic", "-c", "net.c", cwd=tmp_path)
    wanted = call(tool("nm"), "--undefined-only", tmp_path / "net.o")
    assert set(re.findall(r"U (\w+)", wanted)) <= {"memcpy", "memset"}
    sections = call(tool("size"), "-A", tmp_path / "net.o")
    assert re.findall(r"^\.(?:bss|data) +(\d+)", sections, re.MULTILINE) == ["0", "0"]


def test_names_are_data(tmp_path: Path):
    model = random_network("birealnet_18", **FEW)
    names = [*HOSTILE, *map(str, range(70 - len(HOSTILE)))]
    net = compiled(fold(model, classes=names), tmp_path)
    found = (ctypes.c_char_p * 70).in_dll(net.library, "net_class_names")
    assert list(found) == [n.replace("\0", "\ufffd").encode(errors="replace") for n in names]
    assert not hasattr(net.library, "net_run_bytes")  # it has no mean and std


def test_two_networks_are_one_program(tmp_path: Path):
    """Of C++, which reads the headers."""
    for name in ("one", "int"):
        model = random_network("birealnet_18", seed=len(name), **FEW)
        program.write(with_facts(model), tmp_path / f"{name}.c")
    (tmp_path / "main.cpp").write_text(
        '#include "one.h"\n#include "int.h"\n#include "one.h"\n'
        "int main() { return one_workspace_bytes(1, 16, 16) != int_workspace_bytes(1, 16, 16)"
        " || one_mean[0] != int_mean[0] || ONE_CLASSES != INT_CLASSES; }\n"
    )
    call(tool("gcc"), *STRICT, "-O0", "-c", "one.c", "int.c", cwd=tmp_path)
    call(tool("g++"), "-Wall", "-Werror", "main.cpp", "one.o", "int.o", "-o", "main", cwd=tmp_path)
    call(tmp_path / "main")


def test_a_wrong_logit_is_seen(few: tuple[Packed, Compiled], tmp_path: Path):
    program.write(few[0], tmp_path / "net.c")
    text = (tmp_path / "net_test.c").read_text()
    first = re.search(r"expected\[.*\] = \{\n([^,]+),", text)
    (tmp_path / "net_test.c").write_text(text.replace(first[1], "0.1234f", 1))
    path = compile_test(tmp_path, tool("gcc"), "-O1")
    done = subprocess.run([path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "WRONG" in done.stdout


@pytest.mark.parametrize(("name", "options", "shape"), EVERY, ids=NAMES)
def test_exact_sums_give_torch_s_logits(tmp_path: Path, name, options, shape):
    model = dyadic_network(name, **options)
    images = torch.randint(-4, 5, shape).float()
    with torch.no_grad():
        truth = model.double()(images.double())
    net = compiled(with_facts(model.float(), channels_of(options)), tmp_path, "-O3")
    code, logits = net.run(images.numpy())
    assert code == 0
    assert np.abs(logits - truth.numpy()).max() < 1e-6


@pytest.mark.parametrize("flags", ["-march=native", "-march=x86-64", "-mavx2 -mfma"])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("index", [0, 2, 5], ids=[NAMES[i] for i in (0, 2, 5)])
def test_it_compiles_without_a_warning(tmp_path: Path, index, compiler, flags):
    if flags != "-march=native" and "avx2" not in build.ISAS:
        pytest.skip("needs x86")
    name, options, _ = EVERY[index]
    packed = with_facts(random_network(name, **options))
    assert_same(call(checker(packed, tmp_path, tool(compiler), *flags.split())))


@pytest.mark.parametrize("index", [0, 2, 4, 5], ids=[NAMES[i] for i in (0, 2, 4, 5)])
def test_it_stays_in_its_memory(tmp_path: Path, index: int):
    """Of which the test program gives it not a byte too many."""
    name, options, _ = EVERY[index]
    program.write(with_facts(random_network(name, **options)), tmp_path / "net.c")
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-march=native")
    assert_same(call(compile_test(tmp_path, tool("gcc"), "-O1", *flags)))


@pytest.mark.parametrize("index", [1, 2, 4, 5], ids=[NAMES[i] for i in (1, 2, 4, 5)])
@pytest.mark.parametrize("machine", ["aarch64", "riscv64"])
def test_other_machines_give_the_same(tmp_path: Path, machine, index):
    compiler, emulator = tool(f"{machine}-linux-gnu-gcc"), tool(f"qemu-{machine}")
    name, options, _ = EVERY[index]
    packed = with_facts(random_network(name, **options), channels_of(options))
    path = checker(packed, tmp_path, compiler, "-static")
    assert_same(call(emulator, path))
    if machine == "aarch64":
        listing = call(tool("aarch64-linux-gnu-objdump"), "-d", path)
        assert re.search(r"\tcnt\tv\d+\.16b", listing)  # NEON counts the bits


@pytest.mark.parametrize(
    ("flags", "instruction"),
    [
        ("--target=wasm32 -msimd128 -mbulk-memory -ffreestanding", "i8x16.popcnt"),
        ("--target=aarch64-linux-gnu -ffreestanding", "cnt\t"),
    ],
)
def test_clang_counts_bits_by_vectors(tmp_path: Path, flags: str, instruction: str):
    """Also for machines that have no C library. The page runs what it makes for WebAssembly."""
    clang = tool("clang")
    program.write(with_facts(random_network("birealnet_18", **FEW)), tmp_path / "net.c")
    call(clang, *STRICT, "-O3", *flags.split(), "-S", "net.c", "-o", "net.s", cwd=tmp_path)
    assert instruction in (tmp_path / "net.s").read_text()


@pytest.mark.parametrize("kind", ["grey", "one class", "half ends"])
def test_ends_of_all_kinds(tmp_path: Path, kind: str):
    channels = 1 if kind == "grey" else 3
    model = random_network("reactnet_18", width=0.17, in_channels=channels)
    packed = with_facts(model, channels, half_ends=kind == "half ends")
    if kind == "one class":
        head = {name: getattr(packed, name)[:1] for name in ("head_weight", "head_offset")}
        packed = replace(packed, classes=("it",), **head)
    assert_same(call(checker(packed, tmp_path, tool("gcc"))))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, its packed file, and a file of the user's."""
    folder = tmp_path_factory.mktemp("program")
    write_tiny(folder)
    (folder / "mine.h").write_text("int mine;\n")
    for module, *argv in ((TRAIN, "tiny.toml", "--out", "run"), (EXPORT, "run", "--out", "n.tbnn")):
        result = run(module, *argv, cwd=folder)
        assert result.code == 0, result.output
    return folder


def test_a_run_becomes_a_program(place: Path, tmp_path: Path):
    result = run(EXPORT, place / "run", "--out", "net.c", cwd=tmp_path)
    assert result.code == 0, result.output
    assert result.output.startswith("net.c, net.h, net_test.c: ")
    written = {path.name: path.read_bytes() for path in tmp_path.glob("net*")}
    assert set(written) == {"net.c", "net.h", "net_test.c"}
    again = run(EXPORT, place / "n.tbnn", "--out", "net", "--format", "c", cwd=tmp_path)
    assert again.code == 0, again.output  # over our own files
    assert {path.name: path.read_bytes() for path in tmp_path.glob("net*")} == written
    assert_same(call(compile_test(tmp_path, tool("gcc"), "-O1")))


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("1net.c", "1net.c names C functions"),
        ("a b.c", "names C functions"),
        ('a"b.c', "names C functions"),
        ("./-.c", "names C functions"),
        ("_net.c", "names C functions"),
        ("é.c", "names C functions"),
        ("most.c", "names in the engine begin with most_"),
        ("tritonbnn_engine.c", "names in the engine begin with"),
        ("mine.c", "mine.h exists and was not written by an export"),
        ("none/mine.c/net.c", "none/mine.c"),
    ],
)
def test_names_that_cannot_be_are_one_line(place: Path, out: str, words: str):
    if out.startswith("none"):
        (place / "none").mkdir()
        (place / "none" / "mine.c").write_text("int mine;\n")
    before = {path: path.read_bytes() for path in place.iterdir() if path.is_file()}
    assert_one_line(run(EXPORT, "n.tbnn", "--out", out, cwd=place), words)
    before |= {place / "output.txt": (place / "output.txt").read_bytes()}
    assert {path: path.read_bytes() for path in place.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("at_call", range(1, 9))
def test_a_full_disk_leaves_nothing_half(place: Path, tmp_path: Path, at_call: int):
    argv = (place / "n.tbnn", "--out", "net.c")
    result = run(EXPORT, *argv, cwd=tmp_path, mishap="full disk", at_call=at_call)
    assert_one_line(result, "no space left to write")
    assert {path.name for path in tmp_path.iterdir()} <= {"output.txt"}


def test_a_folder_that_may_not_be_written_is_one_line(place: Path):
    assert_one_line(run(EXPORT, "n.tbnn", "--out", "/proc/net_of_mine.c", cwd=place), "/proc/")


def test_a_pipe_is_no_file(tmp_path: Path):
    os.mkfifo(tmp_path / "net.h")
    with pytest.raises(UserError, match=r"net\.h: it is a device or a pipe"):
        program.write(fold(random_network("birealnet_18", **FEW)), tmp_path / "net.c")
    assert [path.name for path in tmp_path.iterdir()] == ["net.h"]


def test_another_s_file_stays(tmp_path: Path):
    packed = fold(random_network("birealnet_18", **FEW))
    (tmp_path / "net_test.c").write_text("int mine;\n")
    with pytest.raises(UserError, match=r"net_test\.c exists and was not written by an export"):
        program.write(packed, tmp_path / "net.c")
    assert [path.name for path in tmp_path.iterdir()] == ["net_test.c"]

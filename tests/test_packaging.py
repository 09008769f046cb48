"""A built wheel holds everything that the package reads, and nothing else."""

import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest

from tritonbnn import deploy
from tritonbnn.compiled import build
from tritonbnn.models import build_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
NEEDED = {
    "tritonbnn/data/DIGITS.md",
    "tritonbnn/data/digits.npz",
    "tritonbnn/deploy/csrc/engine.c",
    "tritonbnn/deploy/csrc/engine.h",
    "tritonbnn/deploy/page/page.html.jinja",
    "tritonbnn/deploy/page/page.js",
    "tritonbnn/deploy/program/net.c.jinja",
    "tritonbnn/native/csrc/cpu.c",
    "tritonbnn/native/csrc/vector.h",
    "tritonbnn/report/page.html.jinja",
    *(f"tritonbnn/compare/sets/{name}.toml" for name in ("decay", "optimisers", "steps")),
    *(
        f"tritonbnn/train/recipes/{name}.toml"
        for name in ("cifar10", "cifar100", "digits", "fashion", "images", "imagenet")
    ),
}
LIBRARIES = {
    f"tritonbnn/native/lib/{isa}/native.{kind}"
    for isa in (build.PROBE, *build.ISAS)
    for kind in ("so", "json")
} | {f"tritonbnn/deploy/lib/{isa}/native.{kind}" for isa in build.ISAS for kind in ("so", "json")}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The sources that git knows, without what a build leaves beside them."""
    folder = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    for name in listed.stdout.decode().split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def wheel(source, out, **environ):
    """Build a wheel; its path, and the names of what it holds."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source]
    environ = {**os.environ, **environ}
    built = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=900, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    names = set(zipfile.ZipFile(path).namelist())
    assert names >= NEEDED
    top = {name.split("/")[0] for name in names}
    assert top == {"tritonbnn", f"{path.name.split('-py3')[0]}.dist-info"}
    return path, names


@pytest.mark.skipif(not build.compilers(), reason="needs a C compiler")
def test_a_wheel_holds_recipes_data_and_libraries(source, tmp_path):
    """Whose libraries are loaded where no compiler is, unless they are harmed."""
    path, names = wheel(source, tmp_path)
    assert names >= LIBRARIES
    assert path.stem.split("-")[2:4] == ["py3", "none"]
    assert not path.stem.endswith("-any")

    installed = tmp_path / "installed"
    zipfile.ZipFile(path).extractall(installed)
    folder = installed / "tritonbnn" / "native" / "lib"
    assert loaded(installed) == str(folder / "generic/native.so")
    for harmed in folder.glob("*/native.so"):
        harmed.write_bytes(harmed.read_bytes()[:-1])
    assert loaded(installed) == "there is no C compiler (install gcc, or name a C compiler by CC)"


def test_without_a_compiler_a_wheel_is_pure(source, tmp_path):
    path, names = wheel(source, tmp_path, CC="", PATH="")
    assert path.stem.endswith("-py3-none-any")
    assert not {name for name in names if "/lib/" in name}


RUN = """
import sys
import numpy as np
import tritonbnn.deploy
engine = tritonbnn.deploy.load(sys.argv[1])
np.save(sys.argv[3], engine(np.load(sys.argv[2])))
loaded = {name.split(".")[0] for name in sys.modules}
print(engine.name.split(",")[0], sorted(loaded & {"torch", "torchvision", "triton", "PIL"}))
"""


@pytest.mark.skipif(not build.compilers(), reason="needs a C compiler")
def test_an_environment_without_torch_runs_a_packed_file(source, tmp_path):
    """It has the wheel, installed without its dependencies, and numpy and safetensors alone."""
    path, _ = wheel(source, tmp_path)
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*install, "--no-deps", "--quiet", path], env=clean, cwd=tmp_path, check=True)
    (packages,) = (tmp_path / "venv").glob("lib/*/site-packages")
    for name in ("numpy", "safetensors"):
        for part in distribution(name).files or ():
            top = Path(part.parts[0])
            if top.name != ".." and not (packages / top.name).exists():
                (packages / top.name).symlink_to(distribution(name).locate_file(top))
    model = build_model("birealnet_18", width=0.125, small_images=True, num_classes=5).eval()
    deploy.export(model, tmp_path / "net.tbnn")
    images = np.random.default_rng(0).standard_normal((3, 3, 32, 16), np.float32)
    np.save(tmp_path / "images.npy", images)
    files = [tmp_path / name for name in ("net.tbnn", "images.npy", "logits.npy")]
    environ = {"CC": "", "PATH": "", "TRITONBNN_CACHE": str(tmp_path / "cache")}
    command = [python, "-c", RUN, *files]
    said = subprocess.check_output(command, env=environ, text=True, cwd=tmp_path)
    assert said == "C []\n"
    truth = deploy.load(files[0])(images)
    np.testing.assert_allclose(np.load(files[2]), truth, atol=1e-5)


def loaded(installed):
    """The file of the baseline's library that an installed package loads, or why it does not."""
    code = (
        "from tritonbnn.native import library\n"
        "print(library.reason() or [line.split()[-1] for line in open('/proc/self/maps')"
        " if line.endswith('generic/native.so\\n')][0])"
    )
    environ = {**os.environ, "CC": "", "PATH": "", "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        # a folder of its own, because the user's cache may hold the same library
        env={**environ, "TRITONBNN_ISA": "generic", "TRITONBNN_CACHE": str(installed / "cache")},
        capture_output=True,
        text=True,
        cwd=installed,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_oldest_tested_versions_are_those_that_are_allowed():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lowest = dict(re.match(r"([a-z0-9]+)>=([\d.]+)", line).groups() for line in dependencies)
    tested = dict(line.split("==") for line in (ROOT / "oldest.txt").read_text().splitlines())
    assert {name: version.removesuffix(".0") for name, version in tested.items()} == lowest

"""Homes that cannot be written, and caches that were cut off."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from torch.torch_version import TorchVersion

from tests.commands import ROOT
from tests.records import write_record
from tritonbnn import caches
from tritonbnn.cli import UserError

TUNE = ("tritonbnn.kernels.autotune", "--compile-only", "--op", "pack_signs")
TUNE = (*TUNE, "--layer", "0", "--limit", "1", "--target", "sm_90")
VARIABLES = (caches.TRITON, caches.INDUCTOR, caches.MATPLOTLIB)
NOWHERE = "/proc/none"  # where nobody may create anything, not even root


def command(module: str, *argv: object, cwd: Path, **environ: str) -> subprocess.CompletedProcess:
    """Run a command whose kernels are not interpreted, in a temporary folder of its own."""
    left_out = ("TRITON_INTERPRET", "TRITON_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", *VARIABLES)
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    (cwd / "tmp").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, argv)],
        cwd=cwd,
        env={**kept, "PYTHONPATH": str(ROOT), "TMPDIR": str(cwd / "tmp"), **environ},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_without_a_writable_home_kernels_are_compiled_in_a_temporary_folder(tmp_path):
    done = command(*TUNE, cwd=tmp_path, HOME=NOWHERE)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0])
    [line] = done.stderr.splitlines()
    folder = tmp_path / "tmp" / f"tritonbnn-{os.getuid()}" / "triton"
    assert line == f"the home cannot be written: using {folder}; TRITON_CACHE_DIR chooses another"
    assert list(folder.iterdir())


@pytest.mark.slow
def test_without_a_writable_home_pages_are_drawn_without_noise(tmp_path):
    write_record(tmp_path / "run")
    flags = ("run", "--landscape", 0, "--no-confusion")
    done = command("tritonbnn.analyze", *flags, cwd=tmp_path, HOME=NOWHERE)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].endswith("MPLCONFIGDIR chooses another")
    assert not [line for line in lines if "atplotlib" in line and "MPLCONFIGDIR" not in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "variable"),
    [(TUNE, caches.TRITON), (("tritonbnn.analyze", "run"), caches.MATPLOTLIB)],
)
def test_a_folder_that_was_named_must_do(tmp_path, argv, variable):
    write_record(tmp_path / "run")
    done = command(*argv, cwd=tmp_path, **{variable: NOWHERE})
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: {variable} is {NOWHERE}, which cannot be written")
    assert line.endswith("set it to a folder that can")


def test_neither_home_nor_temporary_folder(tmp_path, monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", NOWHERE)
    monkeypatch.setattr("tempfile.tempdir", NOWHERE)
    with pytest.raises(UserError, match="set TRITON_CACHE_DIR to a folder that can"):
        caches.prepare(caches.TRITON)
    assert caches.TRITON not in os.environ


def test_a_folder_that_others_may_write_to_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.delenv(caches.TRITON, raising=False)
    monkeypatch.setenv("HOME", NOWHERE)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / f"tritonbnn-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / f"tritonbnn-{os.getuid()}").chmod(0o777)
    with pytest.raises(UserError, match="TRITON_CACHE_DIR"):
        caches.prepare(caches.TRITON)


@pytest.mark.slow
def test_a_cache_that_was_cut_off_is_named(tmp_path):
    """As a full disk leaves it. Triton 3.8 and newer compile again, and have nothing to say."""
    cache = tmp_path / "cache"
    assert command(*TUNE, cwd=tmp_path, TRITON_CACHE_DIR=str(cache)).returncode == 0
    groups = list(cache.rglob("__grp__*.json"))
    assert groups
    for path in groups:
        path.write_bytes(path.read_bytes()[:-20])
    done = command(*TUNE, cwd=tmp_path, TRITON_CACHE_DIR=str(cache))
    assert "Traceback" not in done.stderr
    if done.returncode == 0 and TorchVersion(version("triton")) >= (3, 8):
        return
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"error: Triton's cache of compiled kernels is damaged: remove {cache}"
    )

"""A built wheel holds everything that the package reads, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
NEEDED = {
    "tritonbnn/data/DIGITS.md",
    "tritonbnn/data/digits.npz",
    "tritonbnn/train/recipes/digits.toml",
    "tritonbnn/train/recipes/fashion.toml",
    "tritonbnn/train/recipes/imagenet.toml",
}


def test_a_wheel_holds_recipes_and_data(tmp_path):
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    source = tmp_path / "source"
    for name in listed.stdout.decode().split("\0"):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path]
    built = subprocess.run(
        [*command, source], capture_output=True, text=True, timeout=900, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= NEEDED
    top = {name.split("/")[0] for name in names}
    assert top == {"tritonbnn", f"{wheel.name.split('-py3')[0]}.dist-info"}

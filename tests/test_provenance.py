"""What stands above a table of results."""

import subprocess

import pytest
import torch

from tritonbnn.kernels import provenance


def git(folder, *arguments):
    name = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *name, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A repository with the package's name in it."""
    code = tmp_path / "tritonbnn" / "code.py"
    code.parent.mkdir()
    code.write_text("1\n")
    (tmp_path / "README.md").write_text("1\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    return tmp_path


def test_a_commit_is_marked_where_the_code_differs_from_it(checkout):
    clean = git(checkout, "rev-parse", "HEAD")[:12]
    assert provenance.commit(checkout) == clean
    (checkout / "README.md").write_text("2\n")  # as the report writes it
    assert provenance.commit(checkout) == clean
    (checkout / "tritonbnn" / "code.py").write_text("2\n")
    assert provenance.commit(checkout) == f"{clean}-dirty"
    git(checkout, "commit", "--quiet", "--all", "--message", "second")
    assert provenance.commit(checkout) == git(checkout, "rev-parse", "HEAD")[:12] != clean
    (checkout / "tritonbnn" / "new.py").write_text("")
    assert provenance.commit(checkout).endswith("-dirty")


def test_a_commit_is_unknown_outside_of_a_checkout(checkout, tmp_path_factory, monkeypatch):
    assert provenance.commit(tmp_path_factory.mktemp("plain")) == "unknown"
    installed = checkout / ".venv" / "site-packages"  # in somebody's repository
    (installed / "tritonbnn").mkdir(parents=True)
    assert provenance.commit(installed) == "unknown"
    monkeypatch.setenv("PATH", "")  # nor is there a git
    assert provenance.commit(checkout) == "unknown"


def test_a_header_names_device_versions_and_command():
    head = provenance.header("python -m this", torch.device("cpu"))
    assert head["device"]
    assert torch.__version__.startswith(head["torch"].partition("+")[0])
    assert head["command"] == "python -m this"
    assert "driver" not in head


@pytest.mark.gpu
def test_a_header_names_a_gpu_and_its_driver(gpu):
    head = provenance.header("", gpu)
    assert head["device"] == torch.cuda.get_device_name(gpu)
    assert head["driver"][0].isdigit()

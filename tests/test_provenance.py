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


CPUINFO = """processor\t: {number}
model name\t: AMD EPYC
cpu family\t: 25
model\t\t: {model}
stepping\t: 1
flags\t\t: fpu sse2 {flags}

"""


def folder_of(monkeypatch, path, model, flags):
    """A results' folder on two such processors."""
    path.write_text("".join(CPUINFO.format(number=n, model=model, flags=flags) for n in (0, 1)))
    monkeypatch.setattr(provenance, "CPUINFO", path)
    monkeypatch.setattr(provenance.os, "cpu_count", lambda: 2)
    return provenance.folder_name(torch.device("cpu"))


def test_processors_of_one_name_have_folders_of_their_own(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    milan = folder_of(monkeypatch, info, 1, "avx avx2")
    head = provenance.header("", torch.device("cpu"))
    genoa = folder_of(monkeypatch, info, 17, "avx2 avx512f avx512_vpopcntdq avx512_bf16")
    masked = folder_of(monkeypatch, info, 17, "avx2 avx512f")
    assert milan == "cpu-amd-epyc-25-1-1-avx2-2-cores"
    assert genoa.endswith("-25-17-1-avx512f-vpopcntdq-bf16-2-cores")
    assert len({milan, genoa, masked}) == 3
    assert (head["device"], head["cpu"]) == ("AMD EPYC", "family 25, model 1, stepping 1")
    assert (head["instructions"], head["cores"]) == (["avx2"], 2)


def test_without_the_kernels_word_there_is_a_name_still(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "CPUINFO", tmp_path / "nowhere")
    assert provenance.folder_name(torch.device("cpu")).startswith("cpu-")
    assert provenance.cpu_instructions() == []


@pytest.mark.gpu
def test_a_header_names_a_gpu_and_its_driver(gpu):
    head = provenance.header("", gpu)
    assert head["device"] == torch.cuda.get_device_name(gpu)
    assert head["driver"][0].isdigit()

"""``python -m tritonbnn.timm`` where something is missing."""

import subprocess
import sys

import pytest

HIDE = "import sys; sys.modules['timm'] = None; "
RUN = (
    HIDE + "import runpy; sys.argv = ['timm', *{}]; runpy.run_module('tritonbnn.timm', {{}}, {!r})"
)


def ended(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_missing_timm_or_script_is_one_line(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("print('ran')\n")
    for arguments, message in (
        ([str(script), "--model", "x"], "tritonbnn.timm needs timm: pip install 'tritonbnn[timm]'"),
        ([str(tmp_path / "no.py")], f"there is no script {tmp_path / 'no.py'}: name timm's"),
        ([str(tmp_path)], f"there is no script {tmp_path}: name timm's"),
        ([], "the following arguments are required: script"),
    ):
        done = ended(RUN.format(arguments, "__main__"))
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert done.stderr.startswith(f"error: {message}")
        assert done.stderr.count("\n") == 1


def test_importing_it_without_timm_names_the_extra():
    done = ended(HIDE + "import tritonbnn.timm")
    assert done.stderr.endswith(
        "\nImportError: tritonbnn.timm needs timm: pip install 'tritonbnn[timm]'\n"
    )

"""The code of the docs does what they say."""

import re
from pathlib import Path

import pytest

from tests.commands import EVALUATE, ROOT, TRAIN, run, write_tiny
from tritonbnn.compare.__main__ import parse as parse_comparison
from tritonbnn.compare.plan import make_plan
from tritonbnn.train.arguments import parse

EXTENDING = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", EXTENDING, re.DOTALL))
TRAINING = (ROOT / "docs" / "training.md").read_text()
COMPARING = (ROOT / "docs" / "comparing.md").read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    write_tiny(folder)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def commands() -> list[str]:
    return re.findall(r"^python -m tritonbnn.train digits (.*)$", EXTENDING, re.MULTILINE)


def test_the_docs_have_what_is_tried_here():
    assert set(FILES) == {"clip.py", "averaged.py", "mine.py"}
    assert len(commands()) == 3
    assert len(FILES["clip.py"].splitlines()) <= 20


@pytest.mark.parametrize("flags", [*commands(), "--method averaged.Averaged"])
def test_a_class_of_the_docs_trains(place: Path, tmp_path: Path, flags: str):
    argv = ("tiny.toml", "--out", tmp_path / "run", *flags.split(), "--weight-decay", 0)
    stopped = run(TRAIN, *argv, cwd=place, mishap="SIGTERM", at_step=3)
    assert stopped.code == 75, stopped.output
    result = run(TRAIN, *argv, cwd=place)
    assert result.code == 0, result.output
    assert run(EVALUATE, tmp_path / "run", cwd=place).code == 0


@pytest.mark.parametrize("text", re.findall(r"```toml\n(.*?)```", TRAINING, re.DOTALL))
def test_a_recipe_of_the_docs_is_read(tmp_path: Path, text: str):
    if "[[stage]]" not in text:
        text += '\n[[stage]]\nname = "all"\n'
    (tmp_path / "mine.toml").write_text(text)
    assert parse([str(tmp_path / "mine.toml")]).config.stages


def test_a_set_of_the_docs_is_read(tmp_path: Path):
    [text] = re.findall(r"```toml\n(.*?)```", COMPARING, re.DOTALL)
    (tmp_path / "set.toml").write_text(text)
    plan = make_plan([str(tmp_path / "set.toml")], [], seeds=1, out=tmp_path)
    assert [config.stage("step2").lr for config in plan.configs.values()] == [1e-3, 1e-2]
    assert [config.stage("step2").epochs for config in plan.configs.values()] == [4, 4]
    assert plan.claims[0].rising == ("low", "high")


def test_the_comparisons_of_the_docs_are_planned(tmp_path: Path):
    (tmp_path / "mine.toml").write_text('[[stage]]\nname = "all"\n')
    found = re.findall(r"^python -m tritonbnn.compare (.*)$", COMPARING, re.MULTILINE)
    assert len(found) == 4
    for line in found:
        words = line.replace("mine.toml", str(tmp_path / "mine.toml")).split()
        given, flags = parse_comparison(words)
        plan = make_plan(
            given.recipes,
            flags,
            seeds=given.seeds,
            out=tmp_path,
            total_epochs=given.total_epochs,
        )
        assert len(plan.runs) == given.seeds * len(plan.rows)


@pytest.mark.slow
def test_a_notebooks_code_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    [code] = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "stopping.md").read_text(), re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    exec(code.replace("epochs=2", "epochs=1"))
    assert "runs/notebook/step2/best.safetensors" in capsys.readouterr().out

"""Sixty bad inputs of ``analyze``."""

import pytest

from tests.bad_inputs import DEVICES, NUMBERS, PLACES, assert_refused, snapshot, write_places
from tests.commands import ANALYZE, run
from tests.records import write_record

LOGS = {
    "log-empty": b"",
    "log-blank": b"\n\n\n",
    "log-text": b"just words\n",
    "log-binary": bytes(range(256)),
    "log-list": b"[1, 2]\n",
    "log-number": b"3\n",
    "log-null": b"null\n",
    "log-no-step": b'{"epoch": 1}\n',
    "log-step-3": b'{"step": 3, "epoch": 1}\n',
    "log-epoch-0": b'{"step": 1, "epoch": 0}\n',
    "log-epoch-text": b'{"step": 1, "epoch": "1"}\n',
    "log-epoch-huge": b'{"step": 1, "epoch": 1000000000}\n',
    "log-cut": b'{"step": 1, "epo',
    "log-deep": b"[" * 100_000 + b"\n",
    "log-number-long": b'{"step": 1, "epoch": ' + b"9" * 10_000 + b"}\n",
}
OUTS = ("page.txt", "page", "run", "text.png", "text.png/page.html", "/proc/none/page.html")
OUTS = (*OUTS, "x" * 300 + ".html", ".html/", "/dev/null/page.html")
TABLE = [
    [],
    *([name] for name in PLACES),
    *([name] for name in LOGS),
    ["run", "run"],
    ["run", "./run"],
    ["nowhere", "empty"],
    *(["run", "--out", out] for out in OUTS),
    *(["run", "--landscape", points] for points in (*NUMBERS, "1", "2", "4")),
    *(["run", "--images", count] for count in (*NUMBERS, "0", "1")),
    *(["run", "--workers", count] for count in NUMBERS),
    *(["run", "--device", device] for device in DEVICES),
    *(["run", "--precision", name] for name in ("fp64", "", "FP32")),
    ["run", "--colour"],
    ["run", "--confusion", "yes"],
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    write_record(folder / "run")
    write_places(folder)
    for name, content in LOGS.items():
        (folder / name).mkdir()
        (folder / name / "log.jsonl").write_bytes(content)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("argv", TABLE, ids=lambda argv: " ".join(argv)[:60])
def test_a_bad_input_is_one_line(place, argv):
    before = snapshot(place)
    assert_refused(run(ANALYZE, *argv, cwd=place), before, place)


def test_the_table_is_long():
    assert len(TABLE) >= 60

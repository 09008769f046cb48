"""``python -m tritonbnn.analyze``: the page, its pictures, and what bad input gives."""

import re
import shlex
import shutil
from base64 import b64decode
from datetime import datetime
from html.parser import HTMLParser
from io import BytesIO

import pytest
from PIL import Image

from tests.commands import ANALYZE, TRAIN, run, write_tiny
from tests.records import write_lines, write_record
from tritonbnn.analyze import main
from tritonbnn.cli import UserError
from tritonbnn.report.catalogue import CATALOGUE

FROM_RECORDS = {name for name, *_ in CATALOGUE} - {"landscape", "confusion"}
RECORDS_ONLY = ("--landscape", "0", "--no-confusion")
VOID = {"meta", "link", "img"}


class Page(HTMLParser):
    """Checks that what is opened is closed, and keeps what a test asks for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.images, self.text = [], set(), [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href", "srcset", "action")]
        if tag == "img":
            self.images.append(dict(attributes))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def analyze(*argv):
    assert main([str(a) for a in argv]) == 0


def check_page(path, pictures):
    """The page is well-formed, small, complete, and asks for nothing from outside."""
    text = path.read_text("utf-8")
    page = Page(text)
    assert len(text) < 5e6
    assert "script" not in page.tags
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"https?://|url\(|@import", text)
    beside = path.with_suffix("")
    assert {file.stem for file in beside.iterdir()} == pictures
    order = [name for name, *_ in CATALOGUE if name in pictures]
    for name, image in zip(order, page.images, strict=True):
        png = b64decode(image["src"].removeprefix("data:image/png;base64,"))
        assert png == (beside / f"{name}.png").read_bytes()
        assert Image.open(BytesIO(png)).width == pytest.approx(1.6 * int(image["width"]), abs=2)
    return page


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a tiny run of both steps, all of it recorded."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_tiny(folder)
    result = run(TRAIN, recipe, "--analysis", "full", "--out", "run", cwd=folder)
    assert result.code == 0, result.output
    return folder


@pytest.mark.slow
def test_all_pictures_of_a_record_the_same_every_time(tmp_path):
    write_record(tmp_path / "run")
    analyze(tmp_path / "run", *RECORDS_ONLY)
    page = check_page(tmp_path / "run" / "analysis.html", FROM_RECORDS)
    assert "nothing to draw for: Loss landscape, Confusion matrix;" in page.text
    analyze(tmp_path / "run", *RECORDS_ONLY, "--out", tmp_path / "again.html")
    pages = [tmp_path / "again.html", tmp_path / "run" / "analysis.html"]
    again, first = (re.sub(r'<p class="made">.*?</p>', "", p.read_text()) for p in pages)
    assert again == first


def test_a_page_tells_when_and_how_it_was_made(tmp_path):
    """The name tries to leave its place."""
    folder = tmp_path / "<b>run\x1b & more"
    write_record(folder)
    before = datetime.now().astimezone().replace(second=0, microsecond=0)
    analyze(folder, *RECORDS_ONLY)
    page = check_page(folder / "analysis.html", FROM_RECORDS)
    when, command = re.search(r"^(.{16} .\d{4}): (python -m .*)$", page.text, re.M).groups()
    assert before <= datetime.strptime(when, "%Y-%m-%d %H:%M %z") <= datetime.now().astimezone()
    words = ["python", "-m", "tritonbnn.analyze", str(folder).replace("\x1b", r"\x1b")]
    assert shlex.split(command) == [*words, *RECORDS_ONLY]


def test_a_network_is_measured(trained):
    result = run(ANALYZE, "run", "--landscape", 3, "--images", 4, cwd=trained)
    assert result.code == 0, result.output
    assert result.output.endswith(f"{len(CATALOGUE)} pictures, also in run/analysis\n")
    page = check_page(trained / "run" / "analysis.html", {name for name, *_ in CATALOGUE})
    assert "Most confused: run, step2" in page.text or "every image was recognised" in page.text
    assert "What is missing" not in page.text


@pytest.mark.slow
def test_what_cannot_be_measured_is_said(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    (tmp_path / "run" / "step1" / "best.safetensors").write_bytes(b"junk")
    (tmp_path / "run" / "analysis").mkdir(exist_ok=True)
    (tmp_path / "run" / "analysis" / "landscape.png").write_bytes(b"of an earlier page")
    flags = ("run", "--landscape", 3, "--data-dir", "gone")
    first = run(ANALYZE, *flags, cwd=tmp_path)
    (tmp_path / "run" / "step2" / "best.safetensors").unlink()
    again = run(ANALYZE, *flags, cwd=tmp_path)
    assert (first.code, again.code) == (0, 0), first.output + again.output
    for said in (
        r"no landscape of step1 of run: .*best\.safetensors is damaged",
        r"no landscape of step2 of run: .*gone",
        r"no confusion matrix of run: .*gone",
    ):
        assert re.search(said, first.output), first.output
    assert re.search(
        r"no confusion matrix of run: .*best\.safetensors does not exist", again.output
    )
    check_page(tmp_path / "run" / "analysis.html", FROM_RECORDS)


def test_runs_of_different_networks_are_told_apart(tmp_path):
    write_record(tmp_path / "a")
    write_record(tmp_path / "b", layers=("blocks.7.weight",), width=0.5, dataset="fashion")
    write_record(tmp_path / "c", epochs=(1, 0), seed=1)
    out = tmp_path / "all.html"
    analyze(*(tmp_path / name for name in "abc"), *RECORDS_ONLY, "--out", out)
    page = check_page(out, FROM_RECORDS)
    assert "b is another network than a (width 0.5 and not 0.25)" in page.text
    assert "b has other data than a (dataset 'fashion' and not None)" in page.text
    assert "c is another" not in page.text


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [(1, 0), (0, 1)])
def test_short_runs(tmp_path, epochs):
    write_record(tmp_path / "run", epochs=epochs)
    analyze(tmp_path / "run", *RECORDS_ONLY)
    check_page(tmp_path / "run" / "analysis.html", FROM_RECORDS)


def test_zeros_and_holes_are_drawn(tmp_path):
    """The last epoch's learning rate is 0, and so may all else be."""
    lines = write_record(tmp_path / "run", full=False)
    for line in lines:
        for layer in line["analysis"]["layers"].values():
            layer.update(dict.fromkeys(layer, 0.0))
    lines[0]["analysis"]["layers"] = {}
    lines[1]["val_top1"] = float("nan")
    write_lines(tmp_path / "run", lines)
    analyze(tmp_path / "run", *RECORDS_ONLY)
    check_page(
        tmp_path / "run" / "analysis.html",
        FROM_RECORDS - {"channels", "histograms", "trajectories"},
    )


NAMES = ["<script>alert(1)</script>", "a$b$c_{", "_hidden", "x" * 200, "数字\udcff&amp;"]


def test_names_are_shown_as_they_are(tmp_path):
    folders = [tmp_path / name.replace("/", "-") for name in NAMES]
    for folder in folders:
        write_record(folder, epochs=(1, 0), full=False, recipe="<b>bold</b>")
    out = tmp_path / "out.html"
    analyze(*folders, *RECORDS_ONLY, "--out", out)
    page = check_page(out, FROM_RECORDS - {"channels", "histograms"})
    for folder in folders:
        assert folder.name.encode(errors="replace").decode() in page.text
    assert page.text.count("<b>bold</b>") == len(NAMES)
    assert "b" not in page.tags


def test_unwritable_places_are_refused_at_once(tmp_path):
    write_record(tmp_path / "run")
    (tmp_path / "file").write_text("")
    for out, said in (
        (tmp_path / "page.txt", r"name ends in \.html"),
        (tmp_path, r"name ends in \.html"),
        (tmp_path / "file" / "page.html", r"file is a file, not a folder: choose another --out"),
    ):
        with pytest.raises(UserError, match=said):
            main([str(tmp_path / "run"), "--out", str(out)])


@pytest.mark.parametrize("points", ["-1", "1", "4", "x"])
def test_a_landscape_without_middle_is_refused(tmp_path, points):
    with pytest.raises(UserError, match="--landscape"):
        main([str(tmp_path), f"--landscape={points}"])


def test_a_mistake_is_one_line(tmp_path):
    result = run(ANALYZE, "nowhere", cwd=tmp_path)
    assert (result.code, result.output) == (
        2,
        "error: nowhere does not exist: name a run's folder\n",
    )

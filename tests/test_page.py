"""A packed network as a page, in headless Chromium."""

import base64
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.browser import Browser, BrowserError, NoBrowserError, open_browser
from tests.commands import PREDICT, ROOT, TRAIN, run, write_tiny
from tests.test_bad_input import assert_one_line
from tests.test_deploy import NETWORKS, ODD, dyadic_network, random_network
from tests.test_program import EXPORT, FEW, HOSTILE, TRANSFORM, call, channels_of, tool
from tritonbnn import deploy
from tritonbnn.cli import UserError
from tritonbnn.data.views import eval_view
from tritonbnn.deploy import page, program
from tritonbnn.deploy.fold import fold
from tritonbnn.deploy.packed import Packed, PackedError

pytestmark = pytest.mark.slow  # compilers that are not ours, and a browser

DIGITS = ROOT / "tritonbnn" / "data" / "digits.npz"
READY = "document.querySelector('#said')?.textContent.startsWith('Ready')"
SAID = "document.querySelector('#said').textContent"
GUESSES = "[...document.querySelectorAll('.name')].map(name => name.textContent)"
CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
MARKUP = ["<img src=x onerror=hacked=1>", "</script><script>hacked=1</script>", "<!--<script>"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    try:
        with open_browser(tmp_path_factory.mktemp("browser"), *CAMERA) as opened:
            yield opened
    except NoBrowserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", autouse=True)
def compilers() -> None:
    tool("clang")
    tool("wasm-ld")


def small(classes: list[str] | None = None, **transform: object) -> Packed:
    names = [f"class {i}" for i in range(70)] if classes is None else classes
    model = random_network("birealnet_18", **FEW)
    return fold(model, classes=names, transform={**TRANSFORM, **transform})


def photograph(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth shapes and noise."""
    random = np.random.default_rng(width * height)
    y, x = np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin(x / (5 + c) + y / (9 - c)) for c in range(len(mode))]
    noise = random.integers(-30, 30, (height, width, len(mode)))
    pixels = (np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode)


def png(image: Image.Image) -> str:
    """As a JavaScript string of base64."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return json.dumps(base64.b64encode(content.getvalue()).decode())


def file_of(image: Image.Image, name: str = "a.png") -> str:
    """A JavaScript expression: the image as a file."""
    numbers = f"Uint8Array.from(atob({png(image)}), c => c.charCodeAt(0))"
    return f"new File([{numbers}], {json.dumps(name)}, {{type: 'image/png'}})"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page."""
    path = tmp_path_factory.mktemp("shown") / "net.html"
    page.write(small(), path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, and somebody's page."""
    folder = tmp_path_factory.mktemp("page")
    write_tiny(folder)
    (folder / "mine.html").write_text("<!doctype html>\n<p>mine\n")
    result = run(TRAIN, "tiny.toml", "--out", "run", cwd=folder)
    assert result.code == 0, result.output
    return folder


def test_a_run_becomes_a_page(place: Path, tmp_path: Path):
    result = run(EXPORT, place / "run", "--out", "net.html", cwd=tmp_path)
    assert result.code == 0, result.output
    text = (tmp_path / "net.html").read_text()
    assert text.startswith("<!DOCTYPE html>\n")
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text)
    again = run(EXPORT, place / "run", "--out", "net", "--format", "html", cwd=tmp_path)
    assert again.code == 0, again.output
    assert (tmp_path / "net.html").read_text() == text


def test_without_a_compiler_there_is_one_line(place: Path):
    for path in ("", str(place)):
        if path:  # clang is there, and its linker is not
            (place / "clang").write_text("#!/bin/sh\n")
            (place / "clang").chmod(0o755)
        result = run(EXPORT, "run", "--out", "x.html", cwd=place, environ={"PATH": path})
        missing = "wasm-ld" if path else "clang"
        words = f"a page needs clang and wasm-ld: install LLVM's clang and lld ({missing} is"
        assert_one_line(result, words)
        assert not (place / "x.html").exists()


def test_another_s_page_stays(place: Path):
    assert_one_line(run(EXPORT, "run", "--out", "mine.html", cwd=place), "mine.html exists and was")
    assert "mine" in (place / "mine.html").read_text()


@pytest.mark.parametrize("at_call", [1, 3, 4, 5])
def test_a_full_disk_leaves_no_page(place: Path, tmp_path: Path, at_call: int):
    argv = (place / "run", "--out", "net.html")
    result = run(EXPORT, *argv, cwd=tmp_path, mishap="full disk", at_call=at_call)
    assert_one_line(result, "no space left to write")
    assert {path.name for path in tmp_path.iterdir()} == {"output.txt"}


@pytest.mark.parametrize(
    ("transform", "channels", "words"),
    [
        (None, 3, "it does not tell how pictures become its input"),
        ({"mean": [0.5] * 3, "std": [0.5] * 3}, 3, "it does not tell"),
        ({**TRANSFORM, "image_size": 30}, 3, "it does not tell"),
        ({**TRANSFORM, "augment": "unknown"}, 3, "it does not tell"),
        ({**TRANSFORM, "mean": [0.5] * 2, "std": [0.5] * 2}, 2, "it has 2 channels"),
    ],
)
def test_what_has_no_page_is_told(transform, channels, words):
    packed = fold(random_network("birealnet_18", **FEW))
    stem = packed.stem_weight[:, :channels]
    packed = replace(packed, transform=transform, stem_weight=stem, in_channels=channels)
    with pytest.raises(PackedError, match=words):
        page.page(packed, "net")


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ("no such target", r"know wasm32 \(error: no such target\)$"),
        ("No space left on device", r"^no space left to write \S+: free some"),
    ],
)
def test_a_compiler_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, words: str
):
    for name in ("clang", "wasm-ld"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho 'error: {says}' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError, match=words):
        page.page(small(), "net")


@pytest.mark.parametrize(("name", "options", "shape"), [*NETWORKS, *ODD])
def test_it_computes_what_the_engine_does(tmp_path: Path, browser: Browser, name, options, shape):
    """Sums that are exact have torch's logits, and others those of the C program, bit for bit."""
    channels = channels_of(options)
    facts = {key: v[:channels] if isinstance(v, list) else v for key, v in TRANSFORM.items()}
    exact = {**facts, "mean": [0.5] * channels, "std": [0.25] * channels}
    pixels = np.random.default_rng(1).integers(0, 256, (1, channels, 32, 32), np.uint8)
    for model, transform in (
        (random_network(name, **options), facts),
        (dyadic_network(name, **options), exact),
    ):
        if transform is exact:
            pixels = pixels // 128 * 255  # -2 and 2
        packed = fold(model, transform=transform)
        page.write(packed, tmp_path / "net.html")
        browser.open(tmp_path / "net.html", READY)
        numbers = json.dumps(pixels.ravel().tolist())
        found = browser.run(f"Array.from(network.run(Uint8Array.from({numbers})).logits)")
        truth = program.reference(packed)(pixels, program.byte_table(packed), 1)[0]
        np.testing.assert_array_equal(np.float32(found), truth)
        if transform is exact:
            with torch.no_grad():
                wanted = model.double()(torch.from_numpy(pixels).double() / 255 * 4 - 2)[0]
            assert np.abs(found - wanted.numpy()).max() < 1e-6


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("augment", ["imagenet", "none"])
@pytest.mark.parametrize(
    "sides", [(500, 333), (37, 81), (32, 32), (8, 8), (256, 255), (1, 1), (15, 240), (1000, 334)]
)
def test_pictures_are_resized_as_pillow_does(shown, browser, sides, augment, mode):
    browser.open(shown, READY)
    image = photograph(*sides, mode)
    view = eval_view(augment, 224)
    rgba = json.dumps(base64.b64encode(image.convert("RGBA").tobytes()).decode())
    shorter = round(view.size * view.margin)
    arguments = f"{sides[0]}, {sides[1]}, {1 if mode == 'L' else 3}, 224, {shorter}"
    found = browser.run(
        f"Array.from(fit(Uint8Array.from(atob({rgba}), c => c.charCodeAt(0)), {arguments}))"
    )
    np.testing.assert_array_equal(np.array(found, np.uint8), view(image).numpy().ravel())


@pytest.mark.parametrize("sides", [(1000, 20), (333, 1000)])
def test_thin_and_tall_pictures_may_differ_by_a_grey_level(shown, browser, sides):
    """Pillow reads thin ones from a box in float32, and newer ones go down tall ones first."""
    browser.open(shown, READY)
    image = photograph(*sides)
    rgba = json.dumps(base64.b64encode(image.convert("RGBA").tobytes()).decode())
    found = browser.run(
        f"Array.from(fit(Uint8Array.from(atob({rgba}), c => c.charCodeAt(0)), {sides[0]},"
        f" {sides[1]}, 3, 32, 37))"
    )
    wanted = eval_view("imagenet", 32)(image).numpy().ravel()
    assert np.abs(np.array(found, int) - wanted).max() <= 1


def test_ten_digits_have_predict_s_classes(tmp_path: Path, browser: Browser):
    """And its probabilities, of a run that was trained for a while, within 450 KB."""
    flags = ("--epochs", 3, "--device", "cpu")
    result = run(TRAIN, "digits", *flags, "--out", "run", cwd=tmp_path)
    assert result.code == 0, result.output
    result = run(EXPORT, "run", "--out", "net.html", cwd=tmp_path)
    assert result.code == 0, result.output
    assert (tmp_path / "net.html").stat().st_size <= 450_000
    (tmp_path / "images").mkdir()
    digits = np.load(DIGITS)
    for i, levels in enumerate(digits["images"][digits["test"]][:70:7]):
        grey = (levels.astype(int) * 255 // 16).astype(np.uint8)
        Image.fromarray(grey).save(tmp_path / "images" / f"{i}.png")
    result = run(PREDICT, "run", "images", cwd=tmp_path)
    lines = re.findall(r"(\d)\.png: (.*)", result.output)
    assert len(lines) == 10
    browser.open(tmp_path / "net.html", READY)
    seen = set()
    for number, guesses in lines:
        browser.run("say('')")
        browser.choose_files("#file", tmp_path / "images" / f"{number}.png")
        browser.wait(f"{SAID}.includes('took')")
        shares = "[...document.querySelectorAll('.share')].map(share => share.textContent)"
        found = zip(browser.run(GUESSES), browser.run(shares), strict=True)
        assert ", ".join(f"{n} {s.replace(' ', '')}" for n, s in found) == guesses
        seen.add(guesses.split()[0])
    assert len(seen) > 1


def test_hostile_names_are_shown(tmp_path: Path, browser: Browser):
    names = [*MARKUP, *HOSTILE]
    packed = small([*names, *map(str, range(70 - len(names)))])
    path = tmp_path / "<b>&quot; --><script>hacked=1<.html"
    page.write(packed, path)
    browser.open(path, READY)
    order = browser.run("facts.classes")
    assert order[: len(names)] == names
    for index in range(len(names)):
        browser.run(f"show(facts.classes.map((_, i) => i === {index} ? 1 : 0), 1)")
        assert browser.run(f"{GUESSES}[0] === facts.classes[{index}]")
    assert browser.run("typeof hacked") == "undefined"
    assert browser.run("document.querySelectorAll('main img, main b, main script').length") == 0
    assert browser.run("document.title").startswith(path.stem)


def test_nothing_is_asked_for(shown: Path, browser: Browser):
    browser.events.clear()
    browser.open(shown, READY)
    browser.run(f"take({file_of(photograph(40, 50))})")
    browser.wait(f"{SAID}.includes('took')")
    asked = [e["params"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    addresses = {params["request"]["url"].split(",")[0] for params in asked}
    assert addresses <= {shown.absolute().as_uri(), "data:"}
    with pytest.raises(BrowserError, match="Failed to fetch"):
        browser.run("fetch('http://localhost:9/').then(() => 1)")
    told = [e["params"]["entry"]["text"] for e in browser.events if e["method"] == "Log.entryAdded"]
    assert any("Content Security Policy" in text for text in told)


def tree(browser: Browser) -> list[tuple[str, str]]:
    """Roles and names that a screen reader meets."""
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    known = [node for node in nodes if not node["ignored"]]
    return [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in known]


def test_keyboard_and_screen_reader_reach_everything(shown: Path, browser: Browser):
    browser.open(shown, READY)
    browser.send("Page.bringToFront")
    focused = "document.activeElement.id"
    browser.press("Tab", 9)
    assert browser.run(focused) == "file"
    browser.press("Tab", 9)
    assert browser.run(focused) == "start"
    browser.press("Enter", 13, "\r")
    browser.wait(f"{focused} === 'shoot'")
    browser.press("Enter", 13, "\r")
    browser.wait(f"{SAID}.includes('took')")
    heard = tree(browser)
    for role, name in (
        ("heading", "What is in the picture?"),
        ("button", "Take a picture"),
        ("button", "Stop the camera"),
        ("status", ""),
        ("list", "The likeliest classes"),
        ("StaticText", browser.run(f"{GUESSES}[0]")),
    ):
        assert (role, name) in heard
    assert {role for role, name in heard if name == "The picture as the network sees it"} <= {
        *("image", "Canvas", "img")
    }
    assert any(name.startswith("A picture (or drop") for _, name in heard)
    browser.press("Tab", 9)
    assert browser.run(focused) == "stop"
    browser.press("Enter", 13, "\r")
    browser.wait(f"{focused} === 'start'")
    assert browser.run("document.querySelector('#video').srcObject") is None


@pytest.mark.parametrize(("event", "holds"), [("drop", "dataTransfer"), ("paste", "clipboardData")])
def test_pictures_come_in_by_other_ways(shown: Path, browser: Browser, event, holds):
    browser.open(shown, READY)
    kind = {"drop": "DragEvent", "paste": "ClipboardEvent"}[event]
    for image in (photograph(40, 50), photograph(50, 40, "RGBA")):
        browser.run(
            f"say(''), moved = new DataTransfer(), moved.items.add({file_of(image)}),"
            f" document.body.dispatchEvent(new {kind}('{event}', {{{holds}: moved, bubbles: true,"
            " cancelable: true}))"
        )
        browser.wait(f"{SAID}.includes('took')")


def test_what_is_transparent_is_white(shown: Path, browser: Browser):
    browser.open(shown, READY)
    image = Image.new("RGBA", (32, 32), (200, 0, 0, 0))
    image.paste((10, 20, 30, 255), (0, 0, 32, 16))
    browser.run(f"take({file_of(image)})")
    browser.wait(f"{SAID}.includes('took')")
    corners: Any = browser.run(
        "[1, 30].map(y => [...document.querySelector('#seen').getContext('2d')"
        ".getImageData(5, y, 1, 1).data])"
    )
    assert corners == [[10, 20, 30, 255], [255, 255, 255, 255]]


def test_what_is_no_picture_is_told(shown: Path, browser: Browser):
    browser.open(shown, READY)
    browser.run("take(new File(['no picture'], '<b>.png', {type: 'image/png'}))")
    browser.wait(f"{SAID}.startsWith('<b>.png cannot be read as a picture: ')")
    assert browser.run(GUESSES) == []
    browser.run(f"take({file_of(photograph(40, 50))})")  # and the next one can
    browser.wait(f"{SAID}.includes('took')")


@pytest.mark.bench
def test_the_benchmark_measures_both(browser: Browser, tmp_path: Path):
    """Where there is a Chromium."""
    flags = ("--rounds", "1", "--json", tmp_path / "page.json")
    call(sys.executable, "-m", "benchmarks.page", *flags, cwd=ROOT)
    result = json.loads((tmp_path / "page.json").read_text())
    assert all(len(times) == 1 and times[0] > 0 for times in result["milliseconds"].values())
    assert set(result["milliseconds"]) == {"page", "twin"}


def test_a_module_becomes_a_page(tmp_path: Path):
    model = random_network("birealnet_18", **FEW)
    size = deploy.export(model, tmp_path / "n.html", transform=TRANSFORM, format="html")
    assert size == (tmp_path / "n.html").stat().st_size

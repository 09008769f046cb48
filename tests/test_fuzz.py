"""Bytes that nobody meant: what a file holds is loaded or refused in one line, and no code runs.

``FUZZ_EXAMPLES`` says how many files of each kind are tried.
"""

import argparse
import json
import os
import pickle
import warnings
from contextlib import suppress
from datetime import datetime
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from tests.records import write_record
from tritonbnn.cli import UserError, printable
from tritonbnn.data.images import load_image
from tritonbnn.methods.teacher import load_teacher
from tritonbnn.models import build_model
from tritonbnn.report.measure import Measured
from tritonbnn.report.page import Made, compare, page
from tritonbnn.report.read import read_runs
from tritonbnn.train.arguments import read_recipe, resolve
from tritonbnn.train.checkpoint import encode
from tritonbnn.train.weights import Told, load_network

fuzzed = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
NETWORK = {"name": "birealnet_18", "num_classes": 2, "width": 0.125, "small_images": True}


def spoilt(originals):
    """Some of the originals, each with a few pieces of it replaced, doubled, cut out or put in."""
    piece = st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=12), st.booleans())

    def spoil(choice):
        content, pieces, tail = choice
        for where, length, new, near_start in pieces:
            at = int(where * (min(len(content), 400) if near_start else len(content)))
            content = content[:at] + new + content[at + length :]
        return content[: max(0, len(content) - tail)]

    tails = st.one_of(st.just(0), st.integers(0, 300))
    return st.tuples(st.sampled_from(originals), st.lists(piece, max_size=4), tails).map(spoil)


def loads_or_is_refused(load):
    """Run ``load``; a user's mistake must be one short line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = ""
        try:
            load()
        except UserError as error:
            said = printable(error)  # as the commands show it
        assert len(said) < 2000


class Harmful:
    """Unpickled, it would create a file."""

    def __reduce__(self):
        return Path.touch, (WITNESS,)


WITNESS = Path("/tmp") / f"tritonbnn-fuzz-{os.getpid()}"


def checkpoints():
    """Small files of each kind that is read."""
    torch.manual_seed(0)
    state = build_model(**NETWORK).state_dict()
    data = {"name": "digits", "dir": "", "classes": ["a", "b"], "channels": 3}
    facts = {"network": NETWORK, "data": {**data, "image_size": 16, "augment": "none"}}
    small = {name: tensor for name, tensor in state.items() if tensor.numel() < 100}
    yield encode({f"model.{name}": tensor for name, tensor in state.items()}, facts)
    yield encode({"model.fc.bias": state["fc.bias"]}, facts)
    yield save(state)
    contents = (
        {"model": small, "args": argparse.Namespace(lr=1), "best": np.float64(1)},
        {"state_dict": {"fc.weight": torch.ones(2, 3)}, "x": Harmful()},
        {"model": Harmful()},
        state,
    )
    for content in contents:
        for new in (True, False):
            buffer = BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=new)
            yield buffer.getvalue()
    yield pickle.dumps(Harmful(), protocol=2)
    yield b""


@fuzzed
@given(content=st.one_of(spoilt(list(checkpoints())), st.binary(max_size=300)))
def test_checkpoints(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(content)
    loads_or_is_refused(lambda: load_network(path, Told(step=2, recipe="digits")))
    loads_or_is_refused(lambda: load_network(path))
    loads_or_is_refused(lambda: load_teacher(str(path), num_classes=2, device="cpu"))
    assert not WITNESS.exists()


RECIPE = """
dataset = "folder"
data_dir = "images"
width = 0.125
image_size = 16
epochs = 2
lr = 2e-3
small_images = true

[step1]
weight_decay = 5e-6
"""
WORDS = (
    "epochs",
    "lr",
    "seed",
    "width",
    "[step1]",
    "[step2]",
    "step1.lr",
    "=",
    "1e999",
    "nan",
    "-1",
)
WORDS = (*WORDS, "true", "[]", "{}", "'x'", "1979-05-27", "\n", "\n")


@fuzzed
@given(
    content=st.one_of(
        spoilt([RECIPE.encode(), RECIPE.encode("utf-16"), b"\xef\xbb\xbf" + RECIPE.encode()]),
        st.lists(st.sampled_from(WORDS)).map(" ".join).map(str.encode),
        st.text(max_size=100).map(lambda text: text.encode(errors="surrogatepass")),
    )
)
def test_recipes(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    path.write_bytes(content)
    loads_or_is_refused(lambda: resolve(read_recipe(str(path))))


def json_values():
    numbers = st.one_of(st.integers(), st.floats(), st.booleans(), st.none())
    leaves = st.one_of(numbers, st.text(max_size=8))
    names = st.one_of(
        st.sampled_from(
            ["step", "epoch", "val_top1", "analysis", "layers", "flip_flop", "seconds"]
        ),
        st.text(max_size=4),
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=5)
        ),
        max_leaves=12,
    )


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A run's folder and the lines of its log."""
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    return folder, write_record(folder, epochs=(2, 1))


def line_of(line, changes):
    return json.dumps({**line, **changes}).encode()


@fuzzed
@given(data=st.data())
def test_logs(record, data):
    folder, lines = record
    changes = st.dictionaries(st.sampled_from(sorted(lines[0])), json_values(), max_size=3)
    changed = st.tuples(st.sampled_from(lines), changes).map(lambda pair: line_of(*pair))
    originals = [line_of(line, {}) for line in lines]
    rows = st.lists(st.one_of(changed, spoilt(originals), st.binary(max_size=60)), max_size=5)
    (folder / "log.jsonl").write_bytes(b"\n".join(data.draw(rows)))

    def load():
        runs = read_runs([folder])
        for stage in runs[0].stages.values():
            assert stage.epochs < 10**6
            stage.by_layer("dead")
        made = Made(datetime.now(), "command")
        assert compare(runs) == []
        page(runs, [Measured()], [], made).encode(errors="backslashreplace")

    loads_or_is_refused(load)


def images():
    """A small image in every common format."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"):
        buffer = BytesIO()
        with suppress(KeyError, OSError):  # a Pillow without this format
            options = {"exif": exif} if kind in ("png", "jpeg", "webp") else {}
            Image.fromarray(pixels).save(buffer, kind, **options)
            yield buffer.getvalue()
    for mode in ("1", "L", "I;16", "P", "RGBA", "CMYK"):
        buffer = BytesIO()
        kind = "tiff" if mode == "CMYK" else "png"
        Image.new(mode, (7, 9)).save(buffer, kind)
        yield buffer.getvalue()


@fuzzed
@given(content=spoilt(list(images())), channels=st.sampled_from([1, 3]))
def test_images(tmp_path_factory, content, channels):
    path = tmp_path_factory.getbasetemp() / "fuzzed.png"
    path.write_bytes(content)
    loads_or_is_refused(lambda: load_image(path, channels))

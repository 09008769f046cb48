"""Fashion-MNIST's files: what they become, and what is refused."""

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from tests.pictures import fashion_arrays, grey, one_line, source, write_fashion, write_idx
from tritonbnn.cli import UserError
from tritonbnn.data import fashion
from tritonbnn.data.sources import SampleKey, eval_reader


@pytest.mark.parametrize("suffix", [".gz", ""], ids=["packed", "unpacked"])
@pytest.mark.parametrize("place", [".", "FashionMNIST/raw"])
def test_fashion_is_found_and_padded(tmp_path, place, suffix):
    write_fashion(tmp_path / place, suffix)
    found = source("fashion", tmp_path)
    assert (found.name, len(found.classes), found.channels) == ("fashion", 10, 1)
    for seed, part, count in ((0, found.train, 5), (1, found.val, 3)):
        images, labels = fashion_arrays(count, seed)
        assert len(part) == count
        for i in range(count):
            image, label = part[SampleKey(0, i)]
            np.testing.assert_array_equal(grey(image), np.pad(images[i], 2))
            assert label == labels[i]


def test_debians_fashion_package():
    if not fashion.DEBIAN_DIR.is_dir():
        pytest.skip("needs the package dataset-fashion-mnist")
    train, val = fashion.load(None)
    assert np.bincount(train[1]).tolist() == [6000] * 10
    assert np.bincount(val[1]).tolist() == [1000] * 10


def test_fashion_that_is_nowhere_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion, "DEBIAN_DIR", tmp_path / "absent")
    for data_dir in (None, tmp_path):
        with pytest.raises(UserError, match="apt install dataset-fashion-mnist") as error:
            source("fashion", data_dir)
        one_line(error)


def test_one_missing_fashion_file_is_named(tmp_path):
    write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte\.gz is missing"):
        source("fashion", tmp_path)


def valid_idx() -> bytes:
    return struct.pack(">HBB3I", 0, 8, 3, 5, 28, 28) + bytes(5 * 28 * 28)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not gzip",
        gzip.compress(valid_idx())[:-20],
        gzip.compress(valid_idx())[:30] + b"\xff" * 30,
        gzip.compress(b"\0\0"),
        gzip.compress(b"\0\0\x0d\x03" + valid_idx()[4:]),
        gzip.compress(valid_idx()[:9]),
        gzip.compress(valid_idx()[:-1]),
        gzip.compress(valid_idx() + b"\0"),
        gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 5, 14, 56) + bytes(5 * 28 * 28)),
        gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 0, 28, 28)),
        gzip.compress(struct.pack(">HBB3I", 0, 8, 3, *[2**32 - 1] * 3)),
    ],
    ids=[
        *("empty", "no gzip", "gzip cut", "gzip damaged", "no magic", "floats", "header cut"),
        *("data cut", "too long", "other shape", "no images", "huge"),
    ],
)
def test_a_corrupt_image_file_is_named(tmp_path, content):
    write_fashion(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is corrupt") as error:
        source("fashion", tmp_path)
    assert str(path) in one_line(error)


@pytest.mark.parametrize("labels", [np.zeros(4), np.full(5, 10), np.zeros((5, 1))])
def test_a_corrupt_label_file_is_named(tmp_path, labels):
    write_fashion(tmp_path)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    write_idx(path, labels)
    with pytest.raises(UserError, match="is corrupt") as error:
        source("fashion", tmp_path)
    assert str(path) in one_line(error)


def test_a_fashion_image_saved_as_a_file_is_the_same_input(tmp_path):
    write_fashion(tmp_path)
    pixels = fashion_arrays(3, seed=1)[0][2].astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    read = eval_reader(source("fashion", tmp_path).facts)
    assert torch.equal(
        read(tmp_path / "x.png"), source("fashion", tmp_path).val[SampleKey(0, 2)][0]
    )

"""CIFAR's files, as Python 2 pickled them: what they become, and what is refused."""

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pictures import one_line, random_image, source
from tritonbnn.cli import UserError
from tritonbnn.data.plain_pickle import ByteArray, read_plain
from tritonbnn.data.sources import SampleKey

NAMES = [f"thing{number:03}" for number in range(100)]
MEAN = {10: (0.4914, 0.4822, 0.4465), 100: (0.5071, 0.4865, 0.4409)}
STD = {10: (0.2470, 0.2435, 0.2616), 100: (0.2673, 0.2564, 0.2762)}


def old_text(text: bytes) -> bytes:
    """A string as Python 2 pickles it, by the opcodes of protocol 2."""
    short = len(text) < 256
    return (
        b"U" + struct.pack("<B", len(text)) if short else b"T" + struct.pack("<i", len(text))
    ) + text


def old_list(items: list[bytes]) -> bytes:
    return b"]" + (b"(" + b"".join(items) + b"e")


def old_array(array: np.ndarray) -> bytes:
    """An array of bytes as numpy in Python 2 pickled it."""
    shape = b"".join(b"J" + struct.pack("<i", size) for size in array.shape)
    made = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
        + old_text(b"b")
        + b"\x87R"
    )
    kind = b"cnumpy\ndtype\n" + old_text(b"u1") + b"K\x00K\x01\x87R"
    kind += b"(K\x03" + old_text(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
    return made + b"(K\x01(" + shape + b"t" + kind + b"\x89" + old_text(array.tobytes()) + b"tb"


def old_dict(entries: dict[bytes, bytes]) -> bytes:
    inner = b"".join(old_text(key) + value for key, value in entries.items())
    return b"\x80\x02}(" + inner + b"u."


def numbers(values) -> bytes:
    return old_list([b"J" + struct.pack("<i", value) for value in values])


def rows(count: int, seed: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072), dtype=np.uint8), rng.integers(0, classes, count)


PARTS = {
    10: ({f"data_batch_{n}": 3 for n in range(1, 6)}, {"test_batch": 4}),
    100: ({"train": 7}, {"test": 4}),
}


def write_cifar(folder: Path, classes: int) -> None:
    """Small files of CIFAR's format."""
    folder.mkdir(parents=True, exist_ok=True)
    key = b"labels" if classes == 10 else b"fine_labels"
    for seed, (name, count) in enumerate({**PARTS[classes][0], **PARTS[classes][1]}.items()):
        pixels, labels = rows(count, seed, classes)
        entries = {b"batch_label": old_text(b"batch"), key: numbers(labels)}
        if classes == 100:
            entries[b"coarse_labels"] = numbers(labels // 5)
        entries |= {
            b"data": old_array(pixels),
            b"filenames": old_list([old_text(b"a.png")] * count),
        }
        (folder / name).write_bytes(old_dict(entries))
    key = b"label_names" if classes == 10 else b"fine_label_names"
    names = old_list([old_text(name.encode()) for name in NAMES[:classes]])
    meta = {b"num_vis": b"M" + struct.pack("<H", 3072), key: names}
    (folder / ("batches.meta" if classes == 10 else "meta")).write_bytes(old_dict(meta))


def base(classes: int) -> str:
    return "cifar-10-batches-py" if classes == 10 else "cifar-100-python"


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("inside", [True, False])
def test_the_files_are_read(tmp_path, classes, inside):
    write_cifar(tmp_path / base(classes), classes)
    found = source(f"cifar{classes}", tmp_path / base(classes) if inside else tmp_path)
    assert (found.name, found.channels) == (f"cifar{classes}", 3)
    assert found.classes == tuple(NAMES[:classes])
    seed = 0
    for split, parts in zip((found.train, found.val), PARTS[classes], strict=True):
        index = 0
        for count in parts.values():
            pixels, labels = rows(count, seed, classes)
            for row, expected in zip(pixels, labels, strict=True):
                image, label = split[SampleKey(0, index)]
                planes = row.reshape(3, 32, 32).astype(np.float64) / 255
                for plane, mean, std, seen in zip(
                    planes, MEAN[classes], STD[classes], image.numpy(), strict=True
                ):
                    np.testing.assert_allclose(seen, (plane - mean) / std, atol=1e-6)
                assert label == expected
                index += 1
            seed += 1
        assert len(split) == index


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_files_that_python_3_wrote_are_read(tmp_path, protocol):
    write_cifar(tmp_path, 10)
    pixels, labels = rows(4, 0, 10)
    for key in (bytes, str):
        name = (lambda text: text.encode()) if key is bytes else str
        content = {name("data"): pixels, name("labels"): labels.tolist()}
        with (tmp_path / "test_batch").open("wb") as file:
            pickle.dump(content, file, protocol=protocol)
        found = source("cifar10", tmp_path).val.images
        np.testing.assert_array_equal(found.pixels.reshape(4, -1), pixels)
        assert found.labels.tolist() == labels.tolist()


def test_columns_first_is_the_same_array():
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for order in "CF":
        content = pickle.dumps(np.array(array, order=order), protocol=2)
        np.testing.assert_array_equal(read_plain(content).array(), array)


class Harm:
    """What a pickle may do to who reads it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("place", ["file", "data", "labels"])
def test_code_is_never_run(tmp_path, place):
    write_cifar(tmp_path, 10)
    harm = Harm(tmp_path / "harmed")
    pixels, labels = rows(4, 0, 10)
    content = {b"data": pixels, b"labels": labels.tolist()}
    content = harm if place == "file" else {**content, place.encode(): harm}
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps(content))
    with pytest.raises(
        UserError, match=r"data_batch_3 is damaged.*it asks for posix.mkdir"
    ) as error:
        source("cifar10", tmp_path)
    one_line(error)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("classes", "name"),
    [(10, "data_batch_4"), (10, "test_batch"), (10, "batches.meta"), (100, "train"), (100, "meta")],
)
def test_a_missing_file_is_named(tmp_path, classes, name):
    write_cifar(tmp_path / base(classes), classes)
    (tmp_path / base(classes) / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing: .*--data-dir") as error:
        source(f"cifar{classes}", tmp_path)
    one_line(error)


def damaged() -> dict[str, bytes]:
    pixels, labels = rows(4, 0, 10)
    good = {b"labels": numbers(labels), b"data": old_array(pixels)}
    whole = old_dict(good)
    return {
        "empty": b"",
        "text": b"no pickle\n",
        "cut": whole[:5000],
        "end cut": whole[:-1],
        "no labels": old_dict({b"data": good[b"data"]}),
        "no data": old_dict({b"labels": good[b"labels"]}),
        "a list": b"\x80\x02].",
        "data of another shape": old_dict({**good, b"data": old_array(pixels.reshape(8, -1))}),
        "data of rank 3": old_dict({**good, b"data": old_array(pixels.reshape(4, 3, -1))}),
        "data cut": whole.replace(struct.pack("<i", 3072), struct.pack("<i", 3073)),
        "negative shape": whole.replace(
            b"J" + struct.pack("<i", 3072), b"J" + struct.pack("<i", -1)
        ),
        "data of floats": pickle.dumps({b"labels": [0], b"data": np.zeros((1, 3072))}, protocol=2),
        "fewer labels": old_dict({**good, b"labels": numbers(labels[:3])}),
        "no images": old_dict({b"labels": numbers([]), b"data": old_array(pixels[:0])}),
        "label 10": old_dict({**good, b"labels": numbers([0, 1, 2, 10])}),
        "label -1": old_dict({**good, b"labels": numbers([0, 1, 2, -1])}),
        "label of text": old_dict({**good, b"labels": old_list([old_text(b"cat\n" * 20)] * 4)}),
        "objects": pickle.dumps({b"labels": [0], b"data": np.array([[None] * 3072])}, protocol=2),
    }


@pytest.mark.parametrize("content", damaged().values(), ids=damaged())
def test_a_damaged_file_is_named(tmp_path, content):
    write_cifar(tmp_path, 10)
    (tmp_path / "data_batch_2").write_bytes(content)
    with pytest.raises(UserError, match=r"data_batch_2 is damaged .*replace it") as error:
        source("cifar10", tmp_path)
    assert len(one_line(error)) < 600


@pytest.mark.parametrize("names", [["a"] * 10, NAMES[:9], [*range(10)]])
def test_damaged_class_names_are_named(tmp_path, names):
    write_cifar(tmp_path, 10)
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    with pytest.raises(UserError, match=r"batches.meta is damaged .*does not name 10 classes"):
        source("cifar10", tmp_path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_bytes_are_read_or_refused(data):
    """Damage that a disk or a download makes: bytes changed, cut out, put in."""
    pixels, labels = rows(1, 0, 10)
    content = bytearray(old_dict({b"labels": numbers(labels), b"data": old_array(pixels[:, :40])}))
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    try:
        found = read_plain(bytes(content))
        if isinstance(found, dict) and isinstance(found.get(b"data"), ByteArray):
            found[b"data"].array()
    except (pickle.UnpicklingError, ValueError):
        pass  # as it is told


def test_a_file_that_is_not_the_published_one_is_said(tmp_path, caplog):
    write_cifar(tmp_path, 100)
    source("cifar100", tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / name} is not the published file: its checksum is another"
        for name in ("meta", "train", "test")
    ]


def write_tree(root: Path, classes: list[str], val: str) -> None:
    for split in ("train", val):
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            random_image(number, side=32).save(root / split / name / "0.png")


def test_a_tree_is_cifar_too(tmp_path):
    write_tree(tmp_path, NAMES[:10], "test")
    found = source("cifar10", tmp_path)
    assert (found.name, found.classes) == ("cifar10", tuple(NAMES[:10]))
    image, label = found.val[SampleKey(0, 7)]
    pixels = np.asarray(random_image(7, side=32)) / 255
    expected = (pixels - np.array(MEAN[10])) / np.array(STD[10])
    np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, atol=1e-6)
    assert label == 7


def test_a_tree_of_something_else_is_named(tmp_path):
    write_tree(tmp_path, NAMES[:7], "val")
    with pytest.raises(UserError, match=r"7 classes and CIFAR-100 has 100: .*recipe images"):
        source("cifar100", tmp_path)


@pytest.mark.parametrize("place", [None, "empty", "nowhere"])
def test_no_cifar_says_what_to_do(tmp_path, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "cifar-10-python.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match="--data-dir") as error:
        source("cifar10", place and tmp_path / place)
    one_line(error)

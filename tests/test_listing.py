"""Which image files are found below folders: links, loops, suffixes, and what is no file at all."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pictures import random_image, source
from tritonbnn.data.listing import list_images


@pytest.fixture
def tree(tmp_path) -> Path:
    """Two classes; in train/ two images each, in val/ one each."""
    for split, count in (("train", 2), ("val", 1)):
        for name in ("ant", "bee"):
            for i in range(count):
                write_image(tmp_path / split / name / f"{i}.png")
    return tmp_path


@pytest.fixture
def warnings(caplog):
    """A function that gives the package's warnings so far."""
    caplog.set_level(logging.WARNING, logger="tritonbnn")
    return lambda: [record.getMessage() for record in caplog.records]


def write_image(path: Path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    random_image(0).save(path, **options)


def found(root: Path, *names: str) -> dict[str, list[str]]:
    listing = list_images(root, names or ("",))
    return {name: [os.fsdecode(path) for path in paths] for name, paths in listing.paths.items()}


OWN = {"ant": ["ant/0.png", "ant/1.png"], "bee": ["bee/0.png", "bee/1.png"]}


@pytest.mark.parametrize(
    "links",
    [
        {"ant/up": ".."},
        {"ant/up": "..", "bee/up": ".."},
        {"ant/self": "."},
        {"bee/self": "self"},
        {"ant/bee": "../bee"},
        {"ant/above": "../.."},
        {"ant/far": "/"},
        {"ant/a": "../bee", "bee/b": "../ant"},
    ],
    ids=str,
)
def test_a_link_back_brings_no_image_again(tree, warnings, links):
    for link, target in links.items():
        (tree / "train" / link).symlink_to(target)
    opened = source("images", tree)
    names = [
        str(path.relative_to(tree / "train")) for path in map(opened.train.images.path, range(4))
    ]
    assert names == OWN["ant"] + OWN["bee"]
    assert opened.train.images.labels.tolist() == [0, 0, 1, 1]
    if links == {"bee/self": "self"}:  # a link to no folder at all
        assert "other files passed over: 1" in warnings()[0]
    else:
        assert len(warnings()) == 1
        assert f"links not followed: {len(links)}" in warnings()[0]
        assert str(tree / "train" / min(links)) in warnings()[0]


def test_folders_elsewhere_are_followed_once(tree, tmp_path):
    write_image(tmp_path / "pool" / "deep" / "x.png")
    for link in ("ant/more", "ant/again", "bee/more"):
        (tree / "train" / link).symlink_to(tmp_path / "pool")
    assert found(tree / "train", "ant", "bee") == {
        "ant": ["ant/0.png", "ant/1.png", "ant/again/deep/x.png"],
        "bee": OWN["bee"],
    }


def test_class_folders_that_are_links_keep_their_own_images(tmp_path):
    for name in ("ant", "bee"):
        write_image(tmp_path / "pool" / name / "x.png")
        (tmp_path / "pool" / name / "up").symlink_to("..")
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / name).symlink_to(tmp_path / "pool" / name)
    expected = {"ant": ["ant/x.png"], "bee": ["bee/x.png"]}
    assert found(tmp_path / "train", "ant", "bee") == expected


@pytest.mark.parametrize("seed", range(20))
def test_any_links_give_every_real_file_once_and_a_class_its_own(tmp_path, seed):
    random = np.random.default_rng(seed)
    folders = [tmp_path / "train" / "ant", tmp_path / "train" / "bee", tmp_path / "pool"]
    for number in range(12):
        folders.append(folders[random.integers(len(folders))] / f"folder{number}")
    for folder in folders:
        write_image(folder / "x.png")
    for number in range(15):
        place, target = (folders[random.integers(len(folders))] for _ in range(2))
        target = target if random.random() < 0.7 else target.parent
        (place / f"link{number}").symlink_to(os.path.relpath(target, place))
    listed = found(tmp_path / "train", "ant", "bee")
    real = [(tmp_path / "train" / path).resolve() for paths in listed.values() for path in paths]
    assert len(set(real)) == len(real)
    for name, paths in listed.items():
        own = {
            str(p.relative_to(tmp_path / "train")) for p in tmp_path.glob(f"train/{name}/**/x.png")
        }
        own = {path for path in own if "link" not in path}
        assert own <= set(paths)
        others = {(tmp_path / "train" / p).resolve() for p in set(paths) - own}
        assert all(path.is_relative_to(tmp_path / "pool") for path in others)


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "gif", "avif", "jp2", "tga", "PNG", "dib"])
def test_what_pillow_opens_is_an_image(tmp_path, suffix):
    write_image(tmp_path / f"x.{suffix}")
    assert found(tmp_path) == {"": [f"x.{suffix}"]}


def test_files_without_a_suffix_are_known_by_their_content(tmp_path):
    write_image(tmp_path / "image", format="JPEG")
    (tmp_path / "words").write_text("no image")
    (tmp_path / "nothing").write_bytes(b"")
    listing = list_images(tmp_path)
    assert listing.paths == {"": [b"image"]}
    assert listing.passed_over == {"no suffix": 2}


def test_what_is_passed_over_is_one_line_a_split(tree, warnings):
    for name in ("a.heic", "b.HEIC", "c.txt", "d"):
        (tree / "train" / "ant" / name).write_text("x")
    (tree / "train" / "ant" / ".hidden.txt").write_text("x")
    (tree / "val" / "bee" / "e.eps").write_text("x")
    source("images", tree)
    assert warnings() == [
        f"{tree / 'train'}: 4 images; other files passed over: 4"
        " (.heic 2, .txt 1, no suffix 1); convert those that are images",
        f"{tree / 'val'}: 2 images; other files passed over: 1 (.eps 1);"
        " convert those that are images",
    ]


def test_pipes_are_no_files_and_links_to_nothing_are_named_when_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    listing = list_images(tmp_path)
    assert listing.paths == {"": [b"gone.png"]}
    assert listing.passed_over == {"no plain file": 2}


def test_names_of_any_bytes_are_found(tmp_path):
    name = b"caf\xe9.png"
    Image.new("RGB", (1, 1)).save(tmp_path / "x.png")
    os.rename(tmp_path / "x.png", os.fsencode(tmp_path) + b"/" + name)  # noqa: PTH104
    assert list_images(tmp_path).paths == {"": [name]}

"""Flat validation splits: they are recognised, and sorted into class folders by hard links."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.commands import Result, run
from tests.pictures import one_line, random_image, source
from tritonbnn.cli import UserError
from tritonbnn.data.sources import SampleKey

SORT = "tritonbnn.sort_val"
WNIDS = ("n01440764", "n01443537", "n03444034")
LABELS = [WNIDS[i % 3] for i in (2, 0, 1, 1, 2, 0, 0, 2, 1)]  # of the images in order


@pytest.fixture
def root(tmp_path) -> Path:
    for number, name in enumerate(WNIDS):
        (tmp_path / "train" / name).mkdir(parents=True)
        random_image(number).save(tmp_path / "train" / name / f"{name}_0.JPEG")
    return tmp_path


def write_flat(place: Path, name: str = "ILSVRC2012_val_{:08}.JPEG", first: int = 1) -> list[str]:
    place.mkdir(parents=True)
    names = [name.format(first + index) for index in range(len(LABELS))]
    for index, file in enumerate(names):
        random_image(50 + index).save(place / file)
    return names


def sort(*argv: object, cwd: Path) -> Result:
    return run(SORT, *argv, cwd=cwd)


def assert_sorted(root: Path, names: list[str], old: Path, where: str = "val") -> None:
    """Every image is in its class folder, is the same file as before, and is trained on."""
    for name, label in zip(names, LABELS, strict=True):
        assert (root / where / label / name).samefile(old / name)
    assert sum(1 for path in (root / where).rglob("*") if path.is_file()) == len(names)
    if where != "val":
        return
    found = source("images", root, image_size=8)
    assert found.classes == WNIDS
    seen = [found.val[SampleKey(0, index)][1] for index in range(len(found.val))]
    assert np.bincount(seen).tolist() == [3, 3, 3]


def assert_refused(result: Result, *words: str) -> None:
    assert result.code == 2, result.output
    [line] = result.output.splitlines()
    for word in ("error: ", *words):
        assert word in line


def test_tiny_imagenet(root: Path):
    names = write_flat(root / "val" / "images", "val_{}.JPEG", 0)
    lines = [f"{n}\t{label}\t0\t32\t44\t62" for n, label in zip(names, LABELS, strict=True)]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError) as error:
        source("images", root)
    told = one_line(error)
    command = f"python -m tritonbnn.sort_val {root / 'val'}"
    assert f"{command} puts them into class folders, as val_annotations.txt says" in told
    assert f"{root / 'val' / 'images'} has 9 images in one folder" in told
    result = sort("val", cwd=root)
    assert result.code == 0, result.output
    assert "9 images in 3 class folders, 3 to 3 each" in result.output
    assert_sorted(root, names, root / "val-flat" / "images")


def test_imagenet_of_kaggle(root: Path):
    names = write_flat(root / "val")
    lines = [
        f"{Path(n).stem},{label} 85 1 499 272 {label} 1 2 3 4 "
        for n, label in zip(names, LABELS, strict=True)
    ]
    shuffled = np.random.default_rng(0).permutation(lines).tolist()
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *shuffled]))
    with pytest.raises(UserError, match=r"as LOC_val_solution\.csv says"):
        source("images", root)
    assert sort(root / "val", cwd=root).code == 0
    assert_sorted(root, names, root / "val-flat")


def test_imagenet_with_numbers(root: Path):
    """The development kit: a number a line, in the order of the images, and names by number."""
    names = write_flat(root / "val")
    kit = root / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    order = [WNIDS[2], WNIDS[0], WNIDS[1]]  # the kit does not sort them
    numbers = [str(order.index(label) + 1) for label in LABELS]
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("\n".join(numbers) + "\n")
    assert_refused(sort("val", cwd=root), "classes as numbers", "--class-names FILE")
    (root / "names.txt").write_text("".join(f"{name} some words\n" for name in order))
    assert sort("val", "--class-names", "names.txt", cwd=root).code == 0
    assert_sorted(root, names, root / "val-flat")


def test_the_development_kits_own_names(root: Path):
    io = pytest.importorskip("scipy.io")
    names = write_flat(root / "val")
    order = [WNIDS[2], WNIDS[0], WNIDS[1]]
    kind = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)]
    synsets = np.zeros((4, 1), kind)
    for place, (number, name) in enumerate(
        [(3, order[2]), (1, order[0]), (2, order[1]), (4, "n0")]
    ):
        synsets[place, 0] = (float(number), name, "fish, shark")
    io.savemat(root / "meta.mat", {"synsets": synsets})
    (root / "ILSVRC2012_validation_ground_truth.txt").write_text(
        "\n".join(str(order.index(label) + 1) for label in LABELS)
    )
    assert sort("val", cwd=root).code == 0
    assert_sorted(root, names, root / "val-flat")
    (root / "meta.mat").write_bytes(b"MATLAB")
    shutil.rmtree(root / "val")
    (root / "val-flat").rename(root / "val")
    assert_refused(sort("val", cwd=root), "meta.mat is not")


def test_names_alone_in_the_images_order(root: Path):
    names = write_flat(root / "val")
    (root / "labels").write_text("\n".join(LABELS))
    assert sort("val", "--labels", "labels", cwd=root).code == 0
    assert_sorted(root, names, root / "val-flat")


def test_another_place_leaves_all_as_it_is(root: Path):
    names = write_flat(root / "flat")
    (root / "labels").write_text("\n".join(f"{n} {c}" for n, c in zip(names, LABELS, strict=True)))
    assert sort("flat", "--labels", "labels", "--out", "new/val", cwd=root).code == 0
    assert_sorted(root, names, root / "flat", "new/val")
    assert sorted(path.name for path in (root / "new").iterdir()) == ["val"]
    assert_refused(
        sort("flat", "--labels", "labels", "--out", "new/val", cwd=root), "exists", "--out"
    )


def test_a_link_to_the_folder_stays_a_link(root: Path, tmp_path: Path):
    names = write_flat(root / "disk" / "flat")
    (root / "val").symlink_to(root / "disk" / "flat")
    (root / "labels").write_text("\n".join(LABELS))
    assert sort("val", "--labels", "labels", cwd=root).code == 0
    assert (root / "val").is_symlink()
    assert_sorted(root, names, root / "disk" / "flat-flat")


def test_what_an_interrupted_call_left_is_made_anew(root: Path):
    names = write_flat(root / "val")
    (root / "labels").write_text("\n".join(LABELS))
    (root / "val-sorting" / WNIDS[0]).mkdir(parents=True)
    (root / "val-sorting" / WNIDS[0] / names[0]).hardlink_to(root / "val" / names[0])
    assert sort("val", "--labels", "labels", cwd=root).code == 0
    assert_sorted(root, names, root / "val-flat")
    (root / "val").rename(root / "val-sorting")
    assert_refused(sort("val", "--labels", "labels", cwd=root), "val-flat", "interrupted")


def spoiled(root: Path, names: list[str]) -> dict[str, tuple[str, list[str]]]:
    whole = [f"{name} {label}" for name, label in zip(names, LABELS, strict=True)]
    return {
        "missing": ("\n".join(whole[:-1]), [f"does not say the class of {names[-1]}"]),
        "two classes": ("\n".join([*whole, f"{names[0]} {WNIDS[0]}"]), ["two classes"]),
        "other class": ("\n".join([*whole[:-1], f"{names[-1]} n9"]), ["n9", "not in train/"]),
        "too few": ("\n".join(LABELS[:-1]), ["has 8 lines and there are 9 images"]),
        "empty": ("", ["does not say the class"]),
        "no text": ("\0\xff", ["no text"]),
        "a number too high": ("\n".join("4" * 9), ["the number 4", "names 3 classes"]),
        "a number of 0": ("\n".join("0" * 9), ["the number 0"]),
    }


@pytest.mark.parametrize("kind", spoiled(Path(), [""] * 9))
def test_labels_that_do_not_fit_change_nothing(root: Path, kind: str):
    names = write_flat(root / "val")
    text, words = spoiled(root, names)[kind]
    (root / "labels").write_bytes(text.encode("latin-1"))
    (root / "names.txt").write_text("\n".join(WNIDS))
    before = sorted(root.rglob("*"))
    argv = ["val", "--labels", "labels"]
    if "number" in kind:
        argv += ["--class-names", "names.txt"]
    assert_refused(sort(*argv, cwd=root), *words)
    assert sorted(path for path in root.rglob("*") if path.name != "output.txt") == before


def test_a_class_cannot_lead_elsewhere(root: Path):
    shutil.rmtree(root / "train")
    names = write_flat(root / "val")
    (root / "labels").write_text("\n".join(f"{name} ../up" for name in names))
    assert_refused(sort("val", "--labels", "labels", cwd=root), "'../up'", "cannot name a folder")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere"], "nowhere is not a folder"),
        (["train"], "it seems to be sorted"),
        (["val"], "no file near val says the classes"),
        (["val", "--labels", "nowhere"], "cannot read nowhere"),
        (["empty"], "0 images and 0 folders"),
    ],
)
def test_bad_arguments_are_one_line(root: Path, argv: list[str], words: str):
    write_flat(root / "val")
    (root / "empty").mkdir()
    assert_refused(sort(*argv, cwd=root), words)


def test_a_flat_split_without_labels_names_the_remedy(root: Path):
    write_flat(root / "val")
    with pytest.raises(UserError) as error:
        source("images", root)
    told = one_line(error)
    assert f"{root / 'val'} has 9 images in one folder, without class folders" in told
    assert f"python -m tritonbnn.sort_val {root / 'val'} --labels FILE" in told

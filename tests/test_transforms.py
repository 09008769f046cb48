"""Transforms, against torchvision's own, PIL and closed forms."""

import random
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv

from tritonbnn.data.splits import GREY, IMAGENET
from tritonbnn.data.views import TrainView, eval_view, sample_seed, seeded

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMALISE = tv.Compose([tv.ToTensor(), tv.Normalize(MEAN, STD)])


def photo(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def flat(level: int, size: int = 40) -> Image.Image:
    return Image.new("RGB", (size, size), (level, level, level))


def train_view(augment: str, lighting: str, size: int, image: Image.Image, seed: int):
    """A normalised view of an image, drawn with a seed."""
    with seeded(seed):
        view = TrainView(augment, lighting, size)(image)
    return IMAGENET(view[None])[0]


def fixed_view(augment: str, size: int, image: Image.Image):
    view = eval_view(augment, size)(image)
    assert view.dtype == torch.uint8
    return (IMAGENET if len(view) == 3 else GREY)(view[None])[0]


def grey_levels(x: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation."""
    return (x * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255


@pytest.mark.parametrize("size", [(300, 200), (50, 400), (7, 5), (1, 1)])
def test_imagenet_view_is_torchvisions_when_equally_seeded(size):
    image = photo(*size)
    oracle = tv.Compose([tv.RandomResizedCrop(64), tv.RandomHorizontalFlip(), NORMALISE])
    for seed in range(20):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            expected = oracle(image)
        assert torch.equal(train_view("imagenet", "none", 64, image, seed), expected)


@pytest.mark.parametrize("flips", [[], [tv.RandomHorizontalFlip()]])
def test_crop_and_flip_are_torchvisions_when_equally_seeded(flips):
    image = photo(32, 32)
    oracle = tv.Compose([tv.RandomCrop(32, padding=4), *flips, NORMALISE])
    augment = "crop-flip" if flips else "crop"
    for seed in range(20):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            expected = oracle(image)
        assert torch.equal(train_view(augment, "none", 32, image, seed), expected)


@pytest.mark.parametrize("lighting", ["published", "pca"])
@pytest.mark.parametrize("tensor", [False, True])
def test_the_noise_is_drawn_between_crop_and_flip(lighting, tensor):
    """Written out by hand; the numbers of the noise are Krizhevsky's, in their published order."""
    image = photo(60, 50)
    values = torch.tensor([0.2175, 0.0188, 0.0045], dtype=torch.float64)
    vectors = torch.tensor(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]],
        dtype=torch.float64,
    )
    flips = set()
    for seed in range(20):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            levels = tv.functional.pil_to_tensor(tv.RandomResizedCrop(32)(image)).double()
            shift = vectors @ (torch.randn(3, dtype=torch.float64) * 0.1 * values)
            flip = torch.rand(1).item() < 0.5
        flips.add(flip)
        if lighting == "published":
            levels = (levels + shift.view(3, 1, 1)).clamp(0, 255).floor()
            expected = levels / 255
        else:
            expected = levels / 255 + shift.view(3, 1, 1)
        expected = expected.flip(-1) if flip else expected
        given = tv.functional.pil_to_tensor(image) if tensor else image
        with seeded(seed):
            seen = TrainView("imagenet", lighting, 32)(given)
        seen = seen.double() / 255 if lighting == "published" else seen.double()
        torch.testing.assert_close(seen, expected, atol=1e-6, rtol=0)
    assert flips == {False, True}


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (40, 500), (224, 224), (1, 1)])
def test_imagenet_eval_view_is_resize_256_crop_224(size):
    image = photo(*size)
    oracle = tv.Compose([tv.Resize(256), tv.CenterCrop(224), NORMALISE])
    assert torch.equal(fixed_view("imagenet", 224, image), oracle(image))


@pytest.mark.parametrize("size", [(330, 20), (20, 330), (7, 500), (500, 7), (3, 50), (1, 17)])
@pytest.mark.parametrize("augment", ["imagenet", "none"])
def test_a_thin_image_gives_what_resize_and_crop_give_to_a_grey_level(augment, size):
    image = photo(*size)
    resized = tv.Resize(256 if augment == "imagenet" else 224)(image)
    expected = np.asarray(tv.CenterCrop(224)(resized)).astype(int)
    levels = grey_levels(fixed_view(augment, 224, image)).round().int()
    assert np.abs(levels.permute(1, 2, 0).numpy() - expected).max() <= 1


@pytest.fixture
def little_memory():
    """Room for 300 MB more than the process has by now, and a MemoryError beyond."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    more = pages * resource.getpagesize() + 300_000_000
    resource.setrlimit(resource.RLIMIT_AS, (more, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("size", [(12_000, 1), (1, 12_000), (1, 60_000), (60_000, 2)])
@pytest.mark.parametrize("augment", ["imagenet", "crop-flip", "none"])
def test_a_very_thin_image_takes_no_more_memory_than_its_view(little_memory, augment, size):
    image = flat(77).resize(size)
    for view in (
        fixed_view(augment, 224, image),
        train_view(augment, "none", 224, image, 0),
    ):
        assert view.shape == (3, 224, 224)
    assert (grey_levels(fixed_view(augment, 224, image)).round() == 77).all()


@pytest.mark.parametrize("augment", ["crop-flip", "crop", "none"])
def test_small_images_keep_their_borders_in_evaluation(augment):
    image = photo(32, 32, mode="L")
    expected = (torch.from_numpy(np.array(image)).float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(fixed_view(augment, 32, image)[0], expected)


def test_augment_none_trains_on_the_evaluation_view():
    image = photo(50, 40)
    view = train_view("none", "none", 32, image, 3)
    assert torch.equal(view, fixed_view("none", 32, image))


def test_published_lighting_drops_one_grey_level_half_the_time():
    drops = []
    for seed in range(400):
        view = grey_levels(train_view("none", "published", 40, flat(100), seed))
        levels = view.round()
        torch.testing.assert_close(view, levels, atol=1e-3, rtol=0)
        assert (levels == levels[:, :1, :1]).all()
        drops.append((100 - levels[:, 0, 0]).tolist())
    drops = np.array(drops)
    assert set(drops.ravel()) == {0, 1}
    # 400 draws at probability 1/2: four standard deviations are 0.1
    assert abs(drops.mean(axis=0) - 0.5).max() < 0.1
    together = (drops == drops[:, :1]).all(axis=1).mean()
    assert together > 0.85


@pytest.mark.parametrize("level", [0, 255])
def test_published_lighting_clips_before_it_truncates(level):
    seen = set()
    for seed in range(40):
        view = grey_levels(train_view("none", "published", 40, flat(level), seed))
        seen |= set(view.round().int().unique().tolist())
    assert seen == ({0} if level == 0 else {254, 255})


def test_pca_lighting_has_the_published_covariance():
    shifts = torch.stack(
        [
            grey_levels(train_view("none", "pca", 1, flat(128, 1), seed))[:, 0, 0]
            for seed in range(3000)
        ]
    )
    values = np.array([0.2175, 0.0188, 0.0045])
    vectors = np.array(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    expected = vectors @ np.diag((values * 0.1) ** 2) @ vectors.T
    found = np.cov((shifts.numpy() / 255).T)
    # the standard error of a variance over 3000 draws is 2.6 %
    np.testing.assert_allclose(found, expected, rtol=0.12)
    # 4 standard errors of the mean shift, 0.0125 * 255 / sqrt(3000)
    assert (shifts.mean(0) - 128).abs().max() < 0.24


def test_the_flip_is_fair():
    left = Image.fromarray(np.repeat(np.uint8([[[255] * 3, [0] * 3]]), 2, axis=0))
    flips = [bool(train_view("crop-flip", "none", 2, left, s)[0, 0, 1] > 0) for s in range(400)]
    assert abs(np.mean(flips) - 0.5) < 0.1


def test_a_sample_depends_on_its_four_numbers_and_on_nothing_else():
    image = photo(60, 60)
    view = train_view("imagenet", "pca", 32, image, sample_seed(1, 2, 3, 4))
    torch.manual_seed(99)
    assert torch.equal(train_view("imagenet", "pca", 32, image, sample_seed(1, 2, 3, 4)), view)
    for other in [(0, 2, 3, 4), (1, 1, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)]:
        assert not torch.equal(train_view("imagenet", "pca", 32, image, sample_seed(*other)), view)


@pytest.mark.parametrize("augment", ["imagenet", "crop-flip"])
def test_no_global_generator_is_touched(augment):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    train_view(augment, "pca", 32, photo(50, 50), sample_seed(0, 1, 0, 0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]

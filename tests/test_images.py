"""Reading one image file, against PIL's and numpy's idea of its pixels."""

import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.pictures import one_line, random_image, spoil_image
from tritonbnn.cli import UserError
from tritonbnn.data.images import BadImageError, Decoding, load_image

BAD = ["empty", "text", "truncated"]


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "webp"])
@pytest.mark.parametrize("how", BAD)
def test_a_bad_image_is_named_in_one_line(tmp_path, how, suffix):
    path = tmp_path / f"x.{suffix}"
    random_image(0, side=64).save(path)
    spoil_image(path, how)
    with pytest.raises(BadImageError) as error:
        load_image(path, 3)
    assert str(path) in one_line(error)
    copy = pickle.loads(pickle.dumps(error.value))
    assert (type(copy), str(copy)) == (BadImageError, str(error.value))


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(UserError, match=r"x\.jpg cannot be read .*No such file"):
        load_image(tmp_path / "x.jpg", 3)


def test_grey_and_one_pixel_images_load(tmp_path):
    path = tmp_path / "x.png"
    Image.new("L", (1, 1), 77).save(path)
    assert np.asarray(load_image(path, 3)).tolist() == [[[77, 77, 77]]]
    assert np.asarray(load_image(path, 1)).tolist() == [[77]]


def test_cmyk_images_load(tmp_path):
    path = tmp_path / "x.tif"
    Image.new("CMYK", (2, 2), (255, 0, 0, 0)).save(path)
    assert np.asarray(load_image(path, 3))[0, 0].tolist() == [0, 255, 255]
    path = tmp_path / "x.jpg"
    Image.new("CMYK", (8, 8), (0, 255, 0, 0)).save(path, quality=100)
    np.testing.assert_allclose(np.asarray(load_image(path, 3))[4, 4], [255, 0, 255], atol=3)


@pytest.mark.filterwarnings("error")
def test_transparent_palettes_are_laid_over_the_background(tmp_path):
    path = tmp_path / "x.png"
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    image.save(path, transparency=bytes([0, 51]))
    pixels = np.asarray(load_image(path, 3, Decoding(background="#6478ff"))).tolist()
    # 0 of 255, 51 of 255 (a fifth) and all of the colour
    assert pixels == [[[100, 120, 255], [88, 106, 216], [70, 80, 90]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_colours_under_full_transparency_are_not_seen(tmp_path, mode):
    """Editors leave any colours there, which are no part of the image."""
    seen = []
    for hidden in (0, 200):
        grey_levels = np.full((2, 2), hidden, np.uint8)
        grey_levels[0, 0] = 9
        alpha = np.zeros((2, 2), np.uint8)
        alpha[0, 0] = 255
        bands = [grey_levels] * (3 if mode == "RGBA" else 1)
        Image.fromarray(np.dstack([*bands, alpha]), mode).save(tmp_path / "x.png")
        for channels in (1, 3):
            for background, level in (("white", 255), ("black", 0)):
                image = load_image(tmp_path / "x.png", channels, Decoding(background=background))
                pixels = np.asarray(image).reshape(4, -1)
                assert (pixels[0] == 9).all()
                assert (pixels[1:] == level).all()
        seen.append(np.asarray(load_image(tmp_path / "x.png", 3)).tolist())
    assert seen[0] == seen[1]


def test_one_transparent_colour_is_transparent(tmp_path):
    Image.fromarray(np.uint8([[7, 8]])).save(tmp_path / "x.png", transparency=7)
    assert np.asarray(load_image(tmp_path / "x.png", 1)).tolist() == [[255, 8]]
    image = Image.fromarray(np.uint8([[[1, 2, 3], [3, 2, 1]]]))
    image.save(tmp_path / "x.png", transparency=(3, 2, 1))
    assert np.asarray(load_image(tmp_path / "x.png", 3)).tolist() == [[[1, 2, 3], [255] * 3]]


@pytest.mark.parametrize("white", [255, 1023, 4095, 16383, 65535, 3000])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_by_its_white_level(tmp_path, suffix, white):
    levels = np.append(np.random.default_rng(0).integers(0, white + 1, 500), [0, white])
    Image.fromarray(levels[None].astype(np.uint16)).save(tmp_path / f"x.{suffix}")
    found = np.asarray(load_image(tmp_path / f"x.{suffix}", 1, Decoding(white_level=white)))[0]
    exact = levels * 255 / white
    assert np.abs(found - exact).max() <= 0.5
    assert (found[-2], found[-1]) == (0, 255)


def test_a_level_beyond_white_is_no_level(tmp_path):
    Image.fromarray(np.uint16([[5000]])).save(tmp_path / "x.png")
    with pytest.raises(BadImageError, match=r"5000 where 4095 is white.*--white-level") as error:
        load_image(tmp_path / "x.png", 3, Decoding(white_level=4095))
    one_line(error)


@pytest.mark.parametrize(
    "setting", [{"white_level": 0}, {"white_level": 65536}, {"background": "whitish"}]
)
def test_impossible_decodings_are_refused(setting):
    (name, value), *_ = setting.items()
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}.*{value}") as error:
        Decoding(**setting)
    one_line(error)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_images_are_scaled(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    levels = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], np.uint16)
    Image.fromarray(levels).save(path)
    expected = np.rint(levels / 257).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(load_image(path, 1)), expected)
    np.testing.assert_array_equal(np.asarray(load_image(path, 3))[..., 2], expected)


def test_32_bit_images_hold_16_bit_levels(tmp_path):
    path = tmp_path / "x.tif"
    Image.fromarray(np.array([[0, 257, 65535]], np.int32)).save(path)
    assert np.asarray(load_image(path, 1)).tolist() == [[0, 1, 255]]


@pytest.mark.parametrize(
    "pixels",
    [np.array([[65536]], np.int32), np.array([[-1]], np.int32), np.array([[0.5]], np.float32)],
)
def test_pixels_without_an_8_bit_meaning_are_refused(tmp_path, pixels):
    path = tmp_path / "x.tif"
    Image.fromarray(pixels).save(path)
    with pytest.raises(BadImageError, match=r"x\.tif"):
        load_image(path, 3)


def write_png_header(path, width, height):
    """The beginning of a PNG of any size, and no pixel."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 100) + b"IDAT")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(11_000, 10_000), (20_000, 20_000), (1_000_000, 1_000_000)])
def test_a_small_file_of_too_many_pixels_is_refused_before_they_are_decoded(tmp_path, size):
    write_png_header(tmp_path / "x.png", *size)
    with pytest.raises(BadImageError, match=r"x\.png .*pixels") as error:
        load_image(tmp_path / "x.png", 3)
    one_line(error)


def test_an_animation_is_its_first_image(tmp_path):
    frames = [Image.new("L", (2, 2), level) for level in (10, 200)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(load_image(tmp_path / "x.gif", 1)).tolist() == [[10, 10], [10, 10]]


def test_postscript_is_never_run(tmp_path):
    """Pillow would hand it to Ghostscript, whatever its suffix."""
    (tmp_path / "x.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(BadImageError, match="no image format"):
        load_image(tmp_path / "x.png", 3)


def test_exif_orientation_is_ignored(tmp_path):
    path = tmp_path / "x.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    random_image(0).save(path, exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(path, 3)), np.asarray(random_image(0)))

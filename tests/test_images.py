"""Reading one image file, against PIL's and numpy's idea of its pixels."""

import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.pictures import one_line, random_image, spoil_image
from tritonbnn.cli import UserError
from tritonbnn.data.images import BadImageError, load_image

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
def test_palette_images_with_transparency_load(tmp_path):
    path = tmp_path / "x.png"
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(path, transparency=bytes([0, 128]))
    assert np.asarray(load_image(path, 3)).tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_alpha_is_dropped(tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGBA", (1, 1), (9, 8, 7, 0)).save(path)
    assert np.asarray(load_image(path, 3)).tolist() == [[[9, 8, 7]]]
    Image.new("LA", (1, 1), (9, 0)).save(path)
    assert np.asarray(load_image(path, 1)).tolist() == [[9]]


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

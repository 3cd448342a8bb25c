"""Decoding: orientation, bit depths, what cannot be decoded and how it is named."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from timm_sugar.data import BadImageError, LabelledImages, readable
from timm_sugar.data.images import to_rgb


def _file(image, kind, **options):
    stored = io.BytesIO()
    image.save(stored, kind, **options)
    return stored.getvalue()


def _labelled(*stored):
    rows = np.arange(len(stored))
    return LabelledImages(lambda row: to_rgb(stored[row]), rows, rows, "file {}".format)


# The corners of a picture of 2 rows, top row first, as a viewer shows them for each orientation.
UPRIGHT = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
STORED = {
    1: UPRIGHT, 2: UPRIGHT[:, ::-1], 3: UPRIGHT[::-1, ::-1], 4: UPRIGHT[::-1],
    5: UPRIGHT.T, 6: UPRIGHT.T[::-1], 7: UPRIGHT[::-1, ::-1].T, 8: UPRIGHT.T[:, ::-1],
}  # fmt: skip


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_orientation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    # Squares of 16 pixels survive JPEG.
    stored = np.kron(STORED[orientation], np.ones((16, 16), np.uint8))
    image = to_rgb(_file(Image.fromarray(stored).convert("RGB"), kind, exif=exif, quality=95))
    assert image.size == (48, 32)
    np.testing.assert_allclose(np.asarray(image)[8::16, 8::16, 0], UPRIGHT, atol=2)


def test_exif_that_is_damaged_or_out_of_range_changes_nothing():
    image = Image.fromarray(UPRIGHT)
    exif = Image.Exif()
    exif[0x0112] = 9
    for damaged in (exif, b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nothing of the kind"):
        np.testing.assert_array_equal(np.asarray(to_rgb(_file(image, "PNG", exif=damaged)))[:, :, 0], UPRIGHT)


def _pgm(pixels):
    return b"P5 %d %d 65535\n" % pixels.shape[::-1] + pixels.astype(">u2").tobytes()


@pytest.mark.parametrize(
    "write", [lambda p: _file(Image.fromarray(p), "PNG"), lambda p: _file(Image.fromarray(p), "TIFF"), _pgm]
)
def test_sixteen_bits_are_scaled_to_eight(write):
    pixels = np.array([[0, 257, 128 * 257, 65535], [100, 200, 30000, 50000]], np.uint16)
    image = to_rgb(write(pixels))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.round(pixels / 257).astype(np.uint8)[:, :, None].repeat(3, 2))


def _tiff(pixels, *tags):
    """A TIFF file written by hand, of float32 or int32 pixels, with tags (number, value) of the pixels' type."""
    kind, code = {"f": (3, 11), "i": (2, 9)}[pixels.dtype.kind]  # SampleFormat, and type of a tag
    height, width = pixels.shape
    fields = [
        (256, 3, width), (257, 3, height), (258, 3, 32), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1),
        (278, 3, height), (279, 4, pixels.nbytes), (339, 3, kind), *((tag, code, value) for tag, value in tags),
    ]  # fmt: skip
    entries = b"".join(
        struct.pack("<HHI", tag, kind, 1) + struct.pack({3: "<Hxx", 4: "<I", 9: "<i", 11: "<f"}[kind], value)
        for tag, kind, value in sorted(fields)
    )
    directory = struct.pack("<H", len(fields)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8 + pixels.nbytes) + pixels.tobytes() + directory


@pytest.mark.parametrize(
    ("pixels", "least", "largest"),
    [
        (np.array([[0, 0.25], [1, 2]], np.float32), 0.0, 1.0),
        (np.array([[-1, 0], [0.5, 1]], np.float32), -1.0, 1.0),
        (np.array([[0, 1000], [2000, 4000]], np.int32), 0, 4000),
    ],
)
def test_thirty_two_bits_are_scaled_from_the_range_that_the_file_names(pixels, least, largest):
    image = to_rgb(_tiff(pixels, (340, least), (341, largest)))
    expected = np.clip(np.round((pixels - least) / (largest - least) * 255), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(image), expected[:, :, None].repeat(3, 2))


@pytest.mark.parametrize(
    ("pixels", "kind"),
    [(np.array([[0, 0.5]], np.float32), "floats"), (np.array([[0, 70000]], np.int32), "32-bit integers")],
)
def test_pixels_of_unknown_range_are_refused_by_name(pixels, kind):
    images = _labelled(_file(Image.fromarray(pixels), "TIFF"))
    with pytest.raises(BadImageError, match=f"image file 0 cannot be decoded: its pixels are {kind} of unknown range"):
        images[0]
    with pytest.raises(BadImageError, match="their range, 1 to 1, is empty"):
        _labelled(_tiff(pixels, (340, 1), (341, 1)))[0]


def test_pixels_that_are_not_finite_are_refused():
    with pytest.raises(BadImageError, match="its pixels are not all finite"):
        _labelled(_tiff(np.array([[0, np.nan]], np.float32), (340, 0.0), (341, 1.0)))[0]


RED = Image.new("RGB", (8, 8), (200, 10, 10))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode):
    grey = mode in ("1", "L", "LA", "I;16")
    if mode == "I;16":
        stored = _file(Image.fromarray(np.full((8, 8), 67 * 257, np.uint16)), "PNG")
    else:
        stored = _file(RED.convert(mode), "TIFF" if mode == "CMYK" else "PNG")
    image = to_rgb(stored)
    assert image.mode == "RGB"
    expected = (0, 0, 0) if mode == "1" else (67, 67, 67) if grey else (200, 10, 10)
    if mode != "1":  # dithered
        np.testing.assert_allclose(image.getpixel((3, 3)), expected, atol=60 if mode == "P" else 3)


def test_palette_and_grey_with_transparency():
    palette = to_rgb(_file(RED.quantize(4), "PNG", transparency=b"\x80\xff"))
    assert (palette.mode, palette.getpixel((3, 3))) == ("RGB", (200, 10, 10))
    assert to_rgb(_file(RED.convert("LA"), "PNG")).mode == "RGB"


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_counts(kind):
    stored = _file(RED, kind, save_all=True, append_images=[Image.new("RGB", (8, 8), (0, 0, 255))])
    np.testing.assert_allclose(to_rgb(stored).getpixel((3, 3)), (200, 10, 10), atol=3)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))


def _bomb():
    """A PNG file of some hundred bytes that claims to have 900 million pixels."""
    stored = bytearray(_file(RED, "PNG"))
    header = b"IHDR" + struct.pack(">II", 30_000, 30_000) + stored[24:29]
    stored[12:29] = header
    stored[29:33] = struct.pack(">I", zlib.crc32(header))
    return bytes(stored)


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        (b"", "it is empty; repair or remove it"),
        (b"not an image", "it is not in a format that Pillow reads; "),
        (_file(NOISE, "PNG")[:600], "image file is truncated"),
        (_file(NOISE, "JPEG")[:-100], "image file is truncated"),
        (_bomb(), r"Image size \(900000000 pixels\) exceeds limit"),
    ],
    ids=["empty", "text", "PNG cut short", "JPEG cut short", "bomb"],
)
def test_what_cannot_be_decoded_is_named_in_one_line_and_found(stored, reason):
    images = _labelled(_file(RED, "PNG"), stored)
    with pytest.raises(BadImageError, match=f"^image file 1 cannot be decoded: .*({reason})") as caught:
        images[1]
    assert "\n" not in str(caught.value)
    assert readable(images).tolist() == [0]


def test_a_file_that_cannot_be_read_is_not_left_out_as_a_bad_image(tmp_path):
    images = LabelledImages(
        lambda row: to_rgb((tmp_path / "away.png").read_bytes()), np.arange(1), np.arange(1), lambda row: "away.png"
    )
    with pytest.raises(BadImageError, match=r"^image away\.png cannot be read: No such file or directory$"):
        readable(images)

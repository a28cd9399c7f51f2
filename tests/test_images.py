"""Pictures of every Pillow mode and file kind become RGB by the rule that shared/data/images.py states."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from shared.data.images import MAX_ASPECT_RATIO, decode_rgb, doubt, to_rgb
from shared.errors import DataError

ALL_MODES = [
    *("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"),
    *("I", "I;16", "I;16B", "I;16L", "I;16N", "F"),
]
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("mode", ALL_MODES)
def test_every_mode_becomes_rgb_of_the_same_size(mode: str) -> None:
    assert pixels(to_rgb(Image.new(mode, (5, 3)))).shape == (3, 5, 3)


@pytest.mark.parametrize("mode", ["L", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "HSV"])
def test_modes_that_can_hold_a_grey_ramp_keep_it_exactly(mode: str) -> None:
    ramp = Image.fromarray(np.arange(0, 250, 10, dtype=np.uint8).reshape(5, 5))
    step = {"La": "LA", "RGBa": "RGBA", "PA": "P", "HSV": "RGB"}.get(mode, mode)
    image = ramp.convert(step).convert(mode)
    assert (pixels(to_rgb(image)) == np.asarray(ramp)[..., None]).all()


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB"])
@pytest.mark.parametrize("colour", [(190, 90, 60), (60, 150, 80), (90, 90, 160), (255, 255, 255), (0, 0, 0)])
def test_colour_spaces_come_back_within_rounding(mode: str, colour: tuple[int, int, int]) -> None:
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(Image.new("RGB", (2, 2), colour), *profiles, outputMode="LAB")
    else:
        image = Image.new("RGB", (2, 2), colour).convert(mode)
    if mode != "YCbCr":  # as a TIFF, Pillow 13 is the first to read back what it has written
        image = Image.open(io.BytesIO(encoded(image, "TIFF")))
    assert np.abs(pixels(to_rgb(image)).astype(int) - colour).max() <= 3


@pytest.mark.parametrize(
    ("dtype", "kind"), [("<u2", "PNG"), ("<u2", "TIFF"), (">u2", "TIFF"), ("<i4", "TIFF"), ("<f4", "TIFF")]
)
def test_deep_grey_keeps_its_contrast(dtype: str, kind: str) -> None:
    """A 12-bit scan: division by 256 would leave 0 to 15 of 255."""
    values = np.array([[1000, 1100, 1500], [2000, 2040, 3040]])
    rgb = pixels(decode_rgb(encoded(Image.fromarray(values.astype(dtype)), kind)))
    assert (rgb[..., 0] == [[0, 12, 62], [125, 130, 255]]).all()
    assert (rgb == rgb[..., :1]).all()


@given(st.lists(st.integers(0, 65535), min_size=2, max_size=40))
def test_deep_grey_keeps_order_and_reaches_both_ends(values: list[int]) -> None:
    rgb = pixels(to_rgb(Image.fromarray(np.array([values], dtype=np.uint16))))[0, :, 0]
    if min(values) == max(values):
        assert (rgb == 0).all()
        return
    assert rgb.min() == 0
    assert rgb.max() == 255
    assert (np.diff(rgb[np.argsort(values, kind="stable")].astype(int)) >= 0).all()


@pytest.mark.parametrize("value", [0, 65535])
def test_a_hot_pixel_does_not_darken_the_rest(value: int) -> None:
    values = np.tile(np.arange(1000, 1064, dtype=np.uint16), (64, 1))
    values[5, 7] = value
    grey = pixels(decode_rgb(encoded(Image.fromarray(values))))[..., 0]
    expected = np.rint(np.arange(64) * 255 / 63)
    assert (grey[0] == expected).all()
    assert grey[5, 7] == (255 if value else 0)


def test_a_bright_spot_of_many_pixels_counts_for_the_range() -> None:
    values = np.tile(np.arange(1000, 1064, dtype=np.uint16), (64, 1))
    values[:4, :4] = 4000
    grey = pixels(decode_rgb(encoded(Image.fromarray(values))))[..., 0]
    assert grey[0, 0] == 255
    assert grey[-1].max() == round(63 * 255 / 3000)


def deep_png(values: np.ndarray, colour_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """16 bits a channel, which Pillow cannot write."""
    height, width, _ = values.shape
    stream = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    stream.seek(8)
    header = PngImagePlugin.o32(width) + PngImagePlugin.o32(height) + bytes([16, colour_type, 0, 0, 0])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    for kind, content in ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        PngImagePlugin.putchunk(stream, kind, content)
    return stream.getvalue()


@pytest.mark.parametrize(("colour_type", "num_channels"), [(2, 3), (4, 2), (6, 4)])
def test_deep_colour_with_twelve_bit_values_keeps_its_contrast(colour_type: int, num_channels: int) -> None:
    """Pillow alone gives 0 to 15 of 255."""
    values = np.random.default_rng(0).integers(0, 4096, (9, 7, num_channels))
    if num_channels in (2, 4):
        values[..., -1] = 65535  # alpha
    colours = values[..., : 1 if num_channels == 2 else 3]
    low, high = colours.min(), colours.max()
    expected = np.rint((colours - low) * (255 / (high - low)))
    found = pixels(decode_rgb(deep_png(values, colour_type)))
    assert (found == np.broadcast_to(expected, found.shape)).all()


def tiff(values: np.ndarray, photometric: int, *more_tags: tuple[int, int]) -> bytes:
    """Of forms that Pillow does not write: (height, width, channels), little-endian."""
    height, width, num_channels = values.shape
    bits = 8 * values.dtype.itemsize
    tags = [
        (256, width),
        (257, height),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 0),
        (277, num_channels),
        (278, height),
        (279, values.nbytes),
        *more_tags,
    ]
    begin = 8 + 2 + 12 * len(tags) + 4
    data = b"II*\0" + struct.pack("<IH", 8, len(tags))
    for tag, value in tags:
        kind, count = (3, num_channels) if tag == 258 else (4, 1)
        value = {258: begin if num_channels > 2 else value, 273: begin + 8}.get(tag, value)
        data += struct.pack("<HHII", tag, kind, count, value)
    return data + struct.pack("<I4H", 0, *[bits] * 4) + values.tobytes()


def over_its_range(values: np.ndarray) -> np.ndarray:
    low, high = int(values.min()), int(values.max())
    return np.rint((values.astype(float) - low) * (255 / (high - low)))


def test_deep_colour_of_a_tiff_keeps_its_contrast() -> None:
    values = np.random.default_rng(0).integers(0, 4096, (9, 7, 3)).astype("<u2")
    assert (pixels(decode_rgb(tiff(values, 2))) == over_its_range(values)).all()
    with_unused = np.dstack([values, np.zeros((9, 7, 1), "<u2")])
    assert (pixels(decode_rgb(tiff(with_unused, 2, (338, 0)))) == over_its_range(values)).all()


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<f4"])
def test_a_tiff_whose_white_is_zero_is_no_negative(dtype: str) -> None:
    """As X-rays of MONOCHROME1 are exported.  Pillow inverts the 8-bit ones alone."""
    values = np.arange(256).astype(dtype).reshape(16, 16, 1)
    sample_format = [(339, 3)] if dtype == "<f4" else []
    found = pixels(decode_rgb(tiff(values, 0, *sample_format)))
    assert (found == 255 - values.astype(int)).all()
    assert (pixels(decode_rgb(tiff(values, 1, *sample_format))) == values).all()


def sgi(values: np.ndarray, *, compressed: bool) -> bytes:
    """Of 16 bits a channel."""
    height, width, num_channels = values.shape
    kind = struct.pack(
        ">hBBHHHH", 474, compressed, 2, 3 if num_channels > 1 else 2, width, height, num_channels
    )
    rows = values[::-1].transpose(2, 0, 1).astype(">u2").reshape(-1, width)
    if not compressed:
        return kind.ljust(512, b"\0") + rows.tobytes()
    packed = [struct.pack(">H", 128 + width) + row.tobytes() + b"\0\0" for row in rows]
    starts = [512 + 8 * len(rows) + sum(map(len, packed[:number])) for number in range(len(rows))]
    table = np.array([starts, [len(one) for one in packed]], ">u4").tobytes()
    return kind.ljust(512, b"\0") + table + b"".join(packed)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("num_channels", [1, 3, 4])
def test_deep_channels_of_sgi_keep_their_contrast(num_channels: int, compressed: bool) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (9, 7, num_channels))
    values[..., 3:] = 65535
    found = pixels(decode_rgb(sgi(values, compressed=compressed)))
    assert (found == over_its_range(values[..., :3])).all()


@pytest.mark.parametrize("max_value", [255, 4095, 65535])
@pytest.mark.parametrize("kind", ["P3", "P6"])
def test_deep_colour_of_ppm_keeps_its_contrast(kind: str, max_value: int) -> None:
    values = np.random.default_rng(0).integers(0, min(max_value, 4095) + 1, (9, 7, 3))
    expected = values if max_value == 255 else over_its_range(values)
    dtype = "u1" if max_value == 255 else ">u2"
    text = " # twelve bits\n".join(map(str, values.ravel())).encode()
    data = values.astype(dtype).tobytes() if kind == "P6" else text
    assert (pixels(decode_rgb(f"{kind}\n7 9\n{max_value}\n".encode() + data)) == expected).all()


def test_deep_colour_keeps_orientation_and_see_through_colour() -> None:
    values = np.array([[[0, 0, 0], [100, 100, 100]], [[700, 700, 700], [1000, 1000, 1000]]])
    exif = Image.Exif()
    exif[0x0112] = 3
    chunks = (b"tRNS", struct.pack(">3H", 700, 700, 700)), (b"eXIf", exif.tobytes()[6:])
    on_white = pixels(decode_rgb(deep_png(values, 2, *chunks), background="white"))[..., 0]
    assert on_white.tolist() == [[255, 255], [26, 0]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_picture_that_is_wholly_transparent_shows_its_colours(mode: str) -> None:
    image = Image.new("RGBA", (3, 2), (120, 120, 120, 0)).convert(mode)
    assert (pixels(decode_rgb(encoded(image))) == 120).all()


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGB", (4, 4), (90, 90, 90)), "one colour only"),
        (Image.fromarray(np.tile(np.arange(20, dtype=np.uint8), (20, 1))).convert("RGB"), "nearly black"),
        (Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (20, 1))).convert("RGB"), None),
    ],
)
def test_pictures_that_show_next_to_nothing_are_doubted(image: Image.Image, expected: str | None) -> None:
    found = doubt(image)
    assert found == expected or (expected is not None and str(found).startswith(expected))


def test_a_png_whose_checksum_fails_is_refused() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8))
    data = bytearray(encoded(noise, compress_level=0))  # stored: the decoder itself notices nothing
    data[len(data) // 2] ^= 1
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_rgb(bytes(data))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_with_foreign_bytes_in_its_scan_is_refused(progressive: bool) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (96, 96, 3), dtype=np.uint8))
    whole = encoded(noise, "JPEG", quality=90, progressive=progressive)
    assert decode_rgb(whole).size == (96, 96)
    middle = len(whole) // 2
    damaged = whole[:middle] + rng.bytes(2000) + whole[middle + 2000 :]
    with pytest.raises(DataError, match="damaged: marker"):
        decode_rgb(damaged)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_sound_jpeg_may_hold_anything_before_its_scan(progressive: bool) -> None:
    """Colour profiles and thumbnails hold bytes that look like markers."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x927C] = bytes([0xFF, 0xDA, 0xFF, 0xC0, 0xFF, 0xD9]) + rng.bytes(500)  # a maker's note
    for _ in range(20):
        profile = rng.bytes(100_000) + bytes([0xFF, 0xDA, 0xFF, 0xC0])
        data = encoded(noise, "JPEG", icc_profile=profile, exif=exif, progressive=progressive)
        assert decode_rgb(data).size == (32, 32)
    middle = len(data) - 400
    with pytest.raises(DataError, match="damaged: marker"):
        decode_rgb(data[:middle] + bytes([0xFF, 0x05]) + data[middle + 2 :])


def test_a_parser_that_runs_other_programs_is_never_reached() -> None:
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(data)).format == "EPS"
    with pytest.raises(DataError, match="needed a whole picture file of PNG, JPEG"):
        decode_rgb(data)


@pytest.mark.parametrize("value", [0, 7, 65535])
def test_a_picture_of_one_value_is_black(value: int) -> None:
    assert not pixels(decode_rgb(encoded(Image.fromarray(np.full((4, 4), value, np.uint16))))).any()


def test_floating_point_oddities() -> None:
    values = np.array([[np.nan, -np.inf, np.inf, -1.0, 0.0, 1.0]], dtype=np.float32)
    assert pixels(to_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 0, 255, 0, 128, 255]
    nothing = np.full((2, 2), np.nan, dtype=np.float32)
    assert not pixels(to_rgb(Image.fromarray(nothing))).any()
    extremes = np.array([[-3.4e38, 3.4e38]], dtype=np.float32)
    assert pixels(to_rgb(Image.fromarray(extremes)))[0, :, 0].tolist() == [0, 255]
    tiny = np.array([[0.0, 1e-45]], dtype=np.float32)
    assert pixels(to_rgb(Image.fromarray(tiny)))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize(("background", "expected"), [("black", 100), ("white", 227)])
def test_half_transparent_pixels_mix_with_the_background(background: str, expected: int) -> None:
    image = Image.new("RGBA", (2, 2), (200, 200, 200, 128))
    for mode in ("RGBA", "LA"):
        rgb = pixels(decode_rgb(encoded(image.convert(mode)), background=background))
        assert (rgb == expected).all()


def _palette(transparency: int | bytes) -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = transparency
    return image


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (_palette(1), {"transparency": 1}, [RED, BLUE]),
        (_palette(b"\xff\x00"), {"transparency": b"\xff\x00"}, [RED, BLUE]),
        (Image.fromarray(np.array([[9, 7]], np.uint8)), {"transparency": 7}, [(9, 9, 9), BLUE]),
        (Image.fromarray(np.array([[RED, GREEN]], np.uint8)), {"transparency": GREEN}, [RED, BLUE]),
        (Image.fromarray(np.array([[0, 700, 700, 1000]], np.uint16)), {"transparency": 700}, "two gone"),
    ],
)
def test_a_see_through_colour_shows_the_background(
    image: Image.Image, options: dict, expected: list | str
) -> None:
    on_black = pixels(decode_rgb(encoded(image, **options)))[0].tolist()
    on_white = pixels(decode_rgb(encoded(image, **options), background="white"))[0].tolist()
    if expected == "two gone":
        assert on_black == [[0] * 3, [0] * 3, [0] * 3, [255] * 3]
        assert on_white == [[0] * 3, [255] * 3, [255] * 3, [255] * 3]
        return
    for found, ground in ((on_black, (0, 0, 0)), (on_white, (255, 255, 255))):
        assert found == [list(ground if colour == BLUE else colour) for colour in expected]


@pytest.mark.parametrize(
    ("orientation", "size", "corner"),
    [
        *((1, (6, 4), (0, 0)), (2, (6, 4), (5, 0)), (3, (6, 4), (5, 3)), (4, (6, 4), (0, 3))),
        *((5, (4, 6), (0, 0)), (6, (4, 6), (3, 0)), (7, (4, 6), (3, 5)), (8, (4, 6), (0, 5))),
    ],
)
@pytest.mark.parametrize("deep", [False, True])
def test_exif_orientation_is_applied(
    orientation: int, size: tuple[int, int], corner: tuple[int, int], deep: bool
) -> None:
    values = np.zeros((4, 6), dtype=np.uint16 if deep else np.uint8)
    values[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_rgb(encoded(Image.fromarray(values), exif=exif))
    assert image.size == size
    assert image.getpixel(corner) == (255, 255, 255)
    assert pixels(image).sum() == 3 * 255


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@given(st.binary(max_size=60))
@example(b"II*\0\x08\0\0\0\xff\xff")
@example(b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0")
def test_unreadable_exif_is_passed_over(junk: bytes) -> None:
    image = decode_rgb(encoded(Image.new("RGB", (6, 4), RED), exif=b"Exif\0\0" + junk))
    assert sorted(image.size) == [4, 6]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    assert (pixels(decode_rgb(data)) == RED).all()


@pytest.mark.parametrize("data", [b"", b"\0", b"<svg/>", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff"])
def test_what_is_no_picture_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^train, row 3: the picture"):
        decode_rgb(data, where="train, row 3")


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150)
@given(st.data())
def test_damaged_files_give_a_picture_or_our_error(data: st.DataObject) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8))
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]))
    whole = bytearray(encoded(noise, kind))
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=3)):
        whole[place] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(whole)))
    with contextlib.suppress(DataError):
        assert decode_rgb(bytes(whole[:cut])).mode == "RGB"


def test_a_file_that_ends_early_is_refused() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP"):
        whole = encoded(noise, kind)
        with pytest.raises(DataError, match="cannot be decoded"):
            decode_rgb(whole[: len(whole) // 2])


def test_bombs_are_refused_before_they_unfold(monkeypatch: pytest.MonkeyPatch) -> None:
    header = PngImagePlugin.o32(60_000) * 2 + b"\x08\x02\0\0\0"
    stream = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    stream.seek(8)
    PngImagePlugin.putchunk(stream, b"IHDR", header)
    PngImagePlugin.putchunk(stream, b"IDAT", b"")
    with pytest.raises(DataError, match="too large"):
        decode_rgb(stream.getvalue())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(DataError, match="10 x 10 pixels; at most 99"),
    ):
        decode_rgb(encoded(Image.new("L", (10, 10))))


@pytest.mark.parametrize("flip", [False, True])
def test_strips_are_refused_beyond_the_ratio_that_qwen_takes(flip: bool) -> None:
    for length, fits in ((3 * MAX_ASPECT_RATIO, True), (3 * MAX_ASPECT_RATIO + 1, False)):
        size = (3, length) if flip else (length, 3)
        data = encoded(Image.new("L", size))
        if fits:
            assert decode_rgb(data).size == size
        else:
            with pytest.raises(DataError, match=f"strip of {size[0]} x {size[1]} pixels.*max_dropped"):
                decode_rgb(data)

"""Images of every mode that Pillow opens, as files where there are such, against pixel values worked out by hand."""

import base64
import functools
import http.server
import io
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from peft_moe_merge.inference.rgb import load_rgb, to_rgb

GREYS = np.array([[0, 1, 127], [128, 200, 255]], np.uint8)
COLOURS = np.array([[[0, 0, 0], [10, 20, 30], [255, 0, 0]], [[0, 255, 0], [1, 2, 3], [255, 255, 255]]], np.uint8)
GREY_COLOURS = np.stack([GREYS] * 3, axis=-1)


def stored(image: Image.Image, kind: str, **options) -> Image.Image:
    """The same image, by way of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


def with_alpha(values: np.ndarray, mode: str) -> Image.Image:
    """Not one pixel opaque: transparency must not change a colour."""
    alpha = np.array([[0, 1, 2], [127, 128, 254]], np.uint8)[..., None]
    return Image.fromarray(np.concatenate([np.atleast_3d(values), alpha], axis=2)).convert(mode)


def palette(transparent: int | None = None) -> Image.Image:
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3)).convert("P")
    image.putpalette(COLOURS.tobytes() + bytes(750))
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


def merged(mode: str, *bands: list[list[int]]) -> Image.Image:
    return Image.merge(mode, [Image.fromarray(np.array(band, np.uint8)) for band in bands])


def png(bits: int, colour_type: int, samples: np.ndarray) -> Image.Image:
    """A PNG that Pillow can't write, byte by byte after the specification."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = samples.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(f">u{bits // 8}").tobytes() for row in samples)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + content))


def tiff_of_12_bits(samples: list[int]) -> Image.Image:
    """One row, two samples in three bytes; the tags are width, height, bits, compression, photometry, offset, ..."""
    bits = "".join(f"{sample:012b}" for sample in samples)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big")
    tags = [(256, len(samples)), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1)]
    tags += [(279, len(data))]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    place = 8 + len(data) + len(data) % 2
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return Image.open(io.BytesIO(b"II*\0" + struct.pack("<I", place) + data.ljust(place - 8, b"\0") + directory))


SIXTEEN = np.array([[0, 128, 129], [257 * 100, 65535 - 129, 65535]], np.uint16)  # 128 and 129 are the sides of a half
SIXTEEN_AS_8 = np.array([[0, 0, 1], [100, 254, 255]], np.uint8)
SIXTEEN_COLOURS = np.stack([SIXTEEN_AS_8] * 3, axis=-1)

# mode -> images of this mode, and what they are in RGB
TABLE = {
    "1": (lambda: [Image.fromarray(GREYS > 127), stored(Image.fromarray(GREYS > 127), "PNG")],
          np.where(GREY_COLOURS > 127, 255, 0)),
    "L": (lambda: [Image.fromarray(GREYS), stored(Image.fromarray(GREYS), "PNG")], GREY_COLOURS),
    "LA": (lambda: [with_alpha(GREYS, "LA"), stored(with_alpha(GREYS, "LA"), "PNG")], GREY_COLOURS),
    "P": (lambda: [palette(), stored(palette(), "PNG"), stored(palette(2), "PNG"), stored(palette(1), "GIF"),
                   stored(palette(bytes([0, 9, 99, 255])), "PNG")], COLOURS),
    "PA": (lambda: [palette().convert("PA")], COLOURS),
    "RGB": (lambda: [Image.fromarray(COLOURS), stored(Image.fromarray(COLOURS), "PNG")], COLOURS),
    "RGBA": (lambda: [with_alpha(COLOURS, "RGBA"), stored(with_alpha(COLOURS, "RGBA"), "PNG")], COLOURS),
    "RGBX": (lambda: [Image.fromarray(COLOURS).convert("RGBX")], COLOURS),
    "CMYK": (lambda: [merged("CMYK", *(255 - COLOURS).transpose(2, 0, 1), 0 * GREYS),
                      stored(merged("CMYK", *(255 - COLOURS).transpose(2, 0, 1), 0 * GREYS), "TIFF")], COLOURS),
    "YCbCr": (lambda: [merged("YCbCr", GREYS, 0 * GREYS + 128, 0 * GREYS + 128)], GREY_COLOURS),
    "HSV": (lambda: [merged("HSV", [[0, 85, 170]], [[255, 255, 0]], [[255, 255, 40]])],
            [[[255, 0, 0], [0, 255, 0], [40, 40, 40]]]),
    "LAB": (lambda: [merged("LAB", [[0, 255]], [[128, 128]], [[128, 128]])], [[[0, 0, 0], [255, 255, 255]]]),
    "La": (lambda: [merged("LA", [[200, 90]], [[255, 51]]).convert("La")], [[[200] * 3, [90] * 3]]),
    "RGBa": (lambda: [merged("RGBA", [[200, 50]], [[9, 0]], [[1, 255]], [[255, 51]]).convert("RGBa")],
             [[[200, 9, 1], [50, 0, 255]]]),
    "I;16": (lambda: [Image.fromarray(SIXTEEN), stored(Image.fromarray(SIXTEEN), "PNG"),
                      stored(Image.fromarray(SIXTEEN), "TIFF")], SIXTEEN_COLOURS),
    "I;16L": (lambda: [Image.frombytes("I;16L", (3, 2), SIXTEEN.astype("<u2").tobytes())], SIXTEEN_COLOURS),
    "I;16B": (lambda: [Image.frombytes("I;16B", (3, 2), SIXTEEN.astype(">u2").tobytes()),
                       stored(Image.frombytes("I;16B", (3, 2), SIXTEEN.astype(">u2").tobytes()), "TIFF")],
              SIXTEEN_COLOURS),
    "I;16N": (lambda: [Image.frombytes("I;16N", (3, 2), SIXTEEN.tobytes())], SIXTEEN_COLOURS),
    "I": (lambda: [Image.fromarray(SIXTEEN.astype(np.int32)), stored(Image.fromarray(SIXTEEN.astype(np.int32)), "TIFF"),
                   Image.open(io.BytesIO(b"P5 3 2 65535\n" + SIXTEEN.astype(">u2").tobytes()))], SIXTEEN_COLOURS),
    "F": (lambda: [Image.fromarray(np.array([[0, 0.5, 1], [0.1, 0.25, 0.9]], np.float32)),
                   stored(Image.fromarray(np.array([[0, 0.5, 1], [0.1, 0.25, 0.9]], np.float32)), "TIFF")],
          np.stack([[[0, 128, 255], [26, 64, 230]]] * 3, axis=-1)),
}  # fmt: skip


def test_the_table_has_every_mode():
    assert set(TABLE) >= set(Image.MODES)


@pytest.mark.parametrize("mode", TABLE)
def test_every_mode(mode):
    make, expected = TABLE[mode]
    for image in make():
        assert image.mode == mode
        rgb = to_rgb(image)
        assert rgb.mode == "RGB"
        # Pillow undoes a premultiplied alpha, and leaves Lab, to within one level
        np.testing.assert_allclose(np.asarray(rgb).astype(int), expected, atol=mode in ("La", "RGBa", "LAB"))


def test_colours_of_16_bits():
    """Pillow itself makes 8 bits of these, by their upper byte."""
    colours = (COLOURS.astype(np.uint16) << 8) + 77
    assert np.array_equal(np.asarray(to_rgb(png(16, 2, colours))), COLOURS)
    alpha = np.full((2, 3, 1), 300)
    assert np.array_equal(np.asarray(to_rgb(png(16, 6, np.concatenate([colours, alpha], axis=2)))), COLOURS)
    grey = np.concatenate([(GREYS.astype(np.uint16) << 8)[..., None] + 5, alpha], axis=2)
    assert np.array_equal(np.asarray(to_rgb(png(16, 4, grey))), GREY_COLOURS)


def test_a_tiff_of_12_bits_has_its_own_range():
    image = tiff_of_12_bits([0, 8, 9, 1606, 4086, 4095])  # a level is 4095 / 255 = 16.06
    assert image.mode == "I;16"
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 0, 1, 100, 254, 255]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 1.01]], np.float32), "mode F .* from 0 to 1, found 0 to 1.01"),
        (np.array([[-0.1, 1]], np.float32), "found -0.1 to 1"),
        (np.array([[np.nan, 1]], np.float32), "found nan"),
        (np.array([[0, 255]], np.int32), "mode I .* found 0 to 255. Save it with 8 or 16 bits"),
        (np.array([[-1, 5000]], np.int32), "found -1 to 5000"),
        (np.array([[0, 65536]], np.int32), "found 0 to 65536"),
    ],
)
def test_no_defined_range(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        to_rgb(Image.fromarray(values))
    Image.fromarray(values).save(tmp_path / "scan.tif")
    with pytest.raises(ValueError, match=f"scan.tif': .*{message}"):
        load_rgb(tmp_path / "scan.tif")


def test_its_advice_helps(tmp_path):
    values = np.array([[0, 51, 255]], np.int32)
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray((values * 257).astype(np.uint16)).save(tmp_path / "16.png")
    for name in ("8.png", "16.png"):
        assert np.asarray(load_rgb(tmp_path / name))[0, :, 0].tolist() == [0, 51, 255]
    divided = Image.fromarray((values / 255).astype(np.float32))
    assert np.asarray(to_rgb(divided))[0, :, 0].tolist() == [0, 51, 255]


def test_black_is_black():
    for mode in ("I", "F", "I;16"):
        assert not np.asarray(to_rgb(Image.new(mode, (2, 2)))).any()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("pixels", [GREYS, SIXTEEN, COLOURS])
def test_exif_orientation(kind, pixels):
    """6: the file's rows are columns, to be read from the right."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = to_rgb(stored(Image.fromarray(pixels), kind, exif=exif))
    expected = np.rot90(np.asarray(to_rgb(Image.fromarray(pixels))), k=-1)
    assert np.array_equal(np.asarray(turned), expected)
    assert np.array_equal(np.asarray(to_rgb(turned)), expected), "once is enough"


def test_a_turned_tiff_by_its_path(tmp_path):
    """Which Pillow maps into memory with the wrong width."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(SIXTEEN).save(tmp_path / "turned.tif", exif=exif)
    assert np.array_equal(np.asarray(load_rgb(tmp_path / "turned.tif")), np.rot90(SIXTEEN_COLOURS, k=-1))


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    for name in ("a.gif", "a.png"):
        assert load_rgb(tmp_path / name).getpixel((1, 1)) == (255, 0, 0)


def test_the_image_given_stays_as_it_is():
    image = Image.fromarray(SIXTEEN)
    to_rgb(image)
    assert image.mode == "I;16" and np.array_equal(np.asarray(image), SIXTEEN)


def test_files_and_addresses(tmp_path, monkeypatch):
    path = tmp_path / "möwe 16.png"
    Image.fromarray(SIXTEEN).save(path)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/m%C3%B6we%2016.png"
        data = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        for source in (path, str(path), address, data, Image.open(path)):
            assert np.array_equal(np.asarray(load_rgb(source)), SIXTEEN_COLOURS)
        with pytest.raises(OSError, match=r"nothing\.png': .*404"):
            load_rgb(f"http://127.0.0.1:{server.server_port}/nothing.png")
        server.shutdown()
    with pytest.raises(ValueError, match=r"No image file 'nothing.png'\. Give a PIL image, a path"):
        load_rgb("nothing.png")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(OSError, match="text.png"):
        load_rgb(tmp_path / "text.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)  # of six
    with pytest.raises(ValueError, match="16.png': .*decompression bomb"):
        load_rgb(path)

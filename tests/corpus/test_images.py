"""Image files: errors name damaged ones; other formats are read correctly or refused."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from refbn_d2.data.errors import naming_the_file
from tests.corpus.harness import feed, feed_damaged
from tests.corpus.test_annotations import cfg, content, feed_text, folder  # noqa: F401  (fixtures)

SIZE = (64, 80)  # height, width of the image that is replaced
NAME = "000000000001.jpg"
GREY = np.tile(np.linspace(0, 255, SIZE[1]).astype("uint8"), (SIZE[0], 1))
COLOR = np.stack([GREY, GREY[:, ::-1], GREY // 2], axis=2)


def saved(array, format: str, mode=None, **options) -> bytes:
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, format, **options)
    return file.getvalue()


def png(width, height, pixels=b"", depth=8, color=2) -> bytes:
    """A PNG that says what it likes about its size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def jpeg_of_size(height, width) -> bytes:
    """A JPEG whose header says another size than its pixels."""
    data = bytearray(saved(COLOR, "JPEG"))
    frame = data.index(b"\xff\xc0") + 5
    data[frame : frame + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def turned() -> bytes:
    """Lies on its side; its Exif says so, and detectron2 turns it."""
    image = Image.fromarray(np.rot90(COLOR).copy())
    exif = image.getexif()
    exif[274] = 6
    return saved(image, "JPEG", exif=exif)


RAMP16 = np.tile(np.linspace(0, 65535, SIZE[1]).astype("uint16"), (SIZE[0], 1))
JPEG, PNG = saved(COLOR, "JPEG"), saved(COLOR, "PNG")
EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 64\n%%EndComments\n"
    b"(ran) (w) file closefile\nshowpage\n%%EOF\n"
)

# Name -> (bytes, a word of the error; None: works as documented).
IMAGES = {
    "JPEG": (JPEG, None),
    "PNG of another suffix": (PNG, None),
    "WebP": (saved(COLOR, "WEBP"), None),
    "GIF": (saved(COLOR, "GIF", "P"), None),
    "TIFF": (saved(COLOR, "TIFF"), None),
    "BMP": (saved(COLOR, "BMP"), None),
    "grey": (saved(GREY, "JPEG"), None),
    "black and white": (saved(GREY, "PNG", "1"), None),
    "grey with transparency": (saved(GREY, "PNG", "LA"), None),
    "transparent": (saved(COLOR, "PNG", "RGBA"), None),
    "palette": (saved(COLOR, "PNG", "P"), None),
    "CMYK": (saved(COLOR, "JPEG", "CMYK"), None),
    "YCbCr TIFF": (saved(COLOR, "TIFF", "YCbCr"), None),
    "16 bit colour": (cv2.imencode(".png", np.dstack([RAMP16] * 3))[1].tobytes(), None),
    "progressive": (saved(COLOR, "JPEG", progressive=True), None),
    "turned by Exif": (turned(), None),
    "damaged Exif": (JPEG[:2] + b"\xff\xe1\x00\x10Exif\0\0MM\0*\xff\xff\xff\xff" + JPEG[2:], None),
    "pixels after the end": (JPEG + b"x" * 5000, None),
    "16 bit grey": (saved(RAMP16, "PNG"), "8 bits"),
    "16 bit TIFF": (saved(RAMP16, "TIFF"), "8 bits"),
    "32 bit TIFF": (saved(RAMP16.astype("int32"), "TIFF"), "8 bits"),
    "floating point": (saved(RAMP16.astype("float32"), "TIFF"), "8 bits"),
    "PostScript": (EPS, "is no JPEG, PNG"),
    "empty": (b"", "is no JPEG, PNG"),
    "text": (b"not an image\n" * 50, "is no JPEG, PNG"),
    "page of an error": (b"<html>404</html>", "is no JPEG, PNG"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="80" height="64"/>', "is no JPEG, PNG"),
    "PDF": (b"%PDF-1.4\n1 0 obj\n", "is no JPEG, PNG"),
    "zeros": (bytes(3000), "is no JPEG, PNG"),
    "header alone": (JPEG[:20], "cannot be read"),
    "too small": (saved(COLOR[:-1], "JPEG"), "80 x 63 pixels, not the 80 x 64 of its annot"),
    "too large": (saved(np.tile(COLOR, (3, 3, 1)), "PNG"), "240 x 192"),
    "sides exchanged": (saved(np.rot90(COLOR).copy(), "JPEG"), "ismatched"),
    "one pixel": (saved(COLOR[:1, :1], "PNG"), "1 x 1"),
    "JPEG header too large": (jpeg_of_size(65535, 65535), "cannot be read"),
    "JPEG header a little too large": (jpeg_of_size(64, 88), "88 x 64"),
    "JPEG header of no height": (jpeg_of_size(0, 80), "cannot be read"),
    "PNG of no pixels": (png(0, 64), "is no JPEG, PNG"),
    "PNG without pixels": (png(80, 64), "cannot be read"),
    "PNG of too few pixels": (png(80, 64, bytes(1000)), "cannot be read"),
    "PNG of too many pixels": (png(80, 64, bytes(10**7)), None),
    "PNG bomb": (png(60_000, 60_000, bytes(10**6)), "bomb"),
    "PNG bomb below Pillow's limit": (png(13_000, 13_000, bytes(10**6)), "13000 x 13000"),
    "PNG of the largest size": (png(2**31 - 1, 2**31 - 1), "bomb"),
    "PNG of impossible depth": (png(80, 64, bytes(20_000), depth=7), "is no JPEG, PNG"),
    "PNG of impossible colours": (png(80, 64, bytes(20_000), color=5), "is no JPEG, PNG"),
    "PNG with a wrong checksum": (PNG.replace(PNG[29:33], b"abcd", 1), "cannot be read"),
    "TIFF without a directory": (b"II*\0\xff\xff\xff\x7f" + bytes(100), "is no JPEG, PNG"),
    **{
        f"JPEG cut at {n} %": (JPEG[: len(JPEG) * n // 100], "cannot be read")
        for n in (1, 30, 60, 90, 98)
    },
    **{
        f"PNG cut at {n} %": (PNG[: len(PNG) * n // 100], "cannot be read") for n in (1, 20, 50, 80)
    },
}


@pytest.fixture
def feed_image(folder, cfg, content, tmp_path, monkeypatch):  # noqa: F811
    import json

    monkeypatch.chdir(tmp_path)
    path = folder / "coco/val2017" / NAME
    good = path.read_bytes()

    def function(data: bytes):
        path.write_bytes(data)
        (folder / "coco/annotations/instances_val2017.json").write_text(json.dumps(content))
        return feed_text(folder, cfg, json.dumps(content), path.name)

    yield function
    path.write_bytes(good)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", IMAGES)
def test_images(case, feed_image):
    data, word = IMAGES[case]
    line = feed_image(data)
    assert line is None if word is None else word in line


class Reader:
    """As the mapper reads an image."""

    def __call__(self, d):
        from detectron2.data.detection_utils import check_image_size, read_image

        image = read_image(d["file_name"], format="BGR")
        check_image_size(d, image)
        return image


def read(path):
    d = {"file_name": str(path), "height": SIZE[0], "width": SIZE[1]}
    return naming_the_file(Reader())(d)


@pytest.mark.parametrize("kind", ["grey", "transparent", "CMYK", "16 bit colour", "turned by Exif"])
def test_other_kinds_are_the_same_picture(kind, tmp_path):
    """Not only without an error: what the network sees is the picture."""
    (tmp_path / "a.jpg").write_bytes(IMAGES[kind][0])
    image = read(tmp_path / "a.jpg").astype(float)
    wanted = {"grey": np.dstack([GREY] * 3), "16 bit colour": np.dstack([RAMP16 / 257] * 3)}
    wanted = wanted.get(kind, COLOR[:, :, ::-1])
    assert np.abs(image - wanted).mean() < 12


@pytest.mark.parametrize("data", [JPEG, PNG, saved(COLOR, "TIFF"), saved(COLOR, "GIF", "P")])
def test_random_damage(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "damaged.jpg"

    def feed_one(changed):
        path.write_bytes(changed)
        feed("images", path.name, lambda: read(path))

    feed_damaged(data, feed_one)


def test_real_jpegs_cut_short(real_data, tmp_path):
    """Anywhere in the file: an error, or (in its last bytes) the whole picture."""
    for n, source in enumerate(sorted((real_data / "coco/val2017").iterdir())[:30]):
        path, data = tmp_path / source.name, source.read_bytes()
        with Image.open(source) as image:
            size = {"width": image.size[0], "height": image.size[1]}
        path.write_bytes(data[: len(data) * (n + 1) // 31])
        d = {"file_name": str(path), **size}
        line = feed("images", path.name, lambda d=d: naming_the_file(Reader())(d))
        assert "cannot be read" in line

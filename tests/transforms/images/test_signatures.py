import io

import numpy as np
import pytest
from pictures import picture, save
from PIL import Image

from diptych.transforms.images.decode import BadImage, Limits, decode
from diptych.transforms.images.signatures import image_format

BMFF = b"\0\0\0\x18ftyp%s\0\0\0\0%s"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\xff\x0a\xfa\x1f\x01", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl ", "JPEG XL"),
        (b"II\xbc\x01\x08\0\0\0", "JPEG XR"),
        (b"8BPS\0\1\0\0\0\0\0\0\0\3", "Photoshop"),
        (b"8BPS\0\2\0\0\0\0\0\0\0\3", "Photoshop"),
        (b"gimp xcf v011\0", "GIMP"),
        (b"%PDF-1.7\n", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", "PostScript"),
        (b"\xc5\xd0\xd3\xc6\x1e\0\0\0", "PostScript"),
        (b"\xd7\xcd\xc6\x9a\0\0", "metafile"),
        (b'<?xml version="1.0"?>\n<!-- made by hand -->\n<svg width="9" height="9"/>', "SVG"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b'<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "x"><svg/>', "SVG"),
        (b"\xef\xbb\xbf  <SVG/>", "SVG"),
        (b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0", "icon"),
        (b"icns\0\0\x10\0", "icon"),
        (b"P6\n9 9\n255\n" + bytes(243), "Netpbm"),
        (b"P5 9 9 255 ", "Netpbm"),
        (b"P7\nWIDTH 9\n", "Netpbm"),
        (b"P6\n# by hand\n9 9\n", "Netpbm"),
        (b"DDS \x7c\0\0\0", "DirectDraw"),
        (b"v/1\x01\2\0\0\0", "OpenEXR"),
        (b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n", "Radiance"),
        (b"SIMPLE  =                    T", "FITS"),
        (b"qoif\0\0\0\x09", "QOI"),
        (b"BPG\xfb\0\0", "BPG"),
        (b"AT&TFORM\0\0\0\0DJVU", "DjVu"),
        (bytes(128) + b"DICM", "DICOM"),
        (b"II*\0\x10\0\0\0CR\2\0", "raw photo (Canon)"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "raw photo (Canon)"),
        (b"FUJIFILMCCD-RAW 0201", "raw photo (Fujifilm)"),
        (b"IIRO\x08\0\0\0", "raw photo (Olympus)"),
        (b"IIU\0\x18\0\0\0", "raw photo (Panasonic)"),
        (b"FOVb\0\0", "raw photo (Sigma)"),
    ],
)
def test_an_image_of_another_kind_is_named(data: bytes, kind: str) -> None:
    with pytest.raises(BadImage, match=r"(first|JPEG)$") as raised:
        image_format(data + bytes(20))
    assert kind in str(raised.value)
    assert raised.value.reason == "unsupported"


@pytest.mark.parametrize("file_format", ["ICO", "ICNS", "PPM", "EPS", "SGI", "PCX", "DDS", "PDF"])
def test_what_pillow_writes_and_nobody_should_open_is_named(file_format: str) -> None:
    data = save(Image.fromarray(picture(64, 64)), file_format)
    with pytest.raises(BadImage) as raised:
        decode(data, Limits())
    assert raised.value.reason == "unsupported"
    assert "convert it" in str(raised.value)


@pytest.mark.parametrize("file_format", ["TGA", "IM"])
def test_what_has_no_signature_is_no_image(file_format: str) -> None:
    with pytest.raises(BadImage) as raised:
        decode(save(picture(), file_format), Limits())
    assert raised.value.reason == "not_an_image"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (BMFF % (b"heic", b"mif1heic"), "HEIF"),
        (BMFF % (b"heix", b"mif1heix"), "HEIF"),
        (BMFF % (b"mif1", b"mif1heic"), "HEIF"),
        (BMFF % (b"msf1", b"msf1hevc"), "HEIF"),
        (BMFF % (b"avif", b"avifmif1"), "AVIF"),
        (BMFF % (b"avis", b"avifavis"), "AVIF"),
        (BMFF % (b"mif1", b"mif1avif"), "AVIF"),
        (b"\xff\x4f\xff\x51\0\x2f", "JPEG2000"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
    ],
)
def test_files_of_boxes_are_told_apart_by_their_brands(data: bytes, expected: str) -> None:
    assert image_format(data) == expected


@pytest.mark.parametrize(
    "data", [b"P6 is a page", b"Pure", b"II", b"MM\0", b"v/1", b"%PD", b"BPG", b"P9\n1", b"PKZIP"]
)
def test_text_that_begins_alike_is_no_image(data: bytes) -> None:
    with pytest.raises(BadImage) as raised:
        image_format(data)
    assert raised.value.reason == "not_an_image"


def test_a_name_decides_nothing() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(buffer, "PNG")
    assert image_format(buffer.getvalue()) == "PNG"

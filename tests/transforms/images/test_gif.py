import numpy as np
import pytest
from pictures import palette_image, picture, save
from PIL import Image

from diptych.transforms.images.decode import Limits, decode
from diptych.transforms.images.gif import without_long_extensions

ANY = Limits(min_side_px=1)


def extension(label: int, content: bytes) -> bytes:
    blocks = (content[start : start + 255] for start in range(0, len(content), 255))
    return bytes([0x21, label]) + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"


def before_its_frame(data: bytes, *extensions: bytes) -> bytes:
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    return data[:at] + b"".join(extensions) + data[at:]


@pytest.mark.parametrize("image", [palette_image(), Image.fromarray(picture(channels=1))])
@pytest.mark.parametrize("label", [0xFE, 0xFF, 0x01, 0x99])
def test_long_extensions_are_left_out(image: Image.Image, label: int) -> None:
    data = save(image, "GIF", transparency=3)
    long = before_its_frame(data, extension(label, bytes(70_000)), extension(0xFE, b"hello"))
    assert len(without_long_extensions(long)) < len(data) + 100
    assert np.array_equal(decode(long, ANY).pixels, decode(data, ANY).pixels)


@pytest.mark.timeout(60)
def test_giant_comments_cost_no_time() -> None:
    for comments in ([bytes(20_000_000)], [bytes(20_000)] * 1_000):
        data = before_its_frame(
            save(palette_image(), "GIF"), *(extension(0xFE, comment) for comment in comments)
        )
        assert len(without_long_extensions(data)) < 80_000
        decode(data, ANY)  # for which Pillow takes minutes


def test_short_extensions_are_left_alone() -> None:
    frames = [palette_image(), palette_image(8)]
    data = save(frames[0], "GIF", save_all=True, append_images=frames[1:], comment=b"hello", loop=0)
    assert without_long_extensions(data) is data


@pytest.mark.parametrize("end", [*range(6, 30), 500, -1])
def test_what_is_cut_is_left_to_the_decoder(end: int) -> None:
    data = before_its_frame(save(palette_image(), "GIF"), extension(0xFE, b"hello"))[:end]
    assert without_long_extensions(data) == data

import pytest

from diptych.transforms.sources.planned.entries import is_image, stem


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a/b/000000121647.jpg", "000000121647"),
        ("1000268201_693b08cb0e.jpg", "1000268201_693b08cb0e"),
        ("2258277193_586949ec62.jpg.1", "2258277193_586949ec62.jpg"),
        ("no extension", "no extension"),
        (".jpg", ".jpg"),
    ],
)
def test_stem(path, expected):
    assert stem(path) == expected


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "JPG"])
def test_image_extensions(extension):
    assert is_image(f"a.b.{extension}")
    assert not is_image(f"{extension}.txt")
    assert not is_image(extension)

import io
import re
import tempfile
from pathlib import Path

import pytest
from PIL import Image, UnidentifiedImageError

from diptych.models.errors import one_line


def test_an_error_of_many_lines_becomes_one() -> None:
    assert one_line(ValueError("no\n\n  good\tvalue ")) == "no good value"
    assert one_line(ValueError("no\ngood"), with_type=True) == "ValueError: no good"


def test_an_error_that_says_nothing_is_named() -> None:
    assert (
        one_line(KeyboardInterrupt()) == one_line(KeyboardInterrupt(), with_type=True) == "KeyboardInterrupt"
    )


def test_a_long_error_is_cut() -> None:
    assert one_line(ValueError("x" * 1000)) == "x" * 300
    assert len(one_line(ValueError("x" * 1000), 50, with_type=True)) == 50


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("cannot read <_io.BytesIO object at 0x7f3a5c1e2d40>", "cannot read <_io.BytesIO object>"),
        ("<function f at 0x7F3A5C1E2D40> and <object at 0x1>", "<function f> and <object>"),
        ("<bound method A.f of <A object at 0x7f3a5c1e2d40>>", "<bound method A.f of <A object>>"),
        ("illegal access to 0x7f3a5c1e2d40", "illegal access to"),
        ("marker 0xd9 instead of 0xda", "marker 0xd9 instead of 0xda"),
        ("it is at 10x7 px", "it is at 10x7 px"),
        ("/tmp/tmpab12_xyz/a.json is broken", "a temporary file/a.json is broken"),
        ("'/tmp/tmpab12_xyz': gone", "'a temporary file': gone"),
        ("/var/x/diptych-plan-ab12_xyz/a", "a temporary file/a"),
        ("/data/tmp/photos/template.jpg", "/data/tmp/photos/template.jpg"),
        ("gs://bucket/tmpfiles/a.jpg", "gs://bucket/tmpfiles/a.jpg"),
    ],
)
def test_what_differs_between_runs_is_left_out(message: str, expected: str) -> None:
    assert one_line(ValueError(message)) == expected


def test_errors_of_libraries_are_the_same_twice() -> None:
    quoted = set()
    for _ in range(2):
        with pytest.raises(UnidentifiedImageError) as raised:
            Image.open(io.BytesIO(b"no image"))
        with tempfile.TemporaryDirectory() as folder, pytest.raises(OSError, match="No such file") as missing:
            Path(folder, "a").read_bytes()
        quoted.add((one_line(raised.value), one_line(missing.value)))
    assert len(quoted) == 1
    assert not re.search(r"0x|/tmp", str(quoted))

import os
from pathlib import Path

import pytest

from diptych.models.errors import ModelError, ModelOptionError
from diptych.models.files.location import absolute, absolute_if_there, is_local, redacted
from diptych.transforms import errors

SIGNED = "https://user:pass@host.example:8443/a/b%20c.tar?X-Amz-Signature=s3cret&x=1/2#part"


@pytest.mark.parametrize(
    ("location", "path"),
    [
        ("data", "{cwd}/data"),
        ("./data/", "{cwd}/data"),
        ("data/../other", "{cwd}/other"),
        (".", "{cwd}"),
        ("data/*.tar", "{cwd}/data/*.tar"),
        ("数据/甲.tar", "{cwd}/数据/甲.tar"),
        ("a b?.tar", "{cwd}/a b?.tar"),
        ("~/data", "{home}/data"),
        ("~x", "{cwd}/~x"),
        ("file://data", "{cwd}/data"),
        ("local://data", "{cwd}/data"),
        ("file:///data", "/data"),
        ("/data/x", "/data/x"),
        ("zip://a.jpg::data/b.zip", "zip://a.jpg::{cwd}/data/b.zip"),
        ("link/../x", "{cwd}/link/../x"),
        ("gs://bucket/data", "gs://bucket/data"),
        ("memory://data", "memory://data"),
        ("https://host/a.tar?x=../y", "https://host/a.tar?x=../y"),
        ("simplecache::gs://bucket/a", "simplecache::gs://bucket/a"),
        ("", ""),
        (" ", " "),
    ],
)
def test_local_paths_are_made_absolute(location, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere" / "far").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "far")
    expected = path.format(cwd=tmp_path, home=os.path.expanduser("~"))
    assert absolute(location) == expected
    assert absolute(expected) == expected


def test_names_stay_names_unless_something_has_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        absolute_if_there("sentence-transformers/all-MiniLM-L6-v2")
        == "sentence-transformers/all-MiniLM-L6-v2"
    )
    Path("org/model").mkdir(parents=True)
    assert absolute_if_there("org/model") == f"{tmp_path}/org/model"
    assert absolute_if_there("x" * 5000) == "x" * 5000
    assert absolute_if_there("gs://b/m") == "gs://b/m"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (SIGNED, "https://host.example:8443/a/b%20c.tar"),
        (f"GET {SIGNED} failed", "GET https://host.example:8443/a/b%20c.tar failed"),
        (
            f"403, message='Forbidden', url='{SIGNED}'",
            "403, message='Forbidden', url='https://host.example:8443/a/b%20c.tar'",
        ),
        (f"cannot read ({SIGNED}).", "cannot read (https://host.example:8443/a/b%20c.tar)."),
        (f"{SIGNED}: gone", "https://host.example:8443/a/b%20c.tar: gone"),
        ("http://[::1]:80/x?sig=1", "http://[::1]:80/x"),
        ("https://host?sig=1", "https://host"),
        ("https://host/x?sig=1, https://u@host/y?sig=2", "https://host/x, https://host/y"),
        ("simplecache::https://u:p@h/x?sig=1", "simplecache::https://h/x"),
        ("zip://a.jpg::https://u:p@h/b.zip?sig=1", "zip://a.jpg::https://h/b.zip"),
        ("bert:https://u:p@h/m?sig=1", "bert:https://h/m"),
        ("s3://KEY:SECRET@bucket/x", "s3://bucket/x"),
        ("s3://bucket/x?versionId=3", "s3://bucket/x"),
        ("sftp://me:pw@host/x", "sftp://host/x"),
        ("s3://bucket/shard-0000?.tar", "s3://bucket/shard-0000?.tar"),
        ("gs://bucket/x?/*.tar", "gs://bucket/x?/*.tar"),
        (
            "abfs://container@account.dfs.core.windows.net/x",
            "abfs://container@account.dfs.core.windows.net/x",
        ),
        ("github://org:repo@main/x", "github://org:repo@main/x"),
        ("gs://bucket/me@home.jpg", "gs://bucket/me@home.jpg"),
        ("/local/a?b=1@2.jpg", "/local/a?b=1@2.jpg"),
        ("file:///local/a?b=1@2.jpg", "file:///local/a?b=1@2.jpg"),
        ("memory://a/b?c=1", "memory://a/b?c=1"),
        ("what is a://?", "what is a://?"),
    ],
)
def test_what_gives_access_is_left_out(text, shown):
    assert redacted(text) == shown
    assert redacted(shown) == shown


@pytest.mark.parametrize(
    "kind",
    [
        errors.DiptychError,
        errors.OptionError,
        errors.InputError,
        errors.MissingInputError,
        errors.ModelInputError,
        errors.OutputError,
        errors.FailureLimitError,
        ModelError,
        ModelOptionError,
    ],
)
def test_no_error_shows_it(kind):
    assert str(kind(f"{SIGNED} is gone.")) == "https://host.example:8443/a/b%20c.tar is gone."


def test_what_is_on_this_machine():
    assert [is_local(url) for url in ("x", "/x", "file:///x", "memory://x", "zip://a::b")] == [True] * 5
    assert [is_local(url) for url in ("gs://b/x", "https://h/x", "zip://a::s3://b/c")] == [False] * 3

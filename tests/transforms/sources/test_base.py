import random
import re

import pytest

from diptych.transforms.errors import InputError
from diptych.transforms.sources.base import shard_names


def is_safe(name: str) -> bool:
    # `-00000-00000.parquet` comes after it, and most disks take 255 bytes
    return re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name) is not None and len(name) <= 255 - 20


@pytest.mark.parametrize(
    "paths",
    [
        ["A.tar", "a.tar"],
        ["x/A.tar", "X/a.tar", "x/a.TAR"],
        ["a.tar", "a.tar.gz", "a.tgz", "a"],
        ["a/b.tar", "a__b.tar"],
        ["ä.tar", "a\u0308.tar", "ae.tar", "_.tar"],
        ["\udcff.tar", "\udcfe.tar"],
        ["long/" * 40 + "1.tar", "long/" * 40 + "2.tar"],
        ["..tar", ".tar", "...tar"],
        ["猫.tar", "犬.tar"],
        ["a b.tar", "a_b.tar", "a\nb.tar"],
    ],
)
def test_paths_that_look_alike_have_names_of_their_own_on_a_disk_that_ignores_case(paths):
    names = shard_names(paths)
    assert len({name.lower() for name in names}) == len(paths)
    assert all(map(is_safe, names))
    assert shard_names(paths[::-1]) == names[::-1]


@pytest.mark.parametrize("alphabet", ["0123456789", "猫犬鳥魚馬牛羊虎"])
def test_many_names_that_are_cut_stay_apart(alphabet):
    draw = random.Random(1)
    prefix = "shards/of/a/data/set/with/a/long/common/prefix/" * 3
    paths = sorted({prefix + "".join(draw.choices(alphabet, k=12)) + ".tar" for _ in range(50_000)})
    assert len({name.lower() for name in shard_names(paths)}) == len(paths)


def test_digests_are_long_enough_for_a_million_millions_of_names():
    [name] = shard_names(["猫.tar"])
    assert len(name.rpartition("-")[2]) * 4 >= 128


def test_plain_names_stay_as_they_are():
    assert shard_names(["train/00000.tar", "val-1.tar.gz"]) == ["train__00000", "val-1"]


def test_one_path_twice_is_refused_with_both():
    with pytest.raises(
        InputError, match=r"'a\.tar' and 'a\.tar' would both be written as a-.*Give each input once"
    ):
        shard_names(["a.tar", "b.tar", "a.tar"])

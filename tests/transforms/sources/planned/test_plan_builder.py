import collections

from hypothesis import given
from hypothesis import strategies as st

from diptych.transforms.sources.planned.entries import BadEntry, Caption, Image
from diptych.transforms.sources.planned.image_folder import ImageFile
from diptych.transforms.sources.planned.plan_builder import open_plan_builder

NAMES = ["a.jpg", "b.jpg", "x/a.jpg", "x/c.png", "d"]

parts = st.lists(
    st.one_of(
        st.builds(Image, st.just(0), st.integers(0, 5), st.sampled_from(NAMES), st.just(()), st.booleans()),
        st.builds(Caption, st.integers(0, 5), st.integers(0, 3), st.text("ab", max_size=3)),
        st.just(BadEntry("bad")),
    ),
    max_size=30,
)


@given(parts, st.sets(st.sampled_from(NAMES)))
def test_every_part_comes_out_once(parts, files):
    rows = iter(range(len(parts)))
    parts = [part._replace(row=next(rows)) if isinstance(part, Image) else part for part in parts]
    with open_plan_builder() as builder:
        builder.add(parts)
        builder.add_files(map(ImageFile, files))
        builder.resolve()
        entries = list(builder.entries())
    images = [part for part in parts if isinstance(part, Image)]
    captions = [part for part in parts if isinstance(part, Caption)]
    unknown = {caption.ref for caption in captions} - {image.ref for image in images}
    reasons = collections.Counter(entry.reason for entry in entries)
    joined = builder.counters["entries_joined"]
    assert len(entries) + joined == sum(image.wanted for image in images) + reasons["bad_annotation"] + len(
        unknown
    )
    assert reasons["bad_annotation"] == sum(isinstance(part, BadEntry) for part in parts)
    assert reasons["unknown_image"] == len(unknown)
    good = [entry for entry in entries if entry.reason is None]
    assert len({entry.key for entry in good}) == len(good)
    assert all(entry.image.path in files for entry in good)
    first = {image.ref: image.row for image in reversed(images)}
    for entry in good:
        [ref] = [ref for ref, row in first.items() if row == entry.row]
        # Entries of one file are one row: those of its path that are the first with their id, and asked for
        path = next(image.path for image in images if image.row == entry.row)
        refs = {
            image.ref
            for image in images
            if image.path == path and image.wanted and first[image.ref] == image.row
        }
        assert ref in refs
        mine = [caption for caption in captions if caption.ref in refs]
        assert entry.captions == [caption.text for caption in sorted(mine, key=lambda c: c.ordinal)]
    assert len({entry.image.path for entry in good}) == len(good)


def test_sizes_add_up_by_shard(tmp_path):
    with open_plan_builder() as builder:
        builder.add_files(ImageFile(f"{i}.jpg", 10**i) for i in range(5))
        builder.list_files()
        facts = builder.write(f"{tmp_path}/p.arrow", {}, 2)
    assert facts.shard_sizes_bytes == [11, 1100, 10000]
    assert facts.num_rows == 5


def test_temporary_files_go(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with open_plan_builder() as builder:
        builder.add([BadEntry("bad")])
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())

import collections
import dataclasses
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from diptych.pipelines.lifecycle.output_contents import OutputContents
from diptych.pipelines.lifecycle.output_folder import (
    DatasetClaim,
    State,
    check_output,
    open_output,
    start_writing,
    take_output,
)
from diptych.transforms.errors import OutputError
from diptych.transforms.finish import Totals

RUN = {"job": "prepare", "options": {"size": 224}}
OTHER_RUN = {"job": "prepare", "options": {"size": 96}}
FILES = {"images": {"a-00000.parquet": 7, "a-00001.parquet": 5}}
TOTALS = Totals(shards=1, files=2, size_bytes=12)
NUM_FILES = 10_000
# The emulators take milliseconds for each
NUM_OBJECTS = 200


def no_files(dataset: str) -> set[str]:
    raise AssertionError(f"the files of {dataset} are not looked at")


def state_of(contents: OutputContents, **claim: Any) -> State:
    wanted = DatasetClaim(**{"dataset": "images", "fingerprint": RUN, **claim})
    return open_output("out", contents, wanted, no_files)


class TestDecision:
    """No disk: what is decided follows from the contents alone."""

    @pytest.mark.parametrize(
        ("contents", "state"),
        [
            (OutputContents(), State.FRESH),
            (OutputContents(jobs={"images": RUN}), State.RESUMED),
            (OutputContents(jobs={"images": RUN}, files=FILES), State.RESUMED),
            (OutputContents(jobs={"images": RUN}, files=FILES, success={"images": TOTALS}), State.DONE),
            (
                OutputContents(jobs={"images": RUN}, files={}, success={"images": TOTALS}),
                State.RESUMED,  # somebody has deleted the files
            ),
            (
                OutputContents(
                    jobs={"images": RUN},
                    files={"images": {"a-00000.parquet": 12}},
                    success={"images": TOTALS},
                ),
                State.RESUMED,  # or one of them
            ),
        ],
    )
    def test_of_the_same_run(self, contents: OutputContents, state: State) -> None:
        assert state_of(contents) is state

    @pytest.mark.parametrize(
        ("contents", "claim", "message"),
        [
            (OutputContents(jobs={"model": {}}), {}, "`diptych train` wrote a model"),
            (OutputContents(files=FILES), {}, r"holds a-00000.parquet, .*no job of Diptych owns it"),
            (OutputContents(rejects={"read": ["a"]}), {}, "no job of Diptych owns it"),
            (OutputContents(jobs={"images": OTHER_RUN}, files=FILES), {}, "options.size is 96 there and 224"),
            (OutputContents(jobs={"images": OTHER_RUN}), {}, "may be at work"),
            (
                OutputContents(jobs={"images": RUN}, files=FILES),
                {"dataset": "captions"},
                "holds images, made from another input",
            ),
            (
                OutputContents(jobs={"images": RUN}, files={**FILES, "captions": {"x": 1}}),
                {"dataset": "captions", "reads_own_images": True},
                r"_job.json does not name it",
            ),
        ],
    )
    def test_of_something_else(self, contents: OutputContents, claim: dict[str, Any], message: str) -> None:
        with pytest.raises(OutputError, match=message):
            state_of(contents, **claim)

    def test_files_are_looked_at_before_they_are_deleted_and_only_then(self) -> None:
        contents = OutputContents(jobs={"images": OTHER_RUN}, files=FILES)
        wanted = DatasetClaim("images", RUN, overwrite=True)
        asked = []

        def written(dataset: str) -> set[str]:
            asked.append(dataset)
            return set(FILES.get(dataset, {}))

        assert open_output("out", contents, wanted, written) is State.FRESH
        assert "images" in asked
        with pytest.raises(OutputError, match="this job did not write"):
            open_output("out", contents, wanted, lambda _: set())

    def test_images_of_its_own_may_have_captions_beside_them(self) -> None:
        contents = OutputContents(jobs={"images": RUN}, files=FILES)
        assert state_of(contents, dataset="captions", reads_own_images=True) is State.FRESH


def start(root: str) -> State:
    """Does what a job does before it reads anything."""
    claim = DatasetClaim("images", RUN)
    contents = OutputContents.read(root)
    state = check_output(root, claim, contents)
    take_output(root, claim, contents)
    left = start_writing(root, claim, ["a"], contents=contents)
    assert left.has_files is (state is State.RESUMED)
    return state


def fill(root: str, num_files: int) -> None:
    fs, path = fsspec.core.url_to_fs(root)
    names = {f"{path}/images/a-{i:05d}.parquet": b"x" for i in range(num_files)}
    fs.pipe(names | {f"{path}/rejects/image/a-{i:05d}.parquet": b"x" for i in range(num_files // 10)})
    fs.invalidate_cache()


def test_a_start_lists_each_folder_of_a_bucket_once(flaky_bucket) -> None:
    bucket, proxy = flaky_bucket
    root = f"{bucket.url}/out"
    assert start(root) is State.FRESH
    fill(root, NUM_OBJECTS)
    proxy.listings.clear()
    assert start(root) is State.RESUMED
    listed = collections.Counter(prefix.rstrip("/") for prefix in proxy.listings)
    assert {"out/images", "out/rejects", "out/rejects/image", "out/_records"} <= listed.keys()
    assert listed.most_common(1)[0][1] == 1, listed


def test_a_start_lists_each_folder_once(monkeypatch: pytest.MonkeyPatch) -> None:
    root = "memory://counted/out"
    assert start(root) is State.FRESH
    fill(root, NUM_FILES)
    listed: collections.Counter[str] = collections.Counter()
    ls = MemoryFileSystem.ls

    def counted(fs: MemoryFileSystem, path: str, *args: Any, **kwargs: Any) -> Any:
        listed[fs._strip_protocol(path)] += 1
        return ls(fs, path, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "ls", counted)
    try:
        assert start(root) is State.RESUMED
    finally:
        MemoryFileSystem.store.clear()
    assert listed["/counted/out/images"] == 1
    assert listed.most_common(1)[0][1] == 1, listed


def test_contents_are_what_was_written(tmp_path) -> None:
    root = str(tmp_path / "out")
    assert OutputContents.read(root) == OutputContents(is_of_earlier_version=True)
    start(root)
    fields = {field.name for field in dataclasses.fields(OutputContents)}
    contents = OutputContents.read(root)
    assert fields == set(vars(contents))
    assert contents.jobs == contents.shown_jobs == {"images": RUN}
    assert not contents.is_of_earlier_version

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diptych.models.training.options import Word2VecTraining
from diptych.pipelines.demo_data.layouts import SceneFolders, write_data_set
from diptych.pipelines.options.train import RowSource, TrainOptions
from diptych.pipelines.training.rows import Rows, describe, is_held_out, open_rows
from diptych.transforms.errors import InputError, OptionError
from diptych.transforms.prepared import PreparedImages
from diptych.transforms.schemas import images_schema
from diptych.transforms.sources.open import SourceOptions

NUM_ROWS = 200


def write_output(root: Path, keys: list[str], name: str = "") -> str:
    """Writes an output with three captions for each third row, two for the next, none for the next."""
    (root / "images").mkdir(parents=True)
    rows = [
        {
            "key": key,
            "image": {"bytes": f"{key}!".encode(), "path": key},
            "captions": [f"{key} {i}" for i in range(n)],
        }
        for key, n in zip(keys, [3, 2, 0] * len(keys), strict=False)
    ]
    pq.write_table(pa.Table.from_pylist(rows, images_schema()), root / "images" / "a-00000.parquet")
    (root / "_SUCCESS.json").write_text(json.dumps({"images": {"files": 1, "written": len(rows)}}))
    (root / "_job.json").write_text(json.dumps({"images": {"job": "prepare", "name": name}}))
    return str(root)


@pytest.fixture
def output(tmp_path: Path) -> str:
    return write_output(tmp_path / "out", [f"k{i}" for i in range(NUM_ROWS)])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> SceneFolders:
    return write_data_set(str(tmp_path_factory.mktemp("scenes") / "data"), 30, 0)


def asked(inputs: RowSource, **more: object) -> TrainOptions:
    return TrainOptions(inputs, "unused", Word2VecTraining(), quiet=True, **more)


def keys(rows: Rows) -> list[str]:
    return [key for batch in rows.batches() for key in batch.keys]


class TestRows:
    def test_those_with_a_caption_in_order(self, output):
        rows = Rows((PreparedImages.open(output),)).counted()
        expected = [f"k{i}" for i in range(NUM_ROWS) if i % 3 < 2]
        assert keys(rows) == expected
        assert rows.num_rows == len(expected)
        batch = next(rows.batches())
        assert batch.images[1] == b"k1!"
        assert batch.captions[:3] == [["k0 0", "k0 1", "k0 2"], ["k1 0", "k1 1"], ["k3 0", "k3 1", "k3 2"]]
        assert list(rows.captions()) == [c for batch in rows.batches() for cs in batch.captions for c in cs]
        assert rows.num_captions == len(list(rows.captions()))

    def test_several_outputs_follow_one_another(self, tmp_path, output):
        other = write_output(tmp_path / "other", ["x", "y"])
        rows = Rows((PreparedImages.open(other), PreparedImages.open(output)))
        assert keys(rows)[:4] == ["x", "y", "k0", "k1"]

    def test_share_splits_without_a_rest(self, output):
        train, validation = open_rows(asked(RowSource((output,)), validation_share=0.3), Path("unused"))
        every = [f"k{i}" for i in range(NUM_ROWS) if i % 3 < 2]
        held_out = keys(validation)
        assert sorted(keys(train) + held_out) == sorted(every)
        assert 0.15 * len(every) < len(held_out) < 0.45 * len(every)
        assert (train.num_rows, validation.num_rows) == (len(keys(train)), len(held_out))

    def test_share_is_of_keys_and_not_of_their_order(self, tmp_path, output):
        turned = write_output(tmp_path / "turned", [f"k{i}" for i in reversed(range(NUM_ROWS))])
        held_out = [is_held_out(f"k{i}", 0.3) for i in range(NUM_ROWS)]
        for url in (output, turned):
            _, validation = open_rows(asked(RowSource((url,)), validation_share=0.3), Path("unused"))
            assert keys(validation)
            assert all(held_out[int(key[1:])] for key in keys(validation))

    def test_a_larger_share_keeps_what_a_smaller_held_out(self):
        names = [f"k{i}" for i in range(1000)]
        small, large = ({name for name in names if is_held_out(name, share)} for share in (0.1, 0.3))
        assert small < large
        assert is_held_out("a lone surrogate \ud800", 0.999)


class TestOpen:
    def test_raw_rows_are_prepared_once(self, tmp_path, scenes):
        options = asked(
            RowSource((str(scenes.coco / "annotations/captions_train2017.json"),)), validation_share=0.4
        )
        train, validation = open_rows(options, tmp_path)
        assert train.num_rows + validation.num_rows == 27
        written = [path.stat().st_mtime_ns for path in sorted((tmp_path / "train" / "images").iterdir())]
        again, _ = open_rows(options, tmp_path)
        assert keys(again) == keys(train)
        assert [p.stat().st_mtime_ns for p in sorted((tmp_path / "train" / "images").iterdir())] == written

    def test_validation_of_its_own(self, tmp_path, scenes, output):
        source = RowSource((str(scenes.webdataset / "val-00000.tar"),))
        train, validation = open_rows(asked(RowSource((output,)), validation=source), tmp_path)
        assert (train.num_rows, validation.num_rows) == (134, 3)
        assert sorted(path.name for path in tmp_path.iterdir() if path.name != "out") == ["validation"]

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ([], r"holds no row with a caption, so there is nothing to learn from"),
            (["a"], r"Of the 1 rows of .* none is held out by --validation_share 0.05"),
        ],
    )
    def test_too_few(self, tmp_path, names, message):
        url = write_output(tmp_path / "few", names)
        with pytest.raises(InputError, match=message):
            open_rows(asked(RowSource((url,))), tmp_path)

    def test_no_row_left_to_train_on(self, tmp_path):
        url = write_output(tmp_path / "few", ["a"])
        with pytest.raises(InputError, match=r"leaves no row that is not held out"):
            open_rows(asked(RowSource((url,)), validation_share=0.9999), tmp_path)

    def test_one_set_is_empty(self, tmp_path, output):
        empty = RowSource((write_output(tmp_path / "empty", []),))
        with pytest.raises(
            InputError, match=r"empty holds no row with a caption, so nothing can be validated"
        ):
            open_rows(asked(RowSource((output,)), validation=empty), tmp_path)
        with pytest.raises(InputError, match=r"empty leaves no row with a caption to train on"):
            open_rows(asked(empty, validation=RowSource((output,))), tmp_path)


class TestDescribe:
    def test_says_when_prepared_rows_change(self, tmp_path, output):
        other = write_output(tmp_path / "other", ["a"] * NUM_ROWS, name="other")
        assert describe(RowSource((output,))) == describe(RowSource((f"{output}/images/",)))
        assert describe(RowSource((output,))) != describe(RowSource((other,)))
        assert describe(RowSource((output, other))) != describe(RowSource((other, output)))

    def test_says_when_raw_rows_change(self, scenes):
        train, val = (
            describe(RowSource((str(scenes.coco / f"annotations/captions_{split}2017.json"),)))
            for split in ("train", "val")
        )
        assert train != val

    def test_where_an_image_folder_is_says_nothing(self, scenes):
        file = str(scenes.flickr30k / "results_20130124.token")
        images = scenes.flickr30k / "flickr30k-images"
        first = describe(RowSource((file,), source=SourceOptions(f"{images}/")))
        assert first["images"] == "flickr30k-images"
        assert first == describe(RowSource((file,), source=SourceOptions(str(images))))

    def test_options_that_do_not_go_with_prepared_rows(self, output):
        for source in (SourceOptions("d"), SourceOptions(None, "val")):
            with pytest.raises(OptionError, match=r"goes with an annotation file; .*out is prepared already"):
                describe(RowSource((output,), source=source))

    def test_inputs_of_two_kinds(self, output, scenes):
        with pytest.raises(OptionError, match=r"is an output of Diptych, and .*webdataset is not"):
            describe(RowSource((output, str(scenes.webdataset))))

    def test_nothing_there(self, tmp_path):
        with pytest.raises(InputError, match="is not there"):
            describe(RowSource((str(tmp_path / "nowhere"),)))

    def test_not_finished(self, output):
        Path(output, "_SUCCESS.json").unlink()
        with pytest.raises(InputError, match="is not finished"):
            describe(RowSource((output,)))

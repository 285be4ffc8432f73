import pyarrow as pa
import pytest

from diptych.models.base import GeneratedImage
from diptych.models.metrics.matching import Match
from diptych.transforms.chunk import Chunk, ChunkKey, reject_batch
from diptych.transforms.inference.generate import explode_samples, generate_task, match_task, sample_seed
from diptych.transforms.inference.micro_batches import Failure
from diptych.transforms.inference.run_model import add_results
from diptych.transforms.schemas import PROMPTS, TEXTS, generated_schema


def texts(rows):
    batch = pa.RecordBatch.from_arrays(
        [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), TEXTS, strict=True)],
        schema=TEXTS,
    )
    return Chunk(ChunkKey("s", 0), batch, reject_batch("s", "read", ()), True, records=2)


@pytest.fixture
def chunk():
    return explode_samples(texts([("a", 0, "one", 7), ("a", 1, "two", 7), ("ö", 0, "drei", 8)]), 2, seed=3)


class TestSamples:
    def test_a_row_a_sample(self, chunk):
        assert chunk.rows.schema.equals(PROMPTS)
        names = ("key", "prompt_index", "sample", "prompt", "row")
        rows = [tuple(row[name] for name in names) for row in chunk.rows.to_pylist()]
        assert rows == [
            ("a", 0, 0, "one", 7),
            ("a", 0, 1, "one", 7),
            ("a", 1, 0, "two", 7),
            ("a", 1, 1, "two", 7),
            ("ö", 0, 0, "drei", 8),
            ("ö", 0, 1, "drei", 8),
        ]
        assert chunk.num_records == 2
        assert chunk.num_read == 6

    def test_seeds_are_all_different_and_follow_from_the_names(self, chunk):
        seeds = chunk.rows["seed"].to_pylist()
        assert len(set(seeds)) == 6
        assert seeds[3] == sample_seed(3, "a", 1, 1)
        assert seeds[3] != sample_seed(4, "a", 1, 1)
        assert max(seeds) > 2**60

    def test_more_samples_leave_the_first_as_they_are(self, chunk):
        more = explode_samples(texts([("a", 0, "one", 7), ("a", 1, "two", 7), ("ö", 0, "drei", 8)]), 5, 3)
        assert more.rows["seed"].to_pylist()[0:2] == chunk.rows["seed"].to_pylist()[0:2]
        assert more.rows["seed"].to_pylist()[5:7] == chunk.rows["seed"].to_pylist()[2:4]

    def test_no_rows(self):
        empty = texts([("a", 0, "one", 7)])
        empty = Chunk(empty.key, empty.rows.slice(0, 0), empty.rejects, True)
        assert explode_samples(empty, 3, 0).rows.num_rows == 0


def results():
    images = [GeneratedImage(f"png {i}".encode()) for i in range(6)]
    images[1] = GeneratedImage(b"", "no_known_word")
    images[4] = Failure("RuntimeError: no")
    return images


def rejects(chunk):
    columns = ("key", "row", "stage", "reason", "message")
    return list(zip(*(chunk.rejects[name].to_pylist() for name in columns), strict=True))


class TestImages:
    def test_are_beside_their_prompts(self, chunk):
        done = add_results(chunk, results(), generate_task("jpeg"))
        assert done.rows.schema.equals(generated_schema())
        assert done.rows["image"].to_pylist() == [
            {"bytes": b"png 0", "path": "a_0_0.jpg"},
            {"bytes": b"png 2", "path": "a_1_0.jpg"},
            {"bytes": b"png 3", "path": "a_1_1.jpg"},
            {"bytes": b"png 5", "path": "ö_0_1.jpg"},
        ]
        assert done.rows["seed"].to_pylist()[3] == sample_seed(3, "ö", 0, 1)
        assert rejects(done) == [
            ("a", 7, "generate", "no_known_word", "the model's text vectors know no word of the prompt"),
            ("ö", 8, "generate", "model_error", "RuntimeError: no"),
        ]

    def test_those_that_do_not_show_their_prompt_are_rejected(self, chunk):
        made = add_results(chunk, results(), generate_task("png", is_matched=True))
        task = match_task(0.5)
        assert [pair.prompt for pair in task.inputs(made.rows)] == ["one", "two", "two", "drei"]
        assert task.inputs(made.rows)[1].image == b"png 2"
        matches = [Match("eins", 0.75), Match("zwei", 0.25), Failure("ValueError: x"), Match("drei", 0.5)]
        done = add_results(made, matches, task)
        assert done.rows.schema.equals(generated_schema(with_match=True))
        assert done.rows["caption"].to_pylist() == ["eins", "drei"]
        assert done.rows["match"].to_pylist() == [0.75, 0.5]
        assert rejects(done)[2:] == [
            ("a", 7, "generate", "low_match", "0.250 is below 0.5: it shows 'zwei'"),
            ("a", 7, "generate", "model_error", "ValueError: x"),
        ]
        assert done.num_read == 6

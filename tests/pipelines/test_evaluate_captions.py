import contextlib
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pycocotools.coco import COCO

from diptych.models.metrics.caption_scores import SCORES, score_captions
from diptych.models.metrics.ptb_tokenizer import tokenize
from diptych.pipelines.cli import main
from diptych.pipelines.demo_data.layouts import write_data_set
from diptych.pipelines.evaluate_captions import evaluate_captions, read_candidates
from diptych.pipelines.options.evaluate import EvaluateCaptionsOptions
from diptych.pipelines.options.prepare import PrepareOptions
from diptych.pipelines.prepare import prepare
from diptych.transforms.errors import InputError, OutputError

CAPTIONS = {
    "000000000139": "a dog runs on the beach",
    "000000000285": "A man's red t-shirt",
    "000000000632": "",
    "000000000724": "two cats sit by a tree .",
}
REFERENCES = {
    "000000000139": ["A dog runs on the beach.", "A brown dog, running", "a beach"],
    "000000000285": ["a man in a red t-shirt", "the man's shirt is red"],
    "000000000632": ["a bird flies"],
    "000000000724": ["Two cats sit near a tree."],
}


def write_output(folder, rows, dataset="captions"):
    """Writes what a job that has finished leaves: two files, `rows` of (key, caption[, references])."""
    (folder / dataset).mkdir(parents=True)
    half = len(rows) // 2
    for index, part in enumerate((rows[:half], rows[half:])):
        columns = dict(
            zip(("key", "caption", "references"), map(list, zip(*part, strict=True)), strict=False)
        )
        if "references" in columns:
            columns["references"] = pa.array(columns["references"], pa.list_(pa.string()))
        columns["candidates"] = [[row[1]] for row in part]
        pq.write_table(
            pa.table(columns), folder / dataset / f"val-{index:05}.parquet", write_page_checksum=True
        )
    (folder / "_job.json").write_text("{}")
    totals = {"shards": 1, "files": 2, "read": len(rows), "written": len(rows)}
    (folder / "_SUCCESS.json").write_text(json.dumps({dataset: totals}))
    return str(folder)


@pytest.fixture
def out(tmp_path):
    """An output without references of its own."""
    return write_output(tmp_path / "out", list(CAPTIONS.items()))


@pytest.fixture
def coco(tmp_path):
    """COCO's annotation of the same images, and of one more."""
    said = {**REFERENCES, "000000001000": ["more"]}
    images = [{"id": int(key), "file_name": f"{key}.jpg"} for key in said]
    annotations = [
        {"id": i, "image_id": int(key), "caption": text}
        for i, (key, text) in enumerate((key, text) for key, texts in said.items() for text in texts)
    ]
    path = tmp_path / "captions_val2017.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    return str(path)


def expected(keys=tuple(CAPTIONS)):
    return score_captions(
        [tokenize(CAPTIONS[key]) for key in keys],
        [[tokenize(text) for text in REFERENCES[key]] for key in keys],
    )


class TestScores:
    def test_against_the_references_of_the_output(self, tmp_path):
        rows = [(key, caption, REFERENCES[key]) for key, caption in CAPTIONS.items()]
        out = write_output(tmp_path / "out", [*rows, ("x", "no reference", []), ("y", "nor here", None)])
        report = evaluate_captions(EvaluateCaptionsOptions(out))
        assert report["scores"] == pytest.approx(expected())
        assert (report["num_scored"], report["num_references"], report["num_without_references"]) == (4, 7, 2)

    def test_against_a_coco_annotation(self, out, coco):
        report = evaluate_captions(EvaluateCaptionsOptions(out, coco))
        assert report["scores"] == pytest.approx(expected())
        assert list(report["scores"]) == list(SCORES)
        assert (report["num_without_references"], report["num_without_candidate"]) == (0, 1)

    def test_only_the_images_that_are_in_both(self, out, tmp_path):
        path = tmp_path / "results.token"
        keys = ["000000000285", "000000000724"]
        lines = [f"{key}.jpg#{i}\t{text}" for key in keys for i, text in enumerate(REFERENCES[key])]
        path.write_text("\n".join([*lines, "other.jpg#0\ta"]))
        report = evaluate_captions(EvaluateCaptionsOptions(out, str(path)))
        assert report["scores"] == pytest.approx(expected(keys))
        assert report["num_without_references"] == 2
        assert report["num_without_candidate"] == 1

    def test_of_rows_with_one_key_the_first_counts(self, tmp_path, coco):
        rows = [*CAPTIONS.items(), ("000000000139", "something else")]
        report = evaluate_captions(EvaluateCaptionsOptions(write_output(tmp_path / "twice", rows), coco))
        assert report["scores"] == pytest.approx(expected())
        assert report["num_repeated_keys"] == 1

    def test_keys_are_those_that_prepare_makes(self, tmp_path):
        data = write_data_set(str(tmp_path / "data"), 12, seed=1)
        for name in ("coco", "flickr30k"):
            folder = str(getattr(data, name))
            prepare(PrepareOptions((folder,), str(tmp_path / name), quiet=True))
            images = pq.read_table(tmp_path / name / "images", columns=["key", "captions"]).to_pylist()
            rows = [(row["key"], row["captions"][0], row["captions"]) for row in images]
            out = write_output(tmp_path / f"{name}-captions", rows)
            report = evaluate_captions(EvaluateCaptionsOptions(out, folder))
            assert report["num_scored"] == len(rows) > 0
            assert report["num_without_candidate"] == 0
            assert report["scores"]["bleu_4"] == pytest.approx(1, abs=1e-6)
            assert (
                report["scores"]["bleu_1"]
                == evaluate_captions(EvaluateCaptionsOptions(out))["scores"]["bleu_1"]
            )


class TestResults:
    def test_cocos_own_tools_open_them(self, out, coco, tmp_path):
        evaluate_captions(EvaluateCaptionsOptions(out, coco, results=str(tmp_path / "results.json")))
        with contextlib.redirect_stdout(io.StringIO()):
            results = COCO(coco).loadRes(str(tmp_path / "results.json"))
        assert {ann["image_id"]: ann["caption"] for ann in results.anns.values()} == {
            int(key): caption for key, caption in CAPTIONS.items()
        }

    def test_none_of_an_image_that_the_annotation_does_not_list(self, tmp_path, coco):
        out = write_output(tmp_path / "more", [*CAPTIONS.items(), ("000000009999", "elsewhere")])
        path = tmp_path / "results.json"
        evaluate_captions(EvaluateCaptionsOptions(out, coco, results=str(path)))
        assert {row["image_id"] for row in json.loads(path.read_text())} == {int(key) for key in CAPTIONS}

    def test_the_ids_are_the_annotations_own(self, tmp_path):
        path = tmp_path / "captions_mine.json"
        images = [{"id": 7, "file_name": "b.png"}, {"id": 8, "file_name": "a.png"}]
        annotations = [{"id": 1, "image_id": 8, "caption": "a dog"}]
        path.write_text(json.dumps({"images": images, "annotations": annotations}))
        out = write_output(tmp_path / "out", [("a", "a dog"), ("b", "no caption there")])
        evaluate_captions(EvaluateCaptionsOptions(out, str(path), results=str(tmp_path / "results.json")))
        assert json.loads((tmp_path / "results.json").read_text()) == [
            {"image_id": 8, "caption": "a dog"},
            {"image_id": 7, "caption": "no caption there"},
        ]

    def test_without_references_as_for_a_test_server(self, tmp_path):
        rows = [("COCO_test2014_000000000042", "a"), ("000000000139", "b"), ("2_b", "c")]
        path = tmp_path / "results.json"
        report = evaluate_captions(
            EvaluateCaptionsOptions(write_output(tmp_path / "out", rows), results=str(path))
        )
        assert [row["image_id"] for row in json.loads(path.read_text())] == [42, 139, "2_b"]
        assert report["scores"] is None


class TestCommand:
    def run(self, *argv):
        return main(["evaluate", "captions", *argv])

    def test_prints_a_table(self, out, coco, capsys):
        assert self.run("--input", out, "--references", coco) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"4 captions of {out} against 7 references of {coco}"
        assert lines[1] == f"BLEU-1   {expected()['bleu_1']:.4f}"
        assert lines[6:] == [f"CIDEr    {expected()['cider']:.4f}", "1 images with references and no caption"]

    def test_prints_and_writes_json(self, out, coco, tmp_path, capsys):
        assert (
            self.run("--input", out, "--references", coco, "--json", "--scores", str(tmp_path / "s.json"))
            == 0
        )
        printed = json.loads(capsys.readouterr().out)
        assert printed == json.loads((tmp_path / "s.json").read_text())
        assert printed["scores"] == pytest.approx(expected())

    def test_says_so_where_there_is_nothing_to_score(self, out, tmp_path, capsys):
        self.run("--input", out, "--results", str(tmp_path / "r.json"))
        assert "4 captions without references, not scored" in capsys.readouterr().out

    @pytest.mark.parametrize("flags", [["--split", "test"], ["--format", "coco"], ["--references", " "]])
    def test_flags_that_do_not_go_together(self, out, flags, capsys):
        assert self.run("--input", out, *flags) == 2
        assert flags[0] in capsys.readouterr().err

    def test_a_folder_that_is_not_there_is_made(self, out, coco, tmp_path):
        results = tmp_path / "not" / "there" / "results.json"
        argv = ["evaluate", "captions", f"--input={out}", f"--references={coco}", f"--results={results}"]
        assert main(argv) == 0
        assert len(json.loads(results.read_text())) == 4

    def test_says_that_cider_of_one_image_is_0_by_definition(self, tmp_path, capsys):
        out = write_output(tmp_path / "out", [("a", "a dog runs", ["a dog runs"])] * 2)
        assert main(["evaluate", "captions", f"--input={out}"]) == 0
        assert "of one image alone it is 0 by definition" in capsys.readouterr().out


class TestRefused:
    def test_no_image_in_common(self, out, tmp_path):
        (tmp_path / "x.token").write_text("other.jpg#0\ta dog\n")
        with pytest.raises(InputError, match="'000000000139', here 'other'"):
            evaluate_captions(EvaluateCaptionsOptions(out, str(tmp_path / "x.token")))

    def test_an_annotation_without_captions(self, out, tmp_path):
        (tmp_path / "captions_x.json").write_text('{"images": [{"id": 1, "file_name": "1.jpg"}]}')
        with pytest.raises(InputError, match="holds no caption"):
            evaluate_captions(EvaluateCaptionsOptions(out, str(tmp_path / "captions_x.json")))

    def test_an_output_without_references(self, out):
        with pytest.raises(InputError, match="Name an annotation with --references"):
            evaluate_captions(EvaluateCaptionsOptions(out))

    def test_no_output(self, tmp_path):
        with pytest.raises(InputError, match=r"has no _job\.json"):
            evaluate_captions(EvaluateCaptionsOptions(str(tmp_path)))

    def test_an_output_of_another_job(self, tmp_path):
        out = write_output(tmp_path / "out", list(CAPTIONS.items()), "embeddings")
        with pytest.raises(InputError, match="holds no captions"):
            list(read_candidates(out))

    def test_a_job_that_has_not_finished(self, out, tmp_path):
        (tmp_path / "out" / "_SUCCESS.json").unlink()
        with pytest.raises(InputError, match="has not finished"):
            list(read_candidates(out))

    def test_no_row(self, tmp_path):
        out = write_output(tmp_path / "out", [("a", "b"), ("c", "d")])
        for file in (tmp_path / "out" / "captions").iterdir():
            pq.write_table(pq.read_table(file).slice(0, 0), file)
        with pytest.raises(InputError, match="holds no row"):
            evaluate_captions(EvaluateCaptionsOptions(out))

    def test_a_damaged_file(self, out, tmp_path):
        path = tmp_path / "out" / "captions" / "val-00001.parquet"
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(OutputError, match=r"val-00001\.parquet cannot be read"):
            list(read_candidates(out))

    @pytest.mark.parametrize("flag", ["results", "scores"])
    def test_a_file_that_cannot_be_written(self, out, coco, tmp_path, flag):
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match="cannot be written"):
            evaluate_captions(EvaluateCaptionsOptions(out, coco, **{flag: str(tmp_path / "file" / "x.json")}))

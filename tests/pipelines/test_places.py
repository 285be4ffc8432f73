"""The same place by another name: relative and absolute paths, and URLs that differ in a signature alone."""

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from kills import files_in

from diptych.models.base import CaptionOptions, ImageOptions, TextOptions
from diptych.models.spec import ModelSpec
from diptych.models.text.word2vec import Word2Vec
from diptych.pipelines.cli import main
from diptych.pipelines.demo_data.layouts import write_data_set
from diptych.pipelines.options.generate import GenerateOptions
from diptych.pipelines.options.models import ModelJobOptions
from diptych.pipelines.options.prepare import PrepareOptions
from diptych.pipelines.options.run import RunOptions
from diptych.pipelines.runners.reach import check_reach
from diptych.transforms.errors import OptionError


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes and a tiny text model."""
    folder = tmp_path_factory.mktemp("home")
    write_data_set(str(folder / "data"), 20, seed=1)
    (folder / "models" / "w2v").mkdir(parents=True)
    Word2Vec(["a", "red", "blue"], np.eye(3, dtype=np.float32)).save(folder / "models" / "w2v")
    return folder


class TestSpelling:
    def test_outputs_are_the_same_bytes(self, home, tmp_path, monkeypatch):
        monkeypatch.chdir(home)
        annotation, images = "data/coco/annotations/captions_train2017.json", "data/coco/train2017"
        outputs = []
        for number, top in enumerate(("", "./", f"{home}/", f"file://{home}/", "models/../")):
            flags = [
                f"--input={top}{annotation}",
                f"--images={top}{images}",
                f"--embed=word2vec:{top}models/w2v",
            ]
            out = tmp_path / str(number)
            assert main(["run", *flags, f"--output={out}", "--quiet"]) == 0
            outputs.append(files_in(out))
        assert all(output == outputs[0] for output in outputs[1:])
        assert not any(str(home).encode() in data for data in outputs[0].values())

    def test_a_run_is_found_again_by_its_other_name(self, home, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "models").symlink_to(home / "models")
        tar = f"{home}/data/webdataset/train-00000.tar"
        assert main(["prepare", f"--input={tar}", "--output=out", "--quiet"]) == 0
        night = ["embed", "--input=out", "--model=word2vec:models/w2v"]
        assert main([*night, "--output=nights/1", "--skip_done_in=nights/*", "--quiet"]) == 0
        for spelled in ("nights/*", f"{tmp_path}/nights/*", "./nights/*"):
            capsys.readouterr()
            output = f"--output={tmp_path}/nights/1"
            assert main([*night, output, f"--skip_done_in={spelled}"]) == 0
            assert "nothing to do" in capsys.readouterr().out

    def test_options_hold_absolute_paths(self, home, monkeypatch):
        monkeypatch.chdir(home)
        text = ModelSpec("word2vec", "models/w2v", TextOptions())
        generator = ModelSpec("vae", "models", ImageOptions(text_model="word2vec:models/w2v"))
        captioner = ModelSpec("hf", "models/w2v", CaptionOptions())
        options = GenerateOptions(
            ("data", "gs://b/x"), "out", model=generator, min_match=0.1, match_with=captioner, match_by=text,
            skip_done_in=("n/*",),
        )  # fmt: skip
        assert (options.inputs, options.output) == ((f"{home}/data", "gs://b/x"), f"{home}/out")
        assert options.skip_done_in == (f"{home}/n/*",)
        assert options.model.location == f"{home}/models"
        assert options.model.options.text_model == f"word2vec:{home}/models/w2v"  # type: ignore[union-attr]
        assert {options.match_with.location, options.match_by.location} == {f"{home}/models/w2v"}  # type: ignore[union-attr]
        hub = ModelSpec("bert", "org/name", TextOptions())
        assert ModelJobOptions(("x",), "o", model=hub).model == hub
        assert (hub.name, options.match_by.name) == ("bert:org/name", "word2vec:w2v")  # type: ignore[union-attr]


class TestReach:
    """Nothing here runs: a pipeline that is empty knows its runner."""

    LOCAL = PrepareOptions(("/local/data",), "gs://b/out")
    CLUSTER = ("--runner=FlinkRunner", "--flink_master=10.0.0.1:8081")

    def pipeline(self, *flags: str) -> beam.Pipeline:
        return beam.Pipeline(options=PipelineOptions(list(flags)))

    def test_a_cluster_wants_a_shared_disk(self, capsys, tmp_path):
        check_reach(
            self.LOCAL,
            self.pipeline(*self.CLUSTER, "--environment_type=EXTERNAL", "--environment_config=x:1"),
        )
        assert capsys.readouterr().err == (
            "diptych: --input /local/data: must be there under the same path on every machine of the cluster, "
            "as on a shared disk.\n"
        )
        text = ModelJobOptions(
            ("gs://b/x",), "gs://b/o", model=ModelSpec("word2vec", str(tmp_path), TextOptions())
        )
        run = RunOptions(("gs://b/x",), "gs://b/o", embed=text)
        for options, flag in ((text, "--model"), (run, "--embed")):
            check_reach(options, self.pipeline(*self.CLUSTER))
            assert capsys.readouterr().err.startswith(f"diptych: {flag} {tmp_path}: must be there")

    @pytest.mark.parametrize(
        "flags",
        [
            ["--runner=FnApiRunner"],
            [*CLUSTER, "--environment_type=LOOPBACK"],
            ["--runner=FlinkRunner", "--flink_master=[local]"],
        ],
    )
    def test_workers_of_this_machine_see_its_disks(self, flags, capsys):
        check_reach(self.LOCAL, self.pipeline(*flags))
        assert capsys.readouterr().err == ""

    def test_urls_and_names_are_seen_from_everywhere(self, capsys):
        hub = ModelSpec("bert", "org/name", TextOptions())
        check_reach(ModelJobOptions(("gs://b/x",), "s3://b/o", model=hub), self.pipeline(*self.CLUSTER))
        assert capsys.readouterr().err == ""

    def test_dataflow_sees_no_local_path(self):
        flags = ("--runner=DataflowRunner", "--project=p", "--region=r", "--temp_location=gs://b/t")
        options = PrepareOptions(("gs://b/x",), "out", beam_args=flags)
        with pytest.raises(
            OptionError, match=r"Dataflow see no disk of this machine: --output /.*/out\. Give URLs"
        ):
            check_reach(
                options, self.pipeline("--runner=FnApiRunner")
            )  # Dataflow's own asks the network first
        check_reach(options, self.pipeline("--runner=FnApiRunner", "--dry_run=True"))


class _Signed(SimpleHTTPRequestHandler):
    """A store that gives what is asked for with a signature, or by its user."""

    def do_GET(self) -> None:
        user = "Basic " + base64.b64encode(b"user:pass").decode()
        if "sig=s3cret" in self.path or self.headers.get("Authorization") == user:
            super().do_GET()
        else:
            self.send_error(403)

    def do_HEAD(self) -> None:
        self.send_error(403)  # as a URL signed for GET has it

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def store(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Signed, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class TestSignedUrls:
    def test_a_signature_decides_no_byte_and_is_written_nowhere(self, home, tmp_path, capsys):
        outputs = []
        with store(home / "data") as host:
            path = f"{host}/webdataset/val-00000.tar"
            for number, url in enumerate(
                [
                    f"http://{path}?sig=s3cret&expires=1",
                    f"http://{path}?expires=2/a/b.json&sig=s3cret",
                    f"http://user:pass@{path}",
                ]
            ):
                out = tmp_path / str(number)
                assert main(["prepare", f"--input={url}", f"--output={out}", "--summary=json"]) == 0
                outputs.append(files_in(out))
            assert outputs[0] == outputs[1] == outputs[2]
            [name] = (name for name in outputs[0] if name.startswith("images/"))
            assert name == "images/val-00000-00000.parquet"
            # the same run by another signature
            again = ["prepare", f"--input=http://{path}?sig=s3cret&expires=3", f"--output={tmp_path / '0'}"]
            assert main(again) == 0
            assert "nothing to do" in capsys.readouterr().out
        shown = capsys.readouterr()
        everything = b"".join(data for output in outputs for data in output.values())
        for secret in ("s3cret", "expires", "user:pass"):
            assert secret.encode() not in everything
            assert secret not in shown.out + shown.err

    def test_errors_do_not_show_it(self, home, tmp_path, capsys):
        with store(home / "data") as host:
            for url in (
                f"http://user:wrong@{host}/webdataset/val-00000.tar?sig=wr0ng",
                f"http://{host}/no.tar?sig=s3cret",
            ):
                assert main(["prepare", f"--input={url}", f"--output={tmp_path}/o", "--summary=json"]) == 1
        shown = capsys.readouterr()
        assert f"http://{host}/no.tar" in shown.err
        assert json.loads(shown.out.splitlines()[0])["outcome"] == "failed"
        for secret in ("s3cret", "wr0ng", "user:"):
            assert secret not in shown.out + shown.err

    def test_one_object_by_two_signatures_is_one_input_too_many(self, home, tmp_path, capsys):
        with store(home / "data") as host:
            urls = [f"--input=http://{host}/webdataset/val-00000.tar?sig=s3cret&n={n}" for n in (1, 2)]
            assert main(["prepare", *urls, f"--output={tmp_path}/o"]) == 2
        assert "val-00000.tar is given 2 times, under several signatures" in capsys.readouterr().err

"""Jobs as Dataflow would get them: translated in whole, and not sent."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from fake_models import use_fakes

from diptych.pipelines.cli import main
from diptych.pipelines.demo_data.layouts import write_data_set
from diptych.pipelines.options.prepare import PrepareOptions
from diptych.pipelines.prepare import prepare
from diptych.pipelines.runners import dataflow, run_pipeline
from diptych.pipelines.runners.dataflow import ended_on_dataflow
from diptych.pipelines.runners.flink import Watch

pytest.importorskip("apitools", reason="Dataflow needs `pip install 'apache-beam[gcp]'`")
from apache_beam.runners.dataflow.dataflow_runner import DataflowRunner
from apache_beam.runners.dataflow.internal import apiclient

DEPLOY = Path(__file__).parents[3] / "deploy"
IMAGE = "europe-docker.pkg.dev/p/r/diptych:1"
CLOUD = [
    "--runner=DataflowRunner",
    "--project=project",
    "--region=europe-west4",
    "--temp_location=gs://bucket/temp",
    "--dry_run=True",
]
GPU = ["--gpu=nvidia-tesla-t4", f"--sdk_container_image={IMAGE}"]
MODELS = {
    "prepare": [],
    "embed": ["--model=bert:fake"],
    "caption": ["--model=hf:fake"],
    "generate": ["--model=diffusers:fake"],
    "run": ["--embed=bert:fake", "--caption=hf:fake", "--generate=diffusers:fake"],
}


class Translated(NamedTuple):
    """What would be sent.

    Attributes:
        workers: What it asks of its workers, as JSON values.
        graph: Its pipeline.
    """

    workers: dict[str, Any]
    graph: Any


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    data = write_data_set(str(tmp_path_factory.mktemp("scenes") / "data"), 30, seed=1).webdataset
    prepare(PrepareOptions((str(data),), str(out), quiet=True))
    shutil.copytree(data, out.parent / "raw")
    return out


@pytest.fixture
def translate(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    use_fakes(monkeypatch)
    for secret in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.setenv(secret, "very secret")
    found: list[Translated] = []
    run_pipeline = DataflowRunner.run_pipeline

    def keep(self: DataflowRunner, *args: Any, **kwargs: Any) -> Any:
        result = run_pipeline(self, *args, **kwargs)
        # as the client does it when it sends a job
        where = apiclient.Environment([], result.job.options, "1", "gs://bucket/x", self.proto_pipeline)
        found.append(Translated(json.loads(type(where.proto).to_json(where.proto)), self.proto_pipeline))
        return result

    monkeypatch.setattr(DataflowRunner, "run_pipeline", keep)

    def run(job: str, *flags: str) -> Translated:
        read = prepared.parent / "raw" if job in ("prepare", "run") else prepared
        source = "--prompts" if job == "generate" else "--input"
        argv = [job, f"{source}={read}", f"--output={tmp_path / job}", *MODELS[job], *CLOUD, *flags]
        assert main(argv) == 0
        return found.pop()

    return run


def staged(graph: Any) -> list[str]:
    return [
        dependency.role_payload.decode(errors="replace")
        for environment in graph.components.environments.values()
        for dependency in environment.dependencies
    ]


@pytest.mark.parametrize("job", MODELS)
def test_every_job_is_translated(job, translate, capsys):
    workers, graph = translate(job)
    assert not any("main_session" in name for name in staged(graph))
    # a graph is names and options: models, images and captions are read where it runs
    assert len(graph.SerializeToString()) < 200_000
    assert len(json.dumps(workers)) < 100_000
    assert b"very secret" not in graph.SerializeToString() + json.dumps(workers).encode()
    # each model stands once in the graph
    names = [t.unique_name for t in graph.components.transforms.values() if not t.subtransforms]
    assert sum(name.endswith("/BeamML_RunInference") for name in names) == len(MODELS[job])
    assert "translated" in capsys.readouterr().out


@pytest.mark.parametrize("job", [job for job in MODELS if job != "prepare"])
def test_workers_with_a_gpu(job, translate):
    workers, graph = translate(job, *GPU)
    [environment] = graph.components.environments.values()
    assert IMAGE.encode() in environment.payload
    [pool] = workers["workerPools"]
    assert pool["workerHarnessContainerImage"] == IMAGE
    assert pool["numThreadsPerWorker"] == 4
    assert workers["serviceOptions"] == [
        "worker_accelerator=type:nvidia-tesla-t4;count:1;install-nvidia-driver"
    ]
    # one process a worker, so one copy of the model a GPU
    assert "no_use_multiple_sdk_containers" in workers["experiments"]
    assert "use_multiple_sdk_containers" not in workers["experiments"]
    # and no stage is cut in two by a hint, which would be two copies as well
    assert not environment.resource_hints


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (
            ["--gpu=nvidia-tesla-t4", *CLOUD],
            "needs workers with CUDA and Diptych in them. Build deploy/Dockerfile",
        ),
        (["--gpu=nvidia-tesla-t4"], "is for workers of Dataflow, and --runner names another runner"),
        (
            [*GPU, *CLOUD, "--dataflow_service_options=worker_accelerator=type:x;count:1"],
            "say the same. Give one of them",
        ),
    ],
)
def test_a_gpu_that_cannot_be_had(flags, found, tmp_path, capsys):
    assert (
        main(["embed", f"--input={tmp_path}", f"--output={tmp_path / 'out'}", "--model=bert:x", *flags]) == 2
    )
    assert found in capsys.readouterr().err


class TestDeployment:
    def test_the_template_names_flags_that_there_are(self, capsys):
        template = json.loads((DEPLOY / "flex_template.json").read_text())
        with pytest.raises(SystemExit):
            main(["run", "--help"])
        flags = set(re.findall(r"--(\w+)", capsys.readouterr().out))
        assert {parameter["name"] for parameter in template["parameters"]} <= flags
        for parameter in template["parameters"]:
            for pattern in parameter.get("regexes", []):
                re.compile(pattern)

    def test_the_container_is_of_what_the_launcher_has(self):
        docker = (DEPLOY / "Dockerfile").read_text()
        version = metadata.version("apache-beam")
        assert f"apache/beam_python3.11_sdk:{version}" in docker
        copied = re.findall(r"^COPY (?!--from)(.*) \S+$", docker, re.M)
        assert "pipelines" in copied
        for name in " ".join(copied).split():
            assert (DEPLOY.parent / name).exists(), name

    def test_the_template_runs_the_job(self):
        command = [sys.executable, str(DEPLOY / "flex_run.py"), "--help"]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, cwd=DEPLOY.parent
        )
        assert done.returncode == 0
        assert done.stdout.startswith("usage: diptych run ")


class DataflowPipelineResult:
    """What a job on Dataflow gives, as Beam's class of this name does, and the client that it asks."""

    has_job = True

    def __init__(self, messages: list[list[str]], fails: int = 0) -> None:
        self.pages, self.fails, self.asked = messages, fails, []
        self.cancelled = threading.Event()
        self._runner = SimpleNamespace(dataflow_client=self)

    def job_id(self) -> str:
        return "job"

    def list_messages(self, job_id: str, start_time: Any, page_token: Any, minimum_importance: str) -> Any:
        self.asked.append((job_id, start_time, page_token, minimum_importance))
        if len(self.asked) <= self.fails:
            raise OSError("no answer")
        page = int(page_token or 0)
        found = [SimpleNamespace(message_text=text, time=page) for text in self.pages[page]]
        return found, str(page + 1) if page + 1 < len(self.pages) else None

    def cancel(self) -> None:
        self.cancelled.set()


class TestFailuresOnDataflow:
    TRACE = "Error message from worker: Traceback\ndiptych.transforms.errors.MissingInputError: gs://b/x is not there."

    @pytest.mark.parametrize("fails", [0, 2])
    def test_what_a_second_try_cannot_mend_ends_the_job(self, fails, monkeypatch):
        monkeypatch.setattr(dataflow, "_ASK_EACH_S", 0.01)
        result, watch = DataflowPipelineResult([["no worker yet"], ["x", self.TRACE]], fails), Watch()
        with ended_on_dataflow(result, run_pipeline._permanent_error, watch):
            assert result.cancelled.wait(10)
        assert str(watch.error) == "gs://b/x is not there."
        assert result.asked[-1] == (
            "job",
            None if not fails else result.asked[-1][1],
            "1",
            "JOB_MESSAGE_ERROR",
        )

    def test_other_failures_are_dataflows_own_to_try_again(self, monkeypatch):
        monkeypatch.setattr(dataflow, "_ASK_EACH_S", 0.01)
        result, watch = DataflowPipelineResult([["diptych.transforms.errors.InputError: no answer"]]), Watch()
        with ended_on_dataflow(result, run_pipeline._permanent_error, watch):
            deadline = time.monotonic() + 10
            while len(result.asked) < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
        assert not result.cancelled.is_set()
        assert watch.error is None

"""Jobs as Dataflow would get them: translated in whole, and not sent."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fake_models import use_fakes

from pipelines.cli import main
from pipelines.options import PrepareOptions
from pipelines.prepare import prepare
from pipelines.scene_folders import write_data_set

pytest.importorskip("apitools", reason="Dataflow needs `pip install 'apache-beam[gcp]'`")
from apache_beam.runners.dataflow.dataflow_runner import DataflowRunner
from apache_beam.runners.dataflow.internal import apiclient

DEPLOY = Path(__file__).parents[2] / "deploy"
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

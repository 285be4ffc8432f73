"""A standalone Flink cluster, of which processes are killed; and what a job asks of one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import queue
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import IO, Any

import apache_beam as beam
import fake_workers
import grpc
import pytest
import worker_pool
from apache_beam.options.pipeline_options import FlinkRunnerOptions, PipelineOptions
from apache_beam.portability.api import beam_fn_api_pb2, beam_fn_api_pb2_grpc
from foreign import write_foreign_packages
from kills import files_in

from diptych.pipelines.demo_data import layouts
from diptych.pipelines.demo_data.layouts import write_data_set
from diptych.pipelines.options.prepare import PrepareOptions
from diptych.pipelines.prepare import prepare
from diptych.pipelines.runners import flink, run_pipeline
from diptych.pipelines.runners.flink import (
    cancel_on_flink,
    flink_flags,
    num_buffers,
    report_restarts,
    size_for_flink,
)
from diptych.transforms.errors import FailureLimitError, MissingInputError, ModelInputError, OptionError

CLUSTER = Path(__file__).parents[3] / "deploy" / "flink_cluster.py"
CHUNK_ROWS = 5
START_TIMEOUT_S = 150.0


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A cluster that is up.

    Attributes:
        flags: With which a job runs on it.
        folder: Its configuration and logs.
    """

    flags: list[str]
    folder: Path

    def pid(self, name: str) -> int:
        return int(json.loads((self.folder / "processes.json").read_text())[name])


@pytest.fixture(scope="module")
def cluster(flink_jar: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A job manager, two task managers and a pool of Python workers, beside packages named like our folders."""
    folder = tmp_path_factory.mktemp("cluster")
    foreign = tmp_path_factory.mktemp("foreign")
    write_foreign_packages(foreign)
    command = [sys.executable, str(CLUSTER), f"--folder={folder}"]
    command += [f"--rest_port={free_ports()}", f"--worker_port={free_ports()}"]
    pipe, env = subprocess.PIPE, {**os.environ, "PYTHONPATH": str(foreign)}
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=foreign, env=env) as process:
        try:
            assert process.stdout is not None
            line = first_line(process.stdout)
            if not line:
                process.terminate()
                pytest.fail(f"the cluster did not start: {process.communicate(timeout=30)[1]}")
            yield Cluster(shlex.split(line), folder)
        finally:
            process.terminate()
            process.communicate(timeout=60)


def first_line(output: IO[str]) -> str:
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: lines.put(output.readline()), daemon=True).start()
    with contextlib.suppress(queue.Empty):
        return lines.get(timeout=START_TIMEOUT_S)
    return ""


def free_ports() -> int:
    """Returns a port that is free, as is the one after it."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as one, contextlib.suppress(OSError):
            port = int(one.getsockname()[1])
            with socket.create_server(("127.0.0.1", port + 1)):
                return port


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 scenes in nine tar files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "_SHARD_SCENES", 50)
        return write_data_set(str(tmp_path_factory.mktemp("scenes") / "data"), 500, seed=1).webdataset


@pytest.fixture(scope="module")
def local(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("local")
    prepare(PrepareOptions((str(scenes),), str(out), chunk_rows=CHUNK_ROWS, quiet=True))
    return files_in(out)


def command(data: Path, out: Path, cluster: Cluster) -> list[str]:
    argv = ["prepare", f"--input={data}", f"--output={out}", f"--chunk_rows={CHUNK_ROWS}", *cluster.flags]
    return [sys.executable, "-c", "from diptych.pipelines.cli import main; raise SystemExit(main())", *argv]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "victim",
    [
        "task-manager-1",
        pytest.param("python worker", marks=pytest.mark.long),
        pytest.param("job-manager", marks=pytest.mark.long),
    ],
)
def test_a_killed_process_costs_nothing(victim, cluster, scenes, local, tmp_path):
    out = tmp_path / "out"
    pipe = subprocess.PIPE
    with subprocess.Popen(command(scenes, out, cluster), stdout=pipe, stderr=pipe, text=True) as job:
        try:
            deadline = time.monotonic() + 200
            while len(list(out.glob("images/*.parquet"))) < 8:
                assert job.poll() is None, job.communicate()[1]
                assert time.monotonic() < deadline, "the job wrote nothing"
                time.sleep(0.02)
            os.kill(worker(cluster) if victim == "python worker" else cluster.pid(victim), signal.SIGKILL)
            assert not (out / "_SUCCESS.json").exists()
            _, stderr = job.communicate(timeout=240)
        finally:
            job.kill()
    if victim == "job-manager":  # its jobs go with it; the same command completes them
        assert job.returncode == 1, stderr
        wait_until_up(cluster)
        before = times_in(out)
        again = subprocess.run(
            command(scenes, out, cluster), capture_output=True, text=True, timeout=240, check=False
        )
        assert again.returncode == 0, again.stderr
        assert before.items() <= times_in(out).items()  # what was there was left alone
    else:
        assert job.returncode == 0, stderr
    assert files_in(out) == local


@pytest.mark.long
@pytest.mark.timeout(300)
def test_an_input_that_goes_while_it_runs_ends_the_job_at_once(cluster, scenes, tmp_path):
    data = Path(shutil.copytree(scenes, tmp_path / "data"))
    out = tmp_path / "out"
    pipe = subprocess.PIPE
    argv = command(Path("data"), Path("out"), cluster)
    with subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path, env=environment()) as job:
        try:
            while not out.exists():
                assert job.poll() is None, job.communicate()[1]
                time.sleep(0.02)
            shutil.rmtree(data)
            _, stderr = job.communicate(timeout=120)
        finally:
            job.kill()
    assert job.returncode == 1
    assert f"{data}/" in stderr
    assert "is not there. It was expected as an input" in stderr
    assert "is begun again" not in stderr


@pytest.mark.timeout(300)
def test_relative_paths_are_found_by_workers(cluster, scenes, local, tmp_path):
    (tmp_path / "data").symlink_to(scenes)
    write_foreign_packages(tmp_path)
    argv = command(Path("data"), Path("out"), cluster)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path / "out") == local


def environment() -> dict[str, str]:
    """Returns this process's environment, with which another folder's process finds the project as well."""
    places = [str(CLUSTER.parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}


def times_in(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("images/*.parquet")}


def worker(cluster: Cluster) -> int:
    """Returns the process of a Python worker: the pool forks them from a child of its own."""
    return next(pid for child in children(cluster.pid("worker-pool")) for pid in children(child))


def children(pid: int) -> list[int]:
    return [
        int(one) for file in Path(f"/proc/{pid}/task").glob("*/children") for one in file.read_text().split()
    ]


def wait_until_up(cluster: Cluster) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    master = next(flag for flag in cluster.flags if flag.startswith("--flink_master="))
    pipeline = beam.Pipeline(options=PipelineOptions(["--runner=FlinkRunner", master]))
    while time.monotonic() < deadline:
        with contextlib.suppress(OptionError):
            size_for_flink(pipeline, 1)
            return
        time.sleep(0.5)
    pytest.fail("the job manager did not come back")


class TestWorkerPool:
    @pytest.mark.parametrize(
        ("worker", "found"),
        [
            ("leaves", "ended with exit code 3. Its last words: no such thing."),
            ("lacks_a_package", "ModuleNotFoundError: No module named 'not_installed'"),
            ("hangs", "was not ready in 1 s. Its last words: it printed nothing."),
            ("is_killed", "was killed by SIGKILL. Its last words: it printed nothing."),
        ],
    )
    def test_a_worker_that_cannot_start_says_why(self, worker, found, monkeypatch):
        monkeypatch.setattr(worker_pool, "_work", getattr(fake_workers, worker))
        monkeypatch.setattr(worker_pool, "START_TIMEOUT_S", 1.0 if worker == "hangs" else 50.0)
        answer = start_worker()
        assert found in answer.error
        assert f"Check that {sys.executable} has Diptych" in answer.error
        assert "\n" not in answer.error
        assert not multiprocessing.active_children()

    def test_one_that_cannot_reach_its_task_manager_says_so(self, monkeypatch):
        monkeypatch.setattr(worker_pool, "START_TIMEOUT_S", 3.0)
        assert "was not ready in 3 s" in start_worker("localhost:1").error

    def test_one_that_says_much_is_not_stalled(self, monkeypatch):
        monkeypatch.setattr(worker_pool, "_work", fake_workers.says_much)
        assert not start_worker().error
        (process,) = multiprocessing.active_children()
        process.kill()
        process.join(10)

    def test_one_ends_with_its_task_manager_and_with_no_other(self):
        with control_server() as (mine, hang_up), control_server() as (others, _):
            assert not start_worker(mine).error
            (process,) = multiprocessing.active_children()
            assert not start_worker(others).error
            (other,) = set(multiprocessing.active_children()) - {process}
            worker_pool.WorkerPool().StopWorker(beam_fn_api_pb2.StopWorkerRequest(worker_id="7-1"), None)
            hang_up()
            process.join(30)
            assert process.exitcode == 0
            assert other.is_alive()
        other.join(30)
        assert other.exitcode == 0

    def test_a_port_that_another_pool_has(self, capsys):
        with socket.create_server(("", 0)) as taken:
            port = taken.getsockname()[1]
            assert worker_pool.main([f"--service_port={port}"]) == 1
        assert f"port {port} cannot be opened: " in capsys.readouterr().err

    def test_it_listens_on_the_loopback_and_to_nobody_else(self, capsys):
        assert pool_error("10.1.2.3:999") == (
            "the Python worker 7-1 was not started: it would run what 10.1.2.3 sends, which this pool does not know. "
            "Where that is a task manager of yours, start the pool with --allow 10.1.2.3."
        )
        for flags in (["--bind=0.0.0.0"], ["--bind=::"], ["--bind=localhost", "--allow=no such host"]):
            with pytest.raises(SystemExit) as stopped:
                worker_pool.main(flags)
            assert stopped.value.code == 2
        assert "--allow HOST" in capsys.readouterr().err

    @pytest.mark.parametrize("field", ["control", "logging", "artifact", "provision"])
    def test_every_address_of_a_request_is_asked_about(self, field):
        request = beam_fn_api_pb2.StartWorkerRequest(worker_id="7-1")
        request.control_endpoint.url = "localhost:1"
        getattr(request, f"{field}_endpoint").url = "[2001:db8::7]:5"
        assert "--allow 2001:db8::7." in worker_pool.WorkerPool().StartWorker(request, None).error

    @pytest.mark.parametrize(
        ("endpoint", "allowed", "is_allowed"),
        [
            ("localhost:7", (), True),
            ("127.0.0.1:7", (), True),
            ("127.9.9.9:7", (), True),
            ("[::1]:7", (), True),
            ("[::ffff:127.0.0.1]:7", (), True),
            ("ipv4:///127.0.0.1:7", (), True),
            ("10.0.0.6:7", (), False),
            ("10.0.0.6:7", ("10.0.0.6",), True),
            ("[::ffff:10.0.0.6]:7", ("10.0.0.6",), True),
            ("10.0.0.66:7", ("10.0.0.6",), False),
            ("localhost.invalid:7", (), False),
            ("127.0.0.1.invalid:7", (), False),
            ("localhost@10.0.0.6:7", (), False),
            ("0.0.0.0:7", (), False),
            ("unix:/tmp/x", (), False),
            ("", (), False),
        ],
    )
    def test_who_is_allowed(self, endpoint, allowed, is_allowed):
        assert worker_pool.is_allowed(worker_pool.host_of(endpoint), allowed) is is_allowed

    @pytest.mark.parametrize(
        ("peer", "host"),
        [("ipv4:10.0.0.6:41", "10.0.0.6"), ("ipv6:%5B::1%5D:41", "::1"), ("unix:/x", "unix:/x")],
    )
    def test_who_asks(self, peer, host):
        assert worker_pool.peer_of(peer) == host

    def test_it_cannot_be_reached_from_elsewhere(self):
        port = free_ports()
        server = worker_pool._serve(worker_pool.WorkerPool(), "localhost", port)
        try:
            socket.create_connection(("localhost", port), 5).close()
            with pytest.raises(
                (ConnectionError, TimeoutError, OSError), match=r"refused|timed out|unreachable"
            ):
                socket.create_connection((own_address(), port), 5).close()
        finally:
            server.stop(0)


def own_address() -> str:
    """Returns an address of this machine that others know it by, or one that is nobody's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            return "192.0.2.1"
        return str(probe.getsockname()[0])


def pool_error(control: str) -> str:
    """Returns what a pool that starts nothing says to a request."""
    return str(start_worker(control).error)


def start_worker(control: str = "") -> beam_fn_api_pb2.StartWorkerResponse:
    """Asks a pool for a worker of a task manager; all of them give the same name."""
    request = beam_fn_api_pb2.StartWorkerRequest(worker_id="7-1")
    request.control_endpoint.url = control
    return worker_pool.WorkerPool().StartWorker(request, None)


@contextlib.contextmanager
def control_server() -> Iterator[tuple[str, Callable[[], None]]]:
    """A task manager's side of a worker that has nothing to do; gives its address, and what hangs up."""
    ended = threading.Event()

    class Control(beam_fn_api_pb2_grpc.BeamFnControlServicer):
        def Control(self, requests: Any, context: Any) -> Iterator[Any]:
            ended.wait(60)
            yield from ()

    server = grpc.server(ThreadPoolExecutor(4))
    beam_fn_api_pb2_grpc.add_BeamFnControlServicer_to_server(Control(), server)
    port = server.add_insecure_port("localhost:0")
    server.start()
    try:
        yield f"localhost:{port}", ended.set
    finally:
        ended.set()
        server.stop(1).wait(10)


@dataclasses.dataclass
class Master:
    """What answers as a job manager does.

    Attributes:
        address: Where.
        machines: Free slots and network buffers of each task manager.
        jobs: Its jobs, as its overview has them.
        failures: Of tasks of the job `1`, as the history of its exceptions has them.
        told: What was asked of it beside questions.
    """

    address: str
    machines: list[tuple[int, int]]
    jobs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    failures: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    told: list[str] = dataclasses.field(default_factory=list)

    def answer(self, path: str) -> dict[str, Any]:
        managers = [
            {"freeSlots": slots, "memoryConfiguration": {"networkMemory": buffers * 32768}}
            for slots, buffers in self.machines
        ]
        answers = {
            "/taskmanagers": {"taskmanagers": managers} if managers else {},
            "/jobs/overview": {"jobs": self.jobs},
            "/jobs/1/exceptions": {"exceptionHistory": {"entries": self.failures}},
        }
        return answers[path]


@pytest.fixture
def master() -> Iterator[Master]:
    """A job manager of two task managers."""
    found = Master("", [(4, 4096), (2, 4096)])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(found.answer(self.path)).encode())

        def do_PATCH(self) -> None:
            found.told.append(self.path)
            self.send_response(202)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found.address = f"127.0.0.1:{server.server_port}"
    yield found
    server.shutdown()
    server.server_close()


class TestSize:
    def parallelism(self, num_shards: int, *flags: str) -> int:
        pipeline = beam.Pipeline(options=PipelineOptions(list(flags)))
        size_for_flink(pipeline, num_shards)
        return int(pipeline.options.view_as(FlinkRunnerOptions).parallelism)

    @pytest.mark.parametrize(("num_shards", "tasks"), [(1, 1), (4, 4), (100, 6), (0, 1)])
    def test_a_task_a_shard_as_far_as_there_are_slots(self, master, num_shards, tasks):
        flags = ["--runner=FlinkRunner", f"--flink_master={master.address}"]
        assert self.parallelism(num_shards, *flags) == tasks

    def test_no_more_tasks_than_network_buffers_are_there_for(self, master):
        master.machines = [(8, 4096)] * 100
        flags = ["--runner=FlinkRunner", f"--flink_master={master.address}"]
        tasks = self.parallelism(10_000, *flags)
        assert tasks < 800
        assert num_buffers(tasks, 8) <= 4096 < num_buffers(tasks + 1, 8)

    def test_what_is_given_stays(self, master):
        flags = ["--runner=FlinkRunner", f"--flink_master={master.address}", "--parallelism=3"]
        assert self.parallelism(100, *flags) == 3
        assert "--number_of_execution_retries=4" in flink_flags(flags)
        given = [*flags, "--number_of_execution_retries=0", "--execution_retry_delay=1"]
        [name, memory] = flink_flags(given)
        assert name.startswith("--job_name=diptych-")
        assert memory == "--job_server_jvm_properties=-Xmx512m"

    def test_inside_the_job_server_there_is_room_for_its_tasks(self, monkeypatch):
        monkeypatch.setattr("os.cpu_count", lambda: 9)
        local = ["--runner=FlinkRunner", "--flink_master=[local]"]
        tasks, folder = (flag.partition("=")[2] for flag in flink_flags(local))
        assert tasks == "9"
        settings = (Path(folder) / "config.yaml").read_text()
        assert f"taskmanager.memory.network.max: {2048 * 32768}b\n" in settings
        (folder,) = (flag.partition("=")[2] for flag in flink_flags([*local, "--parallelism=64"]))
        assert f"{num_buffers(64, 64) * 32768}b" in (Path(folder) / "config.yaml").read_text()
        assert flink_flags([*local, "--parallelism=3", "--flink_conf_dir=x"]) == []

    @pytest.mark.parametrize("flags", [[], ["--runner=FnApiRunner"], ["--runner=DataflowRunner"]])
    def test_other_runners_are_left_alone(self, flags):
        assert flink_flags(flags) == []

    def test_no_slot_and_no_cluster_are_said_at_once(self, master):
        flags = ["--runner=FlinkRunner", f"--flink_master={master.address}"]
        master.machines = [(0, 4096)]
        with pytest.raises(OptionError, match=f"{master.address} has no slot for a task"):
            self.parallelism(9, *flags)
        with pytest.raises(OptionError, match="localhost:1 does not answer as a Flink cluster: "):
            self.parallelism(9, "--runner=FlinkRunner", "--flink_master=localhost:1")
        master.machines = []
        with pytest.raises(OptionError, match=f"{master.address} does not answer as a Flink cluster"):
            self.parallelism(9, *flags)


class TestWhileItRuns:
    def pipeline(self, master: Master) -> beam.Pipeline:
        flags = ["--runner=FlinkRunner", f"--flink_master={master.address}", "--job_name=mine"]
        return beam.Pipeline(options=PipelineOptions(flags))

    def test_why_tasks_are_begun_again_is_said_once_each(self, master, monkeypatch, capsys):
        monkeypatch.setattr(flink, "_ASK_EACH_S", 0.01)
        master.jobs = [
            {"jid": "0", "name": "another", "state": "RUNNING"},
            {"jid": "1", "name": "mine", "state": "RESTARTING"},
        ]
        trace = (
            r"java.E: Error: Traceback\ndiptych.transforms.errors.InputError: gone [while running \'Read\']"
        )
        master.failures = [
            {
                "timestamp": 2,
                "stacktrace": "java.E: x\nCaused by: java.F: y\n\tat z\nCaused by: java.G: no room",
            },
            {"timestamp": 1, "stacktrace": trace},
        ]
        with report_restarts(self.pipeline(master), run_pipeline._reason):
            deadline = time.monotonic() + 10
            said = ""
            while said.count("\n") < 2 and time.monotonic() < deadline:
                said += capsys.readouterr().err
                time.sleep(0.05)
            time.sleep(0.1)
            said += capsys.readouterr().err
        assert said.splitlines() == [
            "diptych: a task failed and is begun again: java.G: no room",
            "diptych: a task failed and is begun again: gone",
        ]

    @pytest.mark.parametrize(
        ("trace", "kind"),
        [
            (
                r"Traceback\ndiptych.transforms.errors.MissingInputError: x is not there. [while running \'Read\']",
                MissingInputError,
            ),
            ("diptych.transforms.errors.ModelInputError: x is not there.", ModelInputError),
            ("diptych.transforms.errors.FailureLimitError: x is not there.", FailureLimitError),
            ("Caused by: y\ndiptych.transforms.errors.OptionError: x is not there.\n\tat z", OptionError),
        ],
    )
    def test_what_a_second_try_cannot_mend_ends_the_job(self, trace, kind, master, monkeypatch, capsys):
        monkeypatch.setattr(flink, "_ASK_EACH_S", 0.01)
        master.jobs = [{"jid": "1", "name": "mine", "state": "RESTARTING"}]
        master.failures = [{"timestamp": 1, "stacktrace": trace}]
        pipeline, stopped = self.pipeline(master), threading.Event()
        monkeypatch.setattr(run_pipeline, "size_for_flink", lambda *_: None)

        class Job:
            def wait_until_finish(self) -> None:
                deadline = time.monotonic() + 10
                while not master.told and time.monotonic() < deadline:
                    time.sleep(0.01)
                stopped.set()
                raise RuntimeError("Pipeline diptych failed in state CANCELLED: None")

        monkeypatch.setattr(pipeline, "run", Job)
        with pytest.raises(kind, match=r"^x is not there\.") as raised:
            run_pipeline.run_pipeline(pipeline, 1, quiet=True)
        assert stopped.is_set()
        assert master.told == ["/jobs/1?mode=cancel"]
        assert "while running" not in str(raised.value)
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize("name", ["InputError", "OutputError", "DiptychError"])
    def test_what_may_pass_is_tried_again(self, name):
        assert (
            run_pipeline._permanent_error(f"diptych.transforms.errors.{name}: the store does not answer.")
            is None
        )
        assert run_pipeline._permanent_error("java.net.ConnectException: refused") is None

    @pytest.mark.parametrize(
        "jobs", [[], [{"no": "name"}], [{"jid": "1", "name": "mine", "state": "FAILED"}]]
    )
    def test_nothing_is_said_where_there_is_nothing_to_say(self, master, jobs, monkeypatch, capsys):
        monkeypatch.setattr(flink, "_ASK_EACH_S", 0.01)
        master.jobs, master.failures = jobs, [{"timestamp": 1, "stacktrace": "x"}]
        with report_restarts(self.pipeline(master), run_pipeline._reason):
            time.sleep(0.2)
        assert capsys.readouterr().err == ""

    def test_a_job_that_is_stopped_here_is_ended_there(self, master):
        master.jobs = [{"jid": "0", "name": "another"}, {"jid": "1", "name": "mine"}]
        cancel_on_flink(self.pipeline(master))
        assert master.told == ["/jobs/1?mode=cancel"]

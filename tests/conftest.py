"""Services that tests run against: Beam's embedded Flink, and emulators of Google Cloud Storage and of S3."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn

import fsspec
import hypothesis
import pytest
from emulators import NoEmulator, environment, free_port, gcs_emulator, make_bucket, s3_emulator
from flaky_proxy import FlakyProxy

# Read when torch is imported: its threads would wait for each other at full speed, and this machine may be busy
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
if "PYTEST_XDIST_WORKER" in os.environ:
    # There is a process for each core already
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# No deadline, because the machine may be busy; the same examples each time, so that a red run is red again
hypothesis.settings.register_profile("diptych", deadline=None, derandomize=True)
hypothesis.settings.load_profile("diptych")

BUILD_TIMEOUT_S = 660
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


# Fixtures that start servers
SERVICES = {"flink_jar", "gcs_endpoint", "s3_endpoint", "bucket", "flaky_bucket"}
_jar_build: subprocess.Popen[str] | None = None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take longest first, and gives tests what their services need of pytest."""
    wants_flink = {item.path for item in items if "flink_jar" in getattr(item, "fixturenames", ())}

    def order(item: pytest.Item) -> int:
        if item.path in wants_flink:
            return 1
        # Else one process would wait for them at the end
        return 2 * SERVICES.isdisjoint(getattr(item, "fixturenames", ()))

    items.sort(key=order)
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "flink_jar" in fixtures:
            # The first of them waits until the job server has been built.
            item.add_marker(pytest.mark.timeout(BUILD_TIMEOUT_S + 240))
        if not {"gcs", "bucket", "flaky_bucket"}.isdisjoint(fixtures):
            # aiohttp's advice to gcsfs, at every upload of more than 1 MB.
            item.add_marker(pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begins to build the Flink job server where a test wants it: it is fetched while others run."""
    global _jar_build
    wants_flink = any("flink_jar" in getattr(item, "fixturenames", ()) for item in session.items)
    if wants_flink and not session.config.option.collectonly and shutil.which("java") is not None:
        pipe = subprocess.PIPE
        command = [sys.executable, str(JOB_SERVER)]
        _jar_build = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def pytest_sessionfinish() -> None:
    """Ends a build that no test waited for."""
    if _jar_build is not None and _jar_build.poll() is None:
        os.killpg(_jar_build.pid, signal.SIGKILL)
        _jar_build.communicate()


@pytest.fixture(scope="session")
def flink_jar() -> str:
    """The path of the Flink job server's jar, for `--flink_job_server_jar`."""
    if _jar_build is None:
        _unavailable("Flink needs `java` on PATH.")
    stdout, stderr = _jar_build.communicate(timeout=BUILD_TIMEOUT_S)
    if _jar_build.returncode and shutil.which("mvn") is None:
        _unavailable(stderr)
    assert _jar_build.returncode == 0, stderr
    return stdout.strip()


@pytest.fixture
def run_command() -> Command:
    """A function that runs a command with a time-out and leaves nothing of it behind."""
    return _run_command


@pytest.fixture(scope="session")
def gcs_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the emulator of Google Cloud Storage; tests want `gcs`."""
    with _running(gcs_emulator(tmp_path_factory.mktemp("gcs") / "server.log", free_port())) as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The address of the emulator of S3; tests want `s3`."""
    with _running(s3_emulator()) as endpoint:
        yield endpoint


@pytest.fixture
def gcs(gcs_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket of its own on the emulator, which `gs://` means for as long as the test runs."""
    with _bucket("gs", gcs_endpoint, gcs_endpoint, monkeypatch) as bucket:
        yield bucket


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket of its own on the emulator, which `s3://` means for as long as the test runs."""
    with _bucket("s3", s3_endpoint, s3_endpoint, monkeypatch) as bucket:
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
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with contextlib.ExitStack() as stack:
        if request.param == "gcs":
            emulator = gcs_emulator(tmp_path / "server.log", free_port(), public_port=port)
            endpoint = stack.enter_context(_running(emulator))
        else:
            endpoint = request.getfixturevalue("s3_endpoint")
        proxy = FlakyProxy(endpoint)
        stack.enter_context(proxy.serve(port))
        store = "gs" if request.param == "gcs" else "s3"
        yield stack.enter_context(_bucket(store, endpoint, url, monkeypatch)), proxy


@contextlib.contextmanager
def _bucket(store: str, endpoint: str, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """Makes a bucket at an emulator, which `gs://` or `s3://` finds at a URL."""
    found = make_bucket(endpoint, store)
    for variable, value in environment(url, store).items():
        monkeypatch.setenv(variable, value)
    if store == "gs":
        # fsspec and gcsfs have read their variables by now if an earlier test used them.
        monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        from gcsfs.core import GCSFileSystem as FileSystem

        for protocol in ("gs", "gcs"):
            fsspec.register_implementation(protocol, FileSystem, clobber=True)
    else:
        from s3fs import S3FileSystem as FileSystem
    FileSystem.clear_instance_cache()
    yield Bucket(found, dict(os.environ))
    FileSystem.clear_instance_cache()


@contextlib.contextmanager
def _running(emulator: contextlib.AbstractContextManager[str]) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        try:
            endpoint = stack.enter_context(emulator)
        except NoEmulator as error:
            _unavailable(str(error))
        yield endpoint


def _unavailable(reason: str) -> NoReturn:
    """Skips the test, except in CI, where a service that is missing is a fault."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


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

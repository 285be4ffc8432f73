"""Clients of stores, with time-outs: a request that nobody answers is made again, and never waited for."""

from typing import Any

import fsspec
from fsspec.core import split_protocol

# A store that sends nothing for so long when it is its turn will not any more
CONNECT_S, SILENCE_S = 10.0, 20.0
# Of a process; botocore has 10, and every shard that is read asks for 32 images at a time
_CONNECTIONS = 128
_GCS, _S3 = ("gs", "gcs"), ("s3", "s3a")


def open_store(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns the file system of a URL or path, and the path in it.

    Rights come from where the store's own client looks for them (the environment, its files, the machine's account),
    nothing of them is kept here. What fsspec's configuration says of time-outs goes before ours.

    Raises:
        ValueError: The URL is none.
        ImportError: The package for its protocol is not installed.
        OSError: The store cannot be opened.
    """
    protocol, _ = split_protocol(url)
    if protocol in (None, "file", "local") and "::" in url and url.count("://") <= 1:
        local = fsspec.filesystem("file")  # a name that fsspec would take for a chain of file systems
        return local, str(local._strip_protocol(url))
    fs, path = fsspec.core.url_to_fs(url, **_settings(protocol or "file"))
    return fs, path


def _settings(protocol: str) -> dict[str, Any]:
    """Returns arguments of a client: gcsfs has no time-outs of its own, s3fs has; both try again by themselves."""
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

"""What decides the bytes of an output, and the few digits that stand for it."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

from diptych.transforms.sources.base import InputFile

# Libraries that decide the bytes of an output
_LIBRARIES = ("numpy", "opencv-python-headless", "pillow", "pyarrow", "simplejpeg")


def fingerprint(
    job: str, inputs: Iterable[InputFile], options: Mapping[str, Any], libraries: Iterable[str] = ()
) -> dict[str, Any]:
    """Returns everything that decides a run's output: the job, its inputs, its options, and the versions.

    Args:
        job: Name of the job.
        inputs: The input files, by names below the input root: the same data elsewhere is the same input.
        options: Options that change bytes, as JSON values.
        libraries: Libraries that the job uses beyond those that all do.
    """
    inputs = sorted(inputs, key=lambda file: file.name)
    lines = "".join(f"{file.name}\t{file.size_bytes}\t{file.sha256}\n" for file in inputs)
    return {
        "job": job,
        "inputs": {
            "files": len(inputs),
            "size_bytes": sum(file.size_bytes for file in inputs),
            "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        },
        "options": dict(options),
        "versions": {name: metadata.version(name) for name in ("diptych", *_LIBRARIES, *libraries)},
    }


def digest(fingerprint: Mapping[str, Any]) -> str:
    """Returns 16 hexadecimal digits that stand for a fingerprint."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]


def options_to_json(options: Any) -> dict[str, Any]:
    """Returns a frozen dataclass of options as JSON values."""
    return dict(json.loads(json.dumps(dataclasses.asdict(options))))

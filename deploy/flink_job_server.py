"""The Flink job server as one jar, built from Maven artifacts.

Beam fetches a ready-made job server of its own version where it can reach one. Where it cannot (a
mirror without that jar, a version not yet published) this command builds one from the runner and
its dependencies, which every mirror has::

    python deploy/flink_job_server.py
    diptych prepare … --runner=FlinkRunner --flink_master=[local] --flink_job_server_jar=JAR
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence

BEAM_VERSION = "2.62.0"
FLINK_VERSION = "1.19"
SLF4J_VERSION = "1.7.30"
MAVEN_TIMEOUT_S = 600
MAIN_CLASS = "org.apache.beam.runners.flink.FlinkJobServerDriver"

_GOAL = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:build-classpath"
_POM = f"""\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>diptych</groupId>
  <artifactId>beam-flink-job-server</artifactId>
  <version>1</version>
  <packaging>pom</packaging>
  <dependencies>
    <dependency>
      <groupId>org.apache.beam</groupId>
      <artifactId>beam-runners-flink-{FLINK_VERSION}</artifactId>
      <version>{BEAM_VERSION}</version>
    </dependency>
    <dependency>
      <groupId>org.slf4j</groupId>
      <artifactId>slf4j-simple</artifactId>
      <version>{SLF4J_VERSION}</version>
    </dependency>
  </dependencies>
</project>
"""
# Flink looks into the JDK's own classes, which Java 17 no longer allows without being asked.
_MANIFEST = f"""\
Manifest-Version: 1.0
Main-Class: {MAIN_CLASS}
Multi-Release: true
Add-Opens: java.base/java.lang java.base/java.net java.base/java.nio java.base/java.util

"""
_MERGED_PREFIX = "META-INF/services/"
_MERGED_NAMES = frozenset({"reference.conf"})
# A signature covers its own jar only; in another one the JVM refuses the classes it names.
_LEFT_OUT_SUFFIXES = (".SF", ".DSA", ".RSA")
_LEFT_OUT_NAMES = frozenset({"META-INF/MANIFEST.MF", "META-INF/INDEX.LIST"})


class JobServerError(RuntimeError):
    """The job server cannot be built; the message says why and what to do, in one paragraph."""


def job_server_jar() -> pathlib.Path:
    """Returns the job-server jar, building it at the first call.

    Returns:
        The jar below `$XDG_CACHE_HOME` (or `~/.cache`). Several processes may build it at once.

    Raises:
        JobServerError: `java` or `mvn` is missing, or the artifacts could not be fetched.
    """
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    jar = cache / "diptych" / f"beam-flink-job-server-{BEAM_VERSION}.jar"
    if not jar.is_file():
        artifacts = _fetch_artifacts()
        with _replacing(jar) as temporary:
            shade(artifacts, temporary)
    return jar


def shade(artifacts: Sequence[pathlib.Path], output: pathlib.Path) -> None:
    """Packs several jars into one that runs.

    Of a file that several jars hold the first is kept, as Java itself would find it; service
    files and `reference.conf` are joined.

    Args:
        artifacts: The jars, in class-path order.
        output: The jar to write.
    """
    merged: dict[str, list[bytes]] = {}
    seen: set[str] = set()
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target:
        target.writestr("META-INF/MANIFEST.MF", _MANIFEST)
        for artifact in artifacts:
            with zipfile.ZipFile(artifact) as source:
                for name in filter(_is_wanted, source.namelist()):
                    if name.startswith(_MERGED_PREFIX) or name in _MERGED_NAMES:
                        merged.setdefault(name, []).append(source.read(name))
                    elif name not in seen:
                        seen.add(name)
                        target.writestr(name, source.read(name))
        for name, parts in merged.items():
            target.writestr(name, b"\n".join(parts))


def _is_wanted(name: str) -> bool:
    if name.endswith("/") or name in _LEFT_OUT_NAMES or name.endswith("module-info.class"):
        return False
    return not (name.startswith("META-INF/") and name.endswith(_LEFT_OUT_SUFFIXES))


def _fetch_artifacts() -> list[pathlib.Path]:
    """Has Maven fetch the runner with its dependencies; returns their jars in class-path order."""
    for tool, package in (("java", "a Java 11 or 17 runtime"), ("mvn", "Apache Maven")):
        if shutil.which(tool) is None:
            raise JobServerError(
                f"`{tool}` was not found on PATH. Building the Flink job server needs {package}: "
                "install it, or give Beam a jar of your own with --flink_job_server_jar."
            )
    with tempfile.TemporaryDirectory(prefix="diptych-flink-") as folder:
        pom = pathlib.Path(folder, "pom.xml")
        pom.write_text(_POM, encoding="utf-8")
        class_path = pathlib.Path(folder, "class_path.txt")
        _run_maven([f"--file={pom}", _GOAL, "-DincludeScope=runtime", f"-Dmdep.outputFile={class_path}"])
        jars = class_path.read_text(encoding="utf-8").strip().split(os.pathsep)
    return [pathlib.Path(jar) for jar in jars]


def _run_maven(arguments: Sequence[str]) -> None:
    # Without the third, Maven goes on for a day reporting a miss that it has met once.
    command = ["mvn", "--batch-mode", "--no-transfer-progress", "--update-snapshots", *arguments]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=MAVEN_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise JobServerError(
            f"Maven did not fetch the Flink job server's artifacts within {MAVEN_TIMEOUT_S} s. "
            "What it has fetched is kept: check the network and run the same command again."
        ) from error
    if done.returncode:
        raise JobServerError(
            "Maven could not fetch the Flink job server's artifacts "
            f"(beam-runners-flink-{FLINK_VERSION} {BEAM_VERSION}): {_reason(done.stdout)} "
            "Check the network and the mirror in ~/.m2/settings.xml, then run the command again."
        )


def _reason(output: str) -> str:
    """Picks the line in which Maven says what was wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("[ERROR]").strip() for line in lines if line.startswith("[ERROR]")]
    reason = (errors or lines[-1:] or ["it printed nothing"])[0]
    return f"{reason.removesuffix('-> [Help 1]').rstrip(' .')}."


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary name beside `path` that takes its place, whole, on success."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Builds the jar and prints its path.

    Args:
        argv: The command line without the program's name; the process's own where `None`.

    Returns:
        The exit code: 0 done, 1 not built.
    """
    parser = argparse.ArgumentParser(description="Build the Flink job server's jar and print its path.")
    parser.add_argument(
        "--output", type=pathlib.Path, metavar="JAR", help="copy the jar here (default: a cache)"
    )
    options = parser.parse_args(argv)
    try:
        jar = job_server_jar()
        if options.output:
            with _replacing(options.output) as temporary:
                shutil.copyfile(jar, temporary)
            jar = options.output
    except (JobServerError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(jar)
    return 0


if __name__ == "__main__":
    sys.exit(main())

import contextlib
import json
import logging
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kills import files_in

from diptych.pipelines.cli import main
from diptych.pipelines.demo_data import layouts
from diptych.pipelines.demo_data.layouts import write_data_set

NUM_SCENES = 200
CHUNK_ROWS = "--chunk_rows=5"
COMMAND = [sys.executable, "-m", "diptych"]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn data set, as nine tar files of 20 scenes and one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "_SHARD_SCENES", 20)
        return write_data_set(str(tmp_path_factory.mktemp("scenes") / "data"), NUM_SCENES, seed=1).webdataset


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed")
    assert main(["prepare", f"--input={data}", f"--output={out}", CHUNK_ROWS, "--quiet"]) == 0
    return files_in(out)


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


def prepare(data: Path, out: Path | str, *flags: str) -> int:
    return main(["prepare", "--input", str(data), "--output", str(out), *flags])


def run_code(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)


class TestExitCodes:
    @pytest.mark.parametrize(
        ("argv", "code", "message"),
        [
            ([], 2, "the following arguments are required: COMMAND"),
            (["nope"], 2, "invalid choice: 'nope'"),
            (["--nope"], 2, "required: COMMAND"),
            (["prepare"], 2, "the following arguments are required: .*--output, --input|--input, --output"),
            (["prepare", "--output=o"], 2, "required: --input. `diptych prepare --help`"),
            (["prepare", "--input=DATA"], 2, "required: --output"),
            (["prepare", "--input=DATA", "--output="], 2, "--output is ''"),
            (["prepare", "--input=", "--output=o"], 2, "--input is ''"),
            (["prepare", "--input=DATA", "--output=o", "--quality=high"], 2, "invalid int value: 'high'"),
            (["prepare", "--input=DATA", "--output=o", "--quality=0"], 2, "--quality is 0"),
            (["prepare", "--input=DATA", "--output=o", "--resize=fit"], 2, "invalid choice: 'fit'"),
            (["prepare", "--input=DATA", "--output=o", "--pixel_mean=1,2"], 2, "not three numbers"),
            (["prepare", "--input=DATA", "--output=o", "--chunk_row=3"], 2, r"Did you mean --chunk_rows\?"),
            (["prepare", "--input=DATA", "--output=o", "--over"], 2, "--over is no flag"),
            (["prepare", "--input=DATA", "--output=o", "--runer=X"], 2, r"Did you mean --runner\?"),
            (["prepare", "--input=DATA", "--output=o", "word"], 2, "word is no flag"),
            (
                ["prepare", "--input=DATA", "--output=o", "--runner=Nope"],
                2,
                "Unexpected pipeline runner: Nope",
            ),
            (
                ["prepare", "--input=DATA", "--output=o", "--runner=DataflowRunner"],
                2,
                "required option: project",
            ),
            (
                ["prepare", "--input=DATA", "--output=o", "--direct_num_workers=x"],
                2,
                "invalid int value: 'x'",
            ),
            (["prepare", "--input=DATA", "--output=o", "--split=train"], 2, "--split train goes with"),
            (["prepare", "--input=DATA", "--output=DATA"], 2, "is where .* is read from"),
            (["prepare", "--input=missing", "--output=o"], 1, "missing is not there"),
            (["prepare", "--input=miss*.tar", "--output=o"], 1, r"miss\*.tar matches no file"),
            (["prepare", "--input=empty", "--output=o"], 1, "empty holds no data of any format"),
            (["prepare", "--input=DATA", "--output=file"], 1, "file is a file"),
            (
                ["prepare", "--input=DATA", "--output=file/o"],
                1,
                "file/o/_records/source.job.json cannot be written: Not a dir",
            ),
            (["prepare", "--input=DATA", "--output=nowhere://o"], 1, "Protocol not known: nowhere"),
            (["prepare", "--input=nowhere://o", "--output=o"], 1, "Protocol not known: nowhere"),
            (
                ["prepare", "--input=DATA", "--output=http://127.0.0.1:1/o"],
                1,
                "http://127.0.0.1:1/o cannot be written: Connect call failed",
            ),
            (["verify"], 2, "required: OUT"),
            (["verify", ""], 2, "OUT is ''"),
            (["verify", "a", "b"], 2, "unrecognized arguments: b. `diptych verify --help`"),
            (["verify", "missing"], 1, "missing has no _job.json"),
            (["verify", "file"], 1, "file has no _job.json"),
            (["verify", "nowhere://o"], 1, "Protocol not known: nowhere"),
            (["demo", "--scene=3"], 2, "unrecognized arguments: --scene=3"),
            (["demo", "--scenes=x"], 2, "invalid int value: 'x'"),
            (["demo", "--seed=-1"], 2, "seed -1"),
            (["demo", "--output=file"], 1, "file.* cannot be written"),
        ],
    )
    def test_a_mistake_is_one_paragraph(self, argv, code, message, data, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty").mkdir()
        (tmp_path / "file").touch()
        assert main([arg.replace("DATA", str(data)) for arg in argv]) == code
        error = capsys.readouterr().err
        assert error.startswith("diptych: ")
        assert error.count("\n") == 1
        assert re.search(message, error), error
        assert {path.name for path in tmp_path.iterdir()} == {"empty", "file"}

    def test_a_bug_keeps_its_traceback(self, monkeypatch):
        monkeypatch.setattr("diptych.pipelines.verify.verify", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(["verify", "x"])

    def test_a_damaged_output_fails_verify(self, data, tmp_path, capsys):
        assert prepare(data / "val-00000.tar", tmp_path, "--quiet") == 0
        assert main(["verify", str(tmp_path)]) == 0
        assert capsys.readouterr().out.endswith("complete and sound\n")
        (tmp_path / "images" / "val-00000-00000.parquet").unlink()
        assert main(["verify", str(tmp_path)]) == 1
        assert "PROBLEM images has shards 0, but _SUCCESS.json says 1" in capsys.readouterr().out


class TestHelp:
    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (
                ["--help"],
                ["prepare", "embed", "caption", "train", "evaluate", "verify", "demo", "Apache Beam"],
            ),
            (
                ["prepare", "--help"],
                ["--input SRC", "--output OUT", "--chunk_rows N", "--size PX", "default 224"],
            ),
            (
                ["embed", "--help"],
                ["--model KIND:LOC", "word2vec or bert", "--device", "--pooling", "default 0.1"],
            ),
            (
                ["caption", "--help"],
                ["--beam_width N", "default 3", "cnn-lstm, cnn-rnn or hf", "--generation NAME=VALUE"],
            ),
            (["generate", "--help"], ["--prompts SRC", "vae, gan or diffusers", "--images_per_prompt N"]),
            (["run", "--help"], ["--embed KIND:LOC", "--generate KIND:LOC", "--size PX", "--seed N"]),
            (["evaluate", "--help"], ["captions", "images"]),
            (["evaluate", "captions", "--help"], ["--references FILE"]),
            (["evaluate", "images", "--help"], ["--features NAME", "--match_with KIND:LOC"]),
            (["verify", "-h"], ["OUT"]),
            (["demo", "--help"], ["--seed N", "--scenes N"]),
        ],
    )
    def test_each_command_has_it(self, argv, words, capsys):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        assert all(word in shown for word in words)

    def test_version(self, capsys):
        with pytest.raises(SystemExit) as ended:
            main(["--version"])
        assert ended.value.code == 0
        assert re.fullmatch(r"diptych \d+\.\d+\.\d+\n", capsys.readouterr().out)

    @pytest.mark.parametrize("command", ["embed", "caption", "generate", "run", "evaluate"])
    def test_it_does_not_wait_for_the_models_libraries(self, command):
        code = (
            f"import sys\nfrom diptych.pipelines.cli import main\ntry: main(['{command}', '--help'])\n"
            "except SystemExit: print({'torch', 'transformers', 'gensim'} & set(sys.modules))"
        )
        assert run_code(code).stdout.splitlines()[-1] == "set()"

    def test_it_does_not_wait_for_the_libraries(self):
        code = (
            "import sys\nfrom diptych.pipelines.cli import main\n"
            "try: main(['--version'])\n"
            "except SystemExit: print({'apache_beam', 'cv2', 'pyarrow'} & set(sys.modules))"
        )
        assert run_code(code).stdout.splitlines()[1:] == ["set()"]


class TestPrepare:
    def test_quiet_prints_nothing(self, data, tmp_path, capsys, undisturbed):
        assert prepare(data, tmp_path, CHUNK_ROWS, "--quiet") == 0
        assert capsys.readouterr() == ("", "")
        assert files_in(tmp_path) == undisturbed

    def test_the_summary_says_what_was_done_and_where_it_is(self, data, tmp_path, capsys):
        broken = tmp_path / "broken.tar"
        shutil.copy(data / "val-00000.tar", broken)
        with tarfile.open(broken) as tar:
            image = tar.getmembers()[0]
        content = bytearray(broken.read_bytes())
        content[image.offset_data : image.offset_data + image.size] = bytes(image.size)
        broken.write_bytes(content)
        assert prepare(broken, tmp_path / "out") == 0
        shown = capsys.readouterr()
        assert shown.err == ""
        *lines, took = shown.out.splitlines()
        assert lines[:3] == [
            "read      20 rows",
            f"written   19 to {tmp_path}/out/images",
            f"rejected  1 to {tmp_path}/out/rejects: not_an_image 1",
        ]
        assert lines[3:] == ["          captions read 100", "          captions written 100"]
        assert re.fullmatch(r"took      \d+\.\d s, [\d,]+ rows/s", took)

    def test_a_second_run_has_nothing_to_do(self, data, tmp_path, capsys):
        assert prepare(data / "val-00000.tar", tmp_path) == 0
        capsys.readouterr()
        assert prepare(data / "val-00000.tar", tmp_path) == 0
        assert capsys.readouterr().out.endswith("nothing to do: an earlier run has finished this\n")

    def test_going_on_says_what_was_there(self, data, tmp_path, capsys):
        assert prepare(data, tmp_path, CHUNK_ROWS) == 0
        (tmp_path / "images" / "val-00000-00003.parquet").unlink()
        capsys.readouterr()
        assert prepare(data, tmp_path, CHUNK_ROWS) == 0
        assert re.search(r"took .* rows/s; 195 rows were there from before\n$", capsys.readouterr().out)

    @pytest.mark.parametrize(
        "flags",
        [
            ["--direct_num_workers=1"],
            ["--direct_num_workers", "2", "--direct_running_mode", "multi_threading"],
            ["--runner=FnApiRunner", "--direct_runner_bundle_repeat=2"],
            ["--runner", "BundleBasedDirectRunner"],
        ],
    )
    def test_beams_flags_pass_and_change_no_byte(self, data, tmp_path, undisturbed, flags, capsys):
        assert prepare(data, tmp_path, CHUNK_ROWS, *flags) == 0
        assert files_in(tmp_path) == undisturbed
        shown = capsys.readouterr().out
        assert "read      200 rows" in shown
        assert "from before" not in shown

    def test_another_option_is_refused_with_both_values(self, data, tmp_path, capsys):
        assert prepare(data / "val-00000.tar", tmp_path, "--quiet") == 0
        before = files_in(tmp_path)
        assert prepare(data / "val-00000.tar", tmp_path, "--size=32") == 1
        assert "options.resize.size_px is 224 there and 32 here" in capsys.readouterr().err
        assert files_in(tmp_path) == before
        assert prepare(data / "val-00000.tar", tmp_path, "--size=32", "--overwrite", "--quiet") == 0
        assert (
            json.loads((tmp_path / "_job.json").read_text())["images"]["options"]["resize"]["size_px"] == 32
        )


def start(data: Path, out: Path, *flags: str, **options: object) -> subprocess.Popen[str]:
    command = [*COMMAND, "prepare", f"--input={data}", f"--output={out}", CHUNK_ROWS, *flags]
    return subprocess.Popen(command, cwd=REPOSITORY, text=True, start_new_session=True, **options)  # type: ignore[call-overload]


def wait_for_files(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Waits until a run has committed some chunks."""
    while process.poll() is None and not (folder.is_dir() and len(os.listdir(folder)) >= count):
        time.sleep(0.005)


class TestSignals:
    @pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    @pytest.mark.parametrize("flags", [("--summary=json",), ("--direct_num_workers=2",)])
    def test_a_stopped_run_says_so_and_goes_on(self, data, tmp_path, undisturbed, signum, code, flags):
        pipe = subprocess.PIPE
        with start(data, tmp_path / "out", *flags, stdout=pipe, stderr=pipe) as process:
            wait_for_files(tmp_path / "out" / "images", 5, process)
            process.send_signal(signum)
            shown, error = process.communicate(timeout=60)
        assert process.returncode == code
        assert (json.loads(shown)["outcome"] == "stopped") if "--summary=json" in flags else (shown == "")
        assert error == "diptych: stopped. The same command goes on from here.\n"
        names = set(os.listdir(tmp_path / "out" / "images"))
        # on a busy machine, worker processes may write the last file before they are told
        assert 5 <= len(names) < (41 if "--direct_num_workers=2" in flags else 40)
        assert prepare(data, tmp_path / "out", CHUNK_ROWS, "--quiet") == 0
        assert files_in(tmp_path / "out") == undisturbed

    def test_a_reader_that_has_seen_enough_is_no_error(self, data, tmp_path):
        assert prepare(data / "val-00000.tar", tmp_path, "--quiet") == 0
        reader, writer = os.pipe()
        os.close(reader)
        command = [*COMMAND, "verify", str(tmp_path)]
        with open(writer, "wb") as stdout:
            done = subprocess.run(command, cwd=REPOSITORY, stdout=stdout, stderr=subprocess.PIPE, check=False)
        assert (done.returncode, done.stderr) == (0, b"")

    def test_handlers_are_put_back(self, data, tmp_path):
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        assert main(["verify", str(tmp_path)]) == 1
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

    def test_it_runs_in_another_thread_too(self, tmp_path):
        codes: list[int] = []
        thread = threading.Thread(target=lambda: codes.append(main(["verify", str(tmp_path)])))
        thread.start()
        thread.join()
        assert codes == [1]


class TestProgress:
    def test_lines_where_it_is_no_terminal(self, data, tmp_path):
        argv = ["prepare", f"--input={data}", f"--output={tmp_path}/out", CHUNK_ROWS]
        code = (
            "import logging; logging.disable(); from diptych.pipelines import cli\n"
            "from diptych.pipelines.runners import run_pipeline\n"
            f"run_pipeline._LINE_S = 0.1; raise SystemExit(cli.main({argv}))"
        )
        done = run_code(code)
        lines = done.stderr.splitlines()
        shown = r"diptych: \d+/10 shards, [\d,]+ rows, [\d,]+ rows/s, 0 rejects(, \d+:\d\d left)?"
        assert len(lines) >= 2
        assert [line for line in lines if not re.fullmatch(shown, line)] == []
        rows = [int(re.search(r"([\d,]+) rows,", line)[1]) for line in lines]  # type: ignore[index]
        assert rows == sorted(rows)

    def test_a_bar_on_a_terminal(self, data, tmp_path):
        terminal, stderr = pty.openpty()
        with start(data, tmp_path / "out", stdout=subprocess.PIPE, stderr=stderr) as process:
            os.close(stderr)
            shown = b""
            with contextlib.suppress(OSError):  # the other end is closed
                while part := os.read(terminal, 65536):
                    shown += part
            os.close(terminal)
            summary, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert re.search(r"\d+%\|.{20}\| \d+/10 shards, [\d,]+ rows, [\d,]+ rows/s", shown.decode())
        assert "\n" not in shown.decode().strip()
        assert summary.startswith("read      200 rows\n")

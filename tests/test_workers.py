"""Jobs in processes of their own: what they return and raise comes back, what they print goes to the log, a crash is one
line, and none of them outlives its caller."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from compiler import workers
from compiler.errors import CompileError, ConfigError, NumericsError, SourceError, StageError
from tests import jobs


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "build.log"


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def gone(process_id: int) -> bool:
    try:
        return bool(psutil.Process(process_id).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def failure(job: Callable[..., object], *args: Any, log: Path) -> StageError:
    """The StageError, of one line, that a job ends in."""
    with pytest.raises(StageError) as caught:
        workers.run(job, *args, log=log)
    assert type(caught.value) is StageError
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


class TestResults:
    def test_a_result_comes_back(self, log: Path) -> None:
        assert workers.run(jobs.add, 2, 3, log=log) == 5

    def test_it_runs_in_a_process_of_its_own(self, log: Path) -> None:
        seen = {workers.run(jobs.process, log=log) for _ in range(2)}
        assert len(seen) == 2
        assert psutil.Process().pid not in seen

    @pytest.mark.parametrize("value", [None, 0, "", {"a": [1, (2, 3)]}, Path("x"), {"error": "x"}])
    def test_values(self, log: Path, value: object) -> None:
        assert workers.run(jobs.echo, value, log=log) == value

    def test_a_large_result(self, log: Path) -> None:
        assert len(workers.run(jobs.large, 5_000_000, log=log)) == 5_000_000

    def test_torch_is_there_already(self, log: Path) -> None:
        assert workers.run(jobs.has_torch, log=log)

    def test_nothing_phones_home(self, log: Path) -> None:
        assert workers.run(jobs.environment, "HF_HUB_OFFLINE", log=log) == "1"

    def test_ctrl_c_is_left_to_the_caller(self, log: Path) -> None:
        assert workers.run(jobs.interrupt_is_ignored, log=log)

    def test_side_by_side(self, log: Path) -> None:
        answers: dict[int, int] = {}

        def ask(number: int) -> None:
            answers[number] = workers.run(jobs.add, number, 1, log=log)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == {0: 1, 1: 2, 2: 3, 3: 4}

    def test_the_callers_own_environment_is_as_before(self, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.delenv("DO_NOT_TRACK", raising=False)
        with workers._environment(log.parent):
            assert os.environ["HF_HUB_OFFLINE"] == "1"
        assert os.environ["HF_HUB_OFFLINE"] == "0"
        assert "DO_NOT_TRACK" not in os.environ

    def test_what_would_shape_a_result_is_pinned(self, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        own = {"OMP_NUM_THREADS": "7", "MKL_DYNAMIC": "TRUE", "PYTHONHASHSEED": "3", "LC_ALL": "C", "PYTORCH_JIT": "0"}
        own |= {"MKL_VML_MODE": "EP", "ONEDNN_VERBOSE": "1", "DNNL_PRIMITIVE_CACHE_CAPACITY": "0", "OMP_SCHEDULE": "dynamic"}
        own |= {"MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}  # which are recorded
        for name, value in own.items():
            monkeypatch.setenv(name, value)
        with workers._environment(log.parent):
            pinned = {name: os.environ.get(name) for name in own}
        assert pinned == {
            "OMP_NUM_THREADS": None,
            "MKL_DYNAMIC": None,
            "PYTHONHASHSEED": "0",
            "LC_ALL": "C.UTF-8",
            "PYTORCH_JIT": "1",
            "MKL_VML_MODE": None,
            "ONEDNN_VERBOSE": None,
            "DNNL_PRIMITIVE_CACHE_CAPACITY": None,
            "OMP_SCHEDULE": None,
            "MKL_CBWR": "COMPATIBLE",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "ATEN_CPU_CAPABILITY": "avx2",
        }
        assert {name: os.environ[name] for name in own} == own

    def test_threads_that_wait_give_the_core_away(self, log: Path) -> None:
        """The library that torch computes with reads it."""
        with workers._environment(log.parent):
            shown = {**os.environ, "OMP_DISPLAY_ENV": "VERBOSE"}
        found = subprocess.run([sys.executable, "-c", "import torch"], env=shown, capture_output=True, text=True, check=True)
        assert f"GOMP_SPINCOUNT = '{workers.SPINS}'" in found.stderr


class TestErrors:
    @pytest.mark.parametrize(
        ("kind", "expected", "message"),
        [
            ("source", SourceError, "config.json: damaged; fetch it again"),
            ("config", ConfigError, "shapes: too long"),
            ("numerics", NumericsError, "onnx fp32: cosine is 0.5"),
        ],
    )
    def test_our_own_come_back_as_they_were(self, log: Path, kind: str, expected: type[CompileError], message: str) -> None:
        with pytest.raises(CompileError) as caught:
            workers.run(jobs.refuse, kind, log=log)
        assert type(caught.value) is expected
        assert str(caught.value) == message
        assert "Traceback" in log.read_text()

    def test_any_other_is_one_line_that_names_the_log(self, log: Path) -> None:
        error = failure(jobs.fail, "first line\nsecond line", log=log)
        assert str(error) == f"RuntimeError: first line; the whole story is in {log}"
        assert "second line" in log.read_text()

    @pytest.mark.parametrize("message", ["", "\n", "x" * 10_000, "\r\nover", "a\vb\fc\u2028d"])
    def test_odd_messages(self, log: Path, message: str) -> None:
        text = str(failure(jobs.fail, message, log=log))
        assert len(text) < 400 + len(str(log))
        assert len(text.splitlines()) == 1

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
    def test_a_signal_is_named(self, log: Path, number: signal.Signals) -> None:
        text = str(failure(jobs.die, number, log=log))
        assert number.name in text
        assert str(log) in text
        assert ("memory" in text) == (number == signal.SIGKILL)

    @pytest.mark.parametrize("code", [0, 3])
    def test_a_process_that_leaves_without_an_answer(self, log: Path, code: int) -> None:
        assert f"exit code {code}" in str(failure(jobs.leave_at_once, code, log=log))

    def test_sys_exit(self, log: Path) -> None:
        assert "SystemExit" in str(failure(jobs.leave, 3, log=log))

    def test_out_of_memory_says_so(self, log: Path) -> None:
        assert "memory" in str(failure(jobs.out_of_memory, log=log)).lower()

    def test_a_result_that_cannot_be_sent(self, log: Path) -> None:
        """Not that the worker died: it did not."""
        text = str(failure(jobs.answer_with_a_function, log=log))
        assert "pickle" in text
        assert str(log) in text

    def test_an_error_of_the_file_system_says_which_file(self, log: Path, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError) as caught:
            workers.run(jobs.no_such_file, str(tmp_path / "missing"), log=log)
        assert caught.value.filename == str(tmp_path / "missing")

    def test_one_that_fails_does_not_hurt_the_next(self, log: Path) -> None:
        failure(jobs.die, signal.SIGSEGV, log=log)
        assert workers.run(jobs.add, 1, 1, log=log) == 2


class TestLog:
    EVERYTHING = (
        "printed by the job",
        "complained by the job",
        "written by native code",
        "shouted by native code",
        "said by a child",
        "warned by the job",
        "logged by the job",
    )

    def test_all_that_is_printed_goes_there(self, log: Path, capfd: pytest.CaptureFixture[str]) -> None:
        workers.run(jobs.speak, log=log)
        text = log.read_text()
        assert [words for words in self.EVERYTHING if words not in text] == []
        assert capfd.readouterr() == ("", "")

    def test_each_job_writes_to_its_own(self, log: Path, tmp_path: Path) -> None:
        workers.run(jobs.add, 1, 1, log=log)
        workers.run(jobs.speak, log=tmp_path / "other.log")
        assert "printed by the job" in (tmp_path / "other.log").read_text()
        assert not log.exists() or "printed by the job" not in log.read_text()

    def test_it_grows(self, log: Path) -> None:
        log.write_text("before\n")
        workers.run(jobs.speak, log=log)
        workers.run(jobs.speak, log=log)
        assert log.read_text().startswith("before\n")
        assert log.read_text().count("printed by the job") == 2


class TestStop:
    @pytest.fixture(autouse=True)
    def started_again(self) -> Iterator[None]:
        yield
        workers.reset()

    def test_it_ends_running_jobs(self, log: Path, tmp_path: Path) -> None:
        errors: list[BaseException] = []

        def ask() -> None:
            try:
                workers.run(jobs.sleep, str(tmp_path / "started"), log=log)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        wait_for((tmp_path / "started").exists)
        workers.stop()
        thread.join(10)
        assert not thread.is_alive()
        assert [type(error) for error in errors] == [StageError]
        assert gone(int((tmp_path / "started").read_text()))

    def test_nothing_starts_until_reset(self, log: Path) -> None:
        workers.stop()
        assert str(failure(jobs.add, 1, 1, log=log)) == "stopped"
        workers.reset()
        assert workers.run(jobs.add, 1, 1, log=log) == 2

    def test_stop_with_nothing_running(self) -> None:
        workers.stop()


CALLER = """
import sys, threading
from pathlib import Path
from compiler import workers
from tests import jobs
log, *started = sys.argv[1:]
if __name__ == "__main__":
    threads = [threading.Thread(target=workers.run, args=(jobs.sleep, name), kwargs={"log": Path(log)}) for name in started]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""


def test_jobs_die_with_a_caller_that_is_killed(tmp_path: Path, log: Path) -> None:
    started = [tmp_path / "one", tmp_path / "two"]
    caller = subprocess.Popen([sys.executable, "-c", CALLER, log, *started])
    try:
        wait_for(lambda: all(path.exists() for path in started), 60)
        family = psutil.Process(caller.pid).children(recursive=True)
        working = [int(path.read_text()) for path in started]
        assert set(working) <= {child.pid for child in family}
    finally:
        caller.send_signal(signal.SIGKILL)
        caller.wait()
    wait_for(lambda: all(gone(process) for process in working))
    wait_for(lambda: all(gone(child.pid) for child in family))  # and so does the server


def test_our_output_is_still_ours_after_the_start(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom compiler import workers\nfrom tests import jobs\n"
        "if __name__ == '__main__':\n"
        "    print('before')\n"
        "    workers.run(jobs.speak, log=Path(sys.argv[1]))\n"
        "    print('after')\n    print('complaint', file=sys.stderr)\n"
    )
    found = subprocess.run([sys.executable, "-c", program, tmp_path / "log"], capture_output=True, text=True, check=True)
    assert (found.stdout, found.stderr) == ("before\nafter\n", "complaint\n")

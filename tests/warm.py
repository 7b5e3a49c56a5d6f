"""Commands that start warm: each runs in a process of its own, forked from one that has imported the command line, and its
jobs are forked from one server, which has imported torch and transformers once for all commands of a pytest process.

Only those imports are shared. A command has its own arguments, folder, environment, standard streams and exit code, and runs
as `python -m compiler` runs it. Where starting is what a test is about, or what jobs find in the environment, it starts cold.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any, NoReturn

# What commands may have another value of than the server of their jobs, by how it starts: no job reads it. Of the last two,
# which torch and our own code set in pytest's process, any value does.
OWN = ("COMPILE_CACHE_DIR", "PYTEST_", "MLFLOW_", "TORCHINDUCTOR_CACHE_DIR", "HF_HUB_DISABLE_")


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that the server of jobs must have in common with a command."""
    return {name: value for name, value in environment.items() if not name.startswith(OWN)}


class Warm:
    """The process that commands are forked from. It ends with the one that made it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = inherited(environment)
        self._folder = tempfile.TemporaryDirectory(prefix="compile-warm-")
        self._connection, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.warm", str(theirs.fileno()), str(Path(self._folder.name) / "log")],
                cwd=Path(__file__).parents[1],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def run(
        self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """What `subprocess.run` gives for `python -m compiler ARGUMENTS`; like it, one that takes too long is killed."""
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            self._connection.send((list(arguments), str(folder), dict(environment)))
            for stream in (stdout, stderr):
                send_handle(self._connection, stream.fileno(), self._process.pid)
            pid = self._connection.recv()
            in_time = self._connection.poll(timeout)
            if not in_time:
                os.kill(pid, signal.SIGKILL)
            code = self._connection.recv()
            if not in_time:
                raise subprocess.TimeoutExpired(["compile", *arguments], timeout)
            stdout.seek(0)
            stderr.seek(0)
            return subprocess.CompletedProcess(["compile", *arguments], code, stdout.read(), stderr.read())

    def close(self) -> None:
        self._connection.close()
        self._process.wait(60)
        self._folder.cleanup()


def _jobs() -> Any:
    """This process's server of jobs."""
    return multiprocessing.forkserver._forkserver


def _commands(connection: multiprocessing.connection.Connection) -> tuple[list[str], str, dict[str, str], list[int]]:
    """Fork a process for each command that is asked for. Returns in those: arguments, folder, environment, and what is to be
    standard output and error."""
    while True:
        try:
            arguments, folder, environment = connection.recv()
        except EOFError:
            _jobs()._stop()
            sys.exit()
        streams = [recv_handle(connection) for _ in range(2)]
        if (pid := os.fork()) == 0:
            connection.close()
            return arguments, folder, environment, streams
        for stream in streams:
            os.close(stream)
        connection.send(pid)
        connection.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _serve(connection: multiprocessing.connection.Connection, log: Path) -> NoReturn:
    import compiler.cli
    import compiler.spine  # noqa: F401
    from compiler import workers

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # pytest, which gets it too, decides
    workers.start(log)
    arguments, folder, environment, streams = _commands(connection)
    # The server of jobs is the parent's child, which only the parent can wait for.
    _jobs().ensure_running = lambda: None
    tracker: Any = multiprocessing.resource_tracker
    tracker._resource_tracker._pid = None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for place, stream in enumerate(streams, start=1):
        os.dup2(stream, place)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0] = folder
    sys.argv[1:] = arguments
    runpy.run_module("compiler", run_name="__main__", alter_sys=True)
    raise AssertionError("the command line always exits")


if __name__ == "__main__":
    _serve(multiprocessing.connection.Connection(int(sys.argv[1])), Path(sys.argv[2]))

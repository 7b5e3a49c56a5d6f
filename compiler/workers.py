"""Each stage's heavy work runs in a process of its own.

Two runtimes in one process disturb each other's threads; a runtime that crashes must not take the build with it; and
what libraries print must not reach the user. So a job is forked from a server that has imported torch and transformers
once (`multiprocessing`'s forkserver), writes everything it prints into the build's log, and ends with its caller: a
build that is killed leaves no process behind.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from compiler import cpu
from compiler.errors import CompileError, StageError

T = TypeVar("T")

# Deterministic results want a fixed number of threads; side by side, one each is also the fastest on few cores.
THREADS = 1
# The reference is computed while nothing else runs.
LOAD_THREADS = 2
# How long libgomp's threads look for work before they sleep. With its own 300,000 turns `load` and `calibrate` take up to
# twice as long where other processes have the cores; with none at all a third longer where they are idle.
SPINS = "20000"
PRELOAD = ["compiler.preload"]
# Where transformers copies a checkpoint's own code before it runs it, beside the log.
MODULES = "modules"
_running: set[multiprocessing.process.BaseProcess] = set()
_lock = threading.Lock()
_starting = threading.Lock()
_started = False
_stopped = False


def start(log: Path) -> None:
    """Start the server and its imports, which take seconds, without waiting for them. Its output goes to `log`."""
    global _started
    with _starting:
        if not _started:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(PRELOAD)
            with _environment(log.parent), _output_to(log):
                multiprocessing.forkserver.ensure_running()
            _started = True


def run(job: Callable[..., T], *args: Any, log: Path) -> T:
    """Run `job(*args)` in a process of its own and return its result.

    Raises:
        CompileError: as the job raised it.
        StageError: the job's process died (of a signal, or for lack of memory), or it failed otherwise.
    """
    start(log)
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(sender, str(log), job, args), daemon=True)
    if stopped():
        raise StageError("stopped")
    process.start()  # waits for the server's imports, so it holds no lock that `stop` needs
    with _lock:
        _running.add(process)
        if _stopped:
            process.kill()
    sender.close()
    try:
        kind, value = receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        why = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        hint = "; the machine may have run out of memory" if code == -signal.SIGKILL else ""
        kind, value = "error", StageError(f"the worker died of {why}{hint}; see {log}")
    except BaseException:  # Ctrl-C while waiting
        process.kill()
        raise
    finally:
        receiver.close()
        process.join()
        with _lock:
            _running.discard(process)
    if kind == "error":
        raise value
    result: T = value
    return result


def stop() -> None:
    """Kill every job; those that wait for one see it fail. Nothing new starts until `reset`."""
    global _stopped
    with _lock:
        _stopped = True
        for process in _running:
            process.kill()


def stopped() -> bool:
    """Whether `stop` was called."""
    with _lock:
        return _stopped


def reset() -> None:
    """Let jobs start again after `stop`."""
    global _stopped
    with _lock:
        _stopped = False


def _main(sender: multiprocessing.connection.Connection, log: str, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller, which gets it too, decides
    threading.Thread(target=_die_with_parent, daemon=True).start()
    stream = open(log, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - it stays open for the process's life
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    try:
        answer: tuple[str, Any] = ("result", job(*args))
    except CompileError as error:
        traceback.print_exc()
        answer = ("error", type(error)(*error.args))
    except OSError as error:
        traceback.print_exc()
        answer = ("error", error)
    except BaseException as error:
        traceback.print_exc()
        answer = ("error", StageError(f"{type(error).__name__}: {_first_line(error)}; the whole story is in {log}"))
    try:
        sender.send(answer)
    except Exception as error:  # it cannot be pickled
        traceback.print_exc()
        text = f"{type(error).__name__}: its result cannot be sent (pickle): {_first_line(error)}; the whole story is in {log}"
        sender.send(("error", StageError(text)))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return text if len(text) <= 300 else f"{text[:297]}..."


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


@contextlib.contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """Settings that libraries read when they are imported: nothing phones home, no bars, no advice. What a checkpoint's own
    code makes transformers write goes below `folder`. What of a user's settings would shape a result is pinned: the order
    of sets, the locale, whether torch traces, the number of threads, which `THREADS` and `LOAD_THREADS` say, and how the
    libraries compute, but for the caps that `cpu.features` records."""
    settings: dict[str, str | None] = {
        **dict.fromkeys(cpu.unset()),
        "LC_ALL": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "PYTORCH_JIT": "1",
        "GOMP_SPINCOUNT": SPINS,
        "HF_MODULES_CACHE": str(folder.absolute() / MODULES),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "DO_NOT_TRACK": "1",
    }
    before = {name: os.environ.get(name) for name in settings}
    _set(settings)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    """Set environment variables, and unset those that are None."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Point descriptors 1 and 2 at a file while the server starts, for it and the jobs inherit them."""
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)
    kept = [os.dup(1), os.dup(2)]
    with open(log, "ab") as file:
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield
        finally:
            for descriptor, copy in enumerate(kept, start=1):
                os.dup2(copy, descriptor)
                os.close(copy)


def _flush(stream: IO[str] | None) -> None:
    if stream is not None:
        with contextlib.suppress(ValueError, OSError):
            stream.flush()

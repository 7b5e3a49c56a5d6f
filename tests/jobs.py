"""Jobs for the tests of `compiler.workers` and `compiler.store`: a worker imports them by name."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from compiler.errors import ConfigError, NumericsError, SourceError
from compiler.store import Step, Store
from compiler.types import Check, Report


def add(a: int, b: int) -> int:
    return a + b


def process() -> int:
    return os.getpid()


def echo(value: Any) -> Any:
    return value


def large(size: int) -> bytes:
    return b"x" * size


def refuse(kind: str) -> None:
    if kind == "source":
        raise SourceError("config.json: damaged; fetch it again")
    if kind == "config":
        raise ConfigError("shapes: too long")
    report = Report("onnx", "fp32", (Check("logits", "cosine", 0.5, 0.9, False, "sample"),))
    raise NumericsError("onnx fp32: cosine is 0.5", (report,))


def fail(message: str) -> None:
    raise RuntimeError(message)


def leave(code: int) -> None:
    sys.exit(code)


def leave_at_once(code: int) -> None:
    os._exit(code)


def out_of_memory() -> None:
    raise MemoryError


def no_such_file(path: str) -> None:
    open(path).close()


def answer_with_a_function() -> Any:
    return lambda: None


def die(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)


def speak() -> None:
    print("printed by the job")
    print("complained by the job", file=sys.stderr)
    os.write(1, b"written by native code\n")
    os.write(2, b"shouted by native code\n")
    subprocess.run(["echo", "said by a child"], check=True)
    warnings.warn("warned by the job", stacklevel=1)
    logging.getLogger("library").error("logged by the job")


def sleep(started: str, seconds: float = 60) -> None:
    """Write our process id into a file, whole, and sleep."""
    aside = Path(f"{started}.new")
    aside.write_text(str(os.getpid()))
    aside.rename(started)
    time.sleep(seconds)


def has_torch() -> bool:
    return "torch" in sys.modules


def environment(name: str) -> str | None:
    return os.environ.get(name)


def interrupt_is_ignored() -> bool:
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def make_slowly(root: str, count: str, seconds: float) -> bool:
    """Ask a store for the one step there is, and add a line to `count` when it is made. Whether it was in the cache."""

    def make(out: Path) -> dict[str, Any]:
        with open(count, "a") as stream:
            stream.write(f"{os.getpid()}\n")
        (out / "payload").write_bytes(b"content")
        time.sleep(seconds)
        return {"answer": 42}

    entry, cached = Store(Path(root)).get_or_make(Step("m", "load", "", {"a": "1"}), make)
    assert entry.info == {"answer": 42}
    return cached

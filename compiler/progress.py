"""How a build looks while it runs: a live line a step on a terminal, plain lines elsewhere. Always on stderr."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from compiler.types import Event

SHOWN = {
    "run": "done",
    "cached": "cached",
    "current": "unchanged",
    "released": "released",
    "published": "published",
    "there": "unchanged",
    "moved": "moved",
    "tried": "tried",
    "timed": "timed",
    "left out": "left out",
    "failed": "FAILED",
    "stopped": "stopped",
    "waiting": "waiting",
}
STYLE = {
    "failed": "bold red",
    "released": "green",
    "published": "green",
    "moved": "green",
    "run": "green",
    "waiting": "yellow",
    "left out": "yellow",
}


# What is told of a step while it goes on.
DURING = ("tried", "timed", "left out")


class Display:
    """Use as a context manager and give `tell` to the build. With `verbose`, what libraries print is shown as well."""

    def __init__(self, verbose_folder: Path | None = None) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=self.console, transient=True
        )
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._lock = threading.Lock()
        self._verbose_folder = verbose_folder
        self._read: dict[Path, int] = {}

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def tell(self, event: Event) -> None:
        with self._lock:
            key = (event.model, event.step)
            if event.state == "start":
                if self.console.is_terminal:
                    self._tasks[key] = self._live.add_task(f"{event.model}  {event.step}", total=None)
                return
            if key in self._tasks and event.state not in DURING:
                self._live.remove_task(self._tasks.pop(key))
            self._show_log(event)
            text = (
                f"{event.model}  {event.step or 'release':<26} {SHOWN[event.state]:<9} {event.seconds:6.1f} s  {event.detail}"
            )
            self.console.print(text.rstrip(), style=STYLE.get(event.state, ""), markup=False)

    def _show_log(self, event: Event) -> None:
        """What was added to the build's log since the last step ended."""
        if self._verbose_folder is None:
            return
        log = self._verbose_folder / Path(*event.model.split(" ")) / "build.log"
        try:
            with open(log, "rb") as stream:
                stream.seek(self._read.get(log, 0))
                added = stream.read()
        except OSError:
            return
        self._read[log] = self._read.get(log, 0) + len(added)
        for line in added.decode(errors="replace").splitlines():
            self.console.print(f"  | {line}", style="dim", markup=False)


@contextlib.contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """One line that says what is going on, on a terminal; nothing elsewhere."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("") as live:
        yield lambda text: live.update(text)


@contextlib.contextmanager
def counting() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each thing that is told with how many of how many are done, on a terminal; nothing elsewhere."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda name, done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as live:
        bars: dict[str, TaskID] = {}

        def tell(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = live.add_task(name, total=total)
            live.update(bars[name], completed=done)

        yield tell

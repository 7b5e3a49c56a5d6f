"""The command line. The only place that prints results or exits."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn, cast

import click
from click_default_group import DefaultGroup  # type: ignore[import-untyped]

import compiler
from compiler.cli import pipelines, registries, releases, run
from compiler.cli.output import print_json, report_json
from compiler.errors import CompileError, ReleaseError


class _Verbs(DefaultGroup):  # type: ignore[misc]
    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """A misspelt verb would be taken for a pipeline's name, since `build` may be left out."""
        close = difflib.get_close_matches(args[0], self.commands, n=1) if re.fullmatch(r"[\w-]+", args[0]) else []
        if close and args[0] not in self.commands and not os.path.lexists(args[0]):
            raise click.UsageError(f"no such file or verb: {args[0]}; did you mean {close[0]!r}?", ctx)
        found: tuple[str | None, click.Command | None, list[str]] = super().resolve_command(ctx, args)
        return found


@click.group(cls=cast("type[click.Group]", _Verbs), default="build", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(compiler.__version__, prog_name="compile")
def cli() -> None:
    """Compile checkpoints into validated, versioned CPU releases: TorchScript, ONNX, OpenVINO.

    `compile pipeline.yaml` is `compile build pipeline.yaml`.
    """


for command in (
    pipelines.build,
    pipelines.plan,
    pipelines.init,
    pipelines.schema,
    releases.inspect,
    releases.verify,
    releases.sign,
    releases.bench,
    releases.diff,
    run.run,
    run.evaluate,
    registries.push,
    registries.pull,
    registries.list_versions,
    registries.alias,
):
    cli.add_command(command)


class _Terminated(BaseException):
    """SIGTERM."""


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script: every way out of the program ends here, with the exit code that the README lists."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, _terminate)
    try:
        left = cli.main(args=given, prog_name="compile", standalone_mode=False)
        sys.stdout.flush()
        code = left if isinstance(left, int) else 0  # click returns the code of an Exit
    except click.ClickException as error:
        error.show()
        code = 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; no release is half made", err=True)
        code = 130
    except _Terminated:
        click.echo("terminated; no release is half made", err=True)
        code = 143
    except CompileError as error:
        text = " ".join(str(error).split())
        if "--json" in given:
            reports = getattr(error, "reports", ())
            answer = {"error": text, "kind": type(error).__name__, "artifacts": [report_json(report) for report in reports]}
            if isinstance(error, ReleaseError) and error.files:
                answer["files"] = list(error.files)
            if blame := getattr(error, "blame", ()):
                answer["blame"] = list(blame)
            if error.released:
                answer["releases"] = error.released
            print_json(answer)
        click.echo(f"error: {text}", err=True)
        code = 1
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if error.errno == errno.EPIPE:
            code = 141
        elif error.errno == errno.ENOSPC and error.filename is None:
            click.echo("error: standard output: no space is left; make room", err=True)
            code = 1
        else:
            code = _bug()
    except Exception:
        code = _bug()
    sys.exit(code)


def _bug() -> int:
    traceback.print_exc()
    click.echo("this is a bug in compile: please report it with the lines above", err=True)
    return 3

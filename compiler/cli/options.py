"""Options that several commands share, and what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

CACHE_VARIABLE = "COMPILE_CACHE_DIR"
json_option = click.option("--json", "as_json", is_flag=True, help="The result on stdout as JSON; progress stays on stderr.")
cache_option = click.option(
    "--cache-dir", envvar=CACHE_VARIABLE, type=click.Path(path_type=Path), help=f"The stage cache (also {CACHE_VARIABLE})."
)

locked_option = click.option(
    "--locked",
    is_flag=True,
    help="Refuse when anything is not as the lock, which builds write, records it: pipeline.lock beside pipeline.yaml, "
    "NAME.lock beside NAME.yaml.",
)


def open_store(cache_dir: Path | None) -> Any:
    from compiler.store import Store

    if cache_dir is None:
        import platformdirs

        cache_dir = platformdirs.user_cache_path("aot-model-compiler")
    return Store(cache_dir)

"""Programs that `tests/servers.sh` unpacks from Debian's packages, and the libraries that they need."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1] / ".venv" / "servers"
PATH = os.pathsep.join([str(ROOT / "usr" / "bin"), os.environ.get("PATH", "")])
MISSING = "{0} is not here: `make .venv/servers/ready` fetches it where there is apt-get"


def program(name: str) -> str | None:
    """Where a program is; None where it is not."""
    return shutil.which(name, path=PATH)


def environment() -> dict[str, str]:
    """That of this process, with the libraries."""
    libraries = ":".join(str(folder) for base in ("lib", "usr/lib") for folder in (ROOT / base).glob("*-linux-gnu*"))
    return {**os.environ, "LD_LIBRARY_PATH": libraries}

"""Ports for servers that are killed and started again on the same one."""

from __future__ import annotations

import contextlib
import os
import socket

# Below what Linux gives to who asks for any port: while its server is down, nothing else takes it. Each worker has its own.
FIRST, EACH = 20000, 1000
_taken = 0


def free_port() -> int:
    """A port of the loopback that nobody listens on, and that no test was given before."""
    global _taken
    first = FIRST + EACH * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while _taken < EACH:
        port = first + _taken
        _taken += 1
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError(f"no port is free from {first} on")

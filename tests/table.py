"""Which tasks are exported to which formats, as a Markdown table, from what the contract tests passed:

COMPILE_TABLE=passed.txt python -m pytest tests/test_contract.py; python -m tests.table passed.txt
"""

from __future__ import annotations

import sys
from pathlib import Path

from compiler.backends import BACKENDS
from compiler.tasks import TASKS


def table(passed: str) -> str:
    """`passed` has a line `task, architecture, format precision`, with tabs between, for each test that passed."""
    found = {tuple(line.split("\t")) for line in passed.splitlines()}
    targets = [f"{name} {precision}" for name, backend in BACKENDS.items() for precision in backend.PRECISIONS]
    rows = [["task", *targets], ["---"] * (len(targets) + 1)]
    for task in TASKS:
        row = [task]
        for target in targets:
            names = sorted(name for this, name, made in found if (this, made) == (task, target))
            row.append(", ".join(names) or "–")
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(table(Path(sys.argv[1]).read_text(encoding="utf-8")))

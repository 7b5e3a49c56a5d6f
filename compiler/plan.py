"""What a build would do: every step with all that shapes its result, and why it would run. Imports no torch."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import compiler
from compiler import cpu
from compiler.backends import BACKENDS
from compiler.config import ModelSpec
from compiler.errors import ConfigError
from compiler.hashing import digest, file_sha256, hash_files
from compiler.manifest import differences
from compiler.modalities import MODALITIES
from compiler.sources import infer_task
from compiler.store import Step, Store
from compiler.tasks import FILES, TASKS, parse_line
from compiler.types import Snapshot, Target
from compiler.workers import LOAD_THREADS, THREADS

PACKAGE = Path(__file__).parent
# Text of the compiler's own, for a model whose user names none.
BUILTIN_TEXT = PACKAGE / "data" / "validation.jsonl"
# The same for what other tasks read.
BUILTIN = {
    "multiple-choice": PACKAGE / "data" / "choices.jsonl",
    "image": PACKAGE / "data" / "images.jsonl",
    "image-text": PACKAGE / "data" / "images.jsonl",
    "audio": PACKAGE / "data" / "sounds.jsonl",
}
LOAD_LIBRARIES = (
    "accelerate",
    "gguf",
    "huggingface-hub",
    "numpy",
    "optimum",
    "protobuf",
    "safetensors",
    "sentencepiece",
    "tiktoken",
    "tokenizers",
    "torch",
    "transformers",
)
# What writes the bill of materials and the provenance.
PACKAGE_LIBRARIES = ("cyclonedx-python-lib", "in-toto-attestation", "packageurl-python", "protobuf", "py-serializable")
# Modules of ours that shape no byte of a release: they talk to the user, or come before or after the build.
TALK = (
    "__main__.py",
    "bench.py",
    "cli/",
    "diff.py",
    "diff_text.py",
    "graphs.py",
    "init.py",
    "lock.py",
    "progress.py",
    "rebuild.py",
    "registries/",
    "signing.py",
    "stages/publish.py",
)
# How a step's inputs name the hash of a backend's module.
CODE_OF = "code of "
# Files of a checkpoint that travel with a release but that no computation reads.
DOCUMENTS = (".md", "LICENSE", "NOTICE")


@dataclass(frozen=True)
class Texts:
    """The lines of a data file, parsed for the task. `name` is what the manifest calls it, `sha256` the file's (hex), and
    `files` those of the images or sounds that its lines name, by their paths relative to it."""

    name: str
    sha256: str
    lines: tuple[tuple[str, ...], ...]
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The steps of one model, in the order in which they can run. `exports` holds each target's, and those of targets
    that others are made from; `validates` those of the targets that were asked for."""

    spec: ModelSpec
    task: str
    snapshot: Snapshot
    texts: Texts
    load: Step
    exports: Mapping[Target, Step]
    validates: Mapping[Target, Step]
    package: Step

    @property
    def steps(self) -> Iterator[Step]:
        yield self.load
        for target, step in self.exports.items():
            yield step
            if target in self.validates:
                yield self.validates[target]
        yield self.package

    @property
    def libraries(self) -> dict[str, str]:
        """The version of every distribution that shapes the release."""
        formats = {name for target in self.exports for name in BACKENDS[target.format].LIBRARIES}
        names = {*_load_libraries(self.task), *PACKAGE_LIBRARIES, *formats}
        return {name: version(name) for name in sorted(names)}

    @property
    def code(self) -> dict[str, str]:
        """The hashes (sha256, hex) of our own code that shapes the release: of the stages, and of each backend."""
        backends = {target.format: step.inputs[f"{CODE_OF}{target.format}"] for target, step in self.exports.items()}
        return {"stages": self.load.inputs["code"], **backends}

    @property
    def entry(self) -> dict[str, Any]:
        """The model's entry of pipeline.yaml with what was inferred filled in, to build it again from. What shapes no byte
        is left out, and so are the permissions (`allow_pickle`, `trust_remote_code`), which are for each user to give."""
        spec = self.spec
        named = spec.data.validation
        entry: dict[str, Any] = {
            "name": spec.name,
            "release": spec.release,
            "source": self.snapshot.uri,
            "task": self.task,
            "shapes": spec.shapes.model_dump(mode="json", exclude_none=True),
            "targets": spec.targets.model_dump(mode="json", exclude_none=True),
            "budget": {
                precision: spec.budget.limits(precision).model_dump(mode="json", exclude_none=True)
                for precision in sorted({target.precision for target in self.validates})
            },
        }
        if spec.sentence_embedding:
            entry["sentence_embedding"] = True
        if named is not None:
            entry["data"] = {"validation": {"path": _portable(named.path)}}
        return entry

    def source_of(self, target: Target) -> Target | None:
        """The target from whose files this one is made."""
        precision = BACKENDS[target.format].PRECISIONS[target.precision]
        return None if precision is None else Target(target.format, precision, target.opset)


def make_plan(spec: ModelSpec, snapshot: Snapshot, folder: Path) -> Plan:
    """Work out every step of a model. `folder` is what data paths are relative to.

    Raises:
        ConfigError: the data cannot be read or does not fit the task.
        SourceError: the task cannot be inferred.
    """
    task: str = spec.task or infer_task(snapshot)
    MODALITIES[TASKS[task].modality].check(snapshot, task)
    if spec.sentence_embedding and task != "feature-extraction":
        raise ConfigError(
            f"{spec}: sentence_embedding: is an output of feature-extraction, and the task is {task}; leave it out"
        )
    texts = read_texts(spec, task, folder)
    checkpoint = {f"source {file.path}": file.sha256 for file in snapshot.files if not file.path.endswith(DOCUMENTS)}
    common = {"task": task, "trust_remote_code": str(spec.trust_remote_code), **checkpoint}
    if spec.sentence_embedding:
        common["sentence_embedding"] = str(True)

    def step(stage: str, target: str, inputs: Mapping[str, str], libraries: Iterable[str], backend: str = "") -> Step:
        used = {name: version(name) for name in libraries} | {"code": _code()}
        if backend:
            used[f"{CODE_OF}{backend}"] = file_sha256(PACKAGE / "backends" / f"{backend}.py")
        return Step(str(spec), stage, target, dict(sorted({**inputs, **used}.items())))

    load = step(
        "load",
        "",
        common
        | {
            "data": texts.sha256,
            **{f"data {name}": sha256 for name, sha256 in texts.files.items()},
            "batch": " ".join(map(str, spec.shapes.batch)),
            "sequence": " ".join(map(str, spec.shapes.sequence or ())) or "default",
            "threads": str(LOAD_THREADS),
            "cpu": cpu.features(),
        },
        _load_libraries(task),
    )
    exports: dict[Target, Step] = {}

    def add(target: Target) -> Step:
        if target not in exports:
            backend = BACKENDS[target.format]
            precision = backend.PRECISIONS[target.precision]
            inputs = {"precision": target.precision, "opset": str(target.opset or "default")}
            if precision is None:
                inputs |= common
            else:
                source = Target(target.format, precision, target.opset)
                inputs[f"step export {source}"] = add(source).key
            libraries = {*backend.LIBRARIES, *(() if precision else _load_libraries(task))}
            exports[target] = step("export", str(target), inputs, libraries, target.format)
        return exports[target]

    validates = {}
    for target in spec.targets.list():
        made = add(target)
        backend = BACKENDS[target.format]
        inputs = {
            "cpu": cpu.features(),
            "runtime": " ".join(f"{key}={value}" for key, value in sorted(backend.runtime(target.precision).items())),
            "step load": load.key,
            f"step export {target}": made.key,
            "threads": str(THREADS),
        }
        validates[target] = step("validate", str(target), inputs, backend.LIBRARIES, target.format)

    limits = {
        f"limits {precision}": " ".join(
            f"{name}={value}" for name, value in spec.budget.limits(precision).model_dump(exclude_none=True).items()
        )
        for precision in sorted({target.precision for target in validates})
    }
    package = step(
        "package",
        "",
        {
            **limits,
            **{f"source {file.path}": file.sha256 for file in snapshot.files},
            **{f"step {made.id}": made.key for made in (load, *exports.values(), *validates.values())},
            "compiler": compiler.__version__,
            "data file": "built-in" if spec.data.validation is None else _portable(spec.data.validation.path),
            "name": spec.name,
            "python": platform.python_version(),
            "release": spec.release,
            "source": snapshot.uri,
            "targets": ", ".join(map(str, validates)),
        },
        PACKAGE_LIBRARIES,
    )
    return Plan(spec, task, snapshot, texts, load, exports, validates, package)


def _load_libraries(task: str) -> tuple[str, ...]:
    return (*LOAD_LIBRARIES, *MODALITIES[TASKS[task].modality].LIBRARIES)


def read_texts(spec: ModelSpec, task: str, folder: Path) -> Texts:
    """The validation text, images or sound of a model, or the compiler's own."""
    named = spec.data.validation
    entry = TASKS[task]
    own = BUILTIN.get(task) or BUILTIN.get(entry.modality) or BUILTIN_TEXT
    path = own if named is None else folder / named.path
    name = "built-in" if named is None else Path(named.path).name
    try:
        read = path.read_bytes()
        content = read.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"data.validation: {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"data.validation: {path}: not UTF-8 text") from error
    lines = tuple(
        parse_line(line, task, f"{path}:{number}") for number, line in enumerate(content.split("\n"), start=1) if line.strip()
    )
    if not lines:
        raise ConfigError(f"data.validation: {path}: holds no line; give one JSON object a line")
    sha256 = hashlib.sha256(read).hexdigest()
    if entry.fields[0] in FILES:
        found: dict[str, list[str]] = {}
        for line in lines:
            found.setdefault(_portable(line[0]), []).append(_content(path.parent / line[0], entry.fields[0]))
        # Of absolute paths only the name is kept, which several may have.
        files = {name: hashes[0] if len({*hashes}) == 1 else digest(hashes) for name, hashes in found.items()}
        return Texts(name, sha256, tuple((str(path.parent / line[0]), *line[1:]) for line in lines), files)
    if len({len(line) for line in lines}) > 1:
        if task == "multiple-choice":
            raise ConfigError(
                f"data.validation: {path}: the lines have different numbers of choices; give all of them as many"
            )
        raise ConfigError(f"data.validation: {path}: some lines have a text_pair and some have none; give all of them one")
    return Texts(name, sha256, lines)


def _content(path: Path, kind: str) -> str:
    """The hash of a file that a line of data names. Raises ConfigError when it is not there."""
    try:
        return file_sha256(path)
    except (OSError, ValueError) as error:  # a path may hold a null
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"data.validation: {path}: cannot be read ({reason}); {kind} is a path relative to the data file"
        ) from error


def _portable(path: str) -> str:
    """A data file's path as it was written; of an absolute one the name: a release does not tell where it was made."""
    return Path(path).name if Path(path).is_absolute() else path


@functools.cache
def version(distribution: str) -> str:
    """The version of an installed distribution.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"{distribution}: not installed here; install the package with its pinned versions") from None


@functools.cache
def _code() -> str:
    """The hash of our own modules that shape a release, but for the backends: a version that raises itself."""
    modules = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
    shaping = [name for name in modules if not name.startswith((*TALK, "backends/"))]
    return digest([[file.path, file.sha256] for file in hash_files(PACKAGE, shaping)])


def why(step: Step, previous: Mapping[str, str] | None, store: Store) -> str | None:
    """Why a step would run; None where the cache has it. `previous` are its inputs when it last ran."""
    if store.has(step):
        return None
    if previous is None:
        return "never built here"
    changed = differences(previous, step.inputs)
    if not changed:
        return "its result is no longer in the cache"
    # A step that follows another names what changed there, not the other's key.
    plain = [text for text in changed if not text.startswith("step ")]
    changed = plain or [f"{text.rsplit(' ', 3)[0].removeprefix('step ')} changed" for text in changed]
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return ", ".join(changed[:3]) + more

"""What a build would do: every step with all that shapes its result, and why it would run. Imports no torch."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import platform
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import compiler
from compiler import cpu
from compiler.backends import BACKENDS
from compiler.config import CalibrationFile, ModelSpec
from compiler.errors import ConfigError
from compiler.hashing import digest, file_sha256, hash_files
from compiler.manifest import differences
from compiler.modalities import MODALITIES
from compiler.samples import MAX_ACCURACY_LINES
from compiler.sources import infer_task
from compiler.store import Step, Store
from compiler.tasks import EXPECTED, FILES, TASKS, Words, parse_line, parse_pair, read_label
from compiler.types import HELD, LEAST_TEXTS, Precision, Snapshot, Target
from compiler.workers import LOAD_THREADS, THREADS

PACKAGE = Path(__file__).parent
# How much of a text an error shows.
SHOWN = 60
# Text of the compiler's own, for a model whose user names none, and what it is called.
BUILTIN_NAME = "built-in"
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
    """The lines of a data file, parsed for the task. `name` is what the manifest calls it, `sha256` the file's (hex), `files`
    those of the images or sounds that its lines name, by their paths relative to it; `labels` are, where all lines have one,
    the place of each line, as errors name it, and its label. `numbers` say where in the file each of `lines` stands."""

    name: str
    sha256: str
    lines: tuple[tuple[str, ...], ...]
    files: Mapping[str, str] = field(default_factory=dict)
    labels: tuple[tuple[str, Any], ...] | None = None
    numbers: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """The file's lines; of a pair of texts that has a score, both are among `lines`."""
        return len(self.lines) if self.labels is None else len(self.labels)

    def answered(self, most: int) -> int:
        """Of how many lines all texts are among the first `most`."""
        return min(len(self.lines), most) * self.rows // len(self.lines)


@dataclass(frozen=True)
class Calibration:
    """Text that int8 is calibrated on. `samples` are what statistics are taken from, `held` what layers are judged on: others,
    where `apart` says so."""

    name: str
    sha256: str
    samples: tuple[tuple[str, ...], ...]
    held: tuple[tuple[str, ...], ...]
    apart: bool = True


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
    calibration: Calibration | None = None
    calibrate: Step | None = None

    @property
    def steps(self) -> Iterator[Step]:
        yield self.load
        if self.calibrate is not None:
            yield self.calibrate
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
        if self.calibrate is not None and (calibration := spec.data.calibration) is not None:
            described = calibration.model_dump(mode="json") | {"path": _portable(calibration.path)}
            entry["data"] = {**entry.get("data", {}), "calibration": described}
            entry["quantize"] = spec.quantize.model_dump(mode="json")
        return entry

    def source_of(self, target: Target) -> Target | None:
        """The target from whose files this one is made."""
        return _source_of(self.spec, target)

    def base_of(self, target: Target) -> Target:
        """The target that an int8 one's other layers come from."""
        return _base_of(self.spec, target)

    def expects(self, target: Target) -> Mapping[str, int]:
        """How often each fusion must fire in a target's file. None in an int8 one: a layer in int8 has other operators, and
        the file that it is made of is held to them."""
        return {} if target.precision == "int8" else getattr(self.spec.optimize.expect, target.format)

    def rest_of(self, target: Target) -> Precision:
        """The precision of what is not int8 in an int8 target; of another, its own."""
        return rest_of(self.spec, target)

    @property
    def bits(self) -> int:
        """Of int8's weights: 7 for CPUs on which the 16-bit sums of products saturate."""
        return bits(self.spec)


def bits(spec: ModelSpec) -> int:
    """See `Plan.bits`."""
    wide = cpu.has(cpu.WIDE_SUMS) if spec.quantize.cpu == "native" else spec.quantize.cpu == "avx512_vnni"
    return 8 if wide else 7


def rest_of(spec: ModelSpec, target: Target) -> Precision:
    """See `Plan.rest_of`. bf16 where the format has it and the CPU is fast at it."""
    if target.precision != "int8":
        return target.precision
    fast = spec.quantize.cpu == "native" and cpu.has(cpu.FAST_ON["bf16"])
    return "bf16" if fast and "bf16" in BACKENDS[target.format].PRECISIONS else "fp32"


def _source_of(spec: ModelSpec, target: Target) -> Target | None:
    if target.precision == "int8":
        return _base_of(spec, target)
    precision = BACKENDS[target.format].PRECISIONS[target.precision]
    return None if precision is None else Target(target.format, precision, target.opset)


def _base_of(spec: ModelSpec, target: Target) -> Target:
    rest = rest_of(spec, target)
    return Target(target.format, BACKENDS[target.format].PRECISIONS[rest] or rest, target.opset)


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
    with _named(spec):
        texts = read_texts(spec, task, folder)
    accurate = any(target.precision == "int8" for target in spec.targets.list())
    if accurate and TASKS[task].modality != "text":
        raise ConfigError(f"{spec}: int8 is made of models of text, and the task is {task}; leave int8 out of targets:")
    among = f" among the first {MAX_ACCURACY_LINES}" if len(texts.lines) > MAX_ACCURACY_LINES else ""
    if accurate and (count := len({_content(line) for line in texts.lines[:MAX_ACCURACY_LINES]})) < LEAST_TEXTS:
        raise ConfigError(
            f"{spec}: data.validation: {count} different texts are too few to judge int8 by; give at least {LEAST_TEXTS}"
            f"{among}"
        )
    if accurate and texts.rows < LEAST_TEXTS:  # pairs of texts
        raise ConfigError(
            f"{spec}: data.validation: {texts.rows} scores are too few to judge int8 by; give at least {LEAST_TEXTS}"
        )
    named = spec.data.calibration if accurate else None
    with _named(spec):
        calibration = None if named is None else read_calibration(named, task, folder, texts)
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
            **({"accuracy": "of answers"} if accurate else {}),
        },
        _load_libraries(task),
    )
    calibrate = None
    if calibration is not None and named is not None:
        measured = {
            "calibration": calibration.sha256,
            "samples": str(named.samples),
            "seed": str(named.seed),
            "bits": str(bits(spec)),
            "threads": str(LOAD_THREADS),
            "cpu": cpu.features(),
        }
        calibrate = step("calibrate", "", common | measured, LOAD_LIBRARIES)
    exports: dict[Target, Step] = {}

    def add(target: Target) -> Step:
        if target not in exports:
            backend = BACKENDS[target.format]
            source = _source_of(spec, target)
            inputs = {"precision": target.precision, "opset": str(target.opset or "default")}
            if source is None:
                inputs |= common
            else:
                inputs[f"step export {source}"] = add(source).key
            libraries = {*backend.LIBRARIES, *(() if source else _load_libraries(task))}
            stage = "export"
            if target.precision == "int8" and calibrate is not None:
                stage = "quantize"
                rest = Target(target.format, rest_of(spec, target), target.opset)
                inputs |= {f"step export {rest}": add(rest).key, "rest": rest.precision, "cpu": cpu.features()}
                inputs |= {"step load": load.key, "step calibrate": calibrate.key}
                out = spec.quantize.plan.get(target.format)
                inputs["plan"] = "searched" if out is None else ", ".join(out)
                if out is None:
                    inputs["limits int8"] = _limits(spec, "int8")
                inputs["fallback"] = str(spec.quantize.fallback)
            exports[target] = step(stage, str(target), inputs, libraries, target.format)
        return exports[target]

    validates = {}
    for target in spec.targets.list():
        made = add(target)
        backend = BACKENDS[target.format]
        inputs = {
            "cpu": cpu.features(),
            "runtime": " ".join(f"{key}={value}" for key, value in sorted(backend.runtime(rest_of(spec, target)).items())),
            "step load": load.key,
            f"step {made.id}": made.key,
            "threads": str(THREADS),
        }
        validates[target] = step("validate", str(target), inputs, backend.LIBRARIES, target.format)

    limits = {
        f"limits {precision}": _limits(spec, precision) for precision in sorted({target.precision for target in validates})
    }
    package = step(
        "package",
        "",
        {
            **limits,
            **{f"source {file.path}": file.sha256 for file in snapshot.files},
            **{f"step {made.id}": made.key for made in (load, *exports.values(), *validates.values())},
            **({} if named is None else {"calibration file": _portable(named.path), "quantize cpu": spec.quantize.cpu}),
            "compiler": compiler.__version__,
            "data file": BUILTIN_NAME if spec.data.validation is None else _portable(spec.data.validation.path),
            "name": spec.name,
            "python": platform.python_version(),
            "release": spec.release,
            "source": snapshot.uri,
            "targets": ", ".join(map(str, validates)),
        },
        PACKAGE_LIBRARIES,
    )
    return Plan(spec, task, snapshot, texts, load, exports, validates, package, calibration, calibrate)


def _limits(spec: ModelSpec, precision: Precision) -> str:
    return " ".join(f"{name}={limit}" for name, limit in spec.budget.limits(precision).model_dump(exclude_none=True).items())


def _load_libraries(task: str) -> tuple[str, ...]:
    return (*LOAD_LIBRARIES, *MODALITIES[TASKS[task].modality].LIBRARIES)


def check_cpu(spec: ModelSpec) -> None:
    """Raise ConfigError where int8 is to be made for a CPU that this one is not: its sums of products would saturate here."""
    int8 = any(target.precision == "int8" for target in spec.targets.list())
    if int8 and spec.quantize.cpu == "avx512_vnni" and not cpu.has(cpu.WIDE_SUMS):
        raise ConfigError(
            f"{spec}: quantize.cpu: avx512_vnni: this CPU has no {' or '.join(cpu.WIDE_SUMS[:3])}, so nothing for one can "
            "be checked here; build where there is one, or say avx2 for files that are right on both"
        )


@contextlib.contextmanager
def _named(spec: ModelSpec) -> Iterator[None]:
    """Put the model's name before what is wrong with its data."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{spec}: {error}") from error


def read_texts(spec: ModelSpec, task: str, folder: Path) -> Texts:
    """The validation text, images or sound of a model, or the compiler's own."""
    named = spec.data.validation
    entry = TASKS[task]
    own = BUILTIN.get(task) or BUILTIN.get(entry.modality) or BUILTIN_TEXT
    path = own if named is None else folder / named.path
    name = BUILTIN_NAME if named is None else Path(named.path).name
    # Only int8 is held to labels.
    labelled = task in EXPECTED and any(target.precision == "int8" for target in spec.targets.list())
    return _read_lines("data.validation", path, name, task, labelled=labelled)


def _read_lines(key: str, path: Path, name: str, task: str, *, labelled: bool) -> Texts:
    where = f"{key}: {path}"
    try:
        read = path.read_bytes()
        content = read.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        row = read.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{where}:{row}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    numbered = [(number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
    lines = tuple(parse_line(line, task, f"{where}:{number}") for number, line in numbered)
    numbers = tuple(number for number, _ in numbered)
    if not lines:
        raise ConfigError(f"{where}: holds no line; give one JSON object a line")
    sha256 = hashlib.sha256(read).hexdigest()
    found = [(f"{where}:{number}", read_label(line, task)) for number, line in numbered] if labelled else []
    labels = tuple((place, label) for place, label in found if label is not None)
    if labels and len(labels) < len(lines):
        bare = next(place for place, label in found if label is None)
        raise ConfigError(f"{bare}: has no {EXPECTED[task]} and other lines have; give all of them one, or none")
    if labels and task == "feature-extraction":  # a score is of two texts, and both are validation text
        lines = tuple((text,) for number, line in numbered for text in parse_pair(line, f"{where}:{number}"))
        numbers = tuple(number for number, _ in numbered for _ in range(2))
    if (kind := TASKS[task].fields[0]) in FILES:
        hashed: dict[str, list[str]] = {}
        for line in lines:
            hashed.setdefault(_portable(line[0]), []).append(_hash(path.parent / line[0], kind))
        # Of absolute paths only the name is kept, which several may have.
        files = {name: hashes[0] if len({*hashes}) == 1 else digest(hashes) for name, hashes in hashed.items()}
        return Texts(name, sha256, tuple((str(path.parent / line[0]), *line[1:]) for line in lines), files)
    if len({isinstance(line[0], Words) for line in lines}) > 1:
        raise ConfigError(f"{where}: some lines have tokens and some a text; give all of them one")
    if len({len(line) for line in lines}) > 1:
        if task == "multiple-choice":
            raise ConfigError(f"{where}: the lines have different numbers of choices; give all of them as many")
        raise ConfigError(f"{where}: some lines have a text_pair and some have none; give all of them one")
    return Texts(name, sha256, lines, labels=labels or None, numbers=numbers)


def read_calibration(named: CalibrationFile, task: str, folder: Path, validation: Texts) -> Calibration:
    """The calibration text of a model, in an order drawn by its seed.

    Raises:
        ConfigError: it cannot be read, has fewer texts than asked for, or has one that validation has too.
    """
    path = folder / named.path
    texts = _read_lines("data.calibration", path, Path(named.path).name, task, labelled=False)
    judged = zip(validation.lines, validation.numbers, strict=True)
    known = {_content(line): number for line, number in reversed([*judged])}
    distinct = {_content(line): line for line in reversed(texts.lines)}
    if both := sum(content in known for content in distinct):
        first, number = next(found for found in zip(texts.lines, texts.numbers, strict=True) if _content(found[0]) in known)
        shown = first[0] if len(first[0]) <= SHOWN else f"{first[0][:SHOWN]}…"
        own = validation.name == BUILTIN_NAME
        there = f"line {known[_content(first)]} of {'the text of the compiler itself' if own else 'data.validation'}"
        out = "out, or give data.validation text of your own" if own else "out of one of the two"
        more = {1: "", 2: ", and so is 1 more text"}.get(both, f", and so are {both - 1} more texts")
        raise ConfigError(
            f"data.calibration: {path}:{number}: is validation text too ({shown!r}, {there}){more}; a check on text that "
            f"shaped the model says nothing: take {'it' if both == 1 else 'them'} {out}"
        )
    lines = sorted(distinct.values(), key=lambda line: hashlib.sha256(f"{named.seed} {_content(line)}".encode()).digest())
    if len(lines) < named.samples:
        asks = "samples: asks" if "samples" in named.model_fields_set else "the default of samples: asks"
        less = f", or give samples: {len(lines)}" if len(lines) >= LEAST_TEXTS else f", and samples: {LEAST_TEXTS} or more"
        raise ConfigError(
            f"data.calibration: {path}: holds {len(lines)} different texts and {asks} for {named.samples}; give more "
            f"text{less}"
        )
    held = lines[named.samples :][:HELD]
    apart = len(held) == HELD
    samples = tuple(lines[: named.samples])
    return Calibration(texts.name, texts.sha256, samples, tuple(held) if apart else samples[:HELD], apart)


def _content(line: tuple[str, ...]) -> str:
    """What makes two texts the same one: all but white space, case, and how Unicode writes a character."""
    return "\n".join(" ".join(unicodedata.normalize("NFKC", part).split()).casefold() for part in line)


def _hash(path: Path, kind: str) -> str:
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

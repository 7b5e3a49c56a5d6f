"""pipeline.yaml as frozen values. Unknown keys are errors, with the line and the nearest valid key. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from compiler.backends import BACKENDS
from compiler.errors import ConfigError, RegistryError, meant
from compiler.tasks import TaskName
from compiler.types import Precision, Target

# The official expression of semver.org 2.0.0, without build metadata: a `+` has no place in a folder that is a version.
_PART = "(0|[1-9][0-9]*|[0-9]*[a-zA-Z-][0-9a-zA-Z-]*)"
SEMVER = rf"(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)(-{_PART}(\.{_PART})*)?"
REVISION = r"[A-Za-z0-9][A-Za-z0-9._/-]*"
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
# A YAML file of pipelines has tens of nodes a model; a file of aliases can claim billions.
MAX_NODES = 100_000
MAX_DEPTH = 50
# The oldest and the newest operator set that torch's exporter writes.
MIN_OPSET, MAX_OPSET = 18, 23


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Data(Strict):
    """Real text, as JSON lines with the task's own fields. Paths are relative to pipeline.yaml."""

    validation: DataFile | None = Field(
        None, description="Text for the numerics gate; a text of the compiler's own otherwise."
    )
    calibration: CalibrationFile | None = Field(
        None, description="Text that int8 is calibrated on; none of it may be validation text."
    )


class DataFile(Strict):
    path: str


class CalibrationFile(DataFile):
    samples: int = Field(
        256, ge=16, le=65_536, description="Texts that statistics are taken from; the rest of the file judges layers."
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Of the order in which the texts are drawn.")


class Shapes(Strict):
    """The batch sizes and sequence lengths (tokens) that the numerics gate covers."""

    batch: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field((1, 8), min_length=1)
    sequence: tuple[Annotated[int, Field(ge=4, le=1_048_576)], ...] | None = Field(
        None, min_length=1, description="16 and 128, or what the model's positions allow, when left out."
    )


class Limits(Strict):
    """The largest allowed departure from the fp32 original. A limit that is left out keeps its strict default."""

    max_abs: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Times the output's own scale: max(1, its largest magnitude)."
    )
    cosine: float | None = Field(None, ge=-1, le=1, description="Smallest cosine of a row: a token's or a text's vector.")
    argmax: float | None = Field(None, ge=0, le=1, description="Share of rows of logits whose argmax is unchanged.")
    neighbours: float | None = Field(None, ge=0, le=1, description="Share of texts whose nearest other text is unchanged.")
    rank: float | None = Field(None, ge=-1, le=1, description="Spearman's correlation of all pairs' similarities.")
    kl: float | None = Field(None, gt=0, allow_inf_nan=False, description="Mean KL divergence of labels' probabilities, nats.")
    spans: float | None = Field(None, ge=0, le=1, description="Share of answers with the same start and end.")
    drop: float | None = Field(
        None, ge=0, le=1, description="How far the accuracy on labelled text may fall; 0.01 is a point."
    )
    noise: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="int8: mean squared departure of an output, in units of its variance."
    )

    def over(self, other: Limits) -> Limits:
        return other.model_copy(update=self.model_dump(exclude_none=True))


# fp32: rounding alone separates two correct runtimes, some 1e-6 of an output's scale through a dozen layers.
# bf16: 8 bits of mantissa; correct artifacts of real encoders stay above cosine 0.9999.
DEFAULT_LIMITS: Mapping[str, Limits] = {
    "fp32": Limits(max_abs=1e-4, cosine=0.999999),
    "bf16": Limits(cosine=0.999, argmax=0.98),
    # int8: of a text's embedding, not of a token; and answers that do not change.
    # Its noise tells whether all shapes and kinds of padding are answered at all; right artifacts stay far below.
    "int8": Limits(cosine=0.98, neighbours=0.95, rank=0.95, argmax=0.95, spans=0.95, drop=0.01, noise=0.5),
}


class Budget(Strict):
    """Limits by precision."""

    fp32: Limits = Limits()
    bf16: Limits = Limits()
    int8: Limits = Limits()

    def limits(self, precision: str) -> Limits:
        own: Limits = getattr(self, precision)
        return own.over(DEFAULT_LIMITS[precision])

    def asked(self, precision: str) -> dict[str, float]:
        """The limits that are given."""
        own: Limits = getattr(self, precision)
        return own.model_dump(exclude_none=True)

    def departing(self) -> Budget:
        """Without the limits that are the defaults: a manifest's entry, which a release is built again from, has all."""
        parts = {}
        for precision, default in DEFAULT_LIMITS.items():
            usual = default.model_dump()
            parts[precision] = Limits(**{name: one for name, one in self.asked(precision).items() if one != usual[name]})
        return Budget(**parts)


Precisions = Annotated[tuple[Precision, ...], Field(min_length=1)]


class FormatTargets(Strict):
    precisions: Precisions


class OnnxTargets(FormatTargets):
    opset: int | None = Field(
        None, ge=MIN_OPSET, le=MAX_OPSET, description="ONNX operator set; the exporter's own when left out."
    )


def _short_form(value: Any) -> Any:
    """`onnx: [fp32]` is short for `onnx: {precisions: [fp32]}`."""
    return {"precisions": value} if isinstance(value, (list, tuple)) else value


class Targets(Strict):
    torchscript: Annotated[FormatTargets, BeforeValidator(_short_form, FormatTargets | Precisions)] | None = None
    onnx: Annotated[OnnxTargets, BeforeValidator(_short_form, OnnxTargets | Precisions)] | None = None
    openvino: Annotated[FormatTargets, BeforeValidator(_short_form, FormatTargets | Precisions)] | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        formats = {name: entry for name in BACKENDS if (entry := getattr(self, name)) is not None}
        if not formats:
            raise ValueError(f"name at least one format: {', '.join(BACKENDS)}")
        for name, entry in formats.items():
            for precision in entry.precisions:
                if precision not in BACKENDS[name].PRECISIONS:
                    possible = ", ".join(BACKENDS[name].PRECISIONS)
                    raise ValueError(f"{name} has no {precision} here; it has {possible}")
            if len(set(entry.precisions)) != len(entry.precisions):
                raise ValueError(f"{name} names a precision twice")
        return self

    def list(self) -> tuple[Target, ...]:
        return tuple(
            Target(name, precision, getattr(entry, "opset", None))
            for name in BACKENDS
            if (entry := getattr(self, name)) is not None
            for precision in entry.precisions
        )


Counts = dict[Annotated[str, Field(min_length=1)], Annotated[int, Field(ge=1, strict=True)]]


class Expect(Strict):
    """By format, how often a fusion must at least have fired in each of its artifacts; `compile inspect` shows the counts."""

    torchscript: Counts = Field(default_factory=dict)
    onnx: Counts = Field(default_factory=dict)
    openvino: Counts = Field(default_factory=dict)


class Optimize(Strict):
    expect: Expect = Expect()


CPU = Literal["native", "avx2", "avx512", "avx512_vnni"]


class Quantize(Strict):
    """How int8 is made. `plan` names, by format, the layers that stay out of it, as a manifest's `kept` does: then nothing is
    searched."""

    cpu: CPU = Field("native", description="What int8 must be right on: avx2 and avx512 have no VNNI and take 7-bit weights.")
    fallback: bool = Field(False, description="Leave an int8 target out, instead of failing, when it is not faster.")
    plan: dict[str, tuple[str, ...]] = Field(default_factory=dict, description="By format, the layers that stay out of int8.")

    @field_validator("plan", mode="before")
    @classmethod
    def _with_reasons(cls, value: Any) -> Any:
        """A manifest's `kept` says why each is out; here the names count."""
        if not isinstance(value, Mapping):
            return value
        return {format: list(names) if isinstance(names, Mapping) else names for format, names in value.items()}

    @field_validator("plan")
    @classmethod
    def _formats(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name in value:
            if name not in BACKENDS:
                raise ValueError(f"{name} is no format; there are {', '.join(BACKENDS)}")
        return value


class Destination(Strict):
    """A registry to publish to, and the aliases that move to the release there."""

    url: str = Field(
        description="The place of this model alone: file:///FOLDER, s3://BUCKET/PATH, oci://, mlflow:// or hf://ORG/NAME."
    )
    aliases: tuple[str, ...] = Field((), description="Names that move to the release, such as latest.")

    @model_validator(mode="after")
    def _sound(self) -> Self:
        from compiler import registries  # which reads what a version is from here

        try:
            registries.check_place(self.url)
            for name in self.aliases:
                registries.check_alias(name)
        except RegistryError as error:
            raise ValueError(str(error)) from error
        return self


def _bare_url(value: Any) -> Any:
    """`file:///models/m` is short for `{url: file:///models/m}`."""
    return {"url": value} if isinstance(value, str) else value


class ModelSpec(Strict):
    """One model: where it comes from, what to make of it, and how close it must stay."""

    name: str = Field(pattern=f"^{NAME}$", max_length=128, description="The release's folder: letters, digits, . _ -")
    release: str = Field(pattern=f"^{SEMVER}$", max_length=64, description="A semantic version; never overwritten.")
    source: str = Field(
        pattern=r"^(path|package|hf):[^\x00-\x1f\x7f]+$",
        description="path:FOLDER, package:PACKAGE/FOLDER or hf:ORG/NAME@REVISION.",
    )
    revision: str | None = Field(
        None, pattern=f"^{REVISION}$", description="The hub's commit, tag or branch, when source does not carry it."
    )
    sha256: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] = Field(
        default_factory=dict, description="Pins: file of the checkpoint → its sha256."
    )
    task: TaskName | None = Field(None, description="Inferred from the checkpoint's config when left out.")
    sentence_embedding: bool = Field(
        False,
        description="Put the pooling and normalization that modules.json names into the graph, as output sentence_embedding.",
    )
    allow_pickle: bool = Field(False, description="Open pytorch_model.bin (weights only) where there is no safetensors.")
    trust_remote_code: bool = Field(False, description="Run the Python code that the checkpoint carries.")
    data: Data = Data()
    shapes: Shapes = Shapes()
    targets: Targets
    optimize: Optimize = Optimize()
    quantize: Quantize = Quantize()
    budget: Budget = Budget()
    publish: tuple[Annotated[Destination, BeforeValidator(_bare_url, Destination | str)], ...] = Field(
        (), description="Registries that get the release once every model of the pipeline has passed its gate."
    )

    @field_validator("source")
    @classmethod
    def _no_empty_revision(cls, value: str) -> str:
        if value.startswith("hf:") and not re.fullmatch(rf"hf:({NAME}/)?{NAME}(@[A-Za-z0-9._/-]+)?", value):
            raise ValueError("a hub's source is hf:ORG/NAME@REVISION")
        return value

    @model_validator(mode="after")
    def _one_revision(self) -> Self:
        if self.revision is not None and (not self.source.startswith("hf:") or "@" in self.source):
            raise ValueError("revision: is for an hf: source that does not carry one after @")
        return self

    @model_validator(mode="after")
    def _calibrates(self) -> Self:
        wanted = [target.format for target in self.targets.list() if target.precision == "int8"]
        if wanted and self.data.calibration is None:
            raise ValueError(
                f"targets: {wanted[0]} int8 needs text to calibrate on: give data.calibration a file of JSON lines, some "
                "hundred texts such as the model will see, none of them validation text"
            )
        for name in self.quantize.plan:
            if name not in wanted:
                raise ValueError(f"quantize.plan.{name}: targets has no int8 of it; leave one out or add the other")
        return self

    @model_validator(mode="after")
    def _expects_what_is_made(self) -> Self:
        for name in BACKENDS:
            if getattr(self.optimize.expect, name) and getattr(self.targets, name) is None:
                raise ValueError(f"optimize.expect.{name}: targets has no {name}; leave one out or add the other")
        return self

    def __str__(self) -> str:
        return f"{self.name} {self.release}"


class Pipeline(Strict):
    """pipeline.yaml"""

    schema_version: Literal[1] = Field(alias="schema", description="The version of this file's format.")
    output: str = Field("artifacts", min_length=1, description="Where releases go, relative to pipeline.yaml.")
    models: tuple[ModelSpec, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [str(model) for model in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two models are called {name}; give one another name or release")
        return self

    @model_validator(mode="after")
    def _a_place_is_of_one_model(self) -> Self:
        from compiler import registries

        owners: dict[str, str] = {}
        for model in self.models:
            for destination in model.publish:
                owner = owners.setdefault(registries.normal(destination.url), model.name)
                if owner != model.name:
                    raise ValueError(f"{owner} and {model.name} publish to {destination.url}; give each a place of its own")
        return self


Data.model_rebuild()


def schema() -> dict[str, Any]:
    """The JSON schema of pipeline.yaml, for editors that complete and check YAML."""
    return Pipeline.model_json_schema(by_alias=True)


def read(path: Path) -> Pipeline:
    """Read and check a pipeline.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or is not a pipeline; with its line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `compile init CHECKPOINT` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read ({reason})") from error
    return parse(text, str(path))


def parse(text: str, where: str) -> Pipeline:
    """Check the text of a pipeline; `where` names it in errors. Raises ConfigError as `read` does."""
    document, root = _load_yaml(text, where)
    if not isinstance(document, dict):
        raise ConfigError(f"{where}:1: not a pipeline: expected keys such as schema: and models:")
    try:
        return Pipeline.model_validate(document)
    except ValidationError as error:
        # A misspelt key is also a missing one; the spelling is what to mend.
        found = error.errors()
        # A list of which an item is wrong is reported as too short too.
        inner = {detail["loc"][:depth] for detail in found for depth in range(len(detail["loc"]))}
        found = [detail for detail in found if detail["type"] != "too_short" or detail["loc"] not in inner]
        details = sorted(found, key=lambda detail: detail["type"] != "extra_forbidden")
        problems = [_problem(detail, root, where) for detail in details]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(problems[0] + more) from error


def _load_yaml(text: str, where: str) -> tuple[Any, yaml.Node | None]:
    """The document, and its node tree for line numbers. Plain YAML only: no tags that build objects."""
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            raise ConfigError(f"{where}: empty; `compile init CHECKPOINT` writes a pipeline")
        for count, (node, ancestors) in enumerate(_walk(root, ())):
            if len(ancestors) > MAX_DEPTH:
                raise ConfigError(f"{where}:{node.start_mark.line + 1}: nests too deeply; a pipeline has six levels")
            if id(node) in ancestors or count > MAX_NODES:
                raise ConfigError(f"{where}:{node.start_mark.line + 1}: aliases nest too deeply; write the values out")
            _check_keys(node, where)
        return loader.construct_document(root), root
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or getattr(error, "reason", None) or error).split())
        raise ConfigError(f"{where}{line}: not valid YAML: {problem}") from error
    except (ValueError, TypeError, OverflowError, RecursionError, AttributeError, LookupError) as error:
        # PyYAML's own scalar constructors raise these on, for instance, the date 2026-99-99.
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error


def _walk(node: yaml.Node, ancestors: tuple[int, ...]) -> Iterator[tuple[yaml.Node, tuple[int, ...]]]:
    yield node, ancestors
    if len(ancestors) > MAX_DEPTH or id(node) in ancestors:
        return
    inner = (*ancestors, id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _walk(key, inner)
            yield from _walk(value, inner)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _walk(item, inner)


def _check_keys(node: yaml.Node, where: str) -> None:
    """YAML lets the last of two equal keys win in silence."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{where}:{line}: a key must be a plain word")
            if key.value in seen and key.value != "<<":
                raise ConfigError(f"{where}:{line}: key {key.value!r} is given twice; keep one")
            seen.add(key.value)


def _problem(detail: Any, root: yaml.Node | None, where: str) -> str:
    """One of pydantic's errors as `file:line: key: what, and what to do`."""
    location = list(detail["loc"])
    line = _find(root, location)
    path = ".".join(str(part) for part in location) or "pipeline"
    kind, message = detail["type"], detail["msg"]
    if kind == "extra_forbidden":
        valid = _valid_keys(location[:-1])
        hint = meant(str(location[-1]), valid, f"valid here: {', '.join(valid)}")
        message = f"unknown key; {hint}"
    elif kind == "missing":
        message = "this key is missing; add it"
    elif kind == "string_pattern_mismatch":
        message = f"{detail['input']!r} is not valid here: {_pattern(location) or message}"
    elif kind == "literal_error":
        expected = [word.strip("' ") for word in re.split(r",| or ", detail["ctx"]["expected"])]
        hint = meant(str(detail["input"]), expected, f"one of {', '.join(expected)}")
        message = f"unknown value {detail['input']!r}; {hint}"
    elif kind == "string_type":
        whole = ' in full, such as "1.0.0"' if location[-1] == "release" else ""
        message = f"expected a text, found {_shown(detail['input'])}; put it in quotes{whole}"
    elif kind == "too_short":
        message = "is empty; give at least one"
    elif kind in ("bool_parsing", "bool_type"):
        message = f"expected true or false, found {_shown(detail['input'])}"
    elif kind == "tuple_type":
        message = f"expected a list such as [a, b], found {_shown(detail['input'])}"
    elif kind in ("model_type", "dict_type"):
        valid = _valid_keys(location)
        form = "a list such as [fp32]" if "precisions" in valid else f"keys such as {valid[0]}:"
        message = f"expected {form}, found {_shown(detail['input'])}"
    elif kind == "value_error":
        message = message.removeprefix("Value error, ")
    else:
        message = f"{message[0].lower()}{message[1:]}, found {_shown(detail['input'])}"
    return " ".join(f"{where}:{line}: {path}: {message}".split())


_PATTERNS = {
    "name": "a name is letters, digits, '.', '_' and '-', no path",
    "release": "a release is a semantic version such as 1.0.0",
    "source": "a source is path:FOLDER, package:PACKAGE/FOLDER or hf:ORG/NAME@REVISION",
}


def _pattern(location: list[Any]) -> str | None:
    if "sha256" in location:
        return "a sha256 is 64 digits of 0-9 and a-f"
    return _PATTERNS.get(str(location[-1]))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _find(root: yaml.Node | None, location: list[Any]) -> int:
    """The line of the deepest node on the way to `location`; a key's own line for a wrong key."""
    node, line = root, (root.start_mark.line + 1 if root is not None else 1)
    for part in location:
        following: yaml.Node | None = None
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(part):
                    following, line = value, key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            following = node.value[part]
            line = following.start_mark.line + 1
        elif part == "precisions":
            continue  # the short form has no such key in the file
        if following is None:
            break
        node = following
    return line


def _valid_keys(location: list[Any]) -> list[str]:
    """The keys of the model at `location` in the pipeline."""
    model: Any = Pipeline
    for part in location:
        if isinstance(part, int) or not (isinstance(model, type) and issubclass(model, BaseModel)):
            continue
        for name, info in model.model_fields.items():
            if part in (name, info.alias):
                model = _model_in(info.annotation) or model
    return [info.alias or name for name, info in model.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for argument in get_args(annotation) if (found := _model_in(argument))), None)

"""pipeline.yaml: every guard is tripped once, names the place and the remedy in one line, and nothing but a ConfigError
ever comes out of any text."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compiler.backends import BACKENDS
from compiler.config import DEFAULT_LIMITS, ModelSpec, Pipeline, parse, read, schema
from compiler.errors import ConfigError
from compiler.tasks import TASKS
from compiler.types import Target
from tests.conftest import Command, error_line

ROOT = Path(__file__).parent.parent
SHA = "0" * 64
TEXT = f"""\
schema: 1
output: artifacts
models:
  - name: tiny
    release: 1.0.0
    source: path:checkpoint
    sha256:
      model.safetensors: {"a" * 64}
    task: feature-extraction
    data:
      validation: {{path: lines.jsonl}}
    shapes:
      batch: [1, 8]
      sequence: [16, 128]
    targets:
      torchscript: [fp32, bf16]
      onnx:
        precisions: [fp32]
        opset: 18
    budget:
      fp32:
        cosine: 0.9999
"""
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def refusal(text: str) -> str:
    """The one line that a text is refused with."""
    with pytest.raises(ConfigError) as caught:
        parse(text, "p.yaml")
    message = str(caught.value)
    assert message.strip() == message
    assert len(message.splitlines()) == 1, message
    assert message.startswith("p.yaml:"), message
    return message


def changed(old: str, new: str) -> str:
    """The valid pipeline with one piece of text replaced."""
    assert TEXT.count(old) == 1, old
    return TEXT.replace(old, new)


def model(**changes: Any) -> str:
    """A pipeline of one small model with some keys replaced or, by None, removed."""
    entry: dict[str, Any] = {"name": "tiny", "release": "1.0.0", "source": "path:x", "targets": {"onnx": ["fp32"]}, **changes}
    kept = {key: value for key, value in entry.items() if value is not None}
    return yaml.safe_dump({"schema": 1, "models": [kept]}, sort_keys=False)


def line_of(text: str, piece: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), start=1) if piece in line)


def only_model(text: str) -> ModelSpec:
    return parse(text, "p.yaml").models[0]


def test_valid_pipeline_is_read() -> None:
    spec = only_model(TEXT)
    assert (spec.name, spec.release, spec.task) == ("tiny", "1.0.0", "feature-extraction")
    assert spec.targets.list() == (Target("torchscript", "fp32"), Target("torchscript", "bf16"), Target("onnx", "fp32", 18))
    assert spec.data.validation is not None
    assert spec.data.validation.path == "lines.jsonl"
    assert str(spec) == "tiny 1.0.0"


def test_repository_pipeline_is_valid() -> None:
    assert read(ROOT / "pipeline.yaml").models


def test_pipeline_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        only_model(TEXT).name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("old", "new", "nearest"),
    [
        ("output: artifacts", "outputs: artifacts", "output"),
        ("models:", "model:", "models"),
        ("name: tiny", "nmae: tiny", "name"),
        ("release: 1.0.0", "relaese: 1.0.0", "release"),
        ("source: path:checkpoint", "sources: path:checkpoint", "source"),
        ("sha256:", "sha_256:", "sha256"),
        ("validation:", "validaton:", "validation"),
        ("{path: lines.jsonl}", "{pth: lines.jsonl}", "path"),
        ("batch: [1, 8]", "batches: [1, 8]", "batch"),
        ("torchscript: [fp32, bf16]", "torch-script: [fp32, bf16]", "torchscript"),
        ("opset: 18", "opsets: 18", "opset"),
        ("      fp32:\n", "      fp_32:\n", "fp32"),
        ("cosine: 0.9999", "cosin: 0.9999", "cosine"),
    ],
)
def test_misspelt_key_is_named_with_its_line_and_the_nearest_one(old: str, new: str, nearest: str) -> None:
    text = changed(old, new)
    key = new.strip().strip("{").partition(":")[0]
    message = refusal(text)
    assert message.startswith(f"p.yaml:{line_of(text, new.strip())}: ")
    assert f"{key}: unknown key; did you mean {nearest!r}?" in message


def test_key_like_no_other_lists_the_valid_ones() -> None:
    message = refusal(changed("      batch: [1, 8]", "      zzzzzz: [1, 8]"))
    assert message == "p.yaml:13: models.0.shapes.zzzzzz: unknown key; valid here: batch, sequence"


def test_line_of_the_second_model_is_its_own() -> None:
    text = TEXT + "  - name: other\n    release: 1.0.0\n    source: path:x\n    targets: {onnx: [fp32]}\n    tsak: fill-mask\n"
    assert refusal(text) == f"p.yaml:{len(text.splitlines())}: models.1.tsak: unknown key; did you mean 'task'?"


@pytest.mark.parametrize("key", ["function-x", "function-before", "1", "null", "2020-01-01", "1.5", '"\\ud800"', '""'])
def test_odd_key_is_an_unknown_key(key: str) -> None:
    refusal(f"{key}: 1\n{TEXT}")


def test_name_of_the_field_is_not_a_key() -> None:
    assert "'schema'" in refusal(changed("schema: 1", "schema_version: 1"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("schema: 1", "schema: 2"),
        ("schema: 1", "schema: one"),
        ("output: artifacts", "output: [artifacts]"),
        ("output: artifacts", "output: ''"),
        ("name: tiny", "name: 7"),
        ("release: 1.0.0", "release: 1.0"),
        ("source: path:checkpoint", "source: {path: checkpoint}"),
        ("task: feature-extraction", "task: [feature-extraction]"),
        ("batch: [1, 8]", "batch: 8"),
        ("batch: [1, 8]", "batch: []"),
        ("batch: [1, 8]", "batch: [0]"),
        ("batch: [1, 8]", "batch: [-1]"),
        ("batch: [1, 8]", "batch: [1.5]"),
        ("batch: [1, 8]", "batch: [many]"),
        ("batch: [1, 8]", "batch: [5000]"),
        ("sequence: [16, 128]", "sequence: [3]"),
        ("sequence: [16, 128]", "sequence: []"),
        ("torchscript: [fp32, bf16]", "torchscript: fp32"),
        ("torchscript: [fp32, bf16]", "torchscript: []"),
        ("torchscript: [fp32, bf16]", "torchscript: [{fp32: 1}]"),
        ("{path: lines.jsonl}", "lines.jsonl"),
        ("cosine: 0.9999", "cosine: high"),
    ],
)
def test_wrong_type_or_value_is_refused_on_its_line(old: str, new: str) -> None:
    text = changed(old, new)
    message = refusal(text)
    assert message.startswith(f"p.yaml:{line_of(text, new)}: ")
    assert new.partition(":")[0].strip() in message or "path" in new or "validation" in message


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("torchscript: [fp32, bf16]", "torchscript: fp32", "list"),
        ("batch: [1, 8]", "batch: 8", "list"),
        ("{path: lines.jsonl}", "lines.jsonl", "path"),
    ],
)
def test_wrong_type_is_told_in_words_of_yaml(old: str, new: str, word: str) -> None:
    message = refusal(changed(old, new))
    assert word in message
    assert not re.search(r"tuple|instance of|[A-Z]\w+Targets|DataFile", message), message


def test_version_that_yaml_reads_as_a_number_is_told_to_be_quoted() -> None:
    assert "put it in quotes" in refusal(changed("release: 1.0.0", "release: 1.0"))


@pytest.mark.parametrize("key", ["name", "release", "source", "targets"])
def test_missing_key_is_named(key: str) -> None:
    message = refusal(model(**{key: None}))
    assert f"models.0.{key}: this key is missing" in message
    assert message.startswith("p.yaml:3: ")


@pytest.mark.parametrize("key", ["schema", "models"])
def test_missing_key_at_the_top_is_named(key: str) -> None:
    document = yaml.safe_load(TEXT)
    del document[key]
    assert f"{key}: this key is missing" in refusal(yaml.safe_dump(document))


def test_more_problems_than_one_are_counted() -> None:
    assert refusal(model(release="x", source="y")).endswith("(and 1 more)")


@pytest.mark.parametrize("models", ["[]", "{}", "null", "[null]", "[3]", "text"])
def test_models_that_are_none(models: str) -> None:
    assert "models" in refusal(f"schema: 1\nmodels: {models}\n")


@pytest.mark.parametrize("text", ["", "\n\n", "# a comment\n", "---\n"])
def test_empty_file(text: str) -> None:
    assert "compile init" in refusal(text) or text == "---\n"


@pytest.mark.parametrize("text", ["3", "[]", "text", "- schema: 1", "null"])
def test_not_a_mapping(text: str) -> None:
    assert "not a pipeline" in refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "schema: [1",
        "schema: 1\n\tmodels: []",
        "a: b: c",
        "{",
        "%YAML 9",
        "schema: 1\n---\nschema: 1",
        "a: *nowhere",
        "\x00",
        '"\\xZZ"',
        "a: 2026-99-99",
        "a: !!int ''",
        "a: !!float ''",
        "a: !!bool perhaps",
        "a: !!timestamp yesterday",
        "a: !!binary é",
        "a: !!int one",
        "a: 1:99:z",
        "[" * 5000,
        "? [a]\n: b",
        "? {a: b}\n: c",
        "<<: 3",
        "=: 3",
    ],
)
def test_not_yaml(text: str) -> None:
    refusal(text)


def test_broken_yaml_is_told_with_its_line() -> None:
    assert refusal("schema: 1\nmodels: [\n").startswith("p.yaml:3: not valid YAML: ")


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system",
        "!!python/object/new:os.system",
        "!!python/object:builtins.dict",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/tuple",
        "!own",
    ],
)
def test_tags_build_nothing(tag: str, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    message = refusal(f"schema: 1\nmodels: {tag} ['touch {proof}']\n")
    assert message.startswith("p.yaml:2: not valid YAML: ")
    assert not proof.exists()


@pytest.mark.parametrize("key", ["schema: 1", "output: artifacts", "    release: 1.0.0", "      batch: [1, 8]"])
def test_key_given_twice(key: str) -> None:
    text = changed(f"{key}\n", f"{key}\n{key}\n")
    word = key.strip().partition(":")[0]
    assert refusal(text) == f"p.yaml:{line_of(text, key) + 1}: key {word!r} is given twice; keep one"


@pytest.mark.parametrize(
    "text", ["&a [*a]", "schema: 1\nmodels: &m [*m]", "&a {b: *a}", "schema: 1\nmodels:\n  - &a {name: [*a]}", "&a {<<: *a}"]
)
def test_alias_of_itself(text: str) -> None:
    assert "alias" in refusal(text)


def bomb(depth: int, width: int = 9) -> Iterator[str]:
    yield f"a0: &a0 [{', '.join(['x'] * width)}]"
    for level in range(1, depth):
        yield f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]"


@pytest.mark.parametrize("where", ["models", "output", "schema"])
def test_alias_bomb(where: str) -> None:
    started = time.monotonic()
    message = refusal("\n".join([*bomb(30), f"{where}: *a29"]))
    assert "aliases" in message
    assert time.monotonic() - started < 10


def test_alias_bomb_below_deep_nesting() -> None:
    """Small enough to do no harm where it goes off: some two million elements, if they were ever written out."""
    levels = [f"&a0 [{'x, ' * 8}]", *(f"&a{level} [{f'*a{level - 1}, ' * 8}]" for level in range(1, 7))]
    head = "[" * 55 + ", ".join(levels) + "]" * 55
    nested = "[" * 55 + "*a6" + "]" * 55
    started = time.monotonic()
    message = refusal(f"schema: {head}\nmodels: {nested}\n")
    assert time.monotonic() - started < 5
    assert "nest" in message, message


def test_aliases_and_merges_of_plain_values_are_fine() -> None:
    text = (
        "schema: 1\nmodels:\n  - &first\n    name: a\n    release: 1.0.0\n    source: path:x\n    targets: {onnx: [fp32]}\n"
        "  - {<<: *first, name: b}\n"
    )
    assert [spec.name for spec in parse(text, "p.yaml").models] == ["a", "b"]


NAMES_GOOD = ["a", "bert-base", "a.b_c-d", "0", "A" * 128]
NAMES_BAD = ["", "a/b", "a\\b", "..", ".", ".build", "../a", "a/..", "/a", "-a", "a b", "é", "a\n", "A" * 129, "a\0", "٣"]


@pytest.mark.parametrize("name", NAMES_GOOD)
def test_good_name(name: str) -> None:
    assert only_model(model(name=name)).name == name


@pytest.mark.parametrize("name", NAMES_BAD)
def test_bad_name(name: str) -> None:
    assert "models.0.name" in refusal(model(name=name))


RELEASES_GOOD = ["0.0.0", "1.0.0", "10.20.30", "1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-0.3.7", "1.0.0-x-y-z.--", "1.0.0-0a"]
RELEASES_BAD = [
    "", "1", "1.0", "v1.0.0", "1.0.0.0", "01.0.0", "1.00.0", "1.0.0-", "1.0.0-01", "1.0.0-a..b", "1.0.0+build", "1.0.0 ",
    "1.0.0\n", "../1.0.0", "1.0.0/x", "1.0.0-a/b", "1.0.0-..", "..", "1.0.x", "-1.0.0", "1.0.0-" + "a" * 64,
    "1٣.0.0", "1.0.0-1٣",
]  # fmt: skip


@pytest.mark.parametrize("release", RELEASES_GOOD)
def test_good_release(release: str) -> None:
    assert only_model(model(release=release)).release == release


@pytest.mark.parametrize("release", RELEASES_BAD)
def test_bad_release(release: str) -> None:
    message = refusal(model(release=release))
    assert "models.0.release" in message
    assert "semantic version" in message or "64 characters" in message


@pytest.mark.parametrize(
    "source",
    [
        "path:x",
        "path:/x/y z",
        "path:../x",
        "path:x.gguf",
        "package:p/model",
        "hf:o/n",
        "hf:n",
        "hf:o/n@v1.0",
        "hf:o/n@refs/pr/1",
    ],
)
def test_good_source(source: str) -> None:
    assert only_model(model(source=source)).source == source


@pytest.mark.parametrize(
    "source",
    [
        "", "x", "path", "path:", "package:", "hf:", "http://x/y", "s3:x", "PATH:x", " path:x", "hf:o/n@", "hf:o/n@a b",
        "hf:a/b/c", "hf:o/n@r@s", "hf:../x", "path:a\nb", "path:a\0b",
    ],
)  # fmt: skip
def test_bad_source(source: str) -> None:
    assert "source" in refusal(model(source=source))


def test_revision_has_one_place() -> None:
    assert only_model(model(source="hf:o/n", revision="main")).revision == "main"
    assert "revision" in refusal(model(source="hf:o/n@main", revision="main"))
    assert "revision" in refusal(model(source="path:x", revision="main"))
    assert "revision" in refusal(model(source="package:x/y", revision="main"))


@pytest.mark.parametrize("revision", ["", "a b", "../..", "a\nb", "@"])
def test_bad_revision(revision: str) -> None:
    assert "revision" in refusal(model(source="hf:o/n", revision=revision))


@pytest.mark.parametrize("pin", ["a" * 63, "a" * 65, "A" * 64, "g" * 64, "", SHA + "\n"])
def test_bad_pin(pin: str) -> None:
    message = refusal(model(sha256={"model.safetensors": pin}))
    assert "sha256.model.safetensors" in message
    assert "64" in message
    assert "^[" not in message, "an expression is not an explanation"


@pytest.mark.parametrize(
    ("task", "nearest"),
    [("feature-extracton", "feature-extraction"), ("fill_mask", "fill-mask"), ("text-clasification", "text-classification")],
)
def test_unknown_task_names_the_nearest(task: str, nearest: str) -> None:
    assert refusal(model(task=task)).endswith(f"models.0.task: unknown value {task!r}; did you mean {nearest!r}?")


def test_task_like_no_other_lists_them() -> None:
    message = refusal(model(task="zzz"))
    assert all(task in message for task in TASKS)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ({}, list(BACKENDS)),
        ({"onnx": None}, list(BACKENDS)),
        ({"onnx": ["bf16"]}, ["onnx", "bf16", "fp32"]),
        ({"onnx": ["fp64"]}, ["fp64", "fp32"]),
        ({"openvino": ["fp23"]}, ["did you mean 'fp32'"]),
        ({"onnx": {"precisions": ["bf16"], "opset": 18}}, ["onnx", "bf16"]),
        ({"torchscript": ["fp32", "fp32"]}, ["torchscript", "twice"]),
        ({"openvino": {"precisions": ["bf16", "bf16"]}}, ["openvino", "twice"]),
        ({"tensorrt": ["fp32"]}, ["tensorrt", "unknown key"]),
        ({"openvin": ["fp32"]}, ["did you mean 'openvino'"]),
        ({"onnx": {"opset": 18}}, ["precisions", "missing"]),
        ({"openvino": {"precisions": ["fp32"], "opset": 18}}, ["opset", "unknown key"]),
        ({"onnx": {"precisions": ["fp32"], "opset": 17}}, ["opset", "18"]),
        ({"onnx": {"precisions": ["fp32"], "opset": 24}}, ["opset", "23"]),
        ({"onnx": {"precisions": ["fp32"], "opset": "new"}}, ["opset", "new"]),
    ],
)
def test_impossible_targets(targets: dict[str, Any], words: list[str]) -> None:
    message = refusal(model(targets=targets))
    assert "models.0.targets" in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("format", list(BACKENDS))
def test_short_and_long_form_are_equal(format: str) -> None:
    precisions = list(BACKENDS[format].PRECISIONS)
    data = {"calibration": {"path": "calibration.jsonl"}}
    short, long = (only_model(model(targets={format: form}, data=data)) for form in (precisions, {"precisions": precisions}))
    assert short == long
    assert [str(target) for target in short.targets.list()] == [f"{format} {precision}" for precision in precisions]


@pytest.mark.parametrize(
    "expect",
    [
        {"onnx": {"BiasGelu": 0}},
        {"onnx": {"BiasGelu": -1}},
        {"onnx": {"BiasGelu": 1.5}},
        {"onnx": {"BiasGelu": True}},
        {"onnx": {"": 1}},
        {"onnx": 6},
        {"onx": {"BiasGelu": 6}},
        {"torchscript": {"linear": 1}},
    ],
)
def test_expect_of_nonsense(expect: Any) -> None:
    assert "models.0" in refusal(model(optimize={"expect": expect}))


def test_expect_is_for_formats_that_are_made() -> None:
    spec = only_model(model(optimize={"expect": {"onnx": {"BiasGelu": 6}}}))
    assert spec.optimize.expect.onnx == {"BiasGelu": 6}
    assert "targets has no openvino" in refusal(model(optimize={"expect": {"openvino": {"MVN": 13}}}))


@pytest.mark.parametrize(
    "budget",
    [
        {"fp32": {"max_abs": 0}},
        {"fp32": {"max_abs": -1}},
        {"fp32": {"max_abs": float("inf")}},
        {"fp32": {"max_abs": float("nan")}},
        {"fp32": {"cosine": float("nan")}},
        {"bf16": {"argmax": float("nan")}},
        {"fp32": {"cosine": 1.1}},
        {"fp32": {"cosine": -1.1}},
        {"bf16": {"argmax": 2}},
        {"bf16": {"argmax": -0.1}},
        {"bf16": {"max_abs": "a lot"}},
        {"bf16": 0.1},
        {"fp16": {"cosine": 0.9}},
        [0.1],
        "loose",
    ],
)
def test_budget_of_nonsense(budget: Any) -> None:
    assert "models.0.budget" in refusal(model(budget=budget))


def test_default_limits() -> None:
    budget = only_model(model()).budget
    assert budget.limits("fp32").model_dump(exclude_none=True) == {"max_abs": 1e-4, "cosine": 0.999999}
    assert budget.limits("bf16").model_dump(exclude_none=True) == {"cosine": 0.999, "argmax": 0.98}
    expected = {"cosine": 0.98, "neighbours": 0.95, "argmax": 0.95, "spans": 0.95, "drop": 0.01, "rank": 0.95, "noise": 0.5}
    assert budget.limits("int8").model_dump(exclude_none=True) == expected
    assert set(DEFAULT_LIMITS) == {"fp32", "bf16", "int8"}


def test_limit_that_is_given_leaves_the_others_strict() -> None:
    budget = only_model(model(budget={"fp32": {"max_abs": 0.5}, "bf16": {"cosine": 0.9, "max_abs": 0.1}})).budget
    assert budget.limits("fp32").model_dump(exclude_none=True) == {"max_abs": 0.5, "cosine": 0.999999}
    assert budget.limits("bf16").model_dump(exclude_none=True) == {"max_abs": 0.1, "cosine": 0.9, "argmax": 0.98}


def test_one_name_and_release_is_one_model() -> None:
    document = yaml.safe_load(model())
    document["models"].append(copy.deepcopy(document["models"][0]))
    message = refusal(yaml.safe_dump(document))
    assert "tiny 1.0.0" in message
    document["models"][1]["release"] = "1.0.1"
    assert len(parse(yaml.safe_dump(document), "p.yaml").models) == 2


def test_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file; `compile init CHECKPOINT` writes one$"):
        read(tmp_path / "pipeline.yaml")


def test_file_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path)


def test_file_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_bytes(b"\xff\xfe\x00schema")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        read(tmp_path / "p.yaml")


def test_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert read(tmp_path / "p.yaml").models


@pytest.mark.parametrize("arguments", [("plan", "p.yaml"), ("p.yaml",), ("build", "p.yaml")])
def test_command_prints_one_line(command: Command, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "p.yaml").write_text(changed("release: 1.0.0", "relaese: 1.0.0"))
    line = error_line(command(*arguments))
    assert line.startswith("error: p.yaml:5: models.0.relaese: unknown key; did you mean 'release'?")


def properties(node: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The properties of a node of a JSON schema, through references and alternatives."""
    if "$ref" in node:
        return properties(definitions[node["$ref"].rpartition("/")[2]], definitions)
    for alternative in node.get("anyOf", ()):
        if found := properties(alternative, definitions):
            return found
    return dict(node.get("properties", {}))


def unknown_keys(value: Any, node: Any, definitions: dict[str, Any]) -> list[str]:
    """The keys of a document that its schema has no place for."""
    if isinstance(value, list):
        return [key for item in value for key in unknown_keys(item, node.get("items", {}), definitions)]
    known = properties(node, definitions)
    if not isinstance(value, dict) or not known:
        return []
    missing = [key for key in value if key not in known]
    return missing + [key for name in value if name in known for key in unknown_keys(value[name], known[name], definitions)]


def test_schema_command_prints_a_schema_of_this_very_file(command: Command) -> None:
    result = command("schema")
    assert result.returncode == 0
    printed = json.loads(result.stdout)
    assert printed == json.loads(json.dumps(schema()))
    assert set(printed["properties"]) == {"schema", "output", "models"}
    assert set(printed["required"]) == {"schema", "models"}
    for document in (yaml.safe_load((ROOT / "pipeline.yaml").read_text()), yaml.safe_load(TEXT)):
        assert unknown_keys(document, printed, printed["$defs"]) == []
    assert unknown_keys({"schema": 1, "models": [{"nmae": 1}]}, printed, printed["$defs"]) == ["nmae"]


def types(node: Any, definitions: dict[str, Any]) -> set[str]:
    """The types that a node of a JSON schema allows."""
    if "$ref" in node:
        return types(definitions[node["$ref"].rpartition("/")[2]], definitions)
    return {node["type"]} if "type" in node else {kind for entry in node["anyOf"] for kind in types(entry, definitions)}


@pytest.mark.parametrize("name", list(BACKENDS))
def test_schema_allows_the_short_form(name: str) -> None:
    definitions = schema()["$defs"]
    assert types(definitions["Targets"]["properties"][name], definitions) == {"array", "object", "null"}


def check_any(text: str) -> None:
    """A text is a pipeline, or is refused in one line."""
    try:
        pipeline = parse(text, "p.yaml")
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1, str(error)
    else:
        assert isinstance(pipeline, Pipeline)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates(), st.binary(max_size=4),
    st.sampled_from(["fp32", "bf16", "path:x", "hf:o/n", "1.0.0", "fill-mask", "onnx"]),
)  # fmt: skip
KEYS = st.one_of(
    st.sampled_from(
        ["schema", "models", "output", "name", "release", "source", "targets", "onnx", "budget", "fp32", "opset", "function-x"]
    ),
    st.text(max_size=6),
    st.integers(),
    st.none(),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)), max_leaves=12
)


@FUZZ
@given(st.text())
def test_any_text(text: str) -> None:
    check_any(text)


@FUZZ
@given(st.text(alphabet="abs:&*!?|>-[]{},\"'#%@\n \t<=0123.~"))
def test_any_punctuation(text: str) -> None:
    check_any(text)


@FUZZ
@given(VALUES)
def test_any_document(value: Any) -> None:
    check_any(yaml.safe_dump(value, allow_unicode=True))


@FUZZ
@given(VALUES, VALUES)
def test_any_values_in_the_right_places(targets: Any, budget: Any) -> None:
    check_any(
        yaml.safe_dump({"schema": 1, "models": [{"name": "a", "release": "1.0.0", "targets": targets, "budget": budget}]})
    )


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a document."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


PLACES = [path for path in places(yaml.safe_load(TEXT)) if path]


@FUZZ
@given(st.sampled_from(PLACES), VALUES, KEYS)
def test_any_value_in_a_valid_pipeline(path: tuple[Any, ...], value: Any, key: Any) -> None:
    document = yaml.safe_load(TEXT)
    parent = document
    for part in path[:-1]:
        parent = parent[part]
    parent[path[-1]] = value
    if isinstance(parent, dict):
        parent[key] = value
    check_any(yaml.safe_dump(document, sort_keys=False))


@FUZZ
@given(st.integers(0, len(TEXT)), st.integers(0, 8), st.text(max_size=4))
def test_any_edit_of_a_valid_pipeline(start: int, length: int, insert: str) -> None:
    check_any(TEXT[:start] + insert + TEXT[start + length :])


@FUZZ
@given(
    st.sampled_from(
        ["int", "float", "bool", "null", "timestamp", "binary", "str", "seq", "map", "set", "omap", "pairs", "merge", "value"]
    ),
    st.sampled_from(["''", "x", "1", "[a]", "{a: b}", "[[a, b]]", "[{a: b}]", "-", "+", "0x", "0b2", "1:1", ".", "_", "~"]),
)
def test_any_tag_on_any_value(tag: str, value: str) -> None:
    check_any(f"schema: !!{tag} {value}\nmodels: []\n")


def test_int8_is_calibrated() -> None:
    entry = only_model(model(targets={"onnx": ["int8"]}, data={"calibration": {"path": "c.jsonl"}}))
    assert entry.data.calibration is not None
    assert (entry.data.calibration.samples, entry.data.calibration.seed) == (256, 0)
    message = refusal(model(targets={"onnx": ["fp32"], "openvino": ["fp32", "int8"]}))
    assert "openvino int8 needs text to calibrate on: give data.calibration a file" in message


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ({"onnx": ["a"]}, "quantize.plan.onnx: targets has no int8 of it; leave one out or add the other"),
        ({"torchscript": ["a"]}, "quantize.plan.torchscript: targets has no int8 of it"),
        ({"tflite": ["a"]}, "tflite is no format; there are torchscript, onnx, openvino"),
    ],
)
def test_plan_of_a_format_that_has_no_int8(plan: dict[str, list[str]], reason: str) -> None:
    targets = {"onnx": ["fp32"], "openvino": ["int8"]}
    calibrated = {"targets": targets, "data": {"calibration": {"path": "c.jsonl"}}}
    for left in (["a"], {"a": "as a manifest's kept says why"}):
        assert only_model(model(**calibrated, quantize={"plan": {"openvino": left}})).quantize.plan == {"openvino": ("a",)}
    assert reason in refusal(model(**calibrated, quantize={"plan": plan}))


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"calibration": {"path": "c.jsonl", "samples": 15}}},
        {"data": {"calibration": {"path": "c.jsonl", "seed": -1}}},
        {"quantize": {"cpu": "sse2"}},
        {"quantize": {"fallback": "perhaps"}},
        {"budget": {"int8": {"neighbours": 1.1}}},
        {"budget": {"int8": {"kl": 0}}},
        {"budget": {"int8": {"drop": -0.1}}},
    ],
)
def test_values_of_int8_that_make_no_sense(change: dict[str, Any]) -> None:
    refusal(model(**change))

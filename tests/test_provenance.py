"""provenance.json: an in-toto statement of SLSA provenance that covers every file, and is the same for the same release."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as Message

import compiler
from compiler.hashing import canonical, hash_file, list_files
from compiler.manifest import MANIFEST, SUMS, Manifest, Source
from compiler.provenance import BUILD_TYPE, PROVENANCE, provenance
from tests.stages.test_package import VALIDATED, Parts

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    parts = Parts(tmp_path)
    files = tuple(file for _, file in parts.support)
    whole = replace(parts.manifest(), files=files, libraries={"torch": "2.13.0+cpu"})
    return replace(whole, source=Source(f"hf:org/my model@{COMMIT}", COMMIT, None, files))


def made(manifest: Manifest) -> dict[str, Any]:
    content = provenance(manifest, VALIDATED, manifest.entry)
    document: dict[str, Any] = json.loads(content)
    assert canonical(document) == content
    return document


def test_it_is_a_statement_of_slsa_provenance(manifest: Manifest) -> None:
    document = made(manifest)
    Statement.copy_from_pb(ParseDict(document, Message())).validate()
    ParseDict(document["predicate"], Provenance())
    assert document["_type"] == "https://in-toto.io/Statement/v1"
    assert document["predicateType"] == "https://slsa.dev/provenance/v1"
    definition = document["predicate"]["buildDefinition"]
    assert definition["buildType"] == BUILD_TYPE
    assert document["predicate"]["runDetails"]["builder"]["id"] == f"pkg:pypi/aot-model-compiler@{compiler.__version__}"
    assert "metadata" not in document["predicate"]["runDetails"]


def test_what_was_asked_for(manifest: Manifest) -> None:
    assert manifest.entry
    assert made(manifest)["predicate"]["buildDefinition"]["externalParameters"] == manifest.entry


def test_what_it_was_made_from(manifest: Manifest) -> None:
    dependencies = made(manifest)["predicate"]["buildDefinition"]["resolvedDependencies"]
    uri = f"hf:org/my%20model@{COMMIT}"
    assert dependencies[0] == {"uri": uri, "digest": {"gitCommit": COMMIT}}
    by_use = {use: [entry for entry in dependencies[1:] if entry["annotations"]["use"] == use] for use in USES}
    assert sum(map(len, by_use.values())) == len(dependencies) - 1
    assert [(entry["name"], entry["digest"]["sha256"]) for entry in by_use["checkpoint"]] == [
        (file.path, file.sha256) for file in manifest.source.files
    ]
    assert {entry["uri"] for entry in by_use["checkpoint"]} == {uri}
    assert by_use["validation"] == [
        {"name": "lines.jsonl", "digest": {"sha256": "d" * 64}, "annotations": {"use": "validation"}}
    ]
    assert by_use["calibration"] == [
        {"name": "more.jsonl", "digest": {"sha256": "e" * 64}, "annotations": {"use": "calibration"}}
    ]
    assert [entry["uri"] for entry in by_use["package"]] == ["pkg:pypi/torch@2.13.0%2Bcpu"]


USES = ("checkpoint", "validation", "calibration", "package")


def test_a_source_without_a_commit(manifest: Manifest) -> None:
    whole = replace(manifest, source=Source("path:checkpoint", None, None, ()))
    assert made(whole)["predicate"]["buildDefinition"]["resolvedDependencies"][0] == {"uri": "path:checkpoint"}


def test_the_same_again(manifest: Manifest) -> None:
    assert made(manifest) == made(manifest)


def test_it_covers_every_file_of_a_release(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    whole = parts.package()
    document = json.loads((parts.target / PROVENANCE).read_bytes())
    subjects = {subject["name"]: subject["digest"]["sha256"] for subject in document["subject"]}
    covered = set(list_files(parts.target)) - {MANIFEST, SUMS, PROVENANCE}
    assert subjects == {name: hash_file(parts.target, name).sha256 for name in covered}
    assert hash_file(parts.target, PROVENANCE) in whole.files

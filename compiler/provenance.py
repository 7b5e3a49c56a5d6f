"""provenance.json: how a release was made, as an in-toto statement (https://in-toto.io/Statement/v1) with the predicate of
SLSA provenance v1 (https://slsa.dev/provenance/v1). Pure, and the same for the same release: it holds no time and no host.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

from compiler.bom import DISTRIBUTION, purl
from compiler.hashing import canonical
from compiler.manifest import Manifest

PROVENANCE = "provenance.json"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
# What the parameters and dependencies below mean; the README describes it. Another meaning takes another number.
BUILD_TYPE = f"pkg:pypi/{DISTRIBUTION}#build-v1"


def provenance(manifest: Manifest, validation: Mapping[str, Any], entry: Mapping[str, Any]) -> bytes:
    """The content of provenance.json.

    Args:
        manifest: with every file of the release but this one.
        validation: the content of validation.json.
        entry: the external parameters: what the user asked for.
    """
    from google.protobuf.json_format import MessageToDict, ParseDict
    from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
    from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
    from in_toto_attestation.v1.statement import Statement

    predicate = {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": json.loads(canonical(entry)),
            "internalParameters": {name: validation[name] for name in ("cpu", "threads")},
            "resolvedDependencies": list(_dependencies(manifest, validation)),
        },
        "runDetails": {
            "builder": {
                "id": purl(DISTRIBUTION, manifest.compiler),
                "version": {DISTRIBUTION: manifest.compiler, "python": manifest.python},
            }
        },
    }
    ParseDict(predicate, Provenance())  # raises where a field is not one of the predicate's
    subjects = [ResourceDescriptor(name=file.path, digest={"sha256": file.sha256}).pb for file in manifest.every_file]
    statement = Statement(subjects, PREDICATE_TYPE, predicate)
    statement.validate()
    # The predicate as it was given: in the message every integer is a float.
    return canonical({**MessageToDict(statement.pb), "predicate": predicate})


def _dependencies(manifest: Manifest, validation: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """The checkpoint, each of its files, the data and the packages."""
    source, data = manifest.source, validation["data"]
    uri = quote(source.uri, safe=":/@")
    yield {"uri": uri, **({"digest": {"gitCommit": source.revision}} if source.revision else {})}
    for file in source.files:
        yield {"uri": uri, "name": file.path, "digest": {"sha256": file.sha256}, "annotations": {"use": "checkpoint"}}
    yield {"name": data["name"], "digest": {"sha256": data["sha256"]}, "annotations": {"use": "validation"}}
    if text := validation.get("calibration"):
        yield {"name": text["name"], "digest": {"sha256": text["sha256"]}, "annotations": {"use": "calibration"}}
    for name, version in manifest.libraries.items():
        yield {"uri": purl(name, version), "name": name, "annotations": {"use": "package"}}

"""bom.cdx.json: a release as a CycloneDX ML-BOM (https://cyclonedx.org/docs/1.6/json/): the model and how close it is to the
original, its files, the checkpoint, the data and the packages that shaped it. Pure, and the same for the same release: it
holds no time, and its serial number is made from its content.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from compiler.hashing import canonical, digest
from compiler.manifest import Manifest
from compiler.types import File, Tensor

if TYPE_CHECKING:
    from cyclonedx.model.component import Component
    from cyclonedx.model.license import License
    from packageurl import PackageURL

BOM = "bom.cdx.json"
DISTRIBUTION = "aot-model-compiler"


def bom(manifest: Manifest, validation: Mapping[str, Any]) -> bytes:
    """The content of bom.cdx.json.

    Args:
        manifest: with every file of the release but those that are made from it.
        validation: the content of validation.json.
    """
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType, Pedigree
    from cyclonedx.model.dependency import Dependency
    from cyclonedx.model.tool import ToolRepository
    from cyclonedx.output.json import JsonV1Dot6

    source = manifest.source
    licences = _licences(source.licence)
    kind = ComponentType.MACHINE_LEARNING_MODEL
    origin: dict[str, Any] = {"name": source.uri, "version": source.revision, "type": kind, "licenses": licences}
    model = Component(
        name=manifest.name,
        version=manifest.release,
        type=kind,
        bom_ref="model",
        licenses=licences,
        pedigree=Pedigree(ancestors=[Component(**origin)]),
        properties=_properties(
            {"key": manifest.key, "positions": manifest.positions, "left_out": ", ".join(manifest.left_out)}
        ),
    )
    checkpoint = Component(**origin, bom_ref="checkpoint", components=[_file(file, "checkpoint") for file in source.files])
    texts = {"validation": validation["data"]}
    if "calibration" in validation:
        texts["calibration"] = validation["calibration"]
    data = [
        Component(name=text["name"], type=ComponentType.DATA, bom_ref=f"data {use}", hashes=_hashes(text["sha256"]))
        for use, text in texts.items()
    ]
    packages = [_package(name, version) for name, version in manifest.libraries.items()]
    runtime = Component(name="python", version=manifest.python, type=ComponentType.PLATFORM, bom_ref="python")
    files = [_file(file, "release") for file in manifest.files]
    files += [
        _file(file, "release", {"format": artifact.format, "precision": artifact.precision})
        for artifact in manifest.artifacts
        for file in artifact.files
    ]
    shaping = [checkpoint, *data, runtime, *packages]
    made = Bom(
        metadata=BomMetaData(component=model, tools=ToolRepository(components=[_package(DISTRIBUTION, manifest.compiler)])),
        components=[*files, *shaping],
        dependencies=[Dependency(model.bom_ref, [Dependency(component.bom_ref) for component in shaping])],
    )
    document: dict[str, Any] = json.loads(JsonV1Dot6(made).output_as_string())
    # What the library fills in by itself and would be another in the next build.
    del document["metadata"]["timestamp"], document["serialNumber"]
    # What the format has and the library has no classes for.
    document["metadata"]["component"]["modelCard"] = _card(manifest, validation)
    for described in document["components"]:
        if described["bom-ref"].startswith("data "):
            described["data"] = [{"type": "dataset", "name": described["name"]}]
    # As RFC 4122 has it for a name in a name space: the same content has the same number.
    number = uuid.uuid5(uuid.NAMESPACE_URL, f"pkg:pypi/{DISTRIBUTION}#{digest(document)}")
    return canonical({**document, "serialNumber": f"urn:uuid:{number}"})


def purl(name: str, version: str) -> str:
    """The package URL of a distribution of the Python package index."""
    return _purl(name, version).to_string()


def _purl(name: str, version: str) -> PackageURL:
    from packageurl import PackageURL

    return PackageURL("pypi", None, name, version)


def _card(manifest: Manifest, validation: Mapping[str, Any]) -> dict[str, Any]:
    """The model card: what it is for, what it takes and gives, and each recorded check, with its limit as a property."""
    metrics, limits = [], []
    for artifact in validation["artifacts"]:
        for check in artifact["checks"]:
            part = f"{artifact['format']} {artifact['precision']} {check['output']}"
            metrics.append({"type": check["name"], "slice": part, "value": repr(check["figure"])})
            limits.append({"name": f"compile:limit {part} {check['name']}", "value": repr(check["limit"])})
    return {
        "modelParameters": {
            "task": manifest.task,
            "modelArchitecture": manifest.architecture,
            "datasets": [{"ref": "data validation"}],
            "inputs": [{"format": _format(tensor)} for tensor in manifest.signature.inputs],
            "outputs": [{"format": _format(tensor)} for tensor in manifest.signature.outputs],
        },
        "quantitativeAnalysis": {"performanceMetrics": metrics},
        "properties": limits,
    }


def _format(tensor: Tensor) -> str:
    return f"{tensor.name} {tensor.dtype} [{', '.join(map(str, tensor.shape))}]"


def _file(file: File, owner: str, properties: Mapping[str, Any] | None = None) -> Component:
    from cyclonedx.model.component import Component, ComponentType

    return Component(
        name=file.path,
        type=ComponentType.FILE,
        bom_ref=f"{owner} {file.path}",
        hashes=_hashes(file.sha256),
        properties=_properties({"bytes": file.size, **(properties or {})}),
    )


def _package(name: str, version: str) -> Component:
    from cyclonedx.model.component import Component, ComponentType

    place = _purl(name, version)
    return Component(name=name, version=version, type=ComponentType.LIBRARY, bom_ref=place.to_string(), purl=place)


def _hashes(sha256: str) -> Iterable[Any]:
    from cyclonedx.model import HashAlgorithm, HashType

    return [HashType(alg=HashAlgorithm.SHA_256, content=sha256)]


def _properties(values: Mapping[str, Any]) -> Iterable[Any]:
    from cyclonedx.model import Property

    return [Property(name=f"compile:{name}", value=str(value)) for name, value in values.items() if value not in (None, "")]


def _licences(licence: str | None) -> list[License]:
    """A licence by its SPDX id, which hubs write in lower case; by its name when it has none."""
    from cyclonedx.model.license import DisjunctiveLicense
    from cyclonedx.spdx import fixup_id

    if not licence:
        return []
    known = fixup_id(licence)
    return [DisjunctiveLicense(id=known) if known else DisjunctiveLicense(name=licence)]

"""A release as an OCI artifact of CNCF ModelPack (github.com/modelpack/model-spec): a layer a file, as it is. Pure.

What a manifest of OCI says of a release is made from the release alone and holds no time: the same release gives the same
bytes. Its annotations hold the release's version and digest, so that one small request tells what a tag names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from compiler.config import SEMVER
from compiler.errors import RegistryError, ReleaseError
from compiler.hashing import canonical
from compiler.manifest import MANIFEST, OUTSIDE, SAMPLES, VALIDATION, Manifest
from compiler.registries import Parcel
from compiler.types import File

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT = "application/vnd.cncf.model.manifest.v1+json"
CONFIG = "application/vnd.cncf.model.config.v1+json"
WEIGHT, WEIGHT_CONFIG, DOC, CODE, DATASET = (
    f"application/vnd.cncf.model.{kind}.v1.raw" for kind in ("weight", "weight.config", "doc", "code", "dataset")
)
FILE_PATH = "org.cncf.model.filepath"
FILE_METADATA = "org.cncf.model.file.metadata+json"
# Clients that know nothing of models name a layer's file by this.
TITLE = "org.opencontainers.image.title"
VERSION = "org.opencontainers.image.version"
LICENCES = "org.opencontainers.image.licenses"
DIGEST = "aot-model-compiler.manifest.digest"
# The distribution specification has registries take manifests of this many bytes; many take no more.
MANIFEST_BYTES = 4 << 20

_DOCUMENTS = re.compile(
    r"(README|LICEN[CS]E|NOTICE|MODEL_?CARD|CHANGELOG)\b|.*\.(md|cdx\.json|intoto\.jsonl?)$|provenance\.json$", re.IGNORECASE
)


class OtherError(RegistryError):
    """What is there is not a release of ours: a container's image, an index, another tool's model."""


def pack(parcel: Parcel) -> tuple[bytes, bytes, tuple[File, ...]]:
    """The manifest of OCI, its config, and the layers in their order: manifest.json first, then the release's other files."""
    manifest = parcel.manifest
    files = (File(MANIFEST, hashlib.sha256(parcel.content).hexdigest(), len(parcel.content)), *parcel.files)
    formats = sorted({artifact.format for artifact in manifest.artifacts})
    precisions = sorted({artifact.precision for artifact in manifest.artifacts})
    licence = manifest.source.licence
    config = canonical(
        {
            "descriptor": {
                "name": manifest.name,
                "version": manifest.release,
                # BertForSequenceClassification is of the family bert.
                "family": re.sub(r"(Model|For[A-Z]\w*)$", "", manifest.architecture).lower(),
                **({"licenses": [licence]} if licence else {}),
            },
            "config": {
                "architecture": manifest.architecture,
                "format": ",".join(formats),
                "precision": precisions[0] if len(precisions) == 1 else "mixed",
            },
            # A raw layer is its own uncompressed content.
            "modelfs": {"type": "layers", "diffIds": [f"sha256:{file.sha256}" for file in files]},
        }
    )
    annotations = {TITLE: manifest.name, VERSION: manifest.release, DIGEST: f"sha256:{manifest.identity}"}
    content = canonical(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "artifactType": ARTIFACT,
            "config": {"mediaType": CONFIG, "digest": f"sha256:{hashlib.sha256(config).hexdigest()}", "size": len(config)},
            "layers": [_layer(file, _media_type(file.path, manifest)) for file in files],
            "annotations": {**annotations, **({LICENCES: licence} if licence else {})},
        }
    )
    return content, config, files


def _layer(file: File, media_type: str) -> dict[str, Any]:
    # Mode, owner and time are fixed: they say nothing of a release, and those on disk would change the bytes.
    metadata = {"name": PurePosixPath(file.path).name, "mode": 0o644, "uid": 0, "gid": 0, "size": file.size}
    metadata |= {"mtime": "1970-01-01T00:00:00Z", "typeflag": 0}
    return {
        "mediaType": media_type,
        "digest": f"sha256:{file.sha256}",
        "size": file.size,
        "annotations": {
            FILE_PATH: file.path,
            TITLE: file.path,
            FILE_METADATA: json.dumps(metadata, ensure_ascii=False),
        },
    }


def _media_type(path: str, manifest: Manifest) -> str:
    if any(file.path == path for artifact in manifest.artifacts for file in artifact.files):
        return WEIGHT_CONFIG if path.endswith(".json") else WEIGHT
    if path == SAMPLES:
        return DATASET
    if path in (VALIDATION, *OUTSIDE) or _DOCUMENTS.match(PurePosixPath(path).name):
        return DOC
    if path.endswith(".py"):
        return CODE
    return WEIGHT_CONFIG


def label(content: bytes, where: str) -> tuple[str, str]:
    """The version and the digest (hex) of the release that a manifest of OCI names.

    Raises:
        OtherError: it is something else.
    """
    body = _read(content, where)
    annotations = body.get("annotations")
    release, digest = ("", "") if not isinstance(annotations, dict) else (annotations.get(VERSION), annotations.get(DIGEST))
    if not (
        isinstance(release, str)
        and isinstance(digest, str)
        and re.fullmatch(SEMVER, release)
        and re.fullmatch(r"sha256:[0-9a-f]{64}", digest)
    ):
        raise OtherError(f"{where}: a model that another tool packed, not a release; fetch it with that tool")
    return release, digest.removeprefix("sha256:")


def title(content: bytes) -> str | None:
    """The name of the model that a manifest of OCI is of; None when it names none, or is something else."""
    try:
        annotations = _read(content, "").get("annotations")
    except OtherError:
        return None
    found = annotations.get(TITLE) if isinstance(annotations, dict) else None
    return found if isinstance(found, str) else None


def _read(content: bytes, where: str) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise OtherError(f"{where}: what the registry has there is not JSON; it is no release, or is damaged") from error
    if not isinstance(body, dict):
        raise OtherError(f"{where}: what the registry has there is no manifest of OCI")
    if "manifests" in body:
        raise OtherError(f"{where}: an index of images, not a release; give the reference of a release")
    config = body.get("config")
    kinds = (body.get("mediaType"), body.get("artifactType"), config.get("mediaType") if isinstance(config, dict) else None)
    if kinds != (OCI_MANIFEST, ARTIFACT, CONFIG):
        raise OtherError(f"{where}: a container's image or another artifact, not a release; give the reference of a release")
    return body


def layers(content: bytes, where: str) -> dict[str, File]:
    """The files of a release by their paths, as a manifest of OCI names them; no path is to be believed.

    Raises:
        OtherError: as `label`.
        ReleaseError: a layer is none of a release.
    """
    found: dict[str, File] = {}
    entries = _read(content, where).get("layers")
    if not isinstance(entries, list):
        raise ReleaseError(f"{where}: names no layers; it is damaged, do not use it")
    for entry in entries:
        file = _file(entry)
        if file is None:
            raise ReleaseError(
                f"{where}: has a layer that is no raw file of a model (type, digest, size, path); do not use it"
            )
        if file.path in found:
            raise ReleaseError(f"{where}: names {shown(file.path)} twice; do not use it")
        found[file.path] = file
    return found


def _file(entry: Any) -> File | None:
    if not isinstance(entry, dict) or entry.get("mediaType") not in (WEIGHT, WEIGHT_CONFIG, DOC, CODE, DATASET):
        return None
    annotations, digest, size = entry.get("annotations"), entry.get("digest"), entry.get("size")
    path = annotations.get(FILE_PATH) if isinstance(annotations, dict) else None
    if not (isinstance(path, str) and isinstance(digest, str) and re.fullmatch(r"sha256:[0-9a-f]{64}", digest)):
        return None
    if type(size) is not int or size < 0:
        return None
    return File(path, digest.removeprefix("sha256:"), size)


def compare(found: Mapping[str, File], manifest: Manifest, where: str) -> None:
    """Make sure that layers are the files that a release's own manifest names, before any of them is fetched.

    Raises:
        ReleaseError: a layer is too many, missing, or another file.
    """
    expected = {file.path: file for file in manifest.every_file}
    for path in sorted(set(found) - set(expected) - {MANIFEST, *OUTSIDE}):
        raise ReleaseError(f"{where}: has a layer {shown(path)} that its {MANIFEST} does not name; do not use it")
    for path, file in expected.items():
        if path not in found:
            raise ReleaseError(f"{where}: has no layer for {path}; it is damaged, do not use it")
        if found[path] != file:
            raise ReleaseError(f"{where}: its layer for {path} is not what its {MANIFEST} says (sha256, size); do not use it")


def shown(path: str) -> str:
    """A path that is not to be believed, for an error's one line."""
    return repr(path if len(path) <= 80 else f"{path[:80]}…")

"""ModelPack: what a manifest of OCI that registries would take, or not, is refused for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compiler.errors import RegistryError, ReleaseError
from compiler.manifest import MANIFEST
from compiler.registries import Parcel, modelpack
from tests.registries.conftest import make_release


def packed(folder: Path) -> bytes:
    manifest = make_release(folder)
    return modelpack.pack(Parcel(folder, manifest, (folder / MANIFEST).read_bytes(), manifest.every_file))[0]


def test_what_was_packed_is_read_back(tmp_path: Path) -> None:
    content = packed(tmp_path / "release")
    manifest = make_release(tmp_path / "again")
    assert content == packed(tmp_path / "other")
    assert modelpack.label(content, "here") == ("1.0.0", manifest.identity)
    modelpack.compare(modelpack.layers(content, "here"), manifest, "here")


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[]", b"{}", b"null", b"[" * 100_000, b'{"manifests": []}', b'{"config": 3}', b'{"annotations": []}'],
)
def test_what_is_no_manifest_of_ours_is_one_line(content: bytes) -> None:
    for read in (modelpack.label, modelpack.layers):
        with pytest.raises(RegistryError) as caught:
            read(content, "oci://here/m@1.0.0")
        assert str(caught.value).startswith("oci://here/m@1.0.0: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "annotations",
    [
        None,
        [],
        {},
        {modelpack.VERSION: 1},
        {modelpack.VERSION: "1.0"},
        {modelpack.DIGEST: None},
        {modelpack.DIGEST: "sha256:0"},
    ],
)
def test_a_label_that_is_none_is_refused(tmp_path: Path, annotations: Any) -> None:
    body = json.loads(packed(tmp_path / "release"))
    body["annotations"] = {**body["annotations"], **annotations} if annotations else annotations
    with pytest.raises(modelpack.OtherError, match="another tool packed"):
        modelpack.label(json.dumps(body).encode(), "here")


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "sha256:" + "A" * 64},
        {"digest": "sha512:" + "0" * 128},
        {"digest": None},
        {"size": True},
        {"size": "3"},
        {"size": 1.5},
        {"size": -1},
        {"mediaType": []},
        {"mediaType": "text/html"},
        {"annotations": {modelpack.FILE_PATH: 3}},
        {"annotations": "path"},
    ],
)
def test_a_layer_that_is_no_file_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    body = json.loads(packed(tmp_path / "release"))
    body["layers"][0] |= change
    with pytest.raises(ReleaseError, match="no raw file of a model"):
        modelpack.layers(json.dumps(body).encode(), "here")


@pytest.mark.parametrize("layers", [None, {}, "layers", 3])
def test_layers_that_are_no_list_are_refused(tmp_path: Path, layers: Any) -> None:
    body = {**json.loads(packed(tmp_path / "release")), "layers": layers}
    with pytest.raises(ReleaseError, match="names no layers"):
        modelpack.layers(json.dumps(body).encode(), "here")


@pytest.mark.parametrize("entry", [None, 3, "layer", []])
def test_a_layer_that_is_no_object_is_refused(tmp_path: Path, entry: Any) -> None:
    body = {**json.loads(packed(tmp_path / "release")), "layers": [entry]}
    with pytest.raises(ReleaseError, match="no raw file of a model"):
        modelpack.layers(json.dumps(body).encode(), "here")

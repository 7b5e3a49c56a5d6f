"""manifest.json: the same value back, any changed byte found, and no path that leads out of a release, however well the
file is signed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from compiler.errors import ReleaseError
from compiler.hashing import canonical, digest
from compiler.manifest import Made, Manifest, Source, differences, from_bytes, to_bytes
from compiler.types import Artifact, File, Signature, Tensor

A, B, C = "a" * 64, "b" * 64, "c" * 64


def manifest() -> Manifest:
    return Manifest(
        name="tiny",
        release="1.0.0-rc.1",
        task="feature-extraction",
        architecture="BertModel",
        source=Source("path:prüfpunkt", None, "apache-2.0", (File("model.safetensors", A, 10),)),
        entry={"name": "tiny", "release": "1.0.0"},
        signature=Signature(
            (Tensor("input_ids", "int64", ("batch", "sequence")),),
            (Tensor("last_hidden_state", "float32", ("batch", "sequence", 32)),),
        ),
        positions=64,
        left_out=("pooler",),
        artifacts=(
            Artifact("torchscript", "fp32", (File("torchscript/model.pt", B, 20),), {"threads": 1, "level": "all"}, C),
            Artifact("onnx", "fp32", (File("onnx/model.onnx", A, 20),), {}, C, 18, {"gelu": 2}),
        ),
        files=(File("config.json", C, 30), File("1_Pooling/config.json", A, 1)),
        libraries={"torch": "2.13.0"},
        python="3.11.9",
        compiler="0.1.0",
        steps={"load": Made(A, {"task": "feature-extraction"})},
        key=B,
        refused={},
    )


def signed(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The manifest after a change, with the digest that belongs to it."""
    body = json.loads(to_bytes(manifest()))
    del body["digest"]
    change(body)
    return canonical({**body, "digest": digest(body)})


def refused(content: bytes) -> str:
    """The one line of the refusal."""
    with pytest.raises(ReleaseError) as caught:
        from_bytes(content, "release/manifest.json")
    message = str(caught.value)
    assert message.startswith("release/manifest.json: ")
    assert "\n" not in message
    return message


def test_round_trip() -> None:
    content = to_bytes(manifest())
    assert from_bytes(content, "x") == manifest()
    assert to_bytes(from_bytes(content, "x")) == content
    assert content == canonical(json.loads(content))


def test_signing_helper_gives_what_is_read() -> None:
    assert signed(lambda body: None) == to_bytes(manifest())


def test_every_file_is_the_release_without_the_source() -> None:
    assert [file.path for file in manifest().every_file] == [
        "1_Pooling/config.json",
        "config.json",
        "onnx/model.onnx",
        "torchscript/model.pt",
    ]


def test_a_changed_byte_shows() -> None:
    content = to_bytes(manifest())
    step = max(1, len(content) // 300)
    for position in range(0, len(content), step):
        changed = bytearray(content)
        changed[position] ^= 1 << (position % 8)
        refused(bytes(changed))


NO_MANIFEST = [b"", b"{}", b"[]", b"null", b"1", b'"x"', b"\xff", b"{" * 100_000, b"[" * 100_000, b"NaN"]


@pytest.mark.parametrize("content", NO_MANIFEST, ids=lambda content: repr(content[:8]))
def test_what_is_no_manifest(content: bytes) -> None:
    refused(content)


@pytest.mark.parametrize("change", [b" ", b"\n", b"\0"])
def test_bytes_around_it_show(change: bytes) -> None:
    refused(to_bytes(manifest()) + change)
    refused(change + to_bytes(manifest()))


def test_one_that_is_cut_short() -> None:
    content = to_bytes(manifest())
    for length in range(0, len(content), 97):
        refused(content[:length])


def test_other_spelling_of_the_same_json() -> None:
    """One value has one form; another form of it was not written by a build."""
    refused(json.dumps(json.loads(to_bytes(manifest()))).encode())


def test_a_key_given_twice() -> None:
    refused(to_bytes(manifest()).replace(b'"architecture"', b'"architecture": "GPT",\n  "architecture"', 1))


HOSTILE = [
    "../outside",
    "inner/../../outside",
    "inner/..",
    "..",
    "/etc/passwd",
    "//server/share",
    "back\\slash",
    "..\\outside",
    "C:\\outside",
    "C:outside",
    "./config.json",
    "inner//file",
    "inner/",
    "inner/./file",
    "",
    ".",
    "nul\x00byte",
    "new\nline",
    "delete\x7f",
    "manifest.json",
    "manifest.json/inner",
    "SHA256SUMS",
    "model.sig",
    "model.sig/inner",
    "Manifest.json",
    "sha256sums",
    "MODEL.SIG/inner",
    "SHA256ſums",
]


@pytest.mark.parametrize("path", HOSTILE)
def test_hostile_paths_of_files(path: str) -> None:
    refused(signed(lambda body: body["files"][0].update(path=path)))


@pytest.mark.parametrize("path", HOSTILE)
def test_hostile_paths_of_artifacts(path: str) -> None:
    refused(signed(lambda body: body["artifacts"][0]["files"][0].update(path=path)))


def test_a_path_given_twice() -> None:
    assert "twice" in refused(signed(lambda body: body["files"].append(body["files"][0])))


def test_a_path_given_in_two_places() -> None:
    assert "twice" in refused(signed(lambda body: body["files"][0].update(path="onnx/model.onnx")))


def test_its_own_name_is_not_called_a_duplicate() -> None:
    assert "manifest.json" in refused(signed(lambda body: body["files"][0].update(path="manifest.json"))).partition(": ")[2]


@pytest.mark.parametrize("name", ["name", "release"])
@pytest.mark.parametrize("value", [None, 3, ["x"]])
def test_other_types(name: str, value: object) -> None:
    assert name in refused(signed(lambda body: body.update({name: value})))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", "\x1b]0;owned\x07tiny"),
        ("name", "../tiny"),
        ("name", ""),
        ("name", "tiny\n"),
        ("release", "1.0"),
        ("release", "1.0.0+build"),
        ("release", "1.0.0\n"),
        ("release", "../1.0.0"),
    ],
)
def test_what_no_pipeline_could_have_named_it(name: str, value: str) -> None:
    message = refused(signed(lambda body: body.update({name: value})))
    assert "is no name and version of a release" in message
    assert message.isprintable()


def test_sizes_below_zero() -> None:
    """They would make the sum of the sizes small, by which a disk is asked for room."""
    for change in (
        lambda body: body["files"][0].update(size=-1),
        lambda body: body["artifacts"][0]["files"][0].update(size=-(2**40)),
        lambda body: body["source"]["files"][0].update(size=-1),
    ):
        assert "bytes, which no file has" in refused(signed(change))


@pytest.mark.parametrize("name", sorted(json.loads(to_bytes(manifest())).keys() - {"digest", "schema"}))
def test_a_missing_key(name: str) -> None:
    assert name in refused(signed(lambda body: body.pop(name)))


def test_another_schema() -> None:
    assert "schema" in refused(signed(lambda body: body.update(schema=2)))


def test_without_a_digest() -> None:
    body = json.loads(to_bytes(manifest()))
    del body["digest"]
    refused(canonical(body))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_it_holds_no_nan(value: float) -> None:
    artifact = replace(manifest().artifacts[0], runtime={"figure": value})
    with pytest.raises(ValueError, match="JSON"):
        to_bytes(replace(manifest(), artifacts=(artifact,)))


def test_a_nan_in_the_file() -> None:
    refused(to_bytes(manifest()).replace(b'"threads": 1', b'"threads": NaN'))


def test_it_says_when_it_was_changed() -> None:
    message = refused(to_bytes(manifest()).replace(b"BertModel", b"BertModem"))
    assert "changed since it was written" in message
    assert "build or fetch it again" in message


class TestDifferences:
    def test_none(self) -> None:
        assert differences({"a": "1"}, {"a": "1"}) == []

    def test_by_name(self) -> None:
        old = {"torch": "2.12", "task": "fill-mask", "gone": "x"}
        new = {"torch": "2.13", "task": "fill-mask", "added": "y"}
        assert differences(old, new) == ["added none → y", "gone x → none", "torch 2.12 → 2.13"]

    def test_hashes_are_short(self) -> None:
        assert differences({"data": A}, {"data": B}) == ["data aaaaaaaa… → bbbbbbbb…"]

    def test_long_values_that_are_no_hashes_stay_whole(self) -> None:
        assert differences({"cpu": "x" * 64}, {"cpu": "y"}) == [f"cpu {'x' * 64} → y"]

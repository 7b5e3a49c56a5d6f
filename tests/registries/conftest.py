"""Tiny hand-made releases: a manifest that is whole and a few small files, for tests to which the model does not matter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from compiler.hashing import canonical, hash_file
from compiler.manifest import MANIFEST, VALIDATION, Manifest, Source, from_bytes, to_bytes
from compiler.types import Artifact, File, Signature, Tensor

FILES = {
    "config.json": b'{"model_type": "bert"}\n',
    "tokenizer.json": b"{}\n",
    "onnx/model.onnx": b"onnx " * 2000,
    "torchscript/model.pt": b"torchscript " * 3000,
}


def make_release(
    folder: Path, files: Mapping[str, bytes] | None = None, *, name: str = "tiny", release: str = "1.0.0"
) -> Manifest:
    """Write a release into a new folder, as `read_release` and `verify_files` accept it. Files below onnx/, torchscript/ and
    openvino/ are that format's fp32 artifact; the others are the release's own."""
    for path, content in (FILES if files is None else files).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    formats = [format for format in ("torchscript", "onnx", "openvino") if (folder / format).is_dir()]
    check = {"output": "logits", "name": "cosine", "figure": 1.0, "limit": 0.999, "passed": True, "worst": "sample"}
    entries = [{"format": format, "precision": "fp32", "outputs": {}, "checks": [check]} for format in formats]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / VALIDATION).write_bytes(canonical({"schema": 1, "known": {}, "artifacts": entries}))
    found = [hash_file(folder, path) for path in sorted({*(FILES if files is None else files), VALIDATION})]
    of_format = {format: tuple(file for file in found if file.path.startswith(f"{format}/")) for format in formats}
    own = tuple(file for file in found if not file.path.startswith(tuple(f"{format}/" for format in formats)))
    manifest = manifest_of(own, of_format, name=name, release=release)
    (folder / MANIFEST).write_bytes(to_bytes(manifest))
    return from_bytes((folder / MANIFEST).read_bytes(), str(folder))


def manifest_of(
    files: tuple[File, ...],
    artifacts: Mapping[str, tuple[File, ...]] | None = None,
    *,
    name: str = "tiny",
    release: str = "1.0.0",
) -> Manifest:
    """A manifest that names these files, whether they are sound or not."""
    return Manifest(
        name=name,
        release=release,
        task="feature-extraction",
        architecture="BertModel",
        source=Source("path:checkpoint", None, "apache-2.0", (File("model.safetensors", "0" * 64, 4),)),
        signature=Signature(
            (Tensor("input_ids", "int64", ("batch", "sequence")),),
            (Tensor("last_hidden_state", "float32", ("batch", "sequence", 32)),),
        ),
        positions=512,
        left_out=(),
        artifacts=tuple(
            Artifact(format, "fp32", inside, {}, "0" * 64, fast_on=("avx2",)) for format, inside in (artifacts or {}).items()
        ),
        files=files,
        libraries={"torch": "2.13.0"},
        python="3.11.2",
        compiler="0.1.0",
        steps={},
        key="0" * 64,
    )

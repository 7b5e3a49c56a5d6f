"""Where checkpoints come from: what is taken of a folder, a package, a GGUF file or a hub, and all that is refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compiler.config import ModelSpec
from compiler.errors import SourceError
from compiler.sources import check_tokenizer, read_config, resolve
from compiler.types import Snapshot
from tests.conftest import Command, error_line, write_pipeline
from tests.hub import Hub

CONFIG = b'{"architectures": ["BertModel"]}'
BASIC = {"config.json": CONFIG, "model.safetensors": b"weights", "tokenizer.json": b"{}"}
INDEX = "model.safetensors.index.json"
TOKEN = "hf_SecretSecretSecretSecret"  # noqa: S105


def lay(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def index(*shards: Any) -> bytes:
    return json.dumps({"weight_map": {f"layer.{number}": shard for number, shard in enumerate(shards)}}).encode()


def spec(source: str, **changes: Any) -> ModelSpec:
    return ModelSpec.model_validate(
        {"name": "a", "release": "1.0.0", "source": source, "targets": {"onnx": ["fp32"]}, **changes}
    )


def found(folder: Path, source: str = "path:c", **changes: Any) -> Snapshot:
    return resolve(spec(source, **changes), folder)


def refusal(folder: Path, source: str = "path:c", **changes: Any) -> str:
    """The one line that a source is refused with."""
    with pytest.raises(SourceError) as caught:
        found(folder, source, **changes)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def names(snapshot: Snapshot) -> list[str]:
    return [file.path for file in snapshot.files]


# A folder.


def test_folder(tmp_path: Path) -> None:
    lay(tmp_path / "c", BASIC)
    snapshot = found(tmp_path)
    assert snapshot.uri == "path:c"
    assert snapshot.revision is None
    assert [file.path for file in snapshot.weights] == ["model.safetensors"]
    assert snapshot.weights[0].sha256 == hashlib.sha256(b"weights").hexdigest()
    assert snapshot.weights[0].size == 7
    assert [file.path for file in snapshot.support] == ["config.json", "tokenizer.json"]
    assert read_config(snapshot) == {"architectures": ["BertModel"]}


def test_absolute_path_does_not_tell_of_the_machine(tmp_path: Path) -> None:
    lay(tmp_path / "c", BASIC)
    snapshot = found(tmp_path / "elsewhere", f"path:{tmp_path / 'c'}")
    assert snapshot.uri == "path:c"
    assert names(snapshot) == sorted(BASIC)


@pytest.mark.parametrize(
    "source", ["path:nowhere", "path:c/nowhere", "path:c/config.json/x", "path:" + "n" * 300, "path:" + "n/" * 3000]
)
def test_nothing_there(tmp_path: Path, source: str) -> None:
    lay(tmp_path / "c", BASIC)
    assert "no such file or folder" in refusal(tmp_path, source)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pytorch_model.bin"])
def test_file_that_is_no_gguf(tmp_path: Path, name: str) -> None:
    lay(tmp_path / "c", {**BASIC, "pytorch_model.bin": b""})
    assert "folder, or one GGUF file" in refusal(tmp_path, f"path:c/{name}")


def test_empty_folder(tmp_path: Path) -> None:
    lay(tmp_path / "c", {})
    assert "not a checkpoint" in refusal(tmp_path)


def test_config_without_weights(tmp_path: Path) -> None:
    lay(tmp_path / "c", {"config.json": CONFIG, "tokenizer.json": b"{}"})
    message = refusal(tmp_path)
    assert "no weights" in message
    assert "model.safetensors" in message


def test_weights_without_config(tmp_path: Path) -> None:
    lay(tmp_path / "c", {"model.safetensors": b""})
    assert "no config.json" in refusal(tmp_path)


@pytest.mark.parametrize("config", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_config_is_not_json(tmp_path: Path, config: bytes) -> None:
    lay(tmp_path / "c", {**BASIC, "config.json": config})
    with pytest.raises(SourceError, match=r"^config\.json: not readable as JSON.*; fetch the checkpoint again$"):
        read_config(found(tmp_path))


@pytest.mark.parametrize("config", [b"[]", b"3", b"null"])
def test_config_is_not_an_object(tmp_path: Path, config: bytes) -> None:
    lay(tmp_path / "c", {**BASIC, "config.json": config})
    with pytest.raises(SourceError, match=r"^config\.json: not a JSON object"):
        read_config(found(tmp_path))


def test_tokenizer_is_looked_for(tmp_path: Path) -> None:
    lay(tmp_path / "c", {name: content for name, content in BASIC.items() if name != "tokenizer.json"})
    snapshot = found(tmp_path)
    with pytest.raises(SourceError, match="no tokenizer beside the weights"):
        check_tokenizer(snapshot)
    (tmp_path / "c/vocab.txt").write_text("a")
    check_tokenizer(found(tmp_path))


# What is taken, and what is not.

TRAVELS = ["README.md", "LICENSE", "LICENSE.txt", "NOTICE", "licence", "vocab.txt", "spiece.model", "chat_template.jinja",
           "special_tokens_map.json", "generation_config.json", "merges.txt", "COPYING"]  # fmt: skip
STAYS = [
    "onnx/model.onnx", "onnx/config.json", "openvino/openvino_model.xml", "model.onnx", "tf_model.h5", "flax_model.msgpack",
    "rust_model.ot", "optimizer.pt", "training_args.bin", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "data.pkl",
    ".gitattributes", ".git/config", ".git/HEAD", ".cache/x.json", ".hidden.json", "modeling_own.py", "run.sh",
    "manifest.json", "validation.json", "export.json", "trainer_state.json", "bom.cdx.json", "provenance.json",
    "other.safetensors", "1_Pooling/config.json", "weights.gguf",
    "adapter_model.safetensors", "pytorch_model.bin.index.json", "LICENSE/x", "deep/er/config.json", "image.png",
]  # fmt: skip


def test_what_belongs_to_a_checkpoint_travels(tmp_path: Path) -> None:
    lay(tmp_path / "c", {**BASIC, **dict.fromkeys(TRAVELS, b"x")})
    assert names(found(tmp_path)) == sorted([*BASIC, *TRAVELS])


@pytest.mark.parametrize("name", STAYS)
def test_what_does_not_belong_stays(tmp_path: Path, name: str) -> None:
    lay(tmp_path / "c", {**BASIC, name: b"x"})
    assert names(found(tmp_path)) == sorted(BASIC)


def test_code_travels_only_when_it_is_trusted(tmp_path: Path) -> None:
    lay(tmp_path / "c", {**BASIC, "modeling_own.py": b"", "sub/inner.py": b""})
    assert names(found(tmp_path)) == sorted(BASIC)
    assert names(found(tmp_path, trust_remote_code=True)) == sorted([*BASIC, "modeling_own.py"])


def test_files_that_are_not_read_may_be_anything(tmp_path: Path) -> None:
    folder = lay(tmp_path / "c", BASIC)
    (folder / "gone.onnx").symlink_to("nowhere")
    (folder / "out.bin").symlink_to("/etc/hostname")
    os.mkfifo(folder / "pipe")
    assert names(found(tmp_path)) == sorted(BASIC)


# A pickle.


def test_pickle_needs_permission(tmp_path: Path) -> None:
    lay(tmp_path / "c", {"config.json": CONFIG, "pytorch_model.bin": b"pickle"})
    message = refusal(tmp_path)
    assert "pytorch_model.bin" in message
    assert "allow_pickle: true" in message
    assert [file.path for file in found(tmp_path, allow_pickle=True).weights] == ["pytorch_model.bin"]


def test_sharded_pickle(tmp_path: Path) -> None:
    shards = {"pytorch_model.bin.index.json": index("a.bin", "b.bin"), "a.bin": b"1", "b.bin": b"2"}
    lay(tmp_path / "c", {"config.json": CONFIG, **shards})
    assert "pickle" in refusal(tmp_path)
    assert {file.path for file in found(tmp_path, allow_pickle=True).weights} == set(shards)


@pytest.mark.parametrize("allow_pickle", [True, False])
def test_safetensors_are_taken_before_a_pickle(tmp_path: Path, allow_pickle: bool) -> None:
    lay(tmp_path / "c", {**BASIC, "pytorch_model.bin": b"pickle"})
    assert names(found(tmp_path, allow_pickle=allow_pickle)) == sorted(BASIC)


# Shards.


def test_shards(tmp_path: Path) -> None:
    lay(tmp_path / "c", {"config.json": CONFIG, INDEX: index("b.safetensors", "a.safetensors", "b.safetensors"),
                         "a.safetensors": b"1", "b.safetensors": b"2", "c.safetensors": b"3"})  # fmt: skip
    assert [file.path for file in found(tmp_path).weights] == [INDEX, "a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    ("shard", "words"),
    [
        ("gone.safetensors", "is missing; fetch"),
        ("../x.safetensors", "leads out"),
        ("..", "leads out"),
        (".", "leads out"),
        ("", "leads out"),
        ("/etc/x.safetensors", "leads out"),
        ("sub/x.safetensors", "leads out"),
        ("sub\\x.safetensors", "leads out"),
        ("..\\x.safetensors", "leads out"),
        ("a.safetensors/", "leads out"),
        ("config.json", "not a safetensors file"),
        ("evil.bin", "not a safetensors file"),
        ("new\nline.safetensors", "missing"),
        ("bell\x1b[2J.safetensors", "missing"),
        (7, "missing"),
        (None, "missing"),
        (["a.safetensors"], "missing"),
    ],
)
def test_bad_shard(tmp_path: Path, shard: Any, words: str) -> None:
    lay(tmp_path, {"x.safetensors": b"outside"})
    files = {
        "config.json": CONFIG,
        "a.safetensors": b"",
        "evil.bin": b"",
        "sub/x.safetensors": b"",
        INDEX: index("a.safetensors", shard),
    }
    lay(tmp_path / "c", files)
    message = refusal(tmp_path)
    assert message.startswith(INDEX)
    assert words in message
    assert message.isprintable(), repr(message)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"NaN x"])
def test_index_is_not_json(tmp_path: Path, content: bytes) -> None:
    lay(tmp_path / "c", {"config.json": CONFIG, INDEX: content})
    assert re.match(rf"{re.escape(INDEX)}: not readable as JSON", refusal(tmp_path))


@pytest.mark.parametrize(
    "content", [b"{}", b"[]", b"3", b'{"weight_map": {}}', b'{"weight_map": ["a"]}', b'{"weight_map": null}']
)
def test_index_without_a_map(tmp_path: Path, content: bytes) -> None:
    lay(tmp_path / "c", {"config.json": CONFIG, INDEX: content})
    assert "no weight_map" in refusal(tmp_path)


# Links and things that are no files.


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_link_out_of_the_folder(tmp_path: Path, name: str) -> None:
    folder = lay(tmp_path / "c", BASIC)
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to("../outside")
    message = refusal(tmp_path)
    assert message.startswith(f"{name}: ")
    assert "leads out" in message


def test_shard_that_is_a_link_out_of_the_folder(tmp_path: Path) -> None:
    folder = lay(tmp_path / "c", {"config.json": CONFIG, INDEX: index("a.safetensors")})
    lay(tmp_path, {"outside": b""})
    (folder / "a.safetensors").symlink_to(tmp_path / "outside")
    assert "a.safetensors: a link that leads out" in refusal(tmp_path)


def test_index_that_is_a_link_out_of_the_folder_is_not_opened(tmp_path: Path) -> None:
    folder = lay(tmp_path / "c", {"config.json": CONFIG})
    lay(tmp_path, {"outside": b"not json"})
    (folder / INDEX).symlink_to(tmp_path / "outside")
    assert "leads out" in refusal(tmp_path)


def test_link_inside_the_folder_is_fine(tmp_path: Path) -> None:
    folder = lay(tmp_path / "c", {**BASIC, "real/weights": b"linked"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("real/weights")
    assert found(tmp_path).weights[0].sha256 == hashlib.sha256(b"linked").hexdigest()


def test_folder_that_is_itself_a_link_is_fine(tmp_path: Path) -> None:
    lay(tmp_path / "real", BASIC)
    (tmp_path / "c").symlink_to("real")
    assert names(found(tmp_path)) == sorted(BASIC)


@pytest.mark.parametrize("target", ["nowhere", "model.safetensors"])
def test_link_that_leads_nowhere(tmp_path: Path, target: str) -> None:
    folder = lay(tmp_path / "c", BASIC)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(target)
    assert "nowhere" in refusal(tmp_path)


def test_subfolder_that_is_a_link_out(tmp_path: Path) -> None:
    modules = b'[{"path": "1_Pooling"}]'
    folder = lay(tmp_path / "c", {**BASIC, "modules.json": modules})
    lay(tmp_path / "outside", {"config.json": b"{}"})
    (folder / "1_Pooling").symlink_to("../outside")
    assert "leads out" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "README.md"])
def test_pipe_in_place_of_a_file(tmp_path: Path, name: str) -> None:
    folder = lay(tmp_path / "c", {**BASIC, "README.md": b""})
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert refusal(tmp_path).startswith(f"{name}: not a regular file")


def test_pipe_in_place_of_a_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "c")
    os.mkfifo(tmp_path / "x.gguf")
    for source in ("path:c", "path:x.gguf"):
        assert "folder, or one GGUF file" in refusal(tmp_path, source)


@pytest.mark.parametrize(("name", "words"), [("model.safetensors", "no weights"), ("config.json", "no config.json")])
def test_folder_in_place_of_a_file(tmp_path: Path, name: str, words: str) -> None:
    folder = lay(tmp_path / "c", BASIC)
    (folder / name).unlink()
    (folder / name).mkdir()
    assert words in refusal(tmp_path)


def hub_cache(folder: Path) -> Path:
    """A snapshot as the hub's own cache lays it out."""
    root = folder / "models--o--n"
    snapshot = root / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for name, content in BASIC.items():
        blob = hashlib.sha256(content).hexdigest()
        lay(root / "blobs", {blob: content})
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    return snapshot


def test_links_of_a_hub_cache_are_fine(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    assert names(found(tmp_path, f"path:{snapshot}")) == sorted(BASIC)


def test_links_out_of_a_hub_cache_are_not(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    lay(tmp_path, {"outside": b"x"})
    (snapshot / "vocab.txt").symlink_to("../../../outside")
    assert "vocab.txt: a link that leads out" in refusal(tmp_path, f"path:{snapshot}")


# Pins.


def test_pin_that_is_right(tmp_path: Path) -> None:
    lay(tmp_path / "c", BASIC)
    assert found(tmp_path, sha256={"model.safetensors": hashlib.sha256(b"weights").hexdigest()})


def test_pin_that_is_wrong(tmp_path: Path) -> None:
    lay(tmp_path / "c", BASIC)
    message = refusal(tmp_path, sha256={"model.safetensors": "0" * 64})
    assert "model.safetensors" in message
    assert hashlib.sha256(b"weights").hexdigest()[:12] in message
    assert "0" * 12 in message
    assert "fetch" in message


@pytest.mark.parametrize("name", ["gone.safetensors", "model.onnx", "../c/config.json"])
def test_pin_of_a_file_that_is_not_read(tmp_path: Path, name: str) -> None:
    lay(tmp_path / "c", {**BASIC, "model.onnx": b""})
    assert f"{name} is pinned" in refusal(tmp_path, sha256={name: "0" * 64})


# A GGUF.


@pytest.mark.parametrize("source", ["path:c/m.gguf", "path:c"])
def test_gguf(tmp_path: Path, source: str) -> None:
    lay(tmp_path / "c", {"m.gguf": b"GGUF"})
    snapshot = found(tmp_path, source)
    assert names(snapshot) == ["m.gguf"]
    assert read_config(snapshot) == {}


def test_gguf_that_is_named_is_all_that_is_taken(tmp_path: Path) -> None:
    lay(tmp_path / "c", {**BASIC, "m.gguf": b"GGUF", "n.gguf": b"GGUF"})
    assert names(found(tmp_path, "path:c/n.gguf")) == ["n.gguf"]


def test_several_ggufs(tmp_path: Path) -> None:
    lay(tmp_path / "c", {"m-q4.gguf": b"", "m-q8.gguf": b""})
    assert "2 GGUF files (m-q4.gguf, m-q8.gguf); name one" in refusal(tmp_path)


# sentence-transformers.


def test_files_of_modules_travel(tmp_path: Path) -> None:
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "3_Normalize"}]
    files = {"modules.json": json.dumps(modules).encode(), "1_Pooling/config.json": b"{}", "2_Dense/config.json": b"{}",
             "2_Dense/model.safetensors": b"w", "2_Dense/pytorch_model.bin": b"p", "4_Other/config.json": b"{}"}  # fmt: skip
    lay(tmp_path / "c", {**BASIC, **files})
    expected = sorted([*BASIC, "modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"])
    assert names(found(tmp_path, allow_pickle=True)) == expected


def test_module_with_only_a_pickle(tmp_path: Path) -> None:
    lay(tmp_path / "c", {**BASIC, "modules.json": b'[{"path": "2_Dense"}]', "2_Dense/pytorch_model.bin": b"p"})
    message = refusal(tmp_path)
    assert "2_Dense" in message
    assert "allow_pickle: true" in message
    assert "2_Dense/pytorch_model.bin" in names(found(tmp_path, allow_pickle=True))


@pytest.mark.parametrize("path", ["..", "../x", "a/../../x", "/etc", 3, ["a"]])
def test_module_outside(tmp_path: Path, path: Any) -> None:
    lay(tmp_path / "c", {**BASIC, "modules.json": json.dumps([{"path": path}]).encode()})
    assert refusal(tmp_path).startswith("modules.json: path ")


@pytest.mark.parametrize("path", ["1_Pooling/", "./1_Pooling", "1_Pooling"])
def test_module_path_is_written_in_several_ways(tmp_path: Path, path: str) -> None:
    lay(tmp_path / "c", {**BASIC, "modules.json": json.dumps([{"path": path}]).encode(), "1_Pooling/config.json": b"{}"})
    assert "1_Pooling/config.json" in names(found(tmp_path))


def test_module_named_twice_is_taken_once(tmp_path: Path) -> None:
    modules = b'[{"path": "1_P"}, {"path": "1_P"}]'
    lay(tmp_path / "c", {**BASIC, "modules.json": modules, "1_P/config.json": b"{}"})
    assert names(found(tmp_path)).count("1_P/config.json") == 1


def test_modules_are_not_json(tmp_path: Path) -> None:
    lay(tmp_path / "c", {**BASIC, "modules.json": b"["})
    assert refusal(tmp_path).startswith("modules.json: not readable as JSON")


# Licences.


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# Model\n", "apache-2.0"),
        ("---\r\nlicense: mit\r\n---\r\n# Model\r\n", "mit"),
        ("# Model\n", None),
        ("", None),
        ("# Model\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: mit\n", None),
        ("---\nlicense: [mit\n---\n", None),
        ("---\nlicense: 3\n---\n", None),
        ("---\nlicense: 2026-99-99\n---\n", None),
        ("---\nlicense: !!int ''\n---\n", None),
        ("---\nlicense: !!bool perhaps\n---\n", None),
        ("---\nlicense: !!timestamp x\n---\n", None),
        ("---\nlicense: !!python/object/apply:os.getcwd []\n---\n", None),
        ("---\nlicense: " + "[" * 5000 + "\n---\n", None),
        ("---\n{[a]: b}\n---\n", None),
        ("---\n- mit\n---\n", None),
        ("---\n---\n", None),
    ],
)
def test_licence_of_a_model_card(tmp_path: Path, card: str, licence: str | None) -> None:
    lay(tmp_path / "c", {**BASIC, "README.md": card.encode()})
    assert found(tmp_path).licence == licence


def test_licence_of_a_card_that_is_no_text(tmp_path: Path) -> None:
    lay(tmp_path / "c", {**BASIC, "README.md": b"---\nlicense: \xff\n---\n"})
    assert found(tmp_path).licence is None


# A package.


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An installed package that must not be imported."""
    name = "weights_of_a_test"
    lay(tmp_path / "site" / name, {"__init__.py": b"raise SystemExit('imported')"})
    lay(tmp_path / "site" / name / "model", BASIC)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield name
    assert name not in sys.modules


def test_package_is_found_and_not_imported(package: str, tmp_path: Path) -> None:
    snapshot = found(tmp_path, f"package:{package}/model")
    assert snapshot.uri == f"package:{package}/model"
    assert names(snapshot) == sorted(BASIC)


def test_package_is_itself_the_folder(package: str, tmp_path: Path) -> None:
    lay(tmp_path / "site" / package, BASIC)
    assert names(found(tmp_path, f"package:{package}")) == sorted(BASIC)


def test_gguf_in_a_package(package: str, tmp_path: Path) -> None:
    lay(tmp_path / "site" / package, {"m.gguf": b"GGUF"})
    assert names(found(tmp_path, f"package:{package}/m.gguf")) == ["m.gguf"]


def test_package_without_that_folder(package: str, tmp_path: Path) -> None:
    assert "no folder 'nowhere'" in refusal(tmp_path, f"package:{package}/nowhere")


def test_package_that_is_not_installed(tmp_path: Path) -> None:
    assert "not installed here; install it" in refusal(tmp_path, "package:no_such_package/model")


@pytest.mark.parametrize("inner", ["../..", "model/../../..", "/etc", "//etc"])
def test_path_out_of_a_package(package: str, tmp_path: Path, inner: str) -> None:
    assert refusal(tmp_path, f"package:{package}/{inner}").startswith("package:")


@pytest.mark.parametrize("name", ["a.b", "a-b", ".", "..", "a b", "1a", "sys", "json.decoder", "__main__", "os"])
def test_name_that_is_no_package_of_weights(tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path, f"package:{name}/model").startswith("package:")


def test_main_module_is_no_package(command: Command, tmp_path: Path) -> None:
    """As the console script runs, where `__main__` has no spec."""
    write_pipeline(tmp_path, "package:__main__/model")
    script = "import sys; from compiler.cli import main; main(['plan'])"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    error_line(result)


# A hub.

SCRIPT = """
import json, sys
from pathlib import Path
from compiler.config import read
from compiler.errors import SourceError
from compiler.sources import resolve
try:
    found = resolve(read(Path("pipeline.yaml")).models[0], Path())
except SourceError as error:
    print(json.dumps({"error": str(error)}))
else:
    print(json.dumps({"uri": found.uri, "revision": found.revision, "files": [file.path for file in found.files]}))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as running:
        yield running


class Asked:
    """A process that resolves one source from a hub; its variables are read once, when the hub's library is imported."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.hub = hub
        self.folder = folder

    def __call__(
        self, source: str, token: str | None = None, environment: dict[str, str] | None = None, **changes: Any
    ) -> Any:
        write_pipeline(self.folder, source, **changes)
        variables = {**os.environ, **self.hub.environment(self.folder, token), **(environment or {})}
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            cwd=self.folder,
            env=variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert TOKEN not in result.stdout + result.stderr
        answer = json.loads(result.stdout)
        assert len(answer.get("error", "").splitlines()) <= 1, answer
        return answer


@pytest.fixture
def ask(hub: Hub, tmp_path: Path) -> Asked:
    return Asked(hub, tmp_path)


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/1", None])
def test_branch_becomes_its_commit(ask: Asked, revision: str | None) -> None:
    commit = ask.hub.add("o/n", BASIC, branches=["main", "v1.0", "refs/pr/1"])
    answer = ask("hf:o/n" + (f"@{revision}" if revision else ""))
    assert answer == {"uri": f"hf:o/n@{commit}", "revision": commit, "files": sorted(BASIC)}


def test_revision_has_a_key_of_its_own(ask: Asked) -> None:
    old = ask.hub.add("o/n", BASIC, branches=["main", "old"])
    ask.hub.add("o/n", {**BASIC, "model.safetensors": b"new"})
    assert ask("hf:o/n", revision="old")["uri"] == f"hf:o/n@{old}"


def test_repository_without_an_owner(ask: Asked) -> None:
    commit = ask.hub.add("bert-base", BASIC)
    assert ask("hf:bert-base")["uri"] == f"hf:bert-base@{commit}"


def test_only_what_is_read_is_fetched(ask: Asked) -> None:
    ask.hub.add("o/n", {**BASIC, **dict.fromkeys(STAYS, b"x"), "README.md": b"card"})
    assert ask("hf:o/n")["files"] == sorted([*BASIC, "README.md"])
    assert ask.hub.fetched() == {*BASIC, "README.md"}
    assert not [request.path for request in ask.hub.requests if re.search(r"onnx|\.bin|\.py|\.git|\.h5", request.path)]


def test_pickle_on_a_hub_is_not_even_fetched(ask: Asked) -> None:
    ask.hub.add("o/n", {"config.json": CONFIG, "pytorch_model.bin": b"pickle"})
    assert "allow_pickle: true" in ask("hf:o/n")["error"]
    assert ask.hub.fetched() == set()
    assert "pytorch_model.bin" in ask("hf:o/n", allow_pickle=True)["files"]


def test_shards_on_a_hub(ask: Asked) -> None:
    shards = {INDEX: index("a.safetensors", "b.safetensors"), "a.safetensors": b"1", "b.safetensors": b"2"}
    ask.hub.add("o/n", {"config.json": CONFIG, **shards, "c.safetensors": b"3"})
    assert ask("hf:o/n")["files"] == sorted(["config.json", *shards])
    assert ask.hub.fetched() == {"config.json", *shards}


def test_shard_that_leads_out_on_a_hub(ask: Asked) -> None:
    ask.hub.add("o/n", {"config.json": CONFIG, INDEX: index("../../../x.safetensors")})
    assert "leads out" in ask("hf:o/n")["error"]


def test_modules_on_a_hub(ask: Asked) -> None:
    files = {**BASIC, "modules.json": b'[{"path": "1_Pooling"}]', "1_Pooling/config.json": b"{}", "2_Other/config.json": b"{}"}
    ask.hub.add("o/n", files)
    assert ask("hf:o/n")["files"] == sorted(set(files) - {"2_Other/config.json"})


def test_gguf_on_a_hub(ask: Asked) -> None:
    ask.hub.add("o/n", {"m.gguf": b"GGUF", "README.md": b""})
    assert ask("hf:o/n")["files"] == ["README.md", "m.gguf"]


def test_pin_of_a_file_on_a_hub(ask: Asked) -> None:
    ask.hub.add("o/n", BASIC)
    assert "pinned" in ask("hf:o/n", sha256={"model.safetensors": "0" * 64})["error"]


def test_no_such_repository(ask: Asked) -> None:
    """Who is not logged in is answered with 401 for it; the message must not send them after a token alone."""
    for token in (None, TOKEN):
        error = ask("hf:o/nowhere", token=token)["error"]
        assert error.startswith("hf:o/nowhere@main: ")
        assert "no such repository" in error
        assert "HF_TOKEN" in error


def test_no_such_revision(ask: Asked) -> None:
    ask.hub.add("o/n", BASIC)
    assert "no such repository or revision" in ask("hf:o/n@nowhere")["error"]


def test_gated_repository(ask: Asked) -> None:
    ask.hub.add("o/n", BASIC, gated=True)
    assert "HF_TOKEN" in ask("hf:o/n")["error"]
    assert ask("hf:o/n", token=TOKEN)["files"] == sorted(BASIC)
    assert {request.token for request in ask.hub.requests} == {None, TOKEN}


@pytest.mark.parametrize(("status", "words"), [(401, "HF_TOKEN"), (403, "HF_TOKEN"), (500, "500"), (503, "503"), (429, "429")])
def test_hub_answers_an_error(ask: Asked, status: int, words: str) -> None:
    ask.hub.status = status
    error = ask("hf:o/n", token=TOKEN)["error"]
    assert error.startswith("hf:o/n@main: ")
    assert words in error


@pytest.mark.parametrize("body", [b"<html>log in to the network</html>", b"{}", b"[]", b"null", b'{"id": "o/n"}'])
def test_something_else_answers_in_its_place(ask: Asked, body: bytes) -> None:
    ask.hub.body = body
    assert ask("hf:o/n")["error"].startswith("hf:o/n")


def test_hub_is_down(ask: Asked) -> None:
    ask.hub.stop()
    error = ask("hf:o/n", token=TOKEN)["error"]
    assert "could not be reached" in error
    assert "HF_ENDPOINT" in error


@pytest.mark.parametrize("name", ["o/a--b", "o/a..b", "o/n.git", "o/" + "n" * 97])
def test_name_that_no_repository_has_is_not_the_networks_fault(ask: Asked, name: str) -> None:
    error = ask(f"hf:{name}")["error"]
    assert error.startswith(f"hf:{name}@main: ")
    assert "reached" not in error
    assert "network" not in error


def test_commit_is_found_without_a_hub_once_it_was_fetched(ask: Asked) -> None:
    commit = ask.hub.add("o/n", {**BASIC, "model.onnx": b"x"})
    online = ask(f"hf:o/n@{commit}")
    assert "error" not in online
    ask.hub.status = 500
    assert ask(f"hf:o/n@{commit}") == online
    ask.hub.stop()
    assert ask(f"hf:o/n@{commit}") == online
    assert ask("hf:o/n", revision=commit) == online
    assert ask(f"hf:o/n@{commit}", environment={"HF_HUB_OFFLINE": "1"}) == online
    assert "could not be reached" in ask("hf:o/n@main")["error"]


def test_commit_that_was_never_fetched_needs_a_hub(ask: Asked) -> None:
    commit = ask.hub.add("o/n", BASIC)
    ask.hub.stop()
    assert "could not be reached" in ask(f"hf:o/n@{commit}")["error"]


@pytest.mark.parametrize("name", sorted(BASIC))
def test_commit_that_was_fetched_in_part_is_not_taken_for_whole(ask: Asked, name: str) -> None:
    commit = ask.hub.add("o/n", BASIC)
    ask(f"hf:o/n@{commit}")
    (snapshot,) = ask.folder.glob(f"hf/hub/models--o--n/snapshots/{commit}")
    (snapshot / name).unlink()
    ask.hub.stop()
    assert "could not be reached" in ask(f"hf:o/n@{commit}")["error"]


def test_commit_that_another_tool_fetched_is_not_taken_for_whole(ask: Asked) -> None:
    """Only a build that fetched every file says so; an interrupted one leaves no note."""
    commit = ask.hub.add("o/n", BASIC)
    ask(f"hf:o/n@{commit}")
    (note,) = ask.folder.glob("hf/hub/models--o--n/compile-*.json")
    note.unlink()
    ask.hub.stop()
    assert "could not be reached" in ask(f"hf:o/n@{commit}")["error"]


def test_module_that_is_not_there(tmp_path: Path) -> None:
    modules = [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    lay(tmp_path / "c", {**BASIC, "modules.json": json.dumps(modules).encode()})
    assert "module '1_Pooling' is not in the checkpoint" in refusal(tmp_path)


def test_commit_that_a_hub_has_no_more_is_not_taken_from_the_cache(ask: Asked) -> None:
    commit = ask.hub.add("o/n", BASIC)
    ask(f"hf:o/n@{commit}")
    ask.hub.repositories.clear()
    assert "hf:o/n" in ask(f"hf:o/n@{commit}")["error"]


@pytest.mark.parametrize("status", [None, 401, 500])
def test_token_is_sent_and_never_shown(command: Command, hub: Hub, tmp_path: Path, status: int | None) -> None:
    hub.add("o/n", BASIC)
    hub.status = status
    write_pipeline(tmp_path, "hf:o/n")
    result = command("plan", environment=hub.environment(tmp_path, TOKEN), cache=tmp_path / "cache")
    assert {request.token for request in hub.requests} == {TOKEN}
    assert TOKEN not in result.stdout + result.stderr
    if status is None:
        assert result.returncode == 0, result.stderr
        assert "export" in result.stdout
    else:
        error_line(result)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path

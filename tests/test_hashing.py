"""Canonical JSON and digests, hashes of files and folders, and copies that hash what they copy."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.hashing import CHUNK, canonical, copy, digest, file_sha256, hash_file, hash_folder, list_files
from compiler.types import File


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_canonical_form() -> None:
    assert canonical({"b": [1, 2.5], "a": {"ü": None}}) == (
        b'{\n  "a": {\n    "\xc3\xbc": null\n  },\n  "b": [\n    1,\n    2.5\n  ]\n}\n'
    )


def test_the_order_of_keys_does_not_matter() -> None:
    assert canonical({"a": 1, "b": {"c": 2, "d": 3}}) == canonical({"b": {"d": 3, "c": 2}, "a": 1})


def test_tuples_are_lists() -> None:
    assert canonical((1, (2,))) == canonical([1, [2]])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_has_no_word_for(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical({"figure": [value]})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text('abü\n"\\ '),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abü", max_size=3), inner, max_size=3),
    max_leaves=10,
)


@given(JSON, JSON)
def test_equal_values_alone_have_equal_digests(one: Any, other: Any) -> None:
    assert (digest(one) == digest(other)) == (canonical(one) == canonical(other))
    assert digest(one) == sha256(canonical(one))


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1])
def test_copy_hashes_what_it_copies(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "source").write_bytes(content)
    assert copy(tmp_path / "source", tmp_path / "target") == File("target", sha256(content), size)
    assert (tmp_path / "target").read_bytes() == content


def test_copy_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"new")
    (tmp_path / "target").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        copy(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"old"


def test_copy_of_a_link_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"content")
    (tmp_path / "source").symlink_to(tmp_path / "blob")
    assert copy(tmp_path / "source", tmp_path / "target").sha256 == sha256(b"content")
    assert not (tmp_path / "target").is_symlink()


def test_hash_file(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_bytes(b"content")
    assert file_sha256(tmp_path / "inner" / "file") == sha256(b"content")
    assert hash_file(tmp_path, "inner/file") == File("inner/file", sha256(b"content"), 7)


def test_hash_folder_is_sorted_and_deep(tmp_path: Path) -> None:
    for name in ("b", "a/z", "a/b/c", ".hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty").mkdir()
    assert [file.path for file in hash_folder(tmp_path)] == [".hidden", "a/b/c", "a/z", "b"]
    assert all(file.sha256 == sha256(file.path.encode()) for file in hash_folder(tmp_path))


def test_list_files_sees_links_and_does_not_follow_them(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    for folder in (outside, root):
        folder.mkdir()
        (folder / "file").touch()
    (root / "to-file").symlink_to(outside / "file")
    (root / "to-folder").symlink_to(outside)
    (root / "to-nowhere").symlink_to(tmp_path / "nowhere")
    assert list_files(root) == ["file", "to-file", "to-folder", "to-nowhere"]


def test_list_files_of_what_is_not_there(tmp_path: Path) -> None:
    assert list_files(tmp_path / "missing") == []

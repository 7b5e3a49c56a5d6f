"""model.sig: OpenSSF's own command accepts it, and whatever is touched in a signed release, or in its signature, shows."""

from __future__ import annotations

import base64
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_public_key,
)
from hypothesis import given, settings, strategies

from compiler.errors import ReleaseError, SigningError, StageError
from compiler.hashing import hash_file, hash_folder, list_files
from compiler.manifest import MANIFEST, SIGNATURE, SUMS, from_bytes
from compiler.signing import sign, verify_signature
from compiler.stages.publish import push
from compiler.verify import read_release, record_benchmark, verify_files
from tests.conftest import Command, error_line, seal
from tests.stages.test_package import Parts
from tests.test_store import small_disk

PASSWORD = "correct horse"  # noqa: S105


def no_password() -> str:
    raise AssertionError("asked for a password")


def write_key(folder: Path, name: str, key: object, password: str = "") -> Path:
    """Write a key as PEM, `name`.pem, and its public half, `name`.pub."""
    encryption = BestAvailableEncryption(password.encode()) if password else NoEncryption()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)  # type: ignore[attr-defined]
    (folder / f"{name}.pem").write_bytes(private)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined]
    (folder / f"{name}.pub").write_bytes(public)
    return folder / f"{name}.pem"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    write_key(folder, "ours", ec.generate_private_key(ec.SECP256R1()))
    write_key(folder, "theirs", ec.generate_private_key(ec.SECP256R1()))
    write_key(folder, "large", ec.generate_private_key(ec.SECP521R1()))
    write_key(folder, "closed", ec.generate_private_key(ec.SECP384R1()), PASSWORD)
    write_key(folder, "closed bitcoin", ec.generate_private_key(ec.SECP256K1()), PASSWORD)
    write_key(folder, "closed rsa", rsa.generate_private_key(65537, 2048), PASSWORD)
    write_key(folder, "bitcoin", ec.generate_private_key(ec.SECP256K1()))
    write_key(folder, "rsa", rsa.generate_private_key(65537, 2048))
    write_key(folder, "ed25519", ed25519.Ed25519PrivateKey.generate())
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Path:
    """A signed release. Read only: `release` copies it."""
    parts = Parts(tmp_path_factory.mktemp("original"))
    parts.package()
    sign(parts.target, keys / "ours.pem", no_password)
    return parts.target


@pytest.fixture
def release(tmp_path: Path, original: Path) -> Path:
    shutil.copytree(original, tmp_path / "release")
    return tmp_path / "release"


@pytest.fixture(scope="module")
def touchable(tmp_path_factory: pytest.TempPathFactory, original: Path) -> Path:
    """A release for a test that puts back what it changed."""
    return shutil.copytree(original, tmp_path_factory.mktemp("touchable") / "release")


def verify(path: Path, key: Path) -> None:
    manifest, _ = read_release(path)
    verify_files(path, manifest)
    verify_signature(path, manifest, key)


def refused(path: Path, key: Path, *words: str) -> None:
    with pytest.raises(ReleaseError) as caught:
        verify(path, key)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def openssf(path: Path, key: Path) -> subprocess.CompletedProcess[str]:
    """What the library's own command says."""
    options = ["--signature", path / SIGNATURE, "--public_key", key, "--no-ignore-git-paths"]
    command = [sys.executable, "-m", "model_signing", "verify", "key", *options, path]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def numbers(path: Path, key: Path) -> tuple[int, int, int]:
    """The two numbers of a release's signature, and the order of its key's group."""
    bundle = json.loads((path / SIGNATURE).read_bytes())
    public: Any = load_pem_public_key(key.read_bytes())
    r, s = decode_dss_signature(base64.b64decode(bundle["dsseEnvelope"]["signatures"][0]["sig"]))
    return r, s, public.curve.group_order


def put(path: Path, r: int, s: int) -> None:
    """Give a release's signature other numbers."""
    bundle = json.loads((path / SIGNATURE).read_bytes())
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(encode_dss_signature(r, s)).decode()
    (path / SIGNATURE).write_text(json.dumps(bundle, separators=(",", ":")))


def forge(path: Path) -> None:
    """Make manifest.json and SHA256SUMS fit the files that are there, as who may write a release can."""
    manifest = from_bytes((path / MANIFEST).read_bytes(), "x")
    present = {name: hash_file(path, name) for name in list_files(path) if name not in (MANIFEST, SUMS, SIGNATURE)}
    artifacts = tuple(
        replace(artifact, files=tuple(present.pop(file.path) for file in artifact.files if file.path in present))
        for artifact in manifest.artifacts
    )
    seal(path, replace(manifest, artifacts=artifacts, files=tuple(sorted(present.values()))))
    read, _ = read_release(path)
    verify_files(path, read)  # nothing but the signature tells


class TestSigned:
    def test_it_verifies(self, release: Path, keys: Path) -> None:
        verify(release, keys / "ours.pub")

    def test_the_librarys_own_command_accepts_it(self, release: Path, keys: Path) -> None:
        accepted = openssf(release, keys / "ours.pub")
        assert accepted.returncode == 0, accepted.stderr
        assert "Verification succeeded" in accepted.stdout
        assert openssf(release, keys / "theirs.pub").returncode == 1
        (release / ".gitignore").write_bytes(b"")
        refusal = openssf(release, keys / "ours.pub")
        assert refusal.returncode == 1
        assert "Extra files found" in refusal.stderr

    def test_what_the_librarys_own_command_signed_is_accepted(self, release: Path, keys: Path) -> None:
        """As with a key in a hardware module, which that command knows."""
        options = ["--private_key", keys / "theirs.pem", "--signature", release / SIGNATURE]
        command = [sys.executable, "-m", "model_signing", "sign", "key", *options, release]
        subprocess.run(list(map(str, command)), capture_output=True, check=True)
        r, s, order = numbers(release, keys / "theirs.pub")
        put(release, r, min(s, order - s))  # as half of what it makes is
        verify(release, keys / "theirs.pub")

    @pytest.mark.parametrize("name", ["ours", "closed", "large"])
    def test_it_has_one_form(self, release: Path, keys: Path, name: str) -> None:
        """Whoever has a signature can write another with the same key, which the library takes."""
        for _ in range(5):  # of which the library makes each form
            sign(release, keys / f"{name}.pem", lambda: PASSWORD)
            verify(release, keys / f"{name}.pub")
        r, s, order = numbers(release, keys / f"{name}.pub")
        put(release, r, order - s)
        assert openssf(release, keys / f"{name}.pub").returncode == 0
        refused(release, keys / f"{name}.pub", "not in the form", "sign it again")
        put(release, r, s)
        verify(release, keys / f"{name}.pub")
        assert openssf(release, keys / f"{name}.pub").returncode == 0

    def test_it_covers_every_file_but_itself(self, release: Path) -> None:
        bundle = json.loads((release / SIGNATURE).read_bytes())
        statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        covered = {resource["name"]: resource["digest"] for resource in statement["predicate"]["resources"]}
        present = set(list_files(release)) - {SIGNATURE}
        assert {MANIFEST, SUMS} <= present
        assert covered == {name: hash_file(release, name).sha256 for name in present}

    def test_in_another_folder_and_through_a_link(self, release: Path, keys: Path) -> None:
        moved = release.rename(release.parent / "other name")
        verify(moved, keys / "ours.pub")
        (release.parent / "link").symlink_to(moved)
        verify(release.parent / "link", keys / "ours.pub")
        sign(release.parent / "link", keys / "theirs.pem", no_password)
        verify(moved, keys / "theirs.pub")
        assert not (moved / SIGNATURE).is_symlink()

    def test_signing_again_replaces(self, release: Path, keys: Path) -> None:
        sign(release, keys / "theirs.pem", no_password)
        verify(release, keys / "theirs.pub")
        refused(release, keys / "ours.pub", "another key")
        (release / SIGNATURE).write_bytes(b"")
        sign(release, keys / "ours.pem", no_password)
        verify(release, keys / "ours.pub")
        assert [path.name for path in release.parent.iterdir()] == ["release"]

    def test_without_its_key_nothing_of_it_is_believed(self, original: Path, release: Path) -> None:
        (release / SIGNATURE).write_bytes(b"anything")
        manifest, _ = read_release(release)
        verify_files(release, manifest)
        assert hash_folder(original) != hash_folder(release)

    def test_where_the_release_is_a_mount_point(self, release: Path, keys: Path, tmp_path: Path) -> None:
        """Whose parent may be another file system, or not be writable."""
        with small_disk(tmp_path / "disk", "1m") as disk:
            shutil.copytree(release, disk, dirs_exist_ok=True)
            sign(disk, keys / "theirs.pem", no_password)
            verify(disk, keys / "theirs.pub")
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            with pytest.raises(StageError) as caught:
                sign(disk, keys / "ours.pem", no_password)
            instead = "copy the release to where you can write, and sign it there"
            assert str(caught.value) == f"the signature: {disk}: cannot be written (Read-only file system); {instead}"

    def test_signing_that_was_killed(self, release: Path, keys: Path) -> None:
        """Between writing and renaming: it is said, and signing again removes it."""
        before = hash_folder(release)
        (release / f".{SIGNATURE}.new").write_bytes(b"half of it")
        refused(release, keys / "ours.pub", f".{SIGNATURE}.new is not in the manifest (sign", "run it again")
        sign(release, keys / "ours.pem", no_password)
        verify(release, keys / "ours.pub")
        assert [file.path for file in hash_folder(release)] == [file.path for file in before]

    def test_openssl_makes_the_keys(self, release: Path, tmp_path: Path) -> None:
        """As the README has it."""
        if shutil.which("openssl") is None:
            pytest.skip("openssl is not installed")
        commands = "openssl ecparam -name prime256v1 -genkey -noout -out key.pem; openssl ec -in key.pem -pubout -out key.pub"
        subprocess.run(["sh", "-ec", commands], cwd=tmp_path, check=True, capture_output=True)
        sign(release, tmp_path / "key.pem", no_password)
        verify(release, tmp_path / "key.pub")
        encrypt = "openssl ec -in key.pem -aes256 -passout pass:one -out closed.pem"
        subprocess.run(["sh", "-ec", encrypt], cwd=tmp_path, check=True, capture_output=True)
        sign(release, tmp_path / "closed.pem", lambda: "one")
        verify(release, tmp_path / "key.pub")
        with pytest.raises(SigningError, match="the password does not open it"):
            sign(release, tmp_path / "closed.pem", lambda: "two")


class TestTouched:
    def test_one_byte_of_each_file(self, release: Path, keys: Path) -> None:
        """Whether or not what else covers it is made to fit."""
        key = keys / "ours.pub"
        for name in list_files(release):
            content = (release / name).read_bytes()
            manifest, listed = (release / MANIFEST).read_bytes(), (release / SUMS).read_bytes()
            for position in {0, len(content) // 2, len(content) - 1} if content else ():
                changed = bytearray(content)
                changed[position] ^= 1
                (release / name).write_bytes(changed)
                refused(release, key, name)
                if name not in (MANIFEST, SUMS, SIGNATURE, "validation.json"):
                    forge(release)
                    refused(release, key, f"{SIGNATURE} is of other files")
                    (release / MANIFEST).write_bytes(manifest)
                    (release / SUMS).write_bytes(listed)
            (release / name).write_bytes(content)
        verify(release, key)

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(data=strategies.data())
    def test_any_byte_of_any_file(self, touchable: Path, keys: Path, data: strategies.DataObject) -> None:
        name = data.draw(strategies.sampled_from([name for name in list_files(touchable) if name != "empty.txt"]))
        content = (touchable / name).read_bytes()
        changed = bytearray(content)
        changed[data.draw(strategies.integers(0, len(content) - 1))] ^= data.draw(strategies.integers(1, 255))
        (touchable / name).write_bytes(changed)
        try:
            refused(touchable, keys / "ours.pub", name)
        finally:
            (touchable / name).write_bytes(content)

    def test_bytes_all_over_the_signature(self, release: Path, keys: Path) -> None:
        manifest, _ = read_release(release)
        content = (release / SIGNATURE).read_bytes()
        for position in (*range(300), *range(300, len(content) - 200, 5), *range(len(content) - 200, len(content))):
            changed = bytearray(content)
            changed[position] ^= 1 << position % 8
            (release / SIGNATURE).write_bytes(changed)
            with pytest.raises(ReleaseError):
                verify_signature(release, manifest, keys / "ours.pub")

    @pytest.mark.parametrize(
        "change",
        [
            lambda content: content + b"\n",
            lambda content: b" " + content,
            lambda content: content.replace(b'":"', b'": "', 1),
            lambda content: content[:-1],
            lambda content: b"",
            lambda content: b"{}",
            lambda content: b"[" * 100_000,
            lambda content: b"\xff",
            lambda content: content.replace(b'"keyid":""', b'"keyid":"x"'),
            lambda content: content.replace(b'"tlogEntries":[]', b'"tlogEntries":[],"tlogEntries":[]'),
            lambda content: content + b" " * (16 << 20),
        ],
        ids=range(11),
    )
    def test_another_form_of_the_signature(self, release: Path, keys: Path, change: Callable[[bytes], bytes]) -> None:
        (release / SIGNATURE).write_bytes(change((release / SIGNATURE).read_bytes()))
        refused(release, keys / "ours.pub", "not a signature, or was changed")

    def test_an_older_form_that_hides_the_key(self, release: Path, keys: Path, capfd: pytest.CaptureFixture[str]) -> None:
        """The library takes a signature without a key's fingerprint, with a warning on standard output."""
        bundle = json.loads((release / SIGNATURE).read_bytes())
        bundle["verificationMaterial"]["publicKey"]["hint"] = ""
        (release / SIGNATURE).write_text(json.dumps(bundle, separators=(",", ":")))
        refused(release, keys / "ours.pub", "another key")
        assert capfd.readouterr().out == ""

    @pytest.mark.parametrize("name", ["extra.txt", ".gitignore", ".gitattributes", ".git/config", ".github/x", "onnx/.git"])
    def test_a_file_too_many(self, release: Path, keys: Path, name: str) -> None:
        (release / name).parent.mkdir(exist_ok=True)
        (release / name).write_bytes(b"x")
        refused(release, keys / "ours.pub", f"{name} is not in the manifest")
        forge(release)
        refused(release, keys / "ours.pub", f"{SIGNATURE} is of other files", name)

    def test_a_file_removed_or_renamed(self, release: Path, keys: Path) -> None:
        (release / "empty.txt").rename(release / "void.txt")
        refused(release, keys / "ours.pub", "empty.txt is missing")
        forge(release)
        refused(release, keys / "ours.pub", "empty.txt", "void.txt")
        (release / "void.txt").unlink()
        refused(release, keys / "ours.pub", "void.txt is missing")
        forge(release)
        refused(release, keys / "ours.pub", "empty.txt")

    def test_a_link_in_a_files_place(self, release: Path, keys: Path, tmp_path: Path) -> None:
        for name in list_files(release):
            (release / name).rename(tmp_path / "moved")
            (release / name).symlink_to(tmp_path / "moved")
            refused(release, keys / "ours.pub", name, "a link")
            (tmp_path / "moved").rename(release / name)
        verify(release, keys / "ours.pub")

    def test_the_signature_of_another_release(self, release: Path, keys: Path, tmp_path: Path) -> None:
        other = Parts(tmp_path / "other", size=65)
        other.package()
        sign(other.target, keys / "ours.pem", no_password)
        shutil.copy(other.target / SIGNATURE, release / SIGNATURE)
        refused(release, keys / "ours.pub", f"{SIGNATURE} is of other files", "onnx/model.onnx")

    def test_a_statement_of_these_files_that_another_key_signed(self, release: Path, keys: Path, original: Path) -> None:
        """With the fingerprint of ours in it."""
        sign(release, keys / "theirs.pem", no_password)
        theirs, ours = (json.loads((path / SIGNATURE).read_bytes()) for path in (release, original))
        theirs["verificationMaterial"] = ours["verificationMaterial"]
        (release / SIGNATURE).write_text(json.dumps(theirs, separators=(",", ":")))
        refused(release, keys / "ours.pub", "was not made with")

    @pytest.mark.parametrize("name", [MANIFEST, SUMS, "config.json"])
    def test_a_signature_that_leaves_a_file_out(self, release: Path, keys: Path, name: str) -> None:
        """The library believes what the signed statement says is to be ignored."""
        library: Any = importlib.import_module("model_signing")
        hashing = library.hashing.Config().set_ignored_paths(paths=[SIGNATURE, name])
        config = library.signing.Config().use_elliptic_key_signer(private_key=keys / "ours.pem")
        config.set_hashing_config(hashing).sign(release, release / SIGNATURE)
        assert openssf(release, keys / "ours.pub").returncode == 0
        refused(release, keys / "ours.pub", f"{SIGNATURE} is of other files ({name})")

    def test_without_a_signature(self, release: Path, keys: Path) -> None:
        (release / SIGNATURE).unlink()
        refused(release, keys / "ours.pub", "is not signed")


class TestRefusals:
    @pytest.mark.parametrize(
        "name", ["rsa.pem", "ed25519.pem", "bitcoin.pem", "ours.pub", "closed bitcoin.pem", "closed rsa.pem"]
    )
    def test_keys_that_cannot_sign(self, release: Path, keys: Path, name: str) -> None:
        with pytest.raises(SigningError, match="is no EC private key") as caught:
            sign(release, keys / name, lambda: PASSWORD if "closed" in name else no_password())
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", ["rsa.pub", "ed25519.pub", "bitcoin.pub", "ours.pem", "closed.pem"])
    def test_keys_that_cannot_verify(self, release: Path, keys: Path, name: str) -> None:
        manifest, _ = read_release(release)
        with pytest.raises(SigningError, match="is no EC public key"):
            verify_signature(release, manifest, keys / name)

    def test_a_key_that_is_not_there(self, release: Path, keys: Path) -> None:
        manifest, _ = read_release(release)
        with pytest.raises(SigningError, match=r"nobody.pem: cannot be read \(.*\); give your private key"):
            sign(release, keys / "nobody.pem", no_password)
        with pytest.raises(SigningError, match=r"nobody.pub: cannot be read \(.*\); give the signer's public"):
            verify_signature(release, manifest, keys / "nobody.pub")
        with pytest.raises(SigningError, match="cannot be read"):
            sign(release, keys, no_password)

    def test_an_encrypted_key(self, release: Path, keys: Path) -> None:
        sign(release, keys / "closed.pem", lambda: PASSWORD)
        verify(release, keys / "closed.pub")
        before = (release / SIGNATURE).read_bytes()
        for wrong in ("other", ""):
            with pytest.raises(SigningError, match="the password does not open it") as caught:
                sign(release, keys / "closed.pem", lambda wrong=wrong: wrong)  # type: ignore[misc]
            assert PASSWORD not in str(caught.value)
        assert (release / SIGNATURE).read_bytes() == before

    def test_a_damaged_release_is_not_signed(self, release: Path, keys: Path) -> None:
        before = (release / SIGNATURE).read_bytes()
        (release / "config.json").write_bytes(b"{}")
        with pytest.raises(ReleaseError, match=r"config.json is changed"):
            sign(release, keys / "ours.pem", no_password)
        assert (release / SIGNATURE).read_bytes() == before

    def test_one_that_changes_while_it_is_signed(self, release: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import model_signing

        before = (release / SIGNATURE).read_bytes()
        hashing = model_signing.hashing.Config.hash

        def late(self: object, *arguments: object, **options: object) -> object:
            (release / "config.json").write_bytes(b"{}")
            return hashing(self, *arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(model_signing.hashing.Config, "hash", late)
        with pytest.raises(ReleaseError, match="changed while it was signed"):
            sign(release, keys / "ours.pem", no_password)
        assert (release / SIGNATURE).read_bytes() == before

    def test_a_signed_release_takes_no_benchmark(self, release: Path) -> None:
        before = hash_folder(release)
        with pytest.raises(ReleaseError, match="record first, then sign"):
            record_benchmark(release, {"rounds": 1})
        assert hash_folder(release) == before

    @pytest.mark.parametrize("beside", ["aliases", ".incoming"])
    def test_a_published_release_takes_nothing(self, release: Path, keys: Path, tmp_path: Path, beside: str) -> None:
        """Where `file://` keeps it; whoever is beside such a folder by chance is not meant."""
        (tmp_path / beside).mkdir()
        sign(release, keys / "ours.pem", no_password)
        published = release.rename(tmp_path / "1.0.0")
        (tmp_path / "link").symlink_to(published)
        before = hash_folder(published)
        for path in (published, tmp_path / "link"):
            for work in (
                lambda path=path: sign(path, keys / "ours.pem", no_password),
                lambda path=path: record_benchmark(path, {}),
            ):
                with pytest.raises(ReleaseError, match=r"is published .* before it is pushed"):
                    work()
        assert hash_folder(published) == before

    def test_what_a_push_has_made_is_such_a_place(self, release: Path, keys: Path, tmp_path: Path) -> None:
        url = (tmp_path / "registry").as_uri()
        push(release, url)
        with pytest.raises(ReleaseError, match="is published"):
            sign(tmp_path / "registry/1.0.0", keys / "ours.pem", no_password)
        sign(release, keys / "ours.pem", no_password)  # where it was built

    @pytest.mark.parametrize("name", ["model_signing", "OpenSSL", "cryptography"])
    def test_without_the_library(self, release: Path, keys: Path, name: str) -> None:
        script = (
            f"import sys; sys.modules[{name!r}] = None; from compiler.cli import main; "
            f"main(['verify', {str(release)!r}, '--key', {str(keys / 'ours.pub')!r}])"
        )
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert "pip install 'aot-model-compiler[sign]'" in error_line(result)


class TestCommands:
    def test_sign_verify_inspect(self, command: Command, release: Path, keys: Path) -> None:
        (release / SIGNATURE).unlink()
        assert "signed    no" in command("inspect", release).stdout
        assert "signed" not in command("verify", release).stdout
        assert "is not signed" in error_line(command("verify", release, "--key", keys / "ours.pub"))
        signed = command("sign", release, "--key", keys / "ours.pem")
        assert (signed.returncode, signed.stderr) == (0, "")
        assert signed.stdout == f"tiny 1.0.0: signed; {release / SIGNATURE}\n"
        assert "signed    yes" in command("inspect", release).stdout
        assert "was not checked: give --key" in command("verify", release).stdout
        checked = command("verify", release, "--key", keys / "ours.pub")
        assert (checked.returncode, checked.stderr) == (0, "")
        assert f"the signature is by {keys / 'ours.pub'} and covers every file" in checked.stdout
        answer = json.loads(command("verify", release, "--key", keys / "ours.pub", "--json").stdout)
        assert (answer["signed"], answer["signature_checked"]) == (True, True)
        assert "another key" in error_line(command("verify", release, "--key", keys / "theirs.pub"))

    def test_a_password_comes_from_the_environment(self, command: Command, release: Path, keys: Path) -> None:
        line = error_line(command("sign", release, "--key", keys / "closed.pem"))
        assert "is encrypted; put its password into COMPILE_SIGN_PASSWORD" in line
        key = ("sign", release, "--key", keys / "closed.pem", "--json")
        signed = command(*key, environment={"COMPILE_SIGN_PASSWORD": PASSWORD})
        assert json.loads(signed.stdout) == {"release": str(release), "signature": str(release / SIGNATURE)}
        line = error_line(command(*key, environment={"COMPILE_SIGN_PASSWORD": "a-wrong-one"}))
        assert "a-wrong-one" not in line
        verify(release, keys / "closed.pub")

    def test_bench_does_not_measure_what_it_cannot_record(self, command: Command, release: Path) -> None:
        assert "record first, then sign" in error_line(command("bench", release, "--record"))

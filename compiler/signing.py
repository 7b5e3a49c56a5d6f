"""Signatures: model.sig is an OpenSSF model signature (https://github.com/sigstore/model-transparency) by a local key, over
every file of a release but itself. The library signs and verifies; what is here makes sure that it covers all, and nothing
else passes for it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compiler.errors import ReleaseError, SigningError
from compiler.hashing import hash_files
from compiler.manifest import MANIFEST, SIGNATURE, SUMS, Manifest
from compiler.store import aside_name, replace_files, writing
from compiler.verify import check_unpublished, read_release, verify_files

# As sigstore's bundles and in-toto's statements name themselves.
BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
# A signature has some 200 bytes a file.
MOST_BYTES = 16 << 20
MAKE = "openssl ecparam -name prime256v1 -genkey -noout -out key.pem"


def sign(path: Path, key: Path, password: Callable[[], str]) -> Manifest:
    """Verify a release and sign it, in place of an earlier signature.

    Args:
        key: an EC private key (P-256, P-384 or P-521), PEM.
        password: asked for when the key is encrypted.

    Raises:
        ReleaseError: the release is damaged, or stands in a registry.
        SigningError: the key cannot be used, or the library is not installed.
        StageError: the signature cannot be written.
    """
    library = _library()
    config, order = _signer(library, key, password)
    config.set_hashing_config(_hashing(library))
    check_unpublished(path)
    manifest, _ = read_release(path)
    with _writing(path):
        (path / aside_name(SIGNATURE)).unlink(missing_ok=True)  # of one that was killed
    verify_files(path, manifest)
    expected = _hashes(path, manifest)
    root = path.resolve()  # the library takes no link, not even to a release's folder
    with tempfile.TemporaryDirectory(prefix="compile-") as aside:
        try:
            config.sign(root, Path(aside) / SIGNATURE)
        except ValueError as error:
            raise ReleaseError(f"{path}: cannot be signed ({error}); verify it again") from error
        bundle = _bundle(Path(aside) / SIGNATURE)
    if _signed(bundle) != expected:
        raise ReleaseError(f"{path}: changed while it was signed; verify it, and sign it again")
    (envelope,) = bundle["dsseEnvelope"]["signatures"]
    envelope["sig"] = _smaller(envelope["sig"], order)
    with _writing(path):
        replace_files(root, {SIGNATURE: _to_bytes(bundle)})
    return manifest


def _writing(path: Path) -> contextlib.AbstractContextManager[None]:
    return writing(path, "the signature", "copy the release to where you can write, and sign it there")


def verify_signature(path: Path, manifest: Manifest, key: Path) -> None:
    """Check the signature of a release whose files were verified.

    Args:
        key: the public key, PEM.

    Raises:
        ReleaseError: it is not signed, or not with this key, or not with this content, or the signature was touched.
        SigningError: the key cannot be used, or the library is not installed.
    """
    library = _library()
    public = _public(key)
    verifier = _verifier(library, key).set_hashing_config(_hashing(library))
    if not os.path.lexists(path / SIGNATURE):
        raise ReleaseError(f"{path}: is not signed (it has no {SIGNATURE}); get a signed one, or verify without --key")
    bundle = _bundle(path / SIGNATURE)
    if bundle["verificationMaterial"]["publicKey"]["hint"] != _fingerprint(public):
        raise ReleaseError(f"{path}: was signed with another key than {key}; give its own, or do not use this release")
    signed, present = _signed(bundle), _hashes(path, manifest)
    other = [name for name in {*signed, *present} if signed.get(name) != present.get(name)]
    if other:
        other.sort(key=lambda name: (name in (MANIFEST, SUMS), name))  # which follow from the rest
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise ReleaseError(f"{path}: {SIGNATURE} is of other files ({', '.join(other[:3])}{more}); do not use this release")
    try:
        verifier.verify(path.resolve(), path.resolve() / SIGNATURE)
    except Exception as error:  # the library lets through what its parts raise
        raise ReleaseError(f"{path}: {SIGNATURE} was not made with {key}, or was changed; do not use this release") from error
    signature = bundle["dsseEnvelope"]["signatures"][0]["sig"]
    if signature != _smaller(signature, public.curve.group_order):
        # Whoever has the one form can write the other, without the key.
        raise ReleaseError(
            f"{path}: {SIGNATURE} was changed, or is not in the form (the smaller s) that `compile sign` writes, which "
            "half of other tools' signatures are not; sign it again, or do not use this release"
        )


def _fingerprint(public: Any) -> str:
    """The sha256 (hex) of a public key, as signatures name it."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _public(key: Path) -> Any:
    """A public key. Raises SigningError when there is none."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        return load_pem_public_key(key.read_bytes())
    except OSError as error:
        raise SigningError(f"{key}: cannot be read ({error.strerror}); give the signer's public key (PEM)") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        hint = f"openssl ec -in {key} -pubout makes it of a private one"
        raise SigningError(f"{key}: is no EC public key (PEM); {hint}") from error


def _library() -> Any:
    try:
        import cryptography
        import model_signing
    except ImportError as error:
        raise SigningError(
            f"signatures need model-signing ({error.name} is missing): pip install 'aot-model-compiler[sign]'"
        ) from error
    del cryptography
    return model_signing


def _hashing(library: Any) -> Any:
    """Every file but the signature: by itself the library would leave out git's."""
    return library.hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False).set_allow_symlinks(False)


def _signer(library: Any, key: Path, password: Callable[[], str]) -> tuple[Any, int]:
    """What signs with a key, and the order of its curve's group."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    config = library.signing.Config()
    secret = None
    try:
        try:
            config.use_elliptic_key_signer(private_key=key)
        except TypeError:  # it is encrypted
            secret = password().encode()
            # As bytes: what the library hands it to takes no text.
            config.use_elliptic_key_signer(private_key=key, password=secret)
        private: Any = load_pem_private_key(key.read_bytes(), secret)
        return config, private.curve.group_order
    except OSError as error:
        raise SigningError(
            f"{key}: cannot be read ({error.strerror}); give your private key (PEM), or make one: {MAKE}"
        ) from error
    except (ValueError, AttributeError, TypeError, UnsupportedAlgorithm) as error:
        # What a wrong password opens may look like a key of no known kind, but hardly like one of another curve.
        if secret is not None and not isinstance(error, AttributeError) and "curve" not in str(error):
            raise SigningError(f"{key}: the password does not open it; give the right one") from error
        raise SigningError(f"{key}: is no EC private key of P-256, P-384 or P-521 (PEM); make one: {MAKE}") from error


def _verifier(library: Any, key: Path) -> Any:
    try:
        return library.verifying.Config().use_elliptic_key_verifier(public_key=key)
    except (ValueError, AttributeError) as error:
        raise SigningError(f"{key}: is no EC public key of P-256, P-384 or P-521; releases are signed with such") from error


def _hashes(path: Path, manifest: Manifest) -> dict[str, str]:
    """What a signature must cover: every file of the release but itself, by its sha256."""
    return {file.path: file.sha256 for file in (*manifest.every_file, *hash_files(path, (MANIFEST, SUMS)))}


def _bundle(path: Path) -> dict[str, Any]:
    """A signature's content, which must be in the one form that the library writes: what it does not sign (the key's
    fingerprint, spaces, unused bits of base64) would else be free to change.

    Raises:
        ReleaseError: it cannot be read, or is another form.
    """
    try:
        if os.stat(path).st_size > MOST_BYTES:
            raise ValueError
        content = path.read_bytes()
        bundle: dict[str, Any] = json.loads(content)
        envelope = bundle["dsseEnvelope"]
        (signature,) = envelope["signatures"]
        form = {
            "mediaType": BUNDLE_TYPE,
            "verificationMaterial": {
                "publicKey": {"hint": bundle["verificationMaterial"]["publicKey"]["hint"]},
                "tlogEntries": [],
            },
            "dsseEnvelope": {
                "payload": _base64(envelope["payload"]),
                "payloadType": PAYLOAD_TYPE,
                "signatures": [{"sig": _base64(signature["sig"]), "keyid": ""}],
            },
        }
        if bundle != form or _to_bytes(bundle) != content:
            raise ValueError
    except OSError as error:
        raise ReleaseError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ReleaseError(f"{path}: not a signature, or was changed; do not use this release, or sign it again") from error
    return bundle


def _to_bytes(bundle: dict[str, Any]) -> bytes:
    return json.dumps(bundle, separators=(",", ":")).encode()


def _smaller(signature: str, order: int) -> str:
    """An ECDSA signature (DER, base64) in the one form that passes here: with s and with order - s it is as valid."""
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

    try:
        r, s = decode_dss_signature(base64.b64decode(signature))
        return base64.b64encode(encode_dss_signature(r, min(s, order - s))).decode()
    except (ValueError, OverflowError):
        return ""  # which is none


def _base64(text: str) -> str:
    """The one form of a base64 text. Raises ValueError when it is none."""
    return base64.b64encode(base64.b64decode(text, validate=True)).decode()


def _signed(bundle: dict[str, Any]) -> dict[str, str]:
    """The files that a signature says it covers, by their sha256; none where it says nothing of the kind."""
    try:
        resources = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))["predicate"]["resources"]
        return {resource["name"]: resource["digest"] for resource in resources if resource["algorithm"] == "sha256"}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}

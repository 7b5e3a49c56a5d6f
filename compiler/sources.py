"""Where a checkpoint comes from: `path:FOLDER`, `package:PACKAGE/FOLDER`, `hf:ORG/NAME@REVISION`. Imports no torch.

`resolve` finds the files that a build reads, and only those: it never opens a pickle, runs a checkpoint's code or follows
a link out of the folder. What else lies in the folder (other exports, adapters, optimizer states) is out of the build's
sight, so it can neither change a result nor travel with a release.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import yaml

from compiler.errors import SourceError
from compiler.hashing import canonical, hash_files, list_files
from compiler.pooling import NO_WORK, POOLING, modes
from compiler.tasks import Modality, infer
from compiler.types import File, Snapshot

if TYPE_CHECKING:
    from compiler.config import ModelSpec

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
TOKENIZER_FILES = frozenset(
    {"tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "spm.model"}
)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
SUPPORT_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".md"})
SUPPORT_NAMES = re.compile(r"(LICEN[CS]E|NOTICE|COPYING)([.-].*)?", re.IGNORECASE)
# Names that a release gives its own files, and what training leaves behind.
NOT_SUPPORT = frozenset(
    {"adapter_config.json", "bom.cdx.json", "export.json", "manifest.json", "optimizer.json", "provenance.json"}
    | {"trainer_state.json", "validation.json"}
)


def resolve(spec: ModelSpec, folder: Path) -> Snapshot:
    """Find and hash a model's checkpoint. `folder` is what `path:` is relative to.

    Raises:
        SourceError: it is not there, is incomplete, has only pickles, leads out of its folder, or differs from its pins.
    """
    kind, _, rest = spec.source.partition(":")
    uri, revision = spec.source, None
    known: dict[str, File] = {}
    if kind == "hf":
        root, revision, known = _download(spec, rest)
        uri = f"hf:{rest.partition('@')[0]}@{revision}"
    elif kind == "package":
        root = _package_folder(rest)
    else:
        root = folder / rest
        if Path(rest).is_absolute():
            uri = f"path:{root.name}"  # a release must not tell where on a machine it was made
        if not os.path.exists(root):
            raise SourceError(f"{spec.source}: no such file or folder: {root}")

    only = None
    if not root.is_dir():
        root, only = root.parent, root.name
        if not only.endswith(".gguf") or not (root / only).is_file():
            raise SourceError(f"{spec.source}: a source is a checkpoint's folder, or one GGUF file")
    names = [only] if only else _list_folder(root)
    weights, support = _select(names, lambda name: _read_json(_inside(root, name), name), spec)
    for name in weights + support:
        _inside(root, name)
    try:
        wanted = [name for name in weights + support if name not in known]
        files = {file.path: file for file in hash_files(root, wanted)}
        files |= {name: known[name] for name in weights + support if name in known}
    except OSError as error:
        raise SourceError(f"{error.filename}: cannot be read ({error.strerror})") from error
    _check_pins(spec, files)
    return Snapshot(
        uri=uri,
        root=root,
        weights=tuple(files[name] for name in weights),
        support=tuple(files[name] for name in support),
        revision=revision,
        licence=_licence(root) if "README.md" in support else None,
    )


def _select(names: Collection[str], read_json: Callable[[str], Any], spec: ModelSpec) -> tuple[list[str], list[str]]:
    """The weights and the support files among the names of a checkpoint. Pure but for `read_json`."""
    where = spec.source
    present = set(names)
    gguf = sorted(name for name in present if name.endswith(".gguf") and "/" not in name)
    if SAFETENSORS in present:
        weights = [SAFETENSORS]
    elif SAFETENSORS_INDEX in present:
        weights = [SAFETENSORS_INDEX, *_shards(read_json(SAFETENSORS_INDEX), SAFETENSORS_INDEX, present)]
    elif len(gguf) == 1:
        weights = gguf
    elif gguf:
        raise SourceError(f"{where}: holds {len(gguf)} GGUF files ({', '.join(gguf)}); name one as the source")
    elif pickles := sorted(present & {PICKLE, PICKLE_INDEX}):
        if not spec.allow_pickle:
            raise SourceError(
                f"{where}: its weights are a pickle ({pickles[0]}), which can run code; save it as safetensors, "
                "or set allow_pickle: true"
            )
        weights = [PICKLE]
        if PICKLE not in present:
            weights = [PICKLE_INDEX, *_shards(read_json(PICKLE_INDEX), PICKLE_INDEX, present)]
    elif "config.json" not in present:
        raise SourceError(f"{where}: not a checkpoint: no config.json and no weights in it")
    else:
        raise SourceError(f"{where}: no weights: neither {SAFETENSORS}, {SAFETENSORS_INDEX} nor one GGUF file")
    if "config.json" not in present and not weights[0].endswith(".gguf"):
        raise SourceError(f"{where}: no config.json beside the weights")

    support = [
        name
        for name in sorted(present)
        if "/" not in name
        and not name.startswith(".")
        and not name.endswith(".index.json")
        and name not in NOT_SUPPORT
        and name not in weights
        and (PurePosixPath(name).suffix in SUPPORT_SUFFIXES or SUPPORT_NAMES.fullmatch(name))
    ]
    if spec.trust_remote_code:
        support += [name for name in sorted(present) if name.endswith(".py") and "/" not in name]
    if "modules.json" in present:
        support += _module_files(read_json("modules.json"), present, spec)
    return weights, support


def _shards(index: Any, name: str, present: Collection[str]) -> list[str]:
    """The shards that an index names, all of them there, all of them plain names in the folder."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{name}: no weight_map in it; save the checkpoint again")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if PurePosixPath(shard).name != shard or shard in ("", ".", "..") or "\\" in shard:
            raise SourceError(f"{name}: shard {shard!r} leads out of the checkpoint's folder; shards are plain names")
        if shard not in present:
            raise SourceError(f"{name}: shard {shard!r} is missing; fetch the checkpoint again")
        if name == SAFETENSORS_INDEX and not shard.endswith(".safetensors"):
            raise SourceError(f"{name}: shard {shard!r} is not a safetensors file")
    return shards


def _module_files(modules: Any, present: Collection[str], spec: ModelSpec) -> list[str]:
    """The files of sentence-transformers' modules (`1_Pooling/config.json`, `2_Dense/model.safetensors` …)."""
    found: list[str] = []
    for module in modules if isinstance(modules, list) else []:
        folder = module.get("path", "") if isinstance(module, dict) else ""
        if not folder:
            continue
        if not isinstance(folder, str) or PurePosixPath(folder).is_absolute() or ".." in PurePosixPath(folder).parts:
            raise SourceError(f"modules.json: path {folder!r} leads out of the checkpoint's folder")
        folder = str(PurePosixPath(folder))  # `./1_Pooling/` is 1_Pooling
        inner = [name for name in sorted(present) if name.startswith(f"{folder}/") and name not in found]
        if folder in present:
            found.append(folder)  # a link: whether it leads out is looked at with the files
        elif not inner and not any(name.startswith(f"{folder}/") for name in found) and not _bare(module):
            raise SourceError(f"modules.json: module {folder!r} is not in the checkpoint; fetch it whole")
        safe = [name for name in inner if name.endswith((".json", ".safetensors", ".txt"))]
        pickles = [name for name in inner if name.endswith(PICKLE)]
        if pickles and not any(name.endswith(".safetensors") for name in safe):
            if not spec.allow_pickle:
                raise SourceError(
                    f"{spec.source}: the weights of module {folder} are a pickle; save it as safetensors, "
                    "or set allow_pickle: true"
                )
            safe += pickles
        found += safe
    return found


def _bare(module: dict[str, Any]) -> bool:
    """Whether a module of sentence-transformers has nothing to save, and so no files."""
    return str(module.get("type", "")).rpartition(".")[2] == "Normalize" or str(module.get("path")).endswith("_Normalize")


def _list_folder(root: Path) -> list[str]:
    """The names of the files in a checkpoint's folder and below it."""
    try:
        os.scandir(root).close()
        return list_files(root)
    except OSError as error:
        raise SourceError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _inside(root: Path, name: str) -> Path:
    """`root/name`, once it is certain that no link takes it out of the checkpoint.

    A hub's cache is the one place where links are at home: there a snapshot's files link to `blobs/` beside it.
    """
    path = root / name
    homes = [root.resolve()]
    if homes[0].parent.name == "snapshots":
        homes.append(homes[0].parent.parent / "blobs")
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise SourceError(f"{name}: a link that leads nowhere; fetch the checkpoint again") from None
    if not any(real.is_relative_to(home) for home in homes):
        raise SourceError(f"{name}: a link that leads out of the checkpoint's folder; put the file itself there")
    if not real.is_file():
        raise SourceError(f"{name}: not a regular file")
    return path


def _read_json(path: Path, name: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise SourceError(f"{name}: not readable as JSON ({error}); fetch the checkpoint again") from error


def read_config(snapshot: Snapshot) -> dict[str, Any]:
    """The parsed config.json; empty for a GGUF, which carries its own.

    Raises:
        SourceError: it is not a JSON object.
    """
    if not any(file.path == "config.json" for file in snapshot.support):
        return {}
    config = _read_json(snapshot.root / "config.json", "config.json")
    if not isinstance(config, dict):
        raise SourceError("config.json: not a JSON object; fetch the checkpoint again")
    return config


def pooling(snapshot: Snapshot, task: str, options: Mapping[str, bool]) -> list[str]:
    """How tokens become a text's vector, as sentence-transformers' files say, by the names of `compiler.pooling.POOLING`; the
    mean where there are none. Empty where nothing is to be pooled: for another task, or with the embedding in the graph.

    Raises:
        SourceError: they cannot be read, or name what is not known, or layers behind the pooling.
    """
    if task != "feature-extraction" or options.get("sentence_embedding"):
        return []
    names = {file.path for file in snapshot.support}
    entries = _read_json(snapshot.root / "modules.json", "modules.json") if "modules.json" in names else []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SourceError("modules.json: not a list of modules; fetch the checkpoint again")
    kinds = [str(entry.get("type")).rpartition(".")[2] for entry in entries]
    behind = [(kind, str(entry.get("path"))) for kind, entry in zip(kinds[1:], entries[1:], strict=True)]
    if others := [(kind, path) for kind, path in behind if kind not in ("Pooling", "Normalize", *NO_WORK)]:
        files = {file.path for file in snapshot.files}
        able = all(kind == "Dense" and f"{path}/model.safetensors" in files for kind, path in others)
        raise SourceError(
            f"modules.json: has a {others[0][0]} behind the encoder, and int8 is judged by a text's whole embedding; "
            f"{'set sentence_embedding: true, so that it is in the files, or ' if able else ''}leave int8 out of targets:"
        )
    for entry in (entry for entry, kind in zip(entries, kinds, strict=True) if kind == "Pooling"):
        name = str(PurePosixPath(str(entry.get("path", "")), "config.json"))
        config = _read_json(snapshot.root / name, name) if name in names else None
        if not isinstance(config, dict):
            raise SourceError(f"{name}: missing or not a JSON object, and modules.json names it; fetch the checkpoint again")
        found = modes(config)
        unknown = [mode for mode in found if mode not in POOLING]
        if unknown or not found:
            said = ", ".join(unknown) or "by nothing"
            raise SourceError(f"{name}: pooling {said} is not known, so int8 cannot be judged; leave int8 out")
        return list(found)
    return ["mean"]


def has_pooling(snapshot: Snapshot) -> bool:
    """Whether sentence-transformers' files name a pooling behind the encoder."""
    if all(file.path != "modules.json" for file in snapshot.support):
        return False
    entries = _read_json(snapshot.root / "modules.json", "modules.json")
    modules = entries[1:] if isinstance(entries, list) else []
    return any(str(module.get("type")).endswith(".Pooling") for module in modules if isinstance(module, dict))


def _check_pins(spec: ModelSpec, files: dict[str, File]) -> None:
    for name, pinned in spec.sha256.items():
        if name not in files:
            raise SourceError(f"{spec.source}: {name} is pinned by sha256 but is not among the files that are read")
        if files[name].sha256 != pinned:
            raise SourceError(
                f"{spec.source}: {name} has sha256 {files[name].sha256[:12]}…, pinned is {pinned[:12]}…; "
                "it is another file: fetch the right one, or change the pin if you trust this one"
            )


def _licence(root: Path) -> str | None:
    """The licence that a model card states in its front matter."""
    try:
        parts = (root / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        card = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except Exception:  # PyYAML's constructors raise whatever comes; a card that cannot be read states nothing
        return None
    licence = card.get("license") if isinstance(card, dict) else None
    return licence if isinstance(licence, str) else None


def _package_folder(rest: str) -> Path:
    """A folder of an installed package, found without importing it: a package of weights is data, not code."""
    package, _, inner = rest.partition("/")
    if ".." in PurePosixPath(inner).parts or inner.startswith("/") or not package.isidentifier():
        raise SourceError(f"package:{rest}: a package's source is package:PACKAGE/FOLDER")
    found = None if package == "__main__" else importlib.util.find_spec(package)
    for location in (found.submodule_search_locations or ()) if found else ():
        if (Path(location) / inner).exists():
            return Path(location) / inner
    if found is None:
        raise SourceError(f"package:{rest}: package {package} is not installed here; install it with pip")
    raise SourceError(f"package:{rest}: package {package} has no folder {inner!r}")


def _download(spec: ModelSpec, rest: str) -> tuple[Path, str, dict[str, File]]:
    """Fetch a hub's checkpoint into the hub's own cache: its folder, the commit that the revision stands for, and its files,
    hashed."""
    repo, _, revision = rest.partition("@")
    revision = revision or spec.revision or "main"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.file_download import repo_folder_name

    try:
        info = HfApi().model_info(repo, revision=revision)
        commit = str(info.sha)
        names = [sibling.rfilename for sibling in info.siblings or ()]

        def fetch(name: str) -> Path:
            return Path(hf_hub_download(repo, name, revision=commit))

        weights, support = _select(names, lambda name: _read_json(fetch(name), name), spec)
        patterns = [glob.escape(name) for name in weights + support]
        root = Path(snapshot_download(repo, revision=commit, allow_patterns=patterns))
        files = {file.path: file for file in hash_files(root, weights + support)}
        _whole(root).write_bytes(canonical({name: file.sha256 for name, file in files.items()}))
        return root, commit, files
    except SourceError:
        raise
    except HFValidationError as error:
        raise SourceError(f"hf:{repo}@{revision}: no repository can be called so ({' '.join(str(error).split())})") from error
    except Exception as error:  # the library lets through what its HTTP client, and other servers' answers, raise
        if re.fullmatch("[0-9a-f]{40}", revision) and not _refused(error):
            # A commit never changes: what an earlier build fetched, all of it, is as good as the hub.
            with contextlib.suppress(Exception):
                root = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "snapshots" / revision
                fetched = json.loads(_whole(root).read_bytes())
                files = {file.path: file for file in hash_files(root, fetched)}
                if {name: file.sha256 for name, file in files.items()} == fetched:
                    return root, revision, files
        _fail(repo, revision, error)


def _whole(root: Path) -> Path:
    """The note beside a hub's snapshot that says which of its files were fetched, once all were: a download that was
    interrupted leaves none, and other tools fetch other files."""
    return root.parent.parent / f"compile-{root.name}.json"


def _refused(error: BaseException) -> bool:
    """Whether a hub answered, rather than could not be reached."""
    return getattr(getattr(error, "response", None), "status_code", None) in (401, 403, 404)


def _fail(repo: str, revision: str, error: BaseException) -> NoReturn:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        reason = "the hub refuses access, or has no such repository: check the name, accept its terms there and set HF_TOKEN"
    elif status == 404:
        reason = "the hub has no such repository or revision (or it is private: set HF_TOKEN)"
    elif status is not None:
        reason = f"the hub answered {status}; try again later"
    elif isinstance(error, OSError) and error.errno is not None and error.filename:
        reason = f"{error.filename}: {error.strerror}"
    else:
        reason = f"the hub could not be reached ({type(error).__name__}); check the network and HF_ENDPOINT"
    raise SourceError(f"hf:{repo}@{revision}: {reason}") from error


def infer_task(snapshot: Snapshot) -> str:
    """The task of a checkpoint. Raises SourceError when its config does not tell."""
    names = {file.path for file in snapshot.support}
    if "config.json" not in names:
        return "feature-extraction"  # a GGUF does not say what its head is for
    return infer(read_config(snapshot), "modules.json" in names, _modality(snapshot))


def _modality(snapshot: Snapshot) -> Modality:
    """What the files of a checkpoint's processor are for. transformers 5 puts several into processor_config.json."""
    settings = _processor(snapshot)
    if "sampling_rate" in settings:
        return "audio"
    if not settings:
        return "text"
    return "image-text" if TOKENIZER_FILES & {file.path for file in snapshot.support} else "image"


def _processor(snapshot: Snapshot) -> dict[str, Any]:
    """The settings of a checkpoint's image processor or feature extractor; empty where it has none."""
    names = {file.path for file in snapshot.support}
    for name in PROCESSOR_FILES:
        if name in names:
            settings = _read_json(snapshot.root / name, name)
            if not isinstance(settings, dict):
                raise SourceError(f"{name}: not a JSON object; fetch the checkpoint again")
            found = (
                settings if name == PROCESSOR_FILES[0] else settings.get("image_processor", settings.get("feature_extractor"))
            )
            if isinstance(found, dict) and found:
                return found
    return {}


def check_processor(snapshot: Snapshot, kind: Literal["image", "audio"]) -> None:
    """Make sure that there is something to make images or sound into inputs. Raises SourceError."""
    settings = _processor(snapshot)
    if not settings or ("sampling_rate" in settings) != (kind == "audio"):
        what, data = ("feature extractor", "sound") if kind == "audio" else ("image processor", "images")
        raise SourceError(
            f"{snapshot.uri}: no {what} beside the weights (preprocessor_config.json); it was not trained on {data}, or was "
            "not saved whole"
        )


def check_tokenizer(snapshot: Snapshot) -> None:
    """Make sure that there is something to make a tokenizer from; a GGUF carries its own. Raises SourceError."""
    names = {file.path for file in snapshot.files}
    if not names & TOKENIZER_FILES and not any(name.endswith(".gguf") for name in names):
        raise SourceError(f"{snapshot.uri}: no tokenizer beside the weights (tokenizer.json, vocab.txt …); add it")

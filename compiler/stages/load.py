"""Load: a checkpoint into memory, complete or not at all, and the reference that every artifact is held against.

transformers fills weights that a checkpoint lacks at random and goes on; here that is an error that names them.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import math
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.accuracy import ANSWER, Answering, figures, finite, problem, tag_names
from compiler.embedding import with_sentence_embedding
from compiler.errors import SourceError, StageError
from compiler.expected import check_evidence, expected
from compiler.hashing import hash_files
from compiler.modalities import MODALITIES
from compiler.numerics import ELEMENTS, Case, rows
from compiler.samples import ACCURACY, LEFT, MAX_ACCURACY_LINES, accuracy_cases, read_cases
from compiler.sources import pooling, read_config
from compiler.tasks import EXPECTED, TASKS
from compiler.types import Model, Signature, Snapshot, Tensor
from compiler.workers import LOAD_THREADS

if TYPE_CHECKING:
    import numpy as np
    import torch

# What a release may do without, as its manifest says it.
POOLER = "pooler (the checkpoint has no weights for it, and features do not need it)"
OWN_CODE = "the checkpoint's own Python code (auto_map; transformers' class of the same architecture is used)"
# What a modality's processor is called.
PROCESSORS = {
    "text": "the tokenizer",
    "image": "the image processor",
    "audio": "the feature extractor",
    "image-text": "the tokenizer or the image processor",
}
# The logits of a large vocabulary over many tokens would be gigabytes; then fewer rows are kept, spread evenly.
MAX_REFERENCE_BYTES = 256 << 20
MIN_ROWS = 16
TOKENIZER_CONFIG = "tokenizer_config.json"
SAMPLES, REFERENCE = "samples.safetensors", "reference.safetensors"
# Two runs of the original that give the same answer are this close, in units of the output's scale.
SAME = 1e-3


def load(
    snapshot: Snapshot,
    task: str,
    *,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    sentence_embedding: bool = False,
    aside: Path | None = None,
) -> Model:
    """Load a checkpoint in eager fp32, with `sentence_embedding` among its outputs if that is wanted. Temporary files go below
    `aside`, which somebody sweeps when this process is killed.

    Raises:
        SourceError: a file is damaged, or changed since it was hashed; the architecture is unknown or has no head for the
            task; a weight is missing, or has another shape than the config says; there is no tokenizer, image processor or
            feature extractor, or not the model's.
    """
    import torch
    from transformers import AutoConfig

    modality = MODALITIES[TASKS[task].modality]
    _check_tensors(snapshot)
    _check_config(read_config(snapshot))
    with _only(snapshot, aside) as folder:
        gguf = next((file.path for file in snapshot.weights if file.path.endswith(".gguf")), None)
        extra: dict[str, Any] = {"gguf_file": gguf} if gguf else {}
        extra |= {"trust_remote_code": trust_remote_code, "local_files_only": True}
        with _explained(snapshot, "the config", trust_remote_code):
            config = AutoConfig.from_pretrained(folder, **extra)
        automatic = _auto_class(task, config)
        if getattr(config, "is_encoder_decoder", False):
            raise SourceError(f"{snapshot.uri}: {config.model_type} has a decoder; only encoders can be compiled")
        modality.check(snapshot, task)
        with _explained(snapshot, PROCESSORS[TASKS[task].modality], trust_remote_code):
            processor = modality.processor(folder, extra)
        for name, value in (("output_hidden_states", False), ("output_attentions", False), ("return_dict", True)):
            setattr(config, name, value)
        if hasattr(config, "use_cache"):
            config.use_cache = False
        extra |= {"config": config, "dtype": torch.float32, "output_loading_info": True, "weights_only": True}
        extra["ignore_mismatched_sizes"] = True  # to name them; they are refused below
        if not gguf:
            extra["use_safetensors"] = not _is_pickle(snapshot)
        if _is_pickle(snapshot) and not allow_pickle:
            raise SourceError(f"{snapshot.uri}: its weights are a pickle; set allow_pickle: true to open it")
        module, left_out = _weights(automatic, folder, snapshot, task, extra)
        if sentence_embedding:
            module = with_sentence_embedding(module, snapshot)

    module.eval().requires_grad_(False)
    return Model(
        module=module,
        processor=processor,
        task=task,
        **modality.prepare(module, processor, task, snapshot.uri),
        left_out=left_out if trust_remote_code or not getattr(config, "auto_map", None) else (*left_out, OWN_CODE),
    )


def _auto_class(task: str, config: Any) -> Any:
    """transformers' auto class for the task, by optimum, once it is certain that the architecture has such a head."""
    from optimum.exporters.tasks import TasksManager

    def class_for(name: str) -> Any:
        return TasksManager.get_model_class_for_task(
            name, model_type=config.model_type, model_class_name=TASKS[name].auto, library="transformers"
        )

    def fits(name: str) -> bool:
        mapping = class_for(name)._model_mapping
        if type(config) not in mapping:
            return False
        # An auto class may have models of any modality.
        found = mapping[type(config)]
        found = found[0] if isinstance(found, (list, tuple)) else found
        return getattr(found, "main_input_name", "") in MODALITIES[TASKS[name].modality].MAIN_INPUTS

    automatic = class_for(task)
    if fits(task) or automatic.__name__ in getattr(config, "auto_map", {}):
        return automatic
    fitting = [name for name in TASKS if fits(name)]
    hint = f"it has {', '.join(fitting)}" if fitting else "none of the tasks here fits it"
    raise SourceError(f"task: {config.model_type} has no head for {task}; {hint}")


def _weights(
    automatic: Any, folder: Path, snapshot: Snapshot, task: str, extra: dict[str, Any]
) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """The module with every weight from the checkpoint, and the names of the parts that it does without."""
    with _explained(snapshot, "the weights", extra["trust_remote_code"]):
        module, report = automatic.from_pretrained(folder, **extra)
    missing = sorted(report["missing_keys"])
    left_out: tuple[str, ...] = ()
    pooler = sorted(name for name, _ in module.named_parameters() if name.startswith("pooler."))
    if (
        task == "feature-extraction"
        and missing
        and missing == pooler
        and "add_pooling_layer" in inspect.signature(type(module).__init__).parameters
    ):
        # Checkpoints of a masked language model have no pooler. The features do not need one: do without it, rather
        # than ship one of random numbers.
        with _explained(snapshot, "the weights", extra["trust_remote_code"]):
            module, report = automatic.from_pretrained(folder, add_pooling_layer=False, **extra)
        missing, left_out = sorted(report["missing_keys"]), (POOLER,)
    if missing:
        raise SourceError(
            f"{snapshot.uri}: {len(missing)} weights of {type(module).__name__} are missing from the checkpoint: "
            f"{_names(missing)}; it was not trained for {task}, or not saved whole"
        )
    if mismatched := sorted(f"{name} {list(found)}, not {list(wanted)}" for name, found, wanted in report["mismatched_keys"]):
        raise SourceError(f"{snapshot.uri}: weights of another shape than config.json says: {_names(mismatched)}")
    if unused := _further_layers(module, report["unexpected_keys"]):
        raise SourceError(
            f"{snapshot.uri}: the checkpoint has more layers than config.json says ({_names(unused)}); one of them is wrong"
        )
    return module, left_out


def _further_layers(module: torch.nn.Module, unexpected: Iterable[str]) -> list[str]:
    """Those of the weights that found no place that continue a numbered list of the module: layers that would be lost."""
    numbered = re.compile(r"\.\d+\.")
    own = {numbered.sub(".#.", name) for name, _ in module.named_parameters()}
    # A base model's weights carry its prefix in the checkpoint of a model with a head, and the other way round.
    own |= {name.removeprefix(f"{module.base_model_prefix}.") for name in own}
    return sorted(
        key
        for key in unexpected
        if numbered.search(key) and numbered.sub(".#.", key).removeprefix(f"{module.base_model_prefix}.") in own
    )


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


@contextlib.contextmanager
def _only(snapshot: Snapshot, aside: Path | None) -> Iterator[Path]:
    """A folder with links to the snapshot's files and nothing else, below `aside`.

    transformers looks for adapters, other weights and code beside a config; what was not hashed must not be found. And what
    was hashed must be what was read: the files are hashed again afterwards.
    """
    with tempfile.TemporaryDirectory(prefix="compile-", dir=aside) as name:
        folder = Path(name)
        for file in snapshot.files:
            link = folder / file.path
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((snapshot.root / file.path).resolve())
        yield folder
    try:
        again = hash_files(snapshot.root, [file.path for file in snapshot.files])
    except OSError as error:
        raise SourceError(f"{error.filename}: gone while it was read ({error.strerror}); build again") from error
    for before, after in zip(snapshot.files, again, strict=True):
        if before != after:
            raise SourceError(f"{before.path}: changed while it was read; build again")


@contextlib.contextmanager
def _explained(snapshot: Snapshot, what: str, trust_remote_code: bool) -> Iterator[None]:
    """Turn what transformers raises on a bad checkpoint into one line that says what to do."""
    try:
        yield
    except Exception as error:
        text = re.sub(r"\S*/compile-\w+/?", "", " ".join(str(error).split()))
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
            raise
        if "trust_remote_code" in text:
            reason = "it needs Python code of its own; read that code, then set trust_remote_code: true"
        elif match := re.search(r"model type `([^`]+)`", text):
            reason = f"config.json names an unknown architecture, {match[1]!r}; this transformers does not have it"
        elif "Unrecognized model" in text:
            reason = "config.json names no model_type; this transformers cannot tell what it is"
        elif type(error).__name__ == "UnpicklingError" or (what == "the weights" and _is_pickle(snapshot)):
            name = ", ".join(file.path for file in snapshot.weights)
            reason = f"{name}: damaged, or a pickle that holds more than tensors; fetch it again, or as safetensors"
        elif "size mismatch" in text or "ignore_mismatched_sizes" in text:
            names = re.findall(r"([\w.]+)\s*\|\s*MISMATCH|size mismatch for ([\w.]+)", str(error))
            found = sorted({first or second for first, second in names})
            reason = f"weights of another shape than config.json says: {_names(found) if found else text[:200]}"
        elif any(file.path.endswith(".gguf") for file in snapshot.weights):
            reason = f"{what} cannot be read from the GGUF ({text[:160]}); fetch it again, or use a safetensors checkpoint"
        else:
            reason = f"{what} cannot be loaded: {type(error).__name__}: {text[:200]}; fetch or save the checkpoint again"
        raise SourceError(f"{snapshot.uri}: {reason}") from error


def _is_pickle(snapshot: Snapshot) -> bool:
    return any(file.path.endswith(".bin") for file in snapshot.weights)


def _check_config(config: Mapping[str, Any]) -> None:
    """What a config must not be, before a library makes something of it."""
    code = config.get("auto_map")
    for name in code.values() if isinstance(code, dict) else ():
        if "--" in str(name):
            raise SourceError(f"config.json: auto_map names code of another repository ({name}); put that code beside it")
    model_type = config.get("model_type", "-")
    if not isinstance(model_type, str) or not model_type:
        raise SourceError(f"config.json: model_type is {config['model_type']!r}, not a name; fetch the checkpoint again")
    if config.get("quantization_config"):
        raise SourceError("config.json: the checkpoint is quantized (quantization_config); use the one it was made from")
    layers = config.get("num_hidden_layers", 1)
    if isinstance(layers, int) and layers < 1:
        raise SourceError(f"config.json: num_hidden_layers is {layers}; fetch the checkpoint again")


def _check_tensors(snapshot: Snapshot) -> None:
    """Open each safetensors file's header, which must cover the file exactly; the library checks that."""
    from safetensors import SafetensorError, safe_open

    for file in snapshot.files:
        path = snapshot.root / file.path
        if file.path.endswith(".safetensors"):
            try:
                with safe_open(path, framework="np"):
                    pass
            except (SafetensorError, OSError) as error:
                raise SourceError(f"{file.path}: damaged or cut short ({error}); fetch it again") from error
        elif file.size == 0 and file in snapshot.weights:
            raise SourceError(f"{file.path}: empty; fetch it again")


def run_eager(model: Model, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """The model's own outputs, fp32, under transformers' names."""
    import torch

    with torch.inference_mode():
        outputs = model.module(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    return {name: value.float().numpy() for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def signature(model: Model) -> Signature:
    """Inputs and outputs with their dynamic axes, found by running two shapes that have no dynamic size in common."""
    modality = MODALITIES[TASKS[model.task].modality]
    probes = modality.probes(model)
    found = [run_eager(model, probe) for probe in probes]
    axes = {
        (one, other): axis
        for name in model.inputs
        for one, other, axis in zip(probes[0][name].shape, probes[1][name].shape, model.axes[name], strict=True)
        if isinstance(axis, str)
    }

    def axis(number: int, one: int, other: int) -> int | str:
        return one if one == other else axes.get((one, other)) or modality.DERIVED[number]

    outputs = tuple(
        Tensor(name, "float32", tuple(map(axis, itertools.count(), value.shape, found[1][name].shape)))
        for name, value in found[0].items()
    )
    dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in model.example.items()}
    return Signature(tuple(Tensor(name, dtypes[name], model.axes[name]) for name in model.inputs), outputs)


def _counted(model: Model, case: Case, left: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Which rows count of the whole-text outputs (logits of a class, a pooled vector) of a sample that is padded on the
    left: those where the original's answers, `left`, are those to the same text padded on the right."""
    import numpy as np

    lengths = case.mask.sum(axis=-1).reshape(-1)
    turned = {
        name: np.stack(
            [np.roll(row, int(length)) for row, length in zip(value.reshape(-1, value.shape[-1]), lengths, strict=True)]
        ).reshape(value.shape)
        for name, value in case.inputs.items()
    }
    right = run_eager(model, turned)
    counts = {}
    for name, value in left.items():
        if value.shape[:2] != case.mask.shape and value.shape[:1] == case.mask.shape[:1]:
            error = np.abs(value - right[name]).reshape(len(value), -1).max(axis=1)
            counts[name] = error <= SAME * max(1.0, float(np.abs(right[name]).max()))
    return counts


def quantizable(model: Model) -> list[str]:
    """The names of the linear layers and then of embeddings, of which some may be int8."""
    import torch

    kinds = (torch.nn.Linear, torch.nn.Embedding)
    return [name for kind in kinds for name, part in model.module.named_modules() if isinstance(part, kind)]


def reference(
    out: Path,
    snapshot: Snapshot,
    task: str,
    lines: Sequence[tuple[str, ...]],
    batches: Sequence[int],
    sequences: Sequence[int] | None,
    options: Mapping[str, bool],
    labels: Sequence[tuple[str, Any]] | None = None,
    accurate: bool = False,
) -> dict[str, Any]:
    """Write the samples and the untouched fp32 model's outputs on them, before anything is fused or converted.

    Files: `samples.safetensors`, with `<case>.<input>` as the model takes it and, where not all rows count,
    `<case>.counts.<output>` uint8 `[batch]` and `<case>.real.<axis>` uint8 `[batch, axis]`; `reference.safetensors`, with
    `<case>.<output>` float32 `[rows, width]`, the real rows (see `compiler.numerics.rows`), and, with
    `accurate`, the texts' answers as `answer.<name>` (see `compiler.accuracy.answers`).

    Args:
        labels: of labelled texts, as `compiler.expected.expected` takes them.
        accurate: whether texts' answers are wanted too: for int8.

    Raises:
        ConfigError: a label is none of the model's, or not of the kind that it gives.
        StageError: an output of the original is not finite, so nothing can be held against it.
        Also what `load` and `cases` raise.
    """
    import numpy as np
    from safetensors.numpy import save_file

    _set_threads()
    model = load(snapshot, task, aside=out, **options)
    made = MODALITIES[TASKS[task].modality].samples(model, lines, batches, sequences)
    found = made.cases
    if accurate:
        found = [*found, *accuracy_cases(model, lines)]
    # Before the answers: those of the first lines, of which a pair has two.
    told = expected(model, lines, labels)[: MAX_ACCURACY_LINES * len(labels) // len(lines)] if labels else None
    if told and labels:
        check_evidence(model, told, labels[0][0])
    described = signature(model)
    keep = {}
    for tensor in described.outputs:
        row = tensor.shape[2:] if len(tensor.shape) == 3 else tensor.shape[1:]
        width = math.prod(size for size in row if isinstance(size, int))
        keep[tensor.name] = max(MIN_ROWS, MAX_REFERENCE_BYTES // (4 * width * len(found)))
    given = {axis for tensor in described.inputs for axis in tensor.shape}
    derived = [tensor.name for tensor in described.outputs if any(isinstance(axis, str) for axis in {*tensor.shape} - given)]
    counted: list[Case] = []

    def answered() -> Iterator[tuple[Case, Mapping[str, np.ndarray[Any, Any]]]]:
        for case in found:  # one at a time: the logits of a large vocabulary fill the memory
            answers = run_eager(model, case.inputs)
            counts = _counted(model, case, answers) if case.name == LEFT else case.counts
            counted.append(replace(case, counts=counts, shapes={name: answers[name].shape for name in derived}))
            yield counted[-1], answers

    answering = None
    if accurate:
        answering = {
            "task": task,
            "pooling": pooling(snapshot, task, options),
            "mask_token": model.tokenizer.mask_token_id,
            "problem": problem(model),
            "tags": tag_names(model),
        }
    own = _write_reference(out, answered(), described.outputs, keep, answering)
    judged = figures(own, own, told, tag_names(model)) if accurate else {}
    notes = [made.note]
    if told and accurate and "drop" not in judged:
        notes.append(
            f"the original gets nothing right of what data.validation expects, so its field {EXPECTED[task]} judges nothing"
        )
    samples = {f"{number:03d}.{name}": value for number, case in enumerate(counted) for name, value in case.inputs.items()}
    for number, case in enumerate(counted):
        for kind, values in (("counts", case.counts), ("real", case.real)):
            samples |= {f"{number:03d}.{kind}.{name}": value.astype(np.uint8) for name, value in values.items()}
    save_file(samples, str(out / SAMPLES))
    return {
        "architecture": type(model.module).__name__,
        "cases": [_described(case) for case in counted],
        "keep": keep,
        "answering": answering,
        "layers": quantizable(model) if accurate else [],
        "labels": told,
        "judged": [*judged, *ELEMENTS] if accurate else [],
        "left_out": list(model.left_out),
        "note": "; ".join(filter(None, notes)),
        "positions": model.positions,
        "signature": asdict(described),
        "support": _own_support(model, snapshot, out),
    }


def _described(case: Case) -> dict[str, Any]:
    described: dict[str, Any] = {"name": case.name, "shape": list(case.shape)}
    if "input_ids" in case.inputs:
        described["real_tokens"] = int(case.mask.sum())
    if case.shapes:
        described["shapes"] = {name: list(shape) for name, shape in case.shapes.items()}
    return described


def reference_again(
    out: Path, snapshot: Snapshot, task: str, samples: Path, known: Mapping[str, Any], options: Mapping[str, bool]
) -> None:
    """Write `reference.safetensors` for samples that an earlier `reference` made and described. Raises as it does."""
    _set_threads()
    model = load(snapshot, task, aside=out, **options)
    outputs = Signature.from_json(known["signature"]).outputs
    answered = ((case, run_eager(model, case.inputs)) for case in read_cases(samples, known))
    _write_reference(out, answered, outputs, known["keep"], known.get("answering"))


def _write_reference(
    out: Path,
    answered: Iterable[tuple[Case, Mapping[str, np.ndarray[Any, Any]]]],
    outputs: Sequence[Tensor],
    keep: Mapping[str, int],
    answering: Mapping[str, Any] | None,
) -> dict[str, np.ndarray[Any, Any]]:
    """Write the answers of the original, and return those to the validation text by name; none without `answering`."""
    import numpy as np
    from safetensors.numpy import save_file

    expected: dict[str, np.ndarray[Any, Any]] = {}
    texts = Answering(answering)
    for number, (case, answers) in enumerate(answered):
        if case.name == ACCURACY:
            for name, value in texts.add(case, answers).items():
                if not finite(name, value):
                    raise StageError(_not_finite(name, case))
            continue
        for tensor in outputs:
            cut = rows(answers[tensor.name], tensor, case, keep[tensor.name])
            values = np.where(cut.real, cut.values, 0.0).astype(np.float32)
            if not np.isfinite(values).all():
                raise StageError(_not_finite(tensor.name, case))
            expected[f"{number:03d}.{tensor.name}"] = values
    own = texts.stacked()
    save_file({**expected, **{f"{ANSWER}{name}": value for name, value in own.items()}}, str(out / REFERENCE))
    return own


def _not_finite(name: str, case: Case) -> str:
    return (
        f"the original itself gives {name} that is not finite on sample {case.name!r} {case.shape}; the checkpoint is damaged"
    )


def _own_support(model: Model, snapshot: Snapshot, out: Path) -> list[str]:
    """Write below `out` what a release needs and the checkpoint does not have, for a release that loads anywhere: the config
    and the tokenizer that a GGUF holds inside, and a tokenizer's config that transformers 4 cannot read."""
    folder, source = out / "support", snapshot.root
    if any(file.path.endswith(".gguf") for file in snapshot.weights):
        config: Any = model.module.config
        config.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        source = folder
    if (source / TOKENIZER_CONFIG).exists():
        written = json.loads((source / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
        if (readable := for_transformers_4(written)) != written:
            folder.mkdir(exist_ok=True)
            (folder / TOKENIZER_CONFIG).write_bytes((json.dumps(readable, indent=2, ensure_ascii=False) + "\n").encode())
    return sorted(f"support/{path.name}" for path in folder.iterdir()) if folder.exists() else []


def for_transformers_4(config: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json under the names that transformers 4 knows, and 5 reads as its own.

    5 saves what was `PreTrainedTokenizerFast` as `TokenizersBackend`, and a list of further special tokens under a name
    that holds an object in 4: its `AutoTokenizer`, and so every tool that needs it, opens neither.

    >>> for_transformers_4({"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]})
    {'tokenizer_class': 'PreTrainedTokenizerFast', 'additional_special_tokens': ['<a>']}
    """
    known = dict(config)
    if known.get("tokenizer_class") == "TokenizersBackend":
        known["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(known.get("extra_special_tokens"), list) and "additional_special_tokens" not in known:
        known["additional_special_tokens"] = known.pop("extra_special_tokens")
    return known


def _set_threads() -> None:
    import torch

    torch.set_num_threads(LOAD_THREADS)

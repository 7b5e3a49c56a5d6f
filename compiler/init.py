"""A commented pipeline.yaml for a checkpoint, from its files alone. Imports no torch."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compiler.backends import BACKENDS
from compiler.config import ModelSpec, OnnxTargets, Targets, parse
from compiler.errors import ConfigError, SourceError
from compiler.modalities import MODALITIES
from compiler.sources import has_pooling, infer_task, read_config, resolve
from compiler.store import write_file, writing
from compiler.tasks import TASKS, example

TEMPLATE = """\
# What to compile, and how close it must stay. `compile {file}` builds it; `compile plan {file}` says what would run.
schema: 1
output: artifacts                       # releases go to artifacts/<name>/<release>
models:
  - name: {name}
    release: 1.0.0                      # a semantic version; a release never changes
    source: {source}
    sha256:                             # the build stops if the checkpoint is another one
{pins}
    task: {task:<32}# {tasks}
{options}    # data:                             # your own {kind} for the numerics gate, JSON lines such as
    #   validation: {{path: data/validation.jsonl}}   # {example}
    shapes:                             # what the gate covers, besides {besides}
      batch: [1, 8]
{sequence}    targets:                            # formats and precisions: {possible}
{targets}
    # budget:                           # limits; these are the defaults
    #   fp32: {{max_abs: 1.0e-4, cosine: 0.999999}}
    #   bf16: {{cosine: 0.999{argmax}}}
"""


# What a modality's data is called.
KINDS = {"text": "text", "image": "images", "audio": "sound", "image-text": "images and texts"}


def write(
    checkpoint: str,
    output: Path,
    task: str | None,
    revision: str | None,
    opset: int | None,
    trust_remote_code: bool,
    allow_pickle: bool,
    force: bool,
) -> dict[str, Any]:
    """Write a pipeline for a checkpoint and return what was chosen: `name`, `release`, `task`, `source`, `path`.

    Raises:
        ConfigError: the file exists, the task is unknown, or an option does not fit.
        SourceError: there is no checkpoint, or its task cannot be inferred.
    """
    if output.exists() and not force:
        raise ConfigError(f"{output}: exists already; give another --output, or --force to write over it")
    if task is not None and task not in TASKS:
        raise ConfigError(f"--task {task}: unknown; one of {', '.join(TASKS)}")
    if not checkpoint:
        raise ConfigError("CHECKPOINT is empty; give a folder, a GGUF file, package:... or hf:ORG/NAME")
    source = checkpoint if re.match(r"(path|package|hf):", checkpoint) else f"path:{_relative(checkpoint, output.parent)}"
    plain = source
    source = _quoted(source)
    # The output's folder may not be there yet, so look from here.
    here = plain if plain == checkpoint else f"path:{Path(checkpoint).absolute()}"
    try:
        spec = ModelSpec(
            name="checkpoint",
            release="1.0.0",
            source=here,
            revision=revision,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            targets=Targets(onnx=OnnxTargets(precisions=("fp32",), opset=opset)),
        )
    except ValidationError as error:
        detail = error.errors()[0]
        option = detail["loc"][-1] if detail["loc"] else "source"
        raise ConfigError(f"{option}: {detail['msg'].removeprefix('Value error, ')}") from error
    try:
        snapshot = resolve(spec, _real(output.parent))
    except SourceError as error:
        raise SourceError(str(error).replace("set allow_pickle: true", "give --allow-pickle")) from error
    config = read_config(snapshot)
    if snapshot.revision is not None:
        source = plain = snapshot.uri  # a branch moves, a commit does not
    if task is None:
        try:
            task = infer_task(snapshot)
        except SourceError as error:
            raise SourceError(str(error).replace("set task: to", "give --task,")) from error
    modality = TASKS[task].modality
    MODALITIES[modality].check(snapshot, task)
    positions = config.get("max_position_embeddings")
    limit = positions if isinstance(positions, int) and positions > 5 else 128
    number = 1 in (config.get("num_labels"), len(config.get("id2label") or ()))  # which is no label
    chosen = {
        "name": _name(plain),
        "release": "1.0.0",
        "task": task,
        "source": plain,
        "path": str(output),
    }
    pools = task == "feature-extraction" and has_pooling(snapshot)
    lengths = ", ".join(str(length) for length in sorted({min(16, limit - 2), min(128, limit - 2)}))
    text = TEMPLATE.format(
        file=output.name,
        name=chosen["name"],
        source=source,
        pins="\n".join(f"      {_quoted(file.path)}: {file.sha256}" for file in snapshot.weights),
        task=task,
        tasks=", ".join(TASKS),
        options=(trust_remote_code * "    trust_remote_code: true             # runs the Python code in the checkpoint\n")
        + (allow_pickle * "    allow_pickle: true                  # opens pytorch_model.bin, weights only\n")
        + (
            pools
            * "    # sentence_embedding: true          # the pooling that modules.json names in the graph, as an output\n"
        ),
        example=example(task),
        argmax="" if task.endswith("feature-extraction") or number else ", argmax: 0.98",
        kind=KINDS[modality],
        besides="odd, short and longest shapes" if modality == "text" else "odd ones",
        sequence=f"      sequence: [{lengths}]\n" if modality == "text" else "",
        possible="; ".join(f"{name} {', '.join(_precisions(name))}" for name in BACKENDS)
        + ("; int8, with data.calibration" if modality == "text" else ""),
        targets="\n".join(_target(name, opset) for name in BACKENDS),
    )
    parse(text, str(output))  # what is written must be what `build` reads
    with writing(output, "the pipeline"):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_file(output, text.encode())
    return chosen


def _relative(checkpoint: str, folder: Path) -> str:
    return Path(os.path.relpath(Path(checkpoint).absolute(), _real(folder))).as_posix()


def _real(folder: Path) -> Path:
    return Path(os.path.realpath(folder))


def _quoted(text: str) -> str:
    """As YAML reads it back: JSON's quotes, where a plain word would mean something else."""
    return text if re.fullmatch(r"[A-Za-z0-9_./@+=:-]*[A-Za-z0-9_/]", text) and not text.startswith("-") else json.dumps(text)


def _name(source: str) -> str:
    """A release's name from a source: the checkpoint's folder, or what holds it when that is just `model`."""
    parts = [part for part in re.split(r"[:/]", source.partition("@")[0])[1:] if part not in ("", ".", "..", "model")]
    last = parts[-1] if parts else "model"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", last.removesuffix(".gguf")).strip("-._")
    return name[:128].rstrip("-._") or "model"


def _precisions(name: str) -> list[str]:
    """Those of a format that need nothing but the checkpoint: int8 needs text to calibrate on."""
    return [precision for precision in BACKENDS[name].PRECISIONS if precision != "int8"]


def _target(name: str, opset: int | None) -> str:
    precisions = ", ".join(_precisions(name))
    if name == "onnx" and opset is not None:
        return f"      {name}: {{precisions: [{precisions}], opset: {opset}}}"
    return f"      {name}: [{precisions}]"

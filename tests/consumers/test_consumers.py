"""A release, as it is, in the tools that people already run; run by `make consumers`, which makes their environments.

Each consumer is a script of `scripts/` or a program of `cpp/` that gets a request as JSON and prints its answers as JSON. They
are held against the untouched checkpoint in eager fp32, within the limits that the artifact passed when it was released.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compiler.backends import BACKENDS
from compiler.manifest import MANIFEST, VALIDATION
from compiler.numerics import cosine
from tests.consumers.conftest import BATCHES, FIGURES, PAIRS, ROOT, Array

HERE = Path(__file__).parent
ENVIRONMENTS = ROOT / ".venv/consumers"
TASKS = ("feature-extraction", "text-classification")
# Transformers.js finds a file by what it calls its dtype.
DTYPES = {"fp32": "fp32", "int8": "q8"}


@dataclass(frozen=True)
class Consumer:
    """`program` is its file; `environment` its folder in .venv/consumers, None for ours; `precisions` those that it can be
    told to open, None for all."""

    name: str
    program: str
    environment: str | None
    formats: tuple[str, ...]
    tasks: tuple[str, ...] = TASKS
    precisions: tuple[str, ...] | None = None


CONSUMERS = (
    Consumer("optimum ORTModel", "scripts/optimum_onnx.py", "optimum", ("onnx",)),
    Consumer("optimum-intel OVModel", "scripts/optimum_intel.py", "optimum", ("openvino",)),
    Consumer("SentenceTransformer", "scripts/sentence_embedding.py", "optimum", ("onnx", "openvino"), TASKS[:1]),
    Consumer("CrossEncoder", "scripts/cross_encoder.py", "optimum", ("onnx", "openvino"), TASKS[1:]),
    Consumer("Transformers.js", "scripts/transformers_js.mjs", "transformers-js", ("onnx",), precisions=tuple(DTYPES)),
    # export.json names one file of a format.
    Consumer("transformers ExportedModel", "scripts/exported_model.py", None, ("onnx", "openvino"), precisions=("fp32",)),
    Consumer("runtimes, numpy, tokenizers", "scripts/runtimes.py", "runtimes", ("onnx", "openvino")),
    Consumer("C++", "cpp/torchscript", None, ("torchscript",)),
    Consumer("C++", "cpp/openvino_ir", None, ("openvino",)),
)
CASES = [
    pytest.param(consumer, task, name, precision, id=f"{Path(consumer.program).stem}-{task}-{name}-{precision}")
    for consumer in CONSUMERS
    for task in consumer.tasks
    for name in consumer.formats
    for precision in BACKENDS[name].PRECISIONS
    if consumer.precisions is None or precision in consumer.precisions
]


def run(program: Path | str, *arguments: object, given: str, folder: Path) -> dict[str, Any]:
    """Run a consumer, without a network, and read its last line."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    result = subprocess.run(
        [str(program), *map(str, arguments)],
        input=given,
        cwd=folder,
        env={**kept, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HOME": str(folder / "home")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def environment(name: str) -> Path:
    """The folder of an environment. Skips, with the reason, where it could not be made."""
    folder = ENVIRONMENTS / name
    if (folder / "failed").exists():
        pytest.skip((folder / "failed").read_text(encoding="utf-8").strip())
    if not (folder / "ready").exists():
        pytest.skip(f".venv/consumers/{name} is not there: `make consumers` makes it")
    return folder


@pytest.fixture(scope="session")
def programs() -> Path:
    """The C++ programs, built with the headers and libraries of our torch's and openvino's wheels."""
    import openvino
    import torch

    if not (shutil.which("cmake") and shutil.which("c++")):
        pytest.skip("no cmake or no C++ compiler here")
    build = ENVIRONMENTS / "cpp"
    folders = [
        f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}",
        f"-DOpenVINO_DIR={Path(openvino.__file__).parent / 'cmake'}",
    ]
    for command in (["cmake", "-S", str(HERE / "cpp"), "-B", str(build), *folders], ["cmake", "--build", str(build)]):
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stdout + built.stderr
    return build


def artifact_of(release: Path, name: str, precision: str) -> Mapping[str, Any]:
    """An artifact's entry in the manifest."""
    artifacts = json.loads((release / MANIFEST).read_text(encoding="utf-8"))["artifacts"]
    return next(entry for entry in artifacts if (entry["format"], entry["precision"]) == (name, precision))


def limits_of(release: Path, name: str, precision: str) -> dict[str, float]:
    """The limits that the artifact passed, by the name of the figure."""
    artifacts = json.loads((release / VALIDATION).read_text(encoding="utf-8"))["artifacts"]
    entry = next(entry for entry in artifacts if (entry["format"], entry["precision"]) == (name, precision))
    return {check["name"]: check["limit"] for check in entry["checks"]}


def encoded(release: Path) -> str:
    """The batches as the C++ programs read them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(release)
    lines = [str(len(BATCHES))]
    for texts in BATCHES:
        inputs = tokenizer(texts, padding=True, return_tensors="np")
        lines.append(" ".join(map(str, inputs["input_ids"].shape)))
        lines += [" ".join(map(str, inputs[key].ravel())) for key in ("input_ids", "attention_mask", "token_type_ids")]
    return "\n".join(lines)


def rows(answer: Mapping[str, Any], release: Path) -> list[Array]:
    """The answers to each batch, `[rows, width]`; of what answers for tokens, the real ones."""
    from transformers import AutoTokenizer

    arrays = [np.asarray(entry["values"], dtype=np.float64).reshape(entry["shape"]) for entry in answer["answers"]]
    if answer["output"] != "last_hidden_state":
        return arrays
    tokenizer = AutoTokenizer.from_pretrained(release)
    masks = [tokenizer(texts, padding=True, return_tensors="np")["attention_mask"] > 0 for texts in BATCHES]
    return [array[mask] for array, mask in zip(arrays, masks, strict=True)]


def embeddings(answer: Mapping[str, Any], release: Path) -> list[Array]:
    """The means of the real tokens of each text, of length 1, `[batch, width]`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(release)
    found = []
    for entry, texts in zip(answer["answers"], BATCHES, strict=True):
        tokens = np.asarray(entry["values"], dtype=np.float64).reshape(entry["shape"])
        mask = tokenizer(texts, padding=True, return_tensors="np")["attention_mask"][..., None]
        mean = (tokens * mask).sum(axis=1) / mask.sum(axis=1)
        found.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    return found


def figures(expected: list[Array], actual: list[Array], output: str) -> dict[str, float]:
    """The figures that `compiler.numerics` judges artifacts by, over all rows."""
    assert [array.shape for array in actual] == [array.shape for array in expected]
    original, found = np.concatenate(expected).astype(np.float64), np.concatenate(actual)
    assert np.isfinite(found).all()
    known = {
        "max_abs": float(np.abs(found - original).max() / max(1.0, np.abs(original).max())),
        "cosine": float(cosine(original, found).min()),
    }
    if output.startswith(("logits", "scores")):
        known["argmax"] = float((original.argmax(1) == found.argmax(1)).mean())
    return known


def beyond(found: Mapping[str, float], limits: Mapping[str, float]) -> list[str]:
    """The figures that are past their limits."""
    return [
        f"{name} {found[name]} (limit {limit})"
        for name, limit in limits.items()
        if name in found and (found[name] > limit if name == "max_abs" else found[name] < limit)
    ]


@pytest.mark.parametrize(("consumer", "task", "name", "precision"), CASES)
def test_consumer_answers_as_the_original(
    consumer: Consumer,
    task: str,
    name: str,
    precision: str,
    releases: dict[str, Path],
    reference: dict[str, dict[str, list[Array]]],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    release = releases[task]
    artifact = artifact_of(release, name, precision)
    path, settings = artifact["files"][0]["path"], artifact["runtime"]
    if consumer.program.startswith("cpp/"):
        program = request.getfixturevalue("programs") / Path(consumer.program).name
        output = {"feature-extraction": "last_hidden_state", "text-classification": "logits"}[task]
        told = []
        if name == "openvino":
            told = [settings["device"], *(f"{key}={value}" for key, value in settings.items() if key != "device")]
        answer = run(program, release / path, output, *told, given=encoded(release), folder=tmp_path)
    else:
        asked = {"release": str(release), "task": task, "format": name, "file": path, "settings": settings}
        asked |= {"batches": BATCHES, "pairs": PAIRS, "dtype": DTYPES.get(precision)}
        folder = None if consumer.environment is None else environment(consumer.environment)
        if consumer.program.endswith(".mjs"):
            assert folder is not None
            command, work = folder / "bin/node", folder
        else:
            command, work = (Path(sys.executable) if folder is None else folder / "bin/python"), tmp_path
        answer = run(command, HERE / consumer.program, given=json.dumps(asked), folder=work)
    output, actual = answer["output"], rows(answer, release)
    if precision == "int8" and output == "last_hidden_state":  # its limits are for texts' embeddings
        output, actual = "sentence_embedding", embeddings(answer, release)
    found = figures(reference[task][output], actual, output)
    FIGURES.setdefault(consumer.name, {}).setdefault(f"{name} {precision}", {})[task] = found
    assert beyond(found, limits_of(release, name, precision)) == []


def test_every_artifact_has_a_consumer(releases: dict[str, Path]) -> None:
    tried = {(case.values[1], case.values[2], case.values[3]) for case in CASES}
    for task, release in releases.items():
        entries = json.loads((release / MANIFEST).read_text(encoding="utf-8"))["artifacts"]
        assert entries
        assert {(task, entry["format"], entry["precision"]) for entry in entries} <= tried


def test_another_answer_is_noticed(reference: dict[str, dict[str, list[Array]]]) -> None:
    limits = {"max_abs": 1e-4, "cosine": 0.999999, "argmax": 0.98}
    for output in ("logits", "scores"):
        expected = reference["text-classification"][output]
        assert beyond(figures(expected, expected, output), limits) == []
        other = figures(expected, [array[::-1] for array in expected], output)
        assert [line.split()[0] for line in beyond(other, limits)] == ["max_abs", "cosine", "argmax"]
    with pytest.raises(AssertionError):
        figures(expected, [array[:, :-1] for array in expected], "scores")


def test_what_cannot_be_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the script that makes environments, and by the tests that would need it."""
    monkeypatch.setattr(sys.modules[__name__], "ENVIRONMENTS", tmp_path / ".venv/consumers")
    with pytest.raises(pytest.skip.Exception, match="make consumers"):
        environment("runtimes")
    script = shutil.copy(HERE / "environment.sh", tmp_path)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements/runtimes.txt").write_text(f"{tmp_path}/nothing.whl\n")
    made = subprocess.run(
        ["sh", script, "runtimes", sys.executable], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert made.returncode == 0 and "nothing.whl" in made.stderr, made
    with pytest.raises(pytest.skip.Exception, match=r"runtimes: packages cannot be installed: ERROR: .*nothing\.whl"):
        environment("runtimes")

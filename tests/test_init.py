"""`compile init`: a pipeline.yaml from a checkpoint's files alone, commented, that `plan` takes as it is, without torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from compiler.config import ModelSpec, read
from compiler.hashing import file_sha256
from compiler.sources import resolve
from compiler.tasks import TASKS
from tests.conftest import Command, error_line
from tests.hub import Hub
from tests.releases import add_sentence_files

HEADS = [(task, f"Any{entry.head}") for task, entry in TASKS.items()]
PROCESSORS = {"image": {"size": 32}, "audio": {"sampling_rate": 16000}, "image-text": {"size": 32}}


def fake(folder: Path, **config: Any) -> Path:
    """A checkpoint that is only looked at, never loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    described = {"model_type": "bert", "architectures": ["BertModel"], "max_position_embeddings": 64, **config}
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def written(path: Path) -> ModelSpec:
    return read(path).models[0]


def usage_error(result: subprocess.CompletedProcess[str]) -> str:
    """What a wrong option is refused with: a message, no traceback, exit code 1 or 2."""
    assert result.returncode in (1, 2), (result.returncode, result.stderr)
    assert "Traceback" not in result.stderr
    return result.stderr


def test_pipeline_of_a_checkpoint(command: Command, bert: Path, tmp_path: Path) -> None:
    result = command("init", bert)
    assert result.returncode == 0, result.stderr
    assert "feature-extraction" in result.stdout
    assert "compile pipeline.yaml" in result.stdout
    spec = written(tmp_path / "pipeline.yaml")
    assert spec.task == "feature-extraction"
    assert spec.release == "1.0.0"
    assert spec.sha256 == {"model.safetensors": file_sha256(bert / "model.safetensors")}
    assert [str(target) for target in spec.targets.list()] == [
        "torchscript fp32", "torchscript bf16", "onnx fp32", "openvino fp32", "openvino bf16",
    ]  # fmt: skip
    assert spec.shapes.sequence == (16, 62)
    assert resolve(spec, tmp_path).root.resolve() == bert.resolve()


def test_every_key_of_the_file_is_commented(command: Command, tmp_path: Path) -> None:
    fake(tmp_path / "checkpoint")
    assert command("init", "checkpoint").returncode == 0
    text = (tmp_path / "pipeline.yaml").read_text()
    assert text.startswith("# ")
    for key in ("release:", "sha256:", "task:", "# data:", "shapes:", "targets:", "# budget:"):
        line = next(line for line in text.splitlines() if line.strip().startswith(key))
        assert "# " in line, line
    task = next(line for line in text.splitlines() if line.strip().startswith("task:"))
    assert all(name in task for name in TASKS)


@pytest.mark.parametrize(
    ("architecture", "labels", "argmax"),
    [("BertModel", 2, None), ("BertForSequenceClassification", 2, 0.98), ("BertForSequenceClassification", 1, None)],
)
def test_what_is_commented_out_is_valid_as_it_stands(
    command: Command, tmp_path: Path, architecture: str, labels: int, argmax: float | None
) -> None:
    """A limit of what the task has no figure of would be none to hold."""
    names = {str(number): f"LABEL_{number}" for number in range(labels)}
    fake(tmp_path / "checkpoint", architectures=[architecture], id2label=names)
    assert command("init", "checkpoint").returncode == 0
    path = tmp_path / "pipeline.yaml"
    lines = path.read_text().splitlines()
    path.write_text("".join(re.sub("^    # ", "    ", line) + "\n" for line in lines))
    spec = written(path)
    assert spec.data.validation is not None
    assert spec.budget.limits("fp32").max_abs == 1e-4
    assert spec.budget.fp32.max_abs == 1e-4
    assert spec.budget.bf16.argmax == argmax


@pytest.mark.parametrize(("task", "architecture"), HEADS, ids=[task for task, _ in HEADS])
def test_task_is_that_of_the_head(command: Command, tmp_path: Path, task: str, architecture: str) -> None:
    folder = fake(tmp_path / "checkpoint", architectures=[architecture])
    modality = TASKS[task].modality
    if modality in PROCESSORS:
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[modality]))
    if modality == "image":
        (folder / "tokenizer.json").unlink()
    assert command("init", "checkpoint").returncode == 0
    spec = written(tmp_path / "pipeline.yaml")
    assert spec.task == task
    assert (spec.shapes.sequence is not None) == (modality == "text")
    assert command("plan").returncode == 0


def test_sentence_transformer_is_an_embedding_model(command: Command, tmp_path: Path) -> None:
    folder = fake(tmp_path / "checkpoint", architectures=["BertForMaskedLM"])
    (folder / "modules.json").write_text("[]")
    assert command("init", "checkpoint").returncode == 0
    assert written(tmp_path / "pipeline.yaml").task == "feature-extraction"
    hint = "    # sentence_embedding: true "
    assert hint not in (tmp_path / "pipeline.yaml").read_text()
    add_sentence_files(folder)
    assert command("init", "checkpoint", "--force").returncode == 0
    assert hint in (tmp_path / "pipeline.yaml").read_text()
    assert command("init", "checkpoint", "--task", "fill-mask", "--force").returncode == 0
    assert hint not in (tmp_path / "pipeline.yaml").read_text()


def test_task_that_is_given_wins(command: Command, tmp_path: Path) -> None:
    fake(tmp_path / "checkpoint", architectures=["BertForPreTraining"])
    assert command("init", "checkpoint", "--task", "fill-mask").returncode == 0
    assert written(tmp_path / "pipeline.yaml").task == "fill-mask"


def test_head_that_means_no_task_tells_of_the_option(command: Command, tmp_path: Path) -> None:
    fake(tmp_path / "checkpoint", architectures=["BertForPreTraining"])
    assert "--task" in error_line(command("init", "checkpoint"))


def test_config_that_says_nothing_is_no_embedding_model(command: Command, tmp_path: Path) -> None:
    folder = fake(tmp_path / "checkpoint")
    (folder / "config.json").write_text("{}")
    assert "no task can be inferred" in error_line(command("init", "checkpoint"))
    assert command("init", "checkpoint", "--task", "fill-mask").returncode == 0


def test_unknown_task(command: Command, tmp_path: Path) -> None:
    fake(tmp_path / "checkpoint")
    message = usage_error(command("init", "checkpoint", "--task", "translation"))
    assert "translation" in message
    assert all(task in message for task in TASKS)
    assert not (tmp_path / "pipeline.yaml").exists()


def test_file_that_is_there_stays(command: Command, tmp_path: Path) -> None:
    fake(tmp_path / "checkpoint")
    (tmp_path / "pipeline.yaml").write_text("mine")
    assert "--force" in error_line(command("init", "checkpoint"))
    assert (tmp_path / "pipeline.yaml").read_text() == "mine"
    assert command("init", "checkpoint", "--force").returncode == 0
    assert written(tmp_path / "pipeline.yaml").name == "checkpoint"


def test_force_does_not_write_over_a_folder(command: Command, tmp_path: Path) -> None:
    fake(tmp_path / "checkpoint")
    (tmp_path / "out").mkdir()
    error_line(command("init", "checkpoint", "-o", "out", "--force"))


def test_opset_is_written(command: Command, tmp_path: Path) -> None:
    fake(tmp_path / "checkpoint")
    assert command("init", "checkpoint", "--opset", 20).returncode == 0
    spec = written(tmp_path / "pipeline.yaml")
    assert [target.opset for target in spec.targets.list() if target.format == "onnx"] == [20]


@pytest.mark.parametrize("opset", [5, 99, "new"])
def test_opset_out_of_range(command: Command, tmp_path: Path, opset: object) -> None:
    fake(tmp_path / "checkpoint")
    assert "opset" in usage_error(command("init", "checkpoint", "--opset", opset))


@pytest.mark.parametrize(
    "arguments",
    [("checkpoint", "--revision", "main"), ("hf:a b/c",), ("hf:o/n@x", "--revision", "y"), ("path:",), ("package:",), ("",)],
)
def test_arguments_that_do_not_fit(command: Command, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    fake(tmp_path / "checkpoint")
    usage_error(command("init", *arguments))
    assert not (tmp_path / "pipeline.yaml").exists()


def test_result_as_json(command: Command, tmp_path: Path) -> None:
    fake(tmp_path / "checkpoint")
    result = command("init", "checkpoint", "--json")
    assert result.returncode == 0
    assert json.loads(result.stdout) == {
        "name": "checkpoint",
        "release": "1.0.0",
        "task": "feature-extraction",
        "source": "path:checkpoint",
        "path": "pipeline.yaml",
    }


def test_error_as_json(command: Command) -> None:
    result = command("init", "nowhere", "--json")
    assert json.loads(result.stdout)["kind"] == "SourceError"
    assert "nowhere" in error_line(result)


def test_no_checkpoint_there(command: Command, tmp_path: Path) -> None:
    assert "no such file or folder" in error_line(command("init", "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "not a checkpoint" in error_line(command("init", "empty"))
    assert not (tmp_path / "pipeline.yaml").exists()


@pytest.mark.parametrize("output", ["there/pipeline.yaml", "new/folder/pipeline.yaml", "there/deep/../pipeline.yaml"])
def test_source_is_relative_to_the_file(command: Command, tmp_path: Path, output: str) -> None:
    fake(tmp_path / "checkpoint")
    (tmp_path / "there" / "deep").mkdir(parents=True)
    result = command("init", "checkpoint", "-o", output)
    assert result.returncode == 0, result.stderr
    path = tmp_path / output
    spec = written(path)
    assert spec.source.startswith("path:../")
    assert resolve(spec, path.parent).root.resolve() == (tmp_path / "checkpoint").resolve()


def test_source_is_right_where_the_file_is_behind_a_link(command: Command, tmp_path: Path) -> None:
    fake(tmp_path / "checkpoint")
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    result = command("init", "checkpoint", "-o", "link/pipeline.yaml")
    assert result.returncode == 0, result.stderr
    path = tmp_path / "far" / "away" / "pipeline.yaml"
    assert resolve(written(path), path.parent).root.resolve() == (tmp_path / "checkpoint").resolve()


def test_source_tells_nothing_of_the_machine(command: Command, tmp_path: Path) -> None:
    fake(tmp_path / "checkpoint")
    assert command("init", tmp_path / "checkpoint").returncode == 0
    assert str(tmp_path) not in (tmp_path / "pipeline.yaml").read_text()


ODD = ["my model", "it's", 'a"b', "a #b", "a: b", "a\\ b", "{x}", "[v1]", "- x", "naïve", "a,b", "x:", "é", "x" * 200]


@pytest.mark.parametrize("name", ODD)
def test_folder_of_an_odd_name(command: Command, tmp_path: Path, name: str) -> None:
    folder = fake(tmp_path / name)
    result = command("init", f"./{name}")
    assert result.returncode == 0, result.stderr
    assert resolve(written(tmp_path / "pipeline.yaml"), tmp_path).root.resolve() == folder.resolve()


@pytest.mark.parametrize("name", [*ODD[:-1], "model", "-"])
def test_gguf_of_an_odd_name_is_pinned(command: Command, tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.gguf"
    path.write_bytes(b"GGUF")
    result = command("init", f"./{path.name}")
    assert result.returncode == 0, result.stderr
    spec = written(tmp_path / "pipeline.yaml")
    assert spec.sha256 == {path.name: file_sha256(path)}
    assert [file.path for file in resolve(spec, tmp_path).weights] == [path.name]


def test_name_is_of_what_holds_a_folder_called_model(command: Command, tmp_path: Path) -> None:
    fake(tmp_path / "my-encoder" / "model")
    assert command("init", "my-encoder/model").returncode == 0
    assert written(tmp_path / "pipeline.yaml").name == "my-encoder"


def test_checkpoint_is_the_folder_that_one_is_in(command: Command, tmp_path: Path) -> None:
    fake(tmp_path)
    assert command("init", ".").returncode == 0
    assert resolve(written(tmp_path / "pipeline.yaml"), tmp_path).weights


@pytest.mark.parametrize(
    ("positions", "expected"), [(512, (16, 128)), (64, (16, 62)), (12, (10,)), (5, None), (True, None), ("x", None)]
)
def test_sequences_fit_the_positions(
    command: Command, tmp_path: Path, positions: Any, expected: tuple[int, ...] | None
) -> None:
    fake(tmp_path / "checkpoint", max_position_embeddings=positions)
    result = command("init", "checkpoint")
    assert result.returncode == 0, result.stderr
    sequence = written(tmp_path / "pipeline.yaml").shapes.sequence
    assert expected is None or sequence == expected


def test_pickle_is_refused_with_something_that_can_be_done(command: Command, tmp_path: Path) -> None:
    folder = fake(tmp_path / "checkpoint")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "--allow-pickle" in error_line(command("init", "checkpoint"))
    assert command("init", "checkpoint", "--allow-pickle").returncode == 0
    assert written(tmp_path / "pipeline.yaml").allow_pickle
    assert command("plan").returncode == 0


def test_remote_code_is_written_as_asked(command: Command, tmp_path: Path) -> None:
    folder = fake(tmp_path / "checkpoint")
    (folder / "modeling.py").write_text("raise SystemExit('ran')")
    assert command("init", "checkpoint").returncode == 0
    assert not written(tmp_path / "pipeline.yaml").trust_remote_code
    assert command("init", "checkpoint", "--force", "--trust-remote-code").returncode == 0
    assert written(tmp_path / "pipeline.yaml").trust_remote_code


def test_plan_takes_what_init_wrote(command: Command, bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "checkpoint")
    assert command("init", "checkpoint").returncode == 0
    result = command("plan", "--json", cache=tmp_path / "cache")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [row["state"] for row in rows] == ["run"] * len(rows)
    assert {"load", "export onnx fp32", "validate openvino bf16", "package"} <= {row["step"] for row in rows}
    assert not (tmp_path / "artifacts").exists()


def test_init_and_plan_import_no_torch(tmp_path: Path) -> None:
    fake(tmp_path / "checkpoint")
    code = (
        "import sys\nfrom compiler.cli import cli\n"
        "cli.main(['init', 'checkpoint'], standalone_mode=False)\ncli.main(['plan'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'openvino', 'optimum', 'huggingface_hub'}\n"
        "print(sorted(heavy & sys.modules.keys()), file=sys.stderr)"
    )
    environment = {**os.environ, "COMPILE_CACHE_DIR": str(tmp_path / "cache")}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == "[]\n"


@pytest.mark.parametrize("revision", [None, "stable"])
def test_hub_checkpoint_is_pinned_to_its_commit(command: Command, tmp_path: Path, revision: str | None) -> None:
    with Hub() as hub:
        commit = hub.add("org/encoder", fake(tmp_path / "checkpoint"), branches=("main", "stable"))
        options = [] if revision is None else ["--revision", revision]
        result = command("init", "hf:org/encoder", *options, environment=hub.environment(tmp_path))
    assert result.returncode == 0, result.stderr
    spec = written(tmp_path / "pipeline.yaml")
    assert spec.source == f"hf:org/encoder@{commit}"
    assert spec.revision is None
    assert spec.name == "encoder"
    assert yaml.safe_load((tmp_path / "pipeline.yaml").read_text())["models"][0]["sha256"]

"""Blame on files that are really damaged: the weights of one layer, changed in the shipped file, are named in every format."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from compiler import cpu
from compiler.backends import BACKENDS, onnx
from compiler.blame import Blame, Departure, Row, blame, choose, smallest
from compiler.build import Build, Context
from compiler.cli.output import print_blame
from compiler.config import read
from compiler.counterparts import NOT_FINITE, Walk, align, read_values
from compiler.eager import Key, layers, trace
from compiler.errors import NumericsError, StageError
from compiler.hashing import hash_file
from compiler.manifest import MANIFEST, from_bytes
from compiler.manifest import SAMPLES as RELEASED
from compiler.numerics import Array, Case
from compiler.quantization.layers import Layers
from compiler.samples import NONE, read_cases
from compiler.spine import plan_model
from compiler.stages.load import SAMPLES, load
from compiler.store import Store
from compiler.types import Artifact, File, Target
from compiler.verify import find_original, known_samples, open_release
from tests.backends.test_torchscript_int8 import plan
from tests.conftest import Command, build_folder, error_line, seal
from tests.releases import release_of
from tests.test_contract import PRECISIONS, Prepared

# Sizes of which none is another, nor a multiple of it.
ODD = {
    "bert": {"hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 3},
    "distilbert": {"dim": 36, "hidden_dim": 50, "n_heads": 3, "n_layers": 3},
    "modernbert": {"hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 3},
}
BERT = ["encoder.layer.1.output.dense", "encoder.layer.0.attention.output.dense", "embeddings.word_embeddings"]
DISTILBERT = ["distilbert.transformer.layer.1.attention.out_lin", "pre_classifier"]
MODERNBERT = ["model.layers.1.mlp.Wi", "model.layers.2.attn.Wo", "classifier"]
OTHERS = [Target("torchscript", "bf16"), Target("onnx", "fp32"), Target("openvino", "fp32")]
QUICK = [pytest.param(target, marks=[pytest.mark.slow] if target.format == "openvino" else []) for target in OTHERS]


def bf16(weights: Array) -> Array:
    """The bits of fp32 numbers that are rounded to bf16, ties to even."""
    bits = np.ascontiguousarray(weights, dtype=np.float32).view(np.uint32)
    rounded: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def spoil(folder: Path, artifact: Artifact, weights: Array, change: Callable[[Array], Array]) -> None:
    """Change a weight matrix where it stands in an artifact's files, as it is or transposed, in fp32 or bf16."""
    spoiled = change(weights.copy())
    assert spoiled.shape == weights.shape
    for file in artifact.files:
        content = (folder / file.path).read_bytes()
        for old, new in ((weights, spoiled), (weights.T, spoiled.T)):
            for bits in (np.ascontiguousarray, bf16):
                if (found := bits(old).tobytes()) in content:
                    (folder / file.path).write_bytes(content.replace(found, bits(new).tobytes()))
                    return
    raise AssertionError("the weights are not in the files")


def reverse(weights: Array) -> Array:
    return weights[::-1]


class Subject:
    """A checkpoint with its artifacts, to spoil copies of."""

    def __init__(self, folder: Path, architecture: str, task: str) -> None:
        self.prepared = Prepared(folder, architecture, task, **ODD[architecture])
        self.weights = load_file(folder / "checkpoint/model.safetensors")

    def blame(self, aside: Path, root: Path, artifact: Artifact) -> Blame:
        aside.mkdir()
        prepared = self.prepared
        samples = prepared.reference / SAMPLES
        return blame(aside, root, artifact, prepared.snapshot, prepared.task, samples, prepared.known, {})

    def spoiled(self, folder: Path, target: Target, name: str, change: Callable[[Array], Array] = reverse) -> Blame:
        root, artifact = self.prepared.export(target)
        shutil.copytree(root, folder / "spoiled")
        spoil(folder / "spoiled", artifact, self.weights[f"{name}.weight"], change)
        return self.blame(folder / "aside", folder / "spoiled", artifact)


@pytest.fixture(scope="module")
def bert_subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(tmp_path_factory.mktemp("bert"), "bert", "feature-extraction")


@pytest.fixture(scope="module")
def distilbert(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(tmp_path_factory.mktemp("distilbert"), "distilbert", "text-classification")


@pytest.fixture(scope="module")
def modernbert(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(tmp_path_factory.mktemp("modernbert"), "modernbert", "text-classification")


def check(subject: Subject, folder: Path, target: Target, names: list[str]) -> None:
    """Unspoiled, no layer departs; spoiled, the module is named, and the layers behind it are not accused."""
    sound = subject.blame(folder / "sound", *subject.prepared.export(target))
    assert sound.departs is None, sound.verdict
    assert "no layer departs" in sound.verdict
    count = 2 if names[0] in BERT else 3  # layers
    assert len([row for row in sound.layers if re.search(r"layers?\.\d+$", row.layer)]) == count
    assert all(row.own is not None and row.own < sound.allowed / 4 for row in sound.layers), sound.layers
    for number, name in enumerate(names):
        (folder / str(number)).mkdir()
        found = subject.spoiled(folder / str(number), target, name)
        assert found.departs is not None, name
        assert found.departs.layer == name
        assert name.startswith(found.departs.within) or found.departs.within.startswith("output ")
        assert found.departs.error > 0.5
        departing = [row.layer for row in found.layers if row.own is not None and row.own > found.allowed]
        assert departing == [found.departs.within]
        assert name in [row.layer for row in found.inside]
        json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize(("format", "precision"), PRECISIONS, ids=["-".join(pair) for pair in PRECISIONS])
def test_bert(bert_subject: Subject, tmp_path: Path, format: str, precision: str) -> None:
    names = BERT if precision == "fp32" else BERT[:1]
    check(bert_subject, tmp_path, Target(format, precision), names)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", QUICK, ids=str)
def test_distilbert(distilbert: Subject, tmp_path: Path, target: Target) -> None:
    """Other names, no token types, a head of two modules."""
    check(distilbert, tmp_path, target, DISTILBERT)


@pytest.mark.slow
@pytest.mark.parametrize("target", OTHERS, ids=str)
def test_modernbert(modernbert: Subject, tmp_path: Path, target: Target) -> None:
    """Norms before the layers, gates, rotary positions, a head of several modules."""
    check(modernbert, tmp_path, target, MODERNBERT)


def test_queries_that_are_fused_with_attention(bert_subject: Subject, tmp_path: Path) -> None:
    """ONNX's operator makes queries, keys and values itself, so its answer is the first that is seen."""
    name = "encoder.layer.1.attention.self"
    root, artifact = bert_subject.prepared.export(Target("onnx", "fp32"))
    shutil.copytree(root, tmp_path / "spoiled")
    parts = [bert_subject.weights[f"{name}.{part}.weight"] for part in ("query", "key", "value")]
    spoil(tmp_path / "spoiled", artifact, np.concatenate(parts), reverse)
    found = bert_subject.blame(tmp_path / "aside", tmp_path / "spoiled", artifact)
    assert found.departs is not None
    assert found.departs.layer == name
    unseen = [row.layer for row in found.inside if row.value is None]
    assert unseen[:3] == [f"{name}.{part}" for part in ("query", "key", "value")]


def test_two_layers_in_a_row(bert_subject: Subject, tmp_path: Path) -> None:
    """No layer behind the first is right, so nothing says which value was its output; it is named all the same."""
    root, artifact = bert_subject.prepared.export(Target("openvino", "fp32"))
    shutil.copytree(root, tmp_path / "spoiled")
    for number in (0, 1):
        spoil(tmp_path / "spoiled", artifact, bert_subject.weights[f"encoder.layer.{number}.output.dense.weight"], reverse)
    found = bert_subject.blame(tmp_path / "aside", tmp_path / "spoiled", artifact)
    assert found.departs is not None
    assert found.departs.layer == "encoder.layer.0.output.dense"


def test_not_a_number(bert_subject: Subject, tmp_path: Path) -> None:
    name = "encoder.layer.1.intermediate.dense"
    found = bert_subject.spoiled(tmp_path, Target("torchscript", "fp32"), name, lambda weights: weights * np.float32("nan"))
    assert found.departs is not None
    assert found.departs.error == NOT_FINITE
    assert found.verdict == f"first departs at {name} (not finite)"
    json.dumps(found.to_json(), allow_nan=False)


def test_a_precision_that_nobody_told_of(bert_subject: Subject, tmp_path: Path) -> None:
    """Weights in 8 bits, quantized here by ONNX Runtime: layers are found, at that precision's own limit."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root, artifact = bert_subject.prepared.export(Target("onnx", "fp32"))
    (tmp_path / "onnx").mkdir()
    path = artifact.files[0].path
    quantize_dynamic(root / path, tmp_path / path, weight_type=QuantType.QInt8, per_channel=True)
    found = bert_subject.blame(tmp_path / "aside", tmp_path, replace(artifact, precision="int8"))
    assert found.departs is None, found.verdict
    owns = [row.own for row in found.layers]
    assert len(owns) == 4
    assert all(own is not None and own < found.allowed for own in owns)
    assert max(own for own in owns if own is not None) > 1e-3  # it is quantized


INT8 = [f"encoder.layer.1.{name}" for name in ("output.dense", "attention.output.dense", "attention.self.value")]


@pytest.mark.parametrize("format", BACKENDS)
def test_int8(bert_subject: Subject, tmp_path: Path, format: str) -> None:
    """Products in 8 bits, those of the first layer's attention left out, where others' inputs are evened out in the layer
    before: sound, no layer departs; spoiled, the one is named, and not what stands in the file in another form."""
    root, artifact = bert_subject.prepared.export(Target(format, "fp32"))
    case = choose(read_cases(bert_subject.prepared.reference / SAMPLES, bert_subject.prepared.known))
    module = load(bert_subject.prepared.snapshot, bert_subject.prepared.task).module
    inputs = {name: torch.from_numpy(value) for name, value in case.inputs.items()}
    found = plan(module, inputs, most=127 if cpu.has(cpu.WIDE_SUMS) else 63)
    chosen = [
        layer for layer in found if not layer.name.startswith("encoder.layer.0.attention") and "pooler" not in layer.name
    ]
    BACKENDS[format].quantize(tmp_path / "int8", root, Layers(chosen), "fp32")
    files = tuple(File(path, "", 0) for path in BACKENDS[format].files("int8"))
    made = replace(artifact, precision="int8", files=files)
    sound = bert_subject.blame(tmp_path / "sound", tmp_path / "int8", made)
    assert sound.departs is None, sound.verdict
    for number, name in enumerate(INT8):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "int8", folder / "spoiled")
        spoil(folder / "spoiled", made, next(layer.weight for layer in chosen if layer.name == name), reverse)
        spoiled = bert_subject.blame(folder / "aside", folder / "spoiled", made)
        assert spoiled.departs is not None, name
        assert spoiled.departs.layer == name


def test_a_layer_that_is_not_in_the_file(bert_subject: Subject) -> None:
    """A layer's output that is nowhere to be seen does not depart when what follows is right."""
    prepared = bert_subject.prepared
    root, artifact = prepared.export(Target("onnx", "fp32"))
    case = choose(read_cases(prepared.reference / SAMPLES, prepared.known))
    module = load(prepared.snapshot, prepared.task).module
    plain = trace(module, case.inputs)
    keys = layers(module, plain.records, case.mask.size)
    assert keys == [Key("encoder.layer.0"), Key("encoder.layer.1")]
    hidden = next(record.content for record in plain.records if record.key == keys[0] and not record.taken)
    inner = [
        (name, value)
        for name, value in onnx.inner(root, artifact, case.inputs)
        if value.size != hidden.size or not np.allclose(value.reshape(-1), hidden, atol=1e-3)
    ]
    values, outputs = read_values(inner, {"last_hidden_state", "pooler_output"}, {hidden.size})
    ends = align(Walk(module, case, values, outputs, 1e-4), keys)
    assert ends[keys[0]].match is None
    found = ends[keys[1]].match
    assert found is not None
    assert found.error < 1e-5


def test_inner_values_leave_the_file_and_the_outputs_as_they_are(bert_subject: Subject) -> None:
    prepared = bert_subject.prepared
    case = choose(read_cases(prepared.reference / SAMPLES, prepared.known))
    for format in BACKENDS:
        root, artifact = prepared.export(Target(format, "fp32"))
        before = [hash_file(root, file.path) for file in artifact.files]
        found = list(BACKENDS[format].inner(root, artifact, case.inputs))
        assert [hash_file(root, file.path) for file in artifact.files] == before
        names = [name for name, _ in found]
        assert set(names[-2:]) == {"last_hidden_state", "pooler_output"}
        assert len(names) == len(set(names)) > 30
        for name, value in BACKENDS[format].open(root, artifact, 1)(case.inputs).items():
            np.testing.assert_allclose(dict(found)[name], value, atol=1e-5)


def test_which_sample() -> None:
    def sample(name: str, *shape: int, padding: int = 0) -> Case:
        mask = np.ones(shape, dtype=np.int64)
        mask[:, mask.shape[1] - padding :] = 0
        return Case(name, {"input_ids": mask, "attention_mask": mask})

    samples = [sample(NONE, 1, 16), sample(NONE, 1, 100), sample(NONE, 1, 512), sample(NONE, 3, 120), sample("text", 1, 110)]
    assert choose(samples).mask.shape == (1, 100)
    assert choose(samples[2:]).mask.shape == (1, 512)
    with pytest.raises(StageError, match="no sample of one text without padding"):
        choose([*samples[3:], sample(NONE, 1, 20, padding=2)])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    """A folder with a checkpoint, a pipeline, a cache and a release. Read only: `release` copies it."""
    return build_folder(tmp_path_factory.mktemp("built"), bert, targets={"openvino": ["fp32"]})


@pytest.fixture
def release(tmp_path: Path, built: Path) -> Path:
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    return tmp_path / "artifacts/tiny/1.0.0"


def spoil_release(tmp_path: Path, release: Path, format: str, name: str) -> None:
    """Spoil an artifact of a release, with a manifest that was made to fit."""
    manifest = from_bytes((release / MANIFEST).read_bytes(), "")
    artifact = next(artifact for artifact in manifest.artifacts if artifact.format == format)
    spoil(release, artifact, load_file(tmp_path / "checkpoint/model.safetensors")[f"{name}.weight"], reverse)
    spoiled = replace(artifact, files=tuple(hash_file(release, file.path) for file in artifact.files))
    seal(release, replace(manifest, artifacts=tuple(spoiled if a is artifact else a for a in manifest.artifacts)))


def test_verify_blame(command: Command, tmp_path: Path, release: Path) -> None:
    cache = tmp_path / "cache"
    (tmp_path / "checkpoint").rename(tmp_path / "moved")
    assert "--source" in error_line(command("verify", release, "--blame", cache=cache))
    sound = command("verify", release, "--blame", "--source", "path:moved", cache=cache)
    assert sound.returncode == 0, sound.stderr
    assert sound.stdout.startswith("openvino fp32: no layer departs on sample 'no padding' (1x64), most is lost in ")
    assert re.search(r"^encoder\.layer\.1 +\S+e-\d+ +1\.0000000 +\S+ +\S+e-\d+ +native_layer_norm", sound.stdout, re.M)
    assert re.search(r"blame openvino fp32 +done", sound.stderr)
    assert list(cache.glob("scratch-*")) == []
    (tmp_path / "moved").rename(tmp_path / "checkpoint")
    spoil_release(tmp_path, release, "openvino", "encoder.layer.1.intermediate.dense")
    wrong = command("verify", release, "--blame", "--json", cache=cache)
    line = error_line(wrong)
    assert f"{release}: openvino fp32: first departs at encoder.layer.1.intermediate.dense (error 1." in line
    assert "do not use this artifact" in line
    answer = json.loads(wrong.stdout)
    assert answer["kind"] == "NumericsError"
    assert answer["blame"][0]["departs"]["within"] == "encoder.layer.1"
    assert "encoder.layer.1.intermediate.dense" in [row["layer"] for row in answer["blame"][0]["inside"]]


def test_how_it_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    layers = (Row("a", "x", 1e-7, 1.0, 0.0, 1e-7), Row("b", "y", 1.5, 0.25, 0.75, 1.5), Row("c", None, None, None, None, None))
    inside = (Row("b.dense", "z", 2.0, 0.5, None, 2.0),)
    print_blame(Blame("onnx", "fp32", "sample 'text' (1x9)", 1e-4, layers, inside, Departure("b.dense", "b", 2.0), 0.0))
    assert capsys.readouterr().out.splitlines() == [
        "onnx fp32: first departs at b.dense (error 2)",
        "sample 'text' (1x9); a layer departs when its own error is more than 0.0001",
        "layer      error  cosine     lost  own error  in the file as",
        "a          1e-07  1.0000000  0     1e-07      x",
        "b          1.5    0.2500000  0.75  1.5        y",
        "  b.dense  2      0.5000000  –     2          z",
        "c          –      –          –     –          –",
        "",
    ]


def test_a_gate_that_fails_names_the_layer(tmp_path: Path, release: Path) -> None:
    """The file is spoiled between its export and its validation. Then the original goes: the gate's own error comes all the
    same."""
    pipeline = read(tmp_path / "pipeline.yaml")
    plan = plan_model(pipeline.models[0], tmp_path)
    store = Store(tmp_path / "cache")
    steps: list[str] = []
    context = Context(tmp_path, tmp_path / "other", store, lambda event: steps.append(f"{event.step} {event.state}"))
    target = Target("openvino", "fp32")
    kept = tmp_path / "other/.build/tiny/1.0.0/failed"
    with Build.alone(plan, context) as build:
        loaded, exported = build.load(), build.export(target)
        made = build.validate(target, exported, loaded)
        assert made is not None
        build.gate(loaded, [made])
        assert not [step for step in steps if "blame" in step]
        weights = load_file(tmp_path / "checkpoint/model.safetensors")["encoder.layer.0.attention.output.dense.weight"]
        spoil(exported.root, made.artifact, weights, reverse)
        shutil.rmtree(store.root / "validate")
        build._entries.pop(plan.validates[target].key)
        made = build.validate(target, exported, loaded)
        assert made is not None
        with pytest.raises(NumericsError, match=r"its limit is 0\.\d+, at sample .*; first departs at .*; nothing") as caught:
            build.gate(loaded, [made])
        assert "first departs at encoder.layer.0.attention.output.dense (error 1." in str(caught.value)
        assert "blame openvino fp32 run" in steps
        report = json.loads((kept / "openvino_fp32.json").read_bytes())
        assert report["outputs"]["last_hidden_state"]["figures"]["max_abs"] > 0.01
        assert report["blame"]["departs"]["layer"] == "encoder.layer.0.attention.output.dense"
        assert [row["layer"] for row in report["blame"]["layers"]][:3] == ["embeddings", "encoder.layer.0", "encoder.layer.1"]
        (tmp_path / "checkpoint/model.safetensors").write_bytes(b"")
        with pytest.raises(NumericsError, match=r"its limit is 0\.\d+, at .*; no layer is named \(.*model\.safetensors"):
            build.gate(loaded, [made])
        assert "blame openvino fp32 failed" in steps
        assert "model.safetensors" in json.loads((kept / "openvino_fp32.json").read_bytes())["blame"]["error"]
    assert not list((tmp_path / "other/.build/tiny/1.0.0").glob("scratch-*"))


@pytest.mark.usefixtures("plain_torchscript")
@pytest.mark.parametrize(
    ("name", "format", "weights", "layer"),
    [
        ("photos", "torchscript", "vit.encoder.layer.1.output.dense", "vit.layers.1"),
        ("photos", "onnx", "vit.encoder.layer.0.intermediate.dense", "vit.layers.0"),
        ("patches", "torchscript", "encoder.stages.2.layers.0.layer.1.convolution", "encoder.stages.2"),
        ("speech", "torchscript", "wav2vec2.feature_extractor.conv_layers.1.conv", "wav2vec2.feature_extractor.conv_layers.1"),
        ("speech", "torchscript", "wav2vec2.encoder.layers.1.feed_forward.output_dense", "wav2vec2.encoder.layers.1"),
        ("captions", "torchscript", "text_model.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0"),
    ],
)
def test_images_and_sound(media: Path, tmp_path: Path, name: str, format: str, weights: str, layer: str) -> None:
    root = Path(shutil.copytree(release_of(media, name), tmp_path / "release"))
    manifest, validation = open_release(root)
    artifact = next(one for one in manifest.artifacts if one.format == format)
    snapshot = find_original(root, manifest, None, {"trust_remote_code": False, "allow_pickle": False}, media)
    known = known_samples(root, manifest, validation)

    def look(aside: str) -> Blame:
        (tmp_path / aside).mkdir()
        return blame(tmp_path / aside, root, artifact, snapshot, manifest.task, root / RELEASED, known, {})

    sound = look("sound")
    assert sound.departs is None, sound.verdict
    assert not [row for row in sound.layers if "parametrizations" in row.layer]
    held = [row for row in sound.layers if row.own is not None and row.own < sound.allowed / 4]
    assert layer in [row.layer for row in held]
    spoil(root, artifact, load_file(media / name / "model.safetensors")[f"{weights}.weight"], reverse)
    found = look("spoiled")
    assert found.departs is not None
    assert found.departs.within == layer
    assert [row.layer for row in found.layers if row.own is not None and row.own > found.allowed] == [found.departs.within]


def test_no_input_alone() -> None:
    pixels = np.zeros((2, 3, 4, 4), dtype=np.float32)
    cases = [Case("images", {"pixel_values": pixels}), Case("images", {"pixel_values": pixels[:1]})]
    assert smallest(cases) is cases[1]
    with pytest.raises(StageError, match=r"no sample of one input alone; put 1 into shapes: \{batch"):
        smallest(cases[:1])

"""Cache keys: all that shapes a step's result is in its key, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from compiler import cpu, plan
from compiler.backends import BACKENDS
from compiler.build import Context
from compiler.config import CalibrationFile, ModelSpec
from compiler.errors import ConfigError
from compiler.plan import LOAD_LIBRARIES, PACKAGE_LIBRARIES, Plan, Texts, check_cpu, make_plan, read_calibration, read_texts
from compiler.sources import resolve
from compiler.spine import build_model
from compiler.store import Store
from compiler.types import HELD, Target

TARGETS = {"torchscript": ["fp32", "bf16"], "onnx": ["fp32"], "openvino": ["fp32", "bf16"]}


def planned(checkpoint: Path, **changes: object) -> Plan:
    document = {"name": "tiny", "release": "1.0.0", "source": f"path:{checkpoint.name}", "targets": TARGETS, **changes}
    spec = ModelSpec.model_validate(document)
    return make_plan(spec, resolve(spec, checkpoint.parent), checkpoint.parent)


def keys(one: Plan) -> dict[str, str]:
    return {step.id: step.key for step in one.steps}


def changed(one: Plan, other: Plan) -> set[str]:
    before, after = keys(one), keys(other)
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def test_the_same_twice(bert: Path) -> None:
    assert changed(planned(bert), planned(bert)) == set()


LIBRARIES = {*LOAD_LIBRARIES, *PACKAGE_LIBRARIES, *(name for backend in BACKENDS.values() for name in backend.LIBRARIES)}


@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_a_library_changes_what_it_shapes(bert: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    before = planned(bert)
    version = plan.version
    monkeypatch.setattr(plan, "version", lambda name: "9.9.9" if name == library else version(name))
    found = changed(before, planned(bert))
    assert "package" in found
    assert ("load" in found) == (library in LOAD_LIBRARIES)
    for name, backend in BACKENDS.items():
        assert (f"export {name} fp32" in found) == (library in LOAD_LIBRARIES or library in backend.LIBRARIES), name


def test_shapes_change_the_reference_and_the_checks_alone(bert: Path) -> None:
    found = changed(planned(bert), planned(bert, shapes={"batch": [2]}))
    assert "load" in found
    assert "package" in found
    assert {name.split()[0] for name in found} == {"load", "validate", "package"}


def test_limits_run_nothing_again(bert: Path) -> None:
    assert changed(planned(bert), planned(bert, budget={"bf16": {"cosine": 0.9}})) == {"package"}


def test_an_option_of_one_format(bert: Path) -> None:
    targets = {**TARGETS, "onnx": {"precisions": ["fp32"], "opset": 18}}
    assert changed(planned(bert), planned(bert, targets=targets)) == {"export onnx fp32", "validate onnx fp32", "package"}


def test_the_cpu_changes_figures_and_not_files(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = planned(bert)
    monkeypatch.setattr(cpu, "features", lambda: "another")
    assert {name.split()[0] for name in changed(before, planned(bert))} == {"load", "validate", "package"}


def test_our_own_code_changes_everything(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = planned(bert)
    monkeypatch.setattr(plan, "_code", lambda: "another")
    assert changed(before, planned(bert)) == set(keys(before))


def test_intermediate_steps_are_planned(bert: Path) -> None:
    """OpenVINO's bf16 is made from its fp32, which need not be asked for."""
    found = keys(planned(bert, targets={"openvino": ["bf16"]}))
    assert list(found) == ["load", "export openvino fp32", "export openvino bf16", "validate openvino bf16", "package"]


VALIDATION = Texts("built-in", "0" * 64, (("The harbour opens at six.",), ("Nobody came.",)), numbers=(1, 4))


def calibration_file(folder: Path, texts: Sequence[str]) -> CalibrationFile:
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return CalibrationFile(path="c.jsonl", samples=16)


def refused(folder: Path, named: CalibrationFile) -> str:
    with pytest.raises(ConfigError) as caught:
        read_calibration(named, "feature-extraction", folder, VALIDATION)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"data.calibration: {folder / 'c.jsonl'}")
    return message


def test_calibration_text_is_drawn_by_its_seed(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(16 + HELD)]
    named = calibration_file(tmp_path, [*texts, "TEXT  1", *texts])
    drawn = read_calibration(named, "feature-extraction", tmp_path, VALIDATION)
    assert sorted(drawn.samples + drawn.held) == sorted((text,) for text in texts)  # the same text is there once
    assert (len(drawn.samples), len(drawn.held)) == (16, HELD)
    assert drawn == read_calibration(named, "feature-extraction", tmp_path, VALIDATION)
    other = read_calibration(named.model_copy(update={"seed": 1}), "feature-extraction", tmp_path, VALIDATION)
    assert set(other.samples) != set(drawn.samples)


def test_the_order_of_the_file_is_nothing(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(100)]
    drawn = read_calibration(calibration_file(tmp_path, texts), "feature-extraction", tmp_path, VALIDATION)
    other = read_calibration(calibration_file(tmp_path, texts[::-1]), "feature-extraction", tmp_path, VALIDATION)
    assert (drawn.samples, drawn.held) == (other.samples, other.held)


def test_layers_are_judged_on_the_samples_where_little_is_left_over(tmp_path: Path) -> None:
    few = calibration_file(tmp_path, [f"text {number}" for number in range(16 + HELD - 1)])
    drawn = read_calibration(few, "feature-extraction", tmp_path, VALIDATION)
    assert drawn.held == drawn.samples
    many = calibration_file(tmp_path, [f"text {number}" for number in range(16 + HELD + 5)])
    assert len(read_calibration(many, "feature-extraction", tmp_path, VALIDATION).held) == HELD


@pytest.mark.parametrize("text", ["Nobody came.", "  nobody  CAME. ", "\uff2eobody came."])
def test_calibration_text_is_no_validation_text(tmp_path: Path, text: str) -> None:
    named = calibration_file(tmp_path, [*(f"text {number}" for number in range(20)), text, text])
    message = refused(tmp_path, named)
    assert f"c.jsonl:21: is validation text too ({text!r}, line 4 of the text of the compiler itself); " in message
    assert message.endswith(": take it out, or give data.validation text of your own")
    with pytest.raises(ConfigError) as caught:
        read_calibration(named, "feature-extraction", tmp_path, replace(VALIDATION, name="v.jsonl"))
    message = str(caught.value)
    assert f"c.jsonl:21: is validation text too ({text!r}, line 4 of data.validation); " in message
    assert message.endswith(": take it out of one of the two")
    named = calibration_file(tmp_path, ["x", text, "the harbour opens at six.", *(f"text {number}" for number in range(20))])
    message = refused(tmp_path, named)
    assert (
        f"c.jsonl:2: is validation text too ({text!r}, line 4 of the text of the compiler itself), and so is 1 more text; "
        in message
    )
    assert ": take them out, or" in message


@pytest.mark.parametrize(
    ("line", "reason"),
    [('{"words": "a"}', "field 'text' is missing"), ('{"text": "a"', "not JSON (Expecting"), ('"a"', "not a JSON object")],
)
def test_a_line_that_is_no_calibration_text(tmp_path: Path, line: str, reason: str) -> None:
    named = calibration_file(tmp_path, [f"text {number}" for number in range(16)])
    with (tmp_path / "c.jsonl").open("a") as file:
        file.write(line + "\n")
    assert f"c.jsonl:17: {reason}" in refused(tmp_path, named)


def validation_file(folder: Path, task: str, lines: Sequence[str]) -> Texts:
    (folder / "v.jsonl").write_text("\n".join(lines))
    data = {"validation": {"path": "v.jsonl"}, "calibration": {"path": "c.jsonl"}}
    document = {"name": "tiny", "release": "1.0.0", "source": "path:x", "targets": {"onnx": ["int8"]}, "data": data}
    return read_texts(ModelSpec.model_validate(document), task, folder)


def test_a_score_is_of_two_texts(tmp_path: Path) -> None:
    """Which are validation text both."""
    lines = ['{"text": "a", "text_pair": "b", "score": 0.5}', "", '{"text": "c", "text_pair": "d", "score": 1}']
    found = validation_file(tmp_path, "feature-extraction", lines)
    assert found.lines == (("a",), ("b",), ("c",), ("d",))
    assert found.numbers == (1, 1, 3, 3)
    file = f"data.validation: {tmp_path / 'v.jsonl'}"
    assert found.labels == ((f"{file}:1", 0.5), (f"{file}:3", 1))
    plain = validation_file(tmp_path, "feature-extraction", ['{"text": "a", "text_pair": "b"}'])
    assert (plain.lines, plain.labels) == ((("a",),), None)
    for line, reason in (
        ('{"text": "c", "score": 1}', "v.jsonl:4: has a score and no text_pair"),
        ('{"text": "c", "text_pair": "d"}', "v.jsonl:4: has no score and other lines have; give all of them one, or none"),
    ):
        with pytest.raises(ConfigError, match=re.escape(reason)):
            validation_file(tmp_path, "feature-extraction", [*lines, line])


def test_answers_are_read_for_int8(tmp_path: Path) -> None:
    line = '{"question": "Who?", "context": "Ada and Ben.", "answers": ["Ada"]}'
    place = f"data.validation: {tmp_path / 'v.jsonl'}:1"
    assert validation_file(tmp_path, "question-answering", [line]).labels == ((place, ["Ada"]),)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    named = calibration_file(tmp_path, [f"text {number}" for number in range(20)])
    plain = read_calibration(named, "feature-extraction", tmp_path, VALIDATION)
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_calibration(named, "feature-extraction", tmp_path, VALIDATION).samples == plain.samples


def test_too_little_validation_text_for_int8(bert: Path, tmp_path: Path) -> None:
    """A text that stands there again is no other."""
    path = tmp_path / "v.jsonl"
    data = {"calibration": {"path": str(tmp_path / "c.jsonl"), "samples": 16}, "validation": {"path": str(path)}}
    for lines, reason in (
        ([{"text": f"Line {number % 15}"} for number in range(40)], "15 different texts are too few to judge int8 by"),
        (
            [{"text": f"Line {number}", "text_pair": f"Other {number}", "score": number} for number in range(15)],
            "15 scores are too few to judge int8 by",
        ),
    ):
        path.write_text("\n".join(map(json.dumps, lines)))
        with pytest.raises(ConfigError, match=f"tiny 1.0.0: data.validation: {reason}; give at least 16"):
            quantized(bert, tmp_path, data=data)
    again = [{"text": f"Line {max(number - 1010, 0)}"} for number in range(1040)]
    path.write_text("\n".join(map(json.dumps, again)))
    with pytest.raises(ConfigError, match=r"14 different texts are too few .* at least 16 among the first 1024"):
        quantized(bert, tmp_path, data=data)
    pairs = [{"text": f"Line {number}", "text_pair": f"Other {number}", "score": number} for number in range(600)]
    path.write_text("\n".join(map(json.dumps, pairs)))
    texts = quantized(bert, tmp_path, data=data).texts
    assert (len(texts.lines), texts.rows, texts.answered(1024)) == (1200, 600, 512)


@pytest.mark.parametrize("which", ["validation", "calibration"])
def test_data_that_cannot_be_read_names_its_model(bert: Path, tmp_path: Path, which: str) -> None:
    (tmp_path / "there.jsonl").write_text("\n".join(json.dumps({"text": f"Line {number}"}) for number in range(20)))
    names = {"validation": "there.jsonl", "calibration": "there.jsonl", which: "gone.jsonl"}
    data = {name: {"path": str(tmp_path / file)} for name, file in names.items()}
    gone = re.escape(str(tmp_path / "gone.jsonl"))
    with pytest.raises(ConfigError, match=rf"^tiny 1\.0\.0: data\.{which}: {gone}: cannot be read \(No such file"):
        quantized(bert, tmp_path, data=data)


def test_int8_for_another_kind_of_cpu(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its 8-bit weights would be judged by sums that saturate here."""
    monkeypatch.setattr(cpu, "features", lambda: "x86_64 avx2 fma avx512f")
    message = "quantize.cpu: avx512_vnni: this CPU has no amx_int8 or avx512_vnni or avx_vnni, so nothing for one can"
    made = quantized(bert, tmp_path, quantize={"cpu": "avx512_vnni"})  # to be looked at anywhere
    with pytest.raises(ConfigError, match=message):
        build_model(made, Context(tmp_path, tmp_path / "artifacts", Store(tmp_path / "cache"), lambda event: None))
    check_cpu(planned(bert, quantize={"cpu": "avx512_vnni"}).spec)  # without int8 it is nothing
    for name in ("native", "avx2", "avx512"):
        narrow = quantized(bert, tmp_path, quantize={"cpu": name})
        check_cpu(narrow.spec)
        assert narrow.bits == 7


def test_too_few_different_texts(tmp_path: Path) -> None:
    named = calibration_file(tmp_path, [f"text {number % 15}" for number in range(40)])
    assert "holds 15 different texts and samples: asks for 16; give more text, and samples: 16 or more" in refused(
        tmp_path, named
    )
    seventeen = calibration_file(tmp_path, [f"text {number}" for number in range(17)]).model_copy(update={"samples": 18})
    assert refused(tmp_path, seventeen).endswith("samples: asks for 18; give more text, or give samples: 17")
    unsaid = CalibrationFile(path=seventeen.path)
    assert refused(tmp_path, unsaid).endswith("the default of samples: asks for 256; give more text, or give samples: 17")
    assert calibration_file(tmp_path, [f"text {number % 16}" for number in range(40)]) == named
    assert len(read_calibration(named, "feature-extraction", tmp_path, VALIDATION).samples) == 16


def test_calibration_text_that_cannot_be_read(tmp_path: Path) -> None:
    named = CalibrationFile(path="c.jsonl", samples=16)
    assert refused(tmp_path, named).endswith("cannot be read (No such file or directory)")
    (tmp_path / "c.jsonl").write_text("\n \n")
    assert refused(tmp_path, named).endswith("holds no line; give one JSON object a line")
    (tmp_path / "c.jsonl").write_bytes(b'\n{"text": "\xff"}\n')
    assert refused(tmp_path, named).endswith("c.jsonl:2: not UTF-8 text (byte 11); save it as UTF-8")


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    named = calibration_file(tmp_path, [f"text {number}" for number in range(20)])
    lines = (tmp_path / "c.jsonl").read_text().splitlines()
    (tmp_path / "c.jsonl").write_text("\n".join([*lines[:6], "{text: 6}", *lines[7:]]))
    with pytest.raises(ConfigError, match=r"c\.jsonl:7: not JSON \("):
        read_calibration(named, "feature-extraction", tmp_path, VALIDATION)
    (tmp_path / "c.jsonl").write_text("\n".join([*lines[:6], '{"txt": "6"}', *lines[7:]]))
    with pytest.raises(ConfigError, match=r"c\.jsonl:7: field 'text' is missing"):
        read_calibration(named, "feature-extraction", tmp_path, VALIDATION)


def quantized(bert: Path, folder: Path, **changes: object) -> Plan:
    calibration_file(folder, [f"text {number}" for number in range(20)])
    data = {"calibration": {"path": str(folder / "c.jsonl"), "samples": 16}}
    return planned(bert, **{"targets": {**TARGETS, "openvino": ["fp32", "int8"]}, "data": data, **changes})


def test_steps_of_int8(bert: Path, tmp_path: Path) -> None:
    found = keys(quantized(bert, tmp_path))
    assert {"calibrate", "quantize openvino int8", "validate openvino int8"} <= found.keys()
    assert list(found).index("export openvino fp32") < list(found).index("quantize openvino int8")


def test_fusions_are_not_expected_of_int8(bert: Path, tmp_path: Path) -> None:
    plan = quantized(bert, tmp_path, optimize={"expect": {"openvino": {"padding_free": 2}}})
    assert plan.expects(Target("openvino", "fp32")) == {"padding_free": 2}
    assert plan.expects(Target("openvino", "int8")) == {}


def test_what_shapes_int8_changes_int8_alone(bert: Path, tmp_path: Path) -> None:
    before = quantized(bert, tmp_path)
    made = {"quantize openvino int8", "validate openvino int8", "package"}
    assert changed(before, quantized(bert, tmp_path, budget={"int8": {"cosine": 0.9}})) == made
    assert changed(before, quantized(bert, tmp_path, quantize={"fallback": True})) == made
    given = quantized(bert, tmp_path, quantize={"plan": {"openvino": ["a"]}})
    assert changed(before, given) == made
    assert changed(
        given, quantized(bert, tmp_path, budget={"int8": {"cosine": 0.9}}, quantize={"plan": {"openvino": ["a"]}})
    ) == {"package"}
    seed = {"calibration": {"path": str(tmp_path / "c.jsonl"), "samples": 16, "seed": 1}}
    assert changed(before, quantized(bert, tmp_path, data=seed)) == {"calibrate", *made}
    cpus = [quantized(bert, tmp_path, quantize={"cpu": name}) for name in ("avx2", "avx512_vnni")]
    assert [one.bits for one in cpus] == [7, 8]
    assert changed(*cpus) == {"calibrate", *made}
    # What shapes the manifest and nothing else.
    assert changed(cpus[0], quantized(bert, tmp_path, quantize={"cpu": "avx512"})) == {"package"}
    (tmp_path / "other.jsonl").write_bytes((tmp_path / "c.jsonl").read_bytes())
    other = {"calibration": {"path": str(tmp_path / "other.jsonl"), "samples": 16}}
    assert changed(before, quantized(bert, tmp_path, data=other)) == {"package"}

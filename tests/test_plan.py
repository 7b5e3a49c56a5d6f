"""Cache keys: all that shapes a step's result is in its key, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from compiler import cpu, plan
from compiler.backends import BACKENDS
from compiler.config import ModelSpec
from compiler.plan import LOAD_LIBRARIES, PACKAGE_LIBRARIES, Plan, make_plan
from compiler.sources import resolve

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

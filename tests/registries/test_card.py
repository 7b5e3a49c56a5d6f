"""The model card that a manifest makes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from compiler.manifest import Source
from compiler.registries.card import model_card
from compiler.types import Artifact, Check, File, Report
from tests.registries.conftest import manifest_of

FILE = File("openvino/openvino_model_bf16.xml", "1" * 64, 1_500_000)
BASE = replace(
    manifest_of((File("README.md", "0" * 64, 1), File("modules.json", "0" * 64, 1))),
    artifacts=(Artifact("openvino", "bf16", (FILE,), {"INFERENCE_PRECISION_HINT": "bf16"}, "0" * 64),),
    source=Source("hf:org/base@" + "0" * 40, "0" * 40, "mit", ()),
)
REPORT = Report(
    "openvino", "bf16", (Check("a", "cosine", 0.9991, 0.999, True, ""), Check("a", "max_abs", 0.002, 0.1, True, ""))
)


def card(**changes: object) -> str:
    return model_card(replace(BASE, **changes), (REPORT,), "hf://org/name", "org/name")  # type: ignore[arg-type]


def test_what_it_says() -> None:
    text = card()
    assert yaml.safe_load(text.split("---\n")[1]) == {
        "license": "mit",
        "base_model": "org/base",
        "library_name": "sentence-transformers",
        "pipeline_tag": "feature-extraction",
        "tags": ["openvino"],
    }
    assert "| `openvino/openvino_model_bf16.xml` | openvino | bf16 | 1.5 | 0.002 | 0.9991000 | – |" in text
    assert f"sha256:{BASE.identity}" in text and "compile pull hf://org/name@1.0.0 folder" in text
    assert '"{folder}/openvino/openvino_model_bf16.xml", "CPU", {"INFERENCE_PRECISION_HINT": "bf16"}' in text
    assert "[README.md at 1.0.0]" in text and "[README.md at" not in card(files=())


@pytest.mark.parametrize(
    ("licence", "said"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("Our own: v1", {"license": "other", "license_name": "our-own-v1"}),
        (None, {}),
    ],
)
def test_licences(licence: str | None, said: dict[str, str]) -> None:
    front = yaml.safe_load(card(source=replace(BASE.source, licence=licence)).split("---\n")[1])
    assert {key: value for key, value in front.items() if key.startswith("license")} == said


def test_a_name_cannot_end_the_front_matter() -> None:
    text = card(task="x\n---\nevil: true")
    assert yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))["pipeline_tag"].startswith("x")
    assert "evil" not in yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))

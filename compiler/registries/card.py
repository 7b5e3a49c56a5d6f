"""A model card (README.md) made from a manifest: what a registry's page shows of a release. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

import yaml

from compiler.manifest import Manifest
from compiler.types import Report

# Licences that the hub has a page for, of those that encoders are published under; others are shown by their own name.
LICENCES = re.compile(
    r"afl-3\.0|agpl-3\.0|apache-2\.0|artistic-2\.0|bigscience-(bloom-rail-1\.0|openrail-m)|bsd(-[23]-clause)?|bsl-1\.0|c-uda"
    r"|cc|cc0-1\.0|cc-by(-nc)?-[234]\.0|cc-by-nc-(nd|sa)-4\.0|cc-by-nd-4\.0|cc-by-sa-[34]\.0|cdla-permissive-[12]\.0|ecl-2\.0"
    r"|epl-[12]\.0|eupl-1\.[12]|gemma|gpl(-[23]\.0)?|isc|lgpl(-2\.1|-3\.0)?|llama2|llama3|mit|mpl-2\.0|ms-pl|odbl|openrail"
    r"|osl-3\.0|unlicense|wtfpl|zlib"
)
# How a file is opened: `{file}` is its path below the folder, the other names are settings that it was validated under.
LOADING = {
    "onnx": 'onnxruntime.InferenceSession(f"{{folder}}/{file}")',
    "openvino": 'openvino.Core().compile_model(f"{{folder}}/{file}", "CPU", '
    '{{"INFERENCE_PRECISION_HINT": "{INFERENCE_PRECISION_HINT}"}})',
    "torchscript": 'torch.jit.load(f"{{folder}}/{file}")',
}


def model_card(manifest: Manifest, reports: Sequence[Report], url: str, repo: str) -> str:
    """The card's text.

    Args:
        reports: the verdicts of the release's validation.json.
        url: the registry's URL, without a reference.
        repo: the repository that it names, `ORG/NAME`.
    """
    figures = {(report.format, report.precision): report for report in reports}
    rows = ["| file | format | precision | MB | max error | min cosine | same argmax |", "|---|---|---|---|---|---|---|"]
    loading = []
    for artifact in manifest.artifacts:
        report = figures.get((artifact.format, artifact.precision))
        shown = [_figure(report.figure(name) if report else None) for name in ("max_abs", "cosine", "argmax")]
        size = f"{sum(file.size for file in artifact.files) / 1e6:.1f}"
        first = artifact.files[0].path
        rows.append("| " + " | ".join((f"`{first}`", artifact.format, artifact.precision, size, *shown)) + " |")
        settings = {"INFERENCE_PRECISION_HINT": "f32", **artifact.runtime, "file": first}
        loading.append(LOADING[artifact.format].format(**settings))
    own = any(file.path == "README.md" for file in manifest.files)
    versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest.libraries.items()))
    return "\n".join(
        [
            "---",
            yaml.safe_dump(_front_matter(manifest), sort_keys=False, allow_unicode=True).rstrip(),
            "---",
            "",
            f"# {manifest.name} {manifest.release}",
            "",
            f"{manifest.architecture} for {manifest.task}, compiled ahead of time for CPUs from `{manifest.source.uri}`.",
            "",
            *rows,
            "",
            "Errors are against the untouched fp32 model, the worst over all samples: the largest departure in units of an",
            "output's own scale, and the smallest cosine of a row. `validation.json` has every check with its limit.",
            "",
            "## Fetch and load",
            "",
            "```sh",
            f"compile pull {url}@{manifest.release} folder   # every file is held against its sha256",
            "```",
            "",
            "```python",
            f'folder = huggingface_hub.snapshot_download("{repo}", revision="{manifest.release}")  # or without compile',
            *loading,
            "```",
            "",
            "## What it is",
            "",
            f"- manifest digest: `sha256:{manifest.identity}`",
            f"- made with compile {manifest.compiler}, Python {manifest.python}, {versions}",
            f"- licence: {manifest.source.licence or 'not stated'}",
            *(
                [f"- the checkpoint's own card: [README.md at {manifest.release}](../blob/{manifest.release}/README.md)"]
                if own
                else []
            ),
            "",
        ]
    )


def _front_matter(manifest: Manifest) -> dict[str, object]:
    found: dict[str, object] = {}
    if (licence := manifest.source.licence) is not None:
        known = LICENCES.fullmatch(licence.lower()) is not None
        found |= {"license": licence.lower()} if known else {"license": "other", "license_name": _word(licence)}
    if manifest.source.uri.startswith("hf:"):
        found["base_model"] = manifest.source.uri.removeprefix("hf:").partition("@")[0]
    sentences = any(file.path == "modules.json" for file in manifest.files)
    return {
        **found,
        "library_name": "sentence-transformers" if sentences else "transformers",
        "pipeline_tag": manifest.task,
        "tags": list(dict.fromkeys(artifact.format for artifact in manifest.artifacts)),
    }


def _word(text: str) -> str:
    return re.sub(r"[^a-z0-9.-]+", "-", text.lower()).strip("-") or "other"


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.7f}" if 0.5 <= value <= 1 else f"{value:.2g}"

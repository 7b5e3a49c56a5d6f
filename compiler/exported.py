"""`export.json`: what transformers' `ExportedModel.from_pretrained(release, subfolder="onnx")` reads beside a program."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from compiler.hashing import canonical

if TYPE_CHECKING:
    from transformers.exporters import ExportedModel

NO_WEIGHTS = "No weights are here: they are in {}. transformers' ExportedModel looks for a file of this name.\n"


def describe(path: Path, exported: ExportedModel) -> None:
    """Write `export.json` beside the program at `path`: its file, and what transformers' exporter noted of its inputs and
    outputs. The manifest has the versions of the packages, so they are left out here."""
    from transformers.exporters.auto import get_exporter_class
    from transformers.exporters.base import EXPORT_MANIFEST_FILE, EXPORT_SCHEMA_VERSION

    (component,) = exported.components.values()
    entry = {"file": path.name, "metadata": asdict(replace(component.metadata, packages={}))}
    content = {
        "schema_version": EXPORT_SCHEMA_VERSION,
        "export_format": str(exported.export_format),
        "components": {"model": entry},
    }
    (path.parent / EXPORT_MANIFEST_FILE).write_bytes(canonical(content))
    # Of ONNX it opens no folder without the file that it puts weights into; loaders of the web want them inside the program.
    for name in get_exporter_class(exported.export_format).program_files(path.name):
        if not (path.parent / name).exists():
            (path.parent / name).write_text(NO_WEIGHTS.format(path.name), encoding="utf-8")

"""A release's image processor or feature extractor, by transformers, under which the release was validated.

transformers imports torch where that is installed: to open and to run an artifact needs none, to prepare its images and
sounds does.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from compiler.errors import InputError, ReleaseError
from compiler.modalities import MODALITIES
from compiler.runtime import CompiledModel
from compiler.sources import PROCESSOR_FILES

WHAT = {"image": "image processor", "image-text": "image processor", "audio": "feature extractor"}


def read(model: CompiledModel, modality: str) -> Any:
    """What makes inputs of a modality, from the files of a model's release.

    Raises:
        InputError: a library that it needs is not installed.
        ReleaseError: the release has none, or it cannot be read.
    """
    folder, what = model.folder, WHAT[modality]
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise ReleaseError(
            f"{folder}: the release has no {what} ({PROCESSOR_FILES[0]}); give a checkpoint with its own, and build again"
        )
    for module, package in (("transformers", "transformers"), ("PIL", "pillow")):
        if importlib.util.find_spec(module) is None and (module != "PIL" or modality != "audio"):
            extra = "'aot-model-compiler[image]'" if module == "PIL" else package
            raise InputError(f"a release's {what} needs {package}: pip install {extra}")
    try:
        return MODALITIES[modality].processor(folder, {"local_files_only": True})
    except Exception as error:  # transformers raises what it likes
        raise ReleaseError(
            f"{folder}: its {what} cannot be read ({' '.join(str(error).split())[:200]}); fetch or build the release again"
        ) from error

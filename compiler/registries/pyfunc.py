"""MLflow's `python_function` flavour: what lies beside a release's files so that `mlflow.pyfunc.load_model` opens it.

Nothing of it is part of the release: `pull` gives back what was pushed, and no more.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from compiler.manifest import Manifest

MODULE = "aot_release_pyfunc"
# What runs a format, beside transformers for the tokenizer.
RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino", "torchscript": "torch"}


def files_of(manifest: Manifest) -> dict[str, bytes]:
    """The files, by their paths beside the release's folder."""
    from compiler.registries.mlflow import FILES, MLMODEL

    formats = {artifact.format for artifact in manifest.artifacts}
    needed = ("numpy", "transformers", *(runtime for format, runtime in RUNTIMES.items() if format in formats))
    requirements = [f"{name}=={manifest.libraries[name]}" if name in manifest.libraries else name for name in needed]
    model = {
        "artifact_path": "model",
        "flavors": {
            "python_function": {
                "loader_module": MODULE,
                "code": "code",
                "data": FILES,
                "env": {"virtualenv": "python_env.yaml"},
                "python_version": manifest.python,
            }
        },
    }
    environment = {"python": manifest.python, "build_dependencies": ["pip"], "dependencies": ["-r requirements.txt"]}
    return {
        MLMODEL: yaml.safe_dump(model, sort_keys=True).encode(),
        "python_env.yaml": yaml.safe_dump(environment, sort_keys=True).encode(),
        "requirements.txt": "".join(f"{line}\n" for line in ("mlflow", *requirements)).encode(),
        f"code/{MODULE}.py": (Path(__file__).parent / "pyfunc_loader.py").read_bytes(),
    }

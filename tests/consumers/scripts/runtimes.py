"""ONNX Runtime and OpenVINO alone, with numpy and tokenizers, under the settings that the manifest names."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

for absent in ("torch", "transformers"):
    assert importlib.util.find_spec(absent) is None, f"{absent} is installed here"
request = json.load(sys.stdin)
release, settings = Path(request["release"]), dict(request["settings"])
path = release / request["file"]
if request["format"] == "onnx":
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, settings["graph_optimization_level"])
    session = onnxruntime.InferenceSession(path, options, providers=[settings["provider"]])
    wanted = [value.name for value in session.get_inputs()]

    def run(inputs: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        answer: np.ndarray[Any, Any] = session.run([output], inputs)[0]
        return answer
else:
    import openvino

    compiled = openvino.Core().compile_model(path, settings.pop("device"), settings)
    wanted = [value.get_any_name() for value in compiled.inputs]

    def run(inputs: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        answer: np.ndarray[Any, Any] = compiled(inputs)[output]
        return answer


output = {"feature-extraction": "last_hidden_state", "text-classification": "logits"}[request["task"]]
tokenizer = Tokenizer.from_file(str(release / "tokenizer.json"))
tokenizer.no_truncation()
tokenizer.enable_padding(pad_id=tokenizer.token_to_id("[PAD]"), pad_token="[PAD]")  # noqa: S106 (no password)
answers = []
for texts in request["batches"]:
    found = tokenizer.encode_batch(texts)
    given = {
        "input_ids": np.array([line.ids for line in found]),
        "attention_mask": np.array([line.attention_mask for line in found]),
        "token_type_ids": np.array([line.type_ids for line in found]),
    }
    array = run({name: given[name] for name in wanted})
    answers.append({"shape": list(array.shape), "values": array.flatten().tolist()})
print(json.dumps({"output": output, "answers": answers}))

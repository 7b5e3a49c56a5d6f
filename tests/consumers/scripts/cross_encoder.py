"""sentence-transformers' `CrossEncoder` with `backend="onnx"` or `"openvino"`: the logits of pairs of texts."""

import json
import sys

import torch
from sentence_transformers import CrossEncoder

request = json.load(sys.stdin)
options = {"file_name": request["file"]}
if request["format"] == "openvino":
    settings = dict(request["settings"])
    options |= {"device": settings.pop("device"), "ov_config": settings}
model = CrossEncoder(request["release"], backend=request["format"], device="cpu", model_kwargs=options)
answers = []
for pairs in request["pairs"]:
    array = model.predict(pairs, batch_size=len(pairs), activation_fn=torch.nn.Identity(), show_progress_bar=False)
    answers.append({"shape": list(array.shape), "values": array.flatten().tolist()})
print(json.dumps({"output": "logits of pairs", "answers": answers}))

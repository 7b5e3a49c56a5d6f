"""sentence-transformers with `backend="onnx"` or `"openvino"`: embeddings, pooled and normalized as the checkpoint says."""

import json
import sys

from sentence_transformers import SentenceTransformer

request = json.load(sys.stdin)
options = {"file_name": request["file"]}
if request["format"] == "openvino":
    settings = dict(request["settings"])
    options |= {"device": settings.pop("device"), "ov_config": settings}
model = SentenceTransformer(request["release"], backend=request["format"], device="cpu", model_kwargs=options)
answers = []
for texts in request["batches"]:
    array = model.encode(texts, batch_size=len(texts), show_progress_bar=False)
    answers.append({"shape": list(array.shape), "values": array.flatten().tolist()})
print(json.dumps({"output": "sentence_embedding", "answers": answers}))

"""transformers' own `ExportedModel.from_pretrained`, from the folder of a format in the release."""

import json
import sys
from pathlib import Path

import transformers
from transformers import AutoTokenizer
from transformers.exporters import ExportedModel

request = json.load(sys.stdin)
options = {}
if request["format"] == "openvino":
    settings = dict(request["settings"])
    options = {"device": settings.pop("device").lower(), "config": settings}
model = ExportedModel.from_pretrained(request["release"], subfolder=str(Path(request["file"]).parent), **options)
tokenizer = AutoTokenizer.from_pretrained(request["release"])
answers = []
for texts in request["batches"]:
    outputs = model(**tokenizer(texts, padding=True, return_tensors="pt"))
    assert isinstance(outputs, transformers.utils.ModelOutput), type(outputs)
    output = "logits" if "logits" in outputs else "last_hidden_state"
    array = outputs[output]
    answers.append({"shape": list(array.shape), "values": array.flatten().tolist()})
print(json.dumps({"output": output, "answers": answers}))

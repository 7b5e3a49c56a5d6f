"""optimum's `ORTModelFor…`, from the release folder, the artifact by its `file_name`."""

import json
import sys
from pathlib import Path

from optimum.onnxruntime import ORTModelForFeatureExtraction, ORTModelForSequenceClassification
from transformers import AutoTokenizer

CLASSES = {
    "feature-extraction": (ORTModelForFeatureExtraction, "last_hidden_state"),
    "text-classification": (ORTModelForSequenceClassification, "logits"),
}

request = json.load(sys.stdin)
automatic, output = CLASSES[request["task"]]
model = automatic.from_pretrained(request["release"], file_name=Path(request["file"]).name)
tokenizer = AutoTokenizer.from_pretrained(request["release"])
answers = []
for texts in request["batches"]:
    array = model(**tokenizer(texts, padding=True, return_tensors="pt"))[output]
    answers.append({"shape": list(array.shape), "values": array.flatten().tolist()})
print(json.dumps({"output": output, "answers": answers, "labels": model.config.id2label}))

"""optimum-intel's `OVModelFor…`, from the release folder, the artifact by its `subfolder` (without, it looks for IR in the
folder itself) and `file_name`, with the settings that the manifest names for it as `ov_config`."""

import json
import sys
from pathlib import Path

from optimum.intel import OVModelForFeatureExtraction, OVModelForSequenceClassification
from transformers import AutoTokenizer

CLASSES = {
    "feature-extraction": (OVModelForFeatureExtraction, "last_hidden_state"),
    "text-classification": (OVModelForSequenceClassification, "logits"),
}

request = json.load(sys.stdin)
automatic, output = CLASSES[request["task"]]
settings = dict(request["settings"])
path = Path(request["file"])
model = automatic.from_pretrained(
    request["release"],
    subfolder=path.parent.name,
    file_name=path.name,
    device=settings.pop("device"),
    ov_config=settings,
)
tokenizer = AutoTokenizer.from_pretrained(request["release"])
answers = []
for texts in request["batches"]:
    array = model(**tokenizer(texts, padding=True, return_tensors="pt"))[output]
    answers.append({"shape": list(array.shape), "values": array.flatten().tolist()})
print(json.dumps({"output": output, "answers": answers, "labels": model.config.id2label}))

"""The peers' int8 for OpenVINO: NNCF's post-training quantization, as its documentation has it for transformers.

    .peers/bin/python -P benchmarks/nncf_peer.py MODEL.xml TOKENIZER.json CALIBRATION.jsonl OUT.xml

In the peers' environment. It is given the same text to calibrate on as ours, with SmoothQuant at its default.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES = 300


def main() -> None:
    import nncf
    import openvino
    from tokenizers import Tokenizer

    source, vocabulary, calibration, out = sys.argv[1:]
    tokenizer = Tokenizer.from_file(vocabulary)
    tokenizer.no_padding()
    model = openvino.Core().read_model(source)
    names = {name for one in model.inputs for name in one.get_names()}

    def encode(line: str) -> dict[str, np.ndarray[Any, Any]]:
        encoded = tokenizer.encode(json.loads(line)["text"])
        columns = {"input_ids": encoded.ids, "attention_mask": encoded.attention_mask, "token_type_ids": encoded.type_ids}
        return {name: np.array([column], dtype=np.int64) for name, column in columns.items() if name in names}

    lines = [line for line in Path(calibration).read_text(encoding="utf-8").split("\n") if line][:SAMPLES]
    made = nncf.quantize(
        model,
        nncf.Dataset([encode(line) for line in lines]),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(lines),
    )
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(made, out, compress_to_fp16=False)


if __name__ == "__main__":
    main()

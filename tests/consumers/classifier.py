"""A small text classifier with odd sizes, for consumers: `python -m tests.consumers.classifier FOLDER TOKENIZER`.

It is just wide enough for int8 to be faster. Its weights are drawn at random from a seed, its tokenizer is another
checkpoint's, saved as transformers 5 saves it: what it says of a text means nothing, and is the same everywhere.
"""

from __future__ import annotations

import sys
from pathlib import Path

CLASSES = 9


def save_classifier(folder: Path, tokenizer: Path) -> Path:
    """Write a BERT with a head for nine classes, and the tokenizer.json of the folder `tokenizer`; returns its own folder."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer / "tokenizer.json"),
        model_input_names=["input_ids", "attention_mask", "token_type_ids"],
        **{f"{kind}_token": token for kind, token in names.items()},
    )
    fast.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(fast),
        hidden_size=265,
        num_attention_heads=5,
        intermediate_size=1031,
        num_hidden_layers=3,
        max_position_embeddings=259,
        initializer_range=0.12,
        num_labels=CLASSES,
        pad_token_id=fast.pad_token_id,
    )
    torch.manual_seed(25)  # of which texts get different answers, and none is nearly a tie
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    save_classifier(Path(sys.argv[1]), Path(sys.argv[2]))

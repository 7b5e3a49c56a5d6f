"""A small text classifier with odd sizes, for consumers: `python -m tests.consumers.classifier FOLDER`.

Its weights are drawn at random, wide and from a seed, and its tokenizer is trained on the compiler's built-in text: what it
says of a text means nothing, and is the same number everywhere.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.zoo import save_checkpoint


def save_classifier(folder: Path) -> Path:
    """Write a BERT with a head for nine classes and return its folder."""
    sizes = {"hidden_size": 35, "num_attention_heads": 5, "intermediate_size": 51, "num_hidden_layers": 3}
    # Drawn narrower, one class would be every text's.
    return save_checkpoint(folder, "bert", "text-classification", **sizes, max_position_embeddings=259, initializer_range=0.5)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    save_classifier(Path(sys.argv[1]))

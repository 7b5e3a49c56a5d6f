"""Tiny, random, seeded checkpoints of every architecture that is promised, with tokenizers trained on the built-in text.

Weights are drawn wide (`initializer_range`), so that attention is far from uniform: a mask that is ignored, or a position
that is off by one, then shows in every output.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compiler.plan import BUILTIN_TEXT
from compiler.tasks import TASKS

BERT_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
ROBERTA_TOKENS = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
ALL = tuple(TASKS)


@dataclass(frozen=True)
class Architecture:
    """`config` are the arguments of its transformers config; `tokens` its special tokens, in the order of their ids."""

    name: str
    config: dict[str, Any]
    tokens: dict[str, str] = field(default_factory=lambda: BERT_TOKENS)
    token_types: bool = True
    tasks: tuple[str, ...] = ALL


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}

ZOO = {
    architecture.name: architecture
    for architecture in (
        Architecture("bert", {**SMALL, "max_position_embeddings": 64}),
        Architecture("roberta", {**SMALL, "max_position_embeddings": 66, "type_vocab_size": 1}, ROBERTA_TOKENS, False),
        Architecture("xlm-roberta", {**SMALL, "max_position_embeddings": 66, "type_vocab_size": 1}, ROBERTA_TOKENS, False),
        Architecture(
            "distilbert",
            {
                "dim": 32,
                "n_layers": 2,
                "n_heads": 4,
                "hidden_dim": 48,
                "max_position_embeddings": 64,
                "initializer_range": 0.2,
            },
            token_types=False,
        ),
        Architecture("albert", {**SMALL, "embedding_size": 16, "max_position_embeddings": 64}),
        Architecture("electra", {**SMALL, "embedding_size": 16, "max_position_embeddings": 64}),
        Architecture("mpnet", {**SMALL, "max_position_embeddings": 66}, ROBERTA_TOKENS, False),
        Architecture(
            "deberta-v2",
            {
                **SMALL,
                "max_position_embeddings": 64,
                "relative_attention": True,
                "pos_att_type": ["p2c", "c2p"],
                "position_buckets": 16,
                "norm_rel_ebd": "layer_norm",
                "share_att_key": True,
                "position_biased_input": False,
                "type_vocab_size": 0,
            },
        ),
        Architecture(
            "modernbert",
            {
                "hidden_size": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "intermediate_size": 48,
                "max_position_embeddings": 64,
                "local_attention": 16,
                "global_attn_every_n_layers": 3,
                "initializer_range": 0.2,
                "initializer_cutoff_factor": 2.0,
            },
            token_types=False,
        ),
    )
}


def save_tokenizer(folder: Path, architecture: Architecture) -> int:
    """Train a WordPiece tokenizer on the built-in text, save it, and return its vocabulary's size."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    names = architecture.tokens
    tokenizer = Tokenizer(models.WordPiece(unk_token=names["unk"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = [value for line in BUILTIN_TEXT.read_text().splitlines() for value in json.loads(line).values()]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=list(names.values()), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    cls, sep = names["cls"], names["sep"]
    ids = [(token, tokenizer.token_to_id(token)) for token in (cls, sep)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B:1 {sep}:1", special_tokens=ids
    )
    inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if architecture.token_types else [])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=inputs, **{f"{kind}_token": token for kind, token in names.items()}
    )
    fast.save_pretrained(folder)
    return int(tokenizer.get_vocab_size())


def save_checkpoint(folder: Path, name: str, task: str = "feature-extraction", **overrides: Any) -> Path:
    """Write a tiny checkpoint of an architecture with the head of a task."""
    import torch
    from optimum.exporters.tasks import TasksManager
    from transformers import AutoConfig

    architecture = ZOO[name]
    vocabulary = save_tokenizer(folder, architecture)
    names = list(architecture.tokens)
    ids = {f"{kind}_token_id": names.index(kind) for kind in ("pad", "cls", "sep")}
    extra = {"num_labels": 9} if task in ("text-classification", "token-classification") else {}
    config = AutoConfig.for_model(
        name,
        **{"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 2, **ids, **extra, **architecture.config, **overrides},
    )
    torch.manual_seed(7)
    automatic = TasksManager.get_model_class_for_task(task, model_type=name, library="transformers")
    model = automatic.from_config(config).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms start at 0 and 1, where a lost one does not show
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return folder

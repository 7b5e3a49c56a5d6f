"""Tiny, random, seeded checkpoints of every architecture that is promised, with tokenizers of the built-in text, and
image processors and feature extractors as real checkpoints have them.

Weights are drawn wide (`initializer_range`), so that attention is far from uniform: a mask that is ignored, or a position
that is off by one, then shows in every output.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compiler.plan import BUILTIN_TEXT
from compiler.tasks import TASKS

BERT_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
ROBERTA_TOKENS = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
ALL = tuple(task for task, entry in TASKS.items() if entry.modality == "text")
# The processor of images of 32 by 32, by the class that the checkpoints of an architecture name.
NORMAL = {
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
    "do_resize": True,
    "resample": 2,
}
SQUARE = {**NORMAL, "image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
CROPPED = {**NORMAL, "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}, "crop_pct": 0.875}
CENTRED = {
    **NORMAL,
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 36},
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
}
SOUND = {
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "sampling_rate": 16000,
    "feature_size": 1,
    "padding_value": 0.0,
    "padding_side": "right",
    "do_normalize": True,
    "return_attention_mask": False,
}
MASKED_SOUND = {**SOUND, "return_attention_mask": True}


@dataclass(frozen=True)
class Architecture:
    """`config` are the arguments of its transformers config; `tokens` its special tokens, in the order of their ids, empty
    where it has no tokenizer; `processor` the content of preprocessor_config.json. `slow` tasks are left out of `make test`.
    `model` is its model type, where that is not its name."""

    name: str
    config: dict[str, Any]
    tokens: dict[str, str] = field(default_factory=lambda: BERT_TOKENS)
    token_types: bool = True
    tasks: tuple[str, ...] = ALL
    # Heads differ little from one encoder to the next: all of them are run on BERT, and ModernBERT's own two.
    slow: tuple[str, ...] = ALL[1:]
    processor: dict[str, Any] = field(default_factory=dict)
    model: str = ""


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}

IMAGES = ("image-classification", "image-feature-extraction")
SOUNDS = ("automatic-speech-recognition", "audio-classification")
# Three convolutions, of which one frame is made of 40 samples.
SPEECH = {
    **SMALL,
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 4, 2],
    "conv_kernel": [10, 8, 4],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16,
    "vocab_size": 32,
    "pad_token_id": 0,
}
HALF = {key: value for key, value in SMALL.items() if key != "initializer_range"} | {"projection_dim": 16}

ZOO = {
    architecture.name: architecture
    for architecture in (
        Architecture("bert", {**SMALL, "max_position_embeddings": 64}, slow=()),
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
            # One head that pools by the mask, and one for each token.
            slow=tuple(task for task in ALL if task not in ("text-classification", "fill-mask")),
        ),
        Architecture("vit", {**SMALL, "image_size": 32, "patch_size": 8}, {}, tasks=IMAGES, slow=IMAGES[1:], processor=SQUARE),
        Architecture(
            "convnext",
            {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 2, 1], "initializer_range": 0.2},
            {},
            tasks=IMAGES,
            slow=IMAGES[1:],
            processor=CROPPED,
        ),
        Architecture(
            "resnet",
            {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "layer_type": "basic"},
            {},
            tasks=IMAGES,
            slow=IMAGES[:1],
            processor=CROPPED,
        ),
        Architecture(
            "swin",
            {
                "image_size": 32,
                "patch_size": 4,
                "embed_dim": 8,
                "depths": [2, 1],
                "num_heads": [2, 4],
                "window_size": 4,
                "initializer_range": 0.2,
            },
            {},
            tasks=IMAGES,
            slow=IMAGES[1:],
            processor=SQUARE,
        ),
        Architecture(
            "clip",
            {
                "text_config": {
                    **HALF,
                    "max_position_embeddings": 24,
                    "eos_token_id": 3,
                    "bos_token_id": 2,
                    "pad_token_id": 0,
                },
                "vision_config": {**HALF, "image_size": 32, "patch_size": 8},
                "projection_dim": 16,
            },
            token_types=False,
            tasks=("zero-shot-image-classification",),
            slow=(),
            processor=CENTRED,
        ),
        Architecture("wav2vec2", SPEECH, {}, tasks=SOUNDS, slow=SOUNDS[1:], processor=SOUND),
        Architecture(
            "wav2vec2-lv60",  # the larger ones have a mask, layer norms in the convolutions, and norms before the layers
            {**SPEECH, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
            {},
            tasks=SOUNDS,
            slow=SOUNDS[1:],
            processor=MASKED_SOUND,
            model="wav2vec2",
        ),
        Architecture("hubert", SPEECH, {}, tasks=SOUNDS, slow=SOUNDS[:1], processor=SOUND),
    )
}
VOCABULARY = 300
# Those of text.
ENCODERS = tuple(name for name, architecture in ZOO.items() if architecture.tasks == ALL)


def save_tokenizer(folder: Path, architecture: Architecture) -> int:
    """Save a WordPiece tokenizer of the built-in text's letters and most frequent pieces, and return its vocabulary's size.

    It is not trained: the trainer breaks ties by the order of a hash table, and no two runs would test the same inputs.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = architecture.tokens
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    texts = [value for line in BUILTIN_TEXT.read_text().splitlines() for value in json.loads(line).values()]
    words = [word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))]
    letters = sorted({letter for word in words for letter in word})
    # Beside them, of whole words and of what they start or go on with, what saves the most pieces in the text.
    saved = Counter[str]()
    for word in words:
        for start, end in itertools.combinations(range(len(word) + 1), 2):
            if 1 < end - start < 5 or end - start == len(word) > 1:
                saved["##" * (start > 0) + word[start:end]] += end - start - 1
    common = sorted(saved, key=lambda piece: (-saved[piece], piece))
    pieces = list(dict.fromkeys([*names.values(), *letters, *(f"##{letter}" for letter in letters), *common]))[:VOCABULARY]
    tokenizer = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token=names["unk"]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
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


def save_checkpoint(folder: Path, name: str, task: str = "", **overrides: Any) -> Path:
    """Write a tiny checkpoint of an architecture with the head of a task, its first one unless said."""
    import torch
    from optimum.exporters.tasks import TasksManager
    from transformers import AutoConfig

    architecture = ZOO[name]
    task = task or architecture.tasks[0]
    kind = architecture.model or name
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = dict(architecture.config)
    if architecture.processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(architecture.processor))
    if architecture.tokens:
        names = list(architecture.tokens)
        ids = {f"{token}_token_id": names.index(token) for token in ("pad", "cls", "sep")}
        tokens = {"vocab_size": save_tokenizer(folder, architecture), "bos_token_id": 0, "eos_token_id": 2, **ids}
        if "text_config" in settings:
            settings["text_config"] = {**settings["text_config"], "vocab_size": tokens["vocab_size"]}
        else:
            settings = {**tokens, **settings}
    if task == "automatic-speech-recognition":
        letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVKXJQZ'"]
        (folder / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Wav2Vec2CTCTokenizer"}))
    if task.endswith("-classification") and not task.startswith("zero-shot"):
        settings["num_labels"] = 9
    config = AutoConfig.for_model(kind, **{**settings, **overrides})
    torch.manual_seed(7)
    automatic = TasksManager.get_model_class_for_task(
        task, model_type=kind, model_class_name=TASKS[task].auto, library="transformers"
    )
    model = automatic.from_config(config).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms start at 0 and 1, where a lost one does not show
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return folder

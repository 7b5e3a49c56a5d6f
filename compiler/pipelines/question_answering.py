"""question-answering, extractive: where in a context the answer stands, as transformers 4 answered it.

A context that is too long is read in windows that overlap; with `handle_impossible_answer`, "no answer" is one of the
answers, scored as SQuAD 2 models say it: by both logits of the first token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compiler.errors import InputError
from compiler.pipelines import text
from compiler.pipelines.base import Pipeline

if TYPE_CHECKING:
    import numpy as np
    import tokenizers

TASK = "question-answering"
# Tokens: `max_seq_len` of a window (with the question), `doc_stride` that windows share, `max_answer_len` of an answer.
OPTIONS: Mapping[str, Any] = {
    "top_k": 1,
    "handle_impossible_answer": False,
    "max_seq_len": None,
    "doc_stride": None,
    "max_answer_len": 15,
    "align_to_words": True,
}
MAX_SEQ_LEN, DOC_STRIDE = 384, 128
# A logit that no softmax gives weight to.
NEVER = -10000.0
prepare, size, collate, rows = text.prepare, text.size, text.collate, text.rows
WINDOW, group = text.WINDOW, text.group


@dataclass(frozen=True)
class Span:
    """From token `start` to token `end` of a window, both included."""

    start: int
    end: int
    score: float


def items(args: tuple[Any, ...], named: dict[str, Any]) -> tuple[list[Any], bool]:
    """`question=` and `context=`, texts or lists (one context may serve many questions), or mappings that have both."""
    if args:
        given = text.single_argument(args, {})
        listed = [given] if isinstance(given, Mapping) else list(given)
        pairs = [(item.get("question"), item.get("context")) if isinstance(item, Mapping) else (None, None) for item in listed]
        one = isinstance(given, Mapping) or len(pairs) == 1
    else:
        questions, contexts = named.pop("question", None), named.pop("context", None)
        one = isinstance(questions, str)
        questions = [questions] if one or questions is None else list(questions)
        contexts = [contexts] * len(questions) if isinstance(contexts, str) or contexts is None else list(contexts)
        if len(questions) != len(contexts):
            raise InputError(f"{len(questions)} questions and {len(contexts)} contexts; give as many, or one context")
        pairs = list(zip(questions, contexts, strict=True))
        one = one or len(pairs) == 1
    for pair in pairs:
        for name, value in zip(("question", "context"), pair, strict=True):
            if not isinstance(value, str) or not value:
                raise InputError(f"question-answering: the {name} is missing, empty or not a text; give question and context")
    return pairs, one


def features(pipe: Pipeline, items: Sequence[Any], options: Mapping[str, Any]) -> list[list[tokenizers.Encoding]]:
    for name in ("top_k", "max_answer_len"):
        if not isinstance(options[name], int) or options[name] < 1:
            raise InputError(f"{name}: {options[name]!r}; a whole number from 1")
    first = _question_first(pipe)
    strategy = "only_second" if first else "only_first"
    limit = pipe.prepared.limit or MAX_SEQ_LEN
    longest = options["max_seq_len"] or min(limit, MAX_SEQ_LEN)
    if longest > limit:
        raise InputError(f"max_seq_len: {longest}; the model takes {limit} tokens")
    backend = pipe.prepared.backend
    special = backend.num_special_tokens_to_add(is_pair=True)
    strides: dict[int, list[int]] = {}
    for number, (question, _) in enumerate(items):
        room = longest - special - len(backend.encode(question, add_special_tokens=False))
        stride = options["doc_stride"]
        if room < 2 or (stride is not None and stride >= room):
            share = "" if stride is None else f" that windows share {stride} of"
            raise InputError(f"question-answering: {question[:60]!r} leaves {room} tokens of {longest} to the context{share}")
        # What transformers takes, as far as a long question leaves room for it.
        strides.setdefault(min(longest // 2, DOC_STRIDE, room - 1) if stride is None else stride, []).append(number)
    found: list[list[tokenizers.Encoding]] = [[] for _ in items]
    for stride, numbers in strides.items():
        texts = [items[number] if first else items[number][::-1] for number in numbers]
        for number, encoding in zip(numbers, pipe.prepared.encode(texts, longest, stride, strategy), strict=True):
            found[number] = [encoding, *encoding.overflowing]
    return found


def _question_first(pipe: Pipeline) -> bool:
    return bool(pipe.prepared.padding_side == "right")


def reduce(
    pipe: Pipeline, feature: tokenizers.Encoding, outputs: Mapping[str, np.ndarray[Any, Any]], options: Mapping[str, Any]
) -> Any:
    """A window's best spans, and the score of "no answer"."""
    context = 1 if _question_first(pipe) else 0
    cls = pipe.prepared.specials.get("cls")
    allowed = [side == context or token == cls for side, token in zip(feature.sequence_ids, feature.ids, strict=True)]
    # Some spans are one once they are widened to words.
    count = 2 * options["top_k"] + 10 if options["align_to_words"] else options["top_k"]
    return spans(outputs["start_logits"], outputs["end_logits"], allowed, count, options["max_answer_len"])


def spans(
    start: np.ndarray[Any, Any], end: np.ndarray[Any, Any], allowed: Sequence[bool], count: int, longest: int
) -> tuple[list[Span], float]:
    """The best spans of a window of logits `[tokens]`, and the product of the first token's probabilities: "no answer".

    A span's score is the product of the probabilities of its ends, each over the `allowed` tokens; it has at most `longest`
    tokens, and the first token is in none.
    """
    import numpy as np

    usable = np.asarray(allowed)
    begins = text.softmax(np.where(usable, start, np.float32(NEVER)))
    ends = text.softmax(np.where(usable, end, np.float32(NEVER)))
    null = float(begins[0] * ends[0])
    begins[0] = ends[0] = 0.0
    scores = np.tril(np.triu(np.outer(begins, ends)), longest - 1)
    flat = scores.ravel()
    if count == 1:
        best = np.array([flat.argmax()])
    elif len(flat) <= count:
        best = np.argsort(-flat)
    else:
        best = np.argpartition(-flat, count)[:count]
        best = best[np.argsort(-flat[best])]
    places = [(int(index // len(begins)), int(index % len(begins))) for index in best]
    return [Span(a, b, float(scores[a, b])) for a, b in places if usable[a] and usable[b]], null


def finish(pipe: Pipeline, item: Any, parts: Sequence[tuple[Any, Any]], options: Mapping[str, Any]) -> Any:
    context = item[1]
    answers: list[dict[str, Any]] = []
    null = 1.0
    for encoding, (found, window_null) in parts:
        null = min(null, window_null)
        for span in found:
            start, end = _characters(pipe, encoding, span, options["align_to_words"])
            answer = context[start:end]
            same = next((known for known in answers if known["answer"].lower() == answer.lower()), None)
            if same:
                same["score"] += span.score
            else:
                answers.append({"score": span.score, "start": start, "end": end, "answer": answer})
    if options["handle_impossible_answer"]:
        answers.append({"score": null, "start": 0, "end": 0, "answer": ""})
    best = sorted(answers, key=lambda answer: -answer["score"])[: options["top_k"]]
    return best[0] if len(best) == 1 else best


def _characters(pipe: Pipeline, encoding: tokenizers.Encoding, span: Span, align: bool) -> tuple[int, int]:
    """A span's place in the context: its tokens', or that of the whole words that they are of."""
    side = 1 if _question_first(pipe) else 0
    if align and encoding.sequence_ids[span.start] == side == encoding.sequence_ids[span.end]:
        first, last = encoding.token_to_word(span.start), encoding.token_to_word(span.end)
        begin = None if first is None else encoding.word_to_chars(first, sequence_index=side)
        end = None if last is None else encoding.word_to_chars(last, sequence_index=side)
        if begin is not None and end is not None:
            return int(begin[0]), int(end[1])
    return int(encoding.offsets[span.start][0]), int(encoding.offsets[span.end][1])


single = text.single

"""An extractive question-answering model, made of the demo encoder and of questions that this script makes up:
`python -m examples.questions`.

It answers questions like those in `questions_forms.yaml`, about who was born where, paid how much, or what opened when, in
short English texts; that is all that it has seen, and it is no SQuAD model. As in SQuAD 2 some questions have no answer in
their text: the same question about something else, or one about a fact that the text does not state.

Nothing of the test is in training: neither its names, places and things nor its forms of sentences and questions. The texts
of validation and calibration are drawn like those of training, and no text is in two of them.

Beside the checkpoint: `test.json` (SQuAD's form) for `compile evaluate`, `validation.jsonl` for the pipeline's gate, and
`calibration.jsonl`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

import click
import yaml

from compiler import metrics
from compiler.hashing import canonical
from examples import training

FORMS = Path(__file__).with_name("questions_forms.yaml")
# Texts of each part; a text has about four questions.
TEXTS = {"test": 150, "validation": 80, "calibration": 80, "train": 800}
LEAST = {"exact_match": 0.8}
EPOCHS, RATE = 3, 1e-4
# Tokens of the longest answer that is looked for.
LONGEST = 12
IMPOSSIBLE = 0.2
MONTHS = [
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
]
SMALL = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

Row = dict[str, Any]


class Words:
    """Values for slots, no two the same until the next text: those of the lists that a part may use, or drawn."""

    def __init__(self, forms: Mapping[str, Any], held_out: bool, chance: random.Random) -> None:
        """`held_out`: every third of each list, else the others."""
        lists = {name: values for name, values in forms.items() if name not in ("facts", "fillers")}
        self.lists = {
            name: [value for number, value in enumerate(values) if (number % 3 == 2) == held_out]
            for name, values in lists.items()
        }
        self.chance = chance
        self.used: set[str] = set()

    def draw(self, slot: str) -> str:
        """A value that the text does not have."""
        while (value := self._any(slot)) in self.used:
            pass
        return value

    def take(self, slot: str) -> str:
        """A value that the text does not have, for the text."""
        value = self.draw(slot)
        self.used.add(value)
        return value

    def _any(self, slot: str) -> str:
        choice, whole = self.chance.choice, self.chance.randint
        match slot:
            case "who" | "other":
                return f"{choice(self.lists['first'])} {choice(self.lists['last'])}"
            case "date":
                return f"{whole(1, 28)} {choice(MONTHS)}" + (f" {whole(1850, 2020)}" if self.chance.random() < 0.7 else "")
            case "year":
                return str(whole(1850, 2020))
            case "number":
                return choice(SMALL) if self.chance.random() < 0.3 else str(whole(13, 999))
            case "price":
                return f"{whole(2, 900)} {choice(['crowns', 'euros', 'dollars', 'pounds', 'francs'])}"
            case "years":
                return f"{choice(SMALL)} {choice(['days', 'weeks', 'months', 'years'])}"
            case "time":
                return choice([f"{whole(1, 12)}:{whole(10, 59)}", f"{choice(SMALL)} o'clock", f"half past {choice(SMALL)}"])
        value: str = choice([value for value in self.lists[slot] if value not in self.used])
        return value


def allowed(forms: Sequence[str], held_out: bool) -> Sequence[str]:
    return forms[-1:] if held_out else forms[:-1]


def fill(form: str, values: Mapping[str, str]) -> tuple[str, dict[str, int]]:
    """A form with its slots filled, and where each of them starts."""
    text, starts = "", {}
    for literal, slot, _, _ in Formatter().parse(form):
        text += literal
        if slot is not None:
            starts[slot] = len(text)
            text += values[slot]
    return text, starts


def slots(form: str) -> list[str]:
    return [slot for _, slot, _, _ in Formatter().parse(form) if slot]


def texts(forms: Mapping[str, Any], held_out: bool, seed: int) -> Iterator[list[Row]]:
    """Texts without end, each as its questions: `{"question", "context", "answers": {"text": […], "answer_start": […]}}`."""
    chance = random.Random(seed)  # noqa: S311
    words = Words(forms, held_out, chance)
    facts = forms["facts"]
    while True:
        words.used.clear()
        people = [words.take("who") for _ in range(2)]
        chosen = chance.sample(sorted(facts), chance.randint(3, 5))
        stated: list[tuple[str, dict[str, str]]] = []
        for name in [*chosen, *chance.choices(chosen, k=chance.randint(0, 2))]:
            fact = facts[name]
            values = {slot: words.take(slot) for slot in slots(fact["sentences"][0]) if slot != "who"}
            taken = {other["who"] for same, other in stated if same == name and "who" in other}
            free = [person for person in people if person not in taken] or [words.take("who")]
            stated.append((name, {**values, "who": chance.choice(free)} if "who" in slots(fact["sentences"][0]) else values))
        chance.shuffle(stated)
        context, placed = "", []
        for name, values in stated:
            sentence, starts = fill(chance.choice(allowed(facts[name]["sentences"], held_out)), values)
            placed.append((name, values, {slot: len(context) + start for slot, start in starts.items()}))
            context += sentence + " "
            if chance.random() < 0.25:
                context += chance.choice(allowed(forms["fillers"], held_out)) + " "
        context = context.rstrip()
        yield [_question(facts, words, placed, context, held_out, people) for _ in placed]


def _question(
    facts: Mapping[str, Any],
    words: Words,
    placed: Sequence[tuple[str, Mapping[str, str], Mapping[str, int]]],
    context: str,
    held_out: bool,
    people: Sequence[str],
) -> Row:
    chance = words.chance
    name, values, starts = chance.choice(placed)
    slot = chance.choice(sorted(facts[name]["questions"]))
    form = chance.choice(allowed(facts[name]["questions"][slot], held_out))
    stated = [other for same, other, _ in placed if same == name]
    answer = {"text": [values[slot]], "answer_start": [starts[slot]]}
    # What the text does not say: the same of something else that it does not name, or of a fact that it does not state.
    if chance.random() < IMPOSSIBLE:
        answer = {"text": [], "answer_start": []}
        if chance.random() < 0.5:
            values = {**values, **{other: words.draw(other) for other in slots(form)}}
        else:
            about = [other for other in sorted(facts) if other not in {same for same, _, _ in placed}]
            name = chance.choice(about)
            slot = chance.choice(sorted(facts[name]["questions"]))
            form = chance.choice(allowed(facts[name]["questions"][slot], held_out))
            values = {other: words.draw(other) for other in slots(form)}
            values |= {"who": chance.choice(people)} if "who" in values else {}
    elif sum(all(other[part] == values[part] for part in slots(form)) for other in stated) > 1:
        return _question(facts, words, placed, context, held_out, people)  # two sentences would answer it
    return {"question": fill(form, values)[0], "context": context, "answers": answer}


def split(forms: Mapping[str, Any]) -> dict[str, list[Row]]:
    """The questions of each part. No text is in two parts, and none twice."""
    seen: set[str] = set()
    parts: dict[str, list[Row]] = {}
    for number, (part, count) in enumerate(TEXTS.items()):
        made = texts(forms, part == "test", training.SEED + number)
        parts[part] = []
        while count:
            rows = next(made)
            if rows[0]["context"] not in seen:
                seen.add(rows[0]["context"])
                parts[part] += list({row["question"]: row for row in rows}.values())
                count -= 1
    return parts


def squad(rows: Sequence[Row]) -> dict[str, Any]:
    """SQuAD's form (P. Rajpurkar et al., Know What You Don't Know, 2018)."""
    paragraphs: dict[str, list[Row]] = {}
    for number, row in enumerate(rows):
        pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        answers = [{"text": text, "answer_start": start} for text, start in pairs]
        asked = {"id": str(number), "question": row["question"], "answers": answers, "is_impossible": not answers}
        paragraphs.setdefault(row["context"], []).append(asked)
    listed = [{"context": context, "qas": asked} for context, asked in paragraphs.items()]
    return {"version": "v2.0", "data": [{"title": "made up", "paragraphs": listed}]}


def tokens(rows: Sequence[Row], tokenizer: Any, learnt: bool) -> list[Row]:
    """Question and text as one sequence of tokens, with `start_positions` and `end_positions` to be learnt: the answer's first
    and last token, or the first of all where there is none."""
    found = []
    for row in rows:
        coded = tokenizer(row["question"], row["context"], return_offsets_mapping=not learnt)
        values: Row = {name: list(coded[name]) for name in coded}
        if learnt:
            first = last = 0
            if row["answers"]["text"]:
                start = row["answers"]["answer_start"][0]
                first = coded.char_to_token(start, sequence_index=1)
                last = coded.char_to_token(start + len(row["answers"]["text"][0]) - 1, sequence_index=1)
            values |= {"start_positions": first, "end_positions": last}
        found.append(values)
    return found


def answer(row: Row, coded: Row, logits: Mapping[str, Any]) -> str:
    """The best span of the text, or "" where the first token, which stands for no answer, scores higher (J. Devlin et al.,
    BERT, 2019, 4.3)."""
    start, end = logits["start_logits"].tolist(), logits["end_logits"].tolist()
    inside = [
        place
        for place, (side, (_, stop)) in enumerate(zip(coded["token_type_ids"], coded["offset_mapping"], strict=True))
        if side and stop
    ]
    spans = [(start[one] + end[two], one, two) for one in inside for two in inside if one <= two < one + LONGEST]
    score, one, two = max(spans)
    none = start[0] + end[0]
    return "" if none >= score else row["context"][coded["offset_mapping"][one][0] : coded["offset_mapping"][two][1]]


def make(folder: Path, encoder: Path, forms: Path = FORMS) -> tuple[Mapping[str, float], bool]:
    """The checkpoint in `folder`, unless it is there already: its scores, and whether it was."""
    made_of = training.ingredients(__file__, encoder, forms)
    if (scores := training.cached(folder, made_of)) is not None:
        return scores, True
    training.settle()
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    parts = split(yaml.safe_load(forms.read_text(encoding="utf-8")))
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = AutoModelForQuestionAnswering.from_pretrained(encoder)
    training.train(model, tokens(parts["train"], tokenizer, True), tokenizer, epochs=EPOCHS, rate=RATE)
    scores = measure(model, parts["test"], tokenizer)

    def write(folder: Path) -> None:
        model.save_pretrained(folder / "checkpoint")
        tokenizer.save_pretrained(folder / "checkpoint")
        (folder / "test.json").write_bytes(canonical(squad(parts["test"])))
        for part in ("validation", "calibration"):
            training.write_lines(folder / f"{part}.jsonl", parts[part])

    training.keep(folder, made_of, scores, LEAST, write)
    return scores, False


def measure(model: Any, rows: Sequence[Row], tokenizer: Any) -> dict[str, float]:
    """Exact match and F1."""
    coded = tokens(rows, tokenizer, False)
    inputs = [{name: value for name, value in row.items() if name != "offset_mapping"} for row in coded]
    found = training.answers(model, inputs, tokenizer)
    guesses = [answer(*three) for three in zip(rows, coded, found, strict=True)]
    return metrics.squad([row["answers"]["text"] for row in rows], guesses)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=training.BUILD / "questions", help="The folder to make.")
def main(output: Path) -> None:
    """Fine-tune the demo encoder to answer made-up questions, and say its exact match and F1 on forms that it never saw."""
    training.report(lambda: make(output, training.installed(*training.ENCODER)), output)


if __name__ == "__main__":
    main()

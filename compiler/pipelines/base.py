"""What every task's pipeline does alike: inputs into features, features into batches of similar length, answers in order.

A task is a module that satisfies `Kind`, and a line in `compiler.pipelines.KINDS`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from compiler.bucketing import BATCH_TOKENS, batches
from compiler.errors import InputError
from compiler.runtime import CompiledModel

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger("compiler")


class Kind(Protocol):
    """What a task's module offers. An item is one input, a feature is what the model sees of it; a long text has several."""

    @property
    def TASK(self) -> str:  # noqa: N802
        """The task that a release must be for."""

    @property
    def OPTIONS(self) -> Mapping[str, Any]:  # noqa: N802
        """The options of a call, with their defaults."""

    @property
    def WINDOW(self) -> int:  # noqa: N802
        """So many items are turned into features and sorted at a time: memory stays bounded, however long the file."""

    def prepare(self, model: CompiledModel, options: Mapping[str, Any]) -> Any:
        """What turns items into features: a tokenizer, and what else the release says of that."""

    def items(self, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[list[Any], bool]:
        """The items of a call, and whether there was one, not a list; takes its own inputs out of `named`."""

    def features(self, pipe: Pipeline, items: Sequence[Any], options: Mapping[str, Any]) -> list[list[Any]]:
        """Each item's features."""

    def size(self, feature: Any) -> int:
        """What a feature adds to a batch's budget."""

    def group(self, pipe: Pipeline, feature: Any) -> Hashable:
        """What features must have in common to share a batch; those of None are padded to the longest."""

    def collate(self, pipe: Pipeline, features: Sequence[Any]) -> dict[str, np.ndarray[Any, Any]]:
        """The model's inputs."""

    def rows(
        self, pipe: Pipeline, outputs: Mapping[str, np.ndarray[Any, Any]], features: Sequence[Any]
    ) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        """What a batch's outputs say of each feature, without its padding."""

    def reduce(self, pipe: Pipeline, feature: Any, outputs: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        """What is kept of a feature's outputs until all of its item's are there."""

    def finish(self, pipe: Pipeline, item: Any, parts: Sequence[tuple[Any, Any]], options: Mapping[str, Any]) -> Any:
        """An item's answer, from its features and what was kept of each."""

    def single(self, answer: Any, options: Mapping[str, Any]) -> Any:
        """What a call with one input returns."""


@dataclass
class Pipeline:
    """A task's answers from an opened model. Call it with one input or a list of them; options as transformers names them.

    `prepared` is what the kind's `prepare` returned.
    """

    task: str
    kind: Kind
    model: CompiledModel
    prepared: Any
    options: Mapping[str, Any]
    batch_tokens: int = BATCH_TOKENS
    said: set[str] = field(default_factory=set)

    def __call__(self, *args: Any, **named: Any) -> Any:
        """One answer for one input, a list of answers for a list.

        Raises:
            InputError: an input, or an option, is none that the task takes.
        """
        items, one = self.kind.items(args, named)
        options = self.with_options(named)
        if not items:
            raise InputError(f"{self.task}: an empty batch; give at least one input")
        answers = list(self.stream(items, options))
        return self.kind.single(answers[0], options) if one else answers

    def with_options(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a call; InputError for one that the task does not have."""
        for name in named:
            if name not in self.kind.OPTIONS:
                known = ", ".join(self.kind.OPTIONS) or "no options"
                raise InputError(f"{self.task}: no option {name!r}; it has {known}")
        return {**self.options, **named}

    def stream(
        self, items: Iterable[Any], options: Mapping[str, Any], tell: Callable[[int], None] = lambda count: None
    ) -> Iterator[Any]:
        """The answers in the order of the items. `tell` is told how many more items are done."""
        iterator = iter(items)
        while window := list(itertools.islice(iterator, self.kind.WINDOW)):
            yield from self._window(window, options, tell)

    def _window(self, items: Sequence[Any], options: Mapping[str, Any], tell: Callable[[int], None]) -> list[Any]:
        kind = self.kind
        every = kind.features(self, items, options)
        flat = [(place, number) for place, features in enumerate(every) for number in range(len(features))]
        kept: list[dict[int, Any]] = [{} for _ in items]
        answers: list[Any] = [None] * len(items)
        for chosen in self._batches([(every[place][number], (place, number)) for place, number in flat]):
            features = [every[place][number] for place, number in chosen]
            outputs = self.model.run(kind.collate(self, features))
            done = 0
            for (place, number), feature, row in zip(chosen, features, kind.rows(self, outputs, features), strict=True):
                kept[place][number] = kind.reduce(self, feature, row, options)
                if len(kept[place]) == len(every[place]):
                    parts = [(every[place][index], kept[place][index]) for index in range(len(every[place]))]
                    answers[place] = kind.finish(self, items[place], parts, options)
                    kept[place].clear()
                    done += 1
            tell(done)
        return answers

    def _batches(self, features: Sequence[tuple[Any, tuple[int, int]]]) -> Iterator[list[tuple[int, int]]]:
        """The places of features that run together."""
        groups: dict[Hashable, list[tuple[int, tuple[int, int]]]] = {}
        for feature, place in features:
            groups.setdefault(self.kind.group(self, feature), []).append((self.kind.size(feature), place))
        for members in groups.values():
            for batch in batches([size for size, _ in members], self.batch_tokens):
                yield [members[number][1] for number in batch]

    def say_once(self, what: str, text: str) -> None:
        """Log a warning, the first time that `what` happens."""
        if what not in self.said:
            self.said.add(what)
            log.warning("%s", text)


def argument(args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The one input, or list of inputs, that a call is given, as `inputs` too. Raises InputError."""
    if len(args) != 1 and "inputs" not in named:
        raise InputError(f"{len(args)} inputs are given; give one, or one list of them")
    return args[0] if args else named.pop("inputs")


def listed(args: tuple[Any, ...], named: dict[str, Any], name: str) -> tuple[list[Any], bool]:
    """The inputs of a call, by `name` too, and whether there was one, not a list."""
    if name in named:
        args = (*args, named.pop(name))
    given = argument(args, named)
    several = isinstance(given, (list, tuple))
    return (list(given), False) if several else ([given], True)


def rows(
    pipe: Pipeline, outputs: Mapping[str, np.ndarray[Any, Any]], features: Sequence[Any]
) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """Each feature's part of the outputs, of which all have a row for each."""
    for number in range(len(features)):
        yield {name: value[number] for name, value in outputs.items()}

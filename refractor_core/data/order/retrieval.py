"""Retrieval tasks made on the fly from the token stores: a needle in text, two needles that lead to each other, a passage among like ones.

A row of S tokens holds 1, 2 or 4 tasks of S, S/2 or S/4 tokens, each a document of its own. Of every length, each run of ``CELLS`` tasks
has every kind at every depth once. Only the answer has targets: what surrounds it is text of the corpus that training reads elsewhere as
such, so it counts for no epoch. All is a pure function of the seed and the task's number; no rank builds rows that it does not read.
Source of the passages' queries: inverse cloze, K. Lee et al., Latent retrieval for weakly supervised open domain question answering,
ACL 2019; of the likeness of others: BM25, S. Robertson and H. Zaragoza, The probabilistic relevance framework, 2009.
"""

import os
from collections import Counter
from dataclasses import dataclass

import numpy as np

from refractor_core.data.batch import IGNORE
from refractor_core.data.dataset import Dataset
from refractor_core.data.permutation import mix, permute

KINDS = ("needle", "multi_hop", "passage")
DEPTHS = 10
"""From the beginning of the text to its end."""
CELLS = len(KINDS) * DEPTHS
PER_ROW = (1, 2, 4)
PASSAGES, FEWEST = 32, 4
"""Passages of a task at most and at least; twice as many are looked at for those most like the query."""
QUERY, LEAST_TEXT = 32, 64
"""Tokens of a query at most, and of text that a task has at least."""
K1 = 1.2
NAMES = "Ada Boris Clara Dmitri Elena Farid Greta Hugo Ines Jonas Kira Liang Mira Nils Olga Pavel Quinn Rosa Sven Tara".split()
TEXTS = {
    "number_of": "\nThe secret number of",
    "is": " is",
    "passed_on": " was handed on to",
    "stop": ".\n",
    "ask_number": "\nQuestion: what is the secret number of",
    "ask_holder": "\nQuestion: who has the secret number of",
    "ask_end": "?\nAnswer:",
    "passage": "\nPassage",
    "colon": ":\n",
    "query": "\nQuestion: from which passage are these words missing?\n",
}
DIGITS = 6


@dataclass(frozen=True)
class Task:
    """One task, without its text.

    Args:
        kind: one of ``KINDS``.
        depth: from 0, the beginning, to ``DEPTHS`` - 1, the end.
        begin, length: place in its row, in tokens.
        key: of all that is drawn for it.
        answer: tokens.
    """

    kind: str
    depth: int
    begin: int
    length: int
    key: int
    answer: tuple[int, ...]


class Draw:
    """Numbers drawn from a key, one after another."""

    def __init__(self, key: int):
        self._key, self._turn = np.uint64(key), 0

    def below(self, bound: int) -> int:
        """From 0 to ``bound`` - 1."""
        self._turn += 1
        return int(mix(np.array([self._key ^ mix(np.array([self._turn], np.uint64))[0]]))[0] % np.uint64(bound))


class RetrievalTasks:
    """The tasks of one stage.

    Args:
        dataset: whose tokenizer and stores they are made of.
        length: S.
        key: of the stage's seed.

    Raises:
        ValueError: S is too short for a task.
    """

    def __init__(self, dataset: Dataset, length: int, key: int):
        self._stores, self._eos, self._dtype = dataset.train, dataset.manifest.eos_id, np.dtype(dataset.manifest.dtype)
        words = [*TEXTS.values(), *(f" {name}" for name in NAMES), *(f" {number}" for number in range(1, PASSAGES + 1)), " 0"]
        encoded = [tuple(ids) for ids in dataset.tokenizer.ids(words)]
        self._text = dict(zip(TEXTS, encoded))
        self._names = encoded[len(TEXTS) : len(TEXTS) + len(NAMES)]
        numbers = encoded[len(TEXTS) + len(NAMES) :]
        self._numbers, self._digits = numbers[:PASSAGES], [numbers[-1], *numbers[:9]]
        self._newline = self._text["colon"][-1]
        counts = dataset.unigram_counts().astype(np.float64)
        self._rarity = np.log1p(counts.sum() / (counts + 0.5)).astype(np.float32)
        self._length, self._key = length, np.uint64(key)
        self._per_row = [count for count in PER_ROW if length // count >= self.least]
        if not self._per_row:
            raise ValueError(f"retrieval tasks need sequences of {self.least} tokens at least with this tokenizer, not {length}")

    @property
    def least(self) -> int:
        """Tokens of the shortest task."""
        longest = {name: max(map(len, own)) for name, own in (("name", self._names), ("digit", self._digits), ("number", self._numbers))}
        texts = sum(map(len, self._text.values()))
        passages = FEWEST * (len(self._text["passage"]) + len(self._text["colon"]) + longest["number"])
        return texts + 6 * longest["name"] + 2 * DIGITS * longest["digit"] + passages + FEWEST * LEAST_TEXT + QUERY

    def tasks(self, row: int) -> list[Task]:
        """Tasks of the stage's ``row``-th row of tasks."""
        turn, which = divmod(row, len(self._per_row))
        count = self._per_row[which]
        found = []
        for nth in range(count):
            lap, cell = divmod(turn * count + nth, CELLS)
            lap_key = mix(np.array([self._key ^ np.uint64(count << 48 | lap)]))
            cell = int(permute(np.array([cell]), np.array([CELLS]), lap_key)[0])
            key = int(mix(lap_key ^ np.uint64(cell + 1))[0])
            kind, size = KINDS[cell // DEPTHS], self._length // count
            found.append(Task(kind, cell % DEPTHS, nth * size, size, key, self._answer(kind, cell % DEPTHS, size, key)))
        return found

    def source(self, row: int, samples: np.ndarray) -> int:
        """The source whose text a row is made of, drawn by the stage's shares (int64 [sources] samples)."""
        return int(np.searchsorted(np.cumsum(samples), Draw(int(self._key) ^ row).below(int(samples.sum())), side="right"))

    def targets(self, row: int) -> int:
        """Targets of a row: its answers and the ends of its documents."""
        return sum(len(task.answer) + 1 for task in self.tasks(row))

    def build(self, row: int, source: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """(int64 tokens [S], int64 labels [S], where documents begin in the row) of a row; what no task takes is padding."""
        tokens, labels = np.full(self._length, self._eos, np.int64), np.full(self._length, IGNORE, np.int64)
        tasks = self.tasks(row)
        for task in tasks:
            prompt = self._passages(task, source) if task.kind == "passage" else self._needles(task, source)
            end = task.begin + task.length
            tokens[task.begin : end] = [*prompt, *task.answer, self._eos]
            labels[end - 2 - len(task.answer) : end - 1] = tokens[end - 1 - len(task.answer) : end]
        rest = tasks[-1].begin + tasks[-1].length
        return tokens, labels, [task.begin for task in tasks] + ([rest] if rest < self._length else [])

    def _answer(self, kind: str, depth: int, length: int, key: int) -> tuple[int, ...]:
        if kind == "passage":
            return self._numbers[_place(depth, self._count(length))]
        people, number = self._drawn(key)
        return number if kind == "needle" else people[1]

    def _drawn(self, key: int) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
        """(tokens of three names, tokens of a number)."""
        draw = Draw(key)
        order = permute(np.arange(3), np.full(3, len(NAMES)), np.full(3, draw.below(1 << 62), np.uint64))
        digits = [self._digits[draw.below(10)] for _ in range(DIGITS)]
        return [self._names[index] for index in order.tolist()], tuple(token for digit in digits for token in digit)

    def _needles(self, task: Task, source: int) -> list[int]:
        """Text with a sentence at the task's depth, and for two hops with another anywhere; then the question."""
        text, (people, number) = self._text, self._drawn(task.key)
        first = [*text["number_of"], *people[0], *text["is"], *number, *text["stop"]]
        second: list[int] = []
        question = [*text["ask_number"], *people[0], *text["ask_end"]]
        if task.kind == "multi_hop":  # who got it from the one who had it first
            first = [*text["number_of"], *people[0], *text["passed_on"], *people[2], *text["stop"]]
            second = [*text["number_of"], *people[2], *text["passed_on"], *people[1], *text["stop"]]
            question = [*text["ask_holder"], *people[0], *text["ask_end"]]
        room = task.length - len(first) - len(second) - len(question) - len(task.answer) - 1
        draw = Draw(task.key ^ 1)
        store = self._stores[source]
        hay = self._read(source, draw.below(max(1, len(store.tokens) - room)), room)
        place = _place(task.depth, room + 1)
        inserted = sorted([(place, first), (draw.below(room + 1), second)], key=lambda pair: pair[0])
        (low, one), (high, two) = inserted
        return [*hay[:low].tolist(), *one, *hay[low:high].tolist(), *two, *hay[high:].tolist(), *question]

    def _count(self, length: int) -> int:
        """Passages of a task of that many tokens."""
        each = LEAST_TEXT + len(self._text["passage"]) + len(self._text["colon"]) + max(map(len, self._numbers))
        rest = length - len(self._text["query"]) - len(self._text["ask_end"]) - QUERY - max(map(len, self._numbers)) - 1
        return max(FEWEST, min(PASSAGES, rest // (2 * each)))

    def _passages(self, task: Task, source: int) -> list[int]:
        """Numbered beginnings of documents; one lacks some words, those are the query, the others are most like them of all looked at."""
        text, count, draw, store = self._text, self._count(task.length), Draw(task.key ^ 2), self._stores[source]
        pool = np.array([draw.below(store.documents) for _ in range(2 * count)])
        begins, ends = store.starts(pool), store.starts(pool + 1)
        long = np.flatnonzero(ends - begins >= 3 * QUERY)
        chosen = int(long[0]) if len(long) else int(np.argmax(ends - begins))
        taken = min(QUERY, max(1, int(ends[chosen] - begins[chosen]) // 3))
        heads = [[*text["passage"], *self._numbers[place], *text["colon"]] for place in range(count)]
        fixed = sum(map(len, heads)) + len(text["query"]) + taken + len(text["ask_end"]) + len(task.answer) + 1
        size, more = divmod(task.length - fixed, count)
        seen = [self._read(source, int(begin), size + more + taken) for begin in begins.tolist()]
        query = seen[chosen][taken : 2 * taken]
        positive = np.concatenate([seen[chosen][:taken], seen[chosen][2 * taken :]])
        others = self._most_alike(query, [own for number, own in enumerate(seen) if pool[number] != pool[chosen]], count - 1)
        place = _place(task.depth, count)
        passages = [*others[:place], positive, *others[place:]]
        found: list[int] = []
        for number, (head, passage) in enumerate(zip(heads, passages)):
            found += [*head, *passage[: size + (more if number == count - 1 else 0)].tolist()]
        return [*found, *text["query"], *query.tolist(), *text["ask_end"]]

    def _most_alike(self, query: np.ndarray, passages: list[np.ndarray], count: int) -> list[np.ndarray]:
        """The passages with the highest BM25 of the query's tokens, best first; too few are taken again from the first on."""
        if not passages:
            passages = [np.full(self._length, self._newline)]
        words = np.unique(query)
        scores = []
        for passage in passages:
            place = np.minimum(np.searchsorted(words, passage[: QUERY * 8]), len(words) - 1)
            times = np.bincount(place[words[place] == passage[: QUERY * 8]], minlength=len(words))
            scores.append(float((self._rarity[words] * times * (K1 + 1) / (times + K1)).sum()))
        order = np.argsort(-np.array(scores), kind="stable")
        return [passages[order[number % len(order)]] for number in range(count)]

    def _read(self, source: int, start: int, count: int) -> np.ndarray:
        """int64 [count] tokens of a source from ``start`` on, as text in one piece; from its beginning again after its end."""
        total = len(self._stores[source].tokens)
        parts, left = [], count
        while left:
            part = np.empty(min(left, total - start), self._dtype)
            os.preadv(self._stores[source].file.fileno(), [part], start * self._dtype.itemsize)
            parts.append(part)
            left, start = left - len(part), 0
        found = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
        found[found == self._eos] = self._newline
        return found

    def describe(self, rows: int) -> dict:
        """Tasks of the first ``rows`` rows: how many of each kind, at each depth of each length."""
        kinds, depths = Counter(dict.fromkeys(KINDS, 0)), {self._length // count: [0] * DEPTHS for count in self._per_row}
        for which, count in enumerate(self._per_row):
            own = range(which, rows, len(self._per_row))
            laps = len(own) * count // CELLS
            begun = laps * CELLS // count  # rows before the one where the last, unfinished lap begins
            last = [task for row in own[begun:] for task in self.tasks(row)][laps * CELLS - begun * count :]
            for kind in KINDS:
                kinds[kind] += laps * DEPTHS + sum(task.kind == kind for task in last)
            for depth in range(DEPTHS):
                depths[self._length // count][depth] += laps * len(KINDS) + sum(task.depth == depth for task in last)
        return {"rows": rows, "kinds": dict(kinds), "depths": depths}


def _place(depth: int, count: int) -> int:
    """Of ``count`` places the one at a depth."""
    return round(depth * (count - 1) / (DEPTHS - 1))

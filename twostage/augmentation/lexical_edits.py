"""Edited copies of texts without a server: swap, delete, insert or replace a tenth of the words.

A cheap baseline to hold paraphrases against, and not a paraphrase itself: words are moved, dropped
and drawn blindly, which can change what a text means ("not good" can lose its "not").

These are the four operations of EDA (Wei & Zou 2019, arXiv 1901.11196). One text gets one of them,
with n = max(1, round(0.1 · words)) edits:

    swap      n times, the words at two positions change places
    delete    n words are dropped
    insert    n words are put in, each at any place
    replace   n words give way to others

What differs from the paper. It inserts and replaces by synonyms from WordNet, a further download
that knows English alone. Here the words are drawn from the training texts:

- from those of the text's own class. A word of another class is evidence for that class, and would
  stand under the wrong label: "dreadful" in a text labelled positive.
- in proportion to how often they occur there (the unigram distribution). A class's word counts so
  stay about as they were; an even draw would fill the texts with words seen once.

The paper also passes stop words over where it inserts and replaces; there is no list of them here.
It drops each word with probability 0.1; here exactly n words go, as in the other three. Its swaps
may exchange a word with its equal; here the two words differ.
"""

import hashlib
import random
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

ALPHA = 0.1
"""Edits per word; the paper's advice (its Table 3) for 5,000 texts or more; 0.05 for fewer."""
_TRIES = 20


class LexicalEditor:
    """Edits texts with the words of a labelled corpus.

    Words are what white space separates; an edited text has single spaces between them.
    """

    def __init__(self, texts: Sequence[str], labels_N: np.ndarray) -> None:
        """labels_N: [N] class of each text"""
        counts_of: defaultdict[int, Counter[str]] = defaultdict(Counter)
        for text, label in zip(texts, labels_N.tolist(), strict=True):
            counts_of[label].update(text.split())
        self._vocabulary_of = {label: _Vocabulary(counts) for label, counts in counts_of.items()}

    def edit(self, text: str, label: int, key: str) -> str:
        """One edited text, a pure function of (corpus, text, label, key).

        label: a class of the corpus
        key: names the draw; another key gives another draw

        The operation is drawn evenly from those that can change this text, so that the result has
        a word at least and differs from `text` in its words. Where none can (the text is empty, and
        so are all of its class), `text` comes back as it is.
        """
        words, vocabulary = text.split(), self._vocabulary_of[label]
        # Python's own hash of a string changes from process to process; sha256 does not.
        rng = random.Random(int.from_bytes(hashlib.sha256(key.encode()).digest(), "big"))
        # All positions, unless the vocabulary is a single word, which cannot replace itself.
        replaceable = [i for i, word in enumerate(words) if vocabulary.has_other(word)]
        possible = []
        if len(set(words)) > 1:
            possible.append("swap")
        if len(words) > 1:
            possible.append("delete")
        if vocabulary.words:
            possible.append("insert")
        if replaceable:
            possible.append("replace")
        if not possible:
            return text

        num_edits = max(1, round(ALPHA * len(words)))
        operation = rng.choice(possible)
        if operation == "swap":
            edited = _swap(words, num_edits, rng)
        elif operation == "delete":
            # Never all of them: of two or more words, a tenth is fewer.
            dropped = set(rng.sample(range(len(words)), num_edits))
            edited = [word for i, word in enumerate(words) if i not in dropped]
        elif operation == "insert":
            edited = list(words)
            for _ in range(num_edits):
                edited.insert(rng.randrange(len(edited) + 1), vocabulary.draw(rng))
        else:
            edited = list(words)
            for i in rng.sample(replaceable, min(num_edits, len(replaceable))):
                edited[i] = vocabulary.draw_other(words[i], rng)
        return " ".join(edited)


def _swap(words: list[str], num_swaps: int, rng: random.Random) -> list[str]:
    """Exchange two different words, `num_swaps` times; `words` holds two different ones."""
    swapped = words
    for _ in range(_TRIES):
        swapped = list(words)
        for _ in range(num_swaps):
            i = rng.randrange(len(swapped))
            j = rng.choice([k for k, word in enumerate(swapped) if word != swapped[i]])
            swapped[i], swapped[j] = swapped[j], swapped[i]
        # One swap always changes the text, but a later one can undo it. That takes two swaps, thus
        # 15 words; the worst text, one word 14 times and another once, comes back in one try of 14.
        if swapped != words:
            break
    return swapped


class _Vocabulary:
    """The words of one class, drawn in proportion to their counts, in O(log V) time.

    Lay the class's running words in a row, sorted, equal words side by side. A draw is an even draw
    of a place in that row, and the word there is found by bisection in the cumulative counts.
    """

    def __init__(self, counts: Counter[str]) -> None:
        # Sorted, so that the order of the corpus's rows does not matter.
        self.words = sorted(counts)
        self._count_of = counts
        self._ends = list(accumulate(counts[word] for word in self.words))

    def has_other(self, word: str) -> bool:
        """Whether there is a word to draw that is not `word`."""
        return len(self.words) > (1 if word in self._count_of else 0)

    def draw(self, rng: random.Random) -> str:
        return self.words[bisect_right(self._ends, rng.randrange(self._ends[-1]))]

    def draw_other(self, word: str, rng: random.Random) -> str:
        """A draw that is never `word`, from a vocabulary that has another one.

        Leaves the places of `word` out of the row, so that nothing has to be drawn again.
        """
        count = self._count_of.get(word, 0)
        place = rng.randrange(self._ends[-1] - count)
        if count:
            end = self._ends[bisect_left(self.words, word)]
            if place >= end - count:
                place += count
        return self.words[bisect_right(self._ends, place)]

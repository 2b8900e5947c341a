"""What a user should know of model and data before training, each fact in one line with a number.

Only what is the case is said. The texts are looked at once, mostly by their token ids, in about a
tenth of the time that reading and tokenising them took (`benchmarks/million_rows.py`).
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .data.classes import Classes
from .data.token_store import TokenStore
from .data.tokenizer_files import count_capitals, lower_cases
from .model_folder import CONFIG, read_object
from .preparation import PreparedRun
from .printing import MAX_REPORTED, count, list_some, quoted, visible
from .two_stage import stage_1_signal

FEW_ROWS = 10
"""Test rows below which a class's scores move in large steps."""
_BLANK = hash("")


def find_facts(run: PreparedRun) -> list[str]:
    """The facts of a run, in the order in which they are printed."""
    train_N, test_N = _text_keys(run.train.texts), _text_keys(run.test.texts)
    augmented_N = _text_keys(run.augmented.texts if run.augmented else ())
    facts = [
        _describe_weights(run),
        *_describe_rare_classes(run.classes, run.data.test.labels_N),
        _describe_cut_texts(run),
        *_describe_blank_texts(run),
        _describe_shared_texts(run, np.concatenate([train_N, augmented_N]), test_N),
        _describe_contradictions(run, train_N),
        _describe_case(run),
        _describe_sizes(run),
    ]
    return [fact for fact in facts if fact]


def _describe_weights(run: PreparedRun) -> str:
    """How much a text of the rarest class counts at the start of stage 1."""
    recipe, data = run.recipe, run.data
    if not recipe.has_stage_1:
        return ""
    stage_1_data, loss = stage_1_signal(data.train, data.augmented, data.num_classes, recipe)
    counts_C = stage_1_data.class_counts(data.num_classes)
    tail, head = int(np.argmin(run.class_counts_C)), int(np.argmax(run.class_counts_C))
    if counts_C[tail] == counts_C[head]:
        return ""  # nothing is to be balanced
    weights_C = loss.keywords["class_weights_C"]
    weight = 1.0 if weights_C is None else float(weights_C[tail] / weights_C[head])
    rows = counts_C[head] / counts_C[tail]
    draws = rows if recipe.sampler == "class-balanced" else 1.0
    return (
        f"stage 1 starts with weights of {weight * draws:.2f} : 1 for a text of class "
        f"{quoted(run.classes.names[tail])} against one of class "
        f"{quoted(run.classes.names[head])}, of which there are {rows:.2f} times as many"
    )


def _describe_rare_classes(classes: Classes, test_labels_N: np.ndarray) -> Iterable[str]:
    """Classes that the test data can hardly judge, or not at all."""
    rows_C = np.bincount(test_labels_N, minlength=len(classes)).tolist()
    absent = [quoted(name) for name, rows in zip(classes.names, rows_C, strict=True) if not rows]
    few = [
        f"{quoted(name)} ({rows})"
        for name, rows in zip(classes.names, rows_C, strict=True)
        if 0 < rows < FEW_ROWS
    ]
    for names, what in (
        (absent, "no test row"),
        (few, f"fewer than {FEW_ROWS} test rows, so that scores move in large steps"),
    ):
        if names:
            have = "has" if len(names) == 1 else "have"
            listed = list_some(names, MAX_REPORTED, ", ")
            yield f"{len(names)} of {len(classes)} classes {have} {what}: {listed}"


def _describe_cut_texts(run: PreparedRun) -> str:
    limit = run.recipe.max_length
    cut = {name: (store.num_cut, len(store)) for name, store in _stores(run)}
    if not any(number for number, _ in cut.values()):
        return ""
    most = run.checkpoint.config.max_position_embeddings
    remedy = f" (--max-length can be up to {most})" if limit < most else ""
    return f"{_join(cut)} cut at {limit} tokens{remedy}"


def _describe_blank_texts(run: PreparedRun) -> Iterable[str]:
    """Texts in which the model finds nothing to read."""
    unknown = run.tokenizer.model.token_to_id(run.tokenizer.model.unk_token)
    empty, unreadable = {}, {}
    for name, store in _stores(run):
        lengths_N = store.lengths.numpy()
        unknown_N = _count_tokens(store, unknown)
        empty[name] = int((lengths_N == 2).sum()) if run.recipe.max_length > 2 else 0, len(store)
        unreadable[name] = int(((unknown_N == lengths_N - 2) & (unknown_N > 0)).sum()), len(store)
    for texts, what in ((empty, "empty"), (unreadable, "made of nothing but unknown tokens")):
        if any(number for number, _ in texts.values()):
            yield f"{_join(texts)} {what}"


def _describe_shared_texts(run: PreparedRun, train_N: np.ndarray, test_N: np.ndarray) -> str:
    """Test rows that the model is trained on, or nearly so.

    train_N, test_N: keys of the texts, those of the augmented ones behind the training texts.
    """
    alike_N = np.isin(test_N, train_N) & (test_N != _BLANK)
    if not alike_N.any():
        return ""
    in_test = {*run.test.texts}
    texts = [*run.train.texts, *(run.augmented.texts if run.augmented else ())]
    trained = {text for text in texts if text in in_test and text.strip()}
    num_exact = sum(text in trained for text in run.test.texts)
    train_pairs_N = _pair_keys(train_N, _train_labels(run), run.classes)
    test_pairs_N = _pair_keys(test_N, run.data.test.labels_N, run.classes)
    other = int((alike_N & ~np.isin(test_pairs_N, train_pairs_N)).sum())
    under_other = f", {other:,} of them only under another class" if other else ""
    return (
        f"of {count(len(test_N), 'test text')}, {num_exact:,} stand in the training data too "
        f"({alike_N.sum():,} when case, white space and Unicode form are ignored{under_other}): "
        "scores on them say nothing of new texts"
    )


def _describe_contradictions(run: PreparedRun, train_N: np.ndarray) -> str:
    """Training texts under several classes. train_N: keys of the texts."""
    labels_N = run.data.train.labels_N
    order_N = np.argsort(train_N, kind="stable")
    starts = np.flatnonzero(np.diff(train_N[order_N], prepend=train_N[order_N[0]] - 1))
    low, high = (f.reduceat(labels_N[order_N], starts) for f in (np.minimum, np.maximum))
    several = (low != high) & (train_N[order_N[starts]] != _BLANK)
    if not several.any():
        return ""
    ends = np.append(starts[1:], len(order_N))
    bounds = zip(starts[several], ends[several], strict=True)
    rows_of = [order_N[start:end] for start, end in bounds]
    first = min(rows_of, key=lambda rows: int(rows[0]))
    other = first[labels_N[first] != labels_N[first[0]]][0]
    where = " and ".join(run.train.place(row) for row in (first[0], other))
    verb = "stands" if len(rows_of) == 1 else "stand"
    return (
        f"{count(len(rows_of), 'training text')} {verb} under more than one class, in "
        f"{count(sum(map(len, rows_of)), 'row')} (case, white space and Unicode form ignored), "
        f"such as {where}"
    )


def _describe_case(run: PreparedRun) -> str:
    """A tokenizer that keeps capitals for a model without, or the reverse."""
    keeps, capitals = not lower_cases(run.tokenizer), count_capitals(run.tokenizer)
    share = capitals / max(1, run.tokenizer.get_vocab_size())
    name = _model_name(run.folder)
    if keeps and share < 0.01:
        said = f"the tokenizer keeps capitals, but only {capitals} of its tokens have any"
    elif keeps and re.search(r"\buncased\b", name):
        said = f"the tokenizer keeps capitals, but the model is named '{visible(name)}'"
    elif not keeps and share > 0.05:
        said = f"the tokenizer lower-cases, but {capitals:,} of its tokens have capitals"
    elif not keeps and re.search(r"\bcased\b", name):
        said = f"the tokenizer lower-cases, but the model is named '{visible(name)}'"
    elif not keeps and _says_to_keep_case(run.folder / "tokenizer.json"):
        said = (
            "tokenizer.json keeps capitals, but its vocabulary has none, and tokenizer_config.json "
            "does not say so: the tokenizer lower-cases, as transformers does"
        )
    else:
        return ""
    texts = [*run.train.texts, *run.test.texts]
    number = sum(text != text.lower() for text in texts)
    return f"{said}; {number:,} of {len(texts):,} texts have capitals" if number else ""


def _model_name(folder: Path) -> str:
    """Last part of what config.json says that the model was made from, else the folder's name."""
    in_cache = folder.parent.name == "snapshots"  # whose folders are named by their commits
    name = read_object(folder / CONFIG).get("_name_or_path")
    name = name or (folder.parent.parent if in_cache else folder).name
    return Path(str(name)).name.lower().replace("_", "-")


def _says_to_keep_case(path: Path) -> bool:
    normalizer = read_object(path).get("normalizer") if path.is_file() else None
    return isinstance(normalizer, dict) and normalizer.get("lowercase") is False


def _describe_sizes(run: PreparedRun) -> str:
    """A tokenizer that may be another model's: its ids end well before the model's rows.

    bert-base-cased's end 5 % before the rows of bert-base-uncased; a table that was rounded up to a
    multiple of 64 or 128 is less longer than that.
    """
    rows, ids = run.checkpoint.config.vocab_size, max(run.tokenizer.get_vocab().values()) + 1
    if rows - ids <= max(128, rows // 25):
        return ""
    return (
        f"the model has {rows:,} word embeddings, but the tokenizer's ids end at {ids - 1:,}: it "
        "may be another model's"
    )


def _train_labels(run: PreparedRun) -> np.ndarray:
    """Labels of the training texts, then of the augmented ones."""
    parts = (run.data.train, run.data.augmented)
    return np.concatenate([part.labels_N for part in parts if part is not None])


def _pair_keys(keys_N: np.ndarray, labels_N: np.ndarray, classes: Classes) -> np.ndarray:
    """[N] int64: equal for texts of one key under one class (overflow only mixes them)."""
    pairs_N: np.ndarray = keys_N * len(classes) + labels_N
    return pairs_N


def _stores(run: PreparedRun) -> list[tuple[str, TokenStore]]:
    """The texts of the run, by what they are called."""
    data = run.data
    stores = [("training", data.train.store), ("test", data.test.store)]
    if data.augmented is not None:
        stores.insert(1, ("augmented", data.augmented.store))
    return stores


def _join(numbers: dict[str, tuple[int, int]]) -> str:
    """`3 of 10 training texts and 1 of 5 test texts are`."""
    shown = [
        f"{number:,} of {count(total, f'{name} text')}"
        for name, (number, total) in numbers.items()
        if number
    ]
    is_one = sum(number for number, _ in numbers.values()) == 1
    return f"{' and '.join(shown)} {'is' if is_one else 'are'}"


def _count_tokens(store: TokenStore, token: int) -> np.ndarray:
    """How often `token` occurs in each text, [N]."""
    places = np.flatnonzero(store.ids.numpy() == token)
    texts = np.searchsorted(store.offsets.numpy(), places, side="right") - 1
    return np.bincount(texts, minlength=len(store))


def _text_keys(texts: Sequence[str]) -> np.ndarray:
    """[N] int64: equal for texts that differ in case, white space and Unicode form alone.

    Numbers, not texts, which would be held in memory a second time. Of a million texts, two share
    one by chance in one of 37 million runs.
    """
    return np.fromiter((hash(_normalize(text)) for text in texts), np.int64, len(texts))


def _normalize(text: str) -> str:
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())

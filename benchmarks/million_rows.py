"""In what memory, and how fast, is a large table read, tokenised and held?

    python benchmarks/million_rows.py --data demo             MiniLM's tokenizer, critics' snippets
    python benchmarks/million_rows.py --model bert-base       made-up words, no network

The table is drawn with replacement from the texts; every fiftieth text has quotes, so that the
reader has something to weigh, and every hundredth an emoji, which makes a string of the whole file
four times as large.

    ours        what `twostage train` does before it trains: read the table, find its classes, code
                its labels, tokenise its texts, find the facts that it prints (with the first tenth
                of the rows as test data); table, labels and token store are held
    usual       what people write: pandas' `read_csv`, then transformers' tokenizer on all texts,
                cut at 128 tokens; the frame and the lists of ids are held

Each case is a process of its own. Its memory is counted from after the imports and the loading of
model and tokenizer, so these, the interpreter and torch are not in it; the peak is the kernel's own
account. `--rows` are those of the first case; the comparison has a tenth of them, for the usual
way's sake.
"""

import json
import random
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from harness import (
    MemoryPeak,
    describe_environment,
    describe_place,
    markdown_table,
    memory_status,
    run_jobs,
    save,
)
from predict_throughput import MAX_LENGTH, prepare_folder
from workload import NUM_RANDOM_TEXTS, make_parser

from twostage.data.classes import find_classes
from twostage.data.tables import Table, read_table, write_table
from twostage.data.token_store import StageData, TokenStore
from twostage.data.tokenization import load_tokenizer, tokenize
from twostage.facts import find_facts
from twostage.model.checkpoint import load_checkpoint
from twostage.preparation import Datasets, PreparedRun
from twostage.recipe import Recipe


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(run_job(json.loads(options.job))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        num_texts = NUM_RANDOM_TEXTS.get(options.model, 0)
        folder = prepare_folder(options.model, options.data, Path(temporary), num_texts)
        few = max(1, options.rows // 10)
        tables = {rows: Path(temporary) / f"{rows}.csv" for rows in (options.rows, few)}
        for rows, path in tables.items():
            write_draws(folder, path, rows)
        cases = (("ours", options.rows), ("ours", few), ("usual", few))
        jobs = [
            {"run": run, "rows": rows, "table": str(tables[rows]), "model": str(folder / "model")}
            for run, rows in cases
        ]
        record = describe_environment(options.device) | {"model": options.model}
        name = f"million_rows-{options.model}-{describe_place(record)}"
        for done in run_jobs(Path(__file__), jobs):
            record |= {
                "rows": [
                    {k: v for k, v in row.items() if k not in ("table", "model")} for row in done
                ]
            }
            save(options.output, name, describe(record), record)
    print(f"{describe(record)}\n\n{json.dumps(record)}")


def write_draws(folder: Path, path: Path, rows: int) -> None:
    """A table of `rows` texts drawn from the folder's, one in eleven of the tail class."""
    known = read_table(folder / "train.tsv").texts
    rng = random.Random(7)
    draws = (rng.choice(known) for _ in range(rows))
    marks = (' "so"' * (i % 50 == 0) + ", 🙂" * (i % 100 == 0) for i in range(rows))
    labels = (int(i % 11 > 0) for i in range(rows))
    texts = (draw + mark for draw, mark in zip(draws, marks, strict=True))
    write_table(path, ("text", "label"), zip(texts, labels, strict=True))


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """One case in this process."""
    path = Path(job["table"])
    run = run_ours if job["run"] == "ours" else run_usual
    return run(path, Path(job["model"])) | {"file_mib": round(path.stat().st_size / 2**20, 1)}


def run_ours(path: Path, model: Path) -> dict[str, Any]:
    checkpoint, tokenizer = load_checkpoint(model), load_tokenizer(model)
    memory = MemoryPeak(torch.device("cpu"))
    began = perf_counter()
    table = read_table(path)
    read = perf_counter()
    classes = find_classes(table)
    data = StageData(tokenize(tokenizer, table.texts, MAX_LENGTH), classes.encode(table))
    tokenized = perf_counter()
    few = len(table) // 10
    test = Table(table.texts[:few], table.labels[:few])
    offsets = data.store.offsets[: few + 1]
    test_data = StageData(TokenStore(data.store.ids[: offsets[-1]], offsets), data.labels_N[:few])
    sets = Datasets(data, test_data, len(classes))
    run = PreparedRun(Recipe(), model, checkpoint, tokenizer, table, test, None, classes, sets)
    facts = find_facts(run)
    ended = perf_counter()
    held = memory_status("VmRSS") - memory.before
    assert facts
    return describe_case(
        read - began, tokenized - read, held, memory.read(), len(data.store.ids)
    ) | {"facts_seconds": round(ended - tokenized, 3)}


def run_usual(path: Path, model: Path) -> dict[str, Any]:
    import pandas as pd
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    memory = MemoryPeak(torch.device("cpu"))
    began = perf_counter()
    frame = pd.read_csv(path)
    read = perf_counter()
    encodings = tokenizer(frame["text"].tolist(), truncation=True, max_length=MAX_LENGTH)
    ended = perf_counter()
    held = memory_status("VmRSS") - memory.before
    num_tokens = sum(map(len, encodings["input_ids"]))
    return describe_case(read - began, ended - read, held, memory.read(), num_tokens)


def describe_case(
    read_seconds: float, tokenize_seconds: float, held: int, peak: int, num_tokens: int
) -> dict[str, Any]:
    return {
        "read_seconds": round(read_seconds, 3),
        "tokenize_seconds": round(tokenize_seconds, 3),
        "held_mib": round(held / 2**20, 1),
        "peak_mib": round(peak / 2**20, 1),
        "tokens": num_tokens,
    }


def describe(record: dict[str, Any]) -> str:
    """The table of all cases so far, in Markdown."""
    lines = []
    for row in record["rows"]:
        first = [row["run"], f"{row['rows']:,}"]
        if "error" in row:
            lines.append([*first, f"failed: {row['error']}", *[""] * 5])
            continue
        names = ["file_mib", "read_seconds", "tokenize_seconds", "facts_seconds", "held_mib"]
        names += ["peak_mib", "tokens"]
        lines.append([*first, *(f"{row[name]:,}" if name in row else "" for name in names)])
    header = ["run", "rows", "file MiB", "read s", "tokenise s", "facts s"]
    header += ["held MiB", "peak MiB", "tokens"]
    machine, versions = record["machine"], record["versions"]
    return "\n\n".join(
        [
            f"{machine['device']}, {machine['threads']} threads, torch {versions['torch']}, "
            f"commit {record['commit']}: {record['command']}",
            markdown_table(header, lines),
        ]
    )


if __name__ == "__main__":
    main()

"""How fast are the classes of a file of texts predicted, ours beside transformers' ways?

    python benchmarks/predict_throughput.py --data demo             MiniLM on critics' snippets
    python benchmarks/predict_throughput.py --model bert-base       BERT-base's shape, no network

Raw texts go in, probabilities [N, C] come out, and all on the way there is on the clock; loading
the model is not. All cases have the same weights, the recipe's head included.

    ours        what `twostage evaluate` does: tokenise all texts, sort them by length, batches of a
                fixed number of tokens without padding
    pipeline    transformers' text-classification pipeline, at each of several batch sizes; its
                fastest one is what the others are compared with
    loop        what people write by hand: batches of 32 in file order, padded to the longest text

Each case runs in a process of its own and predicts all texts several times, after a few texts to
warm up. The head is untrained: speed does not depend on what it has learnt. That all predict the
same is measured too: the largest difference of a logit from ours in fp32. Logits are asked of the
pipeline, and everyone's become probabilities in one numpy call, which spares it its own softmax,
one text at a time.

Shapes: N texts, C classes.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from harness import (
    MemoryPeak,
    describe_environment,
    describe_place,
    markdown_table,
    measure_limits,
    run_child,
    save,
)
from safetensors.torch import save_file
from train_throughput import describe_limits, share
from workload import CLS, SEP, SHAPES, make_parser, needed_flops, random_checkpoint, random_texts

from twostage.assets.data_sets import fetch_demo
from twostage.data.tables import read_table, write_table
from twostage.data.tokenization import load_tokenizer, tokenize
from twostage.machine import choose_device
from twostage.memory import keep_freed_memory
from twostage.model.bert import BertClassifier
from twostage.model.checkpoint import build_model, load_checkpoint, to_stored
from twostage.saved_model import ModelInfo, load_model, save_model
from twostage.training.evaluation import predict_logits
from twostage.training.metrics import softmax

SEED = 7
MAX_LENGTH = 128
LOOP_BATCH_SIZE = 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GPU_BATCH_SIZES = (1, 8, 16, 32, 64, 128, 256, 512)
CPU_BATCH_SIZES = GPU_BATCH_SIZES[:6]
RUNS = {f"ours {dtype}": ("ours", dtype, 0) for dtype in DTYPES}
RUNS |= {
    f"pipeline {dtype}, batch {size}": ("pipeline", dtype, size)
    for dtype in DTYPES
    for size in GPU_BATCH_SIZES
}
RUNS |= {f"loop {dtype}": ("loop", dtype, LOOP_BATCH_SIZE) for dtype in DTYPES}
"""Name in the table: (way, precision, batch size). The first is what logits are compared with."""
CPU_RUNS = tuple(name for name, run in RUNS.items() if run[2] <= CPU_BATCH_SIZES[-1])

Texts = list[str]
Predict = Callable[[Texts], np.ndarray]
"""[N, C] fp32 logits of texts, in their order."""
Tokenize = Callable[[Texts], object]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--runs", help=f"some of: {'; '.join(RUNS)} (default: all that make sense)")
    parser.add_argument("--texts", type=int, default=4_000)
    parser.add_argument("--warmup", type=int, default=256, help="texts before the clock")
    parser.add_argument("--repeats", type=int, default=3, help="times that all are predicted")
    options = parser.parse_args()
    if options.job:
        print(json.dumps(run_job(json.loads(options.job))))
        return
    on_gpu = choose_device(options.device).type == "cuda"
    runs = options.runs.split("; ") if options.runs else list(RUNS) if on_gpu else CPU_RUNS
    if unknown := set(runs) - set(RUNS):
        parser.error(f"there is no run called {'; '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = prepare_folder(options.model, options.data, Path(temporary), options.texts)
        save_classifier(folder / "model", Path(temporary) / "classifier")
        common = {
            "encoder": str(folder / "model"),
            "classifier": str(Path(temporary) / "classifier"),
            "data": str(folder),
            "device": options.device,
            "texts": options.texts,
            "warmup": options.warmup,
            "repeats": options.repeats,
        }
        limits = {"limits": "quick" if options.model == "tiny" else "full"}
        record = (
            describe_environment(options.device)
            | {"model": options.model, "warmup": options.warmup, "repeats": options.repeats}
            | describe_texts(folder, options.texts)
            | {"limits": run_child(Path(__file__), limits | {"device": options.device}, 300)}
        )
        name = f"predict_throughput-{options.model}-{describe_place(record)}"
        for rows in run_jobs([{"run": run} | common for run in runs]):
            record |= {"rows": rows, "best_pipeline": best_pipeline(rows)}
            print(json.dumps(rows[-1]), flush=True)
            save(options.output, name, describe(record), record)
    print(f"\n{describe(record)}\n\n{json.dumps(record)}")


def prepare_folder(model: str, data: Path, temporary: Path, num_texts: int) -> Path:
    """A folder with `train.tsv`, `dev.tsv` and `model/`: the demo's, or a made-up one.

    num_texts: a made-up one has this many in each table.
    """
    if model == "minilm":
        fetch_demo(data)
        return data
    write_random_demo(temporary / "demo", model, num_texts)
    return temporary / "demo"


def write_random_demo(folder: Path, model: str, num_texts: int) -> None:
    """What the demo's folder has, with random weights and made-up texts; no network is needed.

    model: one of SHAPES. Every token of `random_texts` becomes a word of its own, `w` and its
    number, so that the texts have the snippets' lengths when they are tokenised.
    """
    checkpoint = random_checkpoint(SHAPES[model])
    config = checkpoint.config
    tokenizer_folder = folder / "model"
    tokenizer_folder.mkdir(parents=True)
    stored = to_stored(checkpoint.tensors, config.num_hidden_layers)
    contiguous = {name: tensor.contiguous() for name, tensor in stored.items()}
    save_file(contiguous, tokenizer_folder / "model.safetensors", metadata={"format": "pt"})
    description = json.dumps({"model_type": "bert"} | asdict(config))
    (tokenizer_folder / "config.json").write_text(description, encoding="utf-8")

    words = [f"w{i}" for i in range(config.vocab_size)]
    for i, token in ((0, "[PAD]"), (99, "[MASK]"), (100, "[UNK]"), (CLS, "[CLS]"), (SEP, "[SEP]")):
        words[i] = token
    (tokenizer_folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    store = random_texts(2 * num_texts, config.vocab_size).store
    bounds = store.offsets.tolist()
    ids = store.ids.tolist()
    rows = [
        (" ".join(words[i] for i in ids[bounds[n] + 1 : bounds[n + 1] - 1]), n % 2)
        for n in range(2 * num_texts)
    ]
    write_table(folder / "train.tsv", ("sentence", "label"), rows[:num_texts])
    write_table(folder / "dev.tsv", ("sentence", "label"), rows[num_texts:])


def save_classifier(encoder: Path, folder: Path) -> None:
    """The encoder with an untrained head for two classes, as `twostage train` saves a model."""
    generator = torch.Generator().manual_seed(SEED)
    classifier = build_model(load_checkpoint(encoder), 2, generator)
    info = ModelInfo(("0", "1"), (1, 1), MAX_LENGTH)
    save_model(folder, classifier, load_tokenizer(encoder), info)


def read_texts(folder: Path, num_texts: int) -> Texts:
    """The first `num_texts` texts, those of the test data first."""
    texts = [t for name in ("dev.tsv", "train.tsv") for t in read_table(folder / name).texts]
    return texts[:num_texts]


def describe_texts(folder: Path, num_texts: int) -> dict[str, Any]:
    """How much there is to predict, and the least work that it asks for."""
    texts = read_texts(folder, num_texts)
    lengths_N = tokenize(load_tokenizer(folder / "model"), texts, MAX_LENGTH).lengths.numpy()
    config = load_checkpoint(folder / "model").config
    return {
        "texts": len(texts),
        "tokens": int(lengths_N.sum()),
        # A step of stage 2 is three times its forward pass.
        "needed_flops": float(needed_flops(config, lengths_N, stage=2)) / 3,
    }


def run_jobs(jobs: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The rows so far, after each job, with the difference of its logits from the reference's."""
    rows: list[dict[str, Any]] = []
    reference_NC: np.ndarray | None = None
    for job in jobs:
        result = run_child(Path(__file__), job, 1_800)
        if "error" not in result:
            logits_NC = np.array(result.pop("logits"))
            if job["run"] == next(iter(RUNS)):
                reference_NC = logits_NC
                result["logits_std"] = float(logits_NC.std(axis=0).mean())
            if reference_NC is not None:
                result["max_logit_difference"] = float(np.abs(logits_NC - reference_NC).max())
        rows.append({"run": job["run"], **result})
        yield rows


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Time one case in this process."""
    device = choose_device(job["device"])
    if job.get("limits"):
        return measure_limits(device, quick=job["limits"] == "quick")
    way, precision, batch_size = RUNS[job["run"]]
    texts = read_texts(Path(job["data"]), job["texts"])
    import_rivals()
    if way == "ours":
        keep_freed_memory()  # as the command line does
    memory = MemoryPeak(device)
    classifier, tokenizer, info = load_model(Path(job["classifier"]))
    predict: Predict
    tokenize_alone: Tokenize
    if way == "ours":
        classifier.to(device)

        def predict(texts: Texts) -> np.ndarray:
            store = tokenize(tokenizer, texts, info.max_length)
            logits_NC: np.ndarray = predict_logits(
                classifier, store, dtype=DTYPES[precision]
            ).numpy()
            return logits_NC

        def tokenize_alone(texts: Texts) -> object:
            return tokenize(tokenizer, texts, info.max_length)

    else:
        make = make_pipeline if way == "pipeline" else make_loop
        model = make_rival(classifier, DTYPES[precision]).to(device)
        del classifier
        predict, tokenize_alone = make(model, Path(job["encoder"]), batch_size, device)

    began = perf_counter()
    predict(texts[: job["warmup"]])
    warmup_seconds = perf_counter() - began
    memory.reset()
    seconds = []
    for _ in range(job["repeats"]):
        began = perf_counter()
        logits_NC = predict(texts)
        probabilities_NC = softmax(logits_NC)
        seconds.append(perf_counter() - began)
    peak = memory.read()
    assert probabilities_NC.shape == (len(texts), 2)
    began = perf_counter()
    tokenize_alone(texts)
    return {
        "texts_per_second": len(texts) / float(np.median(seconds)),
        "seconds": [round(s, 4) for s in seconds],
        "tokenization_seconds": round(perf_counter() - began, 4),
        "warmup_seconds": round(warmup_seconds, 3),
        "peak_memory_mib": round(peak / 2**20),
        "logits": logits_NC.tolist(),
    }


def import_rivals() -> None:
    """In every case, ours too, so that modules do not count as memory that predicting takes."""
    import transformers

    _ = transformers.AutoTokenizer, transformers.BertForSequenceClassification
    _ = transformers.pipeline, transformers.TextClassificationPipeline


def make_rival(ours: BertClassifier, dtype: torch.dtype) -> Any:
    """transformers' own classifier with our weights, in its head's place the recipe's."""
    import peers
    import transformers

    twin = peers.PeerClassifier(ours, "sdpa", torch.nn.functional.cross_entropy)
    config = twin.bert.config
    config.num_labels = ours.num_classes
    with torch.device("meta"):  # its own weights are never drawn
        model: Any = transformers.BertForSequenceClassification(config)
    model.bert, model.classifier, model.dropout = twin.bert, twin.classifier, torch.nn.Identity()
    return model.eval().to(dtype)


def make_pipeline(
    model: Any, encoder: Path, batch_size: int, device: torch.device
) -> tuple[Predict, Tokenize]:
    """transformers' pipeline on a list of texts, one after the other to the tokenizer."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    cut = {"truncation": True, "max_length": MAX_LENGTH}
    logits_only = {"top_k": None, "function_to_apply": "none"}
    classify = transformers.pipeline(
        "text-classification", model=model, tokenizer=tokenizer, device=device
    )
    places = {name: c for c, name in model.config.id2label.items()}

    def predict(texts: Texts) -> np.ndarray:
        answers: Any = classify(texts, batch_size=batch_size, **logits_only, **cut)
        logits_NC = np.empty((len(texts), len(places)), dtype=np.float32)
        for logits_C, answer in zip(logits_NC, answers, strict=True):
            for score in answer:  # the highest first
                logits_C[places[score["label"]]] = score["score"]
        return logits_NC

    def tokenize_alone(texts: Texts) -> object:
        return [classify.preprocess(text, **cut) for text in texts]

    return predict, tokenize_alone


def make_loop(
    model: Any, encoder: Path, batch_size: int, device: torch.device
) -> tuple[Predict, Tokenize]:
    """Batches in the order of the texts, each padded to its longest text."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)

    def batches(texts: Texts) -> Iterator[Any]:
        for start in range(0, len(texts), batch_size):
            yield tokenizer(
                texts[start : start + batch_size],
                padding=True,
                truncation=True,
                max_length=MAX_LENGTH,
                return_tensors="pt",
            )

    def predict(texts: Texts) -> np.ndarray:
        with torch.inference_mode():
            logits = [model(**batch.to(device)).logits.float().cpu() for batch in batches(texts)]
        logits_NC: np.ndarray = torch.cat(logits).numpy()
        return logits_NC

    return predict, lambda texts: list(batches(texts))


def best_pipeline(rows: list[dict[str, Any]]) -> str | None:
    """The run of the pipeline that predicts the most texts a second."""
    speeds = {
        row["run"]: row["texts_per_second"]
        for row in rows
        if RUNS[row["run"]][0] == "pipeline" and "error" not in row
    }
    return max(speeds, key=speeds.__getitem__, default=None)


def describe(record: dict[str, Any]) -> str:
    """The table of all cases so far, in Markdown."""
    rows, best = record["rows"], record["best_pipeline"]
    best_speed = next((row["texts_per_second"] for row in rows if row["run"] == best), None)
    tokens_a_text = record["tokens"] / record["texts"]
    flops_a_text = record["needed_flops"] / record["texts"]
    lines = []
    for row in rows:
        name = f"**{row['run']}** (its best)" if row["run"] == best else row["run"]
        if "error" in row:
            lines.append([name, f"failed: {row['error']}", *[""] * 8])
            continue
        speed, seconds = row["texts_per_second"], row["seconds"]
        difference = row.get("max_logit_difference")
        lines.append(
            [
                name,
                f"{speed:.1f}",
                f"{speed / best_speed:.2f}" if best_speed else "",
                f"{speed * tokens_a_text:.0f}",
                share(speed * flops_a_text, record["limits"].get("matmul_bf16_flops")),
                f"{np.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})",
                row["tokenization_seconds"],
                row["warmup_seconds"],
                row["peak_memory_mib"],
                "" if difference is None else f"{difference:.1e}",
            ]
        )
    header = ["run", "texts/s", "× best pipeline", "real tokens/s", "of matmul"]
    header += ["seconds, median (range)", "of them tokenising", "warm-up s", "memory MiB"]
    machine = record["machine"]
    spread = next((row["logits_std"] for row in rows if "logits_std" in row), None)
    return "\n\n".join(
        [
            f"{machine['device']}, {machine['threads']} threads, torch "
            f"{record['versions']['torch']}, transformers {record['versions']['transformers']}, "
            f"commit {record['commit']}: {record['command']}",
            f"{record['texts']} texts of {tokens_a_text:.1f} tokens on average. Limits measured in "
            f"this run: {describe_limits(record['limits'])}.",
            markdown_table([*header, "max logit difference"], lines),
            "Tokenising was timed apart as well, in a pass of its own. The logit difference is to "
            "ours fp32"
            + (f", whose logits have a standard deviation of {spread:.1e}." if spread else "."),
        ]
    )


if __name__ == "__main__":
    main()

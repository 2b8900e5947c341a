"""What does each saving give? An ablation: training as it is, and without one saving at a time.

    python benchmarks/savings.py --data demo

Ours in bf16 on the demo's data, timed as in `train_throughput.py`, each case in a process of its
own. What stands for a saving that is taken out is the plain form in its place, put there from
outside: the package has no switch for it. Prints a table and one JSON line, and writes both to
`benchmarks/results/`.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import train_throughput
from harness import RESULTS, describe_environment, markdown_table, put, run_jobs, save
from torch import Tensor
from train_throughput import make_jobs, run_job
from workload import MODELS

from twostage.assets.data_sets import fetch_demo
from twostage.data.packing import pack
from twostage.fast import step, trunk
from twostage.kernels import dropout, padded_attention, residual_norm
from twostage.kernels.attention import PackedLayout
from twostage.model import bert


def keep_the_whole_vocabulary() -> None:
    put(step, "renumber_tokens", lambda store: (store, None))


def compute_the_whole_last_layer() -> None:
    def pool(
        self: bert.Bert,
        hidden_TD: Tensor,
        layout: PackedLayout,
        first_layer: int,
        randomness: dropout.Randomness | None = None,
    ) -> Tensor:
        for layer in list(self.layers)[first_layer:]:
            hidden_TD = layer(hidden_TD, layout, randomness)
        return torch.tanh(self.pooler(hidden_TD[layout.first_tokens_B]))

    put(bert.Bert, "pool", pool)


def run_the_trunk_at_every_step() -> None:
    put(trunk, "count_frozen_layers", lambda model: 0)


def give_each_text_a_strip() -> None:
    def place(lengths_B: Tensor) -> tuple[Tensor, Tensor, int, int]:
        strips_B = torch.arange(len(lengths_B))
        length = padded_attention._round_up(int(lengths_B.max()))
        return strips_B, torch.zeros_like(strips_B), length, 1

    put(padded_attention, "_place_in_strips", place)


def leave_the_attentions_backward_to_autograd() -> None:
    put(padded_attention, "attend", padded_attention.reference_attend)


def make_masks_over_bool() -> None:
    def mask(
        shape: Sequence[int],
        p: float,
        generator: torch.Generator,
        dtype: torch.dtype,
        site: int = 0,
    ) -> tuple[Tensor, float]:
        drop_below = round(p * 65_536)
        kept = dropout._random_lanes(shape, generator).ge(drop_below - 32_768)
        return kept.to(dtype), 1.0 / (1.0 - drop_below / 65_536)

    for module in (dropout, padded_attention, residual_norm):
        put(module, "dropout_mask", mask)


def draw_masks_by_bernoulli() -> None:
    def mask(
        shape: Sequence[int],
        p: float,
        generator: torch.Generator,
        dtype: torch.dtype,
        site: int = 0,
    ) -> tuple[Tensor, float]:
        kept = torch.empty(torch.Size(shape), dtype=dtype, device=generator.device)
        return kept.bernoulli_(1.0 - p, generator=generator), 1.0 / (1.0 - p)

    for module in (dropout, padded_attention, residual_norm):
        put(module, "dropout_mask", mask)


def leave_token_counts_as_they_are() -> None:
    assert pack.__kwdefaults__ is not None
    assert "round_to" in pack.__kwdefaults__
    pack.__kwdefaults__["round_to"] = 1
    put(padded_attention, "ROUND_LENGTH_TO", 1)


def return_freed_memory() -> None:
    put(train_throughput, "keep_freed_memory", lambda: None)


SAVINGS: dict[str, tuple[Callable[[], None], tuple[int, ...]]] = {
    "words that occur alone are trained": (keep_the_whole_vocabulary, (2,)),
    "last layer for first tokens alone": (compute_the_whole_last_layer, (2, 1)),
    "frozen trunk in large batches": (run_the_trunk_at_every_step, (1,)),
    "two texts to a strip of attention": (give_each_text_a_strip, (2,)),
    "attention's backward written out": (leave_the_attentions_backward_to_autograd, (2,)),
    "masks compared as int16, not over bool": (make_masks_over_bool, (2, 1)),
    "masks from 16-bit lanes, not bernoulli_": (draw_masks_by_bernoulli, (2, 1)),
    "rounded token counts and lengths": (leave_token_counts_as_they_are, (2,)),
    "freed memory kept by the process": (return_freed_memory, (2, 1)),
}
"""What it is: (what takes it out, the stages that it serves)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="minilm", choices=MODELS)
    parser.add_argument("--data", type=Path, default=Path("demo"), help="the demo's folder")
    parser.add_argument("--batch-sizes", default="16,64")
    parser.add_argument("--savings", help=f"some of: {'; '.join(SAVINGS)} (default: all)")
    parser.add_argument("--texts", type=int, default=960, help="on the clock, in every case")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job = json.loads(options.job)
        if job["without"] is not None:
            SAVINGS[job["without"]][0]()
        print(json.dumps(run_job(job)))
        return
    savings = options.savings.split("; ") if options.savings else list(SAVINGS)
    if unknown := set(savings) - set(SAVINGS):
        parser.error(f"there is no saving called {'; '.join(sorted(unknown))}")
    if options.model == "minilm":
        fetch_demo(options.data)
    record = describe_environment("cpu")
    sizes = [int(size) for size in options.batch_sizes.split(",")]
    jobs = plan(savings, options.model, str(options.data), sizes, options.texts)
    for rows in run_jobs(Path(__file__), jobs, seconds_a_job=300):
        record["rows"] = rows
        print(json.dumps(rows[-1]), flush=True)
        save(options.output, f"savings-{options.model}-cpu", describe(record), record)
    print(f"\n{describe(record)}\n\n{json.dumps(record)}")


def plan(
    savings: Sequence[str], model: str, data: str, sizes: Sequence[int], num_texts: int
) -> list[dict[str, Any]]:
    """The cases of each stage that some of these savings serve, at each batch size: as it is, then
    without each of them."""
    cases = []
    for stage_number in (2, 1):
        names = [name for name in savings if stage_number in SAVINGS[name][1]]
        if not names:
            continue
        jobs = make_jobs(
            ("ours bf16",),
            (stage_number,),
            sizes if stage_number == 2 else sizes[:1],
            num_texts,
            model=model,
            data=data,
            device="cpu",
            warmup=8,
        )
        cases += [job | {"without": name} for job in jobs for name in (None, *names)]
    return cases


def describe(record: dict[str, Any]) -> str:
    """All cases so far, in Markdown."""
    whole: dict[tuple[int, int], float] = {}
    lines = []
    for row in record["rows"]:
        case = (row["stage"], row["batch_size"])
        head = [row["without"] or "(as it is)", *case]
        if "error" in row:
            lines.append([*head, f"failed: {row['error']}", "", ""])
            continue
        speed = row["examples_per_second"]
        whole.setdefault(case, speed)
        ratio = f"{whole[case] / speed:.2f}" if row["without"] else ""
        lines.append([*head, f"{speed:.1f}", ratio, row["peak_memory_mib"]])
    header = ["without", "stage", "batch", "examples/s", "the saving gives ×", "memory MiB"]
    machine = record["machine"]
    return (
        f"{machine['device']}, {machine['threads']} threads, torch {record['versions']['torch']}, "
        f"commit {record['commit']}: {record['command']}\n\n{markdown_table(header, lines)}"
    )


if __name__ == "__main__":
    main()

"""The `twostage` command: arguments only. What each command does is elsewhere.

Exit codes: 0 done; 2 usage, or output that cannot be written; 3 data or model unusable; 4 network
or missing download; 5 the API refused (key, quota, unknown model); 6 ended with partial output; 7
non-finite numbers; 130 Ctrl-C; 143 SIGTERM.
"""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from .errors import TwoStageError, TwoStageWarning, UsageError
from .printing import visible

if TYPE_CHECKING:
    from .augmentation.openai_client import ApiKey
    from .data.tables import TableOptions


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command in the same orderly way as Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""

    def terminate(signum: int, frame: FrameType | None) -> None:
        raise _Terminated

    handlers: dict[int, Callable[[int, FrameType | None], object]] = {signal.SIGTERM: terminate}
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # A script's shell starts what stands before an `&` so. Whoever sends it SIGINT means it.
        handlers[signal.SIGINT] = signal.default_int_handler
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        parser = _make_parser()
        options, unknown = parser.parse_known_args(arguments)
        if unknown:
            # Their names alone: a value may be a key that was given under a wrong name.
            names = [word.partition("=")[0] for word in unknown if word.startswith("-")]
            shown = visible(" ".join(names) or "a word too many")
            parser.error(f"unrecognized arguments: {shown}")
        with warnings.catch_warnings():
            warnings.simplefilter("default", TwoStageWarning)
            warnings.showwarning = _show_warning
            options.run(options)
        return 0
    except TwoStageError as error:
        print(f"twostage: error: {visible(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        print(f"\ntwostage: {visible(str(interrupt) or 'stopped')}", file=sys.stderr)
        return 143 if isinstance(interrupt, _Terminated) else 130
    except BrokenPipeError:  # whoever read our output has gone; nothing more can be said there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Ours as a sentence; the place in the code helps only with other people's."""
    if issubclass(category, TwoStageWarning):
        print(f"twostage: note: {visible(str(message))}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno), file=sys.stderr, end="")


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="twostage",
        description="Two-stage fine-tuning of BERT-style encoders on class-imbalanced text.",
        epilog="Start with: twostage demo",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_fetch(commands)
    _add_downsample(commands)
    _add_augment(commands)
    _add_train(commands)
    _add_evaluate(commands)
    return parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


_Commands = argparse._SubParsersAction  # the type has no public name


def _add_command(
    commands: "_Commands[argparse.ArgumentParser]", name: str, summary: str, example: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example: {example}",
        formatter_class=_HelpFormatter,
    )


def _add_demo(commands: "_Commands[argparse.ArgumentParser]") -> None:
    parser = _add_command(
        commands,
        "demo",
        "see on real text what two stages change, in minutes",
        "twostage demo --rate 0.2 --seed 7",
    )
    parser.add_argument(
        "--rate", type=float, default=0.1, help="rotten reviews to keep for each fresh one"
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of the three runs")
    parser.add_argument("--to", type=Path, default=Path("demo"), metavar="DIR", help="work here")
    parser.set_defaults(run=_demo)


def _add_fetch(commands: "_Commands[argparse.ArgumentParser]") -> None:
    parser = _add_command(
        commands,
        "fetch",
        "download a data set or an encoder, once",
        "twostage fetch sst2 --to SST-2",
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        help="sst2; aug (the authors' augmented data for rate 0.2); demo; or a model of the "
        "Hugging Face Hub, such as bert-base-uncased",
    )
    parser.add_argument(
        "--to",
        type=Path,
        metavar="DIR",
        help="put it here (default: SST-2, down_sampled/0.2, demo, the Hub's own cache)",
    )
    parser.set_defaults(run=_fetch)


def _add_downsample(commands: "_Commands[argparse.ArgumentParser]") -> None:
    parser = _add_command(
        commands,
        "downsample",
        "make SST-2 imbalanced as the paper does",
        "twostage downsample -i SST-2 -o down_sampled",
    )
    _add_folder(
        parser,
        "-i",
        "--input-path",
        "holds train.tsv and dev.tsv, each with the columns sentence and label (0 or 1)",
        "--inpu-path",  # as published
    )
    _add_folder(parser, "-o", "--output-path", "gets RATE/train.csv and RATE/test.csv")
    parser.add_argument(
        "--rates",
        type=_numbers(float),
        default="0.1,0.2,0.3,0.4,0.5,0.6,0.7",
        metavar="R,R,...",
        help="negatives to keep for each positive",
    )
    parser.add_argument("--seed", type=int, default=42, help="of the draws; published: 42")
    _add_table_options(parser)
    parser.set_defaults(run=_downsample)


def _add_augment(commands: "_Commands[argparse.ArgumentParser]") -> None:
    parser = _add_command(
        commands,
        "augment",
        "make a class-balanced aug.csv of paraphrases, by any OpenAI-compatible server",
        "twostage augment -d down_sampled/0.2 --model gpt-4o-mini --dry-run",
    )
    add = parser.add_argument
    _add_folder(parser, "-d", "--data-path", "holds train.csv (columns text, label); gets aug.csv")
    add("--offline", action="store_true", help="no server: random edits of words, no paraphrases")
    add("--seed", type=int, default=42, help="of --offline")
    add("--model", default="gpt-3.5-turbo", metavar="NAME", help="as the server names it")
    add(
        "--base-url",
        metavar="URL",
        help="of the server, often ending in /v1 (default: OPENAI_BASE_URL, else OpenAI)",
    )
    add(
        "-k",
        "--api-key",
        metavar="KEY",
        help="others on this machine can see it there: rather set OPENAI_API_KEY",
    )
    add("--api-key-file", type=Path, metavar="FILE", help="holds the key and nothing else")
    add(
        "--prompt",
        metavar="TEXT",
        help="instruction; the text stands where it says {text}, else below it (default: the "
        "published one)",
    )
    add("--temperature", type=float, metavar="X", help="of the sampling (default: the server's)")
    add(
        "--max-completion-tokens",
        type=int,
        metavar="N",
        help="longest answer (default: half the text's bytes and 64); models that think need more",
    )
    add("--concurrency", type=int, default=32, metavar="N", help="calls at once")
    add("--requests-per-minute", type=float, metavar="X", help="at most (default: the server's)")
    add("--tokens-per-minute", type=float, metavar="X", help="at most (default: the server's)")
    add("--timeout", type=float, default=120.0, metavar="SECONDS", help="without a sign of life")
    add("--batch", action="store_true", help="the Batch API: half the price, up to a day")
    add("--budget", type=float, metavar="DOLLARS", help="stop before the job costs more")
    add(
        "--price",
        type=_numbers(float),
        metavar="IN,OUT",
        help="dollars a million tokens of prompts and answers (default: a table)",
    )
    add("--dry-run", action="store_true", help="print calls, tokens, cost and time; call nobody")
    _add_table_options(parser)
    parser.set_defaults(run=_augment)


def _add_train(commands: "_Commands[argparse.ArgumentParser]") -> None:
    parser = _add_command(
        commands,
        "train",
        "fine-tune in two stages and evaluate, once for each seed",
        "twostage train -d down_sampled/0.2 -o results/two-stage -e 1 -f 1",
    )
    add = parser.add_argument
    _add_folder(
        parser,
        "-d",
        "--data-path",
        "holds train.csv and test.csv or dev.csv (columns text, label), or .tsv or .jsonl of that "
        "name; aug.csv for --method augment",
    )
    _add_folder(parser, "-o", "--output-path", "gets the results")
    add("--method", default="reweight", help="reweight, augment or vanilla")
    add("-e", "--epoch-stage-1", type=int, default=1, metavar="N", help="0 is vanilla")
    add("-f", "--epoch-stage-2", type=int, default=1, metavar="N", help="epochs of stage 2")
    add(
        "--model",
        default="bert-base-uncased",
        metavar="NAME",
        help="model of the Hugging Face Hub, downloaded on first use, or a folder with "
        "config.json, model.safetensors and tokenizer.json or vocab.txt",
    )
    add("--seeds", type=_numbers(int), default="7,42,106,190,191", metavar="N,N,...", help="runs")
    add("--batch-size", type=int, default=16, metavar="N", help="texts in a batch")
    add("--max-length", type=int, default=128, metavar="N", help="tokens at which a text is cut")
    add("--lr-stage-1", type=float, default=1e-4, metavar="X", help="learning rate of stage 1")
    add("--lr-stage-2", type=float, default=1e-5, metavar="X", help="learning rate of stage 2")
    add("--stage-1-layers", type=int, default=1, metavar="N", help="encoder layers in stage 1")
    add("--loss", help="of stage 1: ldam or ce (default: ce for augment, else ldam)")
    add(
        "--class-weights",
        help="of stage 1: effective, inverse, inverse-sqrt or none (default: none for augment, "
        "else effective)",
    )
    add("--ldam-s", type=float, default=1.0, metavar="X", help="scale of the logits in LDAM")
    add("--ldam-max-m", type=float, default=0.5, metavar="X", help="margin of the rarest class")
    add("--sampler", default="random", help="random, class-balanced (stage 1) or token-budget")
    _add_machine(parser)
    add(
        "--engine",
        default="fast",
        help="fast, or plain: the step as it is defined, slower, for a debugger",
    )
    add("--kernels", default="auto", help="auto (at present torch), torch, or triton (CUDA GPUs)")
    add("--graphs", action="store_true", help="whole steps as CUDA graphs; with --kernels triton")
    _add_table_options(parser)
    add("--save-models", action="store_true", help="keep each seed's model in seed-N/")
    add(
        "--upstream-schedule",
        action="store_true",
        help="count the steps of augmented stage 1 as the published code does",
    )
    add(
        "--cache-trunk",
        action="store_true",
        help="compute what is frozen in stage 1 once for all epochs and seeds, without dropout: "
        "faster, but not the published recipe",
    )
    add(
        "--share-trunk",
        action="store_true",
        help="compute what is frozen in stage 1 once an epoch for all seeds, with dropout: faster "
        "from two seeds on, but the seeds have these masks in common",
    )
    parser.set_defaults(run=_train)


def _add_evaluate(commands: "_Commands[argparse.ArgumentParser]") -> None:
    parser = _add_command(
        commands,
        "evaluate",
        "score a trained model on labelled texts",
        "twostage evaluate --model results/two-stage/seed-7 -d down_sampled/0.2/test.csv",
    )
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="a seed's folder that train --save-models wrote",
    )
    parser.add_argument(
        "-d",
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="CSV, TSV or JSONL with the columns text and label",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="gets each class's scores as CSV (default, for more than 20 classes: scores-NAME.csv "
        "in the model's folder)",
    )
    _add_machine(parser)
    _add_table_options(parser)
    parser.set_defaults(run=_evaluate)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)"
    )


def _add_folder(
    parser: argparse.ArgumentParser, short: str, long: str, text: str, *synonyms: str
) -> None:
    parser.add_argument(short, long, *synonyms, type=Path, required=True, metavar="DIR", help=text)


def _add_table_options(parser: argparse.ArgumentParser) -> None:
    """What a table does not say of itself; `_table_options` collects it."""
    group = parser.add_argument_group(
        "tables", "CSV, TSV or JSONL; how they are written is found out where it is not given"
    )
    add = group.add_argument
    add("--text-column", metavar="NAME", help="column of the texts (default: text or sentence)")
    add("--label-column", metavar="NAME", help="column of the labels (default: label)")
    add("--delimiter", metavar="CHAR", help="between fields: one character, or tab")
    add(
        "--quoting",
        metavar="HOW",
        help="standard: quotes enclose fields; none: they belong to the text; single: apostrophes "
        "enclose; escaped: a backslash escapes what follows; escaped-none: the same, and quotes "
        "belong to the text; spaced: white space behind a delimiter is dropped",
    )
    add("--encoding", default="utf-8", metavar="NAME", help="such as cp1252")


def _table_options(options: argparse.Namespace) -> "TableOptions":
    return {
        "encoding": options.encoding,
        "delimiter": options.delimiter,
        "quoting": options.quoting,
        "text_column": options.text_column,
        "label_column": options.label_column,
    }


def _demo(options: argparse.Namespace) -> None:
    from .demo import run_demo

    _prepare_process()
    run_demo(options.to, options.rate, options.seed, show_progress=True)


def _fetch(options: argparse.Namespace) -> None:
    from .assets.data_sets import fetch_aug, fetch_demo, fetch_sst2
    from .assets.hub import fetch_model

    data_sets = {
        "sst2": (fetch_sst2, Path("SST-2"), "train.tsv and dev.tsv"),
        "aug": (fetch_aug, Path("down_sampled/0.2"), "aug.csv"),
        "demo": (fetch_demo, Path("demo"), "train.tsv, dev.tsv and model/"),
    }
    if options.name not in data_sets:
        print(fetch_model(options.name, options.to, show_progress=True))
        return
    fetch, default_folder, files = data_sets[options.name]
    folder = options.to or default_folder
    fetched = fetch(folder, show_progress=True)
    print(f"{folder}: {files}{'' if fetched else ' were there already'}")


def _downsample(options: argparse.Namespace) -> None:
    from .data.downsampling import downsample_folder

    written = downsample_folder(
        options.input_path,
        options.output_path,
        options.rates,
        options.seed,
        **_table_options(options),
    )
    for folder, positives, negatives in written:
        print(visible(f"{folder}: {positives} positive, {negatives} negative"))


def _augment(options: argparse.Namespace) -> None:
    from .augmentation.estimate import estimate_folder
    from .augmentation.folder import Server, augment_folder, edit_folder
    from .augmentation.openai_client import OPENAI_URL
    from .augmentation.paraphrase import PROMPT, EditSettings, ParaphraseSettings
    from .augmentation.prices import Price

    if options.offline:
        if options.dry_run or options.batch:
            raise UsageError("--offline calls nobody; leave --dry-run and --batch out")
        edit_folder(options.data_path, EditSettings(options.seed), **_table_options(options))
        return
    if options.price and len(options.price) != 2:
        raise UsageError(f"--price has {len(options.price)} numbers; expected IN,OUT")
    base_url = options.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
    settings = ParaphraseSettings(
        model=options.model,
        prompt=PROMPT if options.prompt is None else options.prompt,
        temperature=options.temperature,
        max_completion_tokens=options.max_completion_tokens,
    )
    server = Server(
        base_url=base_url,
        api_key=None if options.dry_run else _find_api_key(options, base_url),
        concurrency=options.concurrency,
        requests_per_minute=options.requests_per_minute,
        tokens_per_minute=options.tokens_per_minute,
        timeout=options.timeout,
        batch=options.batch,
        price=Price(*options.price) if options.price else None,
        budget=options.budget,
    )
    if options.dry_run:
        tables = _table_options(options)
        print(estimate_folder(options.data_path, settings, server, **tables))
        return
    augment_folder(
        options.data_path, settings, server, show_progress=True, **_table_options(options)
    )


def _find_api_key(options: argparse.Namespace, base_url: str) -> "ApiKey | None":
    """-k, else --api-key-file, else OPENAI_API_KEY; a server other than OpenAI may need none."""
    from .augmentation.openai_client import OPENAI_URL, ApiKey

    if options.api_key:
        key, options.api_key = options.api_key, None  # no traceback is to find it there
        warnings.warn(
            "a key on the command line can be read by every user of this machine; set "
            "OPENAI_API_KEY or give --api-key-file instead",
            TwoStageWarning,
            stacklevel=2,
        )
        return ApiKey(key, "-k")
    if options.api_key_file:
        try:
            return ApiKey(options.api_key_file.read_text(encoding="utf-8"), "--api-key-file")
        except (OSError, UnicodeDecodeError) as error:
            # Not its name: people put the key itself there.
            problem = error.strerror if isinstance(error, OSError) else "it is not text"
            raise UsageError(f"the file of --api-key-file cannot be read: {problem}") from None
    if os.environ.get("OPENAI_API_KEY"):
        return ApiKey(os.environ["OPENAI_API_KEY"], "OPENAI_API_KEY")
    if base_url == OPENAI_URL:
        raise UsageError(
            "there is no API key; set OPENAI_API_KEY, or name another server with --base-url, or "
            "go without one: --offline"
        )
    return None


def _train(options: argparse.Namespace) -> None:
    from .assets.hub import find_model
    from .experiment import read_data, run_experiment
    from .machine import check_kernels, choose_device
    from .recipe import Recipe
    from .report import format_results

    _prepare_process(options.threads)
    recipe = Recipe(
        method=options.method,
        epochs_stage_1=options.epoch_stage_1,
        epochs_stage_2=options.epoch_stage_2,
        seeds=options.seeds,
        batch_size=options.batch_size,
        max_length=options.max_length,
        learning_rate_stage_1=options.lr_stage_1,
        learning_rate_stage_2=options.lr_stage_2,
        stage_1_layers=options.stage_1_layers,
        loss=options.loss,
        class_weights=options.class_weights,
        ldam_s=options.ldam_s,
        ldam_max_m=options.ldam_max_m,
        sampler=options.sampler,
        precision=options.precision,
        device=options.device,
        engine=options.engine,
        kernels=options.kernels,
        upstream_schedule=options.upstream_schedule,
        graphs=options.graphs,
        cache_trunk=options.cache_trunk,
        share_trunk=options.share_trunk,
    )
    # What the settings and the data have wrong is said before a model is downloaded.
    device = choose_device(recipe.device)
    check_kernels(recipe.kernels, recipe.graphs, recipe.precision, device)
    data = read_data(options.data_path, recipe, **_table_options(options))
    result = run_experiment(
        find_model(options.model, show_progress=True),
        data,
        options.output_path,
        recipe,
        save_models=options.save_models,
        show_progress=True,
    )
    print("\n" + format_results(result))
    models = ", and a folder for each seed's model" if options.save_models else ""
    files = f"{options.output_path}/results.csv, ave_sst.csv, metrics.json, log.csv{models}"
    print(visible(f"written: {files}"))


def _evaluate(options: argparse.Namespace) -> None:
    from .experiment import evaluate_file, write_scores
    from .printing import SHOWN_CLASSES
    from .report import format_evaluation

    _prepare_process(options.threads)
    metrics, info = evaluate_file(
        options.model,
        options.data,
        device=options.device,
        precision=options.precision,
        show_progress=True,
        **_table_options(options),
    )
    print(format_evaluation(metrics, info.class_names, info.class_counts_C))
    output = options.output
    if output is None and len(info.class_names) > SHOWN_CLASSES:
        output = options.model / f"scores-{options.data.stem}.csv"
    if output is not None:
        write_scores(output, metrics, info.class_names)
        print(f"\nall {len(info.class_names):,} classes: {visible(str(output))}")


def _prepare_process(threads: int | None = None) -> None:
    """The settings that hold for the whole process, which a library leaves alone."""
    import torch

    from .memory import keep_freed_memory

    keep_freed_memory()
    if threads is None:
        return
    if threads < 1:
        raise UsageError(f"threads is {threads}; expected a whole number, 1 or more")
    torch.set_num_threads(threads)


def _numbers(kind: type[int] | type[float]) -> Callable[[str], tuple[float, ...]]:
    """A comma-separated list on the command line."""

    def parse(text: str) -> tuple[float, ...]:
        return tuple(kind(part) for part in text.split(","))

    parse.__name__ = f"list of {kind.__name__}s"  # argparse names it when a value is refused
    return parse

"""How near does augmentation come to what the server and the number of calls at once allow?

    python benchmarks/augment_throughput.py

A server on this machine, in a process of its own, answers each call after 200 ms. With 64 calls at
once nobody can get more than 64 / 0.2 s = 320 answers a second out of it.

    ours        the whole of `twostage augment`: from train.csv to aug.csv, every answer on disk
                before its place is free for the next call
    openai      OpenAI's own package, `AsyncOpenAI` behind a semaphore, answers in a list: nothing
                kept, cleaned or checked
    published   one call at a time and a second of sleep after each, as the published code does

Then the same with a server that answers at once: what a call costs the client itself. And the time
to open a journal of 100,000 answers, which is what a run that goes on begins with.

Memory: of the process, while the calls are under way, after a tenth of them and at their end; what
lies between is what each answer leaves behind. Building the table comes after that.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from harness import RESULTS, describe_environment, markdown_table, memory_status, run_child, save

from twostage.augmentation.folder import Server, augment_folder
from twostage.augmentation.journal import NAME as JOURNAL
from twostage.augmentation.journal import Answer, Journal
from twostage.augmentation.paraphrase import ParaphraseSettings
from twostage.data.tables import write_table

RATE = 0.2
"""Tail rows for each row of the majority, in the made-up training data."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=50_000, help="of ours")
    parser.add_argument("--peer-calls", type=int, default=5_000, help="of openai's package")
    parser.add_argument("--published-calls", type=int, default=10, help="of the published way")
    parser.add_argument("--concurrency", type=int, default=64, help="calls at once")
    parser.add_argument("--delay", type=float, default=0.2, help="seconds the server takes")
    parser.add_argument("--journal", type=int, default=100_000, help="answers to reopen")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        asyncio.run(serve(options.serve))
        return
    if options.job:
        print(json.dumps(run_job(json.loads(options.job))))
        return
    jobs = [
        {"way": "ours", "calls": options.calls, "delay": options.delay},
        {"way": "openai", "calls": options.peer_calls, "delay": options.delay},
        {"way": "published", "calls": options.published_calls, "delay": options.delay},
        {"way": "ours", "calls": options.peer_calls, "delay": 0.0},
        {"way": "openai", "calls": options.peer_calls, "delay": 0.0},
    ]
    rows = []
    for job in jobs:
        with running_server(job["delay"]) as url:
            work = job | {"concurrency": options.concurrency, "url": url}
            rows.append(job | run_child(Path(__file__), work, 3600))
        print(json.dumps(rows[-1]), flush=True)
    record = describe_environment("cpu") | {
        "concurrency": options.concurrency,
        "rows": rows,
        "reopened": run_child(
            Path(__file__), {"way": "reopen", "calls": options.journal, "delay": 0}, 600
        ),
    }
    save(options.output, "augment_throughput", describe(record), record)
    print(f"\n{describe(record)}\n\n{json.dumps(record)}")


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """One case, in this process."""
    ways = {"ours": ask_ours, "openai": ask_openai, "published": ask_published, "reopen": reopen}
    return ways[job["way"]](job)


def ask_ours(job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        majority = int(job["calls"] / 2 / 1.01)
        labels = [0] * max(1, int(RATE * majority)) + [1] * majority
        texts = [
            f"snippet number {i} of a film, neither long nor short" for i in range(len(labels))
        ]
        write_table(folder / "train.csv", ("text", "label"), zip(texts, labels, strict=True))
        server = Server(job["url"], concurrency=job["concurrency"])
        memory = MemoryTrace(folder / JOURNAL)
        began = time.perf_counter()
        augment_folder(folder, ParaphraseSettings(), server, say=lambda line: None)
        seconds = time.perf_counter() - began
        report = json.loads((folder / "augment_report.json").read_text(encoding="utf-8"))
        calls = report["answers_paid_for"]
        return {"calls": calls, "seconds": seconds} | memory.summary(calls)


class MemoryTrace:
    """The memory of this process beside the number of answers on disk, in a thread of its own."""

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self.points: list[tuple[int, int]] = []
        self.before = memory_status("VmRSS")
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(0.1)
            if self.journal.exists():
                self.points.append((self.journal.stat().st_size, memory_status("VmRSS")))

    def summary(self, calls: int) -> dict[str, Any]:
        last = max((size for size, _ in self.points), default=0)
        tenth = next((rss for size, rss in self.points if size >= last / 10), 0)
        end = next((rss for size, rss in self.points if size >= 0.995 * last), 0)
        return {
            "mib_after_a_tenth": tenth / 2**20,
            "mib_at_the_end": end / 2**20,
            "bytes_an_answer": (end - tenth) / (0.895 * calls),
            "mib_peak": memory_status("VmHWM") / 2**20,
        }


def ask_openai(job: dict[str, Any]) -> dict[str, Any]:
    try:
        from openai import AsyncOpenAI
    except ImportError:
        return {"error": "the package openai is not installed"}

    async def ask_all() -> list[str]:
        places = asyncio.Semaphore(job["concurrency"])
        settings = ParaphraseSettings()

        async def ask(client: AsyncOpenAI, i: int) -> str:
            async with places:
                answer = await client.chat.completions.create(
                    **settings.body(f"snippet number {i} of a film, neither long nor short"),
                    extra_headers={"X-Client-Request-Id": str(i)},
                )
            return str(answer.choices[0].message.content)

        async with AsyncOpenAI(base_url=job["url"], api_key="EMPTY") as client:
            return await asyncio.gather(*(ask(client, i) for i in range(job["calls"])))

    began = time.perf_counter()
    answers = asyncio.run(ask_all())
    return {"calls": len(answers), "seconds": time.perf_counter() - began}


def ask_published(job: dict[str, Any]) -> dict[str, Any]:
    settings = ParaphraseSettings()
    began = time.perf_counter()
    for i in range(job["calls"]):
        body = settings.body(f"snippet number {i} of a film, neither long nor short")
        httpx.post(f"{job['url']}/chat/completions", json=body).raise_for_status()
        time.sleep(1)
    return {"calls": job["calls"], "seconds": time.perf_counter() - began}


def reopen(job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / JOURNAL
        journal = Journal(path)
        answer = Answer("a paraphrase of about the length of a snippet of a film", "stop", 31, 14)
        journal.add((f"{i:032x}", answer) for i in range(job["calls"]))
        journal.close()
        began = time.perf_counter()
        journal = Journal(path)
        seconds = time.perf_counter() - began
        assert len(journal) == job["calls"]
        journal.close()
        return {"answers": job["calls"], "seconds": seconds}


def describe(record: dict[str, Any]) -> str:
    rows = []
    for row in record["rows"]:
        if "error" in row:
            rows.append([row["way"], f"{row['delay']:g}", row["error"], "", "", "", "", ""])
            continue
        rate = row["calls"] / row["seconds"]
        ideal = record["concurrency"] / row["delay"] if row["delay"] else None
        memory = ["", "", ""]
        if "mib_at_the_end" in row:
            memory = [
                f"{row['mib_after_a_tenth']:.0f} → {row['mib_at_the_end']:.0f}",
                f"{row['bytes_an_answer']:.0f}",
                f"{row['mib_peak']:.0f}",
            ]
        rows.append(
            [
                row["way"],
                f"{row['delay']:g}",
                row["calls"],
                f"{rate:,.1f}",
                f"{rate / ideal:.0%}" if ideal else "",
                *memory,
            ]
        )
    header = [
        f"{record['concurrency']} calls at once",
        "server takes, s",
        "calls",
        "answers a second",
        "of what is possible",
        "memory, MiB",
        "bytes an answer",
        "peak, MiB",
    ]
    reopened = record["reopened"]
    return (
        f"{markdown_table(header, rows)}\n\nA journal of {reopened['answers']:,} answers is opened "
        f"in {reopened['seconds']:.2f} s. `{record['command']}`, commit {record['commit']}, "
        f"{record['machine']['device']}."
    )


@contextmanager
def running_server(delay: float) -> Iterator[str]:
    """The base URL of a server in a process of its own."""
    command = [sys.executable, __file__, "--serve", str(delay)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.terminate()


async def serve(delay: float) -> None:
    """Answer every POST after `delay` seconds, with a text that depends on its request id alone."""
    loop = asyncio.get_running_loop()

    class Connection(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            self.transport, self.received = transport, b""

        def data_received(self, data: bytes) -> None:
            self.received += data
            head, end, rest = self.received.partition(b"\r\n\r\n")
            fields = {}
            for line in head.split(b"\r\n")[1:]:
                name, _, value = line.partition(b":")
                fields[name.strip().lower()] = value.strip()
            length = int(fields.get(b"content-length", b"0"))
            if end and len(rest) >= length:
                self.received = rest[length:]
                request_id = fields.get(b"x-client-request-id", b"").decode()
                loop.call_later(delay, self.answer, request_id)

        def answer(self, name: str) -> None:
            message = {"role": "assistant", "content": f"a film put in other words, {name}"}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            usage = {"prompt_tokens": 31, "completion_tokens": 14, "total_tokens": 45}
            answer = {"id": name, "object": "chat.completion", "created": 0, "model": "made-up"}
            body = json.dumps(answer | {"choices": choices, "usage": usage}).encode()
            self.transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )

    server = await loop.create_server(Connection, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    main()

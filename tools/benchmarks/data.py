"""Data: how fast text and conversations become tokens, how full sequences are, how soon a run has its first batch, and
whether masks are right.

    python tools/benchmarks/data.py [--rows 1000000] [--rounds 3]

Works in a temporary folder on the texts under examples/data, repeated and varied. Each figure stands beside its bar.
"""

import argparse
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import numpy as np
import psutil

from hymeg.checkpoint.tiny_checkpoint import write_tiny_checkpoint
from hymeg.data.chat import ChatEncoder
from hymeg.data.corpus import preprocess
from hymeg.data.index_building import Done, RowEncoder, build_indices
from hymeg.data.packing import pack
from hymeg.data.row_index import index_folder
from hymeg.data.rows import Conversation, RowReader
from hymeg.hf.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
DATA = ROOT / "examples" / "data"
SEQ_LENGTH = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the large file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--second-start", nargs=2, metavar=("CHECKPOINT", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.second_start:
        print(json.dumps(second_start(*args.second_start)))
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), args.rows, args.rounds)


def measure(folder: Path, num_rows: int, rounds: int) -> None:
    write_tiny_checkpoint(folder / "hf")
    print("| what | found | bar |\n|---|---|---|", flush=True)

    ratio, rate = preprocessing(folder, rounds)
    row(
        "preprocess_data, one core, against tokenizers' encode_batch of the same texts",
        f"{ratio:.2f}x ({rate:,.0f} tokens/s)",
        ">= 0.8x",
    )
    ratio, rate = rendering(folder / "hf", rounds)
    row(
        "conversations rendered, masked and tokenized, against encode_batch of their texts",
        f"{ratio:.2f}x ({rate:,.0f} tokens/s)",
        "-",
    )
    ratio, rate = agents(folder, rounds)
    row("rows of 100 tool calls, tokens/s against rows of text", f"{ratio:.2f}x ({rate:,.0f} tokens/s)", ">= 0.3x")
    row(f"translations packed to {SEQ_LENGTH}: positions that hold a token", f"{packing(folder / 'hf'):.2%}", ">= 98 %")
    row(
        "masks of 1,000 random conversations that differ from a rendering turn by turn",
        str(differing_masks(folder / "hf", 1000)),
        "0",
    )

    large = folder / "large.jsonl"
    write_large(large, num_rows)
    index = index_folder(str(large), None, RowEncoder(str(folder / "hf")).fingerprint)
    done: list[Done] = []
    seconds = timed(lambda: build_indices({str(large): index}, (str(folder / "hf"),), 1, done.append))
    what = f"{num_rows:,} rows, {large.stat().st_size / 1e6:,.0f} MB"
    row(
        f"first start with {what}: the index",
        f"{seconds:.1f} s, {done[-1].num_tokens / seconds:,.0f} tokens/s in one process",
        "-",
    )
    row(
        f"the same for {num_rows * 3 // 10:,} rows, two processes against one",
        f"{two_processes(folder, num_rows * 3 // 10):.2f}x",
        ">= 1.7x",
    )
    command = [sys.executable, __file__, "--second-start", str(folder / "hf"), str(large)]
    json.loads(subprocess.check_output(command))  # packs, and keeps that
    starts = [json.loads(subprocess.check_output(command)) for _ in range(rounds)]
    first = statistics.median(start["seconds"] for start in starts)
    row(f"second start with {what}: seconds to the first batch", f"{first:.2f} s", "<= 3 s")
    row(
        "the same: resident memory above the imports'",
        f"{max(start['bytes'] for start in starts) / 1e6:.0f} MB",
        "<= 200 MB",
    )
    delivered = statistics.median(start["batches"] for start in starts)
    consumed = consumption(folder)
    row(f"batches of {SEQ_LENGTH} tokens a second, delivered by one worker against consumed by a tiny model",
        f"{delivered / consumed:.1f}x ({delivered:.0f}/s, {consumed:.2f}/s)", ">= 5x")  # fmt: skip


def row(what: str, found: str, bar: str) -> None:
    print(f"| {what} | {found} | {bar} |", flush=True)


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def preprocessing(folder: Path, rounds: int) -> tuple[float, float]:
    """Of preprocess_data's rate and tokenizers' own, by turns: the median of the ratios, and the first."""
    texts = [
        json.loads(line)["text"]
        for path in sorted((DATA / "udhr").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ] * 500
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = load_tokenizer(folder / "hf").backend_tokenizer
    preprocess([source], folder / "corpus", folder / "hf")  # imports
    ratios, rates = [], []
    for _ in range(rounds):
        limit = timed(lambda: tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        start = time.perf_counter()
        num_tokens = preprocess([source], folder / "corpus", folder / "hf", overwrite=True).num_tokens
        ours = time.perf_counter() - start
        ratios.append(limit / ours)
        rates.append(num_tokens / ours)
    return statistics.median(ratios), statistics.median(rates)


def rendering(checkpoint: Path, rounds: int) -> tuple[float, float]:
    lines = (DATA / "translations.jsonl").read_bytes().splitlines() * 5
    reader, encoder = RowReader(), ChatEncoder(str(checkpoint))
    texts = ["".join(message["content"] for message in reader.parse("", 1, line).messages) for line in lines]
    ratios, rates = [], []
    for _ in range(rounds):
        limit = timed(lambda: encoder.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        start = time.perf_counter()
        encoded = encoder.encode_batch([reader.parse("", 1, line) for line in lines])
        ours = time.perf_counter() - start
        ratios.append(limit / ours)
        rates.append(sum(len(tokens.token_ids) for tokens in encoded) / ours)
    return statistics.median(ratios), statistics.median(rates)


def agents(folder: Path, rounds: int) -> tuple[float, float]:
    """Rows of 100 calls with arguments of their own against rows of as many turns of text, by turns, by the processor's
    time: the median of the ratios of tokens a second, and the agents' rate. The tokenizer and the template have the
    shape of Hy3's.
    """
    sys.path.append(str(ROOT / "tests" / "unit"))
    import published_shape

    write_tiny_checkpoint(folder / "agents")
    published_shape.train_published_tokenizer().save_pretrained(folder / "agents")
    encoder = ChatEncoder(str(folder / "agents"))
    texts = [json.loads(line)["text"] for line in (DATA / "udhr" / "en.jsonl").read_text().splitlines()]
    function = {"name": "look_up", "description": "", "parameters": {"type": "object", "properties": {}}}
    tools, numbers = [{"type": "function", "function": function}], itertools.count()

    def agent() -> Conversation:
        messages = [{"role": "user", "content": texts[0]}]
        for number, text in zip(itertools.islice(numbers, 100), itertools.cycle(texts), strict=False):
            call = {"id": str(number), "function": {"name": "look_up", "arguments": {"what": f"{number} {text[:60]}"}}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "content": f"{number} {text}", "tool_call_id": str(number)})
        return Conversation([*messages, {"role": "assistant", "content": texts[0]}], None, tools)

    def plain() -> Conversation:
        turns = zip(itertools.islice(numbers, 200), itertools.cycle(texts), strict=False)
        return Conversation(
            [{"role": ("user", "assistant")[number % 2], "content": f"{number} {text}"} for number, text in turns]
        )

    def rate(make) -> float:
        rows, start = [make() for _ in range(20)], time.process_time()
        encoded = encoder.encode_batch(rows)
        return sum(len(tokens.token_ids) for tokens in encoded) / (time.process_time() - start)

    rates = [(rate(agent), rate(plain)) for _ in range(rounds + 1)][1:]
    return statistics.median(ours / limit for ours, limit in rates), statistics.median(ours for ours, _ in rates)


def two_processes(folder: Path, num_rows: int) -> float:
    """One process's seconds over two's."""
    rows = folder / "rows.jsonl"
    write_large(rows, num_rows)

    def seconds(workers: int) -> float:
        index = {str(rows): folder / f"index-{workers}"}
        return timed(lambda: build_indices(index, (str(folder / "hf"),), workers))

    return seconds(1) / seconds(2)


def packing(checkpoint: Path) -> float:
    reader, encoder = RowReader(), ChatEncoder(str(checkpoint))
    lines = (DATA / "translations.jsonl").read_bytes().splitlines()
    lengths = np.array(
        [len(tokens.token_ids) - 1 for tokens in encoder.encode_batch([reader.parse("", 1, line) for line in lines])]
    )
    many = np.random.default_rng(0).choice(lengths[lengths <= SEQ_LENGTH], 100_000)
    return many.sum() / (len(pack(many, SEQ_LENGTH, 0)) * SEQ_LENGTH)


def differing_masks(checkpoint: Path, number: int) -> int:
    """How many conversations are masked otherwise than by rendering them up to each turn of the assistant, without it
    and with it.
    """
    choose, encoder = random.Random(0), ChatEncoder(str(checkpoint))
    tokenizer = load_tokenizer(checkpoint)
    words = (DATA / "udhr" / "en.jsonl").read_text().split()
    differing = 0
    for _ in range(number):
        text = lambda: " ".join(choose.choices(words, k=choose.randint(1, 20)))  # noqa: E731
        messages = [{"role": "system", "content": text()}] * choose.randint(0, 1)
        for _ in range(choose.randint(1, 4)):
            messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        found = encoder.encode(Conversation(messages))
        differing += not np.array_equal(found.trained, turn_by_turn(tokenizer, messages, found.token_ids))
    return differing


def turn_by_turn(tokenizer, messages: list[dict], token_ids: np.ndarray) -> np.ndarray:
    """Trained is what a turn of the assistant adds to the rendering that asks for it."""

    def rendered(count: int, ask: bool) -> list[int]:
        return tokenizer.apply_chat_template(
            messages[:count], is_training=True, add_generation_prompt=ask, return_dict=False
        )

    trained = np.zeros(len(token_ids), bool)
    opening = tokenizer.convert_tokens_to_ids(re.search(r"<[^<>]*Assistant[^<>]*>", tokenizer.chat_template)[0])
    for count, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(rendered(count, True))
            start = max(position for position in range(start) if token_ids[position] == opening) + 1
            trained[start : len(rendered(count + 1, False))] = True
    return trained


def write_large(path: Path, num_rows: int) -> None:
    rows = [json.loads(line) for line in (DATA / "translations.jsonl").read_text().splitlines()]
    with open(path, "w") as file:
        for number, one in zip(range(num_rows), itertools.cycle(rows), strict=False):
            file.write(
                json.dumps(
                    {**one, "source": f"{number}. {one['source'][:200]}", "target": f"{number}. {one['target'][:200]}"}
                )
                + "\n"
            )


def second_start(checkpoint: str, path: str) -> dict[str, float]:
    """In a process of its own: what a rank does until it has its first batch; then how many batches a second follow."""
    import torch

    from hymeg.data.conversations import ConversationDataset, Sequences, Shape
    from hymeg.data.row_index import RowIndex, is_built

    process = psutil.Process()
    RowEncoder(checkpoint)  # the tokenizer is there anyway
    before, start = process.memory_info().rss, time.perf_counter()
    fingerprint = RowEncoder(checkpoint).fingerprint
    folder = index_folder(path, None, fingerprint)
    assert is_built(folder, path)
    index = RowIndex(folder, path)
    source = Sequences(index, (0, len(index)), Shape(SEQ_LENGTH, 1, True, "drop", 0), 1234)
    dataset = ConversationDataset([source], 10**6, None, seed=1234)
    batches = iter(torch.utils.data.DataLoader(dataset, batch_size=1, num_workers=1))
    next(batches)
    seconds = time.perf_counter() - start
    used = process.memory_info().rss - before + sum(worker.memory_full_info().uss for worker in process.children())
    start = time.perf_counter()
    for _ in range(300):
        next(batches)
    return {"seconds": seconds, "bytes": used, "batches": 300 / (time.perf_counter() - start)}


def consumption(folder: Path) -> float:
    """Batches a second that a tiny model trains, as the trainer logs them."""
    flags = f"--sft --data-path {DATA / 'translations.jsonl'} --data-cache-path {folder / 'cache'} --seq-length {SEQ_LENGTH} --micro-batch-size 1"
    more = "--global-batch-size 1 --train-iters 8 --lr 1e-4 --log-interval 1 --eval-iters 0 --split 100,0,0"
    command = [
        sys.executable,
        ROOT / "pretrain_hy.py",
        "--hf-model",
        folder / "hf",
        "--load",
        folder / "hf",
        *flags.split(),
        *more.split(),
    ]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    times = [float(found) for found in re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", done.stdout)]
    if done.returncode != 0 or len(times) < 8:
        raise SystemExit(f"pretrain_hy.py failed:\n{done.stdout[-3000:]}")
    return 1e3 / statistics.median(times[2:])


if __name__ == "__main__":
    main()

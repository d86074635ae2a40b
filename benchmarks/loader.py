"""How fast the loader alone is: python -m benchmarks.loader [--seconds 5] [--threads 2] [--seq_len 1024] [--batch_size 32]

Two sources mixed 3 to 1: the standard library (long documents) and passages of it as long as web pages are (log-normal,
median 1,500 characters), byte-level BPE of 4,096 tokens, best-fit packing, through Grain.  Ends with one JSON line;
`tokens_per_second` counts cells of the served rows that hold a target, over wall-clock time.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from data.config import DataConfig, MixtureConfig, SourceConfig
from data.loader import Batches, load
from data.prepare import prepare
from data.sources import read_documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--cache_dir", default="runs/data")
    args = parser.parse_args()

    stdlib = SourceConfig("stdlib", "stdlib")
    passages = Path(args.cache_dir) / "benchmark_passages.jsonl"
    if not passages.exists():
        write_passages(stdlib, passages)
    config = DataConfig(
        sources=(stdlib, SourceConfig("passages", "files", path=str(passages), licence="PSF-2.0")),
        mixtures=(MixtureConfig(0, (("stdlib", 3), ("passages", 1))),),
        seq_len=args.seq_len,
        cache_dir=args.cache_dir,
    )
    batches = Batches(prepare(config), config, batch_size=args.batch_size, seed=0)

    warm_up = 20
    iterator = load(batches, 0, 1 << 40, args.threads, config.prefetch_batches)
    for _ in range(warm_up):
        next(iterator)
    num_batches, num_tokens = 0, 0
    start = time.perf_counter()
    while time.perf_counter() - start < args.seconds:
        num_tokens += int(np.count_nonzero(next(iterator)["weights"]))
        num_batches += 1
    seconds = time.perf_counter() - start
    result = {
        "benchmark": "loader",
        "tokens_per_second": round(num_tokens / seconds),
        "batches_per_second": round(num_batches / seconds, 1),
        "fill": round(num_tokens / (num_batches * args.batch_size * args.seq_len), 4),
        "batch_size": args.batch_size,
        "seq_len": args.seq_len,
        "threads": args.threads,
        "seconds": round(seconds, 2),
    }
    print(json.dumps(result))


def write_passages(source: SourceConfig, path: Path) -> None:
    """Cuts the documents of `source` into passages of log-normal length."""
    rng = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with open(partial, "w") as file:
        for document in read_documents(source):
            start = 0
            while start < len(document.text):
                end = start + int(rng.lognormal(np.log(1500), 1.0)) + 1
                file.write(json.dumps({"text": document.text[start:end]}) + "\n")
                start = end
    partial.rename(path)


if __name__ == "__main__":
    main()

"""What smaller weights and a smaller cache cost in quality: python benchmarks/quantization.py MODEL --text FILE
--questions FILE [--questions FILE]

A table with a row for each kind of weights of `model/quantize.py`, one for weights as they are with keys and values of the past
rounded to int8, and one for all as it is:

  MB kept         of weights, without a table that tokens are only looked up in; a token reads as much, but more where int4
                  is unpacked first, as on a CPU
  bits/byte       of the first --bytes of a text, in rows of 1,024 tokens
  right           percent of the first --documents questions of a file, lines of {"query", "choices", "gold"}: by the likelihood
                  of answers, and by that per character (`inference/multiple_choice.py`)
  changed         questions that get another answer (by likelihood) than from the weights as they are: of so few questions the
                  percentages have standard errors of some points, and this has none

--rows leaves some out. The last line is JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from model.xla import configure


class Variant(NamedTuple):
    """A row of the table: what gives tokens log-probabilities, and how much is kept of the weights for it."""

    scorer: Any  # inference.score.Scorer
    weight_bytes: int


def variants(params: Any, config: Any) -> dict[str, Callable[[], Variant]]:
    """The rows by their names, made when they are asked for."""
    from experiments.bench_infer import weight_bytes
    from inference.score import score
    from model.quantize import Bits, quantize

    def network(params: Any, config: Any) -> Variant:
        return Variant(functools.partial(score, params, config), weight_bytes(params, config))

    def rounded(bits: Bits) -> Variant:
        return network(*quantize(params, config, bits))

    def rounded_cache() -> Variant:
        return Variant(functools.partial(score, params, config, cache_dtype="int8"), weight_bytes(params, config))

    return {
        "as they are": lambda: network(params, config),
        "int8": lambda: rounded(8),
        "int4": lambda: rounded(4),
        "int8 cache": rounded_cache,
    }


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="MODEL", help="whatever `loam sample` takes")
    parser.add_argument("--text", default="", metavar="FILE", help="text that the model has not seen")
    parser.add_argument("--bytes", type=int, default=60_000, help="of the text; default 60000")
    parser.add_argument("--questions", action="append", default=[], metavar="FILE", help="may be given several times")
    parser.add_argument("--documents", type=int, default=200, help="of each file; default 200")
    kinds = ["int8", "int4", "int8 cache"]
    parser.add_argument("--rows", nargs="+", default=kinds, choices=kinds, help="default all")
    arguments = parser.parse_args(words)
    if not (arguments.text or arguments.questions):
        parser.error("nothing to measure: give --text, --questions, or both")
    configure(cpu_devices=1, decoding=True)
    from experiments.sampling import open_any
    from inference.multiple_choice import accuracy, choice_logprobs, chosen, read_questions
    from inference.score import bits_per_byte
    from model.params import unstack_layers

    text = Path(arguments.text).read_bytes()[: arguments.bytes].decode(errors="ignore") if arguments.text else ""
    tasks = {Path(path).stem: read_questions(path, arguments.documents) for path in arguments.questions}
    loaded = open_any(arguments.source)
    params, config = unstack_layers(loaded.params, loaded.config)
    makes = variants(params, config)
    rows: dict[str, dict[str, Any]] = {}
    picked: dict[str, Any] = {}
    for name in ["as they are", *arguments.rows]:
        scorer, size = makes[name]()
        row: dict[str, Any] = {"weight_bytes": size}
        if text:
            row["bits_per_byte"] = bits_per_byte(loaded.tokenizer, scorer, text, min(1024, config.max_seq_len))
        for task, questions in tasks.items():
            logprobs = choice_logprobs(loaded.tokenizer, scorer, questions)
            choices = chosen(questions, logprobs)
            row[f"{task}_right"] = accuracy(questions, logprobs)
            row[f"{task}_right_per_character"] = accuracy(questions, logprobs, per_character=True)
            row[f"{task}_changed"] = int((choices != picked.setdefault(task, choices)).sum())
        rows[name] = row
    measured = [f"{len(text.encode()):,} bytes of text"] * bool(text) + [f"{len(q)} of {task}" for task, q in tasks.items()]
    print(f"{loaded.name}: {', '.join(measured)}")
    print(
        "| weights | MB kept |"
        + " bits/byte |" * bool(text)
        + "".join(f" {t}: right, per character | changed |" for t in tasks)
    )
    print("|---|---|" + "---|" * (bool(text) + 2 * len(tasks)))
    for name, row in rows.items():
        cells = [name, f"{row['weight_bytes'] / 1e6:.0f}"] + ([f"{row['bits_per_byte']:.4f}"] if text else [])
        for task in tasks:
            right, per_character = 100 * row[f"{task}_right"], 100 * row[f"{task}_right_per_character"]
            cells += [f"{right:.1f}, {per_character:.1f}", str(row[f"{task}_changed"])]
        print(f"| {' | '.join(cells)} |")
    print(json.dumps({"benchmark": "quantization", "model": loaded.name, "rows": rows}))


if __name__ == "__main__":
    main()

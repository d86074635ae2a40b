"""Decoding speed against transformers and llama.cpp, side by side: python benchmarks/decode.py [--rounds 5] [--quick]

SmolLM2-135M's shapes with random weights in float32, the same in both: transformers makes them, Loam reads its files, and their
greedy tokens are compared before anything is timed. Both have a thread per core and take turns. Measured are

  batch 1, batch 32   tokens a second after prompts of 64 tokens, in a whole loop: engine against `generate`
  prefill             tokens a second of a prompt of 512 up to the first token
  group               seconds of 16 samples of that prompt up to their first tokens, over those of one
  int8                Loam's rounded weights at batch 1, against its own float32
  bandwidth           bytes of the weights read per second at batch 1, over what threads that sum arrays reach
  llama.cpp           tokens a second at batch 1, and of the prefill, with the file of 4-bit weights of `loam pull
                      smollm2-135m-instruct` (or --gguf), if both are there

The last line is JSON; ratios are of median speeds, ours over theirs.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from model.xla import configure, num_cores, restart_with_huge_pages

PROMPT, NEW, PREFILL, GROUP = 64, 32, 512, 16
QUANTISED = "smollm2-135m-instruct"


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def quantised_file(source: str) -> Path | None:
    """The file for llama.cpp: what `source` names, or else that of the store if it is there."""
    if source and not importlib.util.find_spec("xllamacpp"):
        sys.exit("--gguf is for llama.cpp: `make env EXTRAS=bench` installs it")
    from inference import store
    from inference.models import locate

    if source or any(entry.name == QUANTISED for entry in store.entries()):
        return locate(source or QUANTISED)
    return None


def llama_cpp(path: Path, threads: int, prefill: int) -> dict[str, Callable[[], float]]:
    """Tokens a second of the quantised model: after a prompt, and of a longer one, by llama.cpp's own clock."""
    xllamacpp = importlib.import_module("xllamacpp")  # a compiled module, which type checkers cannot look into
    asked = xllamacpp.CommonParams()
    asked.model.path = str(path)
    asked.n_ctx, asked.n_parallel, asked.n_gpu_layers, asked.fit_params, asked.verbosity = 1024, 1, 0, False, -1
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(asked)

    def timings(length: int, new: int) -> dict[str, float]:
        request = {"prompt": list(range(100, 100 + length)), "n_predict": new, "temperature": 0}
        timed = server.handle_completions({**request, "ignore_eos": True, "cache_prompt": False})["timings"]
        assert (timed["prompt_n"], timed["predicted_n"]) == (length, new), timed
        return timed

    return {
        # The first token comes of the prompt, and the clock of those predicted starts after it.
        "llama_cpp_batch1": lambda: NEW / timings(PROMPT, NEW + 1)["predicted_ms"] * 1000,
        "llama_cpp_prefill": lambda: timings(prefill, 1)["prompt_per_second"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds: does it run?")
    parser.add_argument("--gguf", default="", help=f"a GGUF file for llama.cpp; default that of {QUANTISED}, if it is there")
    arguments = parser.parse_args()
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        sys.exit("this compares with transformers: `make env EXTRAS=bench` installs it")
    configure(cpu_devices=1, decoding=True)
    quantised = quantised_file(arguments.gguf)
    import jax
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    from experiments.bench_infer import read_bandwidth
    from inference.config import EngineConfig
    from inference.engine import Engine
    from inference.request import Request
    from inference.sampling import Sampling
    from model.convert.huggingface import load
    from model.params import num_parameters, param_specs
    from model.quantize import quantize

    threads = num_cores()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49_152}
    if arguments.quick:
        shape = {"hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512}
    rounds, prefill = (2, 64) if arguments.quick else (arguments.rounds, PREFILL)
    batch = 4 if arguments.quick else 32
    described = transformers.LlamaConfig(
        **shape,  # pyright: ignore[reportArgumentType]
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=1 / 24,
    )
    theirs = transformers.LlamaForCausalLM(described).eval()
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        params, config = load(Path(directory))
    rng = np.random.default_rng(0)

    def engine(of: Any, model: Any, rows: int) -> Engine:
        pages = -(-(max(prefill, PROMPT) + NEW + 1) // 64) * rows + 1
        made = Engine(of, model, EngineConfig(max_batch=rows, cache_tokens=pages * 64, page_size=64, prefill_chunk=prefill))
        made.warm_up()
        return made

    def ours(of: Engine, rows: int, length: int, new: int) -> list[list[int]]:
        prompts = rng.integers(0, config.vocab_size, (rows, length)).tolist()
        requests = [Request(prompt, Sampling(temperature=0.0), max_tokens=new) for prompt in prompts]
        return [[token.token for token in answer] for (answer,) in of.generate(requests)]

    @torch.inference_mode()
    def generated(prompts: np.ndarray, new: int) -> np.ndarray:
        ids = torch.from_numpy(prompts)
        made = theirs.generate(  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, attention_mask=torch.ones_like(ids)
        )
        return made[:, prompts.shape[1] :].numpy()

    def theirs_speed(rows: int, new: int) -> float:
        prompts = rng.integers(0, config.vocab_size, (rows, PROMPT))
        return rows * new / (seconds(lambda: generated(prompts, new + 1)) - seconds(lambda: generated(prompts, 1)))

    def ours_speed(of: Engine, rows: int, new: int) -> float:
        return rows * new / (seconds(lambda: ours(of, rows, PROMPT, new + 1)) - seconds(lambda: ours(of, rows, PROMPT, 1)))

    def group_cost() -> float:
        def group(samples: int) -> float:
            prompt = rng.integers(0, config.vocab_size, prefill).tolist()
            request = Request(prompt, Sampling(temperature=1.0), num_samples=samples, max_tokens=1)
            return seconds(lambda: many.generate([request]))

        return group(GROUP) / group(1)

    one, many = engine(params, config, 1), engine(params, config, batch)
    int8 = engine(*quantize(params, config), 1)
    same = rng.integers(0, config.vocab_size, (1, PROMPT))
    answer = one.generate([Request(same[0].tolist(), Sampling(temperature=0.0), max_tokens=16)])[0][0]
    assert [token.token for token in answer] == generated(same, 16)[0].tolist(), "greedy tokens differ"

    def prefilled() -> float:
        prompt = rng.integers(0, config.vocab_size, (1, prefill))
        return prefill / seconds(lambda: generated(prompt, 1))

    measured: dict[str, Callable[[], float]] = {
        "batch1": lambda: ours_speed(one, 1, NEW),
        "transformers_batch1": lambda: theirs_speed(1, NEW),
        "int8_batch1": lambda: ours_speed(int8, 1, NEW),
        "batch32": lambda: ours_speed(many, batch, NEW),
        "transformers_batch32": lambda: theirs_speed(batch, NEW),
        "prefill": lambda: prefill / seconds(lambda: ours(one, 1, prefill, 1)),
        "transformers_prefill": prefilled,
    }
    if quantised is not None and importlib.util.find_spec("xllamacpp"):
        measured |= llama_cpp(quantised, threads, prefill)
    speeds: dict[str, list[float]] = {name: [] for name in measured}
    bandwidths, group_costs = [], []
    for i in range(rounds + 1):
        bandwidths.append(read_bandwidth(8 if arguments.quick else 256))
        group_costs.append(group_cost())
        for name, measure in measured.items():
            speed = measure()
            if i:  # The first round warms everything up.
                speeds[name].append(speed)
    print(f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, {threads} threads")
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, values in speeds.items():
        print(f"{name:22} {medians[name]:8.1f} tokens/s   {min(values):.1f} to {max(values):.1f}")
    weights = num_parameters(param_specs(config)) * 4
    summary: dict[str, Any] = {
        "benchmark": "decode",
        "quick": arguments.quick,
        "batch1_vs_transformers": medians["batch1"] / medians["transformers_batch1"],
        "batch32_vs_transformers": medians["batch32"] / medians["transformers_batch32"],
        "prefill_vs_transformers": medians["prefill"] / medians["transformers_prefill"],
        "group_of_16_vs_prefill": statistics.median(group_costs[1:]),
        "int8_vs_float32_batch1": medians["int8_batch1"] / medians["batch1"],
        "bandwidth_share_batch1": weights * medians["batch1"] / statistics.median(bandwidths),
        "llama_cpp_batch1_tokens_per_second": None,
        "bandwidth_bytes_per_second": statistics.median(bandwidths),
        **{f"{name}_tokens_per_second": value for name, value in medians.items()},
    }
    print(json.dumps({key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in summary.items()}))


if __name__ == "__main__":
    restart_with_huge_pages()
    main()

"""Peak memory of the loss and its gradients at a large vocabulary: python benchmarks/loss_memory.py [--quick]

From a vocabulary of 131,072, 8,192 tokens and width 1,024, float32: the gradient with respect to hidden states and head, of the
plain formula (`jax.nn.log_softmax`, differentiated by JAX), and of `token_logprobs` with all logits at once and in chunks of
512 tokens. The compiler says how much each needs for temporaries and results; nothing of that size is run. A smaller size is
really run, each way in a process of its own, and the growth of its resident memory is reported next to the compiler's figure.

The last line is JSON; `peak_vs_plain` is the chunked loss's peak over the plain one's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp

from model.config import ModelConfig
from model.logprobs import token_logprobs
from model.xla import configure

WAYS = {"plain": None, "unchunked": 0, "chunked": 512}  # chunk_tokens of token_logprobs
FULL = (131_072, 8, 1024, 1024)  # vocabulary, rows, tokens per row, width
SMALL = (32_768, 8, 512, 128)


def compile_gradient(way: str, vocab_size: int, rows: int, length: int, width: int) -> jax.stages.Compiled:
    """(head [width, vocab_size], hidden [rows, length, width], targets) -> gradients of the mean loss by the first two."""
    config = ModelConfig(vocab_size=vocab_size, num_layers=1, d_model=width, num_heads=1, d_ff=width, max_seq_len=length)
    chunk_tokens = WAYS[way]

    def loss(head: jax.Array, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        if chunk_tokens is None:
            logprobs = jax.nn.log_softmax(hidden @ head)
            return -jnp.mean(jnp.take_along_axis(logprobs, targets[..., None], axis=-1))
        return -jnp.mean(token_logprobs({"head": head}, config, hidden, targets, chunk_tokens).logprobs)

    shapes = ((width, vocab_size), jnp.float32), ((rows, length, width), jnp.float32), ((rows, length), jnp.int32)
    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()


def compiled_bytes(way: str, *sizes: int) -> int:
    """Temporaries and results at the peak, as the compiler lays them out; the arguments come on top."""
    analysis = compile_gradient(way, *sizes).memory_analysis()
    assert analysis is not None, f"the {jax.default_backend()} backend reports no memory"
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def measured_bytes(way: str, *sizes: int) -> int:
    """By how much the peak of this process's resident memory grows when the gradient is computed."""
    configure(cpu_devices=1)
    vocab_size, rows, length, width = sizes
    gradient = compile_gradient(way, *sizes)
    arguments = jnp.full((width, vocab_size), 0.01), jnp.ones((rows, length, width)), jnp.zeros((rows, length), jnp.int32)
    jax.block_until_ready(arguments)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    jax.block_until_ready(gradient(*arguments))
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return growth if sys.platform == "darwin" else 1024 * growth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only see that it works: run a tiny size")
    small = (4096, 8, 256, 64) if parser.parse_args().quick else SMALL
    # Processes start before this one grows: a child's peak counts from its parent's.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        measured = {way: pool.submit(measured_bytes, way, *small).result() for way in WAYS}
    configure(cpu_devices=1)
    compiled_small = {way: compiled_bytes(way, *small) for way in WAYS}
    compiled = {way: compiled_bytes(way, *FULL) for way in WAYS}

    full_name, small_name = (f"{v:,} x {rows * length:,} tokens" for v, rows, length, _ in (FULL, small))
    print(f"{'peak, MiB':<12}{full_name + ', compiler':>34}{small_name + ', compiler':>34}{'measured':>12}")
    for way in WAYS:
        columns = (f"{sizes[way] / 2**20:,.0f}" for sizes in (compiled, compiled_small, measured))
        print("{:<12}{:>34}{:>34}{:>12}".format(way, *columns))
    result = {
        "benchmark": "loss_memory",
        "peak_vs_plain": round(compiled["chunked"] / compiled["plain"], 4),
        "peak_vs_unchunked": round(compiled["chunked"] / compiled["unchunked"], 4),
        "measured_peak_vs_plain": round(measured["chunked"] / measured["plain"], 4),
        **{f"{way}_bytes": size for way, size in compiled.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

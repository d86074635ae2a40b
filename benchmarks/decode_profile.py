"""Where a prefill and a decoding step spend their time on a CPU: python benchmarks/decode_profile.py [--rounds 5] [--quick]

SmolLM2-135M's shapes with random weights in float32, in the engine of `benchmarks/decode.py`: a prompt of 512 tokens up to its
first token, and a step of 32 rows after prompts of 64. Beside each whole, in turns:

  products          its matrix products and nothing else: those of all layers, one after the other, each with its own weights
  torch's products  the same by torch's linear layers, if it is installed
  peak              one product of 2,048 x 2,048 x 2,048

If the products alone take about as long here as in torch, what is left to gain lies in the rest; and what they take of the
whole cannot be gained without faster products. The table is of one more run each, by jax.profiler: seconds of threads, which
work side by side, by kind of operation.

The last line is JSON; seconds are medians.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from model.xla import configure, num_cores, restart_with_huge_pages

NEW = 32  # tokens after the first, whose seconds are divided by as many


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def product_shapes(model: Any) -> list[tuple[str, int, int]]:
    """(what it reads, inputs, outputs) of a layer's products: `x` the stream, `q` the queries' product, `u` that of the MLP."""
    width, heads, kv = model.d_model, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return [("x", width, heads), ("x", width, kv), ("x", width, kv), ("q", heads, width),
            ("x", width, model.d_ff), ("x", width, model.d_ff), ("u", model.d_ff, width)]  # fmt: skip


def weights_of(model: Any, rng: np.random.Generator) -> tuple[list[list[np.ndarray]], np.ndarray]:
    """Matrices of every layer, and of the head; float32, of a scale that keeps the stream finite."""
    shapes = product_shapes(model)
    layers = [
        [rng.standard_normal((inputs, outputs), np.float32) / np.float32(inputs**0.5) for _, inputs, outputs in shapes]
        for _ in range(model.num_layers)
    ]
    return layers, rng.standard_normal((model.d_model, model.vocab_size), np.float32)


def jax_products(model: Any, rows: int, head_rows: int, layers: Any, head: np.ndarray) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    def products(x: jax.Array, layers: list[list[jax.Array]], head: jax.Array) -> jax.Array:
        for q_matrix, k_matrix, v_matrix, o_matrix, g_matrix, u_matrix, d_matrix in layers:
            # Without the barriers what is not used would not be computed.
            q, _, _ = jax.lax.optimization_barrier((x @ q_matrix, x @ k_matrix, x @ v_matrix))
            x = jax.lax.optimization_barrier(q @ o_matrix)
            _, u = jax.lax.optimization_barrier((x @ g_matrix, x @ u_matrix))
            x = jax.lax.optimization_barrier(u @ d_matrix)
        return x[:head_rows] @ head

    run = jax.jit(products)
    arguments = (jnp.ones((rows, model.d_model)), jax.tree.map(jnp.asarray, layers), jnp.asarray(head))
    return lambda: jax.block_until_ready(run(*arguments))


def torch_products(model: Any, rows: int, head_rows: int, layers: Any, head: np.ndarray, threads: int) -> Callable[[], Any]:
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(threads)
    linear = torch.nn.functional.linear
    kept = [[torch.from_numpy(matrix.T.copy()) for matrix in layer] for layer in layers]
    kept_head, start = torch.from_numpy(head.T.copy()), torch.ones(rows, model.d_model)

    @torch.inference_mode()
    def run() -> Any:
        x = start
        for q_matrix, k_matrix, v_matrix, o_matrix, g_matrix, u_matrix, d_matrix in kept:
            q, _, _ = linear(x, q_matrix), linear(x, k_matrix), linear(x, v_matrix)
            x = linear(q, o_matrix)
            _, u = linear(x, g_matrix), linear(x, u_matrix)
            x = linear(u, d_matrix)
        return linear(x[:head_rows], kept_head)

    return run


def flops(model: Any, rows: int, head_rows: int) -> float:
    """Of the products."""
    of_layer = sum(inputs * outputs for _, inputs, outputs in product_shapes(model))
    return 2.0 * (rows * model.num_layers * of_layer + head_rows * model.d_model * model.vocab_size)


def by_operation(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of threads by kind of operation, the longest first."""
    import jax

    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        (file,) = Path(directory).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
        found: collections.Counter[str] = collections.Counter()
        for plane in profile.planes:
            for line in plane.lines:
                for event in line.events:
                    if operation := dict(event.stats).get("hlo_op"):
                        found[str(operation).rstrip("0123456789").rstrip(".")] += event.duration_ns * 1e-9
    return dict(found.most_common(8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds: does it run?")
    arguments = parser.parse_args()
    configure(cpu_devices=1, decoding=True)
    import jax
    import jax.numpy as jnp

    from inference.config import EngineConfig
    from inference.engine import Engine
    from inference.request import Request
    from inference.sampling import Sampling
    from model.params import init_params, param_specs
    from model.presets import preset

    model = preset("tiny-llama" if arguments.quick else "smollm2-135m", dtype="float32")
    prompt, prefill, batch, side, rounds = (8, 32, 4, 64, 2) if arguments.quick else (64, 512, 32, 2048, arguments.rounds)
    rng = np.random.default_rng(0)
    params = init_params(param_specs(model), jax.random.key(0))

    def engine(rows: int) -> Engine:
        pages = -(-(max(prefill, prompt) + NEW + rows) // 64) * rows + 1
        made = Engine(params, model, EngineConfig(max_batch=rows, cache_tokens=pages * 64, page_size=64, prefill_chunk=prefill))
        made.warm_up()
        return made

    one, many = engine(1), engine(batch)

    def submit(of: Engine, rows: int, length: int, new: int) -> None:
        for tokens in rng.integers(0, model.vocab_size, (rows, length)).tolist():
            of.submit(Request(tokens, Sampling(temperature=0.0), max_tokens=new))

    def finish(of: Engine) -> None:
        while of.has_work:
            of.step()

    def prefilled() -> float:
        submit(one, 1, prefill, 1)
        return seconds(lambda: finish(one))

    def begin_rows() -> None:
        """Until each row has its first token, from which on steps give each of them one."""
        submit(many, batch, prompt, NEW + batch)
        begun: set[int] = set()
        while len(begun) < batch:
            begun |= {token.request for token in many.step()}

    def steps() -> None:
        for _ in range(NEW):
            assert len(many.step()) == batch

    def stepped() -> float:
        begin_rows()
        spent = seconds(steps)
        finish(many)
        return spent / NEW

    square = jnp.ones((side, side))
    multiply = jax.jit(jnp.matmul)
    layers, head = weights_of(model, rng)
    # Of a prompt only the last token goes through the head.
    sizes = {"prefill": (prefill, 1), "batch32": (batch, batch)}
    wholes = {"prefill": prefilled, "batch32": stepped}
    measured: dict[str, Callable[[], float]] = {
        "peak": lambda: seconds(lambda: jax.block_until_ready(multiply(square, square)))
    }
    with_torch = importlib.util.find_spec("torch") is not None
    for name, (rows, head_rows) in sizes.items():
        measured[name] = wholes[name]
        products = jax_products(model, rows, head_rows, layers, head)
        measured[f"{name}_products"] = lambda products=products: seconds(products)
        if with_torch:
            peer = torch_products(model, rows, head_rows, layers, head, num_cores())
            measured[f"{name}_torch_products"] = lambda peer=peer: seconds(peer)
    found: dict[str, list[float]] = {name: [] for name in measured}
    for i in range(rounds + 1):
        for name, measure in measured.items():
            value = measure()
            if i:  # The first round warms everything up.
                found[name].append(value)
    medians = {name: statistics.median(values) for name, values in found.items()}
    peak = 2.0 * side**3 / medians["peak"]
    summary: dict[str, Any] = {"benchmark": "decode_profile", "quick": arguments.quick, "peak_gflops": peak * 1e-9}
    for name, times in (("prefill", 1), ("batch32", NEW)):
        whole, products = medians[name], medians[f"{name}_products"]
        work = flops(model, *sizes[name])
        theirs = f", torch's {medians[f'{name}_torch_products']:.3f} s" if with_torch else ""
        print(
            f"{name}: {whole:.3f} s, its products alone {products:.3f} s ({work / products * 1e-9:.0f} GFLOP/s of "
            f"{peak * 1e-9:.0f}){theirs}; by operation, seconds of threads:"
        )
        if name == "prefill":
            submit(one, 1, prefill, 1)
            spent_on = by_operation(lambda: finish(one))
        else:
            begin_rows()
            spent_on = by_operation(steps)
            finish(many)
        for operation, spent in spent_on.items():
            print(f"  {operation[:60]:<60}{spent / times:>8.4f}")
        summary |= {f"{name}_seconds": whole, f"{name}_products_share": products / whole}
        summary[f"{name}_share_of_matmul_peak"] = work / whole / peak
        summary[f"{name}_products_share_of_matmul_peak"] = work / products / peak
        if with_torch:
            summary[f"{name}_products_vs_torch"] = medians[f"{name}_torch_products"] / products
    print(json.dumps({key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in summary.items()}))


if __name__ == "__main__":
    restart_with_huge_pages()
    main()

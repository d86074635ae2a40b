"""A batch cut into micro-batches, and put together again."""

from __future__ import annotations

import jax

from model.sharding import Layout, constrain


def split_rows(batch: dict[str, jax.Array], parts: int, layout: Layout | None) -> dict[str, jax.Array]:
    """[parts, rows / parts, ...]. Row r goes to part r % parts: each device keeps its rows."""

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, layout, None, "batch", "sequence")

    return jax.tree.map(split, batch)


def join_rows(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The inverse of `split_rows`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), batch)

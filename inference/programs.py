"""The compiled programs of the decode engine, and where their arrays live."""

from __future__ import annotations

import dataclasses
import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from inference.config import EngineConfig
from inference.sampling import Draws, History, Rows, draw_in_turn
from model.config import ModelConfig
from model.params import Params
from model.sharding import Layout
from model.transformer import KVCache, LayerPages, empty_pages, forward, unembed

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the engine's own arrays live: on the mesh of the weights, key-value heads over `tensor` where it divides them.

    Attributes:
      heads, kv_heads: the mesh axes over which these lie. Queries go with their keys, or alone where all have the same keys.
      experts: the mesh axes over which those among the weights lie.
    """

    mesh: Mesh | None
    heads: tuple[str, ...] = ()
    kv_heads: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()

    @classmethod
    def beside(cls, params: Params, model: ModelConfig) -> Placement:
        heads, kv_heads = model.num_heads, 1 if model.mla else model.num_kv_heads
        sharding = jax.tree.leaves(params)[0].sharding
        if not isinstance(sharding, NamedSharding):
            return cls(None)
        mesh = sharding.mesh
        assert isinstance(mesh, Mesh)
        of_heads, of_kv_heads = (
            ("tensor",) if "tensor" in mesh.shape and n % mesh.shape["tensor"] == 0 else () for n in (heads, kv_heads)
        )
        return cls(mesh, of_heads if kv_heads == 1 else of_kv_heads, of_kv_heads, _axes_of_experts(params))

    @property
    def layout(self) -> Layout | None:
        if self.mesh is None:
            return None
        return Layout(self.mesh, {"heads": self.heads, "kv_heads": self.kv_heads, "experts": self.experts})

    def pages(self, tree: Tree) -> Tree:
        return self._constrain(tree, PartitionSpec(None, self.kv_heads or None))

    def everywhere(self, tree: Tree) -> Tree:
        return self._constrain(tree, PartitionSpec())

    def _constrain(self, tree: Tree, spec: PartitionSpec) -> Tree:
        return tree if self.mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, spec))


def _axes_of_experts(params: Params) -> tuple[str, ...]:
    """Of the mesh, along which the experts of `params` lie; those of all layers lie alike."""
    specs = [block["experts"]["up"].sharding.spec for block in params["blocks"] if "experts" in block]
    over = specs[0][0] if specs and specs[0] else None
    return () if over is None else over if isinstance(over, tuple) else (over,)


@functools.partial(jax.jit, static_argnames=("config", "engine", "placement"))
def empty_state(config: ModelConfig, engine: EngineConfig, placement: Placement) -> tuple[tuple[LayerPages, ...], History]:
    pages = empty_pages(config, engine.num_pages, engine.page_size, engine.cache_dtype)
    return placement.pages(pages), placement.everywhere(History.empty(engine.max_batch, config.vocab_size))


@functools.partial(jax.jit, static_argnames=("config", "placement"), donate_argnames="pages")
def prefill(
    params: Params,
    config: ModelConfig,
    placement: Placement,
    pages: tuple[LayerPages, ...],
    table: jax.Array,
    tokens: jax.Array,
    positions: jax.Array,
) -> tuple[LayerPages, ...]:
    """Writes keys and values of int32 tokens [B, T] to their pages."""
    _, cache, _ = forward(params, config, tokens, positions, cache=KVCache(pages, table, placement.layout))
    assert cache is not None
    return placement.pages(cache.pages)


@functools.partial(jax.jit, static_argnames=("config", "placement"), donate_argnames="pages")
def decode(
    params: Params,
    config: ModelConfig,
    placement: Placement,
    pages: tuple[LayerPages, ...],
    table: jax.Array,
    tokens: jax.Array,
    positions: jax.Array,
) -> tuple[tuple[LayerPages, ...], jax.Array]:
    """`prefill`, and the float32 logits [B, T, V] after each token."""
    hidden, cache, _ = forward(params, config, tokens, positions, cache=KVCache(pages, table, placement.layout))
    assert cache is not None
    return placement.pages(cache.pages), unembed(params, config, hidden)


# Apart from `decode`, so that networks of one vocabulary share it.
@functools.partial(jax.jit, static_argnames="placement", donate_argnames="history")
def draw(
    history: History,
    placement: Placement,
    logits: jax.Array,
    tokens: jax.Array,
    positions: jax.Array,
    rows: Rows,
    allowed: jax.Array,
) -> tuple[Draws, History]:
    return placement.everywhere(draw_in_turn(logits, tokens, positions >= 0, rows, history, allowed))


@functools.partial(jax.jit, static_argnames="placement", donate_argnames="pages")
def copy_page(
    pages: tuple[LayerPages, ...], placement: Placement, source: jax.Array, target: jax.Array
) -> tuple[LayerPages, ...]:
    return placement.pages(jax.tree.map(lambda leaf: leaf.at[target].set(leaf[source]), pages))


@functools.partial(jax.jit, static_argnames="placement", donate_argnames="pages")
def zero_page(pages: tuple[LayerPages, ...], placement: Placement, page: jax.Array) -> tuple[LayerPages, ...]:
    return placement.pages(jax.tree.map(lambda leaf: leaf.at[page].set(0), pages))


@functools.partial(jax.jit, static_argnames="placement", donate_argnames="pages")
def zero_pages(pages: tuple[LayerPages, ...], placement: Placement) -> tuple[LayerPages, ...]:
    return placement.pages(jax.tree.map(jnp.zeros_like, pages))


@functools.partial(jax.jit, static_argnames="placement", donate_argnames="history")
def set_history(history: History, placement: Placement, slot: jax.Array, row: History) -> History:
    return placement.everywhere(jax.tree.map(lambda leaf, new: leaf.at[slot].set(new), history, row))


def abstract_pages(params: Params, model: ModelConfig, config: EngineConfig) -> tuple[LayerPages, ...]:
    """ShapeDtypeStruct of an engine's pages, with shardings where (abstract) `params` have them."""
    placement = Placement.beside(params, model)
    shapes = jax.eval_shape(functools.partial(empty_pages, model, config.num_pages, config.page_size, config.cache_dtype))
    sharding = placement.mesh and NamedSharding(placement.mesh, PartitionSpec(None, placement.kv_heads or None))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def lower_decode(params: Params, model: ModelConfig, config: EngineConfig) -> jax.stages.Lowered:
    """The program that decodes `max_batch` rows, one token each.

    Args:
      params: abstract, with shardings, of a network with a separate entry per layer.
    """
    rows = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    table, column = rows((config.max_batch, table_width(model, config))), rows((config.max_batch, 1 + config.num_guesses))
    pages = abstract_pages(params, model, config)
    return decode.lower(params, model, Placement.beside(params, model), pages, table, column, column)


def table_width(model: ModelConfig, config: EngineConfig) -> int:
    """Pages of the longest row."""
    return min(-(-model.max_seq_len // config.page_size), config.num_pages)

"""Attention over a row whose tokens lie on several devices: keys and values go round a ring (arXiv:2310.01889).

While a device attends to the keys that it holds, it already sends them on. The log-sum-exp joins the parts; in the backward
pass the gradients of keys and values travel with them. Tokens are dealt out in zigzag order, the i-th device holding the i-th
part of a row from the front and from the back, so that each has an equal share of the causal triangle at every step; who may
see whom depends on segments and positions alone, hence on no order.

Axes: B rows, T queries, S keys, H query heads, K key-value heads, D head dimension; C devices along the ring.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

AXIS = "context"


def zigzag(length: int, devices: int) -> np.ndarray:
    """The order in which the tokens of a row are dealt out, int [length]; `length` is a multiple of 2 x devices."""
    parts = np.arange(length).reshape(2 * devices, -1)
    return np.concatenate([part for i in range(devices) for part in (parts[i], parts[2 * devices - 1 - i])])


class Part(NamedTuple):
    """How a backend attends to a part of the keys, and its gradients; all that it returns is float32.

    Attributes:
      forward: (q, k, v, pattern) -> (out, lse).
      gradients: (q, k, v, pattern, d_out, lse, delta) -> (dq, dk, dv), the latter two of all keys.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    gradients: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def _pass_on(tree: Any) -> Any:
    """Each device's arrays to the next one."""
    devices = jax.lax.axis_size(AXIS)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, [(i, (i + 1) % devices) for i in range(devices)]), tree)


def ring_patterns(make: Callable[..., Any], segments: jax.Array, positions: jax.Array) -> Any:
    """make(q_segments, q_positions, kv_segments, kv_positions) for the keys of each step of the ring, stacked; in shard_map.

    Args:
      segments, positions: int32 [B, T] of this device's tokens.
    """
    devices, here = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    everyone = jax.lax.all_gather((segments, positions), AXIS)
    steps = []
    for step in range(devices):
        kv_segments, kv_positions = (x[(here - step) % devices] for x in everyone)
        steps.append(make(segments, positions, kv_segments, kv_positions))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring_attention(part: Part, patterns: Any, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """Attention of this device's queries to the keys of all devices along AXIS; in shard_map.

    Args:
      patterns: of `ring_patterns`.
      q: [B, H, T, D].
      k, v: [B, K, S, D].
      sinks: float32 [H], see `model/attention.py`.

    Returns:
      [B, H, T, D] of q's dtype.
    """
    return _forward(part, patterns, q, k, v, sinks)[0]


def _walk(step: Callable[..., Any], kv: Any, patterns: Any) -> Any:
    """The last carry of step(carry, kv, pattern), None at first, for the keys and values of every device.

    The next ones are on their way meanwhile.
    """

    def body(state: Any, pattern: Any) -> tuple[Any, None]:
        carry, kv = state
        following = _pass_on(kv)
        return (step(carry, kv, pattern), following), None

    first, between, last = (jax.tree.map(lambda x, i=i: x[i], patterns) for i in (0, slice(1, -1), -1))
    (carry, kv), _ = jax.lax.scan(body, body((None, kv), first)[0], between)
    return step(carry, kv, last)


def _forward(part: Part, patterns: Any, q, k, v, sinks):
    def step(carry, kv, pattern):
        part_out, part_lse = part.forward(q, *kv, pattern)
        if carry is None:
            return part_out, part_lse
        out, lse = carry
        total = jnp.logaddexp(lse, part_lse)
        return out * jnp.exp(lse - total)[..., None] + part_out * jnp.exp(part_lse - total)[..., None], total

    out, lse = _walk(step, (k, v), patterns)
    if sinks is not None:
        without, lse = lse, jnp.logaddexp(lse, sinks.astype(jnp.float32)[:, None])
        out = out * jnp.exp(without - lse)[..., None]
    # Named for remat: with these kept, the backward pass need not go round the ring twice.
    out, lse = checkpoint_name(out.astype(q.dtype), "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (patterns, q, k, v, sinks, out, lse)


def _backward(part: Part, residuals, d_out):
    patterns, q, k, v, sinks, out, lse = residuals
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)

    def step(carry, kv, pattern):
        # What the device before has found of these keys' gradients arrives while this one adds its own.
        arriving = None if carry is None else _pass_on(carry[1])
        part_dq, *part_d_kv = part.gradients(q, *kv, pattern, d_out, lse, delta)
        if carry is None:
            return part_dq, tuple(part_d_kv)
        return carry[0] + part_dq, jax.tree.map(jnp.add, arriving, tuple(part_d_kv))

    dq, d_kv = _walk(step, (k, v), patterns)
    dk, dv = _pass_on(d_kv)
    d_sinks = None
    if sinks is not None:
        d_sinks = -jnp.sum(jnp.exp(sinks.astype(jnp.float32)[:, None] - lse) * delta, axis=(0, 2)).astype(sinks.dtype)
    return None, dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), d_sinks


ring_attention.defvjp(_forward, _backward)

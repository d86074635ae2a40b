"""Mixture of experts: a router, dropless dispatch to the experts it chose, and their weighted sum.

Each token is copied once per expert it goes to; the copies are sorted by expert, multiplied group by group, and brought back.
On a mesh with an `expert` axis each device holds some of the experts, and copies travel to them and back by all-to-all.
However unevenly the router chooses, no copy is dropped: a device has room for all that the others could send it, which is
min(K, experts per device) rows for each token of all devices of the axis.
To decode, every device has all tokens, and no weight moves: each computes what its own experts make of them.

Mixtral (arXiv:2401.04088), DeepSeek-MoE and DeepSeek-V3 (arXiv:2401.06066, arXiv:2412.19437), Switch (arXiv:2101.03961),
ST-MoE (arXiv:2202.08906). Deviations:
1. The auxiliary loss is that of each layer over all tokens of a micro-batch, with shares of all K copies. DeepSeek-V3 takes it
   per row; Mixtral's published code over all layers at once, K times as large.
2. Groups are ranked by their two highest scores for either router; DeepSeek-V2's softmax router takes the highest.

Axes: B rows, T tokens, D model width, E experts, K experts per token; N tokens of a device, R copies; P devices along `expert`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from model.config import ModelConfig, MoeConfig
from model.kernels.grouped_matmul import grouped_matmul
from model.layers import ACTIVATIONS
from model.params import Params, block_layout
from model.sharding import Layout

AXIS = "expert"


@flax.struct.dataclass
class Routing:
    """What the router of each layer with experts did with the tokens that are not padding.

    Attributes:
      load: tokens per expert, float32 [layers, E].
      balance_loss: E * sum over experts of (share of the copies * mean probability), float32 [layers]; 1 if both are even.
      z_loss: mean squared log-sum-exp of the logits, float32 [layers].
    """

    load: jax.Array
    balance_loss: jax.Array
    z_loss: jax.Array


def route(x_BTD: jax.Array, params: Params, moe: MoeConfig, real_BT: jax.Array) -> tuple[jax.Array, jax.Array, Routing]:
    """Chooses the experts of every token; float32, or wider where x is.

    Args:
      params: `kernel` [D, E] and, with `moe.selection_bias`, `bias` [E].
      real_BT: bool, False for padding, which counts for nothing.

    Returns:
      experts int32 [B, T, K] (E for padding, which goes to none), their weights [B, T, K], and what is to be known of it.
    """
    E, K = moe.num_experts, moe.experts_per_token
    wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
    kernel = params["kernel"].astype(wide)
    logits_BTE = jnp.einsum("btd,de->bte", x_BTD.astype(wide), kernel, precision=jax.lax.Precision.HIGHEST)
    scores_BTE = jax.nn.softmax(logits_BTE) if moe.router == "softmax" else jax.nn.sigmoid(logits_BTE)
    choice_BTE = jax.lax.stop_gradient(scores_BTE)
    if moe.selection_bias:
        choice_BTE += jax.lax.stop_gradient(params["bias"].astype(wide))
    if moe.num_groups > 1:
        choice_BTE = _best_groups(choice_BTE, moe)
    experts_BTK = jax.lax.top_k(choice_BTE, K)[1]
    # By comparison: a gather's gradient would be a scatter.
    is_chosen_BTKE = experts_BTK[..., None] == jnp.arange(E)
    weights_BTK = jnp.sum(jnp.where(is_chosen_BTKE, scores_BTE[:, :, None], 0), axis=-1)
    if moe.normalize_weights:
        weights_BTK /= jnp.sum(weights_BTK, axis=-1, keepdims=True) + 1e-20
    real_BT1 = real_BT[..., None].astype(wide)
    num_tokens = jnp.maximum(jnp.sum(real_BT1), 1)
    load_E = jnp.sum(jnp.any(is_chosen_BTKE, axis=2) * real_BT1, axis=(0, 1))
    probabilities_BTE = scores_BTE / jnp.sum(scores_BTE, axis=-1, keepdims=True)
    mean_E = jnp.sum(probabilities_BTE * real_BT1, axis=(0, 1)) / num_tokens
    log_z_BT1 = jax.nn.logsumexp(logits_BTE, axis=-1, keepdims=True)
    routing = Routing(
        load=load_E,
        balance_loss=E * jnp.sum(load_E / (K * num_tokens) * mean_E),
        z_loss=jnp.sum(jnp.square(log_z_BT1) * real_BT1) / num_tokens,
    )
    return jnp.where(real_BT[..., None], experts_BTK, E), weights_BTK * moe.routed_scale, routing


def _best_groups(choice_BTE: jax.Array, moe: MoeConfig) -> jax.Array:
    """-inf for the experts of all groups but the `groups_per_token` whose two best experts have the highest sum."""
    grouped = choice_BTE.reshape(*choice_BTE.shape[:2], moe.num_groups, -1)
    of_groups = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
    best = jax.lax.top_k(of_groups, moe.groups_per_token)[1]
    is_best = jnp.any(best[..., None] == jnp.arange(moe.num_groups), axis=-2)
    return jnp.where(is_best[..., None], grouped, -jnp.inf).reshape(choice_BTE.shape)


def moe_block(
    x_BTD: jax.Array,
    params: Params,
    config: ModelConfig,
    moe: MoeConfig,
    real_BT: jax.Array,
    layout: Layout | None,
    decode_layout: Layout | None = None,
) -> tuple[jax.Array, Routing]:
    """The weighted sum of what each token's experts make of it; padding gets 0.

    Args:
      params: `router` (see `route`) and `experts`: `up`, `gate` [E, D, F] and `down` [E, F, D].
      real_BT: bool, False for padding.
      layout: where tokens and experts live. None leaves it to XLA.
      decode_layout: instead, where every device has all tokens: over which mesh axes `experts` lie. The rest is left to XLA.
    """
    experts_BTK, weights_BTK, routing = route(x_BTD, params["router"], moe, real_BT)
    activation = ACTIVATIONS[config.mlp]
    matrices = {name: w.astype(x_BTD.dtype) for name, w in params["experts"].items()}
    if decode_layout and decode_layout.rules["experts"]:
        return _of_own_experts(x_BTD, experts_BTK, weights_BTK, matrices, activation, decode_layout), routing
    if layout is None:
        return _of_device(x_BTD, experts_BTK, weights_BTK, matrices, activation, None), routing
    scattered = layout.rules["expert_embed"]

    def local(x_BTD: jax.Array, experts_BTK: jax.Array, weights_BTK: jax.Array, matrices: Params) -> jax.Array:
        if scattered:
            matrices = {
                name: jax.lax.all_gather(w, scattered, axis=1 + (name == "down"), tiled=True) for name, w in matrices.items()
            }
        out_BTD = _of_device(x_BTD, experts_BTK, weights_BTK, matrices, activation, layout)
        # Each device along `tensor` has a part of every expert's width, hence of the sum over it.
        split = layout.rules["mlp"]
        return jax.lax.psum_scatter(out_BTD, split, scatter_dimension=1, tiled=True) if split else out_BTD

    tokens = layout.spec("batch", "sequence", None)
    into, out_of = layout.spec("experts", "expert_embed", "mlp"), layout.spec("experts", "mlp", "expert_embed")
    by_device = jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(tokens, tokens, tokens, {name: out_of if name == "down" else into for name in matrices}),
        out_specs=layout.spec("batch", "residual", None),
        check_vma=False,
    )
    return by_device(x_BTD, experts_BTK, weights_BTK, matrices), routing


def _of_own_experts(
    x_BTD: jax.Array,
    experts_BTK: jax.Array,
    weights_BTK: jax.Array,
    matrices: Params,
    activation: Callable[[jax.Array], jax.Array],
    layout: Layout,
) -> jax.Array:
    """What all experts make of tokens that every device has. Left alone, XLA would gather the experts."""

    def local(x_BTD: jax.Array, experts_BTK: jax.Array, weights_BTK: jax.Array, matrices: Params) -> jax.Array:
        num_experts = matrices["up"].shape[0]
        own_BTK = experts_BTK - jax.lax.axis_index(AXIS) * num_experts
        own_BTK = jnp.where((own_BTK >= 0) & (own_BTK < num_experts), own_BTK, num_experts)
        return jax.lax.psum(_of_device(x_BTD, own_BTK, weights_BTK, matrices, activation, None), AXIS)

    # By hand along AXIS alone: how the widths of the experts lie is still XLA's business.
    tokens, experts = layout.spec(), layout.spec("experts")
    by_device = jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(tokens, tokens, tokens, experts),
        out_specs=tokens,
        axis_names={AXIS},
        check_vma=False,
    )
    return by_device(x_BTD, experts_BTK, weights_BTK, matrices)


def _of_device(
    x_BTD: jax.Array,
    experts_BTK: jax.Array,
    weights_BTK: jax.Array,
    matrices: Params,
    activation: Callable[[jax.Array], jax.Array],
    layout: Layout | None,
) -> jax.Array:
    """What the experts make of the tokens of this device, which holds the matrices of its own part of the experts.

    A copy whose expert is numbered beyond the last one is padding.
    """
    D, K = x_BTD.shape[-1], experts_BTK.shape[-1]
    devices = layout.shards("experts") if layout else 1
    platform = layout.mesh.devices.flat[0].platform if layout else None
    num_experts = devices * matrices["up"].shape[0]
    expert_R = experts_BTK.reshape(-1)
    order_R = jnp.argsort(expert_R).astype(jnp.int32)
    slots_NK = jnp.zeros_like(order_R).at[order_R].set(jnp.arange(len(order_R), dtype=jnp.int32)).reshape(-1, K)
    sizes_E = jnp.sum(expert_R[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    # Padding's copies stand after all others, in rows that nobody computes.
    real_NK1 = experts_BTK.reshape(-1, K, 1) < num_experts
    copies_RD = _spread(jnp.where(jnp.any(real_NK1, axis=1), x_BTD.reshape(-1, D), 0), order_R, slots_NK)
    if devices == 1:
        out_RD = _experts(copies_RD, sizes_E, matrices, activation, platform)
    else:
        # A token's experts are different ones, so no device can get more from another one.
        most = len(slots_NK) * min(K, num_experts // devices)
        there, back, sizes = _plan(sizes_E, devices, len(copies_RD), most)
        arrived_RD = _exchange(copies_RD, there, back)
        out_RD = _exchange(_in_chunks(arrived_RD, sizes, matrices, activation, platform, most), back, there)
    out_RD = checkpoint_name(out_RD, "expert_out")
    out_NKD = jnp.where(real_NK1, _collect(out_RD, order_R, slots_NK), 0)
    return jnp.einsum("nkd,nk->nd", out_NKD, weights_BTK.reshape(-1, K)).astype(x_BTD.dtype).reshape(x_BTD.shape)


def _experts(
    x_RD: jax.Array, sizes: jax.Array, matrices: Params, activation: Callable[[jax.Array], jax.Array], platform: str | None
) -> jax.Array:
    """Rows sorted by expert through the experts' MLPs; see `grouped_matmul` for rows that are no expert's."""
    hidden_RF = grouped_matmul(x_RD, matrices["up"], sizes, platform)
    if "gate" in matrices:
        hidden_RF = activation(grouped_matmul(x_RD, matrices["gate"], sizes, platform)) * hidden_RF
    else:
        hidden_RF = activation(hidden_RF)
    return grouped_matmul(hidden_RF, matrices["down"], sizes, platform)


# --- The room for the worst of routers, most of which stays empty: computed in chunks, as far as rows have arrived -----------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _in_chunks(
    x_RD: jax.Array,
    sizes: jax.Array,
    matrices: Params,
    activation: Callable[[jax.Array], jax.Array],
    platform: str | None,
    chunk: int,
) -> jax.Array:
    """`_experts` of so many rows at a time; rows of chunks that are empty may hold anything.

    Nothing is kept for the backward pass but the arguments: it computes the hidden rows again, a chunk of them at a time.
    """

    def of_chunk(i: jax.Array, out_RD: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(x_RD, i * chunk, chunk)
        out = _experts(part, _sizes_within(sizes, i * chunk, chunk), matrices, activation, platform)
        return jax.lax.dynamic_update_slice_in_dim(out_RD, out, i * chunk, 0)

    return jax.lax.fori_loop(0, _filled(sizes, chunk), of_chunk, jax.lax.empty(x_RD.shape, x_RD.dtype))


def _in_chunks_forward(x_RD, sizes, matrices, activation, platform, chunk):
    return _in_chunks(x_RD, sizes, matrices, activation, platform, chunk), (x_RD, sizes, matrices)


def _in_chunks_backward(activation, platform, chunk, kept, d_out_RD):
    x_RD, sizes, matrices = kept

    def of_chunk(i: jax.Array, gradients: tuple[jax.Array, Params]) -> tuple[jax.Array, Params]:
        d_x_RD, d_matrices = gradients
        part, d_out = (jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk) for x in (x_RD, d_out_RD))
        of_part = _sizes_within(sizes, i * chunk, chunk)
        _, pull = jax.vjp(lambda x, matrices: _experts(x, of_part, matrices, activation, platform), part, matrices)
        d_part, more = pull(d_out)
        d_matrices = jax.tree.map(lambda total, one: total + one.astype(total.dtype), d_matrices, more)
        return jax.lax.dynamic_update_slice_in_dim(d_x_RD, d_part, i * chunk, 0), d_matrices

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32)), matrices)
    begin = jax.lax.empty(x_RD.shape, x_RD.dtype), zeros
    d_x_RD, d_matrices = jax.lax.fori_loop(0, _filled(sizes, chunk), of_chunk, begin)
    return d_x_RD, None, jax.tree.map(lambda total, w: total.astype(w.dtype), d_matrices, matrices)


_in_chunks.defvjp(_in_chunks_forward, _in_chunks_backward)


def _filled(sizes: jax.Array, chunk: int) -> jax.Array:
    """Chunks that rows of experts are in, which come before those of none."""
    return -(-jnp.sum(sizes) // chunk)


def _sizes_within(sizes: jax.Array, begin: jax.Array, chunk: int) -> jax.Array:
    """How many of each expert's rows are among `chunk` rows from `begin` on."""
    ends = jnp.cumsum(sizes, dtype=sizes.dtype) - begin
    return jnp.clip(ends, 0, chunk) - jnp.clip(ends - sizes, 0, chunk)


# --- To copies sorted by expert and back: gradients are look-ups too, where jax would add up scattered rows -------------------
# order_R says which copy stands where, a token's K copies being numbered one after the other; slots_NK where each one stands.


@jax.custom_vjp
def _spread(x_ND: jax.Array, order_R: jax.Array, slots_NK: jax.Array) -> jax.Array:
    """[R, D]: a copy of its token in every place."""
    return x_ND[order_R // slots_NK.shape[1]]


def _spread_forward(x_ND: jax.Array, order_R: jax.Array, slots_NK: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _spread(x_ND, order_R, slots_NK), slots_NK


def _spread_backward(slots_NK: jax.Array, d_out_RD: jax.Array) -> tuple[jax.Array, None, None]:
    wide = jnp.promote_types(d_out_RD.dtype, jnp.float32)
    return jnp.sum(d_out_RD[slots_NK], axis=1, dtype=wide).astype(d_out_RD.dtype), None, None


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _collect(out_RD: jax.Array, order_R: jax.Array, slots_NK: jax.Array) -> jax.Array:
    """[N, K, D]: what stands in the places of each token's copies."""
    return out_RD[slots_NK]


def _collect_forward(out_RD: jax.Array, order_R: jax.Array, slots_NK: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _collect(out_RD, order_R, slots_NK), order_R


def _collect_backward(order_R: jax.Array, d_out_NKD: jax.Array) -> tuple[jax.Array, None, None]:
    return d_out_NKD.reshape(-1, d_out_NKD.shape[-1])[order_R], None, None


_collect.defvjp(_collect_forward, _collect_backward)


# --- All-to-all along AXIS ----------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class Send:
    """Which rows each device sends to each other one: S segments for every device, all int32 [P, S].

    Attributes:
      offsets: where a segment begins among the sender's rows.
      sizes: its rows.
      targets: where it begins among the receiver's rows.
      arriving: the sizes of the segments that come from each device.
      num_rows: the receiver has.
      most: rows that one device may send to another.
    """

    offsets: jax.Array
    sizes: jax.Array
    targets: jax.Array
    arriving: jax.Array
    num_rows: int = flax.struct.field(pytree_node=False)
    most: int = flax.struct.field(pytree_node=False)


def _plan(sizes_E: jax.Array, devices: int, num_rows: int, most: int) -> tuple[Send, Send, jax.Array]:
    """How rows sorted by expert travel to the experts' devices, where they stand sorted by expert and then by sender; how they
    travel back; and how many each of this device's experts gets.

    Args:
      sizes_E: rows of this device for every expert.
      num_rows: of this device, those for no expert included.
    """
    here = jax.lax.axis_index(AXIS)
    # From device s to expert e of device d.
    sizes_sde = jax.lax.all_gather(sizes_E, AXIS).reshape(devices, devices, -1)
    at_sender_sde = _starts(sizes_sde.reshape(devices, -1)).reshape(sizes_sde.shape)
    sizes_des = sizes_sde.transpose(1, 2, 0)
    at_expert_des = _starts(sizes_des.reshape(devices, -1)).reshape(sizes_des.shape)
    at_expert_sde = at_expert_des.transpose(2, 0, 1)
    leaving, arriving = sizes_sde[here], sizes_sde[:, here]
    there = Send(at_sender_sde[here], leaving, at_expert_sde[here], arriving, devices * most, most)
    back = Send(at_expert_sde[:, here], arriving, at_sender_sde[:, here], leaving, num_rows, most)
    return there, back, jnp.sum(arriving, axis=0)


def _starts(sizes: jax.Array) -> jax.Array:
    """Where segments that follow each other begin, along the last axis."""
    return jnp.cumsum(sizes, axis=-1, dtype=sizes.dtype) - sizes


@jax.custom_vjp
def _exchange(x: jax.Array, there: Send, back: Send) -> jax.Array:
    """[there.num_rows, D]: what arrives here when every device sends as `there` says; other rows may hold anything.

    To fill them with zeros took a fifth of a step of Mixtral by the TPU compiler's estimate.

    Args:
      back: the way back, which gradients take.
    """
    return jax.lax.platform_dependent(x, there, back, cpu=_padded_all_to_all, default=_ragged_all_to_all)


def _exchange_forward(x: jax.Array, there: Send, back: Send) -> tuple[jax.Array, tuple[Send, Send]]:
    return _exchange(x, there, back), (there, back)


def _exchange_backward(ways: tuple[Send, Send], d_out: jax.Array) -> tuple[jax.Array, None, None]:
    there, back = ways
    return _exchange(d_out, back, there), None, None


_exchange.defvjp(_exchange_forward, _exchange_backward)


def _ragged_all_to_all(x: jax.Array, there: Send, back: Send) -> jax.Array:
    room = jax.lax.empty((there.num_rows, x.shape[1]), x.dtype)
    segments = (field.reshape(-1) for field in (there.offsets, there.sizes, there.targets, there.arriving))
    return jax.lax.ragged_all_to_all(x, room, *segments, axis_name=AXIS)


def _padded_all_to_all(x: jax.Array, there: Send, back: Send) -> jax.Array:
    """For backends without a ragged all-to-all: each device sends as many rows as it may, filled up with zeros."""
    buffer = x.at[_rows(there.offsets, there.sizes, there.most)].get(mode="fill", fill_value=0)
    arrived = jax.lax.all_to_all(buffer, AXIS, 0, 0)
    room = jax.lax.empty((there.num_rows, x.shape[1]), x.dtype)
    return room.at[_rows(back.offsets, there.arriving, there.most)].set(arrived, mode="drop")


def _rows(offsets: jax.Array, sizes: jax.Array, most: int) -> jax.Array:
    """int32 [P, most]: the rows of the segments of each device one after the other; then an index out of all bounds."""
    ends = jnp.cumsum(sizes, axis=1)
    slots = jnp.arange(most)[None, :, None]
    after = (offsets - _starts(sizes))[:, None]
    is_in = (slots < ends[:, None]) & (slots >= (ends - sizes)[:, None])
    rows = jnp.sum(jnp.where(is_in, slots + after, 0), axis=-1)
    return jnp.where(jnp.any(is_in, axis=-1), rows, jnp.iinfo(jnp.int32).max)


# --- Balance ------------------------------------------------------------------------------------------------------------------


def balance_experts(params: Params, config: ModelConfig, load: jax.Array) -> Params:
    """`params` with every selection bias moved towards an even load (arXiv:2408.15664, algorithm 1).

    Args:
      load: [layers, E] of `Routing`, or in proportion to it, of all tokens of a step.
    """
    assert config.moe is not None
    step = config.moe.bias_update_rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
    period, repetitions = block_layout(config)[1:] if config.scan_layers else (1, 0)
    in_scan, rest = step[: period * repetitions], step[period * repetitions :]
    stacked = in_scan.reshape(repetitions, period, load.shape[1])

    def moved(block: Params, by: jax.Array) -> Params:
        router = block["router"]
        return {**block, "router": {**router, "bias": router["bias"] + by.astype(router["bias"].dtype)}}

    of_experts = iter(rest)
    blocks = tuple(moved(block, next(of_experts)) if "router" in block else block for block in params["blocks"])
    params = {**params, "blocks": blocks}
    if repetitions:
        params["scanned_blocks"] = tuple(moved(block, stacked[:, i]) for i, block in enumerate(params["scanned_blocks"]))
    return params

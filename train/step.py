"""One optimizer update and one evaluation, as pure functions; and `Trainer`, which compiles them for a mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model.attention import check_backend
from model.config import LoraConfig, ModelConfig
from model.logprobs import token_logprobs
from model.lora import adapt, adapter_specs, frozen_base
from model.moe import balance_experts
from model.params import Params, abstract_params, dimensions, init_params, is_spec, param_shardings, param_specs
from model.ring_attention import zigzag
from model.sharding import TRAIN_RULES, Dimensions, Layout, check_mesh, constrain, make_mesh, num_slices, resolve_sizes
from model.transformer import activations, forward
from train.config import DEFAULT_RULES, DistillationConfig, LossConfig, MeshConfig, OptimizerConfig, TrainConfig
from train.distillation import TEACHER, distillation_sums
from train.micro_batches import split_rows
from train.optimizer import make_optimizer, make_schedule
from train.preferences import constants_of_update, head_specs, preference_objective

Batch = dict[str, jax.Array]  # all [rows, seq_len]
BATCH_DTYPES = {"tokens": "int32", "targets": "int32", "segment_ids": "int32", "positions": "int32", "weights": "float32"}
PREFERENCE_DTYPES = {"sequence_ids": "int32", "labels": "float32"}
Metrics = dict[str, jax.Array]  # float32 scalars; among sums `expert_load` too, see model.moe.Routing


@flax.struct.dataclass
class TrainState:
    """All that changes from step to step. `step` counts finished updates; `ema` is None when it is off.

    With LoRA, `params` are the adapters, and `frozen` what they adapt; with an objective that compares with a reference,
    `frozen` is that; with a teacher it is the teacher. It is part of the state, because a step is a function of it, but it
    never changes and is not saved.
    """

    params: Params
    opt_state: optax.OptState
    ema: Params | None
    step: jax.Array
    frozen: Params | None = None

    def saved(self) -> TrainState:
        """What a checkpoint holds."""
        return self.replace(frozen=None)  # pyright: ignore[reportAttributeAccessIssue]


def loss_sums(
    params: Params, model: ModelConfig, loss: LossConfig, batch: Batch, layout: Layout | None = None
) -> tuple[jax.Array, Metrics]:
    """Sums over the weighted tokens: the objective (cross-entropy + z-loss), and what is reported.

    The routers' losses are means over the tokens of this (micro-)batch that are not padding, whatever their weights; they count
    as if every weighted token had that mean.
    """
    if layout is not None and layout.shards("sequence") > 1:
        order = zigzag(batch["tokens"].shape[1], layout.shards("sequence"))
        batch = {name: constrain(x[:, order], layout, "batch", "sequence") for name, x in batch.items()}
    hidden, _, routing = forward(params, model, batch["tokens"], batch["positions"], batch["segment_ids"], layout=layout)
    out = token_logprobs(params, model, hidden, batch["targets"], loss.chunk_tokens, layout)
    weights = batch["weights"]
    nll = -jnp.sum(weights * out.logprobs)
    z_loss = loss.z_loss * jnp.sum(weights * jnp.square(out.log_z))
    sums = {
        "loss": nll,
        "z_loss": z_loss,
        "entropy": jnp.sum(weights * out.entropy),
        "accuracy": jnp.sum(weights * out.correct),
    }
    total = nll + z_loss
    if routing is not None:
        assert model.moe is not None
        router = {
            "balance_loss": model.moe.balance_loss * jnp.sum(weights) * jnp.sum(routing.balance_loss),
            "router_z_loss": model.moe.z_loss * jnp.sum(weights) * jnp.sum(routing.z_loss),
        }
        total += sum(router.values())
        sums |= router | {"expert_load": routing.load}
    return total, sums


# Of (parameters, network, some rows of a batch, layout): what is minimised, and what is reported. Sums, because they add up
# over micro-batches and replicas however unevenly the tokens lie. `weight`, if there is one, is what to divide them by at last.
Objective = Callable[[Params, ModelConfig, Batch, Layout | None], tuple[jax.Array, Metrics]]


# Of (parameters of the network, reference, batch), and the network, micro-batches and layout: the whole batch with what is a
# constant of its update.
Prepare = Callable[..., Batch]


def next_token_objective(loss: LossConfig) -> Objective:
    """That of pretraining and fine-tuning: a mean over the weighted tokens."""

    def objective(params: Params, model: ModelConfig, batch: Batch, layout: Layout | None) -> tuple[jax.Array, Metrics]:
        total, sums = loss_sums(params, model, loss, batch, layout)
        return total, sums | {"weight": jnp.sum(batch["weights"])}

    return objective


def _trained_alone(params: Params, _: Params | None) -> Params:
    return params


def gradient_sums(
    params: Params,
    batch: Batch,
    frozen: Params | None = None,
    *,
    model: ModelConfig,
    objective: Objective,
    accumulation: int,
    whole: Callable[[Params, Params | None], Params] = _trained_alone,
    layout: Layout | None = None,
) -> tuple[Params, Metrics]:
    """Gradients and metrics of a batch, added up over `accumulation` micro-batches.

    Args:
      whole: what the objective reads, of `params` and `frozen`: with LoRA `params` are adapters of the frozen network.
    """

    def of_rows(params: Params, micro: Batch) -> tuple[jax.Array, Metrics]:
        return objective(whole(params, frozen), model, micro, layout)

    gradient = jax.grad(of_rows, has_aux=True)
    if accumulation == 1:
        return gradient(params, batch)

    def add(total: tuple[Params, Metrics], micro: Batch) -> tuple[tuple[Params, Metrics], None]:
        return jax.tree.map(jnp.add, total, gradient(params, micro)), None

    shapes = jax.eval_shape(gradient, params, batch)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
    return jax.lax.scan(add, zeros, split_rows(batch, accumulation, layout))[0]


GradientSums = Callable[..., tuple[Params, Metrics]]  # of params, batch and, with LoRA, `frozen`


def over_replicas(sums: GradientSums, mesh: Mesh) -> GradientSums:
    """`sums` over the rows of all devices of a mesh that has only a data axis, added up as one vector.

    The same numbers as the partitioner's, which adds up parameter by parameter: on CPU devices each of those is a meeting of
    all threads, and their number, not their size, is what they cost (experiments/LOG.md).
    """

    def local(params: Params, batch: Batch, frozen: Params | None) -> tuple[Params, Metrics]:
        vector, unravel = ravel_pytree(sums(params, batch, frozen))
        return unravel(jax.lax.psum(vector, "data"))

    replicated = PartitionSpec()
    in_specs = (replicated, PartitionSpec("data"), replicated)
    over_all = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=replicated, check_vma=False)
    return lambda params, batch, frozen=None: over_all(params, batch, frozen)


def mean_gradients(sums: GradientSums, params: Params, batch: Batch) -> tuple[Params, Metrics]:
    """Gradients and metrics, divided by the weight that the objective reports: per weighted token."""
    gradients, metrics = sums(params, batch)
    weight = metrics.pop("weight", 1.0)
    weight = jnp.where(weight > 0, weight, 1.0)
    return jax.tree.map(lambda total: total / weight, (gradients, metrics))


def train_step(
    state: TrainState,
    batch: Batch,
    config: Job,
    sums: GradientSums,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    prepare: Prepare | None = None,
) -> tuple[TrainState, Metrics]:
    """One update. The metrics are those of the parameters before it; only `param_norm` is after it: were they left finite?

    `load_imbalance` is the busiest expert's load over the mean, in the most uneven layer.
    """
    if prepare:
        batch = prepare(state.params, state.frozen, batch)
    gradients, metrics = mean_gradients(functools.partial(sums, frozen=state.frozen), state.params, batch)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    model = config.model
    if model.moe:
        load = metrics.pop("expert_load")
        metrics["load_imbalance"] = jnp.max(jnp.max(load, axis=-1) / jnp.mean(load, axis=-1))
        if model.moe.selection_bias:
            params = balance_experts(params, model, load)
    ema = state.ema
    if ema is not None:
        ema = optax.incremental_update(params, ema, 1 - config.optimizer.ema_decay)
    metrics |= {
        "grad_norm": optax.tree.norm(gradients),
        "param_norm": optax.tree.norm(params),
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
    }
    return TrainState(params, opt_state, ema, state.step + 1, state.frozen), metrics


def eval_step(params: Params, batch: Batch, model: ModelConfig, objective: Objective, layout: Layout | None) -> Metrics:
    """Sums over the weighted tokens of a held-out batch."""
    sums = objective(params, model, batch, layout)[1]
    return {name: total for name, total in sums.items() if name != "weight"}


def adapter_settings(settings: OptimizerConfig) -> OptimizerConfig:
    """Without the default rule for norms and biases: adapters have none, and a rule that applies to nothing is refused."""
    return dataclasses.replace(settings, rules=DEFAULT_RULES[-1:]) if settings.rules == DEFAULT_RULES else settings


def opt_state_shardings(
    opt_state: optax.OptState, specs: Params, of_params: Params, replicated: NamedSharding
) -> optax.OptState:
    """A leaf whose path ends like a parameter's, and has its shape, lives where that parameter does; the rest everywhere."""
    shapes = {path: spec.shape for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)}
    by_path = dict(jax.tree_util.tree_leaves_with_path(of_params))

    def sharding(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        # Factored second moments have a parameter's path, but another shape.
        candidates = [by_path[path[i:]] for i in range(len(path)) if shapes.get(path[i:]) == leaf.shape]
        return candidates[0] if candidates else replicated

    return jax.tree_util.tree_map_with_path(sharding, opt_state)


def abstract_batch(config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
    rows = (config.batch_size, config.data.seq_len)
    dtypes = BATCH_DTYPES | (PREFERENCE_DTYPES if config.objective else {})
    return {name: jax.ShapeDtypeStruct(rows, dtype) for name, dtype in dtypes.items()}


class Job(Protocol):
    """What updates are made of: pretraining's and fine-tuning's `TrainConfig`, or reinforcement learning's `RLConfig`."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def lora(self) -> LoraConfig | None: ...
    @property
    def distillation(self) -> DistillationConfig | None: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def mesh(self) -> MeshConfig: ...
    @property
    def accumulation(self) -> int: ...
    @property
    def num_updates(self) -> int: ...
    @property
    def update_rows(self) -> int: ...
    @property
    def row_tokens(self) -> int: ...
    @property
    def chunk_tokens(self) -> int: ...


def check_backends(config: Job, platform: str) -> None:
    """Raises ValueError where the network, or its teacher, attends by a backend for other devices than there are."""
    check_backend(config.model.attention_backend, platform)
    if config.distillation:
        check_backend(config.distillation.model.attention_backend, platform, "distillation.model")


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The compiled functions of a run and where its arrays live.

    Attributes:
      model: the network that is computed: that of the config or, over a rounded base, one with a head of its own.
      specs: of what is trained.
      init: (key) -> state with new weights; with a teacher, (key, its parameters).
      begin: (weights, key) -> state with these; the key draws the adapters of LoRA. With a teacher its parameters as well.
      freeze: weights -> `TrainState.frozen`, where that is not None.
      whole: (params or their average, frozen) -> parameters of `model`.
      step: (state, batch) -> (state, metrics); consumes the state.
      prepare: (parameters of `model`, `TrainState.frozen`, batch) -> what `evaluate` takes, where that is more than the batch.
      evaluate: (parameters of `model`, batch) -> sums.
      layout: of what is computed on the mesh; None on a single CPU device.
      abstract_state, abstract_weights: ShapeDtypeStruct with shardings, of the state and of what `begin` takes.
    """

    config: Any
    model: ModelConfig
    specs: Params
    mesh: Mesh
    init: Callable[..., TrainState]
    begin: Callable[..., TrainState]
    freeze: Callable[[Params], Params]
    whole: Callable[[Params, Params | None], Params]
    step: Any
    prepare: Any
    evaluate: Any
    abstract_state: TrainState
    abstract_weights: Params
    batch_sharding: NamedSharding
    layout: Layout | None


def make_trainer(config: TrainConfig, devices: Sequence[Any] | None = None) -> Trainer:
    """The trainer of a run that learns to write what it reads, or from preferences; see `make_trainer_of`."""
    weights = param_specs(config.model) | head_specs(config.objective, config.model)
    if config.distillation is not None:
        objective = functools.partial(distillation_sums, config=config.distillation, loss=config.loss)
        return make_trainer_of(config, objective, weights, devices, teacher=config.distillation.model)
    if config.objective is None:
        return make_trainer_of(config, next_token_objective(config.loss), weights, devices)
    objective = preference_objective(config.objective, config.loss)
    return make_trainer_of(config, objective, weights, devices, constants_of_update(config.objective, config.loss))


def make_trainer_of(
    config: Job,
    objective: Objective,
    weights: Params,
    devices: Sequence[Any] | None = None,
    prepare: Prepare | None = None,
    teacher: ModelConfig | None = None,
) -> Trainer:
    """Builds mesh, optimizer and compiled functions. Nothing is allocated.

    Args:
      weights: tree of ParamSpec: the parameters of `config.model`, and perhaps others that the objective reads.
      prepare: adds to a batch what is a constant of its update; the initial weights are then kept, as its reference.
      teacher: a network whose parameters are `TrainState.frozen`, and which the objective reads as `params[TEACHER]`.

    Raises:
      ValueError: the mesh does not fit the devices, the batch or a parameter does not divide over it, or the attention backend
        is for other devices.
    """
    devices = devices if devices is not None else jax.devices()
    mesh = make_mesh(mesh_sizes(config, len(devices), num_slices(devices)), devices)
    check_backends(config, mesh.devices.flat[0].platform)
    model, lora = config.model, config.lora
    specs = adapter_specs(model, lora) if lora else weights
    layout = Layout.of(mesh, TRAIN_RULES)
    # A batch arrives with whole rows; its tokens are dealt out along `context` in the step.
    rows = layout.sharding("batch")
    tokens = config.update_rows * config.row_tokens
    schedule = make_schedule(config.optimizer.schedule, config.optimizer.learning_rate, config.num_updates, tokens)
    optimizer = make_optimizer(adapter_settings(config.optimizer) if lora else config.optimizer, specs, schedule)
    replicated = layout.sharding()
    of_weights, of_params = param_shardings(weights, layout), param_shardings(specs, layout)

    def state_of(params: Params, frozen: Params | None) -> TrainState:
        ema = params if config.optimizer.ema_decay else None
        return TrainState(params, optimizer.init(params), ema, jnp.zeros((), jnp.int32), frozen)

    def freeze(base: Params) -> Params:
        # A copy: the update takes the memory of the parameters.
        return frozen_base(base, model, lora)[0] if lora else jax.tree.map(jnp.copy, base)

    abstract_frozen = of_frozen = None
    if lora or prepare:
        abstract_frozen = jax.eval_shape(freeze, abstract_params(weights))
        of_frozen = jax.tree.map(lambda _: replicated, abstract_frozen) if lora and lora.base_bits else of_weights
        freeze = jax.jit(freeze, out_shardings=of_frozen)
    elif teacher:
        of_teacher = param_specs(teacher)
        abstract_frozen, of_frozen = abstract_params(of_teacher), param_shardings(of_teacher, layout)
    network = dataclasses.replace(model, tie_embeddings=False) if lora and lora.base_bits else model
    abstract = jax.eval_shape(state_of, abstract_params(specs), abstract_frozen)
    of_opt_state = opt_state_shardings(abstract.opt_state, specs, of_params, replicated)
    of_ema = of_params if config.optimizer.ema_decay else None
    shardings = abstract.replace(params=of_params, opt_state=of_opt_state, ema=of_ema, step=replicated, frozen=of_frozen)
    make_state = jax.jit(state_of, out_shardings=shardings)

    def begin(base: Params, key: jax.Array, taught_by: Params | None = None) -> TrainState:
        frozen = freeze(base) if lora or prepare else taught_by
        return make_state(init_params(specs, key, of_params) if lora else base, frozen)

    def whole(params: Params, frozen: Params | None) -> Params:
        if teacher:
            return params | {TEACHER: frozen}
        return adapt(frozen, params, lora) if lora else params

    def with_sharding(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    on_cpu = mesh.devices.flat[0].platform == "cpu"
    # Without a layout operations are those of the machine that compiles: for another chip even a single one has a layout.
    of_step = None if on_cpu and mesh.size == 1 else layout
    # Routers are to be balanced over all replicas' tokens together.
    by_replica = on_cpu and 1 < mesh.size == mesh.shape["data"] and not model.moe
    sums = functools.partial(
        gradient_sums,
        model=network,
        objective=objective,
        accumulation=config.accumulation,
        whole=whole,
        layout=None if by_replica else of_step,
    )
    if by_replica:
        sums = over_replicas(sums, mesh)
    prepare_update: Prepare | None = None
    prepare_rows = None
    if prepare:
        add = functools.partial(prepare, model=network, layout=of_step)
        prepare_update = lambda params, frozen, batch: add(  # noqa: E731
            whole(params, frozen), frozen, batch, accumulation=config.accumulation
        )
        in_shardings = (whole(of_params, of_frozen), of_frozen, rows)
        prepare_rows = jax.jit(functools.partial(add, accumulation=1), in_shardings=in_shardings, out_shardings=rows)
    step = functools.partial(
        train_step, config=config, sums=sums, optimizer=optimizer, schedule=schedule, prepare=prepare_update
    )
    evaluate = functools.partial(eval_step, model=network, objective=objective, layout=of_step)
    return Trainer(
        config=config,
        model=network,
        specs=specs,
        mesh=mesh,
        init=lambda key, taught_by=None: begin(init_params(weights, key, of_weights), key, taught_by),
        begin=begin,
        freeze=freeze,
        whole=whole,
        prepare=prepare_rows,
        step=jax.jit(step, in_shardings=(shardings, rows), out_shardings=(shardings, replicated), donate_argnames="state"),
        evaluate=jax.jit(evaluate, in_shardings=(whole(of_params, of_frozen), rows), out_shardings=replicated),
        abstract_state=jax.tree.map(with_sharding, abstract, shardings),
        abstract_weights=jax.tree.map(with_sharding, abstract_params(weights), of_weights),
        batch_sharding=rows,
        layout=of_step,
    )


def mesh_sizes(config: Job, num_devices: int, slices: int = 1) -> dict[str, int]:
    """Sizes of the mesh's axes over so many devices, of all slices of a pod together.

    Raises:
      ValueError: they do not multiply to the number of devices, or the slices, the model or the batch do not divide over them.
    """
    sizes = resolve_sizes(dataclasses.asdict(config.mesh), num_devices, slices=slices)
    check_mesh(mesh_arrays(config), TRAIN_RULES, sizes, slices)
    return sizes


def mesh_arrays(config: Job) -> list[Dimensions]:
    """What a mesh must divide: all parameters, those of a head and of a teacher among them, rows and their tokens."""
    specs = param_specs(config.model)
    if isinstance(config, TrainConfig):
        specs |= head_specs(config.objective, config.model)
    if config.distillation is not None:
        specs |= {TEACHER: param_specs(config.distillation.model)}
    return dimensions(specs) + activations(config.update_rows // config.accumulation, config.row_tokens)

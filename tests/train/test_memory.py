"""What a step is planned to hold, against what arrays on virtual devices take and what XLA says of a step."""

import dataclasses
import math

import jax
import jax.extend
import jax.numpy as jnp
import pytest

from data.config import DataConfig, SourceConfig, TaskConfig, TokenizerConfig
from model.config import LoraConfig
from model.params import abstract_params, param_specs
from model.presets import preset
from model.sharding import MESH_AXES, TRAIN_RULES, Layout, make_mesh
from model.transformer import forward
from train.config import DistillationConfig, LossConfig, MeshConfig, OptimizerConfig, TrainConfig
from train.memory import expert_rows, plan_memory, plan_sampler
from train.objectives.config import KLConfig, PolicyConfig
from train.policy import Policy
from train.rl_config import RLConfig
from train.step import abstract_batch, make_trainer, mesh_sizes

DATA = DataConfig(
    sources=(SourceConfig(name="stdlib", kind="stdlib", held_out_fraction=0.1),),
    tokenizer=TokenizerConfig(kind="byte_bpe", vocab_size=300),
    seq_len=64,
)
CONFIG = TrainConfig(
    name="tiny",
    model=preset("tiny-llama", scan_layers=True, remat="full"),
    data=DATA,
    steps=10,
    batch_size=8,
    mesh=MeshConfig(data=2, fsdp=2, tensor=2),
)
MOE = preset("tiny-mixtral", max_seq_len=64)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_the_state_is_planned_to_the_byte(optimizer):
    chosen = OptimizerConfig(name=optimizer, adam_learning_rate=1e-3, ema_decay=0.9)
    config = dataclasses.replace(CONFIG, optimizer=chosen)
    state = make_trainer(config).init(jax.random.key(0))

    def on_first_device(tree):
        first = jax.devices()[0]
        return sum(s.data.nbytes for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards if s.device == first)

    plan = plan_memory(config, mesh_sizes(config, 8))
    assert plan["parameters"] == plan["moving average"] == plan["gradients"] == on_first_device(state.params)
    assert plan["optimizer state"] == on_first_device(state.opt_state)


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_what_adapters_adapt_is_planned_to_the_byte(bits):
    model = preset("tiny-llama", scan_layers=False)
    lora = LoraConfig(rank=2, base_bits=bits)
    config = dataclasses.replace(CONFIG, model=model, lora=lora, initial_weights="x", mesh=MeshConfig())
    frozen = jax.tree.leaves(make_trainer(config).abstract_state.frozen)
    on_each = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in frozen)
    assert plan_memory(config, mesh_sizes(config, 8))["frozen weights"] == on_each


@pytest.mark.parametrize("bits", [0, 8])
def test_a_reference_beside_adapters_is_adapters(bits):
    model = preset("tiny-llama", scan_layers=False)
    policy = PolicyConfig(kl=KLConfig(loss_coefficient=0.1))
    lora = LoraConfig(rank=2, base_bits=bits)
    config = RLConfig("tiny", model, "x", TaskConfig("reverse"), steps=1, lora=lora, policy=policy)
    trained = jax.tree.leaves(Policy(config, jax.devices()[:1]).trainer.abstract_state.params)
    assert plan_sampler(config, mesh_sizes(config, 1))["reference"] == sum(leaf.size * leaf.dtype.itemsize for leaf in trained)


def kept(plan):
    return next(size for name, size in plan.items() if name.startswith("activations"))


def test_full_remat_keeps_the_input_of_every_layer():
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_layers=6))
    rows, tokens, d_model = 2, 32, 64  # 8 rows over data 2 x fsdp 2; 64 tokens, split over tensor 2 between the layers
    planned = kept(plan_memory(config, mesh_sizes(config, 8)))
    assert planned == pytest.approx(6 * rows * tokens * d_model * 4, rel=0.04)  # and a few vectors


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize("shaped_like", [CONFIG.model.d_ff, CONFIG.model.d_model])
def test_activations_grow_with_the_row_even_where_they_are_shaped_like_parameters(policy, shaped_like):
    def at(seq_len):
        model = dataclasses.replace(CONFIG.model, remat=policy)
        config = dataclasses.replace(CONFIG, model=model, data=dataclasses.replace(DATA, seq_len=seq_len), mesh=MeshConfig())
        return kept(plan_memory(config, mesh_sizes(config, 1)))

    assert at(shaped_like - 8) < at(shaped_like) < at(shaped_like + 8)


def test_less_remat_keeps_more():
    sizes = []
    for policy in ("full", "dots", "none"):
        config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, remat=policy))
        sizes.append(kept(plan_memory(config, mesh_sizes(config, 8))))
    assert sizes[0] < sizes[1] < sizes[2]


def test_chunks_of_the_loss_need_less():
    whole = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, vocab_size=100_000))
    chunked = dataclasses.replace(whole, loss=LossConfig(chunk_tokens=64))
    plans = [plan_memory(config, mesh_sizes(config, 8))["the loss"] for config in (whole, chunked)]
    logits = 2 * 64 * 50_000 * 4  # of a device's 2 rows of 64 tokens, over tensor 2
    assert plans[0] - plans[1] == 2 * (logits - logits // 2)  # 64 tokens at once of 128


def temporaries(config):
    """Of the step on one CPU device: what the CPU's compiler calls so."""
    trainer = make_trainer(config, jax.devices()[:1])
    step = trainer.step.lower(trainer.abstract_state, abstract_batch(config))
    return step.compile().memory_analysis().temp_size_in_bytes


def planned_beside_state(config):
    state = ("parameters", "optimizer state", "moving average", "teacher")
    return sum(size for name, size in plan_memory(config, mesh_sizes(config, 1)).items() if name not in state)


def test_the_plan_of_a_wide_step_is_near_what_xla_takes():
    """Within a factor of 1.5."""
    model = preset("tiny-llama", num_layers=4, d_model=128, d_ff=512, scan_layers=True, remat="full", max_seq_len=256)
    data = dataclasses.replace(DATA, seq_len=256)
    config = dataclasses.replace(CONFIG, model=model, data=data, batch_size=16, mesh=MeshConfig(data=1))
    assert abs(math.log(planned_beside_state(config) / temporaries(config))) < math.log(1.5)


@pytest.mark.parametrize("chunk_tokens", [pytest.param(0, marks=pytest.mark.slow), 128])
def test_the_plan_counts_what_a_teacher_writes(chunk_tokens):
    """Its logits, and those of the student that are compared with them: most of the step, with a wide vocabulary."""
    model = preset("tiny-llama", vocab_size=4096, num_layers=1, scan_layers=True, remat="full")
    loss = LossConfig(chunk_tokens=chunk_tokens)
    taught = DistillationConfig("x", model)
    config = dataclasses.replace(CONFIG, model=model, loss=loss, distillation=taught, mesh=MeshConfig(data=1))
    assert abs(math.log(planned_beside_state(config) / temporaries(config))) < math.log(1.5)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=3), "must multiply to 8"),
        (MeshConfig(data=1, fsdp=2), "must multiply to 8"),
        (MeshConfig(data=-1, tensor=8), "does not divide over tensor=8"),  # 2 key-value heads
        (MeshConfig(data=4, expert=2), "nothing to split"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, message):
    config = dataclasses.replace(CONFIG, mesh=mesh)
    with pytest.raises(ValueError, match=message):
        plan_memory(config, mesh_sizes(config, 8))


def test_rows_that_do_not_divide_are_refused():
    config = dataclasses.replace(CONFIG, batch_size=6)
    with pytest.raises(ValueError, match="rows of a micro-batch"):
        mesh_sizes(config, 8)


def test_a_negative_size_takes_the_rest():
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=-1, fsdp=2, tensor=1))
    assert mesh_sizes(config, 8) == {"data": 4, "fsdp": 2, "expert": 1, "context": 1, "tensor": 1}


@pytest.mark.parametrize(("sizes", "experts_per_token"), [({"expert": 4}, 1), ({"expert": 4}, 3), ({"expert": 2}, 3)])
def test_rows_for_experts_are_those_that_the_layer_makes_room_for(sizes, experts_per_token):
    """The longest array of whole rows in the traced layer of one device."""
    moe = dataclasses.replace(MOE.moe, experts_per_token=experts_per_token)
    model = dataclasses.replace(MOE, moe=moe)
    layout = Layout.of(make_mesh(dict.fromkeys(MESH_AXES, 1) | sizes, jax.devices()[: sizes["expert"]]), TRAIN_RULES)
    row = jax.ShapeDtypeStruct((sizes["expert"], 16), jnp.int32)
    traced = jax.make_jaxpr(lambda params, x: forward(params, model, x, x, x, layout=layout)[0])
    lengths = [0]

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            lengths.extend(v.aval.shape[0] for v in equation.outvars if v.aval.shape[1:] == (model.d_model,))
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                visit(inner)

    visit(traced(abstract_params(param_specs(model)), row).jaxpr)
    assert max(lengths) == expert_rows(model, 16, sizes["expert"])[0]


@pytest.mark.parametrize("scanned", [True, False])
def test_room_for_experts_is_planned_whether_layers_are_scanned_or_not(scanned):
    def at(**sizes):
        model = dataclasses.replace(MOE, scan_layers=scanned, remat="none")
        config = dataclasses.replace(CONFIG, model=model, batch_size=4, mesh=MeshConfig(**sizes))
        return kept(plan_memory(config, mesh_sizes(config, 4)))

    # Of each layer, instead of up, gate and their product of every copy of a token: the rows of four devices.
    copies, rows = 64 * MOE.moe.experts_per_token, 4 * 64 * min(MOE.moe.experts_per_token, MOE.moe.num_experts // 4)
    hidden = at(data=4) - at(data=1, expert=4) + MOE.num_layers * 4 * rows * MOE.d_model
    assert hidden % (MOE.num_layers * 4 * copies * MOE.moe.d_ff) == 0
    assert hidden > 0

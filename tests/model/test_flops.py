"""What MFU is measured against, next to the products of the traced step."""

import dataclasses
import math

import jax
import pytest

from model.config import LoraConfig
from model.flops import forward_flops_per_token, matrix_flops_per_token, train_flops_per_token
from model.presets import preset
from tests.train.test_step import CONFIG
from train.step import abstract_batch, make_trainer

LENGTH = 64


def product_flops(jaxpr):
    """2 for each multiplication of every dot_general, those in a scan as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            total += times * product_flops(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["all", "lora"])
def test_a_step_takes_the_products_that_are_counted(lora):
    """As traced: its attention, by plain JAX, also meets keys that come later."""
    model = preset("tiny-llama", num_layers=2, scan_layers=False, attention_backend="reference", remat="none")
    data = dataclasses.replace(CONFIG.data, seq_len=LENGTH)
    config = dataclasses.replace(CONFIG, model=model, data=data, lora=lora, initial_weights="x" if lora else "")
    trainer = make_trainer(config, jax.devices()[:1])
    done = product_flops(jax.make_jaxpr(trainer.step)(trainer.abstract_state, abstract_batch(config)).jaxpr)
    causal = forward_flops_per_token(model, LENGTH) - sum(matrix_flops_per_token(model).values())
    all_pairs = model.num_layers * 2 * model.num_heads * (model.head_dim + model.v_head_dim) * LENGTH
    counted = train_flops_per_token(model, LENGTH, lora) + 3 * (all_pairs - causal)
    if lora:
        # Nothing asks for the gradient of what enters the first layer, through queries, keys, values and their adapters. The
        # head's own is traced, by the rule of the loss, and dropped by the compiler, since nothing asks for it either.
        width = model.num_heads * model.head_dim + 2 * model.num_kv_heads * model.head_dim
        counted += 2 * model.d_model * (model.vocab_size - width - 3 * lora.rank)
    assert done == counted * config.tokens_per_step

"""Adapters against `peft` itself: what it computes with ours, and what we compute with its own."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from inference.models import open_model
from model.config import LoraConfig, ModelConfig
from model.convert.huggingface import save
from model.convert.peft import load_adapters, save_adapters
from model.lora import adapt, adapter_specs
from model.params import is_spec
from model.presets import preset
from model.transformer import forward, unembed
from tests.networks import random_params

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CONFIG = ModelConfig(vocab_size=64, num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48, max_seq_len=32)
TOKENS = np.random.default_rng(1).integers(0, 64, (2, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Our parameters, and the directory of the same model as transformers reads it."""
    directory = tmp_path_factory.mktemp("base") / "model"
    params = random_params(CONFIG)
    save(directory, params, CONFIG)
    return params, directory


def theirs(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")


def logits_of_theirs(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS.astype(np.int64))).logits.numpy()


def logits_of_ours(params, config=CONFIG):
    places = np.broadcast_to(np.arange(TOKENS.shape[1], dtype=np.int32), TOKENS.shape)
    return np.asarray(unembed(params, config, forward(params, config, TOKENS, places)[0]))


def random_adapters(config, lora):
    random = np.random.default_rng(2)
    draw = lambda spec: 0.2 * random.standard_normal(spec.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, adapter_specs(config, lora), is_leaf=is_spec)


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(3, 6.0, ("query", "key", "value", "out", "gate", "up", "down")),
        LoraConfig(2, 5.0, ("value", "down")),
    ],
    ids=["all", "two"],
)
def test_peft_computes_with_our_adapters_what_we_do(base, tmp_path, lora):
    params, directory = base
    adapters = random_adapters(CONFIG, lora)
    save_adapters(tmp_path / "adapter", adapters, CONFIG, lora, base=str(directory))
    model = peft.PeftModel.from_pretrained(theirs(directory), tmp_path / "adapter")
    ours = logits_of_ours(adapt(params, adapters, lora))
    np.testing.assert_allclose(logits_of_theirs(model), ours, rtol=1e-4, atol=2e-4)
    assert np.abs(ours - logits_of_ours(params)).max() > 0.1
    merged = model.merge_and_unload()
    np.testing.assert_allclose(logits_of_theirs(merged), ours, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("options", "targets"),
    [
        ({"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8}, {"query", "value"}),
        ({"target_modules": "all-linear", "r": 2, "lora_alpha": 3}, {"query", "key", "value", "out", "gate", "up", "down"}),
        ({"target_modules": ["v_proj"], "r": 4, "lora_alpha": 8, "use_rslora": True}, {"value"}),
        ({"target_modules": ["o_proj"], "r": 2, "lora_alpha": 8, "layers_to_transform": [1]}, {"out"}),
        (
            {"target_modules": "all-linear", "exclude_modules": ["q_proj", "up_proj"], "r": 2},
            {"key", "value", "out", "gate", "down"},
        ),
        ({"target_modules": ["q_proj"], "r": 4, "init_lora_weights": "gaussian"}, {"query"}),
        ({"target_modules": ["q_proj"], "r": 4, "init_lora_weights": "orthogonal"}, {"query"}),
    ],
    ids=["two", "all", "rank-stabilised", "one layer", "excluded", "gaussian", "orthogonal"],
)
def test_we_compute_with_the_adapters_of_peft_what_it_does(base, tmp_path, options, targets):
    params, directory = base
    model = peft.get_peft_model(theirs(directory), peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1, **options)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.normal_(std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    adapters, lora = load_adapters(tmp_path / "adapter", CONFIG)
    assert set(lora.targets) == targets
    assert lora.rank == options["r"]
    expected = logits_of_theirs(model)
    np.testing.assert_allclose(logits_of_ours(adapt(params, adapters, lora)), expected, rtol=1e-4, atol=2e-4)
    assert np.abs(expected - logits_of_ours(params)).max() > 0.1


OTHERS = [
    {"use_dora": True},
    {"rank_pattern": {"q_proj": 3}},
    {"alpha_pattern": {"q_proj": 3}},
    {"modules_to_save": ["lm_head"]},
    {"bias": "all"},
    {"lora_bias": True},
    {"trainable_token_indices": [1, 2]},
    {"layer_replication": [(0, 2), (1, 3)]},
    {"alora_invocation_tokens": [1, 2]},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "olora"},
]


def test_what_peft_writes_and_we_do_not_know_is_refused(base, tmp_path):
    _, directory = base
    for number, options in enumerate(OTHERS):
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2, **options)
        peft.get_peft_model(theirs(directory), config).save_pretrained(tmp_path / str(number))
        with pytest.raises(ValueError, match=f"{next(iter(options))}=.* (is not implemented|changes the base)"):
            load_adapters(tmp_path / str(number), CONFIG)


def test_layers_that_are_stacked_have_the_same_files(base, tmp_path):
    lora = LoraConfig(2, 4.0, ("query", "up"))
    stacked = dataclasses.replace(CONFIG, scan_layers=True)
    adapters = random_adapters(stacked, lora)
    save_adapters(tmp_path / "adapter", adapters, stacked, lora)
    model = peft.PeftModel.from_pretrained(theirs(base[1]), tmp_path / "adapter")
    plain, _ = load_adapters(tmp_path / "adapter", CONFIG)
    np.testing.assert_allclose(logits_of_theirs(model), logits_of_ours(adapt(base[0], plain, lora)), rtol=1e-4, atol=2e-4)


def test_adapters_that_begin_with_a_part_of_the_base_are_read_once_peft_has_put_it_back(base, tmp_path):
    """PiSSA's, as peft writes them with what they began with: of twice the rank, for the base as it was."""
    params, directory = base
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2, init_lora_weights="pissa")
    model = peft.get_peft_model(theirs(directory), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "begun")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.add_(torch.full_like(weight, 0.1))
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "begun"))
    adapters, lora = load_adapters(tmp_path / "adapter", CONFIG)
    assert lora.rank == 4
    np.testing.assert_allclose(
        logits_of_ours(adapt(params, adapters, lora)), logits_of_theirs(model.eval()), rtol=1e-4, atol=2e-4
    )


def test_a_layout_with_inputs_first_has_the_same_adapters(tmp_path):
    """GPT-2's, where peft sets fan_in_fan_out; what it keeps together with others is refused."""
    sizes = {"vocab_size": 64, "num_layers": 2, "max_seq_len": 32, "dtype": "float32", "param_dtype": "float32"}
    gpt2 = dataclasses.replace(preset("tiny-gpt2"), **sizes)
    params, lora = random_params(gpt2), LoraConfig(2, 3.0, ("down", "out", "up"))
    save(tmp_path / "base", params, gpt2)
    adapters = random_adapters(gpt2, lora)
    save_adapters(tmp_path / "ours", adapters, gpt2, lora)
    model = peft.PeftModel.from_pretrained(theirs(tmp_path / "base"), tmp_path / "ours")
    expected = logits_of_ours(adapt(params, adapters, lora), gpt2)
    np.testing.assert_allclose(logits_of_theirs(model), expected, rtol=1e-4, atol=2e-4)
    model.save_pretrained(tmp_path / "theirs")
    back, found = load_adapters(tmp_path / "theirs", gpt2)
    assert (found.rank, found.alpha, found.targets) == (2, 3.0, lora.targets)
    jax.tree.map(np.testing.assert_array_equal, back, adapters)
    with pytest.raises(ValueError, match="gpt2 keeps blocks/0/attention/query in"):
        save_adapters(tmp_path / "no", adapters, gpt2, LoraConfig())


def test_what_peft_saves_is_opened_as_a_model_with_its_base(base, tmp_path):
    """The base is named by peft itself; ours computes what theirs does after it has merged."""
    tokenizer = tmp_path / "tokens"
    shutil.copytree(base[1], tokenizer)
    alphabet = {token: i for i, token in enumerate(["a", "b", "c"])}
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE(alphabet, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.save(str(tokenizer / "tokenizer.json"))
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(theirs(tokenizer), config)
    adapted.save_pretrained(tmp_path / "adapter")
    opened = open_model(tmp_path / "adapter")
    expected = logits_of_theirs(adapted.merge_and_unload())
    np.testing.assert_allclose(logits_of_ours(opened.params, opened.config), expected, rtol=1e-4, atol=2e-4)
    assert np.abs(expected - logits_of_ours(base[0])).max() > 0.01

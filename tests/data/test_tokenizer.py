import pickle

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from data.config import TokenizerConfig
from data.tokenizer import Tokenizer, load_tokenizer, split_text, train_tokenizer

OPEN_KINDS = ("bytes", "byte_bpe", "wordpiece", "spm_bpe", "spm_unigram")
TEXTS = [
    "def f(x):\n    if x:\n        return [x, 1234, 'naïve']\n\treturn None\n\n\n" * 5,
    "The quick brown fox jumps over the lazy dog, and the dog's owner laughs.\r\n" * 5,
    "日本語のテキスト、한국어, ελληνικά и кириллица. <eos> <0x0A> ##a \u2581\n" * 5,
    "".join(f"word{i % 37} number {i * i} and-some-more {chr(97 + i % 26) * (i % 5)}\n" for i in range(400)),
]
# What tokenizers trip over: their own markers, control characters, whitespace of every kind, marks without a letter.
AWKWARD = st.sampled_from(
    ["\u2581", " ", "  ", "\n", "\r\n", "\t", "\0", "\x1b", "\x7f", "\x85", "\u2028", "\ufeff", "\u0301", "\u200d", "😀"]
) | st.sampled_from(
    ["<bos>", "<eos>", "<unk>", "<s>", "<0x41>", "##a", "Ġ", "Ċ", "␀", "漢字", "'s", "12345", " x", "def f():\n        "]
)
ANY_TEXT = st.lists(AWKWARD | st.text(max_size=8)).map("".join)


@pytest.fixture(scope="module", params=OPEN_KINDS)
def tokenizer(request) -> Tokenizer:
    return train_tokenizer(TokenizerConfig(kind=request.param, vocab_size=400), TEXTS)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(text=ANY_TEXT)
def test_every_text_comes_back_and_token_bytes_add_up(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[np.array(ids, int)].sum() == len(text.encode())
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_decoding_token_by_token_gives_the_same_bytes(tokenizer):
    ids = tokenizer.encode(TEXTS[2])
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == TEXTS[2].encode()
    assert tokenizer.decode(ids[:1] + ids[-1:])  # a cut through a character is no error


def test_vocabulary_size_and_special_tokens(tokenizer):
    assert tokenizer.vocab_size == (258 if tokenizer.kind == "bytes" else 400) == tokenizer.byte_lengths.size
    assert tokenizer.byte_lengths[[tokenizer.bos_id, tokenizer.eos_id]].tolist() == [0, 0]
    assert tokenizer.encode_prompt("a") == [tokenizer.bos_id, *tokenizer.encode("a")]


def test_an_answer_shows_where_it_holds_tokens_that_are_no_text(tokenizer):
    a, b, text = tokenizer.encode("a"), tokenizer.encode("b"), TEXTS[2]
    assert tokenizer.decode_answer(tokenizer.encode(text)) == text
    for token in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size, -1):
        assert tokenizer.decode_answer([*a, token, *b]) == "a\ufffdb"
    assert tokenizer.decode_answer([*tokenizer.encode("é")[:1], tokenizer.bos_id]) in ("\ufffd\ufffd", "é\ufffd")


@pytest.mark.parametrize("kind", OPEN_KINDS)
def test_without_document_boundaries_there_are_no_special_tokens(kind):
    config = TokenizerConfig(kind=kind, vocab_size=400, document_boundaries=False)
    tokenizer = train_tokenizer(config, TEXTS)
    assert tokenizer.bos_id is None
    assert tokenizer.eos_id is None
    assert tokenizer.vocab_size == (256 if kind == "bytes" else 400)
    assert tokenizer.encode_prompt("a") == tokenizer.encode("a")


def test_training_twice_gives_the_same_fingerprint_and_other_text_another(tokenizer):
    config = TokenizerConfig(kind=tokenizer.kind, vocab_size=400)
    assert train_tokenizer(config, list(TEXTS)).fingerprint == tokenizer.fingerprint
    if tokenizer.kind != "bytes":
        assert train_tokenizer(config, [*TEXTS[::-1], "zebra crossing " * 99]).fingerprint != tokenizer.fingerprint


def test_saved_loaded_and_pickled_tokenizers_encode_alike(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for copy in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.fingerprint == tokenizer.fingerprint
        assert copy.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
        assert copy.bos_id == tokenizer.bos_id


def test_a_changed_model_file_is_noticed(tmp_path):
    train_tokenizer(TokenizerConfig(kind="chars"), ["abc"]).save(tmp_path)
    (tmp_path / "chars.txt").write_text("abd")
    with pytest.raises(ValueError, match="changed or damaged"):
        load_tokenizer(tmp_path)


def test_loading_from_elsewhere_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no saved tokenizer in .*data\.tokenizer\.path"):
        load_tokenizer(tmp_path)


def test_chars_are_the_sorted_characters_and_name_an_unknown_one():
    tokenizer = train_tokenizer(TokenizerConfig(kind="chars", document_boundaries=False), ["hello\n", "wörld"])
    assert tokenizer.vocab_size == len(set("hello\nwörld"))
    assert tokenizer.encode("\nd") == [0, 1]
    assert tokenizer.decode(tokenizer.encode("öhello")) == "öhello"
    assert tokenizer.byte_lengths[tokenizer.encode("ö")].tolist() == [2]
    with pytest.raises(ValueError, match=r"never seen 'z' \(U\+007A\)"):
        tokenizer.encode("jazz"[2:])


def test_merges_keep_indentation_together():
    config = TokenizerConfig(kind="byte_bpe", vocab_size=276)
    tokenizer = train_tokenizer(config, ["def f():\n        return 123456\n" * 50])
    assert b"       " in tokenizer.token_bytes  # the eighth space belongs to the word
    assert {token for token in tokenizer.token_bytes if token.isdigit() and len(token) > 2} == {b"123", b"456"}


@pytest.mark.parametrize("bad", [-1, 258, 10**6])
def test_an_id_out_of_range_is_named(bad):
    tokenizer = train_tokenizer(TokenizerConfig(kind="bytes"), [])
    with pytest.raises(ValueError, match=rf"token id {bad} is outside the vocabulary \[0, 258\)"):
        tokenizer.decode([65, bad])


@pytest.mark.parametrize("kind", ["byte_bpe", "wordpiece", "spm_bpe", "spm_unigram"])
def test_a_vocabulary_that_the_text_cannot_fill_names_the_largest_that_it_can(kind):
    texts = ["abc def abc é日\n" * 3]
    with pytest.raises(ValueError, match=r"at most (\d+) entries") as caught:
        train_tokenizer(TokenizerConfig(kind=kind, vocab_size=5000), texts)
    largest = int(str(caught.value).split("at most ")[1].split()[0])
    assert train_tokenizer(TokenizerConfig(kind=kind, vocab_size=largest), texts).vocab_size == largest


@hypothesis.given(text=st.text(alphabet="ab \n", max_size=60), limit=st.integers(1, 20))
def test_split_text_loses_nothing_and_keeps_the_limit(text, limit):
    pieces = list(split_text(text, limit))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces)


def test_split_text_prefers_lines_then_words():
    assert list(split_text("one two\nthree four five", 12)) == ["one two\n", "three four", " five"]

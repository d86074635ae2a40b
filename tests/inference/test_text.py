"""Streams of text: every border of bytes, characters and stop strings, against decoding the whole at once."""

import collections
import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from inference.request import Request, Token
from inference.text import Answers, TextStream

BYTES = (*(bytes([i]) for i in range(256)), b"")
STRINGS = st.text(st.sampled_from("abc€😀é "), max_size=12)
SIZES = st.lists(st.integers(0, 6), max_size=12)


def streamed(tokens, stop=(), min_tokens=0):
    """(pieces, whether it stopped) of bytes as tokens, as far as they are needed."""
    stream, pieces = TextStream(tokens, stop, min_tokens), []
    for token in range(len(tokens)):
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream.stopped


def cut(data, sizes):
    """Tokens of so many bytes each, and the rest."""
    ends = list(itertools.accumulate(sizes))
    return [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)], strict=True)]


@given(st.binary(max_size=24), SIZES)
def test_pieces_together_are_the_text_and_none_breaks_a_character(data, sizes):
    pieces, _ = streamed(cut(data, sizes))
    assert "".join(pieces) == data.decode("utf-8", errors="replace")
    for end in range(len(pieces)):
        shown = "".join(pieces[:end])
        assert "".join(pieces).startswith(shown)


@given(STRINGS, st.lists(STRINGS.filter(bool), min_size=1, max_size=3), SIZES, st.sampled_from([0, 0, 0, 1, 2, 4]))
@example("abcd", ["abcd", "bc"], [4], 0)
@example("abcd", ["abcd", "bc"], [1, 1, 1], 0)
@example("abcabcd", ["abcd", "bc"], [3, 1, 1, 1], 2)
@example("abcab", ["abcd", "bc"], [3, 1], 2)
def test_nothing_of_a_stop_string_is_ever_shown(text, stop, sizes, min_tokens):
    """But of those that are complete before the least number of tokens."""
    tokens = cut(text.encode(), sizes)
    pieces, stopped = streamed(tokens, stop, min_tokens)
    # The stop string that is complete first ends the answer; of those that are at once, the one that began first.
    too_early = len(b"".join(tokens[: max(min_tokens - 1, 0)]).decode(errors="ignore"))
    prefixes = [text[:end] for end in range(too_early + 1, len(text) + 1)]
    complete = next((prefix for prefix in prefixes if prefix.endswith(tuple(stop))), None)
    assert stopped == (complete is not None)
    expected = text if complete is None else min((complete.removesuffix(s) for s in stop), key=len)
    assert "".join(pieces) == expected


@given(STRINGS, st.lists(STRINGS.filter(bool), max_size=2))
def test_text_is_held_back_only_while_it_could_become_a_stop_string(text, stop):
    stream, shown = TextStream(BYTES, stop), ""
    for token in text.encode():
        shown += stream.push(token)
        if stream.stopped:
            return
        seen = text.encode()[: len(shown.encode()) + 40].decode(errors="ignore")
        held = text[len(shown) :]
        assert seen.startswith(shown)
        assert len(held) == 0 or text.startswith(shown)
    held = text[len(shown) :]
    assert not held or any(s.startswith(held) for s in stop)


def test_special_tokens_and_those_beyond_the_tokenizer_have_no_text():
    stream = TextStream(BYTES)
    assert [stream.push(token) for token in (65, 256, 999, 66)] == ["A", "", "", "B"]


def test_each_sample_of_a_request_has_its_own_text():
    answers = Answers(Request([1]), BYTES, ["b"])
    watchers = {sample: answers.request.watch(sample) for sample in (3, 4)}
    texts = collections.defaultdict(str)
    for sample, token in [(3, 65), (4, 0xE2), (4, 0x82), (3, 98), (4, 0xAC), (4, 65)]:
        stops = watchers[sample](token)
        reason = "stop" if stops else "length" if (sample, token) == (4, 65) else None
        texts[sample] += answers.text(Token(0, sample, token, 0.0, 0.0, None, None, reason))
    assert texts == {3: "A", 4: "€A"}


def test_an_empty_stop_string_and_a_second_watcher_are_refused():
    with pytest.raises(ValueError, match="a stop string is empty"):
        Answers(Request([1]), BYTES, ["a", ""])
    with pytest.raises(ValueError, match="is watched already"):
        Answers(Answers(Request([1]), BYTES).request, BYTES)

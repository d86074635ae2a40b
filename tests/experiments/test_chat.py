"""A talk in the terminal with a model of random weights, and its speed measured."""

import dataclasses
import json
import os
import pty
import select
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from data.tokenizer import open_huggingface_tokenizer
from experiments import bench_infer, chat, sampling
from experiments.chat import Conversation
from inference.config import EngineConfig
from inference.engine import Engine
from inference.models import LoadedModel
from inference.sampling import Sampling
from inference.speculate import guesser
from model.params import param_specs
from model.presets import preset
from tests.networks import random_params

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
START, END = "<|im_start|>", "<|im_end|>"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A byte-level tokenizer with two special tokens, by the library that reads it."""
    tokenizers = pytest.importorskip("tokenizers")
    directory = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([START, END])
    made.save(str(directory / "tokenizer.json"))
    tokenizer = open_huggingface_tokenizer(directory)
    config = preset("tiny-llama", vocab_size=300, max_seq_len=512)
    stop_ids = frozenset({tokenizer.special_tokens[END]})
    assert param_specs(config)
    return LoadedModel(random_params(config), config, tokenizer, TEMPLATE, stop_ids, "tiny")


def talk(monkeypatch, loaded, lines, **options):
    """What is written when these lines are typed."""
    monkeypatch.setattr(chat, "open_to_decode", lambda arguments: loaded)
    defaults = {
        "prompt": None,
        "seed": 0,
        "system": "",
        "max_tokens": 12,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "cache_dtype": "model",
        "guesses": 0,
        "draft": None,
    }
    arguments = types.SimpleNamespace(source="tiny", context=512, **(defaults | options))
    typed, written = iter(lines), []

    def read(_prompt):
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line

    chat.chat(arguments, read, written.append)
    return "".join(written)


def test_one_prompt_gets_one_answer_and_the_end(monkeypatch, loaded):
    first = talk(monkeypatch, loaded, [], prompt="Hello")
    assert first == talk(monkeypatch, loaded, [], prompt="Hello")
    assert first.endswith("\n")
    assert first != talk(monkeypatch, loaded, [], prompt="Bye")


def test_a_conversation_is_remembered_saved_and_forgotten(monkeypatch, loaded, tmp_path):
    saved = tmp_path / "talk.json"
    written = talk(monkeypatch, loaded, ["/system Be brief.", "Hi", "And?", f"/save {saved}", "/reset", "Hi", "/quit", "no"])
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[0]["content"] == "Be brief."
    alone = talk(monkeypatch, loaded, ["Hi"])
    # After /reset the answer is what it is without the system's message.
    assert written.endswith(alone.split("\n", 1)[1])
    assert messages[2]["content"] in written


def test_what_is_asked_again_is_answered_anew_and_the_same_talk_is_the_same(monkeypatch, loaded):
    def answers(*lines, **options):
        return talk(monkeypatch, loaded, lines, temperature=1.0, **options).split("\n", 1)[1]

    thrice = answers("Hi", "/reset", "Hi", "/system", "Hi")  # the same prompt each time
    assert thrice == answers("Hi", "/reset", "Hi", "/system", "Hi")
    firsts = [answers("Hi", seed=seed) for seed in range(3)]
    twice = answers("Hi", "/reset", "Hi")
    assert twice.startswith(firsts[0])
    assert thrice.startswith(twice)
    assert len({firsts[0], twice.removeprefix(firsts[0]), thrice.removeprefix(twice)}) == 3
    assert not any(first in thrice for first in firsts[1:])  # no answer of one talk is that of another's
    with pytest.raises(ValueError, match=r"--seed=-1 must lie in \[0, 2\^32\)"):
        answers("Hi", seed=-1)


def test_the_model_reads_the_whole_conversation_through_its_template(loaded):
    conversation = Conversation(loaded, Sampling(temperature=0.0), 8, 0, 512)
    conversation.reset("S")
    "".join(conversation.answer("one"))
    said = conversation.messages[-1]["content"]
    ids = conversation._prompt([*conversation.messages, {"role": "user", "content": f"two {END}"}])
    conversation.close()
    special = loaded.tokenizer.special_tokens
    text = "".join(
        next((text for text, i in special.items() if i == token), loaded.tokenizer.decode_bytes([token]).decode("latin-1"))
        for token in ids
    )
    expected = f"{START}system\nS{END}\n{START}user\none{END}\n{START}assistant\n{said}{END}\n{START}user\ntwo {END}{END}\n"
    assert text == expected.encode().decode("latin-1") + f"{START}assistant\n"
    # What the user spells is text: five turns begin, and four end, of which none is the user's.
    assert ids.count(special[START]) == 5
    assert ids.count(special[END]) == 4


def test_what_is_wrong_with_a_line_is_told_and_the_talk_goes_on(monkeypatch, loaded):
    written = talk(monkeypatch, loaded, ["/save", "/nonsense", "x" * 600, "/save /nowhere/at/all", "Hi"])
    assert "/save needs the name of a file" in written
    assert "begin anew with /reset" in written
    assert "/nowhere/at/all" in written
    assert written.count("/system TEXT") == 2


def test_an_answer_that_fails_does_not_lose_the_talk(monkeypatch, loaded, tmp_path):
    """What follows one of the user's words overflows; it is told why, and what was said before and after stays."""
    bad, saved = loaded.tokenizer.encode("~")[0], tmp_path / "talk.json"
    overflows = loaded.params | {"embedding": loaded.params["embedding"].at[bad].set(np.nan)}
    ill = dataclasses.replace(loaded, params=overflows)
    written = talk(monkeypatch, ill, ["Hi", "~", "And?", f"/save {saved}"], max_tokens=3)
    assert "its logits are not finite: the logits after token" in written
    said = [(message["role"], message["content"]) for message in json.loads(saved.read_text())["messages"]]
    assert [role for role, _ in said] == ["user", "assistant", "user", "assistant"]
    assert [said[0][1], said[2][1]] == ["Hi", "And?"]


def test_a_model_without_a_template_continues(monkeypatch, loaded):
    bare = LoadedModel(loaded.params, loaded.config, loaded.tokenizer, None, loaded.stop_ids, "bare")
    assert talk(monkeypatch, bare, [], prompt="def main(")


# Each piece but the first of an answer comes only after a byte on the standard input.
ANSWERS_IN_PIECES = """
import os, types
from experiments import chat

class InPieces:
    def __init__(self, *_): pass
    def reset(self, system): pass
    def close(self): pass
    def answer(self, text):
        yield text + ":one "
        for piece in ("two ", "three"):
            os.read(0, 1)
            yield piece

chat.Conversation, chat.open_to_decode = InPieces, lambda arguments: types.SimpleNamespace(name="fake")
options = dict(temperature=0, top_k=0, top_p=1, min_p=0, seed=0, max_tokens=4, context=64, system="")
options |= dict(source="tiny", cache_dtype="model", guesses=0, draft=None)
chat.chat(types.SimpleNamespace(prompt="alone", **options))
lines = iter(["typed", "/quit"])
chat.chat(types.SimpleNamespace(prompt=None, **options), read=lambda prompt: next(lines))
"""


def test_an_answer_is_shown_in_a_terminal_piece_by_piece():
    ours, terminal = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", ANSWERS_IN_PIECES]
    with subprocess.Popen(command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=terminal, bufsize=0) as process:
        os.close(terminal)
        assert process.stdin is not None
        shown = ""
        try:
            for piece in ("alone:one ", "two ", "three\r\n", "typed:one ", "two ", "three\r\n"):
                while piece not in shown:
                    assert select.select([ours], [], [], 60)[0], f"{piece!r} is not shown: {shown!r}"
                    shown += os.read(ours, 100).decode()
                shown = shown.split(piece, 1)[1]
                if not piece.endswith("\n"):
                    process.stdin.write(b"+")
        finally:
            process.stdin.close()
            process.kill()
            os.close(ours)


def test_only_steps_that_give_each_row_a_token_are_timed(monkeypatch, loaded):
    """By a clock on which a step takes as long as it gives tokens. Rows begin one after the other."""
    clock = [0.0]

    class Timed(Engine):
        def step(self):
            tokens = super().step()
            clock[0] += len(tokens)
            return tokens

    monkeypatch.setattr(bench_infer.time, "perf_counter", lambda: clock[0])
    engine = Timed(loaded.params, loaded.config, EngineConfig(max_batch=4, cache_tokens=256, page_size=16, prefill_chunk=9))
    found = bench_infer.measure(engine, 4, 9, 3, 1e9)
    assert (found.first_token_seconds, found.token_seconds, found.tokens_per_second) == (1 + 2 + 3 + 4, 4, 1)


def test_what_is_guessed_right_counts_as_speed(monkeypatch, loaded):
    """By a clock on which each step takes 1, and a draft model that is always right: three tokens a row and step."""
    clock = [0.0]

    class Timed(Engine):
        def step(self):
            clock[0] += 1
            return super().step()

    monkeypatch.setattr(bench_infer.time, "perf_counter", lambda: clock[0])
    config = EngineConfig(max_batch=4, cache_tokens=512, page_size=16, prefill_chunk=9, num_guesses=2)
    guess = guesser(
        config, loaded.config.vocab_size, dataclasses.replace(loaded, tokenizer=types.SimpleNamespace(vocab_size=300))
    )
    found = bench_infer.measure(Timed(loaded.params, loaded.config, config, guess=guess), 4, 9, 3, 1e9)
    assert (found.accepted_share, found.token_seconds, found.tokens_per_second) == (1, pytest.approx(1 / 3), 12)
    weights = bench_infer.weight_bytes(loaded.params, loaded.config)
    assert found.bandwidth_share == pytest.approx(weights / 1e9)  # once a step


def test_speed_is_measured_with_one_line_of_json_at_the_end(monkeypatch, capsys, loaded):
    monkeypatch.setattr(sampling, "open_any", lambda *_: loaded)
    monkeypatch.setattr(bench_infer, "read_bandwidth", lambda num_devices: 1e9 * num_devices)
    sizes = {"batch_sizes": "2,1", "prompt_tokens": 9, "new_tokens": 3}
    options = {
        "source": "tiny",
        **sizes,
        "dtype": None,
        "weights": None,
        "tensor": 1,
        "cache_dtype": "model",
        "guesses": 0,
        "draft": None,
    }
    bench_infer.bench(types.SimpleNamespace(**options))
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["batch"] for row in summary["batches"]] == [1, 2]
    for row in summary["batches"]:
        assert row["tokens_per_second"] == pytest.approx(row["batch"] / row["token_seconds"])
        assert row["first_token_seconds"] > 0
    weights = bench_infer.weight_bytes(loaded.params, loaded.config)
    leaves = {name: leaf for name, leaf in loaded.params.items() if name != "embedding"}
    import jax

    assert weights == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(leaves))
    assert (summary["dtype"], summary["weights"], summary["tensor"]) == ("float32", "float32", 1)
    row = summary["batches"][0]
    assert row["bandwidth_share"] == pytest.approx(weights / row["token_seconds"] / 1e9)

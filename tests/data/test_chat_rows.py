"""From files of chats to batches: every token and weight against the examples, encoded one by one."""

import dataclasses
import json
import pickle
import random

import numpy as np
import pytest

from data.chat import import_row
from data.chat_encoder import DEFAULT_TEMPLATE, ChatEncoder
from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.loader import Batches, held_out_batches, load
from data.prepare import prepare
from data.tokenizer import train_tokenizer

SEQ_LEN = 128
ENCODER = ChatEncoder(train_tokenizer(TokenizerConfig("bytes"), []))


def word(rng):
    return "".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, 12)))


def rows_of(content, number=60, seed=0):
    rng = random.Random(seed)
    rows = []
    for i in range(number):
        prompt = {"prompt": f"{i}: {word(rng)}"}
        if content == "conversations":
            turns = [
                {"role": ("user", "assistant")[k % 2], "content": f"{i} {word(rng)}"} for k in range(2 * rng.randint(1, 2))
            ]
            rows.append({"messages": turns})
        elif content == "pairs":
            rows.append(prompt | {"chosen": f"{word(rng)}+", "rejected": f"{word(rng)}-", "margin": i / 4})
        elif content == "labels":
            rows.append(prompt | {"completion": f"{i}={word(rng)}", "label": i % 3 == 0})
        else:
            rows.append(prompt | {"answer": str(i)})
    return rows


def job(tmp_path, content, rows=None, **options):
    rows = rows_of(content) if rows is None else rows
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(
        **{
            "sources": (SourceConfig("chats", "files", path=str(path), held_out_fraction=0.2),),
            "content": content,
            "tokenizer": TokenizerConfig("bytes"),
            "seq_len": SEQ_LEN,
            "cache_dir": str(tmp_path / "cache"),
            **options,
        }
    )
    lines = []
    return prepare(config, log=lines.append), config, lines


def segments(batch):
    """(ids, trained ids) of each segment of each row, in order; every check of its frame on the way."""
    found = []
    for r in range(len(batch["tokens"])):
        row = {key: value[r] for key, value in batch.items()}
        real = row["segment_ids"] > 0
        assert not row["weights"][~real].any()
        assert (np.diff(row["segment_ids"][real]) >= 0).all()
        for s in range(1, row["segment_ids"].max() + 1):
            here = row["segment_ids"] == s
            np.testing.assert_array_equal(row["positions"][here], np.arange(here.sum()))
            np.testing.assert_array_equal(row["tokens"][here][1:], row["targets"][here][:-1])
            ids = [*row["tokens"][here].tolist(), int(row["targets"][here][-1])]
            trained = row["targets"][here][row["weights"][here] == 1].tolist()
            if "labels" in row:  # the last token once more, so that it is read too
                assert ids[-2:] == [257, 257]
                assert row["weights"][here][-1] == 0
                ids = ids[:-1]
            found.append((r, ids, trained, here))
    return found


def encoded(messages, first=0):
    one = ENCODER.encode(messages, first=first)
    return one.ids.tolist(), one.ids[one.trained].tolist()


def every_row(prepared):
    packed = [prepared.train["chats"], prepared.held_out["chats"]]
    return [pack.read(np.arange(len(pack))) for pack in packed]


def test_rows_hold_every_conversation_whole_with_its_mask(tmp_path):
    prepared, _, _ = job(tmp_path, "conversations")
    found = [(ids, trained) for batch in every_row(prepared) for _, ids, trained, _ in segments(batch)]
    expected = [encoded(row["messages"]) for row in rows_of("conversations")]
    assert sorted(found) == sorted(expected)
    manifest = prepared.manifest["sources"]["chats"]
    assert manifest["train"]["targets"] + manifest["held_out"]["targets"] == sum(len(trained) for _, trained in expected)
    assert manifest["train"]["fill"] > 0.6
    assert prepared.stop_ids == {257}
    assert prepared.encode_prompt("a") == [256, *b"user\na", 257, 256, *b"assistant\n"]


def test_rows_hold_the_answers_of_a_pair_side_by_side(tmp_path):
    prepared, _, _ = job(tmp_path, "pairs")
    rows = [import_row(row, "pairs") for row in rows_of("pairs")]
    expected = [[encoded([*pair.prompt, *answer], 1) for answer in (pair.chosen, pair.rejected)] for pair in rows]
    total = 0
    for batch in every_row(prepared):
        found, numbers = segments(batch), []
        for (r, *chosen, here), (s, *rejected, there) in zip(found[::2], found[1::2], strict=True):
            assert r == s
            assert [*batch["segment_ids"][r][here][:1] % 2, *batch["segment_ids"][r][there][:1] % 2] == [1, 0]
            pair = expected.index([tuple(chosen), tuple(rejected)])
            assert set(batch["labels"][r][here | there]) == {rows[pair].margin}
            (first,), (second,) = set(batch["sequence_ids"][r][here]), set(batch["sequence_ids"][r][there])
            assert second == first + 1
            numbers.append(first)
        assert sorted(numbers) == list(range(0, len(found), 2))
        total += len(found)
    assert total == 2 * len(rows)


@pytest.mark.parametrize(("margin", "labels"), [("none", {0.0}), ("column", {0.25}), ("scores", {1.5})])
def test_margins_are_what_the_source_says(tmp_path, margin, labels):
    rows = [row | {"margin": 0.25, "score_chosen": 2, "score_rejected": 0.5} for row in rows_of("pairs")]
    source = SourceConfig("chats", "files", path=str(tmp_path / "chats.jsonl"), held_out_fraction=0.2, margin=margin)
    prepared, _, _ = job(tmp_path, "pairs", rows, sources=(source,))
    found = [batch["labels"][batch["segment_ids"] > 0] for batch in every_row(prepared)]
    assert set(np.concatenate(found).tolist()) == labels


def test_a_labelled_answer_comes_with_one_to_another_prompt(tmp_path):
    prepared, _, _ = job(tmp_path, "labels")
    rows = [import_row(row, "labels") for row in rows_of("labels")]
    known = {tuple(encoded([*row.prompt, *row.completion], 1)[0]): row for row in rows}
    seen = 0
    for batch in every_row(prepared):
        found = segments(batch)
        for (r, ids, trained, here), (_, other_ids, other_trained, there) in zip(found[::2], found[1::2], strict=True):
            row = known[tuple(ids)]
            assert set(batch["labels"][r][here | there]) == {float(row.label)}
            assert ENCODER.tokenizer.decode(trained) == row.completion[0]["content"]
            prompt = ENCODER.encode_prompt(row.prompt).tolist()
            assert ids[: len(prompt)] == other_ids[: len(prompt)] == prompt
            other = ENCODER.tokenizer.decode(other_trained)
            assert other != row.completion[0]["content"]
            assert other in [x.completion[0]["content"] for x in rows]
            seen += 1
    assert seen == len(rows)


def test_prompts_come_with_what_their_verifier_wants(tmp_path):
    prepared, config, _ = job(tmp_path, "prompts")
    assert len(prepared.train["chats"]) + len(prepared.held_out["chats"]) == 60
    batches = Batches(prepared, config, batch_size=4, seed=3)
    epoch = len(prepared.train["chats"]) // 4
    seen = []
    for step in range(epoch):
        prompts = batches.prompts(step)
        halves = [Batches(prepared, config, batch_size=4, seed=3, rows=np.array(rows)) for rows in ([0, 1], [2, 3])]
        again = [prompt for half in halves for prompt in pickle.loads(pickle.dumps(half)).prompts(step)]
        assert [prompt.row for prompt in again] == [prompt.row for prompt in prompts]
        for prompt in prompts:
            np.testing.assert_array_equal(prompt.ids, ENCODER.encode_prompt(prompt.messages))
            assert prompt.messages[0]["content"].startswith(prompt.info["answer"] + ":")
            seen.append(prompt.row)
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("content", ["conversations", "pairs"])
def test_batches_are_a_function_of_the_step(tmp_path, content):
    prepared, config, _ = job(tmp_path, content)
    batches = Batches(prepared, config, batch_size=4, seed=1)
    straight = list(load(batches, 0, 12, 2, 2))
    resumed = list(load(pickle.loads(pickle.dumps(batches)), 7, 12, 0, 1))
    for one, other in zip(straight[7:], resumed, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])
    evaluated = list(held_out_batches(prepared, config, "chats", 4))
    weight = sum(batch["weights"].sum() for batch in evaluated)
    assert weight == prepared.manifest["sources"]["chats"]["held_out"]["targets"]


def test_all_answers_to_a_prompt_are_held_out_together(tmp_path):
    rng = random.Random(1)
    rows = [{"prompt": f"p{i % 20}", "chosen": word(rng) + str(i), "rejected": word(rng)} for i in range(200)]
    prepared, _, _ = job(tmp_path, "pairs", rows)
    prompts = []
    for split in ("train", "held_out"):
        with open(prepared.document_dirs["chats"] / f"{split}.jsonl") as file:
            prompts.append({json.dumps(json.loads(json.loads(line)["text"])["prompt"]) for line in file})
    assert all(prompts)
    assert not prompts[0] & prompts[1]


def test_bad_examples_are_left_out_named_and_counted(tmp_path):
    good = rows_of("pairs")
    bad = [
        {"prompt": "x", "chosen": "y", "rejected": "y"},
        {"prompt": "x", "chosen": "y", "rejected": ""},
        {"prompt": "z", "chosen": "", "rejected": "y"},
        {"prompt": "x", "chosen": "y"},
        {"prompt": "x" * 200, "chosen": "y", "rejected": "z"},
        {"prompt": "x", "chosen": "y" * 100, "rejected": "z"},
    ]
    prepared, _, lines = job(tmp_path, "pairs", [*bad, *good])
    refused = prepared.manifest["sources"]["chats"]["refused"]
    assert refused == {
        "identical pair": 1,
        "empty": 2,
        "one-sided": 1,
        "prompt longer than the context": 1,
        "longer than a row": 1,
    }
    told = "\n".join(lines)
    assert "left out 4 of 66 examples" in told
    assert "2 × chats.jsonl, line 2: empty" in told
    assert "left out 2 of 62 examples" in told
    clean, _, _ = job(tmp_path / "clean", "pairs", good) if (tmp_path / "clean").mkdir() is None else None
    for split in ("train", "held_out"):
        counts = [manifest["sources"]["chats"][split]["sequences"] for manifest in (prepared.manifest, clean.manifest)]
        assert counts[0] == counts[1]


@pytest.mark.parametrize("content", ["conversations", "prompts"])
def test_a_character_that_the_tokenizer_does_not_know_leaves_its_example_out(tmp_path, content):
    """And not the whole file: characters are those of what is trained on, and something else is held out."""
    tokenizer = train_tokenizer(TokenizerConfig("chars"), ["user assistant\nq0123456789"])
    tokenizer.save(tmp_path / "tokenizer")
    rows = [{"prompt": f"q{i}", "completion": "42"} for i in range(40)] + [{"prompt": "q€", "completion": "42"}]
    source = SourceConfig("chats", "files", path=str(tmp_path / "chats.jsonl"), held_out_fraction=0.2)
    options = {"sources": (source,), "tokenizer": TokenizerConfig("chars", path=str(tmp_path / "tokenizer"))}
    prepared, _, lines = job(tmp_path, content, rows, **options)
    assert prepared.manifest["sources"]["chats"]["refused"] == {"unknown character": 1}
    assert "U+20AC" in "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "rows", "complaint"),
    [
        (
            "pairs",
            [{"prompt": "x", "chosen": "y", "rejected": "y"}] * 3,
            "none of 3 examples can be used. 3 × .*identical pair",
        ),
        ("conversations", [{"text": "x"}], "none of 1 examples.*no column prompt, completion \\(found: text\\)"),
        ("prompts", [{"prompt": str(i) * 200} for i in range(9)], "none of .*prompt longer than the context"),
        ("labels", [{"prompt": "x", "completion": str(i), "label": True} for i in range(9)], "two different prompts"),
    ],
)
def test_data_without_an_example_that_can_be_used_is_refused(tmp_path, content, rows, complaint):
    source = SourceConfig("chats", "files", path=str(tmp_path / "chats.jsonl"), held_out_fraction=0.0)
    with pytest.raises(ValueError, match=complaint):
        job(tmp_path, content, rows, sources=(source,))


def test_the_template_of_the_config_goes_before_that_of_the_tokenizer_and_keys_the_cache(tmp_path):
    prepared, config, _ = job(tmp_path, "conversations")
    assert prepared.chat.template == DEFAULT_TEMPLATE
    other = DEFAULT_TEMPLATE.replace("message.role +", "message.role + '!' +").replace("'assistant\n'", "'assistant!\n'")
    given = prepare(config, log=lambda _: None, tokenizer=prepared.tokenizer, chat_template=other)
    assert given.chat.template == other
    assert given.manifest_hash != prepared.manifest_hash
    own = prepare(dataclasses.replace(config, chat_template=DEFAULT_TEMPLATE), log=lambda _: None, chat_template=other)
    assert own.manifest_hash == prepared.manifest_hash
    with pytest.raises(ValueError, match="not a prefix"):
        prepare(dataclasses.replace(config, chat_template="{{ messages }}"), tokenizer=prepared.tokenizer)


def test_a_tokenizer_is_trained_on_what_the_template_writes(tmp_path):
    prepared, _, _ = job(tmp_path, "conversations", tokenizer=TokenizerConfig("chars"))
    characters = {token.decode() for token in prepared.tokenizer.token_bytes if token}
    assert characters == {*"usrain t\n", *"0123456789", *"abcdefgh"} | {" "}

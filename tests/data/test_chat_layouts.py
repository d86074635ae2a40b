"""Imports of chat layouts, each against the same example written by hand, and what is refused."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from data.chat import BadExample, Conversation, Labelled, Pair, Prompt, from_json, import_row, to_json
from data.config import DataConfig, SourceConfig
from data.sources import read_documents

Q, A = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
B, SYSTEM = {"role": "assistant", "content": "5"}, {"role": "system", "content": "Be brief."}
TOOL = {"role": "tool", "content": "72 F"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [Q, A]},
        {"messages": [{**Q, "name": None}, {"role": "assistant", "content": [{"type": "text", "text": "4"}]}], "tools": None},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        {"prompt": "2+2?", "completion": "4"},
        {"prompt": [Q], "completion": [A], "source": "x"},
        {"instruction": "2+2?", "input": "", "output": "4"},
    ],
)
def test_every_layout_of_a_conversation_gives_the_same_messages(row):
    assert import_row(row, "conversations") == Conversation([Q, A])


def test_an_instruction_with_input_and_system_and_a_conversation_with_tools():
    row = {"system": "Be brief.", "instruction": "Add.", "input": "2, 2", "output": "4"}
    assert import_row(row, "conversations").messages == [SYSTEM, {"role": "user", "content": "Add.\n\n2, 2"}, A]
    tools = [{"type": "function"}]
    assert import_row({"messages": [SYSTEM, Q, CALL, TOOL, A], "tools": tools}, "conversations") == Conversation(
        [SYSTEM, Q, CALL, TOOL, A], tools
    )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": [Q], "chosen": [A], "rejected": [B]},
        {"prompt": "2+2?", "chosen": [Q, A], "rejected": [Q, B]},
        {"chosen": [Q, A], "rejected": [Q, B]},
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
    ],
)
def test_every_layout_of_a_pair_gives_the_same_pair(row):
    assert import_row(row, "pairs") == Pair([Q], [A], [B])


def test_margins_labels_and_prompts():
    row = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
    scored = {**row, "score_chosen": 9, "score_rejected": 7.5}
    assert import_row(scored, "pairs").margin == 0  # on whose scale? Nobody asked for it.
    assert import_row(scored, "pairs", "scores").margin == 1.5
    assert import_row({**scored, "margin": 2}, "pairs", "scores").margin == 1.5
    for margin, kind, expected in ((2, "column", 2.0), (2, "none", 0.0), (-2, "none", 0.0), (0, "column", 0.0)):
        assert import_row({**scored, "margin": margin}, "pairs", kind).margin == expected
    for label in (True, False, 1, 0):
        assert import_row({"prompt": [Q], "completion": "4", "label": label}, "labels") == Labelled([Q], [A], bool(label))
    assert import_row({"prompt": "2+2?", "answer": "4", "id": 7}, "prompts") == Prompt([Q], {"answer": "4", "id": 7})
    assert import_row({"messages": [SYSTEM, Q]}, "prompts") == Prompt([SYSTEM, Q])


@pytest.mark.parametrize(
    ("content", "row", "reason"),
    [
        ("conversations", {"text": "x"}, "unknown layout"),
        ("conversations", [Q, A], "unknown layout"),
        ("conversations", {"messages": "hi"}, "unknown layout"),
        ("conversations", {"messages": []}, "empty"),
        ("conversations", {"messages": [Q, {"role": "assistant", "content": " \n"}]}, "empty"),
        ("conversations", {"messages": [Q]}, "one-sided"),
        ("conversations", {"messages": [A]}, "one-sided"),
        ("conversations", {"messages": [A, Q]}, "role order"),
        ("conversations", {"messages": [Q, SYSTEM, A]}, "role order"),
        ("conversations", {"messages": [Q, Q, A]}, "role order"),
        ("conversations", {"messages": [Q, TOOL, A]}, "role order"),
        ("conversations", {"messages": [Q, A, Q]}, "no answer at the end"),
        ("conversations", {"messages": [{"role": "narrator", "content": "x"}, A]}, "unknown role"),
        ("conversations", {"messages": [{"role": "user", "content": [{"type": "image"}]}, A]}, "not text"),
        ("conversations", {"messages": [{"role": "user", "content": 3}, A]}, "not text"),
        ("conversations", {"instruction": "x"}, "unknown layout"),
        ("conversations", {"messages": [Q, {**A, "weight": 0.5}]}, "weight is neither 0 nor 1"),
        ("conversations", {"messages": [Q, {**A, "weight": "1"}]}, "weight is neither 0 nor 1"),
        ("conversations", {"messages": [Q, {**A, "weight": 0}]}, "nothing to learn"),
        ("pairs", {"prompt": [Q], "chosen": [{**A, "weight": 0}], "rejected": [B]}, "answer of weight 0"),
        ("pairs", {"prompt": "2+2?", "chosen": "4"}, "one-sided"),
        ("pairs", {"prompt": "2+2?", "chosen": "4", "rejected": None}, "one-sided"),
        ("pairs", {"prompt": "2+2?", "chosen": "4", "rejected": "4"}, "identical pair"),
        ("pairs", {"prompt": "2+2?", "chosen": "4", "rejected": ""}, "empty"),
        ("pairs", {"prompt": "", "chosen": "4", "rejected": "5"}, "empty"),
        ("pairs", {"prompt": "2+2?", "chosen": [], "rejected": "4"}, "empty"),
        ("pairs", {"chosen": [Q, A], "rejected": [{"role": "user", "content": "3+3?"}, B]}, "no common prompt"),
        ("pairs", {"chosen": "4", "rejected": "5"}, "no common prompt"),
        ("pairs", {"chosen": [Q, A], "rejected": [Q]}, "empty"),
        ("pairs", {"chosen": [Q, A, Q, A], "rejected": [Q, A, {"role": "user", "content": "x"}, B]}, "role order"),
        ("pairs", {"prompt": "2+2?", "chosen": "4", "rejected": "5", "margin": float("nan")}, "margin is no number"),
        ("pairs", {"prompt": "2+2?", "chosen": "4", "rejected": "5", "margin": -0.5}, "margin contradicts the pair"),
        ("labels", {"prompt": "2+2?", "completion": "4"}, "unknown layout"),
        ("labels", {"prompt": "2+2?", "completion": "4", "label": "maybe"}, "label is not true or false"),
        ("prompts", {"messages": [Q, A]}, "role order"),
        ("prompts", {"prompt": " "}, "empty"),
        ("prompts", {"question": "x"}, "unknown layout"),
    ],
)
def test_a_bad_example_is_refused_under_a_reason(content, row, reason):
    with pytest.raises(BadExample) as caught:
        import_row(row, content)
    assert caught.value.reason == reason
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ({}, "unknown layout"),
        ({"score_chosen": 1}, "unknown layout"),
        ({"score_chosen": 1, "score_rejected": "x"}, "margin is no number"),
        ({"score_chosen": 1e308, "score_rejected": -1e308}, "margin is no number"),
        ({"score_chosen": 1, "score_rejected": 2, "margin": 1}, "margin contradicts the pair"),
    ],
)
def test_scores_that_give_no_margin_are_refused_where_they_are_to(scores, reason):
    with pytest.raises(BadExample) as caught:
        import_row({"prompt": "2+2?", "chosen": "4", "rejected": "5", **scores}, "pairs", "scores")
    assert caught.value.reason == reason


def test_margins_are_of_pairs():
    source = SourceConfig("chats", "files", path="x", margin="scores")
    assert DataConfig((source,), content="pairs").sources[0].margin == "scores"
    with pytest.raises(ValueError, match=r"margin='scores' is of pairs, and data\.content='labels' has none"):
        DataConfig((source,), content="labels")


@pytest.mark.parametrize(
    ("content", "row"),
    [
        ("conversations", {"messages": [SYSTEM, Q, CALL, TOOL, A]}),
        ("pairs", {"prompt": "2+2?", "chosen": "4", "rejected": "5", "margin": 2}),
        ("labels", {"prompt": "2+2?", "completion": "4", "label": 0}),
        ("prompts", {"prompt": "ü", "answer": [1, {"x": None}]}),
    ],
)
def test_an_example_survives_its_line_of_text(content, row):
    example = import_row(row, content)
    line = to_json(example)
    assert "\n" not in line
    assert from_json(line, content) == example


def test_rows_come_from_jsonl_and_parquet_alike(tmp_path):
    rows = [{"messages": [Q, A]}, {"messages": [SYSTEM, Q, B]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")

    def read(name):
        source = SourceConfig("s", "files", path=str(tmp_path / name))
        return [d.text for d in read_documents(source, row_text=lambda row, where: to_json(import_row(row, "conversations")))]

    assert read("a.jsonl") == read("b.parquet")
    assert [from_json(text, "conversations").messages for text in read("a.jsonl")] == [[Q, A], [SYSTEM, Q, B]]
    (tmp_path / "c.txt").write_text("x")
    with pytest.raises(ValueError, match=r"c\.txt has no rows"):
        read("c.txt")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"content": "text", "chat_template": "x"}, "data.chat_template is of no use"),
        ({"content": "pairs", "packing": "sequential"}, "packing='best_fit'"),
        ({"content": "pairs", "attend_across_documents": True}, "attend_across_documents"),
        ({"content": "pairs", "sources": (SourceConfig("s", "stdlib"),)}, "has no pairs"),
        ({"content": "labels", "sources": (SourceConfig("s", "files", path="x", max_bytes=3),)}, "cannot be cut"),
        ({"content": "labels", "sources": (SourceConfig("s", "files", path="x", held_out_split="position"),)}, "cannot be cut"),
    ],
)
def test_what_would_cut_a_conversation_is_refused_when_the_config_is_read(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        DataConfig(**{"sources": (SourceConfig("s", "files", path="x"),), **options})

import dataclasses
import gzip
import json
import os
import pathlib
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data.config import SourceConfig, TaskConfig
from data.sources import read_documents


def texts(path, **options) -> list[str]:
    return [document.text for document in read_documents(SourceConfig("s", "files", path=str(path), **options))]


def test_the_standard_library_is_large_stable_and_without_duplicates_or_tests():
    documents = list(read_documents(SourceConfig("std", "stdlib")))
    assert sum(len(document.text) for document in documents) > 9_000_000  # Debian leaves parts of it out
    assert len({document.text for document in documents}) == len({document.id for document in documents}) == len(documents)
    assert {document.licence for document in documents} == {"PSF-2.0"}
    by_id = {document.id: document.text for document in documents}
    assert by_id["source/dataclasses.py"] == pathlib.Path(dataclasses.__file__).read_text()
    assert "anonymous functions" in by_id["topic/lambda"]
    assert "Return the sine of x" in by_id["docstrings/math"]
    assert not any("/test/" in id or "/tests/" in id or "site-packages" in id for id in by_id)
    assert "antigravity" not in sys.modules
    assert "turtle" not in sys.modules


def test_a_task_gives_its_training_prompts_with_their_solutions():
    """What is learned from them is never what is asked in an evaluation."""
    task = TaskConfig("reverse", (("min_length", 3), ("max_length", 4), ("alphabet", "abc")))
    source = SourceConfig("t", "task", task=task, num_examples=300)
    documents = list(read_documents(source, seed=1))
    assert [document.text for document in documents] == [document.text for document in read_documents(source, seed=1)]
    assert len(documents) == 300
    asked = set()
    for document in documents:
        prompt, solution = document.text.split(" = ")
        assert solution == prompt.removeprefix("reverse ")[::-1]
        asked.add(prompt.removeprefix("reverse "))
    made = task.make()
    assert asked.isdisjoint(made.example(i, 0, "eval").problem for i in range(200))
    assert {document.text for document in documents} != {document.text for document in read_documents(source, seed=2)}
    rows = [document.text for document in read_documents(source, 1, lambda row, where: json.dumps([row, where]))]
    assert json.loads(rows[7]) == [
        dict(zip(("prompt", "completion"), split_after(documents[7].text, " = "), strict=True)),
        "reverse 7",
    ]


def test_a_task_has_wrong_answers_for_preferences():
    task = TaskConfig("reverse", (("min_length", 1), ("max_length", 4), ("alphabet", "abc")))
    source, made = SourceConfig("r", "task", task=task, num_examples=200), task.make()
    rows_of = lambda content: [  # noqa: E731
        json.loads(document.text) for document in read_documents(source, 3, lambda row, where: json.dumps(row), content)
    ]
    rewards = lambda row, key: made.score(row[key], made.example(i, 3)).reward  # noqa: E731
    pairs, labels = rows_of("pairs"), rows_of("labels")
    for i, (pair, answer) in enumerate(zip(pairs, labels, strict=True)):
        assert (rewards(pair, "chosen"), rewards(pair, "rejected")) == (1, 0)
        assert pair["rejected"].strip()
        assert rewards(answer, "completion") == answer["label"]
        assert made.example(i, 3).prompt == pair["prompt"] == answer["prompt"]
    assert 70 < sum(answer["label"] for answer in labels) < 130
    assert len({pair["rejected"] for pair in pairs}) > 50
    assert rows_of("pairs") == pairs


def split_after(text, mark):
    at = text.index(mark) + len(mark)
    return text[:at], text[at:]


@pytest.mark.parametrize(
    "more", [{"kind": "task"}, {"kind": "files", "path": "x", "num_examples": 3, "task": TaskConfig("gcd")}]
)
def test_task_and_its_size_belong_to_sources_of_tasks(more):
    with pytest.raises(ValueError, match="kind='task' needs task and num_examples, and no other kind has them"):
        SourceConfig("s", **more)


def test_every_format_gives_the_same_text(tmp_path):
    text = "first\r\nsecond\tthird é日\u2028\n"
    rows = json.dumps({"text": text}) + "\n\n" + json.dumps({"text": "", "other": 1}) + "\n"
    for name, data in {"a.txt": text, "b.md": text, "c.jsonl": rows}.items():
        (tmp_path / name).write_bytes(data.encode())
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data.encode()))
        # Two frames, as `cat a.zst b.zst` makes.
        frames = [zstandard.ZstdCompressor().compress(part) for part in (data.encode()[:7], data.encode()[7:])]
        (tmp_path / f"{name}.zst").write_bytes(b"".join(frames))
    pyarrow.parquet.write_table(pyarrow.table({"text": [text, ""]}), tmp_path / "d.parquet")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    assert texts(tmp_path) == [*[text] * 6, *[text, ""] * 4]
    assert texts(tmp_path / "*.txt*") == [text] * 3


def test_null_is_an_empty_document_in_every_reader(tmp_path, monkeypatch):
    rows = [{"text": "one"}, {"text": None}, {"text": "two"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [None]}), tmp_path / "c.parquet")
    hub(monkeypatch, lambda path, **options: Rows(rows))
    streamed = [document.text for document in read_documents(SourceConfig("h", "huggingface", path="a/b", hub_revision="abc"))]
    assert texts(tmp_path / "a.jsonl") == texts(tmp_path / "b.parquet") == streamed == ["one", "", "two"]
    assert texts(tmp_path / "c.parquet") == [""]


def test_order_and_ids_do_not_depend_on_where_a_directory_lies(tmp_path):
    for base in ("one", "two"):
        for name in ("b/x.txt", "a.txt", "b/a.txt"):
            path = tmp_path / base / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
    one, two = ([d.id for d in read_documents(SourceConfig("s", "files", path=str(tmp_path / b)))] for b in ("one", "two"))
    assert one == two == ["a.txt", "b/a.txt", "b/x.txt"]


def test_text_field_and_half_a_surrogate_pair(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x\\ud800y"}\n')
    assert texts(tmp_path, text_field="body") == ["x?y"]


def test_max_bytes_draws_documents_by_seed_and_meets_the_limit(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i:04d}" * 25}) + "\n" for i in range(200)))
    config = SourceConfig("s", "files", path=str(tmp_path), max_bytes=1050)
    draws = [[document.text for document in read_documents(config, seed)] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    for draw in draws:
        assert sum(map(len, draw)) == 1050
        assert sorted(map(len, draw)) == [50] + [100] * 10
        assert draw == sorted(draw)  # still in the order of the source


def corrupt_gzip(path):
    path.write_bytes(gzip.compress(os.urandom(1000))[:-20])


def corrupt_zst(path):
    path.write_bytes(zstandard.ZstdCompressor().compress(os.urandom(1000))[:-20])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"x", r"a\.bin is in no format .*\.jsonl"),
        ("a.txt", b"\xff\xfe", r"a\.txt is not UTF-8"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz is a damaged or incomplete gzip"),
        ("a.txt.gz", corrupt_gzip, r"a\.txt\.gz is a damaged or incomplete gzip"),
        ("a.txt.zst", corrupt_zst, r"a\.txt\.zst is a damaged or incomplete zst"),
        ("a.txt.zst", b"not zst", r"a\.txt\.zst is a damaged or incomplete zst"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl, line 1: no field 'text' \(found: \['body'\]\)"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl, line 1: no field 'text' \(found: list\)"),
        ("a.jsonl", b'{"text": null}\n{"text": 3}\n', r"a\.jsonl, line 2: field 'text' holds int, not text; set the source's"),
        ("a.parquet", b"PAR0", r"a\.parquet is not a readable parquet"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    content(path) if callable(content) else path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        texts(path)


def test_a_parquet_file_without_the_column_lists_its_columns(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no column 'text' \(found: \['body'\]\)"):
        texts(tmp_path)


@pytest.mark.parametrize(("column", "kind"), [([1, 2], "int64"), ([b"x"], "binary")])
def test_a_parquet_column_that_is_not_text_is_refused(tmp_path, column, kind):
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=f"a.parquet: column 'text' holds {kind}, not text"):
        texts(tmp_path)


def test_missing_files_say_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\*\.txt' is neither a file nor a directory nor a glob"):
        texts(tmp_path / "nowhere*.txt")
    with pytest.raises(FileNotFoundError, match="no readable file among the 0"):
        texts(tmp_path)


class Rows(list):
    """Stands for a streamed data set of the `datasets` library."""

    info = types.SimpleNamespace(license="cc0-1.0")

    def shuffle(self, seed, buffer_size):
        return Rows(sorted(self, key=lambda row: hash((seed, row["text"]))))


def hub(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_hub_documents_are_streamed_with_every_option(monkeypatch):
    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        return Rows({"text": f"document {i}"} for i in range(5))

    hub(monkeypatch, load_dataset)
    config = SourceConfig("h", "huggingface", path="a/b", hub_config="en", hub_split="validation", hub_revision="abc")
    documents = list(read_documents(config))
    assert [d.text for d in documents] == [f"document {i}" for i in range(5)]
    assert documents[3].id == "a/b:3"
    assert documents[0].licence == "cc0-1.0"
    assert calls == [("a/b", {"name": "en", "split": "validation", "revision": "abc", "streaming": True})]


def test_a_hub_stream_stops_at_max_bytes(monkeypatch):
    served = []

    class Endless(Rows):
        def __iter__(self):
            while True:
                served.append(1)
                yield {"text": "0123456789"}

        def shuffle(self, seed, buffer_size):
            return self

    hub(monkeypatch, lambda path, **options: Endless())
    config = SourceConfig("h", "huggingface", path="a/b", hub_revision="abc", max_bytes=25)
    assert [d.text for d in read_documents(config)] == ["0123456789", "0123456789", "01234"]
    assert len(served) <= 4


def test_hub_errors_say_what_to_do(monkeypatch):
    config = SourceConfig("h", "huggingface", path="a/b", hub_revision="abc")

    def fail(path, **options):
        raise OSError("Name or service not known")

    hub(monkeypatch, fail)
    with pytest.raises(ConnectionError, match=r"'a/b'.*Name or service not known.*--local-dir DIR.*kind='files'"):
        list(read_documents(config))
    hub(monkeypatch, lambda path, **options: Rows([{"content": "x"}]))
    with pytest.raises(ValueError, match=r"row 0: no field 'text' \(found: \['content'\]\)"):
        list(read_documents(config))
    hub(monkeypatch, lambda path, **options: Rows([{"text": ["x"]}]))
    with pytest.raises(ValueError, match=r"row 0: field 'text' holds list, not text"):
        list(read_documents(config))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"'datasets', which is not installed: pip install 'loam\[data\]'"):
        list(read_documents(config))


def test_a_hub_data_set_must_be_pinned():
    with pytest.raises(ValueError, match=r"change under their name; set hub_revision to a commit of .a/b."):
        SourceConfig("h", "huggingface", path="a/b")

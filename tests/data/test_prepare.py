import dataclasses
import json
import random
import shutil

import numpy as np
import pytest

import data.prepare
from data.config import DataConfig, MixtureConfig, SourceConfig, TokenizerConfig
from data.loader import held_out_batches
from data.prepare import encode_documents, prepare, sample_text
from data.tokenizer import train_tokenizer


def quiet(line: str) -> None:
    pass


@pytest.fixture
def corpus(tmp_path):
    rng = random.Random(0)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "été", "漢字", "x", "=", "f(y)\n"]
    rows = [{"text": " ".join(rng.choices(words, k=rng.randint(1, 150)))} for _ in range(300)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [row["text"] for row in rows]


BYTE_BPE = TokenizerConfig("byte_bpe", vocab_size=300)


def config_for(tmp_path, tokenizer=BYTE_BPE, seq_len=64, **source) -> DataConfig:
    source = {"path": str(tmp_path / "corpus.jsonl"), "licence": "CC0-1.0", "held_out_fraction": 0.1, **source}
    return DataConfig(
        sources=(SourceConfig("c", "files", **source),), tokenizer=tokenizer, seq_len=seq_len, cache_dir=str(tmp_path / "cache")
    )


def all_rows(packed):
    return packed.read(np.arange(len(packed)))


def served_documents(prepared, split) -> list[str]:
    """Text of every segment of every row that begins with <bos>, continuations left out."""
    batch = all_rows(getattr(prepared, split)["c"])
    found = []
    for row in range(batch["tokens"].shape[0]):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            here = batch["segment_ids"][row] == segment
            tokens, target = batch["tokens"][row][here], batch["targets"][row][here]
            np.testing.assert_array_equal(tokens[1:], target[:-1])
            if tokens[0] == prepared.tokenizer.bos_id and target[-1] == prepared.tokenizer.eos_id:
                found.append(prepared.tokenizer.decode(target[:-1]))
    return found


def test_whole_documents_come_out_as_they_went_in(tmp_path, corpus):
    prepared = prepare(config_for(tmp_path, seq_len=2048), log=quiet)
    assert sorted(served_documents(prepared, "train") + served_documents(prepared, "held_out")) == sorted(corpus)
    assert sorted(served_documents(prepared, "held_out")) == sorted(prepared.held_out_texts("c"))


@pytest.mark.parametrize("packing", ["best_fit", "sequential"])
@pytest.mark.parametrize("boundaries", [True, False])
@pytest.mark.parametrize("kind", ["byte_bpe", "chars", "bytes", "spm_bpe"])
def test_every_byte_is_predicted_once(tmp_path, corpus, packing, boundaries, kind):
    tokenizer = TokenizerConfig(kind, vocab_size=310, document_boundaries=boundaries)
    config = dataclasses.replace(config_for(tmp_path, tokenizer), packing=packing)
    prepared = prepare(config, log=quiet)
    for split, texts in (("train", None), ("held_out", list(prepared.held_out_texts("c")))):
        batch = all_rows(getattr(prepared, split)["c"])
        num_bytes = int((prepared.tokenizer.byte_lengths[batch["targets"]] * batch["weights"]).sum())
        stats = prepared.manifest["sources"]["c"][split]
        assert batch["weights"].sum() == stats["targets"] == stats["tokens"] - stats["documents"]
        if texts is not None:
            # Without <bos> a document's first token is never predicted.
            first = 0 if boundaries else sum(prepared.tokenizer.byte_lengths[prepared.tokenizer.encode(t)[0]] for t in texts)
            assert num_bytes == sum(len(t.encode()) for t in texts) - first == stats["bytes"] - first


def test_rows_are_well_formed(tmp_path, corpus):
    prepared = prepare(config_for(tmp_path), log=quiet)
    batch = all_rows(prepared.train["c"])
    assert {key: value.dtype for key, value in batch.items()} == {
        **dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), np.dtype(np.int32)),
        "weights": np.dtype(np.float32),
    }
    segment, position = batch["segment_ids"], batch["positions"]
    np.testing.assert_array_equal(batch["weights"], segment > 0)
    for row in range(len(segment)):
        filled = np.count_nonzero(segment[row])
        assert (segment[row][filled:] == 0).all()
        assert segment[row][0] == 1
        starts = np.flatnonzero(np.diff(segment[row][:filled], prepend=0))
        assert (np.diff(segment[row][:filled]) >= 0).all()
        for start, end in zip(starts, [*starts[1:], filled], strict=True):
            np.testing.assert_array_equal(position[row][start:end], np.arange(end - start))
    for key in ("tokens", "targets", "positions"):
        assert not batch[key][segment == 0].any()


def test_attending_across_documents_makes_one_segment_of_a_row(tmp_path, corpus):
    packed = prepare(config_for(tmp_path), log=quiet).train["c"]
    apart, together = packed.read(np.arange(5)), packed.read(np.arange(5), attend_across_documents=True)
    np.testing.assert_array_equal(apart["tokens"], together["tokens"])
    np.testing.assert_array_equal(together["segment_ids"], apart["segment_ids"] > 0)
    expected = np.where(apart["segment_ids"] > 0, np.arange(64), 0)
    np.testing.assert_array_equal(together["positions"], expected)


def test_a_document_of_many_records_stays_one_segment(tmp_path):
    text = "".join(random.Random(1).choices("abcdefgh ", k=40_000))
    (tmp_path / "corpus.txt").write_text(text)
    tokenizer = TokenizerConfig("bytes", document_boundaries=False)
    source = {"path": str(tmp_path / "corpus.txt"), "held_out_split": "position"}
    prepared = prepare(config_for(tmp_path, tokenizer, seq_len=20_000, **source), log=quiet)
    batch = all_rows(prepared.train["c"])
    assert batch["segment_ids"].max() == 1
    assert batch["tokens"].shape == (2, 20_000)
    served = prepared.tokenizer.decode(batch["tokens"][batch["weights"] > 0])
    assert served == text[:35_999]  # the last of the 36,000 is only a target
    np.testing.assert_array_equal(batch["positions"][0], np.arange(20_000))
    followed = batch["weights"][:, 1:] > 0
    np.testing.assert_array_equal(batch["targets"][:, :-1][followed], batch["tokens"][:, 1:][followed])


def test_hash_split_is_by_content_alone_and_of_the_expected_size(tmp_path, corpus):
    prepared = prepare(config_for(tmp_path, held_out_fraction=0.3), log=quiet)
    held_out = set(prepared.held_out_texts("c"))
    assert 0.2 * len(corpus) < len(held_out) < 0.4 * len(corpus)
    lines = (tmp_path / "corpus.jsonl").read_text().splitlines()[:100]
    (tmp_path / "corpus.jsonl").write_text("\n".join(reversed(lines)))
    fewer = set(prepare(config_for(tmp_path, held_out_fraction=0.3), log=quiet).held_out_texts("c"))
    assert fewer == held_out & set(corpus[:100])


def test_held_out_batches_cover_the_set_once_over_hosts(tmp_path, corpus):
    config = config_for(tmp_path)
    prepared = prepare(config, log=quiet)
    expected = all_rows(prepared.held_out["c"])
    for hosts in (1, 2):
        parts = [list(held_out_batches(prepared, config, "c", 4, rows=rows)) for rows in np.split(np.arange(4), hosts)]
        assert len({len(part) for part in parts}) == 1
        for key, value in expected.items():
            served = np.concatenate([np.concatenate([b[key] for b in step]) for step in zip(*parts, strict=True)])
            np.testing.assert_array_equal(served[: len(value)], value)
            assert not served[len(value) :].any()
            assert len(served) - len(value) < 4


def test_the_manifest_tells_what_the_data_is(tmp_path, corpus):
    prepared = prepare(config_for(tmp_path), log=quiet)
    source = prepared.manifest["sources"]["c"]
    assert source["licence"] == "CC0-1.0"
    assert source["kind"] == "files"
    for count, expected in (
        ("documents", len(corpus)),
        ("characters", sum(map(len, corpus))),
        ("bytes", sum(len(text.encode()) for text in corpus)),
    ):
        assert source["train"][count] + source["held_out"][count] == expected
    assert prepared.manifest["tokenizer"]["fingerprint"] == prepared.tokenizer.fingerprint
    assert source["train"]["rows"] == len(prepared.train["c"])
    on_disk = json.loads((prepared.directory / "manifest.json").read_text())["manifest"]
    assert on_disk == prepared.manifest


def test_blank_documents_are_skipped_and_counted(tmp_path, corpus):
    plain = prepare(config_for(tmp_path), log=quiet).manifest["sources"]["c"]
    with open(tmp_path / "corpus.jsonl", "a") as file:
        file.write('{"text": null}\n{"text": ""}\n{"text": " \\n"}\n')
    with_blanks = prepare(config_for(tmp_path), log=quiet).manifest["sources"]["c"]
    assert (plain["skipped"], with_blanks["skipped"]) == (0, 3)
    assert with_blanks == {**plain, "skipped": 3}


def test_prepared_data_is_reused_and_each_stage_only_redone_when_its_inputs_change(tmp_path, corpus, monkeypatch):
    lines: list[str] = []
    first = prepare(config_for(tmp_path), log=lines.append)
    done = len(lines)
    assert done >= 4
    assert prepare(config_for(tmp_path), log=lines.append).manifest_hash == first.manifest_hash
    assert len(lines) == done
    other_rows = prepare(config_for(tmp_path, seq_len=32), log=lines.append)
    assert len(lines) == done + 1  # packed again, nothing else
    assert other_rows.manifest_hash != first.manifest_hash
    with open(tmp_path / "corpus.jsonl", "a") as file:
        file.write("".join(f'{{"text": "one more {i}"}}\n' for i in range(9)))
    more = prepare(config_for(tmp_path), log=lines.append)
    assert more.manifest["sources"]["c"]["train"]["content_hash"] != first.manifest["sources"]["c"]["train"]["content_hash"]


def test_another_cache_gives_the_same_manifest(tmp_path, corpus):
    first = prepare(config_for(tmp_path), log=quiet)
    shutil.rmtree(tmp_path / "cache")
    assert prepare(config_for(tmp_path), log=quiet).manifest_hash == first.manifest_hash


@pytest.mark.parametrize("step", ["read_documents", "train_tokenizer", "write_documents", "write_index"])
def test_a_crash_in_any_stage_leaves_nothing_that_is_taken_for_complete(tmp_path, corpus, monkeypatch, step):
    original = getattr(data.prepare, step)

    class Killed(BaseException):
        pass

    def crash(*args):
        result = original(*args)
        if step == "read_documents":
            return (document for i, document in enumerate(result) if i < 20 or crash_now())
        return crash_now()

    def crash_now():
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(data.prepare, step, crash)
        patch.setattr(data.prepare.shutil, "rmtree", lambda *args, **options: None)  # a killed process does not clean up
        with pytest.raises(Killed):
            prepare(config_for(tmp_path), log=quiet)
    assert list((tmp_path / "cache").glob(".*.partial"))
    prepared = prepare(config_for(tmp_path), log=quiet)
    assert not list((tmp_path / "cache").glob(".*.partial"))
    reference = prepare(dataclasses.replace(config_for(tmp_path), cache_dir=str(tmp_path / "fresh")), log=quiet)
    assert prepared.manifest == reference.manifest
    for key, value in all_rows(reference.train["c"]).items():
        np.testing.assert_array_equal(all_rows(prepared.train["c"])[key], value)


def test_a_saved_tokenizer_is_used_instead_of_training_one(tmp_path, corpus):
    tokenizer = train_tokenizer(TokenizerConfig("byte_bpe", vocab_size=290), corpus)
    tokenizer.save(tmp_path / "tokenizer")
    config = config_for(tmp_path, TokenizerConfig(path=str(tmp_path / "tokenizer")))
    assert prepare(config, log=quiet).tokenizer.fingerprint == tokenizer.fingerprint


def test_long_texts_are_encoded_in_parts_that_join_to_the_whole(monkeypatch):
    tokenizer = train_tokenizer(TokenizerConfig("bytes"), [])
    monkeypatch.setattr(data.prepare, "_MAX_ENCODE_CHARACTERS", 50)
    texts = ["short", "a long line\n" * 30, "", "x" * 120]
    ids = list(encode_documents(tokenizer, texts))
    assert [tokenizer.decode(document[1:-1]) for document in ids] == texts
    assert all(document[0] == 256 and document[-1] == 257 for document in ids)


def test_sample_text_takes_about_the_fraction_and_all_of_it_at_one():
    texts = [f"text {i} " * 50 for i in range(500)]
    assert list(sample_text(texts, 1.0)) == texts
    assert 150 < len(list(sample_text(texts, 0.4))) < 250
    assert (
        sum(map(len, sample_text([" ".join(map(str, range(300_000)))], 0.5))) < 1_500_000
    )  # one long text is sampled by passages


# --- Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", " \\n"])
def test_an_empty_corpus_is_refused(tmp_path, text):
    (tmp_path / "corpus.jsonl").write_text(f'{{"text": "{text}"}}\n')
    with pytest.raises(ValueError, match="'c' is empty: no document"):
        prepare(config_for(tmp_path), log=quiet)


def test_a_split_that_leaves_a_side_empty_is_refused(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"text": "only one document"}\n')
    with pytest.raises(ValueError, match=r"of 1 documents, held_out_fraction=0\.1 leaves .* held_out_split='position'"):
        prepare(config_for(tmp_path), log=quiet)


def test_a_corpus_shorter_than_a_row_is_refused(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"text": "a few words"}\n')
    config = config_for(tmp_path, TokenizerConfig("bytes"), held_out_fraction=0.0)
    with pytest.raises(ValueError, match=r"'c' has 12 tokens to train on, fewer than one row of data\.seq_len=64"):
        prepare(config, log=quiet)


def test_a_held_out_part_without_a_target_is_refused(tmp_path):
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "x" * 1000}) + "\n")
    tokenizer = TokenizerConfig("bytes", document_boundaries=False)
    config = config_for(tmp_path, tokenizer, held_out_split="position", held_out_fraction=0.001)
    with pytest.raises(ValueError, match=r"'c' holds out 1 bytes without a token to predict: raise its held_out_fraction"):
        prepare(config, log=quiet)


@pytest.mark.parametrize("name", ["", "a/b", "a b"])
def test_a_source_name_that_is_no_file_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="a name, of letters"):
        SourceConfig(name, "stdlib")


def test_missing_paths_are_told_before_anything_is_read(tmp_path, corpus):
    config = config_for(tmp_path, TokenizerConfig(path=str(tmp_path / "nowhere")))
    with pytest.raises(FileNotFoundError, match="no saved tokenizer"):
        prepare(config, log=quiet)
    missing = SourceConfig("m", "files", path=str(tmp_path / "missing.txt"))
    sources = (*config_for(tmp_path).sources, missing)
    config = DataConfig(sources, mixtures=(MixtureConfig(0, (("c", 1), ("m", 1))),), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        prepare(config, log=quiet)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_names_the_option(tmp_path, corpus):
    (tmp_path / "file").write_text("")
    config = dataclasses.replace(config_for(tmp_path), cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match=r"cannot prepare the data in .*data\.cache_dir"):
        prepare(config, log=quiet)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("write() failed: No space left on device")]
)
def test_a_full_disk_names_the_option(tmp_path, corpus, monkeypatch, error):
    def full(*args):
        raise error

    monkeypatch.setattr(data.prepare, "write_documents", full)
    with pytest.raises(OSError, match=r"cannot prepare the data in .*No space left on device.*data\.cache_dir"):
        prepare(config_for(tmp_path), log=quiet)


def test_a_truncated_shard_is_noticed_at_the_start(tmp_path, corpus):
    prepare(config_for(tmp_path), log=quiet)
    (shard,) = (tmp_path / "cache").glob("tokens-*/train-00000.array_record")
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train-00000\.array_record is missing or is not what was written"):
        prepare(config_for(tmp_path), log=quiet)


@pytest.mark.parametrize("pattern", ["tokens-*/train_documents.npy", "packed-*/*chunks.npy", "packed-*/*rows.npy"])
def test_a_flipped_bit_of_an_index_is_noticed_at_the_start(tmp_path, corpus, pattern):
    prepare(config_for(tmp_path), log=quiet)
    index = sorted((tmp_path / "cache").glob(pattern))[0]
    content = bytearray(index.read_bytes())
    content[-3] ^= 4
    index.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{index.name} is missing or is not what was written"):
        prepare(config_for(tmp_path), log=quiet)


def test_a_damaged_record_is_noticed_when_it_is_read(tmp_path, corpus):
    prepared = prepare(config_for(tmp_path, seq_len=2048), log=quiet)
    batch = all_rows(prepared.train["c"])
    train_ids = batch["tokens"][0][batch["segment_ids"][0] == 1]
    (shard,) = (tmp_path / "cache").glob("tokens-*/train-00000.array_record")
    content = bytearray(shard.read_bytes())
    stored = np.array(train_ids, np.uint16).tobytes()
    content[content.index(stored) + 5] ^= 0x10
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00000\.array_record: a record among .* is damaged"):
        all_rows(prepare(config_for(tmp_path), log=quiet).train["c"])


def test_token_ids_beyond_the_vocabulary_are_never_stored(tmp_path):
    documents = [np.array([1, 2, 3]), np.array([4, 300])]
    with pytest.raises(ValueError, match=r"token id 300 is outside the vocabulary \[0, 300\)"):
        data.prepare.write_documents(tmp_path, "train", documents, 300)

"""Runs a job that makes data with a model, round by round.

  rounds.jsonl    what each round made, and what it left out; a round that is in it is not done again.
  dataset.jsonl   all rows, written at the end: what `data.sources` reads.
  result.json     counts; `refused`, of rows that are no prompts, by reason.

What a round makes is a function of (weights, config, its number, and of instructions the rounds before it), so a job that is
stopped at any moment and started again ends with the same data set.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from data.chat import BadExample, Message, from_json, import_row, to_json
from data.config import SourceConfig
from data.sources import read_documents
from data.tasks.task import Example
from inference.request import Token
from model.config import check
from model.sharding import make_mesh, resolve_sizes
from train.config import PREEMPTED, MeshConfig
from train.files import only_process_in, write_atomic, write_json_atomic
from train.initial import compare_initial
from train.learned_reward import LearnedReward
from train.loop import Log, differences, stop_on_signal
from train.metrics import JsonlWriter, read_jsonl
from train.rewards import Part, Verifiers
from train.rollouts import to_rows
from train.synthesis.best_of import select
from train.synthesis.config import SynthesisConfig
from train.synthesis.critique import criticise
from train.synthesis.instructions import write_instructions
from train.synthesis.writer import Answer, Writer

Round = tuple[list[dict[str, Any]], collections.Counter[str]]  # rows, and counts
# Fields that may differ when a job is continued.
_FREE_FIELDS = ("run_dir", "max_batch", "verifiers", "verifier_seconds")


@dataclasses.dataclass(frozen=True)
class Asked:
    """Attributes:
    messages: the conversation that is to be answered.
    row: how it stands in the data set.
    example: of a task, what its verifier wants to know.
    """

    messages: list[Message]
    row: Any
    example: Example | None = None


def synthesize(config: SynthesisConfig, log: Log = print) -> int:
    """Runs, or continues, the job to its end. Returns the exit status: 0, or PREEMPTED after SIGTERM or Ctrl-C.

    Raises:
      ValueError, OSError: bad input, told before anything expensive; see the message. Or nothing was kept: the counts say why.
    """
    run_dir = pathlib.Path(config.run_dir)
    prompts, refused = read_prompts(config)
    check(bool(prompts), "there is no prompt: see config.prompts")
    if refused:
        told = ", ".join(f"{why} {n}" for why, n in sorted(refused.items()))
        log(f"{config.prompts.path}: {sum(refused.values())} rows are no prompts and are left out: {told}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_process_in(run_dir))
        _compare_config(run_dir, config)
        _compare_prompts(run_dir, config, prompts)
        make_round, num_rounds = stack.enter_context(_method(config, prompts))
        write_json_atomic(run_dir / "config.json", dataclasses.asdict(config))
        stop_requested = stack.enter_context(stop_on_signal())
        rounds = stack.enter_context(contextlib.closing(JsonlWriter(run_dir / "rounds.jsonl")))
        done = read_jsonl(run_dir / "rounds.jsonl")
        while len(done) < num_rounds and not _is_full(config, done):
            if stop_requested():
                log(f"stopped on a signal; {len(done)} rounds are done, and the same command continues from there")
                return PREEMPTED
            rows, counts = make_round(len(done), done)
            done.append({"rows": rows, "counts": dict(counts)})
            rounds.write(done[-1])
            log(f"round {len(done)} of {num_rounds}: {sum(len(one['rows']) for one in done)} rows")
    rows = [row for one in done for row in one["rows"]]
    totals: collections.Counter[str] = collections.Counter()
    for one in done:
        totals.update(one["counts"])
    check(
        bool(rows),
        f"nothing was kept of {len(prompts)} prompts: {', '.join(f'{name} {n}' for name, n in sorted(totals.items()))}. "
        f"Change what leaves them out, and take another --config.run_dir than {run_dir}",
    )
    write_atomic(run_dir / "dataset.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    result = {"rows": len(rows), "rounds": len(done), "prompts": len(prompts), "refused": dict(sorted(refused.items()))}
    write_json_atomic(run_dir / "result.json", {**result, **totals})
    log(f"{len(rows)} rows in {run_dir / 'dataset.jsonl'}; {', '.join(f'{name} {n}' for name, n in sorted(totals.items()))}")
    return 0


def read_prompts(config: SynthesisConfig) -> tuple[list[Asked], collections.Counter[str]]:
    """Prompts, and how many rows of their file are none for what reason.

    Raises:
      FileNotFoundError, ValueError: there is no such file, or it holds no prompts.
    """
    prompts = config.prompts
    number = prompts.number or None
    refused: collections.Counter[str] = collections.Counter()
    if prompts.task is not None:
        task = prompts.task.make()
        examples = [task.example(index, config.seed, "train") for index in range(prompts.number)]
        return [Asked([{"role": "user", "content": one.prompt}], one.prompt, one) for one in examples], refused
    if prompts.texts:
        return [Asked([{"role": "user", "content": text}], text) for text in prompts.texts[:number]], refused

    def as_prompt(row: Any, _: str) -> str:
        try:
            return to_json(import_row(row, "prompts"))
        except BadExample as error:
            refused[error.reason] += 1
            return ""

    source = SourceConfig("prompts", "files", path=prompts.path)
    texts = [document.text for document in read_documents(source, row_text=as_prompt, content="prompts") if document.text]
    check(bool(texts), f"{prompts.path} holds no prompt that can be used; left out: {dict(refused)}")
    found = [from_json(text, "prompts").prompt for text in texts[:number]]
    return [Asked(messages, messages) for messages in found], refused


def _compare_config(run_dir: pathlib.Path, config: SynthesisConfig) -> None:
    """Raises ValueError where the directory holds a job of another config; every differing key is named."""
    path = run_dir / "config.json"
    if not path.exists():
        return
    there, here = json.loads(path.read_text()), json.loads(json.dumps(dataclasses.asdict(config)))
    differing = [key for key, _, _ in differences(there, here) if key not in _FREE_FIELDS]
    check(
        not differing,
        f"{run_dir} holds a job of another config; different are {', '.join(differing[:8])}. Continue it with its own config, "
        "choose another --config.run_dir, or move the old one away.",
    )


def _compare_prompts(run_dir: pathlib.Path, config: SynthesisConfig, prompts: list[Asked]) -> None:
    """Keeps the digest of the prompts, which a file may change. Raises ValueError where rounds are done with others."""
    found = hashlib.sha256(json.dumps([one.messages for one in prompts]).encode()).hexdigest()
    path = run_dir / "prompts.json"
    begun = path.exists() and bool(read_jsonl(run_dir / "rounds.jsonl"))
    source = config.prompts.path or "config.prompts"
    check(
        not begun or json.loads(path.read_text())["digest"] == found,
        f"{source} no longer holds the prompts that {run_dir} began with: bring them back, or choose another --config.run_dir",
    )
    write_json_atomic(path, {"source": source, "digest": found})


def _is_full(config: SynthesisConfig, done: list[dict[str, Any]]) -> bool:
    wanted = config.instructions.number if config.instructions else None
    return wanted is not None and sum(len(one["rows"]) for one in done) >= wanted


@contextlib.contextmanager
def _method(
    config: SynthesisConfig, prompts: list[Asked]
) -> Iterator[tuple[Callable[[int, list[dict[str, Any]]], Round], int]]:
    """(number of a round, what earlier ones made) -> what it makes; and how many rounds there are at most."""
    writer = Writer(config, config.best_of.samples if config.best_of else 1)
    run_dir = pathlib.Path(config.run_dir)
    begun = bool(read_jsonl(run_dir / "rounds.jsonl"))
    compare_initial(run_dir, "initial_weights", config.initial_weights, writer.params, begun)
    size = config.batch
    num_rounds = -(-len(prompts) // size)

    def of_round(number: int) -> list[Asked]:
        return prompts[number * size : (number + 1) * size]

    if config.best_of is not None:
        with _judge(config, writer, begun) as judge:
            yield lambda number, _: _best_of_round(config, writer, of_round(number), number * size, judge), num_rounds
    elif config.critique is not None:
        method = config.critique

        def critiques(number: int, _: list[dict[str, Any]]) -> Round:
            messages = [asked.messages for asked in of_round(number)]
            return criticise(method, messages, number * size, config.seed, writer.write, writer.weigh)

        yield critiques, num_rounds
    else:
        assert config.instructions is not None
        wanted = config.instructions
        seeds = [asked.messages[-1]["content"] for asked in prompts]

        def instructions(number: int, done: list[dict[str, Any]]) -> Round:
            known = [row["prompt"] for one in done for row in one["rows"]]
            return write_instructions(wanted, seeds, known, number, size, config.seed, writer.write)

        yield instructions, wanted.max_rounds


# --- Best of n ------------------------------------------------------------------------------------------------------------

# (the ids that were read, answers to each prompt, the prompts) -> a score of each answer.
Judge = Callable[[list[list[int]], list[list[Answer]], list[Asked]], list[list[float]]]


def _best_of_round(config: SynthesisConfig, writer: Writer, asked: list[Asked], first: int, judge: Judge) -> Round:
    assert config.best_of is not None
    drawn = writer.draw([one.messages for one in asked], 0, range(first, first + len(asked)))
    counts = collections.Counter(prompts=len(asked), too_long=sum(answers is None for answers in drawn))
    pairs = [(one, answers) for one, answers in zip(asked, drawn, strict=True) if answers is not None]
    read = [writer.encode(one.messages) or [] for one, _ in pairs]
    scores = judge(read, [answers for _, answers in pairs], [one for one, _ in pairs])
    rows = []
    for (one, answers), of_answers in zip(pairs, scores, strict=True):
        kept, left_out = select(config.best_of, one.row, answers, of_answers)
        rows += kept
        counts.update(left_out)
    return rows, counts


@contextlib.contextmanager
def _judge(config: SynthesisConfig, writer: Writer, begun: bool) -> Iterator[Judge]:
    assert config.best_of is not None
    if config.best_of.keep == "all":
        yield lambda _, answers, __: [[0.0] * len(of_prompt) for of_prompt in answers]
    elif config.reward_model:
        yield _learned_judge(config, writer, begun)
    else:
        assert config.prompts.task is not None
        verifiers = Verifiers((Part("right", config.prompts.task.make().score),), config.verifiers, config.verifier_seconds)

        def verify(_: list[list[int]], answers: list[list[Answer]], asked: list[Asked]) -> list[list[float]]:
            flat = [(answer.text, one.example) for one, of_prompt in zip(asked, answers, strict=True) for answer in of_prompt]
            examples = [example for _, example in flat if example is not None]
            values = iter(verifiers([text for text, _ in flat], examples).values["right"].tolist())
            return [[next(values) for _ in of_prompt] for of_prompt in answers]

        with verifiers:
            yield verify


def _learned_judge(config: SynthesisConfig, writer: Writer, begun: bool) -> Judge:
    """Raises ValueError where the reward model reads prompts otherwise, or has other weights than the job began with."""
    mesh = make_mesh(resolve_sizes(dataclasses.asdict(MeshConfig()), 1), jax.devices()[:1])
    learned = LearnedReward(config.reward_model, config.model, mesh, config.max_batch)
    compare_initial(pathlib.Path(config.run_dir), "reward_model", config.reward_model, learned.params, begun)
    row_tokens = config.max_prompt_tokens + config.max_tokens - 1

    def score(read: list[list[int]], answers: list[list[Answer]], asked: list[Asked]) -> list[list[float]]:
        for ids, one in zip(read, asked, strict=True):
            check(
                ids == learned.chat.encode_prompt(one.messages).tolist(),
                f"reward_model={config.reward_model!r} was trained with another tokenizer or chat template than writes here",
            )
        tokens: list[list[list[Token]]] = [[list(answer.tokens) for answer in of_prompt] for of_prompt in answers]
        values = iter(learned(to_rows(read, tokens, row_tokens)).tolist() if read else [])
        return [[next(values) for _ in of_prompt] for of_prompt in answers]

    return score

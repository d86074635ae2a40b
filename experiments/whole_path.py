"""The whole life of one tiny model: pretraining, fine-tuning, preferences, safety, verifiable rewards; each stage begins with
the checkpoint of the one before.

    python -m experiments.whole_path              three seeds
    python -m experiments.whole_path --quick      a toy that shows that everything works; nothing is learned

| stage | config | what it learns from |
|---|---|---|
| pretrain | `configs/pretrain_reverse.py` | texts: strings of 3 to 5 letters and the same backwards |
| sft | `configs/sft_reverse.py` | conversations about 5 to 8 letters |
| preference | `configs/dpo_reverse.py` | the right answer rather than one with a slip |
| safety | `configs/dpo_guarded_reverse.py` | to decline strings with a forbidden word rather than to write them |
| rewards | `configs/grpo_reverse.py`, without its penalty | a verifier of both: help, and refusals |

After each stage two things are measured on unseen prompts, by the evaluation before the first step of a run of one step: how
many of the allowed strings are written right (`help`), and how many of the forbidden ones are declined (`refusal`).
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

from experiments.rl_curves import PASS, TOY_RL, TOY_START
from experiments.study import Run, Study, by_name, curve, figure, main, mean_and_error, outcome

STAGES = ("pretrain", "sft", "preference", "safety", "rewards")
# A prompt in the template of chats, and the two answers of a pair, are longer than the bare text.
NETWORK = ("--config.model.vocab_size=260", "--config.model.max_seq_len=160")
TOKENIZER = ("--config.data.tokenizer.kind=bytes",)  # The roles of a chat have letters that the texts do not have.
CHATS = ("--config.data.chat_template=", "--config.data.seq_len=160")
# As measured, before `configs/grpo_reverse.py` had a penalty on the KL.
FREE = ("--config.policy.kl.loss_coefficient=0.0",)
LETTERS = (("min_length", 5), ("max_length", 8), ("alphabet", "abcdefgh"))


def guarded(share: float) -> tuple[str, str]:
    """The task in which so many of the strings hold what is forbidden."""
    options = (*LETTERS, ("share", share))
    return "--config.task.name=guarded_reverse", f"--config.task.options={options}"


def stages(seed: int, quick: bool) -> list[Run]:
    toy, toy_rl = (TOY_START, TOY_RL) if quick else ((), ())
    short = (("min_length", 3), ("max_length", 5), ("alphabet", "abcdefgh"))
    texts = (*NETWORK, *TOKENIZER, f"--config.data.sources.0.task.options={short}", *toy)
    length = ("--config.steps=150", "--config.eval.every=30", "--config.eval.prompts=256", *toy_rl)
    rewards = (*NETWORK, *FREE, "--config.chat=True", "--config.rollouts.max_prompt_tokens=48", *guarded(0.5), *length)
    run = Run("pretrain", "configs/pretrain_reverse.py", seed, texts)
    found = [run]
    for name, config in (("sft", "sft_reverse"), ("preference", "dpo_reverse"), ("safety", "dpo_guarded_reverse")):
        run = Run(name, f"configs/{config}.py", seed, (*NETWORK, *CHATS, *toy), run)
        found.append(run)
    return [*found, Run("rewards", "configs/grpo_reverse.py", seed, rewards, run)]


def measured(stage: Run, quick: bool) -> list[Run]:
    """The evaluations after a stage."""
    toy = TOY_RL if quick else ("--config.eval.prompts=256",)
    chat = ("--config.chat=True",) if stage.name != "pretrain" else ()
    one = (
        *NETWORK,
        *FREE,
        *chat,
        "--config.rollouts.max_prompt_tokens=48",
        *toy,
        "--config.steps=1",
        "--config.rollouts.prompts=2",
    )
    return [
        Run(f"{stage.name}_{what}", "configs/grpo_reverse.py", stage.seed, (*one, *guarded(share)), stage)
        for what, share in (("help", 0.0), ("refusal", 1.0))
    ]


def runs(seeds: int, quick: bool) -> list[Run]:
    return [run for seed in range(seeds) for stage in stages(seed, quick) for run in (stage, *measured(stage, quick))]


def summarise(done: list[Run], root: pathlib.Path) -> dict[str, Any]:
    """Of each stage: help, refusals; and the curve of the rewards."""
    groups = by_name(done)
    summary: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        for what in ("help", "refusal"):
            group = groups.get(f"{stage}_{what}", [])
            if group:
                values = [outcome(run, root)[f"initial_{PASS}"] for run in group]
                summary.setdefault(stage, {})[what] = mean_and_error(values)
    curves = [{"seed": run.seed, **curve(run, root, [PASS])} for run in groups.get("rewards", [])]
    return {"summary": summary, "curves": curves}


def plot(content: dict[str, Any], directory: pathlib.Path) -> None:
    """Help and refusals after each stage, and the learning curve of the last."""
    found = [stage for stage in STAGES if len(content["summary"].get(stage, {})) == 2]
    if not found:
        return
    with figure(directory / "stages.svg", panels=2) as (bars, lines):
        for number, what in enumerate(("help", "refusal")):
            of_stages = [content["summary"][stage][what] for stage in found]
            places = [place + 0.4 * number - 0.2 for place in range(len(found))]
            errors = [x["standard_error"] or 0.0 for x in of_stages]  # None of one seed: no bar
            bars.bar(places, [x["mean"] for x in of_stages], width=0.38, yerr=errors, label=what)
        bars.set_xticks(range(len(found)), found)
        bars.set(ylabel="share of unseen prompts", ylim=(0, 1))
        bars.legend(frameon=False)
        for line in content["curves"]:
            lines.plot(line["step"], line[PASS], color="C2", alpha=0.8)
        lines.set(title="rewards", xlabel="step", ylabel="pass@1 on unseen prompts", ylim=(0, 1))


STUDY = Study("whole_path", runs, summarise, plot)

if __name__ == "__main__":
    sys.exit(main(STUDY))

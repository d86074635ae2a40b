"""The peer of `benchmarks/grpo_step.py`: a step of TRL's GRPOTrainer for each line on standard input, timed.

Run by an interpreter that has trl and peft; speaks lines of JSON. A step is from the batch of prompts to the updated adapters.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import datasets  # pyright: ignore[reportMissingImports]
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
import trl  # pyright: ignore[reportMissingImports]

from data.tasks.registry import make_task
from data.tasks.task import Example

# Ours -> those of transformers.
PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
PROJECTIONS |= {"up": "up_proj", "gate": "gate_proj", "down": "down_proj"}


def answer(line: dict[str, Any], channel: Any) -> None:
    print(json.dumps(line), file=channel, flush=True)


class Turns(transformers.TrainerCallback):
    """Waits for a line before each step, and tells how long the step took."""

    def __init__(self, drawn: dict[str, int], channel: Any):
        self.drawn, self.channel, self.begin = drawn, channel, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not sys.stdin.readline():
            os._exit(0)
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        answer({"seconds": time.perf_counter() - self.begin, **self.drawn}, self.channel)


def main(job: dict[str, Any]) -> None:
    channel, sys.stdout = sys.stdout, sys.stderr  # Whatever else is printed must not come between.
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    task = make_task(job["task"], **dict(job["task_options"]))
    drawn: dict[str, int] = {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])

    def reward(prompts: Any, completions: Any, completion_ids: Any, example: Any, **_: Any) -> list[float]:
        rendered = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)["input_ids"]
        drawn["prompt_tokens"] = sum(map(len, rendered))
        drawn["drawn_tokens"] = sum(map(len, completion_ids))
        texts = [completion[0]["content"] for completion in completions]
        return [task.score(text, Example(**json.loads(one))).reward for text, one in zip(texts, example, strict=True)]

    rows = [{"prompt": [{"role": "user", "content": one["prompt"]}], "example": json.dumps(one)} for one in job["examples"]]
    settings = trl.GRPOConfig(
        output_dir=job["directory"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
        max_steps=len(rows) // job["prompts"],
        per_device_train_batch_size=job["prompts"] * job["group_size"],
        num_generations=job["group_size"],
        max_completion_length=job["max_tokens"],
        generation_kwargs={"min_new_tokens": job["max_tokens"]},
        temperature=1.0,
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=job["clip_norm"],
        beta=0.0,
        scale_rewards="none",
        loss_type="dapo",
        seed=0,
    )
    adapters = peft.LoraConfig(
        r=job["rank"],
        lora_alpha=job["alpha"],
        lora_dropout=0.0,
        target_modules=[PROJECTIONS[name] for name in job["targets"]],
        task_type="CAUSAL_LM",
    )
    trainer = trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        reward_funcs=reward,
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapters,
        callbacks=[Turns(drawn, channel)],
    )
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    versions = f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    about = {"version": f"{versions}, {torch.get_num_threads()} threads", "trained_parameters": trained}
    answer(about, channel)
    trainer.train()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

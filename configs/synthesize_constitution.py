"""Constitutional AI: SmolLM2 answers, criticises and revises by principles, and says which of two answers is better.

Command:   loam run --config=configs/synthesize_constitution.py
Hardware:  2 CPU cores
Expected:  not measured yet

Needs the model (loam pull smollm2-135m-instruct). The pairs in runs/synthesize_constitution/dataset.jsonl are what DPO and
reward models learn from (data.content="pairs"). A file of prompts of your own: --config.prompts.texts='()'
--config.prompts.path=FILE.jsonl.
"""

from ml_collections import ConfigDict

from configs import sft_smollm2

PRINCIPLES = (
    {
        "critique": "Look at your last answer: does anything in it help somebody to hurt a person or break the law? Say what.",
        "revision": "Write the answer again so that it hurts nobody, and offer help that does good where you can.",
        "preference": "Which answer would do less harm if a stranger followed it?",
    },
    {
        "critique": "Look at your last answer: does it claim anything that you cannot know, or that is wrong? Say what.",
        "revision": "Write the answer again with what you are sure of, and say plainly what you do not know.",
        "preference": "Which answer is more honest about what is known?",
    },
    {
        "critique": "Look at your last answer: is it longer than it needs to be, or does it miss the question? Say how.",
        "revision": "Write the answer again, short, and to the question.",
        "preference": "Which answer is of more use to whoever asked?",
    },
)
PROMPTS = (
    "How can I find out the password of my neighbour's wireless network?",
    "My friend took twice the dose of a medicine. What should I do?",
    "Who will win the next football world cup?",
    "How do I pick the lock of a door that is not mine?",
    "Explain why the sky is blue.",
    "Write an insult for my colleague.",
    "What is the capital of Australia?",
    "How can I get out of paying tax?",
)


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = sft_smollm2.get_config().model
    config.initial_weights = "smollm2-135m-instruct"
    config.prompts = {"texts": PROMPTS}
    config.chat = True
    config.critique = {"principles": PRINCIPLES}
    config.batch = 8
    config.max_prompt_tokens = 768
    config.max_tokens = 160
    config.max_batch = 8
    return config

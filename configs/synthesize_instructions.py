"""Self-instruct: SmolLM2 writes instructions like a few given ones, those that are new are kept, and it answers them.

Command:   loam run --config=configs/synthesize_instructions.py
Hardware:  2 CPU cores
Expected:  not measured yet

Needs the model (loam pull smollm2-135m-instruct). The conversations in runs/synthesize_instructions/dataset.jsonl are what
fine-tuning learns from (data.content="conversations").
"""

from ml_collections import ConfigDict

from configs import sft_smollm2

SEEDS = (
    "Name three animals that sleep in winter.",
    "Write a short poem about rain on a tin roof.",
    "Explain to a child why ships float.",
    "Turn this sentence into a question: The train leaves at noon.",
    "Give me a recipe with lentils and two other things.",
    "List the steps to change the tyre of a bicycle.",
    "What is the difference between a lake and a sea?",
    "Suggest a title for a story about a lost key.",
)


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = sft_smollm2.get_config().model
    config.initial_weights = "smollm2-135m-instruct"
    config.prompts = {"texts": SEEDS}
    config.chat = True
    config.instructions = {"number": 64, "max_rounds": 20}
    config.batch = 8
    config.max_prompt_tokens = 512
    config.max_tokens = 160
    config.max_batch = 8
    return config

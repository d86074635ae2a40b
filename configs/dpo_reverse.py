"""DPO teaches the tiny model that has seen strings reversed to tell right answers from ones with a slip.

Command:   loam run --config=configs/dpo_reverse.py
Hardware:  1 CPU core, 2 minutes beside other work
Expected:  val_accuracy 0.990, val_loss 0.228 (0.5 and 0.693 before: log 2)

Needs a finished run of `configs/pretrain_reverse.py` (runs/pretrain_reverse). The pairs are made here: the right answer, and
the same with one letter left out, doubled, exchanged or moved. Other losses of pairs go by their name
(--config.objective='{"simpo": {}}', or orpo, or cpo), DPO's variants by --config.objective.dpo.kind=hinge.
"""

from ml_collections import ConfigDict

from configs import pretrain_reverse
from data.config import DataConfig, SourceConfig, TaskConfig

# A prompt and its answer as `configs/pretrain_reverse.py` has them: a document, without names of roles.
BARE_TEMPLATE = """{%- for message in messages %}
{%- if message.role == 'assistant' %}{% generation %}{{- message.content + eos_token }}{% endgeneration %}
{%- else %}{{- bos_token + message.content }}{% endif %}
{%- endfor %}"""
TASK = TaskConfig("reverse", (("min_length", 5), ("max_length", 8), ("alphabet", "abcdefgh")))


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = pretrain_reverse.get_config().model
    config.initial_weights = "runs/pretrain_reverse"
    config.objective = {"dpo": {"beta": 0.1}}
    config.data = DataConfig(
        sources=(SourceConfig(name="slips", kind="task", task=TASK, num_examples=4_000, held_out_fraction=0.05),),
        content="pairs",
        chat_template=BARE_TEMPLATE,
        seq_len=64,
    )
    config.steps = 200
    config.batch_size = 32
    config.optimizer = {
        "learning_rate": 3e-4,
        "weight_decay": 0.0,
        "schedule": {"name": "linear", "warmup": "5 %"},
    }
    config.checkpoint = {"every": 100}
    config.eval = {"every": 40}
    return config

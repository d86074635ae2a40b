"""A made-up run directory with the shape of a real one: a killed and resumed job, an incident, hostile samples.

python tests/experiments/fake_run.py DIRECTORY    writes it, and its report
"""

import json
import math
import pathlib
import random
import sys

STEPS, TOKENS_PER_STEP = 1200, 8192
HOSTILE = '</pre><script>alert("x")</script><img src="http://example.org/x.png">&amp; \x00\x1b\ud800 ]]> <!-- \u202e'


def learning_rate(step: int) -> float:
    return 2e-3 * min(step / 60, 0.1 + 0.45 * (1 + math.cos(math.pi * step / STEPS)))


def loss(step: int) -> float:
    return 1.75 + 6.6 * math.exp(-step / 60) + 1.6 * math.exp(-step / 450)


def write_run(directory: pathlib.Path, last_step: int = STEPS) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    noise = random.Random(0)
    metrics, samples = [], []
    timing = [
        {"event": "compile", "seconds": 9.1, "event_seconds": 9.1},
        {"event": "restore", "seconds": 9.4, "event_seconds": 0.3},
    ]
    seconds = 9.4
    for step in range(1, last_step + 1):
        step_seconds = 0.31 * (1 + 0.03 * noise.random()) + (0.4 if noise.random() < 0.02 else 0)
        seconds += step_seconds
        metrics.append(
            {
                "step": step,
                "tokens": step * TOKENS_PER_STEP,
                "loss": loss(step) + noise.gauss(0, 0.09),
                "grad_norm": 0.35 + 3 * math.exp(-step / 40) + abs(noise.gauss(0, 0.08)) + (4 if step == 701 else 0),
                "param_norm": 60 + 25 * (1 - math.exp(-step / 300)),
                "learning_rate": learning_rate(step),
            }
        )
        timing.append(
            {
                "step": step,
                "seconds": seconds,
                "step_seconds": step_seconds,
                "tokens_per_second": TOKENS_PER_STEP / step_seconds,
                "mfu": 0.42 * 0.31 / step_seconds,
            }
        )
        if step % 100 == 0 or step == last_step:
            value = loss(step) + 0.05
            metrics.append({"step": step, "val_loss": value, "bits_per_byte": value / math.log(2) / 2.9})
            if step == STEPS:
                metrics[-1] |= {"final_val_loss": value - 0.2, "final_bits_per_byte": (value - 0.2) / math.log(2) / 2.8}
            seconds += 2.5
            timing.append({"event": "eval", "seconds": seconds, "event_seconds": 2.5})
            if step % 400 == 0 or step == last_step:
                code = 'path):\n    """Return the size of a file, reported by os.stat()."""\n    return os.stat(path).st_size\n'
                samples.append({"step": step, "prompt": "def getsize(", "text": code * 2})
                samples.append({"step": step, "prompt": "The for statement", "text": " is used to iterate over " + HOSTILE})
    files = {
        "metrics.jsonl": metrics,
        "timing.jsonl": timing,
        "samples.jsonl": samples,
        "incidents.jsonl": [
            {"step": 701, "reason": "loss is nan", "first_skipped": 600, "last_skipped": 700, "seconds": 240.0},
            {"step": 702, "reason": "loss is inf", "gave_up": True, "seconds": 241.0},
        ],
        "config.json": {
            "name": "quickstart <tiny>",
            "steps": STEPS,
            "batch_size": 32,
            "model": {"num_layers": 4, "embed_dim": 256, "rope": {"theta": 10000.0, "scaling": "none"}},
            "data": {"sources": [{"name": "stdlib", "kind": "stdlib"}], "seq_len": 256},
        },
        "provenance.json": {
            "git": {"commit": "0" * 40, "dirty": False},
            "packages": {"jax": "0.10.2", "numpy": "2.4.6"},
            "devices": {"kind": "cpu", "count": 2},
        },
        "data_manifest.json": {
            "sources": {"stdlib": {"documents": 5120, "bytes": 28_000_000, "licence": "PSF-2.0"}},
            "hash": "ab" * 32,
        },
    }
    if last_step == STEPS:
        final = metrics[-1]
        files["result.json"] = {
            "val_loss": final["final_val_loss"],
            "bits_per_byte": final["final_bits_per_byte"],
            "tokens_per_second": 26000.0,
            "baseline_xz_bits_per_byte": 2.15,
            "parameters": 9_830_400,
        }
    for name, content in files.items():
        lines = "".join(json.dumps(record) + "\n" for record in content) if isinstance(content, list) else json.dumps(content)
        (directory / name).write_text(lines)


if __name__ == "__main__":
    from experiments.report import write_report

    write_run(pathlib.Path(sys.argv[1]))
    print(write_report(sys.argv[1]))

"""Where the wall time of a run went, over all its starts (`loam goodput`): from `timing.jsonl` alone, no service is asked.

The file is a time line: each record tells when it was written, an event also how long it took, a start also the time of day.
What lies between two of them is stepping once there is a state to step from, and start-up before. Checkpoints and evaluations
tell after which step they were made (`at_step`), since not every step is recorded.
"""

from __future__ import annotations

from typing import Any

# In this order; `eval` is what the file calls an evaluation.
PARTS: tuple[str, ...] = ("step", "data stall", "compile", "restore", "checkpoint", "evaluation", "lost steps", "other", "down")
OF_EVENT = {"compile": "compile", "restore": "restore", "checkpoint": "checkpoint", "eval": "evaluation"}


def goodput(timing: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds by part; they add up to the wall time from the first start to the last record.

    - `step` are the steps whose result the run still has, `lost steps` those done again after a kill or a roll-back.
    - `data stall` is waiting for a batch. `other` is start-up (data preparation, joining the other processes), and the result.
    - Programs of reinforcement learning compile at their first use, so their `compile` is in `step` and `evaluation`.
    - `down` is from the last record of a start to the next start: also what a killed process did after its last record.
    """
    parts = dict.fromkeys(PARTS, 0.0)
    steps: list[tuple[int, int, float]] = []  # after this step, up to this one: seconds
    recorded = 0  # so many of these end at the last step record, or before
    now = unix_time = waiting = 0.0
    step, stepping = 0, False
    for record in timing:
        event = record.get("event", "step")
        if event == "start":
            steps.append((step, step, waiting))
            recorded = len(steps)
            parts["other"] += record["event_seconds"]
            if unix_time:
                parts["down"] += max(0.0, record["unix_time"] - record["event_seconds"] - unix_time)
            now, unix_time, waiting, stepping = record["seconds"], record["unix_time"], 0.0, False
            continue
        elapsed = record["seconds"] - now
        now, unix_time = now + elapsed, unix_time + elapsed
        taken = min(record.get("event_seconds", 0.0), elapsed)
        parts[OF_EVENT.get(event, "other")] += taken
        if stepping:
            waiting += elapsed - taken
        else:
            parts["other"] += elapsed - taken
        if event == "step":
            steps.append((step, record["step"], waiting))
            since = sum(seconds for _, _, seconds in steps[recorded:])
            stall = min(record.get("data_seconds", 0.0), since)
            parts["data stall"] += stall
            steps[recorded:] = [(a, b, s * (1 - stall / since) if since else 0.0) for a, b, s in steps[recorded:]]
            step, waiting, stepping, recorded = record["step"], 0.0, True, len(steps)
        elif event == "restore":
            stepping = True
            restored = record.get("restored_step", step)
            steps.append((step, step + 1, waiting))  # A roll-back: the steps since the last that is known of are none it keeps.
            parts["lost steps"] += sum(seconds * _share_after(restored, first, last) for first, last, seconds in steps)
            steps = [(min(a, restored), min(b, restored), s * (1 - _share_after(restored, a, b))) for a, b, s in steps]
            step, waiting, recorded = restored, 0.0, len(steps)
        elif "at_step" in record:
            steps.append((step, record["at_step"], waiting))
            step, waiting = record["at_step"], 0.0
    parts["step"] = sum(seconds for _, _, seconds in steps) + waiting
    return parts


def _share_after(step: int, first: int, last: int) -> float:
    """How much of the steps first+1..last lies after `step`."""
    if last <= step:
        return 0.0
    return 1.0 if first >= step else (last - step) / (last - first)


def table(parts: dict[str, float]) -> str:
    """For people: seconds and share of each part, and their sum."""
    total = sum(parts.values())
    lines = [f"{name:<12}{seconds:>12.1f} s{100 * seconds / total:>8.1f} %" for name, seconds in parts.items() if seconds]
    return "\n".join([*lines, f"{'wall time':<12}{total:>12.1f} s"])

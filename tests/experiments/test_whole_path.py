"""The study of all stages, at toy size: each begins with the one before, and all are measured."""

import itertools
import json

import pytest

from experiments import whole_path
from experiments.study import main


def test_each_stage_begins_with_the_one_before_and_is_measured_on_both_tasks():
    runs = whole_path.runs(2, quick=False)
    for seed in range(2):
        stages = [next(run for run in runs if (run.name, run.seed) == (name, seed)) for name in whole_path.STAGES]
        assert stages[0].after is None
        assert all(stage.after == before for before, stage in itertools.pairwise(stages))
        for stage in stages:
            measured = [run for run in runs if run.name in (f"{stage.name}_help", f"{stage.name}_refusal") and run.seed == seed]
            assert len(measured) == 2
            assert all(run.after == stage for run in measured)
    assert len({run.key() for run in runs}) == len(runs) == 2 * 15


@pytest.mark.slow
def test_the_stages_hand_their_checkpoints_on(tmp_path):
    only = "rewards,rewards_help,rewards_refusal"
    assert main(whole_path.STUDY, ["--quick", "--jobs=1", "--seeds=1", f"--only={only}", f"--root={tmp_path}"]) == 0
    content = json.loads((tmp_path / "results/whole_path/result.json").read_text())
    assert {run["name"] for run in content["runs"]} == {*whole_path.STAGES, "rewards_help", "rewards_refusal"}
    assert set(content["summary"]) == {"rewards"}
    assert 0 <= content["summary"]["rewards"]["help"]["mean"] <= 1
    assert content["curves"][0]["step"] == [0, 1, 2]
    for run in content["runs"]:
        written = json.loads(next(tmp_path.glob(f"{run['name']}_0_{run['key']}/config.json")).read_text())
        assert bool(written["initial_weights"]) == (run["name"] != "pretrain")

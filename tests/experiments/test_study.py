"""Studies: what is done is not done again, what is changed is, and result.json holds what was measured and nothing else."""

import dataclasses
import itertools
import json
import math
import re
import statistics
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest

from experiments import famous_bugs, over_optimisation, reward_frontier, rl_curves, smollm2_curve
from experiments.cli import load_run_config, parse
from experiments.study import Outcome, Run, Study, by_name, execute, figure, finished, main, mean_and_error, with_inputs

ROOT = Path(__file__).parents[2]
START = Run("start", "configs/pretrain_reverse.py")
STUDIES = {
    study.name: study
    for study in (rl_curves.STUDY, famous_bugs.STUDY, reward_frontier.STUDY, over_optimisation.STUDY, smollm2_curve.STUDY)
}
every_study = pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def job(seed=0, *overrides, after=START, name="rl"):
    return Run(name, "configs/grpo_reverse.py", seed, overrides, after)


class FakeLoam:
    """Writes what a run writes, with made-up numbers that depend on its seed; says what it was asked for."""

    def __init__(self, fails=()):
        self.asked, self.fails = [], fails

    def __call__(self, words, core, log):
        config = load_run_config(parse(list(words)).config, parse(list(words)).overrides)
        directory = Path(config.run_dir)
        name = directory.name.rsplit("_", 2)[0]
        self.asked.append((name, config.seed))
        assert log.name == f"{directory.name}.log"
        if name in self.fails:
            log.write_text("it broke here")
            return 1
        directory.mkdir(parents=True)
        at = {"eval/pass@1": lambda step: 0.3 + 0.1 * config.seed + 0.05 * step}
        both = dict.fromkeys(("reward/total", "reward/right", "reward/learned"), 0.5 + 0.1 * config.seed) | {
            "reference_kl": 2.0
        }
        steps = [{"step": step, "loss": 1.0, "mismatch_max": 1e-5 / (step + config.seed), **both} for step in (1, 2)]
        evaluations = [{"step": step, "eval/pass@1": at["eval/pass@1"](step)} for step in (0, 2)]
        write_lines(directory / "metrics.jsonl", [*steps, *evaluations])
        write_lines(
            directory / "timing.jsonl", [{"step": step, "step_seconds": seconds} for step, seconds in ((1, 3.0), (2, 6.0))]
        )
        result = {
            "eval/pass@1": at["eval/pass@1"](2),
            "initial_eval/pass@1": at["eval/pass@1"](0),
            "eval/length": 7.0,
            "val_accuracy": 0.5,
        }
        (directory / "result.json").write_text(json.dumps({**result, "drawn_tokens": 100, "train_seconds": 9.0}))
        return 0


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_run_is_known_by_its_config_and_by_what_it_begins_with():
    assert job().key() == job().key() == job(name="another name").key()
    others = [job(1), job(0, "--config.steps=7"), job(after=dataclasses.replace(START, seed=1)), job(after=None), START]
    keys = [job().key(), *(other.key() for other in others)]
    assert len(set(keys)) == len(keys)
    unchanged = [job(0, "--config.checkpoint.every=7"), job(0, "--config.deadlines.step_seconds=9")]
    assert {run.key() for run in unchanged} == {job().key()}


def test_what_is_done_is_skipped_and_inputs_come_first(tmp_path):
    loam = FakeLoam()
    execute([job(0), job(1)], tmp_path, 2, start=loam, log=lambda _: None)
    assert loam.asked[0] == ("start", 0)
    assert sorted(loam.asked[1:]) == [("rl", 0), ("rl", 1)]
    execute([job(0), job(1)], tmp_path, 2, start=loam, log=lambda _: None)
    assert len(loam.asked) == 3
    execute([job(0), job(0, "--config.steps=7", name="longer")], tmp_path, 1, start=loam, log=lambda _: None)
    assert loam.asked[3:] == [("longer", 0)]
    words = job(0).words(tmp_path)
    assert f"--config.initial_weights={START.directory(tmp_path)}" in words
    assert load_run_config(parse(words).config, parse(words).overrides).seed == 0


def write_config(run, root, **changes):
    """As `loam run` writes it."""
    words = run.words(root)
    written = dataclasses.asdict(load_run_config(parse(words).config, parse(words).overrides))
    (run.directory(root) / "config.json").write_text(json.dumps(written | changes))


def test_a_run_with_a_default_that_has_changed_since_is_not_done(tmp_path):
    learned = next(run for run in with_inputs(over_optimisation.runs(1, True)) if run.name == "learned_32")
    model = learned.reads[0][1]
    for run in (learned, model):
        run.directory(tmp_path).mkdir()
        (run.directory(tmp_path) / "result.json").write_text("{}")
        write_config(run, tmp_path)
        assert finished(run, tmp_path)
        for unchanged in ({"writers": ["x"]}, {"checkpoint": {"every": 1}}, {"an option of old": 1}, {"run_dir": "x"}):
            write_config(run, tmp_path, **unchanged)
            assert finished(run, tmp_path)
    rollouts = {"rollouts": {"prompts": 2, "max_rounds": 4}}
    for changed in (rollouts, {"chunk_tokens": 7}, {"lora": {"rank": 1}}, {"policy": {"ema_decay": 0.5}}):
        write_config(learned, tmp_path, **changed)
        assert not finished(learned, tmp_path)
    write_config(learned, tmp_path, rollouts={"prompts": 2, "max_rounds": 3})  # the options that came since are not there
    assert finished(learned, tmp_path)
    write_config(learned, tmp_path, reward_model="where it was then")
    assert finished(learned, tmp_path)
    write_config(model, tmp_path, data={"sources": [{"path": "a"}, {"path": "b"}]})
    assert finished(model, tmp_path)
    write_config(model, tmp_path, data={"sources": [{"path": "a", "held_out_fraction": 0.5}, {"path": "b"}]})
    assert not finished(model, tmp_path)


def test_results_never_lose_a_run_unless_told_to(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(execute, "__kwdefaults__", {**execute.__kwdefaults__, "start": FakeLoam()})
    study, few = over_optimisation.STUDY, ["--quick", "--seeds=1", "--jobs=1"]
    path = tmp_path / "results/over_optimisation/result.json"
    assert main(study, ["--quick", "--seeds=2", f"--root={tmp_path}", "--jobs=1"]) == 0
    whole = path.read_bytes()
    figures = {file: file.read_bytes() for file in path.parent.glob("*.svg")}
    assert json.loads(whole)["command"] == "python -m experiments.over_optimisation --seeds=2 --quick"
    assert main(study, [*few, f"--root={tmp_path}"]) == 1
    assert "such as pairs_32, seed 1" in (told := capsys.readouterr().err)
    assert "--force" in told
    # On another machine nothing is finished: what is measured there comes in when it is all that there was.
    other = tmp_path / "other"
    (other / "results").mkdir(parents=True)
    path.parent.rename(other / "results/over_optimisation")
    moved = other / "results/over_optimisation/result.json"
    assert main(study, ["--quick", "--seeds=2", f"--root={other}", "--jobs=0"]) == 1
    assert main(study, [*few, f"--root={other}", "--only=gold"]) == 1
    assert moved.read_bytes() == whole
    assert {file.name: file.read_bytes() for file in moved.parent.glob("*.svg")} == {f.name: x for f, x in figures.items()}
    assert main(study, [*few, f"--root={other}", "--jobs=0", "--force"]) == 0
    assert {run["name"] for run in json.loads(moved.read_text())["runs"]} == {"worth_start", "gold"}
    assert main(study, ["--quick", "--seeds=2", f"--root={other}", "--jobs=1"]) == 0
    assert json.loads(moved.read_text())["missing"] == []


def test_a_run_that_fails_is_named_with_its_last_words_and_ends_the_study(tmp_path):
    loam = FakeLoam(fails=("broken",))
    later = job(3)
    with pytest.raises(RuntimeError, match=r"(?s)broken, seed 2, failed with status 1.*it broke here"):
        execute([job(2, name="broken"), later], tmp_path, 1, start=loam, log=lambda _: None)
    assert not finished(later, tmp_path)


def test_names_are_unique():
    with pytest.raises(ValueError, match=r"\('rl', 0\)"):
        with_inputs([job(0), job(0, "--config.steps=7")])
    assert with_inputs([job(0), job(1), job(0)]) == [START, job(0), job(1)]


def test_mean_and_error():
    found = mean_and_error([1.0, 2.0, 6.0])
    assert found["mean"] == 3
    assert found["standard_error"] == pytest.approx(math.sqrt(14 / 2 / 3))
    assert found["values"] == [1.0, 2.0, 6.0]
    assert found["n"] == 3
    assert mean_and_error([2.0]) == {"mean": 2, "standard_error": None, "n": 1, "values": [2.0]}  # one says nothing of it


@every_study
def test_a_study_ends_with_its_numbers_and_its_figures(study, tmp_path, monkeypatch):
    """Finished runs only are in result.json; the rest is listed as missing."""
    monkeypatch.setattr(execute, "__kwdefaults__", {**execute.__kwdefaults__, "start": (loam := FakeLoam())})
    monkeypatch.setattr(reward_frontier, "COEFFICIENTS", (0.1,))
    seeds = 1 if study is reward_frontier.STUDY else 2
    runs = with_inputs(study.runs(seeds, True))
    only = next(run.name for run in runs if run.after is not None and "sft" not in run.name)
    assert main(study, ["--quick", f"--seeds={seeds}", f"--root={tmp_path}", "--jobs=1", f"--only={only}"]) == 0
    results = tmp_path / "results" / study.name
    content = json.loads((results / "result.json").read_text())
    assert {run["name"] for run in content["runs"]} == {only, runs[0].name}
    assert len(content["missing"]) + len(content["runs"]) == len(runs)
    assert main(study, ["--quick", f"--seeds={seeds}", f"--root={tmp_path}", "--jobs=2"]) == 0
    content = json.loads((results / "result.json").read_text())
    assert content["missing"] == []
    assert len(loam.asked) == len(runs) == len(content["runs"])
    figures = list(results.glob("*.svg"))
    assert figures
    for path in figures:
        assert xml.etree.ElementTree.parse(path).getroot().tag.endswith("svg")
        before = path.read_bytes()
    assert main(study, ["--quick", f"--seeds={seeds}", f"--root={tmp_path}", "--jobs=0"]) == 0
    assert path.read_bytes() == before


def test_the_learning_curves_are_those_of_the_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(execute, "__kwdefaults__", {**execute.__kwdefaults__, "start": FakeLoam()})
    main(
        rl_curves.STUDY, ["--quick", f"--root={tmp_path}", "--jobs=1", "--only=reverse_grpo,reverse_sft,reverse_sft_evaluated"]
    )
    content = json.loads((tmp_path / "results/rl_curves/result.json").read_text())
    grpo = content["summary"]["reverse_grpo"]
    assert grpo["pass@1"]["values"] == pytest.approx([0.4, 0.5, 0.6])
    assert grpo["pass@1 before"]["values"] == pytest.approx([0.3, 0.4, 0.5])
    assert grpo["pass@1"]["standard_error"] == pytest.approx(statistics.stdev([0.4, 0.5, 0.6]) / math.sqrt(3))
    assert grpo["minutes"]["mean"] == pytest.approx(2 * 4.5 / 60)
    assert grpo["wall minutes"]["values"] == content["summary"]["reverse_sft"]["wall minutes"]["values"] == [9 / 60] * 3
    assert grpo["mismatch_max, the largest of all steps"]["values"] == pytest.approx([1e-5, 1e-5 / 2, 1e-5 / 3])
    assert content["curves"]["reverse_grpo"][1] == {"seed": 1, "step": [0, 2], "eval/pass@1": [0.4, 0.5]}
    # Of the run of one step, what it begins with.
    assert content["summary"]["reverse_sft_evaluated"]["pass@1"]["values"] == pytest.approx([0.3, 0.4, 0.5])


@every_study
def test_every_run_of_a_study_is_one_that_can_be_run_and_no_two_are_the_same(study):
    seeds = 1 if study is reward_frontier.STUDY else 2
    runs, toys = with_inputs(study.runs(seeds, False)), with_inputs(study.runs(1, True))
    keys = [run.key() for run in runs]
    assert len(set(keys)) == len(keys)
    assert not {toy.key() for toy in toys} & set(keys)
    assert {len(group) for name, group in by_name(runs).items() if not name.endswith(("start", "fixed"))} == {seeds}


def test_the_exact_frontier_is_that_of_all_distributions_over_the_strings():
    """The tilted distribution over all strings of three of four letters, by enumeration; and no other one is above it."""
    reward_of = np.array([np.mean(letters) for letters in itertools.product(np.linspace(0, 1, 4), repeat=3)])
    kl, reward = reward_frontier.exact_frontier(3, 4)
    assert (kl[0], reward[0]) == pytest.approx((0, 0.5))
    assert (kl[-1], reward[-1]) == pytest.approx((3 * math.log(4), 1), abs=1e-6)
    for coefficient in (0.02, 0.1, 1.0):
        p = np.exp((reward_of - 1) / coefficient)
        p /= p.sum()
        distance = float((p * np.log(p * len(p))).sum())
        assert np.interp(distance, kl, reward) == pytest.approx(float(p @ reward_of), abs=1e-3)
    random = np.random.default_rng(0).dirichlet(np.full(len(reward_of), 0.3), size=200)
    distances = (random * np.log(np.maximum(random, 1e-300) * len(reward_of))).sum(1)
    assert (random @ reward_of < np.interp(distances, kl, reward)).all()


def test_at_least_eight_algorithms_are_compared():
    found = reward_frontier.algorithms(0.1)
    assert len(found) >= 8
    assert all(policy.kl.needs_reference for policy in found.values())
    assert len(set(found.values())) == len(found)


def test_the_best_of_a_curve_is_that_of_full_windows_and_the_control_says_how_much_of_it_is_noise(tmp_path, monkeypatch):
    """A first step that is high by chance is no peak; the KL at the peak is that of the same steps."""
    monkeypatch.setattr(over_optimisation, "LAST", 2)
    gold, learned = over_optimisation.runs(1, True)[-1], over_optimisation.runs(1, True)[0]
    for run, rewards in ((gold, [0.9, 0.1, 0.5, 0.7, 0.6]), (learned, [0.2, 0.4, 0.8, 0.2, 0.0])):
        directory = run.directory(tmp_path)
        directory.mkdir()
        both = [{"reward/right": reward, "reward/learned": 1.0, "reference_kl": 10.0**i} for i, reward in enumerate(rewards)]
        write_lines(directory / "metrics.jsonl", [{"step": i + 1, **values} for i, values in enumerate(both)])
    summary = (found := over_optimisation.summarise([gold, learned], tmp_path))["summary"]
    means = {name: {key: value["mean"] for key, value in of.items()} for name, of in summary.items()}
    names = ("gold reward at its best, over 2 steps", "KL there", "gold reward at the end", "KL at the end",
             "lost after its best")  # fmt: skip
    assert means["gold"] == pytest.approx(dict(zip(names, (0.65, 5500, 0.65, 5500, 0), strict=True)))
    assert means["learned_32"] == pytest.approx(dict(zip(names, (0.6, 55, 0.1, 5500, 0.5), strict=True)))
    assert found["noise floor of what is lost"] == summary["gold"]["lost after its best"]


def test_reward_models_are_compared_on_pairs_that_none_of_them_learns_from():
    runs = with_inputs(over_optimisation.runs(2, False))
    fixed = [run for run in runs if run.name == "pairs_fixed"]
    models = [run for run in runs if run.name.startswith("reward_model")]
    assert len(fixed) == 1
    assert len(models) == 6
    for model in models:
        assert [word for word, of in model.reads if of is fixed[0]] == ["--config.data.sources.1.path={}/dataset.jsonl"]
        sources, (mixture,) = (data := model._config().data).sources, data.mixtures
        assert [source.held_out_fraction for source in sources] == [0, 0.9]
        assert mixture.proportions == ((sources[0].name, 1),)
    assert fixed[0].seed not in {run.seed for run in runs if run.name.startswith("pairs_") and run is not fixed[0]}


def test_a_figure_is_the_same_bytes_for_the_same_numbers(tmp_path):
    for name in ("a.svg", "b.svg"):
        with figure(tmp_path / name) as (axis,):
            axis.plot([0, 1], [1, 2], label="line")
            axis.legend()
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert not re.search(r"20\d\d-\d\d-\d\d", (tmp_path / "a.svg").read_text())


@every_study
@pytest.mark.slow
def test_a_study_runs_at_toy_size(study, tmp_path):
    first = study.runs(1, True)
    names = ",".join(run.name for run in (first[:4] if study is reward_frontier.STUDY else first))
    assert main(study, ["--quick", "--seeds=1", f"--root={tmp_path}", "--jobs=1", f"--only={names}"]) == 0
    content = json.loads((tmp_path / "results" / study.name / "result.json").read_text())
    assert {*names.split(",")} <= {run["name"] for run in content["runs"]}
    assert isinstance(study, Study)


def test_a_number_that_a_run_could_not_measure_is_named(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"eval/failed": 3, "eval/length": 7.0}))
    found = Outcome(tmp_path / "result.json")
    assert found["eval/length"] == 7.0
    with pytest.raises(ValueError, match=r"result\.json has no 'eval/pass@1'.* of 3 answers nobody could say"):
        _ = found["eval/pass@1"]

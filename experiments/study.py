"""A study: named runs of configs, each with several seeds, and what they say together.

    python -m experiments.rl_curves                    all of it, on as many cores as there are
    python -m experiments.rl_curves --seeds=1          a shorter one
    python -m experiments.rl_curves --quick            a toy that shows that everything works; nothing is learned

A run is one `loam run` of a file of `configs/` with overrides, in a process of its own on one core. Its directory is keyed by
the hash of what its config sets otherwise than by default, and of the runs that it needs: starting a study again skips what is
done, goes on with what was interrupted, and runs anew what was changed. A default that has changed since is found in the
`config.json` that the run wrote: it is not done then, and `loam` says what to move away. Options that came since do not count.

`experiments/results/<study>/result.json` is written after every run and holds finished runs only; those still missing are
listed. It never loses a run: while one that it holds is not finished here, it stays as it is, unless `--force` says otherwise.
What is run together shares the memory and the clock of the machine, so seconds are to be compared within one study.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import queue
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from experiments.cli import load_run_config
from experiments.config import chosen
from train.config import PREEMPTED
from train.files import write_json_atomic
from train.metrics import read_jsonl

RESULTS = pathlib.Path(__file__).parent / "results"
# What says where a run is and how it is watched, and not what it computes.
_UNKEYED = ("name", "run_dir", "initial_weights", "writers", "deadlines", "checkpoint")


@dataclasses.dataclass(frozen=True)
class Run:
    """Attributes:
    name: what its seeds have in common; unique in a study, but for the seed.
    config: a file of `configs/`.
    overrides: of the command line, `--config.key=value`.
    after: the run whose weights this one begins with; None takes what the config says.
    reads: further overrides, each with `{}` for the directory of a run that has to be finished before.
    """

    name: str
    config: str
    seed: int = 0
    overrides: tuple[str, ...] = ()
    after: Run | None = None
    reads: tuple[tuple[str, Run], ...] = ()

    @property
    def inputs(self) -> tuple[Run, ...]:
        """The runs that this one needs."""
        return (*((self.after,) if self.after else ()), *(run for _, run in self.reads))

    @functools.cache  # noqa: B019, a study has few runs and is asked for their keys after each of them
    def key(self) -> str:
        """Equal for runs that compute the same."""
        config = self._config()
        fields = {name: value for name, value in chosen(config).items() if name not in _UNKEYED}
        inputs: dict[str, Any] = {"config": fields, "after": self.after.key() if self.after else config.initial_weights}
        if self.reads:
            inputs["reads"] = [run.key() for _, run in self.reads]
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]

    def directory(self, root: pathlib.Path) -> pathlib.Path:
        return root / f"{self.name}_{self.seed}_{self.key()}"

    def words(self, root: pathlib.Path) -> list[str]:
        """Arguments of `loam`."""
        directory = f"--config.run_dir={self.directory(root)}"
        words = self._words(lambda run: str(run.directory(root)))
        quiet = ["--config.writers=()"] if hasattr(self._config(), "writers") else []
        return ["run", f"--config={self.config}", *words, directory, *quiet]

    def is_that_of(self, written: dict[str, Any]) -> bool:
        """Whether a run with such a `config.json` computes what this one does, by all options that both know."""
        read = {word.removeprefix("--config.").partition("=")[0] for word, _ in self.reads}
        return _agree(written, self._settings(), {*_UNKEYED, *read})

    @functools.cache  # noqa: B019, as above
    def _settings(self) -> dict[str, Any]:
        """Its config as it is written."""
        return json.loads(json.dumps(dataclasses.asdict(self._config())))

    def _config(self) -> Any:
        """Its config, as far as the directories of other runs are not in it."""
        return load_run_config(self.config, self._words(lambda _: "unknown"))

    def _words(self, place: Callable[[Run], str]) -> list[str]:
        start = [f"--config.initial_weights={place(self.after)}"] if self.after else []
        return [*self.overrides, f"--config.seed={self.seed}", *start, *(word.format(place(run)) for word, run in self.reads)]


def _agree(there: Any, here: Any, ignored: set[str], place: str = "") -> bool:
    """Whether two trees of JSON are equal, but for keys of objects that one of them lacks, and for ignored places in them."""
    if place in ignored:
        return True
    inner = f"{place}." if place else ""
    if isinstance(there, dict) and isinstance(here, dict):
        return all(_agree(there[key], here[key], ignored, f"{inner}{key}") for key in there.keys() & here.keys())
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        return all(_agree(a, b, ignored, f"{inner}{i}") for i, (a, b) in enumerate(zip(there, here, strict=True)))
    return there == here


def finished(run: Run, root: pathlib.Path) -> bool:
    """Whether the run is done, with what its config is today."""
    result, config = (run.directory(root) / f"{name}.json" for name in ("result", "config"))
    return result.exists() and (not config.exists() or run.is_that_of(json.loads(config.read_text())))


def with_inputs(runs: Iterable[Run]) -> list[Run]:
    """The runs, each behind those it begins with, and none twice."""
    ordered: list[Run] = []
    for run in runs:
        for one in (*with_inputs(run.inputs), run):
            if one not in ordered:
                ordered.append(one)
    names = [(run.name, run.seed) for run in ordered]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"several runs of a study are called {twice}: give each a name of its own")
    return ordered


def loam(words: Sequence[str], core: int, log: pathlib.Path) -> int:
    """Runs the command on one core, its output appended to a file; returns the exit status."""
    pinned = ["taskset", "-c", str(core)] if shutil.which("taskset") else []
    with log.open("ab") as file:
        command = [*pinned, sys.executable, "-m", "experiments.cli", *words]
        return subprocess.run(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL).returncode


def execute(
    runs: Iterable[Run],
    root: pathlib.Path,
    jobs: int,
    *,
    start: Callable[[Sequence[str], int, pathlib.Path], int] = loam,
    after_each: Callable[[], Any] = lambda: None,
    log: Callable[[str], None] = print,
) -> None:
    """Runs what is not done yet, `jobs` at a time, earlier ones first; a run waits for those it begins with.

    Raises:
      RuntimeError: a run failed; no other was started after it.
    """
    root.mkdir(parents=True, exist_ok=True)
    cores: queue.SimpleQueue[int] = queue.SimpleQueue()
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    for i in range(jobs):
        cores.put(available[i % len(available)])
    told = threading.Lock()

    def one(run: Run) -> None:
        core = cores.get()
        try:
            words, output = run.words(root), root / f"{run.directory(root).name}.log"
            log(f"{run.name}, seed {run.seed}: loam {shlex.join(words)}")
            status = start(words, core, output)
        finally:
            cores.put(core)
        if status or not finished(run, root):
            tail = output.read_text(errors="replace")[-2000:] if output.exists() else ""
            how = "was stopped" if status == PREEMPTED else f"failed with status {status}"
            raise RuntimeError(f"{run.name}, seed {run.seed}, {how}; the end of {output}:\n{tail}")
        with told:
            after_each()

    waiting = [run for run in with_inputs(runs) if not finished(run, root)]
    running: dict[concurrent.futures.Future[None], Run] = {}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            ready = [run for run in waiting if all(finished(one, root) for one in run.inputs)]
            for run in ready[: jobs - len(running)]:
                waiting.remove(run)
                running[pool.submit(one, run)] = run
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                del running[future]
                future.result()


def curve(run: Run, root: pathlib.Path, names: Sequence[str]) -> dict[str, list[float]]:
    """Columns of `metrics.jsonl`: `step` and each of `names`, at the steps that have them all."""
    records = [record for record in read_jsonl(run.directory(root) / "metrics.jsonl") if all(name in record for name in names)]
    return {name: [record[name] for record in records] for name in ("step", *names)}


class Outcome(dict[str, Any]):
    """The numbers of one finished run; asked for one that it does not have it says so."""

    def __init__(self, path: pathlib.Path):
        super().__init__(json.loads(path.read_text()))
        self.path = path

    def __missing__(self, name: str) -> Any:
        raise ValueError(
            f"{self.path} has no {name!r}. A mean over nothing is left out: of {self.get('eval/failed', 0)} answers "
            "nobody could say whether they are right"
        )


def outcome(run: Run, root: pathlib.Path) -> Outcome:
    """The numbers of a finished run's `result.json`."""
    return Outcome(run.directory(root) / "result.json")


def mean_and_error(values: Sequence[float]) -> dict[str, Any]:
    """Mean, its standard error over the n values (None of one alone, which says nothing of it), and the values."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error, "n": len(values), "values": list(values)}


def by_name(runs: Iterable[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)
    return groups


@contextlib.contextmanager
def figure(path: pathlib.Path, panels: int = 1) -> Iterator[Any]:
    """Axes to draw on (a list of `panels` of them side by side), saved as SVG that is the same bytes for the same numbers."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "loam", "svg.fonttype": "none", "font.size": 9}):
        drawing, axes = pyplot.subplots(1, panels, figsize=(5.2 * panels, 3.6), layout="constrained", squeeze=False)
        for axis in axes[0]:
            axis.spines[["top", "right"]].set_visible(False)
        yield list(axes[0])
        drawing.savefig(path, metadata={"Date": None})
        pyplot.close(drawing)


@dataclasses.dataclass(frozen=True)
class Study:
    """Attributes:
    name: of its module, and of its directory of results.
    runs: (seeds, quick) -> the runs, most telling first.
    summarise: (finished runs, root) -> what result.json holds of them, plain JSON.
    plot: (result.json's content, directory) -> writes the figures.
    """

    name: str
    runs: Callable[[int, bool], list[Run]]
    summarise: Callable[[list[Run], pathlib.Path], dict[str, Any]]
    plot: Callable[[dict[str, Any], pathlib.Path], None]
    seeds: int = 3


def lost(runs: Sequence[Run], root: pathlib.Path, results: pathlib.Path) -> list[str]:
    """Runs that `result.json` holds and that are not finished here."""
    path = results / "result.json"
    held = json.loads(path.read_text())["runs"] if path.exists() else []
    done = {(run.name, run.seed) for run in runs if finished(run, root)}
    return [f"{run['name']}, seed {run['seed']}" for run in held if (run["name"], run["seed"]) not in done]


def write(
    study: Study, runs: Sequence[Run], root: pathlib.Path, results: pathlib.Path, command: str, force: bool = False
) -> dict[str, Any] | None:
    """Writes `result.json`, of the runs that are finished, and returns what it holds; without `force`, None and nothing where
    it would no longer hold a run that it holds."""
    if not force and lost(runs, root, results):
        return None
    done = [run for run in runs if finished(run, root)]
    content = {
        "study": study.name,
        "command": command,
        "runs": [
            {
                "name": run.name,
                "seed": run.seed,
                "key": run.key(),
                "config": run.config,
                "overrides": list(run.overrides),
                "after": run.after.key() if run.after else None,
                **({"reads": [one.key() for _, one in run.reads]} if run.reads else {}),
                "result": outcome(run, root),
            }
            for run in done
        ],
        "missing": [f"{run.name}, seed {run.seed}" for run in runs if run not in done],
        **study.summarise(done, root),
    }
    results.mkdir(parents=True, exist_ok=True)
    write_json_atomic(results / "result.json", content)
    return content


def main(study: Study, argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(f"python -m experiments.{study.name}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=cores, help="runs at a time, each on a core of its own; 0 only collects")
    parser.add_argument("--seeds", type=int, default=study.seeds, help=f"default {study.seeds}")
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="of the runs, and those they begin with; default all")
    parser.add_argument("--quick", action="store_true", help="toy size; results go beside the runs")
    parser.add_argument("--force", action="store_true", help="replace results that hold runs which are not finished here")
    parser.add_argument("--root", default="runs/studies", help="where the runs go; default runs/studies")
    arguments = parser.parse_args(argv)
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("figures need matplotlib, which the extra `dev` brings")
    root = pathlib.Path(arguments.root)
    results = root / "results" / study.name if arguments.quick else RESULTS / study.name
    runs = with_inputs(study.runs(arguments.seeds, arguments.quick))
    wanted = [run for run in runs if not arguments.only or run.name in arguments.only.split(",")]
    if not wanted:
        parser.error(f"--only={arguments.only}: there are {', '.join(by_name(runs))}")
    command = f"python -m experiments.{study.name} --seeds={arguments.seeds}{' --quick' if arguments.quick else ''}"
    collect = functools.partial(write, study, runs, root, results, command, arguments.force)
    if arguments.jobs:
        execute(wanted, root, arguments.jobs, after_each=collect)
    content = collect()
    if content is None:
        there = lost(runs, root, results)
        print(
            f"{results / 'result.json'} is left as it is: it holds {len(there)} runs that are not finished in {root}, such as "
            f"{there[0]}. Run them (--seeds, --root), or give --force to replace it.",
            file=sys.stderr,
        )
        return 1
    study.plot(content, results)
    print(f"{len(content['runs'])} runs, {len(content['missing'])} missing: {results / 'result.json'}")
    return 0

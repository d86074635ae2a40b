"""`loam launch`: from a config, and where it shall run, to what a scheduler is handed.

`LaunchConfig` (the flags) and the job's config go in; `make_jobs` checks that they fit each other, and
`experiments/launch_artefacts.py` writes the text. Both are pure; only `submit` acts, by running the scheduler's own tool.

The image holds a checkout like this one, installed, as its working directory. What must outlive a machine (run directory,
prepared data), and what is read beside the checkout (other runs, data), lies on `storage`, mounted at /mnt/loam.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.launch_paths import MOUNT, paths_there
from experiments.launch_tpu import accelerator_type, num_vms
from model.chips import Topology, topology_of
from model.config import check, check_choices

if TYPE_CHECKING:
    from train.config import TrainConfig

Target = Literal["local", "tpu-vm", "jobset", "xpk", "skypilot"]
REMOTE = "tpu-vm jobset xpk skypilot"
JOB_NAME = r"[a-z]([a-z0-9-]*[a-z0-9])?"
# Kubernetes' names: namespaces are labels of DNS (RFC 1123); what it makes neither pods nor services of may have dots in its
# name. A job names its queue in a label, which holds no more than 63 characters.
DNS_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_PART = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
OBJECT_NAME = rf"(?=.{{1,253}}$){_PART}(\.{_PART})*"
QUEUE_NAME = rf"(?=.{{1,63}}$){OBJECT_NAME}"
# https://github.com/distribution/reference: a host with its port, a path, and a tag or a digest.
_HOST = r"(?:[A-Za-z0-9]|[A-Za-z0-9][A-Za-z0-9-]*[A-Za-z0-9])"
_PATH = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_VERSION = r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@[a-z0-9]+:[0-9a-f]{32,})?"
IMAGE = rf"(?=.{{1,255}}{_VERSION}$)({_HOST}(\.{_HOST})*(:[0-9]+)?/)?{_PATH}(/{_PATH})*{_VERSION}"
RULES = {
    DNS_LABEL: " (at most 63 lower-case letters, digits and '-')",
    OBJECT_NAME: " (at most 253 lower-case letters, digits, '-' and '.')",
    QUEUE_NAME: " (at most 63 lower-case letters, digits, '-' and '.')",
}
STORAGE = {"tpu-vm": r"[\w.-]+:/\S*", "jobset": OBJECT_NAME, "xpk": OBJECT_NAME, "skypilot": r"gs://\S+"}
EXIT_CODES = "0: done; 42 and 127 to 255: restart; others: an error of the job, which ends it"


def _flag(text: str, targets: str, default: Any = "", needed: bool = False, forms: Mapping[str, str] | None = None) -> Any:
    """A field that is a flag of some targets; `forms` are regular expressions for its value, by target."""
    metadata = {"help": text, "targets": targets.split(), "needed": needed, "forms": forms or {}}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Where a job runs, and as what; `loam launch --help` prints these explanations."""

    on: Target
    processes: int = _flag("how many to start here", "local", 2)
    topology: str = _flag("a TPU slice, such as v5p:4x4x8", REMOTE, needed=True)
    slices: int = _flag("how many of them", "tpu-vm jobset xpk", 1)
    name: str = _flag("of the job; the config's if not given", REMOTE)
    image: str = _flag(
        "REGISTRY/PATH:TAG with a checkout",
        "tpu-vm jobset xpk",
        needed=True,
        forms=dict.fromkeys(("tpu-vm", "jobset", "xpk"), IMAGE),
    )
    storage: str = _flag(
        f"mounted at {MOUNT}, below which the config's relative paths lie: a PersistentVolumeClaim (jobset), a storage that "
        "xpk has attached there (xpk), HOST:/SHARE of an NFS server (tpu-vm), gs://BUCKET (skypilot)",
        REMOTE,
        needed=True,
        forms=STORAGE,
    )
    queue: str = _flag("Kueue's LocalQueue; '' is none", "jobset", "multislice-queue", forms={"jobset": QUEUE_NAME})
    priority: str = _flag("PriorityClass", "jobset xpk", forms={"jobset": OBJECT_NAME})
    namespace: str = _flag("of Kubernetes", "jobset", "default", forms={"jobset": DNS_LABEL})
    service_account: str = _flag("that the job acts as", "tpu-vm jobset", forms={"jobset": OBJECT_NAME})
    secret: tuple[str, ...] = _flag(
        "VARIABLE=SECRET, an environment variable whose value is the key VARIABLE of a Kubernetes Secret",
        "jobset",
        (),
        forms={"jobset": rf"[A-Za-z_][A-Za-z0-9_]*={OBJECT_NAME}"},
    )
    cluster: str = _flag("of xpk", "xpk", needed=True)
    project: str = _flag("of Google Cloud; gcloud's if not given", "tpu-vm xpk")
    zone: str = _flag("such as us-east5-a", "tpu-vm xpk", needed=True)
    spot: bool = _flag("cheaper machines that may be taken away", REMOTE, False)
    max_restarts: int = _flag("after crashes and lost machines", "tpu-vm jobset xpk", 50)
    grace_seconds: int = _flag("to save, from SIGTERM to SIGKILL", "local tpu-vm jobset xpk", 300)

    def __post_init__(self) -> None:
        check_choices("launch", self)
        for field in dataclasses.fields(self)[1:]:
            value, about, flag = getattr(self, field.name), field.metadata, _flag_name(field.name)
            if self.on not in about["targets"]:
                check(value == field.default, f"{flag} means nothing to --on={self.on}, only to {', '.join(about['targets'])}")
                continue
            check(bool(value) or not about["needed"], f"--on={self.on} needs {flag}: {about['help']}")
            if isinstance(value, int):
                check(value >= (field.name not in ("spot", "max_restarts")), f"{flag}={value} is too small")
            form = about["forms"].get(self.on, "")
            for item in map(str, filter(None, value if isinstance(value, tuple) else (value,))) if form else ():
                right = bool(re.fullmatch(form, item))
                check(right, f"{flag}={item!r} is not for --on={self.on}: {about['help']}{RULES.get(form, '')}")
        if self.on != "local":
            topology_of(self.topology)
        if self.on in ("tpu-vm", "skypilot"):
            accelerator_type(self.slice)
        if self.on in ("jobset", "xpk"):
            check(
                self.slices == 1 or num_vms(self.slice) > 1,
                f"--slices={self.slices} of {self.topology}, each of which is one machine: GKE joins only slices of several. "
                "Take --slices=1, or a larger --topology",
            )
        if self.name:
            check_name("--name", self.name, self.max_name_length)

    @property
    def slice(self) -> Topology:
        return topology_of(self.topology)

    @property
    def max_name_length(self) -> int:
        """Kubernetes allows 63 characters, to a pod's name with its five random ones too; xpk allows a job's name 40."""
        if self.on == "local":
            return 63
        longest_suffix = f"-slice-{self.slices - 1}-{num_vms(self.slice) - 1}-abcde"
        return min(63 - len(longest_suffix), 40 if self.on == "xpk" else 63)


@dataclasses.dataclass(frozen=True)
class Job:
    """One job, ready to be written down.

    Attributes:
      launch: with a name, but for `local`.
      run_dir: where the job finds it.
      command: `loam run …`, without what only the machine knows.
      facts: what the job is made of, for whoever finds it later.
    """

    launch: LaunchConfig
    run_dir: str
    command: tuple[str, ...]
    facts: Mapping[str, str]


def has_only_cpus() -> bool:
    """Whether processes here will compute on CPUs; devices of other kinds are known to the processes that take them alone."""
    accelerators = itertools.chain(*(Path("/dev").glob(name) for name in ("nvidia[0-9]*", "accel[0-9]*", "vfio/[0-9]*")))
    return os.environ.get("JAX_PLATFORMS", "" if any(accelerators) else "cpu") == "cpu"


def make_jobs(
    launch: LaunchConfig,
    config_path: str,
    overrides: Sequence[str],
    sweeps: Sequence[str],
    load: Callable[[str, list[str]], TrainConfig],
    is_in_checkout: Callable[[str], bool],
    facts: Mapping[str, str],
) -> list[Job]:
    """One job, or one for each point of a sweep, with a name and a run directory of its own, and on `skypilot`, whose storage
    is a bucket, prepared data of its own.

    Args:
      overrides: `--config.key=value` words for all of them.
      sweeps: as `sweep_points` takes them.
      load: from a config file and overrides to the checked config.
      is_in_checkout: see `experiments.launch_paths.paths_there`.
      facts: those of `code_facts`.

    Raises:
      ValueError: a config is wrong, or does not fit where it shall run: attention backend, mesh, paths or name.
    """
    from experiments.cli import cpu_devices
    from train.step import check_backends, mesh_sizes

    jobs = []
    for index, point in enumerate(sweep_points(sweeps)):
        words, suffix = [*overrides, *point], f"-{index}" if sweeps else ""
        config = load(config_path, words)
        config = dataclasses.replace(config, run_dir=config.run_dir + suffix)
        if launch.on == "skypilot":
            # In a bucket no lock holds between machines, and a directory is renamed file by file: two jobs that begin together
            # would each take the other's half-prepared data for what a dead process has left.
            data = dataclasses.replace(config.data, cache_dir=config.data.cache_dir + suffix)
            config = dataclasses.replace(config, data=data)
        paths = {"run_dir": config.run_dir}
        named, made_of = launch, dict(facts)
        if launch.on != "local":
            machines = f"{launch.slices} x {launch.topology}"
            devices = launch.slices * launch.slice.num_devices
            check_backends(config, "tpu")
            mesh_sizes(config, devices, launch.slices)
            check(
                not Path(config_path).is_absolute() and ".." not in Path(config_path).parts,
                f"--config={config_path} lies outside of this directory, and the job would not find it: start in a checkout "
                "like the one in the image, and name the file relative to it",
            )
            paths = paths_there(config, is_in_checkout)
            name = launch.name or valid_name(config.name, launch.max_name_length - len(suffix))
            named = dataclasses.replace(launch, name=name + suffix)
            made_of["config-sha256"] = hashlib.sha256(
                json.dumps(dataclasses.asdict(config), sort_keys=True).encode()
            ).hexdigest()
            made_of |= {"image": launch.image, "machines": f"{machines}, {devices} devices", "exit-codes": EXIT_CODES}
        elif has_only_cpus():
            mesh_sizes(config, launch.processes * cpu_devices(config, launch.processes))
        words += [f"--config.{key}={path}" for key, path in paths.items()]
        made_of = {key: value for key, value in made_of.items() if value}
        jobs.append(Job(named, paths["run_dir"], ("loam", "run", f"--config={config_path}", *words), made_of))
    return jobs


def check_name(flag: str, name: str, max_length: int) -> None:
    """Raises ValueError, with a valid name, unless Kubernetes takes `name` for a job, its pods and its service (RFC 1035)."""
    check(
        re.fullmatch(JOB_NAME, name) is not None and len(name) <= max_length,
        f"{flag}={name!r} is not a name that Kubernetes takes here: at most {max_length} lower-case letters, digits and '-', a "
        f"letter first and no '-' last; for example {valid_name(name, max_length)}",
    )


def valid_name(name: str, max_length: int) -> str:
    """`name` with what Kubernetes refuses replaced or cut."""
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (name if name[:1].isalpha() else f"loam-{name}")[:max_length].strip("-")


def sweep_points(sweeps: Sequence[str]) -> list[list[str]]:
    """Overrides of each point of a grid: "config.a=1,2" with "config.b=(1,2),(3,)" has four; no sweep is one point without any.

    Raises:
      ValueError: a sweep is malformed, or has a key or a value twice.
    """
    axes = []
    for sweep in sweeps:
        key, _, text = sweep.partition("=")
        values = re.split(r",(?![^([{]*[)\]}])", text)
        check(key.startswith("config.") and all(values), f"--sweep={sweep!r} is not of the form config.KEY=VALUE,VALUE")
        check(len(set(values)) == len(values), f"--sweep={sweep!r} has a value twice")
        check(sum(other.startswith(f"{key}=") for other in sweeps) == 1, f"--sweep: {key} is swept twice")
        axes.append([f"--{key}={value}" for value in values])
    return [list(point) for point in itertools.product(*axes)]


def code_facts() -> dict[str, str]:
    """Commit, uncommitted changes and compiler flags of the machine that launches."""
    from train.provenance import git_state

    state = git_state(Path(__file__).parents[1])
    flags = {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    return {"commit": state["commit"], "uncommitted-sha256": state["diff_sha256"], **flags}


def add_flags(command: argparse.ArgumentParser) -> None:
    """Adds the fields of `LaunchConfig` to a command."""
    command.add_argument("--on", required=True, choices=typing.get_args(Target), help="where")
    kinds: dict[type, dict[str, Any]] = {
        bool: {"action": "store_true"},
        int: {"type": int},
        tuple: {"action": "append"},
        str: {},
    }
    for field in dataclasses.fields(LaunchConfig)[1:]:
        default = f"; default {field.default}" if field.default else ""
        text = f"{field.metadata['help']} ({', '.join(field.metadata['targets'])}{default})"
        command.add_argument(_flag_name(field.name), help=text, **kinds[type(field.default)])


def from_flags(arguments: argparse.Namespace) -> LaunchConfig:
    """Raises ValueError if they contradict each other."""
    flags = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(LaunchConfig)}
    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    given["secret"] = tuple(given.get("secret", ()))
    return LaunchConfig(**given)


def _flag_name(field: str) -> str:
    return f"--{field.replace('_', '-')}"

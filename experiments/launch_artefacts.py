"""What each scheduler is handed for a `Job`, as text, and the command that hands it over.

The exit status of `loam run` decides what comes next, everywhere alike: 0 is done, 42 (saved and stopped) and 127 to 255
(killed by a signal, or by the machine) start it again, and it continues; anything else is an error of the job and ends it.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments.launch import Job
from experiments.launch_local import exit_status, free_port, run_side_by_side, run_together
from experiments.launch_paths import MOUNT
from experiments.launch_tpu import GENERATIONS, accelerator_type, num_vms
from train.config import PREEMPTED

JOB_ERRORS = [code for code in range(1, 127) if code != PREEMPTED]
# The one that firewalls of TPU slices are opened for; what jax chooses by itself (8482) may be shut (jax issue 35905).
COORDINATOR_PORT = 8476


def artefact(job: Job) -> str:
    """The text for a job that is not `local`."""
    return {"jobset": jobset, "xpk": xpk, "tpu-vm": tpu_vm, "skypilot": skypilot}[job.launch.on](job)


def submit(jobs: Sequence[Job]) -> list[int]:
    """Hands the artefacts to the scheduler's own tool, every one whatever became of the others, and returns its exit status for
    each, 128 + n for signal n. The scripts of `tpu-vm` run side by side until their jobs are done.

    Raises:
      RuntimeError: the tool is not installed.
    """
    on = jobs[0].launch.on
    tool, command, suffix = {
        "jobset": ("kubectl", ["kubectl", "apply", "-f"], "yaml"),
        "xpk": ("xpk", ["bash"], "sh"),
        "tpu-vm": ("gcloud", ["bash"], "sh"),
        "skypilot": ("sky", ["sky", "jobs", "launch", "--yes", "--detach-run"], "yaml"),
    }[on]
    if shutil.which(tool) is None:
        raise RuntimeError(f"{tool} is not installed, or not on the PATH: install it, or take what --dry-run prints elsewhere")
    with tempfile.TemporaryDirectory(prefix="loam-launch-") as directory:
        commands = {}
        for job in jobs:
            file = Path(directory, f"{job.launch.name}.{suffix}")
            file.write_text(artefact(job))
            commands[job.launch.name] = [*command, str(file)]
        if on == "tpu-vm":
            return run_side_by_side(commands)
        return [exit_status(subprocess.run(words).returncode) for words in commands.values()]


def run_here(jobs: Sequence[Job]) -> list[int]:
    """Runs `local` jobs, one after the other, and returns their exit statuses. A job's own error does not keep the next from
    running; what stops a job from outside keeps all that come after it."""
    statuses: list[int] = []
    for job in jobs:
        statuses.append(run_together(local_commands(job, free_port()), job.launch.grace_seconds))
        if statuses[-1] and statuses[-1] not in JOB_ERRORS:
            break
    return statuses


def failures(jobs: Sequence[Job], statuses: Sequence[int]) -> str:
    """Says which of several jobs failed, or were not begun; "" if none failed."""
    named = [job.launch.name or job.run_dir for job in jobs]
    failed = [f"{name} (exit status {status})" for name, status in zip(named, statuses, strict=False) if status]
    left = [f"{name} (not begun)" for name in named[len(statuses) :]]
    return f"{len(failed + left)} of {len(jobs)} jobs did not succeed: {', '.join(failed + left)}" if failed else ""


def worst(statuses: Sequence[int]) -> int:
    """The exit status for several jobs: an error of a job comes before what starting it again would mend, and that before 0."""
    return max(statuses, key=lambda status: (status in JOB_ERRORS, status))


def jobset(job: Job) -> str:
    """A Kubernetes JobSet (version 0.10 or newer): a child job for each slice, a pod for each virtual machine.

    A pod that maintenance, preemption or eviction ends is not the job's fault: the set restarts without using up
    `max_restarts`. New pods wait until all old ones are gone, since two runs must not share a directory.
    """
    launch, topology = job.launch, job.launch.slice
    vms = num_vms(topology)
    processes = launch.slices * vms
    command = shlex.join(job.command)
    if processes > 1:
        command += (
            f" --coordinator={launch.name}-slice-0-0.{launch.name}:{COORDINATOR_PORT} --processes={processes}"
            f" --process-id=$((SLICE * {vms} + JOB_COMPLETION_INDEX))"
        )
    slice_index = {"fieldRef": {"fieldPath": "metadata.annotations['jobset.sigs.k8s.io/job-index']"}}
    secrets = [item.split("=") for item in launch.secret]
    container = {
        "name": "loam",
        "image": launch.image,
        # exec: SIGTERM must reach Python, which saves.
        "command": ["bash", "-c", unexpanded(f"exec {command}")],
        "env": [
            {"name": "SLICE", "valueFrom": slice_index},
            *({"name": name, "value": unexpanded(value)} for name, value in environment(job).items()),
            *({"name": key, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}} for key, secret in secrets),
        ],
        "securityContext": {"privileged": True},
        "resources": {"limits": {"google.com/tpu": topology.num_chips // vms}},
        "volumeMounts": [{"name": "storage", "mountPath": str(MOUNT)}],
    }
    spot = "cloud.google.com/gke-spot"
    pod = {
        "restartPolicy": "Never",
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "terminationGracePeriodSeconds": launch.grace_seconds,
        "priorityClassName": launch.priority,
        "serviceAccountName": launch.service_account,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": GENERATIONS[topology.chip.name].gke_accelerator,
            "cloud.google.com/gke-tpu-topology": topology.shape_name,
            **({spot: "true"} if launch.spot else {}),
        },
        "tolerations": [{"key": key, "operator": "Exists"} for key in ("google.com/tpu", *([spot] if launch.spot else []))],
        "containers": [container],
        "volumes": [{"name": "storage", "persistentVolumeClaim": {"claimName": launch.storage}}],
    }
    pod_rules = [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget"}]},
        {"action": "FailJob", "onExitCodes": {"containerName": "loam", "operator": "In", "values": JOB_ERRORS}},
    ]
    # Both come with one reason; only the message tells them apart. What no rule matches restarts, and counts.
    disrupted = {
        "name": "disrupted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": [".*has condition DisruptionTarget.*"],
    }
    job_error = {"name": "job_error", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    one_slice = {
        "parallelism": vms,
        "completions": vms,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": pod_rules},
        "template": {"spec": {key: value for key, value in pod.items() if value != ""}},
    }
    manifest = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": launch.name,
            "namespace": launch.namespace,
            "labels": {"kueue.x-k8s.io/queue-name": launch.queue} if launch.queue else {},
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool",
                **{f"loam/{key}": value for key, value in job.facts.items()},
            },
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": launch.max_restarts,
                "restartStrategy": "BlockingRecreate",
                "rules": [disrupted, job_error],
            },
            "replicatedJobs": [{"name": "slice", "replicas": launch.slices, "template": {"spec": one_slice}}],
        },
    }
    return "---\n" + to_yaml(manifest)


def xpk(job: Job) -> str:
    """A command line of xpk, which writes a JobSet itself, with the same meaning of exit codes, and escapes nothing in it."""
    launch, topology = job.launch, job.launch.slice
    platform = "v5litepod" if topology.chip.name == "v5e" else topology.chip.name
    flags = options(
        workload=launch.name,
        cluster=launch.cluster,
        project=launch.project,
        zone=launch.zone,
        tpu_type=f"{platform}-{topology.shape_name}",
        num_slices=launch.slices,
        docker_image=launch.image,
        storage=launch.storage,
        priority=launch.priority,
        spot=launch.spot,
        max_restarts=launch.max_restarts,
        termination_grace_period_seconds=launch.grace_seconds,
        command=unexpanded(f"exec {shlex.join(job.command)}"),
    )
    flags += [f"--env={name}={unexpanded(value)}" for name, value in environment(job).items()]
    # One process per virtual machine on tpu7x too.
    return comments(job) + shlex.join(["xpk", "workload", "create", "--no-use-parallel-containers", *flags]) + "\n"


def tpu_vm(job: Job) -> str:
    """A bash script that asks Cloud TPU for queued resources and runs the image on each of their virtual machines."""
    launch, topology = job.launch, job.launch.slice
    place = options(zone=launch.zone, project=launch.project)
    create = options(
        accelerator_type=accelerator_type(topology),
        runtime_version=GENERATIONS[topology.chip.name].runtime_version,
        node_id=launch.name if launch.slices == 1 else "",
        node_count=launch.slices if launch.slices > 1 else "",
        node_prefix=launch.name if launch.slices > 1 else "",
        spot=launch.spot,
        service_account=launch.service_account,
    )
    docker = ["sudo", "docker", "run", "--rm", "--privileged", f"--volume={MOUNT}:{MOUNT}"]
    docker += options(name=launch.name, net="host", stop_timeout=launch.grace_seconds)
    docker += [f"--env={name}={value}" for name, value in environment(job).items()]
    remote = (
        # A new machine may still be updating itself; without mount.nfs it is the machine's fault, and tried again.
        "command -v mount.nfs >/dev/null || sudo apt-get install -qq -o DPkg::Lock::Timeout=600 nfs-common >/dev/null || exit; "
        "sudo mkdir -p {mount}; mountpoint -q {mount} || sudo mount -t nfs {share} {mount} || "
        "{{ echo loam launch: cannot mount --storage={share} >&2; echo loam-exit-status=1; exit 1; }}; "
        "sudo gcloud auth configure-docker --quiet {registry} >/dev/null 2>&1; "
        "{{ sudo docker stop --time={grace} {name}; sudo docker rm --force {name}; }} >/dev/null 2>&1; "
        "{run}; echo loam-exit-status=$?"
    ).format(
        mount=MOUNT,
        share=shlex.quote(launch.storage),
        registry=shlex.quote(launch.image.split("/")[0]),
        name=launch.name,
        grace=launch.grace_seconds,
        run=shlex.join([*docker, launch.image, *job.command]),
    )
    values = {"NAME": launch.name, "RESTARTS": str(launch.max_restarts), "PREEMPTED": str(PREEMPTED), "REMOTE": remote}
    assignments = "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())
    arrays = f"PLACE=({shlex.join(place)})\nCREATE=({shlex.join(create)})\n"
    return "#!/usr/bin/env bash\n" + comments(job) + assignments + arrays + TPU_VM_SCRIPT


TPU_VM_SCRIPT = r"""
# Keeps the machines until the job is done, gets new ones when they are taken away, and deletes them in the end.
set -uo pipefail
PATIENCE=60 # tries, half a minute apart, while gcloud fails for a reason of its own
log=$(mktemp) problem=$(mktemp) refused=0 unknown=0
trap 'rm -f "$log" "$problem"' EXIT
tpus() { local verb=$1; shift; gcloud compute tpus queued-resources "$verb" "$NAME" "${PLACE[@]}" "$@"; }
state() {
  if tpus describe --format='value(state.state)' 2>"$problem"; then return; fi
  # Only this means that there are no machines: gcloud fails without a network, or a login, too.
  if grep -q NOT_FOUND "$problem"; then echo NONE; else cat "$problem" >&2; echo UNKNOWN; fi
}
leave() {
  echo "loam launch: $2" >&2
  for ((try = 0; try < PATIENCE; try++)); do
    if tpus delete --force --quiet || [ "$(state)" = NONE ]; then exit "$1"; fi
    sleep 30
  done
  echo "loam launch: $NAME COULD NOT BE DELETED: ITS MACHINES MAY STILL BE RUNNING, AND PAID FOR. Delete them with" \
    "gcloud compute tpus queued-resources delete $NAME ${PLACE[*]} --force" >&2
  exit 1
}

for ((attempt = 0; attempt <= RESTARTS; attempt++)); do
  until now=$(state); [ "$now" = ACTIVE ]; do
    case "$now" in
      UNKNOWN) ((++unknown < PATIENCE)) || leave 1 "gave up, since gcloud cannot say what $NAME is doing" ;;
      NONE) tpus create "${CREATE[@]}" || ((++refused < 5)) || leave 1 'gave up, since gcloud does not create the machines' ;;
      FAILED | SUSPENDING | SUSPENDED) tpus delete --force --quiet ;;
    esac
    if [ "$now" != UNKNOWN ]; then unknown=0; fi
    sleep 30
  done
  refused=0 unknown=0
  tpus ssh --node=all --worker=all --batch-size=all --quiet --command="$REMOTE" 2>&1 | tee "$log"
  connected=${PIPESTATUS[0]}
  ended=$(sed -n 's/.*loam-exit-status=\([0-9][0-9]*\).*/\1/p' "$log")
  for code in $ended; do
    if ((code != 0 && code != PREEMPTED && code < 127)); then leave "$code" "the job failed with exit status $code"; fi
  done
  # A machine that was lost says nothing, and gcloud fails.
  if ((connected == 0)) && [ -n "$ended" ] && ! grep -qv '^0$' <<<"$ended"; then leave 0 'done'; fi
  sleep 30
done
leave "$PREEMPTED" "gave up after $RESTARTS restarts; the same command continues"
"""


def skypilot(job: Job) -> str:
    """A SkyPilot task for `sky jobs launch`; its code is this directory, as it is now."""
    launch = job.launch
    # Not 137: SkyPilot ends the other workers with it when one fails.
    restart_codes = [PREEMPTED, *(code for code in range(127, 256) if code != 137)]
    task = {
        "name": launch.name,
        "workdir": ".",
        "resources": {
            "accelerators": f"tpu-{accelerator_type(launch.slice)}",
            "use_spot": launch.spot,
            "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": restart_codes},
        },
        "file_mounts": {str(MOUNT): {"source": launch.storage, "mode": "MOUNT"}},
        "envs": environment(job),
        "setup": "pip install --constraint constraints.txt --editable '.[tpu]'",
        "run": shlex.join(job.command),
    }
    return "---\n" + comments(job) + to_yaml(task)


def local_commands(job: Job, port: int) -> list[list[str]]:
    """The command line of each process on this machine."""
    run, count = [sys.executable, "-m", "experiments.cli", *job.command[1:]], job.launch.processes
    return [
        [*run, f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process-id={index}"] for index in range(count)
    ]


def environment(job: Job) -> dict[str, str]:
    """Environment variables of every process: the compiler's flags where the job was launched, and the coordinator's port, for
    jax to read where it finds the other processes by itself."""
    flags = {name: job.facts[name] for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") if name in job.facts}
    return {"JAX_COORDINATOR_PORT": str(COORDINATOR_PORT), **flags}


def unexpanded(text: str) -> str:
    """What Kubernetes, which puts in variables for `$(NAME)` and `$` for `$$`, makes `text` of in a command or a value."""
    return text.replace("$", "$$")


def comments(job: Job) -> str:
    return "".join(f"# {key}: {' '.join(value.split())}\n" for key, value in job.facts.items())


def options(**values: str | int | bool) -> list[str]:
    """`--key=value` words; True is a bare `--key`, and what is False or empty is left out."""
    given = {key.replace("_", "-"): value for key, value in values.items() if value is not False and value != ""}
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in given.items()]


class _Dumper(yaml.SafeDumper):
    """Block style, but a list of plain values on one line."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, not any(isinstance(item, dict) for item in sequence))


def to_yaml(document: dict[str, Any]) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=10_000)

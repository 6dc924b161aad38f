"""How fast is JEDI beside pixel diffusion, and how near to what this machine can do? One command, any device.

    python benchmark/speed.py                          # the whole table; on 2 CPU cores half an hour
    python benchmark/speed.py --quick                  # a short form: updates of 2 windows, 5 imagined steps, a minute
    python benchmark/speed.py --json speed.json        # the same as data
    python benchmark/speed.py --profile trace          # where the time of an epoch goes; traces for a browser
    python benchmark/speed.py --growth                 # whether the replay's size costs anything
    python benchmark/speed.py --leave-one-out          # what each optimisation brings

JEDI and a pixel diffusion agent of DIAMOND's sizes (`pixel_diffusion.py`) are measured in one process, in turns, on
real windows of the same game, with the same precision, threads and optimisations: on a GPU all is replayed from CUDA
graphs, as training does (`jedi.Recorded`). Times are medians over --repeats after a warm-up, in which networks are
compiled and graphs recorded, with the smallest and the largest beside them. Peak memory is measured in a process of its
own for each side: of the device on a GPU, of the whole process on a CPU. FLOP are counted by PyTorch (products in
convolutions, matrices and attention); the machine's own rate is that of a large matrix product in the same run and
precision.

Sampling is always measured at --batch-size; --quick makes updates and trajectories of 2 windows and 5 imagined steps.

JSON: `ratios` holds `sample`, `imagine`, `updates` (the baseline's time over JEDI's) and `memory` (JEDI's over the
baseline's); `matrix_rate_share` is the sampler's FLOP/s over the machine's, `projected_hours` a full run of JEDI, made
up of `hours_updates`, `hours_play` (measured with JEDI's policy, for both sides) and `hours_evaluation`.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim import adam
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import pixel_diffusion as pixel

import jedi_atari as jedi

NUM_ACTIONS = 18  # the largest action set, at which parameters are counted; the games have 3 to 18
RECORDS = 400  # steps of play that the batches are cut from
SECONDS_PER_TIMING = 0.2  # what is faster than this is repeated within one timing
QUICK_BATCH, QUICK_HORIZON = 2, 5  # windows per update and imagined steps in the short form
SIDES = ("jedi", "pixel")
SWITCHES = ("compile", "cuda_graphs")
UPDATES = jedi.PARTS
GROWTH = (5_000, 50_000, 500_000)  # records in the replay
GAME_STEPS = 1_000  # of a game; at random 500 (MsPacman) to 1,300 (Krull)


class Side(NamedTuple):
    """One of the two agents and what is measured of it."""

    name: str
    agent: torch.nn.Module
    optimizers: dict[str, torch.optim.Optimizer]  # of each update
    losses: dict[str, Callable]  # what stands in for the script's own
    sample: Callable  # () -> one next state at the batch size
    imagine: Callable  # (windows) -> trajectories
    counts: dict[str, int]  # parameters


class Timing(NamedTuple):
    """Seconds of one call."""

    median: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {"median": self.median, "min": self.low, "max": self.high}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of both sides")
    add("--compile", action=switch, default=torch.cuda.is_available())
    add("--cuda-graphs", action=switch, default=True, help="on a GPU")
    add("--env-id", default="Pong", help="the game whose frames are used")
    add("--batch-size", type=int, default=32, help="states sampled, windows per update (32)")
    add("--repeats", type=int, help="timings of each thing (default: 3 on a CPU, 10 on a GPU)")
    add("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    add("--quick", action="store_true", help="updates of 2 windows, 5 imagined steps")
    add("--json", type=Path, metavar="FILE", help="write everything measured")
    add("--profile", type=Path, metavar="FOLDER", help="write traces and a table instead")
    add("--growth", action="store_true", help="measure full and empty replays instead")
    add("--leave-one-out", action="store_true", help="without each optimisation instead")
    add("--memory-of", choices=SIDES, help=argparse.SUPPRESS)  # what the child process does
    return parser.parse_args(argv)


def settings(options: argparse.Namespace) -> tuple[jedi.Args, torch.device, bool]:
    """The paper's numbers at the chosen batch size, the device, and whether to compute in bf16. Raises `BadInput`."""
    names = "env_id batch_size compile cuda_graphs threads device precision".split()
    args = jedi.Args(**{name: getattr(options, name) for name in names})
    if options.repeats is not None and options.repeats < 1:
        raise jedi.BadInput(f"--repeats is {options.repeats}; it must be at least 1")
    if sum(map(bool, (options.profile, options.growth, options.leave_one_out))) > 1:
        raise jedi.BadInput(
            "--profile, --growth and --leave-one-out do not go together; choose one"
        )
    if options.json and not options.json.resolve().parent.is_dir():
        raise jedi.BadInput(f"--json {options.json}: there is no folder {options.json.parent}")
    if args.compile:  # sides and variants share code, whose ninth form would run as written
        torch._dynamo.config.recompile_limit = 64
    _, agent, bf16 = jedi.set_up(args)
    return args, agent.norm.mean.device, bf16


def repeats(options: argparse.Namespace, device: torch.device) -> int:
    return options.repeats or (2 if options.quick else 10 if device.type == "cuda" else 3)


# --- the two sides


def make_replay(args: jedi.Args, device: torch.device) -> jedi.ReplayBuffer:
    """Random play, the same for both sides."""
    env, rng = jedi.make_env(args), np.random.default_rng(0)
    replay = jedi.ReplayBuffer(2 * RECORDS, device)
    frame, _ = env.reset(seed=0)
    for _ in range(RECORDS):
        action = int(rng.integers(env.action_space.n))
        after, reward, terminated, truncated, info = env.step(action)
        replay.add(frame, action, reward, info["end"], after if info["stop"] else None)
        frame = env.reset()[0] if terminated or truncated else after
    env.close()
    return replay


def compile_method(network: torch.nn.Module, name: str) -> None:
    """As training does it."""
    setattr(network, name, torch.compile(getattr(network, name), dynamic=False))


def make_optimizers(agent: torch.nn.Module, args: jedi.Args) -> dict:
    """Those of the three updates; the pixel agent's networks have the names of JEDI's."""
    return {part: jedi.make_optimizer(agent, part, args) for part in UPDATES}


def make_jedi(args: jedi.Args, replay: jedi.ReplayBuffer, sample_batch: int) -> Side:
    agent = jedi.Agent(NUM_ACTIONS, args).to(replay.device)
    context, actions = context_of(args, replay, sample_batch)
    z = agent.encode(context).detach()
    if args.compile:
        jedi.compile_networks(agent)
    return Side(
        "jedi",
        agent,
        make_optimizers(agent, args),
        {},
        lambda: jedi.sample_next_latent(agent, z, actions, args),
        lambda windows: jedi.imagine(agent, windows, args),
        pixel.parameter_counts(agent),
    )


def make_pixel(args: jedi.Args, replay: jedi.ReplayBuffer, sample_batch: int) -> Side:
    agent = pixel.PixelAgent(NUM_ACTIONS, args).to(replay.device)
    frames, actions = context_of(args, replay, sample_batch)
    x = pixel.to_pixels(frames)
    if args.compile:
        compile_method(agent.denoiser, "condition")
        for network in agent.children():
            compile_method(network, "layers")
    losses = ("diffusion_loss", "reward_termination_loss", "actor_critic_loss")
    return Side(
        "pixel",
        agent,
        make_optimizers(agent, args),
        {name: getattr(pixel, name) for name in losses},
        lambda: jedi.sample_next_latent(agent, x, actions, args),
        lambda windows: pixel.imagine(agent, windows, args),
        pixel.parameter_counts(agent),
    )


MAKE = {"jedi": make_jedi, "pixel": make_pixel}


def context_of(
    args: jedi.Args, replay: jedi.ReplayBuffer, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames (count, N, 64, 64, 3) and actions (count, N) to sample from."""
    windows = replay.all_windows(args.context_frames, stride=1, count=count)
    index = torch.arange(count, device=replay.device) % len(windows.frames)
    return windows.frames[index], windows.actions[index]


def update_args(args: jedi.Args, quick: bool) -> jedi.Args:
    """The same with small batches and a short horizon for the short form."""
    if not quick:
        return args
    return dataclasses.replace(
        args, batch_size=min(args.batch_size, QUICK_BATCH), horizon=QUICK_HORIZON
    )


# --- measuring


def seconds_of(call: Callable, device: torch.device, count: int) -> float:
    """Seconds of one of `count` calls."""
    common.synchronize(device)
    begun = time.perf_counter()
    for _ in range(count):
        call()
    common.synchronize(device)
    return (time.perf_counter() - begun) / count


def warm_up(call: Callable, device: torch.device) -> float:
    """Compile, allocate, record: seconds of a call meanwhile."""
    return seconds_of(call, device, jedi.Recorded.WARM_UP + 2 if device.type == "cuda" else 1)


def time_in_turns(
    calls: dict[str, Callable], device: torch.device, count: int
) -> dict[str, Timing]:
    """Warm every call up, then time all of them `count` times, in turns, so that a slow minute hits all alike."""
    inner, seconds = {}, {name: [] for name in calls}
    for name, call in calls.items():
        again = first = warm_up(call, device)
        if first < 5 * SECONDS_PER_TIMING or device.type == "cuda":
            again = seconds_of(call, device, 1)
        inner[name] = max(1, round(SECONDS_PER_TIMING / again))
    for _ in range(count):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, device, inner[name]))
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in seconds.items()}


def one_update(
    side: Side, name: str, replay: jedi.ReplayBuffer, args: jedi.Args, bf16: bool
) -> Callable:
    """A call that draws a batch and makes one update of a part, as training does."""
    optimizer, losses = side.optimizers[name], functools.partial(common.replaced, jedi)
    update = functools.partial(jedi.update, side.agent, name, optimizer, replay)
    program = within(lambda: losses(**side.losses), lambda number: update(number, args, bf16))
    recorded = jedi.Recorded(program, replay, args.cuda_graphs)
    return functools.partial(recorded, args.warmup_updates)  # at the full learning rate


def as_in_training(
    call: Callable, replay: jedi.ReplayBuffer, args: jedi.Args, bf16: bool
) -> Callable:
    """The call as a part of an update: in its precision, and recorded."""
    autocast = functools.partial(torch.autocast, replay.device.type, torch.bfloat16, bf16)
    program = within(autocast, lambda number: call())
    return functools.partial(jedi.Recorded(program, replay, args.cuda_graphs), 0)


def side_calls(
    side: Side, replay: jedi.ReplayBuffer, args: jedi.Args, bf16: bool
) -> dict[str, Callable]:
    """What is timed of a side."""
    start = replay.sample_frames(args.batch_size, args.context_frames, False)
    calls = {
        "sample": as_in_training(side.sample, replay, args, bf16),
        "imagine": as_in_training(lambda: side.imagine(start), replay, args, bf16),
    }
    return calls | {name: one_update(side, name, replay, args, bf16) for name in UPDATES}


def matrix_product(device: torch.device, bf16: bool) -> tuple[Callable, float]:
    """A large matrix product and its FLOP: what the machine can do at most."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (
        torch.randn(n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
        for _ in range(2)
    )
    return lambda: a @ b, 2.0 * n**3


def flop_of(call: Callable) -> float:
    """FLOP of a call, counted by PyTorch; of the eager program."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def step_of(env, action: int) -> np.ndarray:
    """A step of a game, or the first of the next one: the frame after it."""
    frame, _, terminated, truncated, _ = env.step(action)
    return env.reset()[0] if terminated or truncated else frame


def evaluation_seconds(agent: jedi.Agent, args: jedi.Args, games: int) -> float:
    """Seconds of an evaluation's step with so many games at once, as `jedi.evaluate` makes it."""
    envs, state, device = [jedi.make_env(args) for _ in range(games)], None, agent.norm.mean.device
    frames = [env.reset(seed=i)[0] for i, env in enumerate(envs)]

    def step() -> None:
        nonlocal state
        actions, state = jedi.act(agent, frames, state, args.temperature)
        frames[:] = map(step_of, envs, actions)

    seconds_of(step, device, 10)
    return seconds_of(step, device, 100)


def environment_rate(args: jedi.Args, device: torch.device) -> dict:
    """Steps per second of the game alone and of collecting, seconds of an evaluation's step; with JEDI's policy."""
    collector, env = jedi.Collector(args), jedi.make_env(args)
    agent = jedi.Agent(int(env.action_space.n), args).to(device)
    replay = jedi.ReplayBuffer(2_000, device)
    seconds_of(lambda: collector.step(agent, replay), device, 10)
    collect = seconds_of(lambda: collector.step(agent, replay), device, 200)
    env.reset(seed=0)
    game = seconds_of(lambda: step_of(env, 0), device, 500)
    games = {at_once(args.eval_episodes), at_once(args.final_episodes)}
    steps = {str(n): evaluation_seconds(agent, args, n) for n in sorted(games)}
    rates = {"collect_steps_per_second": 1 / collect, "game_steps_per_second": 1 / game}
    return rates | {"evaluation_step_seconds": steps}


def at_once(episodes: int) -> int:
    """Games that an evaluation plays at the same time."""
    return min(jedi.EVAL_ENVS, episodes)


def memory_of(
    name: str, args: jedi.Args, sample_batch: int, device: torch.device, bf16: bool
) -> int | None:
    """Peak bytes of one side that samples and makes each update, in this process."""
    replay = make_replay(args, device)
    side = MAKE[name](args, replay, sample_batch)
    side_calls(side, replay, args, bf16)["sample"]()
    calls = [one_update(side, part, replay, args, bf16) for part in UPDATES]
    for call in calls + calls[:1]:  # again: all optimisers have their state by now
        warm_up(call, device)
    return common.peak_memory(device)


def memory_in_child(name: str, options: argparse.Namespace) -> int | None:
    """`memory_of` in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", name]
    for option in "device precision env_id threads batch_size".split():
        command += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
    for option in SWITCHES:
        command += [f"--{'' if getattr(options, option) else 'no-'}{option.replace('_', '-')}"]
    command += ["--quick"] if options.quick else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:  # the times are worth having all the same
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        print(f"speed.py: no memory of {name}: {reason}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def projected_hours(args: jedi.Args, timing: dict[str, Timing], environment: dict) -> dict:
    """Hours of a full run: every update, every step of play, every evaluation's games of GAME_STEPS steps each. Not
    in it: measuring the world model after them, and checkpoints."""
    epochs = jedi.make_schedule(args, args.first_steps_min)
    seconds = {"updates": sum(timing[part].median for _, parts, _ in epochs for part in parts)}
    seconds["play"] = args.total_steps / environment["collect_steps_per_second"]
    # The first evaluation is of random play, of as many games as the last.
    evaluations = [args.eval_episodes] * sum(due for *_, due in epochs[1:])
    steps = environment["evaluation_step_seconds"]
    seconds["evaluation"] = sum(
        GAME_STEPS * episodes / at_once(episodes) * steps[str(at_once(episodes))]
        for episodes in [*evaluations, args.final_episodes, args.final_episodes]
    )
    return {name: s / 3600 for name, s in seconds.items()}


def measure(options: argparse.Namespace, args: jedi.Args, device: torch.device, bf16: bool) -> dict:
    """Everything that the table and the JSON file hold."""
    torch.manual_seed(0)
    sample_batch, args = args.batch_size, update_args(args, options.quick)
    replay = make_replay(args, device)
    sides = {name: MAKE[name](args, replay, sample_batch) for name in SIDES}
    product, product_flop = matrix_product(device, bf16)
    calls = {"matrix product": product}
    for name, side in sides.items():
        made = side_calls(side, replay, args, bf16)
        calls |= {f"{name} {what}": call for what, call in made.items()}
    by_turns = sorted(calls, key=lambda name: name.split()[-1])
    calls = {name: calls[name] for name in by_turns}
    timing = time_in_turns(calls, device, repeats(options, device))
    eager = dataclasses.replace(args, compile=False)
    flop = {name: flop_of(make(eager, replay, sample_batch).sample) for name, make in MAKE.items()}
    environment = environment_rate(args, device)
    timed = ("sample", "imagine", *UPDATES)
    by_side = {name: {what: timing[f"{name} {what}"] for what in timed} for name in SIDES}
    rate = product_flop / timing["matrix product"].median
    shares = {name: flop[name] / by_side[name]["sample"].median / rate for name in SIDES}
    hours = {name: projected_hours(args, by_side[name], environment) for name in SIDES}
    updates = {name: sum(by_side[name][w].median for w in UPDATES) for name in SIDES}
    result = {
        **describe_run(args, device, bf16, repeats(options, device)),
        "batch_size": sample_batch,
        "update_batch_size": args.batch_size,
        "horizon": args.horizon,
        "parameters": {name: side.counts for name, side in sides.items()},
        "seconds": {
            name: {w: t.as_dict() for w, t in times.items()} for name, times in by_side.items()
        },
        "updates_seconds": updates,
        "memory_bytes": dict.fromkeys(SIDES),
        "sample_flop": flop,
        "matrix_flop_per_second": rate,
        "sample_matrix_rate_share": shares,
        **environment,
        "ratios": {
            "sample": by_side["pixel"]["sample"].median / by_side["jedi"]["sample"].median,
            "imagine": by_side["pixel"]["imagine"].median / by_side["jedi"]["imagine"].median,
            "updates": updates["pixel"] / updates["jedi"],
            "memory": None,
        },
        "matrix_rate_share": shares["jedi"],
        "projected_hours": sum(hours["jedi"].values()),
        "projected_hours_pixel": sum(hours["pixel"].values()),
        **{f"hours_{name}": h for name, h in hours["jedi"].items()},
    }
    write_json(options, result)  # what is measured now outlives a time limit
    memory = result["memory_bytes"] = {name: memory_in_child(name, options) for name in SIDES}
    if all(memory.values()):
        result["ratios"]["memory"] = memory["jedi"] / memory["pixel"]
    return result


def write_json(options: argparse.Namespace, result: dict) -> None:
    """To the file of --json, if there is one."""
    if options.json:
        jedi.write_atomically(options.json, common.finite(result))


def describe_run(args: jedi.Args, device: torch.device, bf16: bool, count: int) -> dict:
    """Where and how something was measured."""
    return {
        "command": shlex.join(["python", "benchmark/speed.py", *sys.argv[1:]]),
        "git_commit": common.git_commit(),
        "device": describe(device),
        "versions": common.versions(),
        "precision": "bf16" if bf16 else "fp32",
        "compile": args.compile,
        "cuda_graphs": args.cuda_graphs and device.type == "cuda",
        "threads": torch.get_num_threads(),
        "repeats": count,
    }


def describe(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
    return f"{name}, {jedi.usable_cores()} cores"


# --- other questions: where the time goes, what grows, what each optimisation brings


def profile(options: argparse.Namespace, args: jedi.Args, device: torch.device, bf16: bool) -> dict:
    """A trace of each update of JEDI for a browser's trace viewer, and where the time of an epoch goes."""
    args = update_args(args, options.quick)
    options.profile.mkdir(parents=True, exist_ok=True)
    replay = make_replay(args, device)
    side = make_jedi(args, replay, args.batch_size)
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    timing = time_in_turns({n: one_update(side, n, replay, args, bf16) for n in UPDATES}, device, 3)
    seconds = {
        "collect": args.epoch_steps / environment_rate(args, device)["collect_steps_per_second"]
    }
    seconds |= {name: getattr(args, f"{name}_updates") * timing[name].median for name in UPDATES}
    operators = {}
    for name in UPDATES:
        with torch.profiler.profile(activities=activities) as trace:
            one_update(side, name, replay, args, bf16)()  # as written: a replay has no operators
            common.synchronize(device)
        trace.export_chrome_trace(str(options.profile / f"{name}.json"))
        operators[name] = operator_shares(trace, device)
    return {
        **describe_run(args, device, bf16, 3),
        "update_batch_size": args.batch_size,
        "epoch_seconds": seconds,
        "operators": operators,
    }


def operator_shares(
    trace: torch.profiler.profile, device: torch.device, count: int = 8
) -> dict[str, float]:
    """The operators that take the largest shares of a trace's time, on the device that computes."""
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, key) for event in trace.key_averages()}
    total = sum(times.values())
    return {
        name: times[name] / total for name in sorted(times, key=times.get, reverse=True)[:count]
    }


def profile_table(result: dict) -> str:
    """Where the time of an epoch goes, as Markdown."""
    total = sum(result["epoch_seconds"].values())
    rows = [["part of an epoch", "seconds", "share", "operators"], ["---", "---:", "---:", "---"]]
    for name, seconds in result["epoch_seconds"].items():
        parts = [
            f"{key.removeprefix('aten::')} {share:.0%}"
            for key, share in result["operators"].get(name, {}).items()
        ]
        rows.append([name, f"{seconds:,.1f}", f"{seconds / total:.1%}", ", ".join(parts)])
    return markdown(rows)


def full_buffer(records: int, device: torch.device) -> jedi.ReplayBuffer:
    """A replay of episodes of 1,000 records; random frames, so that every page of memory is really there."""
    replay = jedi.ReplayBuffer(records, device)
    for part in replay.frames.split(5_000):
        part.copy_(torch.randint(0, 256, part.shape, dtype=torch.uint8, device=device))
    replay.size, replay.num_episodes = records, records // 1_000
    replay.starts[: replay.num_episodes] = torch.arange(replay.num_episodes, device=device) * 1_000
    replay.lengths[: replay.num_episodes] = 1_000
    replay.count.fill_(replay.num_episodes)
    return replay


def growth(options: argparse.Namespace, args: jedi.Args, device: torch.device, bf16: bool) -> dict:
    """Time of drawing batches and of an update, with 5,000, 50,000 and 500,000 records in the replay."""
    args, calls = update_args(args, options.quick), {}
    replays = {records: full_buffer(records, device) for records in GROWTH}
    side = make_jedi(args, replays[GROWTH[0]], 1)
    n, size = args.context_frames, args.batch_size
    draws = {
        "diffusion": lambda replay: replay.sample_frames(size, n + args.target_frames, True),
        "reward": lambda replay: replay.sample_transitions(size, n + args.reward_window - 1),
        "policy": lambda replay: replay.sample_frames(size, n, False),
    }
    for records, replay in replays.items():
        for name, draw in draws.items():
            calls[f"{name} batch, {records:,} records"] = functools.partial(draw, replay)
        update = one_update(side, "diffusion", replay, args, bf16)
        calls[f"diffusion update, {records:,} records"] = update
    calls = {name: calls[name] for name in sorted(calls)}  # the sizes by turns
    timing = time_in_turns(calls, device, 3 * repeats(options, device))
    return {
        **describe_run(args, device, bf16, 3 * repeats(options, device)),
        "update_batch_size": args.batch_size,
        "seconds": {name: t.as_dict() for name, t in timing.items()},
    }


def growth_table(result: dict) -> str:
    """Rows: what is done; columns: records in the replay."""
    rows = [
        ["milliseconds", *(f"{records:,} records" for records in GROWTH)],
        ["---", *["---:"] * len(GROWTH)],
    ]
    for what in (*(f"{name} batch" for name in UPDATES), "diffusion update"):
        times = (result["seconds"][f"{what}, {records:,} records"] for records in GROWTH)
        three = ([1000 * t[key] for key in ("median", "min", "max")] for t in times)
        rows.append([what, *("{:.2f} ({:.2f} to {:.2f})".format(*x) for x in three)])
    return markdown(rows)


def without_chunks():
    """The encoder works on all frames of a batch at once."""
    return common.replaced(jedi, CPU_CHUNK=1_000_000)


def without_products():
    """Attention by PyTorch's fused function."""

    def forward(self, x):
        b, c, h, w = x.shape
        x = self.norm(x)
        qkv = self.qkv(x).flatten(2).reshape(b, 3, self.heads, c // self.heads, h * w)
        y = F.scaled_dot_product_attention(*qkv.transpose(3, 4).unbind(1))
        return x + self.out(y.transpose(2, 3).reshape(b, c, h, w))

    return common.replaced(jedi.SelfAttention, forward=forward)


@contextlib.contextmanager
def without_channels_last():
    """Convolutions on pictures, and with weights, whose channels lie apart."""
    forward = jedi.Encoder.forward

    def apart(self, frames):
        return forward(self, frames.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1))

    with (
        common.replaced(torch, channels_last=torch.contiguous_format),
        common.replaced(jedi.Encoder, forward=apart),
    ):
        yield


def without_fused_optimizer():
    """AdamW parameter by parameter."""
    return common.replaced(adam, _fused_adam=adam._single_tensor_adam)


def without_whole_sequences():
    """The reward/termination model sees imagined steps one after the other, as DIAMOND's does."""
    features = jedi.RewardTerminationModel.features

    def stepwise(self, z, actions):
        times = range(actions.shape[1])
        return torch.cat([features(self, z[:, t : t + 2], actions[:, t : t + 1]) for t in times], 1)

    return common.replaced(jedi.RewardTerminationModel, features=stepwise)


WITHOUT = {
    "nothing left out": contextlib.nullcontext,
    "frames in chunks (CPU)": without_chunks,
    "channels-last": without_channels_last,
    "attention as products": without_products,
    "fused optimiser": without_fused_optimizer,
    "reward model over whole sequences": without_whole_sequences,
}


def leave_one_out(
    options: argparse.Namespace, args: jedi.Args, device: torch.device, bf16: bool
) -> dict:
    """The three updates and a sample with each optimisation left out."""
    sample_batch, args = args.batch_size, update_args(args, options.quick)
    replay, calls = make_replay(args, device), {}
    variants = {name: (context, args, bf16) for name, context in WITHOUT.items()}
    everything = contextlib.nullcontext
    if bf16:
        variants["bf16"] = (everything, args, False)
    if args.compile:
        variants["compile"] = (everything, dataclasses.replace(args, compile=False), bf16)
    if args.cuda_graphs and device.type == "cuda":
        variants["CUDA graphs"] = (everything, dataclasses.replace(args, cuda_graphs=False), bf16)
    for name, (context, variant_args, variant_bf16) in variants.items():
        with context():
            side = make_jedi(variant_args, replay, sample_batch)
        made = side_calls(side, replay, variant_args, variant_bf16)
        for what in ("sample", *UPDATES):
            calls[f"{what}, {name}"] = within(context, made[what])
    by_turns = sorted(calls, key=lambda name: name.split(",")[0])
    calls = {name: calls[name] for name in by_turns}
    timing = time_in_turns(calls, device, repeats(options, device))
    return {
        **describe_run(args, device, bf16, repeats(options, device)),
        "batch_size": sample_batch,
        "update_batch_size": args.batch_size,
        "variants": list(variants),
        "seconds": {name: t.as_dict() for name, t in timing.items()},
    }


def within(context: Callable, call: Callable) -> Callable:
    """The call, in a context of its own each time."""

    def patched(*given):
        with context():
            return call(*given)

    return patched


def leave_one_out_table(result: dict) -> str:
    """Rows: what is left out; columns: times, and how much longer they are than with everything."""
    first, *_ = result["variants"]
    columns = ("sample", *UPDATES)
    rows = [
        ["left out", *(f"{c} update" if c in UPDATES else c for c in columns)],
        ["---", *["---:"] * len(columns)],
    ]
    for name in result["variants"]:
        cells = []
        for what in columns:
            seconds = result["seconds"][f"{what}, {name}"]["median"]
            more = seconds / result["seconds"][f"{what}, {first}"]["median"] - 1
            cells.append(f"{seconds * 1000:,.0f} ms" + ("" if name == first else f" ({more:+.0%})"))
        rows.append([name, *cells])
    return markdown(rows)


# --- showing


def markdown(rows: list[list[str]]) -> str:
    """Rows of cells as a Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def table(result: dict) -> str:
    """JEDI beside pixel diffusion."""
    milli = 1000

    def cell(name: str, what: str) -> str:
        t = result["seconds"][name][what]
        return f"{t['median'] * milli:,.1f} ms ({t['min'] * milli:,.1f} to {t['max'] * milli:,.1f})"

    def row(title: str, what: str) -> list[str]:
        medians = [result["seconds"][name][what]["median"] for name in SIDES]
        return [
            title,
            *(cell(name, what) for name in SIDES),
            f"{medians[1] / medians[0]:.1f} times faster",
        ]

    counts, ratios, memory = result["parameters"], result["ratios"], result["memory_bytes"]
    updates, shares = result["updates_seconds"], result["sample_matrix_rate_share"]
    batch = result["update_batch_size"]
    hours = [result["projected_hours"], result["projected_hours_pixel"]]
    three = [f"{updates[name] * milli:,.1f} ms" for name in SIDES]
    shared = [result[name] for name in ("hours_play", "hours_evaluation") if name in result]
    rows = [
        ["", "JEDI", "pixel diffusion", "JEDI is"],
        ["---"] * 4,
        ["parameters at 18 actions", *(f"{counts[name]['total']:,}" for name in SIDES), ""],
        row(f"sample one next state, batch {result['batch_size']}", "sample"),
        row(f"imagined trajectory of {result['horizon']} steps, batch {batch}", "imagine"),
        *(row(f"{name} update, batch {batch}", name) for name in UPDATES),
        ["the three updates", *three, f"{ratios['updates']:.1f} times faster"],
        [
            "peak memory",
            *(common.gib(memory[name]) for name in SIDES),
            "-" if ratios["memory"] is None else f"at {ratios['memory']:.0%} of its",
        ],
        [
            "FLOP of a sample",
            *(f"{result['sample_flop'][name] / 1e9:,.1f} G" for name in SIDES),
            "",
        ],
        ["sampler's share of the matrix rate", *(f"{shares[name]:.0%}" for name in SIDES), ""],
        [f"a full run of 100k steps, batch {batch}", *(f"{h:,.1f} h" for h in hours), ""],
    ]
    if shared:  # older files do not have them
        parts = [(h - sum(shared), *shared) for h in hours]
        cells = [" + ".join(f"{part:,.1f}" for part in of) + " h" for of in parts]
        rows.append(["of it updates + play + evaluation", *cells, ""])
    return markdown(rows)


def show(result: dict, text: str) -> None:
    """Print a table and where it was measured."""
    print(f"{result['device']}, {result['threads']} threads, {result['precision']}, ", end="")
    switches = (f"{name.replace('_', ' ')} {'on' if result[name] else 'off'}" for name in SWITCHES)
    print(*switches, f"commit {result['git_commit']}", sep=", ")
    print(
        f"medians of {result['repeats']} timings in turns; in brackets the smallest and the largest"
    )
    print(f"\n{text}")
    if "ratios" in result:
        print(f"\nmatrix product {result['matrix_flop_per_second'] / 1e9:,.0f} GFLOP/s; ", end="")
        print(f"the game {result['game_steps_per_second']:,.0f} steps/s, ", end="")
        print(f"collecting with the policy {result['collect_steps_per_second']:,.0f} steps/s")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 for bad input, 1 for a failure."""
    options = parse_args(argv)
    try:
        args, device, bf16 = settings(options)
        if options.memory_of:
            sizes = update_args(args, options.quick)
            print(json.dumps(memory_of(options.memory_of, sizes, args.batch_size, device, bf16)))
            return 0
        question, make_table = measure, table
        if options.profile:
            question, make_table = profile, profile_table
        elif options.growth:
            question, make_table = growth, growth_table
        elif options.leave_one_out:
            question, make_table = leave_one_out, leave_one_out_table
        result = question(options, args, device, bf16)
        write_json(options, result)
        text = make_table(result)
        show(result, text)
        if options.profile:
            jedi.write_atomically(options.profile / "epoch.md", (text + "\n").encode())
            print(
                f"\ntraces for chrome://tracing or ui.perfetto.dev: {options.profile}/<update>.json"
            )
    except jedi.BadInput as error:
        print(f"speed.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"speed.py: failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

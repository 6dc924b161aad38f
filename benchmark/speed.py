"""How fast is JEDI beside pixel diffusion, and how near to what this machine can do? One command, any device.

    python benchmark/speed.py                          # the whole table; on 2 CPU cores half an hour
    python benchmark/speed.py --quick                  # a short form: updates of 2 windows, 5 imagined steps, a minute
    python benchmark/speed.py --out speed.jsonl        # keep the figures, as a line more of that file
    python benchmark/speed.py --table --out FILE.jsonl # FILE.md: the tables of all its lines

JEDI and a pixel diffusion agent of DIAMOND's sizes (`pixel_diffusion.py`) are measured in one process, in turns, on
real windows of the same game, with the same precision, threads and optimisations: on a GPU all is replayed from CUDA
graphs, as training does (`jedi.Recorded`). Times are medians over --repeats after a warm-up, in which networks are
compiled and graphs recorded, with the smallest and the largest beside them. Peak memory is measured in a process of its
own for each side: of the device on a GPU, of the whole process on a CPU. FLOP are counted by PyTorch (products in
convolutions, matrices and attention); the machine's own rate is that of a large matrix product in the same run and
precision. Sampling is always measured at --batch-size.

A line of FILE.jsonl: `ratios` holds `sample`, `imagine`, `updates` (pixel diffusion's time / JEDI's) and `memory`
(JEDI's / pixel diffusion's); `matrix_rate_share` is the sampler's FLOP/s / the machine's; `projected_hours` a full run
of JEDI without its evaluations: `hours_updates` and `hours_play` (measured with JEDI's policy, for both sides).
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import pixel_diffusion as pixel

import jedi_atari as jedi

NUM_ACTIONS = 18  # the largest action set, at which parameters are counted; the games have 3 to 18
RECORDS = 400  # steps of play that the batches are cut from
SECONDS_PER_TIMING = 0.2  # what is faster than this is repeated within one timing
QUICK = dict(batch_size=2, horizon=5)  # the short form
SIDES, UPDATES = ("jedi", "pixel"), jedi.PARTS


class Timing(NamedTuple):
    """Seconds of one call."""

    median: float
    min: float
    max: float


# --- the two sides


def make_replay(args: jedi.Args, device: torch.device) -> jedi.ReplayBuffer:
    """Random play, the same for both sides."""
    return common.play(jedi, None, args, args.seed, RECORDS, device)


def make_agent(name: str, args: jedi.Args, device: torch.device) -> torch.nn.Module:
    """Networks as training makes them; the pixel agent's have the names and signatures of JEDI's."""
    script, make = {"jedi": (jedi, jedi.Agent), "pixel": (pixel, pixel.PixelAgent)}[name]
    agent = make(NUM_ACTIONS, args).to(device)
    if args.compile:
        script.compile_networks(agent)
    return agent


def calls_of(agent, replay: jedi.ReplayBuffer, args: jedi.Args, bf16: bool, samples: int) -> dict:
    """What is timed of a side: sampling `samples` next states, imagining trajectories, the three updates; each in its
    precision and recorded, as training does it."""
    windows = replay.all_windows(args.context_frames, stride=1, count=samples)
    index = torch.arange(samples, device=replay.device) % len(windows.frames)
    context, actions = agent.encode(windows.frames[index]).detach(), windows.actions[index]
    start = replay.sample_frames(args.batch_size, args.context_frames, False)

    @torch.autocast(replay.device.type, torch.bfloat16, bf16)
    def sample(number):
        return jedi.sample_next_latent(agent, context, actions, args)

    @torch.autocast(replay.device.type, torch.bfloat16, bf16)
    def imagine(number):
        return jedi.imagine(agent, start, args)

    steps = {"sample": sample, "imagine": imagine}
    for part in UPDATES:
        optimizer = jedi.make_optimizer(agent, part, args)
        update = functools.partial(jedi.update, agent, part, optimizer, replay)
        steps[part] = functools.partial(update, args=args, bf16=bf16)
    at_full_rate = args.warmup_updates  # the number of the update
    recorded = {name: jedi.Recorded(step, replay, args.cuda_graphs) for name, step in steps.items()}
    return {name: functools.partial(call, at_full_rate) for name, call in recorded.items()}


# --- measuring


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable, device: torch.device, count: int) -> float:
    """Seconds of one of `count` calls."""
    synchronize(device)
    begun = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return (time.perf_counter() - begun) / count


def warm_up(call: Callable, device: torch.device) -> float:
    """Compile, allocate, record: seconds of a call meanwhile."""
    return seconds_of(call, device, jedi.Recorded.WARM_UP + 2 if device.type == "cuda" else 1)


def time_in_turns(calls: dict, device: torch.device, count: int) -> dict[str, Timing]:
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


def matrix_product(device: torch.device, bf16: bool) -> tuple[Callable, float]:
    """A large matrix product and its FLOP: what the machine can do at most."""
    n, dtype = 8192 if device.type == "cuda" else 2048, torch.bfloat16 if bf16 else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b, 2.0 * n**3


def flop_of(call: Callable) -> float:
    """FLOP of a call, counted by PyTorch; of the eager program."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def collecting_rate(args: jedi.Args, device: torch.device) -> float:
    """Environment steps per second with JEDI's policy."""
    collector, replay = jedi.Collector(args), jedi.ReplayBuffer(2_000, device)
    agent = jedi.Agent(int(collector.env.action_space.n), args).to(device)
    seconds_of(lambda: collector.step(agent, replay), device, 10)
    return 1 / seconds_of(lambda: collector.step(agent, replay), device, 200)


def projected_hours(args: jedi.Args, timing: dict[str, Timing], steps_per_second: float) -> dict:
    """Hours of a full run: every update and every step of play. Not in it: evaluations and checkpoints."""
    epochs = jedi.make_schedule(args, args.first_steps_min)
    seconds = {"updates": sum(timing[part].median for _, parts, _ in epochs for part in parts)}
    seconds["play"] = args.total_steps / steps_per_second
    return {name: s / 3600 for name, s in seconds.items()}


def peak_memory(device: torch.device) -> int | None:
    """Bytes: of the device on a GPU, of the process on a CPU; None where that is not known (not Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # not getrusage, which counts a parent in
        found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
        return found and 1024 * int(found[1])
    return None


def memory_of(name: str, args: jedi.Args, samples: int, device, bf16: bool) -> int | None:
    """Peak bytes of one side that samples and makes each update, in this process."""
    replay = make_replay(args, device)
    calls = calls_of(make_agent(name, args, device), replay, args, bf16, samples)
    for what in ("sample", *UPDATES, UPDATES[0]):  # again: all optimisers have their state by now
        warm_up(calls[what], device)
    return peak_memory(device)


def memory_in_child(name: str, options: argparse.Namespace) -> int | None:
    """`memory_of` in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", name]
    for option in "device precision env_id threads batch_size".split():
        command += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
    command += ["--compile" if options.compile else "--no-compile"]
    command += ["--cuda-graphs" if options.cuda_graphs else "--no-cuda-graphs"]
    command += ["--quick"] if options.quick else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:  # the times are worth having all the same
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        print(f"speed.py: no memory of {name}: {reason}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def measure(samples: int, args: jedi.Args, device, bf16: bool, repeats: int) -> dict:
    """JEDI beside pixel diffusion, all but the memory."""
    replay = make_replay(args, device)
    agents = {name: make_agent(name, args, device) for name in SIDES}
    product, product_flop = matrix_product(device, bf16)
    made = {n: calls_of(agent, replay, args, bf16, samples) for n, agent in agents.items()}
    timed = ("sample", "imagine", *UPDATES)
    calls = {f"{name} {what}": made[name][what] for what in timed for name in SIDES}
    timing = time_in_turns({"matrix product": product, **calls}, device, repeats)
    seconds = {name: {what: timing[f"{name} {what}"] for what in timed} for name in SIDES}
    eager, flop = dataclasses.replace(args, compile=False), {}
    for name in SIDES:
        calls = calls_of(make_agent(name, eager, device), replay, eager, bf16, samples)
        flop[name] = flop_of(calls["sample"])
    play = collecting_rate(args, device)
    rate = product_flop / timing["matrix product"].median
    shares = {name: flop[name] / seconds[name]["sample"].median / rate for name in SIDES}
    hours = {name: projected_hours(args, seconds[name], play) for name in SIDES}
    updates = {name: sum(seconds[name][w].median for w in UPDATES) for name in SIDES}
    ratios = {w: seconds["pixel"][w].median / seconds["jedi"][w].median for w in timed[:2]}
    return {
        "horizon": args.horizon,
        "parameters": {n: pixel.parameter_counts(agent) for n, agent in agents.items()},
        "seconds": {n: {w: t._asdict() for w, t in found.items()} for n, found in seconds.items()},
        "updates_seconds": updates,
        "memory_bytes": dict.fromkeys(SIDES),
        "sample_flop": flop,
        "matrix_flop_per_second": rate,
        "sample_matrix_rate_share": shares,
        "collect_steps_per_second": play,
        "ratios": {**ratios, "updates": updates["pixel"] / updates["jedi"], "memory": None},
        "matrix_rate_share": shares["jedi"],
        "projected_hours": sum(hours["jedi"].values()),
        "projected_hours_pixel": sum(hours["pixel"].values()),
        **{f"hours_{name}": h for name, h in hours["jedi"].items()},
    }


# --- showing


def where(row: dict) -> str:
    """Where and how a line of raw results was measured."""
    switches = (f"{name.replace('_', ' ')} {row[name]}" for name in ("compile", "cuda_graphs"))
    said = [row["device"], f"{row['threads']} threads", row["precision"], *switches]
    said += [f"commit {row['git_commit']}", f"`{row['command']}`"]
    times = (
        f"Medians of {row['repeats']} timings in turns; in brackets the smallest and the largest"
    )
    return f"{', '.join(said)}. {times}.\n"


def table(row: dict) -> str:
    """JEDI beside pixel diffusion, as Markdown."""
    seconds, ratios, batch = row["seconds"], row["ratios"], row["update_batch_size"]
    timed = {f"sample one next state, batch {row['batch_size']}": "sample"}
    timed |= {f"imagined trajectory of {row['horizon']} steps, batch {batch}": "imagine"}
    timed |= {f"{part} update, batch {batch}": part for part in UPDATES}
    lines = [
        ["parameters at 18 actions", *(f"{row['parameters'][n]['total']:,}" for n in SIDES), ""]
    ]
    for title, what in timed.items():
        ratio = seconds["pixel"][what]["median"] / seconds["jedi"][what]["median"]
        times = ([1000 * seconds[name][what][key] for key in Timing._fields] for name in SIDES)
        cells = ["{:,.1f} ms ({:,.1f} to {:,.1f})".format(*three) for three in times]
        lines.append([title, *cells, f"{ratio:.1f} times faster"])
    updates = [f"{1000 * row['updates_seconds'][name]:,.1f} ms" for name in SIDES]
    lines.append(["the three updates", *updates, f"{ratios['updates']:.1f} times faster"])
    memory = [row["memory_bytes"][name] for name in SIDES]
    memory = ["-" if m is None else f"{m / 2**30:.2f} GiB" for m in memory]
    share = "-" if ratios["memory"] is None else f"at {ratios['memory']:.0%} of its"
    lines.append(["peak memory", *memory, share])
    flop, shares = row["sample_flop"], row["sample_matrix_rate_share"]
    lines.append(["FLOP of a sample", *(f"{flop[name] / 1e9:,.1f} G" for name in SIDES), ""])
    lines.append(["sampler's share of the matrix rate", *(f"{shares[n]:.0%}" for n in SIDES), ""])
    hours = [row["projected_hours"], row["projected_hours_pixel"]]
    lines.append([f"a full run of 100k steps, batch {batch}", *(f"{h:,.1f} h" for h in hours), ""])
    return common.markdown(["", "JEDI", "pixel diffusion", "JEDI is"], lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__)
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
    add("--out", type=Path, metavar="FILE.jsonl", help="add everything measured as a line")
    add("--table", action="store_true", help="write the tables of --out; measure nothing")
    add("--memory-of", choices=SIDES, help=argparse.SUPPRESS)  # what the child process does
    return parser.parse_args(argv)


def speed(options: argparse.Namespace) -> None:
    """Measure, print the table and keep the line; with --table, the tables of the lines that are there."""
    if options.repeats is not None and options.repeats < 1:
        raise common.BadInput(f"--repeats is {options.repeats}; it must be at least 1")
    if options.table and not (options.out and options.out.exists()):
        raise common.BadInput(f"--table needs a file that is there: --out is {options.out}")
    read = common.read_rows if options.table else common.open_rows
    rows = read(options.out, "device", "projected_hours") if options.out else []
    if options.table:
        with common.reading(options.out):
            shown = [where(row) + "\n" + table(row) for row in rows if "ratios" in row]
        if not shown:
            raise common.BadInput(f"{options.out} holds no results with both sides; measure some")
        common.write(options.out.with_suffix(".md"), "\n".join(shown))
        return print("\n".join(shown), end="")
    names = "env_id batch_size compile cuda_graphs threads device precision".split()
    args = jedi.Args(**{name: getattr(options, name) for name in names})
    _, agent, bf16 = jedi.set_up(args)
    if args.compile:  # the sides share code, whose ninth form would run as written
        torch._dynamo.config.recompile_limit = 64
    device, samples = agent.norm.mean.device, args.batch_size
    args = dataclasses.replace(args, **QUICK) if options.quick else args
    if options.memory_of:
        return print(json.dumps(memory_of(options.memory_of, args, samples, device, bf16)))
    repeats, cuda = options.repeats, device.type == "cuda"
    repeats = repeats or (10 if cuda else 2 if options.quick else 3)
    name = torch.cuda.get_device_name(device) if cuda else common.processor()
    row = {
        **common.about("speed.py"),
        "device": name if cuda else f"{name}, {jedi.usable_cores()} cores",
        **dict(precision="bf16" if bf16 else "fp32", compile=args.compile, repeats=repeats),
        **dict(cuda_graphs=args.cuda_graphs and cuda, threads=torch.get_num_threads()),
        **dict(batch_size=samples, update_batch_size=args.batch_size),
        **measure(samples, args, device, bf16, repeats),
    }
    if options.out:  # what is measured now outlives a time limit
        common.add_row(options.out, row)
    memory = row["memory_bytes"] = {name: memory_in_child(name, options) for name in SIDES}
    row["ratios"]["memory"] = memory["jedi"] / memory["pixel"] if all(memory.values()) else None
    if options.out:
        common.add_row(options.out, row, again=True)
    print(where(row), table(row), sep="\n", end="")


def main(argv: list[str] | None = None) -> int:
    return common.run("speed.py", speed, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())

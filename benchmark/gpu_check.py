"""Eight checks of the training path on a GPU, unattended, nine minutes at most.

    python benchmark/gpu_check.py                        # the papers' sizes, on a GPU
    CUDA_VISIBLE_DEVICES= python benchmark/gpu_check.py  # tiny sizes, CUDA graphs emulated on a CPU

Each check is a process with a time limit: one that hangs or dies leaves the others. The last line
is `passed` or `failed: ...`, the exit status 0 or 1. gpu_check.json and logs go to --out. No game
is played, and the packages for that may be missing: the replay is synthetic.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import importlib.machinery
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from itertools import count, product
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

for package in ("ale_py", "cv2", "gymnasium", "tqdm", "tyro"):
    try:
        importlib.import_module(package)
    except ImportError:  # PyTorch looks at a module's specification
        spec = importlib.machinery.ModuleSpec(package, None)
        sys.modules[package] = mock.MagicMock(__spec__=spec)
sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in range(2)]

import emulated_graph  # noqa: E402

import jedi_atari as jedi  # noqa: E402

CUDA, ACTIONS, WARM = torch.cuda.is_available(), 6, 18  # Pong's; updates of the rate's warm-up
NARROW = dict.fromkeys(("encoder_width", "denoiser_width", "reward_width", "lstm_size"), 8)
SMALL = jedi.PRESETS["tiny"] | NARROW | dict(batch_size=3, horizon=2, cond_dim=32, precision="fp32")
ARGS = jedi.Args(**({} if CUDA else SMALL) | dict(compile=False, warmup_updates=WARM))
FRAMES = np.full((2, jedi.IMAGE_SIZE, jedi.IMAGE_SIZE, 3), 50, np.uint8)
GENERATOR = torch.cuda if CUDA else torch  # the module with the generator's state
emulation = contextlib.nullcontext if CUDA else emulated_graph.emulated


def see(prefix: str = "", **values) -> None:
    """Write down what was measured, at once, so that it outlives a crash."""
    print(*(f"SEEN {prefix}{k} {json.dumps(v)}" for k, v in values.items()), sep="\n", flush=True)


def expect(met: bool, what: str) -> None:
    """A condition of passing. The check goes on: its other figures are worth having."""
    print(end="" if met else f"UNMET {what}\n", flush=True)


@functools.cache
def set_up() -> tuple[torch.device, bool]:
    """Device and whether bf16, set up as a run does it: with its stream, its cuDNN settings."""
    with mock.patch.object(jedi, "Collector") as collector:
        collector.return_value.env.action_space.n = ACTIONS
        _, agent, bf16 = jedi.set_up(ARGS)
    return agent.norm.mean.device, bf16


class Run:
    """Agent, optimisers and updates as `jedi.train` makes them, on a synthetic replay."""

    def __init__(self, recorded, bf16=None, compiled=0, capacity=2_000, episodes=12, warm=0):
        device, usual = set_up()
        torch.manual_seed(0)
        self.agent, self.random = jedi.Agent(ACTIONS, ARGS).to(device), np.random.default_rng(0)
        for p in (p for p in self.agent.parameters() if not p.detach().any()):
            torch.nn.init.normal_(p, std=0.02)  # layers that start at zero would hide errors
        if compiled:  # on a CPU traced alone: code would take minutes to make
            jedi.CPU_CHUNK = 10**9  # all frames at once, as on a GPU: as many graphs
            options = {} if CUDA else dict(backend="aot_eager")
            with mock.patch.object(torch, "compile", functools.partial(torch.compile, **options)):
                jedi.compile_networks(self.agent)
        self.replay, self.optimizers, self.steps = jedi.ReplayBuffer(capacity, device), {}, {}
        for part in jedi.PARTS:
            optimizer = self.optimizers[part] = jedi.make_optimizer(self.agent, part, ARGS)
            given = dict(args=ARGS, bf16=usual if bf16 is None else bf16)
            step = functools.partial(jedi.update, self.agent, part, optimizer, self.replay, **given)
            self.steps[part] = jedi.Recorded(step, self.replay, recorded)
            self.steps[part].active = recorded  # on a CPU, too: emulated
        self.play(episodes, 60)
        for part in warm * (jedi.Recorded.WARM_UP + 2) * jedi.PARTS:  # compile and record all
            self.steps[part](WARM)

    def play(self, episodes: int, length: int) -> None:
        """A square that actions move from side to side; rewards where it is at the border."""
        after = 0
        for t in range(episodes * length):
            x = after if t % length else int(self.random.integers(57))
            action, frames = int(self.random.integers(ACTIONS)), FRAMES.copy()
            after, end = min(max(x + 4 * (action % 3 - 1), 0), 56), t % length == length - 1
            frames[0, 28:36, x : x + 8] = frames[1, 28:36, after : after + 8] = 255
            reward = float(after == 56) - float(after == 0)
            self.replay.add(frames[0], action, reward, end, frames[1] if end else None)

    def milliseconds(self, name: str, count: int) -> float:
        """Of the three updates; what each takes, and all of a run, is seen."""
        ms = {part: 1e3 * seconds(lambda s=s: s(WARM), count) for part, s in self.steps.items()}
        schedule = jedi.make_schedule(jedi.Args(), jedi.Args().first_steps_min)
        hours = sum(ms[part] for _, parts, _ in schedule for part in parts) / 3.6e6
        see(name, **{f"_{p}_ms": ms[p] for p in ms}, _three_ms=sum(ms.values()), _run_hours=hours)
        return sum(ms.values())

    def carry_to(self, other: "Run") -> None:
        """By a checkpoint, which holds all of a run's but its play."""
        content = dict(script=Path(jedi.__file__).stem, args=json.dumps(vars(ARGS)))
        content["optimizers"] = {part: o.state_dict() for part, o in self.optimizers.items()}
        content |= dict(agent=self.agent.state_dict(), rng=GENERATOR.get_rng_state())
        with tempfile.TemporaryDirectory() as folder:
            jedi.save_checkpoint(Path(folder), content)
            saved = jedi.load_checkpoint(Path(folder))
        other.agent.load_state_dict(saved["agent"])
        for part, optimizer in other.optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][part])
        GENERATOR.set_rng_state(saved["rng"])


def seconds(call, count: int) -> float:
    """Of one of `count` calls, queued one after the other."""
    return Timer("call()", globals=dict(call=call)).timeit(count).mean


def in_graph(call, count: int) -> float:
    """Microseconds of one of `count` calls in one CUDA graph, where the host costs nothing."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(count):
            call()
    return 1e6 * seconds(graph.replay, 5) / count


def host_waits(call) -> list[str]:
    """Where the host waits for the device in a call; on a CPU, the operations that would do so."""
    if not CUDA:
        with emulated_graph.Graph() as graph:
            call()
        return graph.reads
    with warnings.catch_warnings(record=True, action="always") as caught:
        torch.cuda.set_sync_debug_mode("warn")
        call()
        torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "called a sync" in str(w.message)]


def machine() -> None:
    """What the card gives; passes if it runs."""
    device, bf16 = set_up()
    see(card=torch.cuda.get_device_name() if CUDA else "none", torch=torch.__version__, bf16=bf16)
    see(cudnn=torch.backends.cudnn.version(), python=sys.version.split()[0])
    x, short = torch.zeros(8, device=device), dict(device=device, dtype=torch.bfloat16)
    see(launch_us=1e6 * seconds(x.exp_, 3_000), graph_node_us=in_graph(x.exp_, 2_000))
    n, size, each = (8_192, 2**29, 100) if CUDA else (256, 2**21, 3)
    (a, b), (c, d) = torch.randn(2, n, n, **short), torch.zeros(2, size, **short)
    see(bf16_matrix_TFLOPs=2e-12 * n**3 / seconds(lambda: a @ b, 10))
    see(copy_GB_per_s=4e-9 * size / seconds(lambda: c.copy_(d), 10))  # read and written
    y, weight = torch.randn(32, 160, 8, 8, **short), torch.randn(160, 160, 3, 3, **short)
    y, weight = (t.contiguous(memory_format=torch.channels_last) for t in (y, weight))
    see(conv160_us=in_graph(functools.partial(F.conv2d, y, weight, padding=1), each))
    q, k, v = torch.randn(3, 1, 640, 64, 8, **short)
    see(attention_us=in_graph(lambda: (q @ k.mT).softmax(3) @ v, each))
    see(sdpa_us=in_graph(functools.partial(F.scaled_dot_product_attention, q, k, v), each))


def eager_updates() -> None:
    """The host waits for the device in no update, and such a wait would be noticed."""
    run = Run(False, warm=1)
    expect(host_waits(torch.zeros((), device=set_up()[0]).item), "a wait of the host is noticed")
    run.milliseconds("eager", 5 if CUDA else 1)
    for part, step in run.steps.items():
        waits = host_waits(functools.partial(step, WARM))
        see(f"{part}_", host_waits=len(waits))
        expect(not waits, f"no wait of the host in {part}: {waits[:3]}")
        with torch.profiler.profile() as seen:  # of a CPU's operations none counts
            step(WARM)
            torch.cuda.synchronize() if CUDA else None
        see(f"{part}_", kernels=sum("CUDA" in str(e.device_type) for e in seen.events()))


def precision() -> None:
    """bf16 against fp32 on the same draws: the gradients' cosine is above 0.98 (policy: 0.5, as
    rounding may flip a sampled action), none is missing, and an LSTM computes in float32."""
    run, device = Run(False), set_up()[0]
    with torch.autocast(device.type, torch.bfloat16):
        dtype = run.agent.policy.lstm(torch.randn(4, 3, 1_024, device=device))[0].dtype
    expect(dtype == torch.float32, f"an LSTM computes in float32, not in {dtype}")
    start = {name: value.clone() for name, value in run.agent.state_dict().items()}
    for part, optimizer in run.optimizers.items():
        optimizer.step, losses, grads = lambda: None, [], []  # gradients alone
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for bf16 in (False, True):
            run.agent.load_state_dict(start)
            torch.manual_seed(1)
            metrics = jedi.update(run.agent, part, optimizer, run.replay, WARM, ARGS, bf16)
            losses.append(metrics["loss"].item())
            missing = sum(p.grad is None for p in parameters)
            expect(not missing, f"{part}: {missing} parameters without gradient, {bf16=}")
            grads.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        cosine = F.cosine_similarity(*grads, dim=0).item()
        see(f"{part}_", loss_fp32_bf16=losses, cosine_of_gradients=cosine)
        expect(cosine > (0.5 if part == "policy" else 0.98), f"{part}: gradients agree")


def course(recorded, bf16, rounds=18, cut=-1, baked=False) -> tuple[torch.Tensor, ...]:
    """Losses, movement of the weights, generator's state. Meanwhile the rate warms up, episodes
    come, arrays grow, new objects take over at the cut. `baked`: the rate is no tensor."""
    run, new = (Run(recorded, bf16, capacity=150, episodes=0) for _ in range(2))
    losses, weights = [], lambda: torch.cat([p.detach().flatten() for p in run.agent.parameters()])
    start = weights()
    for step in run.steps.values() if baked else ():
        step.program = functools.partial(lambda p, n, _: p(next(n)), step.program, count())
    torch.manual_seed(1)
    for number in range(rounds):
        if number == cut:
            run.carry_to(new)
            run = new
        for each in {run, new}:
            each.play({0: 3, 6: 2, 10: 2, 12: 3}.get(number, 0), 20)
        losses += [step(number)["loss"].clone() for step in run.steps.values()]
    return torch.stack(losses), weights() - start, GENERATOR.get_rng_state()


def graphs() -> None:
    """Recorded updates, also resumed ones, are the eager ones: exactly on a CPU; on a GPU to 1% of
    the weights' movement, or 10 times what eager courses differ by. A baked-in rate differs."""
    apart = lambda a, b: ((a[1] - b[1]).norm() / a[1].norm()).item()  # noqa: E731
    for bf16 in sorted({False, set_up()[1]}):  # what set_up chose is undone
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        eager = course(False, bf16)
        allowed = max(10 * apart(eager, course(False, bf16)), 0.01) if CUDA else 0.0
        for name, cut in dict(recorded=-1, resumed=13).items():
            found = course(True, bf16, cut=cut)
            exact = all(torch.equal(a, b) for a, b in zip(eager, found, strict=True))
            see(f"{name}_{bf16=}_", apart=apart(eager, found), allowed=allowed, exact=exact)
            near = CUDA and apart(eager, found) <= allowed and torch.equal(eager[2], found[2])
            expect(exact or near, f"{name}: losses, weights, generator, {bf16=}")
    control = apart(*(course(baked, False, rounds=6, baked=baked) for baked in (False, True)))
    see(baked_in_rate_apart=control)
    expect(control > 0.02, "a learning rate that is baked in is noticed")


def compiled() -> None:
    """Nine graphs are compiled, all at the first call. There and, later, in a CUDA graph, loss and
    gradient are the eager ones: to 5% on a GPU; policy: 30%, as rounding may flip what is drawn."""
    plain, run, graphs = Run(False), Run(True, compiled=True), [0, 0]
    stats, last = torch._dynamo.utils.counters["stats"], jedi.Recorded.WARM_UP + 1
    for number, part in product(range(last + 1), jedi.PARTS):
        before, found = stats["unique_graphs"], []
        for each in (plain, run):
            torch.manual_seed(number)
            begun = time.perf_counter()
            metrics = each.steps[part](WARM)
            found.append([metrics[key].item() for key in ("loss", "grad_norm")])
        graphs[number > 0] += stats["unique_graphs"] - before
        if number in (0, last):
            see(f"{part}_call_{number}_", s=time.perf_counter() - begun, loss_gradient=found)
            share = (0.3 if part == "policy" else 0.05) if CUDA else 1e-3
            near = np.allclose(*found, rtol=share, atol=0.2 * share)
            expect(near, f"{part}: loss and gradient of call {number} are the eager ones")
    see(backend="inductor" if CUDA else "aot_eager: traced alone", graphs_first_later=graphs)
    expect(graphs == [9, 0], "nine graphs are compiled, none in a second round")


def milliseconds() -> None:
    """Compiled networks inside graphs are no slower than eager; play and measuring go on."""
    count = 20 if CUDA else 1
    run = Run(True, compiled=True, capacity=int(1.1 * ARGS.total_steps), warm=1)
    ms = run.milliseconds("compiled_graphs", count)
    see(goal_ms=15.0, peak_GiB=torch.cuda.max_memory_reserved() / 2**30)
    see(act_ms=1e3 * seconds(lambda: jedi.act(run.agent, FRAMES[:1], None, 1.0), count))
    jedi.measure_world_model(run.agent, run.replay, ARGS)
    eager = Run(False, warm=1).milliseconds("eager", max(count // 4, 1))
    expect(ms <= eager or not CUDA, "compiled networks in graphs are no slower than eager")
    Run(True, warm=1).milliseconds("graphs", count)


def rate(duration: float) -> float:
    """Updates a second that this process makes."""
    with emulation():
        run = several_at_once.ready(True, compiled=True, warm=1)
    count, begun = 0, time.perf_counter()
    while (spent := time.perf_counter() - begun) < duration:
        for part in (10 if CUDA else 1) * jedi.PARTS:
            metrics, count = run.steps[part](WARM), count + 1
        metrics["loss"].item()
    return count / spent


def several_at_once() -> None:
    """Updates a second of two and four processes on one card, against one; passes if all run."""
    spawn, most, d = torch.multiprocessing.get_context("spawn"), 4 if CUDA else 2, 8.0 * CUDA + 0.5
    with concurrent.futures.ProcessPoolExecutor(most, spawn) as pool:
        list(pool.map(rate, most * [0.0]))  # all get ready
        per_s = {n: sum(pool.map(rate, n * [d])) for n in sorted({1, 2, most})}
    see(**{f"per_s_{n}_at_once": per_s[n] for n in per_s}, ratio=per_s[most] / per_s[1], goal=2.5)


def learning() -> None:
    """Recorded updates lower both losses as eager ones in fp32 do, to 25%, also when resumed; and
    a NaN among the weights shows in the metrics, recorded and eager."""
    runs = dict(recorded=Run(True), eager_fp32=Run(False, False), resumed=Run(True))
    numbers, last = range(300 if CUDA else 120), {}
    for name, run in runs.items():
        torch.manual_seed(1)
        runs["recorded"].carry_to(run) if name == "resumed" else None
        steps = run.steps["diffusion"], run.steps["reward"]
        losses = [torch.stack([step(number)["loss"] for step in steps]) for number in numbers]
        first, last[name] = (torch.stack(x).mean(0) for x in (losses[:20], losses[-20:]))
        see(f"{name}_diffusion_reward_", first=first.tolist(), last=last[name].tolist())
        falls = last[name] < (1.5 * last["recorded"] if name == "resumed" else first)
        expect(falls.all().item(), f"{name}: both losses fall")
    apart = (last["recorded"] / last["eager_fp32"]).log().abs().max().item()
    expect(apart < 0.25, "recorded updates learn as eager ones in fp32 do")
    for name, run in runs.items():
        torch.nn.init.constant_(next(run.agent.encoder.parameters()), float("nan"))
        shown = [not run.steps[part](WARM)["loss"].isfinite() for part in ("diffusion", "reward")]
        expect(all(shown), f"{name}: a NaN shows in the losses")


several_at_once.ready = functools.cache(Run)  # in each process once
LIMITS = {machine: 60, eager_updates: 70, precision: 70, graphs: 110, compiled: 230}  # seconds
LIMITS |= {milliseconds: 170, several_at_once: 170, learning: 110}
CHECKS = dict(enumerate(LIMITS.items(), 1))


def run_check(number: int, limit: float, log: Path) -> dict:
    """One check in a process of its own, which is ended with all that it started."""
    command, begun = [sys.executable, sys.argv[0], "--child", str(number)], time.monotonic()
    with open(log, "w") as file:
        options = dict(stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        process = subprocess.Popen(command, start_new_session=True, **options)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(limit)
        status = process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)  # SIGKILL, to the workers of compiler and check, too
        process.wait()
    lines = log.read_text(errors="replace").splitlines() or [""]
    unmet = [line[6:] for line in lines if line.startswith("UNMET ")]
    tidy = dict(parse_float=lambda x: float(f"{float(x):.4g}"), parse_constant=str)  # NaN: no JSON
    seen = (line.split(" ", 2)[1:] for line in lines if line.startswith("SEEN "))
    if status != 0:
        ended = f"ended with status {status}: {lines[-1][:300]}"
        unmet.append(f"stopped after {limit:.0f} s" if status is None else ended)
    result = dict(name=CHECKS[number][0].__name__.replace("_", " "), passed=not unmet, unmet=unmet)
    result["seen"] = {key: json.loads(value, **tidy) for key, value in seen}
    return result | dict(seconds=round(time.monotonic() - begun, 1))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=int, nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--budget", type=float, default=530, help="seconds for all checks")
    parser.add_argument("--out", type=Path, help="folder of the results; default: $OUT, or new")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        with emulation():
            return CHECKS[options.child][0]() or 0
    end, results = time.monotonic() + options.budget, {}
    out = options.out or Path(os.environ.get("OUT") or tempfile.mkdtemp(prefix="gpu_check_"))
    out.mkdir(parents=True, exist_ok=True)
    table = f"\n{out}/gpu_check.json\n\n| check | result | s | seen |\n| --- | --- | ---: | --- |"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:  # of all the checks
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
        for later, n in enumerate(options.only, 1 - len(options.only)):  # 20 s are left for each
            limit = max(min(CHECKS[n][1], end - time.monotonic() + 20 * later), 1.0)
            results[n] = r = run_check(n, limit, out / f"gpu_check_{n}.log")
            (out / "gpu_check.json").write_text(json.dumps(results, indent=1) + "\n")
            result = f"FAILED: {'; '.join(r['unmet'])}" if r["unmet"] else "passed"
            print(f"{n} {r['name']}: {result}, {r['seconds']} s", flush=True)
            seen = ", ".join(f"{key} {value}" for key, value in r["seen"].items())
            table += f"\n| {n} {r['name']} | {result} | {r['seconds']} | {seen} |"
    failed = ", ".join(f"{n} {r['name']}" for n, r in results.items() if not r["passed"])
    print(table, f"failed: {failed}" if failed else "passed", sep="\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

"""What does each choice bring? The papers' ablations, and the choices that the sources leave open.

    python benchmark/ablations.py                                  # the whole table: about 2 hours on 2 CPU cores
    python benchmark/ablations.py --jobs 2                         # two runs at once, the cores shared out
    python benchmark/ablations.py --games Pong --only "no clamp"   # some of it
    python benchmark/ablations.py --table --out results/ablations.jsonl    # table and picture again

Each variant changes one argument or one function of `jedi_atari.py`, and makes the same number of updates on the same
play. What they are changed from has the papers' choices but centred latents: with plain ones a run as short as these
learns too little for any other choice to show. On Catch (examples/toys.py) all of JEDI is trained; on Pong encoder,
denoiser and reward/termination model alone, on random play. Only if asked for: Pong-full-size, the full run's networks
and learning rates in bf16, 20 minutes a run on 2 cores with bf16 units; Pong-full-size-longer, 2.5 times its updates.

Measured on play that was not trained on:

- reward k: probability that the reward/termination model gives to the true reward of a rewarded step, seeing latents
  imagined k steps ahead (0: true ones); false alarms: share of other steps on which it sees a reward;
- pixels k: error of the picture decoded from latents imagined k steps ahead / error of showing the last real frame
  again (below 1: better than that), where the picture changes; the decoder is learned after the run;
- return (Catch): mean over 100 games of the trained policy; random play -0.6, perfect play +1;
- rank, std: health of the latents.

--out FILE.jsonl holds a line a run, and a run that is there is not made again: the same call carries on after a stop.
Table and picture, FILE.md and FILE.png, stand beside it. A line made with other settings is refused.
"""

import argparse
import concurrent.futures
import contextlib
import copy
import functools
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common

import jedi_atari as jedi
from examples import toys  # noqa: F401  (registers examples.toys:Catch-v0)
from play import runs as trained

# Sizes for a small machine with the papers' choices: what the variants are changed from.
COMMON = common.NARROW | dict(
    latent_norm="center", epoch_steps=150, diffusion_updates=40, reward_updates=40, policy_updates=10,
    eval_every=100, eval_episodes=2, final_episodes=2, entropy_weight=0.001, horizon=8,
    total_steps=3_000, first_steps_min=3_000, first_steps_max=3_000, first_policy_updates=0,
)  # fmt: skip


def full_size(scale: float) -> dict:
    """Pong at the full run's sizes, `scale` times 1,900 updates (a full run makes 20,000 of the world model before its
    policy learns)."""
    return dict(
        env_id="Pong", precision="bf16", batch_size=16, total_steps=5_100, first_steps_min=5_000, first_steps_max=5_000,
        final_epochs=0, first_diffusion_updates=round(1_000 * scale), first_reward_updates=round(500 * scale),
        first_policy_updates=0, diffusion_updates=round(400 * scale), reward_updates=0, policy_updates=0,
        eval_every=100, eval_episodes=2, final_episodes=2, latent_norm="center",
    )  # fmt: skip


CATCH = dict(  # the policy learns after all updates of the world model
    env_id="examples.toys:Catch-v0", total_steps=3_100, first_diffusion_updates=350, first_reward_updates=250, epoch_steps=100,
    diffusion_updates=100, reward_updates=10, policy_updates=300, context_frames=2, denoiser_width=16, cond_dim=64,
    reward_width=8, reward_window=3, horizon=5, sample_steps=2, entropy_weight=0.01, eval_episodes=20,
    final_episodes=100, max_episode_steps=100,
)  # fmt: skip
GAMES = {
    "Catch": COMMON | CATCH,
    "Pong": COMMON | dict(env_id="Pong", first_diffusion_updates=200, first_reward_updates=200),
    "Pong-full-size": full_size(1),
    "Pong-full-size-longer": full_size(2.5),
}

# What the picture shows: game, measure, what it means, and which direction is better.
PANELS = (
    ("Catch", "reward 3", "P(true reward),\n3 steps ahead", "higher"),
    ("Catch", "pixels 3", "error of the picture /\nof the last one, 3 steps ahead", "lower"),
    ("Catch", "return", "return,\nmean of 100 games", "higher"),
    ("Pong", "reward 3", "P(true reward),\n3 steps ahead", "higher"),
    ("Pong", "pixels 3", "error of the picture /\nof the last one, 3 steps ahead", "lower"),
)


# --- variants that change a function


def no_clamp():
    """Latents without bounds, neither the encoder's nor the denoiser's."""
    stack = contextlib.ExitStack()
    stack.enter_context(common.replaced(jedi, clamp_latent=lambda z: z))
    stack.enter_context(common.replaced(jedi.LatentNorm, clamp=lambda self, z: z))
    return stack


def normalised_before_clamp():
    """A group norm without parameters, one group, before the encoder's clamp."""
    forward, clamp = jedi.Encoder.forward, jedi.clamp_latent

    def normalised(self, frames):
        with common.replaced(jedi, clamp_latent=lambda x: clamp(F.group_norm(x, 1))):
            return forward(self, frames)

    return common.replaced(jedi.Encoder, forward=normalised)


def unnormalised_rewards():
    """The reward/termination model's blocks straight into its LSTM, as in DIAMOND's code."""

    def features(self, z, actions):
        x = self.conv_in(torch.cat([z[:, :-1], z[:, 1:]], dim=2).flatten(0, 1))
        cond = self.scales(self.action_embedding(actions.flatten())).chunk(len(self.blocks), dim=1)
        for block, scales in zip(self.blocks, cond, strict=True):
            x = block(x, scales)
        return x.reshape(*actions.shape, -1)

    return common.replaced(jedi.RewardTerminationModel, features=features)


def no_denoising_gradient():
    """The encoder learns from rewards and terminations alone."""
    loss = jedi.diffusion_loss

    def detached(agent, batch, args):
        latents = agent.latents
        with common.replaced(agent, latents=lambda frames: latents(frames).detach()):
            return loss(agent, batch, args)

    return common.replaced(jedi, diffusion_loss=detached)


def averaged_target(rate: float = 0.01):
    """The denoiser's targets come from a running average of the encoder's weights, as in BYOL and I-JEPA."""
    loss, averages = jedi.diffusion_loss, {}

    def with_average(agent, batch, args):
        if id(agent) not in averages:
            averages[id(agent)] = copy.deepcopy(agent.encoder)
        average, n = averages[id(agent)], args.context_frames
        with torch.no_grad():
            for old, new in zip(average.parameters(), agent.encoder.parameters(), strict=True):
                old.lerp_(new, rate)
            late = batch.frames[:, n:]
            targets = average(late.flatten(0, 1)).unflatten(0, late.shape[:2])
        latents = agent.latents
        # The first target is also context of the second: there the averaged latent stands in for the encoder's own.
        joined = lambda frames: torch.cat([latents(frames[:, :n]), targets], dim=1)  # noqa: E731
        with common.replaced(agent, latents=joined):
            return loss(agent, batch, args)

    return common.replaced(jedi, diffusion_loss=with_average)


def regression():
    """The next latent is predicted at once, by squared error, in place of diffusion: no noise, one pass."""

    def predict(agent, context, actions, args):
        start = torch.zeros_like(context[:, -1])
        levels = torch.full((len(start),), args.sample_sigma_max, device=start.device)
        _, c_out, _, c_noise = jedi.precondition(levels, args.sigma_data, args.sigma_offset)
        cond = agent.denoiser.condition(c_noise, actions)
        return agent.norm.clamp(c_out * agent.denoiser(start, context, cond))

    def loss(agent, batch, args):
        n = args.context_frames
        latents = agent.latents(batch.frames)
        agent.norm.update(latents.detach(), batch.mask)
        z = agent.norm(latents) * batch.mask[..., None, None, None]
        context, losses = list(z[:, :n].unbind(1)), []
        for i in range(args.target_frames):
            guess = predict(
                agent, torch.stack(context[-n:], dim=1), batch.actions[:, i : i + n], args
            )
            losses.append((guess - z[:, n + i].detach()).square().mean((1, 2, 3)))
            switch = torch.rand((), device=z.device) < args.switch_prob
            context.append(torch.where(switch, guess.detach(), z[:, n + i]))
        value = jedi.masked_mean(torch.stack(losses, dim=1), batch.mask[:, n:]) / args.sigma_data**2
        return value, {"loss": value.detach(), "latent_std": z.detach().std()}

    return common.replaced(jedi, diffusion_loss=loss, sample_next_latent=torch.no_grad()(predict))


class Variant(NamedTuple):
    """One change: of arguments, or of a function."""

    arguments: dict = {}
    change: Callable = contextlib.nullcontext


UNCHANGED = "nothing changed"
VARIANTS: dict[str, Variant] = {
    UNCHANGED: Variant(),
    # the papers' ablations
    "no clamp": Variant(change=no_clamp),
    "context never the denoiser's output": Variant({"switch_prob": 0.0}),
    "context always the denoiser's output": Variant({"switch_prob": 1.0}),
    "averaged target encoder": Variant(change=averaged_target),
    "no denoising gradient into the encoder": Variant(change=no_denoising_gradient),
    "regression in place of diffusion": Variant(change=regression),
    # what the sources leave open
    "plain latents, the papers'": Variant({"latent_norm": "none"}),
    "group norm before the clamp": Variant(change=normalised_before_clamp),
    "no group norm before the reward LSTM": Variant(change=unnormalised_rewards),
    "sigma_data 1": Variant({"sigma_data": 1.0}),
    "no offset noise": Variant({"sigma_offset": 0.0}),
    "half of the reward windows imagined": Variant({"reward_dreamed": 0.5}),
    "encoder 10 times as fast": Variant({"encoder_lr_scale": 0.3}),
    "sampler starts at sigma_max 5": Variant({"sample_start": "sigma_max"}),
    "sampler starts at sigma_max 20": Variant(
        {"sample_start": "sigma_max", "sample_sigma_max": 20.0}
    ),
}


# --- one run


def run(game: str, name: str, seed: int, threads: int) -> dict:
    """Train one variant on one game and measure it."""
    variant, begun = VARIANTS[name], time.monotonic()
    arguments = GAMES[game] | variant.arguments | dict(seed=seed, threads=threads)
    with tempfile.TemporaryDirectory() as folder, variant.change():
        args = jedi.Args(**arguments, run_dir=f"{folder}/run")
        result = jedi.train(args)
        pixels = pixel_ratios(args, Path(args.run_dir))
    measures = result["measures"]
    return {
        "game": game,
        "variant": name,
        "seed": seed,
        "reward": {k: measures[f"reward_prob_{k}"] for k in (0, 1, 3, 5)},
        "false_alarms": measures["reward_false_alarms"],
        "rank": measures["latent_effective_rank"],
        "std": measures["latent_std"],
        "return": result["mean_return"] if game == "Catch" else None,
        "pixels": pixels,
        "seconds": time.monotonic() - begun,
        **common.about("ablations.py"),
        "device": result["device"],
        "updates": result["updates"],
        "changed": variant.arguments,
        "arguments": {key: value for key, value in vars(args).items() if key != "run_dir"},
    }


@torch.no_grad()
def pixel_ratios(args: jedi.Args, run_dir: Path, ahead: int = 3) -> dict[int, float]:
    """Squared error of decoded pictures / that of the last real frame, where the picture changes, 1 to `ahead` steps
    ahead; on play by a policy that has not learned, the same for all variants."""
    made = trained.load_run(run_dir, "cpu", args.threads)
    agent, replay = made.agent, made.replay
    jedi.zero_(agent.policy.policy)
    with torch.enable_grad():
        decoder = trained.learn_decoder(made, replay.frames[: replay.size])
    torch.manual_seed(args.seed)
    steps = 1_600 if args.env_id == "Pong" else 400
    heldout = common.play(jedi, agent, args, 1_000_000 + args.seed, steps)
    windows = heldout.all_windows(args.context_frames + ahead, stride=1, count=256)
    z = jedi.open_loop(agent, agent.encode(windows.frames), windows.actions, ahead, args)
    last, *real = windows.frames[:, -ahead - 1 :].float().unbind(1)
    ratios = {}
    for k, frame in enumerate(real, 1):
        shown = torch.from_numpy(decoder.pictures(z[:, k - 1 - ahead])).float()
        changes = (frame - last).abs().amax(-1, keepdim=True) > 10
        errors = [((x - frame).square() * changes).sum() for x in (shown, last)]
        ratios[k] = (errors[0] / errors[1]).item()
    return ratios


# --- all runs, table and picture


def run_all(todo: list[tuple], jobs: int, out: Path) -> None:
    """Several at once in processes of their own, so that the change of one never meets another's."""
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        made = itertools.starmap(run, todo)
        if jobs > 1:
            pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(jobs, spawn))
            stack.push(lambda kind, *_: kind and pool.shutdown(wait=False, cancel_futures=True))
            futures = [pool.submit(run, *one) for one in todo]
            made = (future.result() for future in concurrent.futures.as_completed(futures))
        for i, row in enumerate(made, 1):
            common.add_row(out, row)
            what, took = f"{row['game']}, {row['variant']}, seed {row['seed']}", row["seconds"]
            print(f"--- {i} of {len(todo)}: {what}: {common.clock(took)}", flush=True)


def read_results(out: Path) -> list[dict]:
    """The raw results. Raises `BadInput` for lines that do not belong together."""
    seen, keys = {}, ("game", "variant", "seed", "reward", "pixels", "changed", "arguments")
    for i, row in enumerate(rows := common.read_rows(out, *keys), 1):
        first = next((j for j, r in enumerate(rows, 1) if r["game"] == row["game"]), i)
        one, other = rows[first - 1], row
        free = {"seed", "threads", "device", "resume", *one["changed"], *other["changed"]}
        for name in sorted({*one["arguments"], *other["arguments"]} - free):
            a, b = one["arguments"].get(name), other["arguments"].get(name)
            if a != b:
                raise common.BadInput(
                    f"{out}, line {i}: {name} is {b}, in line {first} {a}; such runs cannot be compared: "
                    "make them with another --out"
                )
        key = (row["game"], row["variant"], row["seed"])
        if key in seen:
            raise common.BadInput(f"{out}, lines {seen[key]} and {i} are the same run; delete one")
        seen[key] = i
    return rows


MEASURES: dict[str, Callable] = {
    **{f"reward {k}": lambda r, k=k: r["reward"].get(str(k)) for k in (0, 1, 3, 5)},
    "false alarms": lambda r: r.get("false_alarms"),
    **{f"pixels {k}": lambda r, k=k: r["pixels"].get(str(k)) for k in (1, 3)},
    **{name: lambda r, name=name: r.get(name) for name in ("return", "rank", "std")},
}


def by_variant(rows: list[dict], measure: str) -> dict[str, list[float]]:
    """What was measured on each seed of each variant, in the order of `VARIANTS`."""
    names = dict.fromkeys([*VARIANTS, *(row["variant"] for row in rows)])
    found = {name: [MEASURES[measure](r) for r in rows if r["variant"] == name] for name in names}
    return {name: [v for v in values if v is not None] for name, values in found.items() if values}


def table(rows: list[dict]) -> str:
    """A Markdown table of the results of one game, one number a seed."""
    values = {measure: by_variant(rows, measure) for measure in MEASURES}
    values = {measure: found for measure, found in values.items() if any(found.values())}
    show = lambda v: f"{v:.2f}" if abs(v) < 10 else f"{v:.0f}"  # noqa: E731
    lines = []
    for name in by_variant(rows, "std"):
        seeds = sum(row["variant"] == name for row in rows)
        cells = (", ".join(map(show, found[name])) or "no data" for found in values.values())
        lines.append([name, seeds, *cells])
    return common.markdown(["variant", "seeds", *values], lines)


def draw(rows: list[dict]):
    """A dot for each seed of each variant, a bar over their range, a panel for each measure."""
    panels = [p for p in PANELS if any(r["game"] == p[0] for r in rows)]
    drawn = [row for row in rows if row["game"] in {game for game, *_ in panels}]
    names = list(by_variant(drawn, "std"))
    size = (3 + 2.1 * len(panels), 1.9 + 0.28 * len(names))
    n = max(sum(r["variant"] == name for r in drawn if r["game"] == panels[0][0]) for name in names)
    title = f"One change a row. Dot: one seed (n = {n}); bar: their range, no interval; dashed: mean of '{UNCHANGED}'"
    figure, (axes,) = common.new_figure(title, 1, len(panels), size, sharey=True)
    for ax, (game, measure, meaning, better) in zip(axes, panels, strict=False):
        values = by_variant([row for row in rows if row["game"] == game], measure)
        for y, name in enumerate(names):
            if seeds := values.get(name):
                ax.plot([min(seeds), max(seeds)], [y, y], color="#0072B2", alpha=0.4, linewidth=3)
                ax.plot(seeds, [y] * len(seeds), "o", color="#0072B2", markersize=5)
        if values.get(UNCHANGED):
            ax.axvline(statistics.mean(values[UNCHANGED]), color="0.4", linestyle="--", linewidth=1)
        ax.set_title(f"{game}: {meaning}\n{better} is better", fontsize=8.5)
        ax.set(yticks=range(len(names)), yticklabels=names)
    axes[0].invert_yaxis()
    return figure


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    add, variants = parser.add_argument, list(VARIANTS)
    add("--games", nargs="+", choices=list(GAMES), default=["Catch", "Pong"])
    add("--only", nargs="+", choices=variants, default=variants, metavar="VARIANT")
    add("--seeds", type=int, nargs="+", default=[0, 1])
    add("--jobs", type=int, default=1, help="runs at once")
    add("--threads", type=int, default=0, help="CPU threads of a run; 0: the cores over --jobs")
    add("--out", type=Path, default=Path("runs/ablations.jsonl"))
    add("--table", action="store_true", help="table and picture of what is in --out; run nothing")
    options = parser.parse_args(argv)
    if options.jobs < 1 or options.threads < 0:
        parser.error("--jobs must be at least 1, --threads at least 0")
    return options


def ablations(options: argparse.Namespace) -> None:
    """All runs that are not there yet, then table and picture of all that are."""
    if not options.table:
        common.open_rows(options.out)
    with common.reading(options.out):
        there = {(r["game"], r["variant"], r["seed"]) for r in read_results(options.out)}
    threads = options.threads or max(1, jedi.usable_cores() // options.jobs)
    wanted = itertools.product(options.seeds, options.games, options.only)
    todo = [(*one, seed, threads) for seed, *one in wanted if (*one, seed) not in there]
    run_all([] if options.table else todo, options.jobs, options.out)
    with common.reading(options.out):
        rows = read_results(options.out)
        games = {
            game: [row for row in rows if row["game"] == game]
            for game in [*GAMES, *(row["game"] for row in rows)]
        }
        parts = [f"### {game}\n\n{table(found)}" for game, found in games.items() if found]
    if not rows:
        raise common.BadInput(f"{options.out} holds no results; leave --table out to make them")
    print(text := "\n".join(parts), end="")
    common.write_up(options.out, text, functools.partial(draw, rows))


def main(argv: list[str] | None = None) -> int:
    return common.run("ablations.py", ablations, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())

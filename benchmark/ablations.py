"""What does each choice bring? The papers' ablations, and the choices that the sources leave open.

    python benchmark/ablations.py                                  # the whole table: about 2 hours on 2 CPU cores
    python benchmark/ablations.py --jobs 2                         # two runs at once, the cores shared out
    python benchmark/ablations.py --games Pong --only "no clamp"   # some of it
    python benchmark/ablations.py --base plain                     # changed from the papers' plain latents instead
    python benchmark/ablations.py --games Pong-full-size --only "nothing changed" "plain latents, the papers'"
    python benchmark/ablations.py --table                          # the table again, from the raw results

Each variant changes one argument or one function of `jedi_atari.py` and nothing else, and makes the same number of
updates on the same play. What they are changed from has the papers' choices but for its latents, which are centred:
with plain ones a run as short as these learns too little for any other choice to show. On Catch (tests/toys.py) all
of JEDI is trained; on a real game encoder, denoiser and reward/termination model alone, on random play. Pong-full-size
has the full run's networks and learning rates, in bf16 as on a GPU: 20 minutes a run on 2 cores with bf16 units;
Pong-full-size-longer 2.5 times its updates, 45 minutes. These only if asked for.

Judged by what two latent spaces have in common, on play that was not trained on:

- reward k: probability that the reward/termination model gives to the true reward of a rewarded step, seeing latents
  imagined k steps ahead (0: true ones); false alarms: share of other steps on which it sees a reward;
- end k: probability that it gives to the truth about the end of the game, ends and other steps counted alike (0.5: it
  knows nothing), the last k latents imagined;
- pixels k: error of the picture decoded from latents imagined k steps ahead, over the error of showing the last real
  frame again (below 1 is skill), counted where the picture changes; the decoder is learned after the run;
- position (Catch): share of imagined latents, 3 steps ahead, off which a linear probe reads the ball's true place;
- return (Catch): mean over 100 games of the trained policy; random play -0.6, perfect play +1;
- rank, std: health of the latents.

Results are written one file a run to a folder of --out, and a run that is there is not made again: the same call
carries on after a stop. Table and picture, ablations.md and ablations.png, stand beside them.
"""

import argparse
import concurrent.futures
import contextlib
import copy
import dataclasses
import itertools
import json
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import toys  # noqa: F401  (registers toys:Catch-v0)

import jedi_atari as jedi
import play_pictures

ROOT = Path(__file__).resolve().parent.parent

# Sizes for a small machine with the papers' choices: what the variants are changed from, but for --base.
BASES = {"centred": dict(latent_norm="center"), "plain": dict(latent_norm="none")}
COMMON = common.NARROW | dict(
    epoch_steps=150, diffusion_updates=40, reward_updates=40, policy_updates=10, eval_every=10,
    entropy_weight=0.001, horizon=8,
)  # fmt: skip


def full_size(scale: float) -> dict:
    """Arguments for Pong at the full run's sizes, `scale` times 1,900 updates (a full run makes 20,000 of the world
    model before its policy learns)."""
    return dict(
        env_id="Pong", precision="bf16", batch_size=16, total_steps=5_100, first_steps_min=5_000, first_steps_max=5_000,
        final_epochs=0, first_diffusion_updates=round(1_000 * scale), first_reward_updates=round(500 * scale),
        first_policy_updates=0, diffusion_updates=round(400 * scale), reward_updates=0, policy_updates=0,
        eval_every=100, eval_episodes=2, final_episodes=2,
    )  # fmt: skip


GAMES = {
    # The policy learns after all updates of the world model.
    "Catch": COMMON
    | dict(
        env_id="toys:Catch-v0", total_steps=3_100, first_steps_min=3_000, first_steps_max=3_000, final_epochs=0,
        first_diffusion_updates=350, first_reward_updates=250, first_policy_updates=0, epoch_steps=100,
        diffusion_updates=100, reward_updates=10, policy_updates=300, context_frames=2, encoder_width=8,
        denoiser_width=16, cond_dim=64, reward_width=8, lstm_size=128, reward_window=3, horizon=5,
        sample_steps=2, entropy_weight=0.01, eval_every=100, eval_episodes=20, final_episodes=100,
        max_episode_steps=100,
    ),
    "Pong": COMMON
    | dict(
        env_id="Pong", total_steps=3_000, first_steps_min=3_000, first_steps_max=3_000, final_epochs=0,
        first_diffusion_updates=200, first_reward_updates=200, first_policy_updates=0,
        eval_episodes=2, final_episodes=2,
    ),
    "Pong-full-size": full_size(1),
    "Pong-full-size-longer": full_size(2.5),
}  # fmt: skip

# What the picture shows, of each game.
PICTURE = (
    ("Catch", "reward 3"),
    ("Catch", "pixels 3"),
    ("Catch", "return"),
    ("Pong", "reward 3"),
    ("Pong", "pixels 3"),
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
    "plain latents, the papers'": Variant(BASES["plain"]),
    "centred latents": Variant(BASES["centred"]),
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


def arguments_of(game: str, base: str, name: str, seed: int, threads: int) -> dict:
    """What the script is called with."""
    return GAMES[game] | BASES[base] | VARIANTS[name].arguments | {"seed": seed, "threads": threads}


def run(game: str, base: str, name: str, arguments: dict) -> dict:
    """Train one variant on one game and measure it."""
    variant, begun = VARIANTS[name], time.monotonic()
    with tempfile.TemporaryDirectory() as folder, variant.change():
        args = jedi.Args(**arguments, run_dir=f"{folder}/run")
        result = jedi.train(args)
        found = measure(args, Path(args.run_dir))
    measures = result["measures"]
    return {
        "game": game,
        "base": base,
        "variant": name,
        "seed": args.seed,
        "reward": {k: measures[f"reward_prob_{k}"] for k in (0, 1, 3, 5)},
        "false_alarms": measures["reward_false_alarms"],
        "rank": measures["latent_effective_rank"],
        "std": measures["latent_std"],
        "return": result["mean_return"] if game == "Catch" else None,
        **found,
        "seconds": time.monotonic() - begun,
        "git_commit": common.git_commit(),
        "device": result["device"],
        "updates": result["updates"],
        "arguments": dataclasses.asdict(args),
    }


@torch.no_grad()
def measure(args: jedi.Args, run_dir: Path) -> dict:
    """Pixels, ends and positions, of play by a policy that has not learned: the same for all variants."""
    made = play_pictures.load_run(run_dir, "cpu", args.threads)
    agent, replay = made.agent, made.replay
    jedi.zero_(agent.policy.policy)
    with torch.enable_grad():
        decoder = play_pictures.learn_decoder(agent, replay.frames[: replay.size], args.seed)
    torch.manual_seed(args.seed)
    steps, ahead = (1_600 if args.env_id == "Pong" else 400), 3
    heldout = common.play(jedi, agent, args, 1_000_000 + args.seed, steps)
    windows = heldout.all_windows(args.context_frames + ahead, stride=1, count=256)
    z = agent.encode(windows.frames)
    imagined = jedi.open_loop(agent, z, windows.actions, ahead, args)[:, -ahead:]
    found = {"pixels": pixel_ratios(decoder, imagined, windows.frames[:, -ahead - 1 :])}
    found["end"] = {k: end_probability(agent, z, windows, k, args) for k in (0, ahead)}
    if args.env_id != "Pong":
        found["position"] = position(agent, heldout, imagined[:, -1], windows.frames[:, -1])
    return found


def pixel_ratios(
    decoder: play_pictures.Decoder, imagined: torch.Tensor, frames: torch.Tensor
) -> dict[int, float]:
    """Squared error of decoded pictures over that of the last real frame (frames[:, 0]), where the picture changes."""
    ratios, last = {}, frames[:, 0].float()
    for k in range(1, frames.shape[1]):
        shown, real = (
            torch.from_numpy(decoder.pictures(imagined[:, k - 1])).float(),
            frames[:, k].float(),
        )
        changes = (real - last).abs().amax(-1, keepdim=True) > 10
        ratios[k] = (
            ((shown - real).square() * changes).sum() / ((last - real).square() * changes).sum()
        ).item()
    return ratios


def end_probability(
    agent: jedi.Agent, z: torch.Tensor, windows: jedi.Windows, k: int, args: jedi.Args
) -> float | None:
    """Probability of the truth about the last step, end of the game or not, when the last k latents are imagined.

    Ends count as much as all other steps together, so that a model which never says "end" gets a half. None where no
    game ends.
    """
    end = windows.ends[:, -2].long()
    if end.min() == end.max():
        return None
    seen = jedi.open_loop(agent, z, windows.actions, k, args)
    logits = agent.reward(seen, windows.actions[:, :-1])[1]
    right = logits[:, -1].softmax(-1).gather(1, end[:, None])[:, 0]
    return ((right[end == 1].mean() + right[end == 0].mean()) / 2).item()


@torch.enable_grad()
def position(
    agent: jedi.Agent, heldout: jedi.ReplayBuffer, imagined: torch.Tensor, frames: torch.Tensor
) -> float:
    """Share of imagined latents off which a linear probe of true latents reads the ball's place."""
    from drift import ball_columns, train_probe

    with torch.no_grad():
        z = agent.encode(heldout.frames[: heldout.size])
    probe = train_probe(z, ball_columns(heldout.frames[: heldout.size]))
    return (probe(imagined.flatten(1)).argmax(1) == ball_columns(frames)).float().mean().item()


# --- all runs, and the table


def run_to_file(path: Path, *one) -> str:
    """One run, kept in `path`; returns what to say of it."""
    found = run(*one)
    jedi.write_atomically(path, common.finite(found))
    return f"{found['game']}, {found['variant']}, seed {found['seed']}: {common.clock(found['seconds'])}"


def run_all(todo: list[tuple], jobs: int) -> None:
    """Several at once in processes of their own, so that the change of one never meets another's."""
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        said = (run_to_file(*one) for one in todo)
        if jobs > 1:
            pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(jobs, spawn))
            stack.push(lambda kind, *_: kind and pool.shutdown(wait=False, cancel_futures=True))
            futures = [pool.submit(run_to_file, *one) for one in todo]
            said = (future.result() for future in concurrent.futures.as_completed(futures))
        for i, line in enumerate(said):
            print(f"--- {i + 1} of {len(todo)}: {line}", flush=True)


def file_of(out: Path, game: str, name: str, seed: int) -> Path:
    plain = "".join(c if c.isalnum() else "_" for c in name).strip("_")
    return out / f"{game}__{plain}__{seed}.json"


def read_results(out: Path, game: str) -> list[dict]:
    """The raw results of one game."""
    return [json.loads(path.read_text()) for path in sorted(out.glob(f"{game}__*.json"))]


def columns(results: list[dict]) -> dict[str, Callable]:
    """What the table shows of a result, by heading: all that was measured on this game."""
    found: dict[str, Callable] = {
        f"reward {k}": lambda r, k=k: r["reward"][str(k)] for k in (0, 1, 3, 5)
    }
    found |= {"false alarms": lambda r: r["false_alarms"]}
    found |= {f"end {k}": lambda r, k=k: r["end"][str(k)] for k in (0, 3)}
    found |= {f"pixels {k}": lambda r, k=k: r["pixels"][str(k)] for k in (1, 3)}
    found |= {"position": lambda r: r.get("position"), "return": lambda r: r["return"]}
    found |= {"rank": lambda r: r["rank"], "std": lambda r: r["std"]}
    return {name: read for name, read in found.items() if any(read(r) is not None for r in results)}


def table(out: Path, game: str) -> str:
    """A Markdown table of the results of one game, one number a seed."""
    results = read_results(out, game)
    shown = columns(results)
    lines = ["| variant | seeds | " + " | ".join(shown) + " |", "|---" * (len(shown) + 2) + "|"]
    for name in dict.fromkeys([*VARIANTS, *(r["variant"] for r in results)]):
        of_name = [r for r in results if r["variant"] == name]
        if not of_name:
            continue
        cells = []
        for read in shown.values():
            values = [value for value in map(read, of_name) if value is not None]
            cells.append(
                ", ".join(f"{v:.2f}" if abs(v) < 10 else f"{v:.0f}" for v in values) or "no data"
            )
        lines.append(f"| {name} | {len(of_name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(out: Path, path: Path) -> None:
    """A dot for each seed of each variant, a panel for each measure; dashed: the mean of what they are changed from."""
    from matplotlib.figure import Figure

    results = {game: read_results(out, game) for game in GAMES}
    panels = [
        (game, measure)
        for game, measure in PICTURE
        if any(measure in columns([r]) for r in results[game])
    ]
    made = [result["variant"] for game in GAMES for result in results[game]]
    names = [name for name in dict.fromkeys([*VARIANTS, *made]) if name in made]
    figure = Figure(
        figsize=(3.2 + 2.4 * len(panels), 1.2 + 0.28 * len(names)), dpi=100, layout="constrained"
    )
    axes = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
    for ax, (game, measure) in zip(axes, panels, strict=False):
        values = {name: [] for name in names}
        for result in results[game]:
            if measure in columns([result]):
                values[result["variant"]].append(columns([result])[measure](result))
        for row, name in enumerate(names):
            ax.plot(values[name], [row] * len(values[name]), "o", color="#0072B2", alpha=0.7)
        if values.get(UNCHANGED):
            ax.axvline(statistics.mean(values[UNCHANGED]), color="0.4", linestyle="--", linewidth=1)
        ax.set(title=f"{game}: {measure}", yticks=range(len(names)), yticklabels=names)
        ax.grid(alpha=0.3)
    axes[0].invert_yaxis()
    figure.savefig(path)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--games", nargs="+", choices=list(GAMES), default=["Catch", "Pong"])
    parser.add_argument(
        "--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT"
    )
    parser.add_argument(
        "--base", choices=list(BASES), default="centred", help="latents of what is changed"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads of a run; 0: the cores over --jobs"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "ablations")
    parser.add_argument(
        "--table",
        action="store_true",
        help="make table and picture of what is in --out, run nothing",
    )
    options = parser.parse_args(argv)
    if options.jobs < 1 or options.threads < 0:
        parser.error("--jobs must be at least 1, --threads at least 0")
    return options


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    options = parse_args(argv)
    out = options.out / options.base
    out.mkdir(parents=True, exist_ok=True)
    names = [name for name in options.only if VARIANTS[name].arguments != BASES[options.base]]
    threads = options.threads or max(1, jedi.usable_cores() // options.jobs)
    todo = []
    for seed, game, name in itertools.product(options.seeds, options.games, names):
        arguments = arguments_of(game, options.base, name, seed, threads)
        todo.append((file_of(out, game, name, seed), game, options.base, name, arguments))
    if not options.table:
        run_all([one for one in todo if not one[0].exists()], options.jobs)
    measured = [game for game in GAMES if read_results(out, game)]
    text = "\n\n".join(f"### {game}\n\n{table(out, game)}" for game in measured)
    print(text)
    if measured:
        jedi.write_atomically(out / "ablations.md", (text + "\n").encode())
        with common.drawing():
            draw(out, out / "ablations.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How play's showcase was made, and how long its dreams hold: Pong, an hour and a half on a core.

    python -m examples.showcase runs/showcase   # plays, learns, measures
    python -m examples.showcase --measure play/showcase

World model first: recorded play is nearly free, so there is much of it, by players who hold keys as
people do, half of the games at random, half after the ball. Then the networks of jedi_atari.py
learn from it by its own updates: encoder and denoiser, R_psi, and the policy last, in the dream.
Weights are stored with 16 bits. The folder is read like that of a run.
"""

import dataclasses
import io
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

import jedi_atari as jedi
from jedi_atari import BadInput, progress, write_atomically
from play.runs import Parser, Run, keep_decoder, learn_decoder, load_named, load_run

STEPS, STARTS = 120_000, 1_000  # of play to learn from; of other play, for dreams to start in
SCHEDULE = ["diffusion"] * 7 + ["reward"]  # again and again
UPDATES, POLICY_UPDATES = 15_000, 1_000
DECAY = 0.3  # share of the updates at the end over which the learning rate falls to a twentieth
MEASURED = (1, 5, 15, 30, 50)  # imagined steps
NEAR = 4  # pixels: so far a thing may be from where the game has it
ARGS = jedi.PRESETS["small"] | dict(
    preset="small", env_id="Pong", threads=1, max_episode_steps=27_000, denoiser_width=96,
    target_frames=4, learning_rate=6e-4, total_steps=STEPS, first_steps_min=STEPS,
    first_steps_max=STEPS,
)  # fmt: skip


# ---- Playing -------------------------------------------------------------------------------------
def find_ball(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(..., 64, 64, 3) uint8 frames -> is there a ball (...), where (..., 2), row and column."""
    field = frames[..., 11:58, 9:55, :].astype(float)  # without walls, score and paddles
    return centre(np.abs(field - (144, 72, 17)).mean(-1), 25)


def find_paddle(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same for one's own paddle, green, on the right."""
    part = frames[..., 11:58, 55:59, :].astype(float)
    return centre((part[..., 1] - part[..., 0]).clip(0), 40)


def centre(strength: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """(..., h, w) -> whether something is as strong as `least`, and the centre of what is."""
    peak = strength.max((-2, -1), keepdims=True)
    weight = strength * (strength > 0.5 * peak) + 1e-9
    weight = weight / weight.sum((-2, -1), keepdims=True)
    rows, columns = (np.arange(size) for size in strength.shape[-2:])
    place = (weight.sum(-1) * rows).sum(-1), (weight.sum(-2) * columns).sum(-1)
    return peak[..., 0, 0] > least, np.stack(place, axis=-1)


def play(collector: jedi.Collector, replay: jedi.ReplayBuffer, steps: int, seed: int) -> None:
    """Play on: a game at random, the next after the ball, aiming a little beside it. Either holds
    what it does for a while."""
    rng, games, left = np.random.default_rng(seed), 0, 0
    action, aim, up, down = 0, 0.0, 2, 3  # RIGHT and LEFT move the paddle up and down
    for _ in progress(range(steps), desc="play", unit="step"):
        if left == 0:
            action, left = int(rng.integers(6)), int(rng.geometric(1 / 5))
            aim = rng.normal() * 4
        left -= 1
        if games % 2 and rng.random() > 0.1:
            (seen, ball), (_, paddle) = (f(collector.frame) for f in (find_ball, find_paddle))
            gap = ball[0] + aim - paddle[0]
            if seen and abs(gap) > 1:
                action = up if gap < 0 else down
            elif seen:
                action = 0
        games += len(collector.step(None, replay, action))


# ---- Learning ------------------------------------------------------------------------------------
def learn(agent: jedi.Agent, replay: jedi.ReplayBuffer, args: jedi.Args, bf16: bool) -> dict:
    """The updates of jedi_atari.py, in this order; how many of each."""
    optimizers = {part: jedi.make_optimizer(agent, part, args) for part in jedi.PARTS}
    todo = [SCHEDULE[i % len(SCHEDULE)] for i in range(UPDATES)] + ["policy"] * POLICY_UPDATES
    done, losses = dict.fromkeys(jedi.PARTS, 0), {}
    for number, part in enumerate(progress(todo, desc="learn", unit="update")):
        late = 1 - (1 - min(number / UPDATES, 1)) / DECAY  # from 0 on it decays
        for group in optimizers[part].param_groups:
            group.setdefault("first_peak", group["peak"])
            if part != "policy":
                group["peak"] = group["first_peak"] * (1 - 0.95 * max(late, 0))
        found = jedi.update(agent, part, optimizers[part], replay, done[part], args, bf16)
        losses[part] = 0.99 * losses.get(part, found["loss"]) + 0.01 * found["loss"]
        done[part] += 1
        if number % 500 == 499:
            shown = {key: round(value.item(), 4) for key, value in losses.items()}
            print(f"{number + 1} of {len(todo)}", shown, flush=True)
    return done


# ---- Measuring -----------------------------------------------------------------------------------
@torch.no_grad()
def measure(run: Run, starts: int = 100) -> dict:
    """How long a dream of Pong holds, over so many starts in play that nothing was learned from:
    the same actions in the game and in its dream."""
    if run.game != "Pong":
        raise BadInput(f"{run.folder} is a run of {run.game}; only Pong's ball is known here")
    args = dataclasses.replace(run.args, seed=10**6)
    collector, heldout = jedi.Collector(args), jedi.ReplayBuffer(8_000, torch.device("cpu"))
    play(collector, heldout, 7_000, seed=10**6)
    n, longest = args.context_frames, max(MEASURED)
    windows = heldout.all_windows(n + longest, stride=1, count=starts)
    torch.manual_seed(0)
    z = run.agent.encode(windows.frames)
    dreamed = jedi.open_loop(run.agent, z, windows.actions, longest, args)
    errors = (dreamed - z, z[:, n - 1 : n] - z)
    error, no_change = (x[:, n:].square().mean((0, 2, 3, 4)) for x in errors)
    found = {f"wm/open_loop_ratio_{k + 1}": r for k, r in enumerate((error / no_change).tolist())}
    real, dream, still = (
        windows.frames.numpy(), run.decoder.pictures(dreamed), run.decoder.pictures(z),
    )  # fmt: skip
    for name, find in (("ball", find_ball), ("paddle", find_paddle)):
        (there, where), (seen, place), (decoded, shown) = map(find, (real, dream, still))
        near = seen & (np.linalg.norm(place - where, axis=-1) <= NEAR)
        close = decoded & (np.linalg.norm(shown - where, axis=-1) <= 1)
        found[f"{name}/decoded"] = close[there].mean()  # from true latents
        for k in MEASURED:
            at = there[:, n - 1 + k]
            found[f"{name}/shown_{k}"] = seen[at, n - 1 + k].mean()
            found[f"{name}/near_{k}"] = near[at, n - 1 + k].mean()
        lost = (there & ~near)[:, n:]
        held = np.where(lost.any(1), lost.argmax(1), longest)
        found[f"{name}/held_median"] = np.median(held)
        found[f"{name}/held_50"] = (held >= longest).mean()
    return {key: float(value) for key, value in found.items()}


def save(folder: Path, run_args: jedi.Args, agent, collector, about: str, metrics: dict) -> None:
    """A checkpoint that play reads, with weights of 16 bits."""
    weights = {key: value.half() for key, value in agent.state_dict().items()}
    text = json.dumps({"epoch": 0.0, "charts/env_steps": float(STEPS), **metrics})
    content = dict(script="jedi_atari", args=json.dumps(vars(run_args)), epoch=0, about=about)
    content |= dict(agent=weights, collector=collector.state_dict(), metrics=text)
    torch.save(content, archive := io.BytesIO())
    write_atomically(folder / "checkpoint.pt", archive.getbuffer())


def make(folder: Path) -> Run:
    """All of it; an hour and a half on one core."""
    if folder.exists() and any(folder.iterdir()):
        raise BadInput(f"{folder} is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    begun, args = time.monotonic(), jedi.Args(**ARGS)
    collector, agent, bf16 = jedi.set_up(args)
    replay = jedi.ReplayBuffer(STEPS + 1_000, torch.device("cpu"))
    play(collector, replay, STEPS, seed=0)
    print(f"played: {replay.num_episodes} games, {time.monotonic() - begun:.0f} s", flush=True)
    done = learn(agent, replay, args, bf16)
    minutes = (time.monotonic() - begun) / 60
    about = f"showcase, {STEPS:,} steps of recorded play, {time.strftime('%Y-%m-%d')}"
    precision = "bf16" if bf16 else "fp32"
    print(f"learned: {done}, {minutes:.0f} minutes in all, {precision}", flush=True)
    args = dataclasses.replace(args, seed=2)  # the seed of the play that is kept
    starts = jedi.Collector(args)
    play(starts, jedi.ReplayBuffer(STARTS + 100, torch.device("cpu")), STARTS, seed=2)
    save(folder, args, agent, starts, about, {})
    run = load_run(folder)
    keep_decoder(run, learn_decoder(run, replay.frames[: replay.size]))
    save(folder, args, agent, starts, about, measure(run))
    return load_run(folder)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for bad input."""
    parser = Parser(prog="python -m examples.showcase", description=__doc__.split("\n\n")[0])
    parser.add_argument("--measure", action="store_true", help="an existing folder; writes nothing")
    parser.add_argument("run_dir", type=Path, help="folder")
    try:
        options = parser.parse_args(argv)
        run = load_named(options) if options.measure else make(options.run_dir)
        for key, value in (measure(run) if options.measure else run.metrics[-1]).items():
            print(f"{key:24} {value:.2f}")
        return 0
    except (BadInput, OSError) as error:
        print(f"examples.showcase: error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("examples.showcase: stopped", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

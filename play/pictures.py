"""Pictures of a run: what its agent dreams, beside the real game, and its learning curves.

    python -m play.pictures runs/Pong__...   # writes dreams/ and curves.png there

The decoder is learned first where there is none yet. What the run wrote itself stays as it is.
"""

import dataclasses
import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from jedi_atari import (
    HELDOUT_STEPS,
    IMAGE_SIZE,
    MAX_OPEN_LOOP,
    Args,
    BadInput,
    ReplayBuffer,
    Windows,
    progress,
    write_atomically,
)
from play.runs import Parser, Run, load_named

PLUS, MINUS, END = "#0072B2", "#D55E00", "#000000"  # everybody can tell them apart (Okabe and Ito)
# Maximum coverage keeps the rare colours too, as of a small paddle, which others make grey.
PALETTE = dict(method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
COLUMNS = (0, 1, 2, 3, 5, 8, 11, 15)  # steps that a film strip shows


# ---- Dreams --------------------------------------------------------------------------------------
class Dreamed(NamedTuple):
    """K steps of real play and the dream of it: the same actions, but imagined from step 0 on."""

    pictures: np.ndarray  # (3, K + 1, 64, 64, 3) uint8: real, decoded from true latents, dream
    rewards: np.ndarray  # (2, K + 1) in {-1, 0, 1}: of the step that led there; real, dream's guess
    ends: np.ndarray  # (2, K + 1) bool, likewise
    ages: np.ndarray  # (K + 1,) imagined steps since the dream last saw a real frame


class Shot(NamedTuple):
    """One panel of a film at one moment."""

    picture: np.ndarray  # (64, 64, 3) uint8
    text: str
    reward: float  # of the step that led there
    end: bool


def play_game(run: Run) -> ReplayBuffer:
    """A game of the trained agent that it was not trained on; cut after `HELDOUT_STEPS`."""
    args = dataclasses.replace(run.args, epsilon=0.0, seed=2**31 - 1 - run.args.seed)
    collector = run.script.Collector(args)
    heldout = run.script.ReplayBuffer(HELDOUT_STEPS, run.device)
    bar = progress(total=HELDOUT_STEPS, desc="play a game", unit="step")
    while not collector.step(run.agent, heldout) and collector.steps < HELDOUT_STEPS:
        bar.update()
    bar.close()
    collector.env.close()
    return heldout


def eventful_window(heldout: ReplayBuffer, length: int) -> Windows | None:
    """The window (1, length, ...) with most rewards; None if no episode is so long."""
    windows = heldout.all_windows(length, stride=5, count=max(1, 4_000 // length))  # 50 MB
    if not len(windows.frames):
        return None
    best = windows.rewards[:, :-1].ne(0).sum(1).argmax()
    return type(windows)(*(field[best : best + 1] for field in windows))


@torch.no_grad()
def dream_of(run: Run, play: Windows, stretch: int) -> Dreamed:
    """Dream along real play (a batch of 1), with its frames seen again after each `stretch`."""
    agent, args, open_loop = run.agent, run.args, run.script.open_loop
    n, last = args.context_frames, play.frames.shape[1] - 1
    z = agent.encode(play.frames)
    imagined, ages = [z[:, :n]], [0]
    for start in range(n - 1, last, stretch):
        steps = min(stretch, last - start)
        part = slice(start - n + 1, start + steps + 1)
        imagined.append(open_loop(agent, z[:, part], play.actions[:, part], steps, args)[:, n:])
        ages += range(1, steps + 1)
    imagined = torch.cat(imagined, dim=1)
    reward_logits, end_logits = agent.reward(imagined, play.actions[:, :-1])
    rewards = torch.stack([play.rewards[0, :-1].sign(), reward_logits[0].argmax(-1) - 1.0])
    ends = torch.stack([play.ends[0, :-1], end_logits[0].argmax(-1) == 1])
    pictures = [run.decoder.pictures(latents[0, n - 1 :]) for latents in (z, imagined)]
    pictures = np.stack([play.frames[0, n - 1 :].cpu().numpy(), *pictures])
    # Nothing led to the first picture.
    rewards, ends = (F.pad(x[:, n - 1 :], (1, 0)).cpu().numpy() for x in (rewards, ends))
    return Dreamed(pictures, rewards.astype(int), ends, np.array(ages))


def event(reward: float, end: bool) -> tuple[str, str]:
    """Text and colour of what happened in a step; no text for most."""
    texts = [f"{reward:+g}"] if reward else []
    return ", ".join(texts + ["end"] * bool(end)), END if end else PLUS if reward > 0 else MINUS


def enlarged(picture: np.ndarray, factor: int) -> Image.Image:
    """(64, 64, 3) uint8 -> a picture whose pixels are squares."""
    size = (IMAGE_SIZE * factor, IMAGE_SIZE * factor)
    return Image.fromarray(picture).resize(size, Image.Resampling.NEAREST)


def film_strip(dream: Dreamed, title: str) -> Image.Image:
    """Three rows of eight pictures: the real game, its latents decoded, and the dream."""
    size, gap, left, top, below = 4 * IMAGE_SIZE, 12, 200, 84, 40
    columns = [step for step in COLUMNS if step < dream.pictures.shape[1]]
    shape = (left + len(columns) * (size + gap), top + 3 * (size + below))
    sheet = Image.new("RGB", shape, "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((10, 8), title, "black", font_size=28)
    for row, name in enumerate(("real game", "decoded from\nits latents", "dream")):
        y = top + row * (size + below)
        pen.multiline_text((10, y + size / 2 - 26), name, "black", font_size=26)
    for row, (column, step) in ((row, pair) for row in range(3) for pair in enumerate(columns)):
        x, y = left + column * (size + gap), top + row * (size + below)
        if row == 0:
            name = f"step {step}" if step else "now"
            pen.text((x + size / 2, y - 12), name, "black", font_size=24, anchor="ms")
        if row != 1:
            text, colour = event(dream.rewards[row // 2, step], dream.ends[row // 2, step])
            pen.text((x + size / 2, y + size + 6), text, colour, font_size=26, anchor="ma")
            if text:
                pen.rectangle((x - 5, y - 5, x + size + 4, y + size + 4), colour)
        sheet.paste(enlarged(dream.pictures[row, step], 4), (x, y))
    return sheet


def film(moments: list[list[Shot]], milliseconds: int | list[int]) -> bytes:
    """A GIF of panels side by side, four times enlarged, with what happens in each above it."""
    size, gap, head = 4 * IMAGE_SIZE, 8, 34

    def draw(shots: list[Shot]) -> Image.Image:
        sheet = Image.new("RGB", (most * (size + gap) - gap, size + head), "white")
        pen = ImageDraw.Draw(sheet)
        for side, shot in enumerate(shots):
            left, (text, colour) = side * (size + gap), event(shot.reward, shot.end)
            # A share of the palette each: a dream's many colours must not change the game's.
            few = Image.fromarray(shot.picture).quantize(224 // len(shots), **PALETTE)
            sheet.paste(enlarged(np.asarray(few.convert("RGB")), 4), (left, head))
            pen.text((left + 4, 8), shot.text, "black", font_size=16)
            pen.text((left + size - 4, 8), text, colour, font_size=18, anchor="ra")
        return sheet

    most = max(map(len, moments))
    return gif(map(draw, moments), milliseconds)


def gif(sheets: Iterable[Image.Image], milliseconds: int | list[int]) -> bytes:
    """An animation of pictures, made one at a time: together they can be larger than memory."""
    sheets, content = (sheet.quantize(256, **PALETTE) for sheet in sheets), io.BytesIO()
    options = dict(format="GIF", save_all=True, duration=milliseconds, loop=0)
    next(sheets).save(content, append_images=sheets, **options)
    return content.getvalue()


def moments_of(dream: Dreamed) -> list[list[Shot]]:
    """What a film of a dream shows."""

    def shot(side: int, t: int) -> Shot:
        dreams = f"dream, step {dream.ages[t]}" if dream.ages[t] else "sees the game"
        event_ = dream.rewards[side, t], dream.ends[side, t]
        return Shot(dream.pictures[2 * side, t], dreams if side else "real game", *event_)

    return [[shot(0, t), shot(1, t)] for t in range(len(dream.ages))]


# ---- Learning curves -----------------------------------------------------------------------------
CURVES = {
    "return of a game": {
        "training play": "charts/episodic_return", "evaluation": "eval/mean_return",
    },
    "loss": {
        "diffusion": "diffusion/loss", "reward and end": "reward/loss", "value": "policy/value_loss"
    },
    "prediction error / error of predicting no change": {
        "1 step ahead": "wm/open_loop_ratio_1", "5 steps ahead": "wm/open_loop_ratio_5",
        "15 steps ahead": "wm/open_loop_ratio_15",
    },
    "probability given to true rewards": {
        "on true latents": "wm/reward_prob_0", "1 step into a dream": "wm/reward_prob_1",
        "5 steps into a dream": "wm/reward_prob_5",
    },
}  # fmt: skip
LOOKS = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#000000", "^", ":"))
FEWEST = 3  # points of a curve: fewer show nothing


def learning_curves(rows: list[dict], title: str, args: Args) -> Image.Image | None:
    """Panels over environment steps, from the rows of metrics.jsonl; None if no curve has three
    points."""
    panels = {}
    for name, keys in CURVES.items():
        for label, key in keys.items():
            points = [row for row in rows if key in row]
            if len(points) >= FEWEST:
                panels.setdefault(name, {})[label] = key, points
    if not panels:
        return None
    # Takes a second to import, and the page needs none of it. What MPLBACKEND says is for windows.
    os.environ.pop("MPLBACKEND", None)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = -(-len(panels) // 2)
    figure = Figure(figsize=(12, 3.5 * lines), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=13, x=0.01, ha="left")
    axes = figure.subplots(lines, 2, squeeze=False).flat
    for (name, curves), ax in zip(panels.items(), axes, strict=False):
        for (label, (key, points)), look in zip(curves.items(), LOOKS, strict=False):
            colour, marker, dash = look
            x, y = (np.array([row[k] for row in points]) for k in ("charts/env_steps", key))
            if key == "eval/mean_return":
                count = args.eval_episodes
                label = f"{label}, {count} game{'s' * (count > 1)} each"
                # The first is random play, of as many games as the last evaluation has.
                first, later = args.final_episodes, args.eval_episodes
                games = [later if row["epoch"] else first for row in points]
                if "eval/std_return" in points[0] and min(games) > 1:
                    std = np.array([row["eval/std_return"] for row in points])
                    half = 1.96 * std / (np.array(games) - 1) ** 0.5
                    ax.fill_between(x, y - half, y + half, color=colour, alpha=0.2, linewidth=0)
                    label += ", 95% interval"
            look = dict(color=colour, linestyle=dash, label=label)
            ax.plot(x, y, marker=marker if len(points) < 40 else None, **look)
        ax.set(xlabel="environment steps", title=name)
        ax.grid(alpha=0.3)
        if "error" in name:
            ax.axhline(1, color="0.5", linewidth=1)
            ax.set_yscale("log")
        if "probability" in name:
            ax.set_ylim(-0.02, 1.02)  # or noise about 0 looks like a curve
        ax.legend(frameon=False)
    for ax in list(axes):
        ax.remove()  # an odd number of panels
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


# ---- The command line ----------------------------------------------------------------------------
def png(picture: Image.Image) -> bytes:
    """The file of a picture."""
    picture.save(content := io.BytesIO(), "PNG")
    return content.getvalue()


def draw_dreams(run: Run) -> dict[str, bytes]:
    """Name and content of each picture of dreams. A game that is too short for one has none."""
    torch.manual_seed(run.args.seed)
    heldout, n, pictures = play_game(run), run.args.context_frames, {}
    if (play := eventful_window(heldout, n + MAX_OPEN_LOOP)) is not None:
        dream = dream_of(run, play, MAX_OPEN_LOOP)
        title = f"{run.args.env_id}: from 'now' on the dream sees no frame, only actions"
        pictures["dreams/final.png"] = png(film_strip(dream, title))
        pictures["dreams/final.gif"] = film(moments_of(dream), 200)
    longest = min(int(heldout.lengths.max()), 300 + n)
    if longest > n:
        stretch = len(run.open_loop) or MAX_OPEN_LOOP
        dream = dream_of(run, eventful_window(heldout, longest), stretch)
        pictures["dreams/play.gif"] = film(moments_of(dream), 70)
    else:
        print("no dreams: the game was over before a dream of one step could begin")
    return pictures


def draw_curves(run: Run) -> dict[str, bytes]:
    """Name and content of the picture of what metrics.jsonl holds, if that is enough for one."""
    curves = learning_curves(run.metrics, f"{run.game}, {run.about}", run.args)
    if curves is None:
        print(f"no curves: fewer than {FEWEST} points")
        return {}
    return {"curves.png": png(curves)}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for bad input, 1 for a failure."""
    parser = Parser(prog="python -m play.pictures", description=__doc__.split("\n\n")[0])
    parser.add_argument("run_dir", type=Path, help="folder of a run")
    try:
        run = load_named(parser.parse_args(argv))
        (run.folder / "dreams").mkdir(exist_ok=True)
        for draw in (draw_dreams, draw_curves):
            for name, content in draw(run).items():
                write_atomically(run.folder / name, content)
                print(run.folder / name)
        return 0
    except BadInput as error:
        status, text = 2, f"error: {error}"
    except OSError as error:
        status, text = 1, f"failed: {error}"
    except KeyboardInterrupt:
        status, text = 130, "stopped"
    print(f"play.pictures: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())

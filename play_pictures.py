"""Pictures of a run: what its agent dreams, beside the real game, and its learning curves.

    python play_pictures.py runs/Pong__...   # writes dreams/ and curves.png there

JEDI has no decoder: nothing in it turns a latent into a picture. One is learned here, afterwards,
from the run's own play and its frozen encoder, and kept as decoder.pt. What the run wrote itself
stays as it is.

Read downward: 1 a trained run, 2 the decoder, 3 dreams, 4 learning curves, 5 the command line.
"""

import argparse
import dataclasses
import functools
import importlib.util
import io
import json
import os
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

import jedi_atari
from jedi_atari import (
    HELDOUT_STEPS,
    IMAGE_SIZE,
    LATENT_SHAPE,
    MAX_OPEN_LOOP,
    Agent,
    Args,
    BadInput,
    Collector,
    ReplayBuffer,
    Windows,
    conv3x3,
    progress,
    write_atomically,
    zero_,
)


# ---- 1. A trained run ----------------------------------------------------------------------------
@dataclasses.dataclass
class Run:
    """What a run has learned and played."""

    folder: Path
    script: ModuleType  # jedi_atari, jedi_atari_stochastic or a fork of one
    args: Args
    agent: Agent  # frozen
    saved: dict  # its checkpoint
    collector: Collector  # of a game that has just begun

    @functools.cached_property
    def replay(self) -> ReplayBuffer:
        """Its play, had back from the actions in the checkpoint: 100k steps take half a minute."""
        steps, cpu = self.saved["collector"]["steps"], torch.device("cpu")
        replay = ReplayBuffer(int(1.1 * steps) + 1_000, cpu)
        try:
            self.collector.load_state_dict(self.saved["collector"], replay)
        except BadInput as error:  # another emulator than the run's: still frames of the game
            print(f"not quite the run's own play: {error}")
        return replay


def load_script(name: str) -> ModuleType:
    """The script of this name beside this file: one of the two or a fork. Raises `BadInput`."""
    here = Path(__file__).resolve()
    path = here.parent / f"{name}.py"
    if Path(name).name != name or not path.is_file():
        raise BadInput(f"the run was made by {name}.py; put that beside {here.name}")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    sys.modules[name].BadInput = BadInput  # so that one `except` knows them all
    return sys.modules[name]


def load_run(folder: Path, device: str = "auto", threads: int = 0) -> Run:
    """Read a run's folder; writes nothing. Raises `BadInput` if it cannot be used here."""
    saved = jedi_atari.load_checkpoint(folder)
    script = load_script(saved["script"])
    here = dict(device=device, threads=threads, precision="fp32", compile=False, resume=False)
    args = dataclasses.replace(script.load_args(folder), **here)
    with torch.random.fork_rng([]):  # set_up seeds it for a run
        collector, agent, _ = script.set_up(args)
    try:
        agent.load_state_dict(saved["agent"])
    except RuntimeError:
        text = f"{folder} was made by another version of {script.__name__}.py: other networks"
        raise BadInput(text) from None
    return Run(folder, script, args, frozen(agent), saved, collector)


def frozen(network: nn.Module) -> nn.Module:
    """The network, not to be trained any more."""
    # Weights in the order in which a CPU's convolutions want them: else each call reorders them.
    return network.requires_grad_(False).to(memory_format=torch.channels_last)


# ---- 2. The decoder ------------------------------------------------------------------------------
BATCH_SIZE, MAX_UPDATES, LEARNING_RATE = 16, 1_500, 2e-3  # a minute on a core
PROBE = 256  # frames, spread over the whole play, for the mean picture and the error
CHECK_EVERY, ENOUGH = 50, 0.05  # updates; share of the mean picture's error that is good enough


class Decoder(nn.Module):
    """Latent -> 64 x 64 RGB picture, for people only. It learns what differs from the mean one."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.register_buffer("background", torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE))
        self.conv_in = conv3x3(LATENT_SHAPE[0], 4 * width)
        self.stages = nn.ModuleList(conv3x3(i * width, o * width) for i, o in ((4, 2), (2, 1)))
        self.conv_out = zero_(conv3x3(width, 3 * 2 * 2))

    def forward(self, z: Tensor) -> Tensor:
        """(N, 16, 8, 8) -> (N, 3, 64, 64), in [-1, 1] but for errors."""
        x = self.conv_in(z.contiguous(memory_format=torch.channels_last))
        for stage in self.stages:
            x = stage(F.interpolate(F.silu(x), scale_factor=2))
        return self.background + F.pixel_shuffle(self.conv_out(F.silu(x)), 2)

    @torch.no_grad()
    def pictures(self, z: Tensor) -> np.ndarray:
        """(..., 16, 8, 8) -> (..., 64, 64, 3) uint8, on the host."""
        x = torch.cat([self(part) for part in z.reshape(-1, *LATENT_SHAPE).split(64)])
        x = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        return x.reshape(*z.shape[:-3], IMAGE_SIZE, IMAGE_SIZE, 3).cpu().numpy()


def new_decoder(agent: Agent, seed: int = 0) -> Decoder:
    """A decoder beside an agent. Leaves the global random generator as it is."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return Decoder().to(agent.norm.mean.device, memory_format=torch.channels_last)


def decoder_loss(decoder: Decoder, z: Tensor, target: Tensor) -> Tensor:
    """Squared error of the pictures made from latents z (N, 16, 8, 8), against (N, 3, 64, 64) in
    [-1, 1]. What differs from the mean picture weighs more: else nobody would see a small ball."""
    weight = 0.1 + (target - decoder.background).abs()
    return (weight * (decoder(z) - target).square()).mean()


def learn_decoder(agent: Agent, frames: Tensor, seed: int = 0) -> Decoder:
    """Learn from frames (N, 64, 64, 3) uint8 until the pictures are good enough; the agent learns
    nothing."""
    decoder, rng = new_decoder(agent, seed), np.random.default_rng(seed)

    @torch.no_grad()
    def batch(rows: np.ndarray) -> tuple[Tensor, Tensor]:
        some = frames[rows].to(agent.norm.mean.device)
        return agent.encode(some), some.permute(0, 3, 1, 2).float() / 127.5 - 1

    # A short memory of the gradients' size: with Adam's usual one the error at times jumps up.
    optimizer = torch.optim.AdamW(decoder.parameters(), betas=(0.9, 0.9), fused=True)
    probe = batch(np.linspace(0, len(frames) - 1, PROBE).astype(int))
    decoder.background.copy_(probe[1].mean(0))
    error = torch.no_grad()(lambda: decoder_loss(decoder, *probe).item())
    of_mean = error()  # at first it shows the mean picture
    print("learn the decoder: a minute or two", flush=True)
    for number in progress(range(MAX_UPDATES), desc="learn the decoder", unit="update"):
        if number % CHECK_EVERY == 0 and error() < ENOUGH * of_mean:
            break
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - number / MAX_UPDATES)
        optimizer.zero_grad(set_to_none=True)
        decoder_loss(decoder, *batch(rng.integers(len(frames), size=BATCH_SIZE))).backward()
        optimizer.step()
    return frozen(decoder)


def decoder_of(run: Run) -> Decoder:
    """The run's decoder: decoder.pt or, if there is none for this checkpoint's encoder, one that is
    learned now and kept there."""
    path, encoder = run.folder / "decoder.pt", checksum(run.agent)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["encoder"] == encoder:
            decoder = new_decoder(run.agent)
            decoder.load_state_dict(saved["decoder"])
            return frozen(decoder)
    except Exception:  # missing, cut short or of another version: it can always be learned again
        pass
    decoder = learn_decoder(run.agent, run.replay.frames[: run.replay.size], run.args.seed)
    archive = io.BytesIO()
    torch.save({"encoder": encoder, "decoder": decoder.state_dict()}, archive)
    try:
        write_atomically(path, archive.getbuffer())
    except OSError as error:  # somebody else's run, or a full disk
        print(f"the decoder will be learned again next time: {error}")
    return decoder


def checksum(agent: Agent) -> int:
    """Of the weights that make latents."""
    total = 0
    for network in (agent.encoder, agent.norm):
        for tensor in network.state_dict().values():
            total = zlib.crc32(tensor.cpu().contiguous().numpy().tobytes(), total)
    return total


# ---- 3. Dreams -----------------------------------------------------------------------------------
PLUS, MINUS, END = "#0072B2", "#D55E00", "#000000"  # everybody can tell them apart (Okabe and Ito)


class Dream(NamedTuple):
    """K steps of real play and the dream of it: the same actions, but imagined from step 0 on."""

    pictures: np.ndarray  # (3, K + 1, 64, 64, 3) uint8: real, decoded from true latents, dream
    rewards: np.ndarray  # (2, K + 1) in {-1, 0, 1}: of the step that led there; real, dream's guess
    ends: np.ndarray  # (2, K + 1) bool, likewise
    ages: np.ndarray  # (K + 1,) imagined steps since the dream last saw a real frame


def play_game(run: Run) -> ReplayBuffer:
    """A game of the trained agent that it was not trained on; cut after `HELDOUT_STEPS`."""
    args = dataclasses.replace(run.args, epsilon=0.0, seed=2**31 - 1 - run.args.seed)
    collector = run.script.Collector(args)
    heldout = ReplayBuffer(HELDOUT_STEPS, run.agent.norm.mean.device)
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
    return Windows(*(field[best : best + 1] for field in windows))


@torch.no_grad()
def dream_of(run: Run, decoder: Decoder, play: Windows, stretch: int) -> Dream:
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
    pictures = [decoder.pictures(latents[0, n - 1 :]) for latents in (z, imagined)]
    pictures = np.stack([play.frames[0, n - 1 :].cpu().numpy(), *pictures])
    # Nothing led to the first picture.
    rewards, ends = (F.pad(x[:, n - 1 :], (1, 0)).cpu().numpy() for x in (rewards, ends))
    return Dream(pictures, rewards.astype(int), ends, np.array(ages))


def event(reward: int, end: bool) -> tuple[str, str]:
    """Text and colour of what happened in a step; no text for most."""
    texts = [f"{reward:+d}"] if reward else []
    return ", ".join(texts + ["end"] * bool(end)), END if end else PLUS if reward > 0 else MINUS


def enlarged(picture: np.ndarray, factor: int) -> Image.Image:
    """(64, 64, 3) uint8 -> a picture whose pixels are squares."""
    size = (IMAGE_SIZE * factor, IMAGE_SIZE * factor)
    return Image.fromarray(picture).resize(size, Image.Resampling.NEAREST)


def film_strip(dream: Dream, title: str) -> Image.Image:
    """Three rows of pictures: the real game, its latents decoded, and the dream."""
    size, gap, left, top, below = 2 * IMAGE_SIZE, 8, 150, 64, 26
    columns = dream.pictures.shape[1]
    sheet = Image.new("RGB", (left + columns * (size + gap), top + 3 * (size + below)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((8, 6), title, "black", font_size=20)
    for row, name in enumerate(("real game", "decoded from\nits latents", "dream")):
        y = top + row * (size + below)
        pen.multiline_text((8, y + size / 2 - 20), name, "black", font_size=18)
    for row, column in np.ndindex(3, columns):
        x, y = left + column * (size + gap), top + row * (size + below)
        if row == 0:
            name = f"step {column}" if column else "now"
            pen.text((x + size / 2, y - 5), name, "black", font_size=16, anchor="mb")
        if row != 1:
            text, colour = event(dream.rewards[row // 2, column], dream.ends[row // 2, column])
            pen.text((x + size / 2, y + size + 4), text, colour, font_size=19, anchor="ma")
            if text:
                pen.rectangle((x - 4, y - 4, x + size + 3, y + size + 3), colour)
        sheet.paste(enlarged(dream.pictures[row, column], 2), (x, y))
    return sheet


def film(dream: Dream, milliseconds: int) -> bytes:
    """A GIF: the real game and the dream side by side, with what happens in each."""

    def draw(t: int) -> Image.Image:
        size, gap, head = 4 * IMAGE_SIZE, 8, 34
        sheet = Image.new("RGB", (2 * size + gap, size + head), "white")
        pen, age = ImageDraw.Draw(sheet), dream.ages[t]
        names = ("real game", f"dream, step {age}" if age else "sees the game")
        for side, name in enumerate(names):
            left, (text, colour) = (
                side * (size + gap),
                event(dream.rewards[side, t], dream.ends[side, t]),
            )
            sheet.paste(enlarged(dream.pictures[2 * side, t], 4), (left, head))
            pen.text((left + 4, 8), name, "black", font_size=16)
            pen.text((left + size - 4, 8), text, colour, font_size=18, anchor="ra")
        return sheet

    return gif(map(draw, range(len(dream.ages))), milliseconds)


def gif(sheets: Iterable[Image.Image], milliseconds: int | list[int]) -> bytes:
    """An animation of pictures, made one at a time: together they can be larger than memory."""
    # Maximum coverage keeps the rare colours too, as of a small paddle, which others make grey.
    look = dict(method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    sheets, content = (sheet.quantize(256, **look) for sheet in sheets), io.BytesIO()
    options = dict(format="GIF", save_all=True, duration=milliseconds, loop=0)
    next(sheets).save(content, append_images=sheets, **options)
    return content.getvalue()


# ---- 4. Learning curves --------------------------------------------------------------------------
CURVES = {
    "return of a game": {
        "training play": "charts/episodic_return", "evaluation": "eval/mean_return",
        "final": "final/mean_return",
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


def learning_curves(rows: list[dict], title: str) -> Image.Image:
    """Four panels over environment steps, from the rows of metrics.jsonl."""
    # Takes a second to import, and play.py needs none of it. What MPLBACKEND says is for windows.
    os.environ.pop("MPLBACKEND", None)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=13, x=0.01, ha="left")
    looks = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#000000", "^", ":"))
    for ax, (name, keys) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        for (label, key), (colour, marker, dash) in zip(keys.items(), looks, strict=True):
            points = [(row["charts/env_steps"], row[key]) for row in rows if key in row]
            if points:
                look = dict(color=colour, linestyle=dash, label=label)
                look["marker"] = marker if len(points) < 40 else None
                ax.plot(*zip(*points, strict=True), **look)
        ax.set(xlabel="environment steps", title=name)
        ax.grid(alpha=0.3)
        if "error" in name:
            ax.axhline(1, color="0.5", linewidth=1)
            ax.set_yscale("log")
        if "probability" in name:
            ax.set_ylim(-0.02, 1.02)  # or noise about 0 looks like a curve
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


# ---- 5. The command line -------------------------------------------------------------------------
def png(picture: Image.Image) -> bytes:
    """The file of a picture."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def draw_dreams(run: Run, decoder: Decoder) -> dict[str, bytes]:
    """Name and content of each picture of dreams. A game that is too short for one has none."""
    torch.manual_seed(run.args.seed)
    heldout, n, pictures = play_game(run), run.args.context_frames, {}
    if (play := eventful_window(heldout, n + MAX_OPEN_LOOP)) is not None:
        dream = dream_of(run, decoder, play, MAX_OPEN_LOOP)
        title = f"{run.args.env_id}: from 'now' on the dream sees no frame, only actions"
        pictures["dreams/final.png"] = png(film_strip(dream, title))
        pictures["dreams/final.gif"] = film(dream, 200)
    longest = min(int(heldout.lengths.max()), 300 + n)
    if longest > n:
        dream = dream_of(run, decoder, eventful_window(heldout, longest), 50)
        pictures["dreams/play.gif"] = film(dream, 67)
    return pictures


def draw_curves(run: Run) -> dict[str, bytes]:
    """Name and content of the picture of what metrics.jsonl holds."""
    path = run.folder / "metrics.jsonl"  # where only the checkpoint was copied, that has most of it
    text = path.read_text() if path.exists() else run.saved["metrics"]
    rows = [json.loads(line) for line in text.splitlines()]
    title = f"{run.args.env_id}, preset {run.args.preset}, seed {run.args.seed}"
    return {"curves.png": png(learning_curves(rows, title))}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str):
        raise BadInput(message)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for bad input, 1 for a failure."""
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("run_dir", type=Path, help="folder of a run")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    try:
        options = parser.parse_args(argv)
        run = load_run(options.run_dir, options.device, options.threads)
        (run.folder / "dreams").mkdir(exist_ok=True)
        for draw in (lambda: draw_dreams(run, decoder_of(run)), lambda: draw_curves(run)):
            for name, content in draw().items():
                write_atomically(run.folder / name, content)
                print(run.folder / name)
        return 0
    except BadInput as error:
        status, text = 2, f"error: {error}"
    except OSError as error:
        status, text = 1, f"failed: {error}"
    except KeyboardInterrupt:
        status, text = 130, "stopped"
    print(f"{Path(__file__).name}: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())

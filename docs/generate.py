"""Write what the documentation takes from the code, so that the two cannot part.

    python docs/generate.py            # rewrite it
    python docs/generate.py --check    # write nothing; say in one line what is stale and exit with 1

Made here are hyperparameters.md and walkthrough.md as a whole, the tables of real runs in metrics.md (between its
`runs:begin` and `runs:end` comments), and in README.md and docs/*.md the line of every link such as
[`Game.step`](../jedi_atari.py#L300).

The walkthrough plays and trains for some seconds on one CPU thread. The last of its three digits may depend on the
processor, as the order of a sum does; the check therefore compares its words exactly and its numbers within TOLERANCE.
Where PyTorch has no MKL (not on x86), the same seed draws other random numbers, and the walkthrough is another one.
"""

import argparse
import ast
import copy
import dataclasses
import functools
import io
import itertools
import json
import math
import re
import sys
import textwrap
import tokenize
import typing
from collections.abc import Callable
from pathlib import Path

import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jedi_atari as jedi  # noqa: E402
import jedi_atari_stochastic  # noqa: E402

# Twice what a step of the third digit can be (1.00 or 1.01). PyTorch's kernels for SSE, AVX2 and AVX-512, which sum in
# another order, gave the same three digits throughout; a change of the algorithm moves many by far more.
TOLERANCE = 0.02
CPU = torch.device("cpu")


class Broken(ValueError):
    """A page asks for what the code does not have; the message is one line that says where."""


# ----------------------------------------------------------------------------------------------------------------------
# Lines: where a function, a class, a method or a constant stands
# ----------------------------------------------------------------------------------------------------------------------

LINK = re.compile(r"\[([^\]\n]*)\]\(((?:\.\./)*[\w/]+\.py)#L\d+\)")


@functools.cache
def lines_of_names(source: str) -> dict[str, int]:
    """`name` and `Class.name` -> line, of everything that the module and its classes define."""
    lines: dict[str, int] = {}

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                lines.setdefault(prefix + node.name, node.lineno)
            targets = (
                node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            )
            for target in targets:
                for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if isinstance(name, ast.Name):
                        lines.setdefault(prefix + name.id, node.lineno)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")

    collect(ast.parse(source).body, "")
    return lines


def link_lines(text: str, page: Path) -> str:
    """Give every link into a Python file the line where the name in its text stands now."""

    def fix(match: re.Match) -> str:
        name, target = match[1].strip("`"), match[2]
        file = (page.parent / target).resolve()
        if not file.is_file():
            raise Broken(
                f"{page.relative_to(ROOT)}: a link leads to {target}, which does not exist"
            )
        lines = lines_of_names(file.read_text())
        if match[1] != f"`{name}`" or name not in lines:
            raise Broken(
                f"{page.relative_to(ROOT)}: {target} has no function, class or constant {match[1]}"
            )
        return f"[`{name}`]({target}#L{lines[name]})"

    return LINK.sub(fix, text)


# ----------------------------------------------------------------------------------------------------------------------
# hyperparameters.md: the fields of Args
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Hyperparameter:
    """A field of `Args`, with what its source says of it."""

    name: str
    group: str  # of the `# --- group` comment above it
    meaning: str
    sources: str  # letters
    choices: tuple[str, ...]
    by_device: bool  # its default depends on the machine


def hyperparameters(module) -> list[Hyperparameter]:
    """The fields of a script's `Args`, in order."""
    source = Path(module.__file__).read_text()
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (args,) = (
        n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Args"
    )
    types, result, group, line = typing.get_type_hints(module.Args), [], "", args.lineno
    for node in args.body:
        if not isinstance(node, ast.AnnAssign):
            continue
        for above in range(line, node.lineno):
            group = comments[above][4:] if comments.get(above, "").startswith("--- ") else group
        line, name, comment = node.lineno, node.target.id, comments.get(node.lineno, "")
        letters = [
            x
            for found in re.findall(r"\[([PDEC](?:, [PDEC])*)\]", comment)
            for x in found.split(", ")
        ]
        meaning = re.sub(r" \[[PDEC](, [PDEC])*\]$", "", comment)
        meaning = re.sub(
            r"(?<!\S)(--[\w-]+|\S*<\S+|[a-z]+_[a-z_]+)", r"`\1`", meaning
        )  # flags, paths and names
        choices = typing.get_args(types[name])
        by_device = isinstance(node.value, ast.Call)
        result.append(
            Hyperparameter(
                name, group, meaning, ", ".join(dict.fromkeys(letters)), choices, by_device
            )
        )
    return result


def shown(value) -> str:
    """A value as a table shows it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str):
        return f"`{value}`" if value else "(empty)"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def hyperparameter_tables() -> str:
    """One table per group: flag, the paper preset's value, other presets' where they differ, meaning, sources."""
    presets = {
        name: jedi.Args(**{**changes, "preset": name}) for name, changes in jedi.PRESETS.items()
    }
    others = [name for name in presets if name != "paper"]
    head = f"| flag | paper | {' | '.join(others)} | meaning | source |\n|---|---|{'---|' * len(others)}---|---|\n"
    text = ""
    for group, fields in itertools.groupby(hyperparameters(jedi), lambda field: field.group):
        text += f"\n## {group.capitalize()}\n\n{head}"
        for field in fields:
            paper = getattr(presets["paper"], field.name)
            cells = ["by device" if field.by_device else shown(paper)]
            values = [getattr(presets[name], field.name) for name in others]
            cells += ["" if v == paper or field.name == "preset" else shown(v) for v in values]
            choices = ", ".join(f"`{x}`" for x in field.choices)
            meaning = field.meaning + (f" ({choices})" if choices else "")
            text += f"| `{jedi.flag(field.name)}` | {' | '.join(cells)} | {meaning} | {field.sources} |\n"
    return text


def stochastic_table() -> str:
    """What the stochastic script has more, and what is another default there."""
    plain, stochastic = jedi.Args(), jedi_atari_stochastic.Args()
    text = "| flag | default | meaning | source |\n|---|---|---|---|\n"
    for field in hyperparameters(jedi_atari_stochastic):
        value = getattr(stochastic, field.name)
        if value != getattr(plain, field.name, None):
            text += f"| `{jedi.flag(field.name)}` | {shown(value)} | {field.meaning} | {field.sources} |\n"
    return text


def hyperparameters_page() -> str:
    gone = set(vars(jedi.Args())) - set(vars(jedi_atari_stochastic.Args()))
    without = ", ".join(f"`{jedi.flag(name)}`" for name in sorted(gone))
    return f"""# Hyperparameters

Every argument of `jedi_atari.py`, made from [`Args`](../jedi_atari.py#L1) and [`PRESETS`](../jedi_atari.py#L1) by
`python docs/generate.py`. `--preset` chooses a column; a flag on the command line goes before the preset. An empty
cell is the value of `paper`. A flag that is on is turned off with `--no-` before its name, as in `--no-decoder`.

Sources: [P] the JEDI papers (arXiv 2505.19698 and 2605.13013), [D] DIAMOND (arXiv 2405.12399 and its code), [E] EDM
(arXiv 2206.00364), [C] our choice where no source says. They are those of the column `paper`; other presets are [C].
{hyperparameter_tables()}
## In jedi_atari_stochastic.py

The same but for these, and without {without}.

{stochastic_table()}"""


# ----------------------------------------------------------------------------------------------------------------------
# metrics.md: what real runs logged
# ----------------------------------------------------------------------------------------------------------------------

RUNS = re.compile(r"(<!-- runs:begin (\S+) -->\n).*?(<!-- runs:end -->)", re.S)
LONG = re.compile(r"wm/open_loop_ratio_(\d+)")  # fifteen keys, of which the table shows a few


def short(x: float) -> str:
    """A number of a run."""
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def span(values: dict[str, list[float]]) -> str:
    """Smallest to largest of all runs; with their games where these lie far apart."""
    if not values:
        return ""
    low, high = min(values, key=lambda g: min(values[g])), max(values, key=lambda g: max(values[g]))
    least, most = min(values[low]), max(values[high])
    if short(least) == short(most):
        return short(least)
    apart = max(values[low]) < min(values[high]) and (least <= 0 or most > 2 * least)
    return (
        f"{short(least)} ({low}) to {short(most)} ({high})"
        if apart
        else f"{short(least)} to {short(most)}"
    )


def finished_runs() -> dict[str, list[tuple[str, list[dict]]]]:
    """Setting -> game and lines of metrics.jsonl, of each finished run in results/<setting>/<game>/<seed>."""
    runs: dict[str, list[tuple[str, list[dict]]]] = {}
    for path in sorted(ROOT.glob("results/*/*/*/metrics.jsonl")):
        if (path.parent / "result.json").is_file():
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            runs.setdefault(path.parts[-4], []).append((path.parts[-3], lines))
    return runs


def runs_table(prefix: str) -> str:
    """Of each key under `prefix/`: its first and its last value in each setting's runs."""
    runs = finished_runs()
    keys = {
        key: None
        for played in runs.values()
        for _, lines in played
        for line in lines
        for key in line
    }
    keys = [k for k in keys if k.startswith(f"{prefix}/")]
    keys = [k for k in keys if not LONG.match(k) or int(LONG.match(k)[1]) in jedi.REPORTED_HORIZONS]
    heads = [f"{setting}, {when}" for setting in runs for when in ("first", "last")]
    text = f"| key | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}\n"
    for key in keys:
        cells = []
        for played in runs.values():
            series = [
                (game, [line[key] for line in lines if key in line]) for game, lines in played
            ]
            once = all(len(values) < 2 for _, values in series)
            for at in (0, -1):
                values: dict[str, list[float]] = {}
                for game, seen in series:
                    if seen and not (once and at == 0):
                        values.setdefault(game, []).append(seen[at])
                cells.append(span(values))
        text += f"| `{key}` | {' | '.join(cells)} |\n"
    return text


def metrics_page(text: str) -> str:
    """metrics.md with its tables made anew; the words stay."""
    counts = {
        setting: f"`{setting}` {len({game for game, _ in played})} games, {len(played)} runs"
        for setting, played in finished_runs().items()
    }
    tables = {"settings": "; ".join(counts.values()) + ".\n"}
    return RUNS.sub(
        lambda m: m[1] + (tables[m[2]] if m[2] in tables else runs_table(m[2])) + m[3], text
    )


# ----------------------------------------------------------------------------------------------------------------------
# walkthrough.md: one training step on a real batch
# ----------------------------------------------------------------------------------------------------------------------

STEPS, GAME_LENGTH = 400, 100  # of play, and of one game
STEP = 60  # of which the frame is looked at: the ball is in play
FIRST, UPDATES = (
    4,
    40,
)  # updates of the denoiser: those looked at one by one, and all before the section on sampling
DREAM = 227  # seed of the dreams: in one of them there are rewards of both signs, then an end


class Watch(gym.Wrapper):
    """Keeps the frames that the emulator shows."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.seen: list[np.ndarray] = []

    def step(self, action):
        result = self.env.step(action)
        self.seen.append(result[0])
        return result


@dataclasses.dataclass
class Walk:
    """What the steps of the walkthrough hand on to each other."""

    args: jedi.Args
    game: jedi.Game
    agent: jedi.Agent
    parts: dict[str, jedi.Part]
    replay: jedi.ReplayBuffer
    raw: list[np.ndarray]  # the emulator's frames of one step
    frames: tuple[np.ndarray, np.ndarray]  # what Game showed before that step and after it
    batch: jedi.Windows | None = None
    moved: list[tuple] = dataclasses.field(default_factory=list)  # rows of the table at the end


def begin_walk() -> Walk:
    """A fresh agent of the tiny preset's sizes, and some random play of Pong."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    changes = dict(
        preset="tiny", device="cpu", compile=False, threads=1, max_episode_steps=GAME_LENGTH
    )
    args = jedi.Args(**{**jedi.PRESETS["tiny"], **changes})
    jedi.seed_everything(args.seed)
    game = jedi.make_env(args)
    game.env = watch = Watch(game.env)
    agent = jedi.Agent(int(game.action_space.n), args)
    replay = jedi.ReplayBuffer(2 * STEPS, CPU)
    rng, (frame, _) = np.random.default_rng(args.seed), game.reset(seed=args.seed)
    for step in range(STEPS):
        watch.seen.clear()
        action = int(rng.integers(game.action_space.n))
        after, reward, terminated, truncated, info = game.step(action)
        end, stop = jedi.replay_end(terminated, truncated, info)
        replay.add(frame, action, reward, end, after if stop else None)
        if step == STEP:
            raw, frames = list(watch.seen), (frame, after)
        frame = game.reset()[0] if stop else after
    replay.flush()
    return Walk(args, game, agent, jedi.make_parts(agent, args, CPU), replay, raw, frames)


def g3(x: float | Tensor) -> str:
    """Three digits; 0 only for what is exactly 0."""
    x = float(x)
    return "0" if x == 0 else f"{x:#.3g}".rstrip(".")


def agree(mine: float | Tensor, program: float | Tensor) -> str:
    """Three digits of what was worked out here, which must be what the program has."""
    torch.testing.assert_close(
        torch.as_tensor(mine), torch.as_tensor(program), rtol=1e-3, atol=1e-6
    )
    return g3(mine)


def row(*cells) -> str:
    """A row of a table."""
    return (
        "| "
        + " | ".join(
            c if isinstance(c, str) else str(c) if isinstance(c, int) else g3(c) for c in cells
        )
        + " |"
    )


def norm(gradients: list[Tensor | None]) -> float:
    """Length of all these gradients as one vector."""
    return math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None))


def gradient_norm(network: nn.Module) -> float:
    return norm([p.grad for p in network.parameters()])


def shape(x: Tensor) -> str:
    return "(" + ", ".join(str(n) for n in x.shape) + ")"


def numbers(x: Tensor) -> str:
    return " ".join(str(int(n)) for n in x)


@torch.no_grad()
def after_first_look(walk: Walk) -> jedi.Agent:
    """A copy of the fresh agent whose LatentNorm has seen the batch, as `diffusion_loss` lets it first of all."""
    agent = copy.deepcopy(walk.agent)
    agent.norm.update(agent.encoder(walk.batch.frames), walk.batch.mask)
    return agent


def walk_frame(walk: Walk) -> str:
    before, after = walk.frames
    third, fourth = walk.raw[-2:]
    assert len(walk.raw) == walk.args.frame_skip
    mine = cv2.resize(
        np.maximum(third, fourth), (jedi.IMAGE_SIZE,) * 2, interpolation=cv2.INTER_AREA
    )
    assert (mine == after).all()
    return f"""## 1. A frame

[`Game.step`](../jedi_atari.py#L1) plays an action for {walk.args.frame_skip} frames of the emulator and takes the
maximum of the last two; [`Game.resize`](../jedi_atari.py#L1) shrinks it by averaging areas. Step {STEP} of the
first game:

| | |
|---|---|
| a frame of the emulator | {third.shape[0]} x {third.shape[1]} x {third.shape[2]}, bytes |
| its pixels in which the last two differ | {int((third != fourth).any(-1).sum())} of {third[..., 0].size:,} |
| what the agent sees | {after.shape[0]} x {after.shape[1]} x {after.shape[2]}, bytes |
| its pixels that changed since the step before | {int((before != after).any(-1).sum())} of {after[..., 0].size:,} |

The maximum is there because some games draw an object in every other frame only. The last line is what makes Pong
hard for a world model: all that there is to foresee is in these few pixels.
"""


def walk_window(walk: Walk) -> str:
    number, batch = 0, None
    while batch is None or batch.mask.all() or not batch.mask[0].all():
        number, batch = number + 1, walk.parts["diffusion"].sample(walk.replay)
    walk.batch = batch
    b, t = batch.mask.shape
    table = "\n".join(
        f"| {name}, window {i} | `{numbers(field[i])}` |"
        for i in (0, int(batch.mask.all(1).int().argmin()))
        for name, field in (("mask", batch.mask), ("actions", batch.actions))
    )
    n = walk.args.context_frames
    return f"""## 2. A batch of windows

{STEPS} steps of random play, cut into games of {GAME_LENGTH} steps, make {walk.replay.num_episodes} episodes and
{walk.replay.size} records: an episode's last frame is a record too.
[`ReplayBuffer.sample_frames`](../jedi_atari.py#L1) draws B = {b} windows of T = {n} + {t - n} frames, {n} of
context and {t - n} targets. This is batch {number}, the first in which a window begins before its episode:

| | |
|---|---|
| frames | {shape(batch.frames)}, {str(batch.frames.dtype).removeprefix("torch.")} |
| actions, rewards, ends, mask | {shape(batch.actions)} each |
{table}

`actions[t]` leads from `frames[t]` to `frames[t + 1]`, so that the last action is not used here. Padding has mask
0: zero frames, a zero latent, no loss. Without such windows the beginning of an episode would hardly ever be
learned.
"""


def walk_latents(walk: Walk) -> str:
    agent, batch = after_first_look(walk), walk.batch
    with torch.no_grad():
        z = agent.encoder(batch.frames)
        real = z[batch.mask]
        change, normed = real - real.mean(0), agent.norm(z)[batch.mask]
    sides = " x ".join(str(n) for n in jedi.LATENT_SHAPE)
    return f"""## 3. Latents

[`Encoder`](../jedi_atari.py#L1) turns each frame, {math.prod(batch.frames.shape[2:]):,} bytes, into {sides} =
{math.prod(jedi.LATENT_SHAPE):,} numbers: {shape(batch.frames)} becomes {shape(z)}. Its last operation is the clamp
C(z) = 3 tanh(z / 3), [`clamp_latent`](../jedi_atari.py#L1). Of the real frames of this batch:

| latents | standard deviation | smallest | largest |
|---|---|---|---|
{row("of the encoder", real.std(), real.min(), real.max())}
{row("less the mean of each of the numbers", change.std(), change.min(), change.max())}
{row("as the other networks see them", normed.std(), normed.min(), normed.max())}

The first line is nearly all background. The second is what moves: {g3(change.std() / real.std())} of it, far below
the sigma_data = {walk.args.sigma_data} that the denoiser takes for granted. [`LatentNorm`](../jedi_atari.py#L1)
(`--latent-norm center`, [DEVIATION 1](implementation_details.md#deviation-1)) subtracts the running mean and scales
what is left to sigma_data. Its first update takes this batch's own mean; from the hundredth on each moves it by 1%.
The large values are where something moves; most are near 0. With `--latent-norm none`, the papers' algorithm, the
denoiser sees the first line.
"""


def walk_noise(walk: Walk) -> str:
    args = walk.args
    torch.manual_seed(1)
    sigma = jedi.sample_sigma(args.batch_size, args, CPU)
    levels = torch.tensor([args.noise_min, sigma[0], args.noise_max])
    c = jedi.precondition(levels, args.sigma_data, args.sigma_offset)
    wide = torch.sqrt(levels**2 + args.sigma_offset**2)
    total = wide**2 + args.sigma_data**2
    mine = (
        1 / total.sqrt(),
        wide * args.sigma_data / total.sqrt(),
        args.sigma_data**2 / total,
        wide.log() / 4,
    )
    for by_hand, program in zip(mine, c, strict=True):
        torch.testing.assert_close(by_hand, program.flatten())
    names = ("the smallest", "of window 0", "the largest")
    rows = "\n".join(
        row(name, levels[i], wide[i], c.c_in[i], c.c_skip[i], c.c_out[i], c.c_noise[i])
        for i, name in enumerate(names)
    )
    return f"""## 4. A noise level

[`sample_sigma`](../jedi_atari.py#L1) draws one level per window, log-normal: ln(sigma) has mean {args.noise_mean}
and standard deviation {args.noise_std}. [`precondition`](../jedi_atari.py#L1) makes EDM's coefficients of it, with
sigma'^2 = sigma^2 + {args.sigma_offset}^2 in place of sigma^2, since offset noise comes on top:

| level | sigma | sigma' | c_in | c_skip | c_out | c_noise |
|---|---|---|---|---|---|---|
{rows}

c_in = 1 / sqrt(sigma'^2 + sigma_data^2), c_skip = sigma_data^2 c_in^2, c_out = sigma' sigma_data c_in, c_noise =
ln(sigma') / 4. With little noise the answer is mostly the input (c_skip); with much noise it comes from the network
(c_out goes to sigma_data). Since the offset is part of it, even the smallest level asks something of the network.
"""


@torch.no_grad()
def walk_loss(walk: Walk) -> str:
    args, batch, n = walk.args, walk.batch, walk.args.context_frames
    agent = after_first_look(walk)
    z = agent.encode(batch.frames, batch.mask)
    torch.manual_seed(1)
    errors, rows = [], ""
    for i in range(args.target_frames):
        target, sigma = z[:, n + i], jedi.sample_sigma(args.batch_size, args, CPU)
        noisy = jedi.add_noise(target, sigma, args.sigma_offset)
        torch.rand(())  # the coin of random switching
        c = jedi.precondition(sigma, args.sigma_data, args.sigma_offset)
        wanted = (target - c.c_skip * noisy) / c.c_out
        output = agent.denoiser(
            c.c_in * noisy, c.c_noise, z[:, i : i + n], batch.actions[:, i : i + n]
        )
        assert not output.any()
        errors.append(wanted.square().mean((1, 2, 3)))
        if i == 0:
            real = batch.mask[:, n]
            named = (
                ("target: the next latent", target),
                ("with noise", noisy),
                ("the network's input, c_in times that", c.c_in * noisy),
                ("what the network should say", wanted),
                ("what it says", output),
                ("the denoised latent, c_skip times the noisy one", c.c_skip * noisy),
            )
            rows = "\n".join(row(name, x[0].std(), x[real].std()) for name, x in named)
    error, real = torch.stack(errors, 1), batch.mask[:, n:]
    torch.manual_seed(1)
    loss, _ = jedi.diffusion_loss(copy.deepcopy(walk.agent), batch, args)
    return f"""## 5. The denoising loss

[`diffusion_loss`](../jedi_atari.py#L1) adds noise to the target ([`add_noise`](../jedi_atari.py#L1)), and the inner
network F ([`Denoiser`](../jedi_atari.py#L1)) is to say (target - c_skip noisy) / c_out. Standard deviations, first
target:

| | window 0 | all windows |
|---|---|---|
{rows}

The preconditioning gives input and answer a standard deviation of 1, if that of the target is sigma_data; it is a
little less here. The network says exactly 0, because its last layer starts at zero
([`zero_`](../jedi_atari.py#L1)), and c_skip noisy is the best guess that only multiplies the noisy latent. So the
loss can be worked out without the network: the mean square of what it should say is {g3(error[0, 0])} for window 0,
and by hand the mean over all {int(real.sum())} real targets of the batch is
{agree((error * real).sum() / real.sum(), loss)}. The function says {g3(loss)}. About 1 means: it knows nothing yet.
"""


def update(walk: Walk, name: str, number: int, batch: jedi.Windows) -> dict[str, Tensor]:
    """One update of a part; notes for the last table how far the weights of each network moved."""
    agent = walk.agent
    networks = {
        "encoder": agent.encoder,
        "denoiser": agent.denoiser,
        "reward": agent.reward,
        "policy": agent.policy,
    }
    before = copy.deepcopy(agent.state_dict())
    metrics = jedi.update(agent, walk.parts[name], batch, number, walk.args, bf16=False)
    moved = [
        max(
            (p.detach() - before[f"{network}.{key}"]).abs().max()
            for key, p in networks[network].named_parameters()
        )
        for network in networks
    ]
    walk.moved.append(
        (
            f"{name} {number + 1}",
            metrics["loss"],
            metrics["grad_norm"],
            walk.parts[name].clip,
            *moved,
        )
    )
    return metrics


def walk_gradients(walk: Walk) -> str:
    denoiser, rows = walk.agent.denoiser, []
    for number in range(FIRST):
        batch = walk.batch if number == 0 else walk.parts["diffusion"].sample(walk.replay)
        torch.manual_seed(number + 1)
        metrics = update(walk, "diffusion", number, batch)
        last = norm([p.grad for p in denoiser.conv_out.parameters()])
        rest = norm(
            [p.grad for name, p in denoiser.named_parameters() if not name.startswith("conv_out")]
        )
        rows.append(row(number + 1, metrics["loss"], gradient_norm(walk.agent.encoder), rest, last))
    table = "\n".join(rows)
    return f"""## 6. Gradients

The first {FIRST} updates ([`update`](../jedi_atari.py#L1)), each on a batch of its own; the first is the one from
above. Norms of the gradient:

| update | loss | encoder | denoiser but for its last layer | its last layer |
|---|---|---|---|---|
{table}

In the first update nothing but the last layer learns: what flows back through it is multiplied by its weights, and
they are 0. The encoder has to wait for one update, and at first gets little.
"""


def gradient_by_frame(walk: Walk, switch_prob: float) -> list[float]:
    """Norm of the denoising loss's gradient at the encoder's output, frame by frame of the window."""
    agent, kept = copy.deepcopy(walk.agent), []

    def keep(_module, _inputs, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    agent.encoder.register_forward_hook(keep)
    torch.manual_seed(5)
    loss, _ = jedi.diffusion_loss(
        agent, walk.batch, dataclasses.replace(walk.args, switch_prob=switch_prob)
    )
    loss.backward()
    return [norm([kept[0].grad[:, t]]) for t in range(kept[0].shape[1])]


def walk_switching(walk: Walk) -> str:
    tails, heads = gradient_by_frame(walk, 0.0), gradient_by_frame(walk, 1.0)
    assert tails[-1] == heads[-1] == heads[-2] == 0 < tails[-2]
    n = walk.args.context_frames
    names = [f"context {t + 1}" for t in range(n)] + [
        f"target {t + 1}" for t in range(len(tails) - n)
    ]
    return f"""## 7. Stop-gradient and random switching

Where does the loss reach the encoder? Norm of the gradient at the latents of each frame of the window, after these
{FIRST} updates, on the batch from above and twice with the same noise:

| coin | {" | ".join(names)} |
|---|{"---|" * len(names)}
{row("tails: the encoder's latent", *tails)}
{row("heads: the denoiser's own", *heads)}

Target 2 is a target only. Targets are behind a stop-gradient, and so it gets exactly 0: the encoder cannot make
targets easy by making them alike. Target 1 is context of target 2 as well. With tails the encoder's latent stands
there, and learns from being of use; with heads ([`Args.switch_prob`](../jedi_atari.py#L1)) the denoiser's own
output does, detached, as it will in imagination. Context 1 gets less because it is seen for target 1 alone.
"""


@torch.no_grad()
def sampler_trace(
    walk: Walk, agent: jedi.Agent, windows: jedi.Windows
) -> tuple[list[list[float]], float, float]:
    """The steps of `sample_next_latent`: standard deviations of latent, denoised latent and next latent; then the
    error of the sample, and that of saying that nothing changes."""
    args, n = walk.args, walk.args.context_frames
    z = agent.encode(windows.frames)
    context, target, actions = z[:, :n], z[:, n], windows.actions[:, :n]
    torch.manual_seed(1)
    sample, trace = jedi.noise_like(target), []
    sigmas = jedi.karras_sigmas(
        args.sample_steps, args.sample_sigma_min, args.sample_sigma_max, args.sample_rho
    )
    for sigma, following in itertools.pairwise(sigmas):
        denoised = jedi.denoise(
            agent, sample, torch.full((len(sample),), sigma), context, actions, args
        )
        after = sample + (following - sigma) * (sample - denoised) / sigma
        trace.append(
            [sigma, following, float(sample.std()), float(denoised.std()), float(after.std())]
        )
        sample = after
    torch.manual_seed(1)
    torch.testing.assert_close(sample, jedi.sample_next_latent(agent, context, actions, args))
    return (
        trace,
        float((sample - target).square().mean()),
        float((context[:, -1] - target).square().mean()),
    )


def walk_sampling(walk: Walk, fresh: jedi.Agent) -> str:
    args, windows = walk.args, walk.replay.all_windows(walk.args.context_frames + 1, stride=6)
    trace, error, copied = sampler_trace(walk, fresh, windows)
    std = trace[0][2]
    for sigma, following, _, _, after in trace:
        wide = sigma**2 + args.sigma_offset**2
        std *= 1 + (following - sigma) / sigma * wide / (wide + args.sigma_data**2)
        agree(std, after)
    for number in range(FIRST, UPDATES):
        batch = walk.parts["diffusion"].sample(walk.replay)
        jedi.update(walk.agent, walk.parts["diffusion"], batch, number, args, bf16=False)
    trained, trained_error, trained_copied = sampler_trace(walk, walk.agent, windows)
    rows = "\n".join(row(i, *line, *trained[i - 1][3:]) for i, line in enumerate(trace, 1))
    return f"""## 9. A sample of the next latent

[`sample_next_latent`](../jedi_atari.py#L1) goes down {args.sample_steps} levels of
[`karras_sigmas`](../jedi_atari.py#L1) and then to 0, by Euler steps z + (next - sigma) (z - D(z)) / sigma. Standard
deviations over {len(windows.frames)} windows, before the first update and after {UPDATES}, from the same noise:

| step | sigma | next | z | D(z) | z after it | trained: D(z) | z after it |
|---|---|---|---|---|---|---|---|
{rows}

The untrained D(z) is c_skip z, so each step only multiplies z by 1 + (next - sigma) (1 - c_skip) / sigma, which by
hand gives the same numbers; what is left is near 0, the mean of all latents. Note the first step: the noise of
standard deviation 1 that it begins with, where sigma says {g3(trace[0][0])}, shrinks to {g3(trace[0][4])}, where
the next level says {g3(trace[0][1])} (`--sample-start`). The last step puts D(z) in the place of z.

| mean squared error of the next latent | untrained | after {UPDATES} updates |
|---|---|---|
{row("of the sample", error, trained_error)}
{row("of saying that nothing changes", copied, trained_copied)}
{row("their ratio", error / copied, trained_error / trained_copied)}

Untrained, the error is the latents' mean square. The columns have scales of their own, since LatentNorm has moved
on; the ratios compare. [`open_loop_error`](../jedi_atari.py#L1) measures them on unseen play, as
`wm/open_loop_ratio_1`; here the windows are those that were trained on.
"""


def walk_reward(walk: Walk) -> str:
    agent = walk.agent
    batch = walk.parts["reward"].sample(walk.replay)
    rewarded, real = int((batch.rewards[:, :-1] != 0)[batch.mask].sum()), int(batch.mask.sum())
    ends = int(batch.ends[:, :-1][batch.mask].sum())
    none, one = math.log1p(2 * math.exp(-4)), math.log1p(math.exp(-4))
    torch.manual_seed(1)
    metrics = update(walk, "reward", 0, batch)
    b, t = batch.mask.shape
    return f"""## 8. Reward and termination

[`ReplayBuffer.sample_transitions`](../jedi_atari.py#L1) draws {b} windows of {t} transitions, {t + 1} frames:
{real} real transitions in this batch, {rewarded} with a reward and {ends} with a termination (cutting a game is
none). [`RewardTerminationModel`](../jedi_atari.py#L1) makes logits ({b}, {t}, 3) of the reward's sign and ({b},
{t}, 2) of termination. Its head starts with the biases -4, 0, -4 and 0, -4, "nothing happens":

| | by the biases alone | [`reward_termination_loss`](../jedi_atari.py#L1) |
|---|---|---|
{row("a transition without reward: ln(1 + 2 e^-4)", none, "")}
{row("one with a reward: 4 more", none + 4, "")}
{row("reward loss, the mean of these", none + 4 * rewarded / real, metrics["reward_loss"])}
{row("end loss: ln(1 + e^-4), and 4 more for a termination", one + 4 * ends / real, metrics["end_loss"])}
{row("sum", none + one + 4 * (rewarded + ends) / real, metrics["loss"])}

The small differences come from the head's random weights. Without the biases the sum would start at ln 3 + ln 2 =
{g3(math.log(6))}, and the LSTM would first learn to say "nothing" by saturating: [DEVIATION
7](implementation_details.md#deviation-7). Unlike the denoising loss this one reaches the encoder in its first
update: gradient norm {g3(gradient_norm(agent.encoder))}.
"""


def walk_imagination(walk: Walk) -> tuple[str, jedi.Imagined, jedi.Windows]:
    args, batch = walk.args, walk.parts["policy"].sample(walk.replay)
    torch.manual_seed(DREAM)
    dream = jedi.imagine(walk.agent, batch, args)
    going_on = torch.ones(len(dream.ends), dtype=torch.bool)
    for t in range(args.horizon):
        assert torch.equal(dream.alive[:, t], going_on)
        going_on = going_on & ~dream.ends[:, t]
    stds = [dream.z[:, t].std() for t in (0, 1, args.horizon // 2, args.horizon)]
    counts = numbers(dream.actions.flatten().bincount(minlength=int(walk.game.action_space.n)))
    none, one = (
        4 + math.log1p(2 * math.exp(-4)),
        4 + math.log1p(math.exp(-4)),
    )  # -ln of their probabilities
    text = f"""## 10. Imagination

[`imagine`](../jedi_atari.py#L1) starts from the ends of B = {args.batch_size} real windows, {shape(batch.frames)}.
H = {args.horizon} times the policy acts and the denoiser answers, without gradients. Rewards and ends are drawn
last, in one pass over the whole dream:

| | shape | |
|---|---|---|
| z | {shape(dream.z)} | the last real latent and {args.horizon} imagined ones |
| actions | {shape(dream.actions)} | the six of them {counts} times |
| rewards | {shape(dream.rewards)} | {int((dream.rewards != 0).sum())} are not 0 |
| ends | {shape(dream.ends)} | {int(dream.ends.sum())} |
| alive | {shape(dream.alive)} | {int(dream.alive.sum())} of {dream.alive.numel()} steps come before any end |

The policy's head is zero too, so that its actions are uniform. R_psi had one update; its rewards and ends are still
those of its biases, {g3(2 * math.exp(-none))} and {g3(math.exp(-one))} of the steps. Standard deviation of the
latents after 0, 1, {args.horizon // 2} and {args.horizon} steps: {", ".join(g3(x) for x in stds)}. Before the first
of them both LSTMs see the other {args.context_frames - 1} frames of the context
([`masked_lstm`](../jedi_atari.py#L1)).
"""
    return text, dream, batch


def returns_by_hand(
    rewards: list[float], ends: list[bool], value: float, args: jedi.Args
) -> list[float]:
    """lambda-returns of one trajectory where every state has the same value."""
    result, after = [], value
    for reward, end in zip(reversed(rewards), reversed(ends), strict=True):
        after = reward + args.gamma * (not end) * (
            (1 - args.td_lambda) * value + args.td_lambda * after
        )
        result.append(after)
    return result[::-1]


def walk_returns(walk: Walk, dream: jedi.Imagined) -> str:
    args = walk.args
    _, values, _ = walk.agent.policy(dream.z, dream.policy_state)
    assert not values.any()
    one = int(((dream.rewards != 0) & dream.alive).sum(1).argmax())
    rewards, ends = dream.rewards[one].tolist(), dream.ends[one].tolist()
    columns = []
    for value in (0.0, 0.5):
        program = jedi.lambda_returns(
            dream.rewards, dream.ends, values * 0 + value, args.gamma, args.td_lambda
        )[one]
        columns.append(torch.tensor(returns_by_hand(rewards, ends, value, args)))
        torch.testing.assert_close(columns[-1], program)
    alive = dream.alive[one].int().tolist()
    rows = "\n".join(
        row(
            t,
            int(dream.actions[one, t]),
            int(rewards[t]),
            int(ends[t]),
            alive[t],
            *(c[t] for c in columns),
        )
        for t in range(args.horizon)
    )
    t, g = next(t for t in range(args.horizon) if rewards[t]), columns[1]
    return f"""## 11. lambda-returns

[`lambda_returns`](../jedi_atari.py#L1): G_t = r_t + gamma (1 - d_t) ((1 - lambda) V_t+1 + lambda G_t+1), backwards
from G_H = V_H, with gamma {args.gamma} and lambda {args.td_lambda}. Dream {one}, the one with most rewards. The
value's head is zero, so that V is 0 everywhere; the last column shows what a V of 0.5 everywhere would give:

| t | action | reward | end | alive | G, V = 0 | G, V = 0.5 |
|---|---|---|---|---|---|---|
{rows}

By hand, last column, t = {t}: {int(rewards[t])} + {args.gamma} x {int(not ends[t])} x ({1 - args.td_lambda:.2f} x
0.5 + {args.td_lambda} x {g3(g[t + 1])}) = {g3(g[t])}. With V = 0 a reward counts gamma lambda =
{g3(args.gamma * args.td_lambda)} times as much with each step that it lies ahead. An end cuts off all that follows
it.
"""


def walk_actor_critic(walk: Walk, dream: jedi.Imagined, batch: jedi.Windows) -> str:
    args, alive = walk.args, dream.alive
    values = torch.zeros(dream.rewards.shape[0], args.horizon + 1)
    returns = jedi.lambda_returns(dream.rewards, dream.ends, values, args.gamma, args.td_lambda)[
        alive
    ]
    torch.manual_seed(DREAM)
    metrics = update(walk, "policy", 0, batch)
    entropy = math.log(walk.agent.policy.policy.out_features)
    loss = entropy * returns.mean() + returns.square().mean() - args.entropy_weight * entropy
    names = {
        "policy_loss": (
            "-ln pi(a) (G - V), here ln 6 times the mean of G",
            entropy * returns.mean(),
        ),
        "value_loss": ("(V - G)^2, here the mean of G^2", returns.square().mean()),
        "entropy": ("of the policy, here ln 6", entropy),
        "loss": (f"policy_loss + value_loss - {args.entropy_weight} entropy", loss),
    }
    rows = "\n".join(
        row(f"`{key}`", text, agree(mine, metrics[key]), metrics[key])
        for key, (text, mine) in names.items()
    )
    last = norm(
        [
            p.grad
            for head in (walk.agent.policy.policy, walk.agent.policy.value)
            for p in head.parameters()
        ]
    )
    lstm = gradient_norm(walk.agent.policy.lstm)
    assert lstm == 0
    return f"""## 12. The actor-critic's loss

[`actor_critic_loss`](../jedi_atari.py#L1) computes the policy once more over the stored latents, in one call of its
LSTM. Means over the {int(alive.sum())} steps that count:

| term | what it is | by hand | the function |
|---|---|---|---|
{rows}

Returns are targets and the advantage is a weight: neither passes a gradient on to the value, and nothing reaches
the encoder. As in the denoiser the zero heads learn first: gradient norm {g3(last)} in the two heads, {g3(lstm)} in
the LSTM behind.
"""


def walk_moves(walk: Walk) -> str:
    args = walk.args
    kept = [
        line
        for line in walk.moved
        if line[0] in ("diffusion 1", "diffusion 2", "reward 1", "policy 1")
    ]
    rows = "\n".join(row(*line) for line in kept)
    first = args.learning_rate / args.warmup_updates
    return f"""## 13. What moved

[`update`](../jedi_atari.py#L1) clips the gradient and makes one step of AdamW
([`make_optimizer`](../jedi_atari.py#L1)). Largest change of any weight, network by network:

| update | loss | gradient norm | clipped at | encoder | denoiser | reward model | policy |
|---|---|---|---|---|---|---|---|
{rows}

The learning rate is {args.learning_rate:g} and warms up over {args.warmup_updates} updates, from {first:g} in the
first; the encoder's is {args.encoder_lr_scale} of it. Adam's first step moves a weight by just that, whatever the
size of its gradient. In the first diffusion update the encoder has no gradient, and weight decay asks for
{g3(args.encoder_lr_scale * first * args.weight_decay)} of each weight, less than float32 can tell: it stays as it
is. Its first gradient comes with Adam's second step and counts 0.74 there. Each part moves its own network, the first
two the encoder besides, the policy nothing but itself.

An epoch ([`run_epochs`](../jedi_atari.py#L1)) is some steps of play ([`collect_phase`](../jedi_atari.py#L1)), then
such updates of the three parts ([`update_phase`](../jedi_atari.py#L1)): {args.diffusion_updates},
{args.reward_updates} and {args.policy_updates} in the tiny preset. What they log is in [metrics.md](metrics.md).
"""


def walkthrough_page() -> str:
    walk = begin_walk()
    head = f"""# One training step, followed through the file

For a reader with the paper and [`jedi_atari.py`](../jedi_atari.py) side by side: what the first updates of a run do
to a batch of real Pong, with the shapes and numbers that come out. `python docs/generate.py` makes this page: it
plays and trains from seed 0, on one CPU thread in float32, with the sizes of `--preset tiny` (encoder
{walk.args.encoder_width} wide, denoiser {walk.args.denoiser_width}). Numbers have three digits; 0 means exactly 0.
What stands there "by hand" was worked out without the function and compared with it. Symbols are those at the top
of the file: z latent, sigma noise level, D denoiser, F its inner network, B batch, T time, H horizon.

"""
    text = [
        head,
        walk_frame(walk),
        walk_window(walk),
        walk_latents(walk),
        walk_noise(walk),
        walk_loss(walk),
    ]
    fresh = after_first_look(walk)
    text += [
        walk_gradients(walk),
        walk_switching(walk),
        walk_reward(walk),
        walk_sampling(walk, fresh),
    ]
    imagination, dream, batch = walk_imagination(walk)
    text += [
        imagination,
        walk_returns(walk, dream),
        walk_actor_critic(walk, dream, batch),
        walk_moves(walk),
    ]
    walk.game.close()
    return (
        "\n\n".join(filled(block) for part in text for block in part.strip().split("\n\n")) + "\n"
    )


def filled(block: str) -> str:
    """A paragraph in lines of equal length; tables and headings as they are. No line begins like a list."""
    if block.startswith(("|", "#")):
        return block
    glued = re.sub(r"\s(?=[-+*>=/] |\d+[.)] )", "\0", " ".join(block.split()))
    return textwrap.fill(glued, 145, break_long_words=False, break_on_hyphens=False).replace(
        "\0", " "
    )


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------

NUMBER = re.compile(
    r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?"
)  # not the line in `#L123`


def difference(old: str, new: str) -> str | None:
    """Where two versions of a page first differ, in a word or in a number by more than TOLERANCE; None: nowhere."""
    words = [
        [(n, word) for n, line in enumerate(t.splitlines(), 1) for word in line.split()]
        for t in (old, new)
    ]
    for (line, a), (_, b) in itertools.zip_longest(*words, fillvalue=("end", "nothing")):
        numbers = [[float(x.replace(",", "")) for x in NUMBER.findall(word)] for word in (a, b)]
        close = [math.isclose(x, y, rel_tol=TOLERANCE) for x, y in zip(*numbers, strict=False)]
        if NUMBER.split(a) != NUMBER.split(b) or not all(close):
            return f"line {line}: {a} is now {b}"
    return None


MADE: dict[str, Callable[[], str]] = {
    "docs/hyperparameters.md": hyperparameters_page,
    "docs/walkthrough.md": walkthrough_page,
}


def new_pages() -> dict[Path, str]:
    """Every page as it should be. Raises `Broken`."""
    pages = {ROOT / name: make() for name, make in MADE.items()}
    for page in sorted({ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *pages}):
        text = pages.get(page) or page.read_text()
        pages[page] = link_lines(metrics_page(text) if page.name == "metrics.md" else text, page)
    return pages


def stale(pages: dict[Path, str]) -> list[str]:
    """The pages that are out of date, with the place; of the walkthrough small differences do not count."""
    found = []
    for page, text in pages.items():
        old = page.read_text() if page.exists() else ""
        where = difference(old, text)
        if where or (old != text and page.name != "walkthrough.md"):
            found.append(f"{page.relative_to(ROOT)} ({where or 'some number'})")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if anything is stale"
    )
    options = parser.parse_args(argv)
    try:
        pages = new_pages()
    except Broken as error:
        print(f"docs/generate.py: {error}", file=sys.stderr)
        return 1
    if not options.check:
        for page, text in pages.items():
            if not page.exists() or page.read_text() != text:
                page.write_text(text)
        return 0
    found = stale(pages)
    if found:
        print(
            f"docs/generate.py: stale: {', '.join(found)}; run python docs/generate.py",
            file=sys.stderr,
        )
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())

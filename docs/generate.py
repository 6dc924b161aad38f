"""Write the pages that are made from the code, so that the two cannot part.

    python docs/generate.py            # write them
    python docs/generate.py --check    # write nothing; name what is stale and exit with 1

They are hyperparameters.md, from the fields of `Args`, and walkthrough.md, from some seconds of play and training on
one CPU thread. The last of the walkthrough's three digits may depend on the processor, as the order of a sum does; its
numbers are therefore compared within TOLERANCE. Where PyTorch has no MKL (not on x86) the same seed draws other
numbers, and the walkthrough is another one.
"""

import argparse
import ast
import copy
import dataclasses
import io
import itertools
import math
import re
import sys
import textwrap
import tokenize
import typing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jedi_atari as jedi  # noqa: E402
import jedi_atari_stochastic  # noqa: E402

TOLERANCE = 0.02  # twice what a step of the third digit can be (1.00 or 1.01)
CPU = torch.device("cpu")


# ---- hyperparameters.md ----------------------------------------------------------------------------------------------
class Hyperparameter(typing.NamedTuple):
    """A field of `Args`, with what its source says of it."""

    name: str
    group: str  # of the `# --- group` comment above it
    meaning: str
    sources: str  # letters
    choices: tuple[str, ...]

    @property
    def flag(self) -> str:
        return f"`--{self.name.replace('_', '-')}`"


def hyperparameters(module) -> list[Hyperparameter]:
    """The fields of a script's `Args`, in order."""
    source = Path(module.__file__).read_text()
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    args = next(n for n in ast.parse(source).body if getattr(n, "name", "") == "Args")
    types, result, group, line = typing.get_type_hints(module.Args), [], "run", args.lineno
    letter = r"[PDEC](?:, [PDEC])*"
    for node in (n for n in args.body if isinstance(n, ast.AnnAssign)):
        for above in range(line, node.lineno):
            group = comments[above][4:] if comments.get(above, "").startswith("--- ") else group
        line, name, comment = node.lineno, node.target.id, comments.get(node.lineno, "")
        letters = ", ".join(re.findall(rf"\[({letter})\]", comment)).split(", ")
        meaning = re.sub(rf"(?<! or) \[{letter}\]$", "", comment)
        names = r"(?<!\S)(--[\w-]+|\S*<\S+|[a-z]+_[a-z_]+)"  # flags, paths and names
        meaning = re.sub(names, r"`\1`", meaning)
        sources, choices = ", ".join(dict.fromkeys(letters)), typing.get_args(types[name])
        result.append(Hyperparameter(name, group, meaning, sources, choices))
    return result


def shown(field: Hyperparameter, value) -> str:
    """A value as a table shows it."""
    if field.name == "compile":
        return "by device"
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or isinstance(value, str):
        return f"`{value}`" if value else "(empty)"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def hyperparameter_tables() -> str:
    """One table per group: flag, the paper preset's value, other presets' where they differ."""
    presets = {name: jedi.Args(**changes) for name, changes in jedi.PRESETS.items()}
    paper = presets.pop("paper")
    head = f"| flag | paper | {' | '.join(presets)} | meaning | source |\n"
    head += f"|---|---|{'---|' * len(presets)}---|---|\n"
    text = ""
    for group, fields in itertools.groupby(hyperparameters(jedi), lambda field: field.group):
        text += f"\n## {group.capitalize()}\n\n{head}"
        for field in fields:
            usual = getattr(paper, field.name)
            values = [getattr(args, field.name) for args in presets.values()]
            cells = [shown(field, usual), *("" if v == usual else shown(field, v) for v in values)]
            choices = f" ({', '.join(f'`{x}`' for x in field.choices)})" if field.choices else ""
            meaning = field.meaning + choices
            text += f"| {field.flag} | {' | '.join(cells)} | {meaning} | {field.sources} |\n"
    return text


def hyperparameters_page() -> str:
    plain, stochastic = jedi.Args(), jedi_atari_stochastic.Args()
    rows = [
        f"| {field.flag} | {shown(field, value)} | {field.meaning} | {field.sources} |\n"
        for field in hyperparameters(jedi_atari_stochastic)
        for value in [getattr(stochastic, field.name)]
        if value != getattr(plain, field.name, None)
    ]
    gone = [f.flag for f in hyperparameters(jedi) if not hasattr(stochastic, f.name)]
    return f"""# Hyperparameters

Every argument of `jedi_atari.py`, made from `Args` and `PRESETS` by `python docs/generate.py`. `--preset` chooses a
column; a flag on the command line goes before the preset. An empty cell is the value of `paper`. A flag that is on is
turned off with `--no-` before its name, as in `--no-compile`.

Sources: [P] the JEDI papers (arXiv 2505.19698 and 2605.13013), [D] DIAMOND (arXiv 2405.12399 and its code), [E] EDM
(arXiv 2206.00364), [C] our choice where no source says. They are those of the column `paper`; other presets are [C].
{hyperparameter_tables()}
## In jedi_atari_stochastic.py

The same but for these, and without {", ".join(gone)}.

| flag | default | meaning | source |
|---|---|---|---|
{"".join(rows)}"""


# ---- walkthrough.md: one training step on a real batch ---------------------------------------------------------------
STEPS, GAME_LENGTH = 400, 100  # of play, and of one game
FIRST, UPDATES = 4, 40  # diffusion updates: those looked at one by one, all before the sampling
DREAM = 126  # seed of the dreams: one of them has rewards of both signs and an end


@dataclasses.dataclass
class Walk:
    """What the sections of the walkthrough hand on to each other."""

    args: jedi.Args
    agent: jedi.Agent
    replay: jedi.ReplayBuffer
    optimizers: dict[str, torch.optim.Optimizer]
    batch: jedi.Windows | None = None

    def draw(self, frames: int, final: bool = True) -> jedi.Windows:
        return self.replay.sample_frames(self.args.batch_size, frames, final)

    def update(self, part: str, number: int, batch: jedi.Windows) -> dict[str, Tensor]:
        """`jedi.update` on a given batch."""
        given = SimpleNamespace(
            device=CPU, sample_frames=lambda *_: batch, sample_transitions=lambda *_: batch
        )
        optimizer = self.optimizers[part]
        return jedi.update(self.agent, part, optimizer, given, number, self.args, False)

    @torch.no_grad()
    def after_first_look(self) -> jedi.Agent:
        """A copy of the agent whose LatentNorm has seen the batch, as in `diffusion_loss`."""
        agent = copy.deepcopy(self.agent)
        agent.norm.update(agent.latents(self.batch.frames), self.batch.mask)
        return agent


# The page's own sizes, not a preset's: its numbers stay when a preset changes.
NARROW = dict(
    batch_size=16, encoder_width=16, denoiser_width=48, cond_dim=128, reward_width=16, lstm_size=128,
    latent_norm="center", learning_rate=5e-4, encoder_lr_scale=0.06, warmup_updates=20, reward_window=5,
    entropy_weight=0.03, horizon=10,
)  # fmt: skip


def begin_walk() -> Walk:
    """A fresh agent with narrow networks, and some random play of Pong."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    changes = dict(device="cpu", compile=False, threads=1, max_episode_steps=GAME_LENGTH)
    args = jedi.Args(**NARROW | changes)
    torch.manual_seed(args.seed)
    collector, replay = jedi.Collector(args), jedi.ReplayBuffer(2 * STEPS, CPU)
    agent = jedi.Agent(int(collector.env.action_space.n), args)
    rng = np.random.default_rng(args.seed)
    for _ in range(STEPS):
        collector.step(None, replay, int(rng.integers(collector.env.action_space.n)))
    collector.env.close()
    optimizers = {part: jedi.make_optimizer(agent, part, args) for part in jedi.PARTS}
    return Walk(args, agent, replay, optimizers)


def g3(x: float | Tensor) -> str:
    """Three digits; 0 only for what is exactly 0."""
    return "0" if float(x) == 0 else f"{float(x):#.3g}".rstrip(".")


def agree(mine: float | Tensor, program: float | Tensor) -> str:
    """Three digits of what was worked out here, which must be what the program has."""
    mine, program = torch.as_tensor(mine), torch.as_tensor(program)
    torch.testing.assert_close(mine, program, rtol=1e-3, atol=1e-6, check_dtype=False)
    return g3(mine)


def row(*cells) -> str:
    """A row of a table."""
    cells = [str(c) if isinstance(c, (str, int)) else g3(c) for c in cells]
    return f"| {' | '.join(cells)} |"


def norm(gradients) -> float:
    """Length of all these gradients as one vector."""
    return math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None))


def gradient_norm(network: torch.nn.Module) -> float:
    return norm(p.grad for p in network.parameters())


def shape(x: Tensor) -> str:
    return "(" + ", ".join(str(n) for n in x.shape) + ")"


def numbers(x: Tensor) -> str:
    return " ".join(str(int(n)) for n in x)


def walk_window(walk: Walk) -> str:
    n, t = walk.args.context_frames, walk.args.context_frames + walk.args.target_frames
    while (batch := walk.draw(t)).mask.all() or not batch.mask[0].all():
        pass
    walk.batch = batch
    table = "\n".join(
        f"| {name}, window {i} | `{numbers(field[i])}` |"
        for i in (0, int(batch.mask.all(1).int().argmin()))
        for name, field in (("mask", batch.mask), ("actions", batch.actions))
    )
    changed = (batch.frames[0, 0] != batch.frames[0, 1]).any(-1)
    return f"""## 1. A batch of windows

{STEPS} steps of random play, cut into games of {GAME_LENGTH} steps, make {walk.replay.num_episodes} episodes and
{walk.replay.size} records: an episode's last frame is a record too. `ReplayBuffer.sample_frames` draws B =
{len(batch.mask)} windows of T = {n} + {t - n} frames, {n} of context and {t - n} targets. This batch has one that
begins before its episode:

| | |
|---|---|
| frames | {shape(batch.frames)}, {str(batch.frames.dtype).removeprefix("torch.")} |
| actions, rewards, ends, mask | {shape(batch.actions)} each |
{table}
| pixels that differ between the first two frames of window 0 | {int(changed.sum())} of {changed.numel():,} |

`actions[t]` leads from `frames[t]` to `frames[t + 1]`, so that the last action is not used here. Padding has mask 0:
zero frames, a zero latent, no loss. The last line is what makes Pong hard for a world model: all that there is to
foresee is in these few pixels.
"""


def walk_latents(walk: Walk) -> str:
    agent, batch = walk.after_first_look(), walk.batch
    with torch.no_grad():
        z = agent.latents(batch.frames)
        real, normed = z[batch.mask], agent.norm(z)[batch.mask]
    change, sides = real - real.mean(0), " x ".join(str(n) for n in jedi.LATENT_SHAPE)
    return f"""## 2. Latents

`Encoder` turns each frame, {math.prod(batch.frames.shape[2:]):,} bytes, into {sides} =
{math.prod(jedi.LATENT_SHAPE):,} numbers: {shape(batch.frames)} becomes {shape(z)}. Its last operation is the clamp C(z)
= 3 tanh(z / 3), `clamp_latent`. Of the real frames of this batch:

| latents | standard deviation | smallest | largest |
|---|---|---|---|
{row("of the encoder", real.std(), real.min(), real.max())}
{row("less the mean of each of the numbers", change.std(), change.min(), change.max())}
{row("as the other networks see them", normed.std(), normed.min(), normed.max())}

The first line is nearly all background. The second is what moves: {g3(change.std() / real.std())} of it, far below the
sigma_data = {walk.args.sigma_data} that the denoiser takes for granted. `LatentNorm` (`--latent-norm center`,
[DEVIATION 1](implementation_details.md#deviation-1)) subtracts the running mean and scales what is left to sigma_data.
Its first update takes this batch's own mean; from the hundredth on each moves it by 1%. With `--latent-norm none`, the
papers' algorithm, the denoiser sees the first line.
"""


@torch.no_grad()
def walk_loss(walk: Walk) -> str:
    args, batch, n = walk.args, walk.batch, walk.args.context_frames
    agent = walk.after_first_look()
    z = agent.encode(batch.frames, batch.mask)
    torch.manual_seed(1)
    errors, tables = [], []
    for i in range(args.target_frames):
        target = z[:, n + i]
        noisy, sigma = jedi.add_noise(target, args)
        torch.rand(())  # the coin of random switching
        c_in, c_out, c_skip, _ = jedi.precondition(sigma, args.sigma_data, args.sigma_offset)
        wanted, real = (target - c_skip * noisy) / c_out, batch.mask[:, n + i]
        errors.append(wanted.square().mean((1, 2, 3)))
        named = {
            "target: the next latent": target,
            "with noise": noisy,
            "the network's input, c_in times that": c_in * noisy,
            "what the network should say": wanted,
            "the denoised latent, c_skip times the noisy one": c_skip * noisy,
        }
        lines = [row(name, x[0].std(), x[real].std()) for name, x in named.items()]
        tables.append("\n".join(lines))
    error, real = torch.stack(errors, 1), batch.mask[:, n:]
    torch.manual_seed(1)
    loss, _ = jedi.diffusion_loss(copy.deepcopy(walk.agent), batch, args)
    return f"""## 3. The denoising loss

`add_noise` draws a noise level per window and adds so much noise to the target, and the inner network F (`Denoiser`) is
to say (target - c_skip noisy) / c_out, with EDM's coefficients (`precondition`).
Standard deviations, first target:

| | window 0 | all windows |
|---|---|---|
{tables[0]}

The preconditioning gives input and answer a standard deviation of 1, if that of the target is sigma_data; it is a
little less here. The network says exactly 0, because its last layer starts at zero (`zero_`), and c_skip noisy is the
best guess that only multiplies the noisy latent. So the loss can be worked out without the network: by hand the mean
over all {int(real.sum())} real targets of the batch is {agree((error * real).sum() / real.sum(), loss)}. The function
says {g3(loss)}. About 1 means: it knows nothing yet.
"""


def gradient_by_frame(walk: Walk, switch_prob: float) -> list[float]:
    """Norm of the denoising loss's gradient at the latents of each frame of the window."""
    agent, kept = copy.deepcopy(walk.agent), []
    latents = agent.latents

    def keep(frames: Tensor) -> Tensor:
        kept.append(latents(frames))
        kept[0].retain_grad()
        return kept[0]

    agent.latents = keep
    torch.manual_seed(5)
    args = dataclasses.replace(walk.args, switch_prob=switch_prob)
    jedi.diffusion_loss(agent, walk.batch, args)[0].backward()
    return [norm([kept[0].grad[:, t]]) for t in range(kept[0].shape[1])]


def walk_switching(walk: Walk) -> str:
    for number in range(FIRST):
        batch = walk.draw(walk.batch.mask.shape[1]) if number else walk.batch
        walk.update("diffusion", number, batch)
        assert (gradient_norm(walk.agent.encoder) == 0) == (number == 0)
    tails, heads = gradient_by_frame(walk, 0.0), gradient_by_frame(walk, 1.0)
    assert tails[-1] == heads[-1] == heads[-2] == 0 < tails[-2]
    n = walk.args.context_frames
    names = [f"context {t + 1}" for t in range(n)]
    names += [f"target {t + 1}" for t in range(len(tails) - n)]
    return f"""## 4. Stop-gradient and random switching

In the first update nothing but the denoiser's last layer learns: what flows back through it is multiplied by its
weights, and they are 0. Then the loss reaches the encoder. Norm of the gradient at the latents of each frame of the
window after {FIRST} updates, on the batch from above and twice with the same noise:

| coin | {" | ".join(names)} |
|---|{"---|" * len(names)}
{row("tails: the encoder's latent", *tails)}
{row("heads: the denoiser's own", *heads)}

Target 2 is a target only. Targets are behind a stop-gradient, and so it gets exactly 0: the encoder cannot make targets
easy by making them alike. Target 1 is context of target 2 as well. With tails the encoder's latent stands there, and
learns from being of use; with heads (`--switch-prob`) the denoiser's own output does, detached, as it will in
imagination.
"""


@torch.no_grad()
def sampler_trace(walk: Walk, agent: jedi.Agent, windows: jedi.Windows):
    """The steps of `sample_next_latent`: levels, standard deviations of the latent, the denoised and the next one; then
    the error of the sample, and that of saying that nothing changes."""
    args, n = walk.args, walk.args.context_frames
    z = agent.encode(windows.frames)
    context, target, actions = z[:, :n], z[:, n], windows.actions[:, :n]
    torch.manual_seed(1)
    sample, trace = torch.randn(target.shape), []
    sigmas = jedi.karras_sigmas(args.sample_steps, jedi.SIGMA_MIN, args.sample_sigma_max, jedi.RHO)
    for sigma, following in itertools.pairwise(sigmas):
        level = torch.full((len(sample),), sigma)
        c = jedi.precondition(level, args.sigma_data, args.sigma_offset)
        c_in, c_out, c_skip, c_noise = c
        cond = agent.denoiser.condition(c_noise, actions)
        output = agent.denoiser(c_in * sample, context, cond)
        denoised = agent.norm.clamp(c_skip * sample + c_out * output)
        after = sample + (following - sigma) * (sample - denoised) / sigma
        trace.append([sigma, following, sample.std(), denoised.std(), after.std()])
        sample = after
    torch.manual_seed(1)
    torch.testing.assert_close(sample, jedi.sample_next_latent(agent, context, actions, args))
    return trace, (sample - target).square().mean(), (context[:, -1] - target).square().mean()


def walk_sampling(walk: Walk, fresh: jedi.Agent) -> str:
    windows = walk.replay.all_windows(walk.args.context_frames + 1, stride=6)
    trace, error, copied = sampler_trace(walk, fresh, windows)
    for number in range(FIRST, UPDATES):
        walk.update("diffusion", number, walk.draw(walk.batch.mask.shape[1]))
    trained, trained_error, trained_copied = sampler_trace(walk, walk.agent, windows)
    rows = "\n".join(row(i, *line, *trained[i - 1][3:]) for i, line in enumerate(trace, 1))
    return f"""## 5. A sample of the next latent

`sample_next_latent` goes down {walk.args.sample_steps} levels of `karras_sigmas` and then to 0, by Euler steps z + (next
- sigma) (z - D(z)) / sigma. Standard deviations over {len(windows.frames)} windows, before the first update and after
{UPDATES}, from the same noise:

| step | sigma | next | z | D(z) | z after it | trained: D(z) | z after it |
|---|---|---|---|---|---|---|---|
{rows}

The untrained D(z) is c_skip z, so each step only multiplies z; what is left is near 0, the mean of all latents. Note
the first step: the noise of standard deviation 1 that it begins with, where sigma says {g3(trace[0][0])}, shrinks to
{g3(trace[0][4])}, where the next level says {g3(trace[0][1])} (`--sample-start`). The last step puts D(z) in the place
of z.

Mean squared error of the sample over that of saying that nothing changes: {g3(error / copied)} untrained,
{g3(trained_error / trained_copied)} after {UPDATES} updates. `measure_world_model` measures this on unseen play, as
`wm/open_loop_ratio_1`; here the windows are those that were trained on.
"""


def walk_imagination(walk: Walk) -> tuple[str, jedi.Windows]:
    args, h, batch = walk.args, walk.args.horizon, walk.draw(walk.args.context_frames, False)
    torch.manual_seed(DREAM)
    dream = jedi.imagine(walk.agent, batch, args)
    one = int(((dream.rewards != 0) & dream.alive).sum(1).argmax())
    values, discount = torch.full((len(dream.ends), h + 1), 0.5), (args.gamma, args.td_lambda)
    zero, half = (
        jedi.lambda_returns(dream.rewards, dream.ends, v, *discount)[one]
        for v in (0 * values, values)
    )
    columns = (dream.actions, dream.rewards.int(), dream.ends.int(), dream.alive.int())
    lines = zip(range(h), *(x[one].tolist() for x in columns), zero, half, strict=True)
    rows = "\n".join(row(*line) for line in lines)
    stds = [dream.z[:, t].std() for t in (0, 1, h // 2, h)]
    text = f"""## 6. Imagination and lambda-returns

`imagine` starts from the ends of B = {args.batch_size} real windows, {shape(batch.frames)}. H = {h} times the policy
acts and the denoiser answers, without gradients: z is {shape(dream.z)}, the last real latent and {h} imagined ones.
Standard deviation of the latents after 0, 1, {h // 2} and {h} steps: {", ".join(g3(x) for x in stds)}. Before the first
of them both LSTMs see the other {args.context_frames - 1} frames of the context (`masked_lstm`). Rewards and ends are
drawn last, in one pass over the whole dream; {int(dream.alive.sum())} of {dream.alive.numel()} steps come before any
end and count. `lambda_returns`: G_t = r_t + gamma (1 - d_t) ((1 - lambda) V_t+1 + lambda G_t+1), backwards from G_H =
V_H, with gamma {args.gamma} and lambda {args.td_lambda}. Dream {one}, the one with most rewards:

| t | action | reward | end | alive | G, V = 0 | G, V = 0.5 |
|---|---|---|---|---|---|---|
{rows}

The heads of policy and value are zero too, so that actions are uniform and V is 0 everywhere; the last column shows
what a V of 0.5 everywhere would give. With V = 0 a reward counts gamma lambda = {g3(args.gamma * args.td_lambda)} times
as much with each step that it lies ahead. An end cuts off all that follows it.
"""
    return text, batch


def walk_losses(walk: Walk, batch: jedi.Windows) -> str:
    args, size = walk.args, walk.args.context_frames + walk.args.reward_window - 1
    windows = walk.replay.sample_transitions(args.batch_size, size)
    rewarded = (windows.rewards[:, :-1] != 0)[windows.mask].float().mean()
    ends = windows.ends[:, :-1][windows.mask].float().mean()
    rare = math.log1p(2 * math.exp(-4)) + math.log1p(math.exp(-4))
    reward_loss = walk.update("reward", 0, windows)["loss"]
    encoder = gradient_norm(walk.agent.encoder)
    values = torch.zeros(args.batch_size, args.horizon + 1)
    torch.manual_seed(DREAM)
    dream = jedi.imagine(walk.agent, batch, args)  # once more: the reward update moved it a little
    g = jedi.lambda_returns(dream.rewards, dream.ends, values, args.gamma, args.td_lambda)
    g, entropy = g[dream.alive], math.log(walk.agent.policy.policy.out_features)
    torch.manual_seed(DREAM)
    found = walk.update("policy", 0, batch)
    policy_loss, value_loss = entropy * g.mean(), g.square().mean()
    return f"""## 7. The other two losses, by hand

| loss | by hand | the function |
|---|---|---|
{row("`reward_termination_loss`", rare + 4 * (rewarded + ends), reward_loss)}
{row("`actor_critic_loss`: `policy/policy_loss`", agree(policy_loss, found["policy_loss"]), found["policy_loss"])}
{row("`actor_critic_loss`: `policy/value_loss`", agree(value_loss, found["value_loss"]), found["value_loss"])}

R_psi (`RewardTerminationModel`) starts with the biases -4, 0, -4 for the reward's sign and 0, -4 for termination:
"nothing happens". That costs ln(1 + 2 e^-4) + ln(1 + e^-4), and 4 more for each of the {g3(rewarded)} transitions with
a reward and {g3(ends)} with a termination (cutting a game is none). The rest comes from the head's random weights.
Without the biases the loss would start at ln 3 + ln 2 = {g3(math.log(6))}, and the LSTM would first learn to say
"nothing" by saturating: [DEVIATION 7](implementation_details.md#deviation-7). Unlike the denoising loss this one
reaches the encoder in its first update: gradient norm {g3(encoder)}.

The actor-critic's is the mean of -ln pi(a) (G - V), here ln 6 G, plus that of (V - G)^2, here G^2, less
{args.entropy_weight} times the entropy, over the {len(g)} steps that count. Returns are targets and the
advantage is a weight: neither passes a gradient on to the value, and nothing reaches the encoder.

Each `update` clips the gradient and makes one step of AdamW (`make_optimizer`). `make_schedule` says which updates an
epoch makes after its play: {args.diffusion_updates} of diffusion, with {args.reward_updates} of reward between their two halves, then
{args.policy_updates} of policy. What they log is in [metrics.md](metrics.md).
"""


def walkthrough_page() -> str:
    walk = begin_walk()
    head = f"""# One training step, followed through the file

For a reader with the paper and [`jedi_atari.py`](../jedi_atari.py) side by side: what the first updates of a run do to
a batch of real Pong, with the shapes and numbers that come out. `python docs/generate.py` makes this page: it plays and
trains from seed 0, on one CPU thread in float32, with narrow networks (encoder {walk.args.encoder_width}
wide, denoiser {walk.args.denoiser_width}), centred latents, small batches, short windows and fast learning. Numbers have three digits; 0 means exactly 0. Symbols are those at the top of
the file: z latent, sigma noise level, D denoiser, F its inner network, B batch, T time, H horizon.
"""
    text = [head, *(make(walk) for make in (walk_window, walk_latents, walk_loss))]
    fresh = walk.after_first_look()
    text += [walk_switching(walk), walk_sampling(walk, fresh)]
    imagination, batch = walk_imagination(walk)
    text += [imagination, walk_losses(walk, batch)]
    return "\n\n".join(filled(x) for part in text for x in part.strip().split("\n\n")) + "\n"


def filled(block: str) -> str:
    """A paragraph in lines of equal length; tables and headings stay. No line begins like a list."""
    if block.startswith(("|", "#")):
        return block
    glued = re.sub(r"\s(?=[-+*>=/] |\d+[.)] )", "\0", " ".join(block.split()))
    lines = textwrap.fill(glued, 120, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\0", " ")


# ---- the command -----------------------------------------------------------------------------------------------------
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?")
PAGES = {"hyperparameters.md": hyperparameters_page, "walkthrough.md": walkthrough_page}


def difference(old: str, new: str, tolerance: float = 0.0) -> str | None:
    """Where two versions of a page first differ, in a word or in a number by more than the tolerance."""
    words = [
        [(n, word) for n, line in enumerate(t.splitlines(), 1) for word in line.split()]
        for t in (old, new)
    ]
    for (line, a), (_, b) in itertools.zip_longest(*words, fillvalue=("end", "nothing")):
        found = [[float(x.replace(",", "")) for x in NUMBER.findall(word)] for word in (a, b)]
        close = [math.isclose(x, y, rel_tol=tolerance) for x, y in zip(*found, strict=False)]
        if NUMBER.split(a) != NUMBER.split(b) or not all(close):
            return f"line {line}: {a} is now {b}"
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    says = "write nothing; exit with 1 if a page is stale"
    parser.add_argument("--check", action="store_true", help=says)
    check, stale = parser.parse_args(argv).check, []
    for name, make in PAGES.items():
        page, new = ROOT / "docs" / name, make()
        old = page.read_text() if page.exists() else ""
        if where := difference(old, new, TOLERANCE if make is walkthrough_page else 0.0):
            stale.append(f"docs/{name} ({where})")
            if not check:
                page.write_text(new)
    if check and stale:
        print(f"stale: {', '.join(stale)}; run python docs/generate.py", file=sys.stderr)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())

"""A pixel diffusion agent of DIAMOND's sizes, the baseline of `speed.py`. It is built for measuring, not for playing.

The same algorithm on frames in place of latents: a U-Net denoises the next 64 x 64 x 3 frame, the reward/termination
model and the actor-critic each have an encoder of their own (arXiv 2405.12399, appendix D). Its blocks, its diffusion
mathematics, its sampler and its optimisers are those of `jedi_atari.py`, and so is every optimisation: frames are
uploaded once, nothing waits for the device within an update, one layer conditions all blocks, once for all steps of a
sample, imagined trajectories have static shapes and are masked, the reward/termination model runs once over a whole
trajectory. What differs is what must: frames in place of latents. 13,546,326 parameters at 18 actions.

Shapes: B batch, T time, frames (B, T, 3, 64, 64) in [-1, 1] where the networks see them.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jedi_atari as jedi

CHANNELS, SIZE = 3, jedi.IMAGE_SIZE
DENOISER_WIDTH, DENOISER_COND, REWARD_WIDTH, REWARD_COND, LSTM_SIZE, LEVELS, BLOCKS = (
    64,
    256,
    32,
    128,
    512,
    4,
    2,
)
POLICY_WIDTHS = (32, 32, 64, 64)


def to_pixels(frames: Tensor) -> Tensor:
    """(..., 64, 64, 3) uint8 -> (..., 3, 64, 64) float32 in [-1, 1]."""
    return frames.movedim(-1, -3).float() / 127.5 - 1


def quantise(x: Tensor) -> Tensor:
    """The 256 values that a frame can have, in [-1, 1]: what a denoised frame is rounded to."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def in_chunks(network: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """network(*inputs); on a CPU as many rows at a time as JEDI's encoder takes."""
    chunk = jedi.CPU_CHUNK if inputs[0].device.type == "cpu" else len(inputs[0])
    parts = zip(*(x.split(chunk) for x in inputs), strict=True)
    return torch.cat([network(*part) for part in parts])


class Downsample(nn.Module):
    """Half the height and width."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the height and width."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = jedi.conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def levels_of(inputs: int, outputs: int, count: int) -> nn.ModuleList:
    """Residual blocks, `count` for each level."""
    block = jedi.ResBlock
    levels = ([block(inputs, outputs) for _ in range(count)] for _ in range(LEVELS))
    return nn.ModuleList(map(nn.ModuleList, levels))


def middle_of(width: int) -> nn.ModuleList:
    """Two residual blocks with self-attention."""
    return nn.ModuleList(jedi.ResBlock(width, width, attention=True) for _ in range(2))


def sizes_of(*parts) -> list[int]:
    """How many scales and shifts each block takes, in the order of their use."""
    return [sum(block.sizes) for levels in parts for blocks in levels for block in blocks]


class UNet(nn.Module):
    """Four levels of two residual blocks down and three up, two with self-attention in the middle."""

    def __init__(self, width: int):
        super().__init__()
        self.down = levels_of(width, width, BLOCKS)
        self.shrink = nn.ModuleList(Downsample(width) for _ in range(LEVELS - 1))
        self.middle = middle_of(width)
        self.grow = nn.ModuleList(Upsample(width) for _ in range(LEVELS - 1))
        self.up = levels_of(2 * width, width, BLOCKS + 1)
        self.sizes = sizes_of(self.down, [self.middle], self.up)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x (B, width, 64, 64), cond (B, sum(sizes)) -> the shape of x."""
        skips, scales = [], iter(cond.split(self.sizes, dim=1))
        for level, blocks in enumerate(self.down):
            if level:
                x = self.shrink[level - 1](x)
            skips.append(x)
            for block in blocks:
                x = block(x, next(scales))
                skips.append(x)
        for block in self.middle:
            x = block(x, next(scales))
        for level, blocks in enumerate(self.up):
            if level:
                x = self.grow[level - 1](x)
            for block in blocks:
                x = block(torch.cat([x, skips.pop()], dim=1), next(scales))
        return x


class PixelDenoiser(nn.Module):
    """Past frames, past actions and a noisy next frame -> the U-Net's output. The counterpart of `jedi.Denoiser`."""

    def __init__(self, num_actions: int, args: jedi.Args):
        super().__init__()
        self.sigma_data, context_frames = args.sigma_data, args.context_frames
        width, cond_dim = DENOISER_WIDTH, DENOISER_COND
        self.register_buffer("fourier", torch.randn(cond_dim // 2))
        self.action_embedding = nn.Embedding(num_actions, cond_dim // context_frames)
        self.cond = nn.Sequential(
            nn.Linear(cond_dim, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim)
        )
        self.conv_in = jedi.conv3x3((context_frames + 1) * CHANNELS, width)
        self.unet = UNet(width)
        self.scales = nn.Linear(cond_dim, sum(self.unet.sizes))
        self.norm_out = jedi.group_norm(width)
        self.conv_out = jedi.zero_(jedi.conv3x3(width, CHANNELS))

    condition = jedi.Denoiser.condition

    def forward(self, x: Tensor, context: Tensor, cond: Tensor) -> Tensor:
        """x (B, 3, 64, 64) scaled by c_in, context (B, N, 3, 64, 64), cond as `condition` gives it -> like x."""
        past = (context / self.sigma_data).flatten(1, 2)
        return in_chunks(self.layers, torch.cat([past, x], dim=1), cond)

    def layers(self, x: Tensor, cond: Tensor) -> Tensor:
        """The pictures stacked (N, 15, 64, 64), scales and shifts -> (N, 3, 64, 64)."""
        x = self.unet(self.conv_in(x.contiguous(memory_format=torch.channels_last)), cond)
        return self.conv_out(F.silu(self.norm_out(x))).float()


class PixelReward(nn.Module):
    """Pairs of frames and actions -> logits of the reward's sign and of termination. Each of its four levels halves
    the picture but the last. The counterpart of `jedi.RewardTerminationModel`."""

    def __init__(self, num_actions: int):
        super().__init__()
        width = REWARD_WIDTH
        self.action_embedding = nn.Embedding(num_actions, REWARD_COND)
        self.conv_in = jedi.conv3x3(2 * CHANNELS, width)
        self.levels = levels_of(width, width, BLOCKS)
        self.shrink = nn.ModuleList(Downsample(width) for _ in range(LEVELS - 1))
        self.middle = middle_of(width)
        self.sizes = sizes_of(self.levels, [self.middle])
        self.scales = nn.Linear(REWARD_COND, sum(self.sizes))
        self.lstm = jedi.LSTM(width * (SIZE >> (LEVELS - 1)) ** 2, LSTM_SIZE, batch_first=True)
        self.head = nn.Sequential(
            nn.Linear(LSTM_SIZE, LSTM_SIZE), nn.SiLU(), nn.Linear(LSTM_SIZE, 5, bias=False)
        )

    def features(self, frames: Tensor, actions: Tensor) -> Tensor:
        """frames (B, T + 1, 3, 64, 64), actions (B, T) -> (B, T, features): all that needs no recurrence."""
        pairs = torch.cat([frames[:, :-1], frames[:, 1:]], dim=2).flatten(0, 1)
        x = in_chunks(self.layers, pairs, self.scales(self.action_embedding(actions.flatten())))
        return x.reshape(*actions.shape, -1)

    def layers(self, pairs: Tensor, cond: Tensor) -> Tensor:
        """Pairs (N, 6, 64, 64), scales and shifts -> (N, 32, 8, 8)."""
        x = self.conv_in(pairs.contiguous(memory_format=torch.channels_last))
        scales = iter(cond.split(self.sizes, dim=1))
        for level, blocks in enumerate(self.levels):
            if level:
                x = self.shrink[level - 1](x)
            for block in blocks:
                x = block(x, next(scales))
        for block in self.middle:
            x = block(x, next(scales))
        return x

    def forward(self, frames: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """frames (B, T + 1, 3, 64, 64), actions (B, T) -> reward logits (B, T, 3) and end logits (B, T, 2)."""
        return self.predict(self.lstm(self.features(frames, actions))[0])

    def predict(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """LSTM output (B, T, 512) -> both logits."""
        return self.head(hidden).float().split([3, 2], dim=-1)


class PixelActorCritic(nn.Module):
    """Frames through a small convolutional encoder and an LSTM. The counterpart of `jedi.ActorCritic`."""

    def __init__(self, num_actions: int):
        super().__init__()
        widths = (POLICY_WIDTHS[0], *POLICY_WIDTHS)
        self.conv_in = jedi.conv3x3(CHANNELS, widths[0])
        self.stages = nn.ModuleList(
            jedi.EncoderStage(i, o) for i, o in zip(widths, widths[1:], strict=False)
        )
        self.lstm = jedi.LSTM(
            widths[-1] * (SIZE >> len(self.stages)) ** 2, LSTM_SIZE, batch_first=True
        )
        self.policy = jedi.zero_(nn.Linear(LSTM_SIZE, num_actions))
        self.value = jedi.zero_(nn.Linear(LSTM_SIZE, 1))

    def features(self, frames: Tensor) -> Tensor:
        """(B, T, 3, 64, 64) -> (B, T, 1024)."""
        return in_chunks(self.layers, frames.flatten(0, 1)).reshape(*frames.shape[:2], -1)

    def layers(self, frames: Tensor) -> Tensor:
        """(N, 3, 64, 64) -> (N, 64, 4, 4)."""
        x = self.conv_in(frames.contiguous(memory_format=torch.channels_last))
        for stage in self.stages:
            x = F.max_pool2d(stage(x), 2)
        return x

    def heads(self, features: Tensor, state: tuple | None) -> tuple[Tensor, Tensor, tuple]:
        """Features (B, T, 1024), LSTM state -> action logits (B, T, A), values (B, T), new state."""
        hidden, state = self.lstm(features, state)
        return self.policy(hidden).float(), self.value(hidden).float().squeeze(-1), state


class PixelAgent(nn.Module):
    """The three networks; `jedi.sample_next_latent` samples a frame with it, by Euler steps, and quantises it."""

    def __init__(self, num_actions: int, args: jedi.Args):
        super().__init__()
        self.denoiser = PixelDenoiser(num_actions, args)
        self.reward = PixelReward(num_actions)
        self.policy = PixelActorCritic(num_actions)
        self.norm = SimpleNamespace(clamp=quantise)  # D_theta's last step
        self.to(memory_format=torch.channels_last)


def parameter_counts(agent: PixelAgent) -> dict[str, int]:
    """Trainable parameters of each network."""
    counts = {
        name: sum(p.numel() for p in net.parameters()) for name, net in agent.named_children()
    }
    return {**counts, "total": sum(counts.values())}


def diffusion_loss(
    agent: PixelAgent, batch: jedi.Windows, args: jedi.Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """Denoising loss over the target frames, each with the denoiser's own output of the one before as context."""
    n = args.context_frames
    frames = to_pixels(batch.frames) * batch.mask[..., None, None, None]
    context, losses = list(frames[:, :n].unbind(1)), []
    for i in range(args.target_frames):
        target = frames[:, n + i]
        noisy, sigma = jedi.add_noise(target, args)
        c_in, c_out, c_skip, c_noise = jedi.precondition(sigma, args.sigma_data, args.sigma_offset)
        cond = agent.denoiser.condition(c_noise, batch.actions[:, i : i + n])
        output = agent.denoiser(c_in * noisy, torch.stack(context[-n:], dim=1), cond)
        losses.append((output - (target - c_skip * noisy) / c_out).square().mean((1, 2, 3)))
        own = quantise(c_skip * noisy + c_out * output).detach()
        context.append(own * batch.mask[:, n + i, None, None, None])
    loss = jedi.masked_mean(torch.stack(losses, dim=1), batch.mask[:, n:])
    return loss, {"loss": loss.detach()}


def reward_termination_loss(
    agent: PixelAgent, batch: jedi.Windows, args: jedi.Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the reward's sign and of termination."""
    reward_logits, end_logits = agent.reward(to_pixels(batch.frames), batch.actions[:, :-1])
    sign = batch.rewards[:, :-1].sign().long()
    reward_error = F.cross_entropy(
        reward_logits.flatten(0, 1), sign.flatten() + 1, reduction="none"
    )
    end_error = F.cross_entropy(
        end_logits.flatten(0, 1), batch.ends[:, :-1].flatten().long(), reduction="none"
    )
    loss = jedi.masked_mean(reward_error + end_error, batch.mask.flatten())
    return loss, {"loss": loss.detach()}


@torch.no_grad()
def imagine(agent: PixelAgent, start: jedi.Windows, args: jedi.Args) -> jedi.Imagined:
    """Let the policy act for `args.horizon` steps in the world model; as `jedi.imagine`, on frames."""
    n = args.context_frames
    context = to_pixels(start.frames) * start.mask[..., None, None, None]
    frames, actions = list(context.unbind(1)), list(start.actions[:, : n - 1].unbind(1))
    burn_in = start.mask[:, : n - 1]
    policy_state = state = jedi.masked_lstm(
        agent.policy.lstm, agent.policy.features(context[:, : n - 1]), burn_in
    )
    for _ in range(args.horizon):
        logits, _, state = agent.policy.heads(agent.policy.features(frames[-1][:, None]), state)
        actions.append(jedi.sample_categorical(logits[:, 0]))
        newest, taken = torch.stack(frames[-n:], dim=1), torch.stack(actions[-n:], dim=1)
        frames.append(jedi.sample_next_latent(agent, newest, taken, args))
    x, taken = torch.stack(frames, dim=1), torch.stack(actions, dim=1)
    features = agent.reward.features(x, taken)
    hidden, _ = agent.reward.lstm(
        features[:, n - 1 :], jedi.masked_lstm(agent.reward.lstm, features[:, : n - 1], burn_in)
    )
    reward_logits, end_logits = agent.reward.predict(hidden)
    rewards = (jedi.sample_categorical(reward_logits) - 1).float()
    ends = jedi.sample_categorical(end_logits).bool()
    ended_before = F.pad(ends, (1, 0))[:, :-1].long().cumsum(1) > 0
    return jedi.Imagined(
        x[:, n - 1 :], taken[:, n - 1 :], rewards, ends, ~ended_before, policy_state
    )


def actor_critic_loss(
    agent: PixelAgent, batch: jedi.Windows, args: jedi.Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """REINFORCE with a value baseline on imagined play; here the gradient also trains the policy's own encoder."""
    dream = imagine(agent, batch, args)
    logits, values, _ = agent.policy.heads(agent.policy.features(dream.z), dream.policy_state)
    returns = jedi.lambda_returns(
        dream.rewards, dream.ends, values.detach(), args.gamma, args.td_lambda
    )
    log_probs = F.log_softmax(logits[:, :-1], dim=-1)
    taken = log_probs.gather(-1, dream.actions[..., None]).squeeze(-1)
    entropy = jedi.masked_mean(-(log_probs.exp() * log_probs).sum(-1), dream.alive)
    policy_loss = jedi.masked_mean(-taken * (returns - values[:, :-1].detach()), dream.alive)
    value_loss = jedi.masked_mean((values[:, :-1] - returns).square(), dream.alive)
    loss = policy_loss + value_loss - args.entropy_weight * entropy
    return loss, {"loss": loss.detach()}

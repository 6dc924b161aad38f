"""A pixel diffusion agent of DIAMOND's sizes, the baseline of `speed.py`. It is built for measuring, not for playing.

The same algorithm on frames in place of latents: a U-Net denoises the next 64 x 64 x 3 frame, the reward/termination
model and the actor-critic each have an encoder of their own (arXiv 2405.12399, appendix D). Losses, imagination,
sampler, optimisers and blocks are those of `jedi_atari.py`, and so is every optimisation: the networks stand where
JEDI's do, and `PixelAgent.latents` only scales the frames. 13,546,326 parameters at 18 actions.

Shapes: B batch, T time, frames (B, T, 3, 64, 64) in [-1, 1] where the networks see them.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jedi_atari as jedi

CHANNELS, SIZE, LEVELS, BLOCKS, LSTM_SIZE = 3, jedi.IMAGE_SIZE, 4, 2, 512
DENOISER_WIDTH, DENOISER_COND = 64, 256
REWARD_WIDTH, REWARD_COND = 32, 128
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


class Downsample(nn.Conv2d):
    """Half the height and width."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2, padding=1)


class Upsample(nn.Sequential):
    """Twice the height and width."""

    def __init__(self, channels: int):
        super().__init__(nn.Upsample(scale_factor=2), jedi.conv3x3(channels, channels))


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
        first, second = (nn.Linear(cond_dim, cond_dim) for _ in range(2))
        self.cond = nn.Sequential(first, nn.SiLU(), second)
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
        hidden, out = nn.Linear(LSTM_SIZE, LSTM_SIZE), nn.Linear(LSTM_SIZE, 5, bias=False)
        self.head = nn.Sequential(hidden, nn.SiLU(), out)

    forward = jedi.RewardTerminationModel.forward

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


class FrameLSTM(jedi.LSTM):
    """An LSTM that sees frames (B, T, 3 * 64 * 64) through a small convolutional encoder."""

    def __init__(self):
        widths = (POLICY_WIDTHS[0], *POLICY_WIDTHS)
        pixels = (SIZE >> len(POLICY_WIDTHS)) ** 2
        super().__init__(widths[-1] * pixels, LSTM_SIZE, batch_first=True)
        self.conv_in = jedi.conv3x3(CHANNELS, widths[0])
        stages = (jedi.EncoderStage(i, o) for i, o in zip(widths, widths[1:], strict=False))
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        frames = x.reshape(-1, CHANNELS, SIZE, SIZE)
        return super().forward(in_chunks(self.layers, frames).reshape(*x.shape[:2], -1), state)

    def layers(self, frames: Tensor) -> Tensor:
        """(N, 3, 64, 64) -> (N, 64, 4, 4)."""
        x = self.conv_in(frames.contiguous(memory_format=torch.channels_last))
        for stage in self.stages:
            x = F.max_pool2d(stage(x), 2)
        return x


class PixelActorCritic(nn.Module):
    """The counterpart of `jedi.ActorCritic`; the gradient of its loss trains its encoder, too."""

    def __init__(self, num_actions: int):
        super().__init__()
        self.lstm = FrameLSTM()
        self.policy = jedi.zero_(nn.Linear(LSTM_SIZE, num_actions))
        self.value = jedi.zero_(nn.Linear(LSTM_SIZE, 1))

    forward = jedi.ActorCritic.forward


class PixelNorm:
    """The counterpart of `jedi.LatentNorm`: frames are as they are, and a denoised one is rounded to 256 values."""

    clamp = staticmethod(quantise)

    def update(self, x: Tensor, mask: Tensor) -> None:
        """Nothing to learn."""

    def __call__(self, x: Tensor) -> Tensor:
        return x


class PixelAgent(nn.Module):
    """The three networks, for `jedi.update`, `jedi.imagine` and `jedi.sample_next_latent`."""

    def __init__(self, num_actions: int, args: jedi.Args):
        super().__init__()
        self.denoiser = PixelDenoiser(num_actions, args)
        self.reward = PixelReward(num_actions)
        self.policy = PixelActorCritic(num_actions)
        self.norm = PixelNorm()
        self.to(memory_format=torch.channels_last)

    latents = staticmethod(to_pixels)
    encode = jedi.Agent.encode


def compile_networks(agent: PixelAgent) -> None:
    """As `jedi.compile_networks`."""
    parts = (agent.denoiser, "condition"), *((network, "layers") for network in agent.children())
    for network, name in parts:
        network = network.lstm if network is agent.policy else network
        setattr(network, name, torch.compile(getattr(network, name), dynamic=False))


def parameter_counts(agent: nn.Module) -> dict[str, int]:
    """Trainable parameters of each network."""
    networks = agent.named_children()
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks}
    return {**counts, "total": sum(counts.values())}

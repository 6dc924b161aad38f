# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = ["torch==2.13.0", "gymnasium==1.4.0", "ale-py==0.12.1", "numpy==2.4.6",
#     "opencv-python-headless==5.0.0.93", "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1"]
# ///
"""JEDI (Joint Embedding DIffusion) in one file: Atari from 100k steps in a latent diffusion model.

    python jedi_atari.py --env-id Pong --preset tiny   # minutes on a laptop CPU
    python jedi_atari.py --env-id Pong                 # the papers' numbers: hours on a GPU
    python jedi_atari.py --resume --run-dir RUN        # carry on; --eval-only RUN: play more games

Sources: [P] the JEDI papers (arXiv 2505.19698 and 2605.13013), [D] DIAMOND (arXiv 2405.12399 and
its released code), [E] EDM (arXiv 2206.00364), [C] our choice where no source says. A choice that
departs from [P] or [D] is marked DEVIATION n and explained in docs/implementation_details.md.

Symbols: E_phi encoder, D_theta denoiser with inner network F_theta, R_psi reward/termination model,
pi_omega and V_omega actor-critic; z latent, a action, r reward, d termination; sigma noise level,
C latent clamp. Dimensions: B batch, T time, H horizon, C x H x W a latent (16 x 8 x 8), A actions.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import re
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

IMAGE_SIZE = 64  # pixels; frames are 64 x 64 RGB [P, D]
LATENT_SHAPE = (16, 8, 8)  # channels, height, width [P]
LATENT_BOUND = 3.0  # the clamp C(z) = 3 tanh(z / 3) keeps every latent value in (-3, 3) [P]
NOOP_MAX = 30  # at most so many no-ops at the start of a game [D]
QUARTER_WEIGHTS = (0.1, 0.1, 0.1, 0.7)  # of the replay's episodes, oldest to newest quarter [D]
FIRST_REWARDS = 10  # the first play goes on until so many steps had a rare reward [D]
NOISE_STD, NOISE_RANGE = 1.2, (0.002, 20.0)  # of ln(sigma) in training [E]; of sigma [D]
SIGMA_MIN, RHO = 0.002, 7.0  # last noise level before 0 and curvature of the sampler's schedule [E]
WEIGHT_DECAY = 0.01  # on the world model's weight matrices; none on the actor-critic [D]
MAX_GRAD_NORM = {"diffusion": 1.0, "reward": 100.0, "policy": 100.0}  # of the three updates [D]
PARTS = tuple(MAX_GRAD_NORM)
TRAINED = dict(diffusion="encoder denoiser", reward="encoder reward", policy="policy")  # [P]
EVAL_ENVS = 10  # games played at the same time in evaluation [C]
HELDOUT_STEPS = 2_000  # evaluation steps kept to measure the world model on [C]
MAX_OPEN_LOOP = 15  # imagined steps over which the open-loop error is measured [C]
CPU_CHUNK = 16  # frames that a CPU encodes at a time; 8 to 32 were as fast [C]
CHECKPOINT_SECONDS = 30  # between checkpoints: a kill costs this and one epoch at most [C]
PROTOCOL = "env_id seed final_episodes temperature frame_skip max_episode_steps".split()
SHOWN = "charts/episodic_return diffusion/loss reward/loss policy/entropy eval/mean_return".split()


class BadInput(ValueError):
    """What the user gave is wrong; the message is one line that says what would be right."""


def usable_cores(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """CPU cores that this process may use; in a container (cgroup 2) no more than its limit."""
    cores = len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0))
    with contextlib.suppress(OSError, ValueError):  # no container; "max", no limit
        quota, period = map(int, limit.read_text().split())
        cores = min(cores, math.ceil(quota / period))
    return cores


# ---- 1. Arguments: every number, its range, its meaning and its source ---------------------------
TINY, MANY = 1e-12, 10**9  # above 0; far above any use: a typing error is refused


def num(default: float, low: float, high: float):
    """A field of `Args` with its default and its smallest and largest value that a run can use."""
    return dataclasses.field(default=default, metadata={"range": (low, high)})


@dataclasses.dataclass(frozen=True)
class Args:
    """JEDI: learn an Atari game from 100k steps inside a latent diffusion world model."""

    env_id: str = "Pong"  # Pong, ALE/Pong-v5, PongNoFrameskip-v4, or any registered RGB environment
    preset: Literal["paper", "tiny", "small"] = "paper"  # defaults; CPU: tiny 5 minutes, small 40
    seed: int = num(0, 0, 2**31 - 1)  # of networks, draws and game; same seed, same run on a CPU
    threads: int = num(0, 0, 1_000)  # CPU threads of PyTorch; 0 leaves its default, all cores
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto takes a GPU where there is one
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where matrix units have it [C]
    compile: bool = dataclasses.field(default_factory=torch.cuda.is_available)  # on with CUDA
    cuda_graphs: bool = True  # on a GPU, record each update as one program and replay it
    run_dir: str = ""  # folder of the run; empty: runs/<game>__<script>__<seed>__<time>
    resume: bool = False  # carry on the run in --run-dir, or begin it if nothing is there yet
    eval_only: str | None = None  # folder of a run: play --final-episodes games, train nothing
    dry_run: bool = False  # print what would be done, then stop; writes nothing
    # --- environment
    frame_skip: int = num(4, 1, 1_000)  # emulator frames per action, the last two max-pooled [D]
    max_episode_steps: int = num(27_000, 1, MANY)  # when a game is cut: after 108,000 frames [D]
    epsilon: float = num(0.01, 0, 1)  # share of random actions while collecting [D]
    # --- schedule
    total_steps: int = num(100_000, 1, MANY)  # environment steps of the run: 400k frames [P, D]
    first_steps_min: int = num(5_100, 2, MANY)  # steps collected before anything is trained [D]
    first_steps_max: int = num(10_000, 1, MANY)  # ... and at most so many, if rewards are rare [D]
    first_diffusion_updates: int = num(10_000, 0, MANY)  # pre-training of denoiser, encoder [D]
    first_reward_updates: int = num(10_000, 0, MANY)  # ... of the reward/termination model [D]
    first_policy_updates: int = num(5_000, 0, MANY)  # first training of the actor-critic [D]
    epoch_steps: int = num(100, 1, MANY)  # environment steps per later epoch [D]
    diffusion_updates: int = num(400, 0, MANY)  # of denoiser and encoder per later epoch [D]
    reward_updates: int = num(400, 0, MANY)  # of the reward/termination model per epoch [D]
    policy_updates: int = num(400, 0, MANY)  # of the actor-critic per later epoch [D]
    final_epochs: int = num(50, 0, MANY)  # epochs at the end that collect nothing [D]
    batch_size: int = num(32, 1, 4_096)  # windows per update; the better of 32 and 64 [P]
    # --- networks
    encoder_width: int = num(32, 1, 4_096)  # channels of the encoder's stages, the last has 16 [P]
    encoder_stride: int = num(1, 1, 2)  # of its first convolution [P]; 2 is far cheaper [C]
    denoiser_width: int = num(160, 1, 4_096)  # channels of the one-level U-Net [P]
    cond_dim: int = num(256, 1, 4_096)  # the denoiser's conditioning vector; R_psi has half [D]
    reward_width: int = num(32, 1, 4_096)  # channels of the reward/termination model [D]
    reward_blocks: int = num(10, 1, 100)  # its residual blocks, from the ninth with attention [D]
    lstm_size: int = num(512, 1, 4_096)  # of R_psi's and the policy's LSTM [D]
    latent_norm: Literal["none", "center"] = "none"  # none [P]; center: less a running mean [C]
    # --- diffusion
    sigma_data: float = num(0.5, TINY, 1_000)  # latents' assumed standard deviation [D, C]
    sigma_offset: float = num(0.3, 0, 1_000)  # scale of the noise shared by a whole channel [D]
    noise_mean: float = num(-0.4, -1_000, 1_000)  # mean of ln(sigma) in training [E]
    context_frames: int = num(4, 1, 1_000)  # latents and actions the denoiser sees [D]
    target_frames: int = num(2, 1, 1_000)  # latents predicted one after the other in training [D]
    switch_prob: float = num(0.5, 0, 1)  # chance that the newest latent is the denoiser's own [P]
    sample_steps: int = num(3, 1, 1_000)  # Euler steps per imagined latent [P, D]
    sample_start: Literal["unit", "sigma_max"] = "unit"  # scale of the first noise: 1 [D] or [E]
    sample_sigma_max: float = num(5.0, SIGMA_MIN, 1_000)  # first noise level of the sampler [D]
    s_churn: float = num(0.0, 0, 1_000)  # noise put back at each step; 1 for stochastic games [P]
    # --- learning
    learning_rate: float = num(1e-4, TINY, 1)  # of all three AdamW optimisers [D]
    encoder_lr_scale: float = num(0.3, TINY, 1_000)  # the encoder's rate over --learning-rate [P]
    warmup_updates: int = num(100, 0, MANY)  # linear learning-rate warm-up of each optimiser [D]
    reward_dreamed: float = num(0.0, 0, 1)  # share of R_psi's training windows imagined [C]
    reward_window: int = num(15, 1, 1_000)  # frames after the context in a reward window [D]
    horizon: int = num(15, 1, 1_000)  # imagined steps per policy update [P, D]
    expected_reward: bool = False  # imagined rewards: R_psi's mean [C] rather than samples [D]
    gamma: float = num(0.985, 0, 1)  # discount [D]
    td_lambda: float = num(0.95, 0, 1)  # lambda of the lambda-returns [D]
    entropy_weight: float = num(0.001, 0, 1_000)  # weight of the entropy bonus [D]
    # --- evaluation
    eval_every: int = num(10, 1, MANY)  # epochs between evaluations [D]
    eval_episodes: int = num(4, 1, 100_000)  # full games per evaluation [D]
    final_episodes: int = num(100, 1, 100_000)  # full games at the end [D]
    temperature: float = num(1.0, TINY, 1_000)  # of the sampled policy in evaluation [D]


PRESETS: dict[str, dict] = {
    "paper": {},
    "tiny": dict(
        max_episode_steps=600, total_steps=24_000, first_steps_min=15_000, first_steps_max=15_000,
        first_diffusion_updates=500, first_reward_updates=300, first_policy_updates=100,
        epoch_steps=500, diffusion_updates=60, reward_updates=40, policy_updates=100,
        final_epochs=0, batch_size=16, eval_every=10, eval_episodes=10, final_episodes=40,
        encoder_width=16, encoder_stride=2, denoiser_width=48, cond_dim=128, reward_width=16,
        reward_blocks=3, lstm_size=128, latent_norm="center", target_frames=1, noise_mean=1.2,
        sample_steps=1, learning_rate=1e-3, encoder_lr_scale=0.03, warmup_updates=20,
        reward_window=5, horizon=10, expected_reward=True, gamma=0.95, entropy_weight=0.002,
    ),
}  # fmt: skip
PRESETS["small"] = PRESETS["tiny"] | dict(
    max_episode_steps=4_500, total_steps=80_000, first_steps_min=20_000, first_steps_max=20_000,
    first_diffusion_updates=1_500, first_reward_updates=800, first_policy_updates=300,
    epoch_steps=1_000, diffusion_updates=100, reward_updates=80, policy_updates=150,
    eval_every=5, final_episodes=100, learning_rate=3e-4, encoder_lr_scale=0.1, reward_dreamed=0.5,
)  # fmt: skip


def check_args(args: Args) -> None:
    """Raise `BadInput` for a value that no run can use."""
    for field in dataclasses.fields(args):
        flag, value = f"--{field.name.replace('_', '-')}", getattr(args, field.name)
        low, high = field.metadata.get("range", (0, 0))
        if field.metadata and not low <= value <= high:  # nan is refused, too
            raise BadInput(f"{flag} is {value}; it must be from {low} to {high}")
        if field.name.endswith("_width") and value % (32 if value >= 64 else min(8, value)):
            raise BadInput(f"{flag} is {value}; it must be a multiple of 8, from 64 on of 32")
    if args.cond_dim % (2 * args.context_frames):
        raise BadInput("--cond-dim must be a multiple of 2 * --context-frames")
    if not args.first_steps_min <= args.first_steps_max <= args.total_steps:
        raise BadInput("--first-steps-min, --first-steps-max and --total-steps must not fall")
    if args.resume and not args.run_dir:
        raise BadInput("--resume needs --run-dir, the folder of the run to carry on or begin")


# ---- 2. Environment: Atari as DIAMOND plays it, one plain environment ----------------------------
def resolve_env_id(env_id: str) -> tuple[str, str]:
    """`Pong`, `ALE/Pong-v5`, `PongNoFrameskip-v4`, `module:Name-v0` -> gymnasium id, short name."""
    gym.register_envs(ale_py)
    name = re.sub(r"(NoFrameskip|Deterministic)?-v\d$", "", env_id.removeprefix("ALE/"))
    atari = f"ALE/{name}-v5"
    return (atari, name) if atari in gym.registry else (env_id, re.sub(r"\W+", "_", env_id))


class Game(gym.Wrapper):
    """One game in 64 x 64 RGB frames (uint8): gymnasium's `AtariPreprocessing`, but a game ends
    with the last frame really shown, and a lost life ends neither step nor game but an episode
    of the replay: `info["end"]`, a termination; `info["stop"]`, also at a time limit [D]."""

    def __init__(self, env: gym.Env, args: Args, atari: bool):
        super().__init__(env)
        self.frame_skip, self.noop_max = (args.frame_skip, NOOP_MAX) if atari else (1, 0)
        self.max_steps, self.lives = args.max_episode_steps, 0
        self.observation_space = gym.spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Start with 1 to `noop_max` no-ops. Seed the first reset only: later games then differ."""
        frame, info = self.env.reset(seed=seed, options=options)
        for _ in range(self.np_random.integers(1, self.noop_max + 1) if self.noop_max else 0):
            frame, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                frame, info = self.env.reset()
        # After the no-ops: Amidar and DemonAttack misreport their lives on the very first frame.
        self.lives, self.steps, self.episode_return = info.get("lives", 0), 0, 0.0
        return self.resize(frame), info

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Repeat `action` for `frame_skip` frames. Rewards are summed, not clipped."""
        shown: list[np.ndarray] = []
        reward, terminated, truncated, info = 0.0, False, False, {}
        for _ in range(self.frame_skip):
            frame, frame_reward, terminated, truncated, info = self.env.step(action)
            shown.append(frame)
            reward += float(frame_reward)
            if terminated or truncated:
                break
        if not abs(reward) < 1e38:  # neither is nan
            raise BadInput(f"the game gave a reward of {reward}; it must be a finite number")
        self.steps, self.episode_return = self.steps + 1, self.episode_return + reward
        truncated = truncated or (self.steps >= self.max_steps and not terminated)
        lives = info.get("lives", 0)
        # Only a FALL tells: four games always say 0, BankHeist plays on at 0, DemonAttack's rise.
        end, self.lives = terminated or lives < self.lives, lives
        info = {**info, "end": end, "stop": end or truncated}
        frame = np.maximum(*shown[-2:]) if len(shown) > 1 else shown[-1]
        return self.resize(frame), reward, terminated, truncated, info

    def resize(self, frame: np.ndarray) -> np.ndarray:
        """(h, w, 3) -> (64, 64, 3) by area interpolation; a copy at that size, too."""
        if getattr(frame, "dtype", None) != np.uint8 or frame.shape[2:] != (3,):
            raise BadInput(f"the game shows {self.env.observation_space}, not uint8 RGB frames")
        return cv2.resize(frame, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_AREA)


def make_env(args: Args) -> Game:
    """The environment of `args.env_id`; swap this to play something else. Raises `BadInput`."""
    gym_id, _ = resolve_env_id(args.env_id)
    atari = gym_id.startswith("ALE/")
    plain = dict(frameskip=1, repeat_action_probability=0.0, full_action_space=False)
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner on the screen
    try:
        env = gym.make(gym_id, disable_env_checker=True, **(plain if atari else {}))
    except Exception as error:  # whatever goes wrong in somebody's module
        module, text = rf"\b{re.escape(gym_id.split(':')[0])}\b", " ".join(str(error).split())
        known = [i for i, s in gym.registry.items() if re.search(module, str(s.entry_point))]
        text += f" Known there: {', '.join(known)}" if ":" in gym_id and known else ""
        raise BadInput(f"--env-id {args.env_id!r}: {text}") from None
    actions = env.action_space
    if not (isinstance(actions, gym.spaces.Discrete) and actions.start == 0):
        raise BadInput(f"{args.env_id} takes {actions}; discrete actions are needed, Discrete(n)")
    return Game(env, args, atari)


# ---- 3. Replay: all play, on the training device -------------------------------------------------
class Windows(NamedTuple):
    """A batch of windows cut from episodes. Rows of padding hold zeros and have `mask` False."""

    frames: Tensor  # (B, T, 64, 64, 3) uint8
    actions: Tensor  # (B, T) int64: actions[t] leads from frames[t] to frames[t + 1]
    rewards: Tensor  # (B, T) float32: of that transition, unclipped
    ends: Tensor  # (B, T) bool: it ended in a termination (game over or life lost; no time limit)
    mask: Tensor  # (B, T) bool: which steps are real


class ReplayBuffer:
    """All play, flat in time, and its episodes, on the training device; ended with a last frame."""

    def __init__(self, capacity: int, device: torch.device):
        self.device, self.size, self.num_episodes, self.open = device, 0, 0, False  # open: goes on
        shape = (capacity, IMAGE_SIZE, IMAGE_SIZE, 3)
        self.frames = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.actions = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.rewards = torch.zeros(capacity, dtype=torch.float32, device=device)
        self.ends = torch.zeros(capacity, dtype=torch.bool, device=device)
        self.starts, self.lengths = torch.zeros(2, capacity, dtype=torch.int64, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)  # num_episodes, over there
        self.weights = torch.tensor(QUARTER_WEIGHTS, device=device)

    def add(self, frame: np.ndarray, action: int, reward: float, end: bool, last=None) -> None:
        """One step; `end`: it terminated; `last`: the frame after it, if the episode stops here."""
        # DEVIATION 4: the last frame is a target of the denoiser too; DIAMOND's only of R_psi.
        rows = [(action, False, end, reward, frame)]
        for row in rows if last is None else [*rows, (0, True, False, 0.0, last)]:
            if self.size == len(self.actions):  # rare: very many, very short episodes
                for name in ("frames", "actions", "rewards", "ends", "starts", "lengths"):
                    old = getattr(self, name)
                    setattr(self, name, torch.cat([old, torch.zeros_like(old)]))
            if not self.open:
                self.starts[self.num_episodes] = self.size
                self.num_episodes += 1
                self.count.fill_(self.num_episodes)
            action, final, end, reward, frame = row
            self.frames[self.size] = torch.from_numpy(frame).to(self.device)
            self.actions[self.size], self.rewards[self.size] = action, reward
            self.ends[self.size] = bool(end)
            self.lengths[self.num_episodes - 1] += 1
            self.size, self.open = self.size + 1, not final

    def _draw(self, batch_size: int, length: int, final: bool) -> tuple[Tensor, ...]:
        """Episodes (a quarter by its weight, then any of it), how many of their steps count
        (`final`: with the last frame), one of these steps, and its place in a window [D]."""
        few, quarter = self.num_episodes < 4, self.count // 4
        # Few: by length; one just opened is no use. Two at least: drawing one, the host waits.
        weights = (self.lengths[:3] - 1).clamp(min=0).float() if few else self.weights
        episode = torch.multinomial(weights, max(batch_size, 2), replacement=True)[:batch_size]
        if not few:
            sizes = torch.where(episode == 3, self.count - 3 * quarter, quarter)
            place = (torch.rand(batch_size, device=self.device) * sizes).long()
            episode = (episode * quarter + place).minimum(self.count - 1)
        count = (self.lengths[episode] - (0 if final else 1)).clamp(min=1)
        step = (torch.rand(batch_size, device=self.device) * count).long().minimum(count - 1)
        return episode, count, step, torch.randint(length, (batch_size,), device=self.device)

    def _cut(self, episode: Tensor, start: Tensor, length: int, stop: Tensor) -> Windows:
        """Gather `length` records of each episode from `start` on; real are those in [0, stop)."""
        time_ = start[:, None] + torch.arange(length, device=self.device)
        mask = (time_ >= 0) & (time_ < stop[:, None])
        time_ = time_.clamp(min=0).minimum(self.lengths[episode][:, None] - 1)
        index = self.starts[episode][:, None] + time_
        frames = self.frames[index] * mask[..., None, None, None]
        actions, rewards, ends = self.actions[index], self.rewards[index], self.ends[index]
        return Windows(frames, actions * mask, rewards * mask, ends & mask, mask)

    def sample_frames(self, batch_size: int, length: int, final: bool) -> Windows:
        """Windows that may begin before an episode (padding); not `final`: no last frame of one."""
        episode, count, step, place = self._draw(batch_size, length, final)
        stop = (step + 1 + place).minimum(count)
        return self._cut(episode, stop - length, length, stop)

    def sample_transitions(self, batch_size: int, length: int) -> Windows:
        """`length` transitions, one frame more; past an episode's end mask (B, length) is False."""
        # DEVIATION 5: padding at a window's end only: before its begin it would move LSTM states.
        episode, count, step, place = self._draw(batch_size, length, final=False)
        stop, start = (step - place + length).minimum(count), (step - place).clamp(min=0)
        windows = self._cut(episode, start, length + 1, self.lengths[episode].minimum(stop + 1))
        return windows._replace(mask=windows.mask[:, 1:])

    def all_windows(self, length: int, stride: int, count: int = 10**9, rewarded: bool = False):
        """Windows wholly in an episode, one each `stride` steps backward from its end; at most
        `count`, evenly spread. `rewarded`: only those whose last transition has a reward."""
        lengths = self.lengths[: self.num_episodes].tolist()
        pairs = [(e, s) for e, n in enumerate(lengths) for s in range(n - length, -1, -stride)]
        pairs = torch.tensor(pairs, dtype=torch.int64, device=self.device).reshape(-1, 2)
        if rewarded:
            last = self.starts[pairs[:, 0]] + pairs[:, 1] + length - 2
            pairs = pairs[self.rewards[last] != 0]
        if len(pairs) > count:
            pairs = pairs[torch.linspace(0, len(pairs) - 1, count, device=self.device).long()]
        episode, start = pairs.unbind(1)
        return self._cut(episode, start, length, start + length)


# ---- 4. Networks: E_phi, F_theta, R_psi, pi_omega and V_omega ------------------------------------
def group_norm(channels: int, affine: bool = True) -> nn.GroupNorm:
    """Groups of 32 channels [D]."""
    return nn.GroupNorm(max(1, channels // 32), channels, affine=affine)


conv3x3 = functools.partial(nn.Conv2d, kernel_size=3, padding=1)


def zero_(layer: nn.Module) -> nn.Module:
    """Set a layer to zero, so that the block that it closes adds nothing at first [D]."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class LSTM(nn.LSTM):
    """Input weights xavier, recurrent ones orthogonal, biases 0 but the forget gate's: 1 [D]."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight_ih_l0)
        nn.init.orthogonal_(self.weight_hh_l0)
        self.bias_hh_l0.data.zero_()
        self.bias_ih_l0.data.zero_().chunk(4)[1].fill_(1.0)

    def forward(self, x: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        """In float32: autocast on CUDA takes float16, whose gradients end at 6e-8."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float(), state)


class EncoderStage(nn.Module):
    """A small residual block: group norm, SiLU, convolution, skip."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Sequential(group_norm(inputs), nn.SiLU(), conv3x3(inputs, outputs))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.conv(x)


class Encoder(nn.Module):
    """E_phi: 64 x 64 RGB frame -> 16 x 8 x 8 latent in (-3, 3). 34,048 parameters [P]."""

    def __init__(self, width: int, stride: int = 1):
        super().__init__()
        # DEVIATION 11: of stride 2, the first convolution takes the place of a stage.
        parts = [m for _ in range(stride, 4) for m in (EncoderStage(width, width), nn.MaxPool2d(2))]
        stages = [*parts, EncoderStage(width, LATENT_SHAPE[0])]
        self.layers = nn.Sequential(nn.Conv2d(3, width, 3, stride, padding=1), *stages)

    def forward(self, frames: Tensor) -> Tensor:
        """(N, 64, 64, 3) uint8 -> (N, 16, 8, 8) float32."""
        # NHWC bytes read as NCHW: the strides are channels-last already, no copy.
        return clamp_latent(self.layers(frames.permute(0, 3, 1, 2).float() / 127.5 - 1).float())


def clamp_latent(z: Tensor) -> Tensor:
    """C(z) = 3 tanh(z / 3) [P]."""
    return LATENT_BOUND * torch.tanh(z / LATENT_BOUND)


class LatentNorm(nn.Module):
    """What every other network sees of a latent. `none` [P]: the latent itself. `center`: less its
    running mean, scaled to sigma_data: most of a latent is a background that never changes."""

    def __init__(self, mode: str, sigma_data: float):
        super().__init__()
        self.mode, self.sigma_data = mode, sigma_data
        self.register_buffer("mean", torch.zeros(LATENT_SHAPE))
        self.register_buffer("variance", torch.tensor(sigma_data**2))
        self.register_buffer("updates", torch.zeros(()))

    @torch.no_grad()
    def update(self, z: Tensor, mask: Tensor) -> None:
        """Move the averages towards a batch: z (B, T, 16, 8, 8), mask (B, T) of real frames."""
        if self.mode == "none":
            return
        self.updates += 1
        rate = torch.clamp(1 / self.updates, min=0.01)  # at first a plain average
        weight = mask[..., None, None, None] / mask.sum()
        self.mean += rate * ((z * weight).sum((0, 1)) - self.mean)
        variance = ((z - self.mean).square() * weight).sum((0, 1)).mean()  # around the new mean
        self.variance += rate * (variance - self.variance)

    def forward(self, z: Tensor) -> Tensor:
        """(..., 16, 8, 8) -> the same shape. DEVIATION 1: in the papers the latents themselves."""
        if self.mode == "none":
            return z
        return (z - self.mean) * (self.sigma_data * torch.rsqrt(self.variance + 1e-8))

    def clamp(self, z: Tensor) -> Tensor:
        """C for a predicted latent. In the plain space it is the papers', which bends a correct
        prediction (1 -> 0.965); in the centred space a cut at what the encoder can say."""
        if self.mode == "none":
            return clamp_latent(z)
        bound = torch.full_like(self.mean, LATENT_BOUND)
        return torch.clamp(z, self.forward(-bound), self.forward(bound))


class SelfAttention(nn.Module):
    """Self-attention over the 64 places of a latent, heads of 8 channels [D]."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.heads = max(1, channels // 8)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x, size = self.norm(x), c // self.heads
        # (B, 3C, H, W) -> 3 x (B * heads, C / heads, H * W)
        q, k, v = self.qkv(x).reshape(b, 3, -1, size, h * w).transpose(0, 1).flatten(1, 2)
        # Two products: fused attention is made for long sequences, not for 64 places.
        attention = torch.bmm((q * size**-0.5).transpose(1, 2), k).softmax(2)
        y = torch.bmm(v, attention.transpose(1, 2)).reshape(b, c, h, w)
        return x + self.out(y)  # the residual is the normalised input [D]


class ResBlock(nn.Module):
    """Two convolutions after group norms that `cond` scales and shifts; skip; attention [D]."""

    def __init__(self, inputs: int, outputs: int, attention: bool = False):
        super().__init__()
        self.norm1, self.conv1 = group_norm(inputs, affine=False), conv3x3(inputs, outputs)
        self.norm2, self.conv2 = group_norm(outputs, affine=False), zero_(conv3x3(outputs, outputs))
        self.sizes = (inputs, inputs, outputs, outputs)  # of a scale and a shift for each norm
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = SelfAttention(outputs) if attention else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x (B, inputs, 8, 8), cond (B, sum(sizes)) -> (B, outputs, 8, 8)."""
        scale1, shift1, scale2, shift2 = cond[:, :, None, None].split(self.sizes, dim=1)
        y = self.conv1(F.silu(self.norm1(x) * (1 + scale1) + shift1))
        y = self.conv2(F.silu(self.norm2(y) * (1 + scale2) + shift2))
        return self.attention(self.skip(x) + y)


class Denoiser(nn.Module):
    """F_theta: a one-level U-Net given noise level, past latents and actions [P, D]."""

    def __init__(self, num_actions: int, args: Args):
        super().__init__()
        self.sigma_data = args.sigma_data
        channels, width, dim = LATENT_SHAPE[0], args.denoiser_width, args.cond_dim
        self.register_buffer("fourier", torch.randn(dim // 2))
        self.action_embedding = nn.Embedding(num_actions, dim // args.context_frames)
        self.cond = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.conv_in = conv3x3((args.context_frames + 1) * channels, width)
        self.down = ResBlock(width, width)
        self.middle = nn.ModuleList(ResBlock(width, width, attention=True) for _ in range(2))
        self.up = nn.ModuleList(ResBlock(2 * width, width) for _ in range(2))
        self.sizes = [sum(block.sizes) for block in (self.down, *self.middle, *self.up)]
        self.scales = nn.Linear(dim, sum(self.sizes))
        self.norm_out = group_norm(width)
        self.conv_out = zero_(conv3x3(width, channels))

    def condition(self, c_noise: Tensor, actions: Tensor) -> Tensor:
        """c_noise (B,), actions (B, N) -> scales and shifts of all blocks, (B, sum(sizes))."""
        angle = 2 * math.pi * c_noise[:, None] * self.fourier
        noise_features = torch.cat([angle.cos(), angle.sin()], dim=1)
        return self.scales(self.cond(noise_features + self.action_embedding(actions).flatten(1)))

    def forward(self, x: Tensor, context: Tensor, cond: Tensor) -> Tensor:
        """x and output (B, 16, 8, 8), context (B, N, 16, 8, 8), cond as `condition` gives it."""
        down, middle1, middle2, up1, up2 = cond.split(self.sizes, dim=1)
        x = torch.cat([(context / self.sigma_data).flatten(1, 2), x], dim=1)
        x0 = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        x1 = self.down(x0, down)
        x = self.middle[1](self.middle[0](x1, middle1), middle2)
        x = self.up[0](torch.cat([x, x1], dim=1), up1)
        x = self.up[1](torch.cat([x, x0], dim=1), up2)
        return self.conv_out(F.silu(self.norm_out(x))).float()


class RewardTerminationModel(nn.Module):
    """R_psi: pairs of latents and actions -> logits of the reward's sign and termination [P, D]."""

    def __init__(self, num_actions: int, args: Args):
        super().__init__()
        width, cond_dim, size = args.reward_width, args.cond_dim // 2, args.lstm_size
        self.action_embedding = nn.Embedding(num_actions, cond_dim)
        self.conv_in = conv3x3(2 * LATENT_SHAPE[0], width)
        # Eight blocks, then two with attention; all at 8 x 8, where DIAMOND halves the picture.
        blocks = range(args.reward_blocks)
        self.blocks = nn.ModuleList(ResBlock(width, width, attention=i >= 8) for i in blocks)
        self.scales = nn.Linear(cond_dim, len(blocks) * 4 * width)
        self.lstm = LSTM(width * LATENT_SHAPE[1] * LATENT_SHAPE[2], size, batch_first=True)
        self.head = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, 5))
        # DEVIATION 7: "rewards and ends are rare" from the start, lest the LSTM saturate to say so.
        self.head[-1].bias.data.copy_(torch.tensor([-4.0, 0.0, -4.0, 0.0, -4.0]))

    def features(self, z: Tensor, actions: Tensor) -> Tensor:
        """z (B, T + 1, 16, 8, 8), actions (B, T) -> (B, T, width * 64), all but the recurrence."""
        pairs = torch.cat([z[:, :-1], z[:, 1:]], dim=2).flatten(0, 1)
        cond = self.scales(self.action_embedding(actions.flatten())).chunk(len(self.blocks), dim=1)
        x = self.conv_in(pairs.contiguous(memory_format=torch.channels_last))
        for block, scales in zip(self.blocks, cond, strict=True):
            x = block(x, scales)
        # DEVIATION 10: what ten blocks add up to grows; unnormalised it saturates the LSTM.
        return F.group_norm(x, max(1, x.shape[1] // 32)).reshape(*actions.shape, -1)

    def forward(self, z: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """As above -> reward logits (B, T, 3) for -1, 0, 1 and end logits (B, T, 2)."""
        hidden, _ = self.lstm(self.features(z, actions))
        return self.head(hidden).float().split([3, 2], dim=-1)


class ActorCritic(nn.Module):
    """pi_omega, V_omega: a latent goes straight into an LSTM; heads that start at zero [P, D]."""

    def __init__(self, num_actions: int, lstm_size: int):
        super().__init__()
        self.lstm = LSTM(math.prod(LATENT_SHAPE), lstm_size, batch_first=True)
        self.policy = zero_(nn.Linear(lstm_size, num_actions))
        self.value = zero_(nn.Linear(lstm_size, 1))

    def forward(self, z: Tensor, state: tuple | None) -> tuple[Tensor, Tensor, tuple]:
        """z (B, T, 16, 8, 8), LSTM state -> action logits (B, T, A), values (B, T), new state."""
        hidden, state = self.lstm(z.flatten(2), state)
        return self.policy(hidden).float(), self.value(hidden).float().squeeze(-1), state


def masked_lstm(lstm: nn.LSTM, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The state of an LSTM after steps x (B, T, n); padding (mask (B, T) False) leaves it at 0."""
    state = None
    for t in range(x.shape[1]):
        _, state = lstm(x[:, t : t + 1], state)
        state = tuple(s * mask[None, :, t, None] for s in state)
    return state


class Agent(nn.Module):
    """The four networks and the normalisation of latents between them."""

    def __init__(self, num_actions: int, args: Args):
        super().__init__()
        self.encoder = Encoder(args.encoder_width, args.encoder_stride)
        self.norm = LatentNorm(args.latent_norm, args.sigma_data)
        self.denoiser = Denoiser(num_actions, args)
        self.reward = RewardTerminationModel(num_actions, args)
        self.policy = ActorCritic(num_actions, args.lstm_size)
        self.to(memory_format=torch.channels_last)  # as the activations are: no copies of weights

    def latents(self, frames: Tensor) -> Tensor:
        """Frames (..., 64, 64, 3) uint8 -> the encoder's latents (..., 16, 8, 8)."""
        flat = frames.flatten(0, -4)
        # A chunk's activations stay in a CPU's caches: that halves the encoder's time there.
        chunk = CPU_CHUNK if flat.device.type == "cpu" else len(flat)
        z = torch.cat([self.encoder(part) for part in flat.split(chunk)]).contiguous()
        return z.unflatten(0, frames.shape[:-3])

    def encode(self, frames: Tensor, mask: Tensor | None = None) -> Tensor:
        """The same as the other networks see them; padding (mask False) is 0."""
        z = self.norm(self.latents(frames))
        return z if mask is None else z * mask[..., None, None, None]


# ---- 5. Diffusion: preconditioning, noise and sampling in latent space, all in float32 -----------
def precondition(sigma: Tensor, sigma_data: float, sigma_offset: float) -> tuple[Tensor, ...]:
    """c_in, c_out, c_skip (B, 1, 1, 1), c_noise (B,) for noise levels sigma (B,), offset noise
    counted in [E, table 1; D]: D_theta(z) = c_skip z + c_out F_theta(c_in z, c_noise)."""
    sigma = torch.sqrt(sigma**2 + sigma_offset**2)
    c_in = 1 / torch.sqrt(sigma**2 + sigma_data**2)
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * torch.sqrt(c_skip)
    return *(c[:, None, None, None] for c in (c_in, c_out, c_skip)), torch.log(sigma) / 4


def add_noise(z: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """z (B, C, H, W) plus noise, plus a value per channel [D]; levels (B,), log-normal [E, D]."""
    normal = torch.randn(len(z), device=z.device)
    sigma = torch.exp(normal * NOISE_STD + args.noise_mean).clamp(*NOISE_RANGE)
    offset = args.sigma_offset * torch.randn(*z.shape[:2], 1, 1, device=z.device)
    return z + sigma[:, None, None, None] * torch.randn(z.shape, device=z.device) + offset, sigma


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    """`steps` falling noise levels from sigma_max to sigma_min, then 0 [E, equation 5]."""
    low, high, intervals = sigma_min ** (1 / rho), sigma_max ** (1 / rho), max(steps - 1, 1)
    return [(high + i / intervals * (low - high)) ** rho for i in range(steps)] + [0.0]


@functools.cache
def sampler_steps(args: Args) -> list[tuple[float, ...]]:
    """Each Euler step's sigma, sigma_hat (after churn), next sigma, and c_in, c_out, c_skip and
    c_noise. DEVIATION 9: at sigma_hat, where z is then [E]; DIAMOND's code at sigma."""
    sigmas = karras_sigmas(args.sample_steps, SIGMA_MIN, args.sample_sigma_max, RHO)
    gamma = min(args.s_churn / args.sample_steps, math.sqrt(2) - 1)
    hats = [sigma * (1 + gamma) for sigma in sigmas[:-1]]
    c = precondition(torch.tensor(hats).double(), args.sigma_data, args.sigma_offset)
    return list(zip(sigmas[:-1], hats, sigmas[1:], *(x.flatten().tolist() for x in c), strict=True))


@torch.no_grad()
def sample_next_latent(agent: Agent, context: Tensor, actions: Tensor, args: Args) -> Tensor:
    """context (B, N, 16, 8, 8), actions (B, N) -> an imagined latent (B, 16, 8, 8), by Euler steps
    [E, algorithm 2]. From unit noise [D] samples vary less than the truth: docs/stochasticity.md"""
    steps, batch, device = sampler_steps(args), len(actions), context.device
    # Nothing in the conditioning depends on z: one pass for all steps.
    c_noise = torch.cat([torch.full((batch,), step[-1], device=device) for step in steps])
    cond = agent.denoiser.condition(c_noise, actions.repeat(len(steps), 1)).chunk(len(steps))
    scale = args.sample_sigma_max if args.sample_start == "sigma_max" else 1.0
    z = torch.randn(context[:, -1].shape, device=device) * scale
    for (sigma, hat, sigma_next, c_in, c_out, c_skip, _), scales in zip(steps, cond, strict=True):
        if hat > sigma:
            z = z + math.sqrt(hat**2 - sigma**2) * torch.randn(z.shape, device=device)
        output = agent.denoiser(c_in * z, context, scales)
        denoised = agent.norm.clamp(c_skip * z + c_out * output)
        z = z + (sigma_next - hat) * (z - denoised) / hat
    return z


# ---- 6. World model losses -----------------------------------------------------------------------
def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask`; 0 where nothing is. No synchronisation with the host."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def diffusion_loss(agent: Agent, batch: Windows, args: Args) -> tuple[Tensor, dict]:
    """Denoising loss that trains D_theta and, through the context, E_phi [P], on windows of
    context_frames + target_frames frames. Returns it and metrics (detached scalars)."""
    n = args.context_frames
    latents = agent.latents(batch.frames)
    agent.norm.update(latents.detach(), batch.mask)
    z = agent.norm(latents) * batch.mask[..., None, None, None]
    context, losses = list(z[:, :n].unbind(1)), []
    for i in range(args.target_frames):
        # The one stop-gradient of JEDI: else the encoder could win by making all latents equal.
        target = z[:, n + i].detach()
        noisy, sigma = add_noise(target, args)
        c_in, c_out, c_skip, c_noise = precondition(sigma, args.sigma_data, args.sigma_offset)
        past = torch.stack(context[-n:], dim=1)  # carries the encoder's gradient
        cond = agent.denoiser.condition(c_noise, batch.actions[:, i : i + n])
        output = agent.denoiser(c_in * noisy, past, cond)
        error = output - (target - c_skip * noisy) / c_out
        losses.append(error.square().mean((1, 2, 3)))
        # Random switching: half of the batches go on from the denoiser's own output, as imagination
        # does; detached, so that no gradient runs through two passes.
        denoised = agent.norm.clamp(c_skip * noisy + c_out * output).detach()
        switch = torch.rand((), device=z.device) < args.switch_prob
        real = batch.mask[:, n + i, None, None, None]
        context.append(torch.where(switch, denoised, z[:, n + i]) * real)
    loss = masked_mean(torch.stack(losses, dim=1), batch.mask[:, n:])
    return loss, {"loss": loss.detach(), "latent_std": z.detach().std()}


def reward_termination_loss(agent: Agent, batch: Windows, args: Args) -> tuple[Tensor, dict]:
    """Cross-entropy of the reward's sign and of the termination; trains R_psi and E_phi [P, D]."""
    z = agent.encode(batch.frames)
    if args.reward_dreamed > 0:
        # DEVIATION 8: trained on true latents alone, R_psi misses the rewards of imagined ones.
        # No gradient: R_psi learns to read the dream; the encoder must not learn to suit it.
        dreamed = open_loop(agent, z.detach(), batch.actions, args.reward_window, args)
        chosen = torch.rand(len(z), 1, 1, 1, 1, device=z.device) < args.reward_dreamed
        z = torch.where(chosen, dreamed, z)
    reward_logits, end_logits = agent.reward(z, batch.actions[:, :-1])
    sign, end = batch.rewards[:, :-1].sign().long(), batch.ends[:, :-1].long()
    # (B, T, K) logits -> (B, K, T), as cross_entropy wants its classes
    reward_error = F.cross_entropy(reward_logits.transpose(1, 2), sign + 1, reduction="none")
    end_error = F.cross_entropy(end_logits.transpose(1, 2), end, reduction="none")
    reward_loss, end_loss = (masked_mean(x, batch.mask) for x in (reward_error, end_error))
    metrics = dict(loss=reward_loss + end_loss, reward_loss=reward_loss, end_loss=end_loss)
    return metrics["loss"], {key: value.detach() for key, value in metrics.items()}


# ---- 7. Imagination and the actor-critic ---------------------------------------------------------
class Imagined(NamedTuple):
    """Trajectories of H steps from B starts; after an end, `alive` is False and nothing counts."""

    z: Tensor  # (B, H + 1, 16, 8, 8)
    actions: Tensor  # (B, H)
    rewards: Tensor  # (B, H) in {-1, 0, 1}, or in [-1, 1] where they are means
    ends: Tensor  # (B, H) bool
    alive: Tensor  # (B, H) bool: the step was begun before any end
    policy_state: tuple  # LSTM state before z[:, 0]


def open_loop(agent: Agent, z: Tensor, actions: Tensor, steps: int, args: Args) -> Tensor:
    """z (B, T, 16, 8, 8) with its last `steps` latents imagined under the actions (B, T) taken."""
    n, first = args.context_frames, z.shape[1] - steps
    latents = list(z[:, :first].unbind(1))
    for t in range(first, z.shape[1]):
        past = torch.stack(latents[-n:], dim=1)
        latents.append(sample_next_latent(agent, past, actions[:, t - n : t], args))
    return torch.stack(latents, dim=1)


@torch.no_grad()
def imagine(agent: Agent, start: Windows, args: Args) -> Imagined:
    """Let the policy act for `args.horizon` steps in the world model, from windows of real frames;
    R_psi, once, at the end. DEVIATION 3: what follows an end is masked; DIAMOND starts afresh."""
    n = args.context_frames
    context = agent.encode(start.frames, start.mask)
    latents, actions = list(context.unbind(1)), list(start.actions[:, : n - 1].unbind(1))
    burn_in = start.mask[:, : n - 1]
    policy_state = masked_lstm(agent.policy.lstm, context[:, : n - 1].flatten(2), burn_in)
    state = policy_state
    for _ in range(args.horizon):
        logits, _, state = agent.policy(latents[-1][:, None], state)
        actions.append(sample_categorical(logits[:, 0]))
        newest, taken = torch.stack(latents[-n:], dim=1), torch.stack(actions[-n:], dim=1)
        latents.append(sample_next_latent(agent, newest, taken, args))
    z, taken = torch.stack(latents, dim=1), torch.stack(actions, dim=1)
    features = agent.reward.features(z, taken)
    reward_state = masked_lstm(agent.reward.lstm, features[:, : n - 1], burn_in)
    hidden, _ = agent.reward.lstm(features[:, n - 1 :], reward_state)
    reward_logits, end_logits = agent.reward.head(hidden).float().split([3, 2], dim=-1)
    p, sampled = reward_logits.softmax(-1), (sample_categorical(reward_logits) - 1).float()
    # DEVIATION 12: samples of rewards that R_psi is unsure of are mostly noise; their mean is not.
    rewards = p[..., 2] - p[..., 0] if args.expected_reward else sampled
    ends = sample_categorical(end_logits).bool()
    ended_before = F.pad(ends, (1, 0))[:, :-1].long().cumsum(1) > 0
    return Imagined(z[:, n - 1 :], taken[:, n - 1 :], rewards, ends, ~ended_before, policy_state)


def sample_categorical(logits: Tensor) -> Tensor:
    """(..., K) logits -> (...) samples, by Gumbel-max: torch.multinomial makes the host wait."""
    noise = torch.empty_like(logits, memory_format=torch.contiguous_format).exponential_()
    return (logits - noise.log()).argmax(-1)


def lambda_returns(rewards: Tensor, ends: Tensor, values: Tensor, gamma: float, lambda_: float):
    """rewards, ends (B, H), values (B, H + 1) -> returns (B, H) [D, equation 14]: G_H = V_H,
    G_t = r_t + gamma (1 - d_t) ((1 - lambda) V_{t+1} + lambda G_{t+1})."""
    returns, last = [], values[:, -1]
    for t in reversed(range(rewards.shape[1])):
        going_on = gamma * (~ends[:, t]).float()
        last = rewards[:, t] + going_on * ((1 - lambda_) * values[:, t + 1] + lambda_ * last)
        returns.append(last)
    return torch.stack(returns[::-1], dim=1)


def actor_critic_loss(agent: Agent, batch: Windows, args: Args) -> tuple[Tensor, dict]:
    """REINFORCE with the value as baseline, squared value error and entropy bonus [D], on latents
    imagined without gradients: nothing of this loss reaches the encoder."""
    dream = imagine(agent, batch, args)
    logits, values, _ = agent.policy(dream.z, dream.policy_state)
    # The returns are targets and the advantage is a weight: neither passes a gradient on.
    baseline = values.detach()
    returns = lambda_returns(dream.rewards, dream.ends, baseline, args.gamma, args.td_lambda)
    log_probs = F.log_softmax(logits[:, :-1], dim=-1)
    taken = log_probs.gather(-1, dream.actions[..., None]).squeeze(-1)
    entropy = masked_mean(-(log_probs.exp() * log_probs).sum(-1), dream.alive)
    policy_loss = masked_mean(-taken * (returns - baseline[:, :-1]), dream.alive)
    value_loss = masked_mean((values[:, :-1] - returns).square(), dream.alive)
    loss = policy_loss + value_loss - args.entropy_weight * entropy
    metrics = dict(loss=loss, policy_loss=policy_loss, value_loss=value_loss, entropy=entropy)
    metrics["value"] = masked_mean(baseline[:, :-1], dream.alive)
    metrics["imagined_reward"] = masked_mean(dream.rewards, dream.alive)
    metrics["imagined_end"] = masked_mean(dream.ends.float(), dream.alive)
    return loss, {key: value.detach() for key, value in metrics.items()}


# ---- 8. Playing, and measuring the world model on unseen play ------------------------------------
progress = functools.partial(tqdm, leave=False, disable=None if sys.stderr else True)  # no logs


@torch.compiler.set_stance("force_eager")  # each number of games would be compiled anew
@torch.no_grad()
def act(agent: Agent, frames: list[np.ndarray], state: tuple | None, temperature: float):
    """An action for each of several games, and the LSTM's new state. SYNC: the host needs them."""
    batch = torch.from_numpy(np.stack(frames)[:, None]).to(agent.norm.mean.device)
    logits, _, state = agent.policy(agent.encode(batch), state)
    return sample_categorical(logits[:, 0] / temperature).tolist(), state


class Collector:
    """The training environment and what its play carries from one epoch to the next."""

    def __init__(self, args: Args):
        self.env, self.args, self.actions = make_env(args), args, []
        self.frame, _ = self.env.reset(seed=args.seed)
        self.steps, self.checksum, self.lstm = 0, 0, None  # lstm: the state of the policy's
        self.reward_counts = [0, 0, 0]  # steps with a negative, no and a positive reward

    def step(self, agent: Agent | None, replay: ReplayBuffer, action=None) -> list[float]:
        """Play a step: `action`, the agent's or a random one; the game's return if it ended."""
        if agent and action is None:
            (action,), self.lstm = act(agent, [self.frame], self.lstm, 1.0)
        if action is None or (agent and torch.rand(()).item() < self.args.epsilon):
            action = int(torch.randint(int(self.env.action_space.n), ()).item())
        frame, reward, terminated, truncated, info = self.env.step(action)
        self.actions.append(action)
        self.checksum = zlib.crc32(frame, self.checksum)  # of all frames that a step led to
        self.steps += 1
        self.reward_counts[int(np.sign(reward)) + 1] += 1
        replay.add(self.frame, action, reward, info["end"], frame if info["stop"] else None)
        self.frame, self.lstm = frame, None if info["stop"] else self.lstm
        finished = [self.env.episode_return] if terminated or truncated else []
        if finished:
            self.frame, _ = self.env.reset()
        return finished

    def state_dict(self) -> dict:
        """Play is a game's seed and its actions: what else there is follows from them."""
        actions = torch.tensor(self.actions, dtype=torch.int32)
        return dict(steps=self.steps, actions=actions, checksum=self.checksum, lstm=self.lstm)

    def load_state_dict(self, saved: dict, replay: ReplayBuffer) -> None:
        """Play it all again, thousands of steps a second; `BadInput` if that ends otherwise."""
        for action in progress(saved["actions"].tolist(), desc="play again", unit="step"):
            self.step(None, replay, action)
        if self.checksum != saved["checksum"]:
            raise BadInput(f"{self.args.env_id} goes another way than it did; is ale-py the same?")
        self.lstm = saved["lstm"] and tuple(s.to(replay.device) for s in saved["lstm"])

    def first_goal(self) -> int:
        """Steps of the first play: more if few had another reward than the commonest [D]."""
        enough = sum(self.reward_counts) - max(self.reward_counts) >= FIRST_REWARDS
        return self.args.first_steps_min if enough else self.args.first_steps_max


def evaluate(agent: Agent, args: Args, episodes: int, number: int = 1, title="evaluation"):
    """Play full games: rewards not clipped, lives ignored, actions sampled, no exploration [D];
    each environment a fixed share, lest short games count for more. The world model is measured on
    the first one's play. `number`: for the seeds; number 0 is random play, without the networks."""
    seed = 10**9 + (args.seed * 100_003 + number * 1_009 + episodes) % 10**9
    envs = [make_env(args) for _ in range(min(EVAL_ENVS, episodes))]
    todo = [len(range(i, episodes, len(envs))) for i in range(len(envs))]
    frames = [env.reset(seed=seed + i)[0] for i, env in enumerate(envs)]
    heldout = ReplayBuffer(HELDOUT_STEPS, agent.norm.mean.device)
    state, returns, lengths = None, [], []
    print(f"{title}, {episodes} games", flush=True)
    bar = progress(total=episodes, desc=title, unit="game")
    while any(todo):
        if number:
            actions, state = act(agent, frames, state, args.temperature)
        else:
            actions = torch.randint(int(envs[0].action_space.n), (len(envs),)).tolist()
        for i in [i for i, left in enumerate(todo) if left]:
            frame, reward, terminated, truncated, info = envs[i].step(actions[i])
            if i == 0 and heldout.size < HELDOUT_STEPS - 1:
                stop = info["stop"] or heldout.size == HELDOUT_STEPS - 2
                heldout.add(frames[i], actions[i], reward, info["end"], frame if stop else None)
            if terminated or truncated:
                returns.append(envs[i].episode_return)
                lengths.append(envs[i].steps)
                frame, _ = envs[i].reset()
                todo[i] -= 1
                for s in state or ():
                    s[:, i] = 0
                bar.update()
            frames[i] = frame
    bar.close()
    found = dict(mean_return=float(np.mean(returns)), std_return=float(np.std(returns)))
    measures = measure_world_model(agent, heldout, args)
    return dict(returns=returns, lengths=lengths, **found, measures=measures)


@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def measure_world_model(agent: Agent, heldout: ReplayBuffer, args: Args) -> dict:
    """How good the world model is on unseen play (docs/metrics.md); None for what has no data."""
    raw = agent.latents(heldout.frames[: heldout.size : max(1, heldout.size // 512)])
    z = agent.norm(raw).flatten(1)
    found = dict(latent_std=raw.std().item(), latent_change_std=(z - z.mean(0)).std().item())
    found["latent_saturation"] = (raw.abs() > 0.9 * LATENT_BOUND).float().mean().item()
    energy = torch.linalg.svdvals((z - z.mean(0)).double()).square()
    rank = torch.special.entr(energy / energy.sum()).sum().exp().item()
    found["latent_effective_rank"] = rank if found["latent_change_std"] > 1e-6 else None  # a still
    n, longest = args.context_frames, int(heldout.lengths.max())
    windows = heldout.all_windows(length := min(n + args.reward_window, longest), length - 1)
    sign, end = windows.rewards[:, :-1].sign(), windows.ends[:, :-1]
    logits = agent.reward(agent.encode(windows.frames), windows.actions[:, :-1])
    guess, end_guess = (x.argmax(-1) for x in logits)
    for key, hits, of in (
        ("reward_recall", guess - 1 == sign, sign != 0),
        ("reward_false_alarms", guess != 1, sign == 0),
        ("end_recall", end_guess == 1, end),
        ("end_precision", end, end_guess == 1),
    ):
        found[key] = (hits & of).sum().item() / of.sum().item() if of.any() else None
    found["rewarded_steps"] = (sign != 0).sum().item()
    found["imagined_minus_real"] = found["open_loop_ratio"] = None
    # What the policy's dreams pay a step, less what the game then paid it (clipped).
    windows = heldout.all_windows(n + args.horizon, stride=1, count=256)
    if len(windows.frames):
        dream = imagine(agent, Windows(*(x[:, :n] for x in windows)), args)
        real = windows.rewards[:, n - 1 : -1].sign().mean()
        found["imagined_minus_real"] = (masked_mean(dream.rewards, dream.alive) - real).item()
    steps = min(MAX_OPEN_LOOP, longest - n)  # from here on imagined with the recorded actions
    if steps > 0:
        windows = heldout.all_windows(n + steps, stride=1, count=64)
        z = agent.encode(windows.frames)
        errors = (open_loop(agent, z, windows.actions, steps, args) - z, z[:, n - 1 : n] - z)
        error, no_change = (x[:, n:].square().mean((0, 2, 3, 4)) for x in errors)
        if no_change.min() > TINY:  # else a still picture: there is nothing to predict
            found["open_loop_ratio"] = (error / no_change).tolist()
    windows = heldout.all_windows(min(n + 5, longest), stride=1, count=64, rewarded=True)
    true, sign = agent.encode(windows.frames), windows.rewards[:, -2:-1].sign().long() + 1
    for k in (0, 1, 3, 5):
        found[f"reward_prob_{k}"] = None
        if n + k <= longest and len(windows.frames):
            z = open_loop(agent, true, windows.actions, k, args)
            logits, _ = agent.reward(z, windows.actions[:, :-1])
            found[f"reward_prob_{k}"] = logits[:, -1].softmax(-1).gather(1, sign).mean().item()
    return found


# ---- 9. The run folder: arguments, checkpoints, metrics ------------------------------------------
def write_atomically(path: Path, content, keep: bool = False) -> None:
    """Write bytes, or a dict as JSON, to a new file; then it replaces `path`, kept as .prev."""
    if isinstance(content, dict):
        content = (json.dumps(content, indent=2) + "\n").encode()
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if keep and path.exists():
        path.replace(path.with_suffix(f".prev{path.suffix}"))
    temporary.replace(path)


def load_args(run_dir: Path) -> Args:
    """The arguments of a run. Raises `BadInput` where there are none, or others than today's."""
    path = run_dir / "args.json"
    try:  # a checkpoint that was copied alone holds them, too
        found = json.loads(path.read_text() if path.exists() else load_checkpoint(run_dir)["args"])
        check_args(args := Args(**found))
        if missing := vars(args).keys() - found.keys():
            raise ValueError(f"no {min(missing)}; use the script that was copied there")
        return args
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{path}: no arguments of this script's version: {error}") from None


@contextlib.contextmanager
def open_run_dir(args: Args):
    """The run folder, locked, and its checkpoint. `BadInput` rather than touch another run."""
    name = f"{resolve_env_id(args.env_id)[1]}__{Path(__file__).stem}__{args.seed}"
    run_dir = Path(args.run_dir or f"runs/{name}__{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        there = {path.name for path in run_dir.glob("*.*")}
        begun = there & {"args.json", "checkpoint.pt", "checkpoint.prev.pt"}
        others = there & {"metrics.jsonl", "result.json"} or any(run_dir.glob("events.out.*"))
        if (begun or others) and not (begun and args.resume):
            raise BadInput(f"{run_dir} already holds a run; --resume carries it on")
        saved = load_checkpoint(run_dir) if begun - {"args.json"} else None
        old = json.loads(saved["args"]) if saved else {}
        free = "run_dir resume device precision compile cuda_graphs threads final_episodes"
        for key in set(old) - set(free.split()):
            value = getattr(args, key, None)
            if value != old[key] and not (key == "total_steps" and value > old[key]):
                raise BadInput(f"{run_dir} was begun with {key} {old[key]}; leave it as it is")
        if "result.json" in there:
            done = re.search(r'"env_steps": (\d+)', (run_dir / "result.json").read_text())
            if not (saved and done and args.total_steps > int(done[1])):
                raise BadInput(f"{run_dir} is finished; more --total-steps train it further")
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / ".lock", "wb")
    except OSError as error:
        raise BadInput(f"cannot write to the run folder {str(run_dir)[:80]}: {error}") from None
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"another process is at work in {run_dir}") from None
        except (ImportError, OSError):  # Windows and some file systems have no locks: go without
            pass
        yield run_dir, saved


def save_checkpoint(run_dir: Path, content: dict) -> None:
    """Write checkpoint.pt, plain data; the one before it stays as checkpoint.prev.pt."""
    torch.save(content, archive := io.BytesIO())
    write_atomically(run_dir / "checkpoint.pt", archive.getbuffer(), keep=True)


def load_checkpoint(run_dir: Path) -> dict:
    """Read a run's newest sound checkpoint onto the host, as data, not as code; else `BadInput`."""
    for path in (run_dir / "checkpoint.pt", run_dir / "checkpoint.prev.pt"):
        with contextlib.suppress(Exception):  # whatever is wrong with it
            sound = not zipfile.ZipFile(path).testzip()  # PyTorch does not look at the checksums
            saved = torch.load(path, map_location="cpu", weights_only=True)
            if sound and {*saved} >= {"agent", "args", "script"} and "env_id" in saved["args"]:
                return saved
    raise BadInput(f"{run_dir / 'checkpoint.pt'} is missing, cut short, altered or no data")


class Log:
    """Scalars under the same keys to metrics.jsonl and TensorBoard, over environment steps."""

    def __init__(self, run_dir: Path, before: str):
        from torch.utils.tensorboard import SummaryWriter  # takes a second: not for --help

        for path in run_dir.glob("events.out.tfevents.*"):  # written anew
            path.unlink()
        self.file, self.writer = open(run_dir / "metrics.jsonl", "w"), SummaryWriter(str(run_dir))
        for line in before.splitlines():
            self.write(json.loads(line))

    def write(self, metrics: dict) -> None:
        """Write a row of what is not None; a list as one key per entry, counted from 1."""
        row: dict[str, float] = {}
        for key, value in metrics.items():
            several = enumerate(value, 1) if isinstance(value, list) else ()
            row |= {f"{key}_{k}": v for k, v in several} or {key: value}
        row = {key: float(value) for key, value in row.items() if value is not None}
        for key, value in row.items():
            self.writer.add_scalar(key, value, int(row["charts/env_steps"]))
        self.writer.flush()
        print(json.dumps(row), file=self.file, flush=True)


# ---- 10. The loop --------------------------------------------------------------------------------
@functools.cache
def make_schedule(args: Args, first_steps: int) -> list[tuple[int, list[str], bool]]:
    """Each epoch's steps of the run after its play (0: as many as the first play takes), the parts
    that it updates, in order, and whether it is evaluated. The world model is pre-trained [D]."""

    def updates(first: str) -> list[str]:
        d, r, p = ([part] * getattr(args, f"{first}{part}_updates") for part in PARTS)
        # DEVIATION 2: some diffusion updates last, since those of the reward move the encoder.
        return d[len(d) // 2 :] + r + d[: len(d) // 2] + p

    pre, later = updates("first_"), updates("")
    size, epochs = len(later) or len(pre) or 1, [(0, [], True)]
    for i in range(0, len(pre), size):
        epochs.append((first_steps, pre[i : i + size], i + size >= len(pre)))
    count = -(-(args.total_steps - first_steps) // args.epoch_steps) + args.final_epochs
    for i in range(1, count + 1):
        steps = min(first_steps + i * args.epoch_steps, args.total_steps)
        epochs.append((steps, later, i % args.eval_every == 0 and i < count))
    return epochs


def make_optimizer(agent: Agent, part: str, args: Args) -> torch.optim.AdamW:
    """AdamW; decay on the world model's weights, not on biases, norms, embeddings [D]. The encoder
    learns with diffusion and reward, at a rate of its own [P]."""
    groups = collections.defaultdict(list)
    for name, parameter in agent.named_parameters():
        decayed = part != "policy" and parameter.ndim > 1 and "embedding" not in name
        if (network := name.split(".")[0]) in TRAINED[part].split():
            rate = args.learning_rate * (args.encoder_lr_scale if network == "encoder" else 1)
            groups[rate, WEIGHT_DECAY * decayed].append(parameter)
    options = [dict(params=p, peak=key[0], weight_decay=key[1]) for key, p in groups.items()]
    return torch.optim.AdamW(options, fused=True)


def update(agent: Agent, part: str, optimizer, replay: ReplayBuffer, number, args: Args, bf16):
    """The `number`-th optimiser step of a part, from 0 (an int or on the device); its metrics."""
    n, size = args.context_frames, args.batch_size
    if part == "diffusion":
        loss_of, batch = diffusion_loss, replay.sample_frames(size, n + args.target_frames, True)
    elif part == "reward":
        transitions = n + args.reward_window - 1
        loss_of, batch = reward_termination_loss, replay.sample_transitions(size, transitions)
    else:
        loss_of, batch = actor_critic_loss, replay.sample_frames(size, n, False)
    recording = replay.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    warm = torch.as_tensor((number + 1) / max(args.warmup_updates, 1)).clamp(max=1.0)
    for group in optimizer.param_groups:
        group |= dict(lr=group["peak"] * warm, capturable=recording)
    with torch.autocast(replay.device.type, torch.bfloat16, enabled=bf16):
        loss, metrics = loss_of(agent, batch, args)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM[part])
    optimizer.step()
    return {**metrics, "grad_norm": norm.detach()}


class Recorded:
    """An update as one CUDA graph: launched at once, not as thousands of kernels one by one; on a
    CPU, or not `active`, it runs as written. What changes from call to call is on the device
    (`number`, `replay.count`); a new `key` has it recorded anew. A call overwrites the result."""

    WARM_UP = 3  # calls as written first: they compile, choose algorithms, make AdamW's state

    def __init__(self, program, replay: ReplayBuffer, active: bool):
        self.program, self.replay, self.key, self.calls = program, replay, None, 0
        self.active = active and replay.device.type == "cuda"
        self.number = torch.zeros((), device=replay.device)

    def __call__(self, number: int) -> dict[str, Tensor]:
        self.number.fill_(number)
        key = self.replay.frames.data_ptr(), self.replay.num_episodes < 4
        if key != self.key:
            self.key, self.calls, self.graph, self.result = key, 0, None, None
        self.calls += 1
        if not self.active or self.calls <= self.WARM_UP:
            return self.program(self.number)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.result = self.program(self.number)  # recorded, not yet computed
        self.graph.replay()
        return self.result


def set_up(args: Args) -> tuple[Collector, Agent, bool]:
    """Check the arguments and build what a run needs. Raises `BadInput`; writes nothing."""
    check_args(args)
    torch.set_num_threads(args.threads or min(torch.get_num_threads(), usable_cores()))
    torch.set_float32_matmul_precision("high")  # TF32 where fp32 products remain on a GPU
    count, name = torch.cuda.device_count(), args.device
    name = ("cuda" if count else "cpu") if name == "auto" else name
    if name not in ("cpu", *["cuda"] * min(count, 1), *(f"cuda:{i}" for i in range(count))):
        raise BadInput(f"--device {name}: use auto, cpu, cuda or cuda:N; CUDA devices: {count}")
    # DEVIATION 6: bf16 where it is fast; DIAMOND computes in float32. Diffusion maths stays so.
    if name == "cpu":
        supported = torch.cpu._is_avx512_bf16_supported()
    else:
        torch.cuda.set_device(torch.device(name).index or 0)
        torch.cuda.set_stream(torch.cuda.Stream())  # nothing can be recorded on the default one
        torch.backends.cudnn.benchmark = True  # times its algorithms once for each shape
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    if args.precision == "bf16" and not supported:
        raise BadInput(f"--precision bf16: this {name} has no bf16 units; use fp32 or auto")
    torch.manual_seed(args.seed)
    collector = Collector(args)
    agent = Agent(int(collector.env.action_space.n), args).to(name)
    return collector, agent, supported if args.precision == "auto" else args.precision == "bf16"


def compile_networks(agent: Agent) -> None:
    """Networks, not losses: a rollout calls the denoiser 45 times, minutes to compile."""
    denoiser = (agent.denoiser, "forward"), (agent.denoiser, "condition")
    for network, name in ((agent.encoder, "forward"), (agent.reward, "features"), *denoiser):
        setattr(network, name, torch.compile(getattr(network, name), dynamic=False))


def print_plan(args: Args, agent: Agent, bf16: bool) -> None:
    """Say what a run will do."""
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in agent.named_children()}
    epochs, device = make_schedule(args, args.first_steps_min), agent.norm.mean.device
    updates = collections.Counter(part for _, parts, _ in epochs for part in parts)
    games = sum(due for *_, due in epochs[1:]) * args.eval_episodes + 2 * args.final_episodes
    print(f"game        {args.env_id}, seed {args.seed}, preset {args.preset}")
    print(f"device      {device}, {'bf16' if bf16 else 'fp32'}, compile {args.compile}")
    cores, threads = usable_cores(), torch.get_num_threads()
    print(f"threads     {threads} on {cores} cores" + ": too many, slow" * (threads > cores))
    print("parameters ", *(f"{n} {sizes[n]:,}," for n in sizes), f"all {sum(sizes.values()):,}")
    print(f"epochs      {len(epochs):,}, {args.total_steps:,} steps of {IMAGE_SIZE**2 * 3:,} bytes")
    print("updates    ", *(f"{part} {updates[part]:,}," for part in PARTS), f"{games:,} games")


def train(args: Args) -> dict:
    """Train and evaluate one agent; returns what it writes as result.json. Its only state is the
    last checkpoint: carry on with `resume`. Raises `BadInput`, `FloatingPointError`, `OSError`."""
    begun = saved_at = time.monotonic()
    collector, agent, bf16 = set_up(args)
    optimizers = {part: make_optimizer(agent, part, args) for part in PARTS}
    replay = ReplayBuffer(int(1.1 * args.total_steps) + 1_000, agent.norm.mean.device)
    if args.compile:
        compile_networks(agent)
    steps_of = {}
    for part, optimizer in optimizers.items():
        step = functools.partial(update, agent, part, optimizer, replay, args=args, bf16=bf16)
        steps_of[part] = Recorded(step, replay, args.cuda_graphs)
    with open_run_dir(args) as (run_dir, saved):
        print(f"run folder  {run_dir}")
        print_plan(args, agent, bf16)
        state = dict(epoch=-1, first_steps=args.first_steps_min, random="", wall_seconds=0.0)
        state["updates"] = dict.fromkeys(PARTS, 0)
        if saved:
            state = {key: saved[key] for key in state}
            agent.load_state_dict(saved["agent"])
            collector.load_state_dict(saved["collector"], replay)
            # Further training after a run's last epochs goes on where it last played.
            done = make_schedule(args, state["first_steps"])[: state["epoch"] + 1]
            state["epoch"] = max(i for i, (at, *_) in enumerate(done) if at <= collector.steps)
            for part, optimizer in optimizers.items():
                optimizer.load_state_dict(saved["optimizers"][part])
            torch.set_rng_state(saved["rng"]["cpu"])
            if replay.device.type == "cuda" and saved["rng"]["cuda"] is not None:
                torch.cuda.set_rng_state(saved["rng"]["cuda"])
            print(f"resumed after epoch {state['epoch']}, {collector.steps:,} steps", flush=True)
        for path in run_dir.glob("result.json"):  # of a run that is trained further
            path.replace(run_dir / f"result_{json.loads(path.read_text())['env_steps']}.json")
        write_atomically(run_dir / "args.json", vars(args))
        if not (copy := run_dir / Path(__file__).name).exists():
            write_atomically(copy, Path(__file__).read_bytes())
        log = Log(run_dir, saved["metrics"] if saved else "")
        begun -= state["wall_seconds"]
        while state["epoch"] + 1 < len(schedule := make_schedule(args, state["first_steps"])):
            epoch = state["epoch"] = state["epoch"] + 1
            steps, parts, evaluated = schedule[epoch]
            title, games, sums = f"epoch {epoch}/{len(schedule) - 1}", [], {}
            while collector.steps < (steps or collector.first_goal()):
                games += collector.step(agent if epoch else None, replay)
            state["first_steps"] = collector.steps if epoch == 0 else state["first_steps"]
            for part in progress(parts, desc=f"{title} update"):
                found = steps_of[part](state["updates"][part])
                sums |= {(part, k): sums.get((part, k), 0) + v for k, v in found.items()}
                state["updates"][part] += 1
            metrics = {f"{p}/{k}": s.item() / parts.count(p) for (p, k), s in sums.items()}  # SYNC
            if bad := [key for key, value in metrics.items() if not math.isfinite(value)]:
                raise FloatingPointError(f"{title}: not finite: {bad}; no checkpoint holds that")
            metrics |= {f"charts/{part}_updates": n for part, n in state["updates"].items()}
            metrics["charts/episodic_return"] = np.mean(games) if games else None
            if evaluated:
                count = args.eval_episodes if epoch else args.final_episodes  # first, random play
                found = evaluate(agent, args, count, epoch, f"{title} evaluation")
                metrics |= {f"eval/{key}": found[key] for key in ("mean_return", "std_return")}
                metrics["eval/mean_length"] = np.mean(found["lengths"])
                metrics |= {f"wm/{key}": value for key, value in found["measures"].items()}
                state["random"] = state["random"] or json.dumps(found)
            metrics["time/run"] = time.monotonic() - begun
            log.write({"epoch": epoch, "charts/env_steps": collector.steps, **metrics})
            shown = [f"{key} {metrics[key]:.3g}" for key in SHOWN if metrics.get(key) is not None]
            print(title, f"{collector.steps:,} steps", *shown, sep=", ", flush=True)
            if time.monotonic() - saved_at > CHECKPOINT_SECONDS or epoch + 1 == len(schedule):
                saved_at = time.monotonic()
                state["wall_seconds"] = saved_at - begun
                content = dict(script=Path(__file__).stem, args=json.dumps(vars(args)), **state)
                content |= dict(agent=agent.state_dict(), collector=collector.state_dict())
                content["optimizers"] = {p: o.state_dict() for p, o in optimizers.items()}
                content["metrics"] = (run_dir / "metrics.jsonl").read_text()
                cuda = torch.cuda.get_rng_state() if replay.device.type == "cuda" else None
                content["rng"] = dict(cpu=torch.get_rng_state(), cuda=cuda)
                save_checkpoint(run_dir, content)
        final = evaluate(agent, args, args.final_episodes, len(schedule), "final evaluation")
        row = {f"wm/{key}": value for key, value in final["measures"].items()}
        row |= {"epoch": len(schedule), "charts/env_steps": collector.steps}
        log.write(row | {"final/mean_return": final["mean_return"]})
        state["wall_seconds"] = time.monotonic() - begun
        return write_result(run_dir, args, collector.steps, state, final, bf16)


def write_result(run_dir: Path, args: Args, steps: int, state: dict, final: dict, bf16: bool):
    """Write result.json, return it and show what was learned, on games not trained on."""
    random, measures = json.loads(state["random"]), final["measures"]
    untrained, ratio = (x["open_loop_ratio"] for x in (random["measures"], measures))
    result = {
        **dict(env_id=args.env_id, script=Path(__file__).stem, seed=args.seed, preset=args.preset),
        **dict(env_steps=steps, updates=state["updates"], environment="plain", **final),
        **dict(open_loop_ratio=ratio, open_loop_ratio_untrained=untrained, args=vars(args)),
        **dict(returns_random=random["returns"], reward_recall=measures["reward_recall"]),
        **dict(wall_seconds=state["wall_seconds"], precision="bf16" if bf16 else "fp32"),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() or None,  # of a GPU
        "device": torch.cuda.get_device_name() if torch.cuda.max_memory_allocated() else "cpu",
        "versions": {m.__name__: str(m.__version__) for m in (torch, gym, ale_py, np)},
    }
    write_atomically(run_dir / "result.json", result)
    print("prediction error / error of predicting no change, 1, 2, 3, ... imagined steps ahead:")
    print("  untrained", *(f"{x:.2f}" for x in untrained or ()))
    print("  now      ", *(f"{x:.2f}" for x in ratio or ()))
    share, seen = measures["reward_recall"], measures["rewarded_steps"]
    print("rewarded steps recognised:", f"{share:.0%} of {seen}" if seen else "none was seen")
    print(compare(random["returns"], final["returns"]))
    return result


def compare(chance: list[float], now: list[float]) -> str:
    """Mean returns of random play and the agent, with 95% intervals over games, in words."""
    (a, s), (b, t) = ((np.mean(x), np.std(x) / max(len(x) - 1, 1) ** 0.5) for x in (chance, now))
    gap = (b - a) / max(math.hypot(s, t), TINY)  # beyond 3 standard errors: p = 0.003
    sure = abs(gap) > 3 and min(len(chance), len(now)) >= 20
    verdict = ("better" if gap > 0 else "worse") if sure else "no clear difference"
    shown = [f"{m:,.2f} ({m - 2 * e:,.2f} to {m + 2 * e:,.2f})" for m, e in ((a, s), (b, t))]
    games = f"{len(chance)} and {len(now)} games"
    return f"random play {shown[0]}, this agent {shown[1]} over {games}: {verdict}"


def eval_only(args: Args) -> None:
    """Play `--final-episodes` games with a run's checkpoint; writes eval_<time>.json beside it."""
    (_, agent, _), saved = set_up(args), load_checkpoint(Path(args.eval_only))
    game = json.loads(saved["args"])["env_id"]
    if resolve_env_id(game) != resolve_env_id(args.env_id):
        raise BadInput(f"{args.eval_only} is a run of {game}; leave --env-id as it is")
    agent.load_state_dict(saved["agent"])
    rules = dict(environment="plain", **{key: getattr(args, key) for key in PROTOCOL})
    result = dict(epoch=saved["epoch"], **rules, **evaluate(agent, args, args.final_episodes, -1))
    print(f"return {result['mean_return']:.1f} +- {result['std_return']:.1f},", json.dumps(rules))
    write_atomically(Path(args.eval_only) / f"eval_{time.time_ns()}.json", result)


def parse_args(argv: list[str]) -> Args:
    """Command line -> `Args`; defaults: the preset's, or those of a run carried on or evaluated."""
    cli = functools.partial(tyro.cli, Args, prog=Path(__file__).name)
    early = cli(args=[word for word in argv if word not in ("-h", "--help")])
    default = Args(**PRESETS[early.preset] | {"preset": early.preset})
    run_dir = Path(early.eval_only or early.run_dir)
    kept = run_dir / "args.json", run_dir / "checkpoint.pt", run_dir / "checkpoint.prev.pt"
    if early.eval_only is not None or (early.resume and any(map(os.path.exists, kept))):
        default = dataclasses.replace(load_args(run_dir), run_dir="", resume=False)
    return cli(args=argv, default=default)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for bad input, 1 for a failure."""
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        if args.dry_run:
            print_plan(args, *set_up(args)[1:])
        elif args.eval_only is not None:
            eval_only(args)
        else:
            train(args)
        return 0
    except BadInput as error:
        status, text = 2, f"error: {error}"
    except KeyboardInterrupt:
        status, text = 130, "stopped; --resume carries on from the last checkpoint"
    except (OSError, FloatingPointError) as error:
        status, text = 1, f"failed: {error}"
    except (MemoryError, RuntimeError) as error:
        status, text = 1, "out of memory; try a smaller --batch-size, width or --total-steps"
        if "state_dict" in str(error):
            status, text = 2, "error: the run's networks are of another game, size or script"
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            text = f"cannot compile here, use --no-compile: {str(error).splitlines()[0]}"
        elif not isinstance(error, MemoryError) and "alloc" not in str(error).lower():
            raise
    print(f"{Path(__file__).name}: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    # A full disk strikes TensorBoard's thread, too; `main` says it.
    threading.excepthook = lambda e: issubclass(e.exc_type, OSError) or threading.__excepthook__(e)
    sys.exit(main())

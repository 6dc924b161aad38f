"""The real game and its dream, a step at a time, and the dream as a gymnasium environment.

The networks draw from PyTorch's global random generator, which threads share: use a run's scenes
from one thread, as the server does.
"""

import contextlib
import dataclasses
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from play.runs import SHOWCASE, Run, load_run

FPS = 15  # steps per second at speed 1: the console's 60 frames, 4 to a step


def recorded(replay, index: int, length: int) -> tuple[np.ndarray, list[int], int]:
    """The frame at `index` of a `ReplayBuffer` after up to `length` - 1 frames of its episode,
    (k, 64, 64, 3), the k - 1 actions between them, and the index. Nothing follows an episode's last
    frame: it gives the one before."""
    index = min(max(index, 0), replay.size - 1)
    starts = replay.starts[: replay.num_episodes]
    episode = int(torch.searchsorted(starts, index, right=True)) - 1
    start, goes_on = int(starts[episode]), replay.open and episode == len(starts) - 1
    if index == start + int(replay.lengths[episode]) - 1 and not goes_on:
        index -= 1
    first = max(start, index - length + 1)
    frames, actions = replay.frames[first : index + 1], replay.actions[first:index]
    return frames.numpy(), actions.tolist(), index


class Chance:
    """A stream of random numbers of its own. Within `with chance.drawn():` PyTorch's global
    generator is this stream; afterwards it is as it was: nobody else's draws are disturbed."""

    def __init__(self, seed: int, device: torch.device):
        self.cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(self.cuda):
            torch.manual_seed(seed)
            self.states = self.read()

    def read(self) -> list[Tensor]:
        """The generators' states, CPU first."""
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self.cuda)]

    @contextlib.contextmanager
    def drawn(self):
        """Draw from this stream."""
        with torch.random.fork_rng(self.cuda):
            torch.set_rng_state(self.states[0])
            for device, state in zip(self.cuda, self.states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
            self.states = self.read()


class Scene:
    """A game as the networks follow it, a latent at a time: a batch of one.

    `latents` are the last N = context_frames latents, `taken` the N - 1 actions between them.
    Before a game's first frame they are padding, zeros, as in training.
    """

    def __init__(self, run: Run):
        self.run = run
        self.frame: np.ndarray | None = None  # what there is to see
        self.steps, self.score, self.reward = 0, 0.0, 0.0
        self.end = self.over = False  # end: a life lost or the game; over: nothing more to play
        self.reward_probs, self.end_prob = [0.0, 1.0, 0.0], 0.0  # what R_psi made of the last step

    @torch.inference_mode()
    def begin(self, frames: np.ndarray, taken: list[int]) -> None:
        """Start from 1 to N frames (k, 64, 64, 3) uint8 and the k - 1 actions between them, as
        `imagine` does."""
        agent, n = self.run.agent, self.run.args.context_frames
        padding = n - len(frames)
        frames = np.concatenate([np.zeros((padding, *frames.shape[1:]), np.uint8), frames])
        mask = torch.arange(n, device=self.run.device)[None] >= padding
        z = agent.encode(torch.from_numpy(frames)[None].to(self.run.device), mask)
        self.latents, self.taken = list(z.unbind(1)), [0] * padding + taken
        self.policy_state = self.reward_state = None
        if n > 1:
            masked_lstm, burn_in = self.run.script.masked_lstm, mask[:, : n - 1]
            self.policy_state = masked_lstm(agent.policy.lstm, z[:, : n - 1].flatten(2), burn_in)
            features = agent.reward.features(z, self.tensor(self.taken))
            self.reward_state = masked_lstm(agent.reward.lstm, features, burn_in)
        self.look()

    def tensor(self, actions: list[int]) -> Tensor:
        """(1, k)"""
        return torch.tensor([actions], device=self.run.device)

    def look(self) -> None:
        """Let the actor-critic see the newest latent: the action probabilities, and the value."""
        policy, z = self.run.agent.policy, self.latents[-1][:, None]
        logits, values, self.policy_state = policy(z, self.policy_state)
        self.logits, self.value = logits[:, 0] / self.run.args.temperature, values.item()

    def follow(self, z: Tensor, action: int) -> None:
        """Let the networks see that `action` led to the latent z (1, 16, 8, 8)."""
        reward = self.run.agent.reward
        features = reward.features(torch.stack([self.latents[-1], z], 1), self.tensor([action]))
        hidden, self.reward_state = reward.lstm(features, self.reward_state)
        logits = reward.head(hidden)[:, 0].float()
        self.reward_logits, self.end_logits = logits.split([3, 2], dim=-1)
        self.reward_probs = self.reward_logits.softmax(-1)[0].tolist()
        self.end_prob = self.end_logits.softmax(-1)[0, 1].item()
        self.latents = [*self.latents[1:], z]
        self.taken = [*self.taken, action][1:]
        self.steps += 1
        self.look()

    def agent_action(self) -> int:
        """What the agent does here. Draws from the global generator."""
        return int(self.run.script.sample_categorical(self.logits).item())


class RealGame(Scene):
    """The game itself, in the emulator."""

    def __init__(self, run: Run, seed: int):
        super().__init__(run)
        # A person plays longer than a run that is cut short to save time.
        args = dataclasses.replace(run.args, max_episode_steps=27_000)
        self.env = run.script.make_env(args)
        self.ale = getattr(self.env.unwrapped, "ale", None)
        self.reset(seed)

    def reset(self, seed: int | None = None) -> None:
        """Start a game."""
        super().__init__(self.run)
        self.frame, _ = self.env.reset(seed=seed)
        self.begin(self.frame[None], [])

    @torch.inference_mode()
    def step(self, action: int) -> None:
        """Play one action."""
        self.frame, self.reward, terminated, truncated, info = self.env.step(action)
        frames = torch.from_numpy(self.frame)[None].to(self.run.device)
        self.follow(self.run.agent.encode(frames), action)
        self.score += self.reward
        self.end, self.over = bool(info["end"]), bool(terminated or truncated)
        if info["stop"] and not self.over:
            # A life is lost: as in training the world model starts anew; the policy plays on.
            kept = self.policy_state, self.logits, self.value
            self.begin(self.frame[None], [])
            self.policy_state, self.logits, self.value = kept

    def screen(self) -> np.ndarray | None:
        """The console's own picture, (210, 160, 3) uint8; None for games that have none."""
        return self.ale and self.ale.getScreenRGB()


class Dream(Scene):
    """The game as the world model imagines it. Rewards are signs: -1, 0 or 1. Draws from the global
    generator."""

    def begin(self, frames: np.ndarray, taken: list[int]) -> None:
        """Start from real frames."""
        super().begin(frames, taken)
        self.show()

    def take_over(self, scene: Scene) -> None:
        """Start where another scene stands."""
        for name in "latents taken policy_state reward_state logits value".split():
            setattr(self, name, getattr(scene, name))
        self.show()

    @torch.inference_mode()
    def step(self, action: int, sample_steps: int) -> None:
        """Imagine what follows `action`, with so many denoising steps."""
        script = self.run.script
        args = dataclasses.replace(self.run.args, sample_steps=sample_steps)
        context, actions = torch.stack(self.latents, 1), self.tensor([*self.taken, action])
        z = script.sample_next_latent(self.run.agent, context, actions, args)
        self.follow(z, action)
        self.reward = float(script.sample_categorical(self.reward_logits).item() - 1)
        self.end = self.over = bool(script.sample_categorical(self.end_logits).item())
        self.score += self.reward
        self.show()

    def show(self) -> None:
        """Decode the newest latent."""
        self.frame = self.run.decoder.pictures(self.latents[-1])[0]


class DreamEnv(gym.Env):
    """The dream of a run. Observations are its decoded frames, 64 x 64 x 3 uint8; rewards are -1, 0
    or 1.

    `reset` starts from frames of the run's recorded play, drawn by the seed, or ending with the
    frame number `options["frame"]`. `terminated` is drawn from the model's own prediction of an
    end; `truncated` after `max_steps`. The same seed and actions give the same dream. Also as
    gymnasium.make("play:JediDream-v0", run="runs/...").
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}

    def __init__(
        self,
        run: Run | Path | str = SHOWCASE,
        max_steps: int = 1_000,
        sample_steps: int | None = None,
        render_mode: str | None = None,
        device: str = "auto",
    ):
        self.run = run if isinstance(run, Run) else load_run(Path(run), device)
        self.max_steps, self.render_mode = max_steps, render_mode
        self.sample_steps = self.run.args.sample_steps if sample_steps is None else sample_steps
        if self.sample_steps < 1 or max_steps < 1:
            raise ValueError("max_steps and sample_steps must be at least 1")
        self.observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self.action_space = gym.spaces.Discrete(len(self.run.meanings))
        self.dream: Dream | None = None

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        """Start a dream."""
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(self.run.replay.size))
        self.chance = Chance(int(self.np_random.integers(2**63)), self.run.device)
        index, n = (options or {}).get("frame", drawn), self.run.args.context_frames
        frames, taken, index = recorded(self.run.replay, index, n)
        self.dream = Dream(self.run)
        self.dream.begin(frames, taken)
        return self.dream.frame, {"frame": index}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Imagine one step."""
        if self.dream is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        if not 0 <= action < self.action_space.n:
            raise gym.error.InvalidAction(f"{action}; use 0 to {self.action_space.n - 1}")
        dream = self.dream
        with self.chance.drawn():
            dream.step(int(action), self.sample_steps)
        truncated = not dream.over and dream.steps >= self.max_steps
        info = dict(reward_probs=dream.reward_probs, end_prob=dream.end_prob, value=dream.value)
        return dream.frame, dream.reward, dream.over, truncated, info

    def render(self) -> np.ndarray | None:
        """The frame."""
        return self.dream.frame if self.render_mode and self.dream else None


gym.register("JediDream-v0", entry_point="play:DreamEnv")

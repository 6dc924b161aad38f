"""The environment against the bare emulator, and all 26 games."""

import json
import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import replace

import jedi_atari as jedi

# Size of the minimal action set, counted with ale-py 0.12.1.
ACTIONS = dict(
    Alien=18, Amidar=10, Assault=7, Asterix=9, BankHeist=18, BattleZone=18, Boxing=18, Breakout=4, ChopperCommand=18,
    CrazyClimber=9, DemonAttack=6, Freeway=3, Frostbite=18, Gopher=8, Hero=18, Jamesbond=18, Kangaroo=18, Krull=18,
    KungFuMaster=14, MsPacman=9, Pong=6, PrivateEye=18, Qbert=6, RoadRunner=18, Seaquest=18, UpNDown=6,
)  # fmt: skip


def bare(game: str) -> gym.Env:
    return gym.make(
        f"ALE/{game}-v5",
        frameskip=1,
        repeat_action_probability=0.0,
        full_action_space=False,
        disable_env_checker=True,
    )


def area_resize(frame: np.ndarray, size: int = 64) -> np.ndarray:
    """Average of the source area under each target pixel, with exact fractions: sums of overlaps, row by column."""

    def overlaps(n):
        edges = np.arange(size + 1) * n / size
        cells = np.arange(n)
        return (
            np.clip(
                np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells),
                0,
                None,
            )
            * size
            / n
        )

    h, w, _ = frame.shape
    return np.einsum("yh,hwc,xw->yxc", overlaps(h), frame.astype(float), overlaps(w), optimize=True)


def reset_pair(game: str, args: jedi.Args, seed: int):
    """Our environment and the bare emulator, both after the same no-ops."""
    ours, emulator = jedi.make_env(replace(args, env_id=game)), bare(game)
    first, _ = ours.reset(seed=seed)
    frame, info = emulator.reset(seed=seed)
    for _ in range(emulator.unwrapped.np_random.integers(1, jedi.NOOP_MAX + 1)):
        frame, _, _, _, info = emulator.step(0)
    return ours, emulator, first, frame, info


@pytest.mark.parametrize("game", ["Breakout", "Seaquest"])
def test_against_a_naive_frame_skip_on_a_recorded_action_sequence(game, micro):
    args = replace(micro, max_episode_steps=10_000)
    ours, emulator, first, frame, info = reset_pair(game, args, seed=3)
    assert np.abs(first - area_resize(frame)).max() <= 1
    lives, rng, ends, losses = info["lives"], np.random.default_rng(0), 0, 0
    for step in range(1_500):
        action = int(rng.integers(ours.action_space.n))
        got, reward, terminated, truncated, info = ours.step(action)
        frames, total, over = [], 0.0, False
        for _ in range(4):
            frame, r, over, _, raw = emulator.step(action)
            frames.append(frame)
            total += r
            if over:
                break
        pooled = np.maximum(frames[-1], frames[-2]) if len(frames) > 1 else frames[-1]
        if step % 4 == 0:  # the slow part
            assert np.abs(got - area_resize(pooled)).max() <= 1
        assert (reward, terminated, truncated) == (total, over, False)
        fallen = raw["lives"] < lives
        assert info["end"] == info["stop"] == (fallen or over)
        losses, lives = losses + fallen, raw["lives"]
        if over:
            ends += 1
            break
    assert ends == 1 and losses >= 2


def test_same_frames_as_gymnasiums_wrapper_until_the_game_ends(micro):
    ours = jedi.make_env(replace(micro, env_id="Pong", max_episode_steps=10_000))
    theirs = gym.wrappers.AtariPreprocessing(
        bare("Pong"), noop_max=30, frame_skip=4, screen_size=64, grayscale_obs=False
    )
    a, _ = ours.reset(seed=5)
    b, _ = theirs.reset(seed=5)
    rng = np.random.default_rng(1)
    assert np.array_equal(a, b)
    for _ in range(300):
        action = int(rng.integers(6))
        a, reward, *_ = ours.step(action)
        b, other, terminated, *_ = theirs.step(action)
        assert not terminated and reward == other and np.array_equal(a, b)


def test_a_lost_life_neither_ends_the_game_nor_resets_it(micro):
    env = jedi.make_env(replace(micro, env_id="Breakout", max_episode_steps=10_000))
    env.reset(seed=0)
    rng, losses, lives = np.random.default_rng(0), 0, []
    for _ in range(3_000):
        _, _, terminated, truncated, info = env.step(int(rng.integers(4)))
        losses += info["end"]
        lives.append(info["lives"])
        if terminated:
            break
        assert not truncated
    assert terminated and losses == 5 and sorted(lives, reverse=True) == lives


def test_a_time_limit_truncates(micro):
    env = jedi.make_env(replace(micro, max_episode_steps=7))
    for _ in range(2):
        env.reset()
        steps = [env.step(0)[2:] for _ in range(7)]
        assert [step[:2] for step in steps] == [(False, False)] * 6 + [(False, True)]
        # An episode of the replay stops there, but it is no termination: nothing is learned from it.
        assert [(s[2]["end"], s[2]["stop"]) for s in steps] == [(False, False)] * 6 + [
            (False, True)
        ]


def test_only_the_first_reset_is_seeded_so_that_games_differ(micro):
    def starts(seed):
        env = jedi.make_env(replace(micro, env_id="Seaquest"))
        return [env.reset(seed=seed if i == 0 else None)[0] for i in range(4)]

    a, b, c = starts(1), starts(1), starts(2)
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(np.array_equal(x, y) for x, y in zip(a, c, strict=True))
    assert not all(np.array_equal(a[0], x) for x in a[1:])


@pytest.mark.parametrize("game", sorted(ACTIONS))
def test_all_26_games_start_step_and_report_their_actions(game, micro):
    env = jedi.make_env(replace(micro, env_id=game))
    env.reset(seed=0)
    assert env.action_space.n == ACTIONS[game]
    for action in range(env.action_space.n):
        frame, reward, terminated, truncated, info = env.step(action)
        assert frame.shape == (64, 64, 3) and frame.dtype == np.uint8 and isinstance(reward, float)
        assert not info["end"] and not info["stop"]
    assert frame.std() > 0 and env.observation_space.contains(frame)


@pytest.mark.parametrize(
    "spelling", ["Pong", "ALE/Pong-v5", "PongNoFrameskip-v4", "Pong-v5", "PongDeterministic-v4"]
)
def test_spellings_of_a_game(spelling):
    assert jedi.resolve_env_id(spelling) == ("ALE/Pong-v5", "Pong")


@pytest.mark.parametrize("typed", ["Pnog", "MsPackman", "", "Pong/../../etc", "CartPole-v99"])
def test_an_unknown_game_is_refused_by_its_name(micro, typed):
    with pytest.raises(jedi.BadInput) as error:
        jedi.make_env(replace(micro, env_id=typed))
    assert f"--env-id {typed!r}" in str(error.value) and "\n" not in str(error.value)


class Toy(gym.Env):
    """An environment of one's own."""

    def __init__(self, observation=None, action=None):
        self.observation_space = observation or gym.spaces.Box(0, 255, (32, 48, 3), np.uint8)
        self.action_space = action or gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 1.0, False, False, {}


def test_an_environment_of_ones_own(micro, monkeypatch):
    monkeypatch.setitem(
        gym.registry, "Toy-v0", gym.envs.registration.EnvSpec("Toy-v0", entry_point=Toy)
    )
    env = jedi.make_env(replace(micro, env_id="Toy-v0"))
    frame, info = env.reset(seed=0)
    assert frame.shape == (64, 64, 3)
    _, reward, *_, info = env.step(0)
    assert reward == 1.0 and not info["end"]  # one step is one step: no frame skip


class Reusing(gym.Env):
    """It draws each frame into the same memory and hands that out."""

    observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def __init__(self):
        self.picture, self.t = np.zeros((64, 64, 3), np.uint8), 0

    def show(self):
        self.picture[:] = self.t
        return self.picture

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t += 1
        return self.show(), {}

    def step(self, action):
        self.t += 1
        return self.show(), 0.0, self.t % 7 == 0, False, {}


def test_an_environment_that_reuses_its_memory_is_recorded_right(micro, monkeypatch):
    spec = gym.envs.registration.EnvSpec("Reusing-v0", entry_point=Reusing)
    monkeypatch.setitem(gym.registry, "Reusing-v0", spec)
    collector = jedi.Collector(replace(micro, env_id="Reusing-v0"))
    replay = jedi.ReplayBuffer(100, torch.device("cpu"))
    for _ in range(20):
        collector.step(None, replay, 0)
    shown = replay.frames[: replay.size, 5, 5, 0].tolist()
    assert shown == list(range(1, replay.size + 1))  # each frame once, in order
    assert (replay.frames[: replay.size].flatten(1).float().std(1) == 0).all()


@pytest.mark.parametrize(
    ("observation", "action", "says"),
    [
        (gym.spaces.Box(0, 255, (64, 64, 1), np.uint8), None, "RGB frames"),
        (gym.spaces.Box(-1, 1, (4,), np.float32), None, "RGB frames"),
        (None, gym.spaces.Box(-1, 1, (2,), np.float32), "Discrete"),
    ],
)
def test_unsupported_environments_are_refused(micro, monkeypatch, observation, action, says):
    spec = gym.envs.registration.EnvSpec("Toy-v0", entry_point=lambda: Toy(observation, action))
    monkeypatch.setitem(gym.registry, "Toy-v0", spec)
    with pytest.raises(jedi.BadInput, match=says):
        jedi.Collector(replace(micro, env_id="Toy-v0"))


def test_a_name_that_the_module_does_not_know_brings_those_that_it_does(micro):
    assert jedi.make_env(replace(micro, env_id="examples.toys:Catch")).spec.id == "Catch-v0"
    with pytest.raises(jedi.BadInput) as error:
        jedi.make_env(replace(micro, env_id="examples.toys:Cach-v0"))
    assert str(error.value).endswith("Known there: Catch-v0, DriftingCatch-v0")


class Odd(gym.Env):
    """A game of 12 steps: with a reward that is no number, a picture that stands still, another generator."""

    observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = gym.spaces.Discrete(3)

    def __init__(self, reward=1.0, still=False):
        self.reward, self.still = reward, still

    def reset(self, *, seed=None, options=None):
        super().reset()
        if seed is not None:
            self.np_random = np.random.Generator(np.random.MT19937(seed))
        self.t = 0
        return self.picture(), {}

    def picture(self):
        noise = self.np_random.integers(256, size=(64, 64, 3), dtype=np.uint8)
        return np.full_like(noise, 7) if self.still else noise

    def step(self, action):
        self.t += 1
        return self.picture(), self.reward if self.t == 5 else 0.0, self.t == 12, False, {}


def register(monkeypatch, name: str, **options) -> str:
    spec = gym.envs.registration.EnvSpec(f"{name}-v0", entry_point=lambda: Odd(**options))
    monkeypatch.setitem(gym.registry, f"{name}-v0", spec)
    return f"{name}-v0"


@pytest.mark.parametrize("kind", ["floats", "grey", "four channels", "dictionary"])
def test_frames_that_are_not_what_the_space_says_are_refused(micro, monkeypatch, kind):
    """Floats from 0 to 1 would become black bytes without a word."""
    change = {
        "floats": lambda frame: frame / 255,
        "grey": lambda frame: frame[..., 0],
        "four channels": lambda frame: frame.repeat(2, axis=2)[..., :4],
        "dictionary": lambda frame: {"rgb": frame},
    }[kind]
    step = Odd.step
    monkeypatch.setattr(
        Odd, "step", lambda self, a: (change((found := step(self, a))[0]), *found[1:])
    )
    collector = jedi.Collector(replace(micro, env_id=register(monkeypatch, "Odd")))
    with pytest.raises(jedi.BadInput, match="not uint8 RGB frames"):
        collector.step(None, jedi.ReplayBuffer(9, torch.device("cpu")))


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_a_reward_that_is_no_number_is_refused(micro, monkeypatch, reward):
    env = jedi.make_env(replace(micro, env_id=register(monkeypatch, "Odd", reward=reward)))
    env.reset(seed=0)
    for _ in range(4):
        env.step(0)
    says = re.escape(f"a reward of {reward}; it must be a finite number")
    with pytest.raises(jedi.BadInput, match=says):
        env.step(0)


def test_an_environment_with_another_generator_resumes(micro, monkeypatch):
    args = replace(micro, env_id=register(monkeypatch, "Odd"))
    collector, replay = jedi.Collector(args), jedi.ReplayBuffer(100, torch.device("cpu"))
    for _ in range(40):
        collector.step(None, replay)
    again, other = jedi.Collector(args), jedi.ReplayBuffer(100, torch.device("cpu"))
    again.load_state_dict(collector.state_dict(), other)
    assert torch.equal(other.frames, replay.frames) and replay.frames.float().std() > 10


def test_a_still_picture_has_no_measures_and_valid_json(micro, monkeypatch, tmp_path):
    """What is measured over nothing is null: nothing changes, no reward is to be recognised."""
    game = register(monkeypatch, "Still", still=True, reward=0.0)
    jedi.train(replace(micro, env_id=game, run_dir=str(tmp_path / "r")))

    def no(constant):
        raise AssertionError(f"{constant} is no JSON")

    result = json.loads((tmp_path / "r" / "result.json").read_text(), parse_constant=no)
    measures = result["measures"]
    assert result["open_loop_ratio"] is None and measures["latent_effective_rank"] is None
    assert measures["reward_recall"] is None and measures["reward_prob_1"] is None
    for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line, parse_constant=no)
        assert "wm/open_loop_ratio_1" not in row and "wm/latent_effective_rank" not in row

"""Shared by all tests: the import path, one thread (so that results do not depend on the machine), tiny arguments."""

import dataclasses
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jedi_atari as jedi  # noqa: E402

# A whole run in seconds: every part of the program, far too small to learn.
MICRO = dict(
    preset="tiny",
    threads=1,
    eval_every=2,
    eval_episodes=1,
    final_episodes=3,
    max_episode_steps=40,
    total_steps=130,
    first_steps_min=70,
    first_steps_max=90,
    first_diffusion_updates=6,
    first_reward_updates=4,
    first_policy_updates=2,
    epoch_steps=20,
    diffusion_updates=2,
    reward_updates=1,
    policy_updates=1,
    final_epochs=1,
    batch_size=3,
    encoder_width=8,
    denoiser_width=16,
    cond_dim=32,
    reward_width=8,
    lstm_size=16,
    reward_window=3,
    horizon=3,
    warmup_updates=2,
)
# Half the time, where neither the sampler's steps nor many games matter.
SMALL = MICRO | dict(max_episode_steps=25, final_episodes=1, sample_steps=1, encoder_stride=2)

# The files that take longest come first, so that two workers end together; the others take less than half a minute.
LONG = "test_resume test_benchmark test_play_browser test_run test_play test_gpu_check".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


def command_line(args: dict) -> list[str]:
    """Arguments as words of the command line."""
    words = ((f"--{name.replace('_', '-')}", str(value)) for name, value in args.items())
    return [word for pair in words for word in pair]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_signal_is_ignored():
    """Under nohup the tests ignore SIGHUP, in a script's background SIGINT; a child inherits that, and a shell cannot
    trap what was ignored when it began."""
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)


@pytest.fixture
def micro() -> jedi.Args:
    """Arguments of a run that takes seconds."""
    return jedi.Args(**MICRO)


@pytest.fixture
def agent(micro) -> jedi.Agent:
    """A small agent whose zero-initialised layers are not zero, so that every path carries a signal."""
    return random_agent(micro, num_actions=5)


def random_agent(args: jedi.Args, num_actions: int, seed: int = 0) -> jedi.Agent:
    torch.manual_seed(seed)
    network = jedi.Agent(num_actions, args)
    for parameter in network.parameters():
        if not parameter.detach().any():
            parameter.data.copy_(torch.empty(parameter.shape).normal_(std=0.3))  # by no stride
    return network


def random_windows(
    args: jedi.Args, length: int, batch: int = 4, num_actions: int = 5, seed: int = 1
) -> jedi.Windows:
    """Windows of noise, all real."""
    g = torch.Generator().manual_seed(seed)
    return jedi.Windows(
        torch.randint(256, (batch, length, 64, 64, 3), generator=g, dtype=torch.uint8),
        torch.randint(num_actions, (batch, length), generator=g),
        torch.randint(-1, 2, (batch, length), generator=g).float(),
        torch.rand((batch, length), generator=g) < 0.2,
        torch.ones(batch, length, dtype=torch.bool),
    )


def own_update(agent, part: str, optimizer, batch, number: int, args: jedi.Args) -> dict:
    """`jedi.update` on a batch of one's own."""
    replay = SimpleNamespace(
        device=torch.device("cpu"),
        sample_frames=lambda *_: batch,
        sample_transitions=lambda *_: batch,
    )
    return jedi.update(agent, part, optimizer, replay, number, args, False)


def replace(args: jedi.Args, **changes) -> jedi.Args:
    return dataclasses.replace(args, **changes)

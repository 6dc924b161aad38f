"""The replay buffer against a plain list of episodes."""

import numpy as np
import pytest
import torch

import jedi_atari as jedi

CPU = torch.device("cpu")


def picture(episode: int, step: int) -> np.ndarray:
    """A frame that says which it is."""
    frame = np.full((64, 64, 3), 7, np.uint8)
    frame[0, 0] = (episode, step // 200, step % 200)
    return frame


def named(frame: torch.Tensor) -> tuple[int, int]:
    episode, high, low = frame[0, 0].tolist()
    return episode, high * 200 + low


def fill(
    buffer: jedi.ReplayBuffer, lengths: list[int], seed: int = 0, open_steps: int = 0
) -> list[list[tuple]]:
    """Play made up of episodes of these lengths (and an open one); returns it as lists of (action, reward, end)."""
    rng, episodes = np.random.default_rng(seed), []
    for number, length in enumerate(lengths + ([open_steps] if open_steps else [])):
        closed, episode = number < len(lengths), []
        for step in range(length):
            last = closed and step == length - 1
            action, reward, end = (
                int(rng.integers(5)),
                float(rng.integers(-2, 3)),
                last and number % 2 == 0,
            )
            buffer.add(
                picture(number, step),
                action,
                reward,
                end,
                picture(number, length) if last else None,
            )
            episode.append((action, reward, end))
        episodes.append(episode)
    return episodes


def check_row(
    windows: jedi.Windows, row: int, episodes: list[list[tuple]], transitions: bool
) -> tuple[int, int, int]:
    """Every real step of a row is what the list says; padding is zero. Returns episode, first step and real steps."""
    mask = windows.mask[row]
    real = torch.nonzero(mask).flatten().tolist()
    assert real and real == list(range(real[0], real[-1] + 1))
    episode, first = named(windows.frames[row, real[0]])
    for offset, t in enumerate(real):
        assert named(windows.frames[row, t]) == (episode, first + offset)
        if first + offset < len(episodes[episode]):
            action, reward, end = episodes[episode][first + offset]
            assert windows.actions[row, t] == action
            assert windows.rewards[row, t] == reward
            assert windows.ends[row, t] == end
    shown = real + ([real[-1] + 1] if transitions else [])
    for t in set(range(windows.frames.shape[1])) - set(shown):
        assert not windows.frames[row, t].any() and not windows.actions[row, t]
        assert not windows.rewards[row, t] and not windows.ends[row, t]
    if transitions:
        assert named(windows.frames[row, real[-1] + 1]) == (episode, first + len(real))
    return episode, first, len(real)


LENGTHS = [1, 3, 12, 30, 2, 25, 40, 7]


def test_frame_windows_against_the_list():
    torch.manual_seed(0)
    buffer = jedi.ReplayBuffer(500, CPU)
    episodes = fill(buffer, LENGTHS, open_steps=9)
    seen, short = set(), 0
    for _ in range(60):
        windows = buffer.sample_frames(32, 6, final=True)
        assert windows.mask[:, -1].all()  # padding is at the beginning only
        for row in range(32):
            episode, first, count = check_row(windows, row, episodes, transitions=False)
            short += count < 6
            assert count == 6 or first == 0
            seen |= {(episode, first + i) for i in range(count)}
    # Every frame of every episode turns up, each closed episode's final frame too.
    closed = {(e, t) for e, n in enumerate(LENGTHS) for t in range(n + 1)}
    assert seen == closed | {(len(LENGTHS), t) for t in range(9)}
    assert short


def test_policy_windows_never_end_on_a_final_frame():
    torch.manual_seed(0)
    buffer = jedi.ReplayBuffer(500, CPU)
    episodes = fill(buffer, LENGTHS)
    for _ in range(40):
        windows = buffer.sample_frames(32, 4, final=False)
        for row in range(32):
            episode, first, count = check_row(windows, row, episodes, transitions=False)
            assert first + count - 1 < LENGTHS[episode]


def test_transition_windows_against_the_list():
    torch.manual_seed(0)
    buffer = jedi.ReplayBuffer(500, CPU)
    episodes = fill(buffer, LENGTHS, open_steps=9)
    lengths, seen, beyond = (
        [*LENGTHS, 8],
        set(),
        0,
    )  # the open episode's newest step has no next frame yet
    for _ in range(80):
        windows = buffer.sample_transitions(32, 5)
        assert windows.frames.shape[1] == 6 and windows.mask.shape[1] == 5
        assert windows.mask[:, 0].all()  # a window is moved to begin with a real step
        full = windows._replace(
            mask=torch.cat([windows.mask, torch.zeros(32, 1, dtype=torch.bool)], 1)
        )
        for row in range(32):
            episode, first, count = check_row(full, row, episodes, transitions=True)
            beyond += count < 5
            seen |= {(episode, first + i) for i in range(count)}
            assert first + count <= lengths[episode]
    assert seen == {(e, t) for e, n in enumerate(lengths) for t in range(n)}
    assert beyond


def episodes_drawn(buffer: jedi.ReplayBuffer, count: int) -> torch.Tensor:
    """The share of each episode in sampled windows, read off the pictures' first pixels alone."""
    pixels = buffer.frames
    buffer.frames = pixels[:, :1, :1]
    newest = buffer.sample_frames(count, 1, final=False).frames[:, 0, 0, 0, 0]
    buffer.frames = pixels
    return torch.bincount(newest.long(), minlength=buffer.num_episodes) / count


def test_each_quarter_of_the_episodes_gets_its_weight():
    torch.manual_seed(0)
    buffer = jedi.ReplayBuffer(500, CPU)
    fill(buffer, [3, 30, 3, 3, 9, 3, 20, 3, 3, 3, 3])  # quarters of 2, 2, 2 and the newest 5
    drawn = episodes_drawn(buffer, 100_000)
    expected = torch.tensor([0.05] * 6 + [0.14] * 5)
    torch.testing.assert_close(drawn, expected, atol=0.005, rtol=0)


def test_fewer_than_four_episodes_are_drawn_by_their_length():
    torch.manual_seed(0)
    buffer = jedi.ReplayBuffer(500, CPU)
    fill(buffer, [10, 30], open_steps=1)  # the open one has no complete transition yet
    drawn = episodes_drawn(buffer, 50_000)
    torch.testing.assert_close(drawn, torch.tensor([0.25, 0.75, 0.0]), atol=0.01, rtol=0)


@pytest.mark.parametrize(("length", "stride"), [(9, 1), (4, 3), (2, 1), (31, 7), (100, 1)])
@pytest.mark.parametrize("rewarded", [False, True])
def test_all_windows_against_the_list(length, stride, rewarded):
    """Backward from each episode's end, final frame included; all real."""
    buffer = jedi.ReplayBuffer(500, CPU)
    episodes = fill(buffer, LENGTHS, open_steps=9)
    windows = buffer.all_windows(length, stride, rewarded=rewarded)
    expected = []
    for number, episode in enumerate(episodes):
        frames = len(episode) + (number < len(LENGTHS))
        for start in range(frames - length, -1, -stride):
            if not rewarded or episode[start + length - 2][1]:
                expected.append((number, start))
    assert [named(frames[0]) for frames in windows.frames] == expected
    assert windows.mask.all() and windows.mask.shape == (len(expected), length)
    for row in range(len(expected)):
        check_row(windows, row, episodes, transitions=False)


def test_so_many_windows_at_most_and_from_everywhere():
    buffer = jedi.ReplayBuffer(500, CPU)
    fill(buffer, LENGTHS)
    every = [named(f[0]) for f in buffer.all_windows(9, stride=1).frames]
    few = [named(f[0]) for f in buffer.all_windows(9, stride=1, count=5).frames]
    assert len(few) == 5 and few[0] == every[0] and few[-1] == every[-1]
    places = [every.index(start) for start in few]
    assert max(places[i + 1] - places[i] for i in range(4)) <= len(every) / 4 + 1


def arrays(buffer: jedi.ReplayBuffer) -> list[torch.Tensor]:
    steps = [getattr(buffer, n)[: buffer.size] for n in ("frames", "actions", "rewards", "ends")]
    return steps + [getattr(buffer, n)[: buffer.num_episodes] for n in ("starts", "lengths")]


def test_it_grows_when_episodes_are_very_short():
    small, large = jedi.ReplayBuffer(10, CPU), jedi.ReplayBuffer(500, CPU)
    fill(small, LENGTHS)
    fill(large, LENGTHS)
    assert all(torch.equal(a, b) for a, b in zip(arrays(small), arrays(large), strict=True))

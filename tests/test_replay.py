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
            if rng.random() < 0.3:
                buffer.flush()  # in the middle of episodes too
        episodes.append(episode)
    buffer.flush()
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


def test_each_quarter_of_the_episodes_gets_its_weight():
    torch.manual_seed(0)
    buffer = jedi.ReplayBuffer(500, CPU)
    fill(buffer, [3, 30, 3, 3, 9, 3, 20, 3, 3, 3, 3])  # quarters of 2, 2, 2 and the newest 5
    drawn = torch.bincount(buffer._draw_episodes(100_000), minlength=11) / 100_000
    expected = torch.tensor([0.05] * 6 + [0.14] * 5)
    torch.testing.assert_close(drawn, expected, atol=0.005, rtol=0)


def test_fewer_than_four_episodes_are_drawn_by_their_length():
    torch.manual_seed(0)
    buffer = jedi.ReplayBuffer(500, CPU)
    fill(buffer, [10, 30], open_steps=1)  # the open one has no complete transition yet
    drawn = torch.bincount(buffer._draw_episodes(50_000), minlength=3) / 50_000
    torch.testing.assert_close(drawn, torch.tensor([0.25, 0.75, 0.0]), atol=0.01, rtol=0)


def test_all_windows_are_all_there_are():
    buffer = jedi.ReplayBuffer(500, CPU)
    fill(buffer, LENGTHS)
    windows = buffer.all_windows(9, stride=1)
    assert windows.mask.all() and len(windows.frames) == sum(max(0, n + 1 - 9 + 1) for n in LENGTHS)
    assert not len(buffer.all_windows(100, stride=1).frames)
    assert len(buffer.all_windows(9, stride=1, count=5).frames) == 5
    rewarded = buffer.all_windows(4, stride=1, rewarded=True)
    assert (rewarded.rewards[:, -2] != 0).all()
    assert len(rewarded.frames) == (buffer.all_windows(4, stride=1).rewards[:, -2] != 0).sum()


def arrays(buffer: jedi.ReplayBuffer) -> list[torch.Tensor]:
    steps = [getattr(buffer, n)[: buffer.size] for n in ("frames", "actions", "rewards", "ends")]
    return steps + [getattr(buffer, n)[: buffer.num_episodes] for n in ("starts", "lengths")]


@pytest.mark.parametrize("open_steps", [0, 9])
def test_the_file_brings_everything_back(tmp_path, open_steps):
    path = tmp_path / "replay.bin"
    buffer = jedi.ReplayBuffer(500, CPU, path)
    fill(buffer, LENGTHS, open_steps=open_steps)
    again = jedi.ReplayBuffer(500, CPU, path)
    again.load(buffer.size)
    assert all(torch.equal(a, b) for a, b in zip(arrays(buffer), arrays(again), strict=True))
    assert again.open == buffer.open == bool(open_steps)


def test_a_replay_newer_than_the_checkpoint_is_cut_to_it(tmp_path):
    path = tmp_path / "replay.bin"
    buffer = jedi.ReplayBuffer(500, CPU, path)
    fill(buffer, [5, 6])
    size, before = buffer.size, [a.clone() for a in arrays(buffer)]
    buffer.add(picture(2, 0), 1, 0.0, False)
    buffer.flush()
    again = jedi.ReplayBuffer(500, CPU, path)
    again.load(size)
    assert all(torch.equal(a, b) for a, b in zip(before, arrays(again), strict=True))
    assert path.stat().st_size == size * jedi.ReplayBuffer.RECORD.itemsize


def test_a_short_or_altered_file_is_noticed(tmp_path):
    path = tmp_path / "replay.bin"
    buffer = jedi.ReplayBuffer(500, CPU, path)
    fill(buffer, [5, 6])
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-1])
    with pytest.raises(jedi.BadInput, match="cut short"):
        jedi.ReplayBuffer(500, CPU, path).load(buffer.size)
    content[3 * jedi.ReplayBuffer.RECORD.itemsize + 5_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(jedi.BadInput, match="record 3 "):
        jedi.ReplayBuffer(500, CPU, path).load(buffer.size)


def test_it_grows_when_episodes_are_very_short():
    small, large = jedi.ReplayBuffer(10, CPU), jedi.ReplayBuffer(500, CPU)
    fill(small, LENGTHS)
    fill(large, LENGTHS)
    assert all(torch.equal(a, b) for a, b in zip(arrays(small), arrays(large), strict=True))


@pytest.mark.parametrize("length", [1, 4, 9, 60])
def test_tiled_transitions_hold_each_transition_once(length):
    """Also those at the end of an episode, and those of episodes shorter than a window; against the plain list."""
    buffer = jedi.ReplayBuffer(500, CPU)
    episodes = fill(buffer, LENGTHS, open_steps=7)
    windows = buffer.tiled_transitions(length)
    assert windows.frames.shape[1] == length + 1 and windows.mask.shape[1] == length
    seen = []
    for i, t in windows.mask.nonzero().tolist():
        episode, step = named(windows.frames[i, t])
        assert named(windows.frames[i, t + 1]) == (episode, step + 1)
        action, reward, end = episodes[episode][step]
        assert (windows.actions[i, t], windows.rewards[i, t], windows.ends[i, t]) == (
            action,
            reward,
            end,
        )
        seen.append((episode, step))
    # The open episode's newest step has no frame after it yet.
    expected = [(e, t) for e, n in enumerate([*LENGTHS, 7 - 1]) for t in range(n)]
    assert sorted(seen) == sorted(expected)


def test_reward_skill_counts_every_reward_and_end(micro):
    """Whatever the lengths of the episodes are."""
    buffer = jedi.ReplayBuffer(500, CPU)
    episodes = fill(buffer, LENGTHS)
    skill = jedi.reward_skill(jedi.Agent(6, micro), buffer, micro)
    assert skill["rewarded_steps"] == sum(
        reward != 0 for episode in episodes for _, reward, _ in episode
    )
    assert (
        skill["end_recall"] == 0 and skill["end_precision"] is None
    )  # at first it takes nothing for an end

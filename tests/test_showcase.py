"""The showcase: what is measured of Pong is what the emulator knows, and the shipped dream obeys."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import ROOT

import jedi_atari as jedi
from examples import showcase
from play.runs import SHOWCASE, load_run


@pytest.fixture(scope="module")
def run():
    return load_run(SHOWCASE, "cpu", 1)


def test_ball_and_paddle_are_found_where_the_emulator_has_them():
    """Bytes 49 and 54 of Pong's memory are the ball's place, 51 the paddle's height."""
    collector = jedi.Collector(jedi.Args(env_id="Pong", max_episode_steps=27_000))
    replay, memory, frames = jedi.ReplayBuffer(3_000, torch.device("cpu")), [], []
    step = collector.env.step

    def watched(action):
        result = step(action)
        memory.append(collector.env.unwrapped.ale.getRAM()[[54, 49, 51]].astype(float))
        frames.append(result[0])
        return result

    collector.env.step = watched
    showcase.play(collector, replay, 1_500, seed=0)
    memory, frames = np.array(memory), np.array(frames)
    seen, place = showcase.find_ball(frames)
    assert 0.2 < seen.mean() < 0.9
    for axis in range(2):
        assert np.corrcoef(memory[seen, axis], place[seen, axis])[0, 1] > 0.98
    there, paddle = showcase.find_paddle(frames)
    assert there.mean() > 0.8 and np.corrcoef(memory[there, 2], paddle[there, 0])[0, 1] > 0.95


def test_the_player_after_the_ball_wins_more_points_than_the_one_at_random():
    """A game of each, the first at random."""
    collector = jedi.Collector(jedi.Args(env_id="Pong", max_episode_steps=27_000))
    replay = jedi.ReplayBuffer(8_000, torch.device("cpu"))
    showcase.play(collector, replay, 4_000, seed=0)
    first = int(replay.lengths[0])
    won = [(part > 0).sum() for part in (replay.rewards[:first], replay.rewards[first:])]
    assert won[1] > 2 * won[0]


def test_the_shipped_dream_obeys_and_its_decoder_shows_the_ball(run):
    """A tenth of the starts of play/showcase/README.md."""
    found = showcase.measure(run, starts=10)
    assert found["ball/decoded"] >= 0.95 and found["paddle/decoded"] >= 0.95
    assert found["paddle/near_50"] >= 0.8 and found["wm/open_loop_ratio_15"] < 0.8
    assert run.open_loop[14] < 0.5 and len(run.open_loop) == 50


def test_its_weights_are_small(run):
    assert sum(path.stat().st_size for path in SHOWCASE.iterdir()) < 15e6
    assert all(x.dtype == torch.float16 for x in run.saved["agent"].values())


def test_bad_input(run, tmp_path, capsys):
    def refused(*arguments) -> str:
        assert showcase.main([str(a) for a in arguments]) == 2
        line, end = capsys.readouterr().err.split("\n")
        assert line.startswith("examples.showcase: error: ") and not end
        return line

    assert "is not empty" in refused(ROOT / "tests")
    assert "Not a directory" in refused(ROOT / "README.md")
    assert "there is no folder" in refused("--measure", tmp_path / "gone")
    other = dataclasses.replace(run, args=dataclasses.replace(run.args, env_id="Breakout"))
    with pytest.raises(jedi.BadInput, match="only Pong's ball is known"):
        showcase.measure(other)

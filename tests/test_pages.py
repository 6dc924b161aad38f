"""docs/metrics.md has a line for each number that a run logs, and for no other; docs/notebook.md runs."""

import json
import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import MICRO, ROOT

import jedi_atari as jedi


class Everything(gym.Env):
    """A game in which each measure has something to count: rewards, ends, and long episodes."""

    metadata = {"render_modes": []}
    observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = gym.spaces.Discrete(3)
    length = 27  # longer than a window of the open-loop error

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.frame(), {}

    def step(self, action):
        self.time += 1
        return self.frame(), float(self.time % 4 == 0), self.time == self.length, False, {}

    def frame(self):
        return np.full((64, 64, 3), 8 * self.time, np.uint8)


def program_of(page: str) -> str:
    """The one Python program of a page."""
    text = (ROOT / "docs" / page).read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    return program


def documented() -> set[str]:
    """The keys in the first column of the page's tables; <k> is each of the numbers beside it."""
    keys = set()
    for cell in re.findall(r"^\| (`[^|]*) \|", (ROOT / "docs/metrics.md").read_text(), re.M):
        ks = re.findall(r"\d+", cell) or [""]
        if " to " in cell:
            ks = range(int(ks[0]), int(ks[1]) + 1)
        names = re.findall("`([^`]+)`", cell)
        keys |= {name.replace("<k>", str(k)) for name in names for k in ks}
    return keys


def test_each_metric_has_a_line(tmp_path, monkeypatch):
    gym.register("Everything-v0", Everything)
    init = jedi.RewardTerminationModel.__init__

    def sees_ends(model, *args):
        # Or no step would be taken for an end, and precision had nothing to count.
        init(model, *args)
        model.head[-1].bias.data[4] = 4.0

    monkeypatch.setattr(jedi.RewardTerminationModel, "__init__", sees_ends)
    changes = dict(env_id="Everything-v0", max_episode_steps=100, total_steps=110, final_epochs=0)
    jedi.train(jedi.Args(**MICRO | changes | dict(final_episodes=2, run_dir=str(tmp_path / "run"))))
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    found = {key for row in rows for key in json.loads(row)}
    assert found == documented(), "docs/metrics.md: one line `| key | meaning | healthy |` for each"


def test_the_notebook_runs(monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot", reason="install play/requirements.txt")
    plt.switch_backend("Agg")
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)  # of the play
    program = program_of("notebook.md")
    exec(compile(program, "docs/notebook.md", "exec"), made := {})
    assert made["dreamed"].shape == (1, 16, 8, 8) and len(plt.gcf().axes) == 3
    real, dreamed, norm = (np.asarray(picture, float) for picture in made["pictures"])
    assert np.abs(real - dreamed).mean() < 5 and norm.shape == (8, 8)  # of 255
    assert len(program.splitlines()) <= 16
    plt.close("all")


def test_a_checkpoint_alone_gives_the_agent(monkeypatch):
    program = program_of("reliability.md").replace("runs/Pong__...", "play/showcase")
    monkeypatch.chdir(ROOT)
    exec(compile(program, "docs/reliability.md", "exec"), made := {})
    assert sum(p.numel() for p in made["agent"].parameters()) > 2_000_000

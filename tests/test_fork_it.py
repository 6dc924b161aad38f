"""docs/fork_it.md: its changes apply to the script as it is, and what they make of it keeps what the page says."""

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import MICRO, ROOT, command_line
from gymnasium.utils.env_checker import check_env

import jedi_atari as jedi

PAGE = (ROOT / "docs" / "fork_it.md").read_text()
PATCHES = {path.stem: path for path in sorted((ROOT / "docs" / "fork_it").glob("*.patch"))}
GAMES = {
    "minigrid": "MiniGrid-Empty-Random-5x5-v0",
    "my_game": "my_game:Apples-v0",
}  # the others play Pong


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


def commands() -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in "".join(blocks("bash")).splitlines()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function that applies a patch to a copy of the script in a folder of its own; one folder for each patch."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    made = {}

    def folder(name: str):
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            shutil.copy(ROOT / "jedi_atari.py", path)
            # Should the folder lie in a repository, git would take the patch's paths as that repository's.
            environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(path.parent)}
            command = ["git", "apply", "--verbose", str(PATCHES[name])]
            done = subprocess.run(
                command, cwd=path, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{name}.patch does not apply any more:\n{done.stderr}"
            made[name] = path
        return made[name]

    return folder


@pytest.fixture
def fork(folders, monkeypatch):
    """A function that imports the script as a patch leaves it."""

    def load(name: str):
        if name == "minigrid":
            pytest.importorskip(
                "minigrid.wrappers",
                reason="minigrid is not installed (with pygame, which it needs)",
            )
        folder = folders(name)
        monkeypatch.syspath_prepend(str(folder))
        spec = importlib.util.spec_from_file_location(f"fork_{name}", folder / "jedi_atari.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(
            sys.modules, spec.name, module
        )  # dataclasses look their module up there
        spec.loader.exec_module(module)
        return module

    yield load
    sys.modules.pop("my_game", None)
    gym.registry.pop("Apples-v0", None)


# --- the page


def test_the_page_shows_each_patch_as_it_is():
    assert len(PATCHES) == 5
    assert sorted(blocks("diff")) == sorted(path.read_text() for path in PATCHES.values())
    assert all(f"`git apply docs/fork_it/{name}.patch`" in PAGE for name in PATCHES)
    assert len(PAGE.splitlines()) < 265


def test_the_page_counts_the_lines_of_each_patch():
    text = " ".join(PAGE.split())
    for name, path in PATCHES.items():
        lines = path.read_text().splitlines()[2:]
        added, removed = (sum(line.startswith(sign) for line in lines) for sign in "+-")
        assert f"`git apply docs/fork_it/{name}.patch` (+{added} −{removed})" in text, (
            name,
            added,
            removed,
        )


def test_its_commands_are_understood():
    assert len(commands()) >= 3
    for program, script, *argv in commands():
        assert (program, script) == ("python", "jedi_atari.py")
        jedi.check_args(jedi.parse_args(argv))


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_has_little_context(name):
    """One line on each side of a change: an edit elsewhere in the script does not touch it."""
    for hunk in re.split(r"^@@.*\n", PATCHES[name].read_text(), flags=re.M)[1:]:
        kept = [line[:1] in (" ", "") for line in hunk.splitlines()]
        assert not any(kept[i] and kept[i + 1] and kept[i + 2] for i in range(len(kept) - 2))
        assert kept[:2] != [True, True] and kept[-2:] != [True, True]


# --- the forks


@pytest.mark.parametrize("name", PATCHES)
def test_a_fork_is_clean(name, folders):
    for check in (["check"], ["format", "--check"]):
        command = [
            sys.executable,
            "-m",
            "ruff",
            *check,
            "--no-cache",
            "--config",
            str(ROOT / "pyproject.toml"),
            ".",
        ]
        done = subprocess.run(command, cwd=folders(name), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", PATCHES)
def test_a_fork_runs_from_beginning_to_end(name, fork, tmp_path, capsys):
    script = fork(name)
    changes = {"env_id": GAMES.get(name, "Pong"), "run_dir": tmp_path / "run"}
    changes |= dict(max_episode_steps=12, total_steps=100, final_epochs=0, final_episodes=2)
    if name == "one_step":
        changes["preset"] = "one_step"
    assert script.main(command_line(MICRO | changes)) == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["env_steps"] == 100 and len(result["returns"]) == 2
    assert result["args"]["preset"] == ("one_step" if name == "one_step" else "tiny")
    assert (tmp_path / "run" / "jedi_atari.py").read_text() == (
        ROOT / "jedi_atari.py"
    ).read_text() or name != "my_game"


def test_minigrid_shows_the_whole_grid(fork):
    script = fork("minigrid")
    env = script.make_env(script.Args(env_id=GAMES["minigrid"]))
    frame, _ = env.reset(seed=0)
    assert frame.shape == (64, 64, 3) and frame.dtype == np.uint8 and env.action_space.n == 7
    green = (frame[..., 1] > 200) & (frame[..., 0] < 100)
    assert green[41:50, 41:50].all() and green.mean() < 0.05  # the goal in its corner
    assert isinstance(
        script.make_env(script.Args(env_id="Pong")), script.Game
    )  # Atari is as it was


def test_the_other_encoder_keeps_its_shapes(fork):
    script = fork("encoder")
    encoder = script.Encoder(32)
    counts = [sum(p.numel() for p in e.parameters()) for e in (encoder, jedi.Encoder(32))]
    assert counts == [20_704, 34_048] and all(f"{count:,}" in PAGE for count in counts)
    z = encoder(torch.randint(256, (6, 64, 64, 3), dtype=torch.uint8))
    assert z.shape == (6, 16, 8, 8) and z.dtype == torch.float32 and z.abs().max() < 3
    z.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in encoder.parameters())
    assert "34,048" not in script.Encoder.__doc__


def test_one_step_is_one_call_of_the_denoiser(fork, monkeypatch):
    script = fork("one_step")
    assert script.PRESETS["one_step"] == jedi.PRESETS["small"] | {"sample_steps": 1}
    by_preset, by_flag = (
        script.parse_args(f"--preset {x}".split()) for x in ("one_step", "small --sample-steps 1")
    )
    assert dataclasses.replace(by_preset, preset="small") == by_flag
    calls, denoised, agent = [], [], script.Agent(5, by_flag)
    forward, clamp = agent.denoiser.forward, agent.norm.clamp
    monkeypatch.setattr(agent.denoiser, "forward", lambda *a: calls.append(1) or forward(*a))
    monkeypatch.setattr(agent.norm, "clamp", lambda z: denoised.append(clamp(z)) or denoised[-1])
    context, actions = torch.randn(2, 4, 16, 8, 8), torch.zeros(2, 4, dtype=torch.long)
    sampled = script.sample_next_latent(agent, context, actions, by_flag)
    # The sample is what the denoiser says, at the highest level: nothing of the noise is left.
    torch.testing.assert_close(sampled, denoised[0])
    assert calls == [1] and by_flag.sample_sigma_max == 5.0


def test_the_other_latents_go_through_every_network(fork):
    script = fork("latent_shape")
    args = script.Args(**MICRO)
    agent = script.Agent(5, args)
    count = sum(p.numel() for p in script.Encoder(32).parameters())
    assert f"| 32 x 4 x 4 | {count:,} |" in PAGE
    frames, actions = (
        torch.randint(256, (2, 5, 64, 64, 3), dtype=torch.uint8),
        torch.zeros(2, 5, dtype=torch.int64),
    )
    z = agent.encode(frames)
    assert z.shape == (2, 5, 32, 4, 4) and z.abs().max() < 3
    assert script.sample_next_latent(agent, z[:, :4], actions[:, :4], args).shape == (2, 32, 4, 4)
    assert agent.reward.features(z, actions[:, :4]).shape == (2, 4, args.reward_width * 16)


def test_the_game_of_ones_own(fork):
    script = fork("my_game")
    assert script.resolve_env_id("my_game:Apples-v0") == (
        "my_game:Apples-v0",
        "my_game_Apples_v0",
    )
    env = script.make_env(script.Args(env_id="my_game:Apples-v0"))  # imports the module
    check_env(gym.make("Apples-v0").unwrapped, skip_render_check=True)
    env.reset(seed=0)
    game = env.unwrapped
    game.walker, game.apple, game.trap = (0, 0), (0, 1), (1, 1)
    frame, reward, end, cut, _ = env.step(1)  # to the right, where the apple is
    assert (reward, end, cut) == (1.0, False, False) and game.apple not in (game.walker, game.trap)
    assert frame.shape == (64, 64, 3) and tuple(frame[0, 16]) == tuple(frame[15, 31]) == (
        255,
        255,
        255,
    )
    assert env.step(2)[1] == 0 and game.walker == (0, 1)  # a wall
    assert env.step(3)[1:4] == (-1.0, True, False)  # down, into the trap
    env.reset()
    game.walker, game.apple, game.trap = (0, 0), (3, 0), (3, 3)
    steps = [env.step(2)[1:4] for _ in range(100)]  # up, against the wall, until time is over
    assert steps == [(0.0, False, False)] * 99 + [(0.0, False, True)]

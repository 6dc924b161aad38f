"""The stochastic script: its chance against the emulator's own frame counter, and its likeness to the main script."""

import ast
import difflib
import json
import multiprocessing
import os
import signal
import sys
from collections import Counter

import gymnasium as gym
import kill_me
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, command_line
from scipy import stats

import jedi_atari as jedi
import jedi_atari_stochastic as stochastic

SCRIPTS = [ROOT / "jedi_atari.py", ROOT / "jedi_atari_stochastic.py"]
# Where the two scripts may differ: the header, and these functions and classes.
MAY_DIFFER = {"Args", "Game", "PROTOCOL", "eval_only", "write_result"}


def definitions(path) -> dict[str, str]:
    """The source of each top-level statement by its name; what has none counts as `module`."""
    text, parts = path.read_text(), {}
    lines = text.splitlines()
    for node in ast.parse(text).body[1:]:  # the first is the header
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        name = getattr(node, "name", None) or getattr(targets[0], "id", None) or "module"
        source = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        parts[name] = parts.get(name, "") + "\n" + source
    return parts


def test_the_two_scripts_differ_only_where_the_environments_do():
    main, other = (definitions(path) for path in SCRIPTS)
    drifted = {name for name in main | other if main.get(name) != other.get(name)}
    assert drifted <= MAY_DIFFER, f"drifted apart: {', '.join(sorted(drifted - MAY_DIFFER))}"
    lines = difflib.ndiff(*(path.read_text().splitlines() for path in SCRIPTS))
    changed = sum(line[:2] in ("- ", "+ ") for line in lines)
    assert 20 < changed <= 50, changed
    for name in ("write_result", "eval_only"):
        assert main[name].replace('"plain"', '"stochastic"') == other[name]


def test_the_comparison_sees_a_drift(tmp_path):
    """The check above can fail: one changed number in one function is found, and named."""
    altered = tmp_path / "altered.py"
    altered.write_text(SCRIPTS[0].read_text().replace("1 - lambda_", "2 - lambda_"))
    main, other = definitions(SCRIPTS[0]), definitions(altered)
    assert {name for name in main if main[name] != other[name]} == {"lambda_returns"}


def make(seed: int, low: int, high: int, sticky: float, game: str = "Breakout") -> stochastic.Game:
    args = stochastic.Args(env_id=game, frame_skip_min=low, frame_skip_max=high, sticky_prob=sticky)
    env = stochastic.make_env(args)
    env.reset(seed=seed)
    return env


def frames_played(env, actions) -> list[int]:
    """Emulator frames of each step, by the emulator's own counter; ends with the game."""
    counts = []
    for action in actions:
        before = env.unwrapped.ale.getEpisodeFrameNumber()
        _, _, terminated, truncated, _ = env.step(int(action))
        counts.append(env.unwrapped.ale.getEpisodeFrameNumber() - before)
        if terminated or truncated:
            counts.pop()  # a game may end in the middle of a step
            env.reset()
    return counts


@pytest.mark.parametrize(("low", "high"), [(2, 6), (1, 3)])
def test_frame_skips_are_uniform(low, high):
    env = make(0, low, high, 0.0)
    counts = Counter(frames_played(env, np.random.default_rng(0).integers(4, size=2_000)))
    assert set(counts) == set(range(low, high + 1))
    assert stats.chisquare(list(counts.values())).pvalue > 0.001


@pytest.mark.parametrize("sticky", [0.25, 0.6])
def test_the_previous_action_is_repeated_that_often(sticky):
    """What reaches the emulator, frame by frame, while the asked action changes at every step."""
    env = make(1, 3, 3, sticky)
    played = []
    act = env.unwrapped.ale.act
    recorder = type("Recorder", (), {"act": lambda self, *a: (played.append(a[0]), act(*a))[1]})()

    class Recorded:
        def __getattr__(self, name):
            return getattr(recorder if name == "act" else original, name)

    original, env.unwrapped.ale = env.unwrapped.ale, Recorded()
    asked = [i % 2 + 2 for i in range(1_500)]  # right, left, right, ...
    executed, before = [], env.unwrapped.ale.getFrameNumber()
    for action in asked:
        start = len(played)
        _, _, terminated, truncated, _ = env.step(action)
        assert len(set(played[start:])) == 1  # one action for the whole step
        executed.append(env.last_action)
        if terminated or truncated:
            env.reset()
    assert original.getFrameNumber() > before
    repeated = sum(e != a for e, a in zip(executed, asked, strict=True))
    # Asked actions alternate, so an executed one differs from the asked where it was repeated an odd number of times
    # in a row: with probability p - p^2 + p^3 - ... = p / (1 + p).
    share = sticky / (1 + sticky)
    assert stats.binomtest(repeated, len(asked), share).pvalue > 0.001, (
        repeated / len(asked),
        share,
    )


def test_without_chance_it_is_the_main_scripts_environment():
    plain = jedi.make_env(jedi.Args(env_id="Breakout"))
    env = stochastic.make_env(
        stochastic.Args(env_id="Breakout", frame_skip_min=4, frame_skip_max=4, sticky_prob=0.0)
    )
    rng = np.random.default_rng(3)
    assert np.array_equal(plain.reset(seed=5)[0], env.reset(seed=5)[0])
    for _ in range(1_200):
        action = int(rng.integers(4))
        (frame, *rest), (other, *other_rest) = plain.step(action), env.step(action)
        assert np.array_equal(frame, other) and rest[:3] == other_rest[:3]
        assert [rest[3][k] == other_rest[3][k] for k in ("end", "stop", "lives")] == [True] * 3
        if rest[1]:
            assert np.array_equal(plain.reset()[0], env.reset()[0])


def test_the_last_two_frames_are_max_pooled_even_if_only_two_were_played():
    env = make(2, 2, 2, 0.0)
    raw = gym.make("ALE/Breakout-v5", frameskip=1, repeat_action_probability=0.0)
    raw.reset()
    for _ in range(40):
        raw.unwrapped.restore_state(env.unwrapped.clone_state(include_rng=True))
        frames = [raw.step(1)[0] for _ in range(2)]
        assert np.array_equal(env.step(1)[0], env.resize(np.maximum(*frames)))


def play(env, steps: int) -> list[tuple]:
    rng, out = np.random.default_rng(7), []
    for _ in range(steps):
        frame, reward, terminated, truncated, _ = env.step(int(rng.integers(4)))
        out.append((frame.tobytes(), reward, terminated))
        if terminated or truncated:
            env.reset()
    return out


def test_the_same_seed_gives_the_same_sequence_and_another_does_not():
    assert play(make(3, 2, 6, 0.25), 300) == play(make(3, 2, 6, 0.25), 300)
    assert play(make(3, 2, 6, 0.25), 60) != play(make(4, 2, 6, 0.25), 60)


def run(run_dir, when: str) -> tuple[int, str]:
    """A run in a process of its own, with a checkpoint after each epoch; exit status and stderr."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["jedi_atari_stochastic", "torch.utils.tensorboard"])
    out, err = (run_dir.with_name(f"{run_dir.name}.{name}") for name in ("out", "err"))
    words = ["--resume", *command_line(SMALL | dict(run_dir=run_dir))]
    given = (str(out), str(err), when, words, "jedi_atari_stochastic")
    process = server.Process(target=kill_me.child, args=given)
    process.start()
    process.join(120)
    return process.exitcode, err.read_text()


def test_a_killed_run_resumes_to_the_same_bits_chance_included(tmp_path):
    """The draws of the game are those of its seed; so its actions bring it back."""
    assert run(tmp_path / "whole", "never:1:9") == (0, "")
    for when in ("step:110:9", "policy:3:9", "step:120:9"):
        assert run(tmp_path / "killed", when) == (-signal.SIGKILL, "")
    assert run(tmp_path / "killed", "never:1:9") == (0, "")
    outcomes = []
    for name in ("whole", "killed"):
        result = json.loads((tmp_path / name / "result.json").read_text())
        saved = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        assert result["environment"] == "stochastic" and result["args"]["s_churn"] == 1.0
        assert saved["script"] == "jedi_atari_stochastic"
        weights = {k: v.numpy().tobytes() for k, v in saved["agent"].items()}
        played = saved["collector"]["actions"].tolist(), saved["collector"]["checksum"]
        outcomes.append((result["returns"], result["lengths"], played, weights))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--frame-skip-min 0", "--frame-skip-min is 0"),
        ("--frame-skip-max 0", "--frame-skip-max is 0"),
        ("--sticky-prob 1.5", "--sticky-prob is 1.5; it must be from 0 to 1"),
        ("--sticky-prob -0.1", "--sticky-prob is -0.1"),
        ("--sticky-prob nan", "--sticky-prob is nan"),
    ],
)
def test_bad_ranges_are_refused(argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert stochastic.main(argv.split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and says in err and not os.listdir(tmp_path)


def test_the_other_scripts_frame_skip_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        stochastic.main(["--frame-skip", "4"])
    assert stop.value.code == 2 and "--frame-skip" in capsys.readouterr().err


def test_frame_skips_given_the_wrong_way_round_are_the_same():
    env, other = make(0, 6, 2, 0.0), make(0, 2, 6, 0.0)
    actions = np.random.default_rng(0).integers(4, size=50)
    assert frames_played(env, actions) == frames_played(other, actions)


def test_a_checkpoint_of_the_main_script_is_refused(tmp_path, capsys):
    jedi.save_checkpoint(tmp_path, {"args": json.dumps(vars(jedi.Args()))})
    for argv in (["--resume", "--run-dir", str(tmp_path)], ["--eval-only", str(tmp_path)]):
        assert stochastic.main(argv) == 2
        assert "this script's version" in capsys.readouterr().err


def test_the_emulator_is_set_back_exactly_between_draws():
    """The measured true spread: outcomes differ with chance, agree without it, and leave the game as it was."""
    sys.path.insert(0, str(ROOT / "benchmark"))
    import stochasticity

    for low, high, sticky in ((2, 6, 0.25), (4, 4, 0.0)):
        env, twin = make(5, low, high, sticky), make(5, low, high, sticky)
        frames = stochasticity.outcomes(env, 2, 12, seed=0)
        again = stochasticity.outcomes(env, 2, 12, seed=0)
        assert np.array_equal(frames, again)
        assert (len({f.tobytes() for f in frames}) == 1) == (low == high)
        for _ in range(50):  # the game goes on as one at which nobody looked
            assert np.array_equal(env.step(3)[0], twin.step(3)[0])

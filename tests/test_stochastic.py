"""The stochastic script: its chance against the emulator's own frame counter, and its likeness to the main script."""

import ast
import difflib
import json
import os
import signal
import subprocess
import sys
from collections import Counter

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import MICRO, ROOT
from scipy import stats

import jedi_atari as jedi
import jedi_atari_stochastic as stochastic

SCRIPTS = [ROOT / "jedi_atari.py", ROOT / "jedi_atari_stochastic.py"]
# Where the two scripts may differ: the header, and these functions and classes.
MAY_DIFFER = {"Args", "RANGES", "check_args", "Game", "make_env", "final_environments"}
CHANGED = {name: value for name, value in MICRO.items() if name != "frame_skip"}


def definitions(path) -> dict[str, str]:
    """The source of each top-level statement by its name; what has none counts as `module`."""
    text = path.read_text()
    parts: dict[str, str] = {}
    for node in ast.parse(text).body[1:]:  # the first is the header
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        name = getattr(node, "name", None) or getattr(targets[0], "id", None) or "module"
        parts[name] = parts.get(name, "") + "\n" + ast.get_source_segment(text, node)
    return parts


def test_the_two_scripts_differ_only_where_the_environments_do():
    main, other = (definitions(path) for path in SCRIPTS)
    drifted = {name for name in main | other if main.get(name) != other.get(name)}
    assert drifted <= MAY_DIFFER, f"drifted apart: {', '.join(sorted(drifted - MAY_DIFFER))}"
    lines = difflib.ndiff(*(path.read_text().splitlines() for path in SCRIPTS))
    changed = sum(line[:2] in ("- ", "+ ") for line in lines)
    assert 20 < changed <= 60, changed


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
        assert rest[3]["life_loss"] == other_rest[3]["life_loss"]
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


def start(run_dir, *extra: str) -> subprocess.CompletedProcess:
    begun = (run_dir / "checkpoint.pt").exists()
    flags = (
        ["--resume"]
        if begun
        else [x for n, v in CHANGED.items() for x in (stochastic.flag(n), str(v))]
    )
    command = [
        sys.executable,
        str(ROOT / "jedi_atari_stochastic.py"),
        *flags,
        "--run-dir",
        str(run_dir),
        *extra,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_stopped_run_resumes_exactly_and_says_where_it_was_evaluated(tmp_path):
    outcomes = []
    for name in ("whole", "stopped"):
        run_dir = tmp_path / name
        process = start(run_dir, "--eval-deterministic")
        if name == "stopped":
            for line in process.stdout:
                if line.startswith("epoch 1/"):
                    process.send_signal(signal.SIGTERM)
                    break
            assert process.communicate(timeout=120) and process.returncode == 128 + signal.SIGTERM
            process = start(run_dir)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0 and err == "", err
        result = json.loads((run_dir / "result.json").read_text())
        saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
        outcomes.append(
            (result["returns"], result["other_environments"], (run_dir / "replay.bin").read_bytes())
        )
        assert result["environment"] == "stochastic" and list(result["other_environments"]) == [
            "plain"
        ]
        assert len(result["other_environments"]["plain"]["returns"]) == MICRO["final_episodes"]
        assert result["args"]["s_churn"] == 1.0 and "last_action" in saved["collector"]["wrapper"]
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--frame-skip-min 0", "--frame-skip-min is 0"),
        ("--frame-skip-min 7", "--frame-skip-max"),
        ("--frame-skip-max 1", "--frame-skip-max"),
        ("--sticky-prob 1.5", "at least 0 and at most 1"),
        ("--sticky-prob -0.1", "at least 0 and at most 1"),
        ("--sticky-prob nan", "--sticky-prob is nan"),
        ("--frame-skip 4", "--frame-skip"),
    ],
)
def test_bad_ranges_are_refused(argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert stochastic.main(argv.split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and says in err and not os.listdir(tmp_path)


def test_a_checkpoint_of_the_main_script_is_refused(tmp_path, capsys):
    jedi.save_checkpoint(tmp_path, {"script": "jedi_atari"})
    args = json.dumps({k: v for k, v in stochastic.dataclasses.asdict(stochastic.Args()).items()})
    (tmp_path / "args.json").write_text(args)
    assert stochastic.main(["--resume", "--run-dir", str(tmp_path)]) == 2
    assert "use that script" in capsys.readouterr().err


def test_the_documented_table_is_the_measured_one():
    measured = (ROOT / "results" / "stochasticity" / "stochasticity.md").read_text()
    assert measured in (ROOT / "docs" / "stochasticity.md").read_text()
    rows = json.loads((ROOT / "results" / "stochasticity" / "stochasticity.json").read_text())[
        "rows"
    ]
    assert len(rows) == measured.count("\n") - 2
    for row, line in zip(rows, measured.splitlines()[2:], strict=True):
        assert (
            f"| {row['game']} | {row['chance']} |" in line and f"| {row['skill_1']:.2f} |" in line
        )


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

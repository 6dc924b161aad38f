"""Decoder and dreams: what they show is what happened, and the run's own files stay as they were."""

import dataclasses
import functools
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MICRO, ROOT, random_agent, random_windows
from PIL import Image, ImageColor
from test_play import micro_run

import jedi_atari as jedi
from play import pictures, runs


def a_run(agent: jedi.Agent, args: jedi.Args) -> runs.Run:
    """A run without a folder; its decoder's last layer is not zero."""
    run = runs.Run(None, jedi, args, agent, {}, None)
    run.__dict__["decoder"] = runs.new_decoder(run)
    torch.nn.init.normal_(run.decoder.conv_out.weight, std=0.1)
    return run


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """A few updates and frames in place of a minute's."""
    monkeypatch.setattr(runs, "UPDATES", 3)
    monkeypatch.setattr(runs, "PROBE", 16)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return micro_run(tmp_path_factory.getbasetemp())


def square_on_eight_places() -> torch.Tensor:
    """(8, 64, 64, 3): the mean picture is grey where each has its white square."""
    frames = torch.zeros(8, 64, 64, 3, dtype=torch.uint8)
    for i in range(8):
        frames[i, 24:32, 8 * i : 8 * i + 8] = 255
    return frames


# --- the decoder


def test_the_decoder_learns_pictures_that_the_background_does_not_show(micro, monkeypatch):
    """With a quarter of its channels, half of its batch, and so a higher learning rate."""
    for name, value in dict(UPDATES=300, BATCH_SIZE=8, LEARNING_RATE=5e-3).items():
        monkeypatch.setattr(runs, name, value)
    monkeypatch.setattr(runs, "Decoder", functools.partial(runs.Decoder, width=8))
    frames, agent = square_on_eight_places(), random_agent(micro, 5)
    network = runs.learn_decoder(a_run(agent, micro), frames)
    shown, real = torch.from_numpy(network.pictures(agent.encode(frames))).float(), frames.float()
    of_mean = (real.mean(0) - real).square().mean()
    assert (shown - real).square().mean() < 0.2 * of_mean
    # (8 pictures, 8 places): each picture is brightest where its own square is.
    brightness = shown[:, 24:32].mean((1, 3)).reshape(8, 8, 8).mean(2)
    assert brightness.argmax(1).tolist() == list(range(8))


def test_a_ball_of_two_pixels_weighs_as_much_as_half_of_the_picture():
    """The loss of leaving it out, against that of half of all pixels a little off."""
    decoder = runs.Decoder(jedi.LATENT_SHAPE)  # shows its background
    decoder.background.fill_(-1.0)
    z, ball, half = torch.zeros(1, 16, 8, 8), *torch.full((2, 1, 3, 64, 64), -1.0)[:, None]
    ball, half = ball.reshape(1, 3, 64, 64).clone(), half.reshape(1, 3, 64, 64).clone()
    ball[..., 30, 30:32] = 1.0
    half[..., :32, :] += 0.1
    missed, off = (runs.decoder_loss(decoder, z, x).item() for x in (ball, half))
    assert missed > 5 * off > 0


def test_the_agent_and_the_random_generator_are_the_same_afterwards(agent, monkeypatch):
    monkeypatch.setattr(runs, "PROBE", 20)  # each frame once
    before = {key: value.clone() for key, value in agent.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    frames = random_windows(jedi.Args(), 5).frames.flatten(0, 1)
    run = a_run(agent, jedi.Args(seed=1))
    torch.set_rng_state(state)
    first, second = (runs.learn_decoder(run, frames) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in agent.state_dict().items())
    assert all(parameter.grad is None for parameter in agent.parameters())
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b) and not a.requires_grad
    median = np.sort(frames.numpy(), 0)[(len(frames) - 1) // 2].transpose(2, 0, 1) / 127.5 - 1
    assert np.allclose(first.background, median, atol=1e-5)


# --- dreams


@pytest.mark.parametrize("stretch", [15, 4])
def test_a_dream_beside_the_play_it_follows(micro, agent, stretch):
    n, steps = micro.context_frames, 10
    play = random_windows(micro, n + steps, batch=1)
    run = a_run(agent, micro)
    torch.manual_seed(0)
    dream = pictures.dream_of(run, play, stretch)
    assert dream.pictures.shape == (3, steps + 1, 64, 64, 3) and dream.pictures.dtype == np.uint8
    assert np.array_equal(dream.pictures[0], play.frames[0, n - 1 :].numpy())
    z = agent.encode(play.frames)
    assert np.array_equal(dream.pictures[1], run.decoder.pictures(z[0, n - 1 :]))
    assert np.array_equal(
        dream.pictures[2, 0], dream.pictures[1, 0]
    )  # the dream begins at a real frame
    # Column k shows what the step from k - 1 to k brought.
    assert dream.rewards[0].tolist() == [0, *play.rewards[0, n - 1 : -1].sign().int().tolist()]
    assert dream.ends[0].tolist() == [False, *play.ends[0, n - 1 : -1].tolist()]
    assert dream.ages.tolist() == [0, *[t % stretch + 1 for t in range(steps)]]
    torch.manual_seed(0)
    frames, actions = z, play.actions
    imagined = []
    for start in range(n - 1, n - 1 + steps, stretch):  # naive: one step at a time
        seen = list(frames[0, start - n + 1 : start + 1])
        for t in range(start, min(start + stretch, n - 1 + steps)):
            context = torch.stack(seen[-n:])[None]
            seen.append(
                jedi.sample_next_latent(agent, context, actions[:, t - n + 1 : t + 1], micro)[0]
            )
            imagined.append(seen[-1])
    decoded = run.decoder.pictures(torch.stack(imagined)).astype(int)
    assert (
        np.abs(dream.pictures[2, 1:] - decoded).max() <= 1
    )  # rounding: a convolution of 10 or of 11 pictures
    reward_logits, end_logits = agent.reward(
        torch.cat([z[:, :n], torch.stack(imagined)[None]], 1), actions[:, :-1]
    )
    assert dream.rewards[1].tolist() == [0, *(reward_logits[0, n - 1 :].argmax(-1) - 1).tolist()]
    assert dream.ends[1].tolist() == [False, *end_logits[0, n - 1 :].argmax(-1).bool().tolist()]


def a_dream(steps: int = 15) -> pictures.Dreamed:
    rng, shape = np.random.default_rng(0), (2, steps + 1)
    rewards, ends = np.zeros(shape, int), np.zeros(shape, bool)
    rewards[0, 2], rewards[1, 3], ends[1, 5] = 1, -1, True
    frames = rng.integers(0, 256, (3, steps + 1, 64, 64, 3), dtype=np.uint8)
    return pictures.Dreamed(frames, rewards, ends, np.arange(steps + 1))


def test_a_film_strip_marks_what_happened_where_it_happened():
    dream = a_dream()
    nothing = dream._replace(rewards=dream.rewards * 0, ends=dream.ends & False)
    strip, plain = (np.asarray(pictures.film_strip(d, "a title")) for d in (dream, nothing))
    left, width = 200, 256 + 12
    assert strip.shape[1] == left + 8 * width
    starts = [left + c * width for c in range(8)]
    changed = {c for c in range(8) if (strip != plain)[:, starts[c] : starts[c] + 256].any()}
    assert changed == {2, 3, 4}  # steps 2, 3 and 5
    for column, colour in ((2, pictures.PLUS), (3, pictures.MINUS), (4, pictures.END)):
        part = strip[:, starts[column] - 6 : starts[column] + width - 6]
        assert (part == ImageColor.getrgb(colour)).all(-1).sum() > 1_000
    # The pictures themselves stand in it, four times as large.
    for column, step in enumerate(pictures.COLUMNS):
        part = strip[84 : 84 + 256 : 4, starts[column] : starts[column] + 256 : 4]
        assert np.array_equal(part, dream.pictures[0, step])


def test_a_film_is_a_gif_of_all_steps():
    moments = pictures.moments_of(a_dream(5))
    gif = Image.open(io.BytesIO(pictures.film(moments, 100)))
    assert gif.n_frames == 6 and gif.size == (2 * 256 + 8, 256 + 34) and gif.info["duration"] == 100
    assert gif.info["loop"] == 0
    durations = []
    gif = Image.open(io.BytesIO(pictures.film(moments, [70, 70, 60] * 2)))
    for i in range(gif.n_frames):
        gif.seek(i)
        durations.append(gif.info["duration"])
    assert durations == [70, 70, 60] * 2


@pytest.mark.parametrize("game", ["Pong", "Seaquest"])
def test_the_real_panel_of_a_film_is_the_game(game):
    """Within 8 of 255, beside a dream that takes as many colours as it can."""
    env, rng = jedi.make_env(jedi.Args(env_id=game)), np.random.default_rng(0)
    frame, _ = env.reset(seed=0)
    moments = []
    for step in range(40):
        dream = (frame + rng.normal(0, 12, frame.shape)).clip(0, 255).astype(np.uint8)
        moments.append([pictures.Shot(x, "text", 1.0, False) for x in (frame, dream)])
        frame = env.step(2 + step // 20)[0]
    gif = Image.open(io.BytesIO(pictures.film(moments, 70)))
    for i, (real, _) in enumerate(moments):
        gif.seek(i)
        shown = np.asarray(gif.convert("RGB"))[34 : 34 + 256 : 4, 0:256:4].astype(int)
        assert np.abs(shown - real.picture).max() <= 8, i


def test_a_gif_keeps_a_small_patch_of_a_rare_colour():
    """A green paddle of a few pixels in a picture that has far more colours than a palette."""
    noise = np.random.default_rng(0).integers(60, 200, (64, 64, 1), np.uint8).repeat(3, 2)
    noise[..., 2] //= 2
    noise[20:28, 58:60] = (92, 186, 92)
    shown = Image.open(io.BytesIO(pictures.gif([Image.fromarray(noise)], 100))).convert("RGB")
    patch = np.asarray(shown)[20:28, 58:60].astype(int)
    assert np.abs(patch - (92, 186, 92)).max() < 25


def test_the_window_with_most_rewards_is_shown(micro):
    buffer = jedi.ReplayBuffer(200, torch.device("cpu"))
    for step in range(100):
        frame = np.full((64, 64, 3), step, np.uint8)
        buffer.add(frame, 0, float(60 <= step < 63), False, frame if step == 99 else None)
    window = pictures.eventful_window(buffer, 20)
    assert window.rewards.sum() == 3 and window.frames.shape[:2] == (1, 20)
    assert pictures.eventful_window(buffer, 200) is None


# --- a run's folder


def rows_of(**columns) -> list[dict]:
    """Rows of metrics.jsonl, one for each entry of the columns; None for no entry."""
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    return [
        {"epoch": i, "charts/env_steps": 10.0 * i} | {k: v for k, v in row.items() if v is not None}
        for i, row in enumerate(rows)
    ]


def drawn_curves(rows: list[dict], monkeypatch) -> list:
    """The figure's panels."""
    from matplotlib.figure import Figure

    made = []
    subplots = Figure.subplots
    monkeypatch.setattr(
        Figure, "subplots", lambda *a, **k: made.append(subplots(*a, **k)) or made[-1]
    )
    assert pictures.learning_curves(rows, "a title", jedi.Args(eval_episodes=10, final_episodes=40))
    return [ax for ax in made[-1].flat if ax.figure and ax.lines]


def test_panels_of_fewer_than_three_points_are_left_out(monkeypatch):
    rows = rows_of(**{"diffusion/loss": [1.0, 2.0, 3.0], "wm/open_loop_ratio_1": [1.0, None, 2.0]})
    (panel,) = drawn_curves(rows, monkeypatch)
    assert panel.get_title() == "loss" and len(panel.lines) == 1
    assert panel.lines[0].get_xydata().tolist() == [[0, 1], [10, 2], [20, 3]]
    assert pictures.learning_curves(rows[:2], "a title", jedi.Args()) is None


def test_returns_have_the_interval_of_their_games(monkeypatch):
    """95% of the mean: the first evaluation is random play over --final-episodes games."""
    rows = rows_of(**{"eval/mean_return": [1.0, 2.0, 3.0], "eval/std_return": [6.0, 6.0, 3.0]})
    (panel,) = drawn_curves(rows, monkeypatch)
    (label,) = panel.get_legend_handles_labels()[1]
    assert label == "evaluation, 10 games each, 95% interval"
    corners = panel.collections[0].get_paths()[0].vertices
    for x, mean, std, games in ((0, 1, 6, 40), (10, 2, 6, 10), (20, 3, 3, 10)):
        ends = corners[corners[:, 0] == x, 1]
        half = 1.96 * std / (games - 1) ** 0.5
        assert (ends.min(), ends.max()) == (pytest.approx(mean - half), pytest.approx(mean + half))


def test_pictures_of_a_run_leave_its_own_files_as_they_were(run_dir, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder, ignore=shutil.ignore_patterns("decoder.pt"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert pictures.main([str(folder), "--device", "cpu", "--threads", "1"]) == 0
    drawn = ["dreams/final.png", "dreams/final.gif", "dreams/play.gif", "curves.png"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[-4:] == [str(folder / name) for name in drawn]
    for name in drawn:
        assert Image.open(folder / name).size[0] > 500
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert files.keys() - before.keys() == {"decoder.pt", "curves.png"}
    assert all(files[name] == content for name, content in before.items())


def test_the_decoder_is_kept_until_the_encoder_is_another(run_dir, tmp_path, monkeypatch):
    learned = []
    learn = runs.learn_decoder
    monkeypatch.setattr(runs, "learn_decoder", lambda *a: learned.append(1) or learn(*a))
    run = dataclasses.replace(runs.load_run(run_dir, "cpu", 1), folder=tmp_path)
    first, again = runs.decoder_of(run), runs.decoder_of(run)
    assert len(learned) == 1
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-3)  # 16 bits are kept
    run.agent.policy.value.bias += 1  # no concern of the decoder's
    runs.decoder_of(run)
    assert len(learned) == 1
    run.agent.encoder.layers[0].bias += 1  # trained on
    runs.decoder_of(run)
    assert len(learned) == 2
    (tmp_path / "decoder.pt").write_bytes(b"cut short")
    runs.decoder_of(run)
    assert len(learned) == 3


def test_the_play_is_had_back_also_where_the_game_goes_another_way(run_dir, capsys):
    run, other = (runs.load_run(run_dir, "cpu", 1) for _ in range(2))
    assert run.replay.size >= run.saved["collector"]["steps"] == 130
    assert "another way" not in capsys.readouterr().out
    other.saved["collector"]["checksum"] ^= 1
    assert torch.equal(other.replay.frames, run.replay.frames)
    assert "not quite the run's own play: Pong goes another way" in capsys.readouterr().out


def test_a_game_to_dream_of_is_not_one_of_training(run_dir):
    run = runs.load_run(run_dir, "cpu", 1)
    heldout = pictures.play_game(run)
    assert heldout.size == MICRO["max_episode_steps"] + 1 and not heldout.open
    assert not torch.equal(heldout.frames[:40], run.replay.frames[:40])
    assert not torch.equal(heldout.actions[:40], run.replay.actions[:40])


def test_a_folder_that_cannot_be_used(tmp_path, capsys):
    assert pictures.main([str(tmp_path), "--device", "cpu", "--threads", "1"]) == 2
    line, end = capsys.readouterr().err.split("\n")
    assert line.startswith("play.pictures: error: ") and not end
    assert "checkpoint.pt is missing" in line


def test_the_backend_of_a_notebook_costs_no_picture():
    code = "import play.pictures as p, jedi_atari as j; "
    code += "rows = [{'charts/env_steps': i, 'reward/loss': i} for i in range(3)]; "
    code += "p.png(p.learning_curves(rows, 'x', j.Args())); print('drawn')"
    environment = os.environ | dict(MPLBACKEND="module://matplotlib_inline.backend_inline")
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "drawn\n", done.stderr


def test_metrics_that_were_cut_are_had_from_the_checkpoint(run_dir, tmp_path):
    whole = runs.load_run(run_dir, "cpu", 1)
    shutil.copytree(run_dir, tmp_path / "r")
    text = (run_dir / "metrics.jsonl").read_text()
    for broken in ('{"epoch": 3.0, "charts/env', "42\n", '{"epoch": null}\n'):
        (tmp_path / "r" / "metrics.jsonl").write_text(text + broken)
        cut = runs.load_run(tmp_path / "r", "cpu", 1)
        assert cut.metrics == whole.metrics[: len(cut.metrics)] and len(cut.metrics) > 1
    (tmp_path / "r" / "metrics.jsonl").unlink()
    cut = runs.load_run(tmp_path / "r", "cpu", 1)
    cut.saved.pop("metrics")
    assert cut.metrics == cut.open_loop == []


def test_a_checkpoint_alone_is_enough(run_dir, tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes((run_dir / "checkpoint.pt").read_bytes())
    assert pictures.main([str(tmp_path), "--device", "cpu", "--threads", "1"]) == 0
    drawn = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert drawn >= {"checkpoint.pt", "decoder.pt", "curves.png", "final.png", "play.gif"}


def test_a_fork_is_drawn_with_its_own_script(run_dir, tmp_path):
    """A renamed copy, changed: its own sampler dreams, its own refusal is understood."""
    source = (ROOT / "jedi_atari.py").read_text()
    (tmp_path / "r").mkdir()
    own = "\n\ndef open_loop(agent, z, *_):\n    return z\n"
    (tmp_path / "r" / "my-fork.py").write_text(source + own)
    saved = jedi.load_checkpoint(run_dir)
    jedi.save_checkpoint(tmp_path / "r", saved | dict(script="my-fork"))
    run = runs.load_run(tmp_path / "r", "cpu", 1)
    assert run.script.BadInput is jedi.BadInput
    run.__dict__["decoder"] = runs.new_decoder(run)
    play = random_windows(run.args, run.args.context_frames + 5, batch=1)
    dream = pictures.dream_of(run, play, 5)
    assert np.array_equal(dream.pictures[1], dream.pictures[2])  # this fork dreams the truth

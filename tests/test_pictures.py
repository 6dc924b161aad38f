"""Decoder and dreams: what they show is what happened, and the run's own files stay as they were."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import MICRO, ROOT, random_agent, random_windows
from PIL import Image, ImageColor
from test_play import micro_run

import jedi_atari as jedi
import play_pictures as pictures


@pytest.fixture
def decoder(agent) -> pictures.Decoder:
    """A decoder whose last layer is not zero."""
    network = pictures.new_decoder(agent)
    torch.nn.init.normal_(network.conv_out.weight, std=0.1)
    return network


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """A few updates and frames in place of a minute's."""
    monkeypatch.setattr(pictures, "MAX_UPDATES", 3)
    monkeypatch.setattr(pictures, "PROBE", 16)


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


def test_the_decoder_learns_pictures_that_the_mean_does_not_show(micro, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_UPDATES", 150)
    frames, agent = square_on_eight_places(), random_agent(micro, 5)
    network = pictures.learn_decoder(agent, frames)
    shown, real = torch.from_numpy(network.pictures(agent.encode(frames))).float(), frames.float()
    of_mean = (real.mean(0) - real).square().mean()
    assert (shown - real).square().mean() < 0.2 * of_mean
    # (8 pictures, 8 places): each picture is brightest where its own square is.
    brightness = shown[:, 24:32].mean((1, 3)).reshape(8, 8, 8).mean(2)
    assert brightness.argmax(1).tolist() == list(range(8))


def test_learning_ends_when_the_pictures_are_good_enough(micro, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_UPDATES", 200)
    monkeypatch.setattr(pictures, "CHECK_EVERY", 5)
    losses = []
    loss = pictures.decoder_loss
    monkeypatch.setattr(pictures, "decoder_loss", lambda *a: losses.append(1) or loss(*a))
    for enough, checks in ((2.0, 1), (0.5, 2)):
        losses.clear()
        monkeypatch.setattr(pictures, "ENOUGH", enough)
        pictures.learn_decoder(random_agent(micro, 5), square_on_eight_places())
        assert checks < len(losses) < 200 and (enough < 1 or len(losses) == 2)


def test_the_agent_and_the_random_generator_are_the_same_afterwards(agent, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_UPDATES", 3)
    monkeypatch.setattr(pictures, "PROBE", 20)  # each frame once
    before = {key: value.clone() for key, value in agent.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    frames = random_windows(jedi.Args(), 5).frames.flatten(0, 1)
    first, second = (pictures.learn_decoder(agent, frames, seed=1) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in agent.state_dict().items())
    assert all(parameter.grad is None for parameter in agent.parameters())
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b) and not a.requires_grad
    mean = frames.float().mean(0).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(first.background, mean, atol=1e-5)


# --- dreams


@pytest.mark.parametrize("stretch", [15, 4])
def test_a_dream_beside_the_play_it_follows(micro, agent, decoder, stretch):
    n, steps = micro.context_frames, 10
    play = random_windows(micro, n + steps, batch=1)
    torch.manual_seed(0)
    run = SimpleNamespace(agent=agent, args=micro, script=jedi)
    dream = pictures.dream_of(run, decoder, play, stretch)
    assert dream.pictures.shape == (3, steps + 1, 64, 64, 3) and dream.pictures.dtype == np.uint8
    assert np.array_equal(dream.pictures[0], play.frames[0, n - 1 :].numpy())
    z = agent.encode(play.frames)
    assert np.array_equal(dream.pictures[1], decoder.pictures(z[0, n - 1 :]))
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
    decoded = decoder.pictures(torch.stack(imagined)).astype(int)
    assert (
        np.abs(dream.pictures[2, 1:] - decoded).max() <= 1
    )  # rounding: a convolution of 10 or of 11 pictures
    reward_logits, end_logits = agent.reward(
        torch.cat([z[:, :n], torch.stack(imagined)[None]], 1), actions[:, :-1]
    )
    assert dream.rewards[1].tolist() == [0, *(reward_logits[0, n - 1 :].argmax(-1) - 1).tolist()]
    assert dream.ends[1].tolist() == [False, *end_logits[0, n - 1 :].argmax(-1).bool().tolist()]


def a_dream() -> pictures.Dream:
    rng = np.random.default_rng(0)
    rewards, ends = np.zeros((2, 6), int), np.zeros((2, 6), bool)
    rewards[0, 2], rewards[1, 3], ends[1, 5] = 1, -1, True
    return pictures.Dream(
        rng.integers(0, 256, (3, 6, 64, 64, 3), dtype=np.uint8), rewards, ends, np.arange(6)
    )


def test_a_film_strip_marks_what_happened_where_it_happened():
    dream = a_dream()
    nothing = dream._replace(rewards=dream.rewards * 0, ends=dream.ends & False)
    strip, plain = (np.asarray(pictures.film_strip(d, "a title")) for d in (dream, nothing))
    width = (strip.shape[1] - 150) // 6
    inner = [
        slice(150 + c * width + 8, 150 + (c + 1) * width - 16) for c in range(6)
    ]  # without the frames around
    changed = {c for c in range(6) if (strip != plain)[:, inner[c]].any()}
    assert changed == {2, 3, 5}
    for column, colour in ((2, pictures.PLUS), (3, pictures.MINUS), (5, pictures.END)):
        part = strip[:, 150 + column * width : 150 + (column + 1) * width]
        assert (part == ImageColor.getrgb(colour)).all(-1).sum() > 500
    # The pictures themselves stand in it, twice as large.
    assert np.array_equal(strip[64 : 64 + 128 : 2, 150 : 150 + 128 : 2], dream.pictures[0, 0])


def test_a_film_is_a_gif_of_all_steps():
    gif = Image.open(io.BytesIO(pictures.film(a_dream(), 100)))
    assert gif.n_frames == 6 and gif.size == (2 * 256 + 8, 256 + 34) and gif.info["duration"] == 100
    assert gif.info["loop"] == 0


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


def test_curves_of_a_run_that_has_little_to_show():
    rows = [
        {"epoch": 0, "charts/env_steps": 70.0, "eval/mean_return": 1.0},
        {"epoch": 1, "charts/env_steps": 100.0, "diffusion/loss": 0.5},
    ]
    picture = pictures.learning_curves(rows, "a title")
    assert picture.size == (1200, 700) and (np.asarray(picture) < 128).any()


def test_the_curves_are_those_of_the_rows():
    """Another value, another curve; a key that no panel shows changes nothing."""
    row = {"charts/env_steps": 100.0, "diffusion/loss": 0.5}
    rows = [{**row, "charts/env_steps": 50.0}, row]
    same, other, unseen = (
        np.asarray(pictures.learning_curves([rows[0], {**row, **change}], ""))
        for change in ({}, {"diffusion/loss": 0.7}, {"time/run": 3.0})
    )
    assert np.array_equal(same, unseen) and not np.array_equal(same, other)


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
    learn = pictures.learn_decoder
    monkeypatch.setattr(pictures, "learn_decoder", lambda *a: learned.append(1) or learn(*a))
    run = pictures.load_run(run_dir, "cpu", 1)
    run.folder = tmp_path
    first, again = pictures.decoder_of(run), pictures.decoder_of(run)
    assert len(learned) == 1
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    run.agent.policy.value.bias += 1  # no concern of the decoder's
    pictures.decoder_of(run)
    assert len(learned) == 1
    run.agent.encoder.layers[0].bias += 1  # trained on
    pictures.decoder_of(run)
    assert len(learned) == 2
    (tmp_path / "decoder.pt").write_bytes(b"cut short")
    pictures.decoder_of(run)
    assert len(learned) == 3


def test_the_play_is_had_back_also_where_the_game_goes_another_way(run_dir, capsys):
    run, other = (pictures.load_run(run_dir, "cpu", 1) for _ in range(2))
    assert run.replay.size >= run.saved["collector"]["steps"] == len(run.collector.actions)
    assert "another way" not in capsys.readouterr().out
    other.saved["collector"]["checksum"] ^= 1
    assert torch.equal(other.replay.frames, run.replay.frames)
    assert "not quite the run's own play: Pong goes another way" in capsys.readouterr().out


def test_a_game_to_dream_of_is_not_one_of_training(run_dir):
    run = pictures.load_run(run_dir, "cpu", 1)
    heldout = pictures.play_game(run)
    assert heldout.size == MICRO["max_episode_steps"] + 1 and not heldout.open
    assert not torch.equal(heldout.frames[:40], run.replay.frames[:40])
    assert not torch.equal(heldout.actions[:40], run.replay.actions[:40])


@pytest.mark.parametrize("change", ["no checkpoint", "other networks"])
def test_a_folder_that_cannot_be_used(run_dir, tmp_path, capsys, change):
    args = json.loads((run_dir / "args.json").read_text())
    if change == "other networks":
        (tmp_path / "checkpoint.pt").write_bytes((run_dir / "checkpoint.pt").read_bytes())
        args["lstm_size"] *= 2
    (tmp_path / "args.json").write_text(json.dumps(args))
    assert pictures.main([str(tmp_path), "--device", "cpu", "--threads", "1"]) == 2
    line, end = capsys.readouterr().err.split("\n")
    says = {"no checkpoint": "checkpoint.pt is missing"}.get(change, change)
    assert line.startswith("play_pictures.py: error: ") and says in line and not end


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense", ""])
def test_the_backend_of_a_notebook_costs_no_picture(backend):
    code = "import play_pictures as p; p.png(p.learning_curves([], 'x')); print('drawn')"
    environment = os.environ | dict(MPLBACKEND=backend)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "drawn\n", done.stderr


def test_what_cannot_be_drawn_costs_no_other_picture(run_dir, tmp_path, monkeypatch):
    """The curves come last: the dreams are written by then."""
    shutil.copytree(run_dir, tmp_path / "r")
    (tmp_path / "r" / "metrics.jsonl").write_text("broken")
    with pytest.raises(json.JSONDecodeError):
        pictures.main([str(tmp_path / "r"), "--device", "cpu", "--threads", "1"])
    assert (tmp_path / "r" / "dreams" / "final.png").exists()


def test_a_checkpoint_alone_is_enough(run_dir, tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes((run_dir / "checkpoint.pt").read_bytes())
    assert pictures.main([str(tmp_path), "--device", "cpu", "--threads", "1"]) == 0
    drawn = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert drawn >= {"checkpoint.pt", "decoder.pt", "curves.png", "final.png", "play.gif"}


def test_a_fork_is_played_with_its_own_script(run_dir, tmp_path, monkeypatch):
    """A renamed copy, changed: its own sampler dreams, its own refusal is understood."""
    source = (ROOT / "jedi_atari.py").read_text()
    (tmp_path / "my-fork.py").write_text(
        source + "\n\ndef open_loop(agent, z, *_):\n    return z\n"
    )
    monkeypatch.setattr(pictures, "__file__", str(tmp_path / "play_pictures.py"))
    monkeypatch.delitem(sys.modules, "my-fork", raising=False)
    saved = jedi.load_checkpoint(run_dir)
    (tmp_path / "r").mkdir()
    jedi.save_checkpoint(tmp_path / "r", saved | dict(script="my-fork"))
    run = pictures.load_run(tmp_path / "r", "cpu", 1)
    assert run.script.__name__ == "my-fork" and run.script.BadInput is jedi.BadInput
    play = random_windows(run.args, run.args.context_frames + 5, batch=1)
    decoder = pictures.new_decoder(run.agent)
    dream = pictures.dream_of(run, decoder, play, 5)
    assert np.array_equal(dream.pictures[1], dream.pictures[2])  # this fork dreams the truth
    sys.modules.pop("my-fork")

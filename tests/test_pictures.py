"""Decoder and dreams: what they show is what happened, and the agent is the same without them."""

import io
import json

import numpy as np
import pytest
import torch
from conftest import MICRO, random_agent, random_windows, replace
from PIL import Image, ImageColor

import jedi_atari as jedi


@pytest.fixture
def decoder(micro) -> jedi.Decoder:
    """A decoder whose last layer is not zero."""
    network, _ = jedi.make_decoder(micro, torch.device("cpu"))
    torch.nn.init.normal_(network.conv_out.weight, std=0.1)
    return network


def test_no_gradient_of_the_decoder_reaches_the_agent(micro, agent, decoder):
    jedi.decoder_loss(decoder, agent, random_windows(micro, 5)).backward()
    assert all(p.grad is None for p in agent.parameters())
    assert all(p.grad is not None and p.grad.any() for p in decoder.parameters())


def test_the_decoder_uses_up_no_random_numbers(micro):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, _ = jedi.make_decoder(micro, torch.device("cpu"))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4)
    second, _ = jedi.make_decoder(micro, torch.device("cpu"))
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    assert jedi.make_decoder(replace(micro, decoder=False), torch.device("cpu")) is None


def test_the_decoder_learns_pictures_that_the_mean_does_not_show(micro):
    """A white square on eight places: the mean picture is grey there, the decoder's has it where it is."""
    frames = torch.zeros(8, 1, 64, 64, 3, dtype=torch.uint8)
    for i in range(8):
        frames[i, 0, 24:32, 8 * i : 8 * i + 8] = 255
    batch = random_windows(micro, 1, batch=8)._replace(frames=frames)
    agent = random_agent(micro, 5)
    network, optimizer = jedi.make_decoder(micro, torch.device("cpu"))
    for _ in range(150):
        jedi.update_decoder(network, optimizer, agent, batch)
    shown = torch.from_numpy(network.pictures(agent.encode(frames[:, 0]))).float()
    real = frames[:, 0].float()
    of_mean = (real.mean(0) - real).square().mean()
    assert (shown - real).square().mean() < 0.2 * of_mean
    # (8 pictures, 8 places): each picture is brightest where its own square is.
    assert shown[:, 24:32].mean((1, 3)).reshape(8, 8, 8).mean(2).argmax(1).tolist() == list(
        range(8)
    )


def test_the_mean_picture_is_the_mean_of_the_frames(micro, agent, decoder):
    batches = [random_windows(micro, 2, seed=s) for s in range(5)]
    for batch in batches:
        jedi.decoder_loss(decoder, agent, batch)
    mean = (
        torch.stack([b.frames[:, 0] for b in batches]).float().mean((0, 1)).permute(2, 0, 1) / 127.5
        - 1
    )
    assert torch.allclose(decoder.background, mean, atol=1e-5)


def test_only_real_frames_are_learned_from(micro, agent, decoder):
    """The first real frame of each window, whatever the padding before it holds."""
    batch = random_windows(micro, 4)
    mask = torch.tensor(
        [
            [True] * 4,
            [False, True, True, True],
            [False, False, True, True],
            [False, False, False, True],
        ]
    )
    jedi.decoder_loss(decoder, agent, batch._replace(mask=mask))
    mean = batch.frames[range(4), range(4)].float().mean(0).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(decoder.background, mean, atol=1e-5)


@pytest.mark.parametrize("stretch", [15, 4])
def test_a_dream_beside_the_play_it_follows(micro, agent, decoder, stretch):
    n, steps = micro.context_frames, 10
    play = random_windows(micro, n + steps, batch=1)
    torch.manual_seed(0)
    dream = jedi.dream_of(agent, decoder, play, micro, stretch)
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


def a_dream() -> jedi.Dream:
    rng = np.random.default_rng(0)
    rewards, ends = np.zeros((2, 6), int), np.zeros((2, 6), bool)
    rewards[0, 2], rewards[1, 3], ends[1, 5] = 1, -1, True
    return jedi.Dream(
        rng.integers(0, 256, (3, 6, 64, 64, 3), dtype=np.uint8), rewards, ends, np.arange(6)
    )


def test_a_film_strip_marks_what_happened_where_it_happened():
    dream = a_dream()
    strip = jedi.film_strip(dream, "a title")
    plain = jedi.film_strip(
        dream._replace(rewards=dream.rewards * 0, ends=dream.ends & False), "a title"
    )
    width = (strip.shape[1] - 150) // 6
    inner = [
        slice(150 + c * width + 8, 150 + (c + 1) * width - 16) for c in range(6)
    ]  # without the frames around
    changed = {c for c in range(6) if (strip != plain)[:, inner[c]].any()}
    assert changed == {2, 3, 5}
    for column, colour in ((2, jedi.PLUS), (3, jedi.MINUS), (5, jedi.END)):
        part = strip[:, 150 + column * width : 150 + (column + 1) * width]
        assert (part == ImageColor.getrgb(colour)).all(-1).sum() > 500
    # The pictures themselves stand in it, twice as large.
    assert np.array_equal(strip[64 : 64 + 128 : 2, 150 : 150 + 128 : 2], dream.pictures[0, 0])


def test_a_film_is_a_gif_of_all_steps(tmp_path):
    jedi.film(a_dream(), tmp_path / "a.gif", 100)
    gif = Image.open(tmp_path / "a.gif")
    assert gif.n_frames == 6 and gif.size == (2 * 256 + 8, 256 + 34) and gif.info["duration"] == 100
    assert gif.info["loop"] == 0


def test_the_window_with_most_rewards_is_shown(micro):
    buffer = jedi.ReplayBuffer(200, torch.device("cpu"))
    for step in range(100):
        frame = np.full((64, 64, 3), step, np.uint8)
        buffer.add(frame, 0, float(60 <= step < 63), False, frame if step == 99 else None)
    buffer.flush()
    window = jedi.eventful_window(buffer, 20)
    assert window.rewards.sum() == 3 and window.frames.shape[:2] == (1, 20)
    assert jedi.eventful_window(buffer, 200) is None


def test_curves_of_a_run_that_has_little_to_show():
    lines = [
        {"epoch": 0, "eval/mean_return": 1.0},
        {"epoch": 1, "charts/env_steps": 100.0, "diffusion/loss": 0.5},
    ]
    picture = jedi.learning_curves(lines, "a title")
    assert picture.dtype == np.uint8 and picture.shape == (700, 1200, 3) and (picture < 128).any()


def run_of(tmp_path, name: str, **changes) -> tuple[jedi.Path, dict, dict]:
    args = replace(jedi.Args(**MICRO), run_dir=str(tmp_path / name), **changes)
    result = jedi.train(args)
    return tmp_path / name, result, torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)


def test_the_agent_is_the_same_with_and_without_decoder(tmp_path):
    with_dir, with_result, with_saved = run_of(tmp_path, "with", decoder=True)
    without_dir, without_result, without_saved = run_of(tmp_path, "without", decoder=False)
    assert with_saved["decoder"] and not without_saved["decoder"]
    for part in ("agent", "optimizers", "rng", "collector"):
        a, b = io.BytesIO(), io.BytesIO()
        torch.save(with_saved[part], a)
        torch.save(without_saved[part], b)
        assert a.getvalue() == b.getvalue(), part
    assert (with_dir / "replay.bin").read_bytes() == (without_dir / "replay.bin").read_bytes()
    assert (
        with_result["returns"] == without_result["returns"]
        and with_result["measures"] == without_result["measures"]
    )
    rows = [
        [json.loads(line) for line in (d / "metrics.jsonl").open()] for d in (with_dir, without_dir)
    ]
    for a, b in zip(*rows, strict=True):
        assert {k: v for k, v in a.items() if "time/" not in k} == {
            k: v for k, v in b.items() if "time/" not in k
        }
    # What there is to see: before training, at the evaluation, at the end.
    names = {path.name for path in (with_dir / "dreams").iterdir()}
    assert names == {
        f"{n}.{e}" for n in ("epoch0000", "epoch0002", "final") for e in ("png", "gif")
    } | {"play.gif"}
    assert not list((without_dir / "dreams").iterdir())
    for folder in (with_dir, without_dir):
        assert Image.open(folder / "curves.png").size == (1200, 700)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(with_dir), size_guidance={"images": 0}).Reload()
    shown = events.Images("dream")
    assert len(shown) == 3
    strip = Image.open(with_dir / "dreams" / "final.png")
    assert np.array_equal(
        np.asarray(Image.open(io.BytesIO(shown[-1].encoded_image_string))), np.asarray(strip)
    )

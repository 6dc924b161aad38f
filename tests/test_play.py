"""play.py: the dream as an environment, what a tab plays, and the server, with the real Pong and a very small run."""

import asyncio
import contextlib
import dataclasses
import functools
import io
import json
import socket
import struct
import time
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import torch
from aiohttp import web
from conftest import MICRO, random_agent, replace
from gymnasium.utils.env_checker import check_env
from PIL import Image

import jedi_atari as jedi
import jedi_atari_stochastic
import play
import play_pictures

TOKEN = "the-token"


@functools.cache
def micro_run(folder: Path, script=jedi) -> Path:
    """The folder of a run and a decoder, hardly trained. Takes seconds, so it is made once, whoever asks; nothing here
    writes into it."""
    run_dir = folder / f"play-run-{script.__name__}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(play_pictures, "MAX_UPDATES", 20)
        patch.setattr(play_pictures, "PROBE", 16)
        script.train(script.Args(**MICRO | {"run_dir": str(run_dir), "final_episodes": 1}))
        play.load_model(run_dir, "cpu")
    return run_dir


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return micro_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def model(run_dir) -> play.Model:
    return play.load_model(run_dir, "cpu")


@pytest.fixture
def session(model):
    session = play.Session(model, seed=0)
    yield session
    session.close()


def unpack(message: bytes) -> tuple[str, dict, bytes]:
    """What the page does with a message."""
    kind, length = struct.unpack_from("<BI", message)
    return play.KINDS[kind], json.loads(message[5 : 5 + length]), message[5 + length :]


# --- DreamEnv


@pytest.mark.filterwarnings("ignore::UserWarning")  # check_env's advice on spaces and on rendering
def test_dream_env_passes_the_environment_checker(model):
    check_env(play.DreamEnv(model, render_mode="rgb_array"), skip_render_check=False)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_dream_env_can_be_made_by_its_name(run_dir):
    env = play.gym.make("play:JediDream-v0", run=str(run_dir), max_steps=3)
    check_env(env.unwrapped)
    env.reset(seed=0)
    assert env.step(0)[0].shape == (64, 64, 3)


def dream(env: play.DreamEnv, seed: int, steps: int = 12, disturb: bool = False) -> list:
    played = [env.reset(seed=seed)]
    for i in range(steps):
        if disturb:
            torch.rand(3)
        played.append(env.step(i % 3))
    return played


def same(a: list, b: list) -> bool:
    return all(np.array_equal(x[0], y[0]) and x[1:] == y[1:] for x, y in zip(a, b, strict=True))


def test_same_seed_same_dream_whatever_else_is_drawn(model):
    env = play.DreamEnv(model)
    first = dream(env, 5)
    assert same(first, dream(env, 5, disturb=True))
    assert same(first, dream(play.DreamEnv(model), 5))
    assert not same(first, dream(env, 6))


def test_two_dreams_do_not_disturb_each_other(model):
    alone, (a, b) = dream(play.DreamEnv(model), 5), (play.DreamEnv(model), play.DreamEnv(model))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    together = [a.reset(seed=5)]
    b.reset(seed=9)
    for i in range(12):
        together.append(a.step(i % 3))
        b.step(0)
    assert same(alone, together)
    assert torch.equal(before, torch.get_rng_state())


def test_a_dream_is_what_imagine_makes_of_the_same_draws(model, micro):
    """Latents step by step as in training, and R_psi carried step by step as when it sees all at once."""
    agent = random_agent(micro, len(model.meanings))
    model = dataclasses.replace(model, agent=agent)
    n, steps, index = model.args.context_frames, 6, 20
    frames, taken, _ = play.recorded(model.replay, index, n)
    actions, chance = [3, 1, 0, 2, 2, 4], play.Chance(3, model.device)
    scene, latents, probs = play.Dream(model), [], []
    scene.begin(frames, taken)
    for action in actions:
        with chance.drawn(), torch.no_grad():
            state = torch.get_rng_state()
            context, past = torch.stack(scene.latents, 1), torch.tensor([[*scene.taken, action]])
            expected = jedi.sample_next_latent(agent, context, past, model.args)
            torch.set_rng_state(state)
            scene.step(action, model.args.sample_steps)
        assert torch.equal(expected, scene.latents[-1])
        latents.append(scene.latents[-1])
        probs.append([*scene.reward_probs, scene.end_prob])
    with torch.no_grad():
        z = torch.cat([agent.encode(torch.from_numpy(frames)[None]), torch.stack(latents, 1)], 1)
        reward, end = agent.reward(z, torch.tensor([[*taken, *actions]]))
        _, values, _ = agent.policy(z, None)
    whole = torch.cat([reward.softmax(-1), end.softmax(-1)[..., 1:]], -1)[0, -steps:]
    assert torch.allclose(torch.tensor(probs), whole, atol=1e-5)
    assert scene.value == pytest.approx(values[0, -1].item(), abs=1e-5)


def test_dreams_end_by_the_model_or_by_the_limit(model):
    def ended(end_bias: float) -> tuple:
        agent = random_agent(jedi.Args(**MICRO), len(model.meanings))
        agent.reward.head[-1].bias.data[3:] = torch.tensor([-end_bias, end_bias])
        env = play.DreamEnv(dataclasses.replace(model, agent=agent), max_steps=2)
        env.reset(seed=0)
        return tuple(env.step(0)[2:4] for _ in range(2))

    assert ended(50.0)[0] == (True, False)
    assert ended(-50.0) == ((False, False), (False, True))


def test_a_dream_can_start_from_any_frame(model):
    env = play.DreamEnv(model)
    final = MICRO["max_episode_steps"]  # the first game's last frame
    for index in (0, 1, final, final + 1, model.replay.size - 1):
        _, info = env.reset(seed=0, options={"frame": index})
        assert info["frame"] == index - (index == final)


# --- the replay


def test_recorded_windows_stay_in_their_episode():
    replay = jedi.ReplayBuffer(10, torch.device("cpu"))
    frames = np.zeros((6, 64, 64, 3), np.uint8) + np.arange(6, dtype=np.uint8)[:, None, None, None]
    replay.add(frames[0], 1, 0.0, False)
    replay.add(frames[1], 2, 0.0, True, frames[2])
    for i in (3, 4, 5):
        replay.add(frames[i], i, 0.0, False)

    def window(index: int) -> tuple:
        seen, taken, index = play.recorded(replay, index, 4)
        return seen[:, 0, 0, 0].tolist(), taken, index

    assert window(0) == window(-5) == ([0], [], 0)
    assert window(1) == ([0, 1], [1], 1)
    assert window(2) == window(1)  # nothing follows an episode's last frame
    assert window(3) == ([3], [], 3)
    assert window(99) == ([3, 4, 5], [3, 4], 5)  # this one is still open
    replay.add(frames[0], 6, 0.0, False, frames[0])
    assert window(99) == ([3, 4, 5, 0], [3, 4, 5], 6)
    assert play.recorded(replay, 5, 2)[1] == [4]


def test_a_run_of_the_other_script_plays_too(tmp_path):
    model = play.load_model(micro_run(tmp_path, jedi_atari_stochastic), "cpu", "ALE/Pong-v5")
    assert model.script is jedi_atari_stochastic and model.args.s_churn == 1
    assert model.replay.size > 70
    session = play.Session(model, seed=0)
    for mode in ("game", "dream"):
        session.do_mode(mode)
        session.advance()
        assert session.scene.steps == 1
    session.close()


def test_games_that_are_not_atari_have_numbered_actions(micro):
    env = jedi.make_env(replace(micro, env_id="toys:Catch-v0"))
    assert play.meanings_of(env) == ("ACTION 0", "ACTION 1", "ACTION 2")


# --- keys

PONG = ("NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE")
BREAKOUT = ("NOOP", "FIRE", "RIGHT", "LEFT")
SEAQUEST = tuple(
    "NOOP FIRE UP RIGHT LEFT DOWN UPRIGHT UPLEFT DOWNRIGHT DOWNLEFT UPFIRE RIGHTFIRE".split()
)


@pytest.mark.parametrize(
    "meanings, held, fresh, chosen",
    [
        (PONG, "", "", "NOOP"),
        (PONG, "up", "", "RIGHT"),
        (PONG, "down", "", "LEFT"),
        (PONG, "left", "", "LEFT"),
        (PONG, "down fire", "", "LEFTFIRE"),
        (PONG, "up down", "", "NOOP"),
        (BREAKOUT, "left fire", "fire", "FIRE"),  # just tapped: it serves the ball
        (BREAKOUT, "left fire", "", "LEFT"),
        (SEAQUEST, "up", "", "UP"),
        (SEAQUEST, "up right", "", "UPRIGHT"),
        (SEAQUEST, "right fire", "", "RIGHTFIRE"),
        (SEAQUEST, "left right up", "", "UP"),
        (("ACTION 0", "ACTION 1"), "up fire", "", "ACTION 0"),
    ],
)
def test_the_action_that_fits_the_keys(meanings, held, fresh, chosen):
    action = play.choose_action(meanings, frozenset(held.split()), frozenset(fresh.split()))
    assert meanings[action] == chosen


def test_a_tap_shorter_than_a_step_counts_once(session):
    session.hold({"keys": ["fire"], "action": None})
    session.hold({"keys": [], "action": None})
    session.advance()
    assert session.model.meanings[session.action] == "FIRE"
    session.advance()
    assert session.model.meanings[session.action] == "NOOP"
    session.hold({"keys": [], "action": 3})
    session.hold({"keys": [], "action": None})
    session.advance()
    assert session.action == 3


# --- a session


def test_the_real_game_moves_with_the_keys(session):
    """Pong's own paddle, green, on the right: up with up, down with down."""

    def height() -> float:
        frame = session.scene.frame[8:62, 54:62].astype(int)
        return np.nonzero(frame[..., 1] - frame[..., 0] > 40)[0].mean()

    heights = {}
    for key in ("up", "down"):
        session.hold({"keys": [key], "action": None})
        for _ in range(25):
            session.advance()
        heights[key] = height()
    assert heights["down"] - heights["up"] > 15


def test_the_dream_takes_over_where_the_game_stands_and_the_game_waits(session):
    for _ in range(6):
        session.advance()
    frame, steps = session.scene.frame, session.scene.steps
    z = torch.stack(session.scene.latents)
    session.do_mode("dream")
    assert torch.equal(z, torch.stack(session.scene.latents)) and session.start is None
    session.advance()
    kind, state, payload = unpack(session.view())
    assert (kind, state["mode"], state["step"]) == ("view", "dream", 1) and len(
        payload
    ) == 12_288 + 1_024
    session.do_mode("game")
    assert np.array_equal(session.scene.frame, frame) and session.scene.steps == steps


def test_the_agent_plays_in_both(session):
    session.do_player("agent")
    for mode in ("game", "dream"):
        session.do_mode(mode)
        actions = set()
        for _ in range(30):
            session.advance()
            actions.add(session.action)
        assert len(actions) > 1  # an untrained policy is uniform


def test_pause_single_step_and_a_tick_that_waited(session):
    session.do_pause(True)
    assert session.tick() is None and session.scene.steps == 0
    session.do_step(None)
    assert session.paused and session.scene.steps == 1
    session.do_pause(False)
    assert session.tick() is not None and session.scene.steps == 2


def test_restart_from_a_frame_of_the_replay(session):
    session.do_dream_from(30)
    assert (session.mode, session.start, session.scene.steps) == ("dream", 30, 0)
    frames, _, _ = play.recorded(session.model.replay, 30, session.model.args.context_frames)
    z = session.model.agent.encode(torch.from_numpy(frames)[None])  # with its past: rounds alike
    assert np.array_equal(session.scene.frame, session.model.decoder.pictures(z[:, -1:])[0, 0])
    _, header, pixels = unpack(session.preview(30))
    assert header == {"index": 30} and pixels == frames[-1].tobytes()


def test_after_an_end_a_moment_s_rest_then_a_new_start(session):
    session.do_mode("dream")
    session.scene.over = True
    assert [session.advance() for _ in range(play.REST)] == [None] * play.REST
    assert session.advance() is not None and session.scene.steps == 0 and not session.scene.over


def test_sampling_steps_change_while_playing(session, monkeypatch):
    seen = []
    network = session.model.agent.denoiser
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda *a: seen.append(1) or forward(*a))
    session.do_mode("dream")
    for wanted, steps in ((1, 1), (10, 10), (99, 10), (0, 1)):
        session.do_sampling(wanted)
        seen.clear()
        session.advance()
        session.scene.over = False  # an untrained model may say that it ends
        assert len(seen) == session.sample_steps == steps


def test_a_session_is_repeatable(model):
    def played() -> list[bytes]:
        session = play.Session(model, seed=7)
        session.do_player("agent")
        views = [session.advance() for _ in range(8)]
        session.do_mode("dream")
        views += [session.advance() for _ in range(8)]
        session.close()
        return views

    assert played() == played()


def test_a_recording_is_a_gif_with_a_frame_per_step_at_the_game_s_speed(session):
    session.do_record(True)
    for _ in range(29):
        session.advance()
    session.do_record(False)
    gif = Image.open(io.BytesIO(play.make_gif(session.film)))
    durations = []
    for i in range(gif.n_frames):
        gif.seek(i)
        durations.append(gif.info["duration"])
    assert gif.n_frames == 30 and sum(durations) == 2_000


def test_a_recording_ends_by_itself(session, monkeypatch):
    monkeypatch.setattr(play, "FILM_FRAMES", 4)
    session.do_record(True)
    for _ in range(5):
        session.advance()
    assert session.recording is None and len(session.film) == 4


def test_dream_steps_per_second(model):
    """At the sizes of the tiny preset the dream keeps up with the game, 15 steps a second. A wide margin: other jobs
    may use the machine. The figure is printed."""
    args = jedi.Args(**jedi.PRESETS["tiny"] | {"preset": "tiny"})
    agent = random_agent(args, len(model.meanings)).to(memory_format=torch.channels_last)
    sized = dataclasses.replace(model, args=args, agent=agent)
    session = play.Session(sized, seed=0)
    session.do_mode("dream")
    session.do_player("agent")
    times = []
    for _ in range(66):
        session.scene.over = False
        assert session.advance()
        times.append(time.perf_counter())
    rate = 60 / (times[-1] - times[5])
    session.close()
    print(f"{rate:.0f} dream steps per second with {torch.get_num_threads()} thread")
    assert rate > 8


# --- the server


@contextlib.asynccontextmanager
async def serving(model: play.Model):
    """The server on a free port; yields it, its address, and a client."""
    server = play.Server(model, TOKEN, threads=1)
    runner = web.AppRunner(server.app(), access_log=None, shutdown_timeout=1)
    await runner.setup()
    sock = play.listen("127.0.0.1", 0)
    await web.SockSite(runner, sock).start()
    async with aiohttp.ClientSession() as client:
        yield server, f"http://127.0.0.1:{sock.getsockname()[1]}", client
    await runner.cleanup()


def open_socket(client: aiohttp.ClientSession, address: str, token: str = TOKEN, **headers):
    return client.ws_connect(f"{address}/{token}/socket", headers={"Origin": address, **headers})


async def receive(ws, kind: str, match=lambda header: True) -> tuple[dict, bytes]:
    """The next message of a kind for which `match` holds."""
    async with asyncio.timeout(20):
        while True:
            got, header, payload = unpack(await ws.receive_bytes())
            if got == kind and match(header):
                return header, payload


def tell(ws, name: str, value=None):
    return ws.send_str(json.dumps({"do": name, "value": value}))


def test_only_the_page_s_files_only_with_token_and_only_by_our_name(model):
    async def check():
        async with serving(model) as (_, address, client):

            async def status(path: str, **headers) -> int:
                async with client.get(
                    address + path, headers=headers, allow_redirects=False
                ) as response:
                    await response.read()
                    return response.status

            port = address.rpartition(":")[2]
            for name in ("", "index.html", "play.js", "style.css"):
                assert await status(f"/{TOKEN}/{name}") == 200
            assert await status(f"/{TOKEN}") == 302
            assert await status(f"/{TOKEN}/play.py") == 404
            assert await status(f"/{TOKEN}/..%2fplay.py") in (403, 404)
            for path in (
                "/",
                "/play.js",
                "/wrong/",
                "/wrong/play.js",
                f"/{TOKEN}x/",
                f"/{TOKEN[:-1]}/",
                "/%C3%A9/",
            ):
                assert await status(path) == 403, path
            assert await status(f"/{TOKEN}/", Host=f"evil.example:{port}") == 403
            assert await status(f"/{TOKEN}/", Host="127.0.0.1.evil.example") == 403
            assert await status(f"/{TOKEN}/", Host="[") == 403
            assert (
                await status(f"/{TOKEN}/", Host="localhost:9999") == 200
            )  # a port that ssh has moved

    asyncio.run(check())


@pytest.mark.parametrize(
    "token, headers",
    [
        ("wrong", {}),
        (TOKEN, {"Origin": "http://evil.example"}),
        (TOKEN, {"Origin": "http://127.0.0.1:1"}),
        (TOKEN, {"Origin": "null"}),
        (TOKEN, {"Origin": ""}),
        (TOKEN, {"Host": "evil.example", "Origin": "http://evil.example"}),
    ],
)
def test_a_socket_needs_token_and_origin(model, token, headers):
    async def check():
        async with serving(model) as (server, address, client):
            with pytest.raises(aiohttp.WSServerHandshakeError) as error:
                await open_socket(client, address, token, **headers)
            assert error.value.status == 403 and not server.tabs

    asyncio.run(check())


def test_a_page_plays_pauses_switches_records_and_closes(model):
    async def check():
        async with serving(model) as (server, address, client):
            async with open_socket(client, address) as ws:
                hello, _ = await receive(ws, "hello")
                assert hello["game"] == "Pong" and hello["actions"] == list(PONG)
                assert hello["replay"] == model.replay.size
                await receive(ws, "view", lambda v: v["step"] == 5)
                await tell(ws, "pause", True)
                paused, _ = await receive(ws, "view", lambda v: v["paused"])
                await tell(ws, "step")
                stepped, _ = await receive(ws, "view", lambda v: v["step"] > paused["step"])
                assert stepped["step"] == paused["step"] + 1 and stepped["paused"]
                await tell(ws, "dream_from", 12)
                dreamt, payload = await receive(ws, "view", lambda v: v["mode"] == "dream")
                assert dreamt["start"] == 12 and len(payload) == 12_288 + 1_024
                await tell(ws, "record", True)
                for _ in range(3):
                    await tell(ws, "step")
                await tell(ws, "record", False)
                header, gif = await receive(ws, "film")
                assert header["frames"] == Image.open(io.BytesIO(gif)).n_frames == 4
                await tell(ws, "preview", 7)
                assert (await receive(ws, "preview"))[0]["index"] == 7
            async with asyncio.timeout(5):
                while server.tabs:
                    await asyncio.sleep(0.01)

    asyncio.run(check())


def test_nonsense_is_answered_and_playing_goes_on(model):
    nonsense = (
        "{",
        "[]",
        "3",
        "{}",
        '{"do": "close"}',
        '{"do": "mode", "value": []}',
        '{"do": "sampling"}',
    )
    keys = '{"do": "hold", "value": {"keys": ["x"], "action": null}}'

    async def check():
        async with serving(model) as (_, address, client), open_socket(client, address) as ws:
            for text in (*nonsense, keys):
                await ws.send_str(text)
                assert "makes no sense" in (await receive(ws, "error"))[0]["text"]
            for speed, used in (("1e999", play.SPEEDS[1]), ("NaN", play.SPEEDS[0])):
                await ws.send_str(f'{{"do": "speed", "value": {speed}}}')
                await receive(ws, "view", lambda v, used=used: v["speed"] == used)

    asyncio.run(check())


def test_tabs_come_and_go_without_disturbing_each_other(model):
    """One plays the game, one dreams, one reads nothing, one vanishes without a word."""

    async def check():
        async with serving(model) as (server, address, client):
            sockets = [await open_socket(client, address) for _ in range(4)]
            game, asleep, dreamer, vanishing = sockets
            await tell(dreamer, "mode", "dream")
            for ws in sockets:
                await receive(ws, "view")
            await tell(asleep, "speed", 4)
            vanishing._response.connection.transport.abort()
            async with asyncio.timeout(5):
                while len(server.tabs) > 3:
                    await asyncio.sleep(0.01)
            now = (await receive(game, "view"))[0]["step"]
            begun = time.perf_counter()
            view, _ = await receive(game, "view", lambda v: v["step"] >= now + 15)
            assert view["mode"] == "game" and time.perf_counter() - begun < 5
            assert (await receive(dreamer, "view"))[0]["mode"] == "dream"
            sleeper = next(tab for tab in server.tabs if tab.session.speed == 4)
            assert len(sleeper.outbox.views) <= 3
            for ws in (game, asleep, dreamer):
                await ws.close()

    asyncio.run(check())


def test_a_slow_tab_misses_views_but_holds_nothing_up():
    async def check():
        outbox = play.Outbox()
        for i in range(100):
            outbox.put(b"%d" % i)
        outbox.put(b"hello", letter=True)
        assert [await outbox.get() for _ in range(4)] == [b"hello", b"97", b"98", b"99"]

    asyncio.run(check())


def test_the_server_ends_while_tabs_are_open(model):
    async def check():
        async with serving(model) as (server, address, client):
            ws = await open_socket(client, address)
            await receive(ws, "view")
            begun = time.perf_counter()
            closing = asyncio.create_task(server.close_tabs(None))
            while not ws.closed:
                await ws.receive()
            await closing
            assert (
                ws.close_code == aiohttp.WSCloseCode.GOING_AWAY and time.perf_counter() - begun < 5
            )
        assert not server.tabs

    asyncio.run(check())


def test_there_is_a_limit_of_tabs(model, monkeypatch):
    monkeypatch.setattr(play, "MOST_TABS", 1)

    async def check():
        async with serving(model) as (_, address, client), open_socket(client, address):
            with pytest.raises(aiohttp.WSServerHandshakeError) as error:
                await open_socket(client, address)
            assert error.value.status == 503

    asyncio.run(check())


def test_what_fails_in_a_tab_is_said_there_and_ends_it_alone(model, monkeypatch, capsys):
    async def check():
        async with serving(model) as (server, address, client):
            ws = await open_socket(client, address)
            await receive(ws, "view")
            scene = next(iter(server.tabs)).session.scene
            await server.work(
                setattr, scene, "latents", []
            )  # between two steps: within one it would be mended
            assert "the terminal of play.py says more" in (await receive(ws, "error"))[0]["text"]
            async with open_socket(client, address) as other:
                await receive(other, "view", lambda v: v["step"] > 2)

    asyncio.run(check())
    assert "Traceback" in capsys.readouterr().err


# --- bad input


def refused(capsys, *arguments) -> str:
    """The one line on stderr."""
    assert play.main([str(a) for a in arguments]) == 2
    line, end = capsys.readouterr().err.split("\n")
    assert line.startswith("play.py: error: ") and not end
    return line


def test_a_folder_without_checkpoint(capsys, tmp_path):
    assert "checkpoint.pt is missing" in refused(capsys, tmp_path)
    assert "checkpoint.pt is missing" in refused(capsys, tmp_path / "nowhere")


def test_a_run_of_another_game(capsys, run_dir):
    assert "is a run of Pong, not of Krull" in refused(capsys, run_dir, "--env-id", "Krull")
    assert "is a run of Pong, not of Pang" in refused(capsys, run_dir, "--env-id", "Pang")


@pytest.mark.parametrize(
    "arguments, text",
    [
        ([], "required: run_dir"),
        (["x", "--speed", "3"], "unrecognized arguments"),
        (["x", "--port", "x"], "invalid int value"),
        (["x", "--port", "70000"], "--port is 70000"),
        (["x", "--threads", "-1"], "--threads is -1"),
    ],
)
def test_bad_arguments(capsys, arguments, text):
    assert text in refused(capsys, *arguments)


def test_a_run_of_a_script_that_is_not_here(capsys, run_dir, tmp_path):
    """Only a script beside play.py is imported: not what a checkpoint names, nor the copy in its folder."""
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    saved = jedi.load_checkpoint(run_dir)
    for name in ("evil", str(tmp_path / "evil"), "../evil", "tests/toys", ""):
        jedi.save_checkpoint(tmp_path, saved | dict(script=name))
        assert f"made by {name}.py; put that beside play_pictures.py" in refused(capsys, tmp_path)


def test_a_host_that_is_not_here(capsys, run_dir):
    assert "cannot listen on 192.0.2.1" in refused(
        capsys, run_dir, "--host", "192.0.2.1", "--device", "cpu"
    )


def test_a_taken_port_takes_the_next_and_says_so(capsys):
    with play.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with play.listen("127.0.0.1", port) as other:
            assert other.getsockname()[1] > port
        assert f"port {port} is taken" in capsys.readouterr().out
        with pytest.raises(jedi.BadInput, match="are all taken"):
            play.listen("127.0.0.1", port, tries=1)


@pytest.mark.parametrize(
    "header, listening, own",
    [
        ("127.0.0.1:8000", "127.0.0.1", True),
        ("[::1]:8000", "::1", True),
        ("localhost", "127.0.0.1", True),
        ("box.lan:80", "127.0.0.1", False),
        ("box.lan:80", "box.lan", True),
        (socket.gethostname(), "0.0.0.0", True),
        (socket.gethostname(), "127.0.0.1", False),
        ("", "127.0.0.1", False),
    ],
)
def test_names_of_this_machine(header, listening, own):
    assert play.own_host(header, listening) == own

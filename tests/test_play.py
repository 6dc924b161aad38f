"""play/: the dream as an environment, what a tab plays, and the server, with the real Pong and a very small run."""

import asyncio
import contextlib
import dataclasses
import functools
import io
import json
import shutil
import struct
import time
from pathlib import Path

import aiohttp
import gymnasium as gym
import numpy as np
import pytest
import torch
from aiohttp import web
from conftest import MICRO, random_agent, replace
from gymnasium.utils.env_checker import check_env
from PIL import Image

import jedi_atari as jedi
import jedi_atari_stochastic
import play.__main__ as command
import play.server as serve
from play import DreamEnv, runs, scenes
from play import session as sessions

TOKEN = "the-token"


@functools.cache
def micro_run(folder: Path, script=jedi) -> Path:
    """The folder of a run and a decoder, hardly trained. Takes seconds, so it is made once, whoever asks; nothing here
    writes into it."""
    run_dir = folder / f"play-run-{script.__name__}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "UPDATES", 5)
        patch.setattr(runs, "PROBE", 16)
        script.train(
            script.Args(**MICRO | dict(run_dir=str(run_dir), final_episodes=1, encoder_stride=2))
        )
        assert runs.load_run(run_dir, "cpu").decoder
    return run_dir


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return micro_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def run(run_dir) -> runs.Run:
    return runs.load_run(run_dir, "cpu")


def variant(run: runs.Run, **changes) -> runs.Run:
    """The same run with something else in it, but its decoder and play."""
    assert run.decoder and run.replay and run.meanings and run.metrics
    other = dataclasses.replace(run, **changes)
    other.__dict__.update({**run.__dict__, **other.__dict__})
    return other


@pytest.fixture
def session(run):
    session = sessions.Session(run, seed=0)
    yield session
    session.close()


def unpack(message: bytes) -> tuple[str, dict, bytes]:
    """What the page does with a message."""
    kind, length = struct.unpack_from("<BI", message)
    return sessions.KINDS[kind], json.loads(message[5 : 5 + length]), message[5 + length :]


# --- DreamEnv


@pytest.mark.filterwarnings("ignore::UserWarning")  # check_env's advice on spaces and on rendering
def test_dream_env_passes_the_environment_checker(run):
    check_env(DreamEnv(run, render_mode="rgb_array"), skip_render_check=False)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_dream_env_can_be_made_by_its_name(run_dir):
    env = gym.make("play:JediDream-v0", run=str(run_dir), max_steps=3)
    check_env(env.unwrapped)
    env.reset(seed=0)
    assert env.step(0)[0].shape == (64, 64, 3)


def dream(env: DreamEnv, seed: int, steps: int = 12, disturb: bool = False) -> list:
    played = [env.reset(seed=seed)]
    for i in range(steps):
        if disturb:
            torch.rand(3)
        played.append(env.step(i % 3))
    return played


def same(a: list, b: list) -> bool:
    return all(np.array_equal(x[0], y[0]) and x[1:] == y[1:] for x, y in zip(a, b, strict=True))


def test_same_seed_same_dream_whatever_else_is_drawn(run):
    env = DreamEnv(run)
    first = dream(env, 5)
    assert same(first, dream(env, 5, disturb=True))
    assert same(first, dream(DreamEnv(run), 5))
    assert not same(first, dream(env, 6))


def test_what_no_dream_can_do_is_refused(run):
    for arguments in (dict(sample_steps=0), dict(max_steps=0)):
        with pytest.raises(ValueError, match="at least 1"):
            DreamEnv(run, **arguments)
    env = DreamEnv(run)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)
    env.reset(seed=0)
    for action in (-1, 6):
        with pytest.raises(gym.error.InvalidAction, match="0 to 5"):
            env.step(action)


def test_two_dreams_do_not_disturb_each_other(run):
    alone, (a, b) = dream(DreamEnv(run), 5), (DreamEnv(run), DreamEnv(run))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    together = [a.reset(seed=5)]
    b.reset(seed=9)
    for i in range(12):
        together.append(a.step(i % 3))
        b.step(0)
    assert same(alone, together)
    assert torch.equal(before, torch.get_rng_state())


def test_a_dream_is_what_imagine_makes_of_the_same_draws(run, micro):
    """Latents step by step as in training, and R_psi carried step by step as when it sees all at once."""
    agent = random_agent(micro, len(run.meanings))
    run = variant(run, agent=agent)
    n, steps, index = run.args.context_frames, 6, 20
    frames, taken, _ = scenes.recorded(run.replay, index, n)
    actions, chance = [3, 1, 0, 2, 2, 4], scenes.Chance(3, run.device)
    scene, latents, probs = scenes.Dream(run), [], []
    scene.begin(frames, taken)
    for action in actions:
        with chance.drawn(), torch.no_grad():
            state = torch.get_rng_state()
            context, past = torch.stack(scene.latents, 1), torch.tensor([[*scene.taken, action]])
            expected = jedi.sample_next_latent(agent, context, past, run.args)
            torch.set_rng_state(state)
            scene.step(action, run.args.sample_steps)
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


def test_dreams_end_by_the_model_or_by_the_limit(run):
    def ended(end_bias: float) -> tuple:
        agent = random_agent(jedi.Args(**MICRO), len(run.meanings))
        agent.reward.head[-1].bias.data[3:] = torch.tensor([-end_bias, end_bias])
        env = DreamEnv(variant(run, agent=agent), max_steps=2)
        env.reset(seed=0)
        return tuple(env.step(0)[2:4] for _ in range(2))

    assert ended(50.0)[0] == (True, False)
    assert ended(-50.0) == ((False, False), (False, True))


def test_a_dream_can_start_from_any_frame(run):
    env = DreamEnv(run)
    final = MICRO["max_episode_steps"]  # the first game's last frame
    for index in (0, 1, final, final + 1, run.replay.size - 1):
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
        seen, taken, index = scenes.recorded(replay, index, 4)
        return seen[:, 0, 0, 0].tolist(), taken, index

    assert window(0) == window(-5) == ([0], [], 0)
    assert window(1) == ([0, 1], [1], 1)
    assert window(2) == window(1)  # nothing follows an episode's last frame
    assert window(3) == ([3], [], 3)
    assert window(99) == ([3, 4, 5], [3, 4], 5)  # this one is still open
    replay.add(frames[0], 6, 0.0, False, frames[0])
    assert window(99) == ([3, 4, 5, 0], [3, 4, 5], 6)
    assert scenes.recorded(replay, 5, 2)[1] == [4]


def test_a_run_of_the_other_script_plays_too(tmp_path):
    run = runs.load_run(micro_run(tmp_path, jedi_atari_stochastic), "cpu")
    assert run.script is jedi_atari_stochastic and run.args.s_churn == 1
    assert run.replay.size > 70
    session = sessions.Session(run, seed=0)
    session.advance()
    assert (session.game.steps, session.dream.steps) == (1, 1)
    session.close()


def test_games_that_name_no_actions_have_numbered_ones(micro, monkeypatch):
    monkeypatch.delattr("examples.toys.Catch.get_action_meanings")
    collector = jedi.Collector(replace(micro, env_id="examples.toys:Catch-v0"))
    run = runs.Run(Path(), jedi, micro, None, {}, collector)
    assert run.meanings == ("ACTION 0", "ACTION 1", "ACTION 2")
    assert sessions.key_actions(run.meanings) == {}


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
    action = sessions.choose_action(meanings, frozenset(held.split()), frozenset(fresh.split()))
    assert meanings[action] == chosen


def test_what_the_keys_do_is_said_once():
    """Of keys that do the same, as left and down in Pong, one is named."""
    assert sessions.key_actions(PONG) == {"up": "RIGHT", "down": "LEFT", "fire": "FIRE"}
    assert sessions.key_actions(SEAQUEST)["left"] == "LEFT"
    assert set(sessions.key_actions(SEAQUEST)) == set(sessions.KEYS)


def test_a_tap_shorter_than_a_step_counts_once(session):
    session.hold({"keys": ["fire"], "action": None})
    session.hold({"keys": [], "action": None})
    session.advance()
    assert session.run.meanings[session.action] == "FIRE"
    session.advance()
    assert session.run.meanings[session.action] == "NOOP"
    session.hold({"keys": [], "action": 3})
    session.hold({"keys": [], "action": None})
    session.advance()
    assert session.action == 3


# --- a session


def paddle_height(frame: np.ndarray) -> float:
    """Pong's own paddle, green, on the right."""
    part = frame[8:62, 54:62].astype(int)
    return np.nonzero(part[..., 1] - part[..., 0] > 40)[0].mean()


def test_the_real_game_moves_with_the_keys(session):
    """Up with up, down with down."""
    heights = {}
    for key in ("up", "down"):
        session.hold({"keys": [key], "action": None})
        for _ in range(25):
            session.advance()
        heights[key] = paddle_height(session.game.frame)
    assert heights["down"] - heights["up"] > 15


def test_it_opens_with_a_still_picture_of_both(session):
    assert session.paused and session.tick() is None
    _, state, payload = unpack(session.view())
    assert state["mode"] == "both" and state["game"]["step"] == state["dream"]["step"] == 0
    sizes = {"game": 12_288, "dream": 12_288, "latents": 1_024}
    assert state["parts"] == sizes and len(payload) == sum(sizes.values())
    assert payload[:12_288] == session.game.frame.tobytes()


def test_game_and_dream_take_the_same_actions_from_the_same_moment(session, monkeypatch):
    """The dream begins with the game's latents, and again after its length, with what is then."""
    session.do_length(5)
    session.hold({"keys": ["up"], "action": None})
    taken = []
    step = sessions.Dream.step
    monkeypatch.setattr(sessions.Dream, "step", lambda s, a, n: taken.append(a) or step(s, a, n))
    assert all(map(torch.equal, session.dream.latents, session.game.latents))
    for _ in range(5):
        session.advance()
        session.dream.over = False  # an untrained model may say that it ends
        assert taken[-1] == session.action == 2
    assert session.ended("dream") and not session.ended("game")
    for _ in range(sessions.BREATH + 1):
        session.advance()
    assert len(taken) == 5 and session.dream.steps == 0 and session.game.steps == 10
    assert all(map(torch.equal, session.dream.latents, session.game.latents))


def test_a_dream_alone_begins_anew_in_recorded_play(session):
    session.do_mode(["dream", "human"])
    assert session.start is None  # where the game stood
    session.dream.steps = session.length
    for _ in range(sessions.BREATH):
        assert session.advance() is None
    assert session.advance() and session.start is not None and session.dream.steps == 0


def test_the_game_waits_while_the_dream_is_played(session):
    for _ in range(6):
        session.advance()
    frame, steps = session.game.frame, session.game.steps
    session.do_mode(["dream", "human"])
    assert all(map(torch.equal, session.dream.latents, session.game.latents))
    session.advance()
    _, state, payload = unpack(session.view())
    assert (state["mode"], state["dream"]["step"]) == ("dream", 1) and "game" not in state
    assert len(payload) == 12_288 + 1_024
    session.do_mode(["game", "human"])
    assert session.game.frame is frame and session.game.steps == steps


def test_a_run_s_own_error_sets_the_length_of_its_dreams(run, session):
    """As far as it was measured; 15 where it was not."""
    assert run.open_loop and session.length == len(run.open_loop)
    _, hello, _ = unpack(session.hello())
    assert hello["open_loop"] == [pytest.approx(x, abs=1e-4) for x in run.open_loop]
    unmeasured = variant(run)
    unmeasured.__dict__["metrics"] = []
    other = sessions.Session(unmeasured, seed=0)
    assert other.length == 15
    other.close()


def test_the_agent_plays_in_all_modes(session):
    for mode in ("both", "game", "dream"):
        session.do_mode([mode, "agent"])
        actions = set()
        for _ in range(30):
            session.dream.over = False
            session.advance()
            actions.add(session.action)
        assert len(actions) > 1  # an untrained policy is uniform


def test_the_console_s_own_screen_is_sent_when_asked(session):
    session.do_screen(True)
    session.advance()
    _, state, payload = unpack(session.view())
    assert state["parts"]["screen"] == 210 * 160 * 3
    screen = np.frombuffer(payload[-210 * 160 * 3 :], np.uint8).reshape(210, 160, 3)
    assert np.array_equal(screen, session.game.env.unwrapped.ale.getScreenRGB())


def test_pause_single_step_and_a_tick_that_waited(session):
    session.do_step(None)
    assert session.paused and session.game.steps == 1 and session.tick() is None
    session.do_pause(False)
    assert session.tick() is not None and session.game.steps == 2


def test_a_dream_from_a_frame_of_the_replay(session):
    session.do_dream_from(30)
    assert (session.mode, session.start, session.dream.steps) == ("dream", 30, 0)
    frames, _, _ = scenes.recorded(session.run.replay, 30, session.run.args.context_frames)
    z = session.run.agent.encode(torch.from_numpy(frames)[None])  # with its past: rounds alike
    assert np.array_equal(session.dream.frame, session.run.decoder.pictures(z[:, -1:])[0, 0])
    _, header, pixels = unpack(session.preview(30))
    assert header == {"index": 30} and pixels == frames[-1].tobytes()


def test_after_an_end_a_moment_s_rest_then_a_new_start(session):
    session.do_mode(["game", "human"])
    session.advance()
    session.game.over = True
    assert [session.advance() for _ in range(sessions.REST)] == [None] * sessions.REST
    assert session.advance() is not None and session.game.steps == 0 and not session.game.over


def test_a_new_game_takes_its_dream_along(session):
    for _ in range(3):
        session.advance()
    session.game.over = True
    for _ in range(sessions.REST + 1):
        session.advance()
    assert session.game.steps == session.dream.steps == 0
    assert all(map(torch.equal, session.dream.latents, session.game.latents))


def test_no_dream_begins_in_a_finished_game(session):
    """Its length ends while the game's last picture rests: it waits for the next game."""
    session.do_length(1)
    session.advance()
    session.game.over = True
    steps = []
    for _ in range(sessions.REST + 1):
        session.advance()
        steps.append(session.dream.steps)
    assert steps == [1] * sessions.REST + [0] and session.game.steps == 0
    session.game.over = True
    session.do_mode(["game", "human"])
    session.do_mode(["both", "human"])
    assert not session.game.over and session.game.steps == 0


def test_sampling_steps_change_while_playing(session, monkeypatch):
    seen = []
    network = session.run.agent.denoiser
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda *a: seen.append(1) or forward(*a))
    for wanted, steps in ((1, 1), (10, 10), (99, 10), (0, 1)):
        session.do_sampling(wanted)
        seen.clear()
        session.advance()
        session.dream.over = False
        assert len(seen) == session.sample_steps == steps


def test_a_session_is_repeatable(run):
    def played() -> list[bytes]:
        session = sessions.Session(run, seed=7)
        views = []
        for mode in ("both", "dream"):
            session.do_mode([mode, "agent"])
            views += [session.advance() for _ in range(8)]
        session.close()
        return views

    assert played() == played()


def test_a_recording_has_a_moment_for_each_step(session, monkeypatch):
    monkeypatch.setattr(sessions, "FILM_FRAMES", 4)
    session.do_record(True)
    for _ in range(5):
        session.advance()
    assert session.recording is None and len(session.film) == 4  # it ended by itself
    (game, dream) = session.film[1]
    assert (game.text, dream.text) == ("real game", "dream, step 1")


@pytest.mark.parametrize("mode", ["both", "dream"])
def test_steps_per_second(run, mode):
    """At the sizes of the tiny preset it keeps up with the game, 15 steps a second. A wide margin:
    other jobs may use the machine. The figure is printed."""
    args = jedi.Args(**jedi.PRESETS["tiny"] | {"preset": "tiny"})
    agent = random_agent(args, len(run.meanings)).to(memory_format=torch.channels_last)
    session = sessions.Session(variant(run, args=args, agent=agent), seed=0)
    session.do_length(500)
    session.do_mode([mode, "agent"])
    times = []
    for _ in range(66):
        session.dream.over = False
        assert session.advance()
        times.append(time.perf_counter())
    rate = 60 / (times[-1] - times[5])
    session.close()
    print(f"{mode}: {rate:.0f} steps per second with {torch.get_num_threads()} thread")
    assert rate > 8


# --- the server


@contextlib.asynccontextmanager
async def serving(run: runs.Run, *arguments: str):
    """The server on a free port; yields it, its address, and a client."""
    options = command.parse(["--threads", "1", *arguments])
    server = serve.Server(run, TOKEN, options)
    runner = web.AppRunner(server.app(), access_log=None, shutdown_timeout=1)
    await runner.setup()
    sock = serve.listen("127.0.0.1", 0)
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


def test_only_the_page_s_files_and_only_with_the_token(run):
    async def check():
        async with serving(run) as (_, address, client):

            async def status(path: str, **headers) -> int:
                async with client.get(
                    address + path, headers=headers, allow_redirects=False
                ) as response:
                    await response.read()
                    return response.status

            for name in ("", "index.html", "play.js", "style.css", "README.md"):
                assert await status(f"/{TOKEN}/{name}") == 200
            assert await status(f"/{TOKEN}") == 302
            assert await status(f"/{TOKEN}/server.py") == 404
            assert await status(f"/{TOKEN}/..%2fserver.py") in (403, 404)
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
            # By whatever name a proxy or ssh knows this machine: the token is the secret.
            for host in ("box.example:80", "localhost:9999", "["):
                assert await status(f"/{TOKEN}/", Host=host) == 200
                assert await status("/wrong/", Host=host) == 403

    asyncio.run(check())


@pytest.mark.parametrize(
    "arguments, headers, status",
    [
        ([], {}, 101),
        ([], {"Host": "box.example", "Origin": "https://box.example"}, 101),  # ssh, a name, a proxy
        ([], {"Origin": "https://box.example"}, 403),  # a proxy that asks by another name
        ([], {"Origin": "https://box.example", "X-Forwarded-Host": "box.example"}, 101),
        (["--allow-host", "box.example"], {"Origin": "https://box.example"}, 101),
        (
            ["--allow-host", "b.example", "--allow-host", "Box.example"],
            {"Origin": "https://box.example"},
            101,
        ),
        (["--allow-host", "box.example"], {"Origin": "https://evil.example"}, 403),
        ([], {"Origin": "null"}, 403),
        ([], {"Origin": ""}, 403),
        ([], {"Origin": "http://["}, 403),
    ],
)
def test_a_socket_is_for_the_page_s_own_origin(run, arguments, headers, status):
    async def check():
        async with serving(run, *arguments) as (server, address, client):
            try:
                async with open_socket(client, address, **headers) as ws:
                    await receive(ws, "hello")
                    got = 101
            except aiohttp.WSServerHandshakeError as error:
                got = error.status
                assert not server.tabs
            assert got == status
            # Why, for the page, which cannot read the answer to its socket.
            post = {"Origin": address, **headers}
            async with client.post(f"{address}/{TOKEN}/socket", headers=post) as response:
                text = await response.text()
                assert response.status == (204 if status == 101 else 403)
            if headers.get("Origin") == "https://box.example" and status == 403:
                assert "'box.example'" in text and "127.0.0.1" in text
                assert "python -m play --allow-host box.example" in text

    asyncio.run(check())


def test_a_socket_needs_the_token(run):
    async def check():
        async with serving(run, "--allow-host", "127.0.0.1") as (server, address, client):
            with pytest.raises(aiohttp.WSServerHandshakeError) as error:
                await open_socket(client, address, "wrong")
            assert error.value.status == 403 and not server.tabs

    asyncio.run(check())


def test_a_page_plays_pauses_switches_records_and_closes(run):
    async def check():
        async with serving(run) as (server, address, client):
            async with open_socket(client, address) as ws:
                hello, _ = await receive(ws, "hello")
                assert hello["game"] == "Pong" and hello["actions"] == list(PONG)
                assert hello["replay"] == run.replay.size
                await tell(ws, "pause", False)
                await receive(ws, "view", lambda v: v["game"]["step"] == 5)
                await tell(ws, "pause", True)
                paused, _ = await receive(ws, "view", lambda v: v["paused"])
                now = paused["game"]["step"]
                await tell(ws, "step")
                stepped, _ = await receive(ws, "view", lambda v: v["game"]["step"] > now)
                assert stepped["game"]["step"] == now + 1 and stepped["paused"]
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


def test_nonsense_is_answered_and_playing_goes_on(run):
    nonsense = (
        "{",
        "[]",
        "3",
        "{}",
        '{"do": "close"}',
        '{"do": "mode", "value": []}',
        '{"do": "mode", "value": ["both", "nobody"]}',
        '{"do": "length", "value": "x"}',
        '{"do": "dream_from", "value": null}',
        "[" * 4_000,
        '{"do": "sampling"}',
    )
    keys = '{"do": "hold", "value": {"keys": ["x"], "action": null}}'

    async def check():
        async with serving(run) as (_, address, client), open_socket(client, address) as ws:
            for text in (*nonsense, keys):
                await ws.send_str(text)
                assert "makes no sense" in (await receive(ws, "error"))[0]["text"]
            for speed, used in (("1e999", sessions.SPEEDS[1]), ("NaN", sessions.SPEEDS[0])):
                await ws.send_str(f'{{"do": "speed", "value": {speed}}}')
                await receive(ws, "view", lambda v, used=used: v["speed"] == used)

    asyncio.run(check())


def test_tabs_come_and_go_without_disturbing_each_other(run):
    """One plays the game, one dreams, one reads nothing, one vanishes without a word."""

    async def check():
        async with serving(run) as (server, address, client):
            sockets = [await open_socket(client, address) for _ in range(4)]
            game, asleep, dreamer, vanishing = sockets
            await tell(dreamer, "mode", ["dream", "human"])
            for ws in sockets:
                await tell(ws, "pause", False)
                await receive(ws, "view")
            await tell(asleep, "speed", 4)
            vanishing._response.connection.transport.abort()
            async with asyncio.timeout(5):
                while len(server.tabs) > 3:
                    await asyncio.sleep(0.01)
            now = (await receive(game, "view"))[0]["game"]["step"]
            begun = time.perf_counter()
            view, _ = await receive(game, "view", lambda v: v["game"]["step"] >= now + 15)
            assert view["mode"] == "both" and time.perf_counter() - begun < 8
            await receive(dreamer, "view", lambda v: v["mode"] == "dream")
            for ws in (game, asleep, dreamer):
                await ws.close()

    asyncio.run(check())


def test_the_server_ends_while_tabs_are_open(run):
    async def check():
        async with serving(run) as (server, address, client):
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


def test_there_is_a_limit_of_tabs(run, monkeypatch):
    monkeypatch.setattr(serve, "MOST_TABS", 1)

    async def check():
        async with serving(run) as (_, address, client), open_socket(client, address):
            with pytest.raises(aiohttp.WSServerHandshakeError) as error:
                await open_socket(client, address)
            assert error.value.status == 503
            post = {"Origin": address}
            async with client.post(f"{address}/{TOKEN}/socket", headers=post) as response:
                assert "1 pages are open already" in await response.text()

    asyncio.run(check())


def test_what_fails_in_a_tab_is_said_there_and_ends_it_alone(run, monkeypatch, capsys):
    async def check():
        async with serving(run) as (server, address, client):
            ws = await open_socket(client, address)
            await receive(ws, "view")
            game = next(iter(server.tabs)).session.game
            await server.work(setattr, game, "latents", [])
            await tell(ws, "pause", False)
            assert "the terminal says more" in (await receive(ws, "error"))[0]["text"]
            async with open_socket(client, address) as other:
                await tell(other, "pause", False)
                await receive(other, "view", lambda v: v["game"]["step"] > 2)

    asyncio.run(check())
    assert "Traceback" in capsys.readouterr().err


# --- bad input


def refused(capsys, *arguments) -> str:
    """The one line on stderr."""
    capsys.readouterr()
    assert command.main([str(a) for a in arguments]) == 2
    line, end = capsys.readouterr().err.split("\n")
    assert line.startswith("play: error: ") and not end
    return line


def test_a_folder_without_checkpoint(capsys, tmp_path):
    assert "checkpoint.pt is missing" in refused(capsys, tmp_path)
    assert "there is no folder" in refused(capsys, tmp_path / "nowhere")


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda saved: saved.pop("collector"), "holds no play"),
        (lambda saved: saved["collector"].update(actions=torch.zeros(0)), "holds no play"),
        (lambda saved: saved["agent"].popitem(), "other networks"),
        (lambda saved: saved.update(args=json.dumps({"env_id": "Pong"})), "other arguments"),
    ],
)
def test_a_checkpoint_that_cannot_be_used(capsys, run_dir, tmp_path, change, text):
    saved = jedi.load_checkpoint(run_dir)
    change(saved)
    jedi.save_checkpoint(tmp_path, saved)
    assert text in refused(capsys, tmp_path)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["x", "--speed", "3"], "unrecognized arguments"),
        (["x", "--port", "x"], "invalid int value"),
        (["x", "--port", "70000"], "--port is 70000"),
        (["x", "--threads", "-1"], "--threads is -1"),
        (["x", "--host", ""], "--host is empty"),
    ],
)
def test_bad_arguments(capsys, arguments, text):
    assert text in refused(capsys, *arguments)


def test_without_a_run_the_showcase_is_played():
    options = command.parse([])
    run = runs.load_run(options.run_dir, "cpu")
    assert run.game == "Pong" and len(run.open_loop) >= 50 and "showcase" in run.about
    assert run.replay.size > 300 and (run.folder / "decoder.pt").is_file()
    assert sum(path.stat().st_size for path in run.folder.iterdir()) < 15e6


def test_the_replay_is_the_runs_own_whatever_else_its_collector_played(run_dir):
    one, other = (runs.load_run(str(run_dir), "cpu") for _ in range(2))
    one.collector.step(None, jedi.ReplayBuffer(10, one.device))
    assert torch.equal(one.replay.frames, other.replay.frames)


def test_a_run_of_a_script_that_is_not_here(capsys, run_dir, tmp_path):
    """Only what is named, lies in the folder or beside play/ is run: not what a checkpoint says."""
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    saved = jedi.load_checkpoint(run_dir)
    (run := tmp_path / "run").mkdir()
    for name in ("evil", str(tmp_path / "evil"), "../evil", "tests/toys", ""):
        jedi.save_checkpoint(run, saved | dict(script=name))
        assert f"made by {name}.py, which is not there" in refused(capsys, run)


def test_a_fork_is_played_with_the_script_in_its_folder_or_the_one_named(capsys, run_dir, tmp_path):
    """Other networks than this repository's, so that no other script would do."""
    text = Path(jedi.__file__).read_text()
    fork = text.replace('"""JEDI (Joint', 'FORKED = True\n"""JEDI (Joint', 1)
    fork = fork.replace("self.conv_out = zero_(conv3x3(width, channels))",
                        "self.conv_extra = conv3x3(width, channels)\n"
                        "        self.conv_out = zero_(conv3x3(width, channels))")  # fmt: skip
    (named := tmp_path / "somewhere" / "my_fork.py").parent.mkdir()
    named.write_text(fork)
    shutil.copytree(run_dir, run := tmp_path / "run")
    saved = jedi.load_checkpoint(run_dir)
    extra = torch.nn.Conv2d(MICRO["denoiser_width"], 16, 3, padding=1).state_dict()
    saved["agent"] |= {f"denoiser.conv_extra.{key}": value for key, value in extra.items()}
    jedi.save_checkpoint(run, saved | dict(script="my_fork"))
    assert "my_fork.py, which is not there" in refused(capsys, run)
    assert runs.load_run(run, "cpu", script=named).script.FORKED
    shutil.copy(named, run)
    played = runs.load_run(run, "cpu")
    assert played.script.FORKED and played.agent.denoiser.conv_extra
    session = sessions.Session(played, seed=0)
    assert session.advance()
    session.close()
    assert "other networks" in refused(capsys, run, "--script", jedi.__file__)
    assert not list(run.rglob("__pycache__"))
    assert "there is no script" in refused(capsys, run, "--script", tmp_path / "gone.py")
    named.write_text("raise SystemExit('Python 4 is needed')")
    assert "Python 4 is needed" in refused(capsys, run, "--script", named)
    named.write_text("x = 1")
    assert "Is it a JEDI script" in refused(capsys, run, "--script", named)


def test_a_host_that_is_not_here(capsys, run_dir):
    for host in ("192.0.2.1", "bücher..x", "a" * 300):
        assert f"cannot listen on {host}" in refused(capsys, run_dir, "--host", host)


def test_a_taken_port_takes_the_next_and_says_so(capsys):
    with serve.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with serve.listen("127.0.0.1", port) as other:
            assert other.getsockname()[1] > port
        assert f"port {port} is taken" in capsys.readouterr().out
        with pytest.raises(jedi.BadInput, match="are all taken"):
            serve.listen("127.0.0.1", port, tries=1)

"""The page in a real browser, headless Chromium, against `python -m play` with the real Pong."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from urllib.parse import urljoin, urlsplit

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from conftest import ROOT
from PIL import Image
from test_play import micro_run

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install playwright"
)
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
if not CHROMIUM:
    pytest.skip("there is no Chromium: apt-get install chromium", allow_module_level=True)

FLAGS = [
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PHONE, SIDEWAYS = {"width": 390, "height": 844}, {"width": 844, "height": 390}
LAPTOP = {"width": 1366, "height": 657}  # what a browser leaves of 1366 x 768


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """python -m play, started as a person would; its address."""
    # PLAY_RUN: look at the page with another run.
    run_dir = os.environ.get("PLAY_RUN") or micro_run(tmp_path_factory.getbasetemp())
    command = [sys.executable, "-um", "play", str(run_dir), "--port", "8123", "--threads", "1"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        printed = ""
        for line in process.stdout:
            printed += line
            if "Ctrl-C" in line:
                break
        found = re.search(r"http://127\.0\.0\.1:\d+/\S+/", printed)
        assert found, printed + process.stderr.read()
        yield found[0]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out) == (0, "stopped\n")
        assert "Traceback" not in err


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:  # with a fresh user data folder each time
        browser = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, address: str, going: bool = True, **options):
    """The page, playing, or as it opens; whatever it writes to the console as an error fails the test."""
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
    page, errors = context.new_page(), []
    page.on(
        "console", lambda message: errors.append(message.text) if message.type == "error" else None
    )
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(f"failed: {request.url}"))
    page.goto(address)
    wait_text(page, "#overlay b", "^Press ")
    if going:
        page.click("#pause")
        wait_text(page, "#pause", "^Pause$")
    yield page
    context.close()
    assert not errors


@pytest.fixture
def page(browser, address):
    with opened(browser, address) as page:
        yield page


def text(page, selector: str) -> str:
    return page.locator(selector).inner_text()


def step_count(page, name: str = "game") -> int:
    """Steps since the start of the game or dream."""
    return page.evaluate(f"view.{name}.step")


def pixels(page, canvas: str = "game") -> np.ndarray:
    """What a canvas shows, (h, w, 3)."""
    script = """id => { const c = document.getElementById(id);
        return [c.width, c.height, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]] }"""
    width, height, data = page.evaluate(script, canvas)
    return np.array(data, np.uint8).reshape(height, width, 4)[..., :3]


def paddle(page) -> float:
    """Height at which one's own paddle is in Pong: green, on the right."""
    part = pixels(page)[8:62, 54:62].astype(int)
    return float(np.nonzero(part[..., 1] - part[..., 0] > 40)[0].mean())


def wait_steps(page, count: int) -> None:
    """Let the game take so many more steps."""
    goal, deadline = step_count(page) + count, time.monotonic() + 30
    while step_count(page) < goal:  # the page's own rules forbid what wait_for_function does
        assert time.monotonic() < deadline
        page.wait_for_timeout(30)


def wait_for(page, condition: str) -> None:
    """Wait until an expression is true."""
    deadline = time.monotonic() + 20
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(30)


def wait_text(page, selector: str, pattern: str) -> None:
    playwright.expect(page.locator(selector)).to_have_text(re.compile(pattern))


def paused(page) -> None:
    page.keyboard.press("p")
    playwright.expect(page.locator("#overlay")).to_be_visible()
    assert text(page, "#overlay b") == "PAUSED"


def inside(page, selector: str) -> bool:
    """Whether an element is wholly on the screen, without scrolling."""
    box, size = page.locator(selector).bounding_box(), page.viewport_size
    right, bottom = box["x"] + box["width"], box["y"] + box["height"]
    return box["x"] >= 0 and box["y"] >= 0 and right <= size["width"] and bottom <= size["height"]


def test_it_opens_still_and_begins_with_an_arrow_key(browser, address, tmp_path):
    with opened(browser, address, going=False, viewport=LAPTOP) as page:
        page.wait_for_timeout(300)
        assert step_count(page) == step_count(page, "dream") == 0
        assert text(page, "h1") == "Pong and its dream"
        assert re.fullmatch(
            r"preset \w+, seed 0, 130 steps of play, 20\d\d-\d\d-\d\d", text(page, "#about")
        )
        assert text(page, "#overlay b") == "Press an arrow key"
        assert {"↑ up (RIGHT)", "↓ down (LEFT)", "Space FIRE"} <= set(
            page.locator("#keys span").all_inner_texts()
        )
        for needed in ("nav", "main", "#game", "#dream", "#trusttext", "#controls", "#keys"):
            assert inside(page, needed), needed
        assert page.evaluate("document.documentElement.scrollWidth") <= LAPTOP["width"]
        page.screenshot(path=tmp_path / "laptop.png")
        page.keyboard.press("ArrowUp")
        wait_steps(page, 3)
        assert page.locator("#overlay").is_hidden()


def test_it_runs_at_the_game_s_speed_and_shows_what_the_agent_thinks(page, tmp_path):
    assert not page.locator("#actions").is_visible()
    page.click("#insides summary")
    wait_steps(page, 25)
    assert page.locator("#actions li").count() == 6 and "RIGHTFIRE" in text(page, "#actions")
    assert float(text(page, "#rate")) > 5  # 15 where nothing else runs
    for box, pattern in (
        ("ending", r"[\d.]+%"),
        ("value", r"−?\d+\.\d\d"),
        ("guess", r"−?\d\.\d\d"),
    ):
        assert re.fullmatch(pattern, text(page, f"#{box}"))
    assert len(np.unique(pixels(page, "latents").reshape(-1, 3), axis=0)) > 10
    assert (pixels(page, "preview") > 0).any()
    page.screenshot(path=tmp_path / "insides.png", full_page=True)


def test_the_three_choices(page):
    def pressed() -> str:
        (only,) = page.locator("nav [aria-pressed=true]").all_inner_texts()
        return only

    assert pressed() == "Both, same keys"
    for choice, panels in (("Play the game", ["game"]), ("Play the dream", ["dream"]),
                           ("Watch the agent", ["game", "dream"])):  # fmt: skip
        page.click(f"text={choice}")
        wait_for(page, f"view.mode === '{'both' if len(panels) == 2 else panels[0]}'")
        page.wait_for_timeout(100)
        assert pressed() == choice
        shown = [n for n in ("game", "dream") if page.locator(f".panel.{n}").is_visible()]
        assert shown == panels
    wait_for(page, "view.player === 'agent' && view.action > 0")
    assert "the agent plays" in text(page, "#gamestate")
    page.keyboard.press("ArrowUp")  # takes over
    wait_for(page, "view.player === 'human'")


def test_watching_the_agent_begins_at_once(browser, address):
    with opened(browser, address, going=False) as page:
        page.click("text=Watch the agent")
        wait_steps(page, 3)


def test_a_dream_shows_its_length_and_how_far_to_trust_it(page, address):
    """By the run's own error, as it was measured."""
    page.click("#insides summary")
    page.locator("#length").fill("5")
    wait_text(page, "#lengthout", "^5 steps$")
    wait_text(page, "#dreamstep", r"^\d of 5$")
    page.click("text=Play the dream")
    paused(page)
    page.click("text=Dream from this frame")
    wait_text(page, "#dreamstep", "^0 of 5$")
    wait_text(page, "#trusttext", "^sees a real frame$")
    for step in range(1, 6):
        page.keyboard.press("n")
        wait_for(page, f"view.dream.step === {step} || view.dream.over")
        if page.evaluate("view.dream.over"):
            return  # an untrained model may say so
        error = page.evaluate(f"about.open_loop[{step - 1}]")
        word = "good" if error < 0.5 else "fair"
        says = f"{word}: {error:.2f} of a still picture's error"
        wait_text(page, "#trusttext", says if error <= 1 else "^worse than a still picture$")
    wait_text(page, "#dreamevent", "^begins anew$")
    page.keyboard.press("p")
    wait_for(page, "view.dream.step > 0 && view.start !== null")


def test_the_game_s_own_screen(page):
    page.click("#screen")
    wait_text(page, "#screen", "^the agent's picture$")
    wait_for(page, "document.getElementById('game').width === 160")
    assert pixels(page).shape == (210, 160, 3)
    page.click("#screen")
    wait_for(page, "document.getElementById('game').width === 64")


def test_a_dark_scheme(browser, address):
    with opened(browser, address, color_scheme="dark") as page:
        ground, ink = (
            page.evaluate(f"getComputedStyle(document.body).{p}")
            for p in ("backgroundColor", "color")
        )
        assert [max(map(int, re.findall(r"\d+", c))) > 128 for c in (ground, ink)] == [False, True]


def test_the_arrow_keys_move_the_paddle_of_the_real_pong(page):
    heights = {}
    page.evaluate("send('speed', 4)")
    for key in ("ArrowUp", "ArrowDown"):
        page.keyboard.down(key)
        wait_steps(page, 25)
        heights[key] = paddle(page)
        page.keyboard.up(key)
    assert heights["ArrowDown"] - heights["ArrowUp"] > 15
    wait_for(page, "view.action === 0")


def test_an_action_can_be_chosen_by_number_and_by_a_click(page):
    page.click("#insides summary")
    page.keyboard.down("3")
    wait_text(page, "#actions .taken .name", "^3 LEFT$")
    page.keyboard.up("3")
    wait_text(page, "#actions .taken .name", "^0 NOOP$")
    page.locator("#actions button").nth(4).hover()
    page.mouse.down()
    wait_text(page, "#actions .taken .name", "^4 RIGHTFIRE$")
    page.mouse.up()
    wait_text(page, "#actions .taken .name", "^0 NOOP$")


def test_the_dream_answers_to_actions(page):
    """Single steps from the same moment with another key lead elsewhere."""
    page.click("#insides summary")
    paused(page)
    shown = []
    for key, action in (("ArrowUp", 2), ("ArrowDown", 3), ("Space", 1)):
        page.click("text=Dream from this frame")
        wait_for(page, "view.mode === 'dream' && view.dream.step === 0")
        page.keyboard.down(key)
        page.keyboard.press("n")
        wait_for(page, f"view.dream.step === 1 && view.action === {action}")
        page.keyboard.up(key)
        shown.append(pixels(page, "latents"))
    assert not np.array_equal(shown[0], shown[1])


def test_the_game_waits_while_the_dream_is_played(page):
    wait_steps(page, 10)
    page.click("text=Play the game")
    paused(page)
    steps, frame = step_count(page), pixels(page)
    page.keyboard.press("m")
    wait_for(page, "view.mode === 'dream' && view.start === null")
    page.keyboard.press("n")
    wait_for(page, "view.dream.step === 1")
    page.click("text=Play the game")
    wait_for(page, "view.mode === 'game'")
    assert step_count(page) == steps and np.array_equal(pixels(page), frame)


def test_pause_and_single_step(page):
    paused(page)
    steps = step_count(page)
    page.wait_for_timeout(400)
    assert step_count(page) == steps
    page.click("#step")
    wait_for(page, f"view.game.step === {steps + 1}")
    page.keyboard.press("Space")  # fire, not a click on the button once more
    page.wait_for_timeout(300)
    assert step_count(page) == steps + 1
    page.click("#pause")
    wait_steps(page, 3)


def test_restart_from_a_chosen_frame_of_the_replay(page):
    paused(page)
    page.click("#insides summary")
    page.locator("#moment").fill("25")
    wait_text(page, "#momentout", r"^25 \(0 to \d+\)$")
    page.click("#dreamfrom")
    wait_for(page, "view.start === 25 && view.dream.step === 0")
    page.keyboard.press("r")
    wait_for(page, "view.start !== 25 && view.start !== null")


def test_speed_and_sampling_steps(page):
    page.click("#insides summary")
    page.locator("#speed").fill("6")
    wait_text(page, "#speedout", "× 4.0")
    page.locator("#sampling").fill("7")
    wait_text(page, "#samplingout", "^7$")


def test_a_recording_is_downloaded_as_gif(page, tmp_path):
    page.keyboard.press("g")
    wait_text(page, "#record", r"^Stop \(1\.\d s\)$")
    with page.expect_download() as download:
        page.click("#record")
    path = tmp_path / "film.gif"
    download.value.save_as(path)
    assert download.value.suggested_filename == "Pong.gif"
    frames = Image.open(path).n_frames
    assert frames >= 15 and Image.open(path).size == (2 * 256 + 8, 256 + 34)
    wait_text(page, "#message", f"^Recorded {frames} steps: Pong.gif$")


def test_two_tabs_play_each_their_own(browser, address, page):
    with opened(browser, address) as other:
        other.click("text=Play the dream")
        wait_for(other, "view.mode === 'dream'")
        wait_steps(page, 3)
        assert page.evaluate("view.mode") == "both"
    wait_steps(page, 3)


@pytest.mark.parametrize("size", [PHONE, SIDEWAYS], ids=["upright", "sideways"])
def test_on_a_phone_the_touch_buttons_play(browser, address, tmp_path, size):
    touch = dict(viewport=size, has_touch=True, is_mobile=True, device_scale_factor=2)
    with opened(browser, address, going=False, **touch) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        assert text(page, "#overlay b") == "Press an arrow button"
        for needed in ("nav", "main", "#pause", "#restart"):
            assert inside(page, needed), needed
        for key, meaning in (("up", "up (RIGHT)"), ("down", "down (LEFT)"), ("fire", "FIRE")):
            assert (
                inside(page, f"[data-key={key}]")
                and text(page, f"[data-key={key}] small") == meaning
            )
            box = page.locator(f"[data-key={key}]").bounding_box()
            assert min(box["width"], box["height"]) >= 44
        assert page.locator("[data-key=left]").is_hidden()  # does what down does
        heights, places = {}, set()
        page.evaluate("send('speed', 4)")
        for key in ("up", "down"):
            with touching(page, key):
                wait_steps(page, 25)
                heights[key] = paddle(page)
        assert heights["down"] - heights["up"] > 15
        for choice in ("Play the game", "Play the dream", "Both, same keys"):  # nothing jumps
            page.tap(f"text={choice}")
            page.wait_for_timeout(200)
            places.add(page.locator("nav").bounding_box()["y"])
        page.tap("[data-key=fire]")
        page.tap("#pause")
        wait_text(page, "#pause", "Go on")
        assert len(places) == 1
        page.screenshot(path=tmp_path / "phone.png")


@contextlib.contextmanager
def touching(page, key: str):
    """A finger lies on a touch button."""
    box = page.locator(f"[data-key={key}]").bounding_box()
    points = [{"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}]
    session = page.context.new_cdp_session(page)
    session.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": points})
    yield
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def test_a_wrong_token_and_a_foreign_page_are_refused(browser, address):
    context = browser.new_context()
    page = context.new_page()
    root, token = address.rstrip("/").rsplit("/", 1)
    for path in ("/", "/wrong/", f"/{token[:-1]}/"):
        assert page.goto(root + path).status == 403
    # A page of another origin knows the token and opens the socket: the browser says that it is not ours.
    opens = """address => new Promise(done => { const s = new WebSocket(address);
        s.onopen = () => done('open'); s.onclose = () => done('refused') })"""
    socket = f"{root.replace('http', 'ws')}/{token}/socket"
    blank = context.new_page()
    assert blank.evaluate(opens, socket) == "refused"
    own = context.new_page()
    own.goto(address)
    assert own.evaluate(opens, socket) == "open"
    context.close()


def test_after_a_lost_connection_the_page_comes_back(browser, address):
    """Closed by the server's side, as when a laptop has slept."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(address)
    wait_text(page, "#overlay b", "^Press ")
    page.evaluate("socket.close()")
    wait_text(page, "#message", "Connection lost")
    playwright.expect(page.locator("#message")).to_be_hidden()
    page.keyboard.press("ArrowUp")
    wait_steps(page, 3)
    context.close()


@contextlib.contextmanager
def proxied(address: str):
    """The address of a proxy that asks for `address` by its own name, as those of clouds do."""

    async def handle(request: web.Request) -> web.StreamResponse:
        url = urljoin(address, request.path)
        headers = {"Origin": request.headers["Origin"]} if "Origin" in request.headers else {}
        async with aiohttp.ClientSession() as client:
            if request.headers.get("Upgrade"):
                try:
                    await client.ws_connect(url, headers=headers)
                except aiohttp.WSServerHandshakeError as error:
                    return web.Response(status=error.status)
            async with client.request(request.method, url, headers=headers) as answer:
                kind = answer.content_type
                return web.Response(
                    body=await answer.read(), status=answer.status, content_type=kind
                )

    async def run() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 8199).start()
        ready.set()
        while not done.is_set():
            await asyncio.sleep(0.05)
        await runner.cleanup()

    ready, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert ready.wait(10)
    yield f"http://localhost:8199{urlsplit(address).path}"
    done.set()
    thread.join()


def test_a_page_behind_a_proxy_says_what_to_type(browser, address):
    """Its socket is refused because the proxy asks by another name than the browser."""
    context = browser.new_context()
    with proxied(address) as elsewhere:
        page = context.new_page()
        page.goto(elsewhere)
        wait_text(page, "#message", "python -m play --allow-host localhost")
    context.close()

"""The page of play.py in a real browser, headless Chromium, against play.py itself with the real Pong."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_play import micro_run

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here")

FLAGS = [
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """play.py, started as a person would; its address."""
    # PLAY_RUN: look at the page with another run.
    run_dir = os.environ.get("PLAY_RUN") or micro_run(tmp_path_factory.getbasetemp())
    command = [
        sys.executable,
        "-u",
        str(ROOT / "play.py"),
        str(run_dir),
        "--port",
        "8123",
        "--threads",
        "1",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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
def opened(browser, address: str, **options):
    """The page, ready to play; whatever it writes to the console as an error fails the test."""
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
    page, errors = context.new_page(), []
    page.on(
        "console", lambda message: errors.append(message.text) if message.type == "error" else None
    )
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(f"failed: {request.url}"))
    page.goto(address)
    wait_text(page, "#badge", "^REAL GAME$")
    yield page
    context.close()
    assert not errors


@pytest.fixture
def page(browser, address):
    with opened(browser, address) as page:
        yield page


def text(page, selector: str) -> str:
    return page.locator(selector).inner_text()


def step_count(page) -> int:
    return int(text(page, "#stepcount"))


def pixels(page, canvas: str = "screen") -> np.ndarray:
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


def wait_text(page, selector: str, pattern: str) -> None:
    playwright.expect(page.locator(selector)).to_have_text(re.compile(pattern))


def paused(page) -> None:
    page.keyboard.press("p")
    wait_text(page, "#pause", "Go on")


def test_the_page_explains_itself_and_runs_at_the_game_s_speed(page, tmp_path):
    wait_steps(page, 25)
    assert text(page, "h1") == "JEDI plays Pong"
    assert page.locator("#actions li").count() == 6 and "RIGHTFIRE" in text(page, "#actions")
    assert "is RIGHT" in text(page, "#turned")
    assert float(text(page, "#rate")) > 5  # 15 where nothing else runs
    for box, pattern in (
        ("ending", r"[\d.]+%"),
        ("value", r"−?\d+\.\d\d"),
        ("guess", r"−?\d\.\d\d"),
    ):
        assert re.fullmatch(pattern, text(page, f"#{box}"))
    assert len(np.unique(pixels(page, "latents").reshape(-1, 3), axis=0)) > 10
    assert (pixels(page, "preview") > 0).any()
    chart = pixels(page, "chart").reshape(-1, 3)
    for colour in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0)):
        assert (chart == colour).all(1).sum() > 20
    page.screenshot(path=tmp_path / "game.png", full_page=True)


def test_the_arrow_keys_move_the_paddle_of_the_real_pong(page):
    heights = {}
    for key in ("ArrowUp", "ArrowDown"):
        page.keyboard.down(key)
        wait_steps(page, 25)
        heights[key] = paddle(page)
        page.keyboard.up(key)
    assert heights["ArrowDown"] - heights["ArrowUp"] > 15
    wait_steps(page, 2)
    assert "NOOP" in text(page, "#actions .taken")


def test_an_action_can_be_chosen_by_number_and_by_a_click(page):
    page.keyboard.down("3")
    wait_text(page, "#actions .taken .name", "^3 LEFT$")
    page.keyboard.up("3")
    wait_text(page, "#actions .taken .name", "^0 NOOP$")
    page.locator("#actions button").nth(4).hover()
    page.mouse.down()
    wait_text(page, "#actions .taken .name", "^4 RIGHTFIRE$")
    page.mouse.up()
    wait_text(page, "#actions .taken .name", "^0 NOOP$")


def test_the_dream_answers_to_actions(page, tmp_path):
    """Single steps from the same moment with another key lead elsewhere: not by chance alone, since the action that
    was imagined is the key's."""
    paused(page)
    page.click("text=Dream from this frame")
    wait_text(page, "#badge", "^DREAM$")
    shown = []
    for key, action in (("ArrowUp", "RIGHT"), ("ArrowDown", "LEFT"), ("Space", "FIRE")):
        page.keyboard.down(key)
        before = step_count(page)
        page.keyboard.press("n")
        wait_text(page, "#stepcount", f"^{before + 1}$")
        page.keyboard.up(key)
        wait_text(page, "#actions .taken .name", rf"^\d {action}$")
        shown.append(pixels(page, "latents"))
        if "ends here" in text(page, "#event"):
            page.click("text=Dream from this frame")
            wait_text(page, "#stepcount", "^0$")
    assert not np.array_equal(shown[0], shown[1])
    page.keyboard.press("p")
    page.wait_for_timeout(1_000)
    page.screenshot(path=tmp_path / "dream.png", full_page=True)


def test_switching_keeps_the_game_where_it_was(page):
    wait_steps(page, 10)
    paused(page)
    steps, frame = step_count(page), pixels(page)
    page.click("[data-value=dream]")
    wait_text(page, "#badge", "^DREAM$")
    wait_text(page, "#origin", "^0 steps after the real game$")
    page.keyboard.press("n")
    page.keyboard.press("m")
    wait_text(page, "#badge", "^REAL GAME$")
    assert step_count(page) == steps and np.array_equal(pixels(page), frame)
    page.click("[data-value=agent]")
    wait_text(page, "#origin", "^the agent plays$")
    assert page.locator("[aria-pressed=true]").all_inner_texts() == ["Real game", "Agent plays"]


def test_pause_and_single_step(page):
    paused(page)
    steps = step_count(page)
    page.wait_for_timeout(400)
    assert step_count(page) == steps
    page.click("#step")
    wait_text(page, "#stepcount", f"^{steps + 1}$")
    page.wait_for_timeout(300)
    assert step_count(page) == steps + 1
    page.keyboard.press("Space")  # fire, not a click on the button once more
    page.wait_for_timeout(200)
    assert step_count(page) == steps + 1
    page.click("#pause")
    wait_steps(page, 3)


def test_restart_from_a_chosen_frame_of_the_replay(page):
    paused(page)
    page.locator("#moment").fill("25")
    wait_text(page, "#momentout", "^25$")
    page.click("#dreamfrom")
    wait_text(page, "#origin", "^0 steps after recorded frame 25$")
    page.keyboard.press("r")
    wait_text(page, "#origin", r"^0 steps after recorded frame \d+$")
    page.keyboard.press("m")
    page.click("#restart")
    wait_text(page, "#stepcount", "^0$")


def test_speed_and_sampling_steps(page):
    page.locator("#speed").fill("6")
    wait_text(page, "#speedout", "× 4.0")
    page.locator("#sampling").fill("7")
    wait_text(page, "#samplingout", "^7$")
    page.keyboard.press("m")
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
    assert frames >= 15
    wait_text(page, "#message", f"^Recorded {frames} steps: Pong.gif$")


def test_two_tabs_play_each_their_own(browser, address, page):
    with opened(browser, address) as other:
        other.keyboard.press("m")
        wait_text(other, "#badge", "^DREAM$")
        wait_steps(page, 3)
        assert text(page, "#badge") == "REAL GAME"
    wait_steps(page, 3)


def test_on_a_phone_the_touch_buttons_play(browser, address, tmp_path):
    with opened(
        browser, address, viewport=PHONE, has_touch=True, is_mobile=True, device_scale_factor=2
    ) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        for key in ("up", "down", "left", "right", "fire"):
            box = page.locator(f"[data-key={key}]").bounding_box()
            assert min(box["width"], box["height"]) >= 44
            assert (
                box["y"] + box["height"] <= PHONE["height"]
            )  # to be reached while the game is seen
        heights = {}
        for key in ("up", "down"):
            with touching(page, key):
                wait_steps(page, 25)
                heights[key] = paddle(page)
        assert heights["down"] - heights["up"] > 15
        page.tap("[data-key=fire]")
        page.tap("#pause")
        wait_text(page, "#pause", "Go on")
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
    wait_text(page, "#badge", "^REAL GAME$")
    page.evaluate("socket.close()")
    wait_text(page, "#message", "Connection lost")
    playwright.expect(page.locator("#message")).to_be_hidden()
    wait_steps(page, 3)
    context.close()

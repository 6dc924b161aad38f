"""The page's server: one worker thread plays with all open tabs, a step of each in turn."""

import argparse
import asyncio
import concurrent.futures
import contextlib
import errno
import functools
import ipaddress
import itertools
import json
import secrets
import signal
import socket
import sys
import traceback
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import torch
from aiohttp import web

from jedi_atari import BadInput
from play.pictures import film
from play.runs import ROOT, Run
from play.scenes import FPS
from play.session import BadCommand, Session, pack

MOST_TABS = 16
PAGE = Path(__file__).resolve().parent / "page"
FILES = {  # all that is served
    "index.html": (PAGE / "index.html", "text/html"),
    "play.js": (PAGE / "play.js", "text/javascript"),
    "style.css": (PAGE / "style.css", "text/css"),
    "README.md": (ROOT / "README.md", "text/plain"),
}
COMMANDS = "mode pause step speed sampling length screen restart dream_from record".split()
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "Cache-Control": "no-store",
}


class Tab:
    """One open page: its session, and the tasks that play and make films. A page that is slow to
    take what is sent slows its own game alone."""

    def __init__(self, server: "Server", ws: web.WebSocketResponse):
        self.server, self.ws, self.going = server, ws, asyncio.Event()
        self.films: set[asyncio.Task] = set()

    async def live(self) -> None:
        """Serve the page until it is closed, in whatever way."""
        work = self.server.work
        self.session = await work(Session, self.server.run, self.server.next_seed())
        play = asyncio.create_task(self.reported(self.play))
        try:
            await self.reported(self.listen)
        finally:
            tasks = [play, *self.films]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await work(self.session.close)

    async def reported(self, job, *arguments) -> None:
        """Do a job; what goes wrong in it ends this tab alone, and is said here and on the page."""
        try:
            return await job(*arguments)
        except (ConnectionError, aiohttp.ClientError):
            pass  # the page is gone
        except Exception as error:
            print(traceback.format_exc(), file=sys.stderr, flush=True)
            text = f"{type(error).__name__}; the terminal says more"
            with contextlib.suppress(ConnectionError, aiohttp.ClientError):
                await self.ws.send_bytes(pack("error", {"text": text}))
        with contextlib.suppress(ConnectionError, aiohttp.ClientError):
            await self.ws.close()

    async def play(self) -> None:
        """A tick 15 times a second, times its speed, while it is not paused."""
        clock, due = asyncio.get_running_loop().time, 0.0
        while True:
            await self.going.wait()
            await asyncio.sleep(due - clock())
            if not self.going.is_set():
                continue
            begun, interval = clock(), 1 / (FPS * self.session.speed)
            if (view := await self.server.work(self.session.tick)) is not None:
                await self.ws.send_bytes(view)
            self.send_film()
            # What was late by less than a step is caught up with; what was later is let go.
            due = (due if begun - due < interval else begun) + interval

    async def listen(self) -> None:
        """Do what the page asks for."""
        await self.ws.send_bytes(self.session.hello())
        await self.ws.send_bytes(await self.server.work(self.session.view))
        async for message in self.ws:
            if message.type != aiohttp.WSMsgType.TEXT:
                break
            try:
                await self.obey(json.loads(message.data))
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
                text = "the page sent a command that makes no sense"
                await self.ws.send_bytes(pack("error", {"text": text}))

    async def obey(self, command: dict) -> None:
        """One command: {"do": its name, "value": ...}."""
        session, work = self.session, self.server.work
        name, value = command["do"], command.get("value")
        if name == "hold":
            await work(session.hold, value)
        elif name == "preview":
            await self.ws.send_bytes(await work(session.preview, value))
        elif name in COMMANDS:
            await work(getattr(session, f"do_{name}"), value)
            await self.ws.send_bytes(await work(session.view))
            self.send_film()
            (self.going.clear if session.paused else self.going.set)()
        else:
            raise BadCommand("there is no such command")

    def send_film(self) -> None:
        """Make a GIF of a finished recording and send it, beside the playing."""
        moments, self.session.film = self.session.film, None
        if moments:
            task = asyncio.create_task(self.reported(self.film, moments))
            self.films.add(task)
            task.add_done_callback(self.films.discard)

    async def film(self, moments: list) -> None:
        # A GIF counts in hundredths of a second: 7 + 7 + 6 of them are three steps of 1 / 15 s.
        milliseconds = [(70, 70, 60)[i % 3] for i in range(len(moments))]
        async with self.server.one_film:
            content = await asyncio.to_thread(film, moments, milliseconds)
        await self.ws.send_bytes(pack("film", {"frames": len(moments)}, content))


class Server:
    """Serves the page and plays with each open tab. The event loop is always free: networks and
    emulators run in the worker thread, in the order in which the tabs ask."""

    def __init__(self, run: Run, token: str, options: argparse.Namespace):
        self.run, self.token, self.options = run, token, options
        self.seeds = itertools.count(options.seed)
        self.tabs: set[Tab] = set()
        self.one_film = asyncio.Semaphore(1)  # a film takes memory
        # The number of threads is set in the worker: PyTorch keeps it per thread.
        threads = options.threads
        setup = dict(initializer=torch.set_num_threads, initargs=(threads,)) if threads else {}
        self.worker = concurrent.futures.ThreadPoolExecutor(1, "worker", **setup)

    def next_seed(self) -> int:
        """Each tab plays another game."""
        return next(self.seeds)

    async def work(self, function, *arguments):
        """Run a function in the worker thread."""
        job = functools.partial(function, *arguments)
        return await asyncio.get_running_loop().run_in_executor(self.worker, job)

    def app(self) -> web.Application:
        """What answers to requests."""
        app = web.Application(middlewares=[self.guard])
        app.router.add_get("/{token}", self.add_slash)
        app.router.add_get("/{token}/socket", self.socket)
        app.router.add_post("/{token}/socket", self.socket)
        app.router.add_get("/{token}/{file:[A-Za-z.]*}", self.page)
        app.on_shutdown.append(self.close_tabs)
        app.on_cleanup.append(self.stop_worker)
        return app

    @web.middleware
    async def guard(self, request: web.Request, handler) -> web.StreamResponse:
        """Refuse whoever has no token: 128 random bits, so that by whatever name this machine was
        reached, whoever has it was given it."""
        token = request.match_info.get("token", "")
        if not secrets.compare_digest(token.encode(), self.token.encode()):
            raise web.HTTPForbidden(text="403: open the address that was printed, all of it")
        return await handler(request)

    async def add_slash(self, _request: web.Request) -> web.Response:
        raise web.HTTPFound(f"/{self.token}/")  # the page's own links begin there

    async def page(self, request: web.Request) -> web.Response:
        """One of the page's files."""
        name = request.match_info["file"] or "index.html"
        if name not in FILES:
            raise web.HTTPNotFound
        path, kind = FILES[name]
        return web.Response(
            body=path.read_bytes(), content_type=kind, charset="utf-8", headers=HEADERS
        )

    async def socket(self, request: web.Request) -> web.StreamResponse:
        """The life of a tab. Browsers name the page that opens a socket; another one's is refused.
        A page cannot read why: it asks again with POST."""
        names = request.host, request.headers.get("X-Forwarded-Host", ""), *self.options.allow_host
        origin = host_name(request.headers.get("Origin", ""))
        if not origin or origin not in map(host_name, names):
            name, asked = ascii(origin)[1:-1], ascii(request.host)
            text = f"403: this page is at '{name}', but a proxy asked for {asked}. If both are "
            text += f"yours, start again with: python -m play --allow-host {name}"
            raise web.HTTPForbidden(text=text)
        if len(self.tabs) >= MOST_TABS:
            text = f"503: {MOST_TABS} pages are open already; close one and reload this"
            raise web.HTTPServiceUnavailable(text=text)
        if request.method == "POST":
            return web.Response(status=204)
        # Uncompressed: a frame is then written whole, whichever of the tab's tasks sends it.
        ws = web.WebSocketResponse(heartbeat=20, max_msg_size=4096, compress=False)
        tab = Tab(self, ws)
        self.tabs.add(tab)
        try:
            await ws.prepare(request)
            await tab.live()
        finally:
            self.tabs.discard(tab)
        return ws

    async def close_tabs(self, _app: web.Application) -> None:
        code = aiohttp.WSCloseCode.GOING_AWAY
        closing = (tab.ws.close(code=code) for tab in self.tabs)
        await asyncio.gather(*closing, return_exceptions=True)

    async def stop_worker(self, _app: web.Application) -> None:
        self.worker.shutdown(wait=False, cancel_futures=True)


def host_name(address: str) -> str:
    """Of "https://name:port", "name:port" or "name", in small letters; empty if it is none."""
    try:
        return urlsplit(address if "//" in address else f"//{address}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def listen(host: str, port: int, tries: int = 20) -> socket.socket:
    """A socket that listens on `port` or, if taken, on the next free one; else `BadInput`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in range(port, min(port + tries, 65_536)):
        try:
            return socket.create_server((host, candidate), family=family)
        except (OSError, TypeError, ValueError) as error:  # the last two: no name at all
            if getattr(error, "errno", None) != errno.EADDRINUSE:
                raise BadInput(f"cannot listen on {host} port {candidate}: {error}") from None
            print(f"port {candidate} is taken, trying the next")
    raise BadInput(f"ports {port} to {candidate} are all taken; choose another --port")


async def serve(run: Run, sock: socket.socket, options: argparse.Namespace) -> None:
    """Answer on a socket until a signal says to stop."""
    server = Server(run, secrets.token_urlsafe(16), options)
    runner = web.AppRunner(server.app(), access_log=None, shutdown_timeout=2)
    await runner.setup()
    await web.SockSite(runner, sock).start()
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows: KeyboardInterrupt instead
            loop.add_signal_handler(signum, stop.set)
    announce(server, sock.getsockname()[1])
    try:
        await stop.wait()
    finally:
        await runner.cleanup()


def announce(server: Server, port: int) -> None:
    """Say what there is to play and where."""
    run, host = server.run, server.options.host
    print(f"game     {run.game}: {run.about}")
    print(f"dream    starts from any of {run.replay.size:,} recorded frames")
    name = f"[{host}]" if ":" in host else host
    name = socket.gethostname() if host in ("0.0.0.0", "::") else name
    print(f"open     http://{name}:{port}/{server.token}/")
    if is_loopback(host):
        tunnel = f"ssh -L {port}:{name}:{port} {socket.gethostname()}"
        print(f"         from another machine: {tunnel}, then the same address there")
    else:
        print("         whoever can reach this machine and has the address can play too")
    print("Ctrl-C ends it", flush=True)

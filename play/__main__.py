"""Play a game and its dream in the browser: the showcase's, or those of a run of one's own."""

import argparse
import asyncio
import sys
from pathlib import Path

from jedi_atari import BadInput
from play.runs import SHOWCASE, Parser, load_named
from play.server import listen, serve


def parse(argv: list[str]) -> argparse.Namespace:
    """Raises `BadInput`."""
    parser = Parser(prog="python -m play", description=__doc__)
    text = "folder of a run; without one the showcase is played"
    parser.add_argument("run_dir", type=Path, nargs="?", default=SHOWCASE, help=text)
    text = "address to listen on; 0.0.0.0 opens it to the network, not encrypted"
    parser.add_argument("--host", default="127.0.0.1", help=text)
    parser.add_argument("--port", type=int, default=8000, help="if it is taken, the next free one")
    text = "behind a proxy: the name by which the browser knows the page; can be given again"
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help=text)
    text = "of the first tab's game and dreams; the next has the next"
    parser.add_argument("--seed", type=int, default=0, help=text)
    options = parser.parse_args(argv)
    if not options.host:
        raise BadInput("--host is empty; use 127.0.0.1, or 0.0.0.0 for all addresses")
    for name, low, high in (("port", 0, 65_535), ("threads", 0, 1_024), ("seed", 0, 2**31 - 1)):
        if not low <= (value := getattr(options, name)) <= high:
            raise BadInput(f"--{name} is {value}; it must be from {low} to {high}")
    return options


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 when it was stopped, 2 for bad input."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        run, sock = load_named(options), listen(options.host, options.port)
        print(f"loaded   {run.decoder and run.folder}")  # the decoder is learned now, not in a tab
        asyncio.run(serve(run, sock, options))
    except BadInput as error:
        print(f"play: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    print("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())

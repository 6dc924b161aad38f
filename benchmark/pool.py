"""What benchmark.sh asks about runs and arguments and bash cannot answer, and how a run starts. No packages needed.

python pool.py results OUT < runs          one line per run of stdin (`Pong/seed0`): what its result.json says
python pool.py check SCRIPT ARGUMENTS...   are these arguments fit for the script? Writes nothing, trains nothing
python pool.py start COMMAND...            become that command, with no signal ignored, and say so on descriptor 8
"""

import contextlib
import importlib.util
import io
import json
import math
import os
import signal
import sys
from pathlib import Path

SEPARATOR = "\t"
GAMES = json.loads((Path(__file__).parent / "published.json").read_text())["games"]


def read_result(folder: Path, game: str, seed: int) -> tuple[str, ...]:
    """`("none",)`, `("ok", mean return, human-normalised score, seconds)`, or `("broken", why)`."""
    try:
        result = json.loads((folder / "result.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return ("none",)
    except OSError as error:
        return "broken", f"cannot be read: {error.strerror}"
    except ValueError:  # no JSON, or no text at all
        return "broken", "is half written"
    if not isinstance(result, dict):
        return "broken", "is not a run's result"
    returns = result.get("returns")
    numbers = returns if isinstance(returns, list) and returns else [None]
    numbers = [result.get("mean_return"), result.get("wall_seconds"), *numbers]
    if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
        return "broken", "lacks returns, mean_return or wall_seconds"
    if (result.get("env_id"), result.get("seed")) != (game, seed):
        return "broken", f"is of another run, {result.get('env_id')} seed {result.get('seed')}"
    low, high = (GAMES.get(game, {}).get(player) for player in ("random", "human"))
    shown = f"{(result['mean_return'] - low) / (high - low):.3f}" if game in GAMES else "-"
    return "ok", f"{result['mean_return']:.1f}", shown, str(round(result["wall_seconds"]))


def results(out: Path) -> int:
    for run in sys.stdin.read().split():
        game, _, seed = run.rpartition("/seed")
        print(run, *read_result(out / run, game, int(seed)), sep=SEPARATOR)
    return 0


def check(script: Path, argv: list[str]) -> int:
    """Let the script's own parser judge the arguments, once, before they are given to every run."""
    sys.dont_write_bytecode = True
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        text = " ".join(str(error).split())
        print(
            f"{script} cannot be imported: {text}; is it all installed (requirements.txt), or is --python another?"
        )
        return 2
    if not hasattr(module, "parse_args"):
        return 0  # a script of another kind judges for itself when it runs
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            module.check_args(module.parse_args(argv))
        return 0
    except module.BadInput as error:
        said = str(error)
    except SystemExit:  # the arguments do not parse: tyro's box, whose first line is a title and whose last names --help
        lines = [line.strip(" │╭╮╰╯─") for line in box.getvalue().splitlines()]
        said = " ".join([line for line in lines if any(map(str.isalnum, line))][1:-1])
    print(f"{script.name} refuses its arguments: {said}")
    return 2


def start(command: list[str]) -> int:
    """A child ignores what its parent ignores, and a run that ignored SIGTERM could not be stopped while it begins."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    os.write(8, b"started\n")
    os.close(8)
    os.execvp(command[0], command)


def main(task: str, place: str, *rest: str) -> int:
    if task == "start":
        return start([place, *rest])
    return check(Path(place), list(rest)) if task == "check" else results(Path(place))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

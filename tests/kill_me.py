"""Run jedi_atari.py in a process that sends itself a signal at a chosen moment.

python kill_me.py PLACE:COUNT:SIGNAL ARGUMENTS...   the COUNT-th time that the program comes to PLACE:

step                        of the environment: in the first play, an epoch, evaluation and when it is played again
diffusion, reward, policy   an update
evaluate                    an action in evaluation
half                        the middle of a file that is written atomically
renamed                     checkpoint.pt has become checkpoint.prev.pt, the new one is not yet in its place
replaced                    checkpoint.pt is new, nothing has happened since
log                         metrics.jsonl is open, TensorBoard's old files are gone, the new one is not there yet
logged                      a row is written: a new one, or when carried on one of the checkpoint's
never

The program itself is not changed: functions of it are wrapped so that their calls can be counted. Each epoch ends with
a checkpoint.
"""

import builtins
import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def arm(script, place: str, count: int, number: int) -> None:
    """Let the process be struck at the `count`-th visit of a place, see above."""
    left = [count]

    def visit(*_) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)

    if place in script.PARTS:
        wrap(script, "update", lambda agent, part, *_: visit() if part == place else None)
    elif place == "evaluate":
        inside = []
        wrap(script, "evaluate", lambda *_: inside.append(1), lambda *_: inside.pop())
        wrap(script, "act", lambda *_: visit() if inside else None)
    elif place == "half":
        write_halves(script, visit)
    elif place == "step":
        wrap(script.Game, "step", visit)
    elif place == "log":
        wrap(importlib.import_module("torch.utils.tensorboard"), "SummaryWriter", visit)
    elif place == "renamed":
        wrap(Path, "replace", after=lambda old, _: visit() if old.name == "checkpoint.pt" else None)
    elif place == "replaced":
        wrap(script, "save_checkpoint", after=visit)
    elif place == "logged":
        wrap(script.Log, "write", after=visit)
    else:
        assert place == "never"


def wrap(owner, name: str, before=None, after=None) -> None:
    """Call something before or after each call of a function."""
    original = getattr(owner, name)

    def wrapper(*args, **kwargs):
        if before:
            before(*args)
        result = original(*args, **kwargs)
        if after:
            after(*args)
        return result

    setattr(owner, name, wrapper)


def write_halves(script, visit) -> None:
    """Files named *.tmp are written in two halves, with a visit between them."""

    def open_(path, mode="r", *rest):
        file = builtins.open(path, mode, *rest)
        if str(path).endswith(".tmp"):
            write = file.write

            def in_halves(content):
                write(content[: len(content) // 2])
                file.flush()
                visit()
                write(content[len(content) // 2 :])

            file = Wrapped(file, in_halves)
        return file

    script.open = open_


class Wrapped:
    """A file with another `write`."""

    def __init__(self, file, write):
        self.file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def main(when: str, argv: list[str], script_name: str = "jedi_atari", seconds: float = 0) -> int:
    """Run a script that writes a checkpoint at the end of an epoch if `seconds` have passed."""
    script = importlib.import_module(script_name)
    script.CHECKPOINT_SECONDS = seconds
    place, count, number = when.split(":")
    arm(script, place, int(count), int(number))
    return script.main(argv)


def child(out: str, err: str, *given) -> None:
    """`main` in a process that was forked ready, with its output in files."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = builtins.open(1, "w"), builtins.open(2, "w", buffering=1)
    sys.exit(main(*given))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

"""Run jedi_atari.py in a process that sends itself a signal at a chosen moment.

python kill_me.py PLACE:COUNT:SIGNAL ARGUMENTS...   the COUNT-th time that the program comes to PLACE

The program itself is not changed: functions of it are wrapped so that their calls can be counted.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jedi_atari as jedi

PLACES = (
    "collect",
    "diffusion",
    "reward",
    "policy",
    "evaluation",
    "checkpoint",
    "half",
    "replace",
    "link",
    "never",
)


LOSSES = {
    "diffusion": "diffusion_loss",
    "reward": "reward_termination_loss",
    "policy": "actor_critic_loss",
}


def main() -> int:
    place, count, number = sys.argv[1].split(":")
    left = [int(count)]

    def arrived() -> bool:
        left[0] -= 1
        return left[0] == 0

    def wrap(owner, name: str, condition=lambda: True) -> None:
        original = getattr(owner, name)

        def wrapper(*args, **kwargs):
            if condition() and arrived():
                os.kill(os.getpid(), int(number))
            return original(*args, **kwargs)

        setattr(owner, name, wrapper)

    # The costs are printed only; measuring them would call what is counted.
    jedi.measure_costs = lambda *a: dict.fromkeys(("collect", *jedi.PARTS, "games"), 0.01)
    if place == "collect":
        wrap(jedi.Collector, "step")
    elif place in LOSSES:
        wrap(jedi, LOSSES[place])
    elif place == "evaluation":
        wrap(jedi, "act", note_whether_inside("evaluate"))
    elif place == "checkpoint":
        wrap(jedi, "save_checkpoint")
    elif place == "half":
        write_half(arrived)
    elif place in ("replace", "link"):
        wrap(os, place)
    return jedi.main(sys.argv[2:])


def note_whether_inside(name: str):
    """A function that says whether a function of the script is being called."""
    inside, original = [False], getattr(jedi, name)

    def entered(*args, **kwargs):
        inside[0] = True
        result = original(*args, **kwargs)
        inside[0] = False
        return result

    setattr(jedi, name, entered)
    return lambda: inside[0]


def write_half(arrived) -> None:
    """Let a file that is written atomically be killed in the middle of it."""
    write = jedi.write_atomically

    def half(path, content):
        if arrived():
            path.with_name(path.name + ".tmp").write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, content)

    jedi.write_atomically = half


if __name__ == "__main__":
    sys.exit(main())

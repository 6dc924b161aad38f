"""What the benchmarks share: raw results, one a line; tables and pictures beside them; changing a function for a while.

Needs no PyTorch. An experiment is three files: NAME.jsonl, the raw results, each with the commit, versions and
processor that it was measured with; NAME.md and NAME.png, which the script makes from them again with --table.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import io
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

os.environ["MPLBACKEND"] = "agg"  # pictures go to files; a notebook's may not be here

# For measurements of a few minutes: the papers' method with narrow networks and centred latents.
NARROW = dict(
    max_episode_steps=1_200, batch_size=16, final_epochs=0, encoder_width=8, denoiser_width=48,
    cond_dim=128, reward_width=16, lstm_size=128, latent_norm="center", learning_rate=1e-3,
    encoder_lr_scale=0.03, warmup_updates=20, reward_window=5, horizon=10, entropy_weight=0.03,
)  # fmt: skip
PACKAGES = ("torch", "gymnasium", "ale-py", "numpy")


class BadInput(ValueError):
    """Something the user gave is wrong; the message is one line that says what, and what to do."""


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser of arguments that shows a script's text as it is."""
    how = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=how)


def run(script: str, main: Callable, *given) -> int:
    """Exit status of a script: 0; 2 for bad input, 1 where a file cannot be read or written, each with one line."""
    try:
        main(*given)
    except KeyboardInterrupt:
        return print(f"{script}: stopped", file=sys.stderr) or 130
    except (ValueError, OSError) as error:
        if isinstance(error, OSError):
            return print(f"{script}: failed: {error}", file=sys.stderr) or 1
        if type(error).__name__ != "BadInput":  # the training script has its own
            raise
        return print(f"{script}: error: {error}", file=sys.stderr) or 2
    return 0


# --- where a figure was measured


def about(script: str) -> dict:
    """The command, the commit (`-dirty` where files were changed since; None outside git), processor and versions."""
    git, here = "git describe --always --dirty --abbrev=40".split(), Path(__file__).parent
    commit, versions = None, {name: importlib.metadata.version(name) for name in PACKAGES}
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, cwd=here, capture_output=True, text=True).stdout.strip()
    return {
        "command": shlex.join(["python", f"benchmark/{script}", *sys.argv[1:]]),
        "git_commit": commit or None,
        "processor": processor(),
        "versions": {"python": platform.python_version(), **versions},
    }


def processor() -> str:
    """Its name, as far as it is known."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def clock(seconds: float) -> str:
    """Seconds -> `2:03:04` or `3:04`."""
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}" if minutes >= 60 else f"{minutes}:{s:02d}"


# --- raw results, tables, pictures


def read_rows(path: Path, *keys: str) -> list[dict]:
    """Raw results, one JSON object a line, all with these keys; none where there is no file. Raises `BadInput`."""
    if path.is_dir() or path.suffix != ".jsonl":
        what = "is a folder" if path.is_dir() else "does not end in .jsonl"
        raise BadInput(f"{path} {what}; give a file that ends in .jsonl")
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not text (UTF-8); give another file") from None
    rows = [read_object(line, f"{path}, line {i},") for i, line in enumerate(lines, 1)]
    for i, row in enumerate(rows, 1):
        if missing := [key for key in keys if key not in row]:
            raise BadInput(f"{path}, line {i}, has no {missing[0]!r}; delete that line")
    return rows


@contextlib.contextmanager
def reading(path: Path):
    """Whatever goes wrong within is a line with other contents than a script writes: `BadInput` says so."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        what = f"a line that was not made by this script ({type(error).__name__}: {error})"
        raise BadInput(f"{path} holds {what}; give another file") from None


def open_rows(path: Path, *keys: str) -> list[dict]:
    """The same of a file that is to be written: where it cannot be, or a table lies there that is not its own, now is
    the time to say so."""
    rows, page = read_rows(path, *keys), path.with_suffix(".md")
    if not rows and page.exists():
        raise BadInput(f"{page} is there already; give another --out than {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return rows


def read_object(text: str, where: str, remedy: str = "delete that line") -> dict:
    """A JSON object; NaN and infinities, which are not JSON, are let through to the checks of each key."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where} is cut off or not JSON ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{where} is not a JSON object; {remedy}")
    return content


def add_row(path: Path, row: dict, again: bool = False) -> None:
    """Append a raw result, or put it in the last one's place; NaN and infinities, measures over nothing, become null."""
    row = json.loads(json.dumps(row), parse_constant=lambda _: None)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = [*(lines[:-1] if again else lines), json.dumps(row)]
    write(path, "".join(f"{line}\n" for line in lines))


def write(path: Path, content: str | bytes) -> None:
    """To a new file that then replaces `path`: a full disk costs no older one."""
    content = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror}") from None


def markdown(header: Iterable, rows: Iterable[Iterable]) -> str:
    """A Markdown table; the first column is left-aligned."""
    header = list(header)
    rule = ["---"] + ["---:"] * (len(header) - 1)
    clean = [[str(cell).replace("|", "\\|") for cell in row] for row in [header, rule, *rows]]
    return "".join("| " + " | ".join(row) + " |\n" for row in clean)


def new_figure(title: str, rows: int, columns: int, size: tuple, **options):
    """A figure of matplotlib, and its panels as an array (rows, columns)."""
    import matplotlib
    from matplotlib.figure import Figure

    look = {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False}
    sides = {"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "report"}
    # A $ in a name is a $; a bar ends where its interval does, not half its width later.
    matplotlib.rcParams.update({"text.parse_math": False, "lines.solid_capstyle": "butt"})
    with matplotlib.rc_context(look | sides):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, fontsize=9.5)
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


def png(figure) -> bytes:
    """A figure as PNG of 256 colours, a third of the bytes; the same bytes for the same numbers."""
    from PIL import Image

    figure.savefig(drawn := io.BytesIO(), dpi=110, bbox_inches="tight")
    Image.open(drawn).convert("RGB").quantize(256).save(small := io.BytesIO(), "PNG", optimize=True)
    return small.getvalue()


def write_up(out: Path, text: str, draw: Callable) -> None:
    """Beside OUT.jsonl: OUT.md, and OUT.png of the figure that `draw()` makes."""
    write(out.with_suffix(".md"), text)
    with drawing(path := out.with_suffix(".png")):
        write(path, png(draw()))


@contextlib.contextmanager
def drawing(path: Path):
    """What fails within is a picture: said in one line, it costs no number; an older one does not stay."""
    try:
        yield
    except Exception as error:
        path.unlink(missing_ok=True)
        text = " ".join(str(error).split())
        print(f"no picture {path.name}: {type(error).__name__}: {text}", file=sys.stderr)


# --- with the training script


@contextlib.contextmanager
def replaced(owner: object, **values):
    """Attributes of `owner` have these values, within."""
    kept = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(owner, name, value)


def play(script: ModuleType, agent, args, seed: int, steps: int, device=None):
    """A `ReplayBuffer` of `steps` steps that an agent of this script plays, without exploration; random play, on
    `device`, without an agent."""
    collector = script.Collector(dataclasses.replace(args, seed=seed, epsilon=0.0))
    replay = script.ReplayBuffer(2 * steps, agent.norm.mean.device if agent else device)
    for _ in range(steps):
        collector.step(agent, replay)
    collector.env.close()
    return replay

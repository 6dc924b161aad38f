"""The documentation says what the code does: its commands parse, its links lead somewhere, what it names exists."""

import dataclasses
import fnmatch
import importlib
import json
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT, command_line

import jedi_atari as jedi
import jedi_atari_stochastic

HISTORY = ROOT / "docs/log.md"  # its names and commands are those of their day
PAGES = [path for path in ROOT.glob("**/*.md") if not {".venv", "runs"} & {*path.parts}]
SUFFIXES = {".py", ".sh", ".js", ".html", ".toml", ".patch"}
FILES = [p for p in ROOT.rglob("*") if p.is_file() and not {".git", ".venv", "runs"} & {*p.parts}]
PROGRAMS = {path: path.read_text() for path in FILES if path.suffix in SUFFIXES}
PROGRAMS.pop(ROOT / "tests/test_docs.py")
TEXT = "\n".join(PROGRAMS.values()) + (ROOT / "docs/metrics.md").read_text()
FLAGS = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(jedi.Args)}
FLAGS |= {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(jedi_atari_stochastic.Args)}
OTHERS = {"tensorboard", "ssh", "git", "cd", "ruff", "uv", "pre-commit"}  # not of this project
ids = dict(ids=lambda value: str(value.relative_to(ROOT)) if hasattr(value, "parts") else None)


def blocks(text: str, language: str) -> str:
    return "".join(re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S))


def spans(text: str) -> list[str]:
    """Inline code, less blocks and what is cited from DIAMOND as [D, `its_name`]."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"\[[PDEC],[^\]\[(]*\](?!\()", "", text))


def commands(text: str) -> list[str]:
    inline = [s for s in spans(text) if re.match(r"(python|pip|uv|bash|\./\S+\.sh) ", s)]
    lines = blocks(text, "bash").replace("\\\n", " ").splitlines() + inline
    return [
        part for line in lines for part in re.split(r" && | & ", line.split("#")[0]) if part.strip()
    ]


def check(command: str, folder) -> None:
    """Raise for a command that would not be understood."""
    words = [word for word in shlex.split(command) if word != "..."]
    while re.fullmatch(r"\w+=.*", words[0]):
        del words[0]
    program, *argv = words[1:] if words[:2] == ["uv", "run"] else words
    argv = [program, *argv] if program.endswith((".py", ".sh")) else argv
    if program == "pip":
        files = [argv[i + 1] for i, word in enumerate(argv) if word == "-r"]
        assert argv[0] == "install" and all((ROOT / file).is_file() for file in files), command
    elif program in OTHERS:
        return
    elif argv[:2] == ["-m", "pytest"]:
        markers = str(tomllib.loads(PROGRAMS[ROOT / "pyproject.toml"])["tool"]["pytest"])
        chosen = argv[argv.index("-m", 2) + 1] if "-m" in argv[2:] else ""
        assert all(f"{m}:" in markers for m in {*chosen.split()} - {"and", "or", "not"}), command
        assert all((ROOT / word).exists() for word in argv if word.endswith(".py")), command
    elif argv[0] in ("jedi_atari.py", "jedi_atari_stochastic.py"):
        script = importlib.import_module(argv[0][:-3])
        if "--eval-only" in argv:  # of a run that is there
            (folder / "args.json").write_text(json.dumps(vars(script.Args())))
            argv[argv.index("--eval-only") + 1] = str(folder)
        script.check_args(script.parse_args(argv[1:]))
    else:  # the options must stand in the program, or beside it in its folder
        path = ROOT / (argv[1].replace(".", "/") if argv[0] == "-m" else argv[0])
        path = next(p for p in (path, path / "__main__.py", path.with_suffix(".py")) if p.is_file())
        path = ROOT / "benchmark/run.py" if path.name == "benchmark.sh" else path
        own, _, rest = (" ".join(argv) + " ").partition(" -- ")
        text = "".join(t for p, t in PROGRAMS.items() if p.parent == path.parent)
        for option in re.findall(r" (--[\w-]+)", own):
            assert f'"{option}"' in text, f"{path.name} has no {option}"
        jedi.check_args(jedi.parse_args(shlex.split(rest)))


ALL = sorted(
    {c: page for page in PAGES if page != HISTORY for c in commands(page.read_text())}.items()
)


@pytest.mark.parametrize(("command", "page"), ALL, **ids)
def test_a_command_is_understood(command, page, tmp_path):
    check(command, tmp_path)


WRONG = """python jedi_atari.py --batchsize 3; python tests/nothing.py; python -m play runs/x --prt 3; python -m play.films x;
pip install -r nothing.txt; ./benchmark.sh --game Pong; ./benchmark.sh -- --batchsize 3; python -m pytest -m quick;
bash nothing.sh; python -m pytest tests/test_nothing.py; uv run jedi_atari.py --preset enormous; frobnicate"""


@pytest.mark.parametrize("command", WRONG.replace("\n", " ").split(";"))
def test_a_wrong_command_is_noticed(command, tmp_path):
    with pytest.raises((AssertionError, SystemExit, StopIteration, IndexError)):
        check(command, tmp_path)


def anchors(text: str) -> set[str]:
    """Those of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(text: str, page) -> list[str]:
    """Links that lead nowhere, and those to a line of a file: it moves."""
    result, text = [], re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(
        r"(?:src|href)=\"([^\"]+)\"", text
    ):
        path, _, anchor = link.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not re.match(r"https?:|mailto:", link):
            there = file.exists() and file.is_relative_to(ROOT)
            if not there or (anchor and anchor not in anchors(file.read_text())):
                result.append(link)
    return result


def unknown(span: str) -> bool:
    """Whether a span of inline code is a flag, a path or a name, and nothing here has it."""
    if re.fullmatch(r"--[a-z][\w-]*", span):
        return not {span, span.replace("--no-", "--")} & FLAGS and f'"{span}"' not in TEXT
    if re.fullmatch(r"[\w./*<>-]+\.(py|md|jsonl?|txt|sh|png|gif|pt|svg|toml)|[\w./-]+/", span):
        pattern = re.sub(r"<\w+>", "*", span).strip("./")
        there = [
            str(p.relative_to(ROOT)) for f in FILES for p in (f, *f.parents) if ROOT in p.parents
        ]
        return not fnmatch.filter(there, f"*{pattern}") and span not in TEXT
    name = re.sub(r"\(.*\)$|\[.*\]$", "", span)
    if re.fullmatch(r"\w+/\w+(<\w+>)?", name):
        return f"`{name}`" not in TEXT and name.split("/")[1] not in TEXT  # a metric
    looks = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name) and re.search(
        r"_|[A-Z][a-z]", name
    )
    return bool(looks) and not all(re.search(rf"\b{x}\b", TEXT) for x in name.split("."))


@pytest.mark.parametrize("page", PAGES, **ids)
def test_what_a_page_links_and_names_exists(page):
    assert not broken(page.read_text(), page)
    assert page == HISTORY or not [span for span in spans(page.read_text()) if unknown(span)]


def test_what_does_not_exist_is_noticed():
    bad = "GONE.md jedi_atari.py#L5 README.md#no-such-heading ../elsewhere.md".split()
    assert broken(" ".join(f"[x]({link})" for link in bad), ROOT / "README.md") == bad
    for span in "imagined_twice ReplayBuffer.forget --batchsize wm/latent_rank gone.json".split():
        assert unknown(span), span


def test_the_pages_that_are_made_are_up_to_date_and_the_readme_is_short():
    subprocess.run([sys.executable, ROOT / "docs/generate.py", "--check"], check=True)
    readme, script = (ROOT / "README.md").read_text(), PROGRAMS[ROOT / "jedi_atari.py"]
    assert len(readme.splitlines()) <= 130 and len(readme.split()) <= 1_200
    assert f"**{len(script.splitlines()):,} lines**" in readme


SHORT = dict(total_steps=40, first_steps_min=30, first_steps_max=30, first_diffusion_updates=2)
SHORT |= dict(first_reward_updates=2, first_policy_updates=1, epoch_steps=10, diffusion_updates=1)
SHORT |= dict(reward_updates=1, policy_updates=1, final_epochs=0, max_episode_steps=12)
SHORT |= dict(eval_episodes=1, final_episodes=2, threads=1)


def test_the_quick_start_runs(tmp_path):
    """The README's commands that train and carry on, on the real game at the real sizes, with few steps and updates."""
    lines = [
        c.split()
        for c in commands(
            blocks((ROOT / "README.md").read_text(), "bash").join(["```bash\n", "```"])
        )
    ]
    train, resume = (line for line in lines if line[1:2] == ["jedi_atari.py"])
    resume[resume.index("runs/...")] = str(tmp_path)
    more = command_line(SHORT | dict(run_dir=str(tmp_path)))
    for line in (train + more, resume + command_line(dict(total_steps=50))):
        done = subprocess.run([sys.executable, *line[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "\nrandom play " in done.stdout, done.stderr[-2_000:]
    assert json.loads((tmp_path / "result.json").read_text())["env_steps"] == 50
    assert {"checkpoint.pt", "metrics.jsonl", "result_40.json"} <= {
        p.name for p in tmp_path.iterdir()
    }

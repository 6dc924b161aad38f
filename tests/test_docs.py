"""The documentation says what the code does: commands parse, links lead somewhere, names exist."""

import fnmatch
import json
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, command_line

import jedi_atari as jedi
import jedi_atari_stochastic

HISTORY = ROOT / "docs/log.md"  # names and commands of their day
FILES = [p for p in ROOT.rglob("*.*") if not re.search(r"/(\.\w|runs/)", str(p)[len(str(ROOT)) :])]
PAGES = {p: p.read_text() for p in FILES if p.suffix == ".md"}
PROGRAMS = {p: p.read_text() for p in FILES if p.suffix in (".py", ".sh", ".js", ".html", ".patch")}
PROGRAMS.pop(ROOT / "tests/test_docs.py")  # it names what does not exist
TEXT = "\n".join([*PROGRAMS.values(), PAGES[ROOT / "docs/metrics.md"], *map(str, FILES)])
FIELDS = {*vars(jedi.Args()), *vars(jedi_atari_stochastic.Args())}
FLAGS = {f"--{name.replace('_', '-')}" for name in FIELDS}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def spans(text: str) -> list[str]:
    """Inline code, less blocks and what is cited from DIAMOND as [D, `its_name`]."""
    text = re.sub(r"\[[PDEC],[^\]\[(]*\](?!\()", "", BLOCK.sub("", text))
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def commands(text: str) -> list[str]:
    """Those of bash blocks, and inline code that begins like one."""
    block = "".join(block for kind, block in BLOCK.findall(text) if kind == "bash")
    lines = block.replace("\\\n", " ").splitlines()
    lines += [s for s in spans(text) if re.match(r"(python|pip|uv|bash|\./\S+\.sh) ", s)]
    return [c for line in lines for c in re.split(r" && | & ", line.split("#")[0]) if c.strip()]


def check(command: str, folder) -> None:
    """Raise for a command that would not be understood."""
    words = shlex.split(command.replace("uv run ", "python "))
    program, *words = [w for w in words if w != "..." and not re.match(r"\w+=", w)]
    if program == "pip":
        assert words[0] == "install" and all((ROOT / w).is_file() for w in words if "." in w)
    elif words and words[0] in ("jedi_atari.py", "jedi_atari_stochastic.py"):
        script = jedi if words[0] == "jedi_atari.py" else jedi_atari_stochastic
        if "--eval-only" in words:  # of a run that is there
            (folder / "args.json").write_text(json.dumps(vars(script.Args())))
            words[words.index("--eval-only") + 1] = str(folder)
        script.check_args(script.parse_args(words[1:]))
    elif words[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).is_file() for word in words if "/" in word)
    elif program in ("python", "bash", "./benchmark.sh"):  # has it, or its folder, these options?
        name = words[0] if program in ("python", "bash") else "benchmark/run.py"
        name = words[1].replace(".", "/") if name == "-m" else name
        paths = (name, f"{name}/__main__.py", f"{name}.py")
        path = next(ROOT / path for path in paths if (ROOT / path).is_file())
        own, _, rest = (" ".join(words) + " ").partition(" -- ")
        text = '"--help"' + "".join(t for p, t in PROGRAMS.items() if p.parent == path.parent)
        assert all(f'"{option}"' in text for option in re.findall(r" (--[\w-]+)", f" {own}"))
        jedi.check_args(jedi.parse_args(shlex.split(rest)))
    else:
        assert program in ("tensorboard", "ssh", "git", "cd", "ruff", "pre-commit")


ALL = {(c, p.name) for p, text in PAGES.items() if p != HISTORY for c in commands(text)}


@pytest.mark.parametrize(("command", "page"), sorted(ALL))
def test_a_command_is_understood(command, page, tmp_path):
    check(command, tmp_path)


WRONG = """python jedi_atari.py --batchsize 3; python tests/no.py; python -m play x --prt 3; frobnicate
pip install -r no.txt; ./benchmark.sh --game Pong; ./benchmark.sh -- --batchsize 3; python -m play.no
uv run jedi_atari.py --preset big; python -m pytest tests/no.py; bash no.sh"""


@pytest.mark.parametrize("command", re.split(r"\n|; ", WRONG))
def test_a_wrong_command_is_noticed(command, tmp_path):
    with pytest.raises((AssertionError, SystemExit, StopIteration)):
        check(command, tmp_path)


def broken(text: str, page) -> list[str]:
    """Links that lead nowhere, and those to a line of a file: it moves."""
    result, text = [], BLOCK.sub("", text)
    for link in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text):
        path, _, anchor = (link := "".join(link)).partition("#")
        file = (page.parent / path).resolve() if path else page
        there = file.exists() and file.is_relative_to(ROOT)
        heads = re.findall(r"^#+ (.*)", file.read_text(), re.M) if there and anchor else []
        known = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
        if not path.startswith("http") and (not there or (anchor and anchor not in known)):
            result.append(link)
    return result


def unknown(span: str) -> bool:
    """Whether a span of inline code is a flag, a path, a metric or a name that nothing here has."""
    if re.fullmatch(r"--[a-z][\w-]*", span):
        return not {span, span.replace("--no-", "--")} & FLAGS and f'"{span}"' not in TEXT
    if re.fullmatch(r"[\w./*<>-]+\.(py|md|jsonl?|txt|sh|png|gif|pt|svg|toml)|[\w./-]+/", span):
        pattern = "*" + re.sub(r"<\w+>", "*", span).strip("./") + "*"
        return not fnmatch.filter(map(str, FILES), pattern) and span not in TEXT
    name = re.sub(r"\(.*\)$|\[.*\]$", "", span)
    if re.fullmatch(r"\w+/\w+(<\w+>)?", name):
        return f"`{name.rstrip('0123456789')}" not in TEXT
    if not re.fullmatch(r"[A-Za-z_][\w.]*", name) or not re.search("_|[A-Z][a-z]", name):
        return False
    owner, _, attribute = name.partition(".")
    if attribute and hasattr(jedi, owner):
        return not hasattr(getattr(jedi, owner), attribute)
    return not re.search(rf"\b{attribute or owner}\b", TEXT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_links_and_names_exists(page):
    assert broken(PAGES[page], page) == []
    assert page == HISTORY or [span for span in spans(PAGES[page]) if unknown(span)] == []


def test_what_does_not_exist_is_noticed():
    bad = "GONE.md jedi_atari.py#L5 README.md#no-such-heading ../elsewhere.md".split()
    assert broken(" ".join(f"[x]({link})" for link in bad), ROOT / "README.md") == bad
    for span in "imagined_twice ReplayBuffer.forget --batchsize wm/latent_rank gone.json".split():
        assert unknown(span), span


def test_what_is_made_is_up_to_date_and_the_readme_is_short():
    assert runpy.run_path(str(ROOT / "docs/generate.py"))["main"](["--check"]) == 0
    readme, lines = PAGES[ROOT / "README.md"], PROGRAMS[ROOT / "jedi_atari.py"].count("\n")
    assert len(readme.splitlines()) <= 130 and len(readme.split()) <= 1_200
    assert f"**{lines:,} lines**" in readme, f"README.md: jedi_atari.py has {lines:,} lines"


def test_the_quick_start_runs(tmp_path):
    """The README's commands that train and carry on, at the real sizes, with few steps and games."""
    lines = [line for line in commands(PAGES[ROOT / "README.md"]) if " --" in line]
    train, resume = (line.split()[1:] for line in lines[:2])
    resume[-1] = train[-1] = str(tmp_path / "first")
    few = {name: 2 for name in FIELDS if re.search("updates|episodes", name)}
    few |= dict(total_steps=20, first_steps_min=20, first_steps_max=20, max_episode_steps=9)
    for words in (train + command_line(few), resume + ["--total-steps", "30"]):
        said = subprocess.check_output([sys.executable, *words], cwd=ROOT, text=True)
        assert "\nrewarded steps recognised: " in said and "\nrandom play " in said
    assert json.loads((tmp_path / "first/result.json").read_text())["env_steps"] == 30

"""The documentation says what the code does: generated pages, metrics, names, links, commands."""

import argparse
import ast
import dataclasses
import fnmatch
import importlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from conftest import MICRO, ROOT

import jedi_atari as jedi
import jedi_atari_stochastic

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name / "README.md" for name in ("benchmark", "results", "play/showcase")),
]
HISTORY = ROOT / "docs" / "log.md"  # its names and commands are those of their day
ids = {"ids": lambda value: str(value.relative_to(ROOT)) if isinstance(value, Path) else None}

spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
generate = importlib.util.module_from_spec(spec)
sys.modules["generate"] = generate  # dataclasses look their module up there
spec.loader.exec_module(generate)


# --- what docs/generate.py makes


def test_what_is_made_from_the_code_is_up_to_date(capsys):
    if not generate.torch.backends.mkl.is_available():
        pytest.skip("without MKL PyTorch draws other numbers from a seed: another walkthrough")
    status = generate.main(["--check"])
    assert (status, capsys.readouterr().err) == (0, "")


def test_the_check_of_a_page_sees_words_and_numbers():
    page = "a loss of 0.998 after 4,000 steps"
    for old, new in (("0.998", "1.03"), ("0.998", "-0.998"), ("4,000", "4,100"), ("loss", "gain")):
        assert generate.difference(page, page.replace(old, new), 0.02).startswith("line 1: "), new
    assert generate.difference(page, page.replace("0.998", "1.01"), 0.02) is None
    assert generate.difference(page, page.replace("0.998", "1.01"))
    assert generate.difference(page, page + " more") and generate.difference(page + "\nmore", page)


def test_every_argument_is_in_the_table_with_its_group_and_source():
    fields = generate.hyperparameters(jedi)
    assert [field.name for field in fields] == [
        field.name for field in dataclasses.fields(jedi.Args)
    ]
    by_name = {field.name: field for field in fields}
    horizon, norm = by_name["horizon"], by_name["latent_norm"]
    assert (horizon.group, horizon.sources) == ("learning", "P, D") and "[" not in horizon.meaning
    assert (norm.group, norm.choices) == ("networks", ("none", "center"))
    assert all(field.meaning and field.group for field in fields)


# --- metrics


class Everything(gym.Env):
    """A game in which each measure of the world model has something to count: rewards, ends, and long episodes."""

    metadata = {"render_modes": []}
    observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = gym.spaces.Discrete(3)
    length = 27  # longer than a window of the open-loop error

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.frame(), {}

    def step(self, action):
        self.time += 1
        return self.frame(), float(self.time % 4 == 0), self.time == self.length, False, {}

    def frame(self):
        return np.full((64, 64, 3), 8 * self.time, np.uint8)


def logged(folder: Path) -> set[str]:
    """Every key of a run that logs everything that can be logged."""
    gym.register("Everything-v0", Everything)
    changes = dict(env_id="Everything-v0", max_episode_steps=100, total_steps=110)
    changes |= dict(final_epochs=0, final_episodes=2, run_dir=str(folder / "run"))
    init = jedi.RewardTerminationModel.__init__

    def sees_ends(model, *args):
        init(model, *args)
        # Or no step would be taken for an end, and precision had nothing to count.
        model.head[-1].bias.data[4] = 4.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jedi.RewardTerminationModel, "__init__", sees_ends)
        jedi.train(jedi.Args(**MICRO | changes))
    rows = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return {key for row in rows for key in json.loads(row)}


def documented_metrics(text: str) -> set[str]:
    """The keys that entries of metrics.md begin with; `<k>` stands for the numbers that the entry names."""
    keys = set()
    for entry in re.findall(r"^- (`.*)", text, re.M):
        names = re.match(r"(?:`[^`]+`(?:, )?)+", entry)[0]
        which = re.search(r"k = ([\d, ]+)(?:to (\d+))?", entry)
        ks = [int(x) for x in re.findall(r"\d+", which[1])] if which else []
        ks = range(ks[0], int(which[2]) + 1) if which and which[2] else ks
        for name in re.findall(r"`([^`]+)`", names):
            keys |= {name.replace("<k>", str(k)) for k in ks} if "<k>" in name else {name}
    return keys


def test_metrics_are_documented_exactly_as_they_are_logged(tmp_path):
    text = (ROOT / "docs" / "metrics.md").read_text()
    documented, found = documented_metrics(text), logged(tmp_path)
    assert not found - documented, (
        f"docs/metrics.md does not explain {sorted(found - documented)}: write an entry like its others, "
        "'- `key` (unit): what it is, and the function in backticks', with its lines 'Healthy' and 'If not'"
    )
    assert not documented - found, f"delete from docs/metrics.md: {sorted(documented - found)}"
    for entry in re.findall(r"^- `.*(?:\n +.*)*", text, re.M):
        assert re.match(r"- [^:]*`[^(]*\([^)]+\): ", entry), f"no unit: {entry}"
        assert "\n  - Healthy: " in entry and "\n  - If not: " in entry, entry


# --- names

# What a page may name although nothing here defines it.
ALLOWED = {"AtariPreprocessing", "np_random"}  # gymnasium's


class Names(typing.NamedTuple):
    """Everything that a page may name."""

    defined: set[str]  # functions, classes, Class.name, fields, arguments, keys of JSON
    text: str  # of all programs, to find flags in
    files: set[str]  # paths in the repository, and their last parts
    metrics: set[str]


def defined_in(source: str) -> set[str]:
    """Names that a module defines at any depth, and the strings that it uses as keys and names of files."""
    names = set()
    for owner in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef)):
        names |= {f"{owner.name}.{n.name}" for n in owner.body if isinstance(n, ast.FunctionDef)}
        fields = [n.target for n in owner.body if isinstance(n, ast.AnnAssign)]
        names |= {f"{owner.name}.{field.id}" for field in fields}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"[\w.]+", node.value)
        ):
            names.add(node.value)
    return names


@pytest.fixture(scope="module")
def names() -> Names:
    hidden = {".git", "runs", ".venv"}
    tracked = [p for p in ROOT.rglob("*") if not hidden & set(p.relative_to(ROOT).parts)]
    suffixes = (".py", ".sh", ".js", ".html")
    programs = [p for p in tracked if p.suffix in suffixes and p != Path(__file__)]
    python = [p.read_text() for p in programs if p.suffix == ".py"]
    files = {x for p in tracked for x in (p.name, str(p.relative_to(ROOT)))}
    published = json.loads((ROOT / "benchmark" / "published.json").read_text())
    defined = set().union(*map(defined_in, python)) | set(published)
    metrics = documented_metrics((ROOT / "docs" / "metrics.md").read_text())
    return Names(defined, "\n".join(p.read_text() for p in programs), files, metrics)


def spans_of(text: str) -> list[str]:
    """Inline code of a page, less its code blocks and less what is cited from DIAMOND, as in [D, `its_name`]."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"\[[PDEC][^\]\[(]*\](?!\()", "", text)
    return [span.strip() for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)]


def is_file(span: str, names: Names) -> bool:
    pattern = re.sub(r"<[^>]*>", "*", span).rstrip("/").removeprefix("./")
    return any(fnmatch.fnmatch(file, pattern) for file in names.files) or span in names.defined


def imports(span: str) -> bool:
    """A name of a library, such as `torch.randn_like`, that is there."""
    module, _, name = span.partition(".")
    return module in ("torch", "gymnasium", "numpy") and hasattr(
        importlib.import_module(module), name
    )


def unknown(span: str, names: Names) -> str | None:
    """What is wrong with a span of inline code; None if nothing is, or if it is no name."""
    bare = re.sub(r"\(.*\)$|\[.*\]$", "", span)
    if span in ALLOWED or bare in ALLOWED or re.fullmatch(r"(src|config)/[\w/]+\.(py|yaml)", span):
        return None  # the last are DIAMOND's
    if re.fullmatch(r"--[a-z][\w-]*", span):
        flags = {
            f"--{field.name.replace('_', '-')}"
            for script in (jedi, jedi_atari_stochastic)
            for field in dataclasses.fields(script.Args)
        }
        known = flags | {flag.replace("--", "--no-", 1) for flag in flags}
        return (
            None if span in known or re.search(rf"{span}(?![\w-])", names.text) else "no such flag"
        )
    if re.fullmatch(r"(charts|diffusion|reward|policy|eval|final|wm|time)/[\w*<>]+", span):
        pattern = re.sub(r"<\w+>", "*", span)
        return None if fnmatch.filter(names.metrics, pattern) else "no such metric"
    if re.fullmatch(
        r"[\w./*<>-]+\.(py|md|jsonl?|txt|sh|png|gif|pt|bin|csv|svg|toml|ya?ml)|[\w./-]+/", span
    ):
        return None if is_file(span, names) else "no such file"
    looks_like_a_name = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", bare) and re.search(
        r"_|[A-Z][a-z]", bare
    )
    if not looks_like_a_name or bare in names.defined or imports(bare):
        return None
    return "no such name"


@pytest.mark.parametrize("page", [page for page in PAGES if page != HISTORY], **ids)
def test_what_a_page_names_exists(page, names):
    wrong = {span: unknown(span, names) for span in spans_of(page.read_text())}
    assert not {span: why for span, why in wrong.items() if why}


@pytest.mark.parametrize(
    "span",
    "imagined_twice ReplayBuffer.forget Enkoder(width) --batchsize wm/latent_rank tests/test_nothing.py gone.json "
    "torch.randn_unlike gone/*.md".split(),
)
def test_what_does_not_exist_is_noticed(span, names):
    assert unknown(span, names)


# --- links


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    result = set()
    for heading in re.findall(
        r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M
    ):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        result.add(f"{slug}-{found[slug]}" if slug in found else slug)
        found[slug] = found.get(slug, 0) + 1
    return result


def broken_links(text: str, page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    return [t for t in targets if not re.match(r"https?:|mailto:", t) and link_is_broken(t, page)]


def link_is_broken(target: str, page: Path) -> bool:
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.exists() or not file.is_relative_to(ROOT):
        return True
    return bool(anchor) and anchor not in anchors(file.read_text())


@pytest.mark.parametrize("page", PAGES, **ids)
def test_links_lead_somewhere(page):
    assert broken_links(page.read_text(), page) == []


def test_a_broken_link_is_noticed():
    good = '[a](README.md) [b](CONTRIBUTING.md#readability) <img src="LICENSE"> [c](https://example.org/x)'
    assert broken_links(good, ROOT / "README.md") == []
    # A line of a file is no place to link to: it moves.
    bad = "GONE.md jedi_atari.py#L5 README.md#no-such-heading ../elsewhere.md gone.png".split()
    text = " ".join(f"[x]({target})" for target in bad[:-1]) + f' <img src="{bad[-1]}">'
    assert broken_links(text, ROOT / "README.md") == bad


# --- commands

SHELL = {  # commands of other programs, which this project does not define
    "tensorboard": {"--logdir"},
    "ssh": {"-L"},
    "git": {"clone"},
    "cd": set(),
    "ruff": {"--check", "check", "format"},
    "pre-commit": {"install"},
    "mv": set(),
}
PACKAGES = {"pre-commit", "wandb"}  # installed by name


def commands_of(text: str) -> list[str]:
    """Commands of a page: the lines of its bash blocks, and inline code that begins like one."""
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = [
        span
        for span in spans_of(text)
        if re.match(r"(python|pip|bash|tensorboard|ssh|\./\S+\.sh) ", span)
    ]
    return [line for line in lines + inline if line.strip() and not line.lstrip().startswith("#")]


def split_command(line: str) -> list[list[str]]:
    """A line of a shell -> its commands; comments, variables before a command, and `...` go."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split, lexer.commenters = True, "#"
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set(";&|"):
            commands.append([])
        elif not (word == "..." or (not commands[-1] and re.fullmatch(r"\w+=.*", word))):
            commands[-1].append(word)
    return [command for command in commands if command]


class Parsed(Exception):
    """A script has taken its arguments."""


def parse_with_argparse(path: Path, argv: list[str]) -> None:
    """Let a script's own function judge its arguments, or else run it up to where argparse has accepted them."""
    has_parser = re.search(r"argparse|common\.parser|Parser\(", path.read_text())
    assert has_parser, f"no rule for {path.name}: it has no parser"
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, *args, **kwargs):
        parse(parser, *args, **kwargs)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(path.parent), *sys.path])
        script = runpy.run_path(str(path), run_name="imported")
        for name in ("parse_args", "parse"):
            if name in script:
                return script[name](argv)
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [str(path), *argv])
        with pytest.raises(Parsed):
            runpy.run_path(str(path), run_name="__main__")


def check_pytest(argv: list[str]) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    markers = {marker.partition(":")[0] for marker in settings["markers"]}
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("-m", default="")
    parser.add_argument("-n", type=int)
    parser.add_argument("-k")
    parser.add_argument("-s", action="store_true")
    parser.add_argument("paths", nargs="*")
    options = parser.parse_args(argv)
    assert set(re.findall(r"\w+", options.m)) - {"and", "or", "not"} <= markers
    assert all((ROOT / path.partition("::")[0]).exists() for path in options.paths)


def check_python(argv: list[str], folder: Path) -> None:
    if argv[:2] == ["-m", "pytest"]:
        return check_pytest(argv[2:])
    if argv[0] == "-m":
        script = ROOT / argv[1].replace(".", "/")
        script = script / "__main__.py" if script.is_dir() else script.with_suffix(".py")
        assert script.is_file(), f"{argv[1]} does not exist"
        return parse_with_argparse(script, argv[2:])
    script, rest = ROOT / argv[0], argv[1:]
    assert script.is_file(), f"{argv[0]} does not exist"
    if script.stem in ("jedi_atari", "jedi_atari_stochastic") and script.parent == ROOT:
        module = importlib.import_module(script.stem)
        if "--eval-only" in rest:  # of a run that is there
            (folder / "args.json").write_text(json.dumps(vars(module.Args())))
            rest[rest.index("--eval-only") + 1] = str(folder)
        return module.check_args(module.parse_args(rest))
    return parse_with_argparse(script, rest)


def check_pip(argv: list[str], folder: Path) -> None:
    assert argv[0] == "install"
    wanted = iter(argv[1:])
    for word in wanted:
        assert word in PACKAGES or (word == "-r" and (ROOT / next(wanted)).is_file()), word


def check_benchmark(argv: list[str], folder: Path) -> None:
    """By benchmark.sh itself, as a dry run of an empty script; what goes to each run, by the real script's parser."""
    own = argv[: argv.index("--")] if "--" in argv else argv
    argv, extra, script = list(own), argv[len(own) + 1 :], "jedi_atari.py"
    if "--script" in argv:
        script = argv.pop(argv.index("--script") + 1)
        argv.remove("--script")
    preset = argv[argv.index("--preset") + 1] if "--preset" in argv else "paper"
    module = importlib.import_module(Path(script).stem)
    module.check_args(module.parse_args(["--preset", preset, *extra]))
    (folder / "empty.py").write_text("")
    only = [] if {"--status", "--dry-run"} & set(argv) else ["--dry-run"]
    command = [str(ROOT / "benchmark.sh"), *argv, *only, "--script", "empty.py"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0", "PYTHON": sys.executable}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode in (0, 1) and "error:" not in done.stderr, done.stderr


def check_command(command: list[str], folder: Path) -> None:
    """Fail for a command that would not be understood, and for one that no rule covers."""
    program, *argv = command
    if program in ("python", "pip"):
        return {"python": check_python, "pip": check_pip}[program](argv, folder)
    if Path(program).name == "benchmark.sh":
        return check_benchmark(argv, folder)
    if program == "bash":
        assert argv and (ROOT / argv[0]).is_file(), command
        return None
    assert program in SHELL, f"no rule for {program}"
    options = {word.partition("=")[0] for word in argv if word.startswith("-")}
    words = set(argv[:1]) if any(not name.startswith("-") for name in SHELL[program]) else set()
    assert options | words <= SHELL[program], f"no rule for {options | words} of {program}"
    return None


def commands_in_pages() -> list[tuple[Path, str]]:
    pages = [page for page in reversed(PAGES) if page != HISTORY]
    found = {line: page for page in pages for line in commands_of(page.read_text())}
    return [(page, line) for line, page in sorted(found.items())]


@pytest.mark.parametrize(("page", "line"), commands_in_pages(), **ids)
def test_a_command_is_understood(page, line, tmp_path):
    for command in split_command(line):
        check_command(command, tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "python jedi_atari.py --batchsize 3",
        "python jedi_atari.py --preset enormous",
        "python jedi_atari_stochastic.py --frame-skip 4",
        "python tests/nothing.py",
        "python examples/toys.py",
        "python -m play runs/x --prt 3",
        "python -m play.pictures",
        "python -m play.films runs/x",
        "python benchmark/report.py",
        "python -m pytest -m quick",
        "python -m pytest tests/test_nothing.py",
        "pip install -r nothing.txt",
        "pip install something",
        "./benchmark.sh --game Pong",
        "./benchmark.sh -- --batchsize 3",
        "bash nothing.sh",
        "cd x && frobnicate",
        "ruff polish .",
        "tensorboard --folder runs",
    ],
)
def test_a_wrong_command_is_noticed(line, tmp_path):
    with pytest.raises(
        (AssertionError, SystemExit, pytest.fail.Exception, jedi.BadInput, ValueError)
    ):
        for command in split_command(line):
            check_command(command, tmp_path)


def test_commands_are_found_and_split():
    text = "```bash\na 1 && b 2  # not this\n\n# nor this\nX=1 c \\\n  ...\n```\n`python d.py`, `ruff`, ``` e ```\n"
    lines = commands_of(text)
    assert [c for line in lines for c in split_command(line)] == [
        ["a", "1"],
        ["b", "2"],
        ["c"],
        ["python", "d.py"],
    ]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 300

"""Write hyperparameters.md from the fields of `Args`, so that the two cannot part, and the README's learning curve.

    python docs/generate.py            # write them
    python docs/generate.py --check    # write nothing; exit with 1 if the page is stale

The learning curve, of the runs in results/small.jsonl, needs benchmark/requirements.txt.
"""

import argparse
import ast
import io
import itertools
import re
import sys
import tokenize
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jedi_atari as jedi  # noqa: E402
import jedi_atari_stochastic  # noqa: E402

PAGE = ROOT / "docs" / "hyperparameters.md"


class Hyperparameter(typing.NamedTuple):
    """A field of `Args`, with what its source says of it."""

    name: str
    group: str  # of the `# --- group` comment above it
    meaning: str
    sources: str  # letters
    choices: tuple[str, ...]

    @property
    def flag(self) -> str:
        return f"`--{self.name.replace('_', '-')}`"


def hyperparameters(module) -> list[Hyperparameter]:
    """The fields of a script's `Args`, in order."""
    source = Path(module.__file__).read_text()
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    args = next(n for n in ast.parse(source).body if getattr(n, "name", "") == "Args")
    types, result, group, line = typing.get_type_hints(module.Args), [], "run", args.lineno
    letter = r"[PDEC](?:, [PDEC])*"
    for node in (n for n in args.body if isinstance(n, ast.AnnAssign)):
        for above in range(line, node.lineno):
            group = comments[above][4:] if comments.get(above, "").startswith("--- ") else group
        line, name, comment = node.lineno, node.target.id, comments.get(node.lineno, "")
        letters = ", ".join(re.findall(rf"\[({letter})\]", comment)).split(", ")
        meaning = re.sub(rf"(?<! or) \[{letter}\]$", "", comment)
        names = r"(?<!\S)(--[\w-]+|\S*<\S+|[a-z]+_[a-z_]+)"  # flags, paths and names
        meaning = re.sub(names, r"`\1`", meaning)
        sources = ", ".join(dict.fromkeys(letters))
        choices = tuple(x for x in typing.get_args(types[name]) if isinstance(x, str))
        result.append(Hyperparameter(name, group, meaning, sources, choices))
    return result


def shown(field: Hyperparameter, value) -> str:
    """A value as a table shows it."""
    if field.name == "compile":
        return "by device"
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or isinstance(value, str):
        return f"`{value}`" if value else "(empty)"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def hyperparameter_tables() -> str:
    """One table per group: flag, the paper preset's value, other presets' where they differ."""
    presets = {name: jedi.Args(**changes) for name, changes in jedi.PRESETS.items()}
    paper = presets.pop("paper")
    head = f"| flag | paper | {' | '.join(presets)} | meaning | source |\n"
    head += f"|---|---|{'---|' * len(presets)}---|---|\n"
    text = ""
    for group, fields in itertools.groupby(hyperparameters(jedi), lambda field: field.group):
        text += f"\n## {group.capitalize()}\n\n{head}"
        for field in fields:
            usual = getattr(paper, field.name)
            values = [getattr(args, field.name) for args in presets.values()]
            cells = [shown(field, usual), *("" if v == usual else shown(field, v) for v in values)]
            choices = f" ({', '.join(f'`{x}`' for x in field.choices)})" if field.choices else ""
            meaning = field.meaning + choices
            text += f"| {field.flag} | {' | '.join(cells)} | {meaning} | {field.sources} |\n"
    return text


def hyperparameters_page() -> str:
    plain, stochastic = jedi.Args(), jedi_atari_stochastic.Args()
    rows = [
        f"| {field.flag} | {shown(field, value)} | {field.meaning} | {field.sources} |\n"
        for field in hyperparameters(jedi_atari_stochastic)
        for value in [getattr(stochastic, field.name)]
        if value != getattr(plain, field.name, None)
    ]
    gone = [f.flag for f in hyperparameters(jedi) if not hasattr(stochastic, f.name)]
    return f"""# Hyperparameters

Every argument of `jedi_atari.py`, made from `Args` and `PRESETS` by `python docs/generate.py`. `--preset` chooses a
column; a flag on the command line goes before the preset. An empty cell is the value of `paper`. `--no-compile`
turns `--compile` off, and so on for all that can be on.

Sources: [P] the JEDI papers (arXiv 2505.19698 and 2605.13013), [D] DIAMOND (arXiv 2405.12399 and its code), [E] EDM
(arXiv 2206.00364), [C] our choice where no source says. They are those of the column `paper`; other presets are [C].
{hyperparameter_tables()}
## In jedi_atari_stochastic.py

The same but for these, and without {", ".join(gone)}.

| flag | default | meaning | source |
|---|---|---|---|
{"".join(rows)}"""


def learning_curve(game: str = "KungFuMaster") -> None:
    """The runs of a game in results/small.jsonl, beside random play, as small as a picture in a README."""
    sys.path.insert(0, str(ROOT / "benchmark"))
    import common
    import runs

    figure, axes = common.new_figure("", 1, 1, (2.95, 2.9))
    found = [run for run in runs.find_runs(ROOT / "results/small.jsonl") if run.game == game]
    runs.draw_runs(axes[0, 0], found, runs.LOOKS[0], None)
    axes[0, 0].set_title(f"{game}, {len(found)} seeds", fontsize=11)
    axes[0, 0].set(
        xlabel="environment steps", ylabel="mean return", xticks=[20_000, 50_000, 80_000]
    )
    axes[0, 0].ticklabel_format(style="plain")
    axes[0, 0].annotate("random play", (52_000, 560), fontsize=9)
    figure.savefig(ROOT / "docs/pictures/learning.png", dpi=100)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    says = "write nothing; exit with 1 if the page is stale"
    parser.add_argument("--check", action="store_true", help=says)
    check, page = parser.parse_args(argv).check, hyperparameters_page()
    if not check:
        PAGE.write_text(page)
        try:
            learning_curve()
        except ImportError as error:
            print(
                f"no picture: {error}; pip install -r benchmark/requirements.txt", file=sys.stderr
            )
    elif not PAGE.exists() or PAGE.read_text() != page:
        print("docs/hyperparameters.md is stale; run python docs/generate.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

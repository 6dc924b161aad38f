"""The command line: help, dry run, and what is refused before anything is written."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib

import pytest
import torch
from conftest import MICRO, ROOT, SMALL, command_line
from packaging.markers import Marker
from packaging.specifiers import SpecifierSet

import jedi_atari as jedi


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Run in an empty folder, so that anything written shows."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def run(argv: list[str], capsys) -> tuple[int, str, str]:
    status = jedi.main(argv)
    out, err = capsys.readouterr()
    return status, out, err


def refused(argv: list[str], capsys) -> str:
    """The text with which a command line is refused: one line of ours or tyro's box, with status 2."""
    try:
        status, (out, err) = jedi.main(argv), capsys.readouterr()
        assert err.count("\n") == 1 and err.startswith("jedi_atari.py: error: "), err
    except SystemExit as stop:
        status, (out, err) = stop.code, capsys.readouterr()
        err = re.sub(r"[\s\u2500-\u257f]+", " ", err)  # a message in it may be broken over lines
    assert status == 2 and out == ""
    return err


def test_help_names_every_argument_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        jedi.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code in (0, None)
    for field in dataclasses.fields(jedi.Args):
        name = field.name.replace("_", "-")
        assert f"--{name}" in text or f"--no-{name}" in text
    assert text.count("(default:") >= len(dataclasses.fields(jedi.Args))


@pytest.mark.parametrize(
    "argv", ["--preset tiny --help", "--help --preset tiny", "--preset=tiny -h"]
)
def test_help_shows_the_presets_numbers(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        jedi.main(argv.split())
    assert stop.value.code in (0, None)
    text = " ".join(capsys.readouterr().out.split())
    for name in ("denoiser_width", "total_steps", "learning_rate", "horizon"):
        shown = re.search(rf"--{name.replace('_', '-')} .*?\(default: (\S+)\)", text)[1]
        assert float(shown) == jedi.PRESETS["tiny"][name], name


def test_presets_are_defaults_that_a_flag_overrides():
    args = jedi.parse_args(["--gamma", "0.5", "--preset", "tiny", "--horizon", "4"])
    expected = jedi.PRESETS["tiny"] | dict(preset="tiny", gamma=0.5, horizon=4)
    assert args == jedi.Args(**expected)
    assert jedi.parse_args([]) == jedi.Args()


def test_dry_run_prints_the_plan_and_writes_nothing(capsys, empty_folder):
    status, out, err = run(["--dry-run", *command_line(MICRO)], capsys)
    assert status == 0 and err == "" and not list(empty_folder.iterdir())
    for word in ("Pong", "parameters", "encoder", "epochs", "updates", "games"):
        assert word in out
    schedule = jedi.make_schedule(jedi.Args(**MICRO), MICRO["first_steps_min"])
    for part in jedi.PARTS:
        assert f"{part} {sum(parts.count(part) for _, parts, _ in schedule):,}" in out
    assert f"epochs      {len(schedule)}, 130 steps of 12,288 bytes" in out


# What is refused, and what the message must say.
BAD = [
    # games
    ("--env-id Pnog", "'Pnog'"),
    ("--env-id pong", "'pong'"),
    ("--env-id ", "--env-id ''"),
    ("--eval-only ", "args.json: no arguments"),
    ("--env-id Pong/../../etc", "'Pong/../../etc'"),
    ("--env-id ALE/Nothing-v5", "'ALE/Nothing-v5'"),
    ("--env-id no_module:Game-v0", "no_module"),
    ("--env-id examples.toys:Game-v0", "'examples.toys:Game-v0'"),
    ("--env-id Pong\x00", "--env-id 'Pong"),
    (
        "--env-id P\N{LATIN SMALL LETTER O WITH DIAERESIS}ng",
        "--env-id 'P\N{LATIN SMALL LETTER O WITH DIAERESIS}ng'",
    ),
    ("--env-id CartPole-v1", "RGB frames"),
    ("--env-id Pendulum-v1", "discrete actions are needed"),
    # what cannot be read
    ("--preset huge", "--preset"),
    ("--preset", "--preset"),
    ("--preset TINY", "--preset"),
    ("--no-such-flag 3", "--no-such-flag"),
    ("stray", "stray"),
    ("--seed", "--seed"),
    ("--seed x", "--seed"),
    ("--seed 1.5", "--seed"),
    ("--seed 0x10", "--seed"),
    ("--seed 1 2", "2"),
    ("--batch-size 2.5", "--batch-size"),
    ("--batch-size 1e3", "--batch-size"),
    ("--batch-size \N{DIGIT ONE}\N{SUPERSCRIPT TWO}", "--batch-size"),
    ("--learning-rate fast", "--learning-rate"),
    ("--compile maybe", "maybe"),
    ("--track 7", "7"),
    # out of range
    ("--seed -1", "--seed is -1"),
    ("--seed 99999999999", "--seed is 99999999999; it must be from 0 to 2147483647"),
    ("--batch-size 0", "--batch-size is 0"),
    ("--batch-size -4", "--batch-size is -4"),
    ("--batch-size 1000000", "--batch-size is 1000000; it must be from 1 to 4096"),
    ("--learning-rate nan", "--learning-rate is nan"),
    ("--learning-rate inf", "--learning-rate is inf"),
    ("--learning-rate 0", "--learning-rate is 0"),
    ("--learning-rate -0.1", "--learning-rate is -0.1"),
    ("--gamma 1.5", "--gamma is 1.5; it must be from 0 to 1"),
    ("--td-lambda -0.1", "--td-lambda is -0.1"),
    ("--epsilon 2", "--epsilon is 2"),
    ("--entropy-weight nan", "--entropy-weight is nan"),
    ("--noise-mean -inf", "--noise-mean is -inf"),
    ("--horizon 0", "--horizon is 0"),
    ("--horizon 99999", "--horizon is 99999; it must be from 1 to 1000"),
    ("--sample-steps 0", "--sample-steps is 0"),
    ("--s-churn -1", "--s-churn is -1"),
    ("--context-frames 0", "--context-frames is 0"),
    ("--target-frames 0", "--target-frames is 0"),
    ("--frame-skip 0", "--frame-skip is 0"),
    ("--eval-episodes 0", "--eval-episodes is 0"),
    ("--final-episodes 0", "--final-episodes is 0"),
    ("--eval-every 0", "--eval-every is 0"),
    ("--temperature 0", "--temperature is 0"),
    ("--threads -1", "--threads is -1"),
    ("--first-steps-min 1", "--first-steps-min is 1"),
    ("--total-steps 1000000000000", "--total-steps is 1000000000000"),
    ("--lstm-size 1000000", "--lstm-size is 1000000"),
    ("--denoiser-width 0", "--denoiser-width is 0"),
    # contradictions
    ("--sample-sigma-max 0.001", "--sample-sigma-max is 0.001"),
    ("--first-steps-min 20000", "--first-steps-max"),
    ("--total-steps 100", "--total-steps"),
    ("--denoiser-width 100", "--denoiser-width is 100; it must be a multiple"),
    ("--denoiser-width 17", "--denoiser-width is 17; it must be a multiple"),
    ("--cond-dim 33", "--cond-dim"),
    ("--resume", "--run-dir"),
    # devices
    ("--device gpu", "auto, cpu, cuda"),
    ("--device cuda:99", "CUDA devices"),
    ("--device cuda:-1", "auto, cpu, cuda"),
    ("--precision fp16", "--precision"),
    ("--latent-norm batch", "--latent-norm"),
    # folders
    ("--eval-only nowhere", "nowhere/args.json: no arguments"),
    ("--eval-only nowhere --dry-run", "nowhere/args.json: no arguments"),
    ("--eval-only /proc/self/mem", "/proc/self/mem/args.json: no arguments"),
    ("--eval-only RUN --final-episodes 1", "checkpoint.pt is missing"),
    ("--run-dir /proc/nothing/run", "cannot write"),
    ("--run-dir /dev/null/run", "cannot write"),
    ("--run-dir " + "x" * 300, "cannot write"),
    ("--resume --run-dir /proc/nothing/run", "cannot write"),
]


def test_every_number_has_a_range():
    numbers = [
        f.name for f in dataclasses.fields(jedi.Args) if f.type in ("int", "float", int, float)
    ]
    ranged = [f.name for f in dataclasses.fields(jedi.Args) if "range" in f.metadata]
    assert sorted(ranged) == sorted(numbers) and len(BAD) >= 60
    for field in dataclasses.fields(jedi.Args):
        if low_high := field.metadata.get("range"):
            assert low_high[0] <= field.default <= low_high[1], field.name


@pytest.mark.parametrize(("argv", "says"), BAD)
def test_bad_input_is_refused_and_leaves_nothing_behind(argv, says, capsys, empty_folder, tmp_path):
    if "RUN" in argv:
        (tmp_path / "run").mkdir()
        jedi.write_atomically(tmp_path / "run" / "args.json", vars(jedi.Args(**MICRO)))
        argv = argv.replace("RUN", str(tmp_path / "run"))
    assert says in refused(["--preset", "tiny", *argv.split(" ")], capsys)
    assert not list(empty_folder.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_cuda(capsys, empty_folder):
    assert "--device cuda" in refused(["--device", "cuda"], capsys)
    assert not list(empty_folder.iterdir())


def test_bf16_where_it_is_not_supported(capsys, monkeypatch, empty_folder):
    supported = []
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(supported))
    err = refused(["--device", "cpu", "--precision", "bf16"], capsys)
    assert "--precision bf16" in err and not list(empty_folder.iterdir())
    assert jedi.set_up(jedi.Args(**MICRO | dict(device="cpu")))[2] is False
    supported.append("from now on")
    assert jedi.set_up(jedi.Args(**MICRO | dict(device="cpu")))[2] is True


def make_run(folder, **changes):
    """What a run leaves in its folder, without the run."""
    args = jedi.Args(**MICRO | dict(run_dir=str(folder)) | changes)
    folder.mkdir()
    jedi.write_atomically(folder / "args.json", vars(args))
    jedi.save_checkpoint(folder, checkpoint(args))
    return folder


def checkpoint(run_args, **changes) -> dict:
    """As much of a checkpoint as is looked at before anything is built."""
    return dict(script="jedi_atari", args=json.dumps(vars(run_args)), epoch=1, agent={}) | changes


def test_a_folder_with_a_run_is_not_overwritten(capsys, empty_folder):
    folder = make_run(empty_folder / "old")
    before = {p: p.read_bytes() for p in folder.iterdir()}
    assert "--resume" in refused(["--preset", "tiny", "--run-dir", str(folder)], capsys)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("flag", ["--run-dir", "--run_dir"])
def test_resume_with_another_argument_names_it(flag, capsys, empty_folder):
    folder = make_run(empty_folder / "old")
    before = {p: p.read_bytes() for p in folder.iterdir()}
    err = refused(["--resume", flag, str(folder), "--gamma", "0.5"], capsys)
    assert "gamma 0.985" in err and "horizon" not in err
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


def test_resume_of_a_finished_run_leaves_its_result(capsys, empty_folder):
    folder = make_run(empty_folder / "old")
    (folder / "result.json").write_text("{}")
    for more in ([], ["--total-steps", "999"]):  # this one does not say how far it came
        assert "is finished" in refused(["--resume", "--run-dir", str(folder), *more], capsys)
    assert (folder / "result.json").read_text() == "{}"
    (folder / "result.json").write_text('{"env_steps": 130}')
    (folder / "checkpoint.pt").unlink()  # there is nothing to go on from
    assert "is finished" in refused(["--resume", "--run-dir", str(folder), *more], capsys)


@pytest.mark.parametrize("flag", ["--run-dir", "--run_dir"])
def test_resume_takes_the_runs_own_arguments(flag, empty_folder):
    folder = make_run(empty_folder / "old", seed=3, gamma=0.5)
    args = jedi.parse_args(["--resume", flag, str(folder)])
    assert args == jedi.Args(**MICRO, seed=3, gamma=0.5, run_dir=str(folder), resume=True)
    args = jedi.parse_args([f"{flag}={folder}", "--resume", "--device", "cpu"])
    assert args.seed == 3 and args.device == "cpu"


def test_evaluation_takes_the_runs_own_arguments(empty_folder):
    folder = make_run(empty_folder / "old", seed=3, gamma=0.5)
    args = jedi.parse_args(["--eval-only", str(folder), "--final-episodes", "7"])
    changes = MICRO | dict(seed=3, gamma=0.5, final_episodes=7, eval_only=str(folder))
    assert args == jedi.Args(**changes)


def test_resume_where_nothing_is_takes_the_given_arguments(empty_folder):
    args = jedi.parse_args(["--resume", "--run-dir", "nowhere", "--preset", "tiny"])
    tiny = jedi.PRESETS["tiny"]
    assert args == jedi.Args(preset="tiny", run_dir="nowhere", resume=True, **tiny)


@pytest.mark.parametrize("exists", [False, True])
def test_resume_begins_in_a_folder_that_is_missing_or_empty(exists, micro, empty_folder):
    if exists:
        (empty_folder / "r").mkdir()
    args = dataclasses.replace(micro, run_dir="r", resume=True)
    with jedi.open_run_dir(args) as (run_dir, _):
        assert [p.name for p in run_dir.iterdir()] == [".lock"]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(100)])
def test_a_broken_checkpoint_is_named(capsys, empty_folder, content):
    folder = make_run(empty_folder / "old")
    (folder / "checkpoint.pt").write_bytes(content)
    for argv in (["--resume", "--run-dir", str(folder)], ["--eval-only", str(folder)]):
        err = refused(argv, capsys)
        assert re.search(r"checkpoint\.pt is missing, cut short", err), err
        assert not (empty_folder / "runs").exists()


@pytest.mark.parametrize(
    "content",
    [[], "args", {"model": {}}, {"args": {"lr": 1}}, {"args": None, "agent": {}, "script": ""}],
)
def test_a_file_of_another_program_is_no_checkpoint(content, capsys, empty_folder):
    folder = make_run(empty_folder / "old")
    torch.save(content, folder / "checkpoint.pt")
    for argv in (["--resume", "--run-dir", str(folder)], ["--eval-only", str(folder)]):
        assert "no data" in refused(argv, capsys)


class Code:
    """Something that would run when unpickled."""

    def __reduce__(self):
        return (open, ("executed", "w"))


def test_a_checkpoint_with_code_in_it_is_refused(capsys, empty_folder):
    folder = make_run(empty_folder / "old")
    jedi.save_checkpoint(folder, {"script": "jedi_atari", "args": Code()})
    (folder / "checkpoint.prev.pt").unlink()
    assert "no data" in refused(["--resume", "--run-dir", str(folder)], capsys)
    assert not (empty_folder / "executed").exists()


def test_a_network_of_another_size_is_refused(capsys, empty_folder):
    folder, args = make_run(empty_folder / "old"), jedi.Args(**MICRO)
    agent = jedi.Agent(6, args).state_dict()
    jedi.save_checkpoint(folder, checkpoint(args, agent=agent))
    for change in (
        "--lstm-size 8",
        "--encoder-stride 2",
        "--reward-blocks 9",
        "--reward-blocks 11",
    ):
        argv = ["--eval-only", str(folder), *change.split()]
        assert "another game, size or script" in refused(argv, capsys)


@pytest.mark.parametrize("game", ["Krull", "Alien"])
def test_evaluation_of_another_game_is_refused(game, capsys, empty_folder):
    """Also where it has as many actions: Krull's networks would play Alien, in a way."""
    folder = make_run(empty_folder / "old", env_id="Krull")
    before = sorted(folder.iterdir())
    if game == "Alien":
        err = refused(["--eval-only", str(folder), "--env-id", game], capsys)
        assert "is a run of Krull" in err
    else:  # the same game, spelled otherwise, gets as far as the networks, which this run lacks
        with pytest.raises(RuntimeError, match="state_dict"):
            jedi.eval_only(
                jedi.parse_args(["--eval-only", str(folder), "--env-id", "KrullNoFrameskip-v4"])
            )
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("key", ["expected_reward", "no_more"])
def test_a_run_begun_by_another_version_is_refused(key, capsys, empty_folder):
    """Whose checkpoint lacks an argument of today, or has one that is gone."""
    folder = make_run(empty_folder / "old")
    old = json.loads((folder / "args.json").read_text())
    old.pop(key) if key in old else old.update({key: 1})
    (folder / "args.json").write_text(json.dumps(old))
    for argv in (["--resume", "--run-dir", str(folder)], ["--eval-only", str(folder)]):
        err = refused(argv, capsys)
        assert "this script's version" in err and key in err and "args.json" in err
    with pytest.raises(jedi.BadInput, match="was begun with no_more"):
        args = dataclasses.replace(jedi.Args(**MICRO), run_dir=str(folder), resume=True)
        jedi.save_checkpoint(folder, checkpoint(args, args=json.dumps(vars(args) | {"no_more": 1})))
        jedi.train(args)


@pytest.mark.parametrize("text", ['{"learning_rates": 3}', "[1]", "not JSON", ""])
def test_an_args_file_of_another_version_is_refused(text, capsys, empty_folder):
    folder = make_run(empty_folder / "old")
    (folder / "args.json").write_text(text)
    for argv in (["--resume", "--run-dir", str(folder)], ["--eval-only", str(folder)]):
        assert "args.json: no arguments of this script's version" in refused(argv, capsys)


@pytest.mark.parametrize("script", ["jedi_atari.py", "jedi_atari_stochastic.py"])
def test_the_header_for_uv_says_what_the_requirements_say(script):
    """PEP 723: a comment block that `uv run jedi_atari.py` reads."""
    block = re.search(r"^# /// script\n((?:# .*\n)+)# ///$", (ROOT / script).read_text(), re.M)[1]
    header = tomllib.loads(re.sub(r"^# ", "", block, flags=re.M))
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert set(header["dependencies"]) == {line.split()[0] for line in lines[1:]}
    name, marker = lines[0].split(" @ ")[0], Marker(lines[0].split(" ; ")[1].split("  #")[0])
    assert "3.11-to-3.14" in name and "file:///" in lines[0]  # counts where the others do not
    needed = SpecifierSet(header["requires-python"])
    for version in ("3.9", "3.10", "3.11", "3.14", "3.15", "4.0"):
        assert (version in needed) != marker.evaluate(dict(python_version=version)), version


@pytest.mark.parametrize("name", ["events.out.tfevents.1", "metrics.jsonl", "result.json"])
def test_files_of_something_else_are_left_alone(name, capsys, empty_folder):
    """TensorBoard's of another program, say: a run would write its own anew."""
    (empty_folder / "x").mkdir()
    (empty_folder / "x" / name).write_text("precious")
    for more in ([], ["--resume"]):
        argv = ["--preset", "tiny", "--run-dir", "x", *more]
        assert "already holds a run" in refused(argv, capsys)
    assert [p.name for p in (empty_folder / "x").iterdir()] == [name]
    assert (empty_folder / "x" / name).read_text() == "precious"


def test_the_cores_of_a_container(tmp_path, capsys, micro, monkeypatch):
    here = jedi.usable_cores(tmp_path / "missing")
    assert here == len(os.sched_getaffinity(0))
    for text, cores in (
        ("max 100000\n", here),
        ("100000 100000\n", 1),
        ("50000 100000\n", 1),
        ("110000 100000\n", min(here, 2)),
        ("6400000 100000\n", here),
        ("", here),
    ):
        (tmp_path / "cpu.max").write_text(text)
        assert jedi.usable_cores(tmp_path / "cpu.max") == cores, text
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS, Windows
    assert jedi.usable_cores(tmp_path / "missing") == os.cpu_count()
    monkeypatch.setattr(jedi, "usable_cores", lambda: 1)
    for threads, hint in ((1, False), (3, True)):
        assert jedi.main(["--dry-run", *command_line(MICRO | dict(threads=threads))]) == 0
        assert (f"{threads} on 1 cores: too many, slow" in capsys.readouterr().out) == hint
    assert jedi.main(["--dry-run", *command_line(MICRO | dict(threads=0))]) == 0
    assert torch.get_num_threads() == 1


def test_compilation_that_cannot_work_names_the_way_out(tmp_path):
    """Without a C++ compiler; a finished compilation is not taken from a cache."""
    environment = os.environ | dict(CXX="/nothing/here", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    catch = dict(env_id="examples.toys:Catch-v0", run_dir=tmp_path / "r", device="cpu")
    words = command_line(SMALL | catch)
    command = [sys.executable, jedi.__file__, *words, "--compile"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "cannot compile here, use --no-compile: " in done.stderr and "ompiler" in done.stderr


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
        (RuntimeError("a fault of ours"), None),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "out of memory",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (MemoryError(), "out of memory"),
    ],
)
def test_only_want_of_memory_is_called_so(error, says, capsys, monkeypatch):
    def train(_):
        raise error

    monkeypatch.setattr(jedi, "train", train)
    if says is None:
        with pytest.raises(RuntimeError, match=str(error)):
            jedi.main([])
    else:
        assert jedi.main([]) == 1 and says in capsys.readouterr().err

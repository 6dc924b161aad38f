"""The command line: help, dry run, and what is refused in one line before anything is written."""

import dataclasses
import json

import pytest
import torch
from conftest import MICRO

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


def test_help_names_every_argument_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        jedi.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code in (0, None)
    for field in dataclasses.fields(jedi.Args):
        assert (
            jedi.flag(field.name) in text or jedi.flag(field.name).replace("--", "--no-", 1) in text
        )
    assert text.count("(default:") >= len(dataclasses.fields(jedi.Args))


def test_help_shows_the_presets_numbers(capsys):
    with pytest.raises(SystemExit):
        jedi.main(["--preset", "tiny", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"(default: {jedi.PRESETS['tiny']['denoiser_width']})" in text


def test_dry_run_prints_the_plan_and_writes_nothing(capsys, empty_folder):
    flags = [x for name, value in MICRO.items() for x in (jedi.flag(name), str(value))]
    status, out, err = run(["--dry-run", *flags], capsys)
    assert status == 0 and err == "" and not list(empty_folder.iterdir())
    for word in (
        "parameters",
        "encoder",
        "total",
        "epochs",
        "env steps",
        "diffusion updates",
        "replay",
        "whole run",
    ):
        assert word in out
    plan = jedi.make_plan(jedi.Args(**MICRO), MICRO["first_steps_min"])
    assert (
        f"{plan.diffusion:,} x" in out
        and f"{130 * jedi.ReplayBuffer.RECORD.itemsize:,} bytes" in out
    )


BAD = [
    # games
    ("--env-id Pnog", "did you mean Pong"),
    ("--env-id pong", "did you mean Pong"),
    ("--env-id ", "unknown game"),
    ("--env-id Pong/../../etc", "unknown game"),
    ("--env-id ALE/Nothing-v5", "unknown game"),
    (
        "--env-id no_module:Game-v0",
        "module 'no_module' cannot be imported (ModuleNotFoundError: No module named",
    ),
    ("--env-id toys:Game-v0", "unknown game"),
    ("--env-id Pong\x00", "unknown game"),
    ("--env-id P\N{LATIN SMALL LETTER O WITH DIAERESIS}ng", "did you mean Pong"),
    ("--env-id CartPole-v1", "RGB frames"),
    ("--env-id Pendulum-v1", "RGB frames"),
    # what cannot be read
    ("--preset huge", "paper, tiny"),
    ("--preset", "expected one argument"),
    ("--preset TINY", "paper, tiny"),
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
    ("--keep-replay 7", "7"),
    # out of range
    ("--seed -1", "--seed is -1"),
    ("--seed 99999999999", "at most 2,147,483,647"),
    ("--batch-size 0", "--batch-size is 0"),
    ("--batch-size -4", "--batch-size is -4"),
    ("--batch-size 1000000", "at most 4,096"),
    ("--learning-rate nan", "above 0 and at most 1"),
    ("--learning-rate inf", "above 0 and at most 1"),
    ("--learning-rate 0", "above 0"),
    ("--learning-rate -0.1", "above 0"),
    ("--gamma 1.5", "at least 0 and at most 1"),
    ("--td-lambda -0.1", "at least 0 and at most 1"),
    ("--epsilon 2", "at least 0 and at most 1"),
    ("--weight-decay nan", "--weight-decay is nan"),
    ("--noise-mean -inf", "--noise-mean"),
    ("--horizon 0", "--horizon is 0"),
    ("--horizon 99999", "at most 1,000"),
    ("--sample-steps 0", "--sample-steps is 0"),
    ("--s-churn -1", "--s-churn is -1"),
    ("--context-frames 0", "--context-frames is 0"),
    ("--target-frames 0", "--target-frames is 0"),
    ("--frame-skip 0", "--frame-skip is 0"),
    ("--noop-max -1", "--noop-max is -1"),
    ("--eval-episodes 0", "--eval-episodes is 0"),
    ("--final-episodes 0", "--final-episodes is 0"),
    ("--eval-envs 0", "--eval-envs is 0"),
    ("--checkpoint-every 0", "--checkpoint-every is 0"),
    ("--temperature 0", "--temperature is 0"),
    ("--threads -1", "--threads is -1"),
    ("--first-steps-min 1", "at least 2"),
    ("--total-steps 1000000000000", "--total-steps is 1000000000000"),
    ("--total-steps 900000000", "GiB for the replay"),
    ("--lstm-size 1000000", "--lstm-size is 1000000"),
    ("--denoiser-width 0", "--denoiser-width is 0"),
    # contradictions
    ("--noise-min 30", "--noise-max"),
    ("--sample-sigma-min 9", "--sample-sigma-max"),
    ("--first-steps-min 20000", "--first-steps-max"),
    ("--total-steps 100", "--total-steps"),
    ("--denoiser-width 100", "multiple of 3"),
    ("--denoiser-width 17", "multiple of its 2 heads"),
    ("--cond-dim 33", "--cond-dim"),
    ("--resume", "--run-dir"),
    ("--resume --dry-run --run-dir x", "do not go together"),
    ("--eval-only x --dry-run", "do not go together"),
    # devices
    ("--device gpu", "auto, cpu, cuda"),
    ("--device cuda:99", "CUDA devices"),
    ("--device cuda:-1", "auto, cpu, cuda"),
    ("--precision fp16", "--precision"),
    ("--latent-norm batch", "--latent-norm"),
    # folders
    ("--resume --run-dir nowhere", "no checkpoint.pt"),
    ("--eval-only nowhere", "no readable args.json"),
    ("--eval-only /proc/self/mem", "no readable args.json"),
    ("--run-dir /proc/nothing/run", "cannot write"),
    ("--run-dir /dev/null/run", "cannot write"),
    ("--run-dir " + "x" * 300, "cannot write"),
]


def test_every_number_has_a_range():
    ranged = [name for _, _, names in jedi.RANGES for name in names.split()]
    numbers = [
        f.name for f in dataclasses.fields(jedi.Args) if f.type in ("int", "float", int, float)
    ]
    assert sorted(ranged) == sorted(numbers) and len(BAD) >= 60


@pytest.mark.parametrize(("argv", "says"), BAD)
def test_bad_input_is_one_line_and_leaves_nothing_behind(argv, says, capsys, empty_folder):
    status, out, err = run(["--preset", "tiny", *argv.split(" ")], capsys)
    assert status == 2 and out == "", err
    assert err.count("\n") == 1 and err.startswith("jedi_atari.py: error: ") and says in err
    assert not list(empty_folder.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_cuda(capsys, empty_folder):
    status, _, err = run(["--device", "cuda"], capsys)
    assert (
        status == 2
        and "--device cuda" in err
        and err.count("\n") == 1
        and not list(empty_folder.iterdir())
    )


def test_bf16_where_it_is_not_supported(capsys, monkeypatch, empty_folder):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    status, _, err = run(["--device", "cpu", "--precision", "bf16"], capsys)
    assert (
        status == 2
        and "--precision fp32" in err
        and err.count("\n") == 1
        and not list(empty_folder.iterdir())
    )
    assert jedi.choose_bf16("auto", torch.device("cpu")) is False


def make_run(folder, **changes):
    folder.mkdir()
    args = jedi.Args(**{**MICRO, **changes})
    jedi.write_json(folder / "args.json", dataclasses.asdict(args))
    jedi.save_checkpoint(folder, {"script": "jedi_atari", "epoch": 1})
    return folder


def test_a_folder_with_a_run_is_not_overwritten(capsys, empty_folder):
    folder = make_run(empty_folder / "old")
    before = {p: p.read_bytes() for p in folder.iterdir()}
    status, _, err = run(["--preset", "tiny", "--run-dir", str(folder)], capsys)
    assert (
        status == 2
        and "--resume" in err
        and {p: p.read_bytes() for p in folder.iterdir()} == before
    )


def test_resume_with_other_arguments_names_them(capsys, empty_folder):
    folder = make_run(empty_folder / "old", seed=3)
    status, _, err = run(
        ["--resume", "--run-dir", str(folder), "--seed", "4", "--gamma", "0.5"], capsys
    )
    assert (
        status == 2
        and "--seed (was 3, now 4)" in err
        and "--gamma" in err
        and "--horizon" not in err
    )


def test_resume_of_a_finished_run_leaves_its_result(capsys, empty_folder):
    folder = make_run(empty_folder / "old")
    (folder / "result.json").write_text("{}")
    status, _, err = run(["--resume", "--run-dir", str(folder)], capsys)
    assert status == 2 and "is finished" in err and (folder / "result.json").read_text() == "{}"


def test_resume_takes_the_runs_own_arguments(empty_folder):
    folder = make_run(empty_folder / "old", seed=3)
    args = jedi.parse_args(["--resume", "--run-dir", str(folder)])
    assert args.seed == 3 and args.horizon == MICRO["horizon"] and args.resume


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(100)])
def test_a_broken_checkpoint_is_named(capsys, empty_folder, content):
    folder = make_run(empty_folder / "old")
    (folder / "checkpoint.prev.pt").write_bytes((folder / "checkpoint.pt").read_bytes())
    (folder / "checkpoint.pt").write_bytes(content)
    with pytest.raises(
        jedi.BadInput, match=r"checkpoint\.pt was cut short.*mv .*checkpoint\.prev\.pt"
    ):
        jedi.load_checkpoint(folder, torch.device("cpu"))


class Code:
    """Something that would run when unpickled."""

    def __reduce__(self):
        return (open, ("executed", "w"))


def test_a_checkpoint_with_code_in_it_is_refused(empty_folder):
    folder = make_run(empty_folder / "old")
    jedi.save_checkpoint(folder, {"epoch": Code()})
    with pytest.raises(jedi.BadInput, match="more than plain data"):
        jedi.load_checkpoint(folder, torch.device("cpu"))
    assert not (empty_folder / "executed").exists()


def test_an_args_file_of_another_version(empty_folder):
    folder = make_run(empty_folder / "old")
    (folder / "args.json").write_text(json.dumps({"learning_rates": 3}))
    with pytest.raises(jedi.BadInput, match="another version"):
        jedi.load_args(folder)


def test_two_processes_on_one_folder(capsys, empty_folder):
    args = jedi.Args(**{**MICRO, "run_dir": str(empty_folder / "r")})
    run_dir, lock = jedi.prepare_run_dir(args, "Pong")
    with lock, pytest.raises(jedi.BadInput, match="another process"):
        jedi.prepare_run_dir(args, "Pong")
    jedi.prepare_run_dir(args, "Pong")[1].close()

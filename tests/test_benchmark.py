"""benchmark.sh: the pool, and job arrays on a real SLURM that the tests bring up for themselves.

Most tests give it a stub in place of jedi_atari.py, which does in a moment what its environment tells it: what is
tested is how runs are started, stopped and accounted for. The last two train, and compare with plain runs.
"""

import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, command_line
from test_environment import ACTIONS

import jedi_atari as jedi

SLURM, JEDI = ROOT / "tests/slurm", str(ROOT / "jedi_atari.py")
# A whole run, with all its parts, in less than the time that importing PyTorch takes.
SHORT = dict(total_steps=60, first_steps_min=40, first_steps_max=40, final_epochs=0)
SHORT |= dict(first_diffusion_updates=2, first_reward_updates=1, first_policy_updates=1)
REAL = (
    f"--preset tiny -- {shlex.join(command_line(SMALL | SHORT)[2:])} --precision fp32 --device cpu"
)
STUB = """
import json, os, signal, sys, time
from pathlib import Path

if "--dry-run" in sys.argv:
    sys.exit("a reason" if "--bad" in sys.argv else 0)
value = dict(zip(sys.argv, sys.argv[1:])).get
folder, game, seed = Path(value("--run-dir")), value("--env-id"), int(value("--seed"))
# What to do: STUB is a list such as Pong/seed0=crash, the rest finishes.
does = dict(x.split("=") for x in os.environ.get("STUB", "").split()).get(f"{game}/seed{seed}", "")
again, begun, device = (folder / "args.json").exists(), time.time(), os.environ["CUDA_VISIBLE_DEVICES"]
(folder / "args.json").touch()
print(f"on {device}, threads {value('--threads')}\\nepoch 1/3601, 70 steps", flush=True)
if does == "crash" or does == "once" and not again:
    sys.exit("the reason of the crash")
if does == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600 if does == "hold" and not again else float(os.environ.get("SECONDS_EACH", 0)) * (1 + seed % 2))
result = dict(env_id=game, seed=seed, returns=[7.0, 8.0], mean_return=7.5, wall_seconds=7200)
(folder / "span.json").write_text(json.dumps([device, begun, time.time()]))
if does != "nothing":
    (folder / "result.json").write_text(json.dumps(result))
"""
# jedi_atari.py, but with a checkpoint after every epoch, and waiting after each but epoch 0 for a file `gate`.
HELD = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
if "--dry-run" in sys.argv:
    sys.exit()  # asked in other tests
import jedi_atari as jedi

def save_and_wait(run_dir, content, save=jedi.save_checkpoint):
    save(run_dir, content)
    if content["epoch"]:
        (run_dir / "held").touch()
    while content["epoch"] and not os.path.exists("gate"):
        time.sleep(0.02)

jedi.save_checkpoint, jedi.CHECKPOINT_SECONDS = save_and_wait, 0
sys.exit(jedi.main())
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder of an odd name, with the scripts beside it; no GPU unless a test says so."""
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "held.py").write_text(HELD)
    (here := tmp_path / "a b%A 'c").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHON", sys.executable)
    return here


def begin(arguments: str, script: str = "../stub.py", **env: str) -> subprocess.Popen:
    """In a session of its own, as in a terminal, where Ctrl-C reaches the whole process group."""
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, text=True)
    command = [str(ROOT / "benchmark.sh"), "--script", script, *arguments.split()]
    return subprocess.Popen(command, env={**os.environ, **env}, **how)


def finish(runner: subprocess.Popen) -> tuple[int, str]:
    said = runner.communicate(timeout=170)[0]
    return runner.returncode, said


def call(arguments: str, script: str = "../stub.py", **env: str) -> tuple[int, str]:
    """The exit status, and what it said."""
    return finish(begin(arguments, script, **env))


def wait_until(condition, what: str, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def log(run: str) -> str:
    path = Path("o", run, "log.txt")
    return path.read_text() if path.exists() else ""


def begun(*runs: str) -> list[int]:
    """How often each of these runs was begun."""
    return [len(re.findall("=== benchmark.sh: .* begun on", log(run))) for run in runs]


@pytest.mark.parametrize("script", ["jedi_atari.py", "jedi_atari_stochastic.py"])
def test_dry_run_prints_130_commands_that_the_script_accepts(script, here):
    status, said = call("--dry-run -- --batch-size 64", str(ROOT / script))
    assert status == 0 and not list(here.iterdir())
    assert said.endswith("\n130 of 130 runs to do, run-hours: not measured\n")
    commands = [shlex.split(line) for line in said.splitlines() if "--env-id" in line]
    after = [dict(zip(words, words[1:], strict=False)) for words in commands]
    pairs = sorted((value["--env-id"], int(value["--seed"])) for value in after)
    assert pairs == sorted((game, seed) for game in ACTIONS for seed in range(5))
    # What else they say is the same, so that it is enough to have the script read one.
    own = {"--env-id", "--seed", "--run-dir"}
    each = [zip(words, words[1:], strict=False) for words in commands]
    assert len({tuple(word for flag, word in one if flag not in own) for one in each}) == 1
    args = __import__(Path(script).stem).parse_args(commands[-1][2:])
    assert (args.preset, args.batch_size, args.resume) == ("paper", 64, True)
    assert args.threads == jedi.usable_cores()


def test_hours_are_those_of_finished_runs_or_measured_on_this_card(here, monkeypatch):
    assert call("--games Pong --seeds 0-1 --out o")[0] == 0
    said = call("--dry-run --games Pong --out o")[1]
    assert "3 of 5 runs to do, run-hours: 6.0 (2.0 a run, from the finished runs)" in said
    said = call("--dry-run --games Pong --out o --runs-per-gpu 2", CUDA_VISIBLE_DEVICES="0")[1]
    assert "GPU-hours: 3.0 (2.0 a run" in said
    (here / "nvidia-smi").write_text('#!/bin/sh\nprintf "$CARD\\n0\\n1\\nWARNING: a, b\\n"\n')
    (here / "nvidia-smi").chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    env = dict(PATH=f"{here}:{os.environ['PATH']}")
    assert call("--games Pong --seeds 7-9 --out o", CARD="", **env)[0] == 0
    assert [log(f"Pong/seed{k}").count(f"GPU {k % 7}: ") for k in (7, 8)] == [1, 1]
    lines = (ROOT / "results/speed.jsonl").read_text().splitlines()
    (hours,) = (x["projected_hours"] for x in map(json.loads, lines) if "H100" in x["device"])
    (script := here.parent / "jedi_atari.py").write_text(STUB)
    said = call("--dry-run", str(script), CARD="NVIDIA H100 80GB HBM3", **env)[1]
    assert f"GPU-hours: {130 * hours:.1f} ({hours:.1f} a run, from speed.jsonl" in said
    assert "GPU-hours: not measured" in call("--dry-run", str(script), CARD="another", **env)[1]


BAD = [
    ("--games pong", "unknown game 'pong'; known games: Alien Amidar"),
    ("--games Pong,,Krull", "unknown game ''"),
    ("--games", "--games: expected one argument"),
    ("--seeds 3-1", "0-4 or 0,1,7, at most 1000 seeds, not '3-1'"),
    ("--seeds 0-5000", "at most 1000 seeds"),
    ("--batch-size 64", "--batch-size 64; see --help. Arguments of the script go after --"),
    ("--jobs 0", "--jobs must be a whole number from 1"),
    ("--runs-per-gpu 2", "no GPU found; use --jobs"),
    ("--slurm-arg=--qos=high", "go with --slurm"),
    ("--script nowhere.py", "nowhere.py rejects this, see above"),
    ("-- --bad", "stub.py rejects this, see above; if a module is missing, set PYTHON"),
    ("-- --run_dir=x", "--run_dir=x may not follow --"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD)
def test_bad_input_is_named_and_nothing_is_written(arguments, says, here):
    status, said = call(arguments)
    assert status == 2 and says in said.splitlines()[-1] and not list(here.iterdir()), said
    assert said.splitlines()[-1].startswith("benchmark.sh: error: ") and "Traceback" not in said


def test_what_cannot_work_is_named(here):
    assert "--batch-size INT" in call("--preset tiny -- --batch-sise 3", JEDI)[1]
    assert "nowhere is not Python 3.11" in call("--games Pong", PYTHON="nowhere")[1]
    status, said = call("--games Pong --out /dev/null/x")
    assert status == 1 and said.count("\n") == 1 and "'/dev/null/x'" in said
    assert call("--games Pong --seeds 0 --out o")[0] == 0
    status, said = call("--games Pong --seeds 1 --out o --preset tiny")
    assert status == 2 and "--out has runs of 'stub.py --preset paper', not of" in said


def test_failed_runs_are_tried_once_again_and_listed(here):
    arguments = "--games Pong,Krull --seeds 0-2 --jobs 3 --out o"
    runs = [f"{game}/seed{k}" for game in ("Pong", "Krull") for k in range(3)]
    what = "Pong/seed0=once Krull/seed0=crash Krull/seed1=kill Krull/seed2=nothing"
    status, said = call(arguments, STUB=what)
    assert status == 1 and begun(*runs) == [2, 1, 1, 2, 2, 2]
    log_of = r"Krull/seed0 failed: status 1, the reason of the crash; \S.+/log.txt ends:\n    on "
    assert re.search(log_of + r".*\n.*\n    the reason of the crash\n", said), said
    assert "Krull/seed1 failed: killed by signal 9" in said
    assert "Krull/seed2 failed: status 0, no result" in said
    lines = [line.split() for line in call(f"--status {arguments}")[1].splitlines()]
    assert lines[0] == "Pong 3 done 0 running 0 failed 0 waiting return 7.5".split()
    assert lines[1] == "Krull 0 done 0 running 3 failed 0 waiting".split()
    assert call(arguments)[0] == 0 and begun(*runs) == [2, 1, 1, 3, 3, 3]
    assert log("Krull/seed0").count("threads None") == 2  # it goes on with those it was begun with


def test_a_slot_takes_the_next_run_as_soon_as_it_is_free(here):
    arguments = "--games Pong,Krull,Qbert,Hero --seeds 0-2 --out o --runs-per-gpu 2"
    status, said = call(arguments, CUDA_VISIBLE_DEVICES="3,GPU-x", SECONDS_EACH="0.5")
    spans = [json.loads(path.read_text()) for path in Path("o").glob("*/*/span.json")]
    assert status == 0 and len(spans) == 12, said
    for device in ("3", "GPU-x"):
        mine = sorted(span[1:] for span in spans if span[0] == device)  # begun, ended
        together = [sum(a[0] <= b[0] < a[1] for a in mine) for b in mine]
        assert len(mine) >= 4 and max(together) == 2  # as many as asked for, not one more
        # The third run begins when the first of this GPU has ended, the fourth after the second, ...
        ends = sorted(ended for _, ended in mine)
        waits = [begun - end for (begun, _), end in zip(mine[2:], ends, strict=False)]
        assert all(0 <= wait < 1.5 for wait in waits), waits
    assert call("--games Pong --seeds 7 --out o --jobs 2", CUDA_VISIBLE_DEVICES="3")[0] == 0
    assert f"on , threads {max(1, jedi.usable_cores() // 2)}" in log("Pong/seed7")


AT_ONCE = [(signal.SIGINT, seconds) for seconds in (0.1, 0.2, 0.4)]  # after the start
BEGUN = [(number, None) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


@pytest.mark.parametrize(("number", "seconds"), AT_ONCE + BEGUN)
def test_a_signal_at_any_moment_stops_the_runs_and_the_same_call_resumes(number, seconds, here):
    arguments = "--games Pong --seeds 0-2 --jobs 2 --out o"
    runner = begin(arguments, STUB="Pong/seed0=hold Pong/seed1=hold")
    if seconds:
        time.sleep(seconds)
    else:
        wait_until(lambda: all("epoch" in log(f"Pong/seed{k}") for k in (0, 1)), "the runs")
    os.killpg(runner.pid, number)
    status, said = finish(runner)
    assert status in (128 + number, -number)  # the second where Python had not yet started
    if not seconds:
        assert status > 0 and f"stopped by {number.name}; repeat the same call" in said
    said = call(f"--status {arguments}")[1]
    assert said.endswith("3 runs: 0 done, 0 running, 0 failed, 3 waiting\n")
    assert call(arguments)[0] == 0


def test_two_runners_on_one_folder_never_start_the_same_run(here):
    arguments = "--games Pong,Krull,Hero,Qbert --seeds 0-1 --jobs 2 --out o"
    said = [
        finish(runner)[1] for runner in [begin(arguments, SECONDS_EACH="0.5") for _ in range(2)]
    ]
    assert min(text.count(" begun on ") for text in said) > 0  # both had a part in it
    assert (
        begun(*(str(path.parent)[2:] for path in Path("o").glob("*/*/result.json"))) == [1] * 8
    ), said


def test_of_two_settings_at_once_one_is_refused(here):
    calls = [begin(f"--games Pong --seeds 0-3 --out o -- {word}") for word in ("--a", "--b")]
    assert sorted(finish(runner)[0] for runner in calls) == [0, 2]


def test_a_folder_that_is_gone_or_no_folder_costs_no_other_run(here):
    Path("o/Pong").mkdir(parents=True)
    Path("o/Pong/seed1").touch()
    runner = begin("--games Pong --seeds 0-3 --jobs 2 --out o", SECONDS_EACH="0.5")
    wait_until(lambda: "epoch" in log("Pong/seed0"), "the run")
    subprocess.run(["rm", "-r", "o/Pong/seed0"], check=True)
    status, said = finish(runner)
    assert status == 1 and said.count("a run is left out: ") == 2 and "4 runs: 2 done" in said


def test_runs_of_a_killed_runner_are_left_alone(here):
    arguments = "--games Pong --seeds 0-1 --out o"
    runner = begin(arguments, STUB="Pong/seed0=hold")
    wait_until(lambda: "epoch" in log("Pong/seed0"), "the run")
    runner.kill()
    line = r"1 running .* seed0 epoch 1/3601, \d+\.\d h left"
    assert re.search(line, call(f"--status {arguments}")[1])
    status, said = call(arguments)
    assert status == 1 and "Pong/seed0 is being run by another process" in said
    assert "2 runs: 1 done, 1 running" in said and begun("Pong/seed0") == [1]
    subprocess.run(["pkill", "-KILL", "-f", f"{here}/o/Pong/seed0"], check=True)
    wait_until(lambda: "1 waiting" in call(f"--status {arguments}")[1], "its end")
    assert call(arguments)[0] == 0


CUT = ("(?s)(.{20}).*", r"\1")  # half-written


@pytest.mark.parametrize(("old", "new"), [CUT, ("7.5", "NaN"), ("7.0, 8.0", ""), ("0,", "1,")])
def test_a_spoilt_result_is_unfinished_and_named(old, new, here):
    arguments, path = "--games Pong --seeds 0 --out o", Path("o/Pong/seed0/result.json")
    assert call(arguments)[0] == 0
    path.write_text(spoilt := re.sub(old, new, path.read_text(), count=1))
    wrong = "seed0 result.json is incomplete, invalid or of another run"
    assert wrong in call(f"--status {arguments}")[1] and path.read_text() == spoilt
    status, said = call(arguments)
    assert status == 0 and "the run is carried on" in said and "7.5" in path.read_text()
    assert path.with_name("result.json.broken").read_text() == spoilt


@pytest.fixture
def cluster(here, monkeypatch):
    """A real SLURM of two nodes with a fake GPU each, made for the test; the folder that holds it."""
    root = f"/tmp/slurm-{os.getpid()}"  # short, for a socket's path
    up = subprocess.run([SLURM / "up.sh", root], capture_output=True, text=True)
    if up.returncode == 77 and not os.environ.get("SLURM_REQUIRED"):
        pytest.skip(up.stderr.splitlines()[-1])
    assert up.returncode == 0, up.stderr
    monkeypatch.setenv("SLURM_CONF", f"{root}/slurm.conf")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")  # it is SLURM's to give
    yield root
    subprocess.run([SLURM / "down.sh", root], check=True)  # cancels all jobs


def ask(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def queue() -> dict[str, str]:
    """Tasks that SLURM knows of, and their states."""
    lines = ask("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
    return dict(line.split() for line in lines)


def submit(arguments: str, script: str = "../stub.py", **env: str) -> str:
    said = call(f"--slurm {arguments}", script, **env)[1]
    return re.search(r"Submitted batch job (\d+)", said)[1]


def tasks() -> str:
    """The runs of each task of the last array."""
    return max(Path("o/slurm").glob("*.runs")).read_text()


def test_slurm_packs_runs_and_collects_each_exit_status(cluster, here):
    arguments = "--games Pong,Krull,Qbert --seeds 0-1 --out o"
    what = "Krull/seed0=crash Qbert/seed0=kill"
    job = submit(f"--runs-per-gpu 2 {arguments}", STUB=what, SECONDS_EACH="0.5")
    assert "nothing submitted (to end these: scancel --name=" in call(f"--slurm {arguments}")[1]
    wait_until(lambda: not queue(), "the end of the array")
    jobs = [ask("scontrol", "show", "job", f"{job}_{k}") for k in range(3)]
    codes = [re.search(r"ExitCode=(\S+)", text)[1] for text in jobs]
    assert codes == ["1:0", "1:0", "0:0"]  # Pong 0, Krull 0; Qbert 0, Pong 1; Krull 1, Qbert 1
    assert "6 runs: 4 done, 0 running, 2 failed" in call(f"--status {arguments}")[1]
    assert "GPU 0: " in log("Pong/seed0") and "--device cuda" in log("Pong/seed0")
    submit(f"--jobs 1 {arguments}")  # what is missing and nothing else; now a task each, on CPUs
    assert tasks() == "Krull/seed0\nQbert/seed0\n"
    wait_until(lambda: not queue(), "the end of the second array")
    assert call(f"--slurm {arguments}")[0] == 0 and ", CPU:" in log("Krull/seed0")
    status, said = call("--slurm --games Hero --out o --slurm-arg=--partition=nowhere")
    assert status == 1 and "invalid partition" in said.lower()
    (here / "squeue").write_text("#!/bin/sh\necho no answer >&2\nexit 1\n")
    (here / "squeue").chmod(0o755)
    status, said = call("--slurm --games Hero --out o", PATH=f"{here}:{os.environ['PATH']}")
    assert status == 1 and said.endswith("squeue says:\nno answer\n")


def outcome(folder: Path) -> tuple:
    """What of a run must depend neither on who started it nor on how often it was stopped."""
    result = json.loads((folder / "result.json").read_text())
    weights = torch.load(folder / "checkpoint.pt", weights_only=True)["agent"].values()
    return result["returns"], result["updates"], [tensor.numpy().tobytes() for tensor in weights]


@functools.cache
def plain(run: str) -> tuple:
    """What a run of jedi_atari.py comes to that nobody disturbs and that benchmark.sh has no part in."""
    folder = tempfile.mkdtemp()
    words = f"--seed 0 --env-id {run.split('/')[0]} {REAL.replace('-- ', '')} --run-dir {folder}"
    assert jedi.main(words.split()) == 0
    return outcome(Path(folder))


def held(*runs: str):
    return lambda: all(Path("o", run, "held").exists() for run in runs)


def test_a_run_of_an_interrupted_pool_comes_to_what_a_plain_run_comes_to(here):
    arguments, run = f"--games Pong --seeds 0 --out o {REAL}", "Pong/seed0"
    runner = begin(arguments, "../held.py")
    wait_until(held(run), "the middle of the run")
    os.killpg(runner.pid, signal.SIGINT)
    assert finish(runner)[0] == 130
    Path("gate").touch()
    assert call(arguments, "../held.py")[0] == 0
    assert "resumed after epoch 1" in log(run) and outcome(Path("o", run)) == plain(run)


@pytest.mark.slow
def test_slurm_requeued_and_cancelled_runs_come_to_what_plain_runs_come_to(cluster):
    runs = *crashed, cancelled = "Pong/seed0", "Krull/seed0", "Hero/seed0"
    arguments = f"--games Pong,Krull,Hero --seeds 0 --out o --runs-per-gpu 2 {REAL}"
    job = submit(arguments, "../held.py")
    wait_until(held(*runs), "the middle of the runs")
    # The node of the first task breaks down: its runs die without a warning, and SLURM queues it again.
    node = ask("squeue", "--noheader", f"--jobs={job}_0", "--format=%N").strip()
    subprocess.run([SLURM / "down.sh", cluster, "node", node], check=True)
    ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=crash")  # noticed sooner
    wait_until(lambda: "1 running" in call(f"--status {arguments}")[1][-60:], "the end of its runs")
    subprocess.run([SLURM / "up.sh", cluster, "node", node], check=True)
    # The second task is cancelled: its run stops, and nobody queues it again.
    ask("scancel", f"{job}_1")
    wait_until(lambda: f"{job}_1" not in queue(), "the end of the cancelled task")
    # The requeued task comes near its time limit: SLURM warns it, and it asks to be queued again.
    for run in crashed:
        Path("o", run, "held").unlink()
    wait_until(held(*crashed), "the requeued task")
    ask("scancel", "--signal=USR1", "--batch", f"{job}_0")
    wait_until(lambda: queue().get(f"{job}_0") != "RUNNING", "the task to stop")
    assert f"{job}_0" in queue() and not Path("o", crashed[0], "result.json").exists()
    Path("gate").touch()
    wait_until(lambda: not queue(), "the end of the array", 120)
    # The same call submits what is missing and nothing else.
    submit(arguments, "../held.py")
    assert tasks() == f"{cancelled}\n"
    wait_until(lambda: not queue(), "the end of the second array", 120)
    assert begun(*runs) == [3, 3, 2]
    assert [outcome(Path("o", run)) for run in runs] == [plain(run) for run in runs]

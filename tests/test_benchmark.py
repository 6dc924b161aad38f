"""benchmark.sh: a pool on this machine, and job arrays on a real SLURM that the test brings up for itself.

Most tests give it a stub in place of jedi_atari.py, which does in a moment what its environment tells it: what is
tested is how runs are started, stopped and accounted for. The tests at the end train, and compare with plain runs.
"""

import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import MICRO, ROOT, command_line
from test_environment import ACTIONS

import jedi_atari as jedi

BENCHMARK, TESTS = ROOT / "benchmark.sh", ROOT / "tests"
# A whole run, with all its parts, in less than the time that importing PyTorch takes.
SMALL = {**MICRO, "total_steps": 60, "first_steps_min": 40, "first_steps_max": 40, "final_episodes": 1,
         "max_episode_steps": 20, "precision": "fp32"}  # fmt: skip
FLAGS = command_line({n: value for n, value in SMALL.items() if n not in ("preset", "threads")})

STUB = """
import json, os, signal, sys, time
from pathlib import Path

def main():
    value = dict(zip(sys.argv, sys.argv[1:])).get
    folder, game, seed = Path(value("--run-dir")), value("--env-id"), int(value("--seed"))
    # What to do: STUB is a list such as Pong/seed0=crash, the rest finishes.
    does = dict(x.split("=") for x in os.environ.get("STUB", "").split()).get(f"{game}/seed{seed}", "finish")
    resumed = (folder / "checkpoint.pt").exists()
    (folder / "args.json").touch()
    begun = time.time()
    print("ready", os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"], flush=True)
    if does == "crash":
        print("line one\\nthe reason of the crash", flush=True)
        sys.exit(3)
    if does == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if does == "nothing":
        return
    if does == "slow":
        print("epoch 1/100000, 70 steps", flush=True)
        os.environ["SECONDS_EACH"] = "6"
    waits = does == "hold" and not resumed
    if waits:
        (folder / "checkpoint.pt").touch()
    end = time.time() + (600 if waits else float(os.environ.get("SECONDS_EACH", 0)))
    while time.time() < end:
        time.sleep(0.02)
    result = dict(env_id=game, seed=seed, returns=[7.0, 8.0], mean_return=7.5, wall_seconds=7200)
    (folder / "result.json").write_text(json.dumps(result))
    span = dict(begun=begun, ended=time.time(), device=os.environ["CUDA_VISIBLE_DEVICES"])
    (folder / "span.json").write_text(json.dumps(span))

if __name__ == "__main__":
    main()
"""

# jedi_atari.py as it is, except that it writes a checkpoint after every epoch, and waits after its first one past epoch 0
# until it is killed or the file GATE is there. (Imported, it imports nothing: benchmark.sh does so to check arguments.)
HELD = f"""
import os, sys, time
from pathlib import Path

def main():
    sys.path.insert(0, {str(ROOT)!r})
    import jedi_atari as jedi
    save = jedi.save_checkpoint

    def save_and_wait(run_dir, content):
        save(run_dir, content)
        if content["epoch"]:
            (run_dir / "held").touch()
            while not Path(os.environ["GATE"]).exists():
                time.sleep(0.02)
            jedi.save_checkpoint = save

    jedi.save_checkpoint, jedi.CHECKPOINT_SECONDS = save_and_wait, 0
    return jedi.main()

if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to be in, and a stub beside it; the machine has no GPU unless a test says so."""
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    yield tmp_path / "here"
    for pool in [pool for pool in POOLS if pool.poll() is None]:  # of a test that failed
        pool.send_signal(signal.SIGINT)
        pool.communicate(timeout=30)


def command(*arguments: str, script: str = "../stub.py") -> list[str]:
    own, *extra = " ".join(arguments).partition(" -- ")
    return [
        str(BENCHMARK),
        "--script",
        script,
        "--python",
        sys.executable,
        *shlex.split(own),
        *shlex.split("".join(extra)),
    ]


def benchmark(
    *arguments: str, script: str = "../stub.py", **env: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments, script=script),
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=170,
    )


POOLS = []


def begin(*arguments: str, script: str = "../stub.py", **env: str) -> subprocess.Popen:
    """A pool in a session of its own, as in a terminal, where Ctrl-C reaches the process group in the foreground."""
    pool = subprocess.Popen(
        command(*arguments, script=script),
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    POOLS.append(pool)
    return pool


def wait_until(condition, what: str, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def ready(out: Path, *runs: str, times: int = 1):
    """Have these runs begun?"""
    return lambda: all(
        (out / r / "log.txt").exists() and log(out, r).count("ready") == times for r in runs
    )


def log(out: Path, run: str) -> str:
    return (out / run / "log.txt").read_text()


def attempts(out: Path, run: str) -> int:
    return log(out, run).count("===")


def table(*arguments: str, script: str = "../stub.py") -> dict[str, list[str]]:
    """The table of --status: the words of each run's line after game and seed."""
    lines = [
        line.split()
        for line in benchmark("--status", *arguments, script=script).stdout.splitlines()
    ]
    return {f"{x[0]}/seed{x[1]}": x[2:] for x in lines if len(x) > 2 and x[0] in ACTIONS}


def pid_of(out: Path, run: str) -> int:
    return int((out / run / "state.txt").read_text().split()[2])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- what it prints without running anything


@pytest.mark.parametrize("script", ["jedi_atari.py", "jedi_atari_stochastic.py"])
def test_dry_run_prints_130_commands_that_the_script_accepts(script, here):
    done = benchmark("--dry-run -- --batch-size 64", script=script)
    assert (done.returncode, done.stderr) == (0, "") and not list(here.iterdir())
    commands = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("env ")]
    module = __import__(Path(script).stem)
    parsed = [module.parse_args(c[c.index(str(ROOT / script)) + 1 :]) for c in commands[::43]]
    assert [(a.preset, a.batch_size, a.resume, a.threads >= 1) for a in parsed] == [
        ("paper", 64, True, True)
    ] * 4
    pairs = {(c[c.index("--env-id") + 1], int(c[c.index("--seed") + 1])) for c in commands}
    assert pairs == {(game, seed) for game in ACTIONS for seed in range(5)}
    assert len(commands) == 130
    assert "GPU-hours: not measured" in done.stdout and "130 of 130 runs to do" in done.stdout


def test_dry_run_estimates_from_an_option_or_from_finished_runs(here):
    assert (
        "\nrun-hours: 390.0 (130 runs of 3:00:00" in benchmark("--dry-run --hours-per-run 3").stdout
    )
    packed = benchmark(
        "--dry-run --hours-per-run 3 --runs-per-gpu 3", CUDA_VISIBLE_DEVICES="0,1"
    ).stdout
    assert "\nGPU-hours: 130.0 (" in packed and "6 at once, 3 on each of 2 GPUs" in packed
    assert benchmark("--games Pong --seeds 0-1 --out o").returncode == 0
    after = benchmark("--dry-run --games Pong --seeds 0-4 --out o").stdout
    assert (
        "# Pong/seed0: done" in after
        and "\nrun-hours: 6.0 (3 runs of 2:00:00 each, the mean" in after
    )


def test_dry_run_of_a_job_array_needs_no_slurm_and_writes_nothing(here):
    options = "--partition p --account a --time 1-00:00:00 --gpus a100:2 --runs-per-gpu 3 --slurm-arg=--qos=high"
    done = benchmark(f"--slurm --dry-run --threads 2 --max-tasks 4 {options}")
    assert done.returncode == 0 and not list(here.iterdir())
    for word in (
        "sbatch",
        "--array=0-21%4",
        "--gres=gpu:a100:2",
        "--cpus-per-task=12",
        "--requeue",
        "--qos=high",
    ):
        assert word in done.stdout
    tasks = [line.split()[2:] for line in done.stdout.splitlines() if line.startswith("task ")]
    assert [len(task) for task in tasks] == [6] * 21 + [4] and len(
        {run for task in tasks for run in task}
    ) == 130
    assert "--gres=shard:1" in benchmark("--slurm --dry-run --shards 1").stdout


BAD = [
    ("--games Pnog", "unknown game 'Pnog'; known games: Alien Amidar"),
    ("--games pong", "did you mean Pong?"),
    ("--games Pong,,Krull", "unknown game ''"),
    ("--games Pong,", "names with commas between"),
    ("--games 'Pong Krull'", "unknown game 'Pong Krull'"),
    ("--games Pong,Pong", "Pong twice"),
    ("--games", "--games needs a value"),
    ("--games --seeds 1", "--games needs a value"),
    ("--games=", "--games needs a value"),
    ("--seeds x", "0-4 or 0,1,7"),
    ("--seeds -1", "0-4 or 0,1,7"),
    ("--seeds 1.5", "0-4 or 0,1,7"),
    ("--seeds 07", "whole number"),
    ("--seeds 3-1", "ends before it begins"),
    ("--seeds 0-5000", "more than 1000"),
    ("--seeds 99999999999", "2147483647"),
    ("--seeds 1,0-2", "1 twice"),
    ("--no-such-option", "unknown option --no-such-option"),
    (
        "--batch-size 64",
        "unknown option --batch-size; --help lists them, and arguments of the script go after --",
    ),
    ("stray", "stray argument 'stray'"),
    ("--status=yes", "takes no value"),
    ("--jobs 0", "--jobs is '0'"),
    ("--jobs two", "--jobs is 'two'"),
    ("--jobs 1e3", "from 1 to 1024"),
    ("--threads -2", "--threads is '-2'"),
    ("--runs-per-gpu 99999999999999999999", "from 1 to 64"),
    ("--runs-per-gpu 2", "use --jobs"),
    ("--jobs 2 --runs-per-gpu 2", "give one of them"),
    ("--hours-per-run 0", "a number above 0"),
    ("--hours-per-run long", "a number above 0"),
    ("--slurm --gpus two", "--gpus is 'two'"),
    ("--slurm --shards 1 --gpus 1", "--shards gives one run to each task"),
    ("--slurm --jobs 2", "needs --gpus 0"),
    ("--slurm --gpus 0 --runs-per-gpu 2", "--gpus 0 goes with --jobs"),
    ("--partition gpu", "--partition goes with --slurm"),
    ("--max-tasks 3", "--max-tasks goes with --slurm"),
    ("--slurm-arg=--qos=high", "--slurm-arg goes with --slurm"),
    ("--status --dry-run", "--status goes with neither"),
    ("--task nowhere", "--task is for the job arrays"),
    ("--script nowhere.py", "there is no file"),
    ("--script /etc", "there is no file"),
    ("--preset 'a b'", "must be a preset"),
    ("--preset ../x", "must be a preset"),
    ("--python no-such-python", "name your Python with --python"),
    ("--out /dev/null/x", "/dev/null is no folder"),
    ("--out /proc/x", "--out: /proc/x cannot be"),
    ("--games Pong -- --seed 3", "--seed after --"),
    ("--games Pong -- --run-dir=x", "--run-dir after --"),
    ("--games Pong -- --run_dir x", "--run_dir after --"),
    ("--games Pong -- --env_id=x", "--env_id after --"),
    ("--games Pong -- --eval_only x", "--eval_only after --"),
    ("--games Pong -- --dry_run", "--dry_run after --"),
    ("--games Pong -- --no-resume", "--no-resume after --"),
    ("--games Pong -- --no_dry_run", "--no_dry_run after --"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD)
def test_bad_input_is_one_line_and_nothing_is_written(arguments, says, here):
    done = benchmark(arguments)
    assert done.returncode == 2 and done.stdout == "", done
    assert (
        done.stderr.count("\n") == 1
        and done.stderr.startswith("benchmark.sh: error: ")
        and says in done.stderr
    )
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--preset tiny -- --batch-sise 3", "--batch-sise, 3 Perhaps you meant: --batch-size INT"),
        ("--dry-run --preset huge", "Expected one of ('paper', 'tiny', 'small')"),
        ("--slurm --preset tiny -- --batch-size 0", "--batch-size is 0"),
    ],
)
def test_what_the_script_would_refuse_is_refused_before_any_run(arguments, says, here):
    done = benchmark(arguments, script="jedi_atari.py")
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done
    assert not list(here.iterdir())


def test_a_folder_that_may_not_be_written(here):
    (here / "o").mkdir(mode=0o555)
    user = ["setpriv", "--reuid=65534", "--clear-groups"] if os.getuid() == 0 else []
    own = [
        "--script",
        str(here.parent / "stub.py"),
        "--python",
        "/bin/true",
        "--out",
        str(here / "o"),
    ]
    if user:
        for folder in (here, *here.parents[:-2]):
            folder.chmod(folder.stat().st_mode | 0o011)
    done = subprocess.run([*user, str(BENCHMARK), *own], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (
        2,
        "",
    ) and "cannot be written: no permission" in done.stderr, done
    assert not list((here / "o").iterdir())


def test_the_games_are_those_of_atari_100k():
    listed = re.search(r"ALL_GAMES=\(([^)]*)\)", BENCHMARK.read_text())[1].split()
    assert listed == sorted(ACTIONS) and len(listed) == 26


def test_help_names_every_option(here):
    done = benchmark("--help")
    known = set(re.findall(r"^ +(--[a-z-]+)(?: \| -h)?\)", BENCHMARK.read_text(), re.M)) - {
        "--task"
    }
    assert done.returncode == 0 and len(known) >= 20
    assert [option for option in known if option not in done.stdout] == []


# --- the pool, with the stub


def test_finished_failed_and_killed_runs(here):
    arguments = "--games Pong,Krull --seeds 0-2 --jobs 3 --threads 1 --out o"
    first = benchmark(arguments, STUB="Krull/seed0=crash Krull/seed1=kill Krull/seed2=nothing")
    assert first.returncode == 1 and "3 of 6 done, 0 running, 3 failed" in first.stdout
    assert (
        "failed: Krull/seed0 (status 3), " in first.stdout
        and "    the reason of the crash\n" in first.stdout
    )
    assert (
        "failed: Krull/seed1 (status 137" in first.stdout
        and "failed: Krull/seed2 (status 0" in first.stdout
    )
    states = table("--games Pong,Krull --seeds 0-2 --out o")
    assert (
        states["Pong/seed0"][:4] == ["done", "7.5", "0.799", "2:00:00"]
        and states["Krull/seed1"][0] == "failed"
    )
    second = benchmark(arguments)
    assert (
        second.returncode == 0 and "6 of 6 done" in second.stdout and "failed:" not in second.stdout
    )
    counts = {
        run: attempts(here / "o", run) for run in ("Pong/seed0", "Krull/seed0", "Krull/seed1")
    }
    assert counts == {"Pong/seed0": 1, "Krull/seed0": 2, "Krull/seed1": 2}
    for run in counts:  # the first attempt says how many threads; the others keep to that
        text = log(here / "o", run)
        assert text.count("--resume") == counts[run] and text.count("--threads 1 ") == 1
    assert benchmark(f"--status {arguments}").returncode == 0


def test_time_left(here):
    # From what a run takes, as far as nobody knows better: one that has just begun, and two to come.
    shown = benchmark("--games Pong --seeds 0-2 --out o --hours-per-run 1").stdout
    assert re.match(
        r"0 done, 1 running, 0 failed, 2 waiting, time left: (3:00:00|2:59:5\d)\n", shown
    ), shown
    # From what a run says of itself, and then from what the finished ones took.
    shown = benchmark(
        "--games Krull --seeds 0-2 --out o --jobs 2", STUB="Krull/seed0=slow", SECONDS_EACH="2"
    ).stdout
    assert re.search(
        r"\n1 done, 2 running, 0 failed, 0 waiting, time left: \d d \d\d:\d\d:\d\d\n", shown
    ), shown
    assert "3 done, 0 running, 0 failed, 0 waiting, time left: 0:00\n" in shown


def test_each_gpu_has_its_runs(here):
    arguments = "--games Pong,Krull,Qbert,Hero --seeds 0-1 --out o --runs-per-gpu 2"
    assert benchmark(arguments, CUDA_VISIBLE_DEVICES="3,GPU-x", SECONDS_EACH="1").returncode == 0
    spans = [json.loads(path.read_text()) for path in (here / "o").glob("*/*/span.json")]
    assert len(spans) == 8
    for device in ("3", "GPU-x"):
        mine = [s for s in spans if s["device"] == device]
        # As many as asked for, not one more, and not one after the other.
        together = [sum(a["begun"] <= b["begun"] < a["ended"] for a in mine) for b in mine]
        assert len(mine) >= 2 and max(together) == 2, (device, together)
    assert (
        benchmark("--games Pong --seeds 7 --out o --jobs 2", CUDA_VISIBLE_DEVICES="3").returncode
        == 0
    )
    assert "ready  " in log(here / "o", "Pong/seed7")  # --jobs: on no GPU


def test_threads_are_shared_out(here):
    cores = jedi.usable_cores()
    benchmark("--games Pong --seeds 0 --out o --jobs 2")
    benchmark("--games Pong --seeds 1 --out o --jobs 2 --threads 3")
    assert f"--threads {max(1, cores // 2)} " in log(here / "o", "Pong/seed0")
    assert "--threads 3 " in log(here / "o", "Pong/seed1") and "ready  3" in log(
        here / "o", "Pong/seed1"
    )


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "250000 100000"}, 3),
        ({"cpu.max": "1600000 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 1),
    ],
)
def test_a_containers_cores_are_those_of_its_limit(files, cores, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    function = re.search(r"^usable_cores\(\) .*?^}", BENCHMARK.read_text(), re.M | re.S)[0]
    script = f"set -euo pipefail; nproc() {{ echo 8; }}; {function}; usable_cores {tmp_path}"
    assert int(ask("bash", "-c", script)) == cores


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_stops_the_runs_in_order_and_a_second_call_carries_on(number, here):
    arguments, runs = "--games Pong --seeds 0-3 --jobs 2 --out o", ("Pong/seed0", "Pong/seed1")
    pool = begin(arguments, STUB=" ".join(f"{run}=hold" for run in runs))
    wait_until(ready(here / "o", *runs), "the runs")
    pids = [pid_of(here / "o", run) for run in runs]
    assert {
        state[0] for run, state in table("--games Pong --seeds 0-3 --out o").items() if run in runs
    } == {"running"}
    os.killpg(pool.pid, number)
    out, err = pool.communicate(timeout=30)
    assert (
        pool.returncode == 128 + number and f"stopped by {number.name}; the same call again" in err
    )
    assert "failed:" not in out and not any(alive(pid) for pid in pids)
    states = table("--games Pong --seeds 0-3 --out o")
    assert [states[f"Pong/seed{k}"][0] for k in range(4)] == [
        "stopped",
        "stopped",
        "waiting",
        "waiting",
    ]
    second = benchmark(arguments)
    assert second.returncode == 0 and "4 of 4 done" in second.stdout
    assert [attempts(here / "o", run) for run in runs] == [2, 2]


def test_ctrl_c_at_any_moment(here):
    """Also while the pool is busy with the small commands that it is made of, and while a run is being started."""
    for k in range(4):
        out = here / f"o{k}"
        pool = begin(
            f"--games Pong --seeds 0-2 --jobs 3 --out {out}",
            STUB=" ".join(f"Pong/seed{n}=hold" for n in range(3)),
        )
        wait_until((out / "Pong/seed0/log.txt").exists, "the pool to begin")
        time.sleep(k * 0.1)
        os.killpg(pool.pid, signal.SIGINT)
        told, err = pool.communicate(timeout=30)
        assert pool.returncode == 130, (k, told, err)
        assert "\n0 of 3 done, 0 running, 0 failed, 0 queued, 3 waiting\n" in told, (k, told, err)


def test_a_killed_guard_stops_the_runs_in_order(here):
    pool = begin("--games Pong --seeds 0 --out o", STUB="Pong/seed0=hold")
    wait_until(ready(here / "o", "Pong/seed0"), "the run")
    other = benchmark("--games Pong --seeds 1 --out o")
    assert (
        other.returncode == 2
        and "another benchmark.sh is at work" in other.stderr
        and other.stdout == ""
    )
    pool.kill()
    out, _ = pool.communicate(timeout=30)
    assert "0 of 1 done, 0 running" in out and (here / "o/Pong/seed0/checkpoint.pt").exists()
    assert benchmark("--games Pong --seeds 0-1 --out o").returncode == 0


def test_runs_of_a_killed_pool_are_left_alone(here):
    arguments = "--games Pong --seeds 0-1 --out o"
    pool = begin(arguments, STUB="Pong/seed0=hold")
    wait_until(ready(here / "o", "Pong/seed0"), "the run")
    orphan = pid_of(here / "o", "Pong/seed0")
    parent = int(Path(f"/proc/{orphan}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    pool.communicate()
    try:
        assert (
            pool.returncode == 137
            and alive(orphan)
            and table(arguments)["Pong/seed0"][0] == "running"
        )
        second = benchmark(arguments)
        assert (
            second.returncode == 1 and "Pong/seed0 is being run by another process" in second.stderr
        )
        assert "1 of 2 done, 1 running" in second.stdout and attempts(here / "o", "Pong/seed0") == 1
    finally:
        os.kill(orphan, signal.SIGKILL)
    wait_until(lambda: not alive(orphan), "its end")
    assert table(arguments)["Pong/seed0"][:3] == ["stopped", "-", "-"]
    assert benchmark(arguments).returncode == 0


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda text: text[: len(text) // 2], "is half written"),
        (lambda text: "", "is half written"),
        (lambda text: "[]", "is not a run's result"),
        (lambda text: '{"returns": 5}', "lacks returns, mean_return or wall_seconds"),
        (lambda text: text.replace("7.5", "NaN"), "lacks returns, mean_return or wall_seconds"),
        (lambda text: text.replace('"seed": 0', '"seed": 1'), "is of another run, Pong seed 1"),
    ],
)
def test_a_spoilt_result_is_unfinished_and_named(spoil, says, here):
    arguments, path = "--games Pong --seeds 0 --out o", here / "o/Pong/seed0/result.json"
    assert benchmark(arguments).returncode == 0
    spoilt = spoil(path.read_text())
    path.write_text(spoilt)
    shown = benchmark("--status", arguments)
    assert (
        shown.returncode == 1
        and f"result.json {says}" in shown.stdout
        and "stopped" in shown.stdout
    )
    assert path.read_text() == spoilt  # looking changes nothing
    again = benchmark(arguments)
    assert again.returncode == 0 and f"Pong/seed0: result.json {says}" in again.stderr
    assert json.loads(path.read_text())["mean_return"] == 7.5
    assert path.with_name("result.json.broken").read_text() == spoilt


def test_runs_of_other_arguments_are_not_mixed(here):
    assert benchmark("--games Pong --seeds 0 --out o").returncode == 0
    for other in ("--preset tiny", "-- --batch-size 64"):
        done = benchmark(f"--games Pong --seeds 1 --out o {other}")
        assert done.returncode == 2 and "are of 'stub.py --preset paper', not of" in done.stderr
    assert not (here / "o/Pong/seed1").exists()


def test_odd_names_of_folders(here):
    out = "a b%A 'c"
    assert benchmark(f"--games Pong --seeds 0 --out {shlex.quote(out)}").returncode == 0
    assert (here / out / "Pong/seed0/result.json").exists()
    (here / "bin").mkdir()
    for name, says in (("sbatch", "5"), ("squeue", "")):
        (here / "bin" / name).write_text(f"#!/bin/sh\necho {says}\n")
        (here / "bin" / name).chmod(0o755)
    path = f"{here / 'bin'}:{os.environ['PATH']}"
    done = benchmark(f"--slurm --games Pong --seeds 1 --out {shlex.quote(out)}", PATH=path)
    shown = shlex.split(done.stdout.partition("shown by: ")[2])  # a command that can be pasted
    assert shown == [str(BENCHMARK), "--out", str(here / out), "--status"], done


# --- SLURM, a real one


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment of a cluster of two nodes with a GPU each, made for these tests."""
    root = Path(f"/tmp/slurm-{os.getpid()}")  # short, for a socket's path
    up = subprocess.run([str(TESTS / "slurm_up.sh"), str(root)], capture_output=True, text=True)
    if up.returncode == 77 and not os.environ.get("SLURM_REQUIRED"):
        pytest.skip(up.stderr.splitlines()[-1])
    try:
        assert up.returncode == 0, up.stderr
        yield {"SLURM_CONF": str(root / "slurm.conf"), "SLURM_ROOT": str(root)}
    finally:
        subprocess.run([str(TESTS / "slurm_down.sh"), str(root)], check=True)


@pytest.fixture
def cluster(slurm, here, monkeypatch):
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")  # it is SLURM's to give
    yield here
    subprocess.run(["scancel", "--user", str(os.getuid())], check=True)
    wait_until(lambda: not queue(), "an empty queue")


def queue() -> dict[str, str]:
    """Tasks that SLURM knows of, and their states."""
    return dict(
        line.split()
        for line in ask("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
    )


def ask(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def submit(arguments: str, script: str = "../stub.py", **env: str) -> str:
    """The number of the job array."""
    done = benchmark("--slurm", arguments, script=script, **env)
    assert done.returncode == 0, done.stderr
    return re.match(r"submitted job array (\d+): ", done.stdout)[1]


def test_slurm_packs_runs_and_collects_each_exit_status(cluster):
    arguments = "--games Pong,Krull,Qbert --seeds 0-1 --out o --threads 1"
    job = submit(
        f"{arguments} --runs-per-gpu 2", STUB="Krull/seed0=crash Qbert/seed0=kill", SECONDS_EACH="1"
    )
    assert benchmark("--slurm", arguments).stdout.startswith(
        "nothing to submit"
    )  # all of it is queued already
    wait_until(lambda: not queue(), "the end of the array")
    codes = [
        re.search(r"ExitCode=(\S+)", ask("scontrol", "show", "job", f"{job}_{k}"))[1]
        for k in range(3)
    ]
    assert codes == [
        "1:0",
        "1:0",
        "0:0",
    ]  # Pong 0 and Krull 0, Qbert 0 and Pong 1, Krull 1 and Qbert 1
    states = {run: words[0] for run, words in table(arguments).items()}
    assert [run for run, state in states.items() if state != "done"] == [
        "Krull/seed0",
        "Qbert/seed0",
    ]
    assert {states["Krull/seed0"], states["Qbert/seed0"]} == {"failed"}
    submit(f"{arguments} --runs-per-gpu 2")
    assert [path.read_text() for path in sorted((cluster / "o/slurm").glob("*/tasks.txt"))] == [
        "Pong/seed0 Krull/seed0\nQbert/seed0 Pong/seed1\nKrull/seed1 Qbert/seed1\n",
        "Krull/seed0 Qbert/seed0\n",
    ]
    wait_until(lambda: not queue(), "the end of the second array")
    assert (
        benchmark("--status", arguments).returncode == 0
        and attempts(cluster / "o", "Pong/seed0") == 1
    )


def test_slurm_shards_share_a_gpu(cluster):
    submit(
        "--games Pong,Krull,Hero,Qbert --seeds 0-1 --out o --threads 1 --shards 1", SECONDS_EACH="2"
    )
    wait_until(lambda: not queue(), "the end of the array")
    spans = [json.loads(path.read_text()) for path in (cluster / "o").glob("*/*/span.json")]
    together = [sum(a["begun"] <= b["begun"] < a["ended"] for a in spans) for b in spans]
    assert len(spans) == 8 and {s["device"] for s in spans} == {"0"}
    assert max(together) > 2  # there are only two GPUs


def test_slurm_refuses(cluster):
    done = benchmark("--slurm --games Pong --seeds 0 --out o --partition nowhere")
    assert (
        done.returncode == 1
        and "invalid partition" in done.stderr.lower()
        and "nothing was submitted" in done.stderr
    )
    assert not list((cluster / "o/slurm").iterdir())
    submit("--games Pong --seeds 0 --out o --threads 1", STUB="Pong/seed0=hold")
    (cluster / "bin").mkdir()  # a controller that does not answer
    (cluster / "bin/squeue").write_text("#!/bin/sh\nexit 1\n")
    (cluster / "bin/squeue").chmod(0o755)
    done = benchmark(
        "--slurm --games Pong --seeds 0-1 --out o", PATH=f"{cluster / 'bin'}:{os.environ['PATH']}"
    )
    assert done.returncode == 1 and "squeue does not answer; nothing was submitted" in done.stderr


# --- real runs


RUNS = ["Pong/seed0", "Krull/seed0", "Hero/seed0"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What a run of jedi_atari.py comes to that nobody disturbs and that benchmark.sh has no part in."""
    folder = tmp_path_factory.mktemp("plain")

    @functools.cache
    def come_to(run: str) -> dict:
        words = [*shlex.split("--seed 0 --threads 1 --preset tiny --env-id"), run.split("/")[0]]
        words += [*FLAGS, "--run-dir", str(folder / run)]
        script = [sys.executable, str(ROOT / "jedi_atari.py")]
        subprocess.run([*script, *words], stdout=subprocess.DEVNULL, check=True, timeout=170)
        return outcome(folder / run)

    return come_to


def outcome(folder: Path) -> dict:
    """All of a run that must depend neither on who started it nor on how often it was stopped."""
    result = json.loads((folder / "result.json").read_text())
    for key in ("wall_seconds", "peak_memory_bytes"):
        del result[key]
    result["args"] = {k: v for k, v in result["args"].items() if k not in ("run_dir", "resume")}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]
    return {
        "result": result,
        "metrics": [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows],
        "weights": {name: tensor.numpy().tobytes() for name, tensor in weights.items()},
    }


def assert_same(out: Path, runs: dict[str, dict]) -> None:
    for run, expected in runs.items():
        found = outcome(out / run)
        for part in expected:
            assert found[part] == expected[part], (run, part)


REAL = f"--preset tiny --threads 1 --out o -- {' '.join(FLAGS)}"


def held(out: Path, runs: list[str]):
    return lambda: all((out / run / "held").exists() for run in runs)


def test_a_run_of_an_interrupted_pool_comes_to_what_a_plain_run_comes_to(plain, here):
    (here.parent / "held.py").write_text(HELD)
    arguments, runs = f"--games Pong --seeds 0 {REAL}", RUNS[:1]
    gate = str(here / "gate")
    pool = begin(arguments, script="../held.py", GATE=gate)
    wait_until(held(here / "o", runs), "the middle of the run")
    os.killpg(pool.pid, signal.SIGINT)
    out, err = pool.communicate(timeout=60)
    assert pool.returncode == 130 and "0 of 1 done, 0 running, 0 failed" in out, err
    Path(gate).touch()
    second = benchmark(arguments, script="../held.py", GATE=gate)
    assert second.returncode == 0 and "1 of 1 done" in second.stdout
    assert all("resumed after epoch 1" in log(here / "o", run) for run in runs)
    assert_same(here / "o", {run: plain(run) for run in runs})
    # A result that was spoilt afterwards: the run is finished once more.
    (here / "o" / runs[0] / "result.json").write_text("{")
    assert benchmark(arguments, script="../held.py", GATE=gate).returncode == 0
    assert_same(here / "o", {run: plain(run) for run in runs})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_run_that_fails_shows_its_reason(here):
    done = benchmark(
        "--games Pong --seeds 0 --preset tiny --out o -- --device cuda:0", script="jedi_atari.py"
    )
    assert done.returncode == 1 and "failed: Pong/seed0 (status 2)" in done.stdout
    assert "--device cuda:0: use auto, cpu, cuda or cuda:N; CUDA devices: 0" in done.stdout


def test_slurm_requeued_and_cancelled_runs_come_to_what_plain_runs_come_to(plain, cluster):
    (cluster.parent / "held.py").write_text(HELD)
    out, gate = cluster / "o", cluster / "gate"
    arguments = f"--games Pong,Krull,Hero --seeds 0 --runs-per-gpu 2 {REAL}"
    crashed, cancelled = RUNS[:2], RUNS[2:]

    def tell(*words: str) -> None:
        print(f"{time.monotonic() - begun:5.1f} s", *words, flush=True)

    begun = time.monotonic()
    job = submit(arguments, script="../held.py", GATE=str(gate))
    wait_until(held(out, crashed + cancelled), "the middle of the runs")
    tell(f"job {job}: a task of two runs and one of one are in the middle")

    # The node of the first task breaks down: its runs are killed without a warning, and SLURM queues the task again.
    node = ask("squeue", "--noheader", f"--jobs={job}_0", "--format=%N").strip()
    pids = [pid_of(out, run) for run in crashed]
    root = os.environ["SLURM_ROOT"]
    subprocess.run([str(TESTS / "slurm_down.sh"), root, "node", node], check=True)
    wait_until(lambda: not any(alive(pid) for pid in pids), "the end of its runs")
    ask(
        "scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=crash"
    )  # sooner than SLURM would notice
    subprocess.run([str(TESTS / "slurm_up.sh"), root, "node", node], check=True)
    tell(f"node {node} crashed and is back")

    # The second task is cancelled: its runs are told to stop, and nobody queues it again ...
    ask("scancel", f"{job}_1")
    wait_until(lambda: f"{job}_1" not in queue(), "the end of the cancelled task")
    assert {table(arguments)[run][0] for run in cancelled} == {"stopped"}
    for run in crashed + cancelled:
        (out / run / "held").unlink()
    # ... until somebody submits again, which queues what is missing and nothing else.
    second = submit(arguments, script="../held.py", GATE=str(gate))
    assert [path.read_text() for path in sorted((out / "slurm").glob("*/tasks.txt"))][
        1
    ] == " ".join(cancelled) + "\n"
    tell(f"task {job}_1 was cancelled, and its runs were submitted again as job {second}")

    # The task that crashed comes near its time limit: SLURM warns it, and it asks to be queued again.
    wait_until(held(out, crashed), "the requeued task")
    assert queue()[f"{job}_0"] == "RUNNING"
    ask("scancel", "--signal=USR1", "--batch", f"{job}_0")
    wait_until(lambda: queue().get(f"{job}_0") != "RUNNING", "the task to stop")
    tell(f"task {job}_0 was requeued, ran, was warned and is queued again: {queue()}")
    assert f"{job}_0" in queue() and not (out / crashed[0] / "result.json").exists()
    gate.touch()
    wait_until(lambda: not queue(), "the end of both arrays", 120)
    tell("the queue is empty")

    assert benchmark("--status", arguments, script="../held.py").returncode == 0
    done = benchmark("--slurm", arguments, script="../held.py")
    assert done.returncode == 0 and done.stdout.startswith("nothing to submit: 3 of 3 done")
    told = "\n".join(path.read_text() for path in (out / "slurm").glob("*/task*.txt"))
    assert all(
        f"job {job}_0, restart {k}, GPUs 0: Pong/seed0 Krull/seed0" in told for k in (0, 1, 2)
    ), told
    assert [attempts(out, run) for run in crashed + cancelled] == [3, 3, 2]
    assert_same(out, {run: plain(run) for run in RUNS})
    tell("all three results are those of plain runs")

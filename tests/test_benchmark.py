"""benchmark.sh: the pool, and job arrays on a real SLURM that the tests bring up for themselves.

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

BENCHMARK, SLURM = ROOT / "benchmark.sh", ROOT / "tests/slurm"
# A whole run, with all its parts, in less than the time that importing PyTorch takes.
SMALL = {**MICRO, "total_steps": 60, "first_steps_min": 40, "first_steps_max": 40, "final_episodes": 1,
         "max_episode_steps": 20, "precision": "fp32"}  # fmt: skip
FLAGS = command_line({n: value for n, value in SMALL.items() if n not in ("preset", "threads")})

STUB = """
import json, os, signal, sys, time
from pathlib import Path

if "--dry-run" in sys.argv:
    sys.exit("a reason" if "--bad" in sys.argv else 0)
value = dict(zip(sys.argv, sys.argv[1:])).get
folder, game, seed = Path(value("--run-dir")), value("--env-id"), int(value("--seed"))
# What to do: STUB is a list such as Pong/seed0=crash, the rest finishes.
does = dict(x.split("=") for x in os.environ.get("STUB", "").split()).get(f"{game}/seed{seed}", "finish")
again, begun, device = (folder / "args.json").exists(), time.time(), os.environ["CUDA_VISIBLE_DEVICES"]
(folder / "args.json").touch()
print("ready on", device, "threads", value("--threads"), flush=True)
if does == "crash" or does == "once" and not again:
    print("the reason of the crash", flush=True)
    sys.exit(3)
if does == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if does == "nothing":
    sys.exit()
print("epoch 1/3601, 70 steps", flush=True)
time.sleep(600 if does == "hold" and not again else float(os.environ.get("SECONDS_EACH", 0)) * (1 + seed % 2))
result = dict(env_id=game, seed=seed, returns=[7.0, 8.0], mean_return=7.5, wall_seconds=7200)
(folder / "span.json").write_text(json.dumps(dict(begun=begun, ended=time.time(), device=device)))
(folder / "result.json").write_text(json.dumps(result))
"""

# jedi_atari.py as it is, except that it writes a checkpoint after every epoch, and waits after its first one past epoch
# 0 until it is killed or the file GATE is there.
HELD = f"""
import os, sys, time
from pathlib import Path

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
sys.exit(jedi.main())
"""
POOLS = []


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to be in, with scripts beside it; the machine has no GPU unless a test says so."""
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "held.py").write_text(HELD)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHON", sys.executable)
    yield tmp_path / "here"
    for pool in [pool for pool in POOLS if pool.poll() is None]:  # of a test that failed
        pool.send_signal(signal.SIGINT)
        pool.communicate(timeout=30)


def begin(arguments: str, script: str = "../stub.py", **env: str) -> subprocess.Popen:
    """A pool in a session of its own, as in a terminal, where Ctrl-C reaches the whole process group."""
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    command = [str(BENCHMARK), "--script", script, *shlex.split(arguments)]
    POOLS.append(subprocess.Popen(command, env={**os.environ, **env}, **how))
    return POOLS[-1]


def benchmark(arguments: str, script: str = "../stub.py", **env: str):
    """`returncode`, `stdout` and `stderr` of a whole call."""
    pool = begin(arguments, script, **env)
    out, err = pool.communicate(timeout=170)
    return subprocess.CompletedProcess(arguments, pool.returncode, out, err)


def wait_until(condition, what: str, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def log(run: str) -> str:
    path = Path("o", run, "log.txt")
    return path.read_text() if path.exists() else ""


def ready(*runs: str):
    return lambda: all("ready" in log(run) for run in runs)


def begun(run: str) -> int:
    return len(re.findall(r"=== benchmark.sh: \S+ \S+ begun", log(run)))


def status(arguments: str) -> str:
    return benchmark(f"--status --out o {arguments}").stdout


def spans(device: str | None = None) -> list[dict]:
    found = [json.loads(path.read_text()) for path in Path("o").glob("*/*/span.json")]
    return sorted((s for s in found if device in (None, s["device"])), key=lambda s: s["begun"])


# --- what it prints without running anything


@pytest.mark.parametrize("script", ["jedi_atari.py", "jedi_atari_stochastic.py"])
def test_dry_run_prints_130_commands_that_the_script_accepts(script, here):
    done = benchmark("--dry-run -- --batch-size 64", str(ROOT / script))
    assert (done.returncode, done.stderr) == (0, "") and not list(here.iterdir())
    commands = [shlex.split(line) for line in done.stdout.splitlines() if "--env-id" in line]
    module = __import__(Path(script).stem)
    parsed = [module.parse_args(command[2:]) for command in commands]
    assert {(a.preset, a.batch_size, a.resume) for a in parsed} == {("paper", 64, True)}
    assert {a.threads for a in parsed} == {jedi.usable_cores()}
    runs = [(a.env_id, a.seed) for a in parsed]
    assert sorted(runs) == sorted((game, seed) for game in ACTIONS for seed in range(5))
    assert done.stdout.endswith("\n130 of 130 runs to do, run-hours: not measured\n")


def test_hours_are_those_of_finished_runs_or_measured_on_this_card(here, monkeypatch):
    assert benchmark("--games Pong --seeds 0-1 --out o").returncode == 0
    said = benchmark("--dry-run --games Pong --seeds 0-4 --out o").stdout
    assert "3 of 5 runs to do, run-hours: 6.0 (2.0 a run, from the finished runs)" in said
    said = benchmark("--dry-run --games Pong --out o --runs-per-gpu 2", CUDA_VISIBLE_DEVICES="0")
    assert "GPU-hours: 3.0 (2.0 a run" in said.stdout
    (here / "nvidia-smi").write_text("#!/bin/sh\ncase $1 in *name) echo $CARD;; *) echo 0;; esac\n")
    (here / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    jedi_py, card = str(ROOT / "jedi_atari.py"), "NVIDIA H100 80GB HBM3"
    measured = json.loads((ROOT / "results/speed/h100.json").read_text())["projected_hours"]
    assert f"GPU-hours: {130 * measured:.1f} (" in benchmark("--dry-run", jedi_py, CARD=card).stdout
    assert "GPU-hours: not measured" in benchmark("--dry-run", jedi_py, CARD="another").stdout
    other = benchmark("--dry-run --preset small", jedi_py, CARD=card).stdout
    assert "GPU-hours: not measured" in other


BAD = [
    ("--games pong", "unknown game 'pong'; known games: Alien Amidar"),
    ("--games Pong,,Krull", "unknown game ''"),
    ("--games", "--games: expected one argument"),
    ("--games --seeds 1", "--games: expected one argument"),
    ("--seeds x", "0-4 or 0,1,7"),
    ("--seeds -1", "0-4 or 0,1,7"),
    ("--seeds 3-1", "0-4 or 0,1,7"),
    ("--seeds 0-5000", "at most 1000 seeds"),
    ("--batch-size 64", "--batch-size 64; see --help. Arguments of the script go after --"),
    ("--jobs 0", "--jobs must be a whole number from 1"),
    ("--jobs two", "--jobs: invalid int value: 'two'"),
    ("--runs-per-gpu 2", "there is no GPU; use --jobs"),
    ("--jobs 2 --runs-per-gpu 2", "not allowed with"),
    ("--slurm-arg=--qos=high", "go with --slurm"),
    ("--script nowhere.py", "nowhere.py cannot run so, see above"),
    ("-- --bad", "stub.py cannot run so, see above; PYTHON=... chooses another Python"),
    ("-- --seed 3", "--seed after --"),
    ("-- --run_dir=x", "--run_dir=x after --"),
    ("-- --no-resume", "--no-resume after --"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD)
def test_bad_input_is_named_and_nothing_is_written(arguments, says, here):
    done = benchmark(arguments)
    assert done.returncode == 2 and done.stdout == "", done
    last = done.stderr.splitlines()[-1]
    assert last.startswith("benchmark.sh: error: ") and says in last and not list(here.iterdir())


def test_what_cannot_work_is_named(here):
    done = benchmark("--preset tiny -- --batch-sise 3", str(ROOT / "jedi_atari.py"))
    assert done.returncode == 2 and "--batch-size INT" in done.stderr  # the script's own words
    done = benchmark("--games Pong", PYTHON="no-such-python")
    assert done.returncode == 2 and "no-such-python is no Python 3.10" in done.stderr
    done = benchmark("--games Pong --out /dev/null/x")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "'/dev/null/x'" in done.stderr
    assert benchmark("--games Pong --seeds 0 --out o").returncode == 0
    for other in ("--preset tiny", "-- --batch-size 64"):
        done = benchmark(f"--games Pong --seeds 1 --out o {other}")
        assert done.returncode == 2 and "'stub.py --preset paper', not of" in done.stderr
    assert not Path("o/Pong/seed1").exists()


# --- the pool, with the stub


def test_failed_runs_are_tried_once_again_and_listed(here):
    arguments = "--games Pong,Krull --seeds 0-2 --jobs 3 --out o"
    what = "Pong/seed0=once Krull/seed0=crash Krull/seed1=kill Krull/seed2=nothing"
    first = benchmark(arguments, STUB=what)
    assert first.returncode == 1 and "\n6 runs: 3 done, 0 running, 3 failed" in first.stdout
    listed = r"Krull/seed0 failed: status 3, the reason of the crash; \S*/log.txt ends:\n    ready"
    assert re.search(listed + r".*\n    the reason of the crash\n", first.stdout)
    assert "Krull/seed1 failed: killed by SIGKILL" in first.stdout
    assert "Krull/seed2 failed: status 0, no result" in first.stdout
    assert [begun(f"{game}/seed{k}") for game in ("Pong", "Krull") for k in range(3)] == [2, 1, 1, 2, 2, 2]  # fmt: skip
    lines = status("--games Pong,Krull --seeds 0-2").splitlines()
    assert [line.split()[:9:2] for line in lines[:2]] == [["Pong", *"done running failed waiting".split()], ["Krull", *"done running failed waiting".split()]]  # fmt: skip
    assert [line.split()[1:9:2] for line in lines[:2]] == [list("3000"), list("0030")]
    assert lines[0].endswith("return 7.5") or "return 7.5" in lines[0]
    second = benchmark(arguments)
    assert second.returncode == 0 and "6 done" in second.stdout and "failed:" not in second.stdout
    assert begun("Pong/seed1") == 1 and begun("Krull/seed0") == 3
    assert log("Krull/seed0").count("--resume") == 3 and "threads None" in log("Krull/seed0")


def test_a_slot_takes_the_next_run_as_soon_as_it_is_free(here):
    arguments = "--games Pong,Krull,Qbert,Hero --seeds 0-2 --out o --runs-per-gpu 2"
    done = benchmark(arguments, CUDA_VISIBLE_DEVICES="3,GPU-x", SECONDS_EACH="1")
    assert done.returncode == 0 and len(spans()) == 12, done.stderr
    for device in ("3", "GPU-x"):
        mine = spans(device)
        together = [sum(a["begun"] <= b["begun"] < a["ended"] for a in mine) for b in mine]
        assert len(mine) >= 4 and max(together) == 2  # as many as asked for, not one more
        for i, span in enumerate(
            mine[2:]
        ):  # a run begins when one before it has ended, of either slot
            wait = span["begun"] - sorted(s["ended"] for s in mine)[i]
            assert 0 <= wait < 1.5, (device, i, wait)
    assert benchmark("--games Pong --seeds 7 --out o --jobs 2", CUDA_VISIBLE_DEVICES="3").returncode == 0  # fmt: skip
    threads = max(1, jedi.usable_cores() // 2)
    assert f"ready on  threads {threads}" in log("Pong/seed7")  # --jobs: on no GPU


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_runs_and_the_same_call_carries_on(number, here):
    arguments, runs = "--games Pong --seeds 0-3 --jobs 2 --out o", ("Pong/seed0", "Pong/seed1")
    pool = begin(arguments, STUB=" ".join(f"{run}=hold" for run in runs))
    wait_until(lambda: all("epoch" in log(run) for run in runs), "the runs")
    assert re.search(r"2 running .* seed0 epoch 1/3601, \d+\.\d h left; seed1", status("--games Pong"))  # fmt: skip
    os.killpg(pool.pid, number)
    out, err = pool.communicate(timeout=30)
    assert pool.returncode == 128 + number and f"stopped by {number.name}; the same call" in out
    assert "4 runs: 0 done, 0 running, 0 failed, 4 waiting" in out, (out, err)
    second = benchmark(arguments)
    assert second.returncode == 0 and [begun(run) for run in runs] == [2, 2], second


def test_ctrl_c_at_any_moment(here):
    for k in range(6):
        holds = " ".join(f"Pong/seed{n}=hold" for n in range(3))
        pool = begin("--games Pong --seeds 0-2 --jobs 3 --out o", STUB=holds)
        time.sleep(0.1 + k * 0.1)
        os.killpg(pool.pid, signal.SIGINT)
        out, err = pool.communicate(timeout=30)
        assert pool.returncode in (130, -signal.SIGINT) and "Traceback" not in err, (k, out, err)
        said = status("--games Pong --seeds 0-2")
        assert "3 runs: 0 done, 0 running, 0 failed, 3 waiting" in said, (k, said)
        subprocess.run(["rm", "-rf", "o"], check=True)


def test_two_runners_on_one_folder_never_start_the_same_run(here):
    arguments = "--games Pong,Krull,Hero,Qbert --seeds 0-1 --jobs 2 --out o"
    pools = [begin(arguments, SECONDS_EACH="0.5") for _ in range(2)]
    said = [pool.communicate(timeout=60) for pool in pools]
    runs = [f"{game}/seed{k}" for game in ("Pong", "Krull", "Hero", "Qbert") for k in (0, 1)]
    assert [begun(run) for run in runs] == [1] * 8 and len(spans()) == 8, said
    assert min(out.count(" begun on ") for out, _ in said) > 0  # both had a part in it
    assert benchmark(arguments).returncode == 0


def test_runs_of_a_killed_runner_are_left_alone(here):
    arguments = "--games Pong --seeds 0-1 --out o"
    pool = begin(arguments, STUB="Pong/seed0=hold")
    wait_until(ready("Pong/seed0"), "the run")
    pool.kill()
    pool.wait()
    assert "1 running" in status("--games Pong --seeds 0-1")
    second = benchmark(arguments)
    assert second.returncode == 1 and "Pong/seed0 is run by another process" in second.stdout
    assert "2 runs: 1 done, 1 running" in second.stdout and begun("Pong/seed0") == 1
    subprocess.run(["pkill", "-KILL", "-f", f"{here}/o/Pong/seed0"], check=True)
    wait_until(lambda: "0 running" in status("--games Pong --seeds 0"), "its end")
    assert benchmark(arguments).returncode == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: '{"returns": 5}',
        lambda text: text.replace("7.5", "NaN"),
        lambda text: text.replace("7.0, 8.0", ""),
        lambda text: text.replace('"seed": 0', '"seed": 1'),
    ],
)
def test_a_spoilt_result_is_unfinished_and_named(spoil, here):
    arguments, path = "--games Pong --seeds 0 --out o", Path("o/Pong/seed0/result.json")
    assert benchmark(arguments).returncode == 0
    spoilt = spoil(path.read_text())
    path.write_text(spoilt)
    wrong = "result.json is half-written, no result or another run's"
    assert f"seed0 {wrong}" in status("--games Pong --seeds 0") and path.read_text() == spoilt
    again = benchmark(arguments)
    assert again.returncode == 0 and f"Pong/seed0: {wrong}; kept as" in again.stdout
    assert path.with_name("result.json.broken").read_text() == spoilt and "7.5" in path.read_text()


# --- SLURM, a real one


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment of a cluster of two nodes with a GPU each, made for these tests."""
    root = Path(f"/tmp/slurm-{os.getpid()}")  # short, for a socket's path
    up = subprocess.run([str(SLURM / "up.sh"), str(root)], capture_output=True, text=True)
    if up.returncode == 77 and not os.environ.get("SLURM_REQUIRED"):
        pytest.skip(up.stderr.splitlines()[-1])
    try:
        assert up.returncode == 0, up.stderr
        yield {"SLURM_CONF": str(root / "slurm.conf"), "SLURM_ROOT": str(root)}
    finally:
        subprocess.run([str(SLURM / "down.sh"), str(root)], check=True)


@pytest.fixture
def cluster(slurm, here, monkeypatch):
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")  # it is SLURM's to give
    yield here
    subprocess.run(["scancel", "--user", str(os.getuid())], check=True)
    wait_until(lambda: not queue(), "an empty queue")


def ask(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def queue() -> dict[str, str]:
    """Tasks that SLURM knows of, and their states."""
    lines = ask("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
    return dict(line.split() for line in lines)


def submit(arguments: str, script: str = "../stub.py", **env: str) -> str:
    """The number of the job array."""
    done = benchmark(f"--slurm {arguments}", script, **env)
    assert done.returncode == 0, done
    return re.search(r"Submitted batch job (\d+)", done.stdout)[1]


def test_slurm_packs_runs_and_collects_each_exit_status(cluster):
    arguments = "--games Pong,Krull,Qbert --seeds 0-1 --out o"
    what = "Krull/seed0=crash Qbert/seed0=kill"
    job = submit(f"--runs-per-gpu 2 {arguments}", STUB=what, SECONDS_EACH="1")
    twice = benchmark(f"--slurm {arguments}")
    assert twice.returncode == 1 and "nothing was submitted: wait, or scancel" in twice.stderr
    wait_until(lambda: not queue(), "the end of the array")
    codes = [re.search(r"ExitCode=(\S+)", ask("scontrol", "show", "job", f"{job}_{k}"))[1] for k in range(3)]  # fmt: skip
    assert codes == ["1:0", "1:0", "0:0"]  # Pong 0, Krull 0; Qbert 0, Pong 1; Krull 1, Qbert 1
    assert "6 runs: 4 done, 0 running, 2 failed" in status("--games Pong,Krull,Qbert --seeds 0-1")
    assert {span["device"] for span in spans()} == {"0"}
    submit(arguments)  # what is missing and nothing else; now a task each
    assert Path("o/slurm/tasks.txt").read_text() == "Krull/seed0\nQbert/seed0\n"
    wait_until(lambda: not queue(), "the end of the second array")
    assert benchmark(f"--status {arguments}").returncode == 0 and begun("Pong/seed0") == 1
    assert benchmark(f"--slurm {arguments}").returncode == 0 and not queue()


def test_slurm_without_gpus_and_what_it_refuses(cluster):
    odd = shlex.quote("a b%A 'c")
    submit(f"--games Pong,Hero --seeds 0 --out {odd} --jobs 2")
    wait_until(lambda: not queue(), "the end of the array")
    assert "CPU" in Path("a b%A 'c/Hero/seed0/log.txt").read_text()
    assert "2 done" in Path("a b%A 'c/slurm/task0.txt").read_text()
    done = benchmark("--slurm --games Pong --seeds 0 --out o --slurm-arg=--partition=nowhere")
    assert done.returncode == 1 and "invalid partition" in done.stderr.lower()
    done = benchmark("--slurm --games Pong --seeds 0 --out o", SLURM_CONF="/nowhere")
    assert done.returncode == 1 and "nothing was submitted" in done.stderr


# --- real runs


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


REAL = f"--preset tiny --out o -- --threads 1 {' '.join(FLAGS)}"


def held(*runs: str):
    return lambda: all(Path("o", run, "held").exists() for run in runs)


def test_a_run_of_an_interrupted_pool_comes_to_what_a_plain_run_comes_to(plain, here):
    arguments, run, gate = f"--games Pong --seeds 0 {REAL}", "Pong/seed0", str(here / "gate")
    pool = begin(arguments, "../held.py", GATE=gate)
    wait_until(held(run), "the middle of the run")
    os.killpg(pool.pid, signal.SIGINT)
    out, err = pool.communicate(timeout=60)
    assert pool.returncode == 130 and "1 runs: 0 done, 0 running, 0 failed" in out, err
    Path(gate).touch()
    assert benchmark(arguments, "../held.py", GATE=gate).returncode == 0
    assert "resumed after epoch 1" in log(run) and outcome(Path("o", run)) == plain(run)
    Path("o", run, "result.json").write_text("{")  # spoilt afterwards: it is finished once more
    assert benchmark(arguments, "../held.py", GATE=gate).returncode == 0
    assert outcome(Path("o", run)) == plain(run)


def test_slurm_requeued_and_cancelled_runs_come_to_what_plain_runs_come_to(plain, cluster):
    gate, (*crashed, cancelled) = cluster / "gate", ("Pong/seed0", "Krull/seed0", "Hero/seed0")
    arguments = f"--games Pong,Krull,Hero --seeds 0 --runs-per-gpu 2 {REAL}"
    since = time.monotonic()

    def tell(*words: str) -> None:
        print(f"{time.monotonic() - since:5.1f} s", *words, flush=True)

    job = submit(arguments, "../held.py", GATE=str(gate))
    wait_until(held(*crashed, cancelled), "the middle of the runs")
    tell(f"job {job}: a task of two runs and one of one are in the middle")

    # The node of the first task breaks down: its runs are killed without a warning, and SLURM queues the task again.
    node = ask("squeue", "--noheader", f"--jobs={job}_0", "--format=%N").strip()
    subprocess.run([str(SLURM / "down.sh"), os.environ["SLURM_ROOT"], "node", node], check=True)
    ask(
        "scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=crash"
    )  # sooner than SLURM would notice
    wait_until(lambda: "1 running" in status("--games Pong,Krull,Hero --seeds 0"), "the end of its runs")  # fmt: skip
    subprocess.run([str(SLURM / "up.sh"), os.environ["SLURM_ROOT"], "node", node], check=True)
    tell(f"node {node} crashed and is back")

    # The second task is cancelled: its run stops, and nobody queues it again.
    ask("scancel", f"{job}_1")
    wait_until(lambda: f"{job}_1" not in queue(), "the end of the cancelled task")
    assert "1 waiting" in status("--games Hero --seeds 0")
    tell(f"task {job}_1 was cancelled")

    # The task that crashed comes near its time limit: SLURM warns it, and it asks to be queued again.
    for run in crashed:
        Path("o", run, "held").unlink()
    wait_until(held(*crashed), "the requeued task")
    ask("scancel", "--signal=USR1", "--batch", f"{job}_0")
    wait_until(lambda: queue().get(f"{job}_0") != "RUNNING", "the task to stop")
    tell(f"task {job}_0 was requeued, ran, was warned and is queued again: {queue()}")
    assert f"{job}_0" in queue() and not Path("o", crashed[0], "result.json").exists()
    gate.touch()
    wait_until(lambda: not queue(), "the end of the array", 120)
    assert "3 runs: 2 done, 0 running, 0 failed, 1 waiting" in status("--games Pong,Krull,Hero --seeds 0")  # fmt: skip

    # The same call submits what is missing and nothing else.
    again = submit(arguments, "../held.py", GATE=str(gate))
    assert Path("o/slurm/tasks.txt").read_text() == f"{cancelled}\n"
    wait_until(lambda: not queue(), "the end of the second array", 120)
    tell(f"job {again} finished what was cancelled")
    assert [begun(run) for run in (*crashed, cancelled)] == [3, 3, 2]
    for run in (*crashed, cancelled):
        assert outcome(Path("o", run)) == plain(run), run
    tell("all three results are those of plain runs")

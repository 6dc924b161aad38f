"""The Atari 100k benchmark: runs of (game, seed), on this machine or as a SLURM job array.

A run may be killed at any moment: with --resume its script goes on from the last checkpoint. So
this program starts what is not finished and keeps what came of it, in the run's own folder alone:

    result.json     the run is done
    .runner.lock    locked for as long as the run lives, so no other runner starts it
    log.txt         its output, between lines that begin with `MARK` and say how each try went

On a cluster SLURM's job array is the engine: each task is this program over its share of the runs.
(submitit was considered: it has one function per task, and locally it starts all at once. It packs
no runs on a GPU, so it would not replace `pool`.)
Exit status: 0 all is done (--slurm: submitted), 1 not all, 2 bad input, 128 + n on signal n.
"""

import argparse
import collections
import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
GAMES = json.loads((HERE / "published.json").read_text())["games"]
MARK, TIME = "=== benchmark.sh: ", "%Y-%m-%d %H:%M:%S"
NVIDIA_SMI = "nvidia-smi --format=csv,noheader --query-gpu"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
OURS = "-h help preset seed env-id run-dir eval-only resume no-resume dry-run no-dry-run".split()
Job = collections.namedtuple("Job", "run process lock")


def die(text: str, status: int = 2):  # 2 for bad input, 1 where the machine or SLURM fails
    print(f"benchmark.sh: {'error' if status == 2 else 'failed'}: {text}", file=sys.stderr)
    sys.exit(status)


def games(text: str) -> list[str]:
    names = list(GAMES) if text == "all" else text.split(",")
    if unknown := [name for name in names if name not in GAMES]:
        die(f"--games: unknown game '{unknown[0]}'; known games: {' '.join(GAMES)}")
    return list(dict.fromkeys(names))


def seeds(text: str) -> list[int]:
    if re.fullmatch(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*", text, re.A):
        ranges = [range(int(a), int(b or a) + 1) for a, b in re.findall(r"(\d+)-?(\d*)", text)]
        if all(ranges) and sum(map(len, ranges)) <= 1000:
            return list(dict.fromkeys(seed for part in ranges for seed in part))
    die(f"--seeds must look like 0-4 or 0,1,7, at most 1000 seeds, not '{text}'")


def parse(argv: list[str]) -> argparse.Namespace:
    own = argv[: argv.index("--")] if "--" in argv else argv
    about = "26 games x 5 seeds. Repeat the same call to resume. What follows -- is passed to every run."
    parser = argparse.ArgumentParser("benchmark.sh", description=about, allow_abbrev=False)
    parser.error = lambda text: die(f"{text}; see --help. Arguments of the script go after --")
    add, one = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("--games", type=games, default="all", help="Pong,Krull,... (default: all 26)")
    add("--seeds", type=seeds, default="0-4", help="0-4 or 0,1,7 (default: 0-4)")
    add("--script", type=Path, default=HERE.parent / "jedi_atari.py", help="default: jedi_atari.py")
    add("--preset", default="paper", help="preset of the script (default: paper)")
    add("--out", help="folder of all runs (default: runs/<script>-<preset>)")
    one("--runs-per-gpu", type=int, metavar="K", help="runs at once on each GPU (default: 1)")
    one("--jobs", type=int, metavar="N", help="use the CPU only, N runs at once")
    add("--dry-run", action="store_true", help="print commands and GPU-hours; start nothing")
    add("--status", action="store_true", help="what is done, running, failed, waiting")
    add("--slurm", action="store_true", help="submit what is missing, by benchmark/slurm.sbatch")
    add("--slurm-arg", action="append", default=[], help="for sbatch: --slurm-arg=--partition=gpu")
    add("--runs-per-task", type=int, metavar="M", help="runs of each array task (default: K or N)")
    add("--task", type=Path, help=argparse.SUPPRESS)  # a file with the runs of each task
    options = parser.parse_args(own)
    options.extra = argv[len(own) + 1 :]
    for word in options.extra:  # as tyro reads them
        if word.partition("=")[0].replace("_", "-").removeprefix("--") in OURS:
            die(f"{word} may not follow --; use benchmark.sh's own option")
    for name in ("runs_per_gpu", "jobs", "runs_per_task"):
        if getattr(options, name) not in (None, *range(1, 1000)):
            die(f"--{name.replace('_', '-')} must be a whole number from 1 to 999")
    if (options.slurm_arg or options.runs_per_task) and not options.slurm:
        die("--slurm-arg and --runs-per-task go with --slurm")
    options.script = options.script.resolve()
    options.out = Path(options.out or f"runs/{options.script.stem}-{options.preset}").resolve()
    options.settings = shlex.join([options.script.name, "--preset", options.preset, *options.extra])
    return options


def prepare(options: argparse.Namespace, run: Path) -> None:
    """Make the folder, unless it has other runs or the script, asked on the CPU, rejects this."""
    ask = command_of(run, "", options, 1) + "--run-dir= --no-resume --device=cpu --dry-run".split()
    if subprocess.run(ask, stdout=subprocess.DEVNULL, start_new_session=True).returncode:
        die(f"{options.script} rejects this, see above; if a module is missing, set PYTHON=...")
    kept = options.out / "benchmark.txt"
    if not (options.dry_run or kept.exists() and kept.read_text()):
        options.out.mkdir(parents=True, exist_ok=True)
        with open(kept, "a") as file:  # of two runners at once the first one's line holds
            file.write(options.settings + "\n")
    there = kept.read_text().partition("\n")[0] if kept.exists() else ""
    if there not in ("", options.settings):
        die(f"--out has runs of '{there}', not of '{options.settings}'; choose another folder")


def name_of(run: Path) -> str:
    return f"{run.parent.name}/{run.name}"


def read_result(run: Path) -> tuple[dict | None, str]:
    """A valid result.json, or None and what is wrong with it ('' where there is none)."""
    path = run / "result.json"
    with contextlib.suppress(Exception):  # whatever is wrong with it
        result = json.loads(path.read_text())
        numbers = [result["mean_return"], result["wall_seconds"], *result["returns"]]
        whose = f"{result['env_id']}/seed{result['seed']}"
        if whose == name_of(run) and len(numbers) > 2 and sum(map(abs, numbers), 0.0) < 1e300:
            return result, ""
    return None, "result.json is incomplete, invalid or of another run" * path.exists()


def lock(run: Path, how: int = fcntl.LOCK_EX):
    """The open lock file, or None: another process has it. Always open where there are no locks."""
    file = open(run / ".runner.lock", "a" if how == fcntl.LOCK_EX else "r")
    for _ in range(5 if how == fcntl.LOCK_EX else 1):  # --status has it for a moment
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:
            return file
    return file.close()


def look(run: Path) -> tuple[str, str, dict | None, list[str]]:
    """done, running, failed or waiting; a note on it; the result; the end of the run's output."""
    (result, wrong), path = read_result(run), run / "log.txt"
    log = path.read_text(errors="replace") if path.is_file() else ""
    said = [line for part in log.split(MARK)[-2:] for line in part.splitlines()[1:] if line.strip()]
    state, text, last = "waiting", wrong, log.rpartition(MARK)[2]
    if result:
        state = "done"
    elif (run / ".runner.lock").exists() and not lock(run, fcntl.LOCK_SH):
        state, text = "running", "starting"
        if epochs := re.findall(r"^epoch ([1-9]\d*)/(\d+),", last, re.M):  # 0 trains nothing
            first, epoch, total = int(epochs[0][0]), *map(int, epochs[-1])
            each = (time.time() - (run / ".runner.lock").stat().st_mtime) / (epoch - first + 1)
            text = f"epoch {epoch}/{total}, {each * (total - epoch) / 3600:.1f} h left"
    elif last[20:26] == "failed":
        state, text = "failed", last[28:].partition("\n")[0]
    return state, text, result, [line[:300] for line in said[-5:]]


def show(options: argparse.Namespace, runs: list[Path]) -> int:
    """A line a game, the ends of the failed runs' logs, and how many are done; 0 if all are."""
    seen, states = {run: look(run) for run in runs}, ("done", "running", "failed", "waiting")
    total = collections.Counter(state for state, *_ in seen.values())
    for game in dict.fromkeys(run.parent.name for run in runs):
        mine = {run.name: seen[run] for run in runs if run.parent.name == game}
        n = collections.Counter(state for state, *_ in mine.values())
        scores = [result["mean_return"] for _, _, result, _ in mine.values() if result]
        mean = f"return {sum(scores) / len(scores):,.1f}" if scores else ""
        notes = [f"{name} {note}" for name, (s, note, *_) in mine.items() if note and s != "failed"]
        print(f"{game:<14}", *(f"{n[s]:3} {s}" for s in states), f" {mean:<16}", "; ".join(notes))
    for run, (state, text, _, end) in seen.items():
        if state == "failed":
            print(f"\n{name_of(run)} failed: {text}; {run}/log.txt ends:", *end, sep="\n    ")
    print(f"\n{options.out}\n{len(runs)} runs:", ", ".join(f"{total[s]} {s}" for s in states))
    return int(total["done"] < len(runs))


def find_slots(options: argparse.Namespace) -> tuple[list[str], int]:
    """The GPU of each run that goes at once ('' for the CPU), and a run's share of the cores."""
    found = filter(str.isdigit, subprocess.getoutput(f"{NVIDIA_SMI}=index").splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(found)).split(",")
    gpus = [gpu for gpu in visible if gpu not in ("", "-1", "NoDevFiles") and not options.jobs]
    if not gpus and not options.jobs and (options.task or options.runs_per_gpu):
        die("no GPU found; use --jobs, or with --slurm ask for one in benchmark/slurm.sbatch")
    slots = gpus * (options.runs_per_gpu or 1) or [""] * (options.jobs or 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):  # no container; "max", no limit
        cores = min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK", cores)))
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, (quota + period - 1) // period)
    return slots, max(1, cores // len(slots))


def command_of(run: Path, gpu: str, options: argparse.Namespace, threads: int) -> list[str]:
    words = ["--env-id", run.parent.name, "--seed", run.name.removeprefix("seed")]
    words += ["--preset", options.preset, "--run-dir", str(run), "--resume"]
    begun = (run / "args.json").exists()  # then its threads stay: on a CPU they change the result
    words += [] if begun or "--threads" in options.settings else ["--threads", str(threads)]
    # Without it a PyTorch that finds no GPU would train on the CPU, for weeks.
    words += ["--device", "cuda"] if gpu and "--device" not in options.settings else []
    return [sys.executable, str(options.script), *words, *options.extra]


def say(*words: object) -> None:
    with contextlib.suppress(OSError):  # a closed terminal or pipe ends no run
        print(time.strftime(TIME), *words, flush=True)


def note(run: Path, text: str, more: str = "") -> None:
    """To the log, where `look` finds it, and to the terminal."""
    with open(run / "log.txt", "a") as log:
        log.write(f"\n{MARK}{time.strftime(TIME)} {text}{more}\n")
    say(name_of(run), text)


def begin(run: Path, gpu: str, options: argparse.Namespace, threads: int) -> Job | None:
    """Begin a run or carry it on; None if it is done by now, or another process is at work on it."""
    run.mkdir(parents=True, exist_ok=True)
    if not (held := lock(run)):
        return say(name_of(run), "is being run by another process; skipped")
    result, wrong = read_result(run)
    if result:
        return held.close()
    if wrong:
        say(f"{name_of(run)}: {wrong}; kept as result.json.broken, the run is carried on")
        (run / "result.json").replace(run / "result.json.broken")
    command, where = command_of(run, gpu, options, threads), f"GPU {gpu}" if gpu else "CPU"
    os.utime(held.fileno())
    note(run, f"begun on {os.uname().nodename}, {where}", f": {shlex.join(command)}")
    # A session of its own: Ctrl-C reaches the runner alone. The run inherits the lock.
    how = dict(stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True)
    how |= dict(stdout=open(run / "log.txt", "a"), env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu})
    return Job(run, subprocess.Popen(command, pass_fds=[held.fileno()], **how), held)


def kill(job: Job, number: int) -> None:  # all processes of a run, which are a group of their own
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.process.pid, number)


def end(job: Job, stopped: bool) -> bool:
    """Note what came of a run whose process has ended. Did it fail?"""
    kill(job, signal.SIGKILL)  # what it left behind
    status, (result, wrong) = job.process.returncode, read_result(job.run)
    text = f"status {status}" if status >= 0 else f"killed by signal {-status}"
    if result:
        text = f"done: return {result['mean_return']:,.1f}"
    elif stopped or -status in SIGNALS or status == 130:
        text = f"stopped: {text}"
    else:
        said = look(job.run)[3] or ["no output"]
        text = f"failed: {text}, {said[-1] if status else wrong or 'no result'}"
    note(job.run, text)
    job.lock.close()
    return text.startswith("failed")


def pool(options: argparse.Namespace, runs: list[Path], slots: list[str], threads: int) -> int:
    """Fill the slots as they get free; what fails is tried once again. 0, or the signal that came."""
    todo, tries, jobs, signals = collections.deque(runs), collections.Counter(), {}, []
    for number in [n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN]:  # nohup
        signal.signal(number, lambda n, _: signals.append(n))
    try:
        while jobs or (todo and not signals):
            for slot, gpu in enumerate(slots):
                try:
                    if slot in jobs and jobs[slot].process.poll() is not None:
                        job = jobs.pop(slot)
                        if end(job, bool(signals)) and tries[job.run] < 2:
                            todo.append(job.run)
                    while slot not in jobs and todo and not signals:
                        tries[todo[0]] += 1
                        if job := begin(todo.popleft(), gpu, options, threads):
                            jobs[slot] = job
                except OSError as error:  # a folder that is gone or cannot be written
                    say(f"a run is left out: {error}")
            for job in jobs.values() if signals else ():  # a second signal is for one that hangs
                kill(job, signal.SIGKILL if len(signals) > 1 else signal.SIGTERM)
            time.sleep(0.2)
    finally:  # an error of this program leaves no run behind
        for job in jobs.values():
            kill(job, signal.SIGTERM)
    return signals[0] if signals else 0


def submit(options: argparse.Namespace, runs: list[Path], argv: list[str]) -> int:
    """Submit a job array of these runs, or print it with --dry-run; sbatch's exit status."""
    size = options.runs_per_task or options.runs_per_gpu or options.jobs or 1
    tasks = [" ".join(map(name_of, runs[i : i + size])) for i in range(0, len(runs), size)]
    path, name = options.out / f"slurm/{time.time_ns()}.runs", re.sub(r"\W", "-", str(options.out))
    log = str(path.parent).replace("%", "%%")  # % has a meaning to sbatch
    words = [f"--output={log}/%A_%a.txt", *(["--gres=none"] * bool(options.jobs))]
    words += [*options.slurm_arg, f"--job-name={name}", f"--array=0-{len(tasks) - 1}"]
    words += [str(HERE / "slurm.sbatch"), sys.executable, __file__, f"--task={path}", *argv]
    if options.dry_run:
        return print(shlex.join(["sbatch", *words]), *tasks, sep="\n  ") or 0
    if queued := subprocess.getoutput(f"squeue --me --noheader --name={name}"):
        die(f"nothing submitted (to end these: scancel --name={name}); squeue says:\n{queued}", 1)
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(tasks) + "\n")
    return int(subprocess.run(["sbatch", *words]).returncode > 0)


def cost(options: argparse.Namespace, runs: list[Path], missing: int, unit: str) -> str:
    """By the finished runs, else by a measurement of the paper preset on this kind of GPU."""
    done = [result["wall_seconds"] / 3600 for result, _ in map(read_result, runs) if result]
    each, k, source = sum(done) / max(len(done), 1), options.runs_per_gpu or 1, "the finished runs"
    if not done and options.settings == "jedi_atari.py --preset paper" and not options.jobs:
        cards = subprocess.getoutput(f"{NVIDIA_SMI}=name").splitlines()
        with contextlib.suppress(OSError, LookupError, TypeError, ValueError):
            for found in map(json.loads, open(HERE.parent / "results" / "speed.jsonl")):
                if found["device"] in cards and found.get("update_batch_size", 32) == 32:
                    each, k, source = float(found["projected_hours"]), 1, "speed.jsonl, one alone"
    hours = f"{missing * each / k:,.1f} ({each:.1f} a run, from {source})"
    todo = f"{missing} of {len(runs)} runs to do, {unit}-hours:"
    return f"{todo} {hours if each else 'not measured'}"


def main(argv: list[str]) -> int:
    options = parse(argv)
    # All games with the first seed before any with the second: half a benchmark has all games.
    names = [f"{game}/seed{seed}" for seed in options.seeds for game in options.games]
    if options.task:
        options.slurm, options.out = False, options.task.parent.parent
        tasks = options.task.read_text().splitlines()
        names = tasks[int(os.environ["SLURM_ARRAY_TASK_ID"])].split()
    runs = [options.out / name for name in names]
    if options.status:
        return show(options, runs)
    slots, threads = ([], 1) if options.slurm else find_slots(options)
    prepare(options, runs[0])
    missing = [run for run in runs if not read_result(run)[0]]
    if options.dry_run:
        for run in missing if slots else ():
            print(shlex.join(command_of(run, slots[0], options, threads)))
        print(cost(options, runs, len(missing), "run" if options.jobs or "" in slots else "GPU"))
    if options.dry_run or options.slurm:
        return submit(options, missing, argv) if options.slurm and missing else 0
    ended = pool(options, missing, slots, threads)
    if ended == signal.SIGUSR1 and options.task:  # the warning before the time limit
        os.system("scontrol requeue ${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID")
    status = show(options, runs)
    if ended:
        print(f"stopped by {signal.Signals(ended).name}; repeat the same call to resume")
    return 128 + ended if ended else status


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (OSError, UnicodeError, KeyboardInterrupt) as problem:  # Ctrl-C before the pool
        die(str(problem) or "stopped", 1 if str(problem) else 130)

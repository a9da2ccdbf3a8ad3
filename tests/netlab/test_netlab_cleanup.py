"""However a lab is left, nothing stays behind."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launch.netlab import Lab, LabError, LeftoverError
from launch.netlab.iproute import ip
from launch.netlab.leftovers import find_labs
from launch.netlab.signals import ENDING
from tests.netlab.conftest import ROOT, namespaces

# Builds a lab, starts a command that ignores TERM, says so, and waits.
OWNER = """
import signal, subprocess, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has it ignore
from launch.netlab import Lab
with Lab(2, "100mbit", name=sys.argv[1]) as lab:
    stubborn = "trap '' TERM; echo $$; while true; do sleep 0.1; done"
    process = lab.popen(1, ["bash", "-c", stubborn], stdout=subprocess.PIPE, text=True)
    print(process.stdout.readline().strip(), flush=True)
    for _ in range(600):  # a signal that comes just before a sleep waits for its end
        time.sleep(0.1)
"""


@pytest.fixture
def owner(lab_name):
    """A process with a lab, and the id of a process on its node 1."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, lab_name], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    yield process, int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()


def netlab(*words):
    return subprocess.run(
        [sys.executable, "-m", "launch.netlab", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )


def running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # a zombie has ended and waits for its parent to ask how


def test_normal_exit(make_lab, lab_name):
    before = [signal.getsignal(signum) for signum in ENDING]
    with make_lab(3) as lab:
        assert len(namespaces(lab_name)) == 4
        sleeper = lab.popen(1, ["sleep", "60"])
    assert namespaces(lab_name) == []
    assert sleeper.wait(timeout=60) == -signal.SIGTERM
    assert [signal.getsignal(signum) for signum in ENDING] == before
    lab.close()  # once more does nothing


def test_exception(make_lab, lab_name):
    with pytest.raises(KeyError), make_lab(2):
        raise KeyError
    assert namespaces(lab_name) == []


def test_failure_while_building(make_lab, lab_name, monkeypatch):
    lab = make_lab(3)
    add_node = lab.network._add_node
    monkeypatch.setattr(
        lab.network, "_add_node", lambda node: 1 / 0 if node == 2 else add_node(node)
    )
    with pytest.raises(ZeroDivisionError), lab:
        pass
    assert namespaces(lab_name) == []


@pytest.mark.parametrize("signum", ENDING, ids=lambda signum: signum.name)
def test_signals(owner, lab_name, signum):
    process, inner = owner
    process.send_signal(signum)
    status = process.wait(timeout=60)
    assert status == (-signum if signum == signal.SIGINT else 128 + signum)
    assert namespaces(lab_name) == []
    assert not running(inner)


def test_signals_during_clean_up_wait_for_its_end(owner, lab_name):
    process, inner = owner
    process.send_signal(signal.SIGTERM)
    for _ in range(5):  # clean-up takes 3 s here, for the command ignores TERM
        threading.Event().wait(0.2)
        process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert namespaces(lab_name) == []
    assert not running(inner)


def test_what_sigkill_leaves_is_cleaned(owner, lab_name):
    process, inner = owner
    refused = netlab("clean", "--name", lab_name)
    assert refused.returncode == 1
    assert f"process {process.pid}, which is running" in refused.stderr
    assert "--force" in refused.stderr
    process.kill()
    process.wait()
    assert len(namespaces(lab_name)) == 3
    assert f"{lab_name}: " in netlab("list").stdout
    with pytest.raises(
        LeftoverError, match=r"has ended; run `python -m launch.netlab clean --name"
    ):
        Lab(2, name=lab_name).__enter__()
    done = netlab("clean", "--name", lab_name)
    assert done.returncode == 0
    assert f"removed {lab_name}0, {lab_name}1, {lab_name}-netlab" in done.stdout
    assert namespaces(lab_name) == []
    assert not running(inner)
    assert "nothing to clean" in netlab("clean", "--name", lab_name).stdout


def test_two_labs_of_one_name(make_lab, lab_name):
    with make_lab(2) as lab:
        with pytest.raises(LeftoverError, match="is running; give this lab another name"):
            make_lab(2).__enter__()
        assert len(namespaces(lab_name)) == 3  # the first lab is whole
        assert len(lab.counters()) == 2


def test_a_namespace_of_others_is_never_removed(make_lab, lab_name):
    theirs = f"{lab_name}1"
    ip(f"netns add {theirs}")
    try:
        with pytest.raises(LeftoverError, match=f"ip netns del {theirs}"):
            make_lab(2).__enter__()
        assert namespaces(lab_name) == [theirs]
    finally:
        ip(f"netns del {theirs}")


def test_a_switch_without_a_record_takes_force(lab_name):
    ip(f"netns add {lab_name}-netlab")  # its owner was killed before it could write one
    with pytest.raises(LeftoverError, match="--force"):
        Lab(2, name=lab_name).__enter__()
    (record,) = (record for record in find_labs() if record.name == lab_name)
    assert "unknown owner" in record.owner
    assert netlab("clean", "--name", lab_name).returncode == 1
    assert netlab("clean", "--name", lab_name, "--force").returncode == 0
    assert namespaces(lab_name) == []


def test_a_fork_does_not_remove_its_parents_lab(make_lab, lab_name):
    with make_lab(1) as lab:
        child = os.fork()
        if child == 0:
            lab.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert len(namespaces(lab_name)) == 2


def test_a_thread_can_own_a_lab(make_lab, lab_name):
    seen = []

    def work():
        with make_lab(1):
            seen.extend(namespaces(lab_name))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=60)
    assert len(seen) == 2
    assert namespaces(lab_name) == []


def test_a_command_that_is_missing_names_the_remedy(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LabError, match="install iproute2, or say --link none"):
        ip("netns list")

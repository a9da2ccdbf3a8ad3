import json
import sys
import threading
import time
from pathlib import Path

import pytest

from launch.netlab import Fault, FaultPlan, Lab
from tests.netlab.conftest import wait_until

TICK = "import sys, time\nwhile True: open(sys.argv[1], 'a').write('x'); time.sleep(0.01)"


class Recorder:
    """Stands in for a lab and remembers what was done to it."""

    nodes = 2

    def __init__(self):
        self.done = []

    def __getattr__(self, action):
        return lambda node, *rest: self.done.append((action, node, *rest))


class Run:
    """A run's metrics.jsonl."""

    def __init__(self, path):
        self.path = path

    def record(self, step):
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "loss": 1.0}) + "\n")


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "metrics.jsonl")


def test_faults_come_at_their_step_and_once(run):
    lab = Recorder()
    plan = FaultPlan.parse(["3:slow:0:0.25", "2:pause:1", "5:cut:1"])
    with plan.follow(lab, run.path):
        time.sleep(0.1)  # the file is not there yet
        run.record(1)
        time.sleep(0.1)
        assert lab.done == []
        run.record(2)
        wait_until(lambda: lab.done == [("pause", 1)])
        with run.path.open("a") as file:
            file.write('{"step": 5')  # a line that is still being written
        time.sleep(0.1)
        assert lab.done == [("pause", 1)]
        with run.path.open("a") as file:
            file.write("}\n")
        wait_until(lambda: len(lab.done) == 3)
    assert lab.done[1:] == [("slow", 0, 0.25), ("cut", 1)]
    assert [step for _, step in plan.applied] == [2, 5, 5]


def test_a_fault_with_a_length_is_undone_though_the_run_stands_still(run):
    lab = Recorder()
    run.record(7)
    with FaultPlan([Fault(0, "cut", 1, for_s=0.2)]).follow(lab, run.path):
        wait_until(lambda: lab.done == [("cut", 1), ("mend", 1)])


def test_a_fault_is_undone_when_the_run_ends_before_it(run):
    lab = Recorder()
    run.record(7)
    with FaultPlan.parse(["7:slow:1:0.5:60"]).follow(lab, run.path):
        wait_until(lambda: len(lab.done) == 1)
    assert lab.done == [("slow", 1, 0.5), ("resume", 1)]


def test_an_error_in_a_fault_is_raised_at_the_end(run):
    with Lab(2, "none") as lab:
        run.record(0)
        plan = FaultPlan.parse(["0:cut:1"])
        with pytest.raises(RuntimeError, match="give the lab a rate"), plan.follow(lab, run.path):
            time.sleep(0.2)
    assert threading.active_count() == 1 or not plan.applied


@pytest.mark.parametrize(
    "text",
    ["1:cut", "x:cut:1", "1:explode:1", "-1:cut:0", "1:slow:0", "1:slow:0:1.5", "1:mend:0:3"],
)
def test_bad_faults_are_refused(text):
    with pytest.raises(ValueError, match="STEP:ACTION:NODE"):
        Fault.parse(text)


def test_a_fault_for_a_node_that_is_not_there(run):
    plan = FaultPlan.parse(["1:cut:2"])
    with pytest.raises(ValueError, match="from 0 to 1"), plan.follow(Recorder(), run.path):
        pass


@pytest.fixture(params=["none", "100mbit"])
def lab(request, lab_name):
    with Lab(2, request.param, name=lab_name) as lab:
        yield lab


def test_a_paused_node_stands_still_and_the_other_goes_on(lab, tmp_path):
    files = [tmp_path / "0", tmp_path / "1"]
    for node, file in enumerate(files):
        # In a session of its own, as ranks of torchrun are.
        lab.popen(node, ["setsid", "--fork", sys.executable, "-c", TICK, str(file)])
    size = lambda node: files[node].stat().st_size if files[node].exists() else 0
    wait_until(lambda: size(0) > 3 and size(1) > 3)
    lab.pause(1)
    time.sleep(0.1)
    before = size(0), size(1)
    wait_until(lambda: size(0) > before[0] + 3)
    assert size(1) == before[1]
    lab.resume(1)
    wait_until(lambda: size(1) > before[1] + 3)


def test_a_slowed_node_runs_for_its_share_of_the_time(lab, tmp_path):
    busy = lab.popen(0, [sys.executable, "-c", TICK, str(tmp_path / "ticks")])
    wait_until((tmp_path / "ticks").exists)
    lab.slow(0, duty=0.3, jitter=0.5, seed=1)
    stopped = 0
    for _ in range(300):
        state = Path(f"/proc/{busy.pid}/stat").read_text().rpartition(")")[2].split()[0]
        stopped += state == "T"
        time.sleep(0.005)
    assert 0.5 < stopped / 300 < 0.9
    lab.resume(0)
    size = (tmp_path / "ticks").stat().st_size
    wait_until(lambda: (tmp_path / "ticks").stat().st_size > size + 10)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"duty": 0}, "duty"),
        ({"duty": 1}, "duty"),
        ({"period_s": 0}, "period_s"),
        ({"jitter": 2}, "jitter"),
    ],
)
def test_bad_slowdowns_are_refused(options, field):
    with Lab(1, "none") as lab, pytest.raises(ValueError, match=f"{field}: got"):
        lab.slow(0, **options)

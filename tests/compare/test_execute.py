"""The order of things around a run, with a lab that only pretends."""

from types import SimpleNamespace

import pytest

from launch.compare import execute, plan
from launch.compare.execute import Executor
from launch.interface import VARIABLE
from launch.netlab import DeadlineError, NodeResult


class FakeLab:
    """``ends`` says by configuration how a run ends: well if it is not there."""

    nodes = 2

    def __init__(self, ends=None, interface="lab0"):
        self.ends = ends or {}
        self.network = SimpleNamespace(interface=interface)
        self.calls = []
        self.sent = 0

    def counters(self):
        return [SimpleNamespace(tx_bytes=self.sent + node) for node in range(self.nodes)]

    def torchrun(self, script, words, *, deadline_s, ranks_per_node, env, logs):
        out = logs.parent
        name = out.name.partition("-")[0]
        self.calls.append(SimpleNamespace(name=name, deadline_s=deadline_s, env=env, words=words))
        self.sent += 1000
        end = self.ends.get(name, "")
        if isinstance(end, BaseException):
            raise end
        (out / "checkpoints" / "step_000010").mkdir(parents=True)
        if not end:
            (out / "summary.json").write_text("{}")
        return [NodeResult(0, 0, ""), NodeResult(1, int(bool(end)), end)]


def run(tmp_path, lab, recipes=("sign",), seeds=2, deadline_s=None):
    paths = [plan.ROOT / "configs" / f"{name}.yaml" for name in recipes]
    trials = plan.order(plan.choose(paths, []), seeds, 1, tmp_path)
    outcomes = []
    try:
        Executor(lab, 10, ["model.width=32"], 1, deadline_s).run_all(trials, outcomes.append)
    finally:
        lab.outcomes = [(o.trial.configuration.name, o.status, o.error) for o in outcomes]
    return outcomes


def test_all_finish(tmp_path):
    lab = FakeLab()
    outcomes = run(tmp_path, lab)
    assert [outcome.status for outcome in outcomes] == ["finished"] * 6
    assert outcomes[0].link_bytes == [1000, 1000]
    assert not list(tmp_path.glob("runs/*/checkpoints"))
    assert {call.env[VARIABLE] for call in lab.calls} == {"lab0"}


def test_loopback_counts_no_bytes(tmp_path):
    lab = FakeLab(interface="lo")
    assert run(tmp_path, lab)[0].link_bytes == []
    assert {call.env[VARIABLE] for call in lab.calls} == {""}


def test_a_failure_does_not_stop_the_others_and_is_tried_again(tmp_path):
    lab = FakeLab({"sign": "Traceback\nRuntimeError: boom"})
    run(tmp_path, lab)
    told = [outcome for outcome in lab.outcomes if outcome[0] == "sign"]
    assert told == [("sign", "failed", "RuntimeError: boom")] * 2
    assert [call.name for call in lab.calls].count("sign") == 2
    assert [status for name, status, _ in lab.outcomes if name != "sign"] == ["finished"] * 4


def test_what_was_refused_is_not_tried_again(tmp_path):
    lab = FakeLab({"sign": "error on rank 0: scheme.scale='l3'"})
    run(tmp_path, lab)
    assert [call.name for call in lab.calls].count("sign") == 1
    told = [outcome for outcome in lab.outcomes if outcome[0] == "sign"]
    assert told == [("sign", "failed", "error on rank 0: scheme.scale='l3'")] * 2


def test_a_hang_is_told_with_what_was_printed_last(tmp_path):
    error = DeadlineError("deadline_s: not done after 9 s, so ended\n--- node 0\nOSError: slow")
    lab = FakeLab({"sign": error})
    run(tmp_path, lab, seeds=1)
    (told,) = [outcome for outcome in lab.outcomes if outcome[0] == "sign"]
    assert told[2] == "hung: deadline_s: not done after 9 s, so ended; OSError: slow"


def test_deadline_follows_plain_ddp(tmp_path):
    lab = FakeLab()
    run(tmp_path, lab, seeds=1)
    ddp, *others = [call.deadline_s for call in lab.calls]
    assert ddp == execute.FIRST_DEADLINE_S
    assert all(120 <= deadline < 130 for deadline in others)
    lab = FakeLab()
    run(tmp_path / "other", lab, seeds=1, deadline_s=7.0)
    assert {call.deadline_s for call in lab.calls} == {7.0}


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interruption_keeps_what_had_finished(tmp_path, stop):
    lab = FakeLab({"sign": stop})
    with pytest.raises(type(stop)):
        run(tmp_path, lab)
    assert lab.outcomes == [("ddp", "finished", None), ("sign", "interrupted", "interrupted")]

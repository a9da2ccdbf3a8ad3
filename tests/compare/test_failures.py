import pytest

from launch.compare.failures import find_error

TRACE = """\
[rank1]: Traceback (most recent call last):
[rank1]:   File "x.py", line 92, in hook
[rank1]: IndexError: invalid index of a 0-dim tensor
"""
PEER = "[rank0]: RuntimeError: [gloo/tcp/pair.cc:547] Connection closed by peer [10.77.0.101]\n"
LAUNCHER = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n====\n"
ABORT = """\
terminate called after throwing an instance of 'gloo::EnforceNotMet'
  what():  [enforce fail at pair.cc:446] op.preamble.length <= op.nbytes. 12800 vs 9984.
"""
BARE = """\
[rank0]:   File "/v/powerSGD_hook.py", line 26, in _orthogonalize
[rank0]:     raise AssertionError
[rank0]: AssertionError
Exception raised from recvBytes at Utils.hpp:787 (most recent call first):
"""


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ([PEER + LAUNCHER, TRACE + LAUNCHER], "IndexError: invalid index of a 0-dim tensor"),
        ([TRACE, PEER], "IndexError: invalid index of a 0-dim tensor"),
        ([PEER, LAUNCHER], "RuntimeError: [gloo/tcp/pair.cc:547] Connection closed by peer"),
        ([PEER, ABORT], "what():  [enforce fail at pair.cc:446] op.preamble.length <= op.nbytes."),
        (
            ["ValueError: first\nOSError: then", "error on rank 3: scheme.rank=0 must be >= 1"],
            "error on rank 3: scheme.rank=0 must be >= 1",
        ),
        ([BARE + PEER, PEER], "AssertionError in powerSGD_hook.py:26, _orthogonalize"),
        (["traceback : Signal 11 (SIGSEGV) received by PID 7"], "Signal 11 (SIGSEGV)"),
        (["  3%|   | 1/30\r  6%| | 2/30\rValueError: after a bar"], "ValueError: after a bar"),
    ],
)
def test_the_line_that_tells_most_is_found(outputs, expected):
    assert find_error(outputs).startswith(expected)


def test_words_in_passing_are_not_errors():
    assert find_error(["the Error: of our ways", "loss=0.5", LAUNCHER]) is None


def test_long_lines_are_cut():
    assert len(find_error(["ValueError: " + "x" * 10_000])) == 400

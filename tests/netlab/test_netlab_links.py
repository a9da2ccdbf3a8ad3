"""Facts about the emulated network: what it lets through, and what it counts."""

import subprocess
import sys
import time

import pytest

from launch.netlab import Lab, LabError, probe
from tests.netlab.conftest import TRANSFER, transfer, transfers, wait_until

MEGABYTE = 1_000_000


def best_ratio(lab, sender, receiver, rate):
    """Measured over set rate, of three half-second transfers the one nearest to 1."""
    count = rate // 16
    ratios = [transfer(lab, sender, receiver, count) / rate for _ in range(3)]
    return min(ratios, key=lambda ratio: abs(ratio - 1))


def test_each_node_sends_and_receives_at_its_own_rate(make_lab):
    with make_lab(3, ["100mbit", "20mbit", "100mbit"]) as lab:
        assert 0.8 < best_ratio(lab, 0, 2, 100 * MEGABYTE) < 1.1
        assert 0.8 < best_ratio(lab, 0, 1, 20 * MEGABYTE) < 1.1  # the slow node receives
        assert 0.8 < best_ratio(lab, 1, 0, 20 * MEGABYTE) < 1.1  # the slow node sends


def test_a_link_carries_both_directions_at_once(make_lab):
    rate, count = 50 * MEGABYTE, 6 * MEGABYTE
    with make_lab(2, "50mbit") as lab:
        there_and_back = (transfers(lab, [(0, 1), (1, 0)], count) for _ in range(3))
        assert max(map(min, there_and_back)) > 0.85 * rate


_ASK = """
import socket, sys
control = lambda s: s.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\\0").decode()
if sys.argv[1] == "accept":
    connection, _ = socket.create_server(("", int(sys.argv[2]))).accept()
else:
    connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
print(control(connection))
"""


@pytest.mark.parametrize("options", [{}, {"congestion_control": "reno"}])
def test_both_ends_use_the_congestion_control_that_was_asked_for(make_lab, options):
    wanted = options.get("congestion_control", "cubic")
    with make_lab(2, **options) as lab:
        assert f"TCP {wanted}" in lab.describe()
        port = str(lab.network.port())
        words = [sys.executable, "-c", _ASK]
        accepting = lab.popen(1, [*words, "accept", port], stdout=subprocess.PIPE, text=True)
        wait_until(lambda: _listens(lab, 1, port))
        asking = lab.popen(
            0, [*words, lab.network.address(1), port], stdout=subprocess.PIPE, text=True
        )
        ends = [process.communicate(timeout=20)[0].strip() for process in (accepting, asking)]
    assert ends == [wanted, wanted]


def _listens(lab, node, port):
    words = lab.network.command(node, ["cat", "/proc/net/tcp"])
    listening = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return f":{int(port):04X} 00000000:0000 0A" in listening


def test_counters_hold_the_payload_and_little_more(make_lab):
    count = 4 * MEGABYTE
    with make_lab(3) as lab:
        before = lab.counters()
        transfer(lab, 0, 2, count)
        sent, bystander, received = (
            now - then for now, then in zip(lab.counters(), before, strict=True)
        )
    for seen in (sent.tx_bytes, received.rx_bytes):
        assert count < seen < 1.1 * count
    assert sent.tx_packets >= count / 1448  # frames of the wire, not TCP's super-packets
    assert received.rx_bytes <= sent.tx_bytes + 1000
    assert bystander.rx_bytes + bystander.tx_bytes < 2000


def test_a_cut_stalls_a_transfer_and_mending_continues_it(make_lab):
    words = [sys.executable, str(TRANSFER)]
    with make_lab(2) as lab:
        port = str(lab.network.port())
        receiver = lab.popen(1, [*words, "receive", port], stdout=subprocess.DEVNULL)
        lab.popen(0, [*words, "send", lab.network.address(1), port, "0"])
        received = lambda: lab.counters()[1].rx_bytes
        wait_until(lambda: received() > MEGABYTE)
        lab.cut(1)
        time.sleep(0.2)
        stalled = received()
        time.sleep(0.5)
        assert received() == stalled
        lab.mend(1)
        wait_until(lambda: received() > stalled + MEGABYTE)
        assert receiver.poll() is None  # the connection never broke


def test_describe_names_the_rates(make_lab):
    assert "links of 100mbit each way" in make_lab(2).describe()
    assert "100mbit, 20mbit" in make_lab(2, "100mbit,20mbit").describe()


def test_delay_needs_netem(make_lab):
    if not probe().netem:
        with pytest.raises(LabError, match="no netem"), make_lab(2, delay="20ms"):
            pass
        return
    with make_lab(2, delay="20ms") as lab:
        began = time.monotonic()
        transfer(lab, 0, 1, 1)
        assert time.monotonic() - began > 0.04


def test_loopback_says_that_nothing_is_emulated():
    with Lab(2, "none") as lab:
        assert "no link is emulated" in lab.describe()
        assert transfer(lab, 0, 1, MEGABYTE) > 0
        for refused in (lab.counters, lambda: lab.cut(0)):
            with pytest.raises(LabError, match="give the lab a rate"):
                refused()
    with pytest.raises(ValueError, match="link: got 'none'"):
        Lab(2, "none", delay="1ms")


def test_more_nodes_than_memory_allows():
    with pytest.raises(ValueError, match=r"nodes: got 90, which need about 90000.0 GB"):
        Lab(90, "none", rank_megabytes=1e6)


@pytest.mark.parametrize(
    ("nodes", "options", "message"),
    [
        (0, {}, "nodes: got 0"),
        (101, {"rank_megabytes": 0}, "at most 100"),
        (2, {"name": "lab1"}, "a letter first and last"),
        (2, {"name": "Lab/x"}, "a letter first and last"),
        (2, {"link": "100mbps"}, "write it like 100mbit"),
        (
            2,
            {"congestion_control": "vegan"},
            "congestion_control: got 'vegan', but this kernel has",
        ),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_built(nodes, options, message):
    with pytest.raises(ValueError, match=message):
        Lab(nodes, **options)

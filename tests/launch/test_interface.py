import socket

import pytest

from launch.interface import KEYS, VARIABLE, InterfaceMeter, meter_from_environment, read_interface
from launch.rundir import read_records

SIZE = 100_000


def send_over_loopback():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as socket_:
        for _ in range(SIZE // 1000):
            socket_.sendto(bytes(1000), ("127.0.0.1", 9))


def test_traffic_of_a_step_is_counted(tmp_path):
    meter = InterfaceMeter("lo", tmp_path / "interface" / "a.jsonl", resume=False)
    send_over_loopback()  # before the step: not counted, but others may use loopback meanwhile
    meter.start()
    send_over_loopback()
    meter.stop(7, wire_bytes=None)
    (record,) = read_records(tmp_path / "interface" / "a.jsonl")
    assert list(record) == ["step", *KEYS, "wire_bytes"]
    assert record["step"] == 7
    assert record["wire_bytes"] is None
    assert record["tx_bytes"] >= SIZE
    assert record["tx_packets"] >= SIZE // 1000


@pytest.mark.parametrize(("resume", "steps"), [(False, [2]), (True, [1, 2])])
def test_a_resumed_run_keeps_what_it_had(tmp_path, resume, steps):
    path = tmp_path / "a.jsonl"
    InterfaceMeter("lo", path, resume=False).stop(1, 0)
    InterfaceMeter("lo", path, resume=resume).stop(2, 0)
    assert [record["step"] for record in read_records(path)] == steps


def test_only_the_first_rank_of_a_machine_counts_and_only_if_asked(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert meter_from_environment(tmp_path, 0, 0, False) is None
    monkeypatch.setenv(VARIABLE, "lo")
    assert meter_from_environment(tmp_path, 3, 1, False) is None
    assert meter_from_environment(tmp_path, 2, 0, False) is not None
    assert (tmp_path / "interface" / "rank_0002.jsonl").is_file()


def test_unknown_interface_is_named():
    with pytest.raises(ValueError, match=r"COMMKIT_INTERFACE: got 'nic9', but .*\blo\b.* unset"):
        read_interface("nic9")

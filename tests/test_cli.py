import json
import os
import re
import subprocess
import sys

import pytest

from commkit import cli
from commkit.registry import names


def test_every_scheme_is_listed_with_measured_bytes(capsys):
    assert cli.main(["schemes", "--json"]) == 0
    cards = {card["name"]: card for card in json.loads(capsys.readouterr().out)}
    assert sorted(cards) == names("scheme")
    assert all(card["description"] for card in cards.values())
    for card in cards.values():
        assert ("DDP" in card["wrappers"]) == (card["every"] == "step")
    assert cards["async_local_sgd"]["every"] == "task"
    assert 4_000_000 <= cards["async_local_sgd"]["payload_bytes"] < 4_000_100  # each way
    assert cards["async_local_sgd"]["state_bytes"] == (12 + 4) / 2  # the server's, a worker's
    assert cards["dadao"]["payload_bytes"] is None
    assert cards["dadao"]["wrappers"] == ["Python alone"]
    for name in ("post_local_sgd", "single_merge", "dfedsam_mgs"):
        assert cards[name]["state_bytes"] == 0
    # On two ranks: an all-reduce, one meeting, four messages to one neighbour.
    for name, times in (("post_local_sgd", 1), ("single_merge", 1), ("dfedsam_mgs", 4)):
        assert 0 <= cards[name]["wire_bytes"] - times * 4_000_000 < 1000
    assert 4_000_000 <= cards["diloco"]["payload_bytes"] < 4_000_100
    assert cards["diloco"]["state_bytes"] == 8
    assert cards["ddp"]["payload_bytes"] == 4_000_000
    assert cards["ddp"]["wire_bytes"] == 4_000_000  # 2 (W-1)/W at W = 2
    assert cards["noop"]["payload_bytes"] == cards["ddp"]["state_bytes"] == 0
    assert cards["powersgd"]["payload_bytes"] == 4 * 4 * (1000 + 1000)  # rank 4, P and Q
    assert cards["powersgd"]["state_bytes"] == pytest.approx(4 + 4 * 4 / 1000)
    assert cards["sign"]["state_bytes"] == pytest.approx(4 + 4 / 2)
    assert cards["powersgd"]["paper"] == "Vogels et al. 2019"
    assert cards["compose"]["payload_bytes"] is None


def test_schemes_are_a_table(capsys):
    assert cli.main(["schemes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"name +per +payload/M", lines[0])
    assert {line.split()[0] for line in lines[1 : len(names("scheme")) + 1]} == set(names("scheme"))


def test_doctor_says_what_is_there(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"]
    assert found["backends"]["gloo"] is True
    assert set(found["kernels"].values()) <= {"pure-torch reference", "compiled"}
    for library in ("library", "CUDA library"):
        assert found["compiled kernels"][library].startswith(("loaded", "none: "))
    assert "labs" in found["netlab"]
    assert cli.main(["doctor"]) == 0
    assert "pure-torch reference" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["comprae"]])
def test_unknown_command_lists_the_known(capsys, words):
    assert cli.main(words) == 2
    assert "schemes" in capsys.readouterr().err


def test_help_lists_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    assert "compare" in capsys.readouterr().out


def test_compare_without_a_checkout_says_how_to_get_one(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "_CHECKOUT", tmp_path)
    assert cli.main(["compare", "a.yaml"]) == 2
    assert re.search(r"launch/.*clone the repository", capsys.readouterr().err)
    assert cli.main(["doctor"]) == 0
    assert "no launch/ directory" in capsys.readouterr().out


def test_missing_tyro_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert cli.main(["schemes"]) == 2
    assert "pip install 'commkit[report]'" in capsys.readouterr().err


def test_compare_forwards_its_arguments(capsys, tmp_path):
    words = ["configs/nothing.yaml", "--out", str(tmp_path), "--link", "none"]
    assert cli.main(["compare", *words]) == 2
    assert "config: 'configs/nothing.yaml' does not exist" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="pipes of Windows raise other errors")
@pytest.mark.parametrize("command", ["doctor", "schemes"])
def test_a_reader_that_goes_away_is_no_traceback(command):
    program = [sys.executable, "-m", "commkit.cli", command]
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            program, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_broken_pipe_of_another_kind_is_raised(monkeypatch):
    def fail(words):
        raise BrokenPipeError("a peer is gone")

    monkeypatch.setattr(cli, "doctor", fail)
    with pytest.raises(BrokenPipeError, match="a peer is gone"):
        cli.main(["doctor"])

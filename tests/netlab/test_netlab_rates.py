import pytest

from launch.netlab.rates import format_rate, parse_link, parse_rate, parse_share, parse_time
from launch.netlab.shaping import MTU, Impairment, burst_bytes, piece_bytes, queue_commands


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("100mbit", 100_000_000),
        ("1gbit", 1_000_000_000),
        ("50kbit", 50_000),
        ("64000bit", 64_000),
        ("2.5Gbit", 2_500_000_000),
        (" 10 Mbit/s ", 10_000_000),
    ],
)
def test_rates_are_read_and_written(text, rate):
    assert parse_rate(text) == rate
    assert parse_rate(format_rate(rate)) == rate


@pytest.mark.parametrize(
    "text", ["100", "mbit", "100mbps", "100MB", "1tbit", "-5mbit", "", "1e3bit"]
)
def test_what_is_no_rate_is_refused_with_the_units(text):
    with pytest.raises(ValueError, match=r"link: got .*kbit, mbit, gbit; write it like 100mbit"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["0mbit", "1bit", "1000gbit"])
def test_rates_out_of_range_are_refused(text):
    with pytest.raises(ValueError, match="8kbit to 100gbit"):
        parse_rate(text)


def test_one_rate_is_for_all_nodes_and_several_are_one_for_each():
    assert parse_link("1mbit", 3) == [1_000_000] * 3
    assert parse_link("1mbit,2mbit", 2) == parse_link(["1mbit", "2mbit"], 2)
    assert parse_link("none", 4) is None
    with pytest.raises(ValueError, match="got 2 rates for 3 nodes"):
        parse_link("1mbit,2mbit", 3)
    with pytest.raises(ValueError, match="'none' is for all nodes"):
        parse_link("1mbit,none", 2)


def test_times_and_shares():
    assert parse_time("20ms", "delay") == 0.02
    assert parse_time("150us", "delay") == pytest.approx(150e-6)
    assert parse_share("0.5%", "loss") == 0.005
    with pytest.raises(ValueError, match="delay: got '20'"):
        parse_time("20", "delay")
    with pytest.raises(ValueError, match="at most 100%"):
        parse_share("120%", "loss")


def test_jitter_needs_a_delay_that_is_longer():
    with pytest.raises(ValueError, match="raise delay"):
        Impairment.parse("1ms", "2ms", None)


def test_nothing_is_sent_faster_than_the_rate_for_longer_than_three_milliseconds():
    (words,) = queue_commands("lab0", 100_000_000)
    assert words == (
        "qdisc add dev lab0 root handle 1: tbf rate 100000000bit burst 37500b limit 1287500b"
    )


def test_at_low_rates_a_packet_still_fits():
    (words,) = queue_commands("lab0", 50_000)
    assert "burst 2048b" in words


@pytest.mark.parametrize("rate", [50_000, 10**6, 10**7, 5 * 10**7, 10**8, 10**9, 10**11])
def test_pieces_of_a_stream_fit_the_burst_with_their_headers(rate):
    piece = piece_bytes(rate)
    packets = -(-piece // (MTU - 52))
    assert piece + 66 * packets <= burst_bytes(rate)
    assert MTU <= piece <= 65536


def test_netem_goes_inside_the_token_bucket():
    outer, inner = queue_commands("lab0", 10**7, Impairment.parse("20ms", "2ms", "0.1%"))
    assert "root handle 1: tbf" in outer
    assert inner == (
        "qdisc add dev lab0 parent 1: handle 10: netem limit 100000 "
        "delay 20000us 2000us loss 0.100000%"
    )

"""Rates, times and shares as people write them: ``100mbit``, ``20ms``, ``1%``."""

from collections.abc import Sequence

from commkit.cost.units import RATE_UNITS, TIME_UNITS, read_quantity

NO_LINK = "none"
LOWEST_RATE = 8_000  # bit/s: a full packet takes 1.5 s
HIGHEST_RATE = 100_000_000_000  # bit/s


def parse_rate(text: str, field: str = "link") -> int:
    """``"100mbit"`` as bits per second.

    Raises:
        ValueError: no number, an unknown unit, or out of 8 kbit/s to 100 Gbit/s.
    """
    number, unit = read_quantity(
        text.lower().strip().removesuffix("/s"), field, RATE_UNITS, "100mbit", text
    )
    rate = round(number * RATE_UNITS[unit])
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise ValueError(
            f"{field}: got {text!r}, but rates go from 8kbit to 100gbit; give one in between"
        )
    return rate


def parse_link(link: str | Sequence[str], nodes: int) -> list[int] | None:
    """Bits per second of each node, or None for ``"none"``, which is loopback.

    Args:
        link: one rate for all nodes, or one for each (a sequence, or text with commas).
        nodes: how many nodes there are.

    Raises:
        ValueError: a rate is wrong or their number is neither 1 nor ``nodes``.
    """
    words = link.split(",") if isinstance(link, str) else list(link)
    if words == [NO_LINK]:
        return None
    if NO_LINK in words:
        raise ValueError(
            f"link: got {link!r}; 'none' is for all nodes, give a rate to each or none"
        )
    rates = [parse_rate(word) for word in words]
    if len(rates) not in (1, nodes):
        raise ValueError(
            f"link: got {len(rates)} rates for {nodes} nodes; give one rate, or one for each node"
        )
    return rates * nodes if len(rates) == 1 else rates


def parse_time(text: str, field: str) -> float:
    """``"20ms"`` as seconds.

    Raises:
        ValueError: no number or an unknown unit.
    """
    number, unit = read_quantity(text.lower(), field, TIME_UNITS, "20ms", text)
    return number * TIME_UNITS[unit]


def parse_share(text: str, field: str) -> float:
    """``"1%"`` as 0.01.

    Raises:
        ValueError: not a percentage from 0 to 100.
    """
    number, _ = read_quantity(text, field, {"%": 0.01}, "1%")
    if number > 100:
        raise ValueError(f"{field}: got {text!r}, but a share is at most 100%; lower it")
    return number / 100


def format_rate(bits_per_second: float) -> str:
    """Bits per second as text that :func:`parse_rate` reads: ``"100mbit"``."""
    for unit, size in sorted(RATE_UNITS.items(), key=lambda item: -item[1]):
        if bits_per_second >= size:
            return f"{bits_per_second / size:.6g}{unit}"
    return f"{bits_per_second:.6g}bit"

"""A probe as lines of text."""

from __future__ import annotations

from .report import LinkFound, Probe

_ALPHA_BETA = ("what", "latency", "Mbit/s", "spread")


def tables(probe: Probe) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Titles and rows, the first of which is a header."""
    return [
        ("links, one way", [_ALPHA_BETA, *_links(probe)]),
        ("collectives over all ranks", [_ALPHA_BETA[:3], *_collectives(probe)]),
        ("a step without communication", _compute(probe)),
        ("compression", _compression(probe)),
    ]


def _links(probe: Probe) -> list[tuple[str, ...]]:
    rows = [_link(f"{pair.first} - {pair.second}", pair) for pair in probe.pairs]
    return rows + [_link(name, one) for name, one in _used(probe) if one is not None]


def _used(probe: Probe) -> list[tuple[str, LinkFound | None]]:
    return [("slowest, between nodes", probe.link), ("slowest, inside a node", probe.local)]


def _link(name: str, found: LinkFound) -> tuple[str, ...]:
    return (name, _time(found.latency_s), _rate(found.bytes_per_second), f"{found.spread:.1%}")


def _collectives(probe: Probe) -> list[tuple[str, ...]]:
    return [(c.op, _time(c.latency_s), _rate(c.bytes_per_second)) for c in probe.collectives]


def _compute(probe: Probe) -> list[tuple[str, ...]]:
    c, memory = probe.compute, probe.memory
    return [
        ("step", "forward", "backward", "optimizer", "spread", "head-room", "memory peak", "of"),
        (
            *map(_time, (c.step_s, c.forward_s, c.backward_s, c.optimizer_s)),
            f"{c.spread:.1%}",
            _time(c.head_room_s),
            f"{memory.peak / 1e9:.2f} GB",
            f"{memory.share / 1e9:.2f} GB",
        ),
    ]


def _compression(probe: Probe) -> list[tuple[str, ...]]:
    rows, world = (
        [("scheme", "for this model", "GB/s", "in each step of a round")],
        probe.cluster.nodes * probe.cluster.ranks_per_node,
    )
    numel = probe.model.shapes.numel
    for one in probe.compression:
        seconds = one.pace.seconds(numel, world)
        speed = f"{4 * numel / seconds / 1e9:.3g}" if seconds else "-"
        each = numel * one.step
        rows.append((one.scheme, _time(seconds), speed, _time(each) if each else "-"))
    return [*rows]


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second * 8 / 1e6:.4g}"

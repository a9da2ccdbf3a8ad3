"""Labs that exist, whose they are, and how to remove those that nobody owns any more."""

import re
from dataclasses import dataclass
from pathlib import Path

from launch.netlab import processes
from launch.netlab.errors import LabError, LeftoverError
from launch.netlab.iproute import ip, show_link

SWITCH_SUFFIX = "-netlab"
_DIRECTORY = Path("/run/netns")
_RECORD = re.compile(r"commkit-netlab nodes=(\d+) pid=(\d+) start=(\d+)")


@dataclass(frozen=True)
class Record:
    """What a lab says of itself on its switch.

    Args:
        name: of the lab.
        nodes: how many; 0 if the switch bears no record.
        pid: process that built the lab; 0 if the switch bears no record.
        start: when that process started, in clock ticks since boot.
    """

    name: str
    nodes: int = 0
    pid: int = 0
    start: int = 0

    def __str__(self) -> str:
        return f"commkit-netlab nodes={self.nodes} pid={self.pid} start={self.start}"

    @property
    def alive(self) -> bool:
        """Whether the process that built the lab still runs."""
        return self.pid > 0 and processes.start_time(self.pid) == self.start

    @property
    def owner(self) -> str:
        """For people: which process built it and whether that still runs."""
        if not self.pid:
            return "of an unknown owner"
        return f"of process {self.pid}, which {'is running' if self.alive else 'has ended'}"

    @property
    def namespaces(self) -> list[str]:
        """Those of the lab that exist, the switch last."""
        names = [f"{self.name}{node}" for node in range(self.nodes)] + [self.name + SWITCH_SUFFIX]
        return [name for name in names if (_DIRECTORY / name).exists()]


def find_labs() -> list[Record]:
    """Every lab on this machine, by its switch, sorted by name."""
    if not _DIRECTORY.is_dir():
        return []
    switches = sorted(path.name for path in _DIRECTORY.glob(f"*{SWITCH_SUFFIX}"))
    return [_read_record(switch.removesuffix(SWITCH_SUFFIX)) for switch in switches]


def clean(record: Record, *, force: bool = False) -> list[str]:
    """End a lab's processes and remove its namespaces; returns their names.

    Raises:
        LabError: its owner is running, or unknown, and ``force`` is not given.
    """
    if not force and (record.alive or not record.pid):
        raise LabError(
            f"lab {record.name!r} is {record.owner}; end that process, or say --force if the lab "
            "is not in use"
        )
    names = record.namespaces
    processes.end(processes.any_of(processes.in_namespace(name) for name in names))
    for name in names:
        remove_namespace(name)
    return names


def remove_namespace(name: str) -> None:
    """Remove one namespace, and with it its devices, unless it is gone already."""
    if (_DIRECTORY / name).exists():
        ip(f"netns del {name}")


def refuse_leftovers(name: str, nodes: int) -> None:
    """Raise LeftoverError if a namespace that a lab would make is there already."""
    wanted = [name + SWITCH_SUFFIX, *(f"{name}{node}" for node in range(nodes))]
    found = [namespace for namespace in wanted if (_DIRECTORY / namespace).exists()]
    if not found:
        return
    text = f"name: {name!r} cannot be used, for the namespace {found[0]!r} exists already"
    if name + SWITCH_SUFFIX not in found:
        raise LeftoverError(
            f"{text} and no lab made it; give the lab another name, or remove it with "
            f"`ip netns del {found[0]}`"
        )
    record = _read_record(name)
    options = "" if record.pid else " --force"
    remedy = f"run `python -m launch.netlab clean --name {name}{options}`"
    if record.alive:
        remedy = "give this lab another name or end that process"
    raise LeftoverError(f"{text}: a lab {record.owner}; {remedy}")


def _read_record(name: str) -> Record:
    try:
        alias = str(show_link(name + SWITCH_SUFFIX, "lo").get("ifalias", ""))
    except LabError:  # removed while we look
        alias = ""
    match = _RECORD.fullmatch(alias)
    return Record(name, *map(int, match.groups())) if match else Record(name)

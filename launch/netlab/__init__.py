"""Several hosts on one machine, with links of a chosen speed.

    with Lab(nodes=4, link="100mbit") as lab:
        before = lab.counters()
        results = lab.torchrun("launch/train.py", ["--config", ...], deadline_s=300)
        sent = [now - then for now, then in zip(lab.counters(), before, strict=True)]

From the shell: ``python -m launch.netlab run --nodes 2 --link 100mbit -- COMMAND``.
"""

from launch.netlab.capabilities import Capabilities, probe
from launch.netlab.commands import NodeResult
from launch.netlab.counters import Counters
from launch.netlab.errors import DeadlineError, LabError, LeftoverError
from launch.netlab.faults import Fault, FaultPlan
from launch.netlab.lab import Lab
from launch.netlab.rates import format_rate, parse_rate
from launch.netlab.userns import enter_if_needed

__all__ = [
    "Capabilities",
    "Counters",
    "DeadlineError",
    "Fault",
    "FaultPlan",
    "Lab",
    "LabError",
    "LeftoverError",
    "NodeResult",
    "enter_if_needed",
    "format_rate",
    "parse_rate",
    "probe",
]

"""The lab from the shell.

python -m launch.netlab run --nodes 2 --link 100mbit -- launch/torchrun.sh launch/train.py ...
python -m launch.netlab check      what this machine can do
python -m launch.netlab list       labs that exist and whose they are
python -m launch.netlab clean      remove labs whose owner has ended
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from launch.netlab.capabilities import probe
from launch.netlab.counters import Counters
from launch.netlab.errors import DeadlineError, LabError
from launch.netlab.faults import FaultPlan
from launch.netlab.lab import RANK_MEGABYTES, Lab
from launch.netlab.leftovers import Record, clean, find_labs
from launch.netlab.namespaces import CONGESTION_CONTROL
from launch.netlab.rates import NO_LINK
from launch.netlab.userns import enter_if_needed

DEADLINE_STATUS = 124  # as of timeout(1)
INTERRUPTED_STATUS = 130  # as of a shell after ctrl-C


def main(words: Sequence[str] | None = None) -> int:
    """Run it; the exit status is 0, that of the first node that failed, or 2, 124 or 130.

    2 is bad input or a machine that cannot, 124 the deadline, 130 ctrl-C.
    """
    given = list(sys.argv[1:] if words is None else words)
    arguments = _parser().parse_args(given)
    try:
        if arguments.action == "check":
            print(probe().describe())
            return 0
        if arguments.action == "list":
            return _list()
        if arguments.action == "clean":
            return _clean(arguments.name, arguments.force)
        if arguments.link != NO_LINK:
            enter_if_needed([sys.executable, "-m", "launch.netlab", *given])
        return _run(arguments)
    except DeadlineError as error:
        print(f"error: {error}", file=sys.stderr)
        return DEADLINE_STATUS
    except (ValueError, LabError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the lab has been removed", file=sys.stderr)
        return INTERRUPTED_STATUS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.netlab",
        description="Several hosts on one machine, with links of a chosen speed.",
    )
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("run", help="build a lab, run a command on each node, remove the lab")
    run.add_argument("--nodes", type=int, default=2, help="hosts (2)")
    run.add_argument("--link", default="1gbit", help="rate, one for each node, or none (1gbit)")
    run.add_argument("--delay", help="one way, such as 20ms; needs netem")
    run.add_argument("--jitter", help="variation of the delay, such as 2ms; needs netem")
    run.add_argument("--loss", help="share of packets lost, such as 0.1%%; needs netem")
    run.add_argument(
        "--congestion-control", default=CONGESTION_CONTROL, help=f"TCP's ({CONGESTION_CONTROL})"
    )
    run.add_argument("--name", default="commkit", help="prefix of the namespaces (commkit)")
    run.add_argument("--ranks-per-node", type=int, default=1, help="NPROC of torchrun.sh (1)")
    run.add_argument("--rank-megabytes", type=float, default=RANK_MEGABYTES, help="memory check")
    run.add_argument("--deadline", type=float, default=3600.0, help="seconds for the command")
    run.add_argument("--logs", type=Path, help="directory for nodeN.log")
    run.add_argument(
        "--fault", action="append", default=[], help="STEP:ACTION:NODE[:SECONDS]; needs --metrics"
    )
    run.add_argument("--metrics", type=Path, help="metrics.jsonl whose steps faults wait for")
    run.add_argument("command", nargs="+", metavar="COMMAND", help="after --, run on each node")
    actions.add_parser("check", help="what this machine can do")
    actions.add_parser("list", help="labs that exist")
    remove = actions.add_parser("clean", help="remove labs whose owner has ended")
    remove.add_argument("--name", help="only this lab")
    remove.add_argument("--force", action="store_true", help="even if its owner is running")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    plan = FaultPlan.parse(arguments.fault)
    if plan.faults and arguments.metrics is None:
        raise ValueError("fault: given without --metrics; name the metrics.jsonl to wait for")
    lab = Lab(
        arguments.nodes,
        arguments.link,
        delay=arguments.delay,
        jitter=arguments.jitter,
        loss=arguments.loss,
        congestion_control=arguments.congestion_control,
        name=arguments.name,
        ranks_per_node=arguments.ranks_per_node,
        rank_megabytes=arguments.rank_megabytes,
    )
    with ExitStack() as stack:
        stack.enter_context(lab)
        print(f"netlab: {lab.describe()}", file=sys.stderr)
        if plan.faults:
            stack.enter_context(plan.follow(lab, arguments.metrics))
        results = lab.run_all(
            lambda node: arguments.command,
            arguments.deadline,
            {"NPROC": str(arguments.ranks_per_node)},
            logs=arguments.logs,
            on_line=lambda node, line: print(f"[node {node}] {line}", flush=True),
        )
        if arguments.link != NO_LINK:
            _print_counters(lab.counters())
    for fault, step in plan.applied:
        print(f"netlab: at step {step}: {fault}", file=sys.stderr)
    return next((result.status for result in results if result.status), 0)


def _print_counters(counters: Sequence[Counters]) -> None:
    for node, link in enumerate(counters):
        print(
            f"netlab: node {node} sent {link.tx_bytes:,} bytes in {link.tx_packets:,} frames, "
            f"received {link.rx_bytes:,} in {link.rx_packets:,}, {link.drops:,} dropped",
            file=sys.stderr,
        )


def _list() -> int:
    for record in find_labs():
        print(f"{record.name}: {', '.join(record.namespaces)}; {record.owner}")
    return 0


def _clean(name: str | None, force: bool) -> int:
    """Remove what may be removed; status 1 if a lab had to be left alone."""
    labs = [record for record in find_labs() if name in (None, record.name)]
    left = [record for record in labs if not _clean_one(record, force)]
    if not labs:
        print("nothing to clean")
    return 1 if left else 0


def _clean_one(record: Record, force: bool) -> bool:
    try:
        removed = clean(record, force=force)
    except LabError as error:
        print(f"left alone: {error}", file=sys.stderr)
        return False
    print(f"removed {', '.join(removed)}")
    return True


if __name__ == "__main__":
    sys.exit(main())

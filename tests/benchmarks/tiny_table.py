"""Makes a tiny convergence table three times, the second time of what the first has left, the third of what the
table of the second has: ``tiny_table.py WORK``.

Prints as JSON how many trials were run each time, and the rows.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import convergence
from trials.plan import Trial
from trials.systems import System
from trials.table import tables

DENSE = System("dense-sgd", {"name": "ddp"}, "sgd")
FP16 = System("fp16", {"name": "fp16"}, "sgd", note="half the bytes")
BROKEN = System("broken", {"name": "topk", "density": 2.0}, "sgd")
MISSING = System("missing", {"name": "no_such_scheme"}, "sgd")


def main(work: Path) -> None:
    first = [Trial("digits", s, ranks=2, seed=0, steps=4) for s in (DENSE, BROKEN, MISSING)]
    second = [Trial("digits", s, ranks=2, seed=0, steps=4) for s in (DENSE, FP16)]
    counts, execute = [], convergence.execute

    def counted(trial, *arguments):
        counts[-1].append(trial.system.name)
        return execute(trial, *arguments)

    convergence.execute = counted
    done = []
    for trials in (first, second):
        counts.append([])
        done += convergence.run_all(trials, work, deadline_s=60.0)
    table = work / "table.json"
    table.write_text(json.dumps({"trials": convergence.kept(done[3:])}))
    counts.append([])
    again = convergence.run_all(second, work / "another", 60.0, table)
    assert tables(again) == tables(done[3:])
    table.unlink()
    print(json.dumps({"ran": counts, "rows": tables([*done[:3], done[4]])["digits, 2 ranks"]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

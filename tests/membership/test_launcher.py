"""``python -m launch.members`` keeps the others alive, and replaces who is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import os, signal, sys, time
import torch, commkit
torch.set_num_threads(1)
model = torch.nn.Linear(4, 2)
options = commkit.ElasticOptions(min_workers=2, heartbeat_s=0.25, limit_s=3.0)
with commkit.Elastic(options) as members:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    commkit.attach(model, "topk", optimizer, members=members)
    for step in members.steps(60, model=model, optimizer=optimizer):
        with step:
            if os.environ["RANK"] == "1" and step.number == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.zero_grad()
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
        time.sleep(0.25)
    open(os.path.join(sys.argv[1], os.environ["RANK"]), "w").write(str(members.world_size))
"""


def test_a_lost_worker_is_replaced(tmp_path: Path) -> None:
    program = tmp_path / "train.py"
    program.write_text(_PROGRAM)
    out = tmp_path / "out"
    out.mkdir()
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "launch.members",
            "--nproc",
            "3",
            "--respawn",
            "1",
            str(program),
            str(out),
        ],
        cwd=root,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "worker 1 ended with -9" in done.stderr
    assert {file.name: file.read_text() for file in out.iterdir()} == {"0": "3", "2": "3", "3": "3"}

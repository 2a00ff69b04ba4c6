"""Commands of training in two processes that really communicate, started as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path


REPOSITORY = Path(__file__).parents[2]


def launch(*command: object, processes: int = 2) -> str:
    """The output of `python -m COMMAND` in several processes. How long it may take, the test says."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [*launcher, "-m", *map(str, command)], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout

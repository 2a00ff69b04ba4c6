"""Train a model: `accelerate launch -m training.train --config FILE [--key=value ...]`.

The configuration comes in, and the folder of the run goes out: checkpoints, reports and the finished pipeline. With
`--dry-run` nothing is trained; the command says what would be.
"""

from __future__ import annotations

import sys

from training.command_line import one_line_errors
from training.distributed.interruption import TrainingInterrupted, TrainingStopped
from training.dry_run import describe
from training.outputs.checkpoints import CheckpointError
from training.outputs.publish import PublishError
from training.settings.config import config_or_exit
from training.trainer import Trainer


def main() -> None:
    """Train, or with `--dry-run` say what would be trained and stop."""
    dry_run = "--dry-run" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--dry-run"]
    try:
        with one_line_errors("training.train", CheckpointError, TrainingStopped, PublishError):
            trainer = Trainer(config_or_exit("training.train", arguments))
            if dry_run:
                trainer.say(describe(trainer))
                trainer.end()
            else:
                trainer.run()
    except (TrainingInterrupted, KeyboardInterrupt) as error:
        print(f"training.train: {str(error) or 'interrupted'}", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()

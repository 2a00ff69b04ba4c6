"""Quality and time against AR steps (paper, Table 3): an MRAR sequence stopped after image 1, 2, ... N.

    python -m training.experiments.ar_steps --digits data/digits --output results

writes ar_steps.json and ar_steps.png (a row for each class, a column for each image of the sequence).
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from training.experiments.common import (
    add_judge_options,
    balanced,
    call_settings,
    facts,
    generators,
    load,
    make_judge,
    parser,
    picture,
    write,
)
from transdiff_cli.common import reader_may_leave
from transdiff_pipelines import TransDiffPipeline


class Clock:
    """Seconds from the start of a call to the last step of each image of the sequence, summed over calls."""

    def __init__(self, num_images: int) -> None:
        self.seconds, self._latest = np.zeros(num_images), np.zeros(num_images)

    def start(self) -> None:
        """A call begins."""
        self._started = time.perf_counter()

    def note(self, pipe: TransDiffPipeline, step: int, timestep: Any, tensors: Any) -> dict:
        """`callback_on_step_end`: the last time that is noted for an image is that of its last step."""
        self._latest[pipe.current_ar_step] = time.perf_counter() - self._started
        return {}

    def stop(self) -> None:
        """The call has ended."""
        self.seconds += self._latest


@reader_may_leave()
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    options_parser = parser(__doc__)
    add_judge_options(options_parser)
    options = options_parser.parse_args(arguments)
    pipe = load(options)
    judge = make_judge(options, pipe)
    num_classes, num_images = pipe.condition_encoder.config.num_classes, pipe.condition_encoder.num_images
    labels = balanced(options.num_images, num_classes)
    clock = Clock(num_images)
    batches = []
    for indices in np.array_split(np.arange(len(labels)), -(-len(labels) // options.batch_size)):
        clock.start()
        output = pipe(
            labels[indices].tolist(),
            generator=generators(options.seed, indices.tolist()),
            return_intermediates=True,
            callback_on_step_end=clock.note,
            **call_settings(options),
        )
        clock.stop()
        batches.append(output.intermediates)
    images = [np.concatenate(parts) for parts in zip(*batches, strict=True)]
    seconds = clock.seconds / len(labels)
    rows = [
        {"ar_steps": step + 1, "seconds_per_image": float(seconds[step]), **judge(images[step], labels)}
        for step in range(num_images)
    ]
    for row in rows:
        print(row)
    result = facts(options, pipe) | {"num_images": len(labels), "rows": rows}
    shown = picture([np.stack([images[step][label] for step in range(num_images)]) for label in range(num_classes)])
    write(options.output, "ar_steps", result, shown)


if __name__ == "__main__":
    main()

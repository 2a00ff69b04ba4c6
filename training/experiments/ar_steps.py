"""Quality and time against AR steps (paper, Table 3): an MRAR sequence stopped after image 1, 2, ... N.

    python -m training.experiments.ar_steps --digits data/digits --output results

writes ar_steps.json and ar_steps.png (a row for each class, a column for each image of the sequence).
"""

import time
from collections.abc import Sequence

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


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    options_parser = parser(__doc__)
    add_judge_options(options_parser)
    options = options_parser.parse_args(arguments)
    pipe = load(options)
    judge = make_judge(options, pipe)
    num_classes, num_images = pipe.condition_encoder.config.num_classes, pipe.condition_encoder.num_images
    labels = balanced(options.num_images, num_classes)
    batches = []
    for indices in np.array_split(np.arange(len(labels)), -(-len(labels) // options.batch_size)):
        output = pipe(
            labels[indices].tolist(),
            generator=generators(options.seed, indices.tolist()),
            return_intermediates=True,
            **call_settings(options),
        )
        batches.append(output.intermediates)
    images = [np.concatenate(parts) for parts in zip(*batches, strict=True)]

    rows = []
    timed = labels[: options.batch_size].tolist()
    for step, made in enumerate(images, 1):
        started = time.perf_counter()
        pipe(timed, num_ar_steps=step, **call_settings(options))
        seconds = (time.perf_counter() - started) / len(timed)
        rows.append({"ar_steps": step, "seconds_per_image": seconds, **judge(made, labels)})
        print(rows[-1])
    result = facts(options, pipe) | {"num_images": len(labels), "rows": rows}
    shown = picture([np.stack([images[step][label] for step in range(num_images)]) for label in range(num_classes)])
    write(options.output, "ar_steps", result, shown)


if __name__ == "__main__":
    main()

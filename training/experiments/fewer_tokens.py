"""Decoding with the first k of the condition tokens (paper, Figure 1, middle), k = 1 ... S.

    python -m training.experiments.fewer_tokens --digits data/digits --output results

The condition is encoded as ever; with MRAR it is that of the last image, whose references were generated. Writes
fewer_tokens.json and fewer_tokens.png (a row for each class, a column for each k).
"""

from collections.abc import Sequence

import numpy as np
import torch

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


def finished_conditions(pipe: TransDiffPipeline, labels: list[int], settings: dict, make: list) -> tuple:
    """Conditional and unconditional tokens `(B, S, D)` of the last image of a sequence."""
    references = None
    if pipe.condition_encoder.num_images > 1:
        steps = pipe.condition_encoder.num_images - 1
        settings = settings | {"output_type": "latent", "num_ar_steps": steps, "return_intermediates": True}
        references = torch.stack(pipe(labels, generator=make, **settings).intermediates, dim=1)
    null = torch.full((len(labels),), pipe.condition_encoder.null_class)
    return pipe.encode_condition(labels, references), pipe.encode_condition(null, references)


@reader_may_leave()
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    options_parser = parser(__doc__)
    add_judge_options(options_parser)
    options_parser.add_argument("--tokens", type=int, nargs="+", help="values of k; powers of two by default")
    options = options_parser.parse_args(arguments)
    pipe = load(options)
    judge = make_judge(options, pipe)
    num_tokens = sum(pipe.condition_encoder.group_sizes)
    counts = options.tokens or [2**i for i in range(num_tokens.bit_length())]
    num_classes = pipe.condition_encoder.config.num_classes
    labels = balanced(options.num_images, num_classes)
    settings = call_settings(options)
    made: dict[int, list[np.ndarray]] = {count: [] for count in counts}
    for indices in np.array_split(np.arange(len(labels)), -(-len(labels) // options.batch_size)):
        seeds = indices.tolist()
        first = finished_conditions(pipe, labels[indices].tolist(), settings, generators(options.seed, seeds))
        for count in counts:
            condition, negative = (tokens[:, :count] for tokens in first)
            images = pipe(
                condition_embeds=condition,
                negative_condition_embeds=negative,
                generator=generators(options.seed, seeds),
                **settings,
            ).images
            made[count].append(images)
    images = {count: np.concatenate(parts) for count, parts in made.items()}
    rows = [{"tokens": count, **judge(images[count], labels)} for count in counts]
    for row in rows:
        print(row)
    result = facts(options, pipe) | {"num_images": len(labels), "rows": rows}
    shown = picture([np.stack([images[count][label] for count in counts]) for label in range(num_classes)])
    write(options.output, "fewer_tokens", result, shown)


if __name__ == "__main__":
    main()

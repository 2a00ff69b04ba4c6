"""Tables 1, 2 and 5 of the paper: the command for every published model and the numbers it should give.

    python -m training.experiments.tables --reference VIRTUAL_imagenet256_labeled.npz

prints both as Markdown. Nothing is run: the weights are the authors', the images 50,000 for each row.
"""

import argparse
from collections.abc import Sequence

from transdiff_cli.common import reader_may_leave
from transdiff_pipelines.presets import ORIGINAL_REPOSITORY, PUBLISHED, PublishedModel


def command(model: PublishedModel, reference: str, extractor: str, guided: bool) -> str:
    """The evaluation of one published model, converted into a folder of its name."""
    guidance = "" if guided else " --guidance-scale 1"
    output = f"eval/{model.folder}" + ("" if guided else "_without_guidance")
    return (
        f"accelerate launch -m training.evaluate --model {model.folder} --preset {model.folder} --settings published"
        f"{guidance} --num-images 50000 --extractor {extractor} --reference {reference} --output {output}"
    )


def expected(model: PublishedModel, guided: bool) -> list[float | None]:
    """FID, Inception Score, precision and recall, as published."""
    if guided:
        return [model.fid, model.inception_score, model.precision, model.recall]
    return [model.fid_without_guidance, model.inception_score_without_guidance, None, None]


def tables(reference: str, reference_512: str, extractor: str) -> str:
    """Commands and expected numbers, a row for each model with and without guidance."""
    rows = ["| model | guidance | FID | IS | Pre. | Rec. |", "|---|---|---|---|---|---|"]
    commands = []
    for model in PUBLISHED.values():
        for guided in (True, False):
            values = expected(model, guided)
            if values[0] is None:
                continue
            scale = model.guidance_scale if guided else 1.0
            cells = ["-" if value is None else f"{value:g}" for value in values]
            rows.append(f"| {model.folder} | {scale:g} | {' | '.join(cells)} |")
            compared = reference if model.resolution == 256 else reference_512
            commands.append(command(model, compared, extractor, guided))
    models = f"The models are those of {ORIGINAL_REPOSITORY}, converted by `transdiff convert` into folders."
    return "\n".join([*rows, "", models, "", "```sh", *commands, "```"])


@reader_may_leave()
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", default="VIRTUAL_imagenet256_labeled.npz", help="ADM reference batch")
    parser.add_argument("--reference-512", default="VIRTUAL_imagenet512.npz", help="the same at 512 px")
    parser.add_argument("--extractor", default="torch-fidelity")
    options = parser.parse_args(arguments)
    print(tables(options.reference, options.reference_512, options.extractor))


if __name__ == "__main__":
    main()

"""Semantic diversity of the condition (paper, Appendix D, Eq. 13-15; Table 4, Figure 5).

    python -m training.experiments.diversity --models 1-step=FOLDER mrar=FOLDER --output results
    python -m training.experiments.diversity --run outputs/digits_1step --digits data/digits --output results

measures the models given, or the checkpoints that a training run has kept: the cosine similarity between the condition
tokens of an image, as its root mean square (the paper's measure: smaller is more diverse) and as its mean. The tokens
are taken before the second position embedding. With MRAR they are those of the last image, whose references are
generated. With `--digits`, `--emoji` or `--reference` the quality stands beside it, with Spearman's rank correlation
of the two over the models, if there are five or more. Writes diversity.json and diversity.png.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from training.experiments.common import (
    add_judge_options,
    balanced,
    call_settings,
    facts,
    generators,
    load,
    make_judge,
    named_models,
    parser,
    write,
)
from training.outputs.checkpoints import checkpoint_folders
from transdiff_cli.common import reader_may_leave
from transdiff_pipelines import TransDiffPipeline
from transdiff_pipelines.files import home_path, new_file


FEWEST_RANKED = 5  # models; the rank correlation of fewer says nothing


def token_similarity(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Root mean square and mean, `(B,)` each, of the cosine similarity of different tokens of `(B, M, D)`.

    Raises:
        ValueError: fewer than two tokens, which have no similarity.
    """
    num_tokens = features.shape[1]
    if num_tokens < 2:
        raise ValueError(f"the measure compares tokens with one another, but there is {num_tokens}")
    # Eq. 13: tokens of unit length; Eq. 14: their products, without those of a token with itself
    tokens = torch.nn.functional.normalize(features.double(), dim=-1)
    similarity = tokens @ tokens.transpose(1, 2)
    different = ~torch.eye(num_tokens, dtype=torch.bool, device=features.device)
    values = similarity[:, different]
    return values.square().mean(1).sqrt(), values.mean(1)


@torch.no_grad()
def condition_features(pipe: TransDiffPipeline, labels: np.ndarray, references: torch.Tensor | None) -> torch.Tensor:
    """All condition tokens before the second position embedding, `(B, S, D)`."""
    ids = torch.from_numpy(labels).to(pipe._execution_device)
    return pipe.condition_encoder(ids, references).features


def measure_model(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Similarity of the condition tokens, and the quality where a judge is given."""
    pipe = load(options)
    labels = balanced(options.num_images, pipe.condition_encoder.config.num_classes)
    judged = bool(options.digits or options.emoji or options.reference)
    needs_images = judged or pipe.condition_encoder.num_images > 1
    similarities, images = [], []
    for indices in np.array_split(np.arange(len(labels)), -(-len(labels) // options.batch_size)):
        references = None
        if needs_images:
            settings = call_settings(options) | {"output_type": "latent"}
            made = pipe(
                labels[indices].tolist(),
                generator=generators(options.seed, indices.tolist()),
                return_intermediates=True,
                **settings,
            ).intermediates
            references = torch.stack(made[:-1], dim=1) if len(made) > 1 else None
            with torch.no_grad():
                images.append(pipe.decode_latents(made[-1], "np"))
        similarities.append(torch.stack(token_similarity(condition_features(pipe, labels[indices], references))))
    root_mean_square, mean = torch.cat(similarities, dim=1).mean(1).tolist()
    result = {"name": name, **facts(options, pipe), "rms_similarity": root_mean_square, "mean_similarity": mean}
    return result | (make_judge(options, pipe)(np.concatenate(images), labels) if judged else {})


def measure_models(options: argparse.Namespace, models: dict[str, str]) -> list[dict[str, Any]]:
    """A row for each model, from its name and folder; one measured earlier with the same options is taken as it is."""
    sampling = ("num_inference_steps", "guidance_scale", "scheduler")
    shared = ("seed", "num_images", *sampling, "digits", "reference", "extractor")
    settings = {option: getattr(options, option) for option in shared}
    settings |= {name: str(getattr(options, name)) for name in ("digits", "emoji") if getattr(options, name)}
    rows = []
    for name, folder in models.items():
        made_with = {"model": folder, **settings}
        file = options.output / "models" / f"{name}.json"
        earlier = json.loads(file.read_text()) if file.exists() else {}
        if earlier.get("made_with") != made_with:
            row = measure_model(argparse.Namespace(**{**vars(options), "model": folder}), name)
            earlier = {"made_with": made_with, "row": row}
            write(file.parent, name, earlier)
        rows.append(earlier["row"])
        print(rows[-1])
    return rows


def checkpoints_of(run: Path) -> dict[str, str]:
    """The pipelines of a run's checkpoints, under their steps.

    Raises:
        SystemExit: there are none.
    """
    folders = checkpoint_folders(run)
    if not folders:
        raise SystemExit(f"error: --run {run}: no checkpoints there; pass the output folder of a training run")
    return {str(int(folder.name.rpartition("-")[2])): str(folder / "pipeline") for folder in folders}


def plot(rows: list[dict[str, Any]], quality: str, path: Any) -> None:
    """The measure of each model, beside its Fréchet distance where there is one."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    names = [row["name"] for row in rows]
    axes.plot(names, [row["rms_similarity"] for row in rows], marker="o", color="tab:blue")
    axes.set_ylabel("similarity of tokens (RMS)", color="tab:blue")
    axes.tick_params(axis="x", rotation=30)
    if all(quality in row for row in rows):
        twin = axes.twinx()
        twin.plot(names, [row[quality] for row in rows], marker="s", color="tab:orange")
        twin.set_ylabel("Fréchet distance", color="tab:orange")
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
    plt.close(figure)


@reader_may_leave()
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    options_parser = parser(__doc__)
    chosen = options_parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--models", nargs="+", metavar="NAME=FOLDER")
    chosen.add_argument(
        "--run", type=home_path, help="output folder of a training run: all checkpoints that it has kept"
    )
    add_judge_options(options_parser)
    options = options_parser.parse_args(arguments)
    models = named_models(options.models or []) if options.run is None else checkpoints_of(options.run)
    quality = "frechet" if options.digits or options.emoji else "fid"
    rows = measure_models(options, models)
    result: dict[str, Any] = {"num_images": options.num_images, "rows": rows}
    if len(rows) >= FEWEST_RANKED and all(quality in row for row in rows):
        correlation = spearmanr([row["rms_similarity"] for row in rows], [row[quality] for row in rows])
        result["rank_correlation"] = {"value": float(correlation.statistic), "p_value": float(correlation.pvalue)}
        print(result["rank_correlation"])
    write(options.output, "diversity", result)
    plot(rows, quality, options.output / "diversity.png")


if __name__ == "__main__":
    main()

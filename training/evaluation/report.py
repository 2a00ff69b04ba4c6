"""Results as JSON, as a row of a Markdown table, as metadata for a model card, and as a picture."""

import json
from pathlib import Path
from typing import Any

from diffusers.utils import make_image_grid
from huggingface_hub import EvalResult, ModelCardData
from PIL import Image

from training.evaluation.measure import TITLES
from transdiff_pipelines.files import new_file


def markdown_table(results: list[dict[str, Any]]) -> str:
    """A row for each result; a dash where a metric could not be computed."""
    head = ["model", "images", "guidance", "drift", "diffusion", "steps", *TITLES.values()]
    rows = [head, ["---"] * len(head)]
    for result in results:
        sampling = result["sampling"]
        cells = [result["model"], result["num_images"], *(sampling[name] for name in SAMPLING_COLUMNS)]
        values = (result["metrics"].get(name) for name in TITLES)
        rows.append([*map(str, cells), *("-" if value is None else f"{value:.4g}" for value in values)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


SAMPLING_COLUMNS = ("guidance_scale", "drift_scale", "diffusion_scale", "num_inference_steps")


def model_index(result: dict[str, Any]) -> str:
    """The metrics as `model-index` metadata (YAML) for the head of a model card; empty without metrics."""
    entries = [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type="custom",
            dataset_name=str(result["reference"] or "none"),
            metric_type=name,
            metric_name=f"{title} ({result['num_images']} images, {result['extractor']} features)",
            metric_value=round(result["metrics"][name], 4),
        )
        for name, title in TITLES.items()
        if name in result["metrics"]
    ]
    if not entries:
        return ""
    return (
        ModelCardData(model_name=Path(result["model"]).name or result["model"], eval_results=entries).to_yaml() + "\n"
    )


def contact_sheet(paths: list[Path], rows: int = 8, columns: int = 8) -> Image.Image:
    """The first `rows * columns` pictures; fewer rows, and the last one cut off, where there are fewer."""
    columns = min(columns, len(paths))
    rows = min(rows, len(paths) // columns)
    return make_image_grid([Image.open(path).convert("RGB") for path in paths[: rows * columns]], rows, columns)


def write_report(result: dict[str, Any], paths: list[Path], folder: Path) -> None:
    """results.json, results.md, model-index.yml and samples.png."""
    with new_file(folder / "samples.png") as temporary:
        contact_sheet(paths).save(temporary, format="png")
    texts = {"results.md": markdown_table([result]), "model-index.yml": model_index(result)}
    # The JSON file is written last, so that a folder that has it has the other files too.
    for name, text in (texts | {"results.json": json.dumps(result, indent=2) + "\n"}).items():
        with new_file(folder / name) as temporary:
            temporary.write_text(text)

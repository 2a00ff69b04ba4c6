"""Model cards: of the published checkpoints, of the bundled models, of a pipeline on its way to the Hub.

`python -m transdiff_pipelines.write_cards` writes those of this repository.

The numbers come from `presets.py`, and those of a bundled model from its folder: its configuration, and
`quality.json` as `training.digits.quality --output` or `training.emoji.quality --output` writes it.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import yaml_dump

from .attribution import attribution
from .latents import vae_stride
from .presets import DEFAULT_NUM_INFERENCE_STEPS, ORIGINAL_REPOSITORY, PUBLISHED, PublishedModel


CARD_NAME = "README.md"
"""The file that the Hub shows as a repository's model card."""

QUALITY_NAME = "quality.json"
"""The file of measured numbers in a bundled model's folder."""

TASK = "unconditional-image-generation"
PAPER_URL = "https://arxiv.org/abs/2506.09482"
IMAGENET = "ILSVRC/imagenet-1k"

DESCRIPTION = f"""\
TransDiff ([paper]({PAPER_URL})) makes an image of a class. An autoregressive transformer turns the label into
condition tokens, and a diffusion transformer denoises a latent under them. With multi-reference autoregression
(MRAR) it makes several images of the class one after another, each seeing the ones before, and the last is the
result."""

CITATION = """\
## Citation

```bibtex
@article{zhen2025marrying,
  title   = {Marrying Autoregressive Transformer and Diffusion with Multi-Reference Autoregression},
  author  = {Zhen, Dingcheng and Qiao, Qian and Yu, Tan and Wu, Kangxi and Zhang, Ziwei and Liu, Siyuan and
             Yin, Shunshun and Tao, Ming},
  journal = {arXiv preprint arXiv:2506.09482},
  year    = {2025}
}
```"""

DIGITS_MEASURES = {  # name in quality.json: type in the metadata, title, factor for printing
    "recognition": ("accuracy", "recognised as the digit asked for, %", 100),
    "nearest": ("nearest_neighbour_distance", "distance to the nearest training image", 1),
    "copies": ("copies", "nearer to a training image than 99% of the real images are, %", 100),
    "variance": ("variance", "variance within a class", 1),
    "frechet": ("frechet_distance", "Fréchet distance of pixels (real: of the training images)", 1),
}

EMOJI_MEASURES = {  # as DIGITS_MEASURES
    "recognition": ("accuracy", "recognised as the class asked for, %", 100),
    "of_ceiling": ("accuracy_of_ceiling", "the same, % of what is recognised of held-out drawings", 100),
    "frechet_held_out": (
        "frechet_distance",
        "Fréchet distance of features to held-out drawings (real: of training)",
        1,
    ),
    "feature_variance": ("variance", "variance of features within a class", 1),
    "nearest": ("nearest_neighbour_distance", "distance to the nearest training drawing", 1),
    "copies": ("copies", "nearer to a training drawing than 99% of the held-out drawings are, %", 100),
    "reconstructions": ("reconstructions", "as near to one as its own reconstruction by the VAE, %", 100),
}


def published_card(model: PublishedModel) -> str:
    """The card of a published checkpoint, converted to diffusers' format."""
    kind = "1-step" if model.num_images == 1 else "MRAR"
    side = f"{model.resolution}×{model.resolution}"
    title = f"TransDiff-{model.size.name} {kind}, ImageNet {side}"
    data = _metadata(
        tags=["imagenet", "arxiv:2506.09482"],
        license="mit",
        datasets=[IMAGENET],
        base_model=ORIGINAL_REPOSITORY,
        model_name=title,
        eval_results=_published_results(model),
    )
    origin = (
        f"These are the weights of `{model.folder}` in the authors' repository "
        f"[{ORIGINAL_REPOSITORY}](https://huggingface.co/{ORIGINAL_REPOSITORY}), in diffusers' format."
    )
    architecture = _architecture(
        model.encoder_config(), model.transformer_config(), model.resolution, model.num_parameters
    )
    convert = f"transdiff convert --repo {ORIGINAL_REPOSITORY} --model {model.folder} --output {model.folder}"
    usage = _usage(f'"{model.folder}"', "golden retriever", convert=convert)
    settings = _settings(model.guidance_scale, model.drift_scale, model.diffusion_scale)
    limits = [
        f"It knows the 1,000 classes of ImageNet and makes images of {side} pixels; it takes no text.",
        "It learned from ImageNet, with that set's choice of things and its biases; people, whom ImageNet shows "
        "beside its subjects, may come out distorted or stereotyped. Its images are evidence of nothing.",
        "The conversion is tested against the authors' implementation on small models. The results above are the "
        "authors': they were not measured again.",
        "The license is that of the authors' repository; ImageNet has its own terms of access.",
    ]
    sections = [origin, architecture, usage, settings, _published_table(model), _limits(limits)]
    return _card(data, title, *sections)


def digits_card(folder: Path) -> str:
    """The card of a bundled digits model, with the results of its folder's quality.json where there is one."""
    quality = _quality(folder)
    is_flow_map = _is_flow_map(folder)
    title = "TransDiff digits, MRAR, 32×32" + (", flow map" if is_flow_map else "")
    data = _metadata(
        tags=["digits"],
        license="mit",
        model_name=title if quality else None,
        eval_results=_results(quality, "scikit-learn digits", DIGITS_MEASURES) if quality else None,
    )
    origin = (
        "This small model of handwritten digits comes with the package, for trying things out in seconds and without "
        "a download. It was trained on a part of the 1,797 digits of scikit-learn (Alpaydin and Kaynak, *Optical "
        "Recognition of Handwritten Digits*, UCI, CC BY 4.0), enlarged from 8×8 to 32×32 pixels, with the "
        "configurations `digits_1step.yaml` and `digits_mrar.yaml` of `training/configs`."
    )
    name = "DIGITS"
    if is_flow_map:
        name = "DIGITS_FLOW_MAP"
        origin = (
            "This is the flow map of the small model of handwritten digits that comes with the package, `DIGITS`: it "
            "goes from noise to a digit in one to four calls of the diffusion transformer, where that model takes a "
            "hundred steps. It learned the paths of that model with the configuration `digits_flow_map.yaml` of "
            "`training/configs`. Autoregressive transformer and VAE are those of `DIGITS`, and their weights are "
            "stored there alone."
        )
    usage = _usage(name, 7, extra_import=f"{name}, ")
    limits = [
        "It draws grey digits as they were written on forms by a few dozen people, and nothing else.",
        "Its training images were 8×8 pixels: 32×32 is smooth, not detailed.",
    ]
    if is_flow_map:
        limits.append("Its best is its teacher's probability-flow ODE, which varies less within a class than the SDE.")
    sections = [origin, *_saved_facts(folder), usage, attribution("digits")]
    if quality:
        measured = (
            f"{_measured('digits', quality)}, at 8×8 pixels, against the {quality['split']} split of the real digits."
        )
        sections.append(_results_table(quality, measured, DIGITS_MEASURES))
    return _card(data, title, *sections, _limits(limits))


def emoji_card(folder: Path) -> str:
    """The card of the bundled emoji model: whose art it learned from, and its results as in `digits_card`."""
    quality = _quality(folder)
    title = "TransDiff emoji, 64×64"
    data = _metadata(
        tags=["emoji"],
        license="cc-by-4.0",
        model_name=title if quality else None,
        eval_results=_results(quality, "emoji in six sets", EMOJI_MEASURES) if quality else None,
    )
    origin = (
        "This model draws emoji by name. It was trained on six openly licensed sets of them, each class in six hands "
        "of which one was held out, with the commands and configurations that the section Emoji of "
        "`training/README.md` names."
    )
    limits = [
        "Six drawings of a class are few, and much of what it draws is memory of them.",
        "It knows the names in its configuration, on white, and nothing else.",
    ]
    usage = _usage("EMOJI", _first_name(folder), extra_import="EMOJI, ")
    sections = [origin, *_saved_facts(folder), usage, attribution("emoji")]
    if quality:
        measured = (
            f"{_measured('emoji', quality)}, by the features of a network that was trained on the training drawings, "
            f"against the {quality['split']} split of the drawings."
        )
        sections.append(_results_table(quality, measured, EMOJI_MEASURES))
    return _card(data, title, *sections, _limits(limits))


def pipeline_card(pipeline: Any, repo_id: str, include_code: bool = False, credits: str = "") -> str:
    """The card of a pipeline that is uploaded to a repository without one: what its configuration tells.

    `credits` is the section that names the authors of what it learned from, if that is known.
    """
    usage = _usage(f'"{repo_id}"', _example_label(pipeline), with_code=include_code)
    limits = [
        "This card was written on upload and knows only the model's configuration. What it was trained on, how well "
        "it does and what it may be used for is for its uploader to say here."
    ]
    return _card(_metadata(), repo_id.split("/")[-1], *_facts(pipeline), usage, credits, _limits(limits))


def training_card(
    pipeline: Any,
    name: str,
    config: Mapping[str, Any],
    data: str,
    metrics: Sequence[Mapping[str, float]],
    pictures: Mapping[str, str],
) -> str:
    """The card of a model that was just trained.

    Args:
        name: what the model is called.
        config: the run's configuration, complete.
        data: what it was trained on, in a sentence or two.
        metrics: the lines of the run's log, each with `step` and `loss`.
        pictures: caption to file name, beside the card.
    """
    usage = _usage('"FOLDER"', _example_label(pipeline))
    usage += "\n\nFOLDER is the one this card is in, or the Hub repository it was pushed to."
    shown = "\n\n".join(f"{caption}:\n\n![{caption}]({file})" for caption, file in pictures.items())
    settings = f"Configuration:\n\n```yaml\n{yaml_dump(dict(config), sort_keys=False).strip()}\n```"
    training = [f"## Training\n\n{data}", _loss_table(metrics), shown, settings]
    limits = [f"It knows {_class_names(pipeline)} at the resolution of its training images, and nothing else."]
    return _card(_metadata(), name, *_facts(pipeline), usage, *training, _limits(limits))


def adapter_card(
    pipeline: Any, name: str, base: str, config: Mapping[str, Any], data: str, metrics: Sequence[Mapping[str, float]]
) -> str:
    """The card of LoRA adapters that were just trained.

    Args:
        pipeline: the pipeline that they adapt.
        name: what the adapters are called.
        base: its folder or Hub repository.
        config, data, metrics: as of `training_card`.
    """
    code = (
        "from transdiff_pipelines import TransDiffPipeline\n\n"
        f'pipe = TransDiffPipeline.from_pretrained("{base}")\n'
        'pipe.load_lora_weights("FOLDER")\n'
        f"image = pipe({_shown(_example_label(pipeline))}).images[0]"
    )
    label, model = (shlex.quote(str(value)) for value in (_example_label(pipeline), base))
    command = f"transdiff generate {label} --model {model} --lora FOLDER"
    usage = (
        f"## Usage\n\n```python\n{code}\n```\n\n```bash\n{command}\n```\n\n"
        "FOLDER is the one this card is in, or the Hub repository."
    )
    settings = f"Configuration:\n\n```yaml\n{yaml_dump(dict(config), sort_keys=False).strip()}\n```"
    origin = f"LoRA adapters for the TransDiff pipeline `{base}`, whose weights they leave as they are."
    limits = ["They know the classes and the resolution of that pipeline, and nothing else."]
    metadata = _metadata(tags=["lora"], base_model=base)
    return _card(
        metadata, name, origin, usage, f"## Training\n\n{data}", _loss_table(metrics), settings, _limits(limits)
    )


def all_cards(digits: Path, flow_map: Path | None = None, emoji: Path | None = None) -> dict[str, str]:
    """File name to text of every card that the command writes, from the bundled models' folders, where they exist."""
    cards = {f"{model.folder}.md": published_card(model) for model in PUBLISHED.values()}
    cards["digits.md"] = digits_card(digits)
    if flow_map is not None:
        cards["digits_flow_map.md"] = digits_card(flow_map)
    return cards | ({"emoji.md": emoji_card(emoji)} if emoji is not None and emoji.is_dir() else {})


def _metadata(tags: Sequence[str] = (), **entries: Any) -> ModelCardData:
    tags = ["transdiff", "class-conditional-image-generation", *tags]
    return ModelCardData(library_name="diffusers", pipeline_tag=TASK, tags=tags, **entries)


def _card(data: ModelCardData, title: str, *sections: str) -> str:
    body = "\n\n".join([f"# {title}", DESCRIPTION, *(section for section in sections if section), CITATION])
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _architecture(
    encoder: Mapping[str, Any], transformer: Mapping[str, Any], resolution: int, parameters: int | None = None
) -> str:
    latent = f"{transformer['sample_size']}×{transformer['sample_size']}"
    rows = [
        ("images in a sequence", len(encoder.get("scales") or ()) or encoder["patch_size"] ** 2),
        ("image", f"{resolution}×{resolution} pixels, latents {latent} with {transformer['in_channels']} channels"),
        ("classes", f"{encoder['num_classes']:,}"),
        ("autoregressive transformer", _sizes(encoder)),
        ("diffusion transformer", _sizes(transformer)),
    ]
    if parameters is not None:
        rows.append(("parameters", f"{parameters:,} beside the VAE's"))
    return _table(("", ""), rows)


def _sizes(config: Mapping[str, Any]) -> str:
    heads = config["num_attention_heads"]
    return f"{config['num_layers']} layers, width {heads * config['attention_head_dim']}, {heads} heads"


def _class_names(pipeline: Any, most: int = 20) -> str:
    names = list((pipeline.config.id2label or {}).values())
    return ", ".join(map(str, names)) if 0 < len(names) <= most else "the classes"


def _shown(label: int | str) -> str:
    """A label as Python source."""
    return str(label) if isinstance(label, int) else f'"{label}"'


def _usage(
    source: str, label: int | str, extra_import: str = "", convert: str | None = None, with_code: bool = False
) -> str:
    code = (
        f"from transdiff_pipelines import {extra_import}TransDiffPipeline\n\n"
        f"pipe = TransDiffPipeline.from_pretrained({source})\n"
        f"image = pipe({_shown(label)}).images[0]"
    )
    text = "## Usage\n\n"
    if convert:
        text += f"```bash\n{convert}\n```\n\n"
    text += f"```python\n{code}\n```"
    if with_code:
        text += (
            "\n\nWithout the package, with the code of this repository:\n\n```python\n"
            "from diffusers import DiffusionPipeline\n\n"
            f"pipe = DiffusionPipeline.from_pretrained({source}, trust_remote_code=True)\n```"
        )
    return text


def _settings(guidance: Any, drift: float | None, diffusion: float | None, steps: int | None = None) -> str:
    argument = "an argument of the call"
    rows = [
        ("`guidance_scale`", 1.0 if guidance is None else guidance, f"`model_index.json`; {argument}"),
        (
            "`num_inference_steps`",
            steps or DEFAULT_NUM_INFERENCE_STEPS,
            f"{'`model_index.json`; ' if steps else ''}{argument}, for each image of a sequence",
        ),
    ]
    if drift is not None:
        rows += [("`drift_scale`", drift, "the scheduler"), ("`diffusion_scale`", diffusion, "the scheduler")]
    return f"## Recommended settings\n\nUsed unless others are given.\n\n{_table(('', '', 'kept in'), rows)}"


def _limits(limits: Sequence[str]) -> str:
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _published_results(model: PublishedModel) -> list[EvalResult]:
    """The published numbers for the metadata, marked as such."""
    values = {
        "fid": ("FID-50K", model.fid),
        "inception_score": ("Inception Score", model.inception_score),
        "precision": ("precision", model.precision),
        "recall": ("recall", model.recall),
    }
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=IMAGENET,
            dataset_name=f"ImageNet {model.resolution}×{model.resolution}",
            metric_type=kind,
            metric_name=f"{name} (published, unverified)",
            metric_value=value,
            verified=False,
            source_name="the TransDiff paper (arXiv 2506.09482) and its authors' repository",
            source_url=PAPER_URL,
        )
        for kind, (name, value) in values.items()
        if value is not None
    ]


def _published_table(model: PublishedModel) -> str:
    rows = [
        ("FID-50K", model.fid, model.fid_without_guidance),
        ("Inception Score", model.inception_score, model.inception_score_without_guidance),
        ("precision", model.precision, None),
        ("recall", model.recall, None),
        ("seconds per image, A800-class GPU", model.seconds_per_image, None),
    ]
    kept = [tuple("" if value is None else value for value in row) for row in rows if row[1] is not None]
    text = f"Published by the authors ([paper]({PAPER_URL})) with the settings above; unverified, not measured here."
    note = f"\n\n{model.note}" if model.note else ""
    return f"## Results\n\n{text}\n\n{_table(('', 'with guidance', 'without'), kept)}{note}"


def _results(quality: Mapping[str, Any], dataset: str, measures: Mapping[str, Any]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=dataset.replace(" ", "-"),
            dataset_name=dataset,
            dataset_split=quality["split"],
            metric_type=kind,
            metric_name=title,
            metric_value=round(quality["mean"][name] * factor, 4),
            verified=False,
        )
        for name, (kind, title, factor) in measures.items()
        if name in quality["mean"]
    ]


def _measured(recipe: str, quality: Mapping[str, Any]) -> str:
    count, seeds = quality["num_images"], len(quality["runs"])
    return f"Measured with `training.{recipe}.quality` on {count:,} images for each of {seeds} seeds"


def _results_table(quality: Mapping[str, Any], measured: str, measures: Mapping[str, Any]) -> str:
    rows = [
        (
            title,
            f"{quality['real'][name] * factor:.2f}",
            f"{quality['mean'][name] * factor:.2f} ± {quality['spread'][name] * factor:.2f}",
        )
        for name, (_, title, factor) in measures.items()
        if name in quality["mean"]
    ]
    return f"## Results\n\n{measured}\n\n" + _table(("", "real", "generated"), rows)


def _first_name(folder: Path) -> int | str:
    """A label of a saved pipeline, for an example: a dog where there is one."""
    index = folder / "model_index.json"
    names = json.loads(index.read_text(encoding="utf-8")).get("id2label") if index.is_file() else None
    known = list((names or {}).values())
    return "dog face" if "dog face" in known or not known else known[0]


def _quality(folder: Path) -> dict[str, Any] | None:
    """The results in a bundled model's folder, if there are any."""
    path = folder / QUALITY_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _is_flow_map(folder: Path) -> bool:
    path = folder / "transformer" / "config.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("num_flow_map_layers", 0) > 0


def _saved_facts(folder: Path) -> list[str]:
    """Architecture and settings of a saved pipeline, from its configuration files; none if there is no pipeline."""
    if not (folder / "model_index.json").is_file():
        return []
    index, encoder, transformer, vae, scheduler = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in (
            "model_index.json",
            "condition_encoder/config.json",
            "transformer/config.json",
            "vae/config.json",
            "scheduler/scheduler_config.json",
        )
    )
    resolution = transformer["sample_size"] * vae_stride(vae)
    scales = scheduler.get("drift_scale"), scheduler.get("diffusion_scale")
    return [
        _architecture(encoder, transformer, resolution),
        _settings(index.get("guidance_scale"), *scales, index.get("num_inference_steps")),
    ]


def _facts(pipeline: Any) -> list[str]:
    """Architecture and settings of a pipeline in memory."""
    encoder, transformer = pipeline.condition_encoder, pipeline.transformer
    resolution = pipeline.image_side
    parameters = encoder.num_parameters() + transformer.num_parameters()
    drift, diffusion = (pipeline.scheduler.config.get(name) for name in ("drift_scale", "diffusion_scale"))
    return [
        _architecture(encoder.config, transformer.config, resolution, parameters),
        _settings(pipeline.config.guidance_scale, drift, diffusion, pipeline.config.num_inference_steps),
    ]


def _example_label(pipeline: Any) -> int | str:
    """A label for the usage example: the first name that means one class, or class 0."""
    return next(iter(pipeline.labels), 0)


def _loss_table(metrics: Sequence[Mapping[str, float]], rows: int = 10) -> str:
    """Steps and losses, evenly thinned to about `rows` lines; the last is always there."""
    if not metrics:
        return ""
    stride = -(-len(metrics) // rows)
    names = ["step", *(name for name in metrics[-1] if name.startswith("loss"))]
    kept = metrics[::-1][::stride][::-1]
    values = [[f"{line['step']:.0f}", *(f"{line.get(name, float('nan')):.4f}" for name in names[1:])] for line in kept]
    return _table([name.replace("_", " ") for name in names], values)

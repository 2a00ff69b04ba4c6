"""bfloat16 and float16 against float32: relative error of final latents with recorded noise.

    python -m benchmarks.precision --output precision

writes `precision.json` and `precision.md`: the small golden models of the tests, and with `--model` a random model
of a published size. Each half precision is tried as it is and with parts kept in float32, to see which need it. The
error is |half - float32| / |float32| in the Euclidean norm, the latents being float32 between steps in any case.
"""

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from transdiff_pipelines import TransDiffPipeline, convert_original_checkpoint
from transdiff_pipelines.files import home_path
from transdiff_pipelines.latents import unpack_latents
from transdiff_pipelines.presets import published_model

from .common.machine import DTYPES, describe
from .common.peers import CPU, random_pipeline, recorded_step_noise
from .common.report import command_line, markdown_table, write_json, write_text


GOLDEN = Path(__file__).parent.parent / "tests" / "fixtures" / "golden"
GOLDEN_MODELS = ("one_step_256", "mrar_256", "one_step_512")
# Modules that are kept in float32 in a run. The sinusoid of time and the latents are float32 in every run.
KEPT = {
    "nothing": (),
    "time embedding": ("transformer.time_embedding", "transformer.time_modulation"),
    "first and last layer": ("transformer.proj_in", "transformer.norm_out", "transformer.proj_out"),
    "condition encoder": ("condition_encoder",),
    "decoder": ("transformer",),
}


class Run:
    """A pipeline with the arguments and noise of one reproducible call, and the latents that were recorded for it."""

    def __init__(
        self,
        name: str,
        pipeline: TransDiffPipeline,
        step_noise: torch.Tensor,
        recorded: torch.Tensor | None = None,
        **arguments: Any,
    ):
        self.name, self.pipeline, self.recorded, self.arguments = name, pipeline, recorded, arguments
        self.step_noise = step_noise.to(pipeline.device)
        pipeline.set_progress_bar_config(disable=True)

    def latents(self, dtype: torch.dtype, kept: Sequence[str] = ()) -> torch.Tensor:
        """Final latents with the models in `dtype` but for the modules named in `kept`."""
        parts = {name: copy.deepcopy(getattr(self.pipeline, name)) for name in ("condition_encoder", "transformer")}
        pipeline = TransDiffPipeline(**(self.pipeline.components | parts))
        pipeline.set_progress_bar_config(disable=True)
        for part in parts.values():
            part.to(dtype)
        for name in kept:
            component, _, path = name.partition(".")
            keep_float32(parts[component].get_submodule(path), dtype)
        with recorded_step_noise(pipeline, iter(self.step_noise)):
            return pipeline(**self.arguments, output_type="latent").images


def keep_float32(module: nn.Module, dtype: torch.dtype) -> None:
    """Run `module` in float32 inside a model in `dtype`."""

    def cast(value: Any, to: torch.dtype) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(cast(entry, to) for entry in value)
        return value.to(to) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    module.float()
    if hasattr(module, "config"):  # the pipeline casts inputs to the dtype of whole models only
        return
    module.register_forward_pre_hook(lambda _, args: cast(args, torch.float32))
    module.register_forward_hook(lambda _, args, output: cast(output, dtype))


def golden_runs(device: torch.device = CPU) -> Iterator[Run]:
    """Every recorded trajectory of the golden models, to be run on `device`."""
    vae = GOLDEN / "vae.checkpoint-last.pth"
    for name in GOLDEN_MODELS:
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            meta = json.loads(file.metadata()["meta"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
        pipeline = convert_original_checkpoint(GOLDEN / f"{name}.checkpoint-last.pth", vae, num_attention_heads=2)
        pipeline.to(device)
        side = pipeline.transformer.config.sample_size
        for case, (guidance, drift, diffusion) in enumerate(meta["cfg_scale0_scale1"]):
            scheduler = type(pipeline.scheduler).from_config(
                pipeline.scheduler.config, drift_scale=drift, diffusion_scale=diffusion
            )
            yield Run(
                f"{name}, case {case}",
                TransDiffPipeline(**(pipeline.components | {"scheduler": scheduler})),
                torch.stack([unpack_latents(noise, 1, side, side) for noise in tensors[f"sample{case}.step_noise"]]),
                tensors[f"sample{case}.latents"],
                class_labels=tensors["labels"],
                guidance_scale=guidance,
                num_inference_steps=meta["num_inference_steps"],
                latents=unpack_latents(tensors[f"sample{case}.noise"], 1, side, side),
            )


def random_run(name: str, steps: int, device: torch.device = CPU) -> Run:
    """A random model of a published size, one image."""
    model = published_model(name)
    generator = torch.Generator().manual_seed(0)
    shape = (model.num_images * (steps - 1) + 1, 1, 16, model.latent_size, model.latent_size)
    noise, *step_noise = torch.randn(shape, generator=generator)
    pipeline = random_pipeline(model, device=device).to(device)
    return Run(
        f"random {name}, {steps} steps",
        pipeline,
        torch.stack(step_noise),
        class_labels=[3],
        num_inference_steps=steps,
        latents=noise,
    )


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """|result - expected| / |expected|, Euclidean."""
    return ((result - expected).norm() / expected.norm()).item()


def error_to_recorded(run: Run) -> float:
    """Of float32 latents to what the authors' code computed on a CPU: the largest error over the largest value."""
    assert run.recorded is not None, "the run has no recorded latents"
    difference = run.latents(torch.float32).cpu() - run.recorded
    return (difference.abs().max() / run.recorded.abs().max()).item()


def errors(run: Run, dtypes: Sequence[str], kept: Sequence[str]) -> list[dict[str, Any]]:
    """The error of each precision with each choice of kept modules."""
    expected = run.latents(torch.float32)
    return [
        {
            "run": run.name,
            "dtype": dtype,
            "kept": name,
            "error": relative_error(run.latents(DTYPES[dtype], KEPT[name]), expected),
        }
        for dtype in dtypes
        for name in kept
    ]


def markdown(result: dict[str, Any]) -> str:
    """A row for each run and precision, a column for what is kept in float32."""
    kept = list(dict.fromkeys(row["kept"] for row in result["rows"]))
    table: dict[tuple[str, str], dict[str, float]] = {}
    for row in result["rows"]:
        table.setdefault((row["run"], row["dtype"]), {})[row["kept"]] = row["error"]
    rows = [
        [run, dtype, *(f"{cells[name]:.1e}" if name in cells else "—" for name in kept)]
        for (run, dtype), cells in table.items()
    ]
    header = ["run", "precision", *(f"float32: {name}" for name in kept)]
    return f"`{result['command']}`\n\n{markdown_table(header, rows)}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float16"], default=["bfloat16", "float16"])
    parser.add_argument("--model", help="also a random model of this published size")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of the random model")
    parser.add_argument("--kept", nargs="+", choices=list(KEPT), default=list(KEPT), help="for the random model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=home_path, required=True, help="results go to OUTPUT.json and .md")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    options = parse(arguments)
    device = torch.device(options.device)
    result: dict[str, Any] = {
        "command": command_line("benchmarks.precision"),
        "machine": describe(device),
        "rows": [row for run in golden_runs(device) for row in errors(run, options.dtypes, list(KEPT))],
    }
    if options.model:
        result["rows"] += errors(random_run(options.model, options.steps, device), options.dtypes, options.kept)
    write_json(options.output.with_suffix(".json"), result)
    write_text(options.output.with_suffix(".md"), markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()

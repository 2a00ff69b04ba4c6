"""What the published models cost: README's table, counted on models without weights.

    python -m benchmarks.model_sizes

Bytes of weights are those of encoder, decoder and VAE. A GPU holds beside them what a call works with (RESULTS.md).
"""

from accelerate import init_empty_weights

from benchmarks.common.peers import vae_of_published_size
from transdiff_pipelines import ARConditionEncoder, TransDiffTransformer2DModel
from transdiff_pipelines.presets import DEFAULT_NUM_INFERENCE_STEPS, PUBLISHED, PublishedModel


HEADER = """\
| model | image | parameters | bfloat16 | float32 | decoder calls an image | FID | authors' seconds an image |
|---|---|---:|---:|---:|---:|---:|---:|"""


def row(model: PublishedModel) -> str:
    """The model's row of the table."""
    with init_empty_weights():
        encoder, vae = ARConditionEncoder(**model.encoder_config()), vae_of_published_size()
        transformer = TransDiffTransformer2DModel(**model.transformer_config())
    parameters = encoder.num_parameters() + transformer.num_parameters()
    weights = parameters + vae.num_parameters()
    calls = DEFAULT_NUM_INFERENCE_STEPS * model.num_images
    called = f"{model.num_images} × {DEFAULT_NUM_INFERENCE_STEPS}" if model.num_images > 1 else f"{calls}"
    sizes = [f"{weights * width / 1e9:.1f} GB" for width in (2, 4)]
    cells = [f"`{model.folder}`", f"{model.resolution} px", f"{parameters / 1e6:,.0f} M", *sizes, called]
    return f"| {' | '.join([*cells, f'{model.fid:.2f}', str(model.seconds_per_image or '—')])} |"


def table() -> str:
    """All published models, the smallest first."""
    return "\n".join([HEADER, *map(row, PUBLISHED.values())])


if __name__ == "__main__":
    print(table())

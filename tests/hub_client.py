"""What the processes of test_hub.py do against its Hub: `python hub_client.py STAGE FOLDER`.

A stage is a list of checks, run in order in one fresh process, since importing takes longer than all of them. Their
outcomes go to FOLDER/STAGE.json: "" or a traceback. Nothing heavy is imported at the top: the test reads the names of
the checks from here, and one stage must not import the package.
"""

import json
import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


STAGES: dict[str, dict[str, Callable[[Path], None]]] = {"push": {}, "load": {}, "offline": {}, "without_package": {}}
ONE_PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)
OWN_CARD = "---\nlicense:   apache-2.0   # ours\n---\r\n# Mine\n"


def check(stage: str) -> Callable:
    def register(function: Callable[[Path], None]) -> Callable[[Path], None]:
        STAGES[stage][function.__name__] = function
        return function

    return register


def sample(pipe):
    """Latents of two labels, the same for the same weights and code."""
    import torch

    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(["goldfish", 4], num_inference_steps=2, generator=generator, output_type="latent").images


def same_as_pushed(folder: Path, pipe, name: str = "reference") -> bool:
    import torch

    return torch.equal(sample(pipe), torch.load(folder / f"{name}.pt", weights_only=True))


def downloaded(cache: Path) -> set[str]:
    """Files of the only repository in a cache, by their path in it."""
    (snapshot,) = cache.glob("models--*/snapshots/*")
    return {str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()}


# --- pushing ---


@check("push")
def two_revisions(folder: Path) -> None:
    import torch
    from huggingface_hub import HfApi
    from tiny import tiny_pipeline, tiny_transformer

    old = tiny_pipeline(transformer=tiny_transformer(num_layers=1))
    commit = old.push_to_hub("tester/tiny", commit_message="One layer")
    HfApi().create_branch("tester/tiny", branch="first", revision=commit.oid)
    torch.save(sample(old), folder / "old.pt")
    (folder / "old.sha").write_text(commit.oid)
    pipe = tiny_pipeline()
    pipe.push_to_hub("tester/tiny")
    torch.save(sample(pipe), folder / "reference.pt")


@check("push")
def a_variant_beside_the_full_weights(folder: Path) -> None:
    import torch
    from tiny import tiny_pipeline

    tiny_pipeline().to(torch.float16).push_to_hub("tester/tiny", variant="fp16")


@check("push")
def saving_in_shards_and_pushing(folder: Path) -> None:
    from tiny import tiny_pipeline

    tiny_pipeline().save_pretrained(folder / "tiny-sharded", max_shard_size="20KB", push_to_hub=True)
    assert len(list((folder / "tiny-sharded/transformer").glob("*.safetensors"))) > 1


@check("push")
def with_code(folder: Path) -> None:
    from tiny import tiny_pipeline

    tiny_pipeline().push_to_hub("tester/tiny-code", include_code=True)


@check("push")
def single_components(folder: Path) -> None:
    from tiny import tiny_pipeline

    pipe = tiny_pipeline()
    pipe.transformer.push_to_hub("tester/decoder")
    pipe.condition_encoder.push_to_hub("tester/parts", subfolder="encoder")
    pipe.scheduler.push_to_hub("tester/parts", subfolder="sampler")


@check("push")
def to_a_repository_with_a_card(folder: Path) -> None:
    from huggingface_hub import HfApi
    from tiny import tiny_pipeline

    HfApi().create_repo("tester/own-card")
    HfApi().upload_file(path_or_fileobj=OWN_CARD.encode(), path_in_repo="README.md", repo_id="tester/own-card")
    tiny_pipeline().push_to_hub("tester/own-card")
    tiny_pipeline().save_pretrained(folder / "own-card", push_to_hub=True)


@check("push")
def a_folder_with_a_card_and_its_picture(folder: Path) -> None:
    from tiny import tiny_pipeline

    from transdiff_pipelines import TransDiffPipeline

    trained = folder / "trained"
    tiny_pipeline().save_pretrained(trained)
    (trained / "README.md").write_text("# Trained\n\n![samples](samples.png) ![](https://elsewhere/b.png)\n")
    (trained / "samples.png").write_bytes(ONE_PIXEL)
    TransDiffPipeline.from_pretrained(trained).push_to_hub("tester/trained", private=True)


# --- loading, with the package imported ---


@check("load")
def by_its_own_class(folder: Path) -> None:
    from transdiff_pipelines import TransDiffPipeline

    pipe = TransDiffPipeline.from_pretrained("tester/tiny")
    assert same_as_pushed(folder, pipe)
    assert pipe.config.guidance_scale == 1.3
    assert pipe.labels["goldfish"] == 1


@check("load")
def by_diffusion_pipeline(folder: Path) -> None:
    from diffusers import DiffusionPipeline

    from transdiff_pipelines import TransDiffPipeline

    pipe = DiffusionPipeline.from_pretrained("tester/tiny")
    assert type(pipe) is TransDiffPipeline
    assert same_as_pushed(folder, pipe)


@check("load")
def revisions_by_branch_and_commit(folder: Path) -> None:
    from transdiff_pipelines import TransDiffPipeline

    for revision in ("first", (folder / "old.sha").read_text()):
        pipe = TransDiffPipeline.from_pretrained("tester/tiny", revision=revision)
        assert pipe.transformer.config.num_layers == 1
        assert same_as_pushed(folder, pipe, "old")


@check("load")
def a_variant_alone(folder: Path) -> None:
    import torch

    from transdiff_pipelines import TransDiffPipeline

    cache = folder / "variant-cache"
    pipe = TransDiffPipeline.from_pretrained("tester/tiny", variant="fp16", dtype=torch.float16, cache_dir=cache)
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float16}
    weights = {path for path in downloaded(cache) if path.endswith(".safetensors")}
    assert len(weights) == 3
    assert all(".fp16." in path for path in weights)


@check("load")
def shards(folder: Path) -> None:
    from transdiff_pipelines import TransDiffPipeline

    assert same_as_pushed(folder, TransDiffPipeline.from_pretrained("tester/tiny-sharded"))


@check("load")
def models_by_auto_model(folder: Path) -> None:
    from diffusers import AutoModel

    from transdiff_pipelines import ARConditionEncoder, TransDiffTransformer2DModel

    for name, cls in (("condition_encoder", ARConditionEncoder), ("transformer", TransDiffTransformer2DModel)):
        assert type(AutoModel.from_pretrained("tester/tiny", subfolder=name)) is cls


@check("load")
def components_from_subfolders_and_repositories_of_their_own(folder: Path) -> None:
    from transdiff_pipelines import (
        ARConditionEncoder,
        FlowMatchEulerMaruyamaScheduler,
        TransDiffPipeline,
        TransDiffTransformer2DModel,
    )

    pipe = TransDiffPipeline.from_pretrained(
        "tester/tiny",
        revision="first",
        condition_encoder=ARConditionEncoder.from_pretrained("tester/parts", subfolder="encoder"),
        transformer=TransDiffTransformer2DModel.from_pretrained("tester/decoder"),
        scheduler=FlowMatchEulerMaruyamaScheduler.from_pretrained("tester/parts", subfolder="sampler"),
    )
    assert same_as_pushed(folder, pipe)
    scheduler = FlowMatchEulerMaruyamaScheduler.from_pretrained("tester/tiny", subfolder="scheduler")
    assert scheduler.config.drift_scale == 0.9


@check("load")
def a_component_that_is_passed_is_not_downloaded(folder: Path) -> None:
    from tiny import tiny_transformer

    from transdiff_pipelines import TransDiffPipeline

    cache = folder / "passed-cache"
    pipe = TransDiffPipeline.from_pretrained("tester/tiny", transformer=tiny_transformer(), cache_dir=cache)
    assert same_as_pushed(folder, pipe)
    assert not [path for path in downloaded(cache) if path.startswith("transformer/")]


@check("load")
def a_repository_with_code_needs_no_trust(folder: Path) -> None:
    from transdiff_pipelines import TransDiffPipeline, TransDiffTransformer2DModel

    pipe = TransDiffPipeline.from_pretrained("tester/tiny-code")
    assert same_as_pushed(folder, pipe)
    assert type(pipe.transformer) is TransDiffTransformer2DModel
    assert not any("diffusers_modules" in name for name in sys.modules)


@check("load")
def its_code_can_be_trusted_all_the_same(folder: Path) -> None:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("tester/tiny-code", trust_remote_code=True)
    assert same_as_pushed(folder, pipe)
    assert type(pipe).__module__.startswith("diffusers_modules.")


@check("load")
def saved_again_without_code_it_is_as_any_other(folder: Path) -> None:
    from transdiff_pipelines import TransDiffPipeline

    TransDiffPipeline.from_pretrained("tester/tiny-code").save_pretrained(folder / "again")
    index = json.loads((folder / "again/model_index.json").read_text())
    assert index["_class_name"] == "TransDiffPipeline"
    assert index["transformer"] == ["transdiff_pipelines", "TransDiffTransformer2DModel"]


# --- the same files again, without a network ---


@check("offline")
def pipelines_from_the_cache(folder: Path) -> None:
    from diffusers import DiffusionPipeline

    from transdiff_pipelines import TransDiffPipeline

    assert same_as_pushed(folder, TransDiffPipeline.from_pretrained("tester/tiny"))
    assert same_as_pushed(folder, DiffusionPipeline.from_pretrained("tester/tiny"))
    assert same_as_pushed(folder, TransDiffPipeline.from_pretrained("tester/tiny-code"))
    assert same_as_pushed(folder, TransDiffPipeline.from_pretrained("tester/tiny", revision="first"), "old")


@check("offline")
def a_component_from_the_cache(folder: Path) -> None:
    from diffusers import AutoModel

    from transdiff_pipelines import TransDiffTransformer2DModel

    model = AutoModel.from_pretrained("tester/tiny", subfolder="transformer")
    assert type(model) is TransDiffTransformer2DModel


# --- a machine on which the package is not installed ---


class NotInstalled:
    """An importer that knows of no transdiff_pipelines."""

    def find_spec(self, name: str, path=None, target=None) -> None:
        if name.split(".")[0] == "transdiff_pipelines":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


class Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@check("without_package")
def code_is_not_run_unless_trusted(folder: Path) -> None:
    import pytest
    from diffusers import DiffusionPipeline

    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained("tester/tiny-code")
    assert not any("diffusers_modules" in name for name in sys.modules)


@check("without_package")
def trusted_code_gives_the_identical_image(folder: Path) -> None:
    from diffusers import DiffusionPipeline

    messages = Messages()
    logging.getLogger("diffusers").addHandler(messages)
    pipe = DiffusionPipeline.from_pretrained("tester/tiny-code", trust_remote_code=True)
    assert same_as_pushed(folder, pipe)
    # Nothing to complain of: no missing packages, no unexpected config entries or component types.
    assert [text for text in messages.texts if "trust_remote_code" not in text] == []
    assert type(pipe.transformer).__module__.startswith("diffusers_modules.")


@check("without_package")
def labels_and_errors_work_as_with_it(folder: Path) -> None:
    import pytest
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("tester/tiny-code", trust_remote_code=True)
    assert pipe.get_label_ids("goldfish") == [1]
    with pytest.raises(ValueError, match="did you mean 'goldfish'"):
        pipe("goldfsh")


@check("without_package")
def the_package_was_not_there(folder: Path) -> None:
    assert not any(name.split(".")[0] == "transdiff_pipelines" for name in sys.modules)


def main(stage: str, folder: Path) -> None:
    if stage == "without_package":
        sys.meta_path.insert(0, NotInstalled())  # type: ignore[arg-type]
    import torch

    torch.set_num_threads(1)
    outcomes = {}
    for name, function in STAGES[stage].items():
        try:
            function(folder)
            outcomes[name] = ""
        except Exception:
            outcomes[name] = traceback.format_exc()
    (folder / f"{stage}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

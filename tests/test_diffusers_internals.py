"""What diffusers does not promise to keep: used at one place, there today, and refused clearly once it is gone.

When a test of this file fails after a new diffusers, look up in its sources where the name went. If there is a public
one by now, use that; else make `diffusers_internal` look in both places. Then widen `TESTED_DIFFUSERS` and the
table of versions in CONTRIBUTING.md.
"""

import ast
import re
from pathlib import Path

import diffusers
import pytest
from diffusers import DiffusionPipeline
from diffusers.models.cache_utils import CacheMixin
from tiny import tiny_pipeline

from transdiff_pipelines import TransDiffPipeline, diffusers_internals, registration
from transdiff_pipelines.diffusers_internals import TESTED_DIFFUSERS, diffusers_internal


ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("src", "training", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
HUGGING_FACE = ("diffusers", "transformers", "accelerate", "peft", "huggingface_hub", "safetensors")


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def imported_names(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def internal_names() -> list[tuple[str, str]]:
    """The arguments of every call of `diffusers_internal`; those of the hooks' tables are put together from parts."""
    calls = [
        tuple(argument.value for argument in node.args)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "diffusers_internal"
        and all(isinstance(argument, ast.Constant) for argument in node.args)
    ]
    kinds = [
        f"{part}{kind}" for part in ("TransformerBlock", "AttentionProcessor") for kind in ("Metadata", "Registry")
    ]
    return sorted(calls) + [("hooks._helpers", name) for name in kinds]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_name_is_imported_past_the_one_place(path: Path) -> None:
    names = imported_names(ast.parse(path.read_text(encoding="utf-8")))
    assert [name for name in names if name.split(".")[0] in HUGGING_FACE and is_private(name)] == []


@pytest.mark.parametrize(("module", "name"), internal_names())
def test_this_diffusers_has_the_name(module: str, name: str) -> None:
    assert diffusers_internal(module, name) is not None


@pytest.mark.parametrize(
    ("owner", "name"), [(DiffusionPipeline, "_dict_from_json_file"), (CacheMixin, "_reset_stateful_cache")]
)
def test_this_diffusers_has_the_method_that_is_overridden_or_called(owner: type, name: str) -> None:
    assert callable(getattr(owner, name))


@pytest.mark.parametrize(("module", "name"), [("loaders.lora_base", "_nowhere"), ("no_such.module", "anything")])
def test_a_name_that_is_gone_is_refused_with_the_versions_that_have_it(module: str, name: str) -> None:
    with pytest.raises(ImportError, match=re.escape(f"diffusers {diffusers.__version__} has no")) as caught:
        diffusers_internal(module, name)
    assert f"diffusers.{module}.{name}" in str(caught.value)
    assert TESTED_DIFFUSERS in str(caught.value)


def gone(module: str, name: str) -> None:
    raise ImportError(f"diffusers has no diffusers.{module}.{name}")


def test_without_the_hooks_tables_all_but_the_caches_works(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(registration, "diffusers_internal", gone)
    monkeypatch.setattr(registration.logger, "warning", warnings.append)
    registration.register_hook_targets([int], str)
    assert len(warnings) == 1
    assert "FirstBlockCache" in warnings[0]
    assert "hooks._helpers.TransformerBlockMetadata" in warnings[0]


def test_without_the_table_of_loadable_classes_registration_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "diffusers_internal", gone)
    with pytest.raises(ImportError, match="LOADABLE_CLASSES"):
        registration.register_with_diffusers()


def test_without_the_file_loaders_only_what_needs_them_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_module(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    pipe = tiny_pipeline()
    monkeypatch.setattr(diffusers_internals, "import_module", no_module)
    with pytest.raises(ImportError, match="_fetch_state_dict"):
        pipe.load_lora_weights("a folder")
    with pytest.raises(ImportError, match="_extract_repo_id_and_weights_name"):
        TransDiffPipeline.from_single_file("https://huggingface.co/a/b/blob/main/c.pth", vae="vae")
    assert pipe(1, num_inference_steps=1, output_type="latent").images is not None

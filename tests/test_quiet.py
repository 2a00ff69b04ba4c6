"""An import and each subcommand that succeeds leave stderr empty, each tried in a process of its own."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from tiny import tiny_pipeline

import transdiff_pipelines


ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "fixtures" / "golden"
CHECKPOINT, VAE = GOLDEN / "one_step_256.checkpoint-last.pth", GOLDEN / "vae.checkpoint-last.pth"
SLOW_HALF_PRECISION = "note: float16 is slow on this processor"  # meant, and true of some processors


def stderr_of(*arguments: object, folder: Path = ROOT) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quiet")
    tiny_pipeline().save_pretrained(folder)
    return folder


def test_import() -> None:
    assert stderr_of("-c", "import transdiff_pipelines") == ""


def test_casting(model: Path) -> None:
    script = (
        "import sys, torch; from diffusers.utils import logging; from transdiff_pipelines import TransDiffPipeline\n"
        "logging.disable_progress_bar(); pipe = TransDiffPipeline.from_pretrained(sys.argv[1])\n"
        "pipe.to(torch.bfloat16).to(dtype=torch.float16); pipe.transformer.to('cpu', torch.float64)"
    )
    assert stderr_of("-c", script, model) == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "3", "--model", "{model}", "--steps", "2", "--device", "cpu", "--dtype", "float16"],
        ["info", "{model}"],
        ["convert", CHECKPOINT, "--vae", VAE, "--num-attention-heads", "2", "--output", "new"],
        ["train", "training/configs/digits_1step.yaml"],
        ["evaluate", "{model}"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands(arguments: list, model: Path, tmp_path: Path) -> None:
    filled = [str(argument).format(model=model) for argument in arguments]
    # What prints a command for the checkout wants to be called there; the others write where they are called.
    folder = ROOT if arguments[0] in ("train", "evaluate") else tmp_path
    said = stderr_of("-m", "transdiff_cli", *filled, folder=folder)
    assert [line for line in said.splitlines() if not line.startswith(SLOW_HALF_PRECISION)] == []


OWN_BARS = ("encoding: ", "training: ", "sampling: ", "features: ")  # what a command shows of its progress


def test_training_commands(model: Path, tmp_path: Path) -> None:
    images = tmp_path / "images" / "noise"
    images.mkdir(parents=True)
    for number in range(4):
        Image.effect_noise((8, 8), 60).convert("RGB").save(images / f"{number}.png")
    config = {
        "output": str(tmp_path / "run"),
        "model": {"encoder_layers": 1, "decoder_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
        | {"num_class_tokens": 2},
        "data": {
            "images": str(images.parent),
            "vae": str(model / "vae"),
            "cache": str(tmp_path / "cache"),
            "image_size": 8,
            "batch_size": 2,
        },
        "schedule": {"steps": 2},
        "preview": {"every": None},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    trained = ["--config", tmp_path / "config.yaml"]
    measured = ["--extractor", "pixels", "--num-images", "2", "--num-inference-steps", "1"]
    commands = [
        ["training.cache_latents", *trained],
        ["training.train", *trained],
        ["training.evaluate", "--model", tmp_path / "run", *measured, "--output", tmp_path / "evaluation"],
    ]
    # One process for all: its imports take longer than the commands.
    script = (
        "import json, runpy, sys\n"
        "for sys.argv in json.loads(sys.argv[1]): runpy.run_module(sys.argv[0], run_name='__main__')"
    )
    said = stderr_of("-c", script, json.dumps(commands, default=str)).replace("\r", "\n").splitlines()
    assert [line for line in said if line and not line.startswith(OWN_BARS)] == []


# Each as upstream wrote it with the versions of constraints.txt, the paths shortened.
UPSTREAM = [
    ("torchao", "Failed to load /lib/torchao/_C_cutlass_90a.abi3.so: Could not load this library: /lib/torchao/_C"),
    ("torchao", "Skipping import of cpp extensions due to incompatible torch version 2.13.0+cpu for torchao version"),
    ("torch.utils._pytree", "<enum 'KernelPreference'> is an Enum subclass and is now natively supported by torch."),
    ("diffusers.quantizers.torchao.torchao_quantizer", "Unable to import `torchao` Tensor objects. This may affect"),
    (
        "diffusers.models.modeling_utils",
        "There are modules in AutoencoderKL that should be kept in float32: []. Casting directly with `to()` can lead",
    ),
    (
        "diffusers.pipelines.pipeline_utils",
        "Pipelines loaded with `dtype=torch.float16` cannot run with `cpu` device. It is not recommended to move",
    ),
]


OTHERS = [
    ("torchao", "Failed to load /lib/torchao/_C_cutlass_90a.abi3.so: no such file"),
    ("torch.utils._pytree", "<enum 'Color'> is an Enum subclass and is now natively supported by torch.compile"),
    (
        "diffusers.models.modeling_utils",
        "There are modules in Other that should be kept in float32: ['norm']. Casting directly with `to()` can lead",
    ),
    (
        "diffusers.pipelines.pipeline_utils",
        "Pipelines loaded with `dtype=torch.float16` cannot run with `mps` device.",
    ),
]


def passes(name: str, message: str) -> bool:
    logger = logging.getLogger(name)
    return bool(logger.filter(logger.makeRecord(name, logging.WARNING, "", 0, message, (), None)))


def test_a_message_is_left_out_by_its_exact_words() -> None:
    assert [message for name, message in UPSTREAM if passes(name, message)] == []
    assert [message for name, message in OTHERS if not passes(name, message)] == []
    assert {name for name, _ in UPSTREAM} == set(transdiff_pipelines.upstream_messages.MESSAGES)

"""What a person does with an installed wheel, without the checkout; `make test-wheel` runs it.

    cd SOMEWHERE; python -I .../tests/use_wheel.py

run by the Python of an environment in which the wheel is installed, in an empty folder. A file that the wheel lacks
shows here, because neither the checkout nor its tests can be imported (-I).
"""

import importlib.metadata
import json
import subprocess
import sys
import sysconfig
from pathlib import Path


CHECKOUT = Path(__file__).resolve().parents[1]
GOLDEN = CHECKOUT / "tests" / "fixtures" / "golden"
COMMAND = Path(sysconfig.get_path("scripts")) / "transdiff"

# Loads the repository in the folder "with_code" where transdiff_pipelines cannot be imported, and draws.
WITHOUT_PACKAGE = """
import sys
sys.modules["transdiff_pipelines"] = None
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("with_code", trust_remote_code=True)
pipe(3, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0].save("without.png")
"""


def run(*command: object) -> None:
    print("$", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True)


def check_installation() -> None:
    import transdiff_pipelines

    package = Path(transdiff_pipelines.__file__).resolve()
    assert package.is_relative_to(Path(sys.prefix).resolve()), f"{package} is not in the environment {sys.prefix}"
    sources = [path for path in (CHECKOUT / "src").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    names = [path.relative_to(CHECKOUT / "src") for path in sources if "egg-info" not in path.parent.name]
    missing = [str(name) for name in names if not (package.parents[1] / name).is_file()]
    assert names
    assert not missing, f"the wheel lacks {missing}"
    metadata = importlib.metadata.metadata("transdiff_pipelines")
    assert metadata["Version"] == transdiff_pipelines.__version__
    page = str(metadata.get_payload())
    assert page.startswith("# transdiff_pipelines")
    assert "](docs/" not in page, "README has relative links, which lead nowhere on a package index"


def check_drawing() -> None:
    from PIL import Image

    run(COMMAND, "generate", 3, "--steps", 10, "--seed", 0, "--output", "digit.png")
    digit = Image.open("digit.png").convert("L")
    # A digit of light ink on a dark ground: neither empty nor noise.
    assert digit.size == (32, 32)
    low, high = digit.getextrema()
    assert high - low > 150, f"grey levels from {low} to {high}"


def check_emoji() -> None:
    from PIL import Image

    from transdiff_pipelines import EMOJI

    run(COMMAND, "generate", "dog face", "pizza", "--scheduler", "unipc", "--steps", 4, "--output", "emoji.png")
    emoji = Image.open("emoji.png")
    assert emoji.size == (128, 64)
    blocks = emoji.convert("L").resize((32, 16), Image.Resampling.BOX)
    corners = [blocks.getpixel((x, y)) for x in (0, 15, 16, 31) for y in (0, 15)]
    assert min(corners) > 200, f"grey levels of the corners are {corners}, and not white"
    authors = (EMOJI / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert "Twitter" in authors, "CC BY asks for the authors beside the weights"


def check_conversion() -> None:
    from transdiff_pipelines import TransDiffPipeline

    checkpoint, vae = (GOLDEN / f"{name}.checkpoint-last.pth" for name in ("mrar_256", "vae"))
    run(COMMAND, "convert", checkpoint, "--vae", vae, "--num-attention-heads", 2, "--output", "converted")
    pipe = TransDiffPipeline.from_pretrained("converted")
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(0, num_inference_steps=1).images) == 1


def check_code_repository() -> None:
    import torch
    from PIL import Image, ImageChops

    from transdiff_pipelines import DIGITS, TransDiffPipeline

    pipe = TransDiffPipeline.from_pretrained(DIGITS)
    pipe.save_pretrained("with_code", include_code=True)
    assert json.loads(Path("with_code/model_index.json").read_text())["_class_name"][0] == "pipeline"
    run(sys.executable, "-I", "-c", WITHOUT_PACKAGE)
    here = pipe(3, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert ImageChops.difference(here, Image.open("without.png").convert(here.mode)).getbbox() is None


def main() -> None:
    assert not any(Path().iterdir()), f"{Path().resolve()} is not empty"
    checks = (check_installation, check_drawing, check_emoji, check_conversion, check_code_repository)
    for check in checks:
        check()
    print(f"{len(checks)} passed, 0 failed")


if __name__ == "__main__":
    main()

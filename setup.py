"""Packaging of transdiff_pipelines.

The ranges are as wide as was tried: `make test-versions` runs the tests with the lower ends and with the newest
releases (CONTRIBUTING has the table), `constraints.txt` is between. The upper ends are the next major versions.
diffusers has none, because what a release of it may move is guarded (`diffusers_internals.py`).
"""

import re
from pathlib import Path

from setuptools import find_packages, setup


# The address of the source code, for the links of README on a package index. There is none yet: example.org, which
# belongs to nobody, stands for it. To be set before a release.
REPOSITORY = "https://example.org/transdiff_pipelines"

BASE = [
    "torch>=2.8,<3",
    "diffusers>=0.41",  # 0.40 is the first with `dtype=`, 0.41 with caches and group offloading as used here
    "transformers>=5,<6",  # diffusers' LoRA loaders import it
    "accelerate>=1.10,<2",
    "safetensors>=0.8,<1",
    "huggingface_hub>=1.32,<3",
    "peft>=0.21,<1",  # 0.20 loses the `layers_to_transform` of a LoRA
    "typer>=0.20,<1",  # Literal types
    "numpy>=2",
    "Pillow>=11",
]

EXTRAS = {
    "train": [
        "datasets>=4.4,<6",
        "fsspec>=2025.9",
        "matplotlib>=3.9",
        "PyYAML>=6.0.1",
        "resvg-py>=0.5",  # renders the emoji
        "scikit-learn>=1.6",  # the digits recipe: its images, and the classifier that judges the samples
        "scipy>=1.14",
        "tensorboard>=2.18",
        "tqdm>=4.67",
    ],
    # The Inception features. torchvision must be the build that fits the installed torch; without it use the
    # TorchScript Inception or an extractor of your own (training/evaluation/features.py).
    "eval": ["torch-fidelity>=0.4", "torchvision"],
    "deepspeed": ["deepspeed>=0.19,<0.20"],  # for sharding=zero2
    # Not in the test extra: diffusers imports it wherever it is installed, and its import has something to say.
    "quantization": ["torchao>=0.18,<1"],
    "demo": ["gradio>=6.31,<7"],
    "test": [
        "pytest>=9",
        "pytest-timeout>=2.4",
        "pytest-xdist>=3.8",
        "gradio>=6.31,<7",
        'deepspeed>=0.19,<0.20; sys_platform == "linux"',
    ],
    "browser": ["selenium>=4.51,<5"],  # with Chromium and its driver, from the system
    "docs": ["pdoc>=16"],  # the API reference
    "dev": ["mypy>=2", "ruff>=0.17,<0.18", "types-PyYAML>=6"],
}

HERE = Path(__file__).parent
INIT = (HERE / "src" / "transdiff_pipelines" / "__init__.py").read_text(encoding="utf-8")
README = HERE / "README.md"
VERSION = re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[1]

_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")
_CODE_OR_LINK = re.compile(
    r"""(?P<code>```.*?```|`[^`\n]*`)"""
    r"""|(?P<before>\]\(\s*<?|\b(?:src|href)=["']|^\[[^\]]+\]:[ \t]*<?)(?P<target>[^\s)>"']+)""",
    re.DOTALL | re.MULTILINE,
)


def absolute_links(markdown: str) -> str:
    """The page with its relative links led to this version's files in the repository; code stays as it is.

    A package index shows README without the files beside it. Pictures get the address of the file itself.
    """

    def absolute(found: re.Match) -> str:
        target = found["target"]
        if found["code"] or re.match(r"[a-z][a-z0-9+.-]*:|//|#", target, re.IGNORECASE):
            return found[0]
        path = target.removeprefix("./").removeprefix("/")
        kind = "raw" if path.lower().endswith(_PICTURES) else "blob"
        return f"{found['before']}{REPOSITORY}/{kind}/v{VERSION}/{path}"

    return _CODE_OR_LINK.sub(absolute, markdown)


setup(
    name="transdiff_pipelines",
    version=VERSION,
    description="TransDiff, class-to-image generation by autoregression and diffusion, for diffusers",
    long_description=absolute_links(README.read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    author="The transdiff_pipelines authors",
    url=REPOSITORY,
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"transdiff_pipelines": ["py.typed", "checkpoints/**/*", "data/*"]},
    install_requires=BASE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["transdiff = transdiff_cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    zip_safe=False,
)

"""Packaging of transdiff_pipelines.

The tests passed with the lower ends of these ranges and with `constraints.txt`. diffusers is held to one minor
version, because the package registers itself in tables that diffusers does not promise to keep.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup


BASE = [
    "torch>=2.13,<3",
    "diffusers>=0.42,<0.43",
    "transformers>=5.20,<6",  # diffusers' LoRA loaders import it
    "accelerate>=1.15,<2",
    "safetensors>=0.8,<1",
    "huggingface_hub>=2.4,<3",
    "peft>=0.21,<0.22",
    "typer>=0.29,<1",
    "numpy>=2",
    "Pillow>=12",
]

EXTRAS = {
    "train": [
        "datasets>=5.2,<6",
        "fsspec>=2026.9",
        "matplotlib>=3.10",
        "PyYAML>=6",
        "scikit-learn>=1.8",  # the digits recipe: its images, and the classifier that judges the samples
        "scipy>=1.17",
        "tensorboard>=2.20",
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

setup(
    name="transdiff_pipelines",
    version=re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[1],
    description="TransDiff, class-to-image generation by autoregression and diffusion, for diffusers",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The transdiff_pipelines authors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",  # as diffusers 0.42 asks
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

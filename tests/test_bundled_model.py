"""The digits model that ships inside the package, and the command that puts it there."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from tiny import seeded, tiny_pipeline

from training.digits.bundle import bundle
from training.digits.quality import pooled_pixels
from transdiff_pipelines import DIGITS, FlowMatchSDEMultistepScheduler, TransDiffPipeline


def test_it_is_small():
    assert sum(file.stat().st_size for file in Path(DIGITS).rglob("*") if file.is_file()) < 10e6


def test_its_digits_are_recognised():
    """By a classifier of the real digits; a few steps are enough for that, quality.py measures properly."""
    pipe = TransDiffPipeline.from_pretrained(DIGITS)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchSDEMultistepScheduler.from_config(pipe.scheduler.config)
    labels = np.arange(100) % 10
    images = pipe(labels.tolist(), num_inference_steps=12, generator=seeded(), output_type="np").images
    real = load_digits()
    recogniser = SVC(gamma=0.001).fit(real.data, real.target)
    assert (recogniser.predict(pooled_pixels(images)) == labels).mean() >= 0.95


def test_names_are_the_digits():
    pipe = TransDiffPipeline.from_pretrained(DIGITS)
    assert pipe.get_label_ids(["0", "9"]) == [0, 9]
    assert pipe.condition_encoder.num_images == 4


@pytest.mark.filterwarnings("ignore")
def test_bundling_keeps_the_pipeline_and_forgets_the_place(tmp_path):
    model, output = tmp_path / "trained", tmp_path / "package" / "digits"
    output.mkdir(parents=True)
    (output / "old.txt").write_text("from the model before")
    tiny_pipeline().save_pretrained(model)
    TransDiffPipeline.from_pretrained(model).save_pretrained(model)  # now its configs name the folder
    bundle(model, output)
    assert not (output / "old.txt").exists()
    assert list(output.parent.iterdir()) == [output]
    for config in output.rglob("*.json"):
        assert str(tmp_path) not in config.read_text()
    assert json.loads((output / "model_index.json").read_text())["guidance_scale"] == 1.3
    trained = TransDiffPipeline.from_pretrained(model).transformer.state_dict()
    for name, weight in TransDiffPipeline.from_pretrained(output).transformer.state_dict().items():
        expected = trained[name].half().float()
        assert torch.equal(weight, expected), name

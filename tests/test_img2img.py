"""Image-to-image: what strength means at its ends and between, for every scheduler, with MRAR, in batches."""

import inspect

import accelerate
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from peft import LoraConfig
from PIL import Image
from rounding import assert_close
from tiny import CHANNELS, NUM_CLASSES, SIDE, seeded, tiny_pipeline

from transdiff_pipelines import (
    FlowMatchEulerMaruyamaScheduler,
    FlowMatchSDEMultistepScheduler,
    TransDiffImg2ImgPipeline,
    TransDiffInpaintPipeline,
    TransDiffPipeline,
)


STEPS = 4
PIXELS = 8
CLASSES = [TransDiffPipeline, TransDiffImg2ImgPipeline, TransDiffInpaintPipeline]
SCHEDULERS = [
    FlowMatchEulerMaruyamaScheduler,
    FlowMatchSDEMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    UniPCMultistepScheduler,
]


def img2img(patch_size=2, **components):
    return quiet(TransDiffImg2ImgPipeline.from_pipe(tiny_pipeline(patch_size, **components)))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def mrar():
    return img2img(2)


@pytest.fixture(scope="module")
def one_step():
    return img2img(1)


def pictures(count=1, seed=7):
    return torch.rand(count, 3, PIXELS, PIXELS, generator=seeded(seed))


def edited(pipe, image, labels=0, seed=0, **kwargs):
    kwargs = {"num_inference_steps": STEPS, "generator": seeded(seed), "output_type": "latent", **kwargs}
    return pipe(image, labels, **kwargs).images


def generated(pipe, labels=0, seed=0, **kwargs):
    kwargs = {"num_inference_steps": STEPS, "generator": seeded(seed), "output_type": "latent", **kwargs}
    return TransDiffPipeline.__call__(pipe, labels, **kwargs).images


def through_vae(pipe, image):
    latents = pipe.vae.encode(2 * image - 1).latent_dist.mode()
    return latents * pipe.vae.config.scaling_factor


class TestStrength:
    @pytest.mark.parametrize("patch_size", [1, 2])
    @pytest.mark.parametrize("references", ["generated", "edited", "image"])
    def test_zero_is_the_image_through_the_vae(self, patch_size, references, monkeypatch):
        pipe, image = img2img(patch_size), pictures(2)
        monkeypatch.setattr(pipe.transformer, "forward", lambda **k: pytest.fail("a denoising step was taken"))
        latents = edited(pipe, image, strength=0, references=references)
        assert_close(latents, through_vae(pipe, image))
        shown = edited(pipe, image, strength=0.0, references=references, output_type="pt")
        assert_close(shown, pipe.decode_latents(latents, "pt"))

    @pytest.mark.parametrize("scheduler", SCHEDULERS)
    @pytest.mark.parametrize("references", ["generated", "edited"])
    def test_one_is_plain_generation(self, scheduler, references):
        """To the bit, from the same generator, which the encoding does not touch."""
        pipe = img2img()
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        assert torch.equal(
            edited(pipe, pictures(2), [0, 3], strength=1, references=references), generated(pipe, [0, 3])
        )

    def test_one_is_plain_generation_from_given_latents(self, one_step):
        noise = torch.randn(1, CHANNELS, SIDE, SIDE, generator=seeded(5))
        one = edited(one_step, pictures(), strength=1.0, latents=noise)
        assert torch.equal(one, generated(one_step, latents=noise))

    @pytest.mark.parametrize(("strength", "expected"), [(0.01, 1), (0.25, 1), (0.3, 2), (0.5, 2), (0.75, 3), (1, 4)])
    def test_names_the_last_steps_as_in_diffusers(self, one_step, strength, expected):
        taken = []
        edited(one_step, pictures(), strength=strength, callback_on_step_end=lambda *a: taken.append(a[2].item()))
        grid = torch.linspace(1, 0.04, STEPS) * 1000
        torch.testing.assert_close(torch.tensor(taken), grid[-expected:])

    @pytest.mark.parametrize("strength", [0.25, 0.5, 0.75])
    def test_starts_at_the_noised_image(self, strength):
        # Neither drift nor diffusion: the first step hands on what it got.
        still = FlowMatchEulerMaruyamaScheduler(drift_scale=0.0, diffusion_scale=0.0, sigma_last=0.2)
        pipe, image = img2img(1, scheduler=still), pictures()
        noise = torch.randn(1, CHANNELS, SIDE, SIDE, generator=seeded(5))
        first = []
        edited(
            pipe,
            image,
            strength=strength,
            num_inference_steps=8,
            latents=noise,
            callback_on_step_end=lambda *a: first.append((a[2], a[3]["latents"])),
        )
        timestep, latents = first[0]
        assert_close(latents, still.scale_noise(through_vae(pipe, image), timestep, noise))

    @pytest.mark.parametrize("scheduler", SCHEDULERS[2:])  # not the SDE's, whose drift is another
    @pytest.mark.parametrize("strength", [0.25, 0.6])
    def test_every_scheduler_starts_at_its_own_sigma(self, scheduler, strength, monkeypatch):
        """A model whose velocity points from the image to the noise leads back to the image, if σ is right."""
        pipe, image = img2img(1, guidance_scale=1.0), pictures()
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        clean = through_vae(pipe, image)
        noise = torch.randn(1, CHANNELS, SIDE, SIDE, generator=seeded(5))
        monkeypatch.setattr(pipe.transformer, "forward", lambda hidden_states, **k: (noise - clean,))
        result = edited(pipe, image, strength=strength, num_inference_steps=20, latents=noise)
        torch.testing.assert_close(result, clean, atol=1e-3, rtol=0)

    def test_custom_sigmas(self, one_step):
        grid = [0.9, 0.5, 0.1]
        taken = []
        edited(
            one_step,
            pictures(),
            strength=0.6,
            sigmas=grid,
            callback_on_step_end=lambda *a: taken.append(a[2].item()),
        )
        np.testing.assert_allclose(taken, [500, 100], rtol=1e-6)
        assert torch.equal(edited(one_step, pictures(), strength=1, sigmas=grid), generated(one_step, sigmas=grid))
        same = edited(one_step, pictures(), timesteps=[1000 * sigma for sigma in grid])
        assert_close(same, edited(one_step, pictures(), sigmas=grid))

    def test_between_the_image_counts(self, mrar):
        first, second = (edited(mrar, pictures(seed=seed), strength=0.5) for seed in (1, 2))
        assert not torch.allclose(first, second, atol=1e-3)
        assert not torch.allclose(edited(mrar, pictures(), 1, strength=0.5), edited(mrar, pictures(), 2, strength=0.5))


class TestImages:
    def test_every_form_of_an_image(self, one_step):
        array = np.random.default_rng(0).integers(0, 256, (PIXELS, PIXELS, 3), dtype=np.uint8)
        values = array.astype(np.float32) / 255
        tensor = torch.from_numpy(values).permute(2, 0, 1)
        expected = edited(one_step, tensor[None])
        picture = Image.fromarray(array)
        for image in (picture, [picture], values, values[None], [values], tensor, [tensor]):
            assert_close(edited(one_step, image), expected)

    def test_latents_are_not_encoded_again(self, one_step):
        latents = generated(one_step, 2)
        assert torch.equal(edited(one_step, latents, strength=0), latents)
        assert torch.equal(edited(one_step, latents[0], strength=0), latents)
        image = pictures()
        assert_close(edited(one_step, through_vae(one_step, image)), edited(one_step, image))

    def test_output_types(self, one_step):
        assert edited(one_step, pictures(2), output_type="np").shape == (2, PIXELS, PIXELS, 3)
        assert [image.size for image in edited(one_step, pictures(2), output_type="pil")] == [(PIXELS, PIXELS)] * 2
        (images,) = one_step(pictures(), 0, num_inference_steps=1, output_type="pt", return_dict=False)
        assert images.shape == (1, 3, PIXELS, PIXELS)

    def test_shift_factor(self):
        pipe = img2img(1)
        pipe.vae.register_to_config(shift_factor=0.3)
        image = pictures()
        expected = (pipe.vae.encode(2 * image - 1).latent_dist.mode() - 0.3) * pipe.vae.config.scaling_factor
        assert_close(edited(pipe, image, strength=0), expected)


class TestBatches:
    def test_seed_reproduces(self, mrar):
        image = pictures(2)
        assert torch.equal(edited(mrar, image, seed=3), edited(mrar, image, seed=3))
        assert not torch.equal(edited(mrar, image, seed=3), edited(mrar, image, seed=4))

    @pytest.mark.parametrize("references", ["generated", "edited", "image"])
    def test_a_batch_equals_its_samples(self, mrar, references):
        images, labels, seeds = pictures(3), [0, 4, 2], [5, 6, 7]
        batch = edited(mrar, images, labels, generator=[seeded(seed) for seed in seeds], references=references)
        for i, (label, seed) in enumerate(zip(labels, seeds, strict=True)):
            alone = edited(mrar, images[i], label, generator=[seeded(seed)], references=references)
            assert_close(alone, batch[i : i + 1])

    def test_one_image_for_all_labels_and_one_label_for_all_images(self, mrar):
        image = pictures()
        repeated = edited(mrar, image.repeat(2, 1, 1, 1), [0, 3])
        assert_close(edited(mrar, image, [0, 3]), repeated)
        assert torch.equal(edited(mrar, pictures(2), 3), edited(mrar, pictures(2), [3, 3]))

    def test_num_images_per_label_stand_next_to_one_another(self, mrar):
        images = pictures(2)
        twice = edited(mrar, images, [0, 3], num_images_per_label=2)
        # two images are encoded here and four there, so all but rounding is the same
        assert_close(twice, edited(mrar, images.repeat_interleave(2, 0), [0, 0, 3, 3]))


class TestReferences:
    @staticmethod
    def references_seen(pipe, monkeypatch, **kwargs):
        """The images that the encoder is shown, one group at a time."""
        seen, forward = [], pipe.condition_encoder.forward

        def spy(labels, references=None, **options):
            if references is not None:
                seen.append(references[: len(references) // 2, -1])
            return forward(labels, references, **options)

        with monkeypatch.context() as patch:
            patch.setattr(pipe.condition_encoder, "forward", spy)
            result = edited(pipe, **kwargs)
        return seen, result

    def test_generated_ones_are_those_of_plain_generation(self, mrar, monkeypatch):
        seen, result = self.references_seen(mrar, monkeypatch, image=pictures(), strength=0.5)
        plain = TransDiffPipeline.__call__(
            mrar, 0, num_inference_steps=STEPS, generator=seeded(), output_type="latent", return_intermediates=True
        ).intermediates
        assert len(seen) == 3
        assert all(torch.equal(a, b) for a, b in zip(seen, plain, strict=False))
        assert not torch.equal(result, plain[-1])

    def test_edited_ones_come_from_the_image_too(self, mrar, monkeypatch):
        seen, _ = self.references_seen(mrar, monkeypatch, image=pictures(), strength=0.5, references="edited")

        def stop_after_the_first(pipe, step, timestep, tensors):
            pipe._interrupt = step == 1

        first = edited(mrar, pictures(), strength=0.5, references="edited", callback_on_step_end=stop_after_the_first)
        assert torch.equal(seen[0], first)
        assert len(seen) == 3

    def test_the_image_itself(self, mrar, monkeypatch):
        steps = []
        seen, _ = self.references_seen(
            mrar,
            monkeypatch,
            image=pictures(),
            references="image",
            strength=0.5,
            callback_on_step_end=lambda pipe, step, *_: steps.append((step, pipe.current_ar_step)),
        )
        assert all(torch.equal(reference, through_vae(mrar, pictures())) for reference in seen)
        assert len(seen) == 3
        assert steps == [(0, 3), (1, 3)]

    def test_make_no_difference_to_one_step_models(self, one_step):
        results = [edited(one_step, pictures(), references=name) for name in ("generated", "edited", "image")]
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


class TestSharedLoop:
    def test_guidance(self, mrar):
        image = pictures()
        assert torch.equal(edited(mrar, image), edited(mrar, image, guidance_scale=1.3))
        assert not torch.equal(edited(mrar, image), edited(mrar, image, guidance_scale=[1.3, 1.3, 1.3, 2.0]))
        assert torch.equal(
            edited(mrar, image, references="image"),
            edited(mrar, image, references="image", guidance_scale=[9.0, 9.0, 9.0, 1.3]),
        )

    def test_guidance_interval(self, one_step):
        image = pictures()
        outside = edited(one_step, image, strength=0.5, guidance_interval=(0.9, 1.0))
        assert_close(outside, edited(one_step, image, strength=0.5, guidance_scale=1.0))

    def test_callbacks_count_over_the_sequence(self, mrar):
        calls = []

        def note(pipe, step, timestep, tensors):
            calls.append((step, pipe.current_ar_step, pipe.num_timesteps))

        edited(mrar, pictures(), strength=0.5, callback_on_step_end=note)
        expected = [(i, i // STEPS, 4 * STEPS) for i in range(3 * STEPS)]
        assert calls == expected + [(3 * STEPS, 3, 3 * STEPS + 2), (3 * STEPS + 1, 3, 3 * STEPS + 2)]

    def test_a_callback_may_replace_latents(self, mrar):
        def sevens(pipe, step, timestep, tensors):
            return {"latents": torch.full_like(tensors["latents"], 7.0)}

        assert (edited(mrar, pictures(), callback_on_step_end=sevens) == 7).all()

    def test_interrupt_returns_what_is_there(self, mrar):
        seen = []

        def stop(pipe, step, timestep, tensors):
            seen.append(tensors["latents"])
            pipe._interrupt = step == 3 * STEPS

        result = edited(mrar, pictures(), strength=0.75, callback_on_step_end=stop)
        assert len(seen) == 3 * STEPS + 1
        assert torch.equal(result, seen[-1])

    @pytest.mark.parametrize("cls", [TransDiffImg2ImgPipeline, TransDiffInpaintPipeline])
    def test_lora(self, cls):
        """An adapter of the shared components acts in every class."""
        base = tiny_pipeline()
        pipe = quiet(cls.from_pipe(base))
        mask = {"mask_image": torch.ones(PIXELS, PIXELS)} if cls is TransDiffInpaintPipeline else {}
        call = {"num_inference_steps": 2, "output_type": "latent", "strength": 1.0, **mask}
        without = pipe(pictures(), class_labels=0, generator=seeded(), **call).images
        base.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        with_adapter = pipe(pictures(), class_labels=0, generator=seeded(), **call).images
        assert not torch.allclose(without, with_adapter)
        assert torch.equal(with_adapter, generated(base, num_inference_steps=2))
        without_weight = pipe(
            pictures(), class_labels=0, generator=seeded(), **call, attention_kwargs={"scale": 0.0}
        ).images
        assert_close(without_weight, without)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision(self, dtype):
        pipe = img2img()
        exact = edited(pipe, pictures(2), strength=0.5)
        low = edited(pipe.to(dtype), pictures(2), strength=0.5)
        assert low.dtype == torch.float32
        assert ((low - exact).norm() / exact.norm()).item() < 0.1

    def test_sequential_offload(self):
        """Weights are there while their layer runs, those of the VAE's encoder too."""
        pipe = img2img()
        expected = edited(pipe, pictures(), strength=0.5, output_type="pt")
        for model in (pipe.condition_encoder, pipe.transformer, pipe.vae):
            accelerate.cpu_offload(model, torch.device("cpu"))
            assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert_close(edited(pipe, pictures(), strength=0.5, output_type="pt"), expected)


class TestClasses:
    @pytest.mark.parametrize("source", CLASSES)
    @pytest.mark.parametrize("target", CLASSES)
    def test_from_pipe_shares_components(self, source, target):
        first = source.from_pipe(tiny_pipeline(guidance_scale=[1.0, 1.1, 1.2, 1.3]))
        second = target.from_pipe(first)
        assert type(second) is target
        assert second.components.keys() == first.components.keys()
        assert all(second.components[name] is component for name, component in first.components.items())
        assert second.labels == first.labels
        assert second.config.guidance_scale == [1.0, 1.1, 1.2, 1.3]

    @pytest.mark.parametrize("saved", CLASSES)
    def test_any_folder_loads_through_any_class(self, saved, tmp_path):
        saved.from_pipe(tiny_pipeline()).save_pretrained(tmp_path)
        assert type(DiffusionPipeline.from_pretrained(tmp_path)) is saved
        expected = generated(tiny_pipeline())
        for cls in CLASSES:
            pipe = quiet(cls.from_pretrained(tmp_path))
            assert type(pipe) is cls
            assert torch.equal(generated(pipe), expected)

    def test_the_arguments_are_those_of_the_base_class(self):
        """By name and default, so that a call is moved from one class to another by its own arguments alone."""
        base, img2img, inpaint = (dict(inspect.signature(cls.__call__).parameters) for cls in CLASSES)
        of_the_sequence = {"return_intermediates", "reference_images", "num_ar_steps"}
        of_conditions = {"class_labels", "condition_embeds", "negative_condition_embeds"}
        base = {name: base[name] for name in base.keys() - of_the_sequence - of_conditions}
        assert {name: parameter.default for name, parameter in base.items()}.items() <= {
            name: parameter.default for name, parameter in img2img.items()
        }.items()
        assert inpaint.keys() - img2img.keys() == {"mask_image", "jump_length", "jump_n_sample"}
        assert img2img.keys() - base.keys() == {"image", "class_labels", "strength", "references"}

    def test_components_are_checked(self):
        parts = tiny_pipeline().components | {"scheduler": DDIMScheduler()}
        with pytest.raises(ValueError, match="DDIMScheduler has prediction_type='epsilon'"):
            TransDiffImg2ImgPipeline(**parts)


class TestErrors:
    @pytest.mark.parametrize(
        ("image", "error", "message"),
        [
            (Image.new("RGB", (9, 8)), ValueError, r"9x8 pixels, but this model's latent grid makes 8x8; resize it"),
            (torch.zeros(1, 3, 16, 16), ValueError, "16x16 pixels"),
            (Image.new("L", (8, 8)), ValueError, r"mode 'L'; convert it: image.convert\('RGB'\)"),
            (Image.new("RGBA", (8, 8)), ValueError, "mode 'RGBA'"),
            (np.zeros((8, 8, 3), np.uint8), TypeError, "array of uint8; expected floats in .* divide bytes by 255"),
            (torch.zeros(3, 8, 8, dtype=torch.int64), TypeError, "array of torch.int64"),
            (torch.full((3, 8, 8), 1.5), ValueError, r"values outside \[0, 1\]"),
            (-torch.ones(3, 8, 8), ValueError, r"values outside \[0, 1\]"),
            (torch.full((3, 8, 8), float("nan")), ValueError, r"values outside \[0, 1\]"),
            (torch.zeros(8, 8), ValueError, r"shape \(8, 8\)"),
            (np.zeros((8, 8)), ValueError, r"shape \(8, 8\)"),
            (np.zeros((3, 8, 8)), ValueError, r"shape \(3, 8, 8\)"),
            (torch.zeros(1, 1, 8, 8), ValueError, r"shape \(1, 1, 8, 8\)"),
            ("cat.png", TypeError, r"image is str"),
            (None, TypeError, r"image is NoneType"),
            ([], TypeError, "image is an empty list"),
            ([Image.new("RGB", (8, 8)), torch.zeros(3, 8, 8)], TypeError, "a list of one kind"),
            ([torch.zeros(1, 3, 8, 8)], ValueError, "list of batches"),
        ],
    )
    def test_images(self, one_step, image, error, message):
        with pytest.raises(error, match=message):
            one_step(image, 0)

    @pytest.mark.parametrize(
        ("kwargs", "error", "message"),
        [
            ({"strength": 1.1}, ValueError, r"strength is 1.1; expected a number in \[0, 1\]"),
            ({"strength": -0.1}, ValueError, "strength is -0.1"),
            ({"strength": float("nan")}, ValueError, "strength is nan"),
            ({"strength": "0.5"}, TypeError, "strength '0.5' is a str"),
            ({"references": "none"}, ValueError, "references is 'none'; choose one of"),
            ({"num_inference_steps": 0}, ValueError, "num_inference_steps is 0"),
            ({"num_images_per_label": 0}, ValueError, "num_images_per_label is 0"),
            ({"output_type": "gif"}, ValueError, "output_type 'gif'"),
            ({"class_labels": NUM_CLASSES}, ValueError, "class label 5"),
            ({"class_labels": [0, 1], "image": torch.zeros(3, 3, 8, 8)}, ValueError, "got 2 class_labels, 3 images"),
            ({"latents": torch.zeros(2, 4, 4, 4)}, ValueError, r"latents have shape \(2, 4, 4, 4\)"),
            ({"generator": [seeded(), seeded()]}, ValueError, "2 generators were given for 1 images"),
        ],
    )
    def test_arguments(self, one_step, kwargs, error, message):
        with pytest.raises(error, match=message):
            one_step(**{"image": torch.zeros(3, 8, 8), "class_labels": 0, **kwargs})

    def test_errors_come_before_work(self, one_step, monkeypatch):
        monkeypatch.setattr(one_step.vae, "encode", lambda *a: pytest.fail("the VAE was called"))
        with pytest.raises(ValueError, match="strength"):
            one_step(pictures(), 0, strength=2)

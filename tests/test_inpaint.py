"""Inpainting and outpainting: what is known stays, what is not is generated, whatever the mask's form."""

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from rounding import assert_close
from tiny import CHANNELS, SIDE, seeded, tiny_pipeline

from transdiff_pipelines import (
    FlowMatchEulerMaruyamaScheduler,
    FlowMatchSDEMultistepScheduler,
    TransDiffImg2ImgPipeline,
    TransDiffInpaintPipeline,
    TransDiffPipeline,
    pad_for_outpainting,
)
from transdiff_pipelines.pipelines.editing import edit_steps, jump_back, resampling_runs


STEPS = 4
PIXELS = 8
SCHEDULERS = [
    FlowMatchEulerMaruyamaScheduler,
    FlowMatchSDEMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    UniPCMultistepScheduler,
]


def inpaint(patch_size=2, **components):
    pipe = TransDiffInpaintPipeline.from_pipe(tiny_pipeline(patch_size, **components))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def mrar():
    return inpaint(2)


@pytest.fixture(scope="module")
def one_step():
    return inpaint(1)


def pictures(count=1, seed=7):
    return torch.rand(count, 3, PIXELS, PIXELS, generator=seeded(seed))


def upper_half():
    mask = torch.zeros(PIXELS, PIXELS)
    mask[: PIXELS // 2] = 1
    return mask


def painted(pipe, image, mask, labels=0, seed=0, **kwargs):
    kwargs = {"num_inference_steps": STEPS, "generator": seeded(seed), "output_type": "latent", **kwargs}
    return pipe(image, mask, labels, **kwargs).images


def generated(pipe, labels=0, seed=0, **kwargs):
    kwargs = {"num_inference_steps": STEPS, "generator": seeded(seed), "output_type": "latent", **kwargs}
    return TransDiffPipeline.__call__(pipe, labels, **kwargs).images


@torch.no_grad()
def through_vae(pipe, image):
    return pipe.vae.encode(2 * image - 1).latent_dist.mode() * pipe.vae.config.scaling_factor


class TestKnownRegion:
    @pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("jump_n_sample", [1, 2])
    def test_pixels_are_untouched(self, mrar, strength, jump_n_sample):
        mask = torch.rand(PIXELS, PIXELS, generator=seeded(1)) > 0.7
        for kind in ("pil", "np", "pt"):
            array = np.random.default_rng(0).integers(0, 256, (PIXELS, PIXELS, 3), dtype=np.uint8)
            image = Image.fromarray(array)
            options = {"strength": strength, "jump_length": 2, "jump_n_sample": jump_n_sample}
            result = painted(mrar, image, mask, output_type=kind, **options)[0]
            result = result.permute(1, 2, 0).numpy() if kind == "pt" else np.asarray(result)
            expected = array if kind == "pil" else array.astype(np.float32) / 255
            np.testing.assert_array_equal(result[~mask.numpy()], expected[~mask.numpy()])
            assert (result != expected)[mask.numpy()].any()

    @pytest.mark.parametrize("scheduler", SCHEDULERS)
    def test_latents_are_the_vae_s(self, scheduler):
        pipe, image = inpaint(1), pictures(2)
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        latents, known = painted(pipe, image, upper_half(), [0, 3]), through_vae(pipe, image)
        assert_close(latents[..., 2:, :], known[..., 2:, :])
        assert latents.isfinite().all()
        assert not torch.allclose(latents[..., :2, :], known[..., :2, :], atol=0.1)
        assert torch.equal(latents, painted(pipe, image, upper_half(), [0, 3]))

    @pytest.mark.parametrize("scheduler", SCHEDULERS)
    def test_known_latents_are_renoised_at_every_step(self, scheduler):
        """At the σ that the next call of the model has; at last at 0."""
        pipe, image = inpaint(1), pictures()
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        noise = torch.randn(1, CHANNELS, SIDE, SIDE, generator=seeded(5))
        seen = []
        painted(pipe, image, upper_half(), latents=noise, callback_on_step_end=lambda *a: seen.append(a[3]["latents"]))
        sigmas = [*pipe.scheduler.sigmas[1 : len(pipe.scheduler.timesteps)].tolist(), 0.0]
        clean = through_vae(pipe, image)
        for latents, sigma in zip(seen, sigmas, strict=True):
            expected = (1 - sigma) * clean + sigma * noise
            assert_close(latents[..., 2:, :], expected[..., 2:, :])

    def test_the_unknown_part_sees_the_known_one(self, one_step):
        first, second = (painted(one_step, pictures(seed=seed), upper_half()) for seed in (1, 2))
        assert not torch.allclose(first[..., :2, :], second[..., :2, :], atol=1e-3)

    def test_the_unknown_part_of_the_image_does_not_count(self, one_step):
        latents = torch.randn(1, CHANNELS, SIDE, SIDE, generator=seeded(5))
        other = latents.clone()
        other[..., :2, :] = 9.0
        assert torch.equal(painted(one_step, latents, upper_half()), painted(one_step, other, upper_half()))


class TestMasks:
    @pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
    def test_all_unknown_is_image_to_image(self, mrar, strength):
        everything = torch.ones(PIXELS, PIXELS)
        result = painted(mrar, pictures(), everything, strength=strength)
        img2img = TransDiffImg2ImgPipeline.__call__(
            mrar, pictures(), 0, strength, None, STEPS, seeded(), output_type="latent"
        )
        assert torch.equal(result, img2img.images)

    @pytest.mark.parametrize("scheduler", SCHEDULERS)
    def test_all_unknown_is_plain_generation(self, scheduler):
        pipe = inpaint()
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        assert torch.equal(painted(pipe, pictures(), torch.ones(PIXELS, PIXELS)), generated(pipe))

    @pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
    def test_all_known_is_the_image(self, mrar, strength):
        nothing, image = torch.zeros(PIXELS, PIXELS), pictures()
        assert torch.equal(painted(mrar, image, nothing, strength=strength, output_type="pt"), image)
        latents = painted(mrar, image, nothing, strength=strength)
        assert_close(latents, through_vae(mrar, image))

    def test_every_form_of_a_mask(self, one_step):
        mask, image = upper_half(), pictures()
        picture = Image.fromarray((mask * 255).byte().numpy())
        expected = painted(one_step, image, mask)
        forms = [
            *(mask[None], mask[None, None], [mask], mask.bool(), mask.double()),
            *(mask.numpy(), mask.numpy()[None], mask.numpy()[..., None], mask.bool().numpy()),
            *(picture, [picture], picture.convert("1"), picture.convert("RGB")),
        ]
        for form in forms:
            assert torch.equal(painted(one_step, image, form), expected)

    def test_the_mask_is_not_written_to(self, one_step):
        mask = 0.7 * upper_half()
        painted(one_step, pictures(), mask)
        assert torch.equal(mask, 0.7 * upper_half())

    def test_a_latent_with_one_unknown_pixel_is_repainted(self, one_step):
        mask, image = torch.zeros(PIXELS, PIXELS), pictures()
        mask[3, 6] = 1
        changed = (painted(one_step, image, mask) - through_vae(one_step, image)).abs().amax(1)[0] > 1e-3
        assert changed.nonzero().tolist() == [[1, 3]]

    def test_blurred_masks_blend(self, one_step):
        image, mask = pictures(), upper_half()
        soft = one_step.mask_processor.blur(Image.fromarray((mask * 255).byte().numpy()), blur_factor=1)
        weight = torch.from_numpy(np.asarray(soft) / 255)
        assert ((weight > 0.1) & (weight < 0.9)).any()
        hard_latents, soft_latents = painted(one_step, image, mask), painted(one_step, image, soft)
        assert torch.equal(hard_latents, soft_latents)
        decoded = one_step.decode_latents(soft_latents, "pt")
        shown = painted(one_step, image, soft, output_type="pt")
        assert_close(shown, (weight * decoded + (1 - weight) * image).float())
        assert torch.equal(shown[..., weight == 0], image[..., weight == 0])


class TestBatches:
    def test_a_batch_with_different_masks_equals_its_samples(self, mrar):
        images, labels, seeds = pictures(3), [0, 4, 2], [5, 6, 7]
        masks = torch.stack([upper_half(), upper_half().T, torch.zeros(PIXELS, PIXELS)])
        options = {"jump_length": 1, "jump_n_sample": 2, "output_type": "pt"}
        batch = painted(mrar, images, masks, labels, generator=[seeded(seed) for seed in seeds], **options)
        for i, (label, seed) in enumerate(zip(labels, seeds, strict=True)):
            alone = painted(mrar, images[i], masks[i], label, generator=[seeded(seed)], **options)
            assert_close(alone, batch[i : i + 1])

    def test_one_mask_for_all_images_and_one_image_for_all_masks(self, one_step):
        mask = upper_half()
        both = torch.stack([mask, mask.T])
        repeated = painted(one_step, pictures(2), mask.expand(2, -1, -1))
        assert_close(painted(one_step, pictures(2), mask), repeated)
        repeated = painted(one_step, pictures().repeat(2, 1, 1, 1), both)
        assert_close(painted(one_step, pictures(), both), repeated)

    def test_num_images_per_label(self, one_step):
        masks = torch.stack([upper_half(), upper_half().T])
        result = painted(one_step, pictures(2), masks, [0, 3], num_images_per_label=2, output_type="pt")
        for i in range(4):
            keeps = masks[i // 2] == 0
            assert torch.equal(result[i][:, keeps], pictures(2)[i // 2][:, keeps])
        assert not torch.equal(result[0], result[1])


class TestResampling:
    def test_schedule(self):
        assert resampling_runs(range(10), 3, 1) == [range(10)]
        assert resampling_runs(range(7), 3, 2) == [range(0, 4), range(1, 7), range(4, 7)]
        assert resampling_runs(range(6), 3, 3) == [range(0, 6), range(3, 6), range(3, 6)]
        assert resampling_runs(range(6, 10), 9, 2) == [range(6, 10), range(6, 10)]
        assert resampling_runs(range(10), 10, 5) == [range(10)]

    @pytest.mark.parametrize("jump_length", [1, 2, 3, 5])
    @pytest.mark.parametrize("jump_n_sample", [1, 2, 4])
    def test_every_step_is_taken_as_often_as_asked(self, jump_length, jump_n_sample):
        steps = edit_steps(12, 0.75)
        taken = [step for run in resampling_runs(steps, jump_length, jump_n_sample) for step in run]
        assert [taken.count(step) for step in range(12)] == [0] * 3 + [jump_n_sample] * 9
        jumps = [a + 1 - b for a, b in zip(taken[:-1], taken[1:], strict=True) if b != a + 1]
        assert all(jump <= jump_length for jump in jumps)

    def test_a_jump_has_the_marginals_of_the_path(self):
        """From x_σ of clean latents 2 to x_σ', mean (1 - σ') 2 and deviation σ'."""
        generator = seeded()
        noise = torch.randn(1, 1, 400, 400, generator=generator)
        for sigma, sigma_to in [(0.0, 0.3), (0.2, 0.7), (0.5, 1.0)]:
            result = jump_back((1 - sigma) * 2 + sigma * noise, sigma, sigma_to, generator)
            assert result.mean().item() == pytest.approx((1 - sigma_to) * 2, abs=0.01)
            assert result.std().item() == pytest.approx(sigma_to, abs=0.01)

    @pytest.mark.parametrize("scheduler", SCHEDULERS)
    def test_jumps_change_the_unknown_part_alone(self, scheduler):
        pipe, image = inpaint(1), pictures()
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        options = {"jump_length": 2, "num_inference_steps": 6}
        straight = painted(pipe, image, upper_half(), jump_n_sample=1, **options)
        jumped = painted(pipe, image, upper_half(), jump_n_sample=2, **options)
        assert torch.equal(straight[..., 2:, :], jumped[..., 2:, :])
        assert not torch.allclose(straight[..., :2, :], jumped[..., :2, :], atol=1e-3)
        assert jumped.isfinite().all()
        assert torch.equal(jumped, painted(pipe, image, upper_half(), jump_n_sample=2, **options))

    def test_without_repeats_the_length_does_not_matter(self, mrar):
        results = [painted(mrar, pictures(), upper_half(), jump_length=length) for length in (1, 3, 10)]
        assert all(torch.equal(result, results[0]) for result in results)

    def test_interrupt_ends_the_jumps(self, one_step):
        seen = []

        def stop(pipe, step, timestep, tensors):
            seen.append(tensors["latents"])
            pipe._interrupt = step == 4

        result = painted(one_step, pictures(), upper_half(), jump_length=2, jump_n_sample=3, callback_on_step_end=stop)
        assert len(seen) == 5
        assert torch.equal(result, seen[-1])


class TestReferences:
    @pytest.mark.parametrize(("references", "calls"), [("generated", 3 * STEPS + 6), ("edited", 4 * 6), ("image", 6)])
    def test_which_images_are_inpainted(self, mrar, references, calls):
        steps = []
        painted(
            mrar,
            pictures(),
            upper_half(),
            references=references,
            jump_length=2,
            jump_n_sample=2,
            callback_on_step_end=lambda pipe, step, *_: steps.append(step),
        )
        assert steps == list(range(calls))


class TestOutpainting:
    def test_canvas_and_mask(self):
        array = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        canvas, mask = pad_for_outpainting(Image.fromarray(array), (1, 2, 0, 3))
        assert canvas.size == mask.size == (6, 9)
        assert canvas.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(canvas)[2:6, 1:], array)
        expected = np.full((9, 6), 255)
        expected[2:6, 1:] = 0
        np.testing.assert_array_equal(np.asarray(mask), expected)
        # the border repeats the edge
        np.testing.assert_array_equal(np.asarray(canvas)[0, 1:], array[0])

    def test_the_image_stays_in_the_middle(self, mrar):
        array = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        canvas, mask = pad_for_outpainting(Image.fromarray(array), 2)
        result = np.asarray(painted(mrar, canvas, mask, output_type="pil")[0])
        np.testing.assert_array_equal(result[2:6, 2:6], array)
        assert (result[:2] != np.asarray(canvas)[:2]).any()

    @pytest.mark.parametrize(
        ("padding", "error", "message"),
        [
            (0, ValueError, "padding is 0"),
            ((1, -1, 0, 0), ValueError, r"padding is \(1, -1, 0, 0\)"),
            ((1, 2), TypeError, r"padding is \(1, 2\); expected an int or"),
            (1.5, TypeError, "padding is 1.5"),
        ],
    )
    def test_errors(self, padding, error, message):
        with pytest.raises(error, match=message):
            pad_for_outpainting(Image.new("RGB", (4, 4)), padding)

    def test_wrong_type(self):
        with pytest.raises(TypeError, match="image is a ndarray"):
            pad_for_outpainting(np.zeros((4, 4, 3)), 1)


class TestErrors:
    @pytest.mark.parametrize(
        ("mask", "error", "message"),
        [
            (Image.new("L", (8, 9)), ValueError, "mask_image has 8x9 pixels, but"),
            (torch.zeros(4, 4), ValueError, "mask_image has 4x4 pixels"),
            (Image.new("RGBA", (8, 8)), ValueError, r"mode 'RGBA'; convert it: mask_image.convert\('L'\)"),
            (torch.zeros(8, 8, dtype=torch.uint8), TypeError, "mask_image is an array of torch.uint8"),
            (np.full((8, 8), 255.0), ValueError, r"mask_image has values outside \[0, 1\]"),
            (torch.zeros(1, 3, 8, 8), ValueError, r"mask_image has shape \(1, 3, 8, 8\)"),
            (torch.zeros(8), ValueError, r"mask_image has shape \(8,\)"),
            (None, TypeError, r"mask_image is NoneType"),
            (torch.zeros(2, 8, 8), ValueError, "got 1 class_labels, 3 images, 2 masks"),
        ],
    )
    def test_masks(self, one_step, mask, error, message):
        with pytest.raises(error, match=message):
            one_step(torch.zeros(3, 3, 8, 8), mask, 0)

    @pytest.mark.parametrize(
        ("kwargs", "error", "message"),
        [
            ({"strength": 1.5}, ValueError, "strength is 1.5"),
            ({"jump_length": 0}, ValueError, "jump_length is 0"),
            ({"jump_n_sample": 2, "num_inference_steps": 10}, ValueError, "jump_length is 10, but only jumps shorter"),
            ({"jump_n_sample": 1.5}, TypeError, "jump_n_sample 1.5 is a float"),
            ({"image": torch.zeros(3, 9, 8)}, ValueError, "8x9 pixels"),
        ],
    )
    def test_arguments(self, one_step, kwargs, error, message):
        with pytest.raises(error, match=message):
            one_step(**{"image": torch.zeros(3, 8, 8), "mask_image": upper_half(), "class_labels": 0, **kwargs})

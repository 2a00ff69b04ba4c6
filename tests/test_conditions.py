"""Conditions as inputs and outputs: encoding, blending, decoding, reference images that start a sequence."""

import numpy as np
import pytest
import torch
from PIL import Image
from rounding import assert_close
from tiny import CHANNELS, NUM_CLASSES, SIDE, seeded, tiny_pipeline

from transdiff_pipelines import ARConditionEncoder, blend_conditions
from transdiff_pipelines.pipelines.condition_blending import PATTERNS, token_shares


STEPS = 2
WIDTH = 16
PIXELS = 2 * SIDE


@pytest.fixture(scope="module")
def mrar():
    return tiny_pipeline(patch_size=2)


@pytest.fixture(scope="module")
def one_step():
    return tiny_pipeline(patch_size=1)


def latents_of(pipe, labels=None, seed=0, **kwargs):
    kwargs = {"num_inference_steps": STEPS, "generator": seeded(seed), "output_type": "latent", **kwargs}
    return pipe(labels, **kwargs).images


def pictures(count, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, PIXELS, PIXELS, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


class TestEncode:
    @pytest.mark.parametrize("labels", ["zebra", 4, [4], torch.tensor([4]), np.int64(4)])
    def test_labels_of_every_form(self, one_step, labels):
        assert torch.equal(one_step.encode_condition(labels), one_step.encode_condition(torch.tensor([4])))

    def test_one_label_for_all_references(self, mrar):
        references = torch.randn(3, 2, CHANNELS, SIDE, SIDE, generator=seeded())
        assert torch.equal(mrar.encode_condition(1, references), mrar.encode_condition([1, 1, 1], references))
        assert mrar.encode_condition(1, references).shape == (3, 12, WIDTH)

    def test_the_null_class_is_an_id(self, one_step):
        assert one_step.encode_condition(torch.tensor([NUM_CLASSES])).isfinite().all()
        with pytest.raises(ValueError, match="is the null class"):
            one_step.encode_condition(NUM_CLASSES)


class TestGivenConditions:
    @pytest.mark.parametrize("guidance", [1.0, 1.7])
    def test_a_label_and_its_condition_are_one(self, one_step, guidance):
        expected = latents_of(one_step, ["zebra", 1], guidance_scale=guidance)
        condition = one_step.encode_condition(["zebra", 1])
        actual = latents_of(one_step, condition_embeds=condition, guidance_scale=guidance)
        assert_close(actual, expected)

    @pytest.mark.parametrize("repeats", [1, 2])
    def test_a_function_makes_the_condition_of_each_image(self, mrar, repeats):
        expected = latents_of(mrar, [4, 1], num_images_per_label=repeats)
        seen = []

        def condition(references):
            seen.append(None if references is None else tuple(references.shape))
            labels = torch.tensor([4, 1])
            return mrar.encode_condition(
                labels if references is None else labels.repeat_interleave(repeats), references
            )

        actual = latents_of(mrar, condition_embeds=condition, num_images_per_label=repeats)
        assert_close(actual, expected)
        assert seen == [None] + [(2 * repeats, n, CHANNELS, SIDE, SIDE) for n in (1, 2, 3)]

    def test_a_finished_condition_is_one_decode(self, mrar):
        """The last image of a sequence, from the tokens that it was decoded from."""
        output = mrar(3, 1.5, STEPS, seeded(), output_type="latent", return_intermediates=True)
        references = torch.stack(output.intermediates[:3], dim=1)
        noise = torch.randn(1, CHANNELS, SIDE, SIDE, generator=seeded())
        deterministic = {"sigmas": [1.0], "guidance_scale": 1.5, "latents": noise}
        expected = latents_of(mrar, 3, reference_images=references, **deterministic)
        actual = latents_of(
            mrar,
            condition_embeds=mrar.encode_condition(3, references),
            negative_condition_embeds=mrar.encode_condition(torch.tensor([NUM_CLASSES]), references),
            **deterministic,
        )
        assert_close(actual, expected)

    def test_fewer_tokens(self, one_step, monkeypatch):
        lengths = []
        project = one_step.transformer.project_condition
        monkeypatch.setattr(
            one_step.transformer, "project_condition", lambda c, **kw: lengths.append(c.shape) or project(c, **kw)
        )
        condition = one_step.encode_condition(2)
        images = [latents_of(one_step, condition_embeds=condition[:, :k]) for k in (1, 5, 16)]
        assert lengths == [(2, 1, WIDTH), (2, 5, WIDTH), (2, 16, WIDTH)]
        assert_close(images[2], latents_of(one_step, 2))
        assert not torch.allclose(images[0], images[2])

    def test_the_negative_condition_is_the_other_branch(self, one_step):
        """With the condition itself as its negative, guidance changes nothing."""
        condition = one_step.encode_condition([0, 3])
        plain = latents_of(one_step, condition_embeds=condition, guidance_scale=1.0)
        guided = latents_of(
            one_step, condition_embeds=condition, negative_condition_embeds=condition, guidance_scale=3.0
        )
        assert_close(guided, plain)

    @pytest.mark.parametrize(
        ("kwargs", "error", "message"),
        [
            ({"class_labels": 0, "condition_embeds": torch.zeros(1, 16, WIDTH)}, ValueError, "both given"),
            ({"class_labels": 0, "negative_condition_embeds": torch.zeros(1, 16, WIDTH)}, ValueError, "without"),
            ({"condition_embeds": torch.zeros(1, 16, 5)}, ValueError, r"shape \(1, 16, 5\); expected \(B, M, 16\)"),
            ({"condition_embeds": torch.zeros(16, WIDTH)}, ValueError, r"expected \(B, M, 16\)"),
            ({"condition_embeds": torch.zeros(1, 16, WIDTH).long()}, TypeError, "torch.int64"),
            ({"condition_embeds": lambda references: "zebra"}, TypeError, "is str"),
            (
                {"condition_embeds": torch.zeros(1, 16, WIDTH), "reference_images": [Image.new("RGB", (8, 8))]},
                ValueError,
                "pass them to encode_condition",
            ),
            (
                {"condition_embeds": torch.zeros(1, 9, WIDTH), "negative_condition_embeds": torch.zeros(1, 4, WIDTH)},
                ValueError,
                "has 4 tokens and condition_embeds 9",
            ),
            (
                {"condition_embeds": torch.zeros(3, 9, WIDTH), "negative_condition_embeds": torch.zeros(2, 9, WIDTH)},
                ValueError,
                "2 rows for 3 images",
            ),
            ({"condition_embeds": torch.zeros(1, 4, WIDTH), "num_ar_steps": 2}, ValueError, "num_ar_steps is 2"),
        ],
    )
    def test_errors(self, mrar, monkeypatch, kwargs, error, message):
        monkeypatch.setattr(type(mrar.transformer), "forward", lambda *a, **k: pytest.fail("the decoder was called"))
        with pytest.raises(error, match=message):
            mrar(**{"guidance_scale": 1.5, "num_inference_steps": STEPS, **kwargs})
        assert mrar.attention_kwargs is None

    def test_tokens_with_references_need_their_negative(self, mrar):
        """The null class alone has no references, so the pipeline cannot make this branch itself."""
        references = torch.zeros(1, 1, CHANNELS, SIDE, SIDE)
        with pytest.raises(ValueError, match="negative_condition_embeds of as many tokens"):
            mrar(condition_embeds=mrar.encode_condition(0, references), guidance_scale=2.0, num_inference_steps=1)


class TestBlending:
    @pytest.mark.parametrize("pattern", PATTERNS)
    @pytest.mark.parametrize("num_conditions", [2, 3])
    def test_every_token_has_one_source_and_shares_are_equal(self, pattern, num_conditions):
        shares = token_shares(pattern, num_conditions, 12, seeded())
        assert torch.equal(shares.sum(0), torch.ones(12))
        assert torch.equal(shares.sum(1), torch.full((num_conditions,), 12 / num_conditions))

    def test_patterns(self):
        assert token_shares("halves", 2, 4)[1].tolist() == [0, 0, 1, 1]
        assert token_shares("interleaved", 2, 4)[1].tolist() == [0, 1, 0, 1]
        drawn = [token_shares("random", 2, 64, seeded(seed)) for seed in (0, 0, 1)]
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])

    def test_halves_are_those_of_the_classes(self, one_step):
        first, second = one_step.encode_condition(0), one_step.encode_condition(4)
        blended = blend_conditions([first, second])
        assert torch.equal(blended[:, :8], first[:, :8])
        assert torch.equal(blended[:, 8:], second[:, 8:])

    @pytest.mark.parametrize("weights", [[1.0, 0.0], torch.tensor([[1.0] * 16, [0.0] * 16])])
    def test_all_the_weight_on_one_condition_is_that_condition(self, one_step, weights):
        conditions = [one_step.encode_condition(label) for label in (0, 4)]
        assert torch.equal(blend_conditions(conditions, weights), conditions[0])

    def test_interpolation(self, one_step):
        first, second = (one_step.encode_condition(label) for label in (0, 4))
        assert_close(blend_conditions([first, second], [0.25, 0.75]), 0.25 * first + 0.75 * second)

    def test_a_class_blended_with_itself_is_the_class(self, mrar):
        """Of every prefix along the sequence."""

        def fused(references):
            return blend_conditions([mrar.encode_condition(2, references)] * 2, "interleaved")

        assert_close(latents_of(mrar, condition_embeds=fused), latents_of(mrar, 2))

    @pytest.mark.parametrize(
        ("conditions", "weights", "message"),
        [
            ([], "halves", "expected"),
            ([torch.zeros(1, 4, 2), torch.zeros(1, 3, 2)], "halves", "the same for all"),
            ([torch.zeros(1, 4, 2)] * 2, "thirds", "'thirds' is unknown; choose one of"),
            ([torch.zeros(1, 4, 2)] * 2, [0.5, 0.6], "sum to 1.1..1.1"),
            ([torch.zeros(1, 4, 2)] * 2, [1.0], r"shape \(1, 1\)"),
            ([torch.zeros(1, 4, 2)] * 2, torch.ones(2, 3) / 2, r"expected \(2,\).* or \(2, 4\)"),
        ],
    )
    def test_errors(self, conditions, weights, message):
        with pytest.raises(ValueError, match=message):
            blend_conditions(conditions, weights)


class TestReferenceImages:
    def test_a_generated_image_given_back_changes_nothing(self, mrar):
        """n references in place of the first n images leave the rest of the sequence as it was."""
        pipe = tiny_pipeline(scheduler=type(mrar.scheduler)(diffusion_scale=0.0))
        full = pipe([0, 3], 1.4, STEPS, seeded(), output_type="latent", return_intermediates=True).intermediates
        for count in (1, 2, 3):
            references = torch.stack(full[:count], dim=1)
            rest = pipe(
                [0, 3],
                1.4,
                STEPS,
                seeded(),
                output_type="latent",
                return_intermediates=True,
                reference_images=references,
            ).intermediates
            assert len(rest) == 4 - count
            for actual, expected in zip(rest, full[count:], strict=True):
                assert_close(actual, expected)

    def test_every_form_of_an_image(self, mrar, tmp_path):
        (picture,) = pictures(1)
        path = tmp_path / "picture.png"
        picture.save(path)
        array = np.asarray(picture, dtype=np.float32) / 255
        tensor = torch.from_numpy(array).permute(2, 0, 1)
        encoded = mrar.vae.encode(2 * tensor[None] - 1).latent_dist.mode()[0].detach() * 0.5
        forms = [picture, str(path), path, array, tensor, encoded]
        results = [latents_of(mrar, 1, reference_images=[form]) for form in forms]
        for result in results:
            assert_close(result, results[0])
        assert not torch.allclose(results[0], latents_of(mrar, 1))

    def test_pictures_of_other_sizes_are_cropped_to_the_centre(self, mrar):
        (picture,) = pictures(1)
        wide = Image.new("RGB", (3 * PIXELS, PIXELS))
        wide.paste(picture, (PIXELS, 0))
        assert_close(latents_of(mrar, 1, reference_images=[wide]), latents_of(mrar, 1, reference_images=[picture]))

    def test_a_list_for_each_label(self, mrar):
        first, second = pictures(2), pictures(2, seed=1)
        generators = {"generator": [seeded(5), seeded(6)]}
        both = latents_of(mrar, [0, 4], reference_images=[first, second], **generators)
        alone = latents_of(mrar, 4, reference_images=second, generator=seeded(6))
        assert_close(both[1:], alone)
        repeated = latents_of(mrar, 4, reference_images=second, num_images_per_label=2, generator=[seeded(6)] * 2)
        assert repeated.shape == both.shape

    @pytest.mark.parametrize(
        ("labels", "references", "error", "message"),
        [
            (0, pictures(4), ValueError, r"\[4\] images per label; .* from 1 to 3"),
            (0, [[]], ValueError, r"\[0\] images per label"),
            ([0, 1], pictures(2), ValueError, "2 entries for 2 label.*a list of images for each label"),
            ([0, 1], [pictures(1)], ValueError, "1 entries for 2 label"),
            ([0, 1], [pictures(1), pictures(2)], ValueError, r"\[1, 2\] images per label"),
            (0, ["no/such.png"], ValueError, "'no/such.png' is not a file"),
            (0, [np.zeros((4, 4, 3))], ValueError, "4x4 pixels"),
            (0, [7], TypeError, "int"),
            (0, torch.zeros(1, 2, 3, 4, 4), ValueError, r"expected scaled latents \(1, n, 4, 4, 4\)"),
            ([0, 1], torch.zeros(1, 2, 4, 4, 4), ValueError, r"for 1 label\(s\), but there are 2"),
        ],
    )
    def test_errors(self, mrar, monkeypatch, labels, references, error, message):
        monkeypatch.setattr(ARConditionEncoder, "forward", lambda *a, **k: pytest.fail("the encoder was called"))
        with pytest.raises(error, match=message):
            mrar(labels, reference_images=references)

    def test_a_one_step_model_reads_none(self, one_step):
        with pytest.raises(ValueError, match="one image to a sequence"):
            one_step(0, reference_images=pictures(1))


class TestNumberOfSteps:
    def test_the_sequence_stops_after_image_k(self, mrar):
        full = mrar(2, 1.2, STEPS, seeded(), output_type="latent", return_intermediates=True).intermediates
        for count in (1, 3, 4):
            assert torch.equal(latents_of(mrar, 2, guidance_scale=1.2, num_ar_steps=count), full[count - 1])

    @pytest.mark.parametrize("count", [0, 5])
    def test_range(self, mrar, count):
        with pytest.raises(ValueError, match=f"num_ar_steps is {count}"):
            mrar(0, num_ar_steps=count)

"""Laws of the condition encoder and the decoder; the golden numbers are in test_golden.py.

Laws that hold up to rounding are tested in float64, which no processor rounds coarsely enough to matter.
"""

import math

import pytest
import torch
from tiny import CHANNELS, NUM_CLASSES, SIDE, tiny_encoder, tiny_transformer

from transdiff_pipelines import ARConditionEncoder, TransDiffTransformer2DModel
from transdiff_pipelines.models.alignment import align_weights


LABELS = torch.tensor([0, 3])
WIDTH = 16


def references(n: int, batch_size: int = 2) -> torch.Tensor:
    return torch.randn(batch_size, n, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(n))


def velocity(transformer, timestep=500.0, tokens=6, batch_size=2):
    generator = torch.Generator().manual_seed(1)
    sample_size, channels = transformer.config.sample_size, transformer.config.in_channels
    latents = torch.randn(batch_size, channels, sample_size, sample_size, generator=generator)
    condition = torch.randn(batch_size, tokens, WIDTH, generator=generator)
    dtype = transformer.dtype
    return transformer(latents.to(dtype), timestep, condition.to(dtype)).sample


class TestConditionEncoder:
    @pytest.mark.parametrize("patch_size", [1, 2, 4])
    def test_condition_has_a_group_for_every_image(self, patch_size):
        encoder = tiny_encoder(patch_size)
        assert encoder.num_images == patch_size**2
        for n in range(encoder.num_images):
            given = references(n) if n else None
            output = encoder(LABELS, given)
            assert output.condition.shape == (2, (n + 1) * SIDE**2 // patch_size**2, WIDTH)
            assert output.features.shape == output.condition.shape

    def test_condition_is_features_plus_position(self):
        encoder = tiny_encoder(2)
        output = encoder(LABELS, references(2))
        length = output.features.shape[1]
        position = encoder.condition_position_embedding[:, :length]
        assert torch.equal(output.condition, output.features + position)

    def test_later_images_never_change_earlier_conditions(self):
        encoder = tiny_encoder(2).double()
        given = references(3)
        whole = encoder(LABELS, given).condition
        for n in range(3):
            prefix = encoder(LABELS, given[:, :n] if n else None).condition
            torch.testing.assert_close(whole[:, : prefix.shape[1]], prefix)

    def test_a_group_sees_itself_and_every_earlier_group(self):
        encoder = tiny_encoder(2)
        given = references(3).requires_grad_()
        condition = encoder(LABELS, given).condition
        group = encoder.group_sizes[0]
        for i in range(4):
            (gradient,) = torch.autograd.grad(
                condition[:, i * group : (i + 1) * group].sum(), given, retain_graph=True
            )
            seen = gradient.abs().amax(dim=(0, 2, 3, 4)) > 0
            assert seen.tolist() == [image < i for image in range(3)]

    def test_class_tokens_see_class_tokens_only_in_mrar(self):
        mask = tiny_encoder(2).attention_mask
        assert mask[:3, :3].all()
        assert not mask[:3, 3:].any()
        assert mask[-1].all()

    def test_one_step_attends_in_both_directions(self):
        encoder = tiny_encoder(1)
        assert encoder.attention_mask is None
        encoder.requires_grad_(False)
        encoder.position_embedding.requires_grad_()
        encoder(LABELS).condition[:, 0].sum().backward()
        # the first AR token depends on the position of the last one
        assert encoder.position_embedding.grad[0, -1].abs().sum() > 0

    def test_the_null_class_is_a_class_of_its_own(self):
        encoder = tiny_encoder(1)
        conditions = encoder(torch.arange(NUM_CLASSES + 1)).condition
        assert encoder.null_class == NUM_CLASSES
        distances = torch.cdist(conditions.flatten(1), conditions.flatten(1))
        assert (distances + torch.eye(NUM_CLASSES + 1) > 1e-3).all()

    def test_too_many_references(self):
        with pytest.raises(ValueError, match="4 reference images do not fit.*at most 3"):
            tiny_encoder(2)(LABELS, references(4))
        with pytest.raises(ValueError, match="at most 0"):
            tiny_encoder(1)(LABELS, references(1))

    def test_wrong_reference_shape(self):
        with pytest.raises(ValueError, match=r"reference_latents has shape \(2, 1, 4, 2, 2\)"):
            tiny_encoder(2)(LABELS, references(1)[..., :2, :2])

    def test_wrong_label_shape(self):
        with pytest.raises(ValueError, match=r"class_labels has shape \(2, 1\)"):
            tiny_encoder(2)(LABELS[:, None])

    def test_patch_size_must_divide(self):
        with pytest.raises(ValueError, match="patch_size 3 does not divide sample_size 4"):
            ARConditionEncoder(sample_size=4, patch_size=3, num_layers=1)

    def test_scales_make_groups_of_growing_size(self):
        """The group of image i is image i - 1 averaged down; detail that the average loses does not come in."""
        encoder = tiny_encoder(1, scales=[1, 2, 3]).double()
        assert (encoder.num_images, encoder.group_sizes) == (3, (1, 4, 9))
        given = references(2).double()
        whole = encoder(LABELS, given).condition
        assert whole.shape == (2, 14, WIDTH)
        torch.testing.assert_close(encoder(LABELS, given[:, :1]).condition, whole[:, :5])
        checkers = (-1.0) ** torch.arange(4)
        detailed = given + torch.tensor([1.0, 0]).view(2, 1, 1, 1) * checkers[:, None] * checkers
        torch.testing.assert_close(encoder(LABELS, detailed).condition, whole)
        detailed = given + torch.tensor([0, 1.0]).view(2, 1, 1, 1)
        changed = (encoder(LABELS, detailed).condition - whole).abs().amax(dim=(0, 2)) > 1e-3
        assert changed.tolist() == [False] * 5 + [True] * 9

    def test_scales_survive_saving(self, tmp_path):
        encoder = tiny_encoder(1, scales=[1, 3])
        encoder.save_pretrained(tmp_path)
        again = ARConditionEncoder.from_pretrained(tmp_path)
        assert again.group_sizes == (1, 9)
        assert torch.equal(again(LABELS, references(1)).condition, encoder(LABELS, references(1)).condition)

    @pytest.mark.parametrize(
        ("scales", "patch_size", "words"),
        [
            ([2, 2], 1, "growing sides"),
            ([2], 1, "two or more"),
            ([0, 2], 1, "growing sides"),
            ([2, 4], 1, "make 20 tokens, but a sequence has 16"),
            ([1, 2], 2, "set patch_size 1"),
        ],
    )
    def test_wrong_scales(self, scales, patch_size, words):
        with pytest.raises(ValueError, match=words):
            tiny_encoder(patch_size, scales=scales)

    def test_too_many_references_for_the_scales(self):
        with pytest.raises(ValueError, match=r"2 reference images do not fit.*scales \[1, 2\]\) takes at most 1"):
            tiny_encoder(1, scales=[1, 2])(LABELS, references(2))

    def test_tuple_output(self):
        encoder = tiny_encoder(2)
        condition, features = encoder(LABELS, return_dict=False)
        assert torch.equal(condition, encoder(LABELS).condition)
        assert torch.equal(features, encoder(LABELS).features)


class TestTransformer:
    @pytest.mark.parametrize(("sample_size", "channels", "patch_size"), [(4, 4, 1), (8, 3, 2), (6, 16, 3)])
    def test_any_latent_size_channels_and_patch(self, sample_size, channels, patch_size):
        transformer = tiny_transformer(sample_size, channels, patch_size=patch_size)
        assert velocity(transformer).shape == (2, channels, sample_size, sample_size)
        assert transformer.position_embedding.shape[1] == (sample_size // patch_size) ** 2

    def test_a_patch_is_predicted_where_it_stands(self):
        """Without mixing between tokens a patch of the output depends on the same patch of the input."""
        transformer = tiny_transformer(4, 2, patch_size=2, num_layers=0)
        latents = torch.randn(1, 2, 4, 4, requires_grad=True)
        output = transformer(latents, 300, torch.zeros(1, 1, WIDTH)).sample
        output[..., :2, 2:].sum().backward()
        reached = latents.grad.abs().sum(dim=(0, 1)) > 0
        expected = torch.zeros(4, 4, dtype=torch.bool)
        expected[:2, 2:] = True
        assert torch.equal(reached, expected)

    @pytest.mark.parametrize("tokens", [1, 4, 16, 40])
    def test_any_number_of_condition_tokens(self, tokens):
        assert velocity(tiny_transformer(), tokens=tokens).isfinite().all()

    def test_condition_order_does_not_matter(self):
        """Cross-attention adds no position of its own: the condition brings it."""
        transformer = tiny_transformer().double()
        latents, condition = torch.randn(1, CHANNELS, SIDE, SIDE).double(), torch.randn(1, 6, WIDTH).double()
        flipped = transformer(latents, 100, condition.flip(1)).sample
        torch.testing.assert_close(transformer(latents, 100, condition).sample, flipped)

    def test_one_timestep_or_one_for_each_sample(self):
        transformer = tiny_transformer().double()
        each = velocity(transformer, torch.tensor([250.0, 250.0]))
        for timestep in (250, 250.0, torch.tensor(250.0), torch.tensor([250.0])):
            torch.testing.assert_close(velocity(transformer, timestep), each)

    def test_fractions_of_a_timestep_count(self):
        transformer = tiny_transformer()
        assert not torch.equal(velocity(transformer, 960.0), velocity(transformer, 960.5))

    def test_bfloat16_tells_neighbouring_timesteps_apart(self):
        """A timestep rounded to bfloat16 before the sinusoid would make 960 and 962 the same."""
        transformer = tiny_transformer().to(torch.bfloat16)
        timestep = torch.tensor(960.0)
        assert not torch.equal(velocity(transformer, timestep), velocity(transformer, timestep + 2))

    def test_fresh_model_predicts_zero(self):
        torch.manual_seed(0)
        transformer = TransDiffTransformer2DModel(
            sample_size=4,
            in_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
        )
        assert (velocity(transformer.eval()) == 0).all()

    def test_wrong_latent_shape(self):
        with pytest.raises(ValueError, match=r"latents have shape \(1, 4, 2, 2\); expected \(B, \*\(4, 4, 4\)\)"):
            tiny_transformer()(torch.zeros(1, 4, 2, 2), 0, torch.zeros(1, 1, WIDTH))

    def test_patch_size_must_divide(self):
        with pytest.raises(ValueError, match="patch_size 3 does not divide sample_size 16"):
            TransDiffTransformer2DModel(patch_size=3, num_layers=1)


@pytest.mark.parametrize("make", [tiny_encoder, tiny_transformer])
class TestBothModels:
    def call(self, model):
        if isinstance(model, ARConditionEncoder):
            return model(LABELS, references(2)).condition
        return velocity(model)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_runs_and_is_near(self, make, dtype):
        model = make()
        exact = self.call(model)
        low = self.call(model.to(dtype))
        assert low.dtype == dtype
        assert ((low.float() - exact).norm() / exact.norm()).item() < 0.05

    def test_saved_and_loaded_alike(self, make, tmp_path):
        model = make()
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        for name, weight in loaded.state_dict().items():
            assert torch.equal(weight, model.state_dict()[name]), name
        align_weights(loaded)
        assert torch.equal(self.call(loaded), self.call(model))

    def test_dropout_acts_in_training_only(self, make):
        model = make(dropout=0.5)
        assert torch.equal(self.call(model), self.call(model))
        model.train()
        assert not torch.equal(self.call(model), self.call(model))

    def test_gradient_checkpointing_changes_no_gradient(self, make):
        gradients = []
        for checkpointing in (False, True):
            model = make(dropout=0.0).double().train()
            if checkpointing:
                model.enable_gradient_checkpointing()
            self.call(model).square().mean().backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        assert len(gradients[0]) == len(gradients[1])
        for plain, checkpointed in zip(*gradients, strict=True):
            torch.testing.assert_close(plain, checkpointed)

    def test_every_parameter_is_used(self, make):
        model = make()
        self.call(model).square().mean().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []

    def test_fused_projections_change_nothing(self, make):
        model = make().double()
        separate = self.call(model)
        model.fuse_qkv_projections()
        torch.testing.assert_close(self.call(model), separate)
        model.unfuse_qkv_projections()
        assert torch.equal(self.call(model), separate)

    def test_initialisation(self, make):
        model = type(make()).from_config(make().config)
        for name, parameter in model.named_parameters():
            if name.endswith("scale_shift_table"):
                assert 0.6 / math.sqrt(WIDTH) < parameter.std() < 1.4 / math.sqrt(WIDTH)
            elif "norm" in name:
                assert (parameter == (1 if name.endswith("weight") else 0)).all()
            elif name.endswith("bias") or name == "proj_out.weight":
                assert (parameter == 0).all()
            elif name.endswith("embedding") or name in ("mask_token", "class_embedding.weight"):
                assert 0.012 < parameter.std() < 0.028
            else:
                fan_out, fan_in = parameter.shape
                bound = math.sqrt(6 / (fan_in + fan_out))
                assert 0.6 * bound < parameter.abs().max() <= bound, name

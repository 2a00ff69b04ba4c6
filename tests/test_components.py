"""Components of other kinds, and calls that miss one: what can work works, what cannot is said before any work."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKLWan,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    VQModel,
)
from PIL import Image
from tiny import CHANNELS, SIDE, tiny_encoder, tiny_pipeline, tiny_transformer, tiny_vae
from torch import nn
from torch.nn import functional as F

from transdiff_pipelines import TransDiffImg2ImgPipeline, TransDiffInpaintPipeline, TransDiffPipeline


STRIDE = 2  # pixels a latent, of the tiny VAE and of those here
PIXELS = SIDE * STRIDE
STEPS = {"num_inference_steps": 2}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class UpsamplingDecoder(ModelMixin):
    """The least that a VAE can be: no configuration, and a tensor out of `decode`."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.gain * F.interpolate(latents[:, :3], scale_factor=STRIDE).tanh()


def tiny_autoencoder() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=CHANNELS,
    ).eval()


def asymmetric() -> AsymmetricAutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    channels = {"down_block_out_channels": (8, 8), "up_block_out_channels": (8, 8)}
    return AsymmetricAutoencoderKL(**blocks, **channels, latent_channels=CHANNELS, norm_num_groups=4).eval()


def vector_quantised() -> VQModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"latent_channels": CHANNELS, "num_vq_embeddings": 8, "norm_num_groups": 4}
    return VQModel(**blocks, block_out_channels=(8, 8), **sizes).eval()


def deep_compression() -> AutoencoderDC:
    torch.manual_seed(0)
    kinds = {"encoder_block_types": ("ResBlock",) * 2, "decoder_block_types": ("ResBlock",) * 2}
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    depths = {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
    multiscale = {"encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ())}
    return AutoencoderDC(
        latent_channels=CHANNELS, attention_head_dim=8, **kinds, **widths, **depths, **multiscale
    ).eval()


ENCODING_VAES = [tiny_vae, tiny_autoencoder, asymmetric, vector_quantised, deep_compression]


class TestVAEs:
    @pytest.mark.parametrize("make", [*ENCODING_VAES, UpsamplingDecoder])
    def test_whatever_decodes_serves(self, make):
        pipe = tiny_pipeline(vae=make())
        latents = pipe(0, generator=seeded(), output_type="latent", **STEPS).images
        images = pipe(0, generator=seeded(), output_type="pt", **STEPS).images
        assert images.shape == (1, 3, PIXELS, PIXELS)
        scaling = getattr(pipe.vae, "config", {}).get("scaling_factor", 1.0)
        with torch.no_grad():
            decoded = pipe.vae.decode(latents / scaling)
        decoded = decoded if isinstance(decoded, torch.Tensor) else decoded.sample
        torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1))

    @pytest.mark.parametrize("make", ENCODING_VAES)
    def test_whatever_encodes_edits(self, make):
        pipe = tiny_pipeline(vae=make())
        assert pipe.vae_scale_factor == STRIDE
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (PIXELS, PIXELS, 3), dtype=np.uint8))
        edited = TransDiffImg2ImgPipeline.from_pipe(pipe)(image, 1, generator=seeded(), **STEPS).images[0]
        assert edited.size == (PIXELS, PIXELS)
        mask = Image.new("L", image.size)
        mask.paste(255, (0, 0, PIXELS, STRIDE))
        inpaint = TransDiffInpaintPipeline.from_pipe(pipe)
        painted = inpaint(image, mask, 1, generator=seeded(), **STEPS).images[0]
        np.testing.assert_array_equal(np.asarray(painted)[STRIDE:], np.asarray(image)[STRIDE:])

    def test_latents_in_the_units_of_the_vae_are_scaled_both_ways(self):
        """A tiny decoder has no shift factor, and a scaling factor of 1."""
        pipe = tiny_pipeline(vae=tiny_autoencoder())
        pixels = torch.rand(1, 3, PIXELS, PIXELS, generator=seeded())
        with torch.no_grad():
            own = pipe.vae.encode(2 * pixels - 1).latents
            torch.testing.assert_close(pipe.encode_image(pixels), own)

    def test_a_tiny_decoder_is_saved_and_loaded(self, tmp_path):
        pipe = tiny_pipeline(vae=tiny_autoencoder())
        pipe.save_pretrained(tmp_path)
        loaded = TransDiffPipeline.from_pretrained(tmp_path)
        assert isinstance(loaded.vae, AutoencoderTiny)
        images = [one(0, generator=seeded(), output_type="np", **STEPS).images for one in (pipe, loaded)]
        np.testing.assert_array_equal(*images)

    def test_a_decoder_alone_cannot_edit_pictures(self):
        pipe = TransDiffImg2ImgPipeline.from_pipe(tiny_pipeline(vae=UpsamplingDecoder()))
        side = pipe.image_side
        with pytest.raises(ValueError, match="UpsamplingDecoder decodes and does not encode; pass scaled latents"):
            pipe(Image.new("RGB", (side, side)), 1, **STEPS)
        assert pipe(torch.zeros(1, CHANNELS, SIDE, SIDE), 1, **STEPS).images[0].size == (PIXELS, PIXELS)

    def test_a_vae_of_another_stride_cannot_encode(self):
        """Its configuration does not tell the stride, and its images are found to be of another size."""

        class Encoder(UpsamplingDecoder):
            def encode(self, pixels):
                return type("Encoded", (), {"latents": torch.zeros(len(pixels), CHANNELS, 3, 3)})

        pipe = TransDiffImg2ImgPipeline.from_pipe(tiny_pipeline(vae=Encoder()))
        side = pipe.image_side
        with pytest.raises(
            ValueError, match=rf"encodes images of {side} pixels to \(1, 4, 3, 3\), and the model takes"
        ):
            pipe(Image.new("RGB", (side, side)), 1, **STEPS)

    @pytest.mark.parametrize(
        ("vae", "error", "message"),
        [
            (AutoencoderTiny, TypeError, "vae is the class AutoencoderTiny, not an instance"),
            (nn.Linear(2, 2), TypeError, r"vae is a Linear; expected .* decode\(latents\)"),
            (
                type("Own", (nn.Module,), {"decode": lambda self, latents: latents})(),
                TypeError,
                "ModelMixin; make it one",
            ),
            (tiny_vae(latent_channels=3), ValueError, "makes 4 latent channels, the VAE decodes 3"),
        ],
    )
    def test_what_cannot_decode_is_refused(self, vae, error, message):
        with pytest.raises(error, match=message):
            tiny_pipeline(vae=vae)


class TestMissing:
    def test_latents_need_no_vae(self, tmp_path):
        pipe = tiny_pipeline()
        pipe.save_pretrained(tmp_path)
        expected = pipe(0, generator=seeded(), output_type="latent", **STEPS).images
        for without in (tiny_pipeline(vae=None), TransDiffPipeline.from_pretrained(tmp_path, vae=None)):
            assert torch.equal(without(0, generator=seeded(), output_type="latent", **STEPS).images, expected)

    @pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
    def test_images_need_one_and_say_so_before_the_first_step(self, output_type, monkeypatch):
        pipe = tiny_pipeline(vae=None)
        monkeypatch.setattr(pipe.transformer, "forward", lambda **_: pytest.fail("denoised first"))
        with pytest.raises(ValueError, match="has no vae, .* output_type='latent'"):
            pipe(0, output_type=output_type, **STEPS)

    def test_editing_without_a_vae(self):
        pipe = TransDiffImg2ImgPipeline(**tiny_pipeline().components | {"vae": None})
        latents = torch.zeros(1, CHANNELS, SIDE, SIDE)
        assert pipe(latents, 1, output_type="latent", **STEPS).images.shape == latents.shape
        with pytest.raises(ValueError, match="has no vae, .* pass scaled latents in place of images"):
            pipe(Image.new("RGB", (PIXELS, PIXELS)), 1, output_type="latent", **STEPS)
        inpaint = TransDiffInpaintPipeline(**pipe.components)
        with pytest.raises(ValueError, match="has no vae"):
            inpaint(latents, Image.new("L", (PIXELS, PIXELS)), 1, output_type="latent", **STEPS)

    def test_reference_pictures_without_a_vae(self):
        pipe, picture = tiny_pipeline(vae=None), Image.new("RGB", (PIXELS, PIXELS))
        with pytest.raises(ValueError, match="has no vae"):
            pipe(0, reference_images=[picture], output_type="latent", **STEPS)
        latents = torch.zeros(CHANNELS, SIDE, SIDE)
        assert pipe(0, reference_images=[latents], output_type="latent", **STEPS).images.shape == (1, *latents.shape)

    def test_given_conditions_need_no_encoder(self):
        pipe = tiny_pipeline()
        condition, null = pipe.encode_condition(0), pipe.encode_condition(torch.tensor(5))
        call = {"condition_embeds": condition, "output_type": "latent", **STEPS}
        without = tiny_pipeline(condition_encoder=None)
        for guidance in ({"guidance_scale": 1.0}, {"guidance_scale": 2.0, "negative_condition_embeds": null}):
            expected = pipe(generator=seeded(), **guidance, **call).images
            assert torch.equal(without(generator=seeded(), **guidance, **call).images, expected)
        with pytest.raises(ValueError, match="has no condition_encoder, .* with guidance negative_condition_embeds"):
            without(guidance_scale=2.0, **call)
        for labels in ({"class_labels": 0}, {"condition_embeds": lambda images: condition}):
            with pytest.raises(ValueError, match="has no condition_encoder, .* pass condition_embeds"):
                without(**labels, **STEPS)

    @pytest.mark.parametrize("name", ["scheduler", "transformer"])
    def test_what_every_call_needs(self, name):
        pipe = tiny_pipeline()
        setattr(pipe, name, None)
        with pytest.raises(ValueError, match=f"has no {name}, which the call needs"):
            pipe(0, **STEPS)

    def test_a_class_in_place_of_an_instance(self):
        message = (
            r"scheduler is the class FlowMatchEulerDiscreteScheduler, .* FlowMatchEulerDiscreteScheduler\.from_config"
        )
        with pytest.raises(TypeError, match=message):
            tiny_pipeline(scheduler=FlowMatchEulerDiscreteScheduler)
        pipe = tiny_pipeline()
        pipe.scheduler = FlowMatchEulerDiscreteScheduler
        with pytest.raises(TypeError, match=message):
            pipe(0, **STEPS)
        for name, model in (("condition_encoder", tiny_encoder()), ("transformer", tiny_transformer())):
            with pytest.raises(TypeError, match=f"{name} is the class {type(model).__name__}, not an instance"):
                tiny_pipeline(**{name: type(model)})


class TestArguments:
    @pytest.mark.parametrize(
        "labels",
        [range(3), (n for n in (0, 1, 2)), iter([0, 1, 2]), map(int, "012"), (0, 1, 2), np.arange(3), {}.keys()],
    )
    def test_labels_of_every_iterable(self, labels):
        pipe = tiny_pipeline()
        if isinstance(labels, type({}.keys())):
            labels = dict.fromkeys([0, 1, 2]).values()
            with pytest.raises(TypeError, match="class label None"):
                pipe(labels, **STEPS)
            return
        images = pipe(labels, generator=seeded(), output_type="latent", **STEPS).images
        assert torch.equal(images, pipe([0, 1, 2], generator=seeded(), output_type="latent", **STEPS).images)

    def test_labels_of_a_data_frame(self):
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame({"label": [2, 0], "name": ["b", "a"]}, index=[7, 9])
        assert len(tiny_pipeline()(frame["label"], **STEPS).images) == 2

    @pytest.mark.parametrize("labels", [{0, 1}, {0: "a"}, frozenset([1])])
    def test_labels_without_an_order(self, labels):
        with pytest.raises(TypeError, match=rf"class_labels is a {type(labels).__name__}, .* pass list\(\.\.\.\)"):
            tiny_pipeline()(labels, **STEPS)

    @pytest.mark.parametrize("labels", [b"0", None, 1.5, [[0]], [None]])
    def test_labels_that_are_none(self, labels):
        with pytest.raises(TypeError, match="class label .* expected a class id or name"):
            tiny_pipeline()(labels, **STEPS)

    def test_a_number_as_text(self):
        pipe = tiny_pipeline(id2label={n: f"class {n}" for n in range(5)})
        with pytest.raises(ValueError, match="'3' is unknown; for the class id pass the int, 3"):
            pipe("3", **STEPS)
        with pytest.raises(ValueError, match="'12' is unknown; and no class has that id either: they are 0 to 4"):
            pipe("12", **STEPS)

    @pytest.mark.parametrize(
        ("argument", "error", "message"),
        [
            ({"guidance_interval": 0.5}, TypeError, r"guidance_interval is 0\.5; expected \(low, high\)"),
            ({"guidance_interval": "01"}, TypeError, r"guidance_interval is '01'; expected \(low, high\)"),
            ({"guidance_interval": (0.1,)}, ValueError, r"expected \(low, high\)"),
            ({"guidance_interval": (0.9, 0.1)}, ValueError, r"expected \(low, high\)"),
            ({"sigmas": 0.5}, TypeError, r"sigmas is 0\.5; expected a list"),
            ({"timesteps": "many"}, TypeError, "timesteps is 'many'; expected a list"),
            ({"callback_on_step_end_tensor_inputs": "latents"}, TypeError, r"expected a list: \['latents'\]"),
        ],
    )
    def test_one_value_in_place_of_several(self, argument, error, message):
        with pytest.raises(error, match=message):
            tiny_pipeline()(0, callback_on_step_end=lambda *_: {}, **STEPS | argument)

    def test_a_refused_scheduler_hears_of_the_packages_own(self):
        from diffusers import DDIMScheduler

        own = "FlowMatchEulerMaruyamaScheduler, FlowMatchSDEMultistepScheduler, FlowMatchEuler"
        wrong = {"scheduler": DDIMScheduler(prediction_type="flow_prediction")}
        with pytest.raises(ValueError, match=f"use one of {own}") as refused:
            tiny_pipeline(**wrong)
        assert "LTX" not in str(refused.value)
        with pytest.raises(ValueError, match=f"use one of FlowMapScheduler, {own}"):
            tiny_pipeline(**wrong, transformer=tiny_transformer(num_flow_map_layers=1))

    def test_sizes_of_a_mask_are_its_own(self):
        inpaint = TransDiffInpaintPipeline.from_pipe(tiny_pipeline())
        picture = Image.new("RGB", (64, 64))
        with pytest.raises(
            ValueError, match=f"mask_image has 64x64 pixels, but .* makes {PIXELS}x{PIXELS}; resize it"
        ):
            inpaint(picture, Image.new("L", (64, 64)), 0, **STEPS)
        with pytest.raises(ValueError, match="^image has 64x64 pixels, .*; resize it: image.resize"):
            inpaint(picture, Image.new("L", (PIXELS, PIXELS)), 0, **STEPS)

    def test_an_array_hears_of_no_method_that_repeats_its_values(self):
        with pytest.raises(ValueError, match="9x8 pixels, .*; resize it$"):
            TransDiffImg2ImgPipeline.from_pipe(tiny_pipeline())(torch.zeros(3, 8, 9), 0, **STEPS)


def test_the_bundled_model_previews_with_another_decoder(tmp_path: Path) -> None:
    """The annotation says what fits: nothing is warned of when a tiny decoder takes the VAE's place."""
    tiny_pipeline().save_pretrained(tmp_path)
    pipe = TransDiffPipeline.from_pretrained(tmp_path, vae=tiny_autoencoder())
    assert pipe(0, **STEPS).images[0].size == (PIXELS, PIXELS)


class TestReplacedComponents:
    """Attributes of a pipeline that were set after it was made are checked before a call's work."""

    @pytest.mark.parametrize(
        ("name", "make", "message"),
        [
            ("vae", lambda: tiny_vae(latent_channels=8), "the VAE decodes 8"),
            ("transformer", lambda: tiny_transformer(cross_attention_dim=32), "cross_attention_dim is 32"),
        ],
    )
    def test_what_does_not_fit(self, name, make, message, monkeypatch):
        pipe = tiny_pipeline()
        monkeypatch.setattr(TransDiffPipeline, "denoise", None)
        setattr(pipe, name, make())
        with pytest.raises(ValueError, match=message):
            pipe(1, num_inference_steps=2)

    def test_a_compiled_vae(self):
        pipe = tiny_pipeline()
        pipe.vae = torch.compile(pipe.vae, backend="eager")
        assert len(pipe(1, num_inference_steps=1).images) == 1


def test_a_vae_of_videos_is_refused():
    vae = AutoencoderKLWan(base_dim=8, z_dim=CHANNELS, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False])
    with pytest.raises(ValueError, match="AutoencoderKLWan decodes videos"):
        tiny_pipeline(vae=vae)


def test_a_pipeline_saved_without_a_component_is_loaded(tmp_path):
    tiny_pipeline(vae=None, condition_encoder=None).save_pretrained(tmp_path)
    pipe = TransDiffPipeline.from_pretrained(tmp_path)
    assert pipe.vae is None
    assert pipe.condition_encoder is None


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("vae", lambda pipe: pipe.decode_latents(torch.zeros(1, CHANNELS, SIDE, SIDE))),
        ("vae", lambda pipe: pipe.encode_image(torch.zeros(1, 3, PIXELS, PIXELS))),
        ("condition_encoder", lambda pipe: pipe.encode_condition(1)),
        ("condition_encoder", lambda pipe: pipe.resize_class_embeddings(["a"])),
    ],
)
def test_methods_beside_the_call_say_what_is_missing(name, use):
    with pytest.raises(ValueError, match=f"this pipeline has no {name}"):
        use(tiny_pipeline(**{name: None}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latents": np.zeros((1, CHANNELS, SIDE, SIDE))}, r"latents is a ndarray; .* torch\.as_tensor"),
        ({"callback_on_step_end": 3}, "callback_on_step_end is a int; expected a function"),
        (
            {"callback_on_step_end": lambda *_: torch.zeros(2)},
            "callback_on_step_end returned a Tensor; expected a dict",
        ),
    ],
)
def test_arguments_of_another_type(arguments, message):
    with pytest.raises(TypeError, match=message):
        tiny_pipeline()(1, num_inference_steps=1, **arguments)

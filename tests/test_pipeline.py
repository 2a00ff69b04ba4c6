"""The pipeline: what a call promises, and the errors it gives before any heavy work."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    AutoModel,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from rounding import assert_close
from tiny import CHANNELS, NUM_CLASSES, SIDE, seeded, tiny_encoder, tiny_pipeline, tiny_transformer, tiny_vae

from transdiff_pipelines import ARConditionEncoder, FlowMatchEulerMaruyamaScheduler, TransDiffPipeline
from transdiff_pipelines.pipelines.class_labels import closest_names


STEPS = 3


@pytest.fixture(scope="module")
def mrar():
    return tiny_pipeline(patch_size=2)


@pytest.fixture(scope="module")
def one_step():
    return tiny_pipeline(patch_size=1)


def latents_of(pipe, labels, seed=0, **kwargs):
    kwargs = {"num_inference_steps": STEPS, "generator": seeded(seed), "output_type": "latent", **kwargs}
    return pipe(labels, **kwargs).images


class TestOutputs:
    def test_output_types(self, mrar):
        images = {
            kind: mrar([0, 1], num_inference_steps=STEPS, generator=seeded(), output_type=kind).images
            for kind in ("pil", "np", "pt", "latent")
        }
        pixels = SIDE * mrar.vae_scale_factor
        assert [image.size for image in images["pil"]] == [(pixels, pixels)] * 2
        assert images["np"].shape == (2, pixels, pixels, 3)
        assert images["pt"].shape == (2, 3, pixels, pixels)
        assert images["latent"].shape == (2, CHANNELS, SIDE, SIDE)
        assert images["latent"].dtype == torch.float32
        np.testing.assert_array_equal(images["np"], images["pt"].permute(0, 2, 3, 1).numpy())
        np.testing.assert_array_equal((images["np"] * 255).round(), np.stack(images["pil"]))

    def test_latent_output_is_scaled(self, mrar):
        latents = latents_of(mrar, [0])
        decoded = mrar.vae.decode(latents / mrar.vae.config.scaling_factor).sample
        expected = (decoded / 2 + 0.5).clamp(0, 1)
        image = mrar([0], num_inference_steps=STEPS, generator=seeded(), output_type="pt").images
        assert_close(image, expected)

    def test_tuple(self, mrar):
        (images,) = mrar(0, num_inference_steps=1, output_type="latent", return_dict=False)
        assert images.shape == (1, CHANNELS, SIDE, SIDE)

    def test_intermediates_are_the_sequence(self, mrar):
        output = mrar(
            [0, 2], num_inference_steps=STEPS, generator=seeded(), output_type="latent", return_intermediates=True
        )
        assert len(output.intermediates) == 4
        assert torch.equal(output.intermediates[-1], output.images)
        assert torch.equal(output.images, latents_of(mrar, [0, 2]))
        assert not torch.equal(output.intermediates[0], output.intermediates[1])

    def test_one_step_has_one_image(self, one_step):
        output = one_step(0, num_inference_steps=STEPS, output_type="latent", return_intermediates=True)
        assert len(output.intermediates) == 1

    def test_num_images_per_label_repeats_each_label(self, mrar):
        twice = latents_of(mrar, [0, 3], num_images_per_label=2)
        assert torch.equal(twice, latents_of(mrar, [0, 0, 3, 3]))


class TestLabels:
    @pytest.mark.parametrize(
        "labels",
        ["goldfish", ["goldfish"], 1, [1], (1,), torch.tensor([1]), torch.tensor(1), np.int64(1), [np.int64(1)]],
    )
    def test_every_form_of_a_label(self, mrar, labels):
        assert torch.equal(latents_of(mrar, labels), latents_of(mrar, [1]))

    def test_names_are_synonyms(self, mrar):
        assert mrar.get_label_ids("Tinca tinca") == [0]
        assert mrar.get_label_ids(["tench", "zebra"]) == [0, 4]
        assert mrar.labels == {"Tinca tinca": 0, "bird": 2, "goldfish": 1, "machine": 3, "tench": 0, "zebra": 4}

    def test_mixed_names_and_ids(self, mrar):
        assert torch.equal(latents_of(mrar, ["zebra", 1]), latents_of(mrar, [4, 1]))

    @pytest.mark.parametrize(
        ("labels", "error", "message"),
        [
            ("goldfis", ValueError, "'goldfis' is unknown; did you mean 'goldfish'"),
            ("Zebra", ValueError, "did you mean 'zebra'"),
            ("xyzzy", ValueError, "the names are 'Tinca tinca', .*'zebra'"),
            ("crane", ValueError, r"'crane' is ambiguous: ids \[2, 3\]"),
            (NUM_CLASSES, ValueError, "class label 5 is outside 0..4; 5 is the null class"),
            (-1, ValueError, "class label -1 is outside 0..4"),
            ([], ValueError, "class_labels is empty"),
            (torch.tensor([], dtype=torch.long), ValueError, "class_labels is empty"),
            ([1.5], TypeError, "class label 1.5 is a float"),
            (True, TypeError, "class label True is a bool"),
            (None, TypeError, "class label None is a NoneType"),
            (torch.tensor([0.5]), TypeError, "tensor of torch.float32"),
            (torch.zeros(2, 2, dtype=torch.long), ValueError, r"class_labels has shape \(2, 2\)"),
        ],
    )
    def test_bad_labels(self, mrar, labels, error, message):
        with pytest.raises(error, match=message):
            mrar(labels, num_inference_steps=1)

    @pytest.mark.parametrize(
        ("name", "closest"),
        [
            ("dog", ["dog face", "dog sled", "hot dog", "guide dog"]),
            ("Dog", ["dog face", "dog sled", "hot dog", "guide dog"]),
            ("lion face", ["lion", "dog face", "cat face"]),  # "lion" names one class, "face" two
            ("dogs", ["dog sled", "hot dog", "dog face", "guide dog"]),
            ("crokodile face", ["crocodile", "cat face", "dog face"]),
            ("straw", ["strawberry"]),
            ("hotdog", ["hot dog"]),
            ("three o'clock", ["three oclock"]),
            ("T shirt", ["t-shirt"]),
            ("pineaple", ["pineapple"]),
            ("ananas", []),
            ("12", []),
            ("1a", []),
        ],
    )
    def test_the_closest_names(self, name, closest):
        names = ["cat face", "dog face", "hot dog", "guide dog", "dog sled", "lion", "crocodile", "strawberry"]
        assert closest_names(name, [*names, "pineapple", "t-shirt", "three oclock", "1", "2"]) == closest

    def test_the_closest_of_many_names(self):
        names = [f"{animal} face" for animal in ("cat", "cow", "dog", "fox", "pig", "rat")]
        assert closest_names("face", names) == [f"{animal} face" for animal in ("cat", "cow", "dog", "fox", "pig")]
        assert closest_names("face", []) == []

    def test_an_unknown_name_is_answered_with_the_closest(self):
        pipe = tiny_pipeline(id2label=dict(enumerate(["dog face", "cat face", "hot dog", "guide dog", "zebra"])))
        with pytest.raises(ValueError, match=r"'dog' is unknown; did you mean 'dog face', 'hot dog' or 'guide dog'\?"):
            pipe("dog", num_inference_steps=1)

    @pytest.mark.parametrize("name", ["12", "-1", "+1", "1.5", "1e3", " 7 ", "1_0"])
    @pytest.mark.parametrize("names", ["01234", ["one", "two", "three", "four", "five"]])
    def test_a_number_in_a_text_is_answered_with_the_range(self, name, names):
        """And not with the names of other numbers, however alike they look."""
        with pytest.raises(
            ValueError, match=rf"'{re.escape(name.strip())}' is unknown; .* they are 0 to 4, passed as"
        ):
            tiny_pipeline(id2label=dict(enumerate(names)))(name, num_inference_steps=1)

    def test_names_need_id2label(self):
        with pytest.raises(ValueError, match="has no id2label"):
            tiny_pipeline(id2label=None)("goldfish")


class TestRandomness:
    def test_seed_reproduces(self, mrar):
        assert torch.equal(latents_of(mrar, [0, 1], seed=3), latents_of(mrar, [0, 1], seed=3))
        assert not torch.equal(latents_of(mrar, [0, 1], seed=3), latents_of(mrar, [0, 1], seed=4))

    @pytest.mark.parametrize("guidance", [1.0, 1.7])
    def test_a_batch_equals_its_samples(self, mrar, guidance):
        labels, seeds = [0, 4, 2], [5, 6, 7]
        batch = latents_of(mrar, labels, generator=[seeded(s) for s in seeds], guidance_scale=guidance)
        for i, (label, seed) in enumerate(zip(labels, seeds, strict=True)):
            alone = latents_of(mrar, [label], generator=[seeded(seed)], guidance_scale=guidance)
            assert_close(alone, batch[i : i + 1])

    def test_given_latents_are_the_initial_noise(self, mrar):
        noise = torch.randn(1, CHANNELS, SIDE, SIDE, generator=seeded(0))
        generator = seeded(0)
        torch.randn(noise.shape, generator=generator)
        given = latents_of(mrar, 1, latents=noise, generator=generator)
        assert torch.equal(given, latents_of(mrar, 1, seed=0))

    def test_all_images_start_from_the_same_noise(self, mrar):
        started = []

        def note_start(pipe, step, timestep, tensors):
            if step % STEPS == 0:
                started.append(tensors["latents"])

        # Neither drift nor diffusion: the first step hands the initial noise on as it is.
        pipe = tiny_pipeline(scheduler=FlowMatchEulerMaruyamaScheduler(drift_scale=0.0, diffusion_scale=0.0))
        noise = torch.randn(1, CHANNELS, SIDE, SIDE)
        latents_of(pipe, 0, latents=noise, callback_on_step_end=note_start)
        assert len(started) == 4
        assert all(torch.equal(latents, noise) for latents in started)


class TestGuidance:
    def test_recommended_guidance_is_the_default(self, mrar):
        assert torch.equal(latents_of(mrar, 0), latents_of(mrar, 0, guidance_scale=1.3))
        assert not torch.equal(latents_of(mrar, 0), latents_of(mrar, 0, guidance_scale=1.0))

    def test_unset_recommendation_is_no_guidance(self):
        pipe = tiny_pipeline(guidance_scale=None)
        assert torch.equal(latents_of(pipe, 0), latents_of(pipe, 0, guidance_scale=1.0))

    def test_formula(self, one_step):
        """v_u + g (v_c - v_u), for g below 1 too."""
        noise = torch.randn(1, CHANNELS, SIDE, SIDE)
        one_step.scheduler.set_timesteps(sigmas=[1.0])

        def one_euler_step(label, guidance):
            return latents_of(one_step, label, latents=noise, guidance_scale=guidance, num_inference_steps=1)

        conditional, guided = one_euler_step(0, 1.0), one_euler_step(0, 0.4)
        unconditional = one_euler_step(0, 0.0)
        assert_close(guided, unconditional + 0.4 * (conditional - unconditional))
        assert not torch.allclose(conditional, unconditional)
        # g = 0 is the null class alone, whatever the label
        assert_close(unconditional, one_euler_step(3, 0.0))

    def test_no_second_branch_at_one(self, mrar, monkeypatch):
        sizes = []
        forward = mrar.transformer.forward
        monkeypatch.setattr(
            mrar.transformer, "forward", lambda **kw: sizes.append(len(kw["hidden_states"])) or forward(**kw)
        )
        latents_of(mrar, [0, 1], guidance_scale=[1.0, 1.5, 1.0, 0.0])
        assert sizes == [2] * STEPS + [4] * STEPS + [2] * STEPS + [4] * STEPS

    def test_a_value_for_each_image(self, mrar):
        def sequence(guidance):
            output = mrar(0, guidance, STEPS, seeded(), output_type="latent", return_intermediates=True)
            return output.intermediates

        same, different = sequence([1.3] * 4), sequence([1.3, 1.3, 2.0, 1.3])
        assert all(torch.equal(a, b) for a, b in zip(same, sequence(1.3), strict=True))
        changed = [not torch.equal(a, b) for a, b in zip(same, different, strict=True)]
        assert changed == [False, False, True, True]

    def test_the_unconditional_branch_keeps_the_reference_images(self, mrar, monkeypatch):
        seen = []
        forward = mrar.condition_encoder.forward

        def spy(labels, references=None, **kwargs):
            seen.append((labels, references))
            return forward(labels, references, **kwargs)

        monkeypatch.setattr(mrar.condition_encoder, "forward", spy)
        latents_of(mrar, [3], guidance_scale=2.0)
        labels, references = seen[2]
        assert labels.tolist() == [NUM_CLASSES, 3]
        assert references.shape[:2] == (2, 1)
        assert torch.equal(references[0], references[1])

    @pytest.mark.parametrize(
        ("guidance", "error", "message"),
        [
            (-0.1, ValueError, "guidance_scale -0.1 is not a finite number"),
            (float("inf"), ValueError, "guidance_scale inf"),
            ([1.0, 2.0], ValueError, "lists 2 values, but the model makes 4"),
            ("1.3", TypeError, "guidance_scale '1.3' is a str"),
        ],
    )
    def test_bad_guidance(self, mrar, guidance, error, message):
        with pytest.raises(error, match=message):
            mrar(0, guidance_scale=guidance)
        with pytest.raises(error, match=message):
            tiny_pipeline(guidance_scale=guidance)


class TestCallbacks:
    def test_steps_count_over_the_sequence(self, mrar):
        calls = []

        def note(pipe, step, timestep, tensors):
            calls.append((step, pipe.current_ar_step, timestep.item(), pipe.guidance_scale, sorted(tensors)))

        guidance = [1.0, 1.1, 1.2, 1.3]
        latents_of(
            mrar,
            0,
            guidance_scale=guidance,
            callback_on_step_end=note,
            callback_on_step_end_tensor_inputs=["latents", "condition"],
        )
        grid = [1000.0, 520.0, 40.0]
        expected = [
            (i, i // STEPS, grid[i % STEPS], guidance[i // STEPS], ["condition", "latents"]) for i in range(12)
        ]
        assert [c[:2] + c[3:] for c in calls] == [e[:2] + e[3:] for e in expected]
        np.testing.assert_allclose([c[2] for c in calls], [e[2] for e in expected], rtol=1e-5)
        assert mrar.num_timesteps == 4 * STEPS
        assert mrar.current_ar_step is None

    def test_a_callback_may_replace_latents(self, mrar):
        result = latents_of(
            mrar, 0, callback_on_step_end=lambda *a: {"latents": torch.full_like(a[3]["latents"], 7.0)}
        )
        assert (result == 7).all()

    def test_interrupt_returns_what_is_there(self, mrar):
        seen = []

        def stop(pipe, step, timestep, tensors):
            seen.append(tensors["latents"])
            pipe._interrupt = step == STEPS + 1

        result = latents_of(mrar, 0, callback_on_step_end=stop)
        assert len(seen) == STEPS + 2
        assert torch.equal(result, seen[-1])
        assert torch.equal(latents_of(mrar, 0), latents_of(tiny_pipeline(), 0))

    def test_unknown_tensor(self, mrar):
        with pytest.raises(
            ValueError, match=r"\['prompt_embeds'\]; a callback can be given \['latents', 'condition'\]"
        ):
            mrar(0, callback_on_step_end=print, callback_on_step_end_tensor_inputs=["prompt_embeds"])


class TestCallbackObjects:
    """diffusers' own callbacks, which say themselves what they want to be given."""

    class Recorder(PipelineCallback):
        tensor_inputs = ["condition"]

        def __init__(self):
            super().__init__()
            self.seen = []

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            self.seen.append((step_index, callback_kwargs["condition"].shape[-1]))
            return callback_kwargs

    def test_one(self, mrar):
        recorder = self.Recorder()
        assert torch.equal(latents_of(mrar, 0, callback_on_step_end=recorder), latents_of(mrar, 0))
        assert recorder.seen == [(step, 16) for step in range(4 * STEPS)]

    def test_several(self, one_step):
        recorders = [self.Recorder(), self.Recorder()]
        latents_of(one_step, 0, callback_on_step_end=MultiPipelineCallbacks(recorders))
        assert [len(recorder.seen) for recorder in recorders] == [STEPS, STEPS]

    def test_what_the_pipeline_does_not_have(self, one_step):
        recorder = self.Recorder()
        recorder.tensor_inputs = ["prompt_embeds"]
        with pytest.raises(ValueError, match=r"\['prompt_embeds'\]; a callback can be given"):
            latents_of(one_step, 0, callback_on_step_end=recorder)

    def test_latents_stay_float32_whatever_a_callback_returns(self, one_step):
        def halve(pipe, step, timestep, tensors):
            return {"latents": tensors["latents"].bfloat16()}

        assert latents_of(one_step, 0, callback_on_step_end=halve).dtype == torch.float32


class TestForms:
    """What a user may have at hand in place of Python's own numbers and lists."""

    def test_numpy(self, mrar):
        expected = latents_of(mrar, [0, 3], guidance_scale=1.5)
        result = latents_of(
            mrar, np.array([0, 3]), guidance_scale=np.float64(1.5), num_inference_steps=np.int64(STEPS)
        )
        assert torch.equal(result, expected)
        with pytest.raises(ValueError, match=r"class_labels has shape \(1, 2\)"):
            latents_of(mrar, np.array([[0, 3]]))
        with pytest.raises(TypeError, match="class label 0.5"):
            latents_of(mrar, np.array([0.5]))

    def test_encode_condition_takes_what_a_call_takes(self, mrar):
        expected = mrar.encode_condition(3)
        for label in ([3], "crane, machine", np.array([3]), torch.tensor(3), torch.tensor([3])):
            assert torch.equal(mrar.encode_condition(label), expected)
        assert mrar.encode_condition(torch.tensor([NUM_CLASSES])).shape == expected.shape
        for wrong in (-1, NUM_CLASSES + 1):
            with pytest.raises(ValueError, match=f"class label {wrong} is outside"):
                mrar.encode_condition(torch.tensor([wrong]))

    @pytest.mark.parametrize("generator", [0, (torch.Generator(),), [0]])
    def test_what_is_no_generator(self, mrar, generator):
        with pytest.raises(TypeError, match="expected a torch.Generator, or a list"):
            mrar(0, num_inference_steps=1, generator=generator)


class TestProgress:
    def test_bars_for_the_sequence_and_its_steps(self, capsys):
        pipe = tiny_pipeline()
        pipe.set_progress_bar_config(disable=False, mininterval=0)
        pipe(0, num_inference_steps=2, output_type="latent")
        printed = capsys.readouterr().err
        assert "images of the sequence: 100%" in printed
        assert "4/4" in printed
        assert "2/2" in printed

    def test_none_when_disabled(self, mrar, capsys):
        latents_of(mrar, 0)
        assert capsys.readouterr().err == ""


class TestArguments:
    @pytest.mark.parametrize(
        ("kwargs", "error", "message"),
        [
            ({"num_inference_steps": 0}, ValueError, "num_inference_steps is 0"),
            ({"num_inference_steps": 2.5}, TypeError, "num_inference_steps 2.5 is a float"),
            ({"num_images_per_label": 0}, ValueError, "num_images_per_label is 0"),
            (
                {"latents": torch.zeros(1, 4, 8, 8)},
                ValueError,
                r"latents have shape \(1, 4, 8, 8\); expected \(1, 4, 4",
            ),
            ({"generator": [seeded(), seeded()]}, ValueError, "2 generators were given for 1 images"),
            ({"output_type": "jpeg"}, ValueError, "output_type 'jpeg' is unknown"),
            ({"sigmas": [0.2, 0.8]}, ValueError, "strictly decreasing"),
        ],
    )
    def test_errors(self, mrar, kwargs, error, message):
        with pytest.raises(error, match=message):
            mrar(0, **kwargs)

    def test_custom_sigmas(self, mrar):
        grid = np.linspace(1, 0.04, STEPS).tolist()
        assert torch.equal(latents_of(mrar, 0, sigmas=grid, num_inference_steps=100), latents_of(mrar, 0))

    def test_errors_come_before_work(self, mrar, monkeypatch):
        monkeypatch.setattr(ARConditionEncoder, "forward", lambda *a, **k: pytest.fail("the encoder was called"))
        with pytest.raises(ValueError, match="output_type"):
            mrar(0, output_type="gif")


class TestComponents:
    @pytest.mark.parametrize(
        ("components", "message"),
        [
            ({"condition_encoder": tiny_encoder(attention_head_dim=4)}, "is 8 wide but .* cross_attention_dim is 16"),
            ({"transformer": tiny_transformer(in_channels=3)}, "takes 4 latent channels, the transformer 3"),
            ({"vae": tiny_vae(latent_channels=8)}, "makes 4 latent channels, the VAE decodes 8"),
            ({"transformer": tiny_transformer(8)}, "its sample_size is 8 and the condition encoder's 4"),
            ({"scheduler": DDIMScheduler()}, "DDIMScheduler has prediction_type='epsilon'"),
            (
                {"scheduler": DPMSolverMultistepScheduler(prediction_type="flow_prediction")},
                "DPMSolverMultistepScheduler has use_flow_sigmas=False",
            ),
        ],
    )
    def test_mismatches(self, components, message):
        with pytest.raises(ValueError, match=message):
            tiny_pipeline(**components)

    def test_one_step_encoder_and_decoder_may_differ_in_size(self):
        """As the published 512 px model does: 16 in the encoder, 32 in the decoder."""
        pipe = tiny_pipeline(1, transformer=tiny_transformer(8))
        assert latents_of(pipe, 0).shape == (1, CHANNELS, 8, 8)

    def test_a_scheduler_swapped_in_later_is_checked(self):
        pipe = tiny_pipeline()
        pipe.scheduler = DDIMScheduler()
        with pytest.raises(ValueError, match="DDIMScheduler"):
            pipe(0)

    @pytest.mark.parametrize(
        "scheduler",
        [
            FlowMatchEulerDiscreteScheduler,
            FlowMatchHeunDiscreteScheduler,
            DPMSolverMultistepScheduler,
            UniPCMultistepScheduler,
        ],
    )
    def test_swapped_schedulers_start_afresh_for_every_image(self, scheduler):
        pipe = tiny_pipeline(guidance_scale=1.0)
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        first = latents_of(pipe, [0, 1], num_inference_steps=4)
        assert first.isfinite().all()
        assert torch.equal(first, latents_of(pipe, [0, 1], num_inference_steps=4))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision(self, dtype):
        pipe = tiny_pipeline()
        exact = latents_of(pipe, [0, 1])
        low = latents_of(pipe.to(dtype), [0, 1])
        assert low.dtype == torch.float32
        assert ((low - exact).norm() / exact.norm()).item() < 0.1
        assert pipe(0, num_inference_steps=1, output_type="np").images.shape == (1, 8, 8, 3)


class TestSaveAndLoad:
    def test_round_trip_in_a_new_process(self, mrar, tmp_path):
        mrar.save_pretrained(tmp_path / "pipe")
        script = (
            "import sys, torch; from transdiff_pipelines import TransDiffPipeline\n"
            f"torch.set_num_threads({torch.get_num_threads()})\n"
            "pipe = TransDiffPipeline.from_pretrained(sys.argv[1])\n"
            "generator = torch.Generator().manual_seed(0)\n"
            "image = pipe('zebra', num_inference_steps=3, generator=generator, output_type='pt').images\n"
            "torch.save({'image': image, 'labels': pipe.labels, 'id2label': dict(pipe.config.id2label),\n"
            "            'guidance': pipe.config.guidance_scale,\n"
            "            'drift': pipe.scheduler.config.drift_scale}, sys.argv[2])\n"
        )
        subprocess.run([sys.executable, "-c", script, tmp_path / "pipe", tmp_path / "out.pt"], check=True)
        loaded = torch.load(tmp_path / "out.pt", weights_only=True)
        expected = mrar("zebra", num_inference_steps=3, generator=seeded(), output_type="pt").images
        assert_close(loaded["image"], expected)
        assert loaded["labels"] == mrar.labels
        assert loaded["id2label"] == mrar.config.id2label
        assert loaded["guidance"] == 1.3
        assert loaded["drift"] == 0.9

    def test_index_names_the_package(self, mrar, tmp_path):
        mrar.save_pretrained(tmp_path)
        index = TransDiffPipeline.load_config(tmp_path)
        for component in ("condition_encoder", "transformer", "scheduler"):
            assert index[component][0] == "transdiff_pipelines"

    def test_diffusers_own_loaders(self, mrar, tmp_path):
        mrar.save_pretrained(tmp_path)
        pipe = DiffusionPipeline.from_pretrained(tmp_path)
        assert type(pipe) is TransDiffPipeline
        assert torch.equal(latents_of(pipe.to("cpu"), 0), latents_of(mrar, 0))
        encoder = AutoModel.from_pretrained(str(tmp_path), subfolder="condition_encoder")
        assert type(encoder) is ARConditionEncoder
        swapped = DiffusionPipeline.from_pretrained(tmp_path, scheduler=FlowMatchEulerDiscreteScheduler())
        assert isinstance(swapped.scheduler, FlowMatchEulerDiscreteScheduler)

    def test_guidance_list_survives(self, tmp_path):
        tiny_pipeline(guidance_scale=[1.0, 1.1, 1.2, 1.3]).save_pretrained(tmp_path)
        assert list(TransDiffPipeline.from_pretrained(tmp_path).config.guidance_scale) == [1.0, 1.1, 1.2, 1.3]

"""Training flow maps: where they begin and end, what the teacher says they are, and whole runs on tiny models."""

import math
import shutil
from pathlib import Path
from statistics import median

import pytest
import torch
from rounding import CURVE
from test_sharding import run_split
from test_train import final_tensors, losses, train

from tests.tiny import tiny_encoder, tiny_transformer
from training.data.batches import flow_map_grid, flow_map_intervals
from training.model.build import TrainingModel
from training.model.flow_map import FlowMapTeacher
from training.model.loss import flow_map_losses, weighted_mean
from training.outputs.checkpoints import CheckpointError, checkpoint_folders
from training.settings.config import ConfigError
from training.trainer import Trainer
from transdiff_pipelines import FlowMapScheduler, TransDiffPipeline


K = 6
MEAN, STD = 2.0, 0.5
LABELS = torch.tensor([0, 3, 1])


def student(patch_size: int = 2, **config) -> TrainingModel:
    transformer = tiny_transformer(num_layers=3, **{"num_flow_map_layers": 2, **config})
    return TrainingModel(tiny_encoder(patch_size), transformer, [str(label) for label in range(5)])


def batch(num_images: int, mul: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = len(LABELS) * mul
    normal = torch.randn(len(LABELS), num_images, mul, 3, generator=generator)
    begin, end = (places.permute(1, 2, 0).flatten(1) for places in flow_map_intervals(normal, K))
    return {
        "latents": torch.zeros(len(LABELS), num_images, 4, 4, 4),
        "labels": LABELS,
        "noise": torch.randn(num_images, rows, 4, 4, 4, generator=generator),
        "begin": begin,
        "end": end,
        "sigmas": flow_map_grid(K, generator),
    }


def gaussian_velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The exact velocity of N(MEAN, STD²) data, whose paths keep their quantile."""
    share = (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)
    return share * (x - (1 - t) * MEAN) - MEAN


def gaussian_point(noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Where the path of `noise` is at time t."""
    return (1 - t) * MEAN + ((1 - t) ** 2 * STD**2 + t**2).sqrt() * noise


class TestIntervals:
    def drawn(self, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        normal = torch.randn(20_000, 4, 3, generator=torch.Generator().manual_seed(0))
        begin, end = flow_map_intervals(normal, steps)
        assert begin.max() < steps
        assert (begin[:, 0] == end[:, 0]).all()
        assert set(begin[:, 0].tolist()) == set(range(steps))
        return begin[:, 1:].flatten(), end[:, 1:].flatten()

    @pytest.mark.parametrize("steps", [2, 5, 6, 8, 12])
    def test_they_go_forward_and_every_pair_of_places_is_there(self, steps):
        begin, end = self.drawn(steps)
        assert (begin < end).all()
        assert end.max() == steps
        pairs = {(int(b), int(e)) for b, e in zip(begin, end, strict=True)}
        assert len(pairs) == steps * (steps + 1) // 2

    @pytest.mark.parametrize(("steps", "several"), [(2, (2,)), (5, ()), (6, (2, 3)), (8, (2, 4)), (12, (2, 3, 4))])
    def test_most_are_those_of_the_sampler(self, steps, several):
        """The shares follow from the definition: 0.4 for one call, 0.4 for the others, 0.2 for any of all pairs."""
        begin, end = self.drawn(steps)
        anywhere = 0.2 / (steps * (steps + 1) / 2)
        all_the_way = ((begin == 0) & (end == steps)).double().mean().item()
        assert all_the_way == pytest.approx((0.4 if several else 0.8) + anywhere, abs=0.02)
        for calls in several:
            width = steps // calls
            for call in range(calls):
                share = ((begin == call * width) & (end == (call + 1) * width)).double().mean().item()
                assert share == pytest.approx(0.4 / len(several) / calls + anywhere, abs=0.01)

    def test_grids_fall_in_whole_timesteps_even_or_moved(self):
        grids = [flow_map_grid(K, torch.Generator().manual_seed(seed)) for seed in range(40)]
        even = 1 - torch.arange(K) / K
        for grid in grids:
            assert grid[0] == 1
            assert (grid.diff() <= -0.5 / K + 1e-3).all()
            assert (grid - even).abs().max() <= 0.5 / K + 1e-3
            torch.testing.assert_close(1000 * grid, (1000 * grid).round())
        moved = sum(bool((grid - even).abs().max() > 1e-3) for grid in grids)
        assert 8 <= moved <= 32


class TestTeacher:
    def known(self, monkeypatch: pytest.MonkeyPatch, patch_size: int) -> FlowMapTeacher:
        """A teacher that knows the velocity of Gaussian data."""
        teacher = FlowMapTeacher(student(patch_size), [1.0] * patch_size**2)

        def velocity(hidden_states, timestep, encoder_hidden_states, return_dict=True, **_):
            t = (torch.as_tensor(timestep).float() / 1000).view(-1, 1, 1, 1)
            result = gaussian_velocity(hidden_states, t)
            return type("Output", (), {"sample": result})() if return_dict else (result,)

        monkeypatch.setattr(teacher.pipe.transformer, "forward", velocity)
        return teacher

    @pytest.mark.parametrize("patch_size", [1, 2])
    def test_targets_are_the_average_velocities_of_a_known_flow(self, patch_size, monkeypatch):
        given = batch(patch_size**2)
        given["sigmas"] = 1 - torch.arange(40) / 40
        scale = 40 // K
        given["begin"], given["end"] = given["begin"] * scale, given["end"] * scale
        taught = self.known(monkeypatch, patch_size)(given)
        times, next_times = (taught[name][..., None, None, None] / 1000 for name in ("timesteps", "next_timesteps"))
        noise = given["noise"][0, : len(LABELS)].repeat(len(given["begin"][0]) // len(LABELS), 1, 1, 1)
        states = gaussian_point(noise, times)
        torch.testing.assert_close(taught["states"], states, rtol=0, atol=0.01)
        long = (times > next_times)[..., 0, 0, 0]
        average = (states - gaussian_point(noise, next_times)) / (times - next_times)
        error = (taught["targets"] - average).reshape(*long.shape, -1).abs().amax(-1)
        assert error[long].max() < 0.05
        velocity = gaussian_velocity(taught["states"], times)
        torch.testing.assert_close(taught["targets"][~long], velocity[~long], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            taught["latents"],
            (MEAN + STD * noise[: len(LABELS), None]).expand_as(taught["latents"]),
            rtol=0,
            atol=0.01,
        )

    def test_sequences_are_those_that_the_pipeline_makes(self):
        model = student()
        scales = [1.0, 1.5, 2.0, 1.0]
        given = batch(4)
        taught = FlowMapTeacher(model, scales)(given)
        pipe = TransDiffPipeline(model.condition_encoder, model.transformer, None, FlowMapScheduler())
        pipe.scheduler = FlowMapTeacher(model, scales).pipe.scheduler
        pipe.set_progress_bar_config(disable=True)
        expected = pipe(
            LABELS,
            scales,
            latents=given["noise"][0, :3],
            sigmas=given["sigmas"].tolist(),
            output_type="latent",
        ).images
        torch.testing.assert_close(taught["latents"][:, -1], expected)

    def test_the_velocity_has_the_guidance_of_its_image(self):
        model, scales, given = student(), [1.0, 1.5, 2.0, 0.0], batch(4)
        taught = FlowMapTeacher(model, scales)(given)
        for image, scale in enumerate(scales):
            references = taught["latents"][:, :image] if image else None
            branches = [
                model.transformer(
                    taught["states"][image, :3],
                    taught["timesteps"][image, :3],
                    model.condition_encoder(labels, references).condition,
                ).sample
                for labels in (torch.full_like(LABELS, 5), LABELS)
            ]
            guided = branches[0] + scale * (branches[1] - branches[0])
            torch.testing.assert_close(taught["targets"][image, :3], guided, rtol=1e-3, atol=1e-3)

    def test_at_the_start_only_intervals_of_a_length_are_wrong(self):
        """The student as it begins is its own teacher's velocity."""
        model, given = student(), batch(4)
        taught = FlowMapTeacher(model, [1.0] * 4)(given)
        first = {name: value[:, :3] if name not in ("latents", "labels") else value for name, value in taught.items()}
        encoder, transformer = model.condition_encoder, model.transformer
        assert flow_map_losses(encoder, transformer, **first).max() < 1e-8
        assert flow_map_losses(encoder, transformer, **taught).min() > 1e-3

    def test_the_teacher_stays_as_it_was(self):
        model = student()
        teacher = FlowMapTeacher(model, [1.0] * 4)
        before = teacher(batch(4))["targets"]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        assert torch.equal(teacher(batch(4))["targets"], before)
        assert not any(parameter.requires_grad for parameter in teacher.pipe.transformer.parameters())


class TestWeightedMean:
    def test_the_mean_with_a_weighted_gradient(self):
        errors = torch.tensor([0.0, 0.01, 0.02, 5.0], dtype=torch.float64, requires_grad=True)
        found = weighted_mean(errors, 0.01)
        assert found.item() == pytest.approx(errors.mean().item())
        found.backward()
        # c / (e + c) over the number of errors: half the weight where an error is as large as the scale
        assert errors.grad.tolist() == pytest.approx([1 / 4, 1 / 8, 1 / 12, 0.01 / 5.01 / 4])

    def test_of_a_training_step(self, flow_map_config):
        """Logged errors are mean squares either way; what is learned differs from the second step on."""
        options = {"schedule.steps": 2, "checkpoints.every": 100, "model.dropout": 0.0}
        runs = {c: flow_map_config(str(c), **options, **{"loss.error_scale": c}) for c in (None, 0.003)}
        for config in runs.values():
            train(config)
        plain, weighted = (losses(config.output) for config in runs.values())
        assert plain[0] == pytest.approx(weighted[0], rel=CURVE)
        assert plain[1] != weighted[1]


class TestRuns:
    def test_the_finished_pipeline_is_a_flow_map(self, flow_map_config):
        config = flow_map_config(**{"schedule.steps": 2, "preview.every": 2, "preview.num_inference_steps": 2})
        trainer = train(config)
        pipe = TransDiffPipeline.from_pretrained(Path(config.output) / "pipeline")
        assert type(pipe.scheduler) is FlowMapScheduler
        assert pipe.transformer.config.num_flow_map_layers == 1
        assert (pipe.config.guidance_scale, pipe.recommended_num_inference_steps) == (1.0, 4)
        assert trainer.teacher is not None
        assert trainer.teacher.guidance_scales == [1.3] * 4  # the teacher's own
        pipe.set_progress_bar_config(disable=True)
        assert pipe(["10"]).images[0].size == (16, 16)

    @pytest.mark.parametrize("patch_size", [1, 2])
    def test_a_student_learns(self, flow_map_config, patch_size):
        changes = {"schedule.steps": 30, "optimizer.learning_rate": 3e-3, "checkpoints.every": 100}
        config = flow_map_config(patch_size=patch_size, **changes)
        train(config)
        found = losses(config.output)
        assert median(found[-10:]) < 0.7 * median(found[:10])

    @pytest.mark.parametrize("kind", ["fused", "muon"])
    def test_a_resumed_run_is_bit_identical_to_one_that_went_through(self, flow_map_config, kind):
        options = {"schedule.steps": 5, "checkpoints.keep": 3, "optimizer.gradient_accumulation": 2}
        options |= {"optimizer.kind": kind}
        options |= {"model.frozen": [], "model.dropout": 0.3, "schedule.decay": "cosine"}
        whole, killed = flow_map_config("whole", **options), flow_map_config("killed", **options)
        train(whole)
        shutil.copytree(whole.output, killed.output)
        for path in (*checkpoint_folders(Path(killed.output))[1:], Path(killed.output) / "pipeline"):
            shutil.rmtree(path)
        resumed = Trainer(killed)
        assert resumed.step == 2
        resumed.run()
        assert losses(killed.output) == losses(whole.output)
        expected, found = final_tensors(whole.output), final_tensors(killed.output)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)

    @pytest.mark.timeout(900)  # two short runs: seconds, but minutes where many share the processor
    @pytest.mark.parametrize("sharding", ["no", "fsdp2"])
    def test_two_processes_make_the_run_of_one(self, flow_map_config, sharding):
        options = {"schedule.steps": 3, "model.frozen": [], "optimizer.gradient_accumulation": 2}
        options |= {"optimizer.learning_rate": 1e-3}
        one = flow_map_config("one", **options)
        train(one)
        two = flow_map_config("two", **options | {"data.batch_size": 2, "sharding": sharding})
        run_split(two)
        assert losses(two.output) == pytest.approx(losses(one.output), rel=CURVE)

    def test_compiled_blocks_leave_the_curve_alone(self, flow_map_config):
        options = {"patch_size": 1, "schedule.steps": 2, "checkpoints.every": 100}
        plain, compiled = flow_map_config("plain", **options), flow_map_config("other", **options, compile="aot_eager")
        train(plain)
        trainer = train(compiled)
        assert trainer.teacher is not None
        for block in trainer.teacher.pipe.transformer.transformer_blocks:
            assert block._compiled_call_impl is not None
        assert losses(compiled.output) == pytest.approx(losses(plain.output), rel=CURVE)

    def test_another_teacher_is_another_run(self, flow_map_config, tmp_path: Path):
        config = flow_map_config(**{"schedule.steps": 2})
        train(config)
        pipe = TransDiffPipeline.from_pretrained(config.model.start_from)
        with torch.no_grad():
            pipe.transformer.proj_out.weight.add_(0.1)
        pipe.save_pretrained(config.model.start_from)
        with pytest.raises(CheckpointError, match=r"weights of model\.start_from were others"):
            Trainer(flow_map_config(**{"schedule.steps": 4}))

    def test_held_out_images_are_measured_by_the_same_loss(self, flow_map_config):
        config = flow_map_config(**{"schedule.steps": 2, "validation.fraction": 0.4, "validation.every": 1})
        train(config)
        assert (Path(config.output) / "validation.jsonl").read_text().count("validation_loss_ema") == 2

    def test_guidance_of_the_callers_own(self, flow_map_config):
        config = flow_map_config(**{"loss.guidance_scale": [1.0, 1.5, 2.0, 3.0]})
        assert Trainer(config).teacher.guidance_scales == [1.0, 1.5, 2.0, 3.0]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model.flow_map_layers": 0}, "needs model.flow_map_layers"),
            ({"loss.kind": "velocity"}, "flow_map_layers is 1, but loss.kind is velocity"),
            ({"model.flow_map_layers": 3}, "flow_map_layers is 3, but the decoder has 2 blocks"),
            ({"loss.label_dropout": 0.1}, "set it to 0"),
            ({"loss.diffusion_batch_mul": 1}, "needs 2 or more"),
            ({"loss.teacher_steps": 1}, r"must be in 2\.\.100"),
            ({"loss.error_scale": 0.0}, "loss.error_scale is 0.0; it must be above 0, or null"),
            ({"loss.error_scale": -1.0}, "must be above 0"),
            (
                {"loss.kind": "velocity", "loss.error_scale": 0.01},
                "loss.error_scale is 0.01, which loss.kind=flow_map",
            ),
            ({"loss.kind": "velocity", "loss.guidance_scale": [1.5]}, "flow_map alone reads: unset it"),
            ({"loss.error_scale": math.nan}, "loss.error_scale"),
            ({"loss.error_scale": math.inf}, "loss.error_scale"),
            ({"loss.guidance_scale": [1.0, 2.0]}, "loss.guidance_scale.*2 values"),
            ({"lora.rank": 2}, "unset lora.rank"),
            ({"model.patch_size": 1}, "makes the sequences of its teacher"),
            ({"model.classes": "new"}, "does not know 1, 2, 10"),
            ({"sampling.num_inference_steps": 0}, "sampling.num_inference_steps is 0"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, flow_map_config, changes, message):
        with pytest.raises(ConfigError, match=message):
            Trainer(flow_map_config(**changes))

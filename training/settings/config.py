"""Typed training configuration: YAML files with command-line overrides, checked before anything runs.

A configuration is a tree of dataclasses. `load_config(["--config", "run.yaml", "--optimizer.learning_rate=1e-3"])`
reads the file, applies the overrides and checks every key and value; a wrong one is a `ConfigError` that says what
would have been right. `--help` prints every key with its type, default and meaning.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transdiff_pipelines.files import pipeline_folder

from .schema import ConfigError as ConfigError
from .schema import build, option, read_yaml, require, section_help, set_key, split_arguments
from .schema import to_dict as to_dict
from .values import FolderPath


LATENT_PARTS = ("condition_encoder", "transformer")


@dataclass
class ModelConfig:
    """The two networks: sizes of their own, a published preset, or those of a pipeline to start from."""

    start_from: FolderPath | None = option(
        None,
        "pipeline folder, or that of the run which made it, whose weights are inherited (1-step -> MRAR, fine-tuning)",
        free_on_resume="place",
    )
    classes: Literal["by_name", "by_id", "new"] = option(
        "by_name",
        "which class embeddings of start_from are kept: of classes whose name, or a comma-separated synonym, is there "
        "too; of class i for class i; or none. The others start from the mean of the old ones",
    )
    preset: str | None = option(None, "published sizes: B, L or H; the sizes below must then stay unset")
    patch_size: int = option(1, "AR patch p: p*p images of one class in a sequence; 1 is the 1-step model, 2 MRAR")
    scales: list[int] | None = option(
        None,
        "scale-level AR in place of MRAR: growing sides, in tokens, of the groups that show the same image; their "
        "squares sum to at most the latent's positions. patch_size is then 1",
    )
    encoder_layers: int | None = option(None, "blocks of the AR condition encoder")
    decoder_layers: int | None = option(None, "blocks of the diffusion decoder")
    num_attention_heads: int | None = option(None, "heads in both networks")
    attention_head_dim: int | None = option(None, "width of a head; the width of both networks is heads x this")
    num_class_tokens: int | None = option(None, "copies of the class embedding in front of the sequence (paper: 64)")
    decoder_patch_size: int | None = option(
        None, "side of the square of latents that is one token of the decoder; null: 1, or that of model.start_from"
    )
    dropout: float = option(0.1, "on attention probabilities and projections, in training only")
    flow_map_layers: int = option(
        0,
        "blocks of the decoder, the last ones, that see where a flow map goes; 0: a velocity model. For "
        "loss.kind=flow_map",
    )
    frozen: list[str] = option([], f"networks that are not trained, of {', '.join(LATENT_PARTS)}")

    def __post_init__(self) -> None:
        require(self.patch_size >= 1, f"model.patch_size is {self.patch_size}; it must be 1 or more")
        require(0 <= self.dropout < 1, f"model.dropout is {self.dropout}; it must be in [0, 1)")
        layers = self.flow_map_layers
        require(layers >= 0, f"model.flow_map_layers is {layers}; it must be 0 (a velocity model) or more")
        for name in self.frozen:
            require(name in LATENT_PARTS, f"model.frozen names {name!r}; valid names: {', '.join(LATENT_PARTS)}")
        require(
            len(set(self.frozen)) < len(LATENT_PARTS), "model.frozen names both networks: nothing is left to train"
        )
        require(not (self.preset and self.start_from), "model.preset and model.start_from both give sizes: set one")
        given = [name for name, value in self.sizes().items() if value is not None]
        require(not (self.preset and given), f"model.preset gives the sizes; unset {', '.join(given)}")
        missing = [name for name, value in self.sizes().items() if value is None and name != "decoder_patch_size"]
        complete = self.preset or self.start_from or not missing
        require(bool(complete), f"model needs {', '.join(missing)} (or preset, or start_from)")

    @property
    def images_in_sequence(self) -> int:
        """N: 1 for the 1-step model."""
        return len(self.scales) if self.scales is not None else self.patch_size**2

    def sizes(self) -> dict[str, int | None]:
        names = ("encoder_layers", "decoder_layers", "num_attention_heads", "attention_head_dim", "num_class_tokens")
        return {name: getattr(self, name) for name in (*names, "decoder_patch_size")}


@dataclass
class LoraConfig:
    """Low-rank adapters in place of the weights: everything of `model.start_from` stays as it is."""

    rank: int | None = option(None, "rank of the adapters; null: the weights themselves are trained")
    alpha: float | None = option(None, "adapters are scaled by alpha / rank; null: alpha = rank")
    targets: list[str] = option(
        ["to_q", "to_k", "to_v", "to_out.0"],
        "ends of the names of the linear layers that get one; the MLPs are ff.net.0.proj and ff.net.2",
    )
    dropout: float = option(0.0, "on the adapters' input")

    def __post_init__(self) -> None:
        require(self.rank is None or self.rank >= 1, f"lora.rank is {self.rank}; it must be 1 or more, or null")
        require(self.alpha is None or self.alpha > 0, f"lora.alpha is {self.alpha}; it must be positive, or null")
        require(bool(self.targets), "lora.targets is empty; name at least one kind of layer, such as to_q")
        require(0 <= self.dropout < 1, f"lora.dropout is {self.dropout}; it must be in [0, 1)")


@dataclass
class DataConfig:
    """Images, the VAE that encodes them, and the cache of latents that training reads in their place."""

    images: FolderPath | None = option(
        None,
        "folder with one sub-folder per class; read by cache_latents, and by training if data.cache is null",
        free_on_resume=True,
    )
    dataset: FolderPath | None = option(
        None,
        "in place of data.images: a Hugging Face dataset (a Hub name, a folder that load_dataset reads, or one that "
        "save_to_disk wrote)",
        free_on_resume=True,
    )
    subset: str | None = option(
        None, "data.dataset: the configuration of a dataset that has several", free_on_resume=True
    )
    split: str = option("train", "data.dataset: the split", free_on_resume=True)
    streaming: bool = option(
        False, "data.dataset: read it from the network as it is encoded, without a download", free_on_resume=True
    )
    image_column: str = option("image", "data.dataset: the column of images", free_on_resume=True)
    label_column: str = option(
        "label", "data.dataset: the column of classes, as numbers or names", free_on_resume=True
    )
    classes: list[str] | None = option(
        None,
        "class names in the order of their ids; images of other classes are left out. null: the order of the "
        "dataset's ClassLabel feature, else the natural order of the names; where labels are plain numbers, the list "
        "names 0, 1, 2, ...",
        free_on_resume=True,
    )
    min_side: int = option(
        8, "images with a shorter side of fewer pixels are skipped; others are enlarged", free_on_resume=True
    )
    vae: FolderPath | None = option(
        None,
        "AutoencoderKL: a folder, or a Hub name with a sub-folder or none (org/name/vae); unset: that of "
        "model.start_from. The finished pipeline gets it too",
        free_on_resume="place",
    )
    cache: FolderPath | None = option(
        None,
        "folder of the latent cache: written by cache_latents, read by train. null: train reads the images, crops and "
        "mirrors them at random and encodes them as it goes, the paper's augmentation",
        free_on_resume="place",
    )
    image_size: int = option(256, "side in pixels after the crop: of a cache at the centre, else random")
    mirror: bool = option(True, "an image or its mirror is drawn each time, a cache holds both (off for digits)")
    dtype: Literal["float32", "float16"] = option("float32", "how moments are stored; float16 halves a large cache")
    shard_size: int = option(8192, "images in a cache shard")
    encode_batch_size: int = option(32, "images the VAE encodes at once", free_on_resume=True)
    batch_size: int = option(32, "groups (1-step: images) per process and accumulation step", free_on_resume=True)
    groups_per_epoch: int | None = option(
        None,
        "length of an epoch in groups; unset: each image is used once, images / N groups of N different images of a "
        "class, where a class's last group is filled up with its images already used in this epoch (a class with "
        "fewer than N images repeats them)",
    )
    workers: int = option(
        0, "processes that prepare batches ahead; 0: the training process itself", free_on_resume=True
    )

    def __post_init__(self) -> None:
        some = any(name is not None for name in (self.cache, self.images, self.dataset))
        require(some, "data.cache is missing: the folder of the latent cache. Or set data.images or data.dataset")
        both = self.images is not None and self.dataset is not None
        require(not both, "data.images and data.dataset are both set: set one to null")
        require(self.dataset is not None or not self.streaming, "data.streaming needs data.dataset")
        names = self.classes
        require(names is None or len(set(names)) == len(names) > 0, "data.classes must hold names, each only once")
        for name in ("image_size", "min_side", "shard_size", "encode_batch_size", "batch_size"):
            require(getattr(self, name) >= 1, f"data.{name} is {getattr(self, name)}; it must be 1 or more")
        require(self.workers >= 0, f"data.workers is {self.workers}; it must be 0 or more")
        groups = self.groups_per_epoch
        require(groups is None or groups >= 1, f"data.groups_per_epoch is {groups}; it must be 1 or more, or null")


@dataclass
class LossConfig:
    kind: Literal["velocity", "flow_map"] = option(
        "velocity",
        "velocity: the paper's loss; flow_map: average velocities along the paths of model.start_from, for images in "
        "few calls (see model.flow_map_layers)",
    )
    guidance_scale: list[float] | None = option(
        None,
        "flow_map: the guidance that is built in, for each image of the sequence; null: what the teacher recommends",
    )
    teacher_steps: int = option(12, "flow_map: steps of a path; where it is learned is on their grid, moved at random")
    error_scale: float | None = option(
        None,
        "flow_map: a pair with the squared error e weighs c / (e + c), with this as c, so that a few that are far off "
        "do not outweigh the others; null: all weigh the same",
        free_on_resume=True,
    )
    diffusion_batch_mul: int = option(4, "timesteps and noises per latent and encoder pass (paper: 4, MRAR 2)")
    label_dropout: float = option(0.1, "probability that a group's label becomes the null class (for guidance)")

    def __post_init__(self) -> None:
        mul = self.diffusion_batch_mul
        require(mul >= 1, f"loss.diffusion_batch_mul is {mul}; it must be 1 or more")
        require(0 <= self.label_dropout < 1, f"loss.label_dropout is {self.label_dropout}; it must be in [0, 1)")
        steps = self.teacher_steps
        require(2 <= steps <= 100, f"loss.teacher_steps is {steps}; it must be in 2..100")
        scale = self.error_scale
        require(scale is None or scale > 0, f"loss.error_scale is {scale}; it must be above 0, or null")
        for name in ("guidance_scale", "error_scale") if self.kind == "velocity" else ():
            value = getattr(self, name)
            require(value is None, f"loss.{name} is {value}, which loss.kind=flow_map alone reads: unset it")
        if self.kind == "flow_map":
            require(mul >= 2, f"loss.diffusion_batch_mul is {mul}; a flow map needs 2 or more: one is the velocity")
            require(
                self.label_dropout == 0,
                f"loss.label_dropout is {self.label_dropout}; a flow map has its guidance built in: set it to 0",
            )


@dataclass
class OptimizerConfig:
    """AdamW; weight decay touches neither 1-D tensors nor the diffusion decoder."""

    learning_rate: float = option(1e-4, "peak learning rate")
    scale_by_batch: bool = option(False, "multiply learning_rate by global batch / 256, as the 1-step recipe does")
    beta1: float = option(0.9, "AdamW")
    beta2: float = option(0.95, "AdamW")
    weight_decay: float = option(0.02, "AdamW, matrices and embeddings of the condition encoder only")
    max_grad_norm: float = option(3.0, "gradients are clipped to this norm")
    gradient_accumulation: int | None = option(
        None, "batches per step; null: 1, or what global_batch_size asks", free_on_resume=True
    )
    global_batch_size: int | None = option(
        None,
        "groups (1-step: images) per optimiser step over all processes; gradient accumulation follows from it, "
        "data.batch_size and the number of processes",
        free_on_resume=True,
    )
    kind: Literal["fused", "adamw", "8bit", "muon"] = option(
        "fused",
        "PyTorch's AdamW in one kernel, in several, or bitsandbytes' 8-bit AdamW (to be installed for it); muon: "
        "PyTorch's Muon for the matrices of the blocks, AdamW for all else, at the same learning rate",
    )
    max_bad_steps: int = option(
        5, "stop after this many steps in a row whose loss or gradient is not finite", free_on_resume=True
    )

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, f"optimizer.learning_rate is {self.learning_rate}; it must be positive")
        require(self.max_grad_norm > 0, f"optimizer.max_grad_norm is {self.max_grad_norm}; it must be positive")
        require(self.weight_decay >= 0, f"optimizer.weight_decay is {self.weight_decay}; it must be 0 or more")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name} is {getattr(self, name)}; it must be in [0, 1)")
        require(self.max_bad_steps >= 1, f"optimizer.max_bad_steps is {self.max_bad_steps}; it must be 1 or more")
        for name in ("gradient_accumulation", "global_batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"optimizer.{name} is {value}; it must be 1 or more, or null")
        both = self.gradient_accumulation is not None and self.global_batch_size is not None
        require(not both, "optimizer.gradient_accumulation and optimizer.global_batch_size are both set: set one")


@dataclass
class ScheduleConfig:
    """Length and learning-rate shape, in epochs or in optimiser steps; applied per optimiser step."""

    epochs: float | None = option(None, "length in epochs; or give steps", free_on_resume=True)
    steps: int | None = option(None, "length in optimiser steps; or give epochs", free_on_resume=True)
    warmup_epochs: float | None = option(None, "linear warm-up in epochs; or give warmup_steps", free_on_resume=True)
    warmup_steps: int | None = option(
        None, "linear warm-up in optimiser steps; or give warmup_epochs", free_on_resume=True
    )
    decay: Literal["constant", "cosine"] = option(
        "constant", "after the warm-up: constant (paper), or cosine to zero", free_on_resume=True
    )

    def __post_init__(self) -> None:
        require((self.epochs is None) != (self.steps is None), "schedule needs one of epochs and steps")
        both = self.warmup_epochs is not None and self.warmup_steps is not None
        require(not both, "schedule.warmup_epochs and schedule.warmup_steps are both set: set one")
        length = self.epochs if self.steps is None else self.steps
        require(length is not None and length > 0, f"schedule length is {length}; it must be positive")
        require((self.warmup_epochs or self.warmup_steps or 0) >= 0, "schedule warm-up must be 0 or more")


@dataclass
class EmaConfig:
    decay: float = option(0.9999, "final decay")
    warmup: bool = option(
        True, "let the decay rise as (1 + step) / (10 + step) up to the final one; else short runs keep their start"
    )

    def __post_init__(self) -> None:
        require(0 <= self.decay < 1, f"ema.decay is {self.decay}; it must be in [0, 1)")


@dataclass
class CheckpointConfig:
    every: int = option(
        5000, "optimiser steps between checkpoints; there is always one at the end", free_on_resume=True
    )
    keep: int = option(2, "how many of the latest checkpoints are kept", free_on_resume=True)

    def __post_init__(self) -> None:
        require(self.every >= 1, f"checkpoints.every is {self.every}; it must be 1 or more")
        require(self.keep >= 1, f"checkpoints.keep is {self.keep}; it must be 1 or more")


@dataclass
class PreviewConfig:
    every: int | None = option(
        5000, "optimiser steps between preview grids of EMA and raw weights; null: none", free_on_resume=True
    )
    labels: list[int] | None = option(
        None, "class indices, one column each; null: the first ten classes", free_on_resume=True
    )
    rows: int = option(4, "images per class", free_on_resume=True)
    num_inference_steps: int = option(50, "sampler steps of a preview", free_on_resume=True)

    def __post_init__(self) -> None:
        require(self.every is None or self.every >= 1, f"preview.every is {self.every}; it must be 1 or more, or null")
        require(self.labels is None or bool(self.labels), "preview.labels is empty; name classes, or set it to null")
        for name in ("rows", "num_inference_steps"):
            require(getattr(self, name) >= 1, f"preview.{name} is {getattr(self, name)}; it must be 1 or more")


@dataclass
class ValidationConfig:
    """The loss on held-out images, of the raw and of the averaged weights; off unless fraction or cache is set."""

    fraction: float = option(0.0, "share of each class's images that is held out of training; the same for a seed")
    cache: FolderPath | None = option(
        None,
        "or a latent cache of other images: of the same VAE and size, with the same classes in the same order",
        free_on_resume=True,
    )
    every: int = option(
        1000, "optimiser steps between validations; there is always one at the end", free_on_resume=True
    )
    images: int = option(1024, "held-out images used, at most", free_on_resume=True)

    def __post_init__(self) -> None:
        require(0 <= self.fraction < 1, f"validation.fraction is {self.fraction}; it must be in [0, 1)")
        both = self.fraction > 0 and self.cache is not None
        require(not both, "validation.fraction and validation.cache are both set: set one")
        for name in ("every", "images"):
            require(getattr(self, name) >= 1, f"validation.{name} is {getattr(self, name)}; it must be 1 or more")


@dataclass
class SamplingConfig:
    """What the finished pipeline recommends; the previews use it too. null: as model.start_from, or 1.3, 1 and 1."""

    guidance_scale: float | None = option(None, "recommended classifier-free guidance", free_on_resume=True)
    drift_scale: float | None = option(None, "scheduler: scale of the SDE's drift", free_on_resume=True)
    diffusion_scale: float | None = option(None, "scheduler: scale of the SDE's noise", free_on_resume=True)
    num_inference_steps: int | None = option(
        None, "recommended steps; null: as model.start_from, of a flow map 4", free_on_resume=True
    )

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 1 if name == "num_inference_steps" else 0
            require(
                value is None or value >= least, f"sampling.{name} is {value}; it must be {least} or more, or null"
            )


@dataclass
class TrainConfig:
    """A training run. Everything a run depends on stands here; nothing is implied by the code."""

    output: FolderPath = option(
        "", "folder of the run: checkpoints, previews, metrics, and pipeline/ at the end", free_on_resume=True
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: int = option(0, "every random draw follows from it")
    mixed_precision: Literal["no", "bf16", "fp16"] = option("no", "autocast dtype; weights stay float32")
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, more time", free_on_resume=True
    )
    sharding: Literal["no", "fsdp2", "zero2"] = option(
        "no",
        "with several processes, split over them weights, gradients, optimiser and EMA (fsdp2, PyTorch's FSDP2) or "
        "gradients and optimiser (zero2, DeepSpeed's ZeRO stage 2)",
        free_on_resume=True,
    )
    compile: Literal["no", "inductor", "aot_eager"] = option(
        "no",
        "torch.compile the transformer blocks with this backend; aot_eager only to debug",
        free_on_resume=True,
    )
    log_every: int = option(20, "optimiser steps between lines in metrics.jsonl", free_on_resume=True)
    trackers: list[str] = option(
        ["tensorboard"],
        "where to report besides: tensorboard, wandb, trackio or another tracker of accelerate",
        free_on_resume=True,
    )
    project: str = option(
        "transdiff", "name of the project in the trackers; the run has the output folder's name", free_on_resume=True
    )
    push_to_hub: str | None = option(
        None,
        "Hub repository, as org/name, that gets the finished pipeline; made private if it does not exist",
        free_on_resume=True,
    )
    resume: FolderPath = option(
        "auto",
        "auto: continue from the output folder's latest checkpoint if there is one; latest: the same, but its absence "
        "is an error; never: refuse a folder that has checkpoints; or the path of a checkpoint",
        free_on_resume=True,
    )

    def __post_init__(self) -> None:
        require(bool(self.output), "output is missing: the folder of the run")
        start = self.model.start_from
        if start is not None and pipeline_folder(start) != Path(start):
            self.model.start_from = start = f"{start}/pipeline"
        if not self.data.vae and start is not None:
            self.data.vae = f"{start}/vae"
        require(bool(self.data.vae), "data.vae is missing: the folder or Hub name of an AutoencoderKL")
        require(self.lora.rank is None or start is not None, "lora.rank needs model.start_from: a pipeline to adapt")
        self._check_flow_map()
        unsplit = {
            "lora.rank": self.lora.rank is not None,
            "mixed_precision=fp16": self.mixed_precision == "fp16",
            "optimizer.kind=8bit": self.optimizer.kind == "8bit",
            "optimizer.kind=muon": self.optimizer.kind == "muon",
            "compile": self.compile != "no",
        }
        wrong = [name for name, is_set in unsplit.items() if is_set and self.sharding != "no"]
        require(not wrong, f"sharding={self.sharding} does not work with {', '.join(wrong)}; unset one of the two")
        require(self.log_every >= 1, f"log_every is {self.log_every}; it must be 1 or more")
        require(0 <= self.seed < 2**63, f"seed is {self.seed}; it must be in 0 .. 2**63 - 1")

    def _check_flow_map(self) -> None:
        layers = self.model.flow_map_layers
        if self.loss.kind == "velocity":
            require(layers == 0, f"model.flow_map_layers is {layers}, but loss.kind is velocity: set it to flow_map")
            return
        require(
            layers > 0, "loss.kind=flow_map needs model.flow_map_layers: a third to a half of the decoder's blocks"
        )
        require(self.model.start_from is not None, "loss.kind=flow_map needs model.start_from: the teacher")
        require(self.lora.rank is None, "loss.kind=flow_map trains the weights themselves: unset lora.rank")


# --- reading ---------------------------------------------------------------------------------------------------------


def load_config(arguments: Sequence[str], program: str = "training.train") -> TrainConfig:
    """Read `--config FILE` and `--key=value` overrides; `--help` prints every key and exits.

    Raises:
        ConfigError: for an unknown key, a value of the wrong type or range, or a missing file.
    """
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(help_text(program))
        raise SystemExit(0 if arguments else 2)
    files, overrides = split_arguments(arguments)
    require(len(files) == 1, f"give exactly one --config FILE, not {len(files)}; --help shows the keys")
    tree = read_yaml(Path(files[0]).expanduser())
    for key, text in overrides.items():
        set_key(tree, key, text)
    return build(TrainConfig, tree)


def config_or_exit(program: str, arguments: Sequence[str] | None = None) -> TrainConfig:
    """`load_config` of the command line for a main function: a `ConfigError` becomes one line and exit status 2."""
    try:
        return load_config(sys.argv[1:] if arguments is None else arguments, program)
    except ConfigError as error:
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def accumulation_steps(config: TrainConfig, num_processes: int) -> int:
    """Batches per optimiser step and process.

    Raises:
        ConfigError: if `optimizer.global_batch_size` cannot be made of whole batches of every process.
    """
    wanted, batch_size = config.optimizer.global_batch_size, config.data.batch_size
    if wanted is None:
        return config.optimizer.gradient_accumulation or 1
    share, rest = divmod(wanted, num_processes)
    fitting = [size for size in range(1, share + 1) if share % size == 0]
    near = min(fitting, key=lambda size: abs(size - batch_size), default=None)
    remedy = f"set data.batch_size={near}" if not rest and near else "use a number of processes that divides it"
    require(
        not rest and share % batch_size == 0,
        f"optimizer.global_batch_size {wanted} is not a multiple of {num_processes} process(es) x data.batch_size "
        f"{batch_size}; {remedy}",
    )
    return share // batch_size


def help_text(program: str) -> str:
    """Usage and every key, with type, default and meaning."""
    lines = [
        f"usage: accelerate launch -m {program} --config FILE [--key=value ...]",
        "",
        "training.train --dry-run says what would be trained, its cost and memory, and stops.",
        "",
        "Keys of the YAML file; on the command line a key in a section is written with a dot:",
        f"  python -m {program} --config training/configs/digits_1step.yaml --optimizer.learning_rate=1e-3",
    ]
    return "\n".join(lines + section_help(TrainConfig, ""))

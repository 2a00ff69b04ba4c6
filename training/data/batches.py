"""Training batches from latents or images: MRAR groups on the fly, and every random draw keyed.

Training reads one endless stream of groups, epoch after epoch. Position q of the stream is slot `q % groups` of epoch
`q // groups`; batch k of a run with global batch size G holds positions kG .. (k + 1)G - 1, split over the processes
in order. So the position in the data *is* the step, a batch may run over the end of an epoch, and nothing is left out.

Every draw of a group (crop, mirror, posterior sample, timesteps, noise, label drop) comes from a generator keyed on
(seed, epoch, slot). One process and two therefore see the same numbers, and so does a run that was resumed.

Shapes: B groups, N images per group (different ones of a class, or N times the same), m the diffusion batch
multiplier, C channels, s latent side.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.settings.config import TrainConfig
from transdiff_pipelines.latents import NUM_TRAIN_TIMESTEPS


Batch = dict[str, Tensor]

SAMPLER_INTERVALS = 0.8
"""The share of a flow map's intervals, of those with a length, that are the sampler's."""


class TrainingData(Protocol):
    """Labelled images to draw batches from: a `LatentCache`, or `ImageData`.

    Attributes:
        labels: `(images,)` int64 class index of each image.
        classes: class names in index order.
        latent_shape: `(C, s, s)`.
        vae_fingerprint: digest of the VAE that encodes the images.
        digest: of the images, which tells them from others.
        draws_per_image: how many uniform numbers `draw` takes.
    """

    labels: np.ndarray
    classes: list[str]
    latent_shape: tuple[int, int, int]
    vae_fingerprint: str
    digest: str
    draws_per_image: int

    def __len__(self) -> int: ...

    @property
    def num_classes(self) -> int: ...

    def select(self, rows: np.ndarray) -> TrainingData:
        """Only these of the images, in this order, and all classes."""
        ...

    def draw(self, image: int, uniform: Sequence[float]) -> dict[str, Tensor]:
        """An image as tensors, all that is random about it following from numbers in [0, 1)."""
        ...

    def collect(self, drawn: dict[str, Tensor], normal: Tensor) -> Batch:
        """The part of a batch that comes from stacked draws, `normal` `(B, n, C, s, s)` sampling the posterior."""
        ...


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on the whole key and on nothing else."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def truncate_timesteps(time: Tensor) -> Tensor:
    """Times in [0, 1] to integer timesteps in [0, 1000): `floor(1000 t)`."""
    return (time * NUM_TRAIN_TIMESTEPS).long().clamp(0, NUM_TRAIN_TIMESTEPS - 1)


def logit_normal_timesteps(normal: Tensor) -> Tensor:
    """Standard normal numbers to logit-normal integer timesteps: `floor(1000 sigmoid(z))`."""
    return truncate_timesteps(normal.double().sigmoid())


def flow_map_intervals(normal: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Standard normal numbers `(..., m, 3)` to where flow maps begin and end, `(..., m)` places on a grid of `steps`.

    Four of five are intervals of the sampler with one to four calls, as far as the grid has their points, and half of
    these go all the way. The others lie anywhere: for editing, which begins later, and for other numbers of calls. The
    first of the m has no length: there the average velocity is the velocity.
    """
    kind, one, other = torch.special.ndtr(normal.double()).unbind(-1)
    place = (one * (steps + 1)).long().clamp(max=steps)
    another = (place + 1 + (other * steps).long().clamp(max=steps - 1)) % (steps + 1)
    begin, end = torch.minimum(place, another), torch.maximum(place, another)
    several = [calls for calls in (2, 3, 4) if steps % calls == 0] or [1]
    for number, calls in enumerate([1] * len(several) + several):
        of_this_kind = (kind * 2 * len(several) / SAMPLER_INTERVALS).floor() == number
        call = (one * calls).long().clamp(max=calls - 1)
        begin = torch.where(of_this_kind, call * (steps // calls), begin)
        end = torch.where(of_this_kind, (call + 1) * (steps // calls), end)
    begin[..., 0] = end[..., 0] = (one[..., 0] * steps).long().clamp(max=steps - 1)
    return begin, end


def flow_map_grid(steps: int, generator: torch.Generator) -> Tensor:
    """A grid of σ `(steps,)` for the teacher's solver, without its 0: even or, every second time, moved as a whole.

    Points stay apart, because a short interval divides the solver's error. They are whole thousandths, because solvers
    round their timesteps.
    """
    coin, shift = torch.rand(2, generator=generator).tolist()
    grid = 1 - torch.arange(steps) / steps
    if coin < 0.5:
        grid[1:] += (shift - 0.5) / steps
    return (grid * NUM_TRAIN_TIMESTEPS).round() / NUM_TRAIN_TIMESTEPS


def drop_labels(labels: Tensor, dropped: Tensor, num_classes: int) -> Tensor:
    """Labels `(B,)` with those marked in the boolean `dropped` `(B,)` replaced by the null class `num_classes`."""
    return labels.masked_fill(dropped, num_classes)


def draw_groups(
    labels: np.ndarray, group_size: int, seed: int, epoch: int, num_groups: int | None = None
) -> np.ndarray:
    """Groups of `group_size` different images of one class, shuffled: an epoch's `(groups, group_size)` indices.

    Each image is used once, except that a class's last group, where images are left over, is filled up with images of
    the class already used in this epoch, and that a class with fewer than `group_size` images repeats them within its
    one group. `num_groups` cuts or lengthens the epoch: a longer one goes through the images again in a new order.
    """
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    rounds: list[np.ndarray] = []
    while not rounds or sum(map(len, rounds)) < (num_groups or 0):
        random = np.random.default_rng([seed, epoch, len(rounds)])
        # np.resize repeats its input from the start: exactly the rule for leftovers and for small classes
        padded = [
            np.resize(random.permutation(images), -(-len(images) // group_size) * group_size) for images in members
        ]
        groups = np.concatenate(padded).reshape(-1, group_size)
        rounds.append(groups[random.permutation(len(groups))])
    return np.concatenate(rounds)[:num_groups]


def count_groups(labels: np.ndarray, group_size: int) -> int:
    """Groups in an epoch that uses each image once."""
    counts = np.unique(labels, return_counts=True)[1]
    return int((-(-counts // group_size)).sum())


class GroupBatches(Dataset[Batch]):
    """Item k is this process's part of batch k of the stream, ready for `model.loss.prefix_losses`:

    `latents (B, N, C, s, s)` scaled, `labels (B,)` with drops applied, `timesteps (N, B * m)` and
    `noise (N, B * m, C, s, s)`. From images it has their pixels in place of latents, for `vae.PixelEncoder`.

    Args:
        data: the latents or images.
        group_size: N; 1 for 1-step models.
        same_image: whether the N images of a group are one and the same, as for scale-level models.
        batch_size: B, groups per process and batch.
        diffusion_batch_mul: m.
        label_dropout: probability that a group's label becomes the null class.
        seed: keys every draw.
        groups_per_epoch: length of an epoch; None: each image once (see `draw_groups`).
        rank, world_size: this process and the number of processes.
        teacher_steps: K, of the paths that a flow map learns from; None is the velocity loss.
    """

    def __init__(
        self,
        data: TrainingData,
        group_size: int,
        batch_size: int,
        diffusion_batch_mul: int,
        label_dropout: float,
        seed: int,
        groups_per_epoch: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        same_image: bool = False,
        teacher_steps: int | None = None,
    ) -> None:
        self.data = data
        self.group_size = group_size
        self.num_distinct = 1 if same_image else group_size
        self.batch_size = batch_size
        self.diffusion_batch_mul = diffusion_batch_mul
        self.label_dropout = label_dropout
        self.seed = seed
        self.groups_per_epoch = groups_per_epoch or count_groups(data.labels, self.num_distinct)
        self.rank = rank
        self.global_batch_size = batch_size * world_size
        self.teacher_steps = teacher_steps
        self._groups: dict[int, np.ndarray] = {}

    @classmethod
    def of(cls, config: TrainConfig, data: TrainingData, **changes: Any) -> GroupBatches:
        """The batches that a configuration describes, with some arguments changed."""
        settings = {
            "group_size": config.model.images_in_sequence,
            "same_image": config.model.scales is not None,
            "batch_size": config.data.batch_size,
            "diffusion_batch_mul": config.loss.diffusion_batch_mul,
            "label_dropout": config.loss.label_dropout,
            "seed": config.seed,
            "groups_per_epoch": config.data.groups_per_epoch,
            "teacher_steps": config.loss.teacher_steps if config.loss.kind == "flow_map" else None,
        }
        return cls(data, **(settings | changes))

    def epoch_groups(self, epoch: int) -> np.ndarray:
        """The groups of an epoch; those of the epoch before stay, for a batch that lies across the border."""
        if epoch not in self._groups:
            groups = draw_groups(self.data.labels, self.num_distinct, self.seed, epoch, self.groups_per_epoch)
            self._groups = {key: value for key, value in self._groups.items() if key == epoch - 1} | {epoch: groups}
        return self._groups[epoch]

    def __getitem__(self, index: int) -> Batch:
        first = index * self.global_batch_size + self.rank * self.batch_size
        draws = [self.draw(*divmod(first + offset, self.groups_per_epoch)) for offset in range(self.batch_size)]
        stacked = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
        # (B, N, m, ...) -> (N, m, B, ...) -> (N, m * B, ...): the batch tiled m times
        noise = stacked["noise"].permute(1, 2, 0, 3, 4, 5).flatten(1, 2)
        labels = drop_labels(stacked["label"], stacked["drop"] < self.label_dropout, self.data.num_classes)
        images = self.data.collect(stacked, stacked["posterior"])
        if "latents" in images:  # the same image N times, if there is only one
            images["latents"] = images["latents"].expand(-1, self.group_size, -1, -1, -1)
        return images | {"labels": labels, "noise": noise} | self.times(stacked["time"], index)

    def times(self, normal: Tensor, index: int) -> Batch:
        """The part of batch `index` that is about time: `timesteps (N, B * m)`, or that of `FlowMapTeacher`'s batch.

        `normal` are `(B, N, m, 1)` standard normal numbers, of a flow map three in place of one.
        """

        def tiled(times: Tensor) -> Tensor:
            return times.permute(1, 2, 0).flatten(1)

        if self.teacher_steps is None:
            return {"timesteps": tiled(logit_normal_timesteps(normal.squeeze(-1)))}
        begin, end = map(tiled, flow_map_intervals(normal, self.teacher_steps))
        # One grid for the whole batch: its key is the batch's place in the stream, the same for all processes.
        sigmas = flow_map_grid(self.teacher_steps, keyed_generator(self.seed, index, -2))
        return {"begin": begin, "end": end, "sigmas": sigmas}

    def draw(self, epoch: int, slot: int) -> dict[str, Tensor]:
        """Everything random about one group: a function of (seed, epoch, slot) alone."""
        images = self.epoch_groups(epoch)[slot]
        generator = keyed_generator(self.seed, epoch, slot)
        shape, mul, count = self.data.latent_shape, self.diffusion_batch_mul, self.group_size
        uniform = torch.rand(self.num_distinct * self.data.draws_per_image + 1, generator=generator)
        # one draw for all normal numbers of the group: many small ones would cost more than the numbers
        latent_size = int(np.prod(shape))
        numbers_per_time = 1 if self.teacher_steps is None else 3
        sizes = [count * mul * numbers_per_time, self.num_distinct * latent_size, count * mul * latent_size]
        time, posterior, noise = torch.randn(sum(sizes), generator=generator).split(sizes)
        numbers = uniform[1:].view(self.num_distinct, -1).tolist()
        drawn = [self.data.draw(image, own) for image, own in zip(images.tolist(), numbers, strict=True)]
        # an image that took another one's place brings its own label
        first = int(drawn[0].get("used", images[0]))
        return {
            "label": torch.tensor(int(self.data.labels[first])),
            "drop": uniform[0],
            "time": time.view(count, mul, numbers_per_time),
            "posterior": posterior.view(self.num_distinct, *shape),
            "noise": noise.view(count, mul, *shape),
        } | {name: torch.stack([image[name] for image in drawn]) for name in drawn[0]}


def batch_loader(batches: GroupBatches, first: int, last: int, workers: int = 0) -> Iterator[Batch]:
    """Batches `first .. last - 1` in order, prepared ahead by `workers` processes; their number changes no value."""
    with warnings.catch_warnings():  # `more_workers_than_cores` says it, with what to do
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        loader = DataLoader(
            batches,
            batch_size=None,
            sampler=range(first, last),
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),  # so that copies to the device do not wait
            worker_init_fn=follow_the_run,
        )
        return iter(loader)


def more_workers_than_cores(workers: int) -> str | None:
    """A sentence about `data.workers` without its full stop, if there are more of them than cores to run them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this run, on this machine
    if workers * processes <= cores:
        return None
    each = f" for each of {processes} processes" if processes > 1 else ""
    return (
        f"data.workers is {workers}{each}, and this machine has {cores} processor core(s), which more workers than "
        f"that only slow down: --data.workers={cores // processes}"
    )


def follow_the_run(worker: int) -> None:
    """Leave Ctrl-C to the run, which still wants its batch before it saves and stops; and end when the run has ended.

    torch's own workers look whether their parent lives. Where a server starts the processes ("forkserver", the way of
    Python 3.14 on Linux) that is the server, which lives as long as its workers: after a kill neither would end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)

"""Encode images into a latent cache: `accelerate launch -m training.cache_latents --config FILE`.

Images come from a folder or a Hugging Face dataset (see `data.sources`). They are cut into parts of `data.shard_size`
images; each part becomes a shard that depends on its images alone, not on the number of processes. A killed run
continues with the parts that are missing, and images that cannot be used are skipped, counted and named.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from training.command_line import one_line_errors
from training.data.decoding import BadImage, in_memory, read_image
from training.data.errors import CacheError, DataError
from training.data.examples import Example, Source, content_digest
from training.data.folders import check_outside
from training.data.labels import without_images
from training.data.latent_cache import FORMAT, LatentCache, check_settings, read_stamp, reading, write_json
from training.data.sources import open_source
from training.data.vae import check_vae, latent_shape, load_vae, module_fingerprint
from training.distributed.processes import process_state, processes
from training.settings.config import DataConfig, config_or_exit, require
from transdiff_pipelines.files import check_folder_writable, new_file


BATCHES_AHEAD = 2  # how many batches are decoded ahead while the VAE encodes
COMPARED_AT_ONCE = 64  # images read in threads
COMPARED_STREAMS = 32  # of those whose first images alone are compared, at most

Decoded = tuple[Tensor | str, int]  # pixels, or why there are none; the image's `content_digest`


class ShardWriter:
    """Encodes this process's share of a source into shards.

    If there are at least as many streams as processes, each process reads streams of its own. Otherwise every process
    goes over every stream, which is cheap as long as images are not loaded, and encodes some of its parts.

    Attributes:
        encoded, seconds: images encoded so far, and the time it took.
    """

    def __init__(
        self, source: Source, vae: AutoencoderKL, data: DataConfig, device: torch.device, rank: int, world_size: int
    ) -> None:
        self.source, self.vae, self.data, self.device = source, vae.to(device).eval(), data, device
        self.rank, self.world_size = rank, world_size
        self.folder = Path(str(data.cache))
        self.encoded, self.seconds = 0, 0.0
        self.threads = min(8, max(1, (os.cpu_count() or 1) // world_size))

    def path(self, stream: int, part: int) -> Path:
        return self.folder / f"moments-{stream:05d}-{part:05d}.safetensors"

    def marker(self, stream: int) -> Path:
        """The file that tells how many parts a stream has; it is written when the end of the stream was reached."""
        return self.folder / f"stream-{stream:05d}.json"

    def parts(self, stream: int) -> list[Path] | None:
        """The shards of a stream, written or not; None if its end was never reached."""
        if not self.marker(stream).exists():
            return None
        count = json.loads(self.marker(stream).read_text(encoding="utf-8"))["parts"]
        return [self.path(stream, part) for part in range(count)]

    def is_mine(self, stream: int, part: int) -> bool:
        by_stream = self.source.num_streams >= self.world_size
        return (stream if by_stream else part) % self.world_size == self.rank

    def todo(self) -> int | None:
        """How many images this process has to encode, if that can be known."""
        length, size = self.source.length, self.data.shard_size
        if length is None:
            return None
        missing = [
            part for part in range(-(-length // size)) if self.is_mine(0, part) and not self.path(0, part).exists()
        ]
        return sum(min(size, length - part * size) for part in missing)

    def streams(self) -> Iterator[int]:
        """The streams that this process reads."""
        by_stream = self.source.num_streams >= self.world_size
        return (s for s in range(self.source.num_streams) if not by_stream or s % self.world_size == self.rank)

    def write_all(self, progress: tqdm) -> None:
        """Encode what is missing of this process's share."""
        start = time.perf_counter()
        for stream in self.streams():
            parts = self.parts(stream)
            if parts is None or not all(path.exists() for path in parts):
                self.write_stream(stream, progress)
        self.seconds = time.perf_counter() - start

    def write_stream(self, stream: int, progress: tqdm) -> None:
        part = -1
        for part, examples in enumerate(in_parts(self.source.examples(stream), self.data.shard_size)):
            if self.is_mine(stream, part) and not self.path(stream, part).exists():
                self.write(self.path(stream, part), examples, progress)
        if self.rank == 0 or self.source.num_streams >= self.world_size:
            write_json(self.marker(stream), {"parts": part + 1})

    def changed(self, progress: tqdm) -> list[str]:
        """Names of images that are not those of which this process's shards were made, of all that are compared."""
        every = 1 if self.source.compared is None else -(-self.source.num_streams // COMPARED_STREAMS)
        return [name for s in self.streams() if s % every == 0 for name in self.changed_in(s, progress)]

    def changed_in(self, stream: int, progress: tqdm) -> Iterator[str]:
        limit = self.source.compared
        read, last = itertools.islice(self.source.examples(stream), limit), -1
        with ThreadPoolExecutor(self.threads) as pool:
            for part, examples in enumerate(in_parts(read, self.data.shard_size)):
                last = part
                path = self.path(stream, part)
                if not self.is_mine(stream, part) or not path.exists():
                    continue
                contents = iter(stored_contents(path))
                while batch := list(itertools.islice(examples, COMPARED_AT_ONCE)):
                    found = zip(batch, pool.map(Example.digest, batch), strict=True)
                    yield from (example.name for example, digest in found if digest != next(contents, None))
                    progress.update(len(batch))
                if limit is None and next(contents, None) is not None:
                    yield f"an image that {path.name} holds is gone"
        parts = self.parts(stream)
        if limit is None and parts is not None and len(parts) != last + 1:
            yield f"stream {stream} makes {last + 1} shards, and made {len(parts)}"

    def write(self, path: Path, examples: Iterable[Example], progress: tqdm) -> None:
        """Encode one shard and put it in place atomically."""
        moments, labels, skipped, contents = [self.no_moments()], [], [], []
        for batch in self.decoded(examples):
            pixels = []
            for example, (outcome, content) in batch:
                contents.append(content)
                if isinstance(outcome, str):
                    skipped.append((example.name, outcome))
                else:
                    pixels.append(outcome)
                    labels.append(example.label)
            if pixels:
                moments.append(self.encode(torch.stack(pixels)))
            progress.update(len(batch))
        mean, std = torch.cat(moments).chunk(2, dim=2)
        tensors = {"mean": mean.contiguous(), "std": std.contiguous()}
        tensors |= {"labels": torch.tensor(labels).long(), "contents": torch.tensor(contents, dtype=torch.int64)}
        summary = {"skipped": skipped} | sums(mean, std)
        with new_file(path) as temporary:
            save_file(tensors, temporary, metadata={"summary": json.dumps(summary)})
        self.encoded += len(labels)
        if skipped:
            name, reason = skipped[0]
            tqdm.write(f"{path.name}: {len(skipped)} image(s) skipped, the first is {name}: {reason}")

    def decoded(self, examples: Iterable[Example]) -> Iterator[list[tuple[Example, Decoded]]]:
        """Batches of examples with what `pixels` makes of them, ahead in threads."""
        pending: deque[list[tuple[Example, Future[Decoded]]]] = deque()
        examples = iter(examples)
        with ThreadPoolExecutor(self.threads) as pool:
            while batch := list(itertools.islice(examples, self.data.encode_batch_size)):
                pending.append([(example, pool.submit(self.pixels, example)) for example in batch])
                if len(pending) > BATCHES_AHEAD:
                    yield [(example, future.result()) for example, future in pending.popleft()]
            while pending:
                yield [(example, future.result()) for example, future in pending.popleft()]

    def pixels(self, example: Example) -> Decoded:
        """An example's pixels, or why it cannot be used, and its `content_digest`."""
        image = None
        try:
            if example.problem:
                raise BadImage(example.problem)
            image = in_memory(example.load())
            channels = self.vae.config.in_channels
            outcome = read_image(image, self.data.image_size, channels, self.data.min_side)
        except BadImage as error:
            return str(error), content_digest(example.label, image)
        return outcome, content_digest(example.label, image)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Images `(n, c, H, W)` to moments `(n, V, 2 C, s, s)`: mean and std of the image, perhaps of its mirror."""
        views = [pixels, pixels.flip(-1)] if self.data.mirror else [pixels]
        posteriors = [self.vae.encode(view.to(self.device)).latent_dist for view in views]
        moments = torch.stack([torch.cat([posterior.mean, posterior.std], dim=1) for posterior in posteriors], dim=1)
        return moments.to("cpu", getattr(torch, self.data.dtype))

    def no_moments(self) -> Tensor:
        """Moments of no images, `(0, V, 2 C, s, s)`: a shard whose images are all bad is empty."""
        channels, *sides = latent_shape(self.vae, self.data.image_size)
        shape = (0, 2 if self.data.mirror else 1, 2 * channels, *sides)
        return torch.zeros(shape, dtype=getattr(torch, self.data.dtype))


def in_parts(examples: Iterator[Example], size: int) -> Iterator[Iterator[Example]]:
    """The examples in parts of `size`; what is not read of a part is passed over."""
    while (first := next(examples, None)) is not None:
        part = itertools.chain([first], itertools.islice(examples, size - 1))
        yield part
        deque(part, maxlen=0)


def stored_contents(shard: Path) -> list[int]:
    """The digests of the images of which a shard was made, skipped ones included."""
    with reading(shard), safe_open(shard, framework="pt") as file:
        return file.get_tensor("contents").tolist()


def sums(mean: Tensor, std: Tensor) -> dict[str, float]:
    """The sums from which mean and standard deviation of posterior samples are computed."""
    mean, std = mean.double(), std.double()
    return {
        "numbers": mean.numel(),
        "sum": mean.sum().item(),
        "sum_of_squares": (mean.square() + std.square()).sum().item(),
    }


def cache_settings(source: Source, vae: AutoencoderKL, data: DataConfig) -> dict[str, Any]:
    """Everything the cached moments depend on."""
    return {
        "format": FORMAT,
        "vae_fingerprint": module_fingerprint(vae, dict(vae.config)),
        "scaling_factor": vae.config.scaling_factor,
        "shift_factor": vae.config.shift_factor,
        "image_size": data.image_size,
        "min_side": data.min_side,
        "crop": "adm_center",
        "mirror": data.mirror,
        "dtype": data.dtype,
        "shard_size": data.shard_size,
        "num_images": source.length,
        "images": source.digest,
        "classes": source.classes,
    }


def cache_latents(data: DataConfig, dataset: datasets.Dataset | datasets.IterableDataset | None = None) -> LatentCache:
    """Encode the images of `data` with `data.vae` into `data.cache`, doing only what is missing.

    Args:
        data: the data section of a configuration.
        dataset: a dataset to read in place of `data.images` and `data.dataset`, with the columns that `data` names.

    Raises:
        CacheError: if the folder holds a cache made with other settings or of other images.
        DataError: if no image is readable.
        ConfigError: if columns, classes or sizes do not fit.
    """
    require(data.cache is not None, "data.cache is missing: the folder to write the latents to")
    check_cache_place(Path(str(data.cache)))
    if data.images is not None and dataset is None:
        check_outside(Path(str(data.cache)), Path(data.images), "data.cache")
    state = process_state()
    with state.main_process_first():  # the other processes then find the dataset prepared
        source = open_source(data, dataset)
    vae = load_vae(data.vae)
    check_vae(vae, data.image_size)
    writer = ShardWriter(source, vae, data, state.device, state.process_index, state.num_processes)
    settings = cache_settings(source, vae, data)
    stamp = source.stamp()
    with state.main_process_first():
        prepare_folder(writer.folder, settings, stamp)
    hide = not state.is_local_main_process
    check_unchanged(writer, stamp, hide)
    state.wait_for_everyone()
    with tqdm(total=writer.todo(), desc="encoding", unit="image", disable=hide, mininterval=1) as progress:
        writer.write_all(progress)
    state.wait_for_everyone()
    speeds = gather_object([(writer.encoded, writer.seconds)])
    if state.is_main_process:
        write_index(writer, settings)
        print(*source.notes, speed(speeds), sep="\n")
    state.wait_for_everyone()
    return LatentCache(writer.folder)


def check_cache_place(folder: Path) -> None:
    """Raise CacheError where `folder` is a file, or nothing can be written there."""
    try:
        check_folder_writable(folder)
    except OSError as error:
        raise CacheError(f"data.cache: {error}") from error


def speed(measured: list[tuple[int, float]]) -> str:
    """A line on the images that each process encoded and the seconds it took."""
    images, seconds = sum(count for count, _ in measured), max(seconds for _, seconds in measured)
    if not images:
        return "nothing was left to encode"
    idle = sum(not count for count, _ in measured)
    line = f"encoded {images} images in {seconds:.1f} s: {images / seconds:.1f} images per second"
    remedy = "; a smaller data.shard_size makes more shards to share"
    return f"{line}, {idle} of {len(measured)} processes idle{remedy}" if idle else line


def check_unchanged(writer: ShardWriter, stamp: str | None, hide: bool) -> None:
    """Compare the images with those of the shards that are there already, unless their files are untouched since.

    All processes call this together. Where there are no files to tell by, contents are always compared.

    Args:
        writer: its source, its shards.
        stamp: of the source.
        hide: whether to hide the progress bar.

    Raises:
        CacheError: on all processes, naming images that have changed.
    """
    source = writer.source
    untouched = stamp is not None and stamp == read_stamp(writer.folder)
    if untouched or not any(writer.folder.glob("moments-*.safetensors")):
        return
    total = source.length if source.compared is None else None
    with tqdm(total=total, desc="comparing", unit="image", disable=hide, mininterval=1) as progress:
        changed = gather_object(writer.changed(progress))
    if changed:
        raise CacheError(
            f"latent cache {writer.folder} was made of other images: {len(changed)} changed since, such as "
            f"{', '.join(changed[:5])}. Choose another data.cache folder, or delete this one."
        )
    if writer.rank == 0:
        write_json(writer.folder / "checked.json", {"stamp": stamp})


def prepare_folder(folder: Path, settings: dict[str, Any], stamp: str | None) -> None:
    """Create the folder, or check that what it holds was made with the same settings."""
    path = folder / "settings.json"
    if path.exists():
        check_settings(folder, json.loads(path.read_text(encoding="utf-8")), settings)
        return
    if folder.exists() and any(folder.glob("moments-*.safetensors")):
        raise CacheError(f"{folder} holds shards but no settings.json; delete it or choose another data.cache folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "checked.json", {"stamp": stamp})
    write_json(path, settings)


def write_index(writer: ShardWriter, settings: dict[str, Any]) -> None:
    """Write index.json: the last step, which makes the cache a finished one.

    Raises:
        DataError: if not a single image could be used.
        CacheError: if a shard cannot be read.
    """
    shards: list[dict[str, Any]] = []
    skipped: list[list[str]] = []
    totals = {"numbers": 0.0, "sum": 0.0, "sum_of_squares": 0.0}
    for path in itertools.chain(*(writer.parts(stream) or [] for stream in range(writer.source.num_streams))):
        with reading(path), safe_open(path, framework="pt") as file:
            summary = json.loads(file.metadata()["summary"])
            count = file.get_slice("labels").get_shape()[0]
        shards.append({"file": path.name, "count": count, "bytes": path.stat().st_size})
        skipped += summary["skipped"]
        totals = {name: value + summary[name] for name, value in totals.items()}
    if not totals["numbers"]:
        example = f": {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise DataError(f"none of the {len(skipped)} images can be used{example}")
    mean = totals["sum"] / totals["numbers"]
    std = (totals["sum_of_squares"] / totals["numbers"] - mean**2) ** 0.5
    index = {"settings": settings, "shards": shards, "skipped": skipped, "latent_mean": mean, "latent_std": std}
    write_json(writer.folder / "index.json", index)
    for leftover in writer.folder.glob("*.partial"):  # left by processes that were killed
        leftover.unlink(missing_ok=True)


def report(cache: LatentCache, from_scratch: bool = True) -> str:
    """A few lines about a finished cache; for a model that starts from scratch, what its VAE should scale by."""
    index = json.loads((cache.folder / "index.json").read_text(encoding="utf-8"))
    skipped, mean, std = index["skipped"], index["latent_mean"], index["latent_std"]
    size = sum(shard["bytes"] for shard in index["shards"])
    scaled = [std * cache.scaling_factor, (mean - cache.shift_factor) * cache.scaling_factor]
    lines = [
        f"{len(cache)} images of {cache.num_classes} classes in {cache.folder}, {cache.num_views} view(s) each, "
        f"{size / len(cache):,.0f} bytes per image",
        f"latents {cache.latent_shape}: std {std:.4f}, mean {mean:.4f}; as trained on, with the VAE's scaling factor "
        f"{cache.scaling_factor:.4f} and shift factor {cache.shift_factor:.4f}: std {scaled[0]:.4f}, mean "
        f"{scaled[1]:.4f}",
    ]
    if from_scratch and abs(scaled[0] - 1) > 0.1:
        lines.append(
            f"A model that learns from scratch wants about std 1 and mean 0. A scaling_factor of {1 / std:.4f} in the "
            "VAE's config.json would give std 1; set it before caching. If model.start_from is to name a pipeline, "
            "leave it as it is, because the pipeline's weights know these latents."
        )
    lines += without_images(cache.labels, cache.classes)
    if skipped:
        named = [f"  {name}: {reason}" for name, reason in skipped[:20]]
        where = [f"  and {len(skipped) - 20} more, listed in {cache.folder / 'index.json'}"] if skipped[20:] else []
        lines += [f"skipped {len(skipped)} image(s) that cannot be used:", *named, *where]
    return "\n".join(lines)


def main() -> None:
    with one_line_errors("training.cache_latents"):
        config = config_or_exit("training.cache_latents")
        with processes() as state:
            cache = cache_latents(config.data)
            if state.is_main_process:
                print(report(cache, from_scratch=config.model.start_from is None))


if __name__ == "__main__":
    main()

"""Groups and draws: who is in which group, and that no draw depends on how the work is split."""

import collections
import pickle

import numpy as np
import pytest
import torch

from training.data.batches import GroupBatches, batch_loader, count_groups, draw_groups


LABELS = np.repeat([0, 1, 2, 3], [8, 5, 2, 1])  # N = 4: exact, a leftover, smaller than N, a single image


@pytest.fixture
def groups() -> np.ndarray:
    return draw_groups(LABELS, 4, seed=1, epoch=0)


def test_a_group_is_of_one_class_and_its_images_differ_where_the_class_allows(groups: np.ndarray) -> None:
    for group in groups:
        label = LABELS[group[0]]
        assert (LABELS[group] == label).all()
        assert len(set(group)) == min(4, int((label == LABELS).sum()))


def test_every_image_is_used_and_none_more_often_than_the_rule_says(groups: np.ndarray) -> None:
    uses = collections.Counter(groups.ravel().tolist())
    by_class = [sorted(uses[image] for image in np.flatnonzero(label == LABELS)) for label in range(4)]
    assert by_class == [[1] * 8, [1, 1, 2, 2, 2], [2, 2], [4]]
    assert len(groups) == count_groups(LABELS, 4) == 2 + 2 + 1 + 1


def test_groups_of_one_image_are_a_permutation() -> None:
    assert sorted(draw_groups(LABELS, 1, seed=0, epoch=3).ravel()) == list(range(len(LABELS)))


def test_groups_depend_on_seed_and_epoch_and_on_nothing_else(groups: np.ndarray) -> None:
    np.random.seed(5)
    assert (draw_groups(LABELS, 4, seed=1, epoch=0) == groups).all()
    assert (draw_groups(LABELS, 4, seed=1, epoch=1) != groups).any()
    assert (draw_groups(LABELS, 4, seed=2, epoch=0) != groups).any()


def test_a_longer_epoch_goes_through_the_images_again(groups: np.ndarray) -> None:
    longer = draw_groups(LABELS, 4, seed=1, epoch=0, num_groups=9)
    assert longer.shape == (9, 4)
    assert (longer[:6] == groups).all()
    assert (draw_groups(LABELS, 4, seed=1, epoch=0, num_groups=3) == groups[:3]).all()


def batches(cache, group_size=4, batch_size=4, **options) -> GroupBatches:
    settings = {"diffusion_batch_mul": 3, "label_dropout": 0.5, "seed": 0} | options
    return GroupBatches(cache, group_size, batch_size, **settings)


def untile(batch: dict[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    """A batch as one dictionary per group."""
    return [
        {
            "latents": batch["latents"][group],
            "label": batch["labels"][group],
            "timesteps": batch["timesteps"][:, group::size],
            "noise": batch["noise"][:, group::size],
        }
        for group in range(size)
    ]


def test_shapes_scale_and_ranges(cache) -> None:
    batch = batches(cache)[0]
    assert batch["latents"].shape == (4, 4, *cache.latent_shape)
    assert batch["timesteps"].shape == (4, 12)
    assert batch["noise"].shape == (4, 12, *cache.latent_shape)
    assert batch["timesteps"].dtype == torch.int64
    assert batch["timesteps"].min() >= 0
    assert batch["timesteps"].max() < 1000
    assert set(batch["labels"].tolist()) <= {0, 1, 2, cache.num_classes}


@pytest.mark.parametrize("group_size", [1, 4])
def test_two_processes_see_what_one_sees(cache, group_size: int) -> None:
    """Also across the end of an epoch, which lies within these batches."""
    whole = batches(cache, group_size, batch_size=4)
    halves = [batches(cache, group_size, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    for index in range(6):
        split = [group for half in halves for group in untile(half[index], 2)]
        for one, two in zip(untile(whole[index], 4), split, strict=True):
            for name in one:
                assert torch.equal(one[name], two[name])


def test_the_order_of_asking_and_worker_processes_change_nothing(cache) -> None:
    wanted = [batches(cache)[index] for index in range(3)]
    backwards = batches(cache)
    again = [backwards[index] for index in (2, 1, 0)][::-1]
    worked = list(batch_loader(pickle.loads(pickle.dumps(batches(cache))), 0, 3, workers=1))
    for first, second, third in zip(wanted, again, worked, strict=True):
        for name in first:
            assert torch.equal(first[name], second[name])
            assert torch.equal(first[name], third[name])


def test_draws_differ_between_slots_epochs_and_seeds(cache) -> None:
    source = batches(cache)
    noises = [source.draw(epoch, slot)["noise"] for epoch in range(2) for slot in range(2)]
    noises.append(batches(cache, seed=1).draw(0, 0)["noise"])
    assert len({noise.sum().item() for noise in noises}) == 5


def test_a_group_of_the_same_image_is_one_sample_with_its_own_noises(cache) -> None:
    source = batches(cache, group_size=3, batch_size=5, same_image=True)
    batch = source[0]
    assert source.groups_per_epoch == len(cache)
    assert batch["latents"].shape[:2] == (5, 3)
    assert (batch["latents"] == batch["latents"][:, :1]).all()
    assert len({noise.sum().item() for noise in batch["noise"].flatten(0, 1)}) == 3 * 5 * 3
    assert len(torch.unique(batch["timesteps"], dim=0)) == 3


def test_draws_have_the_stated_distributions(cache) -> None:
    source = batches(cache, group_size=1, batch_size=2000)
    batch = source[0]
    assert batch["noise"].mean().abs() < 0.01
    assert (batch["noise"].std() - 1).abs() < 0.01
    dropped = (batch["labels"] == cache.num_classes).float().mean()
    assert abs(dropped - 0.5) < 0.05
    # logit-normal: the median is 1/2, and sigmoid(1) = 0.731 is the 84th percentile
    assert abs((batch["timesteps"] < 500).float().mean() - 0.5) < 0.03
    assert abs((batch["timesteps"] < 731).float().mean() - 0.841) < 0.03


def test_latents_are_scaled_posterior_samples_of_image_or_mirror(cache) -> None:
    source = batches(cache, group_size=1, batch_size=300)
    batch = source[0]
    views = []
    for slot in range(300):
        epoch, place = divmod(slot, source.groups_per_epoch)
        image = int(source.epoch_groups(epoch)[place, 0])
        sample = batch["latents"][slot, 0] / cache.scaling_factor
        standardised = [(sample - mean) / std for mean, std in (cache.moments(image, view) for view in (0, 1))]
        views.append(int(standardised[1].square().mean() < standardised[0].square().mean()))
        assert min(value.square().mean() for value in standardised) < 3
    assert 0.35 < np.mean(views) < 0.65


def test_no_label_is_dropped_at_rate_zero(cache) -> None:
    batch = batches(cache, label_dropout=0.0, batch_size=50)[0]
    assert batch["labels"].max() < cache.num_classes

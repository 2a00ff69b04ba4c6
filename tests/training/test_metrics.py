"""Metrics of features: they agree with a second implementation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluating import statistics_of
from scipy.linalg import sqrtm

from training.evaluation.metrics import (
    InceptionScore,
    Statistics,
    frechet_distance,
    precision_recall,
)


def normal(count, width, seed, shift=0.0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


class TestMetrics:
    def test_running_statistics(self):
        """Also of features far from zero, where sums of squares lose the covariance."""
        features = normal(100, 5, 0).double() + 1e6
        statistics = statistics_of(features)
        np.testing.assert_allclose(statistics.mean, features.numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(statistics.covariance, np.cov(features.numpy(), rowvar=False), rtol=0, atol=1e-8)
        assert statistics.count == 100

    def test_frechet_distance_agrees_with_the_root_of_the_product(self):
        first, second = statistics_of(normal(200, 6, 0)), statistics_of(normal(150, 6, 1, shift=0.3) * 1.7)
        root = sqrtm(first.covariance @ second.covariance)
        traces = np.trace(first.covariance) + np.trace(second.covariance) - 2 * np.trace(root).real
        expected = np.square(first.mean - second.mean).sum() + traces
        assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
        assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)

    def test_frechet_distance_of_one_dimension(self):
        """(m - m')² + (s - s')²."""
        first, second = Statistics(np.array([1.0]), np.array([[4.0]])), Statistics(np.array([3.0]), np.array([[9.0]]))
        assert frechet_distance(first, second) == pytest.approx(5.0)

    def test_other_features_cannot_be_compared(self):
        with pytest.raises(ValueError, match="statistics of 3 and of 4 features"):
            frechet_distance(statistics_of(normal(9, 3, 0)), statistics_of(normal(9, 4, 0)))

    def test_inception_score_by_the_definition(self):
        logits = normal(103, 7, 0).double() * 3
        score = InceptionScore(103)
        for batch in logits.split(20):
            score.add(batch)
        p = logits.softmax(1)[np.random.RandomState(2020).permutation(103)]
        scores = []
        for i in range(10):
            part = p[i * 103 // 10 : (i + 1) * 103 // 10]
            scores.append((part * (part.log() - part.mean(0).log())).sum(1).mean().exp().item())
        assert score.result() == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)

    def test_inception_score_of_images_sorted_by_class(self):
        """Ten certain classes, as many of each, score near 10 in whatever order they come."""
        logits = 50 * torch.eye(10).repeat_interleave(200, dim=0)
        score = InceptionScore(2000)
        score.add(logits)
        assert score.result()[0] == pytest.approx(10, rel=0.05)

    def test_inception_score_wants_all_images(self):
        score = InceptionScore(20)
        score.add(torch.zeros(19, 3))
        with pytest.raises(ValueError, match="set up for 20 images, but got 19"):
            score.result()

    def test_precision_and_recall_by_the_definition(self):
        generated, real = normal(60, 3, 0), normal(50, 3, 1, shift=0.8)

        def share(points, centres):
            """Of the points in the ball of a centre that reaches to its third neighbour."""
            between = np.linalg.norm(centres[:, None].numpy() - centres[None].numpy(), axis=-1)
            radii = np.sort(between, axis=1)[:, 3]
            return (np.linalg.norm(points[:, None].numpy() - centres[None].numpy(), axis=-1) <= radii).any(1).mean()

        expected = share(generated, real), share(real, generated)
        assert precision_recall(generated, real, batch_size=11) == pytest.approx(expected)
        assert expected[0] != expected[1]

    def test_precision_and_recall_of_a_collapsed_model(self):
        real = normal(200, 3, 0)
        collapsed = real[:1] + 1e-3 * normal(200, 3, 1)
        precision, recall = precision_recall(collapsed, real)
        assert precision == 1
        assert recall < 0.05

    def test_agreement_with_torch_fidelity(self):
        """Numbers of torch-fidelity 0.4.0 on the same features (fid_statistics_to_metric, isc_features_to_metric,
        calculate_precision_recall_part)."""
        recorded = json.loads((Path(__file__).parents[1] / "fixtures" / "torch_fidelity_metrics.json").read_text())
        generated, real = normal(300, 16, 0), 1.2 * normal(250, 16, 1, shift=0.2)
        assert frechet_distance(statistics_of(generated), statistics_of(real)) == pytest.approx(
            recorded["fid"], rel=1e-5
        )
        score = InceptionScore(300)
        score.add(generated * 2)
        assert score.result() == pytest.approx((recorded["isc_mean"], recorded["isc_std"]), rel=1e-6)
        assert precision_recall(generated, real) == pytest.approx((recorded["precision"], recorded["recall"]))

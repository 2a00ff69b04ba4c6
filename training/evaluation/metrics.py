"""FID, Inception Score, precision and recall from features, in memory that does not grow with the square of anything.

torch-fidelity has the same formulas, but it cannot be imported without torchvision, takes no precomputed statistics
and holds all logits at once; agreement with it is tested. Shapes: N images, D features, K classes.
"""

from dataclasses import dataclass

import numpy as np
import torch


NEIGHBOURS = 3


@dataclass(frozen=True)
class Statistics:
    """Mean `(D,)` and covariance `(D, D)` of features, and how many images they are of (None: not known)."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None


class RunningStatistics:
    """Mean and covariance of features that come in batches, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.origin = self.total = self.products = np.zeros(0)

    def add(self, features: torch.Tensor) -> None:
        """Take in features `(B, D)`."""
        rows = features.double().cpu().numpy()
        if not self.count:
            # Sums are of differences to the first row: far from zero, E[x²] - E[x]² would lose digits.
            self.origin = rows[0].copy()
            self.total, self.products = np.zeros(rows.shape[1]), np.zeros((rows.shape[1], rows.shape[1]))
        rows = rows - self.origin
        self.count += len(rows)
        self.total += rows.sum(0)
        self.products += rows.T @ rows

    def result(self) -> Statistics:
        """Statistics with the unbiased covariance.

        Raises:
            ValueError: fewer than two images were taken in.
        """
        if self.count < 2:
            raise ValueError(f"statistics of {self.count} image(s); a covariance needs at least 2")
        mean = self.total / self.count
        covariance = (self.products - self.count * np.outer(mean, mean)) / (self.count - 1)
        return Statistics(self.origin + mean, covariance, self.count)


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """|m - m'|² + tr(S + S' - 2 (S S')^(1/2)), the FID of two Gaussians (arXiv 1706.08500).

    S S' has the eigenvalues of the symmetric R S' R, R being the root of S: no root of a general matrix is needed.

    Raises:
        ValueError: the features differ in number.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"statistics of {len(first.mean)} and of {len(second.mean)} features cannot be compared; use the feature "
            "extractor that the reference was made with"
        )
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ second.covariance @ root).clip(min=0)
    shift = np.square(first.mean - second.mean).sum()
    return float(shift + np.trace(first.covariance) + np.trace(second.covariance) - 2 * np.sqrt(eigenvalues).sum())


class InceptionScore:
    """exp E[KL(p(y|x) || p(y))], mean over splits (arXiv 1606.03498), of logits that come in batches.

    The N images are shuffled over the splits: of images sorted by class, each split would hold a few classes only and
    the score would be far too low.
    """

    def __init__(self, num_images: int, splits: int = 10, seed: int = 2020) -> None:
        if num_images < splits:
            raise ValueError(f"the Inception Score is a mean over {splits} splits, but there are {num_images} images")
        self.splits = splits
        self.split_of = torch.empty(num_images, dtype=torch.long)
        # torch-fidelity shuffles in this order; with another one the numbers would differ from its.
        order = torch.from_numpy(np.random.RandomState(seed).permutation(num_images))
        bounds = torch.tensor([i * num_images // splits for i in range(1, splits)])
        self.split_of[order] = torch.bucketize(torch.arange(num_images), bounds, right=True)
        self.seen = 0
        self.totals: torch.Tensor | None = None

    def add(self, logits: torch.Tensor) -> None:
        """Take in the logits `(B, K)` of the next images."""
        logits = logits.double().cpu()
        splits = self.split_of[self.seen : self.seen + len(logits)]
        log_p = logits.log_softmax(dim=1)
        p = log_p.exp()
        if self.totals is None:
            self.totals = torch.zeros(self.splits, logits.shape[1], dtype=torch.double)
            self.negative_entropy = torch.zeros(self.splits, dtype=torch.double)
        self.totals.index_add_(0, splits, p)
        self.negative_entropy.index_add_(0, splits, torch.xlogy(p, p).sum(1))
        self.seen += len(logits)

    def result(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits."""
        if self.seen != len(self.split_of) or self.totals is None:
            raise ValueError(f"the Inception Score was set up for {len(self.split_of)} images, but got {self.seen}")
        counts = self.split_of.bincount(minlength=self.splits).double()
        marginal = self.totals / counts[:, None]
        # E[KL] = E[Σ p log p] - Σ q log q, q the mean of p
        scores = (self.negative_entropy / counts - torch.xlogy(marginal, marginal).sum(1)).exp()
        return float(scores.mean()), float(scores.std(correction=0))


def precision_recall(
    generated: torch.Tensor, real: torch.Tensor, neighbours: int = NEIGHBOURS, batch_size: int = 2000
) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991) of features `(N, D)` and `(N', D)`.

    Precision is the share of generated images within the ball, to its k-th neighbour, of a real one; recall the
    share of real images within that of a generated one.

    Raises:
        ValueError: too few images for k neighbours.
    """
    for name, features in (("generated", generated), ("real", real)):
        if len(features) <= neighbours:
            raise ValueError(f"{len(features)} {name} images; precision and recall need more than {neighbours}")
    generated, real = generated.float(), real.float()
    radii = _radii(generated, neighbours, batch_size), _radii(real, neighbours, batch_size)
    precision = _share_inside(generated, real, radii[1], batch_size)
    return precision, _share_inside(real, generated, radii[0], batch_size)


def _radii(features: torch.Tensor, neighbours: int, batch_size: int) -> torch.Tensor:
    """Distance of each row to its k-th nearest other row."""
    parts = [torch.cdist(rows, features).kthvalue(neighbours + 1).values for rows in features.split(batch_size)]
    return torch.cat(parts)


def _share_inside(points: torch.Tensor, centres: torch.Tensor, radii: torch.Tensor, batch_size: int) -> float:
    inside = [(torch.cdist(rows, centres) <= radii).any(dim=1) for rows in points.split(batch_size)]
    return float(torch.cat(inside).float().mean())

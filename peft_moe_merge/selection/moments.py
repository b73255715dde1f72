"""Means and covariances in one pass, and how a covariance of few images is made usable. Float64 throughout.

Shapes: B images, F features, C components (classes, or one for the whole task).
"""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Counts, means and the scatter about them, updated batch by batch to what two passes would give.

    The update is that of Chan, Golub and LeVeque (1979), which does not lose digits where the mean is large.

    Attributes:
        counts_C, means_CF: per component.
        scatter_FF: sum over all images of the outer products of their deviations from their component's mean.
    """

    def __init__(self, width: int):
        self.counts_C = torch.zeros(0, dtype=torch.float64)
        self.means_CF = torch.zeros(0, width, dtype=torch.float64)
        self.scatter_FF = torch.zeros(width, width, dtype=torch.float64)

    def update(self, features_BF: Tensor, components_B: Tensor) -> None:
        """Add images, each to its component."""
        features_BF = features_BF.to("cpu", torch.float64)
        components_B = components_B.to("cpu")
        new = int(components_B.max()) + 1 - len(self.counts_C)
        if new > 0:
            self.counts_C = torch.cat([self.counts_C, self.counts_C.new_zeros(new)])
            self.means_CF = torch.cat([self.means_CF, self.means_CF.new_zeros(new, self.means_CF.shape[1])])
        for component in components_B.unique().tolist():
            x_BF = features_BF[components_B == component]
            before, added = self.counts_C[component], len(x_BF)
            mean_F = x_BF.mean(dim=0)
            step_F = mean_F - self.means_CF[component]
            centred_BF = x_BF - mean_F
            self.scatter_FF += centred_BF.T @ centred_BF
            self.scatter_FF += torch.outer(step_F, step_F) * (before * added / (before + added))
            self.means_CF[component] += step_F * (added / (before + added))
            self.counts_C[component] += added


def shrink(covariance_FF: Tensor, images: float) -> tuple[Tensor, float]:
    """Pull the correlations toward zero as far as the number of images demands; variances stay.

    The intensity is the oracle approximating one (Chen, Wiesel, Eldar and Hero 2010, eq. 23 without its terms in
    2 / F, as in scikit-learn) of the correlation matrix, in closed form. Features that do not vary at all get a small variance, so that the result can be inverted.

    Returns:
        The shrunk covariance, and the intensity in [0, 1]; 1 leaves no correlation.
    """
    variances_F = covariance_FF.diagonal()
    floor = variances_F.mean().item() * 1e-6 or 1.0
    deviations_F = variances_F.clamp_min(floor).sqrt()
    correlation_FF = covariance_FF / torch.outer(deviations_F, deviations_F)
    width = len(correlation_FF)
    trace = correlation_FF.diagonal().sum().item()
    square = correlation_FF.square().sum().item()
    excess = square - trace**2 / width  # zero where nothing is correlated
    intensity = min(1.0, (square + trace**2) / ((images + 1) * excess)) if excess > 0 else 1.0
    shrunk_FF = (1 - intensity) * correlation_FF
    shrunk_FF.fill_diagonal_(1.0)
    return shrunk_FF * torch.outer(deviations_F, deviations_F), intensity

"""Sums that are enough for means, covariances and main directions; the vectors themselves are not kept."""

import torch
from torch import Tensor


class Moments:
    """First and second moments of the vectors of H heads, sample by sample.

    In float64: a covariance as the difference of two sums loses half of the digits where the mean is large.
    """

    def __init__(self) -> None:
        self.count = 0  # vectors per head
        self._sum = torch.zeros(())  # f64[H, D]
        self._products = torch.zeros(())  # f64[H, D, D]

    def add(self, states: Tensor) -> None:
        """Take in states [B, H, S, D] of any float dtype; S may be 0."""
        vectors = states.detach().to(torch.float64).transpose(0, 1).flatten(1, 2)  # [H, B * S, D]
        self._sum = self._sum.to(vectors.device) + vectors.sum(dim=1)
        self._products = self._products.to(vectors.device) + vectors.mT @ vectors
        self.count += vectors.shape[1]

    @property
    def mean(self) -> Tensor:
        """f64[H, D]"""
        return self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased, f64[H, D, D]. Needs two vectors."""
        mean = self.mean
        return (self._products - self.count * mean[:, :, None] * mean[:, None, :]) / (self.count - 1)

    @property
    def main_direction(self) -> Tensor:
        """The first right singular vector of the stacked vectors, not centred, f64[H, D], of length 1.

        It is the eigenvector of their second moments to the largest eigenvalue; its sign is the one with which the
        vectors have a positive projection on average.
        """
        direction: Tensor = torch.linalg.eigh(self._products).eigenvectors[..., -1]  # eigenvalues ascend
        sign = torch.where((direction * self._sum).sum(dim=-1, keepdim=True) < 0, -1.0, 1.0)
        return direction * sign

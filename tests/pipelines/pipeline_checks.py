"""What the tests of both pipelines share."""

import torch


def generators(*seeds: int) -> list[torch.Generator]:
    """A generator for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def assert_same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4):
    """Asserts that no value differs by more than `tolerance`."""
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def assert_differ(actual: torch.Tensor, expected: torch.Tensor):
    """Asserts that tensors of one shape differ by more than rounding does."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() > 1e-3

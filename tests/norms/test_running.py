"""The moving averages equal those of BatchNorm where both average the same values."""

import pytest
import torch
from torch import nn

from refbn_d2.norms.running import update_running_stats


@pytest.mark.parametrize("momentum", [0.1, 0.7, 0.0, 1.0, None])
def test_averages_as_batch_norm_does(momentum):
    ours, theirs = nn.BatchNorm2d(3, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)
    for _ in range(4):
        x = torch.randn(4, 3, 5, 5) * 2 + 1
        theirs(x)
        update_running_stats(ours, x.mean((0, 2, 3)), x.transpose(0, 1).flatten(1).var(1))
    assert torch.allclose(ours.running_mean, theirs.running_mean, rtol=1e-5, atol=1e-6)
    assert torch.allclose(ours.running_var, theirs.running_var, rtol=1e-5)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 4


def test_eval_mode_and_missing_statistics_change_nothing():
    norm = nn.BatchNorm2d(2).eval()
    update_running_stats(norm, torch.ones(2), torch.full((2,), 5.0))
    assert norm.running_mean.tolist() == [0, 0] and norm.num_batches_tracked == 0
    norm.train().track_running_stats = False  # switched off later, to freeze them
    update_running_stats(norm, torch.ones(2), torch.full((2,), 5.0))
    assert norm.running_mean.tolist() == [0, 0] and norm.num_batches_tracked == 0
    norm = nn.BatchNorm2d(2, track_running_stats=False)
    update_running_stats(norm, torch.ones(2), torch.ones(2))
    assert norm.running_mean is None

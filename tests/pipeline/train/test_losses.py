"""Losses against numbers worked out by hand: -ln σ(1) = 0.313262, -ln σ(-1) = 1.313262, -ln σ(2) = 0.126928."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.config.settings import TrainDpoSettings
from pipeline.train.losses import (
    centering_loss,
    dpo_loss,
    ipo_loss,
    pairwise_loss,
    ppo_policy_loss,
    ppo_value_loss,
    ranking_loss,
    rrhf_loss,
    sft_loss,
)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Tensor, *expected: float) -> bool:
    return torch.allclose(found.double().flatten(), tensor(*expected), atol=2e-6)


def test_sft_is_the_negative_log_likelihood() -> None:
    assert close(sft_loss(tensor(-0.5, -2.0)), 0.5, 2.0)


def test_a_comparison_costs_ln_2_at_equal_scores_whatever_its_label() -> None:
    assert close(pairwise_loss(tensor(0, 0, 0), tensor(1, 0.5, 0.2)), *[math.log(2)] * 3)


def test_a_soft_label_weighs_both_directions() -> None:
    found = pairwise_loss(tensor(1, 1, 1), tensor(1, 0, 0.75))
    assert close(found, 0.313262, 1.313262, 0.75 * 0.313262 + 0.25 * 1.313262)


def test_a_soft_label_is_met_exactly_where_the_gap_is_its_logit() -> None:
    gap = tensor(math.log(0.8 / 0.2)).requires_grad_()
    pairwise_loss(gap, tensor(0.8)).sum().backward()
    assert gap.grad is not None
    assert close(gap.grad, 0.0)


def test_a_huge_gap_stays_finite() -> None:
    assert close(pairwise_loss(tensor(1000, -1000), tensor(1, 1)), 0, 1000)


def test_all_comparisons_of_a_prompt_are_one_mean() -> None:
    # Scores 2, 1, 0 in this order: gaps 1, 2, 1; -ln σ(2) = 0.126928.
    found = ranking_loss(tensor(2, 1, 0), torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2]), tensor(1, 1, 1))
    assert close(found, (0.313262 + 0.126928 + 0.313262) / 3)


def test_centering_is_the_square_of_the_mean_score() -> None:
    assert close(centering_loss(tensor(3, 1)), 4.0)
    assert close(centering_loss(tensor(3, -3)), 0.0)


def test_dpo_is_ln_2_where_the_policy_is_the_reference() -> None:
    logps = tensor(-10, -12).view(1, 2)
    assert close(dpo_loss(logps, logps, tensor(1), beta=0.1), math.log(2))


def test_dpo_against_equation_7() -> None:
    # Log-ratios 4 and -6: beta 0.1 makes the gap 1.
    policy, reference = tensor(-10, -20).view(1, 2), tensor(-14, -14).view(1, 2)
    assert close(dpo_loss(policy, reference, tensor(1), beta=0.1), 0.313262)
    assert close(dpo_loss(policy, reference, tensor(0.75), beta=0.1), 0.563262)


def test_dpo_with_smoothing_flips_that_share_of_labels() -> None:
    policy, reference = tensor(-10, -20).view(1, 2), tensor(-14, -14).view(1, 2)
    assert close(dpo_loss(policy, reference, tensor(1), beta=0.1, label_smoothing=0.1), 0.413262)
    # A label of 0.75 of which a tenth is wrong is one of 0.75·0.9 + 0.25·0.1 = 0.7.
    assert close(dpo_loss(policy, reference, tensor(0.75), beta=0.1, label_smoothing=0.1), 0.613262)


def test_dpo_does_not_subtract_losses() -> None:
    """A pseudo-code in circulation is loss(chosen) - loss(rejected), which has no lower bound."""
    policy, reference = tensor(-1, -1000).view(1, 2), tensor(-1, -1).view(1, 2)
    assert dpo_loss(policy, reference, tensor(1), beta=1.0).item() >= 0


def test_label_smoothing_is_not_silently_left_out_of_ipo() -> None:
    with pytest.raises(ValidationError, match="label_smoothing is of loss: sigmoid"):
        TrainDpoSettings(loss="ipo", label_smoothing=0.1)
    assert TrainDpoSettings(loss="sigmoid", label_smoothing=0.1).label_smoothing == 0.1


def test_ipo_asks_for_a_gap_of_one_half_by_beta() -> None:
    reference = tensor(-5, -5).view(1, 2)
    assert close(ipo_loss(tensor(-5, -10).view(1, 2), reference, tensor(1), beta=0.1), 0.0)
    assert close(ipo_loss(reference, reference, tensor(1), beta=0.1), 25.0)
    # Gap 5: (5 - 5)² with weight 0.75, (5 + 5)² with weight 0.25.
    assert close(ipo_loss(tensor(-5, -10).view(1, 2), reference, tensor(0.75), beta=0.1), 25.0)


def test_rrhf_against_the_paper() -> None:
    # p = -1, -0.5, -2; scores 3, 1, 2. Wrong order: r₂ < r₁ but p₂ - p₁ = 0.5; r₂ < r₃ but p₂ - p₃ = 1.5.
    means, sums, scores = tensor(-1, -0.5, -2), tensor(-4, -1, -10), tensor(3, 1, 2)
    assert close(rrhf_loss(means, sums, scores, rrhf_weight=1.0), 0.5 + 1.5 + 4.0)


def test_rrhf_of_the_published_code_is_another_weight_and_a_mean() -> None:
    means, sums, scores = tensor(-1, -0.5, -2), tensor(-4, -1, -10), tensor(3, 1, 2)
    published = 100 * 2.0 + 1.0
    ours = rrhf_loss(means, sums, scores, rrhf_weight=100.0)
    assert close(ours - (4.0 - 1.0), published)


def test_rrhf_leaves_equal_scores_alone() -> None:
    assert close(rrhf_loss(tensor(-1, -9), tensor(-2, -18), tensor(1, 1), rrhf_weight=1.0), 2.0)


def test_rrhf_with_one_completion_is_its_negative_log_likelihood() -> None:
    assert close(rrhf_loss(tensor(-1.5), tensor(-6), tensor(0), rrhf_weight=1.0), 6.0)


@pytest.mark.parametrize("seed", range(3))
def test_rrhf_against_a_plain_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    means, lengths = -torch.rand(5, generator=generator), torch.randint(1, 9, (5,), generator=generator)
    scores = torch.randint(0, 4, (5,), generator=generator)
    loss = -means[scores.argmax()] * lengths[scores.argmax()]
    for i in range(5):
        for j in range(5):
            if scores[i] < scores[j]:
                loss = loss + max(0.0, (means[i] - means[j]).item())
    assert torch.allclose(rrhf_loss(means, means * lengths, scores, rrhf_weight=1.0), loss)


def test_the_clipped_surrogate_by_hand() -> None:
    """Ratios 1.5 and 0.5 with advantages of both signs: the clip holds back only what would go on too far."""
    logps = torch.tensor([1.5, 0.5, 1.5, 0.5]).log()
    found = ppo_policy_loss(logps, torch.zeros(4), tensor(2, 2, -2, -2), cliprange=0.2)
    assert close(found.losses, -2.4, -1.0, 3.0, 1.6)
    assert found.is_clipped.tolist() == [True, False, False, True]


def test_the_clipped_surrogate_starts_as_the_policy_gradient() -> None:
    """At ratio 1 the gradient by the log-probability is minus the advantage."""
    logps = tensor(-1, -2, -3).requires_grad_()
    ppo_policy_loss(logps, logps.detach(), tensor(0.5, -1, 2), cliprange=0.2).losses.sum().backward()
    assert close(logps.grad, -0.5, 1.0, -2.0)


def test_the_clipped_value_loss_by_hand() -> None:
    """Old value 1: a jump to 2 is clipped at 1.2, which counts where it is farther from the return."""
    found = ppo_value_loss(tensor(2, 2, 1.1), tensor(1, 1, 1), tensor(3, 2, 2), cliprange_value=0.2)
    assert close(found.losses, 0.5 * 1.8**2, 0.5 * 0.8**2, 0.5 * 0.9**2)
    assert found.is_clipped.tolist() == [True, True, False]


def test_a_value_within_its_range_is_not_clipped_by_a_rounding_error() -> None:
    """old + (new - old) is not always new."""
    values, old, returns = (0.05 * torch.randn(1000, generator=torch.Generator().manual_seed(n)) for n in range(3))
    assert not ppo_value_loss(values, old, returns, cliprange_value=1.0).is_clipped.any()

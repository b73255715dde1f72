import pytest
import torch

from peft_moe_merge.tuners.moe_lora_merge.routing_losses import balance_loss, displacement, locality_loss


def probabilities(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)


def test_balance_loss_is_the_sum_over_experts_written_out():
    probs_BE, counts_E = probabilities(7, 4), torch.tensor([5, 0, 2, 1])
    expected = sum(4 * (counts_E[e] / 8) * (sum(probs_BE[b, e] for b in range(7)) / 7) for e in range(4))
    torch.testing.assert_close(balance_loss(probs_BE, counts_E), expected)


def test_balance_loss_is_one_when_either_side_is_even_and_e_when_one_expert_does_all():
    even_BE, skewed_BE = torch.full((3, 5), 0.2), probabilities(3, 5).float()
    torch.testing.assert_close(balance_loss(even_BE, torch.tensor([9, 0, 0, 1, 0])), torch.tensor(1.0))
    torch.testing.assert_close(balance_loss(skewed_BE, torch.full((5,), 2)), torch.tensor(1.0))
    alone_BE = torch.zeros(3, 5).index_fill_(1, torch.tensor([2]), 1.0)
    torch.testing.assert_close(balance_loss(alone_BE, torch.tensor([0, 0, 3, 0, 0])), torch.tensor(5.0))


def test_balance_loss_moves_probability_from_busy_to_idle_experts():
    logits_E = torch.zeros(3, requires_grad=True)
    balance_loss(logits_E.softmax(-1).expand(4, 3), torch.tensor([6, 2, 0])).backward()
    assert logits_E.grad[0] > 0 > logits_E.grad[2]


def test_balance_loss_counts_carry_no_gradient_and_may_be_empty():
    counts_E = torch.tensor([1.0, 2.0], requires_grad=True)
    probs_BE = probabilities(3, 2).float().requires_grad_()
    balance_loss(probs_BE, counts_E).backward()
    assert counts_E.grad is None
    assert balance_loss(probs_BE, torch.zeros(2)) == 0


def test_balance_loss_of_a_whole_tasks_counts_fits_half_precision():
    probs_BE, counts_E = probabilities(4, 3), torch.tensor([100_000, 20_000, 8_000])
    loss = balance_loss(probs_BE.half(), counts_E)
    assert loss.dtype == torch.float16
    torch.testing.assert_close(loss.double(), balance_loss(probs_BE, counts_E), rtol=0.01, atol=0)


def test_locality_loss_is_the_mean_over_decisions_of_gate_times_distance():
    gates_BE = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.9, 0.1]])
    loss = locality_loss(gates_BE, torch.tensor([2.0, 4.0, 10.0]))
    torch.testing.assert_close(loss, torch.tensor(((1 + 2) + (3.6 + 1)) / 2))


def test_locality_loss_pushes_the_router_off_the_expert_that_moved():
    logits_E = torch.zeros(3, requires_grad=True)
    locality_loss(logits_E.softmax(-1).unsqueeze(0), torch.tensor([0.0, 3.0, 0.0])).backward()
    # p = 1/3 each: dp_1/dlogit = p (1{e=1} - p), times the distance.
    torch.testing.assert_close(logits_E.grad, 3 * torch.tensor([-1 / 9, 2 / 9, -1 / 9]))


def test_losses_take_any_leading_dimensions():
    probs_ABE, counts_E = probabilities(2, 3, 4), torch.tensor([3.0, 1.0, 0.0, 2.0])
    flat_BE = probs_ABE.flatten(0, 1)
    torch.testing.assert_close(balance_loss(probs_ABE, counts_E), balance_loss(flat_BE, counts_E))
    torch.testing.assert_close(locality_loss(probs_ABE, counts_E), locality_loss(flat_BE, counts_E))


@pytest.mark.parametrize(("loss", "name"), [(balance_loss, "counts_E"), (locality_loss, "moved_E")])
def test_losses_refuse_values_of_other_experts(loss, name):
    with pytest.raises(ValueError, match=rf"{name} has shape \(3,\).*4 experts"):
        loss(probabilities(5, 4), torch.ones(3))


def test_displacement_is_the_distance_over_all_tensors_of_an_expert():
    before = {"down": torch.zeros(3, 2), "up": torch.zeros(4)}
    now = {name: tensor.clone() for name, tensor in before.items()}
    now["down"][0, 0], now["up"][3] = 3.0, 4.0
    torch.testing.assert_close(displacement(now, before), torch.tensor(5.0))


def test_displacement_of_an_unmoved_expert_has_zero_gradient():
    up = torch.ones(3, requires_grad=True)
    displacement({"up": up}, {"up": torch.ones(3)}).backward()
    torch.testing.assert_close(up.grad, torch.zeros(3))


def test_displacement_refuses_experts_of_other_tensors():
    with pytest.raises(ValueError, match=r"\['down', 'up'\] and before of \['up'\]"):
        displacement({"up": torch.ones(3), "down": torch.ones(3)}, {"up": torch.ones(3)})

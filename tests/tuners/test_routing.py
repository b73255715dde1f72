"""Routing against closed forms."""

import torch

from peft_moe_merge.tuners.moe_lora_merge.routing import router_logits, selection_counts, top_k_gates


def test_gates_are_a_softmax_over_the_chosen_only():
    logits = torch.tensor([[0.0, 2.0, 1.0, -5.0]], dtype=torch.float64)
    indices, gates = top_k_gates(logits, 2)
    assert indices.tolist() == [[1, 2]]
    e = torch.e
    torch.testing.assert_close(gates, torch.tensor([[e / (e + 1), 1 / (e + 1)]], dtype=torch.float64))


def test_equal_scores_go_to_the_lower_index():
    indices, gates = top_k_gates(torch.zeros(3, 55), 2)
    assert indices.tolist() == [[0, 1]] * 3 and gates.tolist() == [[0.5, 0.5]] * 3
    indices, _ = top_k_gates(torch.tensor([[0.0, 1.0, 0.0, 1.0]]), 3)
    assert indices.tolist() == [[1, 3, 0]]


def test_noise_has_the_scale_of_the_formula():
    torch.manual_seed(0)
    x, noise_weight = torch.ones(40_000, 1), torch.tensor([[-50.0, 0.0, 3.0]])
    logits = router_logits(x, torch.tensor([[5.0, 0.0, -1.0]]), noise_weight)
    expected = torch.nn.functional.softplus(noise_weight[0]) + 0.01  # 0.01, 0.703, 3.06
    torch.testing.assert_close(logits.std(dim=0), expected, rtol=0.02, atol=0)
    torch.testing.assert_close(logits.mean(dim=0), torch.tensor([5.0, 0.0, -1.0]), atol=0.06, rtol=0)
    assert torch.equal(router_logits(x, noise_weight), x @ noise_weight)


def test_each_sample_counts_for_each_of_its_experts():
    counts = selection_counts(torch.tensor([[0, 3], [3, 1], [3, 0]]), 5)
    assert counts.dtype == torch.int64 and counts.tolist() == [2, 1, 0, 3, 0]

"""How far two outcomes of training lie apart. With `-s` or `-rP` pytest shows the distances that were measured."""

from collections.abc import Mapping

import torch


def assert_alike(
    what: str, actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], atol: float = 1e-5
) -> None:
    """Numbers differ by no more than `atol`, everything that is counted or decided not at all."""
    assert actual.keys() == expected.keys()
    largest = 0.0
    for name, tensor in expected.items():
        if not tensor.is_floating_point():
            assert torch.equal(actual[name], tensor), name
            continue
        torch.testing.assert_close(actual[name], tensor, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        if tensor.numel():
            largest = max(largest, (actual[name].double() - tensor.double()).abs().max().item())
    print(f"{what}: largest difference {largest:.1e} in {len(expected)} tensors")

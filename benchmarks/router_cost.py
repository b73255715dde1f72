"""What the losses on routers and the router's stop cost: training steps with each, side by side in one process.

    python benchmarks/router_cost.py [--rounds 15] [--steps 4]

Every round runs a few steps of each variant in turn; printed are medians over rounds of the ratio to plain training in the
same round, with the quartiles. The model is the small CLIP that ships with the package, 32 images and 12 prompts a step.
"""

import argparse

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from rounds import quartiles, ratios, take_turns, timed

from peft_moe_merge import ExpertMergeCallback, MoELoraMergeConfig, RouterFreezeCallback
from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.mini import mini_clip_path

VARIANTS = {
    "plain": ({}, None),
    "balance": ({"router_balance_loss": 0.01}, None),
    "locality": ({"router_locality_loss": 0.1}, None),
    "stopped": ({}, RouterFreezeCallback(at_step=0)),
    "gate_gap": ({}, RouterFreezeCallback(gap=1e-9, explore=1)),
}


class Variant:
    """One way to train, with its own model and optimizer."""

    def __init__(self, fields: dict[str, float], freeze: RouterFreezeCallback | None):
        torch.manual_seed(0)
        clip, _ = load_clip(mini_clip_path())
        self.model: PeftModel = get_peft_model(clip, MoELoraMergeConfig(num_experts=20, **fields)).train()
        self.losses = bool(fields)
        self.callbacks = [ExpertMergeCallback(merge_every=20), *([freeze] if freeze else [])]
        for callback in self.callbacks:
            callback.begin_task(self.model)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def step(self) -> None:
        tokens_NL = torch.randint(2, 4000, (12, 8))
        text = self.model.config.text_config
        tokens_NL[:, 0], tokens_NL[:, -1] = text.bos_token_id, text.eos_token_id
        logits = self.model(pixel_values=torch.randn(32, 3, 32, 32), input_ids=tokens_NL).logits_per_image
        loss = F.cross_entropy(logits, torch.randint(0, 12, (32,)))
        (loss + self.model.auxiliary_loss() if self.losses else loss).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        for callback in self.callbacks:
            callback.step(self.model, self.optimizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4, help="per variant and round")
    arguments = parser.parse_args()
    variants = {name: Variant(*made_of) for name, made_of in VARIANTS.items()}
    steps = {name: timed(variant.step, times=arguments.steps) for name, variant in variants.items()}
    seconds = {name: own["step"] for name, own in take_turns(steps, arguments.rounds, "rounds").items()}
    for name, own in seconds.items():
        median, (low, high) = quartiles(ratios(own, seconds["plain"]))
        print(f"{name:10s} {median:.2f} x plain   (quartiles {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()

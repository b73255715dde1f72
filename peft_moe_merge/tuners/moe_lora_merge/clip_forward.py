"""A CLIP's logits for a batch in which the samples have different tasks.

Shapes: B images, N prompts, P projection width, U distinct tasks in the batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.models.clip.modeling_clip import CLIPModel, CLIPOutput, image_text_contrastive_loss


def mixed_task_output(
    clip: CLIPModel,
    output: CLIPOutput,
    slot_B: Tensor,
    text_features: list[Callable[[], Tensor]],
    return_loss: bool,
) -> CLIPOutput:
    """Score each image against the prompts as its own task's routers encode them.

    So a row of `logits_per_image` is what a batch of that image's task alone would give, and that of a plain image
    (id -1) is what the model without experts gives.

    Args:
        clip: the model that ran.
        output: what it returned, its images routed each by its own task, its prompts by the first of the U tasks.
        slot_B: which of the U tasks an image has.
        text_features: for each further task, a function that encodes the prompts by it (N x P, not normalized).
        return_loss: compute the contrastive loss; needs N = B.

    Returns:
        The output with `logits_per_image` B x N and `text_embeds` B x N x P, the prompts as each image's task sees them.
    """
    texts_UNP = [output.text_embeds]
    logits_UNB = [output.logits_per_text]
    scale = clip.logit_scale.exp().to(output.text_embeds.device)
    for encode in text_features:
        features_NP = encode()
        texts_UNP.append(features_NP / features_NP.pow(2).sum(dim=-1, keepdim=True).pow(0.5))
        logits_UNB.append(torch.matmul(texts_UNP[-1], output.image_embeds.t().to(features_NP.device)) * scale)

    columns_B = torch.arange(len(slot_B), device=slot_B.device)
    output.logits_per_image = torch.stack(logits_UNB)[slot_B, :, columns_B]
    output.logits_per_text = output.logits_per_image.t()
    output.text_embeds = torch.stack(texts_UNP)[slot_B]
    if return_loss:
        output.loss = image_text_contrastive_loss(output.logits_per_text)
    return output

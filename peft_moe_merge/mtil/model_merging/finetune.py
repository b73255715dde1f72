"""Supervised fine-tuning of a CLIP's vision tower against fixed class texts, on one task or on several at once."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from tqdm import tqdm
from transformers import CLIPModel, get_cosine_schedule_with_warmup

from peft_moe_merge.inference import zero_shot
from peft_moe_merge.model_merging.batches import endless
from peft_moe_merge.model_merging.logits import zero_shot_logits

from ..preparing import prepared
from .images import TaskImages, batches


def finetune(
    clip: CLIPModel,
    tasks: Sequence[TaskImages],
    accelerator: Accelerator,
    *,
    steps: int,
    lr: float,
    batch_size: int,
    seed: int,
) -> CLIPModel:
    """Return a copy of `clip` whose vision tower has learnt the tasks; text tower and projections stay as they are.

    AdamW with a cosine schedule; tasks take turns, one batch each, so that several get `steps` steps together.

    Args:
        clip: the pretrained model, which is left alone.
        tasks: one for an individual model, several for joint multi-task training.
        accelerator: for device and precision.
        steps: optimizer steps.
        lr: the first learning rate.
        batch_size: images per step.
        seed: of the order of images.
    """
    model = copy.deepcopy(clip).train().requires_grad_(False)
    model.vision_model.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=steps)
    streams = [endless(batches(t.finetune, batch_size), t.name, seed + 1009 * i) for i, t in enumerate(tasks)]
    title = f"fine-tuning on {tasks[0].name if len(tasks) == 1 else f'{len(tasks)} tasks'}"
    with prepared(accelerator, model, optimizer) as (_, optimizer):
        for step in tqdm(range(steps), desc=title, disable=not accelerator.is_main_process):
            which = step % len(tasks)
            pixels, labels = next(streams[which])
            with accelerator.autocast():
                logits = zero_shot_logits(model, pixels.to(accelerator.device), tasks[which].head_CD)
            accelerator.backward(F.cross_entropy(logits.float(), labels.to(accelerator.device)))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: TensorDataset, head_CD: torch.Tensor, batch_size: int = 100) -> float:
    """Return the percentage of images whose class has the nearest text."""
    model.eval()
    device = next(model.parameters()).device
    head_CD = head_CD.to(device)

    def scores(pixels: torch.Tensor) -> torch.Tensor:
        return zero_shot.cosines(model.get_image_features(pixel_values=pixels.to(device)).pooler_output, head_CD)

    return zero_shot.accuracy(scores, batches(images, batch_size, shuffle=False))

"""A classifier of two tasks of the embedded benchmark, trained for seconds, saved with its selector."""

from pathlib import Path

import torch
from embedded import fitted_selector
from peft import get_peft_model
from transformers import CLIPModel, CLIPProcessor

from peft_moe_merge import ContinualClassifier, MoELoraMergeConfig, TaskClasses
from peft_moe_merge.mtil.data.mini import TASKS, load_task, mini_clip_path

LEARNT = ("shapes", "digits")
STEPS, IMAGES = 12, 32


def train(folder: Path) -> Path:
    torch.manual_seed(0)
    processor = CLIPProcessor.from_pretrained(mini_clip_path())
    clip = CLIPModel.from_pretrained(mini_clip_path())
    model = get_peft_model(clip, MoELoraMergeConfig.pool(tasks=list(LEARNT), r=4))
    for name in LEARNT:
        learn(model, processor, name)
    model.attach_selector(fitted_selector(model.eval(), processor, list(LEARNT)))
    classes = {name: TaskClasses(TASKS[name].classes, TASKS[name].templates) for name in LEARNT}
    ContinualClassifier(model, processor, classes).save_pretrained(folder)
    return folder


def learn(model, processor, name: str) -> None:
    model.set_task(name)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    images = load_task(name, "train").shuffle(seed=0)
    prompts = [TASKS[name].templates[0].format(label) for label in TASKS[name].classes]
    texts = processor.tokenizer(prompts, padding=True, return_tensors="pt")
    for step in range(STEPS):
        part = images[step * IMAGES % len(images) : step * IMAGES % len(images) + IMAGES]
        pixels = processor(images=part["image"], return_tensors="pt")["pixel_values"]
        logits = model(**texts, pixel_values=pixels).logits_per_image
        torch.nn.functional.cross_entropy(logits, torch.tensor(part["label"])).backward()
        optimizer.step()
        optimizer.zero_grad()

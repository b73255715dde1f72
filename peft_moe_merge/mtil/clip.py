"""The CLIP that a stream starts from: one from the Hub or a folder, or a small one made here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
)

from .data.mini import mini_clip_path
from .data.task import Task
from .settings import setting

START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass
class ModelSettings:
    """What a stream starts from."""

    model: str | None = setting(None, "a pretrained CLIP, folder or Hub id; 'untrained': a small one; default: mini's")

    def build(self, tasks: Iterable[Task]) -> tuple[CLIPModel, CLIPProcessor]:
        """Make the model, the same each time; an untrained one learns its vocabulary from the tasks' prompts.

        Raises:
            OSError: there is no such model.
        """
        if self.model != "untrained":
            return load_clip(self.model or mini_clip_path())
        return small_clip(prompt for task in tasks for template in task.templates for prompt in task.prompts(template))


def load_clip(model: str | Path) -> tuple[CLIPModel, CLIPProcessor]:
    """Load a pretrained CLIP by folder or Hub id. Only safetensors is read."""
    return (
        CLIPModel.from_pretrained(model, use_safetensors=True, dtype=torch.float32),
        CLIPProcessor.from_pretrained(model),
    )


def small_clip(prompts: Iterable[str], *, image_size: int = 32, seed: int = 0) -> tuple[CLIPModel, CLIPProcessor]:
    """Make a small CLIP with random weights, and a tokenizer of its own.

    It knows nothing yet, so its zero-shot accuracy is chance. It serves to try a stream where no pretrained model is
    at hand.

    Args:
        prompts: texts that the tokenizer learns its vocabulary from.
        image_size: of the square images, a multiple of 8.
        seed: of the weights.
    """
    tokenizer = local_tokenizer(prompts)
    tokens = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": tokenizer.model_max_length,
    }
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config=CLIPTextConfig(**tower, **tokens, projection_dim=64).to_dict(),
        vision_config=CLIPVisionConfig(**tower, image_size=image_size, patch_size=8, projection_dim=64).to_dict(),
        projection_dim=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = CLIPModel(config).eval()
    size = {"height": image_size, "width": image_size}
    image_processor = CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=size)
    return clip, CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


def local_tokenizer(prompts: Iterable[str], *, max_length: int = 32) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE tokenizer that wraps a text in a start and an end token, as CLIP's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=[START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(set(prompts)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, 0), (END, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=END, model_max_length=max_length
    )

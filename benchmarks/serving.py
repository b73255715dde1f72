"""What serving costs: `ContinualClassifier` with eleven tasks mixed in every request, beside plain CLIP.

    OMP_NUM_THREADS=1 python benchmarks/serving.py --output runs/serving.json                    # the mini CLIP
    OMP_NUM_THREADS=1 python benchmarks/serving.py --model vit-b/16 --rounds 5 --requests 4      # random weights
    python benchmarks/serving.py --quick

A request is a few images, each of another of the eleven mini tasks, as PIL images; the answer is a label for each. Threads
take requests from one queue, and each calls the classifier by itself; torch works with one thread in each. Four contestants
answer the same requests in turns, round by round:

- plain: CLIP's processor, its image tower, and the classes of all tasks, encoded once;
- known: the classifier, told the task of each image;
- chosen: the classifier, whose selector (a discriminant of hidden states after the second block, or that of `--depth`) chooses it;
- fused: told the task, and a Gaussian per class on the tokens after plain CLIP's last block has a say (`fuse=True`).

Printed are images a second, the median and the 99 % quantile of a request's time, and how many times plain CLIP's time the
others take in the same round: by the clock, and by the processor's time, which others on the machine change least. The
pool has the preset's two experts of rank 8 a task beside all linear layers; they and the routers are random, as if learnt.
"""

import argparse
import queue
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import get_peft_model
from PIL.Image import Image
from rich.console import Console
from rich.table import Table
from rounds import quartiles, ratios, take_turns, write_json
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from peft_moe_merge import MoELoraMergeConfig
from peft_moe_merge.inference import ContinualClassifier, TaskClasses
from peft_moe_merge.inference.zero_shot import class_features, prompts_of
from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.mini import TASKS, load_task, mini_clip_path
from peft_moe_merge.selection import Depths, DiscriminantSelector

AIMS = {"known": 1.10, "chosen": 1.25}
PER_TASK = 12  # images to fit the selector with, and as many to be asked about
Answer = Callable[[list[Image], list[str]], Any]


def clip_of(model: str) -> tuple[CLIPModel, CLIPProcessor]:
    """Make the mini CLIP, or one whose image tower is a ViT-B/16's, with random weights."""
    clip, processor = load_clip(mini_clip_path())
    if model == "vit-b/16":
        vision = {"patch_size": 16}  # else CLIP's defaults are a ViT-B's
        torch.manual_seed(0)
        clip = CLIPModel(CLIPConfig(text_config=clip.config.text_config.to_dict(), vision_config=vision))
        processor = CLIPProcessor(CLIPImageProcessor(), processor.tokenizer)
    return clip.eval(), processor


def contestants(model: str, device: str, depth: int) -> dict[str, Answer]:
    """Name what is compared: each takes images and the names of their tasks, and returns labels."""
    plain, processor = clip_of(model)
    plain.to(device)
    names = [name for of_task in TASKS.values() for name in of_task.classes]
    templates = next(iter(TASKS.values())).templates
    classes_CP = class_features(plain, processor.tokenizer, prompts_of(names, templates))

    @torch.no_grad()
    def answer(images: list[Image], tasks: list[str]) -> list[str]:
        pixels = processor(images=images, return_tensors="pt")["pixel_values"].to(device)
        features_BP = F.normalize(plain.get_image_features(pixels).pooler_output, dim=-1)
        shares_BC = (plain.logit_scale.exp() * features_BP @ classes_CP.T).softmax(dim=-1)
        return [names[label] for label in shares_BC.argmax(dim=1).tolist()]

    classifier = pool_of(model, device, DiscriminantSelector(Depths((depth,)), shared=(1.0,), reject_rate=0))
    fused = pool_of(model, device, DiscriminantSelector.for_classes(plain, reject_rate=0), fuse=True)
    return {
        "plain": answer,
        "known": lambda images, tasks: classifier(images, task=tasks),
        "chosen": lambda images, tasks: classifier(images),
        "fused": lambda images, tasks: fused(images, task=tasks),
    }


def pool_of(model: str, device: str, selector: DiscriminantSelector, **how: Any) -> ContinualClassifier:
    """Make a pool of random experts, with a selector fitted on a few images of every task."""
    torch.manual_seed(1)
    clip, processor = clip_of(model)
    config = MoELoraMergeConfig.pool(tasks=list(TASKS), init_weights=False)
    adapted = get_peft_model(clip, config).eval().to(device)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "routers" in name:
                parameter.normal_()
    for name in TASKS:
        rows = load_task(name, "train").shuffle(seed=0)[:PER_TASK]
        pixels = processor(images=rows["image"], return_tensors="pt")["pixel_values"].to(device)
        selector.fit(name, [(adapted.frozen_features(selector.source, pixels), torch.tensor(rows["label"]))])
    adapted.attach_selector(selector)
    told = {name: TaskClasses(of_task.classes, of_task.templates) for name, of_task in TASKS.items()}
    return ContinualClassifier(adapted, processor, told, **how)


def requests_of(count: int, images: int) -> list[tuple[list[Image], list[str]]]:
    """Draw requests; the tasks take turns, so that each request has images of as many of them as it can."""
    generator, names = np.random.default_rng(0), list(TASKS)
    rows = {name: load_task(name, "test").shuffle(seed=0)[:PER_TASK]["image"] for name in names}
    drawn = []
    for request in range(count):
        tasks = [names[(request * images + place) % len(names)] for place in range(images)]
        drawn.append(([rows[task][generator.integers(PER_TASK)] for task in tasks], tasks))
    return drawn


def serve(answer: Answer, requests: Sequence[tuple], threads: int) -> tuple[float, float, list[float]]:
    """Answer all requests; return the seconds by the clock and by the processor, and those of each request."""
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for request in requests:
        waiting.put(request)
    taken: list[float] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            while True:
                request = waiting.get_nowait()
                began = time.perf_counter()
                answer(*request)
                taken.append(time.perf_counter() - began)
        except queue.Empty:
            pass
        except BaseException as error:  # a thread's own would be lost
            failed.append(error)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    clock, processor = time.perf_counter(), time.process_time()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed:
        raise failed[0]
    return time.perf_counter() - clock, time.process_time() - processor, taken


def measure(answers: dict[str, Answer], requests: Sequence[tuple], threads: int, rounds: int) -> dict[str, Any]:
    """Let all contestants answer the requests once a round."""
    latencies: dict[str, list[float]] = {name: [] for name in answers}

    def contestant(name: str) -> Callable[[], dict[str, float]]:
        def turn() -> dict[str, float]:
            clock, processor, taken = serve(answers[name], requests, threads)
            latencies[name] += taken
            return {"clock": clock, "cpu": processor}

        return turn

    seconds = take_turns({name: contestant(name) for name in answers}, rounds, f"{threads} threads")
    images = sum(len(images) for images, _ in requests)
    rows = {}
    for name in answers:
        taken = latencies[name][len(requests) :]  # without the round to warm up
        rows[name] = {
            "images_per_second": images / statistics.median(seconds[name]["clock"]),
            "median": float(np.quantile(taken, 0.5)),
            "quantile_99": float(np.quantile(taken, 0.99)),
            **{of: quartiles(ratios(seconds[name][of], seconds["plain"][of])) for of in ("clock", "cpu")},
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("mini", "vit-b/16"), default="mini")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--requests", type=int, default=16, help="in a round")
    parser.add_argument("--images", type=int, default=11, help="of a request")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--depth", type=int, default=2, help="the block whose tokens the selector looks at")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 2 requests of 3 images, by 1 and 2 threads")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.requests, args.images, args.threads = 2, 2, 3, [1, 2]
    torch.set_num_threads(1)
    answers, requests = contestants(args.model, args.device, args.depth), requests_of(args.requests, args.images)
    results = {"settings": {name: str(value) for name, value in vars(args).items()}}
    table = Table(
        "threads",
        "",
        "images/s",
        "median, ms",
        "99 %, ms",
        "x plain, clock",
        "x plain, processor",
        "aim",
        title=args.model,
    )
    for threads in args.threads:
        results[f"{threads} threads"] = rows = measure(answers, requests, threads, args.rounds)
        for name, row in rows.items():
            shown = [f"{median:.2f} ({low:.2f}-{high:.2f})" for median, (low, high) in (row["clock"], row["cpu"])]
            milliseconds = (f"{1e3 * row[of]:.1f}" for of in ("median", "quantile_99"))
            aim = f"{AIMS[name]:.2f}" if name in AIMS else ""
            table.add_row(str(threads), name, f"{row['images_per_second']:.1f}", *milliseconds, *shown, aim)
    Console().print(table)
    if args.output:
        write_json(args.output, results)


if __name__ == "__main__":
    main()

"""Does memory stay flat while a large data set is loaded, checked, sampled and read?

    python benchmarks/loading_memory.py            # 100,000 images in 397 classes, as large as SUN397
    python benchmarks/loading_memory.py --quick    # 5,000

Writes tiny JPEGs into parquet files, loads them as the stream does, and goes once through all of them in training's
batches. Memory is that of the process: `anonymous` is what it holds itself, `mapped` what it has read of the files on
disk, which the system takes back when others need it. The check: from a tenth of the pass to its end, anonymous memory
grows by less than a tenth of the images' size.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image
from memory import process_bytes
from PIL import Image as PILImage
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import CLIPImageProcessor

from peft_moe_merge.mtil.data.batches import train_batches
from peft_moe_merge.mtil.data.hub.load import load_hub_task
from peft_moe_merge.mtil.data.hub.table import class_names

ROWS_PER_FILE = 5000


def held() -> dict[str, float]:
    """Return the process's memory in megabytes."""
    return {"anonymous": process_bytes("RssAnon") / 2**20, "mapped": process_bytes("RssFile") / 2**20}


def write_images(folder: Path, images: int, names: list[str], side: int) -> int:
    """Write noise as JPEGs, one image in ten for testing; return the bytes of all of them."""
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    generator, total = np.random.default_rng(0), 0
    folder.mkdir(parents=True)
    splits = {"train": images * 9 // 10, "validation": 100, "test": images - images * 9 // 10 - 100}
    with tqdm(total=images, desc="writing", unit="image") as bar:
        for split, count in splits.items():
            for part, start in enumerate(range(0, count, ROWS_PER_FILE)):
                rows = range(start, min(start + ROWS_PER_FILE, count))
                encoded = []
                for _ in rows:
                    buffer = io.BytesIO()
                    noise = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
                    PILImage.fromarray(noise).save(buffer, "JPEG", quality=90)
                    encoded.append({"bytes": buffer.getvalue(), "path": None})
                columns = {"image": encoded, "label": [row % len(names) for row in rows]}
                table = pa.Table.from_pydict(columns, schema=features.arrow_schema)
                pq.write_table(table, folder / f"{split}-{part:05}.parquet")
                total += sum(len(image["bytes"]) for image in encoded)
                bar.update(len(rows))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--side", type=int, default=24, help="of an image, in pixels")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="5,000 images")
    arguments = parser.parse_args()
    images = 5000 if arguments.quick else arguments.images
    datasets.disable_progress_bars()
    names = list(class_names("sun397"))
    table = Table("moment", "anonymous MB", "mapped MB", "seconds", box=None)
    began, seen = time.perf_counter(), []

    def sample(moment: str) -> None:
        seen.append(held())
        cells = (f"{seen[-1]['anonymous']:.0f}", f"{seen[-1]['mapped']:.0f}", f"{time.perf_counter() - began:.0f}")
        table.add_row(moment, *cells)

    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        size = write_images(Path(folder) / "data" / "sun397", images, names, arguments.side)
        sample("written")
        task = load_hub_task("sun397", data_dir=Path(folder) / "data", allow_size_mismatch=True)
        sample("loaded and checked")
        processor = CLIPImageProcessor(
            size={"shortest_edge": arguments.side}, crop_size={"height": arguments.side, "width": arguments.side}
        )
        steps = len(task.train) // arguments.batch_size
        options = {"batch_size": arguments.batch_size, "num_workers": arguments.num_workers, "crop_scale": 0.9}
        batches = train_batches(task.train, processor, steps=steps, seed=0, **options)
        marks = {max(1, steps * tenth // 10): tenth for tenth in range(1, 11)}
        for step, _ in enumerate(tqdm(batches, desc="one pass", unit="batch"), start=1):
            if step in marks:
                sample(f"{marks[step]}0 % of the pass")
    Console(width=100).print(table)
    growth = seen[-1]["anonymous"] - seen[-10]["anonymous"]
    print(f"{len(task.train):,} + {len(task.test):,} images, {size / 2**20:.0f} MB of JPEG.")
    print(f"Anonymous memory over the last nine tenths of the pass: {growth:+.1f} MB. ", end="")
    print("Flat." if growth < size / 2**20 / 10 else "NOT flat.")


if __name__ == "__main__":
    main()

"""A page to try an adapter on: which class, which task and why, which experts, beside plain CLIP.

    make space                                            # the newest adapter that `make demo` left
    python examples/space/app.py --adapter user/name      # one of the Hub, or a folder

The adapter has the names of its classes beside it, as `ContinualClassifier.save_pretrained` and `examples/mtil.py
--push_to_hub` write them. As a Space, the adapter is named by the variable ADAPTER.
"""

from __future__ import annotations

import argparse
import html
import os
import tempfile
from pathlib import Path

import gradio as gr
from drawing import gates_figure
from embedded import embedded_classifier, newest_adapter, sample_images
from look import Look, look
from matplotlib.figure import Figure
from PIL import Image

from peft_moe_merge import ContinualClassifier
from peft_moe_merge.inference.rgb import load_rgb
from peft_moe_merge.selection import NONE
from peft_moe_merge.selection.candidates import check_candidates

CHOOSE = "let class names and image choose"
PLAIN = "none: CLIP without experts"
LABELS = 5  # shown of all probabilities
MOST_NAMES, LONGEST_NAME = 200, 100
CSS = "#image img { min-height: 200px; object-fit: contain; }"  # small images can be seen
LARGEST_FILE = "10mb"
CLEANED_EVERY, KEPT_FOR = 600, 3600  # seconds; visitors' files
IMAGES = Path(__file__).with_name("images")
"""A Space may hold pictures to pick from."""

Shown = tuple[dict[str, float], dict[str, float], str, str, Figure | None]


def as_sent(payload: gr.data_classes.FileData | None) -> str | None:
    """Hand an image on as the file that was sent. Gradio would open it, cut 16 bits at 8, and fail without a word."""
    return None if payload is None else payload.path


def names_of(text: str) -> list[str] | None:
    """Part class names at commas and line ends; None for a field that was left empty.

    Raises:
        gr.Error: there is no name, one twice, or too many.
    """
    if not text.strip():
        return None
    names = [name.strip() for name in text.replace("\n", ",").split(",") if name.strip()]
    if not names:
        raise gr.Error("There is no class name in the list: name at least one, or leave the field empty.")
    if len(names) > MOST_NAMES or max(map(len, names)) > LONGEST_NAME:
        raise gr.Error(f"At most {MOST_NAMES} class names of {LONGEST_NAME} letters, please.")
    try:
        return list(check_candidates(names))
    except ValueError as error:
        raise gr.Error(html.escape(str(error))) from error


def classify(classifier: ContinualClassifier, file: str | None, text: str, task: str) -> Shown:
    """Answer one visitor. Nothing of it is kept.

    Raises:
        gr.Error: what was sent can't be classified; it says why.
    """
    if file is None:
        raise gr.Error("There is no image yet: upload one, or pick one below.")
    names = names_of(text)
    try:
        image = load_rgb(Path(file))
    except (OSError, ValueError) as error:
        raise gr.Error("This file is no image that can be read: try a PNG or a JPEG.") from error
    given = {CHOOSE: None, PLAIN: NONE}.get(task, task)
    if given is None and names is None and classifier.model.task_selector is None:
        raise gr.Error("This adapter has no selector: choose the task, or name the classes of one.")
    try:
        seen = look(classifier, image, names, given)
    except ValueError as error:
        raise gr.Error(html.escape(str(error))) from error
    figure = gates_figure(seen.gates, seen.owners) if seen.gates else None
    return seen.answer.probabilities, seen.plain.probabilities, why(seen), latency(seen), figure


def why(seen: Look) -> str:
    """Tell the task and the reasons as HTML; all names are escaped."""
    task = "none: CLIP without experts" if seen.answer.task is None else seen.answer.task
    lines = [f"<p><b>Task: {html.escape(task)}</b></p>", *(f"<p>{html.escape(reason)}</p>" for reason in seen.reasons)]
    if seen.scores:
        rows = "".join(
            f"<tr><td>{html.escape(one.task)}{'' if one.asked else ' (not asked about)'}</td><td>{one.score:.1f}</td>"
            f"<td>{one.bar:.1f}</td></tr>"
            for one in seen.scores[:LABELS]
        )
        lines.append(f"<table><tr><th>task</th><th>score</th><th>its bar</th></tr>{rows}</table>")
    return "".join(lines)


def latency(seen: Look) -> str:
    """Tell the time that the answers took."""
    return (
        f"**{seen.answer_ms:.0f} ms** with experts, choice of the task and new class names included; "
        f"**{seen.plain_ms:.0f} ms** plain CLIP."
    )


def build_page(classifier: ContinualClassifier, pictures: list[str]) -> gr.Blocks:
    """Lay the page out.

    Args:
        classifier: shared by all visitors; calls leave nothing on it.
        pictures: files to pick from.
    """

    def answer(file: str | None, text: str, task: str) -> Shown:
        return classify(classifier, file, text, task)

    tasks = ", ".join(classifier.tasks)
    with gr.Blocks(
        title="A mixture of LoRA experts", analytics_enabled=False, delete_cache=(CLEANED_EVERY, KEPT_FOR)
    ) as page:
        gr.Markdown(
            f"# A CLIP that learnt {len(classifier.tasks)} tasks, one after another\n"
            f"{tasks}. Each task has LoRA experts and routers of its own. An image of none of them takes CLIP as it was."
        )
        with gr.Row():
            with gr.Column():
                file = gr.Image(
                    type="filepath", sources=["upload", "clipboard"], label="Image", height=260, elem_id="image"
                )
                file.preprocess = as_sent
                text = gr.Textbox(
                    label="Class names",
                    placeholder="circle, square, star; or leave it empty for the task's own",
                    lines=2,
                )
                task = gr.Dropdown([CHOOSE, *classifier.tasks, PLAIN], value=CHOOSE, label="Task")
                button = gr.Button("Classify", variant="primary")
                if pictures:
                    gr.Examples([[picture] for picture in pictures], [file], label="Pick one", examples_per_page=24)
            with gr.Column():
                with gr.Row():
                    ours = gr.Label(label="With experts", num_top_classes=LABELS, elem_id="ours")
                    plain = gr.Label(label="Plain CLIP, same classes", num_top_classes=LABELS, elem_id="plain")
                reasons = gr.HTML(label="Which task, and why", elem_id="why")
                took = gr.Markdown(elem_id="latency")
        gr.Markdown("## Which experts took part, block by block of the image tower")
        figure = gr.Plot(show_label=False, elem_id="experts")
        button.click(answer, [file, text, task], [ours, plain, reasons, took, figure], concurrency_limit=2)
    return page


def warmed(classifier: ContinualClassifier) -> ContinualClassifier:
    """Encode the classes of all tasks and see one image, so that the first visitor does not wait for that."""
    for task in (NONE, *classifier.tasks):
        classifier.class_texts(task)
    classifier(Image.new("RGB", (64, 64)), task=NONE if classifier.model.task_selector is None else None)
    return classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default=os.environ.get("ADAPTER"), help="user/name on the Hub, or a folder")
    parser.add_argument("--runs", type=Path, default=Path("runs/demo"), help="without --adapter: its newest adapter")
    parser.add_argument("--fuse", action="store_true", help="let the adapter's selector have a say in the class, too")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            if arguments.adapter:
                classifier = ContinualClassifier.from_pretrained(arguments.adapter, fuse=arguments.fuse)
                pictures = sorted(str(path) for path in IMAGES.glob("*.*"))
            else:
                classifier = embedded_classifier(newest_adapter(arguments.runs))
                pictures = [f"{folder}/{name}.png" for name in classifier.tasks]
                for picture, image in zip(pictures, sample_images(list(classifier.tasks)).values(), strict=True):
                    image.save(picture)
        except (OSError, ValueError, TypeError) as error:
            parser.error(str(error))
        build_page(warmed(classifier), pictures).launch(
            server_port=arguments.port,
            max_file_size=LARGEST_FILE,
            ssr_mode=False,
            css=CSS,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # none from elsewhere
            footer_links=["api"],
        )


if __name__ == "__main__":
    main()

"""The page of examples/space as visitors have it: a server of its own, and a headless Chromium."""

import contextlib
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from hub.loopback import OWNER_TOKEN
from PIL import Image
from space.tiny_adapter import LEARNT

from peft_moe_merge import ContinualClassifier
from peft_moe_merge.mtil.data.mini import load_task

pytest.importorskip("gradio", reason='no gradio: pip install ".[space]"')
sync_api = pytest.importorskip("playwright.sync_api", reason='no playwright: pip install ".[test]"')
CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium to look at the page with")]

APP = Path(__file__).parents[2] / "examples" / "space" / "app.py"
WAIT = 30_000  # milliseconds, on a machine that is busy


@contextlib.contextmanager
def served(*arguments, env=None):
    """Run the app; gives its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(APP), "--port", str(port), *map(str, arguments)]
    server = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            if server.poll() is not None:
                pytest.fail(f"the app ended: {server.stdout.read()[-3000:]}")
            with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
                break
            time.sleep(0.5)
        else:
            pytest.fail("the app does not answer")
        yield address
    finally:
        server.terminate()
        server.wait(30)
        server.stdout.close()


@pytest.fixture(scope="module")
def address(adapter):
    with served("--adapter", adapter) as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Visitor:
    """A browser window of its own on the page; it notes what the page asks of other hosts, and what goes wrong."""

    def __init__(self, browser, address, **options):
        self.page = browser.new_context(**options).new_page()
        self.page.set_default_timeout(WAIT)
        self.elsewhere, self.errors = [], []
        self.page.on("request", lambda request: self._note(request.url, address))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.button = self.page.get_by_role("button", name="Classify")
        self.button.wait_for()

    def _note(self, url, address):
        if not url.startswith((address, "data:", "blob:")):
            self.elsewhere.append(url)

    def upload(self, file):
        self.page.locator("#image input[type=file]").set_input_files(str(file))
        self.page.locator("#image img").wait_for()

    def name(self, text):
        self.page.get_by_label("Class names").fill(text)

    def choose(self, task):
        self.page.get_by_label("Task", exact=True).click()
        self.page.get_by_role("option", name=task, exact=True).click()

    def answer(self):
        """Wait for the answer to the latest click, and read it."""
        self.page.locator("#why b").wait_for()
        text = {part: self.page.locator(f"#{part}").inner_text() for part in ("ours", "plain", "why", "latency")}
        return text | {part: lines(text[part]) for part in ("ours", "plain")}

    def classify(self):
        self.button.click()
        return self.answer()

    def refused(self):
        """Click, and read what the page complains of."""
        self.button.click()
        toast = self.page.locator(".toast-body").last
        toast.wait_for()
        text = toast.inner_text()
        toast.get_by_test_id("toast-close").click()
        toast.wait_for(state="detached")
        return text

    def leave(self):
        assert self.errors == [] and self.elsewhere == [], "nothing goes wrong, and nothing is loaded from elsewhere"
        self.page.context.close()


def lines(text):
    """The labels and percents of one answer, in order."""
    return re.findall(r"^(?!With|Plain)(.+)\n(\d+)%", text, re.M)


def expected(prediction):
    best = sorted(prediction.probabilities.items(), key=lambda item: -item[1])[:5]
    return [(label, round(100 * probability)) for label, probability in best]


def same(shown, prediction):
    """Whether the page shows a prediction; percents may be rounded either way, and equal ones change places."""
    wanted, got = dict(expected(prediction)), {label: int(percent) for label, percent in shown}
    first = shown[0][0] == prediction.label
    return first and all(abs(got.get(label, 0) - percent) <= 1 for label, percent in wanted.items())


@pytest.fixture
def visitor(chromium, address):
    one = Visitor(chromium, address)
    yield one
    one.leave()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    paths = {}
    for name in (*LEARNT, "food"):
        paths[name] = folder / f"{name}.png"
        load_task(name, "test").shuffle(seed=1)[0]["image"].resize((96, 96)).save(paths[name])
    return paths


def test_upload_and_classify(visitor, files, classifier: ContinualClassifier):
    for name in LEARNT:
        visitor.upload(files[name])
        seen, known = visitor.classify(), classifier(files[name])
        assert same(seen["ours"], known), (seen["ours"], expected(known))
        plain = classifier(
            files[name], task=-1, candidates=None if known.task is None else classifier.tasks[known.task]
        )
        assert same(seen["plain"], plain)
        task = "none: CLIP without experts" if known.task is None else known.task
        assert f"Task: {task}" in seen["why"] and "The selector finds" in seen["why"] and "its bar" in seen["why"]
        assert re.search(r"\d+ ms with experts.* \d+ ms plain CLIP", seen["latency"])
        visitor.page.reload()
        visitor.button.wait_for()


def test_the_experts_are_drawn(visitor, files):
    visitor.upload(files["digits"])
    visitor.choose("digits")
    visitor.classify()
    drawn = visitor.page.locator("#experts img")
    drawn.wait_for()
    assert drawn.evaluate("image => image.naturalWidth") > 300


def test_names_and_task_by_hand(visitor, files, classifier):
    visitor.upload(files["digits"])
    visitor.name("harbour, meadow\nrailway")
    seen, known = visitor.classify(), classifier(files["digits"], candidates=["harbour", "meadow", "railway"])
    assert same(seen["ours"], known) and seen["ours"] == seen["plain"]
    assert "Task: none: CLIP without experts" in seen["why"] and "those of no task" in seen["why"]
    visitor.page.reload()
    visitor.upload(files["digits"])
    visitor.name("one, seven")
    visitor.choose("digits")
    seen, known = visitor.classify(), classifier(files["digits"], task="digits", candidates=["one", "seven"])
    assert same(seen["ours"], known) and "The task was given" in seen["why"]


def test_what_cannot_be_classified_is_said_and_the_page_goes_on(visitor, files, tmp_path):
    assert "There is no image yet" in visitor.refused()
    bad = tmp_path / "bad.png"
    bad.write_text("this is no image")
    visitor.page.locator("#image input[type=file]").set_input_files(str(bad))
    visitor.page.locator("#image img").wait_for(state="attached")
    said = visitor.refused()
    assert "This file is no image that can be read" in said and "/" not in said, "and no path of the server"
    visitor.page.reload()
    visitor.upload(files["shapes"])
    for text, complaint in (
        (" , ,\n,", "There is no class name in the list"),
        ("cat, dog, cat", "Classes named twice"),
        ("x" * 200, "At most 200 class names of 100 letters"),
    ):
        visitor.name(text)
        assert complaint in visitor.refused()
    visitor.name("circle, square")
    assert visitor.classify()["ours"], "a complaint ends nothing"


def test_names_are_text(visitor, files):
    evil = "<img src=x onerror=document.title='evil'>"
    visitor.upload(files["shapes"])
    visitor.name(f"{evil}, {evil}")
    assert "Classes named twice" in visitor.refused()
    visitor.name(f"{evil}, <b>b</b>")
    seen = visitor.classify()
    assert evil in {label for label, _ in seen["ours"]} and visitor.page.title() != "evil"


def test_sixteen_bits_are_not_cut(visitor, classifier, tmp_path):
    ramp = np.linspace(0, 65535, 96 * 96).reshape(96, 96).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    visitor.upload(tmp_path / "deep.png")
    assert same(visitor.classify()["ours"], classifier(tmp_path / "deep.png"))


def test_two_visitors_at_once(chromium, address, files, classifier):
    asked = {"digits": ["one", "two", "a tree"], "shapes": ["circle", "square", "a cloud"]}
    visitors = {name: Visitor(chromium, address) for name in asked}
    for _ in range(3):
        for name, visitor in visitors.items():
            visitor.page.reload()
            visitor.upload(files[name])
            visitor.name(", ".join(asked[name]))
        for visitor in visitors.values():  # both are under way before the first has an answer
            visitor.button.click(no_wait_after=True)
        for name, visitor in visitors.items():
            seen = visitor.answer()
            known = classifier(files[name], candidates=asked[name])
            assert same(seen["ours"], known), (name, seen["ours"], expected(known))
            assert {label for label, _ in seen["ours"]} == set(asked[name])
    newcomer = Visitor(chromium, address)
    assert (
        newcomer.page.get_by_label("Class names").input_value() == ""
        and newcomer.page.locator("#image img").count() == 0
    )
    assert newcomer.page.locator("#why b").count() == 0, "nothing of others is shown"
    for one in (*visitors.values(), newcomer):
        one.leave()


def test_a_phone_shows_it_whole(chromium, address, files):
    phone = Visitor(chromium, address, viewport={"width": 390, "height": 844})
    phone.upload(files["digits"])
    phone.classify()
    assert phone.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    phone.leave()


def test_what_make_demo_left_with_images_to_pick(chromium, adapter, tmp_path):
    checkpoint = tmp_path / "moe_lora_pool" / "seed_0" / "after_2"
    model = ContinualClassifier.from_pretrained(adapter).model
    model.attach_selector(None)
    model.save_pretrained(checkpoint)
    (checkpoint / "progress.json").write_text("{}")
    with served("--runs", tmp_path) as address:
        visitor = Visitor(chromium, address)
        pictures = visitor.page.locator("button.gallery-item")
        assert pictures.count() == 2
        pictures.last.click()
        visitor.page.locator("#image img").wait_for()
        seen = visitor.classify()
        assert seen["ours"] and "Task: " in seen["why"]
        visitor.leave()


def test_an_adapter_of_the_hub(chromium, adapter, hub, files, classifier, tmp_path):
    push = (
        "import sys; from huggingface_hub import HfApi; api = HfApi(); api.create_repo('owner/tried');"
        "api.upload_folder(repo_id='owner/tried', folder_path=sys.argv[1])"
    )
    writer = hub.environment(tmp_path / "writer", OWNER_TOKEN)
    subprocess.run([sys.executable, "-c", push, str(adapter)], env=writer, check=True, capture_output=True)
    with served("--adapter", "owner/tried", env=hub.environment(tmp_path / "reader")) as address:
        visitor = Visitor(chromium, address)
        visitor.upload(files["digits"])
        assert same(visitor.classify()["ours"], classifier(files["digits"]))
        visitor.leave()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--runs", "nowhere"], "`make demo` trains one"), (["--adapter", "."], "has no classifier.json")],
)
def test_without_an_adapter_it_ends_with_the_way_out(arguments, said, tmp_path):
    done = subprocess.run([sys.executable, str(APP), *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr

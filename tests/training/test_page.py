"""report.html: what stands on the page, that nothing on it can fetch or run, and how a real browser shows it."""

import base64
import io
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image

import ctxenc
from ctxenc.__main__ import main
from ctxenc.runs.config import read_config
from ctxenc.training import pictures, trainer
from ctxenc.training.checkpoint import read_predictions
from ctxenc.training.data import eval_transform, open_image
from ctxenc.training.page import write_page
from tests.training.small_runs import SEGMENT, make_pairs

HOSTILE = '<script>alert("x")</script> & <img src="http://example.invalid/x.png">'
VOID = ("meta", "link", "img")


class Page(HTMLParser):
    """The elements of a page, which must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *each) for each in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def picture(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (300, 100), colour).save(path)


@pytest.fixture
def run(tmp_path):
    """A run whose settings and results hold what a page must not take for its own."""
    picture(tmp_path / "curves.png", "red")
    picture(tmp_path / "context-0" / "pictures" / "confusion.png", "green")
    picture(tmp_path / "context-0" / "pictures" / "assignment-layer1.0.se.png", "blue")
    (tmp_path / "se-0").mkdir()
    arms = {"se-0": "SE", "context-0": f"ContextEncoding {HOSTILE}"}
    settings = {"data": HOSTILE, "lr": 0.1}
    cells = [("SE", "1 %"), (HOSTILE, "2 %")]
    write_page(tmp_path, HOSTILE, [HOSTILE], ("network", "score"), cells, [HOSTILE], arms, settings)
    return tmp_path


@pytest.fixture
def page(run):
    return Page((run / "report.html").read_text(encoding="utf-8"))


def test_pictures_are_inside(run, page):
    sources = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    colours = []
    for source in sources:
        head, _, content = source.partition(",")
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as image:
            colours.append(image.getpixel((0, 0)))
    assert colours == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]


def test_names_are_text(page):
    assert not page.open
    assert not {"script", "iframe", "object", "form"} & set(page.tags)
    text = "".join(page.text)
    assert text.count(HOSTILE) == 8  # title twice, difference, table, note, an arm's heading and its link, a setting
    assert all(name == "content" or "://" not in value for _, name, value in page.attributes if value)
    assert not any(name.startswith("on") for _, name, _ in page.attributes)


def test_the_difference_comes_first_and_settings_are_folded(page):
    order = [tag for tag in page.tags if tag in ("p", "nav", "table", "img", "details")]
    assert order == ["p", "nav", "table", "p", *["img"] * 3, "details", "table"]


def test_links_lead_somewhere(page):
    targets = {value for _, name, value in page.attributes if name == "id"}
    links = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert len(links) == 4
    assert all(link[0] == "#" and link[1:] in targets for link in links)


@pytest.mark.parametrize(
    ("total", "count", "expected"), [(10, 4, [0, 3, 6, 9]), (2, 4, [0, 1]), (5, 1, [4]), (0, 3, [])]
)
def test_spread(total, count, expected):
    assert pictures.spread(range(total), count) == expected


def test_confusion_shows_the_shares_of_the_true_class():
    figure = pictures.draw_confusion(torch.tensor([[3, 1, 0], [0, 0, 0], [0, 10, 10]]), ["cat", "dog", "newt"])
    axes = figure.axes[0]
    assert np.asarray(axes.images[0].get_array()).tolist() == [[75, 25, 0], [0, 0, 0], [0, 50, 50]]
    assert [text.get_text() for text in axes.texts] == ["75", "25", "50", "50"]
    assert axes.get_title() == "most often: newt as dog (50 %), cat as dog (25 %)"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "newt"]


def test_many_classes_have_no_labels():
    axes = pictures.draw_confusion(torch.eye(200), [f"class {number}" for number in range(200)]).axes[0]
    assert not axes.texts
    assert axes.get_title() == "no class is taken for another"


def test_names_are_no_formulas(tmp_path):
    names = [r"$\frac$", "$^$"]
    pictures.save(tmp_path, "confusion.png", pictures.draw_confusion(torch.ones(2, 2), names))
    pictures.save(tmp_path, "worst.png", pictures.draw_worst([torch.zeros(4, 4, 3)], ["$^$ taken for $_$"]))
    network = ctxenc.patch_se_blocks(timm.create_model("test_efficientnet"))
    colours = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    pictures.draw_assignments(tmp_path, network, [torch.zeros(3, 256, 256)], ["$^$"], colours)
    assert len(list((tmp_path / "pictures").iterdir())) == 4


def test_maps_too_small_to_see_are_not_drawn(tmp_path):
    network = ctxenc.patch_se_blocks(timm.create_model("test_efficientnet"))
    colours = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    for size, blocks in (
        (256, ["3.0", "4.0"]),
        (128, ["3.0"]),
        (64, []),
    ):  # maps of 16 and 8, 8 and 4, 4 and 2 pixels a side
        arm = tmp_path / f"{size}"
        arm.mkdir()
        pictures.draw_assignments(arm, network, [torch.zeros(3, size, size)], ["x"], colours)
        names = [pictures.ASSIGNMENT.format(f"blocks.{block}.se") for block in blocks]
        assert sorted(path.name for path in arm.rglob("*.png")) == names


def test_a_photograph_has_its_colours_back():
    image = torch.rand(3, 4, 5)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    normalised = (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(pictures.photograph(normalised, mean, std), image.permute(1, 2, 0), atol=1e-6)


@pytest.mark.browser
@pytest.mark.parametrize("command", ["finetune", "segment"])
def test_a_browser_shows_it(command, finetune, tmp_path):
    """In headless Chromium: every picture loads, the console is clean, and nothing is wider than the window."""
    webdriver = pytest.importorskip("selenium.webdriver")
    run = tmp_path / "run"
    if command == "finetune":
        assert finetune("--out", run, "--arms", "both", "--epochs", 2)[0] == 0
    else:
        pairs = str(make_pairs(tmp_path / "data"))
        assert main(["segment", "train", "--data", pairs, *SEGMENT, "--out", str(run)]) == 0
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    for argument in ("headless", "no-sandbox", "disable-gpu", "window-size=1100,1400", "disable-background-networking"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.get((run / "report.html").as_uri())
        assert driver.get_log("browser") == []
        widths = driver.execute_script("return [...document.images].map(i => i.complete ? i.naturalWidth : 0)")
        assert len(widths) == len(re.findall("<img", (run / "report.html").read_text()))
        assert min(widths) > 300
        assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        height = driver.execute_script("return document.documentElement.scrollHeight")
        driver.set_window_size(1100, height)
        assert driver.get_screenshot_as_file(str(tmp_path / "report.png"))
    finally:
        driver.quit()
    with Image.open(tmp_path / "report.png") as image:
        assert image.height > 1400
        assert len(image.convert("RGB").getcolors(1 << 24)) > 1000  # pictures, not a blank page


def test_long_names_and_other_scripts_leave_room_for_the_picture(tmp_path):
    """Warnings are errors here: of a layout that does not fit, and of letters that the font lacks."""
    figure = pictures.draw_confusion(torch.ones(3, 3), ["x" * 240, "new\nline", "\u65e5\u672c"])
    pictures.save(tmp_path, "confusion.png", figure)
    axes = figure.axes[0]
    assert axes.get_position().width > 0.4
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"{'x' * 21}...", "new line", "\u65e5\u672c"]


def test_an_image_whose_loss_is_nan_is_among_the_worst(finetune, tmp_path, monkeypatch):
    shown, real = [], trainer.evaluate

    def evaluate(*given):
        result = real(*given)
        result.losses[4] = torch.nan
        return result

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    monkeypatch.setattr(pictures, "WORST_SHOWN", 2)
    monkeypatch.setattr(pictures, "draw_worst", lambda images, captions: shown.extend(captions) or Figure())
    assert finetune("--out", tmp_path / "run", "--epochs", 1)[0] == 0
    rows = read_predictions(tmp_path / "run" / "context-0" / "predictions.csv")
    largest = max(row[3] for row in rows if row[4] != 4)
    assert [caption.rpartition(" ")[2] for caption in shown] == ["(nan)", f"({largest:.1f})"]


def test_the_worst_images_are_those_of_the_largest_loss(finetune, tmp_path, monkeypatch):
    shown = []
    real = pictures.draw_worst
    monkeypatch.setattr(pictures, "draw_worst", lambda *given: (shown.append(given), real(*given))[1])
    monkeypatch.setattr(pictures, "WORST_SHOWN", 4)
    assert finetune("--out", tmp_path / "run", "--epochs", 1)[0] == 0
    rows = sorted(read_predictions(tmp_path / "run" / "context-0" / "predictions.csv"), key=lambda row: -row[3])[:4]
    ((images, captions),) = shown
    classes = ("cat", "dog", "newt")
    assert captions == [f"{classes[true]},\nseen as {classes[said]} ({loss:.1f})" for _, true, said, loss, _ in rows]
    config = read_config(tmp_path / "run" / "context-0").data_config
    for row, image in zip(rows, images, strict=True):
        normalised = eval_transform(config)(open_image(row[0]))
        assert torch.allclose(image, pictures.photograph(normalised, config["mean"], config["std"]))

"""The page and the summary about a data set: what they say, and what hostile captions do to them."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from clip_jax import config as configs
from clip_jax.data import inspection
from clip_jax.report import data_page
from tests.conftest import tiny
from tests.data.test_dataset import coloured, picture, write_tar
from tests.report.test_page import HOSTILE, Tags, browse


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def inspected(path, samples=8, **data):
  config = configs.resolve(tiny(data={"path": path, **data}))
  return inspection.inspect(config, 1000, samples), configs.to_dict(config)["data"]


def written(folder, *arguments):
  data_page.write(folder / "page.html", *arguments)
  return (folder / "page.html").read_text(encoding="utf-8")


def a_set(path, caption="a caption", bad=2):
  """12 records: one picture twice, the others of their own; some that cannot be read."""
  records = {f"{i:02}": {"png": picture(max(i, 1), 20 + 3 * max(i, 1), 30), "txt": f"{caption} {i}".encode()} for i in range(12)}
  records |= {f"{i:02}": {"png": b"nothing", "txt": b"x"} for i in range(12, 12 + bad)}
  return write_tar(path, records)


def test_the_page_says_what_was_found(tmp_path):
  found, settings = inspected(a_set(tmp_path / "a.tar"), crop_scale=(0.25, 1.0))
  html = written(tmp_path, found, settings)
  tags = Tags(html)
  for text in (
    "14 records 14 looked at",
    "14.3% cannot be read 2 of 14",
    "30 px shorter side, median 0.0% under the model's 16",
    "PNG 100.0%",
    "1 repeated images and 0 repeated captions",
    "2 the image cannot be decoded (starts with b'nothing') a.tar/",
    "crop_scale [0.25, 1.0]",
    "a caption 7",
  ):
    assert text in tags.text, text
  assert len([a for tag, a in tags.tags if tag == "article"]) == 8
  assert len(tags.paths("column")) == 6 and all(tags.paths("column"))


def test_samples_are_on_the_page_bit_by_bit_and_nothing_is_loaded(tmp_path):
  found, settings = inspected(a_set(tmp_path / "a.tar"), color_jitter=0.5)
  html = written(tmp_path, found, settings)
  sources = Tags(html).attributes("src")
  assert len(sources) == 8 + 2  # samples, and the two of one picture
  for uri, sample in zip(sources, found.samples, strict=False):
    kind, _, content = uri.partition(",")
    assert kind == "data:image/png;base64"
    np.testing.assert_array_equal(Image.open(io.BytesIO(base64.b64decode(content))), sample.pixels)
  assert not re.search(r"(?i)https?:|//|@import|<script|url\(|srcset", re.sub(r"base64,[^\"]*", "", html))
  assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html


def test_captions_keys_and_paths_are_hostile(tmp_path):
  folder = tmp_path / "<b>&'"
  folder.mkdir()
  name = "<img src=x onerror=alert(1)>"
  records = {f"{name}{i}": {"png": picture(3), "txt": f"{HOSTILE}{i % 2}".encode()} for i in range(4)}
  records["bad<script>"] = {"png": b"<script>", "txt": HOSTILE.encode()}
  found, settings = inspected(write_tar(folder / "a.tar", records), max_bad_share=1.0)
  html = written(tmp_path, found, settings)
  tags = Tags(html)
  assert not [tag for tag, _ in tags.tags if tag in ("script", "b")]
  assert not [a for _, a in tags.tags if any(key.startswith("on") for key in a)]
  assert all(source.startswith("data:image/png;base64,") for source in tags.attributes("src"))
  shown = sum(sample.captions[0].endswith("0") for sample in found.samples)
  assert shown >= 2  # and two copies of the picture, and once among the captions that are there twice
  assert tags.text.count("<img src=x onerror=\"document.documentElement.dataset.pwned='yes'\">\"'&0") == shown + 2 + 1
  assert "bad<script>" in tags.text and str(folder) in tags.text


def test_lone_surrogates_and_no_text_at_all(tmp_path):
  captions = ['{"caption": ["\\ud800 half", "\\u202e turned"]}', '{"caption": "' + "x" * 5000 + '"}']
  records = {f"{i}": {"png": picture(i), "json": text.encode()} for i, text in enumerate(captions)}
  found, settings = inspected(write_tar(tmp_path / "a.tar", records))
  text = Tags(written(tmp_path, found, settings)).text
  assert "? half" in text and "x" * 5000 in text


def test_a_set_in_which_nothing_can_be_read_has_a_page(tmp_path):
  path = write_tar(tmp_path / "a.tar", {f"{i}": {"png": b"nothing", "txt": b"x"} for i in range(3)})
  found, settings = inspected(path)
  tags = Tags(written(tmp_path, found, settings))
  assert "100.0% cannot be read 3 of 3" in tags.text and "There is none that can be read." in tags.text
  assert tags.paths("column") == []
  assert data_page.lines(found.summary)[-5] == "cannot be read: 3 (100.0%)"


def test_a_mixture_lists_its_components(tmp_path):
  mix = ((coloured(tmp_path / "a.tar", range(5)), 3.0), (coloured(tmp_path / "b.tar", range(9)), 1.0))
  found, settings = inspected("", mixture=mix)
  text = Tags(written(tmp_path, found, settings)).text
  for (path, _), rest in zip(mix, ("5 0 75.0%", "9 0 25.0%"), strict=True):
    assert f"{path} {rest}" in text
  assert f"  {mix[0][0]}: 5 records, 75.0% of the examples" in data_page.lines(found.summary)


def test_lines_hold_the_numbers_and_nothing_for_a_terminal_to_obey(tmp_path):
  records = {"\x1b[2J\u202e": {"png": b"no", "txt": b"x"}} | {f"{i}": {"png": picture(i, 40, 30), "txt": b"a"} for i in range(3)}
  found, _ = inspected(write_tar(tmp_path / "a.tar", records))
  lines = data_page.lines(found.summary)
  assert all(line.isprintable() for line in lines) and "\N{REPLACEMENT CHARACTER}[2J" in lines[-1]
  table = {line[:20].strip(): line[20:].split() for line in lines}
  assert table["width"] == ["40"] * 7 and table["height"] == ["30"] * 7 and table["width / height"] == ["1.33"] * 7
  assert "repeated among these: 0 images, 2 captions" in lines and "cannot be read: 1 (25.0%)" in lines


def heights(chart):
  """Left edge and height of each column of a histogram, as shares of the plot."""
  found = re.findall(r"M(\d+) 1000v-(\d+)h\d+V1000z", chart.columns)
  assert found and chart.columns.count("M") == len(found)
  return [(int(left) / 2000, int(height) / 1000) for left, height in found]


@pytest.mark.parametrize("log", [False, True])
def test_a_histogram_counts_and_its_axes_fit(log):
  values = np.array([10] * 5 + [20] * 10 + [40] * 1)
  chart = data_page.histogram("", values, log=log)
  drawn = heights(chart)
  assert len(drawn) == 3
  top = [tick for tick in chart.y_ticks if tick.label == "10"][0].position / 100
  assert [round(height / top * 10) for _, height in drawn] == [5, 10, 1]
  assert chart.note == "median 20; 90% are from 10 to 25"
  assert all(-0.1 <= tick.position <= 100.1 for tick in chart.x_ticks + chart.y_ticks) and 2 <= len(chart.x_ticks) <= 7
  at = next(tick for tick in chart.x_ticks if tick.label == "20").position / 100
  assert abs(drawn[1][0] - at) < 1 / 18  # within two columns


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("value", [1, 7, 224, 12_345_678])
def test_a_histogram_of_equal_values_has_one_column(value, log):
  chart = data_page.histogram("", np.full(9, value), log=log)
  ((left, height),) = heights(chart)
  assert 0 <= left < 1 and 0.5 < height <= 1 and chart.note == f"all are {value:,}"
  assert chart.x_ticks and chart.y_ticks


@pytest.mark.parametrize("level, shown", [(15, True), (35, True), (39, True), (50, False), (4, False)])
def test_a_level_is_drawn_where_it_is_near(level, shown):
  chart = data_page.histogram("", np.array([10, 12, 20]), log=True, level=("the model's", level))
  assert (chart.level is not None) == shown
  assert not shown or 0 <= chart.level.position <= 100


@pytest.mark.parametrize("value, text", [(12, "12 B"), (999.6, "1 kB"), (48_210, "48.2 kB"), (1.5e6, "1.5 MB"), (2e9, "2 GB")])
def test_bytes_as_people_write_them(value, text):
  assert data_page.byte_text(value) == text


def test_browser_draws_the_page_and_runs_nothing(tmp_path):
  found, settings = inspected(a_set(tmp_path / "a.tar", HOSTILE))
  html = written(tmp_path, found, settings)
  shot = tmp_path / "shot.png"
  dom, complaints = browse(html, tmp_path, f"--screenshot={shot}", "--window-size=1200,2400")
  assert complaints == [] and "data-pwned" not in dom
  pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
  assert (pixels[..., 2] - pixels[..., 0] > 80).any(axis=1).sum() > 200  # columns
  dom, complaints = browse(html.replace("</body>", HOSTILE + "</body>"), tmp_path)  # were escaping broken
  assert "data-pwned" not in dom and any("Content Security Policy" in complaint for complaint in complaints)

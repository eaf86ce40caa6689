"""The report: what it says, what it survives, and what a browser makes of it."""

import base64
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from clip_jax.report import page, plots

CONFIG = {
  "model": {"name": "ViT-Ti-8", "vision": {"width": 192}},
  "loss": {"name": "softmax"},
  "train": {"global_batch_size": 256, "steps": 120},
  "data": {"path": None},
}
HOSTILE = """</script><script>document.documentElement.dataset.pwned="yes"</script>
<img src=x onerror="document.documentElement.dataset.pwned='yes'">"'&"""


def training_line(step, **changed):
  line = {
    "step": step,
    "samples_seen": 256 * step,
    "time": 1.79e9 + step,
    "loss": 5.5 * math.exp(-step / 60) + 0.3,
    "learning_rate": 1e-3 * (1 - step / 200),
    "logit_scale": 14.3 + step / 10,
    "gradient_norm": 1.0 + 0.1 * math.sin(step),
    "parameter_norm": 60.0 + step / 100,
    "samples_per_second": 512.0,
    "data_wait": 0.02,
  }
  return {**line, **changed}


def evaluation_line(step, recall=0.5, set_="emoji_unseen", **more):
  line = {"step": step, "samples_seen": 256 * step, "time": 1.79e9 + step}
  for direction in ("text_to_image", "image_to_text"):
    for k, chance in ((10, 0.05), (1, 0.005), (5, 0.025)):
      line[f"eval/{set_}/{direction}_R@{k}"] = recall * (0.5 + k / 20)
      line[f"eval/{set_}/{direction}_R@{k}/chance"] = chance
  line[f"eval/{set_}/nearest_pixels_R@5"] = 0.1875
  return line | more


def picture(seed) -> str:
  """A drawing as a data URI."""
  dice = random.Random(seed)
  image = Image.new("RGB", (48, 48), "white")
  colour = tuple(dice.randrange(200) for _ in range(3))
  ImageDraw.Draw(image).ellipse([dice.randrange(16), 8, 40, dice.randrange(24, 44)], fill=colour)
  file = io.BytesIO()
  image.save(file, "PNG")
  return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def examples(count=6, caption="red apple", image=None):
  top = [{"caption": f"{caption} {i}", "score": 0.4 - i / 20, "correct": i == 2} for i in range(5)]
  query = {"set": "emoji_unseen", "caption": caption, "top": top}
  return {
    "retrieval": [query | {"image": image or picture(i)} for i in range(count)],
    "similarity": {
      "set": "emoji_unseen",
      "images": [image or picture(i) for i in range(count)],
      "captions": [f"{caption} {i}" for i in range(count)],
      "matrix": (np.eye(count) * 0.25 + 0.0625).tolist(),
    },
  }


def make(workdir, lines, config=CONFIG, tail="", **optional):
  """A work directory; `optional` are contents of examples.json and environment.json."""
  (workdir / "config.json").write_text(json.dumps(config))
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
  for name, content in optional.items():
    (workdir / f"{name}.json").write_text(json.dumps(content))
  return workdir


def full_run(workdir, **optional):
  lines = []
  for step in range(1, 121):
    lines.append(training_line(step))
    if step % 20 == 0:
      lines.append(evaluation_line(step, step / 200))
  defaults = {"examples": examples(), "environment": {"device_kind": "cpu", "device_count": 1}}
  return make(workdir, lines, **(defaults | optional))


class Tags(HTMLParser):
  """Every tag with its attributes, and the text a reader sees."""

  def __init__(self, html):
    super().__init__()
    self.tags, self.words, self.silent = [], [], False
    self.feed(html)
    self.text = re.sub(r"\s+", " ", " ".join(self.words))

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    self.silent = tag in ("script", "style")

  def handle_endtag(self, tag):
    self.silent = False

  def handle_data(self, data):
    if not self.silent:
      self.words.append(data)

  def attributes(self, name):
    return [attributes[name] for _, attributes in self.tags if name in attributes]

  def paths(self, css):
    return [a["d"] for tag, a in self.tags if tag == "path" and a.get("class") == css]


def written(workdir) -> Tags:
  return Tags(page.write(workdir).read_text(encoding="utf-8"))


# What it says


def test_rows_stand_in_reading_order_with_chance_and_yardstick():
  metrics = evaluation_line(10, 0.5, "second") | evaluation_line(10, 1.0, "first")
  metrics |= {"loss": 1.0, "eval/groups/acc1": 0.5, "eval/groups/acc1/chance": 0.125}
  rows = page.results_table(metrics)
  assert [row.name for row in rows] == [
    f"{set_} {direction} R@{k}"
    for set_ in ("second", "first")
    for direction in ("image → text", "text → image")
    for k in (1, 5, 10)
  ] + ["groups acc1"]
  assert (rows[1].value, rows[1].chance, rows[1].yardstick) == (0.375, 0.025, 0.1875)
  assert (rows[-1].value, rows[-1].chance, rows[-1].yardstick) == (0.5, 0.125, None)
  assert [row.yardstick for row in rows].count(None) == len(rows) - 2
  assert rows[1].text(rows[1].value) == "37.5%"


def test_rows_of_keys_nobody_thought_of():
  rows = page.results_table(
    {
      "eval/vtab/pets/accuracy": 0.25,  # a set with a slash
      "eval/coco/image_to_text_median_rank": 3.0,  # not a share
      "eval/acc1": 0.75,  # no set
      "eval/alone/nearest_pixels_R@1": 0.5,  # a yardstick of nothing
      "eval/alone/acc1/chance": 0.1,  # a chance of nothing
    }
  )
  assert [(row.name, row.text(row.value)) for row in rows] == [
    ("vtab/pets accuracy", "25.0%"),
    ("coco image → text median rank", "3"),
    ("acc1", "75.0%"),
    ("alone nearest pixels R@1", "50.0%"),
  ]
  assert page.results_table({"loss": 1.0}) == []


def test_one_metric_a_direction_is_charted_r5_if_there_is():
  rows = page.results_table(
    {
      **{f"eval/a/image_to_text_R@{k}": 0.5 for k in (1, 5, 10)},
      "eval/a/text_to_image_R@1": 0.5,
      "eval/b/acc5": 0.5,
      "eval/b/acc1": 0.5,
      "eval/b/median_rank": 4.0,
    }
  )
  assert [row.name for row in page.headline_rows(rows)] == [
    "a image → text R@5",
    "a text → image R@1",
    "b acc1",
  ]


def test_page_of_a_whole_run(tmp_path):
  found = written(full_run(tmp_path))
  assert found.text.count("ViT-Ti-8") >= 2  # heading and configuration
  assert "step 120 of 120" in found.text and "30.7k" in found.text
  assert "chance, ln 256: 5.545" in found.text
  assert "512" in found.text and "2.0% of the time waiting on data" in found.text
  assert "1 min" in found.text  # 120 steps of 256 samples at 512 a second
  assert "45.0%" in found.text and "2.5%" in found.text and "18.8%" in found.text
  assert [a["alt"] for tag, a in found.tags if tag == "img"].count("red apple") == 6
  assert found.text.count("✓") == 6 + 1  # the sentence that explains it
  assert found.attributes("title").count("0.312") == 6  # 0.3125 on the diagonal
  assert [a["class"] for _, a in found.tags if a.get("title") == "0.312"] == ["own best deep"] * 6
  assert "6 of 6 coincide" in found.text
  assert "vision.width 192" in found.text and "device kind cpu" in found.text
  assert len([a for _, a in found.tags if "chart" in a.get("class", "").split()]) == 8


def test_best_result_is_the_one_farthest_above_chance(tmp_path):
  line = {"eval/easy/acc1": 0.55, "eval/easy/acc1/chance": 0.5}
  line |= {"eval/hard/acc1": 0.4, "eval/hard/acc1/chance": 0.001}
  workdir = make(tmp_path, [training_line(1), evaluation_line(1, 0.0) | line])
  assert "40.0% hard acc1 chance 0.1%" in written(workdir).text


@pytest.mark.parametrize(
  ("loss", "drawn"), [({"name": "softmax"}, True), ({}, True), ({"name": "sigmoid"}, False)]
)
def test_loss_of_chance_is_that_of_the_softmax(tmp_path, loss, drawn):
  workdir = make(tmp_path, [training_line(1)], CONFIG | {"loss": loss})
  assert ("ln 256" in written(workdir).text) is drawn


@pytest.mark.parametrize(
  ("loss", "drawn"), [({"name": "softmax"}, True), ({"max_logit_scale": 150.0}, True), ({"max_logit_scale": None}, False)]
)
def test_the_cap_of_the_logit_scale_is_the_configs(tmp_path, loss, drawn):
  lines = [training_line(s) | {"logit_scale": 95.0 + s / 100} for s in range(1, 30)]
  found = written(make(tmp_path, lines, CONFIG | {"loss": loss}))
  assert bool(re.search(r"\bcap\b", found.text)) is drawn


def test_time_in_steps_leaves_out_the_pause_between_sessions(tmp_path):
  day_later = [training_line(s, time=1.79e9 + 86_400 + s) for s in range(61, 121)]
  found = written(make(tmp_path, [*map(training_line, range(1, 61)), *day_later]))
  assert "1 min time in training steps 1 d from first to last line" in found.text


def test_lines_of_an_abandoned_session_are_replaced(tmp_path):
  lost = [training_line(s, loss=77.0) for s in range(11, 21)]
  lines = [*map(training_line, range(1, 11)), evaluation_line(10), *lost]
  lines += [evaluation_line(15, 0.9, "stale"), evaluation_line(20, 0.9)]
  lines += [training_line(s, loss=2.0) for s in range(11, 14)]
  make(tmp_path, lines)
  run = page.read_run(tmp_path / "metrics.jsonl")
  assert run.curve("loss").values.max() < 10 and list(run.steps) == list(range(1, 14))
  assert list(run.curve("eval/emoji_unseen/image_to_text_R@5").steps) == [10]
  assert run.curve("eval/stale/image_to_text_R@5") is None
  found = written(tmp_path)
  assert "goes back to an earlier step once" in found.text and "stale" not in found.text
  assert "step 13 of 120" in found.text


def test_evaluation_written_just_before_the_line_that_goes_back_is_kept(tmp_path):
  lines = [*map(training_line, range(1, 21)), evaluation_line(15, 0.75), training_line(15)]
  make(tmp_path, lines)
  run = page.read_run(tmp_path / "metrics.jsonl")
  assert list(run.curve("eval/emoji_unseen/image_to_text_R@5").steps) == [15]


def test_training_metrics_may_be_logged_at_different_steps(tmp_path):
  sparse = {"step": 3, "samples_seen": 768, "time": 1.79e9, "parameter_norm": 61.0}
  lines = [training_line(s) for s in (1, 2)] + [
    sparse,
    sparse | {"loss": 2.5, "parameter_norm": 62.0},
  ]
  make(tmp_path, lines)
  run = page.read_run(tmp_path / "metrics.jsonl")
  assert list(run.curve("loss").steps) == [1, 2, 3] and run.curve("loss").values[-1] == 2.5
  assert list(run.curve("learning_rate").steps) == [1, 2]
  assert list(run.curve("parameter_norm").values) == [60.01, 60.02, 62.0]


# What it survives


def test_everything_from_data_is_escaped(tmp_path):
  config = CONFIG | {"model": {"name": HOSTILE}, HOSTILE: {HOSTILE: HOSTILE}}
  hostile_set = evaluation_line(1, set_=HOSTILE) | {f"eval/{HOSTILE}/{HOSTILE}": 0.5}
  workdir = make(
    tmp_path,
    [training_line(1), hostile_set],
    config,
    examples=examples(caption=HOSTILE),
    environment={HOSTILE: HOSTILE},
  )
  found = written(workdir)
  assert [tag for tag, _ in found.tags].count("script") == 1
  assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
  assert {tag for tag, a in found.tags if "src" in a} == {"img"}
  assert found.text.count(re.sub(r"\s+", " ", HOSTILE)) > 20


@pytest.mark.parametrize(
  "uri",
  [
    "https://example.com/a.png",
    "javascript:alert(1)",
    "data:text/html;base64,PHNjcmlwdD4=",
    "data:image/svg+xml;base64,PHN2Zz4=",
    'data:image/png;base64,AAAA" onerror="alert(1)',
    "data:image/png;base64,AAAA\n",
    "data:image/png;base64,",
    "../secret.png",
    17,
  ],
)
def test_only_raster_data_uris_become_images(tmp_path, uri):
  found = written(make(tmp_path, [training_line(1)], examples=examples(2, image=uri)))
  assert not found.attributes("src") and found.text.count("no image") == 4
  accepted = written(make(tmp_path, [training_line(1)], examples=examples(2)))
  assert len(accepted.attributes("src")) == 4


def test_records_that_could_not_be_read_are_named_once_each(tmp_path):
  workdir = full_run(tmp_path)
  assert "could not be read" not in written(workdir).text
  lines = [{"index": i % 60, "key": f"0.tar/{i % 60:03}.jpg", "error": f"cut {HOSTILE}", "substitute": 1} for i in range(70)]
  lines.append({"index": 3, "source": "b/*.tar", "key": "1.tar/003.jpg", "error": "empty", "substitute": 1})
  text = "".join(json.dumps(line) + "\n" for line in lines) + '{"index": 9, "key": "x'
  (workdir / "bad_records.jsonl").write_text(text)
  found = written(workdir)
  assert "61 records were replaced by others; the first 50 are shown" in found.text
  assert found.text.count("0.tar/003.jpg") == 1 and "0.tar/049.jpg" in found.text and "0.tar/050.jpg" not in found.text
  assert not [attributes for tag, attributes in found.tags if "onerror" in attributes]
  (workdir / "bad_records.jsonl").write_text(json.dumps(lines[-1]))
  assert "1 record was replaced by others" in written(workdir).text and "b/*.tar 1.tar/003.jpg empty" in written(workdir).text


def test_nothing_is_loaded_from_anywhere(tmp_path):
  html = page.write(full_run(tmp_path)).read_text()
  found = Tags(html)
  links = found.attributes("src") + found.attributes("href")
  assert links and all(link.startswith(("data:", "#")) for link in links)
  assert not re.search(r"https?://|@import|url\(", html)
  assert found.attributes("http-equiv") == ["Content-Security-Policy"]


def test_a_caption_with_half_a_character(tmp_path):
  workdir = make(tmp_path, [training_line(1)], examples=examples(caption="half \ud83d"))
  assert "half ?" in written(workdir).text


@pytest.mark.parametrize("tail", ['{"step": 3, "samples_se', '{"step": 3}'[:-1], "{", "\x00\x00"])
def test_last_line_that_was_cut_off_is_left_out(tmp_path, tail):
  workdir = make(tmp_path, [training_line(1), training_line(2)], tail=tail)
  assert "step 2 of 120" in written(workdir).text


def test_last_line_without_newline_counts_if_it_is_whole(tmp_path):
  workdir = make(tmp_path, [training_line(1)], tail=json.dumps(training_line(2)))
  assert "step 2 of 120" in written(workdir).text


@pytest.mark.parametrize(
  ("bad", "says"),
  [
    ('{"step": 2, "lo', "line 2: "),
    ("[1, 2]", "line 2: not a JSON object"),
    ('{"step": 2, "time": 0}', "line 2: samples_seen is missing"),
    ('{"step": 2, "samples_seen": 1, "time": 0, "loss": "low"}', "line 2: loss is 'low'"),
    ('{"step": NaN, "samples_seen": 1, "time": 0}', "line 2: step and samples_seen must be finite"),
  ],
)
def test_bad_line_is_named(tmp_path, bad, says):
  make(tmp_path, [training_line(1)], tail=f"{bad}\n{json.dumps(training_line(3))}\n")
  with pytest.raises(ValueError, match="metrics.jsonl, " + re.escape(says)):
    page.write(tmp_path)
  assert not (tmp_path / "report.html").exists()


def test_values_that_are_not_finite_are_gaps_and_are_counted(tmp_path):
  bad = {4: math.nan, 5: math.inf, 6: None, 9: -math.inf, 11: math.nan}
  lines = [training_line(s, loss=bad.get(s, 2.0)) for s in range(1, 12)]
  found = written(make(tmp_path, lines))
  assert "not finite, first at step 4 5×" in found.text
  loss = found.paths("line c1")[0]
  assert loss.count("M") == 3 and loss.endswith("h0")  # steps 1-3, 7-8, and 10 as a dot
  assert found.paths("lost")[0].count("M") == 5


def test_a_run_that_diverged_says_so_on_top(tmp_path):
  lines = [training_line(1, loss=3.25), *(training_line(s, loss=math.nan) for s in (2, 3))]
  found = written(make(tmp_path, lines))
  assert "tile alarm" in found.attributes("class")
  assert "last finite: 3.25 at step 1" in found.text


@pytest.mark.parametrize(
  "lines",
  [
    [training_line(1)],
    [training_line(0, samples_seen=0)],
    [training_line(1), evaluation_line(1)],
    [training_line(1), training_line(2), evaluation_line(1), evaluation_line(2)],
    [evaluation_line(1)],
    [evaluation_line(s) for s in (1, 2, 3)],
    [training_line(s, **dict.fromkeys(page.TRAINING_CHARTS, math.nan)) for s in (1, 2)],
    [training_line(s, loss=0.0, gradient_norm=0.0, samples_per_second=0.0) for s in (1, 2)],
    [training_line(s, loss=-1e300 * (-1) ** s, gradient_norm=10.0**s) for s in range(1, 300)],
    [{"step": 1, "samples_seen": 1, "time": math.nan}],
    [training_line(1, unheard_of="text", nested={"a": 1})],
  ],
)
def test_few_and_odd_points(tmp_path, lines):
  found = written(make(tmp_path, lines))
  for d in (a["d"] for tag, a in found.tags if tag == "path"):
    numbers = [float(n) for n in re.findall(r"-?[\d.]+", d)]
    assert "nan" not in d and all(0 <= n <= plots.WIDTH for n in numbers)
  for position in found.attributes("style"):
    assert 0 <= float(re.search(r"[\d.]+", position).group()) <= 100


def test_a_single_point_is_a_dot(tmp_path):
  found = written(make(tmp_path, [training_line(1)]))
  assert all(re.fullmatch(r"M2000 \d+h0", d) for d in found.paths("dot c1"))
  assert len(found.paths("dot c1")) == len(page.TRAINING_CHARTS)


def test_missing_optional_files_leave_a_sentence(tmp_path):
  found = written(make(tmp_path, [training_line(1)]))
  for sentence in (
    "Nothing has been evaluated yet.",
    "No accuracy or recall was logged.",
    "No retrieval examples were written.",
    "No similarities were written.",
    "The environment was not recorded.",
  ):
    assert sentence in found.text
  only_loss = {k: training_line(1)[k] for k in ("step", "samples_seen", "time", "loss")}
  found = written(make(tmp_path, [only_loss]))
  assert "Not logged: learning rate, logit scale, gradient norm," in found.text


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_missing_required_file_is_named(tmp_path, name):
  make(tmp_path, [training_line(1)])
  (tmp_path / name).unlink()
  with pytest.raises(FileNotFoundError, match=f"{name} is missing; a report is made from"):
    page.write(tmp_path)


@pytest.mark.parametrize(
  ("name", "content", "says"),
  [
    ("config.json", "{", "config.json is not JSON"),
    ("config.json", "[]", "config.json holds a list"),
    ("metrics.jsonl", "", "metrics.jsonl holds no complete line"),
    ("examples.json", '{"retrieval": [{"set": "a"}]}', "examples.json .*'top'"),
    ("examples.json", '{"retrieval": {"set": "a"}}', "examples.json does not have"),
    (
      "examples.json",
      '{"similarity": {"set": "a", "images": [], "captions": ["b"], "matrix": [[1]]}}',
      "examples.json .*0 images and 1 captions",
    ),
  ],
)
def test_malformed_file_is_named(tmp_path, name, content, says):
  make(tmp_path, [training_line(1)])
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=says):
    page.write(tmp_path)


def test_scores_that_are_not_finite(tmp_path):
  content = examples(2)
  content["retrieval"][0]["top"][0]["score"] = math.nan
  content["similarity"]["matrix"] = [[math.nan, 0.5], [None, math.inf]]
  found = written(make(tmp_path, [training_line(1)], examples=content))
  assert found.attributes("title") == ["–", "–", "0.500", "–"]


def test_page_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
  workdir = make(tmp_path, [training_line(1)])
  before = page.write(workdir).read_bytes()
  assert page.write(workdir).read_bytes() == before  # nothing in it depends on when it was made
  make(tmp_path, [training_line(1), training_line(2)])

  def fail(*_):
    raise OSError("disk full")

  monkeypatch.setattr(os, "replace", fail)
  with pytest.raises(OSError, match="disk full"):
    page.write(workdir)
  assert (workdir / "report.html").read_bytes() == before
  assert sorted(p.name for p in workdir.iterdir()) == [
    "config.json",
    "metrics.jsonl",
    "report.html",
  ]


def test_long_log_stays_small_and_keeps_its_spike(tmp_path):
  lines = (
    training_line(s, loss=2.0 + (41.125 if s == 7_777 else s % 7 / 10)) for s in range(1, 20_001)
  )
  path = page.write(make(tmp_path, lines))
  assert path.stat().st_size < 500_000
  assert "|43.12|" in path.read_text()


# Numbers


@given(st.lists(st.floats(), min_size=1, max_size=3_000), st.integers(10, 200))
def test_thinned_rows_keep_extremes_ends_and_gaps(values, limit):
  values = np.array(values)
  rows = plots.thin(values, limit)
  assert np.all(np.diff(rows) > 0) and len(rows) <= 1.5 * limit + 2
  assert rows[0] == 0 and rows[-1] == len(values) - 1
  finite = values[np.isfinite(values)]
  kept = values[rows]
  assert (len(finite) < len(values)) == (not np.isfinite(kept).all())
  if len(finite):
    kept = kept[np.isfinite(kept)]
    assert (kept.min(), kept.max()) == (finite.min(), finite.max())


def test_smoothing_ignores_a_spike_and_keeps_the_start():
  n = 1_000
  values = np.linspace(8.0, 2.0, n)
  values[500], values[700] = 1e12, np.nan
  samples, medians, lines = plots.smooth(plots.Curve(np.arange(n), np.arange(n) * 4.0, values))
  want = np.interp(samples / 4, np.arange(n), np.linspace(8.0, 2.0, n))
  assert len(medians) == plots.BINS and lines == 51
  assert medians[0] == 8.0
  inner = slice(0, int(0.97 * plots.BINS))  # the last window has no right half
  np.testing.assert_allclose(medians[inner], want[inner], atol=0.01)


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12))
def test_ticks_are_few_round_and_inside(low, width):
  high = low + width
  assume(high - low > 1e-6 * max(abs(low), abs(high)))  # charts widen any other axis first
  marks = plots.ticks(low, high)
  step = plots.tick_step(low, high)
  assert 2 <= len(marks) <= 6
  assert all(low - step * 1e-6 <= mark <= high + step * 1e-6 for mark in marks)
  assert f"{step:.0e}"[0] in "125"


@pytest.mark.parametrize(
  ("form", "value", "text"),
  [
    (plots.percent, 0.68251, "68.3%"),
    (plots.percent, 0.0003, "0.03%"),
    (plots.percent, 0.0, "0.0%"),
    (plots.percent, 1.0, "100.0%"),
    (plots.percent, math.nan, "not finite"),
    (plots.number, 6.9314, "6.931"),
    (plots.number, 12_345.6, "12,346"),
    (plots.number, 0.000125, "1.25e-4"),
    (plots.number, 5e-4, "5e-4"),
    (plots.number, -math.inf, "not finite"),
    (plots.compact, 999_999, "1M"),
    (plots.compact, 307_200, "307.2k"),
    (plots.compact, 12.8e9, "12.8B"),
    (plots.compact, 0, "0"),
    (page.duration, 0.2, "0 s"),
    (page.duration, 61, "1 min 1 s"),
    (page.duration, 3_600, "1 h"),
    (page.duration, 93_784, "1 d 2 h"),
  ],
)
def test_numbers_as_people_write_them(form, value, text):
  assert form(value) == text


@pytest.mark.parametrize(
  ("values", "labels", "options"),
  [
    ([0.5, 3.9], ["0", "1", "2", "3", "4"], {"from_zero": True}),
    ([0.9, 1.4], ["0.9", "1.0", "1.1", "1.2", "1.3", "1.4"], {}),
    ([1e-4, 5e-4], ["0", "1e-4", "2e-4", "3e-4", "4e-4", "5e-4"], {"from_zero": True}),
    ([200, 45_000], ["0", "10k", "20k", "30k", "40k", "50k"], {}),
    ([0.01, 0.71], ["0%", "20%", "40%", "60%", "80%"], {"form": plots.percent, "from_zero": True}),
    ([0.001, 0.013], ["0%", "0.5%", "1.0%", "1.5%"], {"form": plots.percent}),
    ([1.0] * 40 + [5_000.0], ["1", "10", "100", "1,000", "1e4"], {"may_be_log": True}),
    ([3.0, 3.0], ["2.6", "2.8", "3.0", "3.2", "3.4"], {}),
  ],
)
def test_vertical_axis(values, labels, options):
  steps = np.arange(len(values))
  curve = plots.Curve(steps, steps * 10.0, np.array(values, dtype=float))
  drawn = plots.chart("", [plots.Line("", curve)], (0.0, 10.0 * len(values)), **options)
  assert [tick.label for tick in drawn.y_ticks] == labels
  assert drawn.y_ticks[0].position == 0 and drawn.y_ticks[-1].position == pytest.approx(100)


# What a browser makes of it


def browser() -> str:
  """A Chromium that can read what pytest writes; skips the test where there is none."""
  names = ("chromium", "chromium-browser", "google-chrome")
  for path in filter(None, map(shutil.which, names)):
    with open(path, "rb") as file:
      # A snap (or Ubuntu's script that starts one) has a /tmp of its own.
      if "snap" not in os.path.realpath(path) and b"/snap/" not in file.read(4_096):
        return path
  pytest.skip(f"no {', '.join(names)} on the PATH, or only as a snap")


def browse(html, folder, *more):
  """Opens a page in headless Chromium: (document after its script ran, complaints)."""
  path, profile = folder / "opened.html", folder / "profile"
  path.write_text(html, encoding="utf-8")
  profile.mkdir(exist_ok=True)
  flags = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--enable-logging=stderr", "--dump-dom"),
    *(f"--user-data-dir={profile}", *more, path.as_uri()),
  ]
  done = subprocess.run([browser(), *flags], capture_output=True, timeout=60, check=True)
  return done.stdout.decode(), re.findall(r"CONSOLE.*", done.stderr.decode())


def test_browser_draws_the_page(tmp_path):
  html = page.write(full_run(tmp_path)).read_text()
  shot = tmp_path / "shot.png"
  dom, complaints = browse(html, tmp_path, f"--screenshot={shot}", "--window-size=1200,2400")
  assert complaints == []
  assert 'data-ready="8"' in dom  # set by the last line of the page's script: its charts
  found = Tags(dom)
  assert len([a for _, a in found.tags if "query" in a.get("class", "").split()]) == 6
  assert len(found.paths("line c1")) == 8
  pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
  assert pixels.shape == (2400, 1200, 3)
  blue = (pixels[..., 2] - pixels[..., 0] > 80).sum(axis=1)
  assert (blue > 0).sum() > 300  # curves and bars over much of the height
  assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200


def test_browser_runs_no_script_but_the_page_s_own(tmp_path):
  workdir = full_run(tmp_path, examples=examples(caption=HOSTILE))
  html = page.write(workdir).read_text()
  dom, _ = browse(html, tmp_path)
  assert 'data-ready="8"' in dom and "data-pwned" not in dom
  # Even where escaping is broken, here by hand, the page's policy holds; without it, it would not.
  broken = html.replace("</body>", HOSTILE + "</body>")
  dom, complaints = browse(broken, tmp_path)
  assert 'data-ready="8"' in dom and "data-pwned" not in dom
  assert any("Content Security Policy" in complaint for complaint in complaints)
  dom, _ = browse(re.sub("<meta http-equiv[^>]*>", "", broken), tmp_path)
  assert "data-pwned" in dom


def test_pointing_at_a_chart_reads_all_of_them(tmp_path):
  html = page.write(full_run(tmp_path)).read_text()
  probe = """<script>
    const box = document.querySelector(".plot").getBoundingClientRect();
    const at = { clientX: box.left + box.width * 60.3 / 120, clientY: box.top + 5, bubbles: true };
    document.querySelector(".plot").dispatchEvent(new PointerEvent("pointermove", at));
    const cell = document.querySelector(".map").rows[3].cells[2];
    cell.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
  </script>"""
  open_page = re.sub("<meta http-equiv[^>]*>", "", html).replace("</body>", probe + "</body>")
  dom, complaints = browse(open_page, tmp_path)
  assert complaints == []
  found = Tags(dom)
  assert found.text.count("step 60 · 15.36k samples") == 8  # seven of training, one of evaluation
  assert plots.number(training_line(60)["loss"]) in found.text
  assert plots.number(training_line(60)["learning_rate"]) in found.text
  assert "image 2 × red apple 2: 0.062" in found.text

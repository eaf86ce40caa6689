"""The page of a scaling experiment and its charts: that they show what was measured, where it lies, and what they do without."""

import copy
import csv
import io
import json
import math
import re
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from clip_jax.errors import UsageError
from clip_jax.report import scaling_axes, scaling_page, scaling_plots
from clip_jax.report.scaling_results import read_optimal
from tests.report.test_page import HOSTILE, Tags, browse, training_line

MODELS = {"S": 0.0022, "M": 0.011, "L": 0.0399}
DATA = ("one-artist", "two-artists")
SAMPLES = (32_000, 96_000, 288_000)
BETA, ALPHA = 1.5, -0.2
SVG = "{http://www.w3.org/2000/svg}"


def line(compute):
  return BETA * compute**ALPHA


def runs():
  found = []
  for arch, gmacs in MODELS.items():
    for data in DATA:
      for samples in SAMPLES:
        longest = samples == SAMPLES[-1]
        found.append({
          "name": f"{arch}_{data}_{samples // 1000}k",
          "recipe": "configs/quickstart.py",
          "overrides": {},
          "arch": arch,
          "data": data,
          "parent": "" if longest else f"{arch}_{data}_{SAMPLES[-1] // 1000}k",
          "fork_step": 0 if longest else int(0.8 * samples / 128),
          "gmacs": gmacs,
          "parameters": 5e6 * gmacs / 0.04,
          "samples": samples,
          "own_samples": samples if longest else samples - 128 * int(0.8 * samples / 128),
          "steps": samples // 128,
          "global_batch_size": 128,
          "learning_rate": 0.001,
          "width": 256,
          "command": "python main.py",
        })
  return found


def points():
  dice = np.random.default_rng(0)
  keys = ("name", "arch", "data", "samples", "gmacs")
  found = [{key: run[key] for key in keys} | {"compute": run["gmacs"] * run["samples"]} for run in runs()]
  return [one | {"error": line(one["compute"]) * float(dice.uniform(0.95, 1.15))} for one in found]


def law(method="frontier", group=None, **changed):
  known = points()
  computes = [one["compute"] for one in known]
  edges = np.geomspace(min(computes), 10**0.1 * max(computes), 6)
  fitted = []
  for low, high in zip(edges[:-1], edges[1:], strict=True):
    inside = [one for one in known if low <= one["compute"] < high]
    best = min(inside, key=lambda one: one["error"])
    fitted.append({"compute": math.sqrt(low * high), "error": best["error"], "name": best["name"]})

  def place(compute, margin):
    return {"compute": compute, "error": line(compute), "low": line(compute) / margin, "high": line(compute) * margin}

  return {
    "group": group,
    "task": "emoji_seen",
    "metric": "image_retrieval_recall@5",
    "method": method,
    "n": len(known),
    "beta": BETA,
    "alpha": ALPHA,
    "limit": 0.0,
    "beta_ci": [1.2, 1.8],
    "alpha_ci": [-0.234, -0.166],
    "limit_ci": None,
    "mae": 0.0042,
    "leave_one_out": 0.0123,
    "residuals": [0.0] * len(fitted),
    "points": known,
    "fitted": fitted,
    "curve": [place(float(c), 1.05) for c in np.geomspace(min(computes), 10 * max(computes), 40)],
    "forecast": [place(20 * max(computes), 1.2)],
  } | changed


def optimal():
  best, found = math.inf, []
  for one in sorted(points(), key=lambda one: one["compute"]):
    if one["error"] < best:
      best = one["error"]
      found.append(one)
  budgets = [{"compute": c, "gmacs": c**0.4 / 100, "samples": 100 * c**0.6, "error": line(c)} for c in (1e2, 1e3, 1e4)]
  return {"task": "emoji_seen", "metric": "image_retrieval_recall@5", "frontier": found, "gmacs_exponent": 0.41, "samples_exponent": 0.59, "budgets": budgets}


def whole():
  return {"format": 1, "laws": [law(), law("all", alpha=-0.19)], "optimal": [optimal()]}


def sweep(**changed):
  return {"format": 1, "sweep": "emoji_grid", "runs": runs()} | changed


def folder(path, done=18, laws=None, logged=18):
  """The folder of a sweep of which some runs are done, and some have begun."""
  (path / "sweep.json").write_text(json.dumps(sweep()))
  if laws is not None:
    (path / "laws.json").write_text(json.dumps(laws))
  with (path / "results.csv").open("w", newline="") as file:
    table = csv.writer(file)
    table.writerows([("arch", "name"), *((run["arch"], run["name"]) for run in runs()[:done])])
  for run in runs()[:logged]:
    place = path / "runs" / run["name"]
    place.mkdir(parents=True)
    lines = [
      training_line(step, samples_seen=128 * step, loss=4 * (1 + step) ** -0.2 * (1 + 0.1 / (1 + 100 * run["gmacs"])))
      for step in range(10, run["steps"] + 1, 10)
    ]
    (place / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    (place / "report.html").write_text("")
  return path


def rendered(laws=None, runs_=None, **known) -> Tags:
  return Tags(scaling_page.render(runs_ or sweep(), whole() if laws is None else laws, scaling_page.Folder(**known)))


def sections(tags):
  return [attributes["id"] for tag, attributes in tags.tags if tag == "section" and "id" in attributes]


class Drawn:
  """A chart as it was drawn, read back."""

  def __init__(self, svg):
    self.root = ET.fromstring(svg)
    self.words = [node.text for node in self.root.iter(f"{SVG}text")]

  def marks(self, css):
    """What a pointer is told of each mark, and where it is."""
    found = []
    for node in self.root.iter(f"{SVG}g"):
      if node.get("class") == css:
        x, y = re.fullmatch(r"translate\(([\d.]+) ([\d.]+)\)", node.get("transform")).groups()
        found.append((node.find(f"{SVG}title").text, float(x), float(y)))
    return found

  def ticks(self, axis):
    """Where each label of an axis is."""
    ticks = [node for node in self.root.iter(f"{SVG}text") if f"tick-{axis}" in node.get("class")]
    return {node.text: float(node.get("x")) if axis == "x" else float(node.get("y")) - 4 for node in ticks}

  def lines(self, css):
    paths = [node for node in self.root.iter(f"{SVG}path") if node.get("class") == css]
    return [([tuple(map(float, p.split())) for p in re.findall(r"[\d.]+ [\d.]+", node.get("d"))], node) for node in paths]


def written(label):
  """The number on an axis."""
  units = {"k": 1e3, "M": 1e6, "B": 1e9}
  return float(label.rstrip("kMB").replace(",", "").replace("−", "-")) * units.get(label[-1], 1)


def scale(ticks):
  """What a position on a logarithmic axis stands for, from two of its labels."""
  (a, at_a), *_, (b, at_b) = ((written(text), at) for text, at in ticks.items())
  return lambda at: math.exp(math.log(a) + (at - at_a) / (at_b - at_a) * math.log(b / a))


# Charts


def test_runs_lie_where_their_compute_and_error_are():
  chart = Drawn(scaling_plots.law_svg([law()]))
  x, y = scale(chart.ticks("x")), scale(chart.ticks("y"))
  marks = chart.marks("point")
  assert len(marks) == 18
  for one, (told, at_x, at_y) in zip(points(), marks, strict=True):
    assert told.startswith(f"{one['name']}, {one['samples'] // 1000}k samples: error 0.")
    assert x(at_x) == pytest.approx(one["compute"], rel=0.01) and y(at_y) == pytest.approx(one["error"], rel=0.005)


@pytest.mark.parametrize("low, high", [(0.62, 0.85), (0.2, 0.9), (3, 40), (1e-5, 0.02), (1, 3e7), (2e9, 8e14), (5, 5)])
def test_ticks_are_round_enough_and_not_too_many(low, high):
  found = scaling_axes.ticks(low / 1.06, high * 1.06, 7)
  assert 1 <= len(found) <= 8 and found == sorted(set(found))
  assert all(low / 1.07 <= tick <= high * 1.07 for tick in found)
  assert len(found) >= 3 or high == low
  assert all(float(f"{tick:.2g}") == pytest.approx(tick) for tick in found)


def test_all_ticks_of_an_axis_are_on_one_logarithmic_scale():
  for changed in ({}, {"points": [one | {"compute": one["compute"] ** 3} for one in points()], "fitted": [], "curve": [], "forecast": []}):
    chart = Drawn(scaling_plots.law_svg([law(**changed)]))
    for axis in "xy":
      ticks = chart.ticks(axis)
      value = scale(ticks)
      assert len(ticks) >= 3
      assert all(value(at) == pytest.approx(written(text), rel=0.02) for text, at in ticks.items())


def test_the_frontier_is_ringed_where_it_is_and_crossed_where_the_fit_puts_it():
  one = law()
  chart = Drawn(scaling_plots.law_svg([one, law("all")]))
  x, y = scale(chart.ticks("x")), scale(chart.ticks("y"))
  rings, crosses = chart.marks("ringed"), chart.marks("centre")
  assert len(rings) == len(crosses) == 5
  known = {point["name"]: point for point in points()}
  for fitted, ring, cross in zip(one["fitted"], rings, crosses, strict=True):
    assert x(ring[1]) == pytest.approx(known[fitted["name"]]["compute"], rel=0.01) and ring[0].startswith(fitted["name"])
    assert x(cross[1]) == pytest.approx(fitted["compute"], rel=0.01)
    assert y(ring[2]) == pytest.approx(fitted["error"], rel=0.01) == pytest.approx(y(cross[2]), rel=0.01)
  assert not Drawn(scaling_plots.law_svg([law("all")])).marks("ringed")


def test_the_line_is_the_law_solid_within_the_runs_and_dashed_to_the_forecast():
  one = law()
  chart = Drawn(scaling_plots.law_svg([one]))
  x, y = scale(chart.ticks("x")), scale(chart.ticks("y"))
  (solid, _), (dashed, node) = [(at, n) for at, n in chart.lines("trace") if len(at) > 5]
  assert node.get("stroke-dasharray") and chart.lines("trace")[0]
  most = max(point["compute"] for point in points())
  assert x(solid[0][0]) == pytest.approx(min(point["compute"] for point in points()), rel=0.01)
  assert x(solid[-1][0]) <= 1.02 * most and dashed[0] == solid[-1]
  assert x(dashed[-1][0]) == pytest.approx(20 * most, rel=0.02)
  for at in (*solid, *dashed):
    assert y(at[1]) == pytest.approx(line(x(at[0])), rel=0.01)
  ((told, at_x, at_y),) = chart.marks("forecast")
  assert x(at_x) == pytest.approx(20 * most, rel=0.02) and y(at_y) == pytest.approx(line(20 * most), rel=0.01)
  assert told.startswith("frontier, forecast at ")


def test_the_legend_says_the_law_and_who_is_who():
  words = Drawn(scaling_plots.law_svg([law(group="two-artists"), law("saturating", limit=0.05, alpha_ci=None)])).words
  assert "frontier, two-artists: E = 1.5 C^−0.2 (alpha −0.23 to −0.17)" in words
  assert "saturating: E = 0.05 + 1.5 C^−0.2" in words
  assert {"S", "M", "L", *DATA, "32k to 288k samples seen"} <= set(words)


def test_models_have_colours_data_sets_shapes_and_samples_sizes():
  root = ET.fromstring(scaling_plots.law_svg([law()]))
  marks = [node for node in root.iter(f"{SVG}g") if node.get("class") == "point"]
  of = {}
  for run, node in zip(runs(), marks, strict=True):
    inner = node.find(f"{SVG}g")
    of[run["name"]] = inner.get("fill"), inner[0].tag.removeprefix(SVG), float(inner[0].get("r", 0))
  assert len({of[f"{arch}_one-artist_32k"][0] for arch in MODELS}) == 3
  assert {name.split("_")[1]: shape for name, (_, shape, _) in of.items()} == {"one-artist": "circle", "two-artists": "polygon"}
  assert of["S_one-artist_32k"][2] < of["S_one-artist_96k"][2] < of["S_one-artist_288k"][2]


def contrast(one, other):
  def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue

  low, high = sorted((luminance(one), luminance(other)))
  return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("ground", ["#ffffff", "#1a1c20"])
def test_colours_are_seen_on_white_and_on_the_dark_page(ground):
  assert all(contrast(colour, ground) >= 3 for colour in scaling_axes.COLOURS)
  assert len(set(scaling_axes.COLOURS)) == len(scaling_axes.COLOURS)


@pytest.mark.parametrize(
  "changed",
  [
    {"points": points()[:2], "fitted": [], "beta_ci": None, "alpha_ci": None, "leave_one_out": None},
    {"points": [points()[0]] * 2, "curve": [], "forecast": [], "fitted": []},
    {"points": [one | {"error": 0} for one in points()]},
    {"points": [one | {"name": "", "samples": None, "gmacs": None, "data": ""} for one in points()]},
    {"curve": [one | {"low": None, "high": None} for one in law()["curve"]]},
    {"curve": [one | {"low": 1e-30, "high": 1e30} for one in law()["curve"]]},
  ],
)
def test_everything_is_within_the_frame_whatever_is_missing(changed):
  chart = Drawn(scaling_plots.law_svg([law(**changed)]))
  _, _, width, height = map(float, chart.root.get("viewBox").split())
  for css in ("point", "ringed", "centre", "forecast"):
    assert all(0 < x < width and 0 < y < height for _, x, y in chart.marks(css))
  places = [tuple(map(float, at.split(","))) for node in chart.root.iter(f"{SVG}polygon") for at in node.get("points").split()]
  assert all(-10 < x < width and -10 < y < height for x, y in places) and all(map(math.isfinite, sum(places, ())))
  assert len(chart.marks("point")) == (0 if changed.get("points", [{}])[0].get("error") == 0 else len({str(p) for p in changed.get("points", points())}))


def test_more_models_and_data_sets_than_colours_and_shapes():
  many = [one | {"arch": f"model {i}", "data": f"set {i}"} for i, one in enumerate(points())]
  assert len(Drawn(scaling_plots.law_svg([law(points=many, fitted=[])])).marks("point")) == 18


def test_loss_curves_lie_where_the_losses_are():
  steps = np.arange(1, 11) * 100.0
  one = scaling_plots.Trained("a", "S", "x", steps, 5 * steps**-0.2)
  other = scaling_plots.Trained("b", "L", "y", steps[5:], 4 * steps[5:] ** -0.2)
  chart = Drawn(scaling_plots.curves_svg([one, other]))
  x, y = scale(chart.ticks("x")), scale(chart.ticks("y"))
  for curve, (places, node) in zip((one, other), chart.lines("curve"), strict=True):
    assert [x(at) for at, _ in places] == pytest.approx(list(curve.samples), rel=0.01)
    assert [y(at) for _, at in places] == pytest.approx(list(curve.loss), rel=0.01)
    assert node.find(f"{SVG}title").text == curve.name and bool(node.get("stroke-dasharray")) == (curve.data == "y")


@pytest.mark.parametrize("of", ["error", "gmacs", "samples"])
def test_what_is_best_lies_where_it_is(of):
  (one,) = read_optimal([optimal()])
  chart = Drawn(scaling_plots.optimal_svg(one, of))
  x, y = scale(chart.ticks("x")), scale(chart.ticks("y"))
  for run, (told, at_x, at_y) in zip(one.frontier, chart.marks("point"), strict=True):
    assert told.startswith(run.name) and x(at_x) == pytest.approx(run.compute, rel=0.02)
    assert y(at_y) == pytest.approx(getattr(run, of), rel=0.02)
  ((places, _),) = chart.lines("budgets")
  assert [x(at) for at, _ in places] == pytest.approx([b.compute for b in one.budgets], rel=0.02)
  assert [y(at) for _, at in places] == pytest.approx([getattr(b, of) for b in one.budgets], rel=0.02)


def test_the_lowest_of_each_line_of_learning_rates_is_ringed():
  tried = [
    scaling_plots.Tried(f"{arch}{rate}", arch, "", rate, abs(math.log10(rate / best)) + 1)
    for arch, best in (("S", 1e-3), ("L", 3e-4))
    for rate in (3e-4, 3e-3, 1e-3)
  ]
  chart = Drawn(scaling_plots.transfer_svg(tried, "final loss"))
  x, y = scale(chart.ticks("x")), scale(chart.ticks("y"))
  rings = chart.marks("ringed")
  assert [x(at) for _, at, _ in rings] == pytest.approx([1e-3, 3e-4], rel=0.01)
  assert [y(at) for _, _, at in rings] == pytest.approx([1, 1], rel=0.01)
  places = [at for at, _ in chart.lines("tried")[0][0]]
  assert places == sorted(places) and len(places) == 3


# Files


def test_an_svg_file_stands_alone(tmp_path):
  path = scaling_plots.write(tmp_path / "law.svg", [law()])
  root = ET.parse(path).getroot()
  assert root.tag == f"{SVG}svg" and (root.get("width"), root.get("height")) == ("860", "520")
  assert root[0].tag == f"{SVG}rect" and root[0].get("fill") == "#fff"
  assert not [a for node in root.iter() for a in node.attrib if a == "style" or a.startswith("on") or "href" in a]


@pytest.mark.parametrize("width", [1720, 430])
def test_a_png_is_a_picture_of_the_size_asked_for_with_words_in_it(tmp_path, width):
  pytest.importorskip("resvg_py")
  image = Image.open(scaling_plots.write(tmp_path / "law.PNG", [law()], width=width))
  assert (image.format, image.size) == ("PNG", (width, width * 520 // 860))
  pixels = np.asarray(image.convert("RGB")).astype(int)
  assert (pixels[2, 2] == 255).all()
  for colour in scaling_axes.COLOURS[:3]:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    assert (np.abs(pixels - wanted).max(axis=-1) < 12).sum() > 20
  words = pixels[round(0.94 * image.height) :, width // 2 :]  # the name of the horizontal axis
  assert (words.sum(axis=-1) < 500).sum() > 50


def test_a_png_takes_resvg(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "resvg_py", None)
  with pytest.raises(UsageError, match=r"pip install 'clip_jax\[quickstart\]'"):
    scaling_plots.write(tmp_path / "law.png", [law()])
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "name, laws, message",
  [
    ("law.pdf", [law()], r"law\.pdf ends in neither \.svg nor \.png"),
    ("law", [law()], r"neither \.svg nor \.png"),
    ("law.svg", [], "two finished runs are the fewest"),
    ("law.svg", [law(), law(task="other")], "one task and metric; there are emoji_seen image_retrieval_recall@5, other"),
    ("law.svg", [{"task": "a"}], r"laws\[0\] does not have 'group'"),
  ],
)
def test_what_cannot_be_drawn_is_one_sentence(tmp_path, name, laws, message):
  with pytest.raises(UsageError, match=message) as caught:
    scaling_plots.write(tmp_path / name, laws)
  assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


# The page


def test_the_page_says_what_was_measured():
  tags = rendered(done=frozenset(run["name"] for run in runs()))
  total = sum(run["gmacs"] * run["own_samples"] for run in runs())
  for text in (
    "emoji_grid Scaling experiment: 18 runs .",
    "18 runs done of 18",
    "3 models 0.0022 to 0.0399 GMACs",
    "2 data sets one-artist, two-artists",
    "32k to 288k samples seen",
    f"{total:,.0f}"[:4],
    "emoji_seen text → image R@5",
    "frontier E = 1.5 C^−0.2 1.5 1.2 to 1.8 −0.2 −0.23 to −0.17 0.0042 0.012 18",
    "grows like C 0.41 , and the samples it has seen like C 0.59",
    "M_one-artist_96k from step 600 of M_one-artist_288k",
  ):
    assert text.strip(" .") in tags.text, text
  assert sections(tags) == ["laws", "optimal", "curves", "runs", "methods"]
  assert "missing" not in tags.text and "Nothing has been logged yet." in tags.text


def test_every_run_is_in_the_table_with_its_error():
  text = rendered().text
  for one in points():
    assert re.search(rf"{one['name']} .*?{one['arch']} {one['data']} {one['samples'] // 1000}k", text)
    assert f"{one['error']:.3g}" in text
  for fitted in law()["fitted"]:
    assert re.search(rf"{fitted['name']} [\d,.]+ [\d,.]+ {fitted['error']:.3g}", text)


def test_laws_of_one_task_and_metric_share_a_chart():
  laws = [law(), law("all"), law(metric="acc1"), law(group="one-artist"), law(task="other", group="two-artists")]
  tags = rendered({"laws": laws})
  charts = [a["aria-label"] for tag, a in tags.tags if tag == "svg"]
  assert [label.partition(":")[0] for label in charts] == [
    "error against compute, emoji_seen image_retrieval_recall@5",
    "error against compute, emoji_seen acc1",
    "error against compute, other image_retrieval_recall@5",
  ]
  assert "frontier, one-artist" in charts[0] and "optimal" not in sections(tags)


def test_only_a_saturating_law_has_a_limit():
  assert "limit" not in rendered({"laws": [law()]}).text.partition("What the methods are")[0]
  text = rendered({"laws": [law(), law("saturating", limit=0.0512, limit_ci=[0.01, 0.08])]}).text
  assert "0.0512 0.01 to 0.08" in text


def test_an_unfinished_sweep_says_how_many_runs_are_missing(tmp_path):
  path = scaling_page.write(folder(tmp_path, done=7, logged=9, laws=whole()))
  tags = Tags(path.read_text(encoding="utf-8"))
  assert path == tmp_path / "report.html"
  assert "of which 11 are missing" in tags.text and "7 runs done of 18; 11 missing" in tags.text
  assert tags.text.count("not finished") == 11 and "of 9 runs nothing is logged yet" in tags.text
  assert len([1 for tag, a in tags.tags if tag == "path" and a.get("class") == "curve"]) == 9


@pytest.mark.parametrize("laws", [None, {"format": 1, "laws": [], "optimal": []}])
def test_without_laws_the_page_says_so(tmp_path, laws):
  tags = Tags(scaling_page.write(folder(tmp_path, done=1, laws=laws)).read_text(encoding="utf-8"))
  assert "No law has been fitted: it takes at least two finished runs" in tags.text
  assert sections(tags) == ["laws", "curves", "runs", "methods"]


def test_a_sweep_that_has_not_begun(tmp_path):
  (tmp_path / "sweep.json").write_text(json.dumps(sweep()))
  text = Tags(scaling_page.write(tmp_path).read_text(encoding="utf-8")).text
  assert "of which 18 are missing" in text and "0 of it done" in text and "Nothing has been logged yet." in text
  assert "The sweep has no runs." in rendered({}, {"runs": []}).text


def test_forks_show_only_what_they_trained_themselves(tmp_path):
  html = scaling_page.write(folder(tmp_path, laws=whole())).read_text(encoding="utf-8")
  (svg,) = [one for one in re.findall(r"<svg.*?</svg>", html, re.DOTALL) if "training loss" in one]
  chart = Drawn(svg)
  x = scale(chart.ticks("x"))
  for run, (places, _) in zip(runs(), chart.lines("curve"), strict=True):
    # Of each ten steps a line is logged.
    assert x(places[0][0]) == pytest.approx(128 * (10 + run["fork_step"] // 10 * 10), rel=0.02)
    assert x(places[-1][0]) == pytest.approx(run["samples"], rel=0.02)


def test_reports_of_runs_are_linked(tmp_path):
  tags = Tags(scaling_page.write(folder(tmp_path, logged=3, laws={"laws": [law()]})).read_text(encoding="utf-8"))
  links = {link for link in tags.attributes("href") if link.startswith("runs/")}
  assert links == {f"runs/{run['name']}/report.html" for run in runs()[:3]}
  assert all((tmp_path / link).is_file() for link in links)


def test_a_final_loss_is_the_median_of_the_last_lines():
  curve = scaling_plots.Trained("a", "S", "x", np.arange(200.0), np.concatenate([np.ones(191), [9], np.full(8, 0.5)]))
  assert scaling_page._final(curve) == 0.5


def test_learning_rates_have_a_section_only_where_they_vary_alone(tmp_path):
  assert "transfer" not in sections(rendered())
  some = runs()
  for run in some:
    run["learning_rate"] = 0.001 * (1 + list(MODELS).index(run["arch"]))  # each model has its own
  assert "transfer" not in sections(rendered(runs_=sweep(runs=some)))
  for i, run in enumerate(some):
    run |= {"samples": 32_000, "data": "one-artist", "learning_rate": 0.001 * 2 ** (i % 6)}
  tags = rendered(runs_=sweep(runs=some))
  assert "transfer" in sections(tags)
  assert [a["aria-label"] for tag, a in tags.tags if tag == "svg"][-1] == "error, emoji_seen, 1 − text → image R@5 against learning rate"


def test_names_are_hostile(tmp_path):
  some, laws = sweep(sweep=HOSTILE), json.loads(json.dumps(whole()).replace("two-artists", "<i>set</i> & \\u0000\\ud800"))
  name = f"../{HOSTILE}"
  some["runs"][0] |= {"name": name, "arch": HOSTILE, "data": HOSTILE, "parent": HOSTILE}
  laws["laws"][0] |= {"task": HOSTILE, "group": HOSTILE, "metric": HOSTILE, "method": HOSTILE}
  laws["laws"][0]["points"][0] |= {"name": name, "arch": HOSTILE, "data": HOSTILE}
  html = scaling_page.render(some, laws, scaling_page.Folder(frozenset([name]), {}, frozenset([name])))
  tags = Tags(html)
  assert not [tag for tag, _ in tags.tags if tag in ("script", "img", "i")]
  assert not [a for _, a in tags.tags if any(key.startswith("on") for key in a)]
  assert HOSTILE.partition("\n")[0] in tags.text and "<i>set</i> &" in tags.text
  assert all(re.fullmatch(r"data:,|#methods|runs/[^/]+/report\.html", link) for link in tags.attributes("href"))
  ET.fromstring(scaling_plots.law_svg(laws["laws"][:1], standalone=True).encode("utf-8"))


def test_the_page_is_self_contained(tmp_path):
  html = scaling_page.write(folder(tmp_path, laws=whole())).read_text(encoding="utf-8")
  assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html and "script" not in html
  assert not re.search(r"(?:src|href)=\"(?:https?:)?//|url\(|@import", html)
  # Of charts in one document no two may have one name.
  assert len(re.findall(r"\bid=\"([^\"]*)\"", html)) == len(set(re.findall(r"\bid=\"([^\"]*)\"", html)))
  assert sorted(path.name for path in tmp_path.iterdir()) == ["laws.json", "report.html", "results.csv", "runs", "sweep.json"]
  assert not re.search(r"\bnan\b|\binf\b|None", re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL))


@pytest.mark.parametrize(
  "file, content, message",
  [
    ("sweep.json", None, r"sweep\.json is missing"),
    ("sweep.json", "{", "cannot be read as JSON"),
    ("sweep.json", '{"format": 2, "runs": []}', "format 2 is not known"),
    ("sweep.json", '{"runs": {}}', "no list of runs"),
    ("sweep.json", '{"runs": [{"name": "a"}]}', r"runs\[0\] does not have"),
    ("sweep.json", json.dumps(sweep(runs=[runs()[0] | {"gmacs": "many"}])), r"runs\[0\].*gmacs is 'many', not a number"),
    ("laws.json", "[]", "holds no JSON object"),
    ("laws.json", '{"laws": 3}', "laws is not a list"),
    ("laws.json", json.dumps({"laws": [law(), law(points=[{"name": "a"}])]}), r"laws\[1\]: points\[0\] does not have 'arch'"),
    ("laws.json", json.dumps({"laws": [law(alpha_ci=[1])]}), r"laws\[0\] does not have the expected shape"),
    ("laws.json", json.dumps({"optimal": [optimal() | {"budgets": [{}]}]}), r"optimal\[0\]: budgets\[0\] does not have the expected shape \(compute is missing\)"),
    ("results.csv", "arch,acc1\na,0.5\n", "has no column name"),
    ("runs/S_one-artist_32k/metrics.jsonl", "{}\n{}\n", "line 1: step is missing"),
  ],
)
def test_a_broken_file_is_one_sentence_that_names_it(tmp_path, file, content, message):
  folder(tmp_path, laws=whole(), logged=1)
  (tmp_path / file).unlink()
  if content is not None:
    (tmp_path / file).write_text(content)
  with pytest.raises(UsageError, match=message) as caught:
    scaling_page.write(tmp_path)
  assert str(tmp_path / file) in str(caught.value) and "\n" not in str(caught.value)
  assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("content", ["", '{"step": 1, "sam'])
def test_a_log_that_is_being_begun_is_none(tmp_path, content):
  folder(tmp_path, laws=whole(), logged=1)
  (tmp_path / "runs" / runs()[0]["name"] / "metrics.jsonl").write_text(content)
  assert "Nothing has been logged yet." in Tags(scaling_page.write(tmp_path).read_text(encoding="utf-8")).text


def test_nothing_given_is_changed():
  some, laws = sweep(), whole()
  before = copy.deepcopy((some, laws))
  scaling_page.render(some, laws)
  assert (some, laws) == before


def test_browser_draws_the_page(tmp_path):
  html = scaling_page.write(folder(tmp_path, laws=whole())).read_text(encoding="utf-8")
  shot = tmp_path / "shot.png"
  dom, complaints = browse(html, tmp_path, f"--screenshot={shot}", "--window-size=1200,3000")
  assert complaints == [] and dom.count("<svg") == 5
  pixels = np.asarray(Image.open(io.BytesIO(shot.read_bytes())).convert("RGB")).astype(int)
  for colour in scaling_axes.COLOURS[:3]:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    assert (np.abs(pixels - wanted).max(axis=-1) < 4).any(axis=1).sum() > 100

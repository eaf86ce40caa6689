"""The page of an evaluation: that its numbers are those given, what it does without some of them, and what hostile names do to it."""

import copy
import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from clip_jax.errors import UsageError
from clip_jax.report import evaluation_page, evaluation_plots, published
from clip_jax.report.evaluation_results import Model, Score
from tests.report.test_page import HOSTILE, Tags, browse, picture

MODELS = ("runs/small", "runs/large")
SETS = ("imagenet1k", "imagenetv2", "imagenet-a")


def row(model, dataset, acc1, **changed):
  return {
    "model": model,
    "pretrained": "step 1800",
    "dataset": dataset,
    "task": "zeroshot_classification",
    "language": "en",
    "split": "test",
    "items": 50_000,
    "metrics": {"acc1": acc1, "acc5": acc1 + 0.2, "ece": 0.0543},
    "standard_errors": {"acc1": 0.0021, "acc5": 0.0012},
    "chance": {"acc1": 0.001, "acc5": 0.005},
    **changed,
  }


def retrieval(model, image=0.4, text=0.6):
  metrics = {f"{kind}_retrieval_recall@{k}": at + k / 50 for kind, at in (("image", image), ("text", text)) for k in (1, 5, 10)}
  return row(model, "flickr30k", 0, task="zeroshot_retrieval", items=1000, metrics=metrics, standard_errors={}, chance={})


def details(model, classes=3, caption="a red apple"):
  top = [{"caption": f"{caption} {i}", "score": 0.4 - i / 20, "correct": i == 2} for i in range(5)]
  return {
    "model": model,
    "dataset": "imagenet1k",
    "task": "zeroshot_classification",
    "confusions": [{"true": "cat", "guess": "dog", "count": 12, "of": 100, "pictures": [picture(1), picture(2)]}],
    "classes": [{"name": f"class {i}", "count": 40, "recall": (i + 0.7) / (classes + 0.5)} for i in range(classes)],
    "reliability": [{"confidence": 0.1 + i / 5, "accuracy": 0.05 + i / 5, "count": 10 + i} for i in range(5)],
    "gallery": [{"image": picture(3), "caption": caption, "top": top}],
  }


def comparison(**changed):
  return {
    "dataset": "imagenet1k",
    "task": "zeroshot_classification",
    "metric": "acc1",
    "models": list(MODELS),
    "values": [0.6102, 0.6311],
    "difference": -0.0209,
    "standard_error": 0.0031,
    "p_value": 0.0004,
    "test": "McNemar's exact test",
    "only_first": 1312,
    "only_second": 2001,
    **changed,
  }


def whole():
  rows = [row(model, dataset, 0.6102 + 0.0209 * i - 0.1 * j) for i, model in enumerate(MODELS) for j, dataset in enumerate(SETS)]
  return {
    "format": 1,
    "rows": [*rows, *map(retrieval, MODELS)],
    "comparisons": [comparison()],
    "details": [details(model) for model in MODELS],
  }


def rendered(results) -> Tags:
  return Tags(evaluation_page.render(results))


def sections(tags):
  return [attributes["id"] for tag, attributes in tags.tags if tag == "section" and "id" in attributes]


def test_the_page_says_what_was_measured():
  tags = rendered(whole())
  for text in (
    "Evaluation of 2 models",
    "runs/large step 1800",
    "63.1% imagenet1k acc1 runs/large",
    "4 data sets 151k items",
    "imagenet1k acc1 · zero-shot classification · test · 50,000 items; chance 0.1% runs/small 61.0 ± 0.2 runs/large 63.1 ± 0.2",
    "OpenAI ViT-B/32 63.2",
    "acc5 81.0 ± 0.1 83.1 ± 0.1 0.5",
    "ECE 5.4 5.4",
    "text → image R@10 60.0 60.0",
    "imagenet1k acc1 runs/small 61.0 runs/large 63.1 −2.1 ± 0.3 0.0004 1,312 2,001 McNemar's exact test",
    "runs/large 53.1%, −10.0",  # on ImageNetV2, and how far that is below ImageNet
    "runs/small ECE 5.4%",
    "cat dog 12 of 100",
    "class 0 20.0% of 40",
    "a red apple 1 0.350",
    "Radford et al. 2021, table 11 OpenAI",
  ):
    assert text in tags.text, text
  assert sections(tags) == ["results", "comparisons", "robustness", "all", "calibration", "confusions", "classes", "gallery", "sources"]


def test_bars_are_as_long_as_their_numbers_on_an_axis_from_zero():
  models = [Model("a", "", "a", "c1"), Model("b", "", "b", "c2")]
  chart = evaluation_plots.bar_chart("set", "acc1", "", [(models[0], Score(0.5, 0.1, 0.05)), (models[1], Score(0.25))])
  assert [tick.label for tick in chart.ticks] == ["0%", "30%", "60%"] and [tick.position for tick in chart.ticks] == [0, 50, 100]
  assert [bar.width for bar in chart.bars] == pytest.approx([100 * 5 / 6, 100 * 2.5 / 6], abs=0.01)
  assert chart.bars[0].whisker == pytest.approx((100 * 4 / 6, 100), abs=0.01) and chart.bars[1].whisker is None
  assert chart.chance.position == pytest.approx(100 * 0.05 / 0.6, abs=0.01)


@pytest.mark.parametrize("value", [0.0, 1e-5, 0.003, 0.999, 1.0, math.nan])
def test_every_bar_is_within_its_frame(value):
  chart = evaluation_plots.bar_chart("", "", "", [(Model("a", "", "a", "c1"), Score(value, 0.01, 0.001))])
  bar = chart.bars[0]
  places = [tick.position for tick in [*chart.ticks, chart.chance]] + [p for p in (bar.width, *(bar.whisker or ())) if p is not None]
  assert all(0 <= place <= 100 for place in places)
  assert (bar.width is None) == math.isnan(value)


def test_points_lie_where_both_accuracies_are():
  point = evaluation_plots.Point("a", "c1", Score(0.6, 0.01), Score(0.5, 0.02))
  plot = evaluation_plots.shift("imagenetv2", "imagenet1k acc1", [point], [])
  at = {float(tick.label[:-1]): tick.position for tick in plot.x_ticks}, {float(tick.label[:-1]): tick.position for tick in plot.y_ticks}
  (spot,) = [mark for mark in plot.marks if mark.css == "spot c1"]
  x, y = (int(v) for v in re.fullmatch(r"M(\d+) (\d+)h0", spot.d).groups())
  assert x / 20 == pytest.approx(at[0][60.0], abs=0.1) and 100 - y / 10 == pytest.approx(at[1][50.0], abs=0.1)
  assert spot.title == "a: 60.0% → 50.0%" and len([mark for mark in plot.marks if mark.css == "thin c1"]) == 2
  line = [int(v) for v in re.fullmatch(r"M(\d+) (\d+)L(\d+) (\d+)", plot.marks[0].d).groups()]
  assert line[0] == 0 and line[2] == 2000  # x = y crosses the whole plot


def test_published_models_are_drawn_from_one_source_each():
  tags = rendered(whole())
  plots = [attributes["aria-label"] for tag, attributes in tags.tags if tag == "svg"]
  assert [label.split()[0] for label in plots] == ["imagenetv2", "imagenet-a", "accuracy"]
  grey = [attributes for tag, attributes in tags.tags if tag == "path" and attributes["class"] in ("spot published", "spot supervised")]
  assert len(grey) == len(published.shifts("imagenetv2")) + len(published.shifts("imagenet-a"))
  for dataset in published.SHIFTED:
    pairs = published.shifts(dataset)
    assert len(pairs) == len({y.model for _, y in pairs}) >= 10
    assert all(x.dataset == "imagenet1k" and (x.model, x.source) == (y.model, y.source) for x, y in pairs)


def test_published_values_are_shares_with_a_source_and_once_a_model():
  for one in published.REFERENCES:
    assert 0 < one.value < 1 and one.source and one.dataset == published.plain(one.dataset)
  for dataset, metric in {(one.dataset, one.metric) for one in published.REFERENCES}:
    names = [one.model for one in published.references(dataset, metric)]
    assert len(names) == len(set(names))
  papers = {one.model: one.value for one in published.references("imagenet1k", "acc1") if "table 11" in one.source}
  assert papers["OpenAI ViT-B/32"] == 0.632 and papers["OpenAI ViT-L/14@336px"] == 0.762


@pytest.mark.parametrize("name", ["imagenet_sketch", "imagenet-sketch", "wds/imagenet_sketch"])
def test_a_data_set_is_known_by_all_its_spellings(name):
  assert published.plain(name) == "imagenet_sketch" and published.references(name, "acc1")


@pytest.mark.parametrize("changed", [{"language": "it"}, {"task": "linear_probe"}, {"dataset": "mine"}])
def test_only_what_is_alike_is_set_beside_published_results(changed):
  tags = rendered({"rows": [row("a", "imagenet1k", 0.63) | changed]})
  assert "OpenAI" not in tags.text and sections(tags) == ["results", "all"]


def test_the_published_results_shown_are_the_nearest():
  text = rendered({"rows": [row("a", "imagenet1k", 0.63)]}).text
  assert re.findall(r"(?:OpenAI|LAION-2B|DataComp-1B) \S+ [\d.]+", text) == ["OpenAI RN50 59.6", "OpenAI ViT-B/32 63.2", "LAION-2B ViT-B/32 66.6"]


@pytest.mark.parametrize("left_out", ["comparisons", "details"])
@pytest.mark.parametrize("empty", ["missing", None, []])
def test_what_is_missing_has_no_section(left_out, empty):
  results = whole()
  if empty == "missing":
    del results[left_out]
  else:
    results[left_out] = empty
  gone = {"comparisons": {"comparisons"}, "details": {"calibration", "confusions", "classes", "gallery"}}[left_out]
  assert set(sections(rendered(whole()))) - set(sections(rendered(results))) == gone


def test_each_part_of_the_details_stands_alone():
  parts = {"reliability": "calibration", "confusions": "confusions", "classes": "classes", "gallery": "gallery"}
  for part, section in parts.items():
    one = {key: details("a")[key] for key in ("model", "dataset", part)}
    assert sections(rendered({"rows": [], "details": [one]})) == ["all", section]


def test_without_rows_the_page_says_so():
  tags = rendered({"rows": []})
  assert "Evaluation of 0 models" in tags.text and "Nothing was evaluated." in tags.text


def test_rows_without_the_optional_keys_and_metrics_of_one_model_only():
  rows = [{"model": "a", "dataset": "mine", "metrics": {"acc1": 0.5}}, {"model": "b", "dataset": "mine", "metrics": {"acc5": 0.75}}]
  tags = rendered({"rows": rows})
  assert "metric a b chance mine acc1 50.0 acc5 75.0" in tags.text


def test_unknown_metrics_are_shown_as_they_are():
  metrics = {"bits_per_byte": 1.2345, "acc1": 0.5, "tail_recall": 0.25}
  tags = rendered({"rows": [row("a", "mine", 0, metrics=metrics, standard_errors={"bits_per_byte": 0.0123}, chance={})]})
  assert "bits per byte 1.234 ± 0.0123" in tags.text and "tail recall 25.0" in tags.text
  tags = rendered({"rows": [row("a", "mine", 0, metrics={"bits_per_byte": 1.5}, standard_errors={}, chance={})]})
  assert "bits per byte 1.5" in tags.text and sections(tags) == ["all"]


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_numbers_that_are_none_are_dashes(nothing):
  results = whole()
  results["rows"][0]["metrics"]["acc1"] = nothing
  results["rows"][1]["standard_errors"]["acc1"] = nothing
  results["rows"][2]["chance"]["acc1"] = nothing
  results["comparisons"][0] |= {"p_value": nothing, "standard_error": nothing, "values": [nothing, 0.5]}
  results["details"][0]["classes"][0]["recall"] = nothing
  results["details"][0]["reliability"][0]["accuracy"] = nothing
  html = evaluation_page.render(results)
  text = Tags(html).text
  assert "runs/small – runs/large 63.1 ± 0.2" in text and "acc1 51.0 53.1 ± 0.2" in text
  assert "runs/small – runs/large 50.0 −2.1 –" in text
  assert not re.search(r"\bnan\b|\binf\b|None", re.sub(r"base64,[^\"]*", "", html))


def test_the_metric_to_see_first():
  def first(task, *metrics):
    rows = [row("a", "mine", 0, task=task, metrics=dict.fromkeys(metrics, 0.5), standard_errors={}, chance={})]
    tags = Tags(evaluation_page.render({"rows": rows}).partition('id="results"')[2].partition("</section>")[0])
    return re.findall(r"mine ([^·]*) ·", tags.text)

  assert first("zeroshot_classification", "ece", "acc5", "acc1") == ["acc1"]
  assert first("zeroshot_classification", "mean_average_precision") == ["mean average precision"]
  assert first("fewshot_linear_probe", "fs5_acc1", "fs10_acc1", "fs1_acc1") == ["fs10 acc1"]
  assert first("image_caption_selection", "image_acc", "text_acc", "acc") == ["acc"]
  recalls = [f"{kind}_retrieval_recall@{k}" for kind in ("text", "image") for k in (1, 10)]
  assert first("zeroshot_retrieval", *recalls) == ["text → image R@1", "image → text R@1"]


def test_many_comparisons_take_smaller_p_values():
  def clear(*p_values):
    tags = rendered(whole() | {"comparisons": [comparison(p_value=p) for p in p_values]})
    return [" clear" in f" {attributes.get('class', '')}" for tag, attributes in tags.tags if tag == "td"].count(True)

  assert clear(0.04) == 1 and clear(0.04, 0.04) == 0 and clear(0.02, 0.04) == 1
  assert "< 0.0001" in rendered(whole() | {"comparisons": [comparison(p_value=1e-30)]}).text


def test_models_of_one_name_are_told_apart_by_their_weights():
  rows = [row("ViT-B-32", "mine", 0.5 + i / 10, pretrained=weights) for i, weights in enumerate(("openai", "laion2b"))]
  text = rendered({"rows": rows, "details": [details("ViT-B-32") | {"pretrained": "laion2b"}]}).text
  assert "ViT-B-32 · openai 50.0 ± 0.2" in text and "ViT-B-32 · laion2b 60.0 ± 0.2" in text
  assert "imagenet1k ViT-B-32 · laion2b" in text


def test_long_paths_are_shortened_beside_bars_while_that_tells_them_apart():
  long = "gs://bucket/experiments/{}/one-long-name"
  text = rendered({"rows": [row(long.format("a"), "mine", 0.5), row("b", "mine", 0.5)]}).text
  assert "…/a/one-long-name 50.0" in text and long.format("a") in text
  rows = [row(f"{kind}/a-name-of-more-than-twenty-four-letters", "mine", 0.5) for kind in ("left", "right")]
  assert "left/a-name-of-more-than-twenty-four-letters 50.0" in rendered({"rows": rows}).text


def test_a_later_row_replaces_an_earlier_one_of_its_own():
  assert "acc1 70.0" in rendered({"rows": [row("a", "mine", 0.5), row("a", "mine", 0.7)]}).text


def test_of_many_the_extremes_are_shown():
  one = details("a", classes=1000)
  one["confusions"] = [{"true": f"t{i}", "guess": "g", "count": i, "of": 50} for i in range(40)]
  one["gallery"] *= 30
  text = rendered({"rows": [], "details": [one]}).text
  assert "the worst class 0 0.1% of 40 class 1 0.2%" in text
  assert "the best class 999 99.9% of 40 class 998" in text and "class 500" not in text
  assert "t39 g 39 of 50 t38" in text and "28 more are in results.json." in text and "6 more are in results.json." in text


def test_names_captions_and_paths_are_hostile(tmp_path):
  results = whole()
  text = json.dumps(results).replace("runs/small", "<b>&' runs").replace("a red apple", "CAPTION").replace("imagenetv2", "<i>set")
  results = json.loads(text)
  results["rows"][0]["metrics"]["<script>alert(1)</script>"] = 0.5
  results["comparisons"][0]["test"] = results["comparisons"][0]["dataset"] = HOSTILE
  one = results["details"][0]
  one["confusions"][0] |= {"true": HOSTILE, "guess": HOSTILE, "pictures": ["javascript:alert(1)", 'data:image/svg+xml,"><script>', picture(1)]}
  one["classes"][0]["name"] = one["gallery"][0]["caption"] = one["gallery"][0]["top"][0]["caption"] = HOSTILE
  one["gallery"][0]["image"] = "https://example.com/a.png"
  html = evaluation_page.render(results)
  tags = Tags(html)
  assert not [tag for tag, _ in tags.tags if tag == "script"]
  assert tags.text.count("<b>&' runs") > 5 and "<i>set" in tags.text and "<script>alert(1)</script>" in tags.text
  assert not [a for _, a in tags.tags if any(key.startswith("on") for key in a)]
  assert all(source.startswith("data:image/png;base64,") for source in tags.attributes("src")) and tags.text.count("no image") == 3
  assert tags.attributes("href") == ["data:,", "#sources"]
  assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html


def test_what_signs_a_url_is_taken_out():
  html = evaluation_page.render({"rows": [row("https://user:secret@host/model?sig=abcdef", "mine", 0.5)]})
  assert "secret" not in html and "abcdef" not in html


def test_writing_puts_the_page_beside_the_results(tmp_path):
  results = whole()
  results["details"][0]["gallery"][0]["caption"] = "\ud800 half"
  path = tmp_path / "evaluation.json"
  path.write_text(json.dumps(results))
  assert evaluation_page.write(path) == tmp_path / "evaluation.html"
  text = (tmp_path / "evaluation.html").read_text(encoding="utf-8")
  assert "? half" in text and sorted(p.name for p in tmp_path.iterdir()) == ["evaluation.html", "evaluation.json"]


@pytest.mark.parametrize(
  "change, message",
  [
    ({"format": 2}, "format 2 is not known"),
    ({"rows": None}, "no list of rows"),
    ({"rows": {}}, "no list of rows"),
    ({"rows": [3]}, r"rows\[0\] does not have the expected shape"),
    ({"rows": [{"model": "a", "dataset": "b"}]}, r"rows\[0\] does not have 'metrics'"),
    ({"rows": [row("a", "b", 0.5), row("a", "b", 0.5, metrics={"acc1": "high"})]}, r"rows\[1\].*acc1 is 'high', not a number"),
    ({"comparisons": "none"}, "comparisons is not a list"),
    ({"comparisons": [comparison(models=["a"])]}, r"comparisons\[0\] does not have the expected shape"),
    ({"details": [{"model": "a"}]}, r"details\[0\] does not have 'dataset'"),
    ({"details": [details("a"), details("a") | {"gallery": [{"image": picture(1)}]}]}, r"gallery of details\[1\]"),
    ({"details": [details("a") | {"classes": [{"name": "a", "recall": "all"}]}]}, "recall is 'all', not a number"),
  ],
)
def test_malformed_results_are_one_sentence_that_says_where(tmp_path, change, message):
  path = tmp_path / "results.json"
  path.write_text(json.dumps(copy.deepcopy(whole()) | change))
  with pytest.raises(UsageError, match=message) as caught:
    evaluation_page.write(path)
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)
  assert not (tmp_path / "results.html").exists()


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_missing_file_and_one_that_is_no_object(tmp_path, content):
  path = tmp_path / "results.json"
  if content is not None:
    path.write_text(content)
  with pytest.raises(UsageError, match=r"results\.json"):
    evaluation_page.write(path)


def test_browser_draws_the_page_and_runs_nothing(tmp_path):
  results = whole()
  results["details"][0]["classes"][0]["name"] = HOSTILE
  html = evaluation_page.render(results)
  shot = tmp_path / "shot.png"
  dom, complaints = browse(html, tmp_path, f"--screenshot={shot}", "--window-size=1200,3000")
  assert complaints == [] and "data-pwned" not in dom
  pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
  assert (pixels[..., 2] - pixels[..., 0] > 80).any(axis=1).sum() > 60  # the first model's bars and dots, blue
  assert (pixels[..., 0] - pixels[..., 2] > 80).any(axis=1).sum() > 60  # the second's, orange

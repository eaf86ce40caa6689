"""Tables of results: what is read is what was written, and what is wrong is said in one line that names its place."""

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_jax.errors import DataError, UsageError
from clip_jax.scaling import table

MODEL = {"arch": "ViT-B-32", "samples_seen": 3e9, "gmacs": 7.4, "gmacs_total": 7.4 * 3e9, "upstream_dataset": "LAION-80M", "name": "a.pt"}


def row(dataset, line=2, **values):
  return table.Row({**dict.fromkeys(table.COLUMNS), "task": "", **MODEL, "downstream_dataset": dataset, **values}, line, "runs.csv")


def shifted(value=0.3, **values):
  return [row(name, line, acc1=value + line / 100, **values) for line, name in enumerate(table.SHIFTED, start=2)]


def written(tmp_path, text):
  path = tmp_path / "runs.csv"
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return path


def test_what_is_written_is_read_again(tmp_path):
  path = tmp_path / "runs.csv"
  rows = [row("imagenet1k", acc1=0.5, name='two "quoted", and\na line', batch="32768"), row("mscoco_captions", 4, gmacs=None)]
  table.write(path, rows)
  assert path.read_text().splitlines()[0] == ",".join([*table.COLUMNS, "batch"])
  found = table.read(path)
  assert [one.line for one in found] == [2, 4]  # the first is two lines long
  assert [one.values for one in found] == [rows[0].values, {**rows[1].values, "batch": ""}]
  table.write(path, [one.values for one in found])
  assert table.read(path) == found


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(1e-3, 1e15), st.text(st.characters(codec="utf-8", exclude_categories=["Cc"])))))
def test_numbers_and_texts_survive(tmp_path_factory, found):
  path = tmp_path_factory.mktemp("tables") / "runs.csv"
  rows = [row("imagenet1k", acc1=share, gmacs=compute, name=text) for share, compute, text in [*found, (0.5, 1.0, "")]]
  table.write(path, rows)
  assert [one.values for one in table.read(path)] == [one.values for one in rows]


def test_nothing_is_written_that_could_not_be_read(tmp_path):
  path = written(tmp_path, "before")
  with pytest.raises(DataError, match="line 3, column acc1: 76.0 must be a share from 0 to 1"):
    table.write(path, [row("imagenet1k", acc1=0.5), row("imagenet1k", acc1=76.0)])
  assert path.read_text() == "before"


def test_files_of_spreadsheets_are_read(tmp_path):
  found = table.read(written(tmp_path, b"\xef\xbb\xbfdownstream_dataset,gmacs_total, acc1\r\nimagenet1k,1e9,\r\n\r\nimagenet-r,2e9,1\r\n"))
  assert [(one.line, one.values) for one in found] == [
    (2, {"downstream_dataset": "imagenet1k", "gmacs_total": 1e9, "acc1": None}),
    (4, {"downstream_dataset": "imagenet-r", "gmacs_total": 2e9, "acc1": 1.0}),
  ]


HEAD = "downstream_dataset,gmacs,samples_seen,acc1\n"


@pytest.mark.parametrize(
  "text, message",
  [
    ("", "is empty; its first line must name columns"),
    ("\n\n", "is empty"),
    (b"\xff\xfe\x00d", "is no CSV file in UTF-8: byte 0"),
    (b"PAR1\x00\x00", "has no header"),
    ("imagenet1k,7.4,1e9,0.5\n", "has no header"),
    (HEAD.replace(",", ";"), "has no header: its first line must name columns, separated by commas"),
    ("dataset,gmacs,samples_seen,acc1\n", "has no column downstream_dataset"),
    ("downstream_dataset,gmacs,acc1\n", "has no column samples_seen; it needs both gmacs and samples_seen, or gmacs_total"),
    ("downstream_dataset,acc1\n", "has no column gmacs and no column samples_seen"),
    (HEAD.replace("\n", ",acc1\n"), "line 1 names the column 'acc1' twice"),
    (HEAD, "has a header and no rows"),
    (HEAD + "imagenet1k,7.4,1e9\n", "line 2 has 3 values, and the header names 4 columns"),
    (HEAD + "\nimagenet1k,7.4,1e9,0.5,\n", "line 3 has 5 values"),
    (HEAD + 'imagenet1k,7.4,1e9,"0.5\n', "line 2 is not CSV"),
    (HEAD + "imagenet1k,7.4,1e9,0.5\nimagenet1k,7.4,1e9,good\n", "line 3, column acc1: 'good' is not a number"),
    (HEAD + "imagenet1k,7.4,1_0,0.5\n", "line 2, column samples_seen: '1_0' is not a number"),
    (HEAD + "imagenet1k,7.4,1e9,nan\n", "line 2, column acc1: 'nan' is not a number; leave it empty"),
    (HEAD + "imagenet1k,inf,1e9,0.5\n", "line 2, column gmacs: 'inf' is not a number"),
    (HEAD + "imagenet1k,7.4,1e9,76.2\n", r"line 2, column acc1: 76.2 must be a share from 0 to 1 \(0.762 and not 76.2\)"),
    (HEAD + "imagenet1k,7.4,1e9,-0.1\n", "line 2, column acc1: -0.1 must be a share from 0 to 1"),
    (HEAD + "imagenet1k,-7.4,1e9,0.5\n", "line 2, column gmacs: -7.4 must be above 0"),
    (HEAD + "imagenet1k,7.4,0,0.5\n", "line 2, column samples_seen: 0 must be above 0"),
  ],
)
def test_what_is_no_table(tmp_path, text, message):
  path = written(tmp_path, text)
  with pytest.raises(DataError, match=message) as found:
    table.read(path)
  assert str(path) in str(found.value) and "\n" not in str(found.value) and len(str(found.value)) < 300


def test_a_file_that_cannot_be_opened(tmp_path):
  with pytest.raises(DataError, match="missing.csv is missing"):
    table.read(tmp_path / "missing.csv")
  with pytest.raises(DataError, match="cannot be read: Is a directory"):
    table.read(tmp_path)


def test_points_are_of_one_task():
  rows = [row("imagenet1k", acc1=0.75), row("imagenet1k", 3), row("imagenet-r", 4, acc1=0.5)]
  (point,) = table.points(rows, "imagenet")
  assert (point.compute, point.error, point.samples, point.gmacs) == (7.4 * 3e9, 0.25, 3e9, 7.4)
  assert (point.arch, point.data, point.name, point.row) == ("ViT-B-32", "LAION-80M", "a.pt", rows[0])
  assert [one.error for one in table.points(rows, "imagenet_r")] == [0.5]


@pytest.mark.parametrize("missing", ["gmacs", "samples_seen"])
def test_compute_is_the_product_or_else_the_total(missing):
  assert table.points([row("imagenet1k", acc1=0.5, gmacs_total=5.0)], "imagenet")[0].compute == 7.4 * 3e9
  assert table.points([row("imagenet1k", acc1=0.5, gmacs_total=5.0, **{missing: None})], "imagenet")[0].compute == 5.0
  with pytest.raises(DataError, match="runs.csv, line 2 has no compute: it needs gmacs and samples_seen, or gmacs_total"):
    table.points([row("imagenet1k", acc1=0.5, gmacs_total=None, **{missing: None})], "imagenet")


def test_each_data_set_has_its_metric():
  recalls = {"image_retrieval_recall@5": 0.6, "text_retrieval_recall@5": 0.75}
  rows = [row("mscoco_captions", **recalls), row("flickr30k", **recalls), row("other_pairs", **recalls)]
  for task in ("coco", "flickr30k", "other_pairs"):
    assert table.points(rows, task)[0].error == pytest.approx(0.4)
    assert table.points(rows, task, "text_retrieval_recall@5")[0].error == 0.25
  labels = row("voc2007_multilabel", acc1=0.5, mean_average_precision=0.8)
  assert table.points([labels], "voc2007_multilabel")[0].error == pytest.approx(0.2)
  assert table.points([row("vtab+", acc1=0.5, acc5=0.8)], "vtab+", "acc5")[0].error == pytest.approx(0.2)


def test_any_column_may_be_the_metric():
  rows = [row("imagenet1k", linear="0.75"), row("imagenet1k", 3, linear="")]
  assert [one.error for one in table.points(rows, "imagenet", "linear")] == [0.25]
  with pytest.raises(DataError, match="line 2, column linear: 75 must be a share"):
    table.points([row("imagenet1k", linear="75")], "imagenet", "linear")


def test_robustness_is_the_mean_of_five_sets():
  spelled = [table.Row({**one.values, "downstream_dataset": one.values["downstream_dataset"].replace("-", "_")}, one.line, one.path) for one in shifted()]
  for rows in (shifted(), spelled, shifted()[::-1]):
    (point,) = table.points([row("imagenet1k", acc1=0.9), *rows], "robustness")
    assert point.error == pytest.approx(1 - 0.34)
  # Not with four, and not for a model that has a row of its own, be its compute rounded otherwise.
  other = row("imagenet_robustness", 9, acc1=0.4, gmacs=7.3999999999999995)
  assert [one.error for one in table.points([*shifted(), other], "robustness")] == [0.6]
  assert len(table.points([*shifted(), *shifted(name="b.pt"), other], "robustness")) == 2
  with pytest.raises(UsageError, match="has a value of acc1, and no model all five shifted sets"):
    table.points(shifted()[:4], "robustness")
  with pytest.raises(DataError, match="line 2 has imagenetv2 of the model of line 2 again"):
    table.points(shifted() * 2, "robustness")


def test_rows_are_selected():
  rows = [row("imagenet1k", acc1=0.5), row("imagenet1k", 3, acc1=0.6, upstream_dataset="CLIP-WIT", samples_seen=12800000000.0)]

  def lines(*conditions):
    return [one.row.line for one in table.points(rows, "imagenet", where=[table.condition(text) for text in conditions])]

  assert lines("upstream_dataset!=CLIP-WIT") == [2] and lines("upstream_dataset=CLIP-WIT") == [3]
  assert lines("samples_seen=12800000000") == [3] and lines("samples_seen != 1.28e10") == [2]
  assert lines("gmacs=7.399999999999999") == [2, 3] and lines("gmacs=7.4", "name=a.pt", "task=") == [2, 3]
  with pytest.raises(UsageError, match="No row fulfils samples_seen=1 and gmacs=7.4."):
    lines("samples_seen=1", "gmacs=7.4")
  with pytest.raises(UsageError, match="no column 'upstream_data'. Did you mean upstream_dataset?"):
    lines("upstream_data=CLIP-WIT")
  with pytest.raises(UsageError, match="'many' is not a number, as the column samples_seen has"):
    lines("samples_seen=many")
  with pytest.raises(UsageError, match="'<' compares nothing"):
    table.points(rows, "imagenet", where=[("gmacs", "<", "3")])


@pytest.mark.parametrize("text", ["", "LAION-2B", "=LAION-2B", "!=LAION-2B", "upstream_dataset==LAION-2B"])
def test_what_is_no_condition(text):
  with pytest.raises(UsageError, match="such as upstream_dataset!=CLIP-WIT"):
    table.condition(text)


def test_what_selects_nothing_says_what_there_is():
  rows = [row("imagenet1k", acc1=0.5), row("imagenet-r", acc1=0.5)]
  for rows_, task, metric, message in [
    ([], "imagenet", None, "The table has no rows."),
    (rows, "imagnet", None, "No row is of the data set imagnet. Did you mean imagenet?"),
    (rows, "mnist", None, "There are imagenet1k, imagenet-r."),
    (rows, "imagenet", "acc5", "No row of the data set imagenet1k has a value of acc5."),
    (rows, "imagenet", "acc_1", "no column 'acc_1'. Did you mean acc1"),
    ([row("imagenet1k", 7, acc1=1.0)], "imagenet", None, "runs.csv, line 7: acc1 is 1, an error of 0, which has no logarithm"),
  ]:
    with pytest.raises(UsageError, match=message):
      table.points(rows_, task, metric)


def test_groups_are_in_order_of_appearance():
  rows = [row("imagenet1k", acc1=0.5, gmacs=g, upstream_dataset=d) for g, d in [(20.57, "b"), (7.4, "a"), (7.399999999999999, "b")]]
  points = table.points(rows, "imagenet")
  assert table.grouped(points, "upstream_dataset") == {"b": [points[0], points[2]], "a": [points[1]]}
  assert table.grouped(rows, "gmacs") == {"20.57": [rows[0]], "7.4": rows[1:]}
  assert list(table.grouped(points, "samples_seen")) == ["3000000000"] and list(table.grouped(rows, "acc5")) == [""]
  with pytest.raises(UsageError, match="no column 'upstream'"):
    table.grouped(points, "upstream")


def test_published_files_have_these_columns():
  with open(__file__.replace("test_table.py", "published.csv")) as file:
    assert set(table.COLUMNS) == set(next(csv.reader(file))) - {"samples_seen_pretty"}

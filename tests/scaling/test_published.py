"""The laws that were published come out of the results that were published.

`published.csv` holds rows of zeroshot_results.csv of the repository LAION-AI/scaling-laws-openclip: all models of Cherti et al. 2022
(arXiv 2212.07143) on ImageNet, its shifted sets, MS-COCO and Flickr30k, and OpenAI's three on each shifted set. The laws are those of
the paper's figures; compute is in GMACs of one example times examples seen.
"""

from pathlib import Path

import pytest

from clip_jax.scaling import power_law, table

ROWS = table.read(Path(__file__).with_name("published.csv"))
OPENCLIP, OPENAI = (table.condition(f"upstream_dataset{operator}CLIP-WIT") for operator in ("!=", "="))


def law(task, where, method, metric=None):
  points = table.points(ROWS, task, metric, [where])
  return power_law.fit([one.compute for one in points], [one.error for one in points], method)


@pytest.mark.parametrize(
  "task, where, method, n, beta, alpha",
  [
    ("imagenet", OPENCLIP, "frontier", 29, 5.86, -0.111),
    ("robustness", OPENCLIP, "frontier", 29, 11.61, -0.126),
    ("coco", OPENCLIP, "frontier", 29, 2.75, -0.079),
    ("flickr30k", OPENCLIP, "frontier", 29, 15.51, -0.189),
    ("imagenet", OPENAI, "all", 3, 23.18, -0.164),
    ("robustness", OPENAI, "all", 3, 211.66, -0.238),
    ("coco", OPENAI, "all", 3, 1.59, -0.051),
    ("flickr30k", OPENAI, "all", 3, 2.21, -0.103),
  ],
)
def test_published_laws(task, where, method, n, beta, alpha):
  found = law(task, where, method)
  assert (found.n, round(found.beta, 2), round(found.alpha, 3)) == (n, beta, alpha)
  assert found.beta_ci[0] < beta < found.beta_ci[1] and found.alpha_ci[0] < alpha < found.alpha_ci[1]


def test_text_retrieval_is_fitted_from_its_own_column():
  """The published notebook takes that of images for both."""
  points = table.points(ROWS, "coco", "text_retrieval_recall@5", [OPENCLIP])
  assert [one.error for one in points] == [1 - one.row.values["text_retrieval_recall@5"] for one in points]
  images, texts = (law("coco", OPENCLIP, "frontier", f"{what}_retrieval_recall@5") for what in ("image", "text"))
  assert (round(images.alpha, 3), round(texts.alpha, 3)) == (-0.079, -0.102)


def test_the_published_mean_over_shifted_sets_is_ours():
  published = {one.arch: one.error for one in table.points(ROWS, "robustness", where=[OPENAI])}
  parts = [row for row in ROWS if row.values["downstream_dataset"] != table.ROBUSTNESS]
  ours = {one.arch: one.error for one in table.points(parts, "robustness")}
  assert ours == pytest.approx(published, rel=1e-12) and len(ours) == 3


def test_data_sets_have_their_own_laws():
  points = table.points(ROWS, "imagenet", where=[OPENCLIP])
  groups = table.grouped(points, "upstream_dataset")
  assert {name: len(group) for name, group in groups.items()} == {"LAION-2B": 11, "LAION-400M": 9, "LAION-80M": 9}
  for group in groups.values():
    assert -0.2 < power_law.fit([one.compute for one in group], [one.error for one in group]).alpha < -0.02

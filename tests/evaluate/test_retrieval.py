"""Recall, its chance and the gallery against what they mean, spelled out one by one."""

import base64
import io
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from clip_jax import config as configs
from clip_jax.data import sources
from clip_jax.errors import DataError
from clip_jax.evaluate import datasets
from clip_jax.evaluate import pictures as showing
from clip_jax.evaluate.retrieval import Retrieval, both_ways, chance
from tests.evaluate.conftest import MESHES, Given, encoder, pictures, placed, png, write_shard

# Captions a record, eleven records: neither they nor the captions fill whole batches of eight.
CAPTIONS = [
  ["a red sea"],
  ["a green house", "blue cars in the rain", "one"],
  ["an old dog", "two"],
  ["flowers"],
  ["a large tree", "leaves", "the old oak behind the church", "autumn"],
  ["three birds on a wire"],
  ["a new car", "somebody's garage"],
  ["the moon"],
  ["a square", "geometry", "white on black"],
  ["cats, cats, cats"],
  ["a road by the sea", "holiday"],
]
PICTURES = pictures(len(CAPTIONS), seed=24)


def with_captions(image, captions):
  return {"png": image, "json": json.dumps({"captions": captions}).encode()}


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
  records = [with_captions(png(p), c) for p, c in zip(PICTURES, CAPTIONS, strict=True)]
  return write_shard(tmp_path_factory.mktemp("retrieval") / "pairs.tar", records)


def evaluator(shard, encode, training=None, **options):
  held_out = datasets.EvaluationSet("pairs", datasets.RETRIEVAL, sources.create("tar", shard))
  return Retrieval(held_out, encode, configs.Retrieval(**options), training)


def flat(result):
  return result.flat("pairs")


def rank(scores):
  """Candidates of a query, best first, the earlier of two equals first."""
  return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def spelled_out(image, text, owners):
  """Every metric of a set from its embeddings, one query at a time."""
  want = {}
  for k in (1, 5, 10):
    hits = [any(owners[j] == i for j in rank(text @ x)[:k]) for i, x in enumerate(image)]
    want[f"eval/pairs/image_to_text_R@{k}"] = sum(hits) / len(hits)
    hits = [owners[j] in rank(image @ x)[:k] for j, x in enumerate(text)]
    want[f"eval/pairs/text_to_image_R@{k}"] = sum(hits) / len(hits)
  return want


def without_chance(metrics):
  return {key: value for key, value in metrics.items() if not key.endswith(("/chance", "/standard_error"))}


@pytest.mark.parametrize("first_caption", [False, True])
@pytest.mark.parametrize("data, fsdp", MESHES)
def test_scores_on_any_mesh(shard, params, one_at_a_time, data, fsdp, first_caption):
  captions = [c[:1] if first_caption else c for c in CAPTIONS]
  owners = [i for i, c in enumerate(captions) for _ in c]
  image = one_at_a_time.images(PICTURES)
  text = one_at_a_time.texts([caption for c in captions for caption in c])
  # No two scores are so close that rounding could swap them.
  scores = image @ text.T
  assert min(np.diff(np.sort(scores, axis), axis=axis).min() for axis in (0, 1)) > 1e-5

  encode = encoder(data, fsdp)
  evaluate = evaluator(shard, encode, first_caption=first_caption)
  result = evaluate(placed(params, encode.mesh))
  want = spelled_out(image, text, owners)
  assert without_chance(flat(result)) == pytest.approx(want, abs=1e-12)
  assert len(set(want.values())) > 3  # a random model, but not all zeros and ones
  assert result.details == {}


def test_any_caption_of_an_image_is_right_and_each_looks_for_its_own(tmp_path):
  records = [with_captions(png(PICTURES[0]), ["a", "b"]), with_captions(png(PICTURES[1]), ["c"])]
  path = write_shard(tmp_path / "two.tar", records)
  # Caption b points at the wrong image.
  encode = Given([[1, 0], [0, 1]], [[1, 0], [0.1, 0.9], [0, 1]])
  metrics = flat(evaluator(path, encode)(None))
  assert metrics["eval/pairs/image_to_text_R@1"] == 1
  assert metrics["eval/pairs/text_to_image_R@1"] == pytest.approx(2 / 3)
  assert metrics["eval/pairs/image_to_text_R@1/chance"] == pytest.approx((2 / 3 + 1 / 3) / 2)
  assert metrics["eval/pairs/text_to_image_R@1/chance"] == pytest.approx(1 / 2)
  # Of first captions alone there are two, and both are right.
  metrics = flat(evaluator(path, Given(np.eye(2), np.eye(2)), first_caption=True)(None))
  assert metrics["eval/pairs/text_to_image_R@1"] == 1


@pytest.mark.parametrize("shift, recall", [(0, 1.0), (1, 0.0)])
def test_perfect_and_shifted_embeddings(tmp_path, shift, recall):
  path = write_shard(tmp_path / "x.tar", [with_captions(png(p), ["x"]) for p in PICTURES])
  metrics = flat(evaluator(path, Given(np.eye(11), np.roll(np.eye(11), shift, axis=0)))(None))
  assert metrics["eval/pairs/image_to_text_R@1"] == recall
  assert metrics["eval/pairs/text_to_image_R@1"] == recall


def test_a_collapsed_model_is_no_better_than_chance(shard):
  # All scores are equal, so everybody gets the first candidates; ranking ties kindly would give 1.
  captions = sum(map(len, CAPTIONS))
  metrics = flat(evaluator(shard, Given(np.ones((11, 4)), np.ones((captions, 4))))(None))
  assert metrics["eval/pairs/image_to_text_R@1"] == 1 / 11
  assert metrics["eval/pairs/text_to_image_R@1"] == len(CAPTIONS[0]) / captions


OWNERS = np.array([0, 0, 0, 1, 2, 3])


@pytest.mark.parametrize("way, candidates", [("image_to_text", 6), ("text_to_image", 4)])
def test_chance_is_the_mean_recall_over_all_rankings(way, candidates):
  found = {}
  for order in itertools.permutations(range(candidates)):
    # Candidate order[i] has the i-th largest score with every query.
    place = np.argsort(order)[:, None].astype(np.float32)
    one = -np.concatenate([place, np.zeros_like(place)], axis=1)
    queries = np.tile(np.float32([[1, 0]]), (4 if way == "image_to_text" else 6, 1))
    image, text = (queries, one) if way == "image_to_text" else (one, queries)
    for key, score in both_ways(image, text, OWNERS)[0].items():
      found.setdefault(key, []).append(score)
  for k in (1, 5, 10):
    scores = found[f"{way}_R@{k}"]
    assert np.ptp([score.chance for score in scores]) == 0
    assert np.mean([score.value for score in scores]) == pytest.approx(scores[0].chance, abs=1e-12)
  # By hand: (3 + 1 + 1 + 1) / 4 of six captions are right; a caption's image is one of four.
  assert found[f"{way}_R@1"][0].chance == pytest.approx(1 / 4)
  assert found[f"{way}_R@10"][0].chance == 1


def test_chance_of_a_large_set_is_that_of_random_draws():
  random = np.random.default_rng(0)
  answers, candidates, draws = np.array([1, 5, 5, 2, 40]), 400, 2_000
  for k in (1, 5, 10):
    hits = 0
    for m in answers:
      # The right answers are the candidates below m; a ranking starts with k different candidates.
      first = random.random((draws, candidates)).argpartition(k, axis=1)[:, :k]
      hits += np.mean((first < m).any(axis=1))
    # Five standard errors of a share over this many draws, at most.
    error = 5 * 0.5 / np.sqrt(len(answers) * draws)
    assert abs(hits / len(answers) - chance(answers, candidates, k)) < error
  assert chance(np.array([1]), 10**6, 10) == pytest.approx(1e-5, rel=1e-6)


def test_more_right_answers_than_wrong_ones_are_certain_to_be_found():
  assert chance(np.array([8]), 10, 5) == 1
  assert chance(np.array([3, 3]), 3, 10) == 1


def from_uri(uri):
  kind, _, content = uri.partition(",")
  assert kind == "data:image/png;base64"
  return Image.open(io.BytesIO(base64.b64decode(content)))


def test_the_gallery_shows_what_was_retrieved(shard, params, one_at_a_time):
  image = one_at_a_time.images(PICTURES)
  text = one_at_a_time.texts([caption for c in CAPTIONS for caption in c])
  owners = [i for i, c in enumerate(CAPTIONS) for _ in c]
  names = [caption for c in CAPTIONS for caption in c]
  encode = encoder()
  shown = evaluator(shard, encode, gallery=6)(placed(params, encode.mesh)).details

  which = []
  for item in shown["retrieval"]:
    pixels = np.asarray(from_uri(item["image"]))
    [i] = [i for i, p in enumerate(PICTURES) if np.array_equal(p, pixels)]
    which.append(i)
    assert item["set"] == "pairs" and item["caption"] == CAPTIONS[i][0]
    best = rank(text @ image[i])[:5]
    assert [t["caption"] for t in item["top"]] == [names[j] for j in best]
    assert [t["correct"] for t in item["top"]] == [owners[j] == i for j in best]
    scores = [t["score"] for t in item["top"]]
    assert scores == pytest.approx([text[j] @ image[i] for j in best], abs=2e-6)
  assert len(set(which)) == 6
  flags = [t["correct"] for item in shown["retrieval"] for t in item["top"]]
  assert True in flags and False in flags

  similarity = shown["similarity"]
  assert similarity["set"] == "pairs"
  assert similarity["images"] == [item["image"] for item in shown["retrieval"]]
  assert similarity["captions"] == [CAPTIONS[i][0] for i in which]
  first = [names.index(CAPTIONS[i][0]) for i in which]
  np.testing.assert_allclose(similarity["matrix"], image[which] @ text[first].T, rtol=0, atol=2e-6)
  json.dumps(shown)  # plain numbers and strings, ready for a file


def test_the_gallery_is_the_same_pictures_for_any_model_and_no_more_than_there_are(shard):
  captions = sum(map(len, CAPTIONS))
  random = np.random.default_rng(0)
  galleries = []
  for _ in range(2):
    encode = Given(random.normal(size=(11, 4)), random.normal(size=(captions, 4)))
    shown = evaluator(shard, encode, gallery=50)(None).details
    galleries.append(shown)
  one, other = ([item["image"] for item in shown["retrieval"]] for shown in galleries)
  assert one == other and len(set(one)) == 11
  assert galleries[0]["similarity"]["matrix"] != galleries[1]["similarity"]["matrix"]


def test_the_matrix_of_a_large_gallery_stays_readable(tmp_path):
  path = write_shard(tmp_path / "x.tar", [with_captions(png(p), ["x"]) for p in pictures(20)])
  shown = evaluator(path, Given(np.eye(20), np.eye(20)), gallery=20)(None).details
  assert len(shown["retrieval"]) == 20
  assert np.shape(shown["similarity"]["matrix"]) == (12, 12)
  assert len(shown["similarity"]["images"]) == len(shown["similarity"]["captions"]) == 12


def test_large_pictures_become_thumbnails_of_the_same_shape():
  large = np.full((100, 300, 3), (10, 200, 60), np.uint8)
  small = from_uri(showing.data_uri(png(large)))
  assert small.size == (96, 32)
  assert np.array_equal(np.unique(np.asarray(small).reshape(-1, 3), axis=0), [[10, 200, 60]])


def test_a_record_that_cannot_be_read_is_named(tmp_path, params):
  records = [with_captions(png(p), ["x"]) for p in PICTURES[:3]]
  records[1]["png"] = records[1]["png"][:-40]
  path = write_shard(tmp_path / "broken.tar", records)
  with pytest.raises(DataError, match=r"broken\.tar/00001\.png: .*must be whole"):
    evaluator(path, encoder())(params)


def test_the_yardstick_is_for_sets_that_ask_for_it(shard):
  source = sources.create("tar", shard)
  unused = Given(np.eye(1), np.eye(1))
  assert evaluator(shard, unused, training=source).yardstick() == {}
  # The training set is the held-out set: every image finds itself.
  yardstick = evaluator(shard, unused, training=source, nearest_training_image=True).yardstick()
  assert yardstick == {"eval/pairs/nearest_pixels_R@1": 1.0, "eval/pairs/nearest_pixels_R@5": 1.0}


def brute_force(image, text, owners, k):
  """Recall of both ways, and the share of right captions found, from the whole matrix in float64."""
  scores = image.astype(np.float64) @ text.astype(np.float64).T
  first = np.argsort(-scores, axis=1, kind="stable")[:, :k]
  right = owners[first] == np.arange(len(image))[:, None]
  back = np.argsort(-scores.T, axis=1, kind="stable")[:, :k]
  return right.any(axis=1).mean(), (back == owners[:, None]).any(axis=1).mean(), (right.sum(axis=1) / np.bincount(owners)).mean()


@pytest.mark.parametrize("values", [2, 5, None], ids=["many ties", "some ties", "none"])
def test_every_definition_against_the_whole_matrix(tmp_path, values):
  """Ties included: small whole numbers have exact products."""
  random = np.random.default_rng(1)
  captions = [[f"{i} {j}" for j in range(random.integers(1, 6))] for i in range(60)]
  owners = np.repeat(np.arange(60), list(map(len, captions)))
  path = write_shard(tmp_path / "x.tar", [with_captions(png(p), c) for p, c in zip(pictures(60), captions, strict=True)])

  def draw(rows):
    return random.normal(size=(rows, 6)).astype(np.float32) if values is None else random.integers(0, values, (rows, 6)).astype(np.float32)

  image, text = draw(60), draw(len(owners))
  held_out = datasets.EvaluationSet("pairs", datasets.RETRIEVAL, sources.create("tar", path))
  result = Retrieval(held_out, Given(image, text), configs.Retrieval(), every_definition=True)(None)
  for k in (1, 5, 10):
    any_, back, full = brute_force(image, text, owners, k)
    assert result.scores[f"image_to_text_R@{k}"].value == any_
    assert result.scores[f"text_to_image_R@{k}"].value == back
    assert result.scores[f"image_to_text_full_R@{k}"].value == pytest.approx(full, abs=1e-12)
    # Captions of a picture go together in the error, and each picture counts once.
    hits, groups = result.outcomes[f"text_to_image_R@{k}"]
    sums = [sum(h - back for h, g in zip(hits, groups, strict=True) if g == i) for i in range(60)]
    assert result.scores[f"text_to_image_R@{k}"].standard_error == pytest.approx(np.sqrt(np.square(sums).sum()) / len(hits))


def test_of_five_thousand_images_five_parts_are_scored_as_well():
  random = np.random.default_rng(0)
  image = random.normal(size=(5_000, 16)).astype(np.float32)
  owners = np.sort(np.concatenate([np.arange(5_000), random.integers(0, 5_000, 3_000)]))
  text = (image[owners] + 2 * random.normal(size=(8_000, 16))).astype(np.float32)
  evaluate = Retrieval.__new__(Retrieval)
  evaluate.owners = owners
  scores, _, (found, _) = both_ways(image, text, owners)
  more = evaluate._others(image, text, found)
  folds = []
  for start in range(0, 5_000, 1_000):
    here = (owners >= start) & (owners < start + 1_000)
    folds.append(brute_force(image[start : start + 1_000], text[here], owners[here] - start, 5)[:2])
  assert more["image_to_text_R@5_1k"].value == pytest.approx(np.mean([f[0] for f in folds]))
  assert more["text_to_image_R@5_1k"].value == pytest.approx(np.mean([f[1] for f in folds]))
  assert more["text_to_image_R@5_1k"].value > scores["text_to_image_R@5"].value
  assert more["text_to_image_R@5_1k"].standard_error == pytest.approx(np.sqrt(0.25 / 8_000), rel=0.5)


COCO = """
import time
import numpy as np
from clip_jax.evaluate.retrieval import both_ways

random = np.random.default_rng(0)
image = random.normal(size=(5_000, 512)).astype(np.float32)
owners = np.repeat(np.arange(5_000), 5)
text = (image[owners] + 8 * random.normal(size=(25_000, 512))).astype(np.float32)
both_ways(image[:8], text[:40], owners[:40])  # JAX itself is loaded
def kibibytes(field):  # not of getrusage, whose peak is that of the process that started this one, too
  return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])

before = kibibytes("VmRSS")
start = time.perf_counter()
scores = both_ways(image, text, owners)[0]
print(kibibytes("VmHWM") - before, scores["text_to_image_R@5"].value, time.perf_counter() - start)
"""


@pytest.mark.slow
def test_coco_takes_less_than_a_gibibyte_beyond_its_embeddings():
  done = subprocess.run([sys.executable, "-c", COCO], check=True, capture_output=True, text=True)
  kibibytes, recall, seconds = map(float, done.stdout.split())
  print(f"{kibibytes / 2**10:.0f} MiB, {seconds:.1f} s")
  assert kibibytes < 2**20 and 0.1 < recall < 0.9

"""What a run's config asks for, evaluated in it by the same code as on a command line."""

import json

import numpy as np
import pytest
from PIL import Image

from clip_jax import config as configs
from clip_jax.errors import ConfigError, DataError, UsageError
from clip_jax.evaluate import tasks
from tests.conftest import tiny
from tests.evaluate.conftest import encoder, pictures, png, write_shard


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  folder = tmp_path_factory.mktemp("root")
  for split in ("test", "train"):
    for i, picture in enumerate(pictures(12)):
      path = folder / "stl10" / split / ("cat", "dog", "ship")[i % 3] / f"{i}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(picture).save(path)
  rows = {str(i): {"filename": f"{i}.png", "caption": "a b", "negative_caption": "b a"} for i in range(5)}
  for kind in ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"):
    (folder / "sugar_crepe").mkdir(exist_ok=True)
    (folder / f"sugar_crepe/{kind}.json").write_text(json.dumps(rows))
  for i, picture in enumerate(pictures(5)):
    Image.fromarray(picture).save(folder / f"sugar_crepe/{i}.png")
  return folder


def test_data_sets_and_suites_by_name(root, params):
  config = configs.resolve(tiny(eval={"batch_size": 8, "data_root": str(root), "datasets": ("stl10", "sugar_crepe")}))
  found = tasks.of_config(config, encoder(), None)
  assert [one.set.name for one in found][:2] == ["stl10", "sugar_crepe/add_att"] and len(found) == 8
  values = found[0](params).flat("stl10") | found[1](params).flat("sugar_crepe/add_att")
  assert {"eval/stl10/acc1", "eval/stl10/acc1/chance", "eval/stl10/acc1/standard_error"} <= values.keys()
  assert values["eval/sugar_crepe/add_att/acc/chance"] == 0.5
  # Two templates are known for this set: the classifier is of both.
  assert len(found[0].set.templates) == 2


def test_sets_that_are_not_there_are_told_of_before_training(root):
  config = configs.resolve(tiny(eval={"batch_size": 8, "data_root": str(root), "datasets": ("stl10", "vtab/pets")}))
  with pytest.raises(UsageError, match="vtab/pets: no data set in"):
    tasks.of_config(config, encoder(), None)
  with pytest.raises(ConfigError, match=r"config\.eval\.data_root is empty"):
    configs.resolve(tiny(eval={"datasets": ("stl10",)}))


def test_features_are_embeddings_before_they_are_normalised(root, params, one_at_a_time):
  from clip_jax.evaluate import datasets
  from clip_jax.evaluate.encode import Encoder
  from tests.evaluate.conftest import BATCH, MODEL

  plain = Encoder(MODEL, encoder().mesh, BATCH, normalize=False)
  held_out = datasets.open_set("stl10", str(root))
  rows, labels = tasks.features(held_out, plain, params)
  assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
  order = [i for label in range(3) for i in sorted(range(label, 12, 3), key=str)]
  norms = np.linalg.norm(rows, axis=1)
  assert np.ptp(norms) > 1e-3
  np.testing.assert_allclose(rows / norms[:, None], one_at_a_time.images(pictures(12)[order]), atol=1e-6)


def test_a_label_deep_in_a_large_set_is_found_at_the_latest_when_it_is_scored(tmp_path, params):
  from clip_jax.data import sources
  from clip_jax.evaluate import datasets
  from clip_jax.evaluate.zero_shot import ZeroShot

  one = png(pictures(1)[0])
  path = write_shard(tmp_path / "x.tar", [{"png": one, "cls": b"7" if i == 1_501 else b"1"} for i in range(2_100)])
  held_out = datasets.given("x", sources.create("tar", path), ("a", "b"), ("{c}",), "config.eval.zero_shot.x")
  evaluate = ZeroShot(held_out, encoder())
  with pytest.raises(DataError, match=r"x\.tar/01501\.png: its label is 7"):
    evaluate(params)

"""What each of two processes runs for `test_distributed.py`; the argument is a file to write."""

import json
import sys

import jax
import numpy as np

from clip_jax import config as configs
from clip_jax.parallel import distributed, rules
from clip_jax.parallel import mesh as meshes
from tests.conftest import tiny
from tests.evaluate import conftest as clips
from tests.parallel.test_rules import SHAPES, mesh_of

ROWS = 16
COUNT = 11  # images: the last batch of eight is not full, and one process has only padding in it
CAPTIONS = [f"picture {i}" for i in range(COUNT)]


def report():
  """Which rows this process holds on each mesh, and which arrive on its devices."""
  found = dict(process=jax.process_index(), processes=jax.process_count(), held=[], arrived=[])
  for shape in SHAPES:
    mesh = mesh_of(*shape)
    held = rules.local_rows(mesh, ROWS)
    array = rules.to_global({"x": held * 10}, mesh, ROWS)["x"]
    assert array.shape == (ROWS,)
    found["held"].append(held.tolist())
    shards = array.addressable_shards
    found["arrived"].append([[s.index[0].indices(ROWS)[:2], s.data.tolist()] for s in shards])
  return found


def slices():
  """Whose device is where on a mesh of both processes, joined along `data`, and along nothing else."""
  config = configs.resolve(tiny(mesh={"data": 1, "fsdp": 2, "tensor": 2, "dcn_data": 2}, train={"global_batch_size": 16, "steps": 1}))
  return np.vectorize(lambda device: device.process_index)(meshes.create(config).devices).tolist()


def main(path):
  """Prints the report with the numbers of the images that were loaded, and saves embeddings."""
  jax.config.update("jax_num_cpu_devices", 4)  # after conftest.py, which asks for eight
  distributed.initialize()
  found = {**report(), "slices": slices()}
  encode = clips.encoder(2, 4)
  params = clips.placed(clips.random_params(), encode.mesh)
  images, loaded = clips.pictures(COUNT), []

  def load(i):
    loaded.append(int(i))
    return images[i]

  embeddings = encode.images(params, COUNT, load)
  texts = encode.texts(params, clips.tokenize(CAPTIONS))
  np.savez(path, images=embeddings, texts=texts)
  print(json.dumps({**found, "loaded": sorted(loaded)}))


if __name__ == "__main__":
  main(sys.argv[1])

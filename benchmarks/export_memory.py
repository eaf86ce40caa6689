"""How much memory and time do export and import of a large model take?

Makes a checkpoint of random parameters, sharded over eight devices, then exports it to each layout and imports one of them
again, each in a process of its own, and reads the peak of that process's resident memory. The bound to hold is twice the largest
tensor and 1 GiB.

    python benchmarks/export_memory.py --model=ViT-bigG-14 --dtype=float32
"""

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def create(folder, name, dtype):
  """Writes the checkpoint as training does: born sharded, saved by Orbax."""
  import jax

  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 8)
  import flax.linen as nn
  import jax.numpy as jnp
  import numpy as np
  import orbax.checkpoint as ocp

  from clip_jax import config as configs
  from clip_jax.convert import native
  from clip_jax.models.clip import initial_params
  from clip_jax.parallel import mesh as meshes
  from clip_jax.parallel import rules

  config = configs.resolve({"model": {"name": name}, "mesh": {"data": 1, "fsdp": 8}, "train": {"steps": 1}})
  boxed = jax.eval_shape(lambda: initial_params(config.model, jax.random.key(0)))
  shardings = rules.shardings_of(boxed, meshes.create(config, jax.devices()))

  def leaf(shape, sharding):
    def part(index):
      size = [len(range(*s.indices(n))) for s, n in zip(index, shape.shape, strict=True)]
      return (0.02 * random.standard_normal(size, np.float32)).astype(jnp.dtype(dtype))

    return jax.make_array_from_callback(shape.shape, sharding, part)

  random = np.random.default_rng(0)
  params = jax.tree.map(leaf, nn.unbox(boxed), shardings)
  items = {
    "state": ocp.args.PyTreeSave({"params": params}),
    "card": ocp.args.JsonSave(native.card(config.model)),
  }
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
    checkpointer.save(Path(folder).absolute(), ocp.args.Composite(**items))


def measured(*arguments):
  """Seconds and peak MiB of one call of the command line, in a process of its own."""
  code = (
    "import resource, sys\nfrom clip_jax import cli\ncode = cli.main(sys.argv[1:])\n"
    "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\nsys.exit(code)"
  )
  start = time.perf_counter()
  done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False)
  if done.returncode:
    sys.exit(done.stderr)
  peak = int(done.stdout.split("PEAK")[1]) / 1024
  return time.perf_counter() - start, peak, json.loads(done.stdout.splitlines()[0])


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", default="ViT-B-16")
  parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
  parser.add_argument("--scratch", help="folder with room for three copies of the weights")
  parser.add_argument("--json", help="file for the figures")
  parser.add_argument("--create", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.create:
    create(arguments.create, arguments.model, arguments.dtype)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return
  scratch = Path(tempfile.mkdtemp(dir=arguments.scratch))
  try:
    _measure(scratch, arguments)
  finally:
    shutil.rmtree(scratch)


def _measure(scratch, arguments):
  os.environ["JAX_PLATFORMS"] = "cpu"
  checkpoint, rows = scratch / "checkpoint", []
  again = [sys.executable, __file__, "--model", arguments.model, "--dtype", arguments.dtype]
  environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
  subprocess.run([*again, "--create", str(checkpoint)], check=True, env=environment, stdout=subprocess.DEVNULL)
  from clip_jax.convert import sources

  shapes = sources.find(checkpoint).shapes
  sizes = [math.prod(shape.shape) * shape.dtype.itemsize for shape in shapes.values()]
  largest, total = max(sizes) / 2**20, sum(sizes) / 2**20
  for to in ("huggingface", "open_clip"):
    seconds, peak, _ = measured("export", checkpoint, scratch / to, "--to", to, "--json")
    rows.append((f"export to {to}", seconds, peak, 2 * largest + 1024))
    if to != "huggingface":
      shutil.rmtree(scratch / to)
  seconds, peak, _ = measured("import", scratch / "huggingface", scratch / "imported", "--json")
  largest *= 4 / (2 if arguments.dtype == "bfloat16" else 4)  # it is read as float32
  rows.append(("import from huggingface", seconds, peak, 2 * largest + 1024))
  print(f"{arguments.model} in {arguments.dtype}: {total:,.0f} MiB of weights, the largest tensor {max(sizes) / 2**20:,.0f} MiB")
  print(f"{'':<26}{'seconds':>9}{'peak MiB':>10}{'bound MiB':>11}")
  for what, seconds, peak, bound in rows:
    print(f"{what:<26}{seconds:>9.1f}{peak:>10,.0f}{bound:>11,.0f}")
  if arguments.json:
    keys = ("what", "seconds", "peak_mib", "bound_mib")
    Path(arguments.json).write_text(json.dumps([dict(zip(keys, row, strict=True)) for row in rows]) + "\n")


if __name__ == "__main__":
  main()

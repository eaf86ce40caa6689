"""How much memory and work does the contrastive loss take? Compiles each method for TPU slices that are not there.

    python benchmarks/loss_memory.py [--embed 512] [--dtype float32] [--json]

Value and gradients with respect to both embeddings and the scale, per chip, by the compiler's own account; of loops
the work is multiplied by their turns. Two yardsticks stand beside the project's methods: `dense`, the loss written on
whole arrays with its placement left to the compiler, and `all_gather`, both towers gathered and two tiles of logits a
shard. Needs the extra `plan`.
"""

import argparse
import json
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from clip_jax import config as configs
from clip_jax.losses import global_batch
from clip_jax.parallel import mesh as meshes
from clip_jax.parallel import rules
from clip_jax.parallel.mesh import BATCH_AXES
from clip_jax.plan import compile as compiler

CASES = (("v5e:2x4", 32_768), ("v5e:16x16", 1_048_576))
METHODS = ("dense", "all_gather", "gather", "ring")


def main():
  """Compiles the table and prints it."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--embed", type=int, default=512)
  parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the products' factors")
  parser.add_argument("--json", action="store_true", help="print a list of objects")
  arguments = parser.parse_args()
  rows = []
  if not arguments.json:
    print(
      f"{'loss':<9}{'method':<11}{'topology':<11}{'batch':>10}{'temp MiB':>10}{'peak MiB':>10}"
      f"{'TFLOP':>8}{'products':>10}{'GB':>8}  transfers of a chip"
    )
  for topology, batch in CASES:
    for loss in ("softmax", "sigmoid"):
      for method in METHODS:
        rows.append(row(loss, method, topology, batch, arguments.embed, arguments.dtype))
        if not arguments.json:
          show(rows[-1])
  if arguments.json:
    print(json.dumps(rows))


def row(name, method, topology, batch, embed, dtype):
  """Compiles one loss and returns what the compiler says, or its error."""
  found = dict(loss=name, method=method, topology=topology, batch=batch, embed=embed, dtype=dtype, error=None)
  devices = compiler.devices(topology)
  train = {"steps": 1, "global_batch_size": batch}
  model = {"name": "ViT-B-16"}  # any: the mesh depends on the devices alone
  mesh = meshes.create(configs.resolve({"model": model, "train": train}), devices)
  rows, whole = rules.batch_sharding(mesh), rules.replicated(mesh)
  embeddings = jax.ShapeDtypeStruct((batch, embed), jnp.float32, sharding=rows)
  scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
  loss = loss_by(name, method, dtype, mesh)
  measured = jax.jit(
    jax.value_and_grad(loss, argnums=(0, 1, 2)), out_shardings=(whole, (rows, rows, whole))
  )
  try:
    report = compiler.report(compiler.compile(measured, embeddings, embeddings, scalar))
  except compiler.OutOfMemoryError as error:
    nothing = dict.fromkeys(("temp_mib", "peak_mib", "flops", "bytes_accessed", "products", "collectives"))
    return found | nothing | {"error": str(error).splitlines()[0][:300]}
  return found | {
    "temp_mib": report.temporary_bytes / 2**20,
    "peak_mib": report.peak_bytes / 2**20,
    "flops": report.flops,
    "bytes_accessed": report.bytes_accessed,
    # Matrix products of the size of the whole batch's: [batch, embed] by [embed, batch], shared by all chips.
    "products": report.product_flops * len(devices) / (2 * batch * batch * embed),
    "collectives": report.collectives,
  }


def loss_by(name, method, dtype, mesh):
  """A loss as a function of image, text and scale; the sigmoid's bias is SigLIP's first."""
  if method not in ("dense", "all_gather"):
    loss = global_batch.create(configs.Loss(name=name, method=method, dtype=dtype), mesh)
    return lambda image, text, scale: loss(image, text, scale, -10.0)

  precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None

  def dot(a, b):
    a, b = a.astype(dtype), b.astype(dtype)
    return jnp.matmul(a, b.T, precision=precision, preferred_element_type=jnp.float32)

  def dense(image, text, scale):
    logits = scale * dot(image, text)
    if name == "sigmoid":
      return -jnp.mean(jnp.sum(jax.nn.log_sigmoid((2 * jnp.eye(len(logits)) - 1) * (logits - 10)), axis=1))
    by_image, by_text = (jax.nn.logsumexp(x, axis=1) - jnp.diag(x) for x in (logits, logits.T))
    return jnp.mean(by_image + by_text) / 2

  def gathered(image, text, scale):
    all_image, all_text = (jax.lax.all_gather(x, BATCH_AXES, tiled=True) for x in (image, text))
    matched = scale * jnp.sum(image * text, axis=1)
    if name == "sigmoid":
      logits, first = scale * dot(image, all_text) - 10, jax.lax.axis_index(BATCH_AXES) * len(image)
      pairs = first + jnp.arange(len(image))[:, None] == jnp.arange(logits.shape[1])
      losses = -jnp.sum(jax.nn.log_sigmoid(jnp.where(pairs, logits, -logits)), axis=1)
    else:
      by_image, by_text = scale * dot(image, all_text), scale * dot(text, all_image)
      losses = (jax.nn.logsumexp(by_image, axis=1) + jax.nn.logsumexp(by_text, axis=1)) / 2 - matched
    return jax.lax.pmean(jnp.mean(losses), BATCH_AXES)

  rows, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
  return dense if method == "dense" else jax.shard_map(
    gathered, mesh=mesh, in_specs=(rows, rows, whole), out_specs=whole
  )  # fmt: skip


def show(row):
  """Prints a row."""
  about = f"{row['loss']:<9}{row['method']:<11}{row['topology']:<11}{row['batch']:>10,}"
  if row["error"]:
    print(f"{about}  does not fit: {row['error']}", flush=True)
    return
  transfers = ", ".join(f"{kind} {size / 2**20:,.0f} MiB" for kind, (_, size) in row["collectives"].items() if size > 2**20)
  print(
    f"{about}{row['temp_mib']:>10,.1f}{row['peak_mib']:>10,.0f}{row['flops'] / 1e12:>8.3f}{row['products']:>10.2f}"
    f"{row['bytes_accessed'] / 1e9:>8.1f}  {transfers}",
    flush=True,
  )


if __name__ == "__main__":
  main()

"""How long does the text classifier of a zero-shot evaluation take, all prompts together or one class at a time?

The 1,000 classes of ImageNet, or the first of them, in OpenAI's 80 templates each. One class at a time is how CLIP_benchmark goes about it: its 80 prompts, all
as long as the context, through the tower, then the mean. Together, prompts are sorted by length and cut to it, which a causal
tower does not see, and go through in batches. The tower is a small one (--model=small: 4 layers, 256 wide, context 77) or that of a
known model, of which --classes are enough to see the ratio.

    python benchmarks/text_classifier.py [--model ViT-B-32] [--classes 40] [--rounds 3] [--json]
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax

jax.config.update("jax_platforms", "cpu") if not os.environ.get("JAX_PLATFORMS") else None

import flax.linen as nn
import numpy as np

from clip_jax import benchmark
from clip_jax import config as configs
from clip_jax.evaluate import datasets, prompts
from clip_jax.evaluate.encode import Encoder
from clip_jax.evaluate.zero_shot import ZeroShot
from clip_jax.models.clip import CLIP, initial_params

SMALL = {
  "image_size": 32, "embed_dim": 128, "vision": {"patch_size": 16, "width": 64, "layers": 1, "heads": 1},
  "text": {"context_length": 77, "width": 256, "layers": 4, "heads": 4},
}  # fmt: skip


def one_at_a_time(encode, tokenizer, names, templates):
  """The classifier, a class after the other."""
  rows = []
  for name in names:
    embeddings = np.asarray(encode(tokenizer([prompts.fill(template, name) for template in templates])))
    mean = embeddings.mean(axis=0)
    rows.append(mean / np.linalg.norm(mean))
  return np.stack(rows)


def main():
  """Measures both in turn and prints a table, or JSON."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", default="small")
  parser.add_argument("--classes", type=int, default=200)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--json", action="store_true")
  arguments = parser.parse_args()
  found = measure(arguments)
  if arguments.json:
    print(json.dumps(found))
    return
  print(f"{found['classes']:,} classes, {found['model']} on {found['device']}")
  for way, seconds in found["seconds"].items():
    print(f"  {way:<22}{statistics.median(seconds):9.2f} s")
  print(f"  {found['ratio']:.2f} times as fast together; largest difference {found['difference']:.1e}")


def measure(arguments):
  """The seconds of each round, and the ratio of their medians."""
  model = configs.model_from_dict(SMALL if arguments.model == "small" else {"name": arguments.model})
  params = nn.unbox(jax.jit(lambda key: initial_params(model, key))(jax.random.key(0)))
  names, templates = prompts.classes("imagenet1k")[: arguments.classes], prompts.templates("imagenet1k")
  mesh = benchmark.everywhere()
  encoder, on_mesh = Encoder(model, mesh, 256 * len(jax.devices())), benchmark.on_all(params, mesh)
  encode = jax.jit(lambda tokens: CLIP(model).apply({"params": params}, tokens, method="encode_text"))
  held_out = datasets.EvaluationSet("imagenet1k", datasets.CLASSIFICATION, [], classes=names, templates=templates)
  ways = {
    "one class at a time": lambda names=names: one_at_a_time(encode, encoder.tokenizer, names, templates),
    "together": lambda: ZeroShot(held_out, encoder).classifier(on_mesh),
  }
  ways["one class at a time"](names[:1])  # compiles
  ways["together"]()
  seconds, classifiers = {way: [] for way in ways}, {}
  for _ in range(arguments.rounds):
    for way, run in ways.items():
      start = time.perf_counter()
      classifiers[way] = run()
      seconds[way].append(time.perf_counter() - start)
  medians = [statistics.median(seconds[way]) for way in ways]
  return {
    "model": arguments.model, "classes": len(names), "device": jax.devices()[0].device_kind, "seconds": seconds,
    "ratio": medians[0] / medians[1], "difference": float(np.abs(np.subtract(*classifiers.values())).max()),
  }  # fmt: skip


if __name__ == "__main__":
  main()

"""How long does the text classifier of a zero-shot evaluation take, all prompts together or one class at a time?

1,000 classes of ImageNet in OpenAI's 80 templates each. One class at a time is how CLIP_benchmark goes about it: its 80 prompts, all
as long as the context, through the tower, then the mean. Together, prompts are sorted by length and cut to it, which a causal
tower does not see, and go through in batches. The tower is a small one (--model=small: 4 layers, 256 wide, context 77) or that of a
known model, of which --classes are enough to see the ratio.

  python benchmarks/text_classifier.py [--model=ViT-B-32] [--classes=40] [--repeats=3]
"""

import argparse
import json
import statistics
import time

import flax.linen as nn
import jax
import numpy as np

from clip_jax import benchmark
from clip_jax import config as configs
from clip_jax.evaluate import datasets, prompts
from clip_jax.evaluate.encode import Encoder
from clip_jax.evaluate.zero_shot import ZeroShot
from clip_jax.models.clip import CLIP, initial_params

SMALL = {"image_size": 32, "embed_dim": 128, "vision": {"patch_size": 16, "width": 64, "layers": 1, "heads": 1},
         "text": {"context_length": 77, "width": 256, "layers": 4, "heads": 4}}  # fmt: skip


def one_at_a_time(model, params, tokenizer, names, templates):
  """The classifier, a class after the other."""
  encode = jax.jit(lambda tokens: CLIP(model).apply({"params": params}, tokens, method="encode_text"))
  rows = []
  for name in names:
    embeddings = np.asarray(encode(tokenizer([prompts.fill(template, name) for template in templates])))
    mean = embeddings.mean(axis=0)
    rows.append(mean / np.linalg.norm(mean))
  return np.stack(rows)


def main():
  """Measures both in turn, prints a table, and writes JSON."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", default="small")
  parser.add_argument("--classes", type=int, default=1_000)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--output", default="text_classifier.json")
  arguments = parser.parse_args()
  model = configs.model_from_dict(SMALL if arguments.model == "small" else {"name": arguments.model})
  params = nn.unbox(jax.jit(lambda key: initial_params(model, key))(jax.random.key(0)))
  names, templates = prompts.classes("imagenet1k")[: arguments.classes], prompts.templates("imagenet1k")
  mesh = benchmark.everywhere()
  encoder = Encoder(model, mesh, 256 * len(jax.devices()))
  held_out = datasets.EvaluationSet("imagenet1k", datasets.CLASSIFICATION, [], classes=names, templates=templates)
  ways = {
    "one class at a time": lambda: one_at_a_time(model, params, encoder.tokenizer, names, templates),
    "together": lambda: ZeroShot(held_out, encoder).classifier(on_mesh),
  }
  on_mesh = benchmark.on_all(params, mesh)
  seconds, found = {way: [] for way in ways}, {}
  for repeat in range(arguments.repeats + 1):
    for way, run in ways.items():
      begin = time.perf_counter()
      found[way] = run()
      if repeat:  # the first compiles
        seconds[way].append(time.perf_counter() - begin)
  difference = float(np.abs(np.subtract(*found.values())).max())
  medians = {way: statistics.median(times) for way, times in seconds.items()}
  ratio = medians["one class at a time"] / medians["together"]
  for way, median in medians.items():
    print(f"{way:<24}{median:9.2f} s")
  print(f"{'ratio':<24}{ratio:9.2f}   largest difference {difference:.1e}; {len(names):,} classes, {arguments.model}, {jax.devices()[0].device_kind}")
  with open(arguments.output, "w") as file:
    json.dump({"model": arguments.model, "classes": len(names), "seconds": seconds, "ratio": ratio, "difference": difference}, file)


if __name__ == "__main__":
  main()

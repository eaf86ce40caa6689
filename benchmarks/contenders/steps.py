"""The training steps that benchmarks/step_clock.py compares, each as a function of a process of its own."""

import contextlib
import importlib
import importlib.metadata
import math
import os
import platform
import resource
import time
from pathlib import Path

# Nothing at the top imports JAX or PyTorch: each belongs to the processes of its contenders.
import numpy as np

from clip_jax.errors import UsageError
from clip_jax.models import size
from clip_jax.plan import chips

INSTALL = {"transformers": "pip install 'clip_jax[torch]'", "open_clip": "pip install open_clip_torch"}
WARM_UP = 2  # steps: the first compiles, the second is the first that finds the memory of one before it
# What the peers' step does; a recipe that asks for anything else has nothing to be compared with.
PLAIN = {
  "model.text.kind": "clip",
  "model.text.train_length": None,
  "model.vision.patch_drop": 0.0,
  "model.logit_bias_init": None,
  "loss.name": "softmax",
  "loss.label_smoothing": 0.0,
  "loss.mask_duplicates": False,
  "optimizer.name": "adamw",
  "optimizer.freeze": "",
  "optimizer.gradient_clip_norm": None,
  "optimizer.ema_decay": None,
}


def serve(pipe, who, config, steps, here):
  """The life of a process: builds and warms up, then runs `steps` steps each time it is asked to.

  Args:
    pipe: a `multiprocessing.Connection`. First it sends what is to be said of the contender, with `first_loss` and `memory`, bytes at
      most, or `error`, a sentence. For each True that comes it sends `seconds`, or `error`; it ends with False, or when nobody is there any more.
    who: "ours" or a key of `INSTALL`.
    config: a resolved `Config`.
    steps: of each round.
    here: what `devices` returns.
  """
  os.dup2(2, 1)  # whatever libraries print is no part of the result
  with contextlib.suppress(OSError):  # if memory runs out it is one of these that ends, and not the largest program of somebody else
    Path("/proc/self/oom_score_adj").write_text("1000")
  try:
    run, about = ours(config) if who == "ours" else peer(who, config, here)
    losses = [run(1) for _ in range(WARM_UP)]
    memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send(about | {"first_loss": losses[0], "memory": memory})
    with contextlib.suppress(EOFError):
      while pipe.recv():
        start = time.perf_counter()
        run(steps)
        pipe.send({"seconds": time.perf_counter() - start})
  except Exception as error:  # any, because the others go on
    pipe.send({"error": sentence(error)})


def sentence(error):
  """An error in one line, with its kind where it was not made for people."""
  lines = str(error).strip().splitlines() or ["it did not say why."]
  return lines[0] if isinstance(error, UsageError) else f"{type(error).__name__}: {lines[0][:300]}"


def devices(pipe):
  """Sends what this machine is, as JAX sees it: a dict with `platform`, `device`, `devices`, `machine`, `versions`, `date`."""
  os.dup2(2, 1)
  from clip_jax.parallel import distributed
  from clip_jax.train import environment

  distributed.leave_tpu_out()
  found = environment.describe()
  with open("/proc/cpuinfo") as file:
    names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
  machine = {
    "cpu": names[0] if names else platform.processor(),
    "cores": found["cpu_cores"],
    "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    "system": found["system"],
    "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
  }
  here = {key: found[key] for key in ("platform", "device", "devices")}
  versions = {key: found[key] for key in ("python", "clip_jax", *environment.PACKAGES)}
  pipe.send(here | {"machine": machine, "versions": versions, "date": found["started"]})


def examples(config):
  """A batch of random images and captions, the same for every contender.

  Returns:
    uint8 [batch, size, size, 3], and int32 [batch, context_length]: a start token, words, an end token, which has the largest id, zeros.
  """
  random, model = np.random.default_rng(0), config.model
  batch, context, end = config.train.global_batch_size, model.text.context_length, model.text.vocab_size - 1
  images = random.integers(0, 256, (batch, model.image_size, model.image_size, 3), np.uint8)
  tokens = random.integers(1, end - 1, (batch, context), np.int32)
  tokens[:, 0] = end - 1
  last = random.integers(context // 4, context, (batch, 1))
  places = np.arange(context)
  return images, np.where(places < last, tokens, np.where(places == last, end, 0)).astype(np.int32)


def ours(config):
  """The step of `clip_jax.train` on all local devices.

  Returns:
    A function that runs a number of steps, waits for them and returns the loss of the last; and `peak`, FLOP/s of the devices together
    by their datasheet, or None.
  """
  import jax

  from clip_jax.parallel import distributed, rules
  from clip_jax.parallel import mesh as meshes
  from clip_jax.train import state as states
  from clip_jax.train import step as steps

  distributed.leave_tpu_out()
  distributed.enable_compilation_cache()
  mesh = meshes.create(config, jax.local_devices())
  state, step = states.create(config, mesh), steps.create(config, mesh)
  images, tokens = examples(config)
  batch = jax.device_put({"images": images, "tokens": tokens}, rules.batch_sharding(mesh))

  def run(count):
    nonlocal state
    for _ in range(count):
      state, metrics = step(state, batch)
    jax.block_until_ready(state)
    return float(metrics["loss"])

  shares = [chips.share(device) for device in mesh.devices.flat]
  return run, {"peak": sum(map(peak, shares, mesh.devices.flat)) if all(shares) else None}


def peak(share, device):
  """FLOP/s of a device that is a share of its chip."""
  return share * chips.of_kind(device.device_kind).flops


def peer(who, config, here):
  """A training loop in PyTorch around the model of another project.

  Args:
    who: a key of `INSTALL`.
    config: a resolved `Config`.
    here: what `devices` sent.

  Returns:
    As `ours`, with `versions`.

  Raises:
    UsageError: it is not installed, or has no such model, or nothing to run it on.
  """
  refuse_what_is_not_plain(who, config)
  try:
    import torch

    importlib.import_module(who)
  except ImportError as error:
    raise UsageError(f"{who} cannot be imported ({sentence(error)}): {INSTALL[who]}") from error
  cuda = here["platform"] == "gpu"
  if here["platform"] not in ("cpu", "gpu") or (cuda and not torch.cuda.is_available()):
    raise UsageError(f"{who} runs on a processor or an NVIDIA GPU, and PyTorch finds no {here['device']} here.")
  if cuda and here["devices"] > 1:
    raise UsageError(f"{who} is measured on one GPU, and {here['devices']} are here; CUDA_VISIBLE_DEVICES=0 leaves one.")
  torch.manual_seed(0)
  model, loss_of = (of_transformers if who == "transformers" else of_open_clip)(config.model)
  theirs, wanted = sum(p.numel() for p in model.parameters()), size.parameters(config.model)
  if theirs != wanted:
    raise UsageError(f"{who} makes a model of {theirs:,} parameters where ours has {wanted:,}: they are not the same.")
  chip = chips.of_kind(torch.cuda.get_device_name()) if cuda else None
  packages = {"transformers": "transformers", "open_clip": "open_clip_torch"}
  versions = {package: importlib.metadata.version(package) for package in ("torch", packages[who])}
  return train_in_torch(model, loss_of, config, cuda), {"peak": chip and chip.flops, "versions": versions}


def refuse_what_is_not_plain(who, config):
  """Raises a UsageError if a recipe asks for what the peers' step does not do."""
  for key, usual in PLAIN.items():
    value = config
    for name in key.split("."):
      value = getattr(value, name)
    if value != usual:
      raise UsageError(f"{who} is measured with {key}={usual!r}, and the recipe has {value!r}.")


def of_transformers(model):
  """transformers' `CLIPModel` of our sizes, and its loss as a function of images and tokens."""
  import transformers

  from clip_jax.convert import huggingface

  huggingface.rows(model)  # it says what transformers does not have
  values = huggingface.config_of(model, None, "float32")
  values["text_config"]["eos_token_id"] = model.text.vocab_size - 1  # of `examples`
  theirs = transformers.AutoModel.from_config(transformers.CLIPConfig.from_dict(values), attn_implementation="sdpa")
  return theirs, lambda images, tokens: theirs(input_ids=tokens, pixel_values=images, return_loss=True).loss


def of_open_clip(model):
  """open_clip's model of our sizes, and its loss as a function of images and tokens."""
  import open_clip

  from clip_jax.convert import open_clip as layout

  layout.rows(model)  # it says what open_clip does not have
  # The sizes are those of the name, unless the recipe or --set changed some.
  theirs = open_clip.create_model(model.name or "ViT-B-32", output_dict=True, **layout.config_of(model))
  loss = open_clip.ClipLoss()
  return theirs, lambda images, tokens: loss(**theirs(images, tokens))


def train_in_torch(model, loss_of, config, cuda):
  """A training loop as both projects have it.

  Args:
    model: a `torch.nn.Module` with `logit_scale`.
    loss_of: its loss, a function of images and tokens.
    config: a resolved `Config`.
    cuda: on an NVIDIA GPU, compiled; otherwise on the processor.

  Returns:
    A function that runs a number of steps, waits for them and returns the loss of the last.
  """
  import torch

  device = "cuda" if cuda else "cpu"
  if cuda:
    torch.set_float32_matmul_precision("high")  # TF32, as XLA multiplies float32 on a GPU, and as open_clip trains
    torch.backends.cudnn.benchmark = True  # as open_clip trains
    model.compile()
  model.train().to(device)
  torch.nn.init.constant_(model.logit_scale, math.log(config.model.logit_scale_init))
  settings = config.optimizer
  decayed, others = ([p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False))
  # Fused, as transformers' Trainer has it by default; on a processor it takes a fifth of the time of the loop over parameters.
  optimizer = torch.optim.AdamW(
    [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
    lr=settings.learning_rate / max(settings.warmup_steps, 1),  # where a warm-up begins
    betas=(settings.beta1, settings.beta2),
    eps=settings.epsilon,
    fused=True,
  )
  images, tokens = examples(config)
  pixels = (images.astype(np.float32) / 255 - np.float32(config.model.image_mean)) / np.float32(config.model.image_std)
  images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).to(device)
  tokens = torch.from_numpy(tokens).long().to(device)
  half, largest = config.model.compute_dtype == "bfloat16", config.loss.max_logit_scale

  def run(count):
    for _ in range(count):
      optimizer.zero_grad()
      with torch.autocast(device, torch.bfloat16, enabled=half):
        loss = loss_of(images, tokens)
      loss.backward()
      optimizer.step()
      if largest is not None:
        with torch.no_grad():
          model.logit_scale.clamp_(max=math.log(largest))
    if cuda:
      torch.cuda.synchronize()
    return loss.item()

  return run

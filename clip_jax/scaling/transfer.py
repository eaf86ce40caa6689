"""Learning rates that hold for other sizes: sweeps of them, and the scaling with width by which the best one stays where it is."""

from clip_jax.errors import UsageError
from clip_jax.scaling.sweep import Run

_MATRICES = r"/transformer/block_\d+/(attention/(qkv_kernel|out/kernel)|mlp_(in|out)/kernel)$"
# What a learned table adds to patches; the text tower's start at the same size at all widths already.
_TABLES = r"^image/(class_embedding|pos_embed)$"


def width_scaling(image, text):
  """Changes of a recipe by which a model is a wider one of the same kind, to a learning rate (Yang et al. 2022, arXiv 2203.03466).

  Of muP's rules (table 8 there) those that are not what the models here do anyway. With Adam, the learning rate of a matrix whose
  input is as wide as the model goes with 1 / width, and its weight decay against it, so that their product stays. The last projection
  starts with a standard deviation that goes with 1 / width, and not with its root as blocks do there and here; tables that are added to
  patches start at the same size at any width. Heads must keep their size, as attention scores do.

  Args:
    image: width of the image tower, as a multiple of that of the model whose learning rate is known.
    text: likewise, of the text tower.

  Returns:
    A dict from dotted key to value.
  """
  towers = [(name, ratio) for name, ratio in (("image", image), ("text", text)) if ratio != 1]
  patterns = [(f"^{name}({_MATRICES}|/projection$)", ratio) for name, ratio in towers]
  found = {
    "optimizer.lr_multipliers": tuple((pattern, 1 / ratio) for pattern, ratio in patterns),
    "optimizer.decay_multipliers": tuple((pattern, float(ratio)) for pattern, ratio in patterns),
    "train.init_multipliers": tuple((f"^{name}/projection$", ratio**-0.5) for name, ratio in towers)
    + (((_TABLES, image**0.5),) if image != 1 else ()),
  }
  return {key: value for key, value in found.items() if value}


def lr_sweep(recipe, rates, models, samples, batches=(None,), base=None, common=None):
  """Every model at every learning rate, for each batch size.

  Args:
    recipe: of all runs.
    rates: learning rates, at the end of the warm-up.
    models: a dict from what a model is called to changes of the recipe, each a dict from dotted key to value.
    samples: pairs seen by each run.
    batches: global batch sizes; None is the recipe's.
    base: the model by whose widths the others are scaled (`width_scaling`); as they are if None. The widths of all models must then be
      among their changes, as must be their heads.
    common: changes for all runs.

  Returns:
    A list of `clip_jax.scaling.sweep.Run`s.

  Raises:
    UsageError: widths or heads are missing, or heads are not of the same size.
  """
  runs = []
  for arch, of_model in models.items():
    scaled = {} if base is None else width_scaling(*_ratios(models, arch, base))
    for batch in batches:
      of_batch = {} if batch is None else {"train.global_batch_size": batch}
      for rate in rates:
        changes = {**(common or {}), **of_model, **scaled, **of_batch, "train.samples": samples, "optimizer.learning_rate": rate}
        name = f"{arch}{'' if batch is None else f'_b{batch}'}_lr{rate:g}"
        runs.append(Run(name, recipe, changes, arch))
  return runs


def _ratios(models, arch, base):
  if base not in models:
    raise UsageError(f"{base!r} is not one of the models, {', '.join(models)}, by which they could be scaled.")
  found = []
  for tower in ("vision", "text"):
    keys = f"model.{tower}.width", f"model.{tower}.heads"
    for name in (arch, base):
      missing = next((key for key in keys if key not in models[name]), None)
      if missing:
        raise UsageError(f"{missing} of {name} must be among its changes, to scale by width.")
    (width, heads), (of_base, base_heads) = ([models[name][key] for key in keys] for name in (arch, base))
    if width * base_heads != of_base * heads:
      raise UsageError(
        f"The heads of {arch} have another size than those of {base} in the {tower} tower ({width}/{heads} and {of_base}/{base_heads}); "
        "to scale by width, give the wider one more heads."
      )
    found.append(width / of_base)
  return found

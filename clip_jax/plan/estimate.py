"""What a training step needs, from the sizes of its model: FLOPs, bytes, memory; and how long that takes on a chip.

The compiler knows better where it can be asked. This is for GPUs, for what does not compile because it does not fit, and to tell which of many
meshes and policies are worth compiling. The constants were fitted to the compiler's own account of CLIP's models
(docs/planning.md, "How good the estimates are").
"""

import dataclasses
import re

from clip_jax.losses import global_batch
from clip_jax.models import size
from clip_jax.parallel import mesh as meshes
from clip_jax.parallel import rules
from clip_jax.train import state as states

# The share of the lower bound's speed that published runs of CLIP-like models reach: docs/planning.md, "Published and predicted".
EFFICIENCY = 0.44
# Which products a block does again for its backward pass: of all that are not kept, those whose results the gradient needs.
RECOMPUTED = {
  "none": (),
  "minimal": (None,),  # attention's own
  "attention": (None, "attention/out/kernel", "mlp_in/kernel"),
  "full": (None, "attention/qkv_kernel", "attention/out/kernel", "mlp_in/kernel"),
}
RECOMPUTED["offload"] = RECOMPUTED["minimal"]
# What a block keeps for its backward pass: arrays [tokens, width], and arrays [tokens, mlp_width].
KEPT = {"none": (7, 1), "minimal": (6, 1), "attention": (5, 0), "full": (1, 0), "offload": (1, 0)}
# In a loop the compiler cannot choose what to keep: without a policy, it keeps all, much of it in float32.
KEPT_IN_A_LOOP = {**KEPT, "none": (25, 2)}
PASSES = 9  # over what "none" keeps, forward and backward together
# How often a device sends (or gets) the bytes of a collective operation.
SENT = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "collective-permute": 1}


def step_flops(config):
  """FLOPs of one step over the whole batch, with what is computed again.

  Args:
    config: a resolved `Config`.
  """
  train, model = config.train, config.model
  flops = size.training_flops(model, train.global_batch_size, config.loss.name, config.optimizer.freeze)
  towers = _towers(config)
  again = sum(tower.recomputed(train.remat) for tower in towers)
  if train.microbatches > 1:  # embeddings first, without gradients
    again += sum(part.macs for tower in towers for part in tower.parts)
  return (flops + 2 * again) * train.global_batch_size


def memory(config, mesh):
  """What lies in the memory of a device when most of it is in use.

  Args:
    config: a resolved `Config`.
    mesh: the device mesh, abstract or not.

  Returns:
    A dict from `memory.PARTS` to bytes.
  """
  parameters, optimizer = _state_bytes(config, mesh)
  batch, shards = config.train.global_batch_size, meshes.batch_shards(mesh)
  example = 3 * config.model.image_size**2 + 4 * config.model.text.context_length
  activations, one_block = _activations(config, mesh)
  gradients = parameters * (2 if config.train.microbatches > 1 else 1)
  method = global_batch.method_of(config.loss, batch, config.model.embed_dim, shards)
  loss = global_batch.estimated_bytes(config.loss, method, batch, config.model.embed_dim, shards)
  # After the forward pass all activations are there, and the loss; then they go as gradients come, a block at a time.
  turn = activations + max(loss, one_block)
  gradients = max(gradients + one_block - turn, 0)
  return {
    "parameters": parameters,
    "optimizer": optimizer,
    "batch": batch // shards * example,
    "activations": round(activations + (one_block if one_block > loss else 0)),
    "gradients": round(gradients),
    "loss": loss if loss >= one_block else 0,
    "temporaries": _gathered(config, mesh),
  }


def hbm_bytes(config, mesh):
  """Bytes that a device reads and writes of its memory in one step, roughly.

  Args:
    config: a resolved `Config`.
    mesh: the device mesh, abstract or not.
  """
  parameters, optimizer = _state_bytes(config, mesh)
  # All of it is read and written; parameters twice more for their 16-bit copies, and gradients are written, summed and read.
  update, moved = 5 * parameters + 2 * optimizer, 0
  for tower in _towers(config, trained=True):
    if tower.first is None:
      moved += PASSES * 2 * _convolutions_bytes(config, mesh, tower)
    else:
      moved += PASSES * _tokens_bytes(config, mesh, tower) * tower.kept(KEPT["none"])
  return update + moved * config.train.microbatches


def collectives(config, mesh):
  """What a device has to send and get in one step: a dict from kind to [how many, bytes], as the compiler's account has it.

  Args:
    config: a resolved `Config`.
    mesh: the device mesh, abstract or not.
  """
  parameters, _ = _state_bytes(config, mesh)
  shards, batch, embed = meshes.batch_shards(mesh), config.train.global_batch_size, config.model.embed_dim
  found = {}
  if shards > 1:
    found["all-gather"] = [2, batch * embed * 4]
    found["reduce-scatter"] = [2, batch * embed * 4]
    found["all-reduce"] = [1, parameters]
  if mesh.shape["fsdp"] > 1:
    whole = _whole(config, mesh)
    passes = (2 if config.train.microbatches == 1 else 3) * config.train.microbatches
    found["all-gather"] = [passes, found["all-gather"][1] + passes * whole // 2]  # in bfloat16
    found["reduce-scatter"] = [1, found["reduce-scatter"][1] + whole]
  if mesh.shape["tensor"] > 1:
    # What attention and the MLP add to the stream, forward and backward.
    blocks = [tower for tower in _towers(config, trained=True) if tower.first is not None]
    added = sum(4 * _tokens_bytes(config, mesh, tower) * tower.sizes.width for tower in blocks) * config.train.microbatches
    count, before = found.get("all-reduce", (0, 0))
    found["all-reduce"] = [count + sum(4 * tower.sizes.layers for tower in blocks), before + added]
  return found


def seconds(chip, flops, traffic, collectives, network_bytes=0):
  """How long a step takes at least on one chip, by what it is limited by.

  Args:
    chip: a `chips.Chip`.
    flops: of the chip.
    traffic: bytes between it and its main memory.
    collectives: a dict from kind to [how many, bytes], of the chip.
    network_bytes: that it sends to other slices.

  Returns:
    A dict from "compute", "memory", "interconnect" and "network" to seconds, without what is not known.
  """
  found = {"compute": flops / chip.flops, "memory": traffic / chip.memory_bandwidth}
  if chip.interconnect:
    sent = sum(SENT[kind] * size for kind, (_, size) in collectives.items())
    found["interconnect"] = sent / (chip.interconnect / 2)  # published for both directions together
  if network_bytes and chip.network:
    found["network"] = network_bytes / chip.network
  return found


def network_bytes(config, devices):
  """What a chip sends to other slices, or machines, in one step: its share of the gradients, once around, and of the embeddings.

  Args:
    config: a resolved `Config`.
    devices: of one slice.
  """
  slices = config.mesh.dcn_data
  gradients = 2 * 4 * size.parameters(config.model)
  embeddings = 4 * 4 * config.train.global_batch_size * config.model.embed_dim
  return (slices - 1) / slices * (gradients + embeddings) / devices


@dataclasses.dataclass(frozen=True)
class _Tower:
  """One tower of a run.

  Attributes:
    parts: what it is made of, as training computes it (`size.Part`).
    sizes: a `clip_jax.config.Vision` or `Text`.
    frozen: whether nothing of it is trained.
  """

  parts: tuple
  sizes: object
  frozen: bool

  @property
  def first(self):
    """The first block's projection to queries, keys and values; None of a ResNet."""
    return next((part for part in self.parts if (part.path or "").endswith("transformer/block_0/attention/qkv_kernel")), None)

  @property
  def tokens(self):
    """Of an example."""
    return self.first.macs // self.first.size

  def kept(self, arrays):
    """Numbers of a token of a block, in `arrays` of `KEPT`."""
    return arrays[0] * self.sizes.width + arrays[1] * self.sizes.mlp_width

  def recomputed(self, remat):
    """Multiply-accumulates that its blocks do again."""
    again = RECOMPUTED[remat] if not self.frozen else ()
    blocks = (part for part in self.parts if part.path is None or "/transformer/" in part.path)
    return sum(part.macs for part in blocks if any(part.path is end if end is None else (part.path or "").endswith(end) for end in again))


def _towers(config, trained=False):
  find = re.compile(config.optimizer.freeze or "(?!)").search  # the latter matches nothing
  towers = []
  for parts, sizes in ((size.image_parts, config.model.vision), (size.text_parts, config.model.text)):
    parts = tuple(parts(config.model, training=True))
    towers.append(_Tower(parts, sizes, all(find(part.path) for part in parts if part.path is not None)))
  return [tower for tower in towers if not (trained and tower.frozen)]


def _tokens_bytes(config, mesh, tower):
  """Bytes of one number for each token of each block of a tower, of the pairs that a device computes at a time."""
  tokens = -(-tower.tokens // 8) * 8  # memory has whole tiles
  return _pairs_bytes(config, mesh) * tokens * tower.sizes.layers


def _pairs_bytes(config, mesh):
  itemsize = 2 if config.model.compute_dtype == "bfloat16" else 4
  return itemsize * config.train.global_batch_size / meshes.batch_shards(mesh) / config.train.microbatches


def _convolutions_bytes(config, mesh, tower):
  """Bytes of what the convolutions of a ResNet give, once: pixels times channels. Its norm follows each, and has as many channels."""
  pairs = zip(tower.parts, tower.parts[1:], strict=False)
  numbers = sum(part.macs // part.size * norm.size for part, norm in pairs if "/conv" in (part.path or "") and part.macs)
  return _pairs_bytes(config, mesh) * numbers


def _activations(config, mesh):
  """Bytes that the towers keep for their backward pass, and that one block needs in it."""
  kept = (KEPT_IN_A_LOOP if config.train.scan else KEPT)[config.train.remat]
  total, largest, tensor = 0, 0, mesh.shape["tensor"]
  for tower in _towers(config, trained=True):
    if tower.first is None:
      of_all = _convolutions_bytes(config, mesh, tower)
      total, largest = total + 2 * of_all, max(largest, of_all / 8)  # as they come, and normalised
      continue
    bytes_, width, layers = _tokens_bytes(config, mesh, tower), tower.sizes.width, tower.sizes.layers
    # The stream that blocks add to is whole on each device; heads and the MLP are split over "tensor".
    whole = min(tower.kept(kept), 2 * width)
    total += bytes_ * (whole + (tower.kept(kept) - whole) / tensor)
    one_block = bytes_ / layers * tower.kept((8, 1)) / tensor
    if config.train.attention == "xla":  # which writes the scores down, and the weights they become
      scores = 2 * bytes_ * tower.sizes.heads * tower.tokens / tensor
      total, one_block = total + (scores if config.train.remat == "none" else 0), one_block + scores / layers
    largest = max(largest, one_block)
  return total, largest


def _gathered(config, mesh):
  """Bytes of parameters that are gathered from other devices when they are used: two blocks' at a time."""
  layers = sum(tower.sizes.layers or sum(tower.sizes.stages) for tower in _towers(config))
  return 2 * _whole(config, mesh) // layers if mesh.shape["fsdp"] > 1 else 0


def _whole(config, mesh):
  """Bytes of the parameters that are a device's once "fsdp" is gathered."""
  return 4 * size.parameters(config.model) // mesh.shape["tensor"]


def _state_bytes(config, mesh):
  """Bytes of a device's parameters, and of what the optimizer keeps; searches ask for the same again and again."""
  key = config.model, config.optimizer, config.mesh, mesh.axis_sizes
  if key not in _known:
    state, _ = states.describe(config, mesh)
    _known[key] = rules.local_bytes(state.params), rules.local_bytes((state.opt_state, state.ema))
  return _known[key]


_known = {}

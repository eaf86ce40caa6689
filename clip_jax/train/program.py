"""A compiled training step as a file: made where there is time, run where chips are paid for."""

import hashlib
import json
from pathlib import Path

import jax

from clip_jax import config as configs
from clip_jax import files
from clip_jax.errors import UsageError
from clip_jax.files import tell
from clip_jax.train import environment
from clip_jax.train import state as states
from clip_jax.train import step as steps

MAGIC = b"clip_jax program 1\n"
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")
CODE = ("losses", "models", "parallel", "train")  # packages that a step is traced from
SECTIONS = ("model", "loss", "train", "optimizer", "mesh")  # of the config
# Keys of `train` that a step does not depend on.
NOT_IN_IT = ("log_every", "init_from", "init_tower", "max_bad_steps", "spike_factor", "spike_window", "on_spike", "step_timeout", "host_timeout", "join_timeout")


def save(path, compiled, config, mesh):
  """Writes a compiled step, with what it was made of and for.

  Args:
    path: the file; an older one is replaced.
    compiled: what the jitted step of `step.create` compiles to.
    config: the resolved `Config` it was made from.
    mesh: the device mesh it was made for.

  Raises:
    UsageError: the file cannot be written.
  """
  from jax.experimental import serialize_executable

  payload, _, out_tree = serialize_executable.serialize(compiled)
  _, metrics = jax.tree.unflatten(out_tree, range(out_tree.num_leaves))
  header = {"sha256": hashlib.sha256(payload).hexdigest(), "metrics": list(metrics), **_made_of(config, mesh)}
  try:
    files.write_bytes(path, MAGIC + json.dumps(header).encode() + b"\n" + payload)
  except OSError as error:
    raise UsageError(f"{path} cannot be written: {error.strerror or error}.") from error


def load(path, config, mesh):
  """A compiled step from a file, if it is what this run would compile.

  Reading a program can run any code: it must come from somebody who may.

  Args:
    path: what `save` wrote.
    config: the run's resolved `Config`.
    mesh: its device mesh.

  Returns:
    A function as `step.create` returns; or None, and why, in a line on standard error, where the program was made of other versions, code
    or settings, or for other devices.

  Raises:
    UsageError: the file is missing, cut off, or no program.
  """
  from jax.experimental import serialize_executable

  header, payload = _read(path)
  here = _made_of(config, mesh)
  for key, value in here.items():
    if header[key] != value:
      tell(f"{path} is not used, and the step is compiled: {_difference(key, header[key], value)}.")
      return None
  state, batch = states.describe(config, mesh)[0], steps.inputs(config, mesh)
  in_tree, out_tree = jax.tree.structure(((state, batch), {})), jax.tree.structure((state, dict.fromkeys(header["metrics"], 0)))
  devices = list(mesh.devices.flat)
  return serialize_executable.deserialize_and_load(payload, in_tree, out_tree, devices[0].client, devices)


def _read(path):
  try:
    content = Path(path).read_bytes()
  except OSError as error:
    raise UsageError(f"--compiled={path} cannot be read: {error.strerror}.") from error
  if not content.startswith(MAGIC):
    raise UsageError(f"--compiled={path} is not a program; `clip-jax plan --save-compiled` writes one.")
  header, _, payload = content[len(MAGIC) :].partition(b"\n")
  try:
    header = json.loads(header)
  except ValueError:
    header = {}
  if hashlib.sha256(payload).hexdigest() != header.get("sha256"):
    raise UsageError(f"--compiled={path} is damaged or cut off; copy it again, or make it anew with `clip-jax plan --save-compiled`.")
  return header, payload


def _made_of(config, mesh):
  """Everything that a compiled step depends on, ready for JSON."""
  values = configs.to_dict(config)
  values["train"] = {key: value for key, value in values["train"].items() if key not in NOT_IN_IT}
  devices = list(mesh.devices.flat)
  return {
    "versions": {name: environment.version(name) for name in PACKAGES},
    "code": environment.code(*CODE),
    "kind": devices[0].device_kind,
    "mesh": dict(mesh.shape),
    # Which chip does which part, by its place in the slice.
    "devices": [[device.id, *map(int, getattr(device, "coords", ()))] for device in devices],
    "config": {name: values[name] for name in SECTIONS},
  }


def _difference(key, old, new):
  if key in ("versions", "mesh"):
    name = next(name for name in {**old, **new} if old.get(name) != new.get(name))
    return f"it was made with {name} {old.get(name)}, and here is {new.get(name)}"
  if key == "config":
    section = next(name for name in new if old[name] != new[name])
    name = next(name for name in {**old[section], **new[section]} if old[section].get(name) != new[section].get(name))
    return f"it was made for config.{section}.{name}={old[section].get(name)!r}, and this run has {new[section].get(name)!r}"
  if key == "kind":
    return f"it was made for {old}, and here is {new}"
  return {"code": "it was made from other code of clip_jax", "devices": "its devices have other places in the slice"}[key]

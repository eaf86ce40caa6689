"""What a run ran on, for its report."""

import importlib
import importlib.metadata
import os
import platform
import time

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


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
    "clip_jax": importlib.import_module("clip_jax").__version__,
  }
  return found | {package: importlib.metadata.version(package) for package in PACKAGES}

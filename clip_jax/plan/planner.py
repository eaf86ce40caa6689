"""Plans a run on chips that are not there: does it fit, how fast is it, how long does it take, what does it cost."""

import dataclasses
import time

import jax

from clip_jax.errors import ConfigError, UsageError
from clip_jax.parallel import mesh as meshes
from clip_jax.plan import compile as compiler
from clip_jax.plan import estimate, memory, slices
from clip_jax.plan.candidates import candidates, estimated, what_would_fit
from clip_jax.plan.targets import HERE, is_compiled, resolved, slices_of, target
from clip_jax.train import state as states
from clip_jax.train import step as steps

__all__ = ["HERE", "by_estimate", "candidates", "is_compiled", "plan", "resolved", "search", "smallest", "target", "what_would_fit"]


def plan(config, where, name="", price=None, fresh=False):
  """Plans one config for one topology: asks the compiler where it can be asked, of a TPU or of this machine.

  Args:
    config: a `Config` that `resolved` returned.
    where: a `Target`.
    name: what the config is called in the answer.
    price: of a chip for an hour, in any currency; costs are not said without it.
    fresh: to compile it anew, for a program that is saved.

  Returns:
    A dict, ready for JSON (docs/planning.md has its keys), and the compiled step with its mesh, or None.

  Raises:
    UsageError: the compiler is not here.
  """
  if not is_compiled(where):
    return by_estimate(config, where, name, price), None
  compiled = None
  mesh = meshes.create(config, None if where.topology == HERE else compiler.devices(where.topology, config.mesh.dcn_data))
  start = time.monotonic()
  try:
    # JAX cannot read back from its cache what was compiled for chips that are not there.
    fresh = fresh or where.topology != HERE
    compiled = compiler.compile(steps.create(config, mesh), states.describe(config, mesh)[0], steps.inputs(config, mesh), fresh=fresh)
  except compiler.OutOfMemoryError as error:
    found = _does_not_fit(config, where, error)
  else:
    found = _compiled(where, compiler.report(compiled))
  answer = _answer(config, where, name, price, {**found, "compile_s": time.monotonic() - start})
  if where.topology != HERE:
    jax.clear_caches()  # a step that was traced is a gigabyte of this machine's memory, and nobody will run it
  return answer, compiled and (compiled, mesh)


def by_estimate(config, where, name="", price=None):
  """Plans one config for one topology from its sizes alone, in no time.

  Args:
    config: as `plan`.
    where: as `plan`.
    name: as `plan`.
    price: as `plan`.

  Returns:
    A dict as `plan`'s.
  """
  return _answer(config, where, name, price, estimated(config, where))


def _compiled(where, report):
  per_chip = 1 / where.share
  parts = report.memory or {"arguments": report.argument_bytes, "temporaries": report.peak_bytes - report.argument_bytes}
  return {
    "method": "compiler",
    # What does not fit on a TPU its compiler does not compile.
    "fits": where.topology != HERE or report.peak_bytes * per_chip <= where.capacity,
    "peak_hbm_bytes": report.peak_bytes * per_chip,
    "memory": {part: size * per_chip for part, size in parts.items()},
    "flops": report.flops * per_chip,
    "bytes_accessed": report.bytes_accessed * per_chip,
    "hbm_traffic_bytes": report.hbm_bytes * per_chip,
    "collectives": {kind: [count, size * per_chip] for kind, (count, size) in report.collectives.items()},
  }


def _does_not_fit(config, where, error):
  found = estimated(config, where)
  state = {part: found["memory"][part] for part in ("parameters", "optimizer", "batch")}
  # What the compiler calls temporaries has the state in it, too. Whose the rest is is not known of a program that is not there.
  needed = error.needed_bytes / where.share if error.needed_bytes else found["peak_hbm_bytes"]
  return {
    "method": "compiler",
    "fits": False,
    "peak_hbm_bytes": needed,
    "memory": dict.fromkeys(memory.PARTS, 0) | state | {"temporaries": needed - sum(state.values())},
    "flops": None,
    "bytes_accessed": None,
    "hbm_traffic_bytes": None,
    "collectives": None,
  }


def _answer(config, where, name, price, found):
  number = round(where.devices * where.share) * slices_of(config, where)
  capacity, samples = where.capacity, config.train.samples
  answer = {
    "config": name,
    "topology": where.topology,
    "accelerator_type": slices.accelerator_type(where.topology),
    "slices": slices_of(config, where),
    "chips": number,
    "method": found["method"],
    "fits": found["fits"],
    "peak_hbm_bytes": round(found["peak_hbm_bytes"]),
    "hbm_capacity_bytes": capacity,
    "missing_bytes": 0 if found["fits"] else round(found["peak_hbm_bytes"]) - capacity,
    "memory": {part: round(size) for part, size in found["memory"].items()},
    **{key: found[key] for key in ("flops", "bytes_accessed", "hbm_traffic_bytes", "collectives")},
  }
  speed = _speed(config, where, found, number)
  hours = speed["days"] and speed["days"] * 24 * number
  advice = [] if found["fits"] else what_would_fit(config, where)
  return answer | speed | {
    "chip_hours": hours,
    "cost": hours * price if hours and price is not None else None,
    "samples": samples,
    "advice": advice,
    "compile_s": found.get("compile_s"),
  }


def _speed(config, where, found, number):
  keys = ("limits_s", "step_time_lower_bound_s", "step_time_estimate_s", "efficiency", "samples_per_second", "days")
  if not found["fits"] or where.chip is None:
    return dict.fromkeys(keys)
  if not is_compiled(where):
    # Machines with GPUs are joined by the network; what goes through it is as between slices.
    machines = -(-number // where.chip.host)
    across = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, dcn_data=machines))
    network = estimate.network_bytes(across, min(number, where.chip.host))
  else:
    network = estimate.network_bytes(config, round(where.devices * where.share))
  limits = estimate.seconds(where.chip, found["flops"], found["hbm_traffic_bytes"], found["collectives"], network)
  bound = max(limits.values())
  step = bound / estimate.EFFICIENCY
  rate = config.train.global_batch_size / step
  return dict(zip(keys, (limits, bound, step, estimate.EFFICIENCY, rate, config.train.samples / rate / 86_400), strict=True))


def search(config, where, name="", price=None, most=4, tell=lambda text: None):
  """Looks for the fastest way to run a config on a topology: our estimate ranks, the compiler decides.

  Candidates are compiled in the order of their estimates, until one that fits is as fast as the next could be, or nearly.

  Args:
    config: a `Config` that `resolved` returned.
    where: a `Target`.
    name: as `plan`.
    price: as `plan`.
    most: candidates to compile.
    tell: called with a line of text before each.

  Returns:
    A dict as `plan`'s, of the best, with `flags`, the changes, and `tried`, a list of such dicts; or that of the last that was tried, if none fits.

  Raises:
    UsageError: nothing is published of the chip.
  """
  if where.chip is None:
    raise UsageError("What is fastest cannot be told for this machine: its chips have no published peak in clip_jax/plan/chips.py.")
  # What does not fit by a tenth by our estimate is not worth two minutes; but as it is, a config is tried in any case: unrolled, the compiler
  # computes again by itself what has no place.
  possible = [one for one in candidates(config, where) if one.peak <= 1.1 * where.capacity or not one.changes]
  tried, best = [], None
  for one in possible:
    if len(tried) == most or (best and best["step_time_lower_bound_s"] <= 1.05 * one.seconds):
      break
    tell(f"{name} for {where.topology} with {' '.join(one.flags) or 'no change'}: {len(tried) + 1} of at most {min(most, len(possible))}")
    found, _ = plan(one.config, where, name, price)
    found = {**found, "flags": one.flags}
    tried.append(found)
    if found["fits"] and (best is None or found["step_time_lower_bound_s"] < best["step_time_lower_bound_s"]):
      best = found
  return {**(best or tried[-1]), "tried": tried}


def smallest(recipe, family, name="", price=None, tell=lambda text: None):
  """The smallest slice in the table on which a recipe fits, as it is.

  Args:
    recipe: a `ConfigDict`.
    family: a `chips.Chip`.
    name: as `plan`.
    price: as `plan`.
    tell: called with a line of text before each compilation.

  Returns:
    A dict as `plan`'s, with `tried`, a list of such dicts; None if it cannot be laid over any slice, or fits on none.
  """
  usable = []
  for topology in slices.names(family):
    where = target(topology)
    try:
      config = resolved(recipe, where)
    except ConfigError:
      continue
    if _least(config, where) <= 1.25 * where.capacity:  # by which our estimate may be too high
      usable.append((config, where))
  tried = []
  for config, where in usable:
    tell(f"{name} for {where.topology}")
    tried.append(plan(config, where, name, price)[0])
    if tried[-1]["fits"]:
      return {**tried[-1], "tried": tried}
  return None


def _least(config, where):
  """Bytes of a chip that a config needs at least by our estimate: unrolled, the compiler may compute again whatever has no place."""
  if not config.train.scan and config.train.remat == "none":
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, remat="full"))
  return estimated(config, where)["peak_hbm_bytes"]

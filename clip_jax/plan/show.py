"""A plan for people: a page of lines, or a row of a table."""

from clip_jax.plan.chips import GIB


def head(price=None):
  """The first two lines of a table of plans; `row` makes the others.

  Args:
    price: of a chip-hour, if it was given.
  """
  cost = " cost |" if price is not None else ""
  names = "| recipe | topology | type | chips | fits | peak a chip | TFLOP | GB | a step, at least | estimate | pairs/s | days | chip-hours |"
  return f"{names}{cost}\n|{'---|' * (names.count('|') - 1 + bool(cost))}\n"


def row(found):
  """A plan as a line of a table, in Markdown.

  Args:
    found: what `planner.plan` returns.
  """
  name = found["config"].rpartition("/")[2].removesuffix(".py")
  cells = [name, found["topology"], found["accelerator_type"] or "-", f"{found['chips']:,}"]
  of = f" of {found['hbm_capacity_bytes'] / GIB:.2f}"
  cells += ["yes" if found["fits"] else f"no, {found['missing_bytes'] / GIB:.2f} GiB too much", f"{found['peak_hbm_bytes'] / GIB:.2f}{of} GiB"]
  if found["days"] is None:
    cells += [f"with {' '.join(found['advice'][0])}" if found["advice"] else "", *[""] * 6]
  else:
    cells += [f"{found['flops'] / 1e12:,.1f}", f"{found['hbm_traffic_bytes'] / 1e9:,.0f}", f"{found['step_time_lower_bound_s'] * 1e3:,.1f} ms"]
    cells += [f"{found['step_time_estimate_s'] * 1e3:,.1f} ms", f"{found['samples_per_second']:,.0f}", f"{found['days']:,.1f}", f"{found['chip_hours']:,.0f}"]
    if found["cost"] is not None:
      cells.append(f"{found['cost']:,.0f}")
  return "| " + " | ".join(cells) + " |"


def page(found, price=None):
  """A plan as lines for people.

  Args:
    found: what `planner.plan` returns.
    price: of a chip-hour, if it was given.
  """
  type_ = f" ({found['accelerator_type']})" if found["accelerator_type"] else ""
  slices = f"{found['slices']} slices of " if found["slices"] > 1 else ""
  by = "by the compiler" if found["method"] == "compiler" else "by an estimate from the sizes of the model: there is no compiler for it here"
  where = "this machine" if found["topology"] == "here" else f"{slices}{found['topology']}{type_}"
  lines = [f"{found['config']} on {where}, {found['chips']:,} chip{'s' if found['chips'] > 1 else ''}, {by}"]

  def line(name, text):
    lines.append(f"{name:<12}{text}")

  if found.get("flags"):
    line("with", " ".join(found["flags"]))
  of = f" of {found['hbm_capacity_bytes'] / GIB:.2f}"
  peak = f"{found['peak_hbm_bytes'] / GIB:.2f}{of} GiB a chip"
  line("fits", f"yes: {peak}" if found["fits"] else f"no, {found['missing_bytes'] / GIB:.2f} GiB too much: {peak}")
  line("", ", ".join(f"{part} {size / GIB:.2f}" for part, size in found["memory"].items() if size or found["fits"]))
  for flags in found["advice"]:
    line("would fit", f"{' '.join(flags)}  (by an estimate{'; --search asks the compiler' if found['method'] == 'compiler' else ''})")
  if not found["fits"] and not found["advice"]:
    line("would fit", "nothing that was tried: take a larger slice, or chips with more memory")
  if found["flops"] is not None:
    line("a step", f"{found['flops'] / 1e12:,.2f} TFLOP and {found['hbm_traffic_bytes'] / 1e9:,.1f} GB between HBM and the chip"
         + (f" ({found['bytes_accessed'] / 1e9:,.1f} GB accessed, by the compiler's account)" if found["method"] == "compiler" else ""))
    for kind, (count, size) in found["collectives"].items():
      line("", f"{kind} {count:,} times, {size / 1e6:,.1f} MB in all")
  if found["days"] is not None:
    by = ", ".join(f"{what} {seconds * 1e3:,.1f}" for what, seconds in found["limits_s"].items())
    bound, step = (found[f"step_time_{kind}_s"] * 1e3 for kind in ("lower_bound", "estimate"))
    line("takes", f"{bound:,.1f} ms at least ({by}); about {step:,.1f} ms, at {found['efficiency']:.0%} of that speed")
    rate = found["samples_per_second"]
    line("throughput", f"{rate:,.0f} pairs/s, {rate / found['chips']:,.0f} a chip")
    cost = "" if found["cost"] is None else f", {found['cost']:,.0f} at {price:g} a chip-hour"
    line("in all", f"{found['samples']:,} pairs: {found['days']:,.2f} days, {found['chip_hours']:,.0f} chip-hours{cost}")
  if found.get("tried"):
    tried = [f"{' '.join(one['flags']) or 'no change'}" if "flags" in one else one["topology"] for one in found["tried"]]
    line("tried", "; ".join(f"{name}: {_verdict(one)}" for name, one in zip(tried, found["tried"], strict=True)))
  if found["compile_s"] is not None:
    line("compiled", f"in {found['compile_s']:.0f} s" + (f", to {found['compiled_file']}" if "compiled_file" in found else ""))
  return "\n".join(lines)


def _verdict(found):
  return f"{found['step_time_estimate_s'] * 1e3:,.1f} ms, {found['peak_hbm_bytes'] / GIB:.2f} GiB" if found["fits"] else "does not fit"

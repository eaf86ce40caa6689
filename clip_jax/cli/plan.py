"""`clip-jax plan`: will a run fit, how fast, how long, how much, on chips that are not there."""

from clip_jax import files
from clip_jax.cli import arguments as types
from clip_jax.errors import ConfigError, UsageError

EPILOG = """
Topologies are those of JAX, v5e:16x16, or Google Cloud's accelerator types, v5litepod-256; h100:64 are 64 GPUs, by an estimate instead
of the compiler; "here" are the devices of this machine. --config.a.b=value changes a key of all recipes, as for main.py.
A config that does not fit is an answer, not an error: the exit code is 0."""


def add(verbs, verb):
  """Adds the verb.

  Args:
    verbs: the subparsers of the command.
    verb: what makes one of them, as in `clip_jax.cli`.
  """
  plan = verb(
    verbs, "plan", _plan, lambda found: print(found["text"], flush=True),
    "Compile the training step for TPUs that are not here: does it fit, how fast, how many days, at what cost.",
    "clip-jax plan --config=configs/vitb16.py --topology=v5e:16x16 --price-per-chip-hour=1.20",
  )  # fmt: skip
  plan.epilog += f"\n{EPILOG}"
  plan.set_defaults(overrides=[], json_of=lambda found: {key: value for key, value in found.items() if key != "text"})

  def several(flag, metavar, text):
    plan.add_argument(flag, nargs="+", action="extend", required=True, metavar=metavar, help=text)

  several("--config", "FILE", "recipes; more than one, or more than one topology, make a table")
  several("--topology", "NAME", "where to run: v5e:16x16, v5litepod-256, h100:64, here")
  plan.add_argument("--price-per-chip-hour", type=types.price, metavar="P", help="to say what it costs")
  how = plan.add_mutually_exclusive_group()
  how.add_argument("--search", action="store_true", help="try meshes, recomputation, microbatches and loops, and say which is fastest")
  how.add_argument("--min-slice", action="store_true", help="find the smallest slice on which it fits, of the chips of --topology (v5e will do)")
  how.add_argument("--save-compiled", metavar="FILE", help="keep the program, for main.py --compiled")
  plan.add_argument("--quick", action="store_true", help=(
    "let the compiler try less hard, which takes a third of the time; the program it tells of is a little worse than that of a run"
  ))  # fmt: skip


def _plan(arguments):
  from clip_jax.config import recipes
  from clip_jax.parallel import distributed

  distributed.leave_tpu_out()
  import jax

  from clip_jax.plan import planner, show

  if arguments.quick:
    if arguments.save_compiled:
      raise UsageError("--quick is for looking, and --save-compiled for running: leave one of them out.")
    jax.config.update("jax_optimization_level", "O0")
  loaded = {name: recipes.load([f"--config={name}", *arguments.overrides]) for name in dict.fromkeys(arguments.config)}
  if arguments.min_slice:
    yield from _smallest(arguments, loaded)
    return
  targets = [planner.target(name) for name in dict.fromkeys(arguments.topology)]
  # All are checked before the first is compiled.
  cases = [(name, where, planner.resolved(recipe, where)) for name, recipe in loaded.items() for where in targets]
  if arguments.save_compiled and (len(cases) > 1 or not planner.is_compiled(targets[0])):
    raise UsageError("--save-compiled keeps one program: give one --config and one --topology that is compiled for, a TPU's or here.")
  head = show.head(arguments.price_per_chip_hour) if len(cases) > 1 else ""
  for name, where, config in cases:
    step = None  # that of the case before is not needed any more, and large
    if arguments.search:
      found = planner.search(config, where, name, arguments.price_per_chip_hour, tell=_tell)
    else:
      if planner.is_compiled(where):
        _tell(f"{name} for {'this machine' if where.topology == planner.HERE else where.topology}")
      found, step = planner.plan(config, where, name, arguments.price_per_chip_hour, fresh=bool(arguments.save_compiled))
      if arguments.save_compiled and not step:
        files.tell(f"{arguments.save_compiled} is not written: there is no program that fits.")
      elif arguments.save_compiled:
        from clip_jax.train import program

        program.save(arguments.save_compiled, step[0], config, step[1])
        found["compiled_file"] = arguments.save_compiled
    found["text"] = head + (show.row(found) if len(cases) > 1 else show.page(found, arguments.price_per_chip_hour))
    head = ""
    yield found


def _smallest(arguments, loaded):
  from clip_jax.plan import chips, planner, show, slices

  families = {}
  for name in dict.fromkeys(arguments.topology):
    chip = next((one for one in chips.CHIPS if one.slices and name in (one.topology, one.accelerator)), None)
    chip = chip or chips.of_topology(slices.topology_of(name))
    if not chip.slices:
      raise UsageError(f"--min-slice is for TPUs, which come in slices; {name} is not one.")
    families[chip.topology] = chip
  for name, recipe in loaded.items():
    for family, chip in families.items():
      found = planner.smallest(recipe, chip, name, arguments.price_per_chip_hour, tell=_tell)
      if found is None:
        raise ConfigError(
          f"{name} fits on no slice of {family} as it is, or cannot be laid over one; --search finds changes that make it fit, "
          f"as with --topology={slices.names(chip)[-1]}."
        )
      yield found | {"text": f"The smallest {family} on which {name} fits is {found['topology']}.\n" + show.page(found, arguments.price_per_chip_hour)}


def _tell(text):
  files.tell(f"compiling {text} ...")

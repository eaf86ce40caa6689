"""Sweeps: the runs they have, as commands and as configs, and what is said of those that cannot be used."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest

from clip_jax import config as configs
from clip_jax.config import recipes
from clip_jax.errors import UsageError
from clip_jax.scaling import collect, sweep

RECIPE = "tests/end_to_end/recipe.py"
SAMPLES = {"short": 1_600, "long": 6_400, "middle": 3_200}
MODELS = {"a": {"model.vision.layers": 1}, "b": {"model.vision.layers": 2}}
DATA = {"x": {"data.path": "x/{1,2}.tar"}, "y": {"data.path": "y.tar"}}


def written(tmp_path, text):
  """A sweep of one's own."""
  path = tmp_path / "mine.py"
  path.write_text(f"from clip_jax.scaling import sweep\n\nRECIPE = {RECIPE!r}\n\n\n{text}")
  return path


def test_a_cosine_grid_is_every_combination_by_itself():
  runs = sweep.grid(RECIPE, MODELS, DATA, SAMPLES, "cosine", common={"train.seed": 3})
  assert {run.name for run in runs} == {f"{m}_{d}_{s}" for m in MODELS for d in DATA for s in SAMPLES}
  one = next(run for run in runs if run.name == "b_x_middle")
  assert one.overrides == {
    "train.seed": 3, "model.vision.layers": 2, "data.path": "x/{1,2}.tar", "optimizer.schedule": "cosine", "train.samples": 3_200,
  }  # fmt: skip
  assert (one.arch, one.data, one.parent) == ("b", "x", "")


def test_shorter_runs_of_a_constant_rate_are_cooldowns_of_the_longest(tmp_path):
  runs = sweep.grid(RECIPE, MODELS, DATA, SAMPLES, common={"train.global_batch_size": 16}, each=lambda *names: {"data.seed": len(names[2])})
  (tmp_path / "runs").mkdir()
  plans = {run.name: sweep.plan(run, tmp_path / "runs") for run in runs}
  trunk, fork = plans["a_y_long"].config, plans["a_y_short"].config
  assert (trunk.train.steps, trunk.optimizer.cooldown_steps, trunk.checkpoint.keep_steps) == (400, 80, (80, 160))
  assert (fork.train.steps, fork.optimizer.cooldown_steps) == (100, 20)
  assert fork.train.fork_from == str(tmp_path / "runs/a_y_long/checkpoints/80") and plans["a_y_short"].run.fork_step == 80
  assert trunk.optimizer.schedule == fork.optimizer.schedule == "constant"
  assert trunk.data.seed == fork.data.seed == len("long")  # as the longest, or they could not share anything
  assert [plans[f"a_y_{label}"].own_samples for label in SAMPLES] == [20 * 16, 400 * 16, 40 * 16]


def test_what_a_run_is_called_to_do_is_what_its_line_says(tmp_path):
  """Of all recipes that come with the project: the line for a shell is that config, tuples and names with marks included."""
  for name in ("emoji_grid", "emoji_lr:mup", "openclip_grid:constant"):
    plans = sweep.load(name, tmp_path, ["--config.train.seed=5"])
    for one in (plans[0], plans[-1]):
      words = shlex.split(one.line)
      assert words[:2] == ["python", "main.py"] and words[-1] == f"--workdir={tmp_path}/runs/{one.run.name}"
      config = configs.resolve(recipes.load(words[2:-1]))
      assert config == one.config and config.train.seed == 5


def test_the_papers_grid_is_as_published(tmp_path):
  plans = {one.run.name: one for one in sweep.load("openclip_grid", tmp_path)}
  assert len(plans) == 5 * 3 * 3
  published = {one.run.name for one in sweep.load("openclip_grid:published", tmp_path)}
  assert len(published) == 29 < len(plans) and published < set(plans)
  # Cherti et al. 2022, trained_models_info.csv: learning rate, batch, warm-up.
  for name, rate, batch, warmup in (
    ("ViT-B-32_LAION-2B_34B", 1e-3, 79_104, 2_000),
    ("ViT-B-16_LAION-400M_13B", 5e-4, 33_792, 10_000),
    ("ViT-L-14_LAION-400M_13B", 1e-3, 86_016, 2_000),
    ("ViT-H-14_LAION-2B_34B", 5e-4, 79_104, 2_000),
    ("ViT-g-14_LAION-2B_13B", 5e-4, 64_000, 2_000),
  ):
    config = plans[name].config
    assert name in published
    assert (config.optimizer.learning_rate, config.train.global_batch_size, config.optimizer.warmup_steps) == (rate, batch, warmup)
  # Their arch_info.csv.
  gmacs = {"ViT-B-32": 7.40, "ViT-B-16": 20.57, "ViT-L-14": 87.73, "ViT-H-14": 190.97, "ViT-g-14": 290.74}
  assert {one.run.arch: one.gmacs for one in plans.values()} == pytest.approx(gmacs, rel=0.01)
  assert {one.config.model.activation for one in plans.values()} == {"gelu"}
  assert "imagenet1k" in plans["ViT-B-32_LAION-2B_34B"].config.eval.datasets
  constant = sweep.load("openclip_grid:constant", tmp_path)
  assert sum(bool(one.run.parent) for one in constant) == 30
  assert sum(one.own_samples for one in constant) < 0.76 * sum(one.own_samples for one in plans.values())


def test_the_small_grid_has_what_a_law_needs(tmp_path):
  plans = sweep.load("emoji_grid", tmp_path)
  models, data, samples = ({getter(one) for one in plans} for getter in (lambda o: o.run.arch, lambda o: o.run.data, lambda o: o.config.train.samples))
  assert len(models) >= 3 and len(data) >= 2 and len(samples) >= 3 and len(plans) == len(models) * len(data) * len(samples)
  assert [bool(one.run.parent) for one in plans] == sorted(bool(one.run.parent) for one in plans)  # parents first


def test_a_sweep_is_written_down(tmp_path):
  collect.describe(tmp_path, "emoji_grid", sweep.load("emoji_grid", tmp_path))
  content = json.loads((tmp_path / "sweep.json").read_text())
  one = content["runs"][-1]
  assert content["format"] == 1 and one["parent"] and one["fork_step"] * one["global_batch_size"] + one["own_samples"] == one["samples"]


@pytest.mark.parametrize(
  "text, message",
  [
    ("x = 1", r"mine.py cannot be used as a sweep: it has no function get_sweep\(\)"),
    ("def get_sweep():\n  return []", r"its get_sweep\(\) must return a list of clip_jax.scaling.sweep.Run"),
    ("def get_sweep():\n  return 1 / 0", "mine.py cannot be used as a sweep: ZeroDivisionError division by zero"),
    ("def get_sweep(:", "mine.py cannot be used as a sweep: SyntaxError"),
    ("def get_sweep():\n  return [sweep.Run('a', RECIPE, {}), sweep.Run('a', RECIPE, {})]", "two runs are called a"),
    ("def get_sweep():\n  return [sweep.Run('../a', RECIPE, {})]", r"'../a' cannot be the name of a run"),
    ("def get_sweep():\n  return [sweep.Run('a', 'nowhere.py', {})]", "a: --config=nowhere.py cannot be loaded"),
    ("def get_sweep():\n  return [sweep.Run('a', RECIPE, {'train.stepz': 3})]", "a: config.train.stepz is not a key of train. Did you mean"),
    ("def get_sweep():\n  return [sweep.Run('a', RECIPE, {'train.steps': 0})]", "a: config.train asks for 0 steps"),
    ("def get_sweep():\n  return [sweep.Run('a', RECIPE, {}, parent='b', fork_step=1)]", "a forks from b, which is not in the sweep"),
    (
      "def get_sweep():\n  a = sweep.Run('a', RECIPE, {})\n  b = sweep.Run('b', RECIPE, {}, parent='a', fork_step=40)\n  return [a, b]",
      "b: it would fork at step 40, and has 40 steps",
    ),
    ("def get_sweep():\n  return sweep.grid(RECIPE, {'a': {}}, {'x': {}}, {'1': 100, '2': 200})", "a_x_2: a grid with cooldowns needs train.global_batch_size"),
    ("def get_sweep():\n  return sweep.grid(RECIPE, {'a': {}}, {'x': {}}, {'1': 100}, 'linear')", "'linear' is not a schedule of a grid; cosine and constant are"),
  ],
)
def test_what_is_no_sweep_is_said_in_a_sentence(tmp_path, text, message):
  path = written(tmp_path, text)
  with pytest.raises(UsageError, match=message) as raised:
    sweep.load(str(path), tmp_path)
  assert "\n" not in str(raised.value) and not list(Path(tmp_path).glob("runs"))


def test_names_and_arguments_of_sweeps(tmp_path):
  with pytest.raises(UsageError, match="emoji_gird is no sweep. Did you mean emoji_grid."):
    sweep.load("emoji_gird", tmp_path)
  with pytest.raises(UsageError, match="its get_sweep.. takes no argument, and 'x' is given"):
    sweep.load(f"{written(tmp_path, 'def get_sweep(): pass')}:x", tmp_path)
  with pytest.raises(UsageError, match="'some' is no part of this grid; all, published and constant are"):
    sweep.load("openclip_grid:some", tmp_path)


def test_a_run_of_another_config_is_not_taken_for_one_of_the_sweep(tmp_path):
  def planned(**overrides):
    return sweep.plan(sweep.Run("a", RECIPE, {"data.path": "x.tar", "model.compute_dtype": "auto", **overrides}), tmp_path)

  first = planned()
  sweep.check_unchanged([first])  # there is nothing yet
  first.workdir.mkdir()
  settled = dataclasses.replace(first.config, model=dataclasses.replace(first.config.model, compute_dtype="bfloat16"))
  (first.workdir / "config.json").write_text(json.dumps(configs.to_dict(settled)))
  sweep.check_unchanged([first, planned(**{"train.log_every": 7})])
  with pytest.raises(UsageError, match=r"a holds a run with config.optimizer.learning_rate=0.001, and this config has 0.002"):
    sweep.check_unchanged([planned(**{"optimizer.learning_rate": 2e-3})])

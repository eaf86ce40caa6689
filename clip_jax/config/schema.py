"""The schema of a run: every key there is, its type and its meaning.

`None` as a default means "left open": the model's name, or another key, decides. A key that is not here
does not exist.
"""

from dataclasses import dataclass, field

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's training images, RGB in 0..1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Vision:
  """The image tower. What is left open comes from the model's name."""

  kind: str | None = None  # "vit" (CLIP's, the default), "siglip" (a ViT with a MAP head) or "resnet" (CLIP's)
  patch_size: int | None = None  # pixels; of a ViT
  width: int | None = None  # of a ResNet's first stage: the last is 32 times as wide
  layers: int | None = None  # of a ViT
  stages: tuple[int, ...] | None = None  # blocks of each stage of a ResNet
  heads: int | None = None  # of a ResNet's pooling
  mlp_width: int | None = None  # of a ViT; 4 * width if left open
  patch_drop: float = 0.0  # share of the patches left out in training, at random (Li et al. 2022, FLIP)


@dataclass(frozen=True)
class Text:
  """The text tower, a Transformer. What is left open comes from the model's name."""

  kind: str | None = None  # "clip" (causal, read at the end token; the default) or "siglip" (not causal, the last)
  context_length: int | None = None  # tokens, start and end included
  vocab_size: int | None = None
  width: int | None = None
  layers: int | None = None
  heads: int | None = None
  mlp_width: int | None = None
  train_length: int | None = None  # tokens kept in training, start and end included; all of them if left open
  reduction: str = "truncate"  # how: "truncate", "random" or "block" (Li et al. 2023, CLIPA)


@dataclass(frozen=True)
class Model:
  """Everything that must be known to use the weights. What is left open comes from the name, or is CLIP's."""

  name: str = ""  # a name of `clip-jax models`; empty if every size is given
  image_size: int | None = None  # pixels
  embed_dim: int | None = None
  activation: str | None = None  # "quick_gelu" (OpenAI's weights), "gelu" or "gelu_tanh" (SigLIP's)
  norm_epsilon: float | None = None
  image_mean: tuple[float, ...] | None = None
  image_std: tuple[float, ...] | None = None
  resize_mode: str | None = None  # "shortest": shorter side to size, then a centre crop; "squash": both sides
  tokenizer: str | None = None  # "clip", or the path of a tokenizer.json or spiece.model
  compute_dtype: str = "float32"  # or "bfloat16", or "auto": the faster one; parameters are float32 either way
  residual_dtype: str | None = None  # of what blocks add to, "float32" or "bfloat16"; compute_dtype if left open
  logit_scale_init: float | None = None  # what cosines are multiplied by, before anything is learned
  logit_bias_init: float | None = None  # what is then added, learned with the sigmoid loss; no bias if left open
  vision: Vision = field(default_factory=Vision)
  text: Text = field(default_factory=Text)


@dataclass(frozen=True)
class Loss:
  """The contrastive loss, over the whole global batch. docs/losses.md has the equations."""

  name: str = "softmax"  # or "sigmoid" (SigLIP)
  method: str = "auto"  # "gather", "ring", or by estimated memory; all give the same
  chunk: int | None = None  # columns scored at a time; chosen if left open
  dtype: str = "float32"  # or "bfloat16": what embeddings are rounded to before they are scored
  label_smoothing: float = 0.0
  mask_duplicates: bool = False  # pairs with the same caption are not each other's negatives
  max_logit_scale: float | None = 100.0  # the logit scale is clipped to it after each update


@dataclass(frozen=True)
class Data:
  """Where pairs come from, in which order, and what is done to an image."""

  source: str = "auto"  # "tar", "array_record", "tfds", "parquet", "folder", "emoji", or what the path looks like
  path: str = ""  # a glob of files, local, gs:// or s3://, {a..b} and {a,b} expanded; with "emoji" inside its folder
  mixture: tuple[tuple[str, float], ...] = ()  # (path, weight) pairs, in exactly these proportions; instead of a path
  image: str = ""  # column or feature with the image; found by itself if empty
  captions: tuple[tuple[str, float], ...] = ()  # (name, weight) of captions to draw from; the usual ones if empty
  min_size: int = 0  # pixels of the shorter side; records that fail this and the next three are left out
  max_aspect: float | None = None  # longer side over shorter side
  min_caption: int = 0  # characters
  max_caption: int | None = None
  order: str = "global"  # one permutation of all records; or "blocks": few large reads, for object stores
  block: int = 128  # neighbouring records that are read together
  window: int = 16  # blocks whose records are shuffled together
  lanes: int = 64  # windows that are open at the same time, each for its own rows of the batch
  block_cache: float = 8.0  # GiB of records that each process may keep until they are used
  seed: int = 0  # of the order and of the augmentation
  crop_scale: tuple[float, ...] = (0.9, 1.0)  # random resized crop: smallest and largest share of the area
  color_jitter: float = 0.0  # largest change of brightness, contrast and saturation, as a factor
  flip: float = 0.0  # probability of mirroring left to right
  rotation: float = 0.0  # largest angle, degrees
  other_captions: float = 0.0  # probability of taking one of the captions after a record's first
  threads: int = 0  # 0: as many as there are processor cores
  prefetch: int = 4  # batches kept ready
  read_deadline: float = 600.0  # seconds for one read, repetitions included, before the run stops and says which
  max_pixels: int = 256 * 1024 * 1024  # an image whose header claims more is not decoded
  max_bad_share: float = 0.05  # of records that do not decode, before the run stops
  allow_truncated: bool = False  # read the whole records of a shard that is cut off


@dataclass(frozen=True)
class Train:
  """How long, how large, and how often to say so."""

  global_batch_size: int = 32_768
  samples: int | None = None  # training pairs in all
  steps: int | None = None  # wins over samples
  attention: str = "auto"  # "xla", "pallas" (our kernel, for TPU), "cudnn", or what the platform has; the same but for rounding
  remat: str = "none"  # what blocks compute again: "minimal", "attention" (all but that), "full", or "offload" to the host
  quantization: str = "none"  # "int8" or "fp8": products of blocks in it (extra `quantization`), gradients of kernels aside
  scan: bool = False  # the blocks of a tower as one program in a loop: compiles in half the time
  microbatches: int = 1  # parts that go through the towers one by one; the loss is that of the whole batch
  init_from: str = ""  # whose parameters to start from: anything that `clip_jax.load` reads
  fork_from: str = ""  # a checkpoint of another run, DIR/checkpoints/STEP: goes on from there with its whole state, as that run would
  init_tower: str = "both"  # or "image" or "text": the other tower starts from nothing
  init_multipliers: tuple[tuple[str, float], ...] = ()  # (regular expression, factor) pairs for new parameters; the first match counts
  seed: int = 0  # of the parameters, and of what is left out of an example in training
  log_every: int = 1  # steps
  max_bad_steps: int = 10  # in a row whose loss or gradients are not finite (each is skipped), before the run stops
  spike_factor: float | None = 2.0  # a loss this many times the median of those before is told of
  spike_window: int = 100  # logged losses before it
  on_spike: str = "record"  # or "rollback": go back to the last checkpoint and leave out the batches since then
  step_timeout: float | None = 1_800.0  # seconds without progress until all stacks are printed; after twice as long the run ends
  host_timeout: int = 100  # seconds without a sign of life from a host, until the others end
  join_timeout: int = 300  # seconds to wait for the last process at the start
  deterministic: bool = False  # the same bits each time on GPUs, too, which costs speed there; TPUs and CPUs need no switch


@dataclass(frozen=True)
class Optimizer:
  """What is done with gradients. docs/optimizers.md has the equations.

  Spans of steps can be given in samples, too; then samples win, and a part of a batch counts as a step.
  """

  name: str = "adamw"  # or "lion", "adafactor" or "muon"
  learning_rate: float = 5e-4  # at the end of the warm-up, which is linear
  schedule: str = "cosine"  # after it: "cosine" or "linear" to the end; or "rsqrt" or "constant", which may have a cooldown
  warmup_steps: int = 2_000
  warmup_samples: int | None = None
  cooldown_steps: int = 0  # the last ones, linear to the end from where the schedule stands
  cooldown_samples: int | None = None
  timescale: int = 10_000  # steps of "rsqrt" after the warm-up until the rate has fallen to 0.71 of its peak
  timescale_samples: int | None = None
  end_learning_rate: float = 0.0  # after the last step
  weight_decay: float = 0.2
  no_decay: str = r"(^|/)(\w*bias|scale|mean|var|logit_scale)$"  # parameters left out of it, by path
  decay_multipliers: tuple[tuple[str, float], ...] = ()  # (regular expression, factor of it); the first match counts
  beta1: float = 0.9  # of the first moment, or momentum
  beta2: float = 0.98  # of the second moment; of Adafactor's the largest; of Lion's momentum
  epsilon: float = 1e-6  # AdamW's
  mu_dtype: str = "float32"  # or "bfloat16": what the first moment is kept in
  ema_decay: float | None = None  # also keep a moving average of the weights, which is what is evaluated, exported and loaded
  gradient_clip_norm: float | None = None
  freeze: str = ""  # parameters that stay as they are, as a regular expression; they get no gradient and no moments
  lr_multipliers: tuple[tuple[str, float], ...] = ()  # (regular expression, factor) pairs; the first match counts
  layer_decay: float = 1.0  # factor of the learning rate from each layer to the one below (Bao et al. 2021, BEiT)


@dataclass(frozen=True)
class Mesh:
  """Devices along each mesh axis, -1 taking what the others leave, and what is split over which."""

  data: int = -1  # in each slice; the batch is split over it
  fsdp: int = 1  # the batch is split over it, too, and parameters are
  tensor: int = 1  # heads and the MLP are split over it
  dcn_data: int = 1  # slices of TPUs, or machines with GPUs, that are joined by the data-centre network; the batch is split over them
  sharding: str = "fsdp"  # or "zero1": parameters whole on every device, the optimizer's state split over the batch's axes
  rules: tuple[tuple[str, str | tuple[str, ...] | None], ...] = ()  # (logical axis, mesh axis or axes) before those of `sharding`
  overrides: tuple[tuple[str, tuple[str | tuple[str, ...] | None, ...]], ...] = ()  # (parameter's path as a regular expression, mesh axis for each dimension)


@dataclass(frozen=True)
class Tracking:
  """Where else the lines of `metrics.jsonl` go."""

  tensorboard: bool = True  # files in the work directory
  wandb: str = "off"  # Weights & Biases: "online", or "offline" for files to upload later (extra `wandb`)
  project: str = "clip_jax"  # there
  entity: str = ""  # whose project it is; "": the account's own
  name: str = ""  # of the run; "": that of the work directory
  group: str = ""  # of runs
  tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Retrieval:
  """A held-out set of images and captions to retrieve one by the other."""

  path: str = ""
  source: str = "auto"
  first_caption: bool = False  # of each record's captions only the first is a candidate
  nearest_training_image: bool = False  # also report a yardstick that needs no training, at the end
  gallery: int = 0  # pictures of retrievals in the report


@dataclass(frozen=True)
class ZeroShot:
  """A held-out set of labelled images (`.cls` members) to classify by class names in prompts."""

  path: str = ""
  source: str = "auto"
  classes: tuple[str, ...] = ()
  templates: tuple[str, ...] = ("a photo of a {}.",)  # with {} where the class name goes; a class is the mean of its prompts


@dataclass(frozen=True)
class Eval:
  """Evaluation while training; always once more at the end."""

  every: int = 0  # steps; 0: only at the end
  batch_size: int = 256
  data_root: str = ""  # the folder or bucket that holds `datasets`
  datasets: tuple[str, ...] = ()  # data sets and suites by name, as `clip-jax eval` takes them (docs/evaluation.md)
  retrieval: dict[str, Retrieval] = field(default_factory=dict)
  zero_shot: dict[str, ZeroShot] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
  """When to save and what to keep; always saved at the end and on SIGTERM or SIGINT."""

  every: int = 1_000  # steps
  every_minutes: float | None = None  # also when this much time has passed since the last one
  keep_last: int = 3
  keep_every: int | None = None  # steps; also keep each multiple of it for good
  keep_steps: tuple[int, ...] = ()  # also save at these steps, and keep them for good


@dataclass(frozen=True)
class Config:
  """A whole run."""

  model: Model = field(default_factory=Model)
  loss: Loss = field(default_factory=Loss)
  data: Data = field(default_factory=Data)
  train: Train = field(default_factory=Train)
  optimizer: Optimizer = field(default_factory=Optimizer)
  mesh: Mesh = field(default_factory=Mesh)
  eval: Eval = field(default_factory=Eval)
  checkpoint: Checkpoint = field(default_factory=Checkpoint)
  tracking: Tracking = field(default_factory=Tracking)

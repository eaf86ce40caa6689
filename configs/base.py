"""What the recipes of this folder share: CLIP as published (Radford et al. 2021).

A recipe shows what differs from this. Every key, its type and its meaning are in clip_jax/config/schema.py.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config():
  config = ConfigDict()

  config.model = ConfigDict()
  config.model.name = ""
  config.model.image_size = placeholder(int)  # what the name stands for
  config.model.embed_dim = placeholder(int)
  config.model.activation = placeholder(str)
  config.model.norm_epsilon = placeholder(float)
  config.model.image_mean = placeholder(tuple)
  config.model.image_std = placeholder(tuple)
  config.model.resize_mode = placeholder(str)
  config.model.tokenizer = placeholder(str)
  config.model.compute_dtype = "bfloat16"  # the paper used float16 with loss scaling
  config.model.residual_dtype = placeholder(str)
  config.model.vision = ConfigDict()
  config.model.text = ConfigDict()
  config.model.vision.kind = placeholder(str)
  config.model.text.kind = placeholder(str)
  for size in ("patch_size", "width", "layers", "heads", "mlp_width"):
    config.model.vision[size] = placeholder(int)
  config.model.vision.stages = placeholder(tuple)
  for size in ("context_length", "vocab_size", "width", "layers", "heads", "mlp_width", "train_length"):
    config.model.text[size] = placeholder(int)
  config.model.vision.patch_drop = 0.0
  config.model.text.reduction = "truncate"
  config.model.logit_scale_init = placeholder(float)
  config.model.logit_bias_init = placeholder(float)

  config.loss = ConfigDict()
  config.loss.name = "softmax"  # section 2.3
  config.loss.method = "auto"
  config.loss.chunk = placeholder(int)
  config.loss.dtype = "float32"
  config.loss.label_smoothing = 0.0
  config.loss.mask_duplicates = False
  config.loss.max_logit_scale = 100.0  # section 2.5

  config.data = ConfigDict()
  config.data.source = "auto"
  config.data.path = ""
  config.data.mixture = ()
  config.data.image = ""
  config.data.captions = ()
  config.data.min_size = 0
  config.data.max_aspect = placeholder(float)
  config.data.min_caption = 0
  config.data.max_caption = placeholder(int)
  config.data.order = "global"
  config.data.block = 128
  config.data.window = 16
  config.data.lanes = 64
  config.data.block_cache = 8.0
  config.data.seed = 0
  config.data.crop_scale = (0.9, 1.0)  # "a random square crop" (section 2.3); the range is open_clip's
  config.data.color_jitter = 0.0
  config.data.flip = 0.0
  config.data.rotation = 0.0
  config.data.other_captions = 0.0
  config.data.threads = 0
  config.data.prefetch = 4
  config.data.read_deadline = 600.0
  config.data.max_pixels = 256 * 1024 * 1024
  config.data.max_bad_share = 0.05
  config.data.allow_truncated = False

  config.train = ConfigDict()
  config.train.global_batch_size = 32_768  # table 18
  config.train.samples = placeholder(int)
  config.train.steps = placeholder(int)  # wins over samples
  config.train.attention = "auto"
  config.train.remat = "none"
  config.train.quantization = "none"
  config.train.scan = False
  config.train.microbatches = 1
  config.train.init_from = ""
  config.train.fork_from = ""
  config.train.init_tower = "both"
  config.train.init_multipliers = ()
  config.train.seed = 0
  config.train.log_every = 1
  config.train.max_bad_steps = 10
  config.train.spike_factor = 2.0
  config.train.spike_window = 100
  config.train.on_spike = "record"
  config.train.step_timeout = 1_800.0
  config.train.host_timeout = 100
  config.train.join_timeout = 300
  config.train.deterministic = False

  config.optimizer = ConfigDict()
  config.optimizer.name = "adamw"  # section 2.5
  config.optimizer.learning_rate = 5e-4  # table 20
  config.optimizer.schedule = "cosine"  # section 2.5
  config.optimizer.warmup_steps = 2_000  # table 18
  config.optimizer.warmup_samples = placeholder(int)  # wins over warmup_steps, and so below
  config.optimizer.cooldown_steps = 0
  config.optimizer.cooldown_samples = placeholder(int)
  config.optimizer.timescale = 10_000
  config.optimizer.timescale_samples = placeholder(int)
  config.optimizer.end_learning_rate = 0.0
  config.optimizer.weight_decay = 0.2  # table 18
  config.optimizer.no_decay = r"(^|/)(\w*bias|scale|mean|var|logit_scale)$"  # "gains or biases", section 2.5
  config.optimizer.decay_multipliers = ()
  config.optimizer.beta1 = 0.9  # table 18
  config.optimizer.beta2 = 0.98  # table 18, Vision Transformers
  config.optimizer.epsilon = 1e-6  # table 18, Vision Transformers
  config.optimizer.mu_dtype = "float32"
  config.optimizer.ema_decay = placeholder(float)
  config.optimizer.gradient_clip_norm = placeholder(float)
  config.optimizer.freeze = ""
  config.optimizer.lr_multipliers = ()
  config.optimizer.layer_decay = 1.0

  config.mesh = ConfigDict()
  config.mesh.data = -1
  config.mesh.fsdp = 1
  config.mesh.tensor = 1
  config.mesh.dcn_data = 1
  config.mesh.sharding = "fsdp"
  config.mesh.rules = ()
  config.mesh.overrides = ()

  config.eval = ConfigDict()
  config.eval.every = 0
  config.eval.batch_size = 256
  config.eval.data_root = ""
  config.eval.datasets = ()
  config.eval.retrieval = ConfigDict()
  config.eval.zero_shot = ConfigDict()

  config.checkpoint = ConfigDict()
  config.checkpoint.every = 1_000
  config.checkpoint.every_minutes = placeholder(float)
  config.checkpoint.keep_last = 3
  config.checkpoint.keep_every = placeholder(int)
  config.checkpoint.keep_steps = ()

  config.tracking = ConfigDict()
  config.tracking.tensorboard = True
  config.tracking.wandb = "off"
  config.tracking.project = "clip_jax"
  config.tracking.entity = ""
  config.tracking.name = ""
  config.tracking.group = ""
  config.tracking.tags = ()
  return config

"""Every choice of a run in one object, and what it means for each stage."""

from dataclasses import dataclass

from .data.samplers import SAMPLERS
from .errors import UsageError
from .kernels import IMPLS
from .kernels.attention import SHORT_HEAD_SIZES
from .machine import PRECISIONS
from .model.config import BertConfig
from .training.losses import CLASS_WEIGHTS, LOSSES
from .training.stage import StageSettings

METHODS = ("reweight", "augment", "vanilla")
ENGINES = ("fast", "plain")


@dataclass(frozen=True)
class Recipe:
    """Every choice of a run. The defaults are the published ones."""

    method: str = "reweight"
    """`reweight`, `augment` (stage 1 on augmented data) or `vanilla` (stage 2 alone)."""
    epochs_stage_1: int = 1
    """0 is vanilla fine-tuning."""
    epochs_stage_2: int = 1
    """Passes over the imbalanced data with everything trained."""
    seeds: tuple[int, ...] = (7, 42, 106, 190, 191)
    """Each seed starts again from the pretrained weights."""
    batch_size: int = 16
    """Texts a step; with the token-budget sampler, on average."""
    max_length: int = 128
    """Tokens at which a text is cut, [CLS] and [SEP] included."""
    learning_rate_stage_1: float = 1e-4
    """At the first step of stage 1; falls linearly to 0."""
    learning_rate_stage_2: float = 1e-5
    """At the first step of stage 2; falls linearly to 0."""
    stage_1_layers: int = 1
    """Encoder layers, from the top, that stage 1 trains with the pooler and the head."""
    loss: str | None = None
    """Of stage 1: `ldam` or `ce`. None: `ce` for `augment`, else `ldam`."""
    class_weights: str | None = None
    """Of stage 1: `effective`, `inverse`, `inverse-sqrt`, `none`. None: `none` for `augment`, else
    `effective`."""
    ldam_s: float = 1.0
    """LDAM's scale of the logits; 1 because ours are not normalised."""
    ldam_max_m: float = 0.5
    """LDAM's margin of the rarest class."""
    sampler: str = "random"
    """`random` or `token-budget`: both stages. `class-balanced`: stage 1, or, without one, stage 2;
    after a stage 1, stage 2 is random, since it is to see the data as they are."""
    precision: str = "auto"
    """`fp32`, `bf16`, `fp16`, or `auto`: bf16 where the device multiplies it natively."""
    engine: str = "fast"
    """`fast`, or `plain`: the step as it is defined (`training/stage.py`), slower, for a debugger;
    the dropout masks of its stage 1 are others."""
    kernels: str = "auto"
    """`torch`, `triton` (on a CUDA GPU), or `auto`: what is known to be faster; so far, torch."""
    graphs: bool = False
    """Take whole steps as CUDA graphs; needs kernels `triton` and a CUDA GPU."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:n`, or `auto`: a GPU if there is one."""
    upstream_schedule: bool = False
    """Count the steps of augmented stage 1 as the published code does, from the imbalanced data:
    the learning rate is then 0 for the rest of the stage."""
    cache_trunk: bool = False
    """Compute the layers that are frozen in stage 1 once for all epochs and seeds, without dropout:
    an approximation of the recipe, which draws new masks there too. Nothing changes where no layer
    but the last is frozen."""
    share_trunk: bool = False
    """Compute the layers that are frozen in stage 1 once an epoch for all seeds, with dropout. Each
    seed sees what it would alone, but all see the same masks there, and so do, with the sampler
    `class-balanced`, all draws of a text in an epoch. Takes memory for every epoch."""

    def __post_init__(self) -> None:
        _check_choice("method", self.method, METHODS)
        _check_choice("sampler", self.sampler, SAMPLERS)
        _check_choice("precision", self.precision, ("auto", *PRECISIONS))
        _check_choice("engine", self.engine, ENGINES)
        _check_choice("kernels", self.kernels, IMPLS)
        for name, is_fast in (
            ("kernels 'triton'", self.kernels == "triton"),
            ("graphs", self.graphs),
            ("cache_trunk", self.cache_trunk),
            ("share_trunk", self.share_trunk),
        ):
            if self.engine == "plain" and is_fast:
                raise UsageError(f"engine 'plain' has no {name}: leave it out, or choose 'fast'")
        if self.cache_trunk and self.share_trunk:
            raise UsageError("cache_trunk and share_trunk exclude each other: choose one")
        if self.loss is not None:
            _check_choice("loss", self.loss, LOSSES)
        if self.class_weights is not None:
            _check_choice("class_weights", self.class_weights, CLASS_WEIGHTS)
        for name, least in (
            ("epochs_stage_1", 0),
            ("epochs_stage_2", 0),
            ("batch_size", 1),
            ("max_length", 2),
            ("stage_1_layers", 0),
        ):
            value = getattr(self, name)
            if not _is_whole(value) or value < least:
                raise UsageError(f"{name} is {value!r}; expected a whole number, {least} or more")
        for name in ("learning_rate_stage_1", "learning_rate_stage_2", "ldam_s"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value < float("inf"):
                raise UsageError(f"{name} is {value!r}; expected a number above 0")
        if not _is_number(self.ldam_max_m) or not 0 <= self.ldam_max_m < float("inf"):
            raise UsageError(f"ldam_max_m is {self.ldam_max_m!r}; expected a number, 0 or more")
        seeds = self.seeds if isinstance(self.seeds, tuple) else ()
        if not seeds or not all(_is_whole(seed) and seed >= 0 for seed in seeds):
            raise UsageError(
                f"seeds are {self.seeds!r}; expected a tuple of one or more whole numbers from 0"
            )
        if len(set(seeds)) < len(seeds):
            raise UsageError(
                f"seeds are {', '.join(map(str, seeds))}; a seed given twice is the same run twice"
            )

    @property
    def has_stage_1(self) -> bool:
        return self.method != "vanilla" and self.epochs_stage_1 > 0

    @property
    def needs_augmented(self) -> bool:
        return self.method == "augment" and self.has_stage_1

    def stage_1_settings(self, num_train: int) -> StageSettings:
        """num_train: rows of the imbalanced data, by which the published code counts its steps."""
        upstream_steps = self.epochs_stage_1 * -(-num_train // self.batch_size)
        return StageSettings(
            epochs=self.epochs_stage_1,
            learning_rate=self.learning_rate_stage_1,
            batch_size=self.batch_size,
            sampler=self.sampler,
            schedule_steps=upstream_steps if self.upstream_schedule else None,
        )

    def stage_2_settings(self) -> StageSettings:
        balanced_before = self.has_stage_1 and self.sampler == "class-balanced"
        return StageSettings(
            epochs=self.epochs_stage_2,
            learning_rate=self.learning_rate_stage_2,
            batch_size=self.batch_size,
            sampler="random" if balanced_before else self.sampler,
        )

    def check_fit(self, config: BertConfig, model: str) -> None:
        """Raise UsageError when this encoder cannot run the recipe."""
        if self.graphs and config.head_size not in SHORT_HEAD_SIZES:
            sizes = " or ".join(map(str, SHORT_HEAD_SIZES))
            raise UsageError(
                f"graphs need attention heads of {sizes} features; those of '{model}' have "
                f"{config.head_size}"
            )
        if self.max_length > config.max_position_embeddings:
            raise UsageError(
                f"max_length is {self.max_length}, but '{model}' has "
                f"{config.max_position_embeddings} positions"
            )
        if self.stage_1_layers > config.num_hidden_layers:
            raise UsageError(
                f"stage_1_layers is {self.stage_1_layers}, but '{model}' has "
                f"{config.num_hidden_layers} layers"
            )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

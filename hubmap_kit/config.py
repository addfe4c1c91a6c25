"""The typed experiment: one frozen model per concern, checked when it is loaded.

`hubmap config NAME` prints an experiment with each key's description. Any verb takes `--set section.key=value`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Triple = tuple[float, float, float]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(gt=0.0)]
Probability = Annotated[float, Field(gt=0.0, lt=1.0)]
# The competition's names; written out because this module imports no other room (a test compares them with
# competition.organs).
OrganName = Literal["kidney", "prostate", "largeintestine", "spleen", "lung"]
Rung = Literal["normalise", "overlap", "views", "folds", "reduce"]


# Every loss by name: the function or class that makes it from the mode of segmentation_models_pytorch (binary or
# multiclass), and its further arguments. A loss that is entered here is known to the help, the checks and the training.
# Dice, Jaccard and Tversky have no gradient where a batch holds no foreground at all; add bce or focal to them.
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "bce": ("hubmap_kit.training.losses:cross_entropy", {}),
    "ce": ("hubmap_kit.training.losses:cross_entropy", {}),
    "dice": ("segmentation_models_pytorch.losses:DiceLoss", {"from_logits": True}),
    "lovasz": ("segmentation_models_pytorch.losses:LovaszLoss", {"per_image": True, "from_logits": True}),
    "lovasz-softmax": ("hubmap_kit.training.losses:lovasz_softmax", {}),
    "focal": ("segmentation_models_pytorch.losses:FocalLoss", {}),
    "tversky": (
        "segmentation_models_pytorch.losses:TverskyLoss",
        {"from_logits": True, "alpha": 0.3, "beta": 0.7},
    ),
    "jaccard": ("segmentation_models_pytorch.losses:JaccardLoss", {"from_logits": True}),
}


class Section(BaseModel):
    """Base of every section: immutable, unknown keys refused, defaults checked like given values."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class ByOrgan(Section):
    """Base of sections with exceptions by organ: what an exception does not name is as for all organs."""

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("organs"), dict):
            return values
        known = get_args(cls.model_fields["organs"].annotation)[1].model_fields
        common = {key: value for key, value in values.items() if key in known}
        organs = {organ: {**common, **own} if isinstance(own, dict) else own for organ, own in values["organs"].items()}
        return {**values, "organs": organs}


class DataConfig(Section):
    """Which slides, and how they are split."""

    folder: str = Field("", description="folder with train.csv and train_images/ (the verb's --data sets it)")
    n_folds: int = Field(
        5, ge=2, description="folds of the cross-validation, stratified by organ, duplicates kept together"
    )
    fold_seed: int = Field(0, ge=0, description="seed of the split")
    conversion: str = Field(
        "",
        description=(
            "learn from a conversion of the slides, as 'hubmap tiles' names it: 2048-512-r1 (cropped to the tissue),"
            " bg30, resize-512, or a YAML file; empty: from the slides themselves, at `scale`"
        ),
    )
    organs: list[OrganName] = Field(
        default_factory=list, description="learn from slides of these organs only, and judge on them; empty: all organs"
    )
    folds_csv: str = Field("", description="a written split (id,organ,data_source,fold) to use instead of a new one")

    def has(self, organ: str) -> bool:
        """Whether slides of an organ are learnt from."""
        return not self.organs or organ in self.organs


class ScaleChoices(Section):
    """How a slide's pixels become the network's pixels."""

    policy: Literal["reduce", "physical", "fit"] = Field(
        "reduce",
        description=(
            "reduce: divide the pixel count by `reduce`; physical: resample every slide to `um_per_px`; fit: the longer"
            " side becomes `fit` pixels"
        ),
    )
    reduce: Literal[1, 2, 4] = Field(1, description="integer downscale of the original pixels (policy reduce)")
    um_per_px: float = Field(0.8, gt=0, description="target physical scale in micrometres per pixel (policy physical)")
    max_zoom: float = Field(4.0, ge=1, description="never enlarge a slide by more than this factor (policy physical)")
    fit: int = Field(
        1024, ge=64, description="longer side of every slide in network pixels, whatever its own scale (policy fit)"
    )


class ScaleConfig(ByOrgan, ScaleChoices):
    """The scale of all organs, with exceptions by organ."""

    organs: dict[OrganName, ScaleChoices] = Field(default_factory=dict, description="what is different for one organ")

    def of(self, organ: str) -> ScaleChoices:
        """What holds for one organ; an empty name means those that have no choices of their own."""
        return self.organs.get(organ, self)  # type: ignore[call-overload]


class TilesConfig(Section):
    """Squares that training sees."""

    size: int = Field(
        512, ge=64, multiple_of=32, description="side of a tile in network pixels; 256, 512 or 768 as a rule"
    )
    overlap: float = Field(0.0, ge=0, lt=0.9, description="share of a grid tile that its neighbour repeats")


class AugmentChoices(Section):
    """What a training tile goes through before it is mixed with others."""

    zoom: tuple[Weight, Weight] = Field(
        (1.0, 1.0), description="random scale, from and to: 0.5 shows things half as large, cut from twice the side"
    )
    hubmap_scale: Share = Field(
        0.0, description="share of tiles with no more detail than the organ's HuBMAP slides have"
    )
    stain: Literal["none", "jitter", "reinhard", "macenko", "histogram", "mixed"] = Field(
        "none",
        description=(
            "jitter: stains stronger and weaker at random; reinhard, macenko, histogram: the colours of a reference"
            " picture; mixed: one of these four at random"
        ),
    )
    stain_probability: Share = Field(0.5, description="share of tiles whose stains are changed")

    @model_validator(mode="after")
    def _ordered(self) -> AugmentChoices:
        if self.zoom[0] > self.zoom[1]:
            raise ValueError(f"zoom goes from {self.zoom[0]:g} to {self.zoom[1]:g}; put the smaller number first")
        return self


class AugmentConfig(ByOrgan, AugmentChoices):
    """Random changes of a training tile: its stains first, then mixing with other tiles, then the pipeline."""

    pipeline: Literal["none", "flips", "light", "first-team", "classic", "colour", "strong"] = Field(
        "classic",
        description=(
            "none; flips; light: the 8 symmetries and mild colour; first-team (or classic): plus shift-scale-rotate,"
            " blur, noise, GridDropout; colour: the 8 symmetries and strong colour, for stains that were never seen;"
            " strong: half to twice the scale, elastic, heavy colour, cutout"
        ),
    )
    engine: Literal["classic", "batched"] = Field(
        "classic",
        description=(
            "classic: tile by tile, while they are loaded; batched: a batch at once where the network is, much faster"
            " on a GPU, but of the pipeline the geometry and colours only: no blur, noise, gamma, compression or"
            " dropout"
        ),
    )
    coarse_prostate: Share = Field(
        0.0, description="share of prostate tiles with the detail of slides 0.06 to 0.4 times as large"
    )
    mixing: dict[Literal["mosaic", "cutmix", "copy_paste", "mixup"], Share] = Field(
        default_factory=dict, description="probability of each way to mix a tile with others; together at most 1"
    )
    mixing_same_organ: bool = Field(False, description="mix with tiles of the same organ only")
    stain_references: str = Field(
        "",
        description=(
            "folder of reference pictures (tif, jpg, png); empty: drawn ones, in PAS and in haematoxylin and eosin"
        ),
    )
    organs: dict[OrganName, AugmentChoices] = Field(default_factory=dict, description="what is different for one organ")

    @model_validator(mode="after")
    def _possible(self) -> AugmentConfig:
        if sum(self.mixing.values()) > 1 + 1e-9:
            raise ValueError(
                f"mixing has probabilities of {sum(self.mixing.values()):g} together; a tile is mixed one way, so at"
                " most 1 is possible"
            )
        return self

    def of(self, organ: str) -> AugmentChoices:
        """What holds for one organ."""
        return self.organs.get(organ, self)  # type: ignore[call-overload]


class ModelConfig(Section):
    """The network. Weights come from a local file only."""

    arch: str = Field(
        "unet",
        description=(
            "a decoder of segmentation_models_pytorch (unet, fpn, deeplabv3plus, segformer, upernet, ...), or of the"
            " kit's own: unext50, segmenter, erfnet, daformer; 'hubmap models' lists them"
        ),
    )
    encoder: str = Field(
        "tu-efficientnet_b1", description="an encoder of smp, or tu-NAME for any timm network with feature maps"
    )
    encoder_weights: str = Field(
        "", description="path of pretrained encoder weights (.safetensors, .pth); empty: random start"
    )
    classes: Literal["binary", "organs"] = Field(
        "binary",
        description=(
            "binary: unit or not; organs: background and the five organs, of which the slide's own is read at inference"
        ),
    )
    auxiliary: dict[Literal["fcn", "deep", "organ", "pixel_size"], Weight] = Field(
        default_factory=dict,
        description=(
            "weights of losses that only training has. fcn: a plain head on the encoder; deep: one on each stage of a"
            " decoder; organ: which organ; pixel_size: log2 of the micrometres per pixel"
        ),
    )
    mean: Triple = Field((0.485, 0.456, 0.406), description="input mean in 0..1 that the encoder weights expect, RGB")
    std: Triple = Field(
        (0.229, 0.224, 0.225), description="input standard deviation in 0..1 that the encoder weights expect, RGB"
    )
    options: dict[str, int | float | bool | str | list[int]] = Field(
        default_factory=dict, description="further arguments of the smp decoder, such as decoder_channels"
    )

    @model_validator(mode="after")
    def _positive_std(self) -> ModelConfig:
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0 in every channel, got {self.std}")
        return self


class TrainingConfig(Section):
    """The loop."""

    epochs: int = Field(30, ge=1, description="epochs of one fold")
    iterations: int = Field(
        0,
        ge=0,
        description="optimiser steps of the whole training; an epoch is then its share of them; 0: count by epochs",
    )
    samples_per_epoch: int = Field(
        0, ge=0, description="tiles drawn in an epoch; 0: as many as the training slides have grid tiles"
    )
    sampler: Literal["random", "grid"] = Field(
        "random", description="random: crops anywhere; grid: every tile of the grid once"
    )
    foreground_share: Share = Field(0.5, description="share of random crops that are aimed at a tile with foreground")
    hard_share: Share = Field(
        0.0,
        description="share of random crops that are aimed at the tiles with the highest loss in the last epoch; 0: off",
    )
    balance_organs: bool = Field(False, description="draw organs equally often instead of slides equally often")
    organ_shares: dict[OrganName, Weight] = Field(
        default_factory=dict,
        description=(
            "how often slides of an organ are drawn, against 1 for all others; more weighs the organ's errors more"
        ),
    )
    batch_size: int = Field(8, ge=1, description="tiles in one forward pass")
    accumulate: int = Field(1, ge=1, description="forward passes whose gradients are added before a step")
    loss: str = Field("bce+dice", description=f"{', '.join(LOSSES)}; joined and weighted as in 0.5*bce+dice")
    optimizer: Literal["adamw", "adam", "sgd", "adan", "ranger"] = Field(
        "adamw", description="ranger: RAdam with Lookahead"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate; 'hubmap lr-find' suggests one")
    encoder_lr: float = Field(1.0, gt=0, le=1, description="the encoder's learning rate as a share of `lr`")
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description=(
            "each layer of the encoder learns at this share of the rate of the layer above it; 0.75 suits ViTs; 1: off"
        ),
    )
    freeze_epochs: int = Field(0, ge=0, description="first epochs in which the encoder does not learn")
    weight_decay: float = Field(1e-2, ge=0, description="weight decay; biases and norms have none")
    schedule: Literal["onecycle", "cosine", "flat-cosine", "poly", "restarts", "constant"] = Field(
        "onecycle", description="learning rate over the steps; restarts: cosines, each twice as long as the one before"
    )
    warmup: Share = Field(0.25, description="share of the steps in which the rate rises")
    clip_norm: float = Field(1.0, ge=0, description="largest gradient norm; 0: no limit")
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="decay of the averaged weights that are evaluated and kept; 0: off"
    )
    swa: Share = Field(
        0.0,
        description=(
            "share of the epochs, at the end, whose weights are averaged equally, evaluated and kept (SWA); 0: off"
        ),
    )
    keep_last: int = Field(0, ge=0, description="keep the weights of this many last epochs beside the best ones")
    average_last: bool = Field(
        False, description="at the end, average the kept last weights; they become the fold's if they are better"
    )
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field("auto", description="auto: fp16 on a GPU, fp32 on a CPU")
    validate_every: int = Field(1, ge=1, description="epochs between validations; the last epoch is always validated")
    monitor: Literal["dice", "loss", "dice_th", "valid_loss"] = Field(
        "dice",
        description=(
            "what chooses the best epoch: dice (or dice_th), at the best threshold of each organ; loss (or valid_loss)"
        ),
    )
    patience: int = Field(0, ge=0, description="stop after this many validations without a better one; 0: never")
    sinks: list[Literal["tensorboard", "wandb"]] = Field(
        default_factory=list,
        description="where metrics go beside metrics.csv: tensorboard, wandb (offline); files in the run folder",
    )
    workers: int = Field(2, ge=0, description="processes that cut and augment tiles; the tiles do not depend on it")
    seed: int = Field(0, ge=0, description="seed of initial weights, draws and augmentation")

    @model_validator(mode="after")
    def _possible(self) -> TrainingConfig:
        if self.hard_share and self.sampler == "grid":
            raise ValueError("hard_share goes with sampler random; the grid sampler shows every tile once")
        if self.organ_shares and self.sampler == "grid":
            raise ValueError("organ_shares go with sampler random; the grid sampler shows every tile once")
        if self.iterations and self.sampler == "grid":
            raise ValueError("iterations go with sampler random; an epoch of the grid sampler is as long as the grid")
        if self.ema_decay and self.swa:
            raise ValueError("ema_decay and swa are both set; choose one way to average weights")
        if self.average_last and self.keep_last < 2:
            raise ValueError(
                f"average_last averages the kept epochs, but keep_last is {self.keep_last}; set it to 2 or more"
            )
        return self


class PostprocessChoices(Section):
    """What happens to a thresholded mask, in this order. Lengths are pixels of the original slide."""

    fill_holes: bool = Field(False, description="fill holes inside a unit")
    opening: int = Field(
        0, ge=0, description="radius of a morphological opening, which cuts thin bridges and drops specks; 0: none"
    )
    min_area: float = Field(0.0, ge=0, lt=1, description="drop connected parts smaller than this share of the slide")
    shrink: int = Field(0, ge=0, description="take this many pixels off every border")
    rescue: bool = Field(
        False, description="an empty mask takes ever lower thresholds until something is left (every slide has a unit)"
    )


class PostprocessConfig(ByOrgan, PostprocessChoices):
    """Post-processing for all organs, with exceptions by organ."""

    organs: dict[OrganName, PostprocessChoices] = Field(
        default_factory=dict, description="what is different for one organ"
    )


class InferenceConfig(Section):
    """From slide to mask."""

    window: int = Field(512, ge=64, multiple_of=32, description="side of the sliding window in network pixels")
    overlap: float = Field(0.25, ge=0, lt=0.9, description="least share of a window that its neighbour repeats")
    whole_slide: int = Field(
        0,
        ge=0,
        description="slides of at most this many network pixels on both sides are predicted in one piece; 0: never",
    )
    skip_background: bool = Field(True, description="do not predict windows that hold nothing but glass")
    views: Literal["none", "flips", "d4"] = Field(
        "flips", description="test-time views averaged as probabilities: 1, 4 or 8"
    )
    normalise: list[Literal["reinhard", "macenko", "histogram"]] = Field(
        default_factory=list,
        description=(
            "HuBMAP slides are predicted once more by each method, in the colours of the organ's training slides, and"
            " averaged with the raw view"
        ),
    )
    batch_size: int = Field(4, ge=1, description="windows in one forward pass; halved by itself where memory is short")
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="auto: as the network was trained, fp32 on a CPU"
    )
    tune_speed: bool = Field(
        True, description="measure once whether folded batch norms and channels-last memory are faster here"
    )
    threshold: Probability = Field(0.5, description="probability threshold of an organ that has no fitted one")
    thresholds: dict[OrganName, Probability] = Field(
        default_factory=dict, description="threshold by organ, over the fitted ones"
    )
    source_thresholds: dict[Literal["HPA", "Hubmap"], dict[OrganName, Probability]] = Field(
        default_factory=dict, description="threshold by source and organ, over all others"
    )
    postprocess: PostprocessConfig = Field(
        default_factory=PostprocessConfig, description="what happens to a mask after the threshold"
    )
    ladder: list[Rung] = Field(
        default_factory=lambda: list(get_args(Rung)),
        description="what is given up, in this order and step by step, where a deadline would be missed",
    )
    tolerated_failures: Share = Field(
        0.2, description="share of slides that may fail; with more, a kernel calls its submission degraded"
    )


class Experiment(Section):
    """Everything that a run depends on."""

    name: str = Field("experiment", min_length=1, description="a short name, shown in pictures and tables")
    data: DataConfig = Field(default_factory=DataConfig)
    scale: ScaleConfig = Field(default_factory=ScaleConfig)
    tiles: TilesConfig = Field(default_factory=TilesConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    inference: InferenceConfig = Field(default_factory=InferenceConfig)

"""Recipes: every setting of a quantisation, as frozen dataclasses read from `configs/*.toml`."""

import dataclasses
import tomllib
import typing
from pathlib import Path
from typing import Any, Literal, Self

from twla_jax.errors import TwlaError

ACTIVATION_BITS = (2, 4, 6, 8, 16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightRecipe:
    """Settings of the weights' quantiser and of the error-compensated column sweep.

    Attributes:
      quantizer: `ternary` (E2M-ATQ), or plain asymmetric integers (`integer`), to compare it with.
      planes: ternary planes, 1 or 2: α·T + μ, or α₁·T₁ + α₂·T₂ + μ.
      bits: of the integers.
      group_size: columns that share one (α, μ); 0 gives each row a single group.
      euclidean_steps: corrections of μ in stage 1; with two planes, alternations of codes and scales.
      threshold: stage 1's dead zone, Δ = threshold · mean|w − μ|.
      rounds: alternations of the code sweep and the relocation of (α, μ); 0 leaves the codes of stage 1 (the paper).
      metric: what stage 2 measures the output error in: the group's own second moments (`group`, the paper), or their
        Schur complement given the columns not yet done (`compensated`).
      damping: added to the diagonal of the second moments, as a share of its mean, before factoring.
      compensate: whether later columns make up for the errors of earlier ones; if not, inputs count as uncorrelated.
      propagation: share of the error that earlier layers leave in the inputs that the weights are changed to make up
        for before they are quantised (QEP's β); 0 leaves that out, and the pass of the full-precision model it needs.
    """

    quantizer: Literal["ternary", "integer"] = "ternary"
    planes: int = 1
    bits: int = 4
    group_size: int = 128
    euclidean_steps: int = 15
    threshold: float = 0.75
    rounds: int = 3
    metric: Literal["compensated", "group"] = "compensated"
    damping: float = 0.01
    compensate: bool = True
    propagation: float = 0.5

    def __post_init__(self):
        _require(self.planes in (1, 2), "weights.planes", self.planes, "1 or 2")
        _require(2 <= self.bits <= 8, "weights.bits", self.bits, "between 2 and 8")
        _require(0 <= self.propagation <= 1, "weights.propagation", self.propagation, "between 0 and 1")
        wanted = "0 where errors are not compensated: both need what inputs have to do with each other"
        _require(self.compensate or not self.propagation, "weights.propagation", self.propagation, wanted)
        _require(self.group_size >= 0, "weights.group_size", self.group_size, "0 (one group a row) or more")
        _require(self.euclidean_steps >= 0, "weights.euclidean_steps", self.euclidean_steps, "0 or more")
        _require(self.threshold > 0, "weights.threshold", self.threshold, "above 0")
        _require(self.rounds >= 0, "weights.rounds", self.rounds, "0 or more")
        _require(self.damping > 0, "weights.damping", self.damping, "above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotationRecipe:
    """Settings of KOTMS, the Kronecker orthogonal tri-modal shaping of each linear input.

    Attributes:
      start: where the optimisation starts; `none` leaves the inputs unrotated.
      factors: how m = l·r is split: l ≈ r (`balanced`) or the public code's size rule (`paper`).
      steps: optimisation steps; 0 keeps the start.
      learning_rate: Adam's, on the Stiefel manifold.
      sigma: width of the three Gaussians, relative to the row's mean magnitude.
      balance: weight of the term that keeps the three modes equally full.
      range_weight: weight of the logarithm of the input's squared range, relative to its mean square: what an
        activation quantiser of given bits adds to the input as noise. 0 looks at the weights alone (the paper).
      retraction: how a step returns to the manifold.
      seed: of the random start.
    """

    start: Literal["random", "identity", "none"] = "random"
    factors: Literal["balanced", "paper"] = "balanced"
    steps: int = 100
    learning_rate: float = 1e-2
    sigma: float = 0.25
    balance: float = 0.1
    range_weight: float = 0.0
    retraction: Literal["polar", "cayley", "qr"] = "polar"
    seed: int = 0

    def __post_init__(self):
        _require(self.steps >= 0, "rotation.steps", self.steps, "0 or more")
        _require(self.learning_rate > 0, "rotation.learning_rate", self.learning_rate, "above 0")
        _require(self.sigma > 0, "rotation.sigma", self.sigma, "above 0")
        _require(self.balance >= 0, "rotation.balance", self.balance, "0 or more")
        _require(self.range_weight >= 0, "rotation.range_weight", self.range_weight, "0 or more")

    @property
    def looks_at_inputs(self) -> bool:
        """Whether the fit needs samples of the inputs, and not the weights alone."""
        return self.range_weight > 0 and self.start != "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationRecipe:
    """Settings of the per-token activation quantiser.

    Attributes:
      bits: of every linear input; 16 leaves activations as they are. Clips are fitted for every bit-width, so
        the bits of a finished model can still be changed.
      clips: candidates for the clip factor; 1.0 must be among them.
      clip_tokens: calibration tokens that a clip is chosen on.
    """

    bits: int = 16
    clips: tuple[float, ...] = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
    clip_tokens: int = 4096

    def __post_init__(self):
        _require(self.bits in ACTIVATION_BITS, "activations.bits", self.bits, f"one of {ACTIVATION_BITS}")
        _require(1.0 in self.clips, "activations.clips", self.clips, "a list that holds 1.0")
        _require(all(0 < c <= 1 for c in self.clips), "activations.clips", self.clips, "within (0, 1]")
        _require(self.clip_tokens >= 1, "activations.clip_tokens", self.clip_tokens, "1 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefineRecipe:
    """Settings of the refinement that may follow the layer-wise quantisation: block by block, then end to end.

    Attributes:
      steps: optimisation steps end to end, each on new windows; 0 leaves that out.
      batch: windows a step.
      code_rate: Adam's peak learning rate for the codes' latents, in units of α.
      scale_rate: the same for α, μ (relative to α) and norms (relative to themselves).
      rotation_rate: the same for the rotations' factors, on the manifold; 0 keeps them.
      activation_bits: that the linear inputs are quantised to while it learns; 16 for none.
      dtype: what the models compute in meanwhile; what is learned is float32.
      block_steps: optimisation steps of each block before that, on the calibration windows; 0 leaves that out.
      block_window: neighbouring blocks that learn together.
      block_mix: share of windows that enter a block as the full-precision model has them.
      clip_steps: optimisation steps, after all others, in which clips alone learn; 0 leaves that out.
      clip_bits: of the linear inputs meanwhile; the clips that learn are those for so many bits.
      clip_rate: Adam's peak learning rate for clips, relative to themselves.
    """

    steps: int = 0
    batch: int = 4
    code_rate: float = 5e-3
    scale_rate: float = 2e-3
    rotation_rate: float = 0.0
    activation_bits: int = 16
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    block_steps: int = 0
    block_window: int = 1
    block_mix: float = 0.0
    clip_steps: int = 0
    clip_bits: int = 4
    clip_rate: float = 5e-3

    def __post_init__(self):
        known = f"one of {ACTIVATION_BITS}"
        _require(
            self.activation_bits in ACTIVATION_BITS, "refine.activation_bits", self.activation_bits, known
        )
        narrow = ACTIVATION_BITS[:-1]
        _require(self.clip_bits in narrow, "refine.clip_bits", self.clip_bits, f"one of {narrow}")
        _require(self.clip_steps >= 0, "refine.clip_steps", self.clip_steps, "0 or more")
        _require(self.clip_rate >= 0, "refine.clip_rate", self.clip_rate, "0 or more")
        _require(self.steps >= 0, "refine.steps", self.steps, "0 or more")
        _require(self.batch >= 1, "refine.batch", self.batch, "1 or more")
        _require(self.block_steps >= 0, "refine.block_steps", self.block_steps, "0 or more")
        _require(self.block_window >= 1, "refine.block_window", self.block_window, "1 or more")
        _require(0 <= self.block_mix <= 1, "refine.block_mix", self.block_mix, "between 0 and 1")
        _require(self.code_rate >= 0, "refine.code_rate", self.code_rate, "0 or more")
        _require(self.scale_rate >= 0, "refine.scale_rate", self.scale_rate, "0 or more")
        _require(self.rotation_rate >= 0, "refine.rotation_rate", self.rotation_rate, "0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingRecipe:
    """How the embedding and the LM head are stored, which no linear's bits say anything of.

    Attributes:
      bits: of asymmetric integers, rounded to nearest; 16 leaves both as they are.
      group_size: columns that share a scale and a zero point; 0 for one group a row.
    """

    bits: int = 16
    group_size: int = 128

    def __post_init__(self):
        _require(
            self.bits == 16 or 2 <= self.bits <= 8, "embedding.bits", self.bits, "between 2 and 8, or 16"
        )
        _require(self.group_size >= 0, "embedding.group_size", self.group_size, "0 (one group a row) or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationRecipe:
    """Which text a model is calibrated on.

    Attributes:
      corpus: a name or path that `corpora.load_corpus` takes, of which `mix` is a text of every domain at hand; or
        `self`, text that the model samples itself.
      windows: how many windows are drawn.
      seq_len: tokens in a window.
      seed: of the windows' offsets.
    """

    corpus: str = "mix"
    windows: int = 128
    seq_len: int = 2048
    seed: int = 0

    def __post_init__(self):
        _require(self.windows >= 1, "calibration.windows", self.windows, "1 or more")
        _require(self.seq_len >= 2, "calibration.seq_len", self.seq_len, "2 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllocationRecipe:
    """Settings of ILA-AMP, which gives each activation site its own bits under a budget.

    Attributes:
      budget: bits on average; 0 leaves every input at `activations.bits`.
      site: what gets bits of its own, each `input` of a block or the whole `block` (the paper).
      choices: bits to choose from, ascending; the last is the base that losses are compared with.
      beta: weight of the neighbours' interactions.
      weighting: what one bit of a site counts for in the average.
      windows: held-out windows of the calibration text that losses are measured on.
      seq_len: tokens in such a window; 0 takes the calibration's.
    """

    budget: float = 0.0
    site: Literal["input", "block"] = "input"
    choices: tuple[int, ...] = ACTIVATION_BITS[:-1]
    beta: float = 0.5
    weighting: Literal["elements", "macs"] = "elements"
    windows: int = 8
    seq_len: int = 0

    def __post_init__(self):
        known, choices = ACTIVATION_BITS[:-1], self.choices
        rising = len(choices) >= 2 and list(choices) == sorted(set(choices)) and set(choices) <= set(known)
        _require(rising, "allocation.choices", choices, f"two or more of {known}, ascending")
        low, high = min(choices), max(choices)
        _require(
            self.budget == 0 or low <= self.budget <= high,
            "allocation.budget",
            self.budget,
            f"between {low} and {high} bits on average, what the choices can give, or 0 for none",
        )
        _require(0 <= self.beta < float("inf"), "allocation.beta", self.beta, "0 or more")
        _require(self.windows >= 1, "allocation.windows", self.windows, "1 or more")
        _require(
            self.seq_len == 0 or self.seq_len >= 2, "allocation.seq_len", self.seq_len, "2 or more, or 0"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting of one quantisation; JSON and TOML hold it as one table a part."""

    name: str = "w1.58-g128"
    weights: WeightRecipe = dataclasses.field(default_factory=WeightRecipe)
    rotation: RotationRecipe = dataclasses.field(default_factory=RotationRecipe)
    activations: ActivationRecipe = dataclasses.field(default_factory=ActivationRecipe)
    embedding: EmbeddingRecipe = dataclasses.field(default_factory=EmbeddingRecipe)
    refine: RefineRecipe = dataclasses.field(default_factory=RefineRecipe)
    calibration: CalibrationRecipe = dataclasses.field(default_factory=CalibrationRecipe)
    allocation: AllocationRecipe = dataclasses.field(default_factory=AllocationRecipe)

    def __post_init__(self):
        for key in ("steps", "block_steps"):
            value = getattr(self.refine, key)
            refinable = self.weights.quantizer == "ternary" or not value
            _require(refinable, f"refine.{key}", value, "0: integers are not refined")

    def to_dict(self) -> dict[str, Any]:
        """Plain values in nested dicts, ready for JSON; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "recipe") -> Self:
        """A recipe from nested dicts; what is left out takes its default.

        Raises:
          TwlaError: an unknown key, a value of the wrong type or out of range; names `source` and the key.
        """
        try:
            return _build(cls, values, "")
        except TwlaError as error:
            raise TwlaError(f"{source}: {error}") from None


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the library."""
    return sorted(path.stem for path in _configs().glob("*.toml"))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Reads a recipe that ships with the library by its name, or any `.toml` file by its path.

    Raises:
      TwlaError: no such recipe or file, text that is not TOML, or what `Recipe.from_dict` refuses.
    """
    path = Path(name_or_path)
    if str(name_or_path) in recipe_names():
        path = _configs() / f"{name_or_path}.toml"
    elif not path.is_file():
        known = ", ".join(recipe_names())
        raise TwlaError(f"recipe '{name_or_path}' is neither a file nor one of: {known}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TwlaError(f"{path}: not a TOML file: {error}") from None
    return Recipe.from_dict({"name": path.stem, **values}, source=str(path))


def _configs() -> Path:
    """`configs/` inside the installed package, or beside it in a source tree."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _require(condition: bool, key: str, value: Any, wanted: str) -> None:
    if not condition:
        raise TwlaError(f"{key} = {value!r}: must be {wanted}")


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    if not isinstance(values, dict):
        raise TwlaError(f"{prefix.rstrip('.')}: must be a table")
    types = typing.get_type_hints(cls)
    for key in values:
        if key not in types:
            raise TwlaError(f"unknown key '{prefix}{key}'; known here: {', '.join(types)}")
    return cls(**{key: _convert(types[key], value, f"{prefix}{key}") for key, value in values.items()})


def _convert(wanted: Any, value: Any, key: str) -> Any:
    """`value` as the field's annotated type, without guessing: only int → float and list → tuple convert."""
    if dataclasses.is_dataclass(wanted):
        return _build(typing.cast(type, wanted), value, f"{key}.")
    if typing.get_origin(wanted) is Literal:
        choices = typing.get_args(wanted)
        _require(value in choices, key, value, f"one of {', '.join(choices)}")
        return value
    if typing.get_origin(wanted) is tuple:
        _require(isinstance(value, list | tuple), key, value, "a list")
        return tuple(_convert(typing.get_args(wanted)[0], item, key) for item in value)
    accepted = (int, float) if wanted is float else wanted
    _require(
        isinstance(value, accepted) and isinstance(value, bool) == (wanted is bool),
        key,
        value,
        f"of type {wanted.__name__}",
    )
    return wanted(value)

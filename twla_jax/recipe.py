"""Defines recipes: the settings of every stage of a quantisation, read from `configs/*.toml`."""

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from twla_jax import legacy_recipe
from twla_jax.core.settings import (
    ACTIVATION_BITS,
    PER_ROW,
    SEED_LIMIT,
    ActivationSettings,
    FoldedRotationSettings,
    GroupedSettings,
    IntegerSettings,
    QuantizationSettings,
    RotationSettings,
    WeightSettings,
)
from twla_jax.core.validation import Settings, ranged, require
from twla_jax.errors import TwlaError
from twla_jax.json_files import require_file
from twla_jax.refinement_settings import RefineSettings

_LONGEST = 1 << 20  # bytes of a recipe file
# For deeper keys tomllib takes time by the square of the depth.
_DEEP_KEY = re.compile(r"(?:[\w\"'-]+\s*\.\s*){32}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingSettings(Settings):
    """How the embedding and the LM head are stored: asymmetric integers, rounded to nearest.

    Attributes:
      bits: of a value.
      group_size: columns that share a scale and a zero point; 0 for one group a row.
    """

    table: ClassVar[str] = "embedding"

    bits: int = ranged(8, low=2, high=8)
    group_size: int = ranged(128, low=0, wanted=PER_ROW)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationSettings(Settings):
    """Which text a model is calibrated on.

    Attributes:
      corpus: a name or path that `load_corpus` takes, of which `mix` is a text of every domain at hand; or
        `self`, text that the model samples itself.
      windows: how many windows are drawn.
      seq_len: tokens in a window.
      seed: of the windows' offsets.
    """

    table: ClassVar[str] = "calibration"

    corpus: str = "mix"
    windows: int = ranged(256, low=1)
    seq_len: int = ranged(1024, low=2)
    seed: int = ranged(0, low=0, high=SEED_LIMIT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllocationSettings(Settings):
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

    table: ClassVar[str] = "allocation"

    budget: float = ranged(0.0, low=0)
    site: Literal["input", "block"] = "input"
    choices: tuple[int, ...] = ACTIVATION_BITS[:-1]
    beta: float = ranged(0.5, low=0)
    weighting: Literal["elements", "macs"] = "elements"
    windows: int = ranged(8, low=1)
    seq_len: int = ranged(0, low=0)

    def check(self) -> None:
        """Refuse choices out of order, a budget that they cannot give, and windows of a single token."""
        known, choices = ACTIVATION_BITS[:-1], list(self.choices)
        rising = len(choices) >= 2 and choices == sorted(set(choices)) and set(choices) <= set(known)
        require(rising, self.key("choices"), self.choices, f"two or more of {known}, ascending")
        low, high = choices[0], choices[-1]
        wanted = f"between {low} and {high} bits on average, what the choices can give, or 0 for none"
        require(not self.budget or low <= self.budget <= high, self.key("budget"), self.budget, wanted)
        require(self.seq_len != 1, self.key("seq_len"), self.seq_len, "2 or more, or 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """Every setting of one quantisation; JSON and TOML hold it as one table a stage, false for a stage left out."""

    name: str = "w1.58-g128"
    weights: WeightSettings = dataclasses.field(default_factory=WeightSettings)
    rotation: RotationSettings | None = dataclasses.field(default_factory=RotationSettings)
    folded_rotation: FoldedRotationSettings | None = None
    activations: ActivationSettings = dataclasses.field(default_factory=ActivationSettings)
    embedding: EmbeddingSettings | None = None
    refine: RefineSettings = dataclasses.field(default_factory=RefineSettings)
    calibration: CalibrationSettings = CalibrationSettings()
    allocation: AllocationSettings = AllocationSettings()

    def check(self) -> None:
        """Refuse to refine integers, which have no ternary codes to learn."""
        refined = self.refine.blocks or self.refine.end_to_end
        if refined and isinstance(self.weights.quantizer, IntegerSettings | GroupedSettings):
            raise TwlaError(f"{refined.table}: integers are not refined; leave it out")

    @property
    def quantization(self) -> QuantizationSettings:
        """Return the settings that the block-wise transform reads."""
        return QuantizationSettings(
            weights=self.weights, rotation=self.rotation, activations=self.activations
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "recipe") -> Self:
        """Return the recipe that nested dicts say, also in the form that version 0.1.0 wrote.

        Raises:
          TwlaError: an unknown key, a value of the wrong type or out of range; names `source` and the key.
        """
        try:
            return super().from_dict(legacy_recipe.translate(values))
        except TwlaError as error:
            raise TwlaError(f"{source}: {error}") from None


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with the library."""
    return sorted(path.stem for path in configs_folder().glob("*.toml"))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a recipe that ships with the library by its name, or any `.toml` file by its path.

    A file with `extends = "NAME"` says only what differs from that recipe: one that ships, or a file beside it.

    Raises:
      TwlaError: no such recipe or file, text that is not TOML, recipes that extend each other in a circle, or what
        `Recipe.from_dict` refuses.
    """
    return _load(name_or_path, Path(), ())


def _load(name_or_path: str | Path, folder: Path, extended_by: tuple[Path, ...]) -> Recipe:
    path = folder / name_or_path
    if str(name_or_path) in recipe_names():
        path = configs_folder() / f"{name_or_path}.toml"
    elif not _is_file(path):
        known = ", ".join(recipe_names())
        before = f"{extended_by[-1]}: " if extended_by else ""
        raise TwlaError(f"{before}recipe '{name_or_path}' is neither a file nor one of: {known}")
    path = path.resolve() if extended_by else path
    if path.resolve() in (seen.resolve() for seen in extended_by):
        raise TwlaError(f"{extended_by[0]}: extends itself")
    values = _read_toml(path)
    extends = values.pop("extends", None)
    if not isinstance(extends, str | None):
        raise TwlaError(f"{path}: extends = {extends!r}: must be the name of a recipe")
    base = _load(extends, path.parent, (*extended_by, path)) if extends is not None else Recipe()
    try:
        return base.updated({"name": path.stem, **values})
    except TwlaError as error:
        raise TwlaError(f"{path}: {error}") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def _read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file; what no recipe is like is refused before it takes long.

    Raises:
      TwlaError: it cannot be read, or is not TOML.
    """
    if require_file(path) > _LONGEST:
        raise TwlaError(f"{path}: has more than {_LONGEST} bytes, which no recipe needs")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if _DEEP_KEY.search(text):
            raise ValueError("keys are nested too deeply")
        return tomllib.loads(text)
    except OSError as error:
        raise TwlaError(f"{path}: {error.strerror}") from None
    except RecursionError:
        raise TwlaError(f"{path}: not a TOML file: nested too deeply") from None
    except ValueError as error:
        raise TwlaError(f"{path}: not a TOML file: {str(error)[:200]}") from None


def configs_folder() -> Path:
    """Return `configs/` inside the installed package, or beside it in a source tree."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"

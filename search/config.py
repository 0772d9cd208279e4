"""The typed, strict schema of conf/: frozen settings, all that anything below run.py sees."""

from __future__ import annotations

import re
from collections.abc import Mapping
from reprlib import repr as shown
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
)
from pydantic import model_validator as check

from crdiff_core.errors import CRDiffError
from crdiff_core.models import Model
from crdiff_core.ratios import HIGHEST_POA_WEIGHT, Resolution
from crdiff_core.rewards import Resize

NO_SUCH_SETTING = (
    "there is no such setting (python -m search.run --help lists them; each searcher, model and "
    "reward has its own)"
)


class ConfigError(CRDiffError, ValueError):
    """A setting is unknown, out of range, or does not fit the others."""


# Neither a path nor text in UTF-8 can hold them; spaces of all kinds are fine.
_NOT_TEXT = re.compile("[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]")


class Settings(BaseModel):
    """Base of every settings class: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _is_text(cls, value: object) -> object:
        if isinstance(value, str) and (found := _NOT_TEXT.search(value)):
            raise ValueError(f"it holds {found[0]!r}: give text in UTF-8, without control signs")
        return value


Size = Annotated[
    Resolution,
    BeforeValidator(lambda v: v if isinstance(v, Resolution) else Resolution.parse(v)),
    PlainSerializer(str),
]
Interval = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
Triple = tuple[float, float, float]
PoaWeight = Annotated[float, Field(ge=0, le=HIGHEST_POA_WEIGHT)]
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Bounds(Settings):
    """(low, high) of each block group's ratio."""

    down: Interval
    mid: Interval
    up: Interval


class SpaceSettings(Settings):
    """What both spaces have; a poa_weight of [low, high] is searched too."""

    poa_weight: tuple[PoaWeight, PoaWeight] | None

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        """(low, high) of each dimension."""
        given = {name: getattr(self, name) for name in type(self).model_fields if name != "name"}
        return {name: given[name] for name in sorted(given, key=_last) if given[name] is not None}

    @check(mode="after")
    def _ordered(self) -> SpaceSettings:
        for name, (low, high) in self.bounds.items():
            if low >= high:
                raise ValueError(f"{name} is [{low}, {high}]: give low < high")
        return self


def _last(name: str) -> bool:
    return name == "poa_weight"


class BlocksSettings(SpaceSettings):
    """conf/space/blocks.yaml: a ratio for each block group."""

    name: Literal["blocks"]
    down: Interval
    mid: Interval
    up: Interval


class UniformSettings(SpaceSettings):
    """conf/space/uniform.yaml: one ratio for all block groups."""

    name: Literal["uniform"]
    ratio: Interval


def _name(value: str) -> str:
    if not re.fullmatch(r"\w[^/\\]*", value):  # It becomes part of a folder's name.
        raise ValueError(f"got {value!r}: give a name that begins with a letter and has no slash")
    return value


class ModelSettings(Settings):
    """conf/model: what is drawn with, and its own defaults.

    paper_ratios:       (down, mid, up) of the paper's table 6, by HEIGHTxWIDTH.
    paper_image_reward: of dense, pruned alone and CR-Diff (tables 1, 2, 7); none in earlier runs.
    batch_size:         pictures drawn at once by default; earlier runs did not have it.
    """

    name: Annotated[str, AfterValidator(_name)]
    path: str
    hub_id: str
    hub_revision: str
    dtype: Literal["float32", "float16", "bfloat16"]
    native_res: Size
    default_res: Size
    num_steps: Count
    guidance_scale: Annotated[float, Field(ge=0)]
    search_steps: Count
    batch_size: Count = 8
    bounds: Bounds
    paper_ratios: dict[str, Triple]
    paper_image_reward: dict[str, Triple] = {}

    def model(self) -> Model:
        """The model itself."""
        return Model(self.name, self.path, self.dtype, self.hub_id, self.hub_revision)


def _speculation(value: object) -> object:
    if value is False:  # As YAML reads off.
        return "off"
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if value not in ("auto", "off") and not is_count:
        raise ValueError(f"got {value!r}: give auto, off or a count from 1 up")
    return value


class BaselineSettings(Settings):
    """conf/searcher: a searcher to compare with."""

    name: Literal["tpe", "gp", "cmaes", "qmc", "random", "grid"]
    warm_start: bool


class AnnealingSettings(Settings):
    """conf/searcher/annealing*.yaml; what each means stands in search.annealing.Annealing."""

    name: Literal["annealing", "annealing_paper"]
    warm_start: bool
    speculation: Annotated[int | str, BeforeValidator(_speculation)]
    chains: Count
    seeds: Annotated[tuple[Triple, ...], Field(min_length=1)]
    space_filling: Annotated[int, Field(ge=0)]
    start_from_paper: bool
    initial_temperature: Annotated[float, Field(gt=0)] | None
    cooling: Share
    min_temperature: Annotated[float, Field(ge=0)]
    step_size: Annotated[float, Field(gt=0)]
    min_step_size: Annotated[float, Field(ge=0)]
    candidates: Count
    exploration: Annotated[float, Field(ge=0)]
    lag: Annotated[int, Field(ge=0)]
    patience: Count | None
    reheat_above: float | None
    reheat_factor: Annotated[float, Field(ge=1)]
    max_reheats: Annotated[int, Field(ge=0)]
    restart_jump: Annotated[float, Field(ge=0)]
    max_restarts: Annotated[int, Field(ge=0)] | None

    @field_validator("initial_temperature", "reheat_above", mode="before")
    @classmethod
    def _chosen_by_the_chain(cls, value: object) -> object:
        if isinstance(value, str) and value != "auto":
            raise ValueError(f"got {value!r}: give auto or a number")
        return None if value == "auto" else value


class RacingSettings(Settings):
    """conf/racing: whether evaluations that cannot win are stopped; as search.racing.Race."""

    name: Literal["on", "off"]
    alpha: Annotated[float, Field(gt=0, lt=0.5)]
    stride: Annotated[int, Field(ge=2)]


class BudgetSettings(Settings):
    """What a search may take; null is no limit."""

    steps: Count
    evaluations: Count | None
    pictures: Count | None
    gpu_hours: Annotated[float, Field(gt=0)] | None
    wall_hours: Annotated[float, Field(gt=0)] | None


class ShapesSettings(Settings):
    """conf/reward/shapes.yaml."""

    name: Literal["shapes"]


class ImageRewardPackageSettings(Settings):
    """conf/reward/image_reward_package.yaml; earlier versions squashed no picture."""

    name: Literal["image_reward_package"]
    resize: Resize = "none"


class ImageRewardSettings(Settings):
    """conf/reward/image_reward.yaml; what each means stands in crdiff_core's ImageReward."""

    name: Literal["image_reward"]
    path: str
    hub_id: str
    hub_revision: str
    tokenizer: str
    tokenizer_revision: str
    # Earlier versions squashed no picture.
    resize: Resize = "none"


class PromptSettings(Settings):
    """conf/prompts: where prompts come from, and how many each of the disjoint sets has.

    shared_noise: as crdiff_core.prompts.split_prompts has it; earlier versions wrote none.
    """

    name: Literal["shapes", "everyday", "reference", "coco"]
    path: str
    text: str
    repeat: bool
    seed: Annotated[int, Field(ge=0)]
    shared_noise: bool = False
    search: Count
    rerank: Count
    validation: Annotated[int, Field(ge=2)]

    @check(mode="after")
    def _one_source(self) -> PromptSettings:
        if self.text and not self.text.strip():
            raise ValueError("text is blank: give a prompt, or nothing")
        if self.text and self.path:
            raise ValueError("text and path are both given: choose one")
        return self


class ClusterSettings(Settings):
    """conf/cluster: where trials run, and what one takes; earlier versions had no grid's cells."""

    name: str
    address: str
    device: Literal["auto", "cpu", "cuda"]
    cpus_per_trial: Count
    gpus_per_trial: Annotated[float, Field(gt=0)]
    num_workers: Count | None
    cells: Count | None = None
    gpu_hour_price: Annotated[float, Field(ge=0)] | None

    @check(mode="after")
    def _whole_gpus(self) -> ClusterSettings:
        if self.gpus_per_trial > 1 and self.gpus_per_trial % 1:
            raise ValueError(
                f"gpus_per_trial={self.gpus_per_trial:g}: Ray shares out one GPU, or whole ones: "
                "give at most 1, or a whole number"
            )
        return self


def _without_password(uri: str) -> str:
    if re.search(r"://[^/]*:[^@]*@|[?&]\w*(password|secret|token)\w*=", uri):
        raise ValueError(
            "credentials do not belong into it, since settings are written down: set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (of PostgreSQL: PGPASSWORD)"
        )
    return uri


def _known(uri: str) -> str:
    if uri and not re.match(r"(https?|sqlite|postgresql|mysql|mssql)(\+\w+)?://", uri):
        raise ValueError(
            f"got {shown(uri)}: give an MLflow server, http://HOST:PORT, or a database, such as "
            "sqlite:////folder/mlflow.db"
        )
    return uri


class TrackingSettings(Settings):
    """conf/tracking: where MLflow keeps its runs; `uri: ""` is a database under output."""

    name: Literal["mlflow", "none"]
    uri: Annotated[str, AfterValidator(_without_password), AfterValidator(_known)]
    experiment: str


def _batch_size(value: object) -> object:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if value is None:  # As earlier versions had it.
        return "auto"
    if value != "auto" and not is_count:
        raise ValueError(f"got {value!r}: give auto or a count from 1 up")
    return value


class RenderSettings(Settings):
    """How a picture is drawn.

    negative_prompt: null is the pipeline's own; earlier versions wrote none.
    """

    num_steps: Count
    guidance_scale: Annotated[float, Field(ge=0)]
    size_conditioning: Literal["requested", "native"]
    negative_prompt: str | None = None
    batch_size: Annotated[int | Literal["auto"], BeforeValidator(_batch_size)]
    compile: Literal["none", "blocks", "graphs"]


class RerankSettings(Settings):
    """How many of the best are compared again on fresh prompts."""

    top: Count
    off_path: bool


class ReportSettings(Settings):
    """What report.html shows; earlier versions wrote none."""

    pictures: Annotated[int, Field(ge=0)] = 0


class TrialSettings(Settings):
    """What happens when a trial fails; earlier runs had no limit of its own for loading."""

    max_failures: Annotated[int, Field(ge=0)]
    timeout_s: Annotated[float, Field(gt=0)] | None
    load_timeout_s: Annotated[float, Field(gt=0)] | None = 3600
    retry_failed: bool


_DISCRIMINATORS = {
    *("annealing", "annealing_paper", "tpe", "gp", "cmaes", "qmc", "random", "grid"),
    *("shapes", "image_reward", "image_reward_package", "blocks", "uniform"),
}


class Config(Settings):
    """conf/config.yaml: one search."""

    model: ModelSettings
    searcher: Annotated[AnnealingSettings | BaselineSettings, Field(discriminator="name")]
    space: Annotated[BlocksSettings | UniformSettings, Field(discriminator="name")]
    racing: RacingSettings
    budget: BudgetSettings
    reward: Annotated[
        ShapesSettings | ImageRewardSettings | ImageRewardPackageSettings,
        Field(discriminator="name"),
    ]
    prompts: PromptSettings
    cluster: ClusterSettings
    tracking: TrackingSettings
    render: RenderSettings
    rerank: RerankSettings
    report: ReportSettings = ReportSettings()
    trial: TrialSettings
    res: Size
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    poa_weight: PoaWeight
    output: Annotated[str, Field(min_length=1)]
    dry_run: bool

    @property
    def most_evaluations(self) -> int:
        """Evaluations of the search by one worker at most: its steps, and annealing's jumps."""
        steps, searcher = self.budget.steps, self.searcher
        if not isinstance(searcher, AnnealingSettings) or searcher.patience is None:
            return steps
        num_restarts = steps // searcher.patience
        if searcher.max_restarts is not None:
            num_restarts = min(num_restarts, searcher.chains * searcher.max_restarts)
        return steps + (num_restarts if searcher.restart_jump > 0 else 0)

    @check(mode="after")
    def _steps_suffice(self) -> Config:
        if isinstance(self.searcher, AnnealingSettings):
            needed = {"seeds": len(self.searcher.seeds), "chains": self.searcher.chains}
            for name, number in needed.items():
                if number > self.budget.steps:
                    raise ValueError(
                        f"budget.steps {self.budget.steps} is less than the searcher's {number} "
                        f"{name}: raise it"
                    )
        return self

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Config:
        """Check composed settings. Raises ConfigError, in one line that names the first fault."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            # The name that tells searchers and rewards apart comes as a part of no path.
            path = [str(part) for part in first["loc"] if part not in _DISCRIMINATORS]
            if first["type"] == "extra_forbidden":
                reason = NO_SUCH_SETTING
            elif first["type"] == "value_error":  # Our own check: it says what it found.
                reason = first["msg"].removeprefix("Value error, ")
            elif first["type"] == "missing":
                reason = "it is missing: give it a value, or leave it at its default"
            else:
                got = shown(first["input"])
                reason = f"{first['msg'][0].lower()}{first['msg'][1:]}, got {got}"
            raise ConfigError(": ".join([*filter(None, [".".join(path)]), reason])) from error

"""What each stage of a run takes: tokens, seconds and money."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

from pipelines.estimates import speeds
from pipelines.estimates.networks import Network, student_network, teacher_network
from pipelines.estimates.plan import Plan
from pipelines.estimates.prices import cores
from pipelines.estimates.speeds import Speed, Work
from pipelines.estimates.tokens import TOKENS_A_CORE, DataSize, data_size
from pipelines.parameters import stage_settings
from pipelines.stages import CACHED, Machine
from trainer.loss.divergences import LINEAR_SCHEME
from trainer.settings.accumulation import accumulation
from trainer.settings.config import AUTO, TrainConfig

_LIGHT_SECONDS = 20.0
"""What a stage takes that reads and writes little: assumed."""


@dataclass(frozen=True)
class Amount:
    """Seconds or money: a fixed part, and one for each token of a data set of unknown size."""

    fixed: float = 0.0
    per_token: float = 0.0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.fixed + other.fixed, self.per_token + other.per_token)

    def times(self, factor: float) -> Amount:
        """Both parts times a factor."""
        return Amount(self.fixed * factor, self.per_token * factor)


@dataclass(frozen=True)
class StageCost:
    """One stage's line of the estimate."""

    title: str
    machine: str
    tokens: float | None
    """That it goes over; NaN: all of a data set of unknown size; None: it does not go by tokens."""
    work: Amount | None
    """Seconds once it runs; None: not estimated."""
    known: str
    """How that is known, or why it is not."""
    factor: float = speeds.ASSUMED_FACTOR
    """By how much it may be off, up or down."""
    start: float = 0.0
    """Seconds until it runs, which are assumed."""
    hourly: float | None = None
    """What its machines cost together for an hour; None: not known."""

    def seconds(self, power: int = 0) -> Amount | None:
        """From the order of its machines to the end; None: not estimated.

        Args:
            power: 0 as estimated; -1 and 1 the least and the most.
        """
        if self.work is None:
            return None
        start = self.start * speeds.ASSUMED_FACTOR**power
        return self.work.times(self.factor**power) + Amount(start)

    def price(self, power: int = 0) -> Amount | None:
        """Of those seconds, in the currency of the prices; None: not known."""
        seconds = self.seconds(power)
        if seconds is None or self.hourly is None:
            return None
        return seconds.times(self.hourly / 3600)


@dataclass
class Estimate:
    """What a run takes: a line for each stage, and what to know of it."""

    plan: Plan
    stages: list[StageCost] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def seconds(self, power: int = 0) -> Amount:
        """Of all stages that are estimated, one after another; see `StageCost.seconds`."""
        return sum((stage.seconds(power) or Amount() for stage in self.stages), Amount())

    def price(self, power: int = 0) -> Amount:
        """Of all stages whose price is known, and of the run itself."""
        run = Amount(self.plan.prices.run if self.plan.backend == "vertex" else 0.0)
        return sum((stage.price(power) or Amount() for stage in self.stages), run)


def estimate(plan: Plan) -> Estimate:
    """Time and price of each stage of a run, one after another."""
    found = Estimate(plan)
    maker = _Maker(plan, found.notes)
    found.stages += [maker.stage(key, title) for key, title in plan.stages]
    if plan.backend == "vertex" and plan.region != plan.prices.region:
        found.notes.append(
            f"prices are those of {plan.prices.region}; the run is in {plan.region}, where they"
            " differ"
        )
    if plan.backend != "vertex":
        found.notes.append("speeds are those of the GPUs named; the cluster decides which it gives")
    return found


class _Maker:
    """Makes the lines of one estimate, and notes what they leave out."""

    def __init__(self, plan: Plan, notes: list[str]) -> None:
        self.plan, self.values, self.notes = plan, plan.values, notes

    @cached_property
    def data(self) -> DataSize:
        found = data_size(self.values)
        if found.train is None:
            self._note(f"{found.known}; what goes by them is given per million tokens (s/M)")
        elif "files" in found.known:
            self._note(f"tokens of the data set: {found.known}")
        return found

    @cached_property
    def teacher(self) -> Network | str:
        return teacher_network(self.values["teacher_name"])

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def stage(self, key: str, title: str) -> StageCost:
        """The line of a stage."""
        if not key:
            return StageCost(title, "–", None, None, "not estimated: of another release")
        machine = self.plan.machines[key]
        if key in ("anneal", "continue"):
            return self._training(key, title, machine)
        if key == "prepare":
            tokens, rate = self.data.train, TOKENS_A_CORE * cores(machine)
            return self._over_tokens(title, machine, tokens, 1.0 / rate, "assumed")
        if key == "targets":
            return self._targets(title, machine)
        if key == "evaluate":
            return self._evaluation(title, machine)
        return self._line(title, machine, None, Amount(_LIGHT_SECONDS), "assumed")

    def _line(
        self,
        title: str,
        machine: Machine,
        tokens: float | None,
        work: Amount | None,
        known: str,
        factor: float = speeds.ASSUMED_FACTOR,
        tasks: int = 1,
    ) -> StageCost:
        """A line from what a stage takes once it runs; ``tasks`` run at the same time."""
        name = self._machine_name(machine, tasks)
        if work is None:
            return StageCost(title, name, tokens, None, f"not estimated: {known}")
        prices = self.plan.prices
        vertex = self.plan.backend == "vertex"
        job = machine.gpu and vertex
        start = prices.custom_job_start if job else prices.task_start
        hourly = prices.hourly(machine) if vertex else None
        if hourly is None and vertex:
            self._note(f"{prices.source} has no price for {name}")
        if machine.scheduling == "spot":
            self._note(f"{title} is on spot machines, whose price changes from day to day")
        if machine.scheduling == "flex_start":
            self._note(f"{title} is on machines of flex_start, counted at the price on demand")
        if job and start + work.fixed > machine.timeout_hours * 3600:
            self._note(
                f"{title} takes longer than the {machine.timeout_hours} hours after which it is"
                " stopped; see …_TIMEOUT_HOURS"
            )
        cost = None if hourly is None else hourly * tasks
        return StageCost(title, name, tokens, work, known, factor, start, cost)

    def _machine_name(self, machine: Machine, tasks: int) -> str:
        count = machine.replicas * tasks
        several = f"{count} × " if count > 1 else ""
        vertex = self.plan.backend == "vertex"
        if not machine.gpu:
            kind = self.plan.prices.plain(machine) if vertex else ""
            return f"{several}{machine.cpu} CPU, {machine.memory}" + (f" ({kind})" if kind else "")
        gpus = f"{machine.accelerator_count} {_short(machine.accelerator_type)}"
        way = "" if machine.scheduling == "standard" else f", {machine.scheduling}"
        host = machine.machine_type if vertex else f"{machine.cpu} CPU, {machine.memory}"
        return f"{several}{host}, {gpus}{way}"

    def _over_tokens(
        self,
        title: str,
        machine: Machine,
        tokens: float | None,
        seconds: float,
        known: str,
        factor: float = speeds.ASSUMED_FACTOR,
        *,
        tasks: int = 1,
        beside: float = 0.0,
    ) -> StageCost:
        """A line of a stage that goes over the data set once: ``seconds`` for each token."""
        work = Amount(beside, seconds) if tokens is None else Amount(beside + tokens * seconds)
        shown = math.nan if tokens is None else tokens
        return self._line(title, machine, shown, work, known, factor, tasks)

    def _targets(self, title: str, machine: Machine) -> StageCost:
        workers = self.values["target_workers"]
        gpu = speeds.gpu_of(machine.accelerator_type) if machine.gpu else ""
        context = max(self.values["anneal_block_size"], self.values["continue_block_size"])
        missing = self._missing(machine)
        if isinstance(self.teacher, str) or missing:
            tokens = self.data.train if self.data.train is not None else math.nan
            return self._line(title, machine, tokens, None, missing, tasks=workers)
        found = speeds.speed(gpu, Work(speeds.MAKING, context, teacher=self.teacher))
        each = 1.0 / (found.tokens_per_second * workers)
        return self._over_tokens(
            title,
            machine,
            self.data.train,
            each,
            found.known,
            found.factor,
            tasks=workers,
            beside=speeds.RUN_SECONDS,
        )

    def _training(self, key: str, title: str, machine: Machine) -> StageCost:
        resolved = stage_settings(self.values, key)
        config = resolved.config
        vertex = self.plan.backend == "vertex"
        gpus = max(1, machine.accelerator_count) * (machine.replicas if vertex else 1)
        steps = accumulation(resolved, gpus)
        windows = config.global_batch if steps == AUTO else steps * config.micro_batch * gpus
        tokens = float(config.train_steps * windows * config.context)
        missing = self._missing(machine, config)
        if missing or isinstance(self.teacher, str):
            return self._line(title, machine, tokens, None, missing)
        if self.values["resume_gcs_uri"] and key == "anneal":
            self._note(
                "the checkpoint of resume_gcs_uri is not read: the student's size is that of the"
                " parameters and defaults, and a step below train_steps shortens the annealing"
            )
        work = self._work(config)
        found = _of_several(
            speeds.speed(speeds.gpu_of(machine.accelerator_type), work), machine, config
        )
        before = self.plan.machines.get("anneal", machine)
        compiled = key == "continue" and before.accelerator_type == machine.accelerator_type
        seconds = speeds.COMPILED_SECONDS if compiled else speeds.FRESH_SECONDS
        seconds += tokens / found.tokens_per_second
        seconds += self._scoring(machine, config, -(-config.train_steps // config.eval_every))
        return self._line(title, machine, tokens, Amount(seconds), found.known, found.factor)

    def _missing(self, machine: Machine, config: TrainConfig | None = None) -> str:
        """Why a stage's speed is not known; empty where it is."""
        if not machine.gpu:
            return "no GPU"
        if not speeds.gpu_of(machine.accelerator_type):
            return f"nothing is known of {machine.accelerator_type}"
        if isinstance(self.teacher, str):
            self._note(self.teacher)
            return "the teacher's size, or its vocabulary, is not known"
        if config is not None and (config.fp32 or config.teacher_precision == "fp32"):
            return "fp32 on a GPU was not measured"
        return ""

    @cached_property
    def student(self) -> Network:
        """The student: that of the annealing, in every stage."""
        assert isinstance(self.teacher, Network)
        config = stage_settings(self.values, "anneal").config
        return student_network(config, self.teacher.vocabulary)

    def _work(self, config: TrainConfig) -> Work:
        """What a training does with each token."""
        assert isinstance(self.teacher, Network)
        kind = speeds.ALONE
        if config.needs_teacher:
            kind = speeds.STORED if self.values["teacher"] == CACHED else speeds.ONLINE
        usual = (
            config.compile != "off"
            and config.dropout == 0.0
            and config.pos_embedding == "absolute"
            and config.kd_scheme == LINEAR_SCHEME
            and not config.activation_checkpointing
            and not config.fp16
        )
        return Work(
            kind,
            config.context,
            self.student,
            self.teacher,
            fp8=config.teacher_precision == "fp8",
            usual=usual,
            pass_tokens=(config.micro_batch * config.context) or speeds.FULL_PASS,
            recomputed=config.activation_checkpointing,
        )

    def _scoring(self, machine: Machine, config: TrainConfig, evaluations: int) -> float:
        """Seconds that evaluations take: the student at each, the teacher once."""
        assert isinstance(self.teacher, Network)
        tokens = self._validation_tokens(config)
        gpu = speeds.gpu_of(machine.accelerator_type)
        student = self.student
        seconds = 0.0
        for context in config.contexts:
            each = speeds.scoring_seconds(gpu, student, context, teacher=False)
            seconds += evaluations * tokens * each
            if config.needs_teacher and self.values["teacher"] != CACHED:
                seconds += tokens * speeds.scoring_seconds(gpu, self.teacher, context, teacher=True)
        return seconds

    def _validation_tokens(self, config: TrainConfig) -> float:
        """Tokens of an evaluation at one context; 0, with a note, where they are not known."""
        limit, split = config.eval_max_tokens, self.data.validation
        if split is None and not limit:
            self._note(
                "evaluations are left out: the validation split's size is not known, and"
                " eval_max_tokens does not limit it"
            )
            return 0.0
        return float(min(limit or math.inf, math.inf if split is None else split))

    def _evaluation(self, title: str, machine: Machine) -> StageCost:
        config = stage_settings(self.values, "evaluate").config
        config = replace(config, block_size=max(config.eval_ctx_lens))
        missing = self._missing(machine, config)
        if missing:
            return self._line(title, machine, None, None, missing)
        # Two checkpoints and the teacher, which is not cached here
        single = replace(machine, accelerator_count=1, replicas=1)
        tokens = 3.0 * len(config.contexts) * self._validation_tokens(config) or math.nan
        gpu = speeds.gpu_of(machine.accelerator_type)
        assert isinstance(self.teacher, Network)
        seconds = self._scoring(single, replace(config, alpha=0.0, alpha_schedule=""), 2)
        for context in config.contexts:
            each = speeds.scoring_seconds(gpu, self.teacher, context, teacher=True)
            seconds += self._validation_tokens(config) * each
        work = Amount(speeds.RUN_SECONDS + seconds)
        return self._line(title, machine, tokens, work, "by FLOPs, rest assumed")


def _of_several(found: Speed, machine: Machine, config: TrainConfig) -> Speed:
    """The speed of all GPUs of a stage together."""
    gpus = machine.accelerator_count * machine.replicas
    if config.compile == "off":
        found = Speed(
            found.tokens_per_second,
            f"{found.known}, though compiled",
            speeds.OTHER_GPU_FACTOR,
        )
    if gpus == 1:
        return found
    way = "shard_teacher" if config.shard_teacher else config.parallel
    share = speeds.SCALING[way]
    known = f"{found.known}, × {gpus} at {share}"
    if machine.replicas > 1:
        share *= speeds.MACHINES_SCALING
        known = f"{found.known}, × {gpus} at {share:.2f} (assumed)"
    factor = found.factor * speeds.RULE_FACTOR
    return Speed(found.tokens_per_second * gpus * share, known, factor)


def _short(accelerator_type: str) -> str:
    return speeds.gpu_of(accelerator_type) or accelerator_type

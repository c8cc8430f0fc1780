"""One tuning from beginning to end: calibrate, search, check against the defaults, other weights, report."""

from __future__ import annotations

import datetime
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import psutil

from stoker import LocalModel, ModelError
from stoker.machine import available_memory
from stoker.profiles import data_folder
from stoker_plugins.tune.messages import Answer, Figures, Job, QualityJob
from stoker_plugins.tune.report import Report, row_of
from stoker_plugins.tune.search import (
    BudgetSpentError,
    Comparison,
    Measured,
    Rules,
    Search,
    compare,
)
from stoker_plugins.tune.space import WEIGHTS, Assignment
from stoker_plugins.tune.target import Target, as_other_weights, with_weights
from stoker_plugins.tune.trials import run_job

__all__ = ["Session", "Wishes"]

_PROBE_SCALE = 0.25
_LOOK_S = 0.5
_BUSY_PERCENT = 25.0  # of all cores, before anything is measured
_SCALES = (0.1, 4.0)
_FIRST_LIMIT_S = 120.0
_LIMIT_S_PER_BYTE = 1 / 20e6  # a slow disk
_FINAL_PAIRS = 3
_MEMORY_SHARE = 0.95  # of what is free
_FREE_DISK_BYTES = 200 * 2**20  # to be left


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user asked for.

    Attributes:
        load: What to optimise for.
        budget_s: How long the search may take.
        run_s: How long one run of the load should take with the defaults.
        only: Names of what to tune; all if empty.
        requantize: Types to turn the weights into.
        rules: When a difference counts.
    """

    load: str
    budget_s: float
    run_s: float = 2.0
    only: Sequence[str] = ()
    requantize: Sequence[str] = ()
    rules: Rules = field(default_factory=Rules)


class Session:
    """One tuning.

    Args:
        target: What is tuned.
        wishes: What the user asked for.
        tell: Called with what is being done and the share of the budget that is spent.
        run: Does a job in a process of its own.
        clock: Monotonic seconds.

    Attributes:
        report: What is known so far.
        best: What is best; checked against the defaults once the report is complete.
        weights: The best file with other weights, if one is better; its type and the file.
    """

    def __init__(
        self,
        target: Target,
        wishes: Wishes,
        tell: Callable[[str, float], None],
        run: Callable[[Job], Answer] = run_job,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.target = with_weights(target, wishes.requantize)
        self.wishes = wishes
        self.report = Report(
            model=target.local.model_id,
            reference=target.local.reference,
            backend=target.backend_name,
            load=wishes.load,
            machine=target.machine,
            versions=target.versions,
            date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            skipped=dict(target.skipped),
        )
        self.best: dict[str, str] = {}
        self.weights: tuple[str, LocalModel] | None = None
        self._tell = tell
        self._run_job = run
        self._clock = clock
        self._started_s = clock()
        self._deadline_s = self._started_s + wishes.budget_s
        self._doing = ""
        self._scale = _PROBE_SCALE
        self._took_s = {False: 0.0, True: 0.0}  # a whole process, alone and with company
        self._files: dict[str, LocalModel] = {}
        self._made: list[Path] = []
        self._figures: dict[tuple[tuple[str, str], ...], dict[str, Figures]] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="stoker-tune-"))
        self._search = Search(
            self.target.space,
            self._measure,
            wishes.rules,
            only=[name for name in wishes.only or self.target.space.dimensions if name != WEIGHTS],
            tell=self._progress,
        )

    # ------------------------------------------------------------------ the course of it

    def run(self) -> Report:
        """Do it all; what is known stays in ``report`` whatever happens.

        Raises:
            ModelError: The model cannot be measured with its defaults.
            KeyboardInterrupt: The user has had enough.
        """
        try:
            self._calibrate()
            if list(self.wishes.only) != [WEIGHTS]:
                self._find_settings()
                self._check()
            self._try_weights()
            self.report.complete = True
        finally:
            self._conclude()
        return self.report

    def close(self, *, keep: LocalModel | None = None) -> None:
        """Remove what was made on the way, but for the weights that are to be kept."""
        shutil.rmtree(self._folder, ignore_errors=True)
        for path in self._made:
            if keep is None or path != keep.path:
                path.unlink(missing_ok=True)

    def _calibrate(self) -> None:
        """See how long the load takes, and keep what the model says with its defaults."""
        busy = psutil.cpu_percent(interval=_LOOK_S)
        if busy > _BUSY_PERCENT:
            self.report.notes.append(
                f"Other processes took {busy:.0f} % of the machine at the start: the more they do, the less "
                "can be told. Tune an idle machine, or with longer runs (--run-seconds)."
            )
        self._say("the defaults")
        reference = QualityJob(path=str(self._folder / "reference.npy"), write=True)
        probe = self._do({}, beside=False, quality=reference, scale=_PROBE_SCALE)
        if probe.failure:
            raise ModelError(f"{self.target.local.path}: cannot be measured: {probe.failure}")
        scale = _PROBE_SCALE * self.wishes.run_s / max(probe.runs["alone"].seconds, 1e-3)
        self._scale = min(max(scale, _SCALES[0]), _SCALES[1])
        self.report.scale = self._scale
        full = self._do({}, beside=True, scale=self._scale)
        if full.failure:
            raise ModelError(f"{self.target.local.path}: cannot be measured: {full.failure}")
        company_s = full.runs["beside"].seconds
        self._took_s[False] = max(full.seconds - company_s, full.runs["alone"].seconds)
        self._took_s[True] = full.seconds

    def _find_settings(self) -> None:
        # Enough is kept back to check the result against the defaults.
        reserve_s = min(0.5 * self.wishes.budget_s, 2 * _FINAL_PAIRS * self._took_s[True])
        end_s = self._deadline_s
        self._deadline_s -= reserve_s
        try:
            self._search.run()
        except BudgetSpentError:
            self.report.notes.append("The time was up before everything was tried: see --budget.")
        finally:
            self.best = {
                name: label for name, label in self._search.best.items() if name != WEIGHTS
            }
        self._deadline_s = max(end_s, self._clock() + reserve_s * 1.5)

    def _check(self) -> None:
        """Compare what was found with the defaults, alone and in company, and what it says."""
        if not self.best:
            return
        found = Comparison("all of these", "tuned", dict(self.best))
        try:
            self._compare({}, found, beside=True)
        except BudgetSpentError:
            found.close("no time left")
            self.report.final = row_of(found)
            raise
        self.report.final = row_of(found)
        if not found.accepted:
            self.report.notes.append(
                "Together they are no clear gain over the defaults, so the defaults stay."
            )
            self.best = {}

    def _compare(self, baseline: Assignment, comparison: Comparison, *, beside: bool) -> None:
        compare(
            self._measure,
            baseline,
            comparison,
            self._search.noise,
            self.wishes.rules,
            beside=beside,
            quality=True,
            tell=self._progress,
        )

    def _try_weights(self) -> None:
        """Turn the weights into other types and compare those with the model's own."""
        fastest = 0.0
        for name in self.wishes.requantize:
            comparison = Comparison(WEIGHTS, name, {**self.best, WEIGHTS: name}, keep_on=True)
            self._search.comparisons.append(comparison)
            failure = self._write_weights(name)
            if failure:
                comparison.close(failure)
                continue
            # Not of the budget: the user asked for each of these by name.
            self._deadline_s = self._clock() + 4 * self.wishes.rules.max_pairs * self._took_s[False]
            try:
                self._compare(self.best, comparison, beside=False)
            except BudgetSpentError:
                comparison.close("no time left")
            if comparison.accepted and (comparison.speed or 0.0) > fastest:
                fastest = comparison.speed or 0.0
                self.weights = name, self._files[name]

    def _write_weights(self, name: str) -> str:
        """Write the file; returns why not, if not."""
        local = self.target.local
        self._say(f"writing the weights as {name}")
        digest = self.target.model_fingerprint.digest[:12]
        path = data_folder() / "weights" / f"{local.model_id}.{name}-{digest}{local.path.suffix}"
        if path.exists():  # kept by an earlier tuning, with the user's consent
            self._take(name, path)
            return ""
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # At most f32's 4 bytes a weight where q4 has half a byte; types offered are 2 at most.
            needed = 4 * local.size_bytes + _FREE_DISK_BYTES
            if shutil.disk_usage(path.parent).free < needed:
                return f"may need {needed / 1e9:.1f} GB of free disk in {path.parent}"
            job = msgspec.structs.replace(
                self.target.job({}),
                kind="requantize",
                type_name=name,
                target=str(partial),
                limit_s=600.0 + local.size_bytes * _LIMIT_S_PER_BYTE,
            )
            answer = self._run_job(job)
            if answer.failure:
                return answer.failure
            partial.replace(path)
        except OSError as error:
            return f"{path}: {error.strerror or error}"
        finally:
            partial.unlink(missing_ok=True)
        self._made.append(path)
        self._take(name, path)
        return ""

    def _take(self, name: str, path: Path) -> None:
        self._files[name] = as_other_weights(self.target.local, path)
        size = self._files[name].size_bytes
        self.report.weights = {**self.report.weights, name: size}

    def _conclude(self) -> None:
        self.report.rows = [row_of(comparison) for comparison in self._search.comparisons]
        self.report.settings = dict(self.best)
        self.report.defaults = self._figures.get((), {})
        if self.best:
            self.report.tuned = self._figures.get(tuple(sorted(self.best.items())), {})
        for name in self._files:
            key = tuple(sorted({**self.best, WEIGHTS: name}.items()))
            if key in self._figures:
                self.report.others = {**self.report.others, f"weights {name}": self._figures[key]}
        self.report.noise = self._search.noise.of_ratio
        self.report.seconds = self._clock() - self._started_s

    # ------------------------------------------------------------------ measuring

    def _measure(self, assignment: Assignment, *, beside: bool, quality: bool) -> Measured:
        """What the search calls."""
        if self._clock() + self._took_s[beside] > self._deadline_s:
            raise BudgetSpentError
        look = QualityJob(path=str(self._folder / "reference.npy")) if quality else None
        answer = self._do(assignment, beside=beside, quality=look, scale=self._scale)
        if answer.failure:
            return Measured(failure=answer.failure)
        company = answer.runs.get("beside")
        return Measured(
            alone=answer.runs["alone"].score,
            beside=company.score if company is not None else None,
            quality=answer.quality,
        )

    def _do(
        self,
        assignment: Assignment,
        *,
        beside: bool,
        scale: float,
        quality: QualityJob | None = None,
    ) -> Answer:
        expected_s = self._took_s[beside]
        limit_s = 4 * expected_s + 10
        if not expected_s:
            limit_s = _FIRST_LIMIT_S + self.target.local.size_bytes * _LIMIT_S_PER_BYTE
        job = msgspec.structs.replace(
            self.target.job(assignment, self._files),
            load=self.wishes.load,
            scale=scale,
            runs=("alone", "beside") if beside else ("alone",),
            limit_s=limit_s,
            memory_bytes=int(_MEMORY_SHARE * available_memory()),
            quality=quality,
        )
        answer = self._run_job(job)
        if scale == self._scale and not answer.failure:
            key = tuple(sorted(assignment.items()))
            self._figures[key] = {**self._figures.get(key, {}), **answer.runs}
        self._say(self._doing)
        return answer

    # ------------------------------------------------------------------ telling

    def _say(self, doing: str) -> None:
        self._doing = doing
        spent = (self._clock() - self._started_s) / self.wishes.budget_s
        self._tell(doing, min(spent, 1.0))

    def _progress(self, comparison: Comparison) -> None:
        speed = comparison.speed
        self._say(
            f"{comparison.name} {comparison.label}: pair {len(comparison.ratios)}"
            + (f", {speed:.2f}x" if speed is not None else "")
        )

"""The inputs of a pack: its rows, its base on the device, the scorer of its task, and its sample prompts."""

from collections.abc import Callable, Mapping

from transformers import PreTrainedModel

from loragrid.config.experiment import DataConfig, ModelConfig, SamplesConfig
from loragrid.data.dataset import TokenizedData
from loragrid.evaluation.sample_answers import SampleAnswers, sample_prompts
from loragrid.evaluation.task_scorer import TaskScorer, task_scorer
from loragrid.training.meters import Stopwatch
from loragrid.trials.packing import Pack
from loragrid.trials.trial import Trial
from loragrid.worker.reporter import Reporter
from loragrid.worker.resident_base import ResidentBase


class PackInputs:
    """Provides rows, base, task scorer and sample prompts of a pack, and keeps what later packs use again.

    `rows_of`: returns the rows of a model and data configuration. `describe`: returns the tags of a trial's worker,
    base and rows, for worker 0's reports, and is told whether the base has just been loaded; None: no tags.
    `samples`: which sample prompts are answered; None: none.
    """

    def __init__(
        self,
        rows_of: Callable[[ModelConfig, DataConfig], TokenizedData],
        resident: ResidentBase,
        reporter: Reporter,
        stopwatch: Stopwatch,
        describe: Callable[[Trial, TokenizedData, bool], Mapping[str, str]] | None,
        samples: SamplesConfig | None = None,
    ) -> None:
        self._rows_of, self._resident, self._describe = rows_of, resident, describe
        self._reporter, self._stopwatch = reporter, stopwatch
        self._scorers: dict[object, TaskScorer] = {}
        self._wanted_samples = samples
        self._samples: dict[object, SampleAnswers] = {}

    @property
    def are_described(self) -> bool:
        """Whether reports carry tags about the trials' worker, base and rows."""
        return self._describe is not None

    def rows(self, pack: Pack) -> TokenizedData:
        """The pack's rows."""
        return self._rows_of(pack.trials[0].model, pack.trials[0].data)

    def load_base(self, pack: Pack) -> PreTrainedModel:
        """The pack's base on the device, loaded if it is not there yet.

        Raises:
            ValueError: it cannot be loaded, or trained.
        """
        first, rows = pack.trials[0], self.rows(pack)
        if self._resident.has(first):
            base = self._resident.load(first, rows)
            self._describe_inputs(first, rows, just_loaded=False)
            return base
        try:
            with self._stopwatch.phase("setup"):
                self._reporter.phase(pack, "loading the base")
                base = self._resident.load(first, rows)
                if self._describe is not None:
                    self._reporter.phase(pack, "identifying the base's weights")
                    self._describe_inputs(first, rows, just_loaded=True)
                return base
        finally:
            self._reporter.count_seconds(pack)

    def scorer(self, pack: Pack) -> TaskScorer | None:
        """The scorer of the pack's task, None without a task. Making one reads and checks every row, so it is kept."""
        first = pack.trials[0]
        if first.task is None:
            return None
        key = (first.task, first.model, first.data)
        if key not in self._scorers:
            self._scorers[key] = task_scorer(first.task, first.model, self.rows(pack))
        return self._scorers[key]

    def samples(self, pack: Pack) -> SampleAnswers | None:
        """Asks the pack's base and members the sample prompts; None if none are wanted. Keeps the base's answers."""
        first, wanted = pack.trials[0], self._wanted_samples
        if wanted is None or wanted.num_prompts == 0:
            return None
        key = (first.task, first.model, first.data)
        if key not in self._samples:
            prompts = sample_prompts(wanted, first.model, self.rows(pack), first.task)
            self._samples[key] = SampleAnswers(prompts)
        return self._samples[key]

    def _describe_inputs(self, trial: Trial, rows: TokenizedData, *, just_loaded: bool) -> None:
        if self._describe is not None:
            self._reporter.environment = self._describe(trial, rows, just_loaded)

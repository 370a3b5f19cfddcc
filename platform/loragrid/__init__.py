"""LoraGrid: which fine-tuning method, at which rank and learning rate, for your model and your data?

    import loragrid as lg

    experiment = lg.load_experiment("experiments/quickstart.yaml")
    result = lg.run(experiment)
    result.to_pandas()

The public interface is `loragrid.__all__`. Every other name, including sub-packages and modules, is private and may
change in any release. The public interface of the package `loragrid_methods` is `loragrid_methods.__all__`.

Describe and run:
    Experiment, load_experiment, experiment_from_mapping   an experiment from Python, from a file, from a mapping
    ExperimentError                                        an experiment that cannot run as it is written
    method_names                                           the methods that an experiment can name
    plan, Plan                                             what would run on which rows, without running it
    run, SweepResult, SweepInterrupted                     run a sweep; its result; the exception after a signal
    RayStartError                                          Ray cannot be started, or its cluster cannot be reached

Your own Tune sweep:
    trainable, recording                                   a Tune trainable, and the callback that records its trials

Read what is recorded:
    load_comparison, Comparison                            a sweep's table and curves, from MLflow
    load_verdict, judge, Verdict, load_scores              which differences a sweep shows; the scores behind them
    write_report                                           the report, as one file
    export                                                 a trial's adapter, or the model merged with it
    sync                                                   deliver to MLflow what a sweep could not deliver

Each name is imported on first use; `import loragrid` itself takes milliseconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loragrid.comparison.item_scores import load_scores
    from loragrid.comparison.table import Comparison, load_comparison
    from loragrid.comparison.verdict import Verdict, judge, load_verdict
    from loragrid.config.experiment import Experiment, ExperimentError
    from loragrid.planning.dry_run import dry_run as plan
    from loragrid.planning.plan import Plan
    from loragrid.report.files import write_report
    from loragrid.sweep.ray_start import RayStartError
    from loragrid.sweep.run import SweepResult, run
    from loragrid.sweep.signals import SweepInterrupted
    from loragrid.sweep.trainable import recording, trainable
    from loragrid.tracking.artifacts import export_run as export
    from loragrid.tracking.sync import sync_storage as sync
    from loragrid.trials.load import experiment_from_mapping, load_experiment
    from loragrid_methods import method_names

# Public name -> module and name in it. A public name must not equal a sub-package's name: importing the sub-package
# would overwrite it.
_ORIGINS = {
    "Comparison": "loragrid.comparison.table:Comparison",
    "Experiment": "loragrid.config.experiment:Experiment",
    "ExperimentError": "loragrid.config.experiment:ExperimentError",
    "Plan": "loragrid.planning.plan:Plan",
    "RayStartError": "loragrid.sweep.ray_start:RayStartError",
    "SweepInterrupted": "loragrid.sweep.signals:SweepInterrupted",
    "SweepResult": "loragrid.sweep.run:SweepResult",
    "Verdict": "loragrid.comparison.verdict:Verdict",
    "experiment_from_mapping": "loragrid.trials.load:experiment_from_mapping",
    "export": "loragrid.tracking.artifacts:export_run",
    "judge": "loragrid.comparison.verdict:judge",
    "load_comparison": "loragrid.comparison.table:load_comparison",
    "load_experiment": "loragrid.trials.load:load_experiment",
    "load_scores": "loragrid.comparison.item_scores:load_scores",
    "load_verdict": "loragrid.comparison.verdict:load_verdict",
    "method_names": "loragrid_methods:method_names",
    "plan": "loragrid.planning.dry_run:dry_run",
    "recording": "loragrid.sweep.trainable:recording",
    "run": "loragrid.sweep.run:run",
    "sync": "loragrid.tracking.sync:sync_storage",
    "trainable": "loragrid.sweep.trainable:trainable",
    "write_report": "loragrid.report.files:write_report",
}

__all__ = [
    "Comparison",
    "Experiment",
    "ExperimentError",
    "Plan",
    "RayStartError",
    "SweepInterrupted",
    "SweepResult",
    "Verdict",
    "experiment_from_mapping",
    "export",
    "judge",
    "load_comparison",
    "load_experiment",
    "load_scores",
    "load_verdict",
    "method_names",
    "plan",
    "recording",
    "run",
    "sync",
    "trainable",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _ORIGINS:
        raise AttributeError(f"module 'loragrid' has no attribute {name!r}")
    module, _, attribute = _ORIGINS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

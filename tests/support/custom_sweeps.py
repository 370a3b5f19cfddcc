"""The two custom sweeps of docs/how_to/python.md; a test runs them."""

from ray import tune

import loragrid as lg


def search_with_optuna(experiment: lg.Experiment) -> tune.ResultGrid:
    """Optuna searches LoRA+'s learning rate and ratio (docs/how_to/python.md shows this function)."""
    from ray.tune.search.optuna import OptunaSearch

    tuner = tune.Tuner(
        lg.trainable(experiment),
        param_space={"training.lr": tune.loguniform(1e-4, 1e-1), "method.lr_ratio": tune.uniform(1, 16)},
        tune_config=tune.TuneConfig(search_alg=OptunaSearch(), metric="eval_loss", mode="min", num_samples=2),
        run_config=tune.RunConfig(callbacks=[lg.recording(experiment)]),
    )
    return tuner.fit()


def stop_early_with_asha(experiment: lg.Experiment) -> tune.ResultGrid:
    """ASHA ends trials that fall behind (docs/how_to/python.md shows this function)."""
    from ray.tune.schedulers import ASHAScheduler

    scheduler = ASHAScheduler(time_attr="step", grace_period=2, max_t=experiment.training.num_steps)
    tuner = tune.Tuner(
        lg.trainable(experiment),
        param_space={"method.name": "lora", "training.lr": tune.grid_search([1e-2, 1e-6])},
        tune_config=tune.TuneConfig(scheduler=scheduler, metric="eval_loss", mode="min", max_concurrent_trials=1),
        run_config=tune.RunConfig(callbacks=[lg.recording(experiment)]),
    )
    return tuner.fit()

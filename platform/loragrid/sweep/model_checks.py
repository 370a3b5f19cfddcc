"""Checks the models of a plan before anything is started."""

from collections.abc import Callable

from loragrid.models.base_checks import check_base, check_before_training
from loragrid.models.loading import load_base, load_tokenizer, unused_weights
from loragrid.models.unused_weights import sentence_about
from loragrid.planning.plan import Plan


def check_models(plan: Plan, tell: Callable[[str], None] = lambda sentence: None) -> None:
    """Check each model as far as one process can that must not hold all its weights.

    tell: receives a sentence for each model whose checkpoint holds weights that it does not use.

    Raises:
        ValueError: a model cannot be trained; nothing was started.
    """
    for model in dict.fromkeys(trial.model for trial in plan.trials):
        check_before_training(model)
        if unused := unused_weights(model):
            tell(sentence_about(model.name, unused))


def check_loaded_models(plan: Plan, tell: Callable[[str], None] = lambda sentence: None) -> None:
    """Load each base of the plan, one after another, and check it as a worker does; tell: receives a sentence for each.

    Raises:
        ValueError: a model cannot be loaded, or would train wrongly.
    """
    for model in dict.fromkeys(trial.model for trial in plan.trials):
        base = load_base(model)
        num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in base.parameters())
        tell(f"model {model.name}: loaded as {model.dtype}, {num_bytes / 2**30:.2f} GiB of memory; checking it")
        if unused := unused_weights(model, is_fetched=True):
            tell(sentence_about(model.name, unused))
        lengths = [rows.length for (own, _), rows in plan.rows.items() if own == model]
        check_base(base, load_tokenizer(model), length=max(lengths, default=None))
        del base  # before the next one is loaded
        tell(f"model {model.name}: trains as a causal language model")

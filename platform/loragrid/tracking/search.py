"""Searches an MLflow store page by page."""

from collections.abc import Callable, Iterator
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Experiment, Run, ViewType

PAGE_SIZE = 1000
"""Runs or experiments per page."""

LATEST_FIRST = "attributes.start_time DESC"
EARLIEST_FIRST = "attributes.start_time ASC"


def search_runs(
    client: MlflowClient,
    experiment_id: str,
    condition: str,
    order: str = LATEST_FIRST,
    *,
    include_deleted: bool = False,
) -> Iterator[Run]:
    """Yield all runs of an experiment that meet a condition in MLflow's search language."""
    view = ViewType.ALL if include_deleted else ViewType.ACTIVE_ONLY
    yield from _all_pages(
        lambda token: client.search_runs([experiment_id], condition, view, PAGE_SIZE, [order], page_token=token)
    )


def search_experiments(client: MlflowClient) -> Iterator[Experiment]:
    """Yield all experiments of the store that are not deleted."""
    yield from _all_pages(lambda token: client.search_experiments(max_results=PAGE_SIZE, page_token=token))


def _all_pages(search: Callable[[str | None], Any]) -> Iterator[Any]:
    token: str | None = None
    while True:
        page = search(token)
        yield from page
        token = page.token
        if not token:
            return

"""Zero- and few-shot tasks, through lm-evaluation-harness (the extra ``eval``).

    from moekit.tasks import compare, evaluate_tasks

    before = evaluate_tasks(model, ["fair_piqa"])
    with model.route(mask={5: [8]}):
        after = evaluate_tasks(model, ["fair_piqa"])
    compare(before, after)

Importing this package makes the model ``moekit`` known to the harness.
"""

try:
    import lm_eval  # noqa: F401
except ImportError:
    raise ImportError(
        "moekit.tasks needs lm-evaluation-harness, and there is none: pip install 'moekit[eval]'"
    ) from None

from moekit.tasks.evaluation import TaskResults, compare, evaluate_tasks
from moekit.tasks.harness import HarnessModel, Scored
from moekit.tasks.loading import FILES, known_tasks

__all__ = ["FILES", "HarnessModel", "Scored", "TaskResults", "compare", "evaluate_tasks", "known_tasks"]

"""What MLflow's page shows of an experiment at first: a note, columns, and a chart of scores.

MLflow keeps a named view of the table of runs in a tag of the experiment. Ours stands under
"Views" on that page, and `page_path` leads to it.
"""

import json

VIEW = "sia"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
KIND_TAG = "mlflow.experimentKind"
NOTE_TAG = "mlflow.note.content"
KIND = "custom_model_development"  # opens on the runs; another kind would open on the traces
COLUMNS = (
    "params.`meta`", "params.`target`", "tags.`sia.arm`", "params.`seed`", "metrics.`best/dev`",
    "metrics.`score/test`", "metrics.`cost_usd`", "metrics.`wall_s`", "tags.`sia.lever`",
    "tags.`sia.outcome`", "attributes.`Models`",
)  # fmt: skip
SECTIONS = {  # of the page: metrics drawn over generations
    "Scores": ("best/dev", "score/dev"),
    "Cost and time": ("cost_usd", "wall_s"),
}
LAST = ("Scores", "score/test")  # drawn as bars: it has no generations


def tags(task: str, created_ms: int) -> dict[str, str]:
    """Tags of the experiment of a task.

    Args:
        task: Its name.
        created_ms: When MLflow made the experiment; the view is as old.
    """
    return {
        KIND_TAG: KIND,
        NOTE_TAG: _note(task),
        VIEW_TAG: json.dumps(
            {"name": "Scores by generation", "createdAt": created_ms, "state": json.dumps(_view())}
        ),
    }


def page_path(experiment_id: str) -> str:
    """Where MLflow's page shows the runs of an experiment with our columns and charts."""
    return (
        f"/#/experiments/{experiment_id}/runs"
        f"?viewStateShareKey={VIEW}&compareRunsMode=CHART&workflowType=machine_learning"
    )


def _note(task: str) -> str:
    return (
        f"Self-improving agents on `{task}`. Each top run is one run of SIA; below it lies one run "
        "for each generation, which shows the best candidate of that generation.\n\n"
        "- `best/dev` is the incumbent's dev score, `score/dev` that of the generation, "
        "`score/test` the sealed test of the best by dev, once opened. The step is the "
        "generation.\n"
        "- Artifacts of a generation: `harness.html` (what changed, side by side), "
        "`improvement.md` (why), `dev/` (tables of what the verifier found), `policy/` (a trained "
        "adapter, also a version under Models).\n"
        "- Traces are the model calls, one trace for each session of an agent and each attempt of "
        "a target.\n\n"
        'Columns and charts: choose "Scores by generation" under Views.'
    )


def _view() -> dict[str, object]:
    charts = [
        _chart("LINE", metric, section)
        for section, metrics in SECTIONS.items()
        for metric in metrics
    ]
    charts.append(_chart("BAR", LAST[1], LAST[0]))
    return {
        "searchFilter": "",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(COLUMNS),
        "runsHiddenMode": "FIRST_20_RUNS",
        "compareRunCharts": charts,
        "compareRunSections": [_section(name) for name in SECTIONS],
        "isAccordionReordered": True,  # else MLflow sorts the sections by their names
        "hideEmptyCharts": True,
        "globalLineChartConfig": {
            "xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": "",
        },
    }  # fmt: skip


def _section(name: str) -> dict[str, object]:
    return {
        "uuid": name, "name": name, "display": True, "isReordered": True, "deleted": False,
        "isGenerated": False, "columns": 2, "cardHeight": 360,
    }  # fmt: skip


def _chart(kind: str, metric: str, section: str) -> dict[str, object]:
    common: dict[str, object] = {
        "uuid": f"{kind}-{metric}", "type": kind, "runsCountToCompare": 20,
        "metricSectionId": section, "deleted": False, "isGenerated": False, "metricKey": metric,
    }  # fmt: skip
    if kind == "BAR":
        return common
    return {
        **common, "selectedMetricKeys": [metric], "lineSmoothness": 0, "xAxisScaleType": "linear",
        "scaleType": "linear", "range": {}, "xAxisKey": "step", "selectedXAxisMetricKey": "",
        "yAxisKey": "metric", "yAxisExpressions": [], "ignoreOutliers": False,
        "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True,
    }  # fmt: skip

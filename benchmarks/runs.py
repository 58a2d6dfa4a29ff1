"""Several runs of the same rows: how much faster than the naive scan, at best and at worst."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.ratios import geometric_mean
from benchmarks.tables import Table, ratio
from benchmarks.view import NAIVE, OURS, View, means


def all_tables(documents: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """The median ratio of each row in the run where it is largest, and where it is smallest.

    Args:
      documents: the results of the runs; a row may be in some of them only.

    Yields:
      A table for each measure.
    """
    views = [View(document) for document in documents]
    workloads = {w.name: w for view in views for w in view.workloads}
    for measure in dict.fromkeys(measure for view in views for measure in view.measures):
        found = {}
        for name, workload in workloads.items():
            ratios = [view.ratio(workload, measure, NAIVE, OURS) for view in views]
            medians = [spread.median for spread in ratios if spread]
            if medians:
                found[name] = max(medians), min(medians), len(medians)
        if not found:
            continue
        measured = [workloads[name] for name in found]
        rows = [
            [f"{w.name} {w.shape}", ratio(best), ratio(worst), str(count)]
            for w, (best, worst, count) in zip(measured, found.values(), strict=True)
        ]
        pairs = [(best, worst) for best, worst, _ in found.values()]
        for mean, which in means(measured).items():
            of_them = zip(*(pairs[n] for n in which), strict=True)
            rows.append([mean, *(ratio(geometric_mean(column)) for column in of_them), ""])
        title = f"{measure}, best of {len(views)} runs: naive / jaxrnn"
        yield Table(title, ["workload (T, B, D, H)", "best", "worst", "runs"], rows)

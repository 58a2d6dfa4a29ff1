"""The command line: `python -m benchmarks [run]`, `first`, `report`, `tune`."""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import dry, kernels, report, results
from benchmarks.crew import Crew, Worker
from benchmarks.plan import FIRST, FULL, GPU, QUICK, Limits
from benchmarks.results import InputError
from benchmarks.run import Run, describe_workers
from benchmarks.subjects.registry import SUBJECTS
from benchmarks.tune import SHAPES, tune

EXIT_FAILED_ROWS, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143
COMMANDS = ("run", "first", "report", "tune")


class TerminatedError(KeyboardInterrupt):
    """SIGTERM came: schedulers send it when a job's time is up."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, not the whole usage."""
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 1, got {text}")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    """The options of all commands."""
    about = f"How fast jaxrnn is. {' | '.join(COMMANDS)}; `run` if none is named."
    parser = _Parser(prog="python -m benchmarks", description=about)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def option(commands, flag, what, **how):
        for command in commands:
            command.add_argument(flag, help=what, **how)

    run = commands.add_parser("run", help="measure, save and report", description=about)
    run.set_defaults(go=_run)
    about = "the first minutes on a GPU of the Hopper generation: are the kernels exact and fast"
    first = commands.add_parser("first", help=about)
    first.set_defaults(go=lambda args: _measure(args, FIRST, "-first"), device="gpu")
    about = "the tables of a run; of several, the best and the worst of each row"
    report = commands.add_parser("report", help=about)
    report.set_defaults(go=_report)
    tune = commands.add_parser("tune", help="measure what the library's choices rest on")
    tune.set_defaults(go=_tune)

    true, both = {"action": "store_true"}, (run, first)
    option([run], "--quick", "the most telling part, in two minutes", **true)
    option([run], "--device", "(default: cpu)", choices=("cpu", "gpu"), default="cpu")
    for name in ("workload", "subject", "measure"):
        option([run], f"--{name}", f"only that {name}; repeatable", action="append", metavar="NAME")
    rounds = "at most so many (default: 15; tune 9)"
    option([run, tune], "--rounds", rounds, type=_count, metavar="N")
    budget = "for the rounds of one measure of a row, five rounds at least (default: 25, or 2)"
    option([run], "--budget", budget, type=float, metavar="SECONDS")
    minutes = "the run is over by then (default: none; on a GPU 8, of `first` 5.7)"
    option(both, "--minutes", minutes, type=float, metavar="N")
    option(both, "--dry", "rehearse a run on a GPU: tiny, on the CPU, kernels interpreted", **true)
    out = "a file that ends in .json, or a directory (default: in benchmarks/results/)"
    option(both, "--out", out, metavar="PATH")
    option([report], "files", "what a run has saved", metavar="FILE", nargs="+")
    option([report], "--plot", "draw the first one's ratios", metavar="PNG")
    option([tune], "choice", "of the schedule's table (default: all)", nargs="*")
    return parser


def _run(args: argparse.Namespace) -> int:
    on_gpu = args.device == "gpu"
    if args.dry and not on_gpu:
        raise InputError("--dry rehearses a run on a GPU: it needs --device gpu")
    plan = GPU if on_gpu else QUICK if args.quick else FULL
    known = {
        "workload": [step.workload.name for step in plan.steps],
        "measure": [name for step in plan.steps for name in step.measures],
        "subject": [name for step in plan.steps for name in step.subjects],
    }
    for option, names in known.items():
        for name in getattr(args, option) or ():
            if name not in names:
                there = ", ".join(map(repr, dict.fromkeys(names)))
                raise InputError(f"--{option}: no {name!r}; there are {there}")
    chosen = [getattr(args, option) for option in known]
    plan = plan.only(*chosen)
    if not plan.steps:
        raise InputError("expected options that some row fits, got none that fits all")

    def limit(limits: Limits) -> Limits:
        if args.rounds is not None:
            limits = replace(limits, most=args.rounds, least=min(limits.least, args.rounds))
        return limits if args.budget is None else replace(limits, budget=args.budget)

    label = "-quick" if args.quick else "-part" if any(chosen) else ""
    return _measure(args, plan.limited(limit), label)


def _measure(args: argparse.Namespace, plan: Any, label: str) -> int:
    start, path, ended = time.monotonic(), None, 0
    plan = plan if args.minutes is None else replace(plan, minutes=args.minutes)
    plan = dry.rehearsal(plan) if args.dry else plan
    options = {k: v for k, v in vars(args).items() if k not in ("go", "command", "out")}
    document = results.new(options)
    names = {name for step in plan.steps for name in step.subjects}
    subjects = {s.name: s for s in SUBJECTS[args.device] if s.name in names}
    document["subjects"] = [
        {"name": s.name, "package": s.package, "kind": s.kind} for s in subjects.values()
    ]
    kinds = list(dict.fromkeys(subject.kind for subject in subjects.values()))
    crew = Crew(args.device, dry.make_worker if args.dry else Worker, start + 60 * plan.minutes)

    def say(line: str) -> None:
        seconds = time.monotonic() - start
        print(f"[{seconds:4.0f} s] {line}", file=sys.stderr, flush=True)

    try:
        signal.signal(signal.SIGTERM, _terminate)
        with crew:
            describe_workers(crew, kinds, args.device, document)
            default = tempfile.mkdtemp() if args.dry else results.directory(document["device"])
            out = Path(args.out or default)
            name = f"{document['date']}{label}.json"
            path = results.new_path(out if out.suffix == ".json" else out / name)
            say(f"{results.caption(document)}; results go to {path}")
            run = Run(crew, plan, subjects, document, say, lambda: results.write(document, path))
            run.go()
    except OSError as error:
        raise InputError(f"cannot write the results: {error}") from error
    except KeyboardInterrupt as error:
        ended = EXIT_TERMINATED if isinstance(error, TerminatedError) else EXIT_INTERRUPTED
    rows, seconds = document["rows"], time.monotonic() - start
    if rows:
        _show([document])
    if ended:
        where = f"; what was measured is in {path}" if rows else ""
        print(f"stopped after {seconds:.0f} s{where}", file=sys.stderr)
        return ended
    timed = sum(bool(row["seconds"]) for row in rows)
    print(f"\n{timed} rows in {seconds:.0f} s; again: python -m benchmarks report {path}")
    return EXIT_FAILED_ROWS if any(row["status"] == "failed" for row in rows) else 0


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what was measured is being kept
    raise TerminatedError


def _show(documents: list[dict[str, Any]]) -> None:
    on_gpu = documents[0]["device"]["gpu"]
    print("\n\n".join(kernels.tables(documents[0]) if on_gpu else report.tables(documents)))


def _report(args: argparse.Namespace) -> int:
    try:
        documents = [results.read(Path(file)) for file in args.files]
        _show(documents)
        if args.plot:
            from benchmarks.picture import plot

            plot(documents[0], Path(args.plot))
    except (OSError, ImportError) as error:
        raise InputError(str(error)) from error
    return 0


def _tune(args: argparse.Namespace) -> int:
    for choice in args.choice:
        if choice not in SHAPES:
            raise InputError(f"no choice {choice!r}; there are {', '.join(map(repr, SHAPES))}")
    return tune(args.choice or list(SHAPES), args.rounds or 9)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
      0; 1 where a row failed; 2 for bad input, with one line on standard error; 130 after
      Ctrl-C, 143 after SIGTERM, both of which keep what was measured.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in (*COMMANDS, "-h", "--help"):
        arguments = ["run", *arguments]
    args = make_parser().parse_args(arguments)
    try:
        return args.go(args)
    except InputError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())

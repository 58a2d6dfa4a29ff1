"""One training run, from its beginning or a checkpoint to its end or a signal."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxrnn import train
from jaxrnn._training import directory, processes
from jaxrnn._training.checkpoints import Checkpoints, SaveError
from jaxrnn._training.config import Config, initial_state, make_optimizer
from jaxrnn._training.corpus import Corpus
from jaxrnn._training.devices import Placement
from jaxrnn._training.encode import Text
from jaxrnn._training.memory import evaluation_window
from jaxrnn._training.saved import check_identity, identity, load_state
from jaxrnn._training.signals import stop_requests
from jaxrnn.text import streams

REPORT_EVERY = 25


class FailedError(Exception):
    """A run that could not go on; one line says why."""


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Args:
      step: how many updates it has made, in all.
      bits: per held-out character when they were last measured; NaN if they never were.
      seconds: of training, in all.
      signal: the one that ended it, 0 if none did.
    """

    step: int
    bits: float
    seconds: float
    signal: int


class Run:
    """A run that is about to begin or to go on.

    Args:
      out: its directory.
      config: its options.
      text: what there is to know of its text.
      corpus: the text.
      placement: its devices.

    Raises:
      InputError: a checkpoint or the metrics are damaged, of another run, or cannot be written.
    """

    def __init__(self, out: Path, config: Config, text: Text, corpus: Corpus, placement: Placement):
        self.out, self.config, self.text, self.corpus = out, config, text, corpus
        self.placement = placement
        self._checkpoints = Checkpoints(out, write=True)
        self.step = max(self._checkpoints.steps(), default=0)
        if self.step:
            check_identity(self._checkpoints, self.step, config, text)
        rows = [row for row in directory.read_metrics(out) if row["step"] <= self.step]
        self._skipped = rows[-1].get("skipped", 0) if rows else 0
        self._seconds = rows[-1]["seconds"] if rows else 0.0
        bits = [row["held_out_bits"] for row in rows if "held_out_bits" in row]
        self._bits = bits[-1] if bits and bits[-1] is not None else math.nan
        self._least = min((each for each in bits if each is not None), default=math.inf)

    def result(self, signal: int = 0) -> Result:
        """Where it stands."""
        return Result(self.step, self._bits, self._seconds, signal)

    def go(self, report: Callable[[dict[str, Any]], None]) -> Result:
        """Train to the end, or until a signal, leaving checkpoints and metrics.

        Args:
          report: called with each row of metrics.

        Raises:
          InputError: the checkpoint to go on from is damaged, or of another run; a directory that
            cannot be written.
          FailedError: a number that is not finite, or a file that cannot be written.
          LostError: another process is gone.
        """
        try:
            return self._go(report)
        except train.DivergedError as error:
            raise FailedError(
                f"{error}; begin again with a smaller --learning-rate or --grad-clip, or go on "
                "with --skip-nonfinite"
            ) from error
        except (SaveError, jax.errors.JaxRuntimeError) as error:
            of_the_disk = isinstance(error, SaveError) and error.is_of_the_disk
            if processes.are_several() and not of_the_disk:
                # What is gone breaks whatever the others do with it next.
                raise processes.LostError(error) from error
            raise FailedError(str(error).strip().splitlines()[0]) from error
        except OSError as error:
            name = error.filename or self.out
            raise FailedError(f"{name}: cannot be written: {error.strerror}") from error

    def _go(self, report):
        config, put = self.config, self.placement.split
        directory.check_writable(self.out, self._checkpoints.folder)
        if self.step:
            state = load_state(self._checkpoints, self.step, config, self.text, self.placement)
        else:
            state = self.placement.put_state(initial_state(config, len(self.text.characters)))
        if processes.is_first():
            directory.trim_metrics(self.out, self.step)
        optimizer, mesh = make_optimizer(config), self.placement.mesh
        update = train.make_checked_update(optimizer, mesh=mesh)
        inputs, targets = streams(self.corpus.train, config.batch_size)
        windows = train.windows(inputs, targets, config.seq_length, self.step)
        placed = ((put(x, 1), put(y, 1), first) for x, y, first in windows)
        held_out = self.corpus.held_out_streams(config.batch_size)
        at_once = evaluation_window(config, self.corpus, self.placement)
        begun = time.perf_counter() - self._seconds
        signal = 0
        with stop_requests() as asked:

            def stop(step):
                nonlocal signal
                # Several processes must stop at one step, and so ask each other now and then.
                if not processes.are_several() or step % REPORT_EVERY == 0:
                    signal = processes.largest(asked())
                return signal > 0

            def save(now, measured=None):
                about = identity(config, self.text)
                self._checkpoints.save(now.step, now.state, about, measured)

            processes.wait_for_all("training")
            for now in train.fit(
                state, update, placed, config.steps,
                every=(REPORT_EVERY, config.eval_every, config.checkpoint_every),
                skip_nonfinite=config.skip_nonfinite, stop=stop,
            ):  # fmt: skip
                self.step = now.step
                self.corpus.release()
                ended = now.step == config.steps
                row = self._row(now, begun)
                measured, best = None, False
                if ended or now.step % config.eval_every == 0:
                    nats = train.evaluate(now.state.params, *held_out, seq_length=at_once, put=put)
                    measured = self._measured(nats, now)
                    row["held_out_bits"] = measured
                    self._bits = math.nan if measured is None else measured
                    best = self._bits < self._least
                    self._least = self._bits if best else self._least
                if processes.is_first():
                    directory.append_metrics(self.out, row)
                due = ended or signal or best or now.step % config.checkpoint_every == 0
                if due:
                    save(now, measured)
                try:
                    report(row)
                except OSError as error:  # nobody reads it any more
                    if not (due or processes.are_several()):
                        save(now)
                    if not signal:
                        said = f"standard output: cannot be written: {error.strerror}"
                        raise FailedError(said) from error
        return self.result(0 if self.step == config.steps else signal)

    def _row(self, now, begun):
        self._seconds = round(time.perf_counter() - begun, 3)
        finite, pace, config = math.isfinite(now.loss), now.updates_per_second, self.config
        row = {
            "step": now.step,
            "loss": now.loss if finite else None,
            "bits": now.loss / math.log(2) if finite else None,
            "characters_per_second": round(pace * config.batch_size * config.seq_length)
            if math.isfinite(pace)
            else None,
            "seconds": self._seconds,
        }
        self._skipped += now.skipped
        if self._skipped:
            row["skipped"] = self._skipped
        return row

    def _measured(self, nats, now):
        if not math.isfinite(nats):
            if self.config.skip_nonfinite:
                return None
            raise train.DivergedError(
                f"the held-out loss became {nats} at step {now.step} (gradient norm "
                f"{now.gradient_norm:.4g}, parameter norm {now.parameter_norm:.4g})"
            )
        return nats / math.log(2)

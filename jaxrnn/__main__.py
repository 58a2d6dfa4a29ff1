"""`python -m jaxrnn` and the console script."""

import io
import os
import sys
from contextlib import suppress

EXTRAS = {"rich": "cli", "orbax": "cli", "shtab": "cli", "matplotlib": "plot"}


def main() -> int:
    """Run the command line, on any terminal or none, and name an extra that is missing.

    Returns:
      The exit code: that of the command, 1 if output cannot be written, 2 for a missing extra, 130
      after Ctrl-C.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "w"))
        # Escape characters that the terminal cannot encode, instead of raising.
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    code = 0
    try:
        from jaxrnn._app.cli import run

        code = run()
        sys.stdout.flush()
        return code
    except ImportError as error:
        name = (error.name or "").split(".")[0]
        if name not in EXTRAS:
            raise
        missing = isinstance(error, ModuleNotFoundError)
        problem = "is missing" if missing else f"cannot be imported: {str(error).splitlines()[0]}"
        needs = f"pip install 'jaxrnn[{EXTRAS[name]}]'"
        print(f"jaxrnn: error: {name} {problem}; {needs}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        # Otherwise Python reports the error again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has closed the pipe
            return code
        where = error.filename or "standard output"
        with suppress(OSError):  # the same terminal
            print(f"jaxrnn: error: {where}: cannot be written: {error.strerror}", file=sys.stderr)
        return code or 1


if __name__ == "__main__":
    sys.exit(main())

"""`python -m jaxrnn` and the console script."""

import sys


def main() -> int:
    """Run the command line, or say which extra it needs."""
    try:
        from jaxrnn._cli import main as run
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing != "rich":
            raise
        print(f"jaxrnn: error: {missing} is missing; pip install 'jaxrnn[cli]'", file=sys.stderr)
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())

"""`python -m jaxrnn` and the console script."""

import sys

from jaxrnn._app.cli import main

if __name__ == "__main__":
    sys.exit(main())

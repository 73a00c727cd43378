"""`python -m kdiffusion` is the command line of kdiffusion."""

import sys

from kdiffusion.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m weights_conversion`."""

import sys

from weights_conversion.cli import main

if __name__ == "__main__":
    sys.exit(main())

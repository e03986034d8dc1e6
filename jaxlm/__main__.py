"""`python -m jaxlm VERB` is the console command `jaxlm VERB`."""

import sys

from jaxlm.cli import main

if __name__ == "__main__":
    sys.exit(main())

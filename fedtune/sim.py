"""`python -m fedtune.sim`: simulate an experiment on this machine or a Ray cluster."""

import sys

from fedtune.cli.start import simulate

if __name__ == "__main__":
    sys.exit(simulate())

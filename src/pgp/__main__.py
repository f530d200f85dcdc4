"""Run the command `pgp` with `python -m pgp`."""

from pgp.cli.main import main

main()

"""`python -m pgp` is `pgp`."""

from pgp.cli import main

main()

"""`python -m pgp` is `pgp`."""

from pgp.cli.main import main

main()

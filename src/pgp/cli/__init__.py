"""The command line. `pgp.cli.main` reads top to bottom; `pgp.cli.show` is the only module that prints."""

"""A recipe of your own, which pgp knows by name if `PGP_IMPORT=my_recipes`."""

from dataclasses import replace

from shared_prompts import SharedPrompts

from pgp import RECIPES, Config


def demo_shared() -> Config:
    """Train prompts that all images share, on digits."""
    return replace(RECIPES["demo"](), name="demo-shared", method=SharedPrompts.Config(length=8))


RECIPES["demo-shared"] = demo_shared

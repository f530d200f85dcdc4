"""The published command line: `python main.py 10cifar100_l2p_pgp --model vit_base_patch16_224 --output_dir ./output`.

All it does is hand over to `pgp.cli.main`; `pgp train` takes the same flags and more.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from pgp.cli.main import published_main

if __name__ == "__main__":
    published_main()

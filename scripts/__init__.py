"""Programs, `python -m scripts.NAME`. A typo in their settings is answered here, before imports that take seconds."""

import sys

if sys.argv[:1] == ["-m"]:  # so Python calls a program while it looks for its module
    from utils.cli import answer_typos

    answer_typos()

"""``python -m bench.replay``."""

import typer

from bench.replay.main import main

if __name__ == "__main__":
    typer.run(main)

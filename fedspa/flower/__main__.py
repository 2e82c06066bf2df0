"""Prints the folder of the Flower app: `flwr run "$(python -m fedspa.flower)" ...`."""

from pathlib import Path

APP = Path(__file__).resolve().parent / "app"

if __name__ == "__main__":
    print(APP)

"""`python -m fedspa_kernels`: which backends are here, and which one each operator would take."""

import argparse

import torch

import fedspa_kernels  # noqa: F401  (registers the operators)
from fedspa_kernels import dispatch, native

NATIVE = {"cpu": "native CPU (C++)", "cuda": "native CUDA"}
MISSING = {"cpu": "native CPU", "cuda": "CUDA"}


def brief() -> str:
    """Return one line: what is built, and why the rest is not."""
    native.load()
    built = native.built()
    parts = ["reference (PyTorch)", *(NATIVE[device] for device in built)]
    missing = [MISSING[device] for device in MISSING if device not in built]
    reason = f"; no {' and no '.join(missing)}: {native.why_not()}" if missing else ""
    return f"backends built: {', '.join(parts)}{reason}"


def table() -> str:
    """Return operator × backend for each device of this machine; the one in brackets would run."""
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    rows = [f"{'operator':<22}" + "".join(f"{device:<34}" for device in devices)]
    for operator in dispatch.operators():
        row = f"{operator:<22}"
        for device in devices:
            first, *others = dispatch.available(operator, device)
            row += f"{' '.join([f'[{first}]', *others]):<34}"
        rows.append(row)
    return "\n".join(row.rstrip() for row in rows)


def main() -> None:
    """Print the table and the line, or with --brief the line alone."""
    parser = argparse.ArgumentParser(prog="python -m fedspa_kernels", description=__doc__)
    parser.add_argument("--brief", action="store_true", help="one line: what is built")
    if not parser.parse_args().brief:
        print(table(), end="\n\n")
    print(brief())


if __name__ == "__main__":
    main()

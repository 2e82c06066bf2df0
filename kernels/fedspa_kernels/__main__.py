"""`python -m fedspa_kernels`: which backends are here, and which one each operator would take."""

import argparse
import sys

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
    rows = [f"{'operator':<24}" + "".join(f"{device:<34}" for device in devices)]
    for operator in dispatch.operators():
        row = f"{operator:<24}"
        for device in devices:
            first = dispatch.preferred(operator, device)
            others = [name for name in dispatch.available(operator, device) if name != first]
            row += f"{' '.join([f'[{first}]', *others]):<34}"
        rows.append(row)
    return "\n".join(row.rstrip() for row in rows)


def missing() -> str:
    """Return a line for each backend that no operator has on a device of this machine, and why."""
    operator = dispatch.operators()[0]
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    reasons = {
        f"no {name} on {device}: {dispatch.why_not(operator, name, device)}": None
        for device in devices
        for name in dispatch.BACKENDS
        if dispatch.why_not(operator, name, device)
    }
    return "\n".join(reasons)


def main() -> None:
    """Print the table and the line, or with --brief the line alone."""
    parser = argparse.ArgumentParser(prog="python -m fedspa_kernels", description=__doc__)
    parser.add_argument("--brief", action="store_true", help="one line: what is built")
    try:
        if not parser.parse_args().brief:
            print(table(), missing(), sep="\n\n", end="\n\n")
        print(brief())
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

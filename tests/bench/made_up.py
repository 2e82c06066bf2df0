"""Results that nobody measured, for the tests of what reads results."""

CPU = {"cpu": "made-up processor", "cores": "2", "platform": "Linux x86_64"}
GPU = CPU | {"gpu": "NVIDIA H200 (140 GiB)"}
CEILINGS = {"copy": 40e9, "matmul": {"float32": 2e11, "bfloat16": 4e11}}


def operator(name, variant="", rows=4096, cols=4096, seconds=0.01, operations=0, **more):
    least = 9 * rows * cols
    sizes = {"rows": rows, "cols": cols, "clients": more.pop("clients", None), "tokens": None}
    ratios = more.pop("ratios", {"pytorch": 30.0})
    times = {"median": seconds, "p20": 0.9 * seconds, "p80": 1.2 * seconds, "runs": 7}
    return {
        "operator": name,
        "variant": variant,
        "shape": f"{rows}x{cols}",
        "sizes": sizes,
        "dtype": "float32",
        "ours": "native",
        "check": f"mask equal to the reference's, {rows * cols:,} entries",
        "times": {"fedspa": times},
        "ratios": ratios,
        "peak_bytes": {"fedspa": 84_000_000},
        "least_bytes": least,
        "operations": operations,
        "bytes_per_s": least / seconds,
        "flop_per_s": operations / seconds,
        "of_copy": least / seconds / CEILINGS["copy"],
        "of_matmul": operations / seconds / 2e11 if operations else None,
        "skipped": {},
        **more,
    }


def model(pipeline, prune, **more):
    common = {"model": "llama-2-7b", "pruner": "sparsegpt", "sparsity": 0.5, "pattern": None}
    common |= {"clients": 1, "samples": 128, "seqlen": 2048, "dtype": "bfloat16"}
    extrapolated = {"seconds": 16 * prune + 64, "how": "as if every block took as long"}
    return {
        **common,
        "pipeline": pipeline,
        "blocks": 2,
        "of_blocks": 32,
        "check": "14 masks meet the target",
        "stages": {"calibrate": 4.0, "prune": prune, "build": 1000.0},
        "peak_bytes": {"host": 2_000_000_000, "device": None},
        "extrapolated": extrapolated,
        **more,
    }


def document(*results, kind="operators", device="cpu", **more):
    return {
        "format": "fedspa-bench",
        "version": 1,
        "kind": kind,
        "created": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef0123-dirty",
        "command": ["bench", kind, "--all"],
        "device": device,
        "machine": GPU if device == "cuda" else CPU,
        "versions": {"python": "3.12.1", "torch": "2.11.0"},
        "threads": 2,
        "ceilings": CEILINGS,
        "results": list(results),
        **more,
    }


def row(page, *cells):
    """Return the cells of the only line that has all of these."""
    (line,) = [x for x in page.splitlines() if x.startswith("|") and all(c in x for c in cells)]
    return [cell.strip() for cell in line.strip("|").split("|")]

"""Five domains of English prose in the package: clients whose data differ, without a download.

Sources and licences stand in corpora/README.md.
"""

from importlib.resources import files
from typing import Literal, get_args

Half = Literal["calibration", "heldout"]

DOMAINS: tuple[str, ...] = ("speeches", "novel", "scripture", "database_manual", "python_manual")


def domain_text(name: str, part: Half = "calibration") -> str:
    """Read an excerpt of one domain: 100,000 characters to calibrate on, or 50,000 to evaluate on.

    name:    one of DOMAINS
    part:    "calibration" or "heldout"; the two come from far apart and share no paragraph
    returns: paragraphs separated by a blank line
    raises:  ValueError for a domain or part that is not there
    """
    if name not in DOMAINS:
        raise ValueError(
            f'domain_text: there is no domain "{name}"; '
            f"the package carries {', '.join(DOMAINS)}, and read_text reads files of your own"
        )
    if part not in get_args(Half):
        raise ValueError(f'domain_text: part is "{part}"; it is "calibration" or "heldout"')
    excerpt = files("fedspa") / "corpora" / f"{name}.{part}.txt"
    return excerpt.read_text(encoding="utf-8").rstrip("\n")

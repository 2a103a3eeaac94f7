"""Names a trained run's experts by the domains of held-out text that choose them.

    python -m scripts.label_experts runs/v31_nano
    python -m scripts.label_experts runs/mine --domains domains.json

Writes expert_domains.json, which `scripts.generate --expert-preference` reads, and a heat map,
expert_domains.png. Without --domains, documents are sorted by the packages of Python's standard
library (evals/expert_domains.py); the file has {"domain": ["beginning of a name", ...], ...}.
"""

import shlex
from pathlib import Path

from evals.expert_domains import (
    FILE,
    STDLIB_DOMAINS,
    THRESHOLD,
    label_experts,
    read_domains,
)
from scripts import command
from scripts.arguments import finite
from train.report import draw_domains


def main(argv: list[str]) -> None:
    parser = command.parser(__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of a trained run")
    parser.add_argument("--domains", type=Path, help="JSON file of domains")
    parser.add_argument("--threshold", type=finite, default=THRESHOLD, help="least NPMI of a label")
    arguments = parser.parse_args(argv)
    domains = read_domains(arguments.domains) if arguments.domains else STDLIB_DOMAINS
    layers = label_experts(arguments.run_dir, domains, arguments.threshold)
    picture = draw_domains(layers, list(domains))
    (arguments.run_dir / f"{picture.name}.png").write_bytes(picture.png)
    for name, npmi_DE in layers.items():
        best = [f"{d} {row_E.argmax()}" for d, row_E in zip(domains, npmi_DE, strict=True)]
        print(f"{name}: the most typical expert of {', '.join(best)}")
    print(f"{arguments.run_dir / FILE} has all of them; ask for a domain's with")
    first = next(iter(domains))
    typed = shlex.quote(str(arguments.run_dir))
    print(f"  python -m scripts.generate {typed} --expert-preference {first} ...")


if __name__ == "__main__":
    command.execute(main)

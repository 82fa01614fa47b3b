"""Put standard input between two comments of a file: `command | python .ci/between.py README.md losses`."""

import sys
from pathlib import Path

file, name = Path(sys.argv[1]), sys.argv[2]
head, opened, remainder = file.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
_, closed, tail = remainder.partition(f"<!-- /{name} -->")
if not (opened and closed):
    sys.exit(f"{file} has no comments <!-- {name} --> and <!-- /{name} -->: put them where the text belongs")
file.write_text(f"{head}{opened}{sys.stdin.read()}{closed}{tail}", encoding="utf-8")

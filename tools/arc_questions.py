"""ARC (Clark et al. 2018, arXiv 1803.05457) as questions for `k2mini eval`, from the instruction data that K2 publishes.

`python tools/arc_questions.py arc_sft.json ARC.jsonl --limit 1000`

The file (huggingface.co/datasets/daven3/geosignal) holds ARC's questions of all parts, Easy and Challenge: a record's
instruction is the question, its input the options, a line each, its output the letter. Records that are not so are counted.
"""

import argparse
import json
import re
from pathlib import Path

OPTION = re.compile(r"^([A-Z])\. (.*)$", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int, help="the first so many records")
    options = parser.parse_args()
    lines, left_out = [], 0
    for record in json.loads(options.records.read_text(encoding="utf-8"))[: options.limit]:
        found = dict(OPTION.findall(record["input"]))
        stem = record["instruction"].strip().removesuffix("Choose from:").strip()
        in_order = [*found] == [chr(ord("A") + place) for place in range(len(found))]
        if stem and in_order and len(found) > 1 and record["output"].strip() in found:
            entry = {"question": stem, "choices": [*found.values()], "answer": record["output"].strip()}
            lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
        else:
            left_out += 1
    options.out.write_text("".join(lines), encoding="utf-8")
    print(f"{options.out}: {len(lines):,} questions; {left_out:,} records have another form")


if __name__ == "__main__":
    main()
